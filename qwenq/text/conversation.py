"""Rows of data sets and messages of clients as documents: text, or a conversation for the model's chat template.

A key that is not understood and could change what a template writes is refused by name; one that could not is let
through. Shapes of rows: plain `text`; `messages` (OpenAI, TRL); `conversations` (ShareGPT); `instruction`, `input` and
`output` (Alpaca); `prompt` and `completion` (TRL: one text, unless a system prompt or the like makes a conversation of
them, or two lists of messages); questions and answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenq.errors import CalibrationError
from qwenq.io.json import shown

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_MEANT = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
_METADATA = frozenset(  # what data sets note beside a message and no template writes
    ("id", "message_id", "uuid", "index", "turn", "created", "created_at", "timestamp", "time", "date",
     "model", "source", "language", "lang", "weight", "train", "loss", "score", "rating", "label", "metadata",
     "meta", "annotations", "hash", "tokens", "num_tokens", "length")
)  # fmt: skip
_SETTINGS_TAKEN = ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "conversations",
                   "continue_final_message", "return_assistant_tokens_mask")  # fmt: skip
_SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "function_call",
}  # fmt: skip
_LISTS = ("messages", "conversations", "conversation")
_PAIRS = (  # question, what is added to it, answer
    ("instruction", "input", "output"), ("instruction", "context", "response"), ("instruction", "input", "response"),
    ("question", "context", "answer"), ("question", "context", "response"), ("prompt", "context", "response"),
    ("query", "context", "response"), ("prompt", "context", "completion"),
)  # fmt: skip
_CONVERSATIONAL = ("system", "system_prompt", "context", "history", "tools", "functions")  # beside prompt, completion
_NOT_TEXT = ("images", "image", "videos", "video", "audios", "audio", "documents", "chosen", "rejected")
COLUMNS = frozenset(
    ("text", "content", "role", "completion", "system", "system_prompt", "history", "tools", "functions",
     "chat_template_kwargs", *_LISTS, *_NOT_TEXT, *(name for pair in _PAIRS for name in pair))
)  # fmt: skip
WANTED = (
    "`text`, `messages`, `conversations` (ShareGPT), `instruction` and `output` (Alpaca), or `prompt` and `completion`"
)


@dataclass(frozen=True, slots=True)
class Document:
    """One document: plain text, or a conversation for the model's chat template."""

    text: str
    messages: tuple[Message, ...] = ()
    tools: tuple[Message, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # what a template is told beside them

    @property
    def words(self) -> str:
        """The text of a conversation, without a template."""
        return self.text or " ".join(m.get("content", "") for m in self.messages)

    @property
    def characters(self) -> int:
        return len(self.text) + sum(len(m.get("content", "")) for m in self.messages)


def read_row(row: Any, where: str) -> Document:
    """The document that a row of a data set is; CalibrationError naming what is not read."""
    if isinstance(row, str):
        return Document(_text(row, where))
    if not isinstance(row, dict):
        raise _unreadable(row, where)
    row = {key: value for key, value in row.items() if value is not None}
    for key in _LISTS:
        turns = row.get(key)
        if isinstance(turns, str) and turns.lstrip().startswith("[{"):  # of tables without nested columns
            turns = _parsed(turns, f"{where}: {key}")
        if isinstance(turns, list) and turns:
            return _conversation(row, [_turn(m, where) for m in turns], where)
    if isinstance(row.get("text"), str):
        return Document(_text(row["text"], where))
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str) and not any(row.get(key) for key in _CONVERSATIONAL):
        return Document(_text(prompt + completion, where))
    if isinstance(prompt, list) and isinstance(completion, list) and prompt and completion:
        return _conversation(row, [*prompt, *completion], where)
    for question, more, answer in _PAIRS:
        if all(isinstance(row.get(key), str) for key in (question, answer)):
            asked = row[question] + (f"\n\n{_text(row[more], where)}" if row.get(more) else "")
            turns = [*_history(row, where), {"role": "user", "content": asked}]
            return _conversation(row, [*turns, {"role": "assistant", "content": row[answer]}], where)
    if isinstance(row.get("content"), str) and "role" not in row:
        return Document(_text(row["content"], where))
    raise _unreadable(row, where)


def read_messages(messages: Sequence[Any], where: str = "messages") -> tuple[Message, ...]:
    """Messages as templates take them: content as text, arguments of tool calls as objects.

    CalibrationError naming what is no message.
    """
    return tuple(_message(message, where) for message in messages)


