"""Answers of a model as OpenAI's clients read them: up to a stop text, with log probabilities and calls of tools."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwenq.runtime.generate import Timing

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Likely:
    """A token's UTF-8, which may be a part of a character, and log probability."""

    utf8: bytes
    logprob: float

    @property
    def text(self) -> str:
        return self.utf8.decode(errors="replace")

    @property
    def key(self) -> str:
        """The text, or OpenAI's `bytes:\\xe6` of a part of a character, whose text others have as well."""
        try:
            return self.utf8.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.utf8)

    def to_json(self) -> dict[str, Any]:
        return {"token": self.text, "logprob": self.logprob, "bytes": list(self.utf8)}


@dataclass(frozen=True)
class Drawn:
    """A token of the answer, and the likeliest in its place."""

    token: Likely
    top: tuple[Likely, ...]

    def to_json(self) -> dict[str, Any]:
        return self.token.to_json() | {"top_logprobs": [likely.to_json() for likely in self.top]}


@dataclass(frozen=True)
class Call:
    """A tool call; `arguments` is JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def to_json(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text, a call, or neither when tokens made no text yet."""

    text: str = ""
    call: Call | None = None
    drawn: tuple[Drawn, ...] = ()


class LogProbs:
    """Notes log probabilities of tokens, by the model's logits before anything is done to them."""

    def __init__(self, top: int, bytes_of: Callable[[int], bytes]) -> None:
        self.top, self.bytes_of = top, bytes_of
        self._drawn: list[Drawn] = []

    def note(self, token: int, logits_V: Tensor) -> None:
        logprobs_V = torch.log_softmax(logits_V.float(), 0)
        values, ids = logprobs_V.topk(min(self.top, logprobs_V.numel()))
        top = tuple(Likely(self.bytes_of(i), v) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
        self._drawn.append(Drawn(Likely(self.bytes_of(token), float(logprobs_V[token])), top))

    def take(self) -> tuple[Drawn, ...]:
        """Those since it was asked last."""
        drawn, self._drawn = tuple(self._drawn), []
        return drawn


class StopTexts:
    """Lets text through up to the first stop text; what could begin one is held back until it is known."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.found, self._held = stops, False, ""

    def feed(self, text: str) -> str:
        """Text that can be shown now; sets `found` when the answer ends with it."""
        held = self._held + text
        at = min((at for stop in self.stops if (at := held.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.found = True
            return held[:at]
        keep = max((_begun(held, stop) for stop in self.stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def end(self) -> str:
        return "" if self.found else self._held


class Calls:
    """Finds tool calls as Qwen's and Hermes' templates ask for them: `<tool_call>{"name", "arguments"}</tool_call>`.

    What stands between the marks and is no such call stays text.
    """

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0
        self._held, self._inside = "", False

    def feed(self, text: str) -> Iterator[str | Call]:
        self._held += text
        while True:
            mark = _CLOSE if self._inside else _OPEN
            before, found, after = self._held.partition(mark)
            if not found:
                break
            self._held, was_inside, self._inside = after, self._inside, not self._inside
            yield from self._call(before, _OPEN + before + _CLOSE) if was_inside else self._shown(before)
        if not self._inside:
            keep = _begun(self._held, _OPEN)
            shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            yield from self._shown(shown)

    def end(self) -> Iterator[str | Call]:
        """The text held back; an unterminated call counts if it is complete."""
        yield from self._call(self._held, _OPEN + self._held) if self._inside else self._shown(self._held)

    def _shown(self, text: str) -> Iterator[str]:
        if text and not (self.count and text.isspace()):
            yield text

    def _call(self, text: str, whole: str) -> Iterator[str | Call]:
        try:
            asked = json.loads(text)
            name, arguments = asked["name"], asked.get("arguments", {})
        except (ValueError, RecursionError, LookupError, TypeError):
            yield whole
            return
        if not isinstance(name, str) or not isinstance(arguments, dict):
            yield whole
            return
        self.count += 1
        if self.count <= self.most:
            yield Call(name, json.dumps(arguments, ensure_ascii=False))


def _begun(text: str, mark: str) -> int:
    """Number of characters at the end of `text` that could start `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


@dataclass
class Choice:
    """One answer put together."""

    timing: Timing
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    drawn_characters: int = 0  # of their texts, some of which may be held back or cut off

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.calls += [piece.call] if piece.call else []
        self.drawn += piece.drawn
        self.drawn_characters += sum(len(each.token.text) for each in piece.drawn)

    @property
    def finish(self) -> str:
        return "tool_calls" if self.calls and self.timing.stopped == "stop" else self.timing.stopped


@dataclass(frozen=True)
class Answer:
    """The JSON around the answers to one request, whole or in pieces."""

    model: str
    chat: bool
    logprobs: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        return self._around([self._choice(k, choice) for k, choice in enumerate(choices)], False) | {"usage": usage}

    def begin(self, index: int) -> dict[str, Any]:
        """The first piece of a chat's answer."""
        return self._piece(index, {"delta": {"role": "assistant", "content": ""}})

    def piece(self, index: int, piece: Piece, before: Choice) -> dict[str, Any]:
        """A piece that comes after `before`."""
        logprobs = self._logprobs(piece.drawn, before.drawn_characters) if self.logprobs else None
        if not self.chat:
            return self._piece(index, {"text": piece.text}, logprobs)
        delta: dict[str, Any] = {"content": piece.text} if piece.text or not piece.call else {}
        if piece.call:
            delta["tool_calls"] = [{"index": len(before.calls)} | piece.call.to_json()]
        return self._piece(index, {"delta": delta}, logprobs)

    def end(self, index: int, finish: str) -> dict[str, Any]:
        return self._piece(index, {"delta": {}} if self.chat else {"text": ""}, finish=finish)

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The piece after the last."""
        return self._around([], True) | {"usage": usage}

    def _around(self, choices: list[dict[str, Any]], piece: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if piece else "chat.completion") if self.chat else "text_completion"
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        return {
            "id": prefix + self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices,
        }  # fmt: skip

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        body: dict[str, Any] = {"text": choice.text}
        if self.chat:
            message: dict[str, Any] = {"role": "assistant", "content": choice.text}
            if choice.calls:
                message["content"] = choice.text.strip() or None
                message["tool_calls"] = [call.to_json() for call in choice.calls]
            body = {"message": message}
        logprobs = self._logprobs(choice.drawn, 0) if self.logprobs else None
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": choice.finish}

    def _piece(
        self, index: int, body: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return self._around([{"index": index, **body, "logprobs": logprobs, "finish_reason": finish}], True)

    def _logprobs(self, drawn: Sequence[Drawn], offset: int) -> dict[str, Any]:
        if self.chat:
            return {"content": [each.to_json() for each in drawn]}
        offsets = []
        for each in drawn:
            offsets.append(offset)
            offset += len(each.token.text)
        return {
            "tokens": [each.token.text for each in drawn],
            "token_logprobs": [each.token.logprob for each in drawn],
            "top_logprobs": [{t.key: t.logprob for t in (*each.top, each.token)} for each in drawn],
            "text_offset": offsets,
        }


def usage(prompts: Sequence[int], choices: Sequence[Choice]) -> dict[str, Any]:
    """Token counts, the cached ones of the first answer's prompt among them; each prompt is counted once."""
    made = sum(choice.timing.new_tokens for choice in choices)
    count = max(1, len(choices) // max(1, len(prompts)))
    cached = sum(choice.timing.cached_tokens for choice in choices[::count])
    return {
        "prompt_tokens": sum(prompts),
        "completion_tokens": made,
        "total_tokens": sum(prompts) + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
