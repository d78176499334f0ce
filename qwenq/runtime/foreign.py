"""Other engines that may be installed, behind the same few lines: prompt ids in, new ids out."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from qwenq.errors import RunError, UsageError
from qwenq.runtime.generate import DEFAULT_NEW_TOKENS, GREEDY_BELOW, Sampling, Timing

ENGINES = ("qwenq", "gptqmodel", "vllm")


def check_engine(name: str) -> None:
    """UsageError for an engine that is unknown, RunError for one that is not installed."""
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}", hint=f"one of {', '.join(ENGINES)}")
    if name != "qwenq" and importlib.util.find_spec(name) is None:
        extra = {"gptqmodel": "gptq", "vllm": "vllm"}[name]
        raise RunError(f"--engine {name}: it is not installed", hint=f"pip install 'qwenq[{extra}]', or leave it out")


class GptqModelEngine:
    """GPTQModel with the kernel it picks itself (Marlin, ExLlama, torch). Tokens come all at once, when done."""

    def __init__(self, directory: Path) -> None:
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
        clock = time.perf_counter()
        out = network.generate(
            torch.tensor([list(ids)], device=device),
            max_new_tokens=sampling.max_new_tokens or DEFAULT_NEW_TOKENS,
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


class VllmEngine:
    """vLLM in this process; the plan's flags as arguments. Tokens come all at once, when done."""

    def __init__(self, directory: Path, **arguments: Any) -> None:
        from vllm import LLM

        self.model = LLM(model=str(directory), **arguments)

    def generate(
        self, ids: Sequence[int], sampling: Sampling, stop_ids: frozenset[int], timing: Timing
    ) -> Iterator[int]:
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=sampling.max_new_tokens or DEFAULT_NEW_TOKENS,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
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