def read_tools(tools: Any, where: str = "tools") -> tuple[Message, ...]:
    """Tools as templates take them, from a list or from its JSON; CalibrationError for anything else."""
    if isinstance(tools, str):
        tools = _parsed(tools, f"{where}: tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise CalibrationError(f"{where}: tools want a list of objects")
    _text(json.dumps(tools, ensure_ascii=False), where)
    return tuple(tools)


def fitted(document: Document, template: str | None, where: str) -> tuple[Message, ...]:
    """The messages as this template (None: ChatML) is to see them: one that knows no developer sees a system.

    CalibrationError naming what it would leave out or does not know.
    """
    names = frozenset(re.findall(r"\w+", template or ""))
    template_is = "the model's chat template" if template else "ChatML, in place of a chat template,"
    if document.tools and "tools" not in names:
        raise CalibrationError(f"{where}: tools are given, and {template_is} does not render them")
    for key in document.settings:
        if key in _SETTINGS_TAKEN:
            raise CalibrationError(f"{where}: chat_template_kwargs cannot say {shown(key)}")
    messages = []
    for message in document.messages:
        role = message["role"]
        if role == "developer" and role not in names:
            message = {**message, "role": "system"}
        elif role not in ROLES and role not in names:
            raise CalibrationError(
                f"{where}: role {shown(role)!r}, which {template_is} does not name", hint=f"wanted {', '.join(ROLES)}"
            )
        for key, value in message.items():
            if key == "tool_calls" and key not in names:
                raise CalibrationError(f"{where}: a message has tool_calls, and {template_is} does not render them")
            if not (key in _MEANT or key in names or key in _METADATA or value in (None, "", [], {})):
                raise CalibrationError(f"{where}: a message has {shown(key)!r}, which is not understood")
        messages.append(message)
    return tuple(messages)


def _turn(message: Any, where: str) -> Any:
    """A message, from ShareGPT's `from` and `value` too."""
    if not isinstance(message, dict) or "from" not in message or "role" in message:
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    speaker, said = message["from"], message.get("value")
    role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None or not isinstance(said, str):
        raise CalibrationError(
            f"{where}: `from` is {shown(str(speaker))!r} and `value` a {type(said).__name__}",
            hint=f"wanted from: {', '.join(_SPEAKERS)}, and a text",
        )
    if role == "function_call":
        call = _parsed(said, f"{where}: function_call")
        calls = [{"type": "function", "function": c} for c in (call if isinstance(call, list) else [call])]
        return rest | {"role": "assistant", "content": "", "tool_calls": calls}
    return rest | {"role": role, "content": said}


def _history(row: Mapping[str, Any], where: str) -> list[Message]:
    """Earlier turns as LLaMA-Factory's Alpaca rows have them: [[question, answer], ...]."""
    turns: list[Message] = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(said, str) for said in pair)):
            raise CalibrationError(f"{where}: history wants pairs of texts")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _conversation(row: Mapping[str, Any], turns: Sequence[Any], where: str) -> Document:
    preferred = "messages" in row and row["messages"] == row.get("chosen")  # as UltraFeedback has it: they are read
    for key in _NOT_TEXT:
        if row.get(key) and not (preferred and key in ("chosen", "rejected")):
            raise CalibrationError(f"{where}: a conversation with {key}, which is not read", hint="text alone is")
    messages = read_messages(turns, where)
    for system in (row.get("system"), row.get("system_prompt")):
        if system and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": _text(system, where)}, *messages)
        elif system and system != messages[0].get("content"):
            raise CalibrationError(f"{where}: two system prompts that differ, of which one is read")
    tools = read_tools(row["tools"], where) if row.get("tools") else ()
    if row.get("functions"):
        if tools:
            raise CalibrationError(f"{where}: both tools and functions, of which one is read")
        tools = tuple({"type": "function", "function": each} for each in read_tools(row["functions"], where))
    settings = row.get("chat_template_kwargs") or {}
    if not isinstance(settings, dict):
        raise CalibrationError(f"{where}: chat_template_kwargs wants an object")
    return Document("", messages, tools, settings)


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise CalibrationError(f"{where}: messages want role and content, both text")
    found = {key: value for key, value in message.items() if value is not None}
    if calls := found.get("tool_calls"):
        found["tool_calls"] = [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
    elif "tool_calls" in found:
        del found["tool_calls"]
    if "content" in found:
        found["content"] = _content(found["content"], where)
    elif "tool_calls" not in found:
        raise CalibrationError(f"{where}: messages want role and content, both text")
    _text(found["role"], where)
    return {"role": found.pop("role")} | found


def _content(content: Any, where: str) -> str:
    """Text, or the texts of OpenAI's parts, a line each (as vLLM and llama.cpp join them)."""
    if isinstance(content, str):
        return _text(content, where)
    if not isinstance(content, list):
        raise CalibrationError(f"{where}: messages want role and content, both text")
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            problem = f"{where}: content has a part of type {shown(str(kind))!r}"
            raise CalibrationError(problem, hint="text alone is read")
        parts.append(part.get("text"))
    if not all(isinstance(text, str) for text in parts):
        raise CalibrationError(f"{where}: a part of content has no text")
    return _text("\n".join(parts), where)


def _call(call: Any, where: str) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise CalibrationError(f"{where}: tool_calls want a function with a name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", f"{where}: arguments of {shown(function['name'])}")
    if not isinstance(arguments, dict):
        raise CalibrationError(f"{where}: arguments of {shown(function['name'])} are no JSON object")
    function = function | {"arguments": arguments}
    _text(json.dumps(function, ensure_ascii=False), where)
    return call | {"function": function} if "function" in call else {"type": "function", "function": function}


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: not JSON ({shown(str(error))})") from None


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise CalibrationError(f"{where}: a {type(text).__name__}, wanted text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CalibrationError(f"{where}: half of a surrogate pair in it, which is not valid text") from None
    return text


def _unreadable(row: Any, where: str) -> CalibrationError:
    has = f"; it has {shown(', '.join(map(str, row)))}" if isinstance(row, dict) and row else ""
    hint = "an array goes into a .json file" if isinstance(row, list) else f"wanted {WANTED}"
    return CalibrationError(f"{where}: neither `text` nor `messages` in it{has}", hint=hint)
