"""Ways for a server to fit where it does not as asked, each tried: flags, a shorter context, a padded checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, NamedTuple

from qwenq.planning.case import Case, Workload
from qwenq.planning.placement import ParallelOption, best_option, padded_weights, parallel_options
from qwenq.units import format_tokens

MOST_UTILIZATION = 98  # percent
FEW_SEQUENCES = 4  # at once, where the batch is not larger: of one user, or few
Change = Literal["utilization", "sequences", "kv cache", "eager", "padding"]
FLAGS: tuple[Change, ...] = ("utilization", "sequences", "kv cache", "eager")  # by what they cost
CHANGES: tuple[Change, ...] = (*FLAGS, "padding")


class Escape(NamedTuple):
    """Changes to what was asked, and the workload and layout that then fit."""

    changes: tuple[str, ...]
    work: Workload
    option: ParallelOption
    padded: bool
    shorter: bool = False  # the context is what was changed

    @property
    def text(self) -> str:
        """`--kv-cache-dtype fp8 at 12k`."""
        return " and ".join(self.changes) + ("" if self.shorter else f" at {format_tokens(self.work.context)}")


class Serving(NamedTuple):
    """A case under a server: its layouts, the best of them, and ways to fit where that does not as asked."""

    case: Case
    options: tuple[ParallelOption, ...]
    chosen: ParallelOption | None
    escapes: tuple[Escape, ...]


def serving(case: Case) -> Serving:
    """Every layout of the case under its engine, a server."""
    options = parallel_options(case)
    chosen = best_option(options)
    return Serving(case, options, chosen, () if chosen and chosen.works else server_escapes(case))


@dataclass(frozen=True)
class _Asked:
    """A case, and the tensor-parallel ranks that its weights were padded for (0: they were not)."""

    case: Case
    ranks: int = 0

    def asking(self, **changes: Any) -> _Asked:
        """The same with fields of the workload changed."""
        return replace(self, case=self.case.asking(**changes))

    def utilizing(self, percent: int) -> _Asked:
        """The same with so much of each GPU."""
        return self.asking(gpu_memory_utilization=percent / 100)

    def options(self) -> list[ParallelOption]:
        return [option for option in parallel_options(self.case) if not self.ranks or option.tensor == self.ranks]

    def has(self, change: Change) -> bool:
        """Whether the case already has the change, or its engine knows none."""
        engine = self.case.engine
        if change == "kv cache":
            return self.case.kv_bytes <= engine.kv_bytes(engine.smaller_kv)
        if change == "sequences":
            return not engine.requests_flag or 0 < self.case.work.max_num_seqs <= self.few_sequences
        if change == "eager":
            return self.case.work.enforce_eager or not engine.eager_flag
        return change == "utilization" and round(100 * engine.asked_part(self.case)) >= MOST_UTILIZATION

    @property
    def few_sequences(self) -> int:
        return max(self.case.work.batch, FEW_SEQUENCES)

    def fitting(self) -> ParallelOption | None:
        found = best_option(self.options())
        return found if found and found.works else None

    def longest(self) -> tuple[Workload, ParallelOption] | None:
        """The longest context that any layout allows, and that layout."""
        possible = [option for option in self.options() if not option.reasons]
        found = [(option.longest_context(self.case), option.tensor) for option in possible]
        context, tensor = max(found, default=(0, 0))
        if not context:
            return None
        asked = self.asking(context=context, prompt=0)
        return asked.case.work, next(option for option in asked.options() if option.tensor == tensor)


def server_escapes(case: Case) -> tuple[Escape, ...]:
    """Ways to fit that were tried, easiest first: the server's own flags, a shorter context, a padded checkpoint.

    Of several changes together only those are named of which no part fits by itself.
    """
    asked = _Asked(case)
    kept = list(_minimal(asked))
    flags = [escape for escape in kept if not escape.padded]
    padded = [escape for escape in kept if escape.padded]
    shorter = list(_shorter(asked, ((),) if flags else ((), FLAGS)))
    if not kept and not shorter:
        shorter = list(_shorter(asked, (("padding",), CHANGES)))
    return (*flags, *shorter, *padded)


def least_utilization(case: Case) -> str:
    """The server's flag with the least part of each GPU with which the case fits; empty where none or no server."""
    asked = _Asked(case)
    found = None if not case.engine.utilization_flag or asked.has("utilization") else _with_least(asked, True)
    return "".join(_utilization_said(asked, ("utilization",), found[1])) if found else ""


