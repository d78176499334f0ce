"""OpenAI's requests as this server takes them: a field that could change the answer and is not read is refused.

Beside OpenAI's own fields, vLLM's for sampling and stopping are read. Null is the same as leaving a field out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qwenq.errors import QwenqError, RunError
from qwenq.io.json import shown
from qwenq.runtime.chat import Chat
from qwenq.runtime.generate import Sampling
from qwenq.text.conversation import Message, read_tools

MAX_STOPS = 256
MAX_STOP_CHARACTERS = 8192  # of all of them
MAX_ANSWERS = 128  # of one request
MAX_LOGPROBS = 20
MAX_BIASED = 1024
_RANDOM_SEED = -1  # vLLM's and llama.cpp's word for none
_WHAT_FITS = -1  # llama.cpp's word for no limit

# Fields that cannot change an answer's text.
_IGNORED = frozenset(
    ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "prediction", "request_id", "priority", "cache_salt", "cache_prompt",
     "timings_per_token", "return_progress", "spaces_between_special_tokens", "keep_alive")
)  # fmt: skip
# Fields that are let through at the value that asks for nothing.
_UNASKED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,), "echo": (False,), "suffix": ("",), "response_format": ({"type": "text"},),
    "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "verbosity": ("medium",),
    "include_reasoning": (True,),
    "use_beam_search": (False,), "length_penalty": (1.0,), "early_stopping": (False,),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "allowed_token_ids": ([],), "bad_words": ([],), "documents": ([],),
    "return_token_ids": (False,), "return_tokens_as_token_ids": (False,), "structured_outputs": ({},),
    "grammar": ("",), "json_schema": ({},), "mirostat": (0,), "typical_p": (1.0,), "tfs_z": (1.0,), "top_a": (0,),
    "repeat_penalty": (1.0,), "dry_multiplier": (0,), "xtc_probability": (0,), "dynatemp_range": (0,),
}  # fmt: skip
_INSTEAD = {
    "repeat_penalty": "repetition_penalty is", "enable_thinking": "chat_template_kwargs takes it",
    "n_predict": "max_tokens is", "functions": "tools is", "function_call": "tools is", "best_of": "n is",
    "reasoning_effort": "chat_template_kwargs takes what the model's template reads",
    "thinking": "chat_template_kwargs takes what the model's template reads",
    "echo": "the prompt is what was sent",
}  # fmt: skip
_Token = Annotated[int, Field(ge=0, lt=1 << 31)]


class Refused(RunError):
    """A request that this server does not do, for the field `param`."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.param, self.code = param, code


@dataclass(frozen=True)
class Order:
    """A request understood: `count` answers to each prompt, all drawn in the same way."""

    prompts: tuple[tuple[int, ...], ...]
    samplings: tuple[Sampling, ...]  # one a prompt; the n-th answer draws with the n-th seed after its own
    count: int
    stops: tuple[str, ...]
    logprobs: int | None  # of so many likely tokens beside the one that was drawn
    tools: bool  # calls are looked for in the answer
    one_call: bool


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # of OpenAI's: random characters beside the text
    continuous_usage_stats: Literal[False] | None = None  # vLLM's


