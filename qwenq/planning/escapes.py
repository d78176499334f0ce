"""What makes vLLM fit where it does not as asked: flags, a shorter context, a padded checkpoint; each tried first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from qwenq.model.spec import ModelSpec
from qwenq.planning.engines import Engine
from qwenq.planning.parallel import ParallelOption, best_option, largest_vllm_context, padded_weights, parallel_options
from qwenq.planning.rig import Rig
from qwenq.planning.terms import Workload
from qwenq.planning.weights import Weights
from qwenq.units import format_tokens

MOST_UTILIZATION = 98  # percent
Change = Literal["utilization", "kv cache", "padding"]
CHANGES: tuple[Change, ...] = ("utilization", "kv cache", "padding")


@dataclass(frozen=True)
class Escape:
    """Changes to what was asked, and the workload and layout that then fit."""

    changes: tuple[str, ...]
    work: Workload
    option: ParallelOption
    padded: bool

    @property
    def text(self) -> str:
        """`--kv-cache-dtype fp8 at 12k`."""
        shorter = self.changes[-1].startswith("--max-model-len")
        return " and ".join(self.changes) + ("" if shorter else f" at {format_tokens(self.work.context)}")


@dataclass(frozen=True)
class _Asked:
    """A model, its weights and the rest of a question about vLLM."""

    spec: ModelSpec
    weights: Weights
    engine: Engine
    work: Workload
    rig: Rig
    ranks: int = 0  # tensor-parallel ranks that the weights were padded for

    def options(self, work: Workload) -> list[ParallelOption]:
        found = parallel_options(self.spec, self.weights, self.engine, work, self.rig)
        return [option for option in found if not self.ranks or option.tensor == self.ranks]

    def has(self, change: Change) -> bool:
        """Whether that is so already."""
        if change == "kv cache":
            return self.work.kv_dtype == "fp8"
        return change == "utilization" and round(100 * self.work.gpu_memory_utilization) >= MOST_UTILIZATION

    def fitting(self, work: Workload) -> ParallelOption | None:
        found = best_option(self.options(work))
        return found if found and found.works else None

    def longest(self) -> tuple[Workload, ParallelOption] | None:
        """The longest context that any layout allows, and that layout."""
        found = []
        for option in self.options(self.work):
            if not option.reasons:
                context = largest_vllm_context(self.spec, self.weights, self.engine, self.work, self.rig, option)
                found.append((context, option.tensor))
        context, tensor = max(found, default=(0, 0))
        if not context:
            return None
        work = replace(self.work, context=context, prompt=0)
        return work, next(option for option in self.options(work) if option.tensor == tensor)


def vllm_escapes(spec: ModelSpec, weights: Weights, engine: Engine, work: Workload, rig: Rig) -> tuple[Escape, ...]:
    """Ways to fit that were tried, easiest first: vLLM's own flags, a shorter context, then a padded checkpoint.

    Of several changes together only those are named of which no part fits by itself.
    """
    asked = _Asked(spec, weights, engine, work, rig)
    kept = list(_minimal(asked))
    flags = [escape for escape in kept if not escape.padded]
    padded = [escape for escape in kept if escape.padded]
    shorter = list(_shorter(asked, ((),) if flags else ((), ("utilization", "kv cache"))))
    if not kept and not shorter:
        shorter = list(_shorter(asked, (("padding",), CHANGES)))
    return (*flags, *shorter, *padded)


def _minimal(asked: _Asked) -> Iterator[Escape]:
    """Sets of changes that keep the context, smallest first, none with a part that fits by itself."""
    done: list[set[Change]] = []
    for size in range(1, len(CHANGES) + 1):
        for together in combinations(CHANGES, size):
            if any(part <= set(together) for part in done):
                continue
            for changed, said in _changed(asked, together):
                found = _with_least(changed, "utilization" in together)
                if found is not None:
                    work, option = found
                    yield Escape((*_utilization_said(together, option), *said), work, option, "padding" in together)
                    done.append(set(together))
                    break


def _shorter(asked: _Asked, sets: Sequence[tuple[Change, ...]]) -> Iterator[Escape]:
    """The longest context with each of these sets of changes, where it is longer than with those before.

    Of a set what is a change: an fp8 cache stays one.
    """
    longest = 0
    for wanted in sets:
        together = tuple(change for change in wanted if not asked.has(change))
        for changed, said in _changed(asked, together):
            if "utilization" in together:
                changed = replace(changed, work=_utilized(changed.work, MOST_UTILIZATION))
            found = changed.longest()
            if found is not None and found[0].context > longest:
                work, option = found
                longest = work.context
                changes = (*_utilization_said(together, option), *said, f"--max-model-len {work.context}")
                yield Escape(changes, work, option, changed.ranks > 0)
                break


def _changed(asked: _Asked, together: tuple[Change, ...]) -> Iterator[tuple[_Asked, tuple[str, ...]]]:
    """The question with its cache and weights changed, and how to say that; nothing where a change is none."""
    said: tuple[str, ...] = ()
    if any(asked.has(change) for change in together):
        return
    if "kv cache" in together:
        asked, said = replace(asked, work=replace(asked.work, kv_dtype="fp8")), ("--kv-cache-dtype fp8",)
    if "padding" not in together:
        yield asked, said
        return
    count, width = len(asked.rig.gpus), asked.weights.intermediate_size
    for ranks in (n for n in range(count, 1, -1) if count % n == 0):
        padded = padded_weights(asked.spec, asked.weights, ranks)
        if padded is not None and padded.intermediate_size > width:
            how = f"the FFN padded from {width} to {padded.intermediate_size} (qwenq quantize --pad-for-tp {ranks})"
            yield replace(asked, weights=padded, ranks=ranks), (*said, how)


def _with_least(asked: _Asked, raise_utilization: bool) -> tuple[Workload, ParallelOption] | None:
    """The workload and a layout that fits, at the lowest utilization that does where it may be raised."""
    if not raise_utilization:
        option = asked.fitting(asked.work)
        return (asked.work, option) if option else None
    if asked.fitting(_utilized(asked.work, MOST_UTILIZATION)) is None:
        return None
    lowest = int(100 * asked.work.gpu_memory_utilization + 1e-9) + 1
    for percent in range(lowest, MOST_UTILIZATION + 1):
        work = _utilized(asked.work, percent)
        if option := asked.fitting(work):
            return work, option
    return None


def _utilized(work: Workload, percent: int) -> Workload:
    return replace(work, gpu_memory_utilization=percent / 100)


def _utilization_said(together: tuple[Change, ...], option: ParallelOption) -> tuple[str, ...]:
    if "utilization" not in together or option.memory is None:
        return ()
    return (f"--gpu-memory-utilization {option.memory.gpu_memory_utilization:g}",)
