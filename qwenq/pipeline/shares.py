"""Which windows of a job each rank has: the rule that decides in which order sums are taken, whoever takes them.

A layer is gone through in passes. The windows of a pass are cut into parts, which ranks take in turn. No torch here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from qwenq.errors import PlanError
from qwenq.pipeline.config import PARTS


def passes(windows: int, corrected: int = 0) -> list[range]:
    """Ranges of windows that go through a layer one after the other: both halves of the first `corrected`, then the
    rest.

    Whoever replays a layer goes through it in the same ranges: parts of other sizes may end in other last bits.
    """
    cuts = [0, corrected // 2, corrected, windows]
    return [range(start, stop) for start, stop in itertools.pairwise(cuts) if start < stop]


def parts_of(windows: range) -> list[range]:
    """Windows that are summed apart: at most PARTS ranges, as even as they can be, the larger ones first."""
    count = min(PARTS, len(windows))
    starts = [windows.start]
    for k in range(count):
        starts.append(starts[-1] + len(windows) // count + (k < len(windows) % count))
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


@dataclass(frozen=True)
class Part:
    """A part of the windows of a pass: its number, and where its hidden states lie among the rank's own."""

    number: int
    own: slice


@dataclass(frozen=True)
class Share:
    """The windows whose hidden states a rank keeps: of each pass every `size`-th part, from part `rank` on.

    passes: ranges of a job's windows that go through a layer one after the other. most: windows there are, where
    that is fewer than these, the first ones.
    """

    passes: tuple[range, ...]
    rank: int = 0
    size: int = 1
    most: int | None = None

    @cached_property
    def windows(self) -> list[int]:
        """The job's numbers of the rank's windows, in the order of their hidden states."""
        return [w for windows in self.passes for part in self._of_rank(windows, self.rank) for w in part]

    def parts(self, windows: range) -> list[Part]:
        """The rank's parts of one pass."""
        at = sum(len(part) for p in self.passes[: self.passes.index(windows)] for part in self._of_rank(p, self.rank))
        found = []
        for number, part in enumerate(parts_of(windows)):
            if number % self.size == self.rank and (count := len(self._there(part))):
                found.append(Part(number, slice(at, at + count)))
                at += count
        return found

    def of_rank(self, rank: int) -> Share:
        """Another rank's share of the same."""
        return Share(self.passes, rank, self.size, self.most)

    @property
    def places(self) -> Iterator[tuple[int, slice]]:
        """Of all windows in the job's order, part by part: the rank that has them, and where among its own."""
        of_ranks = [self.of_rank(rank) for rank in range(self.size)]
        for windows in self.passes:
            found = {part.number: (rank, part.own) for rank, e in enumerate(of_ranks) for part in e.parts(windows)}
            yield from (found[number] for number in sorted(found))

    def batches(self, windows: int) -> Iterator[slice]:
        """So many of the rank's own windows at a time, of one part each."""
        for each in self.passes:
            for part in self.parts(each):
                for start in range(part.own.start, part.own.stop, windows):
                    yield slice(start, min(start + windows, part.own.stop))

    def up_to(self, most: int) -> Share:
        """The same of the first windows alone."""
        return Share(self.passes, self.rank, self.size, most)

    @property
    def count(self) -> int:
        """Windows of all ranks."""
        return sum(len(self._there(windows)) for windows in self.passes)

    def _of_rank(self, windows: range, rank: int) -> list[range]:
        return [self._there(part) for part in parts_of(windows)[rank :: self.size]]

    def _there(self, part: range) -> range:
        return part if self.most is None else range(min(part.start, self.most), min(part.stop, self.most))


NO_WINDOWS = Share(())


def refuse_few(ranks: int, **windows: int | None) -> None:
    """PlanError where windows are fewer than ranks: some would have nothing to do. windows: counts, by kind."""
    for kind, count in windows.items():
        if count is not None and count < ranks:
            raise PlanError(f"{count} {kind} windows for {ranks} ranks", hint="fewer ranks, or more windows of text")
