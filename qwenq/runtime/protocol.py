"""OpenAI's chat and text completions as this server speaks them: what may be asked, and the JSON of the answers."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qwenq.errors import QwenqError, RunError
from qwenq.runtime.chat import Chat
from qwenq.runtime.generate import Sampling, Timing

MAX_STOPS = 4


class _Asked(BaseModel):
    """What both kinds of request share. Fields that would change the answer and are not supported are refused."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=10)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: int | None = None
    logprobs: bool | int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def check(self) -> None:
        """RunError for what this server does not do."""
        unsupported = {
            "n": self.n not in (None, 1),
            "logprobs": bool(self.logprobs),
            "logit_bias": bool(self.logit_bias),
            "presence_penalty": bool(self.presence_penalty),
            "frequency_penalty": bool(self.frequency_penalty),
        }
        for name, wanted in unsupported.items():
            if wanted:
                raise RunError(f"{name} is not supported by this server", hint="leave it out")
        if len(self.stops) > MAX_STOPS or any(not stop for stop in self.stops):
            raise RunError(f"stop: wanted up to {MAX_STOPS} texts, none empty")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.get("include_usage"))

    def sampling(self, chat: Chat, new_tokens: int | None) -> Sampling:
        seed = self.seed if self.seed is not None else time.time_ns() % (1 << 62)
        return chat.sampling(max_new_tokens=new_tokens, temperature=self.temperature, top_p=self.top_p, seed=seed)


class TextPart(BaseModel):
    """One part of a message's content."""

    type: str
    text: str = ""


class ChatMessage(BaseModel):
    """One message; content as text or as a list of text parts."""

    role: str
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, str]:
        parts = self.content if isinstance(self.content, list) else [TextPart(type="text", text=self.content or "")]
        for part in parts:
            if part.type != "text":
                raise RunError(f"a message has a part of type {part.type!r}", hint="this server reads text only")
        return {"role": self.role, "content": "".join(part.text for part in parts)}


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[Any] | None = None

    def prompt_ids(self, chat: Chat) -> list[int]:
        self.check()
        if self.tools:
            raise RunError("tools is not supported by this server", hint="leave it out")
        return chat.prompt_ids([message.plain() for message in self.messages])

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(_Asked):
    """POST /v1/completions."""

    prompt: str | list[int]
    echo: bool = False

    def prompt_ids(self, chat: Chat) -> list[int]:
        self.check()
        if self.echo:
            raise RunError("echo is not supported by this server", hint="leave it out")
        if isinstance(self.prompt, str):
            return chat.text_ids(self.prompt)
        if not all(0 <= token < chat.vocab_size for token in self.prompt):
            raise RunError(f"prompt has a token id outside 0..{chat.vocab_size - 1}")
        return self.prompt

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens


@dataclass(frozen=True)
class Answer:
    """The JSON around one answer, whole or in pieces."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _around(self, choices: list[dict[str, Any]], piece: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if piece else "chat.completion") if self.chat else "text_completion"
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        return {
            "id": prefix + self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices,
        }  # fmt: skip

    def whole(self, text: str, timing: Timing) -> dict[str, Any]:
        body = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": timing.stopped or "stop"}
        return self._around([choice], False) | {"usage": usage(timing)}

    def piece(self, text: str, *, first: bool = False, finish: str | None = None) -> dict[str, Any]:
        delta: dict[str, Any] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        body = {"delta": delta} if self.chat else {"text": text}
        return self._around([{"index": 0, **body, "logprobs": None, "finish_reason": finish}], True)

    def usage_piece(self, timing: Timing) -> dict[str, Any]:
        return self._around([], True) | {"usage": usage(timing)}


def usage(timing: Timing) -> dict[str, Any]:
    """Token counts, the cached ones of the prompt among them."""
    return {
        "prompt_tokens": timing.prompt_tokens,
        "completion_tokens": timing.new_tokens,
        "total_tokens": timing.prompt_tokens + timing.new_tokens,
        "prompt_tokens_details": {"cached_tokens": timing.cached_tokens},
    }


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def said(error: QwenqError) -> str:
    """Message and hint of an error in one line."""
    return f"{error.message} ({error.hint})" if error.hint else error.message
