"""Other engines that may be installed, behind the same few lines: prompt ids in, new ids out."""

from __future__ import annotations

import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch

from qwenq.errors import RunError, UsageError
from qwenq.planning.engines.torch import OWN
from qwenq.runtime.generate import GREEDY_BELOW, Sampling, Timing


class ForeignEngine(ABC):
    """An engine of others in this process. Tokens come all at once, when done."""

    name: ClassVar[str]  # of its package, and of --engine
    extra: ClassVar[str]  # of this project, which installs it
    own_kv: ClassVar[bool] = False  # its KV caches have names of their own, and one may be asked for
    notes: tuple[str, ...] = ()  # a line for each thing that is otherwise than one might expect

    @abstractmethod
    def __init__(self, directory: Path, context: int = 0, kv_dtype: str = "auto") -> None:
        """Load a checkpoint; `context`: most tokens of a sequence, 0 for the engine's own limit."""

    @abstractmethod
    def generate(
        self, ids: Sequence[int], sampling: Sampling, stop_ids: frozenset[int], timing: Timing
    ) -> Iterator[int]:
        """New tokens after a prompt's, without the one that stops; `timing` is filled in."""

    def close(self) -> None:  # noqa: B027 - nothing to let go of is the usual case
        """Let go of what was loaded, once nothing more is asked."""

    @classmethod
    def check_installed(cls) -> None:
        """RunError for an engine that is not."""
        if importlib.util.find_spec(cls.name) is None:
            raise RunError(
                f"--engine {cls.name}: not installed", hint=f"pip install 'qwenq[{cls.extra}]', or leave it out"
            )


def foreign_engine(name: str) -> type[ForeignEngine] | None:
    """The engine called so, None for this project's own; UsageError for one that is unknown."""
    if name == OWN.name:
        return None
    from qwenq.runtime.llamacpp import LlamaCppServer  # which is one of them

    engines: dict[str, type[ForeignEngine]] = {
        kind.name: kind for kind in (GptqModelEngine, VllmEngine, LlamaCppServer)
    }
    if name not in engines:
        raise UsageError(f"unknown engine {name!r}", hint=f"one of {', '.join((OWN.name, *engines))}")
    return engines[name]


class GptqModelEngine(ForeignEngine):
    """GPTQModel with the kernel it picks itself (Marlin, ExLlama, torch)."""

    name = "gptqmodel"
    extra = "gptq"

    def __init__(self, directory: Path, context: int = 0, kv_dtype: str = "auto") -> None:
        from gptqmodel import GPTQModel

        self.model = GPTQModel.load(str(directory))

    def generate(
        self, ids: Sequence[int], sampling: Sampling, stop_ids: frozenset[int], timing: Timing
    ) -> Iterator[int]:
        network = self.model.model
        device = next(network.parameters()).device
        torch.manual_seed(sampling.seed)
        greedy = sampling.temperature < GREEDY_BELOW
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        drawn |= {"min_p": sampling.min_p} if sampling.min_p else {}
        clock = time.perf_counter()
        out = network.generate(
            torch.tensor([list(ids)], device=device),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not greedy,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=sorted(stop_ids),
            pad_token_id=min(stop_ids, default=0),
            **({} if greedy else drawn),
        )
        new = out[0, len(ids) :].tolist()
        timing.prompt_tokens, timing.new_tokens = len(ids), len(new)
        timing.decode_seconds = time.perf_counter() - clock  # the prompt included: it is not told apart
        timing.stopped = "stop" if new and new[-1] in stop_ids else "length"
        yield from (token for token in new if token not in stop_ids)


class VllmEngine(ForeignEngine):
    """vLLM with its own defaults."""

    name = "vllm"
    extra = "vllm"

    def __init__(self, directory: Path, context: int = 0, kv_dtype: str = "auto") -> None:
        from vllm import LLM

        self.model = LLM(model=str(directory), **({"max_model_len": context} if context else {}))

    def generate(
        self, ids: Sequence[int], sampling: Sampling, stop_ids: frozenset[int], timing: Timing
    ) -> Iterator[int]:
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            stop_token_ids=sorted(stop_ids),
        )
        clock = time.perf_counter()
        done = self.model.generate({"prompt_token_ids": list(ids)}, parameters)[0].outputs[0]
        timing.prompt_tokens, timing.new_tokens = len(ids), len(done.token_ids)
        timing.decode_seconds = time.perf_counter() - clock
        timing.stopped = "length" if done.finish_reason == "length" else "stop"
        yield from (token for token in done.token_ids if token not in stop_ids)