def _minimal(asked: _Asked) -> Iterator[Escape]:
    """Sets of changes that keep the context, none with a part that fits by itself.

    A set comes after all those of cheaper changes than its costliest: fewer sequences with an fp8 cache before eager.
    """
    done: list[set[Change]] = []
    sizes = range(1, len(CHANGES) + 1)
    sets = sorted((c for n in sizes for c in combinations(CHANGES, n)), key=_costs)
    for together in sets:
        if any(part <= set(together) for part in done):
            continue
        for changed, said in _changed(asked, together):
            found = _with_least(changed, "utilization" in together)
            if found is not None:
                work, option = found
                said = (*_utilization_said(asked, together, option), *said)
                yield Escape(said, work, option, "padding" in together)
                done.append(set(together))
                break


def _costs(together: tuple[Change, ...]) -> list[int]:
    """A set's changes as numbers, costliest first."""
    return sorted(map(CHANGES.index, together), reverse=True)


def _shorter(asked: _Asked, sets: Sequence[tuple[Change, ...]]) -> Iterator[Escape]:
    """The longest context with each of these sets of changes, where it is longer than with those before.

    Of a set what is a change: an fp8 cache stays one.
    """
    longest = 0
    for wanted in sets:
        together = tuple(change for change in wanted if not asked.has(change))
        for changed, said in _changed(asked, together):
            if "utilization" in together:
                changed = changed.utilizing(MOST_UTILIZATION)
            found = changed.longest()
            if found is not None and found[0].context > longest:
                work, option = found
                longest = work.context
                less = f"{asked.case.engine.context_flag} {work.context}"
                changes = (*_utilization_said(asked, together, option), *said, less)
                yield Escape(changes, work, option, changed.ranks > 0, shorter=True)
                break


def _changed(asked: _Asked, together: tuple[Change, ...]) -> Iterator[tuple[_Asked, tuple[str, ...]]]:
    """The question with its cache and weights changed, and how to say that; nothing where a change is none."""
    said: tuple[str, ...] = ()
    if any(asked.has(change) for change in together):
        return
    if "sequences" in together:
        few = asked.few_sequences
        asked, said = asked.asking(max_num_seqs=few), (f"{asked.case.engine.requests_flag} {few}",)
    if "kv cache" in together:
        smaller = asked.case.engine.smaller_kv
        asked, said = asked.asking(kv_dtype=smaller), (*said, f"--kv-cache-dtype {smaller}")
    if "eager" in together:
        asked, said = asked.asking(enforce_eager=True), (*said, asked.case.engine.eager_flag)
    if "padding" not in together:
        yield asked, said
        return
    case = asked.case
    count, width = len(case.hardware.gpus), case.weights.intermediate_size
    for ranks in (n for n in range(count, 1, -1) if count % n == 0):
        padded = padded_weights(case.spec, case.weights, ranks)
        if padded is not None and padded.intermediate_size > width:
            how = f"the FFN padded from {width} to {padded.intermediate_size} (qwenq quantize --pad-for-tp {ranks})"
            yield _Asked(replace(case, weights=padded), ranks), (*said, how)


def _with_least(asked: _Asked, raise_utilization: bool) -> tuple[Workload, ParallelOption] | None:
    """The workload and a layout that fits, at the lowest utilization that does where it may be raised."""
    if not raise_utilization:
        option = asked.fitting()
        return (asked.case.work, option) if option else None
    if asked.utilizing(MOST_UTILIZATION).fitting() is None:
        return None
    lowest = int(100 * asked.case.engine.asked_part(asked.case) + 1e-9) + 1
    for percent in range(lowest, MOST_UTILIZATION + 1):
        tried = asked.utilizing(percent)
        if option := tried.fitting():
            return tried.case.work, option
    return None


def _utilization_said(asked: _Asked, together: tuple[Change, ...], option: ParallelOption) -> tuple[str, ...]:
    if "utilization" not in together or option.memory is None:
        return ()
    return (f"{asked.case.engine.utilization_flag} {option.memory.gpu_memory_utilization:g}",)