class _Request(BaseModel):
    """Fields of both kinds of request."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=_WHAT_FITS)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[_Token, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stop_token_ids: list[_Token] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=None, ge=1, le=MAX_ANSWERS)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def _stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def _limit(self) -> int | None:
        return self.max_tokens

    def _check(self, chat: Chat) -> None:
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _IGNORED or value in _UNASKED.get(name, ()):
                continue
            raise Refused(f"{shown(name, 60)} is not supported by this server", param=shown(name, 60),
                          hint=_INSTEAD.get(name, "leave it out"))  # fmt: skip
        if self._limit == 0:
            raise Refused("max_tokens is 0, wanted at least 1, or none for the rest of the context", param="max_tokens")
        stops = self._stops
        if len(stops) > MAX_STOPS or sum(map(len, stops)) > MAX_STOP_CHARACTERS or not all(stops):
            wanted = f"up to {MAX_STOPS} texts, of {MAX_STOP_CHARACTERS} characters in all, none empty"
            raise Refused(f"stop: wanted {wanted}", param="stop")
        if len(self.stop_token_ids or ()) > MAX_STOPS:
            raise Refused(f"stop_token_ids: wanted up to {MAX_STOPS}", param="stop_token_ids")
        if len(self.logit_bias or ()) > MAX_BIASED:
            raise Refused(f"logit_bias: wanted up to {MAX_BIASED} tokens", param="logit_bias")
        for name in ("stop_token_ids", "logit_bias"):
            _check_tokens(list(getattr(self, name) or ()), chat.vocab_size, name)

    def _sampling(self, chat: Chat, context: int, prompt: int) -> Sampling:
        limit = self._limit
        if limit is None:
            limit = chat.sampling().usual(prompt, context, otherwise=context)
        elif limit == _WHAT_FITS:
            limit = max(1, context - prompt)
        if prompt < 1:
            raise Refused("the prompt is empty", param="prompt")
        if prompt + limit > context:
            over = prompt + limit - context
            raise Refused(
                f"prompt of {prompt} tokens and {limit} new ones: {prompt + limit} in a context of {context}",
                param="max_tokens" if over < limit else None,
                code="context_length_exceeded",
                hint=f"max_tokens {limit - over} or less" if over < limit else "a shorter prompt",
            )
        if (self.min_tokens or 0) > limit:
            said = f"min_tokens is {self.min_tokens}, more than the {limit} an answer may have"
            raise Refused(said, param="min_tokens")
        asked = None if self.seed == _RANDOM_SEED else self.seed
        return chat.sampling(
            max_new_tokens=limit,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=time.time_ns() % (1 << 62) if asked is None else asked,
            repeatable=asked is not None,
            min_new_tokens=self.min_tokens,
            stop_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )

    def _order(
        self, chat: Chat, context: int, prompts: list[list[int]], logprobs: int | None, calls: tuple[bool, bool]
    ) -> Order:
        count = self.n or 1
        if len(prompts) * count > MAX_ANSWERS:
            raise Refused(f"{len(prompts)} prompts, {count} answers each: wanted at most {MAX_ANSWERS}", param="n")
        samplings = tuple(self._sampling(chat, context, len(ids)) for ids in prompts)
        return Order(tuple(map(tuple, prompts)), samplings, count, self._stops, logprobs, *calls)


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=_WHAT_FITS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None

    @property
    def _limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def order(self, chat: Chat, context: int) -> Order:
        """The order for the model; a QwenqError for anything unsupported or invalid."""
        self._check(chat)
        if self.tool_choice not in (None, "auto", "none"):
            raise Refused("tool_choice: auto and none are supported by this server", param="tool_choice",
                          hint="leave it out")  # fmt: skip
        if self.top_logprobs and not self.logprobs:
            raise Refused("top_logprobs wants logprobs: true", param="top_logprobs")
        if self.add_special_tokens:
            raise Refused("add_special_tokens: the chat template writes them", param="add_special_tokens",
                          hint="leave it out")  # fmt: skip
        if not chat.has_template:
            raise Refused(
                "the model has no chat template (a base model?)", param="messages",
                hint="/v1/completions continues a text",
            )  # fmt: skip
        tools: tuple[Message, ...] = ()
        if self.tools and self.tool_choice != "none":
            tools = read_tools(self.tools)
        ids = chat.prompt_ids(self.messages, tools, self.chat_template_kwargs or {})
        logprobs = self.top_logprobs or 0 if self.logprobs else None
        return self._order(chat, context, [ids], logprobs, (bool(tools), self.parallel_tool_calls is False))


class TextRequest(_Request):
    """POST /v1/completions: a text, token ids, or several of either."""

    prompt: str | list[_Token] | list[str] | list[list[_Token]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = None

    def order(self, chat: Chat, context: int) -> Order:
        """The order for the model; a QwenqError for anything unsupported or invalid."""
        self._check(chat)
        if self.add_special_tokens is False:
            raise Refused("add_special_tokens: false is not supported by this server", param="add_special_tokens",
                          hint="send token ids")  # fmt: skip
        prompts: list[list[int]] = []
        for prompt in self._prompts:
            if isinstance(prompt, str):
                prompts.append(chat.text_ids(prompt))
            else:
                _check_tokens(prompt, chat.vocab_size, "prompt")
                prompts.append(prompt)
        return self._order(chat, context, prompts, self.logprobs, (False, False))

    @property
    def _prompts(self) -> list[str | list[int]]:
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        prompts: list[Any] = list(self.prompt) if several else [self.prompt]
        if len(prompts) > MAX_ANSWERS:
            raise Refused(f"{len(prompts)} prompts, wanted at most {MAX_ANSWERS}", param="prompt")
        return prompts


def said(error: QwenqError) -> str:
    """Message and hint of an error in one line."""
    return f"{error.message} ({error.hint})" if error.hint else error.message


def _check_tokens(ids: list[int], vocab_size: int, name: str) -> None:
    if ids and max(ids) >= vocab_size:
        raise Refused(f"{name} has a token id outside 0..{vocab_size - 1}", param=name)
