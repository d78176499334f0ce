"""Tokens out of a running model: the prompt in chunks into the cache, then one token at a time, sampled or greedy."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwenq.errors import RunError, UsageError
from qwenq.io.tensors import all_finite
from qwenq.pipeline.monitor import memory_errors
from qwenq.planning.engines.torch import QWENQ_PREFILL_CHUNK
from qwenq.runtime.cache import FP8, KvCache
from qwenq.runtime.cpu_kernels import KernelRefused
from qwenq.runtime.decode import DecodeStep, why_not
from qwenq.runtime.model import RunningModel, compute_device

DEFAULT_NEW_TOKENS = 512
GREEDY_BELOW = 1e-5  # a temperature that leaves one token only; vLLM's bound too
KV_DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FP8}


@dataclass(frozen=True)
class Sampling:
    """Sampling of the next token. `temperature` 0 (or below GREEDY_BELOW) takes the most likely one; `top_k` 0 and
    `top_p` 1 keep all.

    `max_new_tokens` 0: as many as `usual` says.
    """

    max_new_tokens: int = 0
    usual_new_tokens: int = 0  # of the model's own settings; 0: none
    usual_length: int = 0  # of prompt and answer, likewise
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0  # of the likeliest token's probability
    repetition_penalty: float = 1.0  # of every token there is
    presence_penalty: float = 0.0  # off the logits of new tokens, once
    frequency_penalty: float = 0.0  # and as often as they came
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    min_new_tokens: int = 0  # before one that ends the answer
    stop_ids: frozenset[int] = frozenset()  # beside the session's
    ignore_eos: bool = False  # the session's stop tokens are tokens like others
    repeatable: bool = False  # the same tokens whatever the cache holds: it is used for whole prefill chunks alone

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 0, "0 or more"),
            ("usual_new_tokens", self.usual_new_tokens, self.usual_new_tokens >= 0, "0 or more"),
            ("usual_length", self.usual_length, self.usual_length >= 0, "0 or more"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("presence_penalty", self.presence_penalty, -100 <= self.presence_penalty <= 100, "-100 to 100"),
            ("frequency_penalty", self.frequency_penalty, -100 <= self.frequency_penalty <= 100, "-100 to 100"),
            ("min_new_tokens", self.min_new_tokens, self.min_new_tokens >= 0, "0 or more"),
            ("seed", self.seed, -(1 << 63) <= self.seed < 1 << 63, "a whole number of 64 bits"),
        )
        for name, value, good, wanted in checks:
            if not good:
                raise UsageError(f"{name} is {value}, wanted {wanted}")

    def usual(self, prompt: int, context: int, otherwise: int = DEFAULT_NEW_TOKENS) -> int:
        """New tokens where no number is asked for: the model's own, or `otherwise`, as far as `context` and the model's
        own length allow; at least one.
        """
        room = min(context, self.usual_length or context) - prompt
        return max(1, min(self.usual_new_tokens or otherwise, room))


@dataclass
class Timing:
    """Tokens and seconds of a generation, filled in while it runs."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, kept from the turn before
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0  # of the tokens after the first
    stopped: str = ""  # stop, length

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second, cached ones not counted."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_speed(self) -> float:
        """Tokens a second after the first."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "new_tokens": self.new_tokens,
            "prefill_seconds": round(self.prefill_seconds, 4),
            "decode_seconds": round(self.decode_seconds, 4),
            "prefill_tokens_per_second": round(self.prefill_speed, 3),
            "decode_tokens_per_second": round(self.decode_speed, 3),
            "stopped": self.stopped,
        }


def new_tokens(prompt: int, sampling: Sampling, context: int) -> int:
    """Number of tokens that may follow a prompt, as asked for or as usual.

    RunError when prompt and answer do not fit the context.
    """
    if prompt < 1:
        raise RunError("the prompt is empty", hint="give it at least one token")
    new = sampling.max_new_tokens or sampling.usual(prompt, context)
    if prompt + new > context:
        over = prompt + new - context
        raise RunError(
            f"prompt of {prompt} tokens and {new} new ones: {prompt + new} in a context of {context}, {over} too many",
            hint=f"--max-new-tokens {new - over}" if over < new else "a shorter prompt or a larger --context",
        )
    return new


@dataclass
class Session:
    """One sequence at a time on a model: its cache is kept, so a prompt that begins like the last one is cheap."""

    model: RunningModel
    max_model_len: int
    prefill_chunk: int = QWENQ_PREFILL_CHUNK
    kv_dtype: str = "auto"
    stop_ids: frozenset[int] = frozenset()
    graphs: bool = True  # replay a token's step as a CUDA graph where that can be
    _step: DecodeStep | None = field(default=None, repr=False)
    _refused: str = field(default="", repr=False)  # why the kernels of a step can't be launched
    _cache: KvCache | None = field(default=None, repr=False)
    _ids: list[int] = field(default_factory=list, repr=False)  # what the cache holds
    _answer: int = field(default=0, repr=False)  # number of the answer it was filled for
    _whole: int = field(default=0, repr=False)  # how many of these were computed in whole chunks, as without a cache

    def __post_init__(self) -> None:
        if self.max_model_len > self.model.spec.extended_context:
            raise RunError(
                f"--context {self.max_model_len}: the model reads {self.model.spec.extended_context} tokens",
                hint=f"ask for at most {self.model.spec.extended_context}",
            )
        if self.prefill_chunk < 1:
            raise UsageError(f"--prefill-chunk {self.prefill_chunk}: wanted at least 1")

    def generate(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        timing: Timing | None = None,
        stopped: Callable[[], bool] = lambda: False,
        listen: Callable[[int, Tensor], None] = lambda token, logits_V: None,
    ) -> Iterator[int]:
        """Yield new token ids until a stop token (not yielded), the limit, or `stopped()`.

        listen: gets each of them first, with the model's logits, float32 [vocabulary]. RunError for what does not fit
        the context or the memory of a device, and for an answer that goes on after another one was begun.
        """
        timing = timing if timing is not None else Timing()
        limit = new_tokens(len(ids), sampling, self.max_model_len)
        if max(ids) >= self.model.spec.vocab_size:
            raise RunError(
                f"token id {max(ids)} is outside the vocabulary of {self.model.spec.vocab_size}",
                hint="the tokenizer belongs to another model",
            )
        generator = torch.Generator().manual_seed(sampling.seed)
        ends = sampling.stop_ids | (frozenset() if sampling.ignore_eos else self.stop_ids)
        seen = list(ids)
        self._answer = answer = self._answer + 1
        clock = time.perf_counter()
        logits = self.prefill(ids, timing, stopped, repeatable=sampling.repeatable)
        timing.prefill_seconds = time.perf_counter() - clock
        if logits is None:
            return
        clock = time.perf_counter()
        for count in range(limit):
            barred = ends if count < sampling.min_new_tokens else frozenset()
            token = next_token(logits, seen, sampling, generator, new=count, barred=barred)
            if token in ends:
                timing.stopped = "stop"
                return
            seen.append(token)
            timing.new_tokens += 1
            timing.decode_seconds = time.perf_counter() - clock
            listen(token, logits)
            yield token
            if stopped():
                return
            if count + 1 < limit:
                if self._answer != answer:
                    raise RunError(
                        "another answer was started meanwhile, and the cache holds its tokens",
                        hint="finish an answer before starting the next, or load the model twice",
                    )
                if count == 0:
                    clock = time.perf_counter()
                logits = self.forward([token])
        timing.stopped = "length"

    def prefill(
        self,
        ids: Sequence[int],
        timing: Timing,
        stopped: Callable[[], bool] = lambda: False,
        *,
        repeatable: bool = False,
    ) -> Tensor | None:
        """Bring the cache to `ids` and return the last position's logits [vocabulary]; None when `stopped()`.

        How many tokens are computed at once decides in what order a sum is taken, and so the last bits of keys, values
        and logits. `repeatable`: the same bits as without a cache.
        """
        kept = self._common(ids, repeatable)
        timing.prompt_tokens, timing.cached_tokens = len(ids), kept
        logits = None
        for start in range(kept, len(ids), self.prefill_chunk):
            if stopped():
                return None
            logits = self.forward(ids[start : start + self.prefill_chunk])
            if start == self._whole and len(self._ids) == start + self.prefill_chunk:
                self._whole += self.prefill_chunk
        assert logits is not None
        return logits

    @torch.inference_mode()
    def forward(self, ids: Sequence[int]) -> Tensor:
        """Append tokens to the cache; the last one's logits, float32 [vocabulary] on the CPU."""
        cache = self._cache
        assert cache is not None
        device, spec = self.model.device, self.model.spec
        need = len(ids) * 2 * (3 * spec.intermediate_size + 5 * spec.hidden_size)
        hint = "a smaller --prefill-chunk or --context"
        with memory_errors(f"computing {len(ids)} tokens", device, need, hint):
            found = self._one(ids[0]) if len(ids) == 1 else None
            if found is not None:
                logits = found.float().cpu()
            else:
                input_ids = torch.tensor([list(ids)], device=device)
                out = self.model.network(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                logits = out.logits[0, -1].float().cpu()
        self._ids += ids
        return logits

    def _one(self, token: int) -> Tensor | None:
        """Logits behind one token by this project's kernels; None where transformers' modules compute it."""
        if self._step is None or self._cache is None:
            return None
        length = self._cache.get_seq_length()
        try:
            return self._step(token)
        except KernelRefused as reason:
            self._cache.crop(length)
            self._step, self._refused = None, str(reason)
            warnings.warn(f"tokens by {self.decoding}", RuntimeWarning, 2)
            return None

    def release(self) -> None:
        """Let go of the cache."""
        self._cache, self._step, self._ids = None, None, []

    @property
    def decoding(self) -> str:
        """How a token is computed, and why not faster."""
        why = self._refused or why_not(self.model, KV_DTYPES[self.kv_dtype])
        if why:
            return f"transformers' modules: {why}"
        if self.model.device.type == "cpu":
            return "this project's CPU kernels"
        if self._step is not None and self._step.reason:
            return f"Triton kernels: {self._step.reason}"
        return "a CUDA graph" if self.graphs else "Triton kernels"

    def _new_cache(self) -> KvCache:
        spec, places = self.model.spec, self.model.device_map
        devices = [compute_device(places[spec.layer_name(k)], places) for k in range(spec.num_hidden_layers)]
        dtype = KV_DTYPES[self.kv_dtype] or self.model.dtype
        doing, hint = f"allocating a cache of {self.max_model_len} tokens", "a smaller --context"
        with memory_errors(doing, devices[0], None, hint):
            return KvCache(devices, self.max_model_len, spec.num_key_value_heads, spec.head_dim, dtype)

    def _common(self, ids: Sequence[int], repeatable: bool) -> int:
        """Cut the cache to the longest common beginning with `ids`, leaving at least one token to compute.

        `repeatable`: in whole chunks.
        """
        if self._cache is None:
            self._cache, self._ids = self._new_cache(), []
            if not self._refused and not why_not(self.model, KV_DTYPES[self.kv_dtype]):
                self._step = DecodeStep(self.model, self._cache)
                self._step.graphed &= self.graphs
        kept = 0
        for old, new in zip(self._ids, ids[:-1], strict=False):
            if old != new:
                break
            kept += 1
        self._whole = min(self._whole, kept // self.prefill_chunk * self.prefill_chunk)
        kept = self._whole if repeatable else kept
        self._cache.crop(kept)
        self._ids = self._ids[:kept]
        return kept


def next_token(
    logits_V: Tensor,
    seen: Sequence[int],
    sampling: Sampling,
    generator: torch.Generator,
    *,
    new: int = 0,
    barred: Collection[int] = (),
) -> int:
    """The next token id from float32 logits, none of `barred`; RunError when they are not numbers.

    seen: prompt and answer so far; its last `new` tokens are the answer's.
    """
    if not all_finite(logits_V):
        raise RunError(
            "the model's logits are not finite", hint="the checkpoint may be damaged: check it with `qwenq eval`"
        )
    if sampling.repetition_penalty != 1.0:
        ids = torch.tensor(sorted(set(seen)))
        chosen = logits_V[ids]
        factor = sampling.repetition_penalty
        logits_V = logits_V.index_put((ids,), torch.where(chosen > 0, chosen / factor, chosen * factor))
    if new and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.tensor(seen[-new:]).unique(return_counts=True)
        logits_V = logits_V.index_add(0, ids, -(sampling.presence_penalty + sampling.frequency_penalty * counts))
    if sampling.logit_bias:
        bias = torch.tensor(list(sampling.logit_bias.values()), dtype=logits_V.dtype)
        logits_V = logits_V.index_add(0, torch.tensor(list(sampling.logit_bias)), bias)
    if barred:
        known = [token for token in barred if token < logits_V.numel()]
        logits_V = logits_V.index_fill(0, torch.tensor(known, dtype=torch.int64), -torch.inf)
    if sampling.temperature < GREEDY_BELOW:
        return int(logits_V.argmax())
    if sampling.top_k:  # before sorting, which takes 16 ms for a vocabulary of 152,000
        scores_V, order_V = torch.topk(logits_V, min(sampling.top_k, logits_V.numel()))
    else:
        scores_V, order_V = torch.sort(logits_V, descending=True, stable=True)
    p_V = torch.softmax((scores_V - scores_V[0]) / sampling.temperature, 0)
    if sampling.top_p < 1:
        kept_V = p_V.cumsum(0) - p_V < sampling.top_p
        kept_V[0] = True  # a top_p too small for a float32 keeps the likeliest too
        p_V = torch.where(kept_V, p_V, 0.0)
    if sampling.min_p:
        p_V = torch.where(p_V >= sampling.min_p * p_V[0], p_V, 0.0)
    return int(order_V[torch.multinomial(p_V, 1, generator=generator)])
