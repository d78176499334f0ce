"""One decoder layer held by every worker, and parts of the token windows sent through it side by side.

A worker is a GPU, or a thread with its share of the CPU's cores: what lies between a layer's matmuls does not keep
cores busy, parts of the tokens do. Workers of one device share the layer's tensors. They take parts of the windows as
ranks do (pipeline/ranks.py), and what they sum up is added in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from qwenq.model.devices import check_gpus
from qwenq.model.layer import Network
from qwenq.model.spec import ModelSpec
from qwenq.pipeline.config import (
    BATCH_TOKENS,
    HELD_VALUES,
    MOST_WORKERS,
    PARTS,
    WORKERS_UP_TO,
    cpu_batch_tokens,
)
from qwenq.pipeline.ranks import ALONE, Ranks
from qwenq.pipeline.shares import Part, Share, parts_of
from qwenq.solver.parallel import side_by_side
from qwenq.solver.triangle import Triangle


def cpu_workers(intermediate_size: int, ranks: int = 1) -> int:
    """Workers of a CPU: as many as share torch's threads evenly, up to MOST_WORKERS, and each pass's parts."""
    if intermediate_size > WORKERS_UP_TO:
        return 1
    threads = torch.get_num_threads()
    return max(n for n in (1, 2, 4) if threads % n == 0 and n <= MOST_WORKERS and n * ranks <= PARTS)


class Workers:
    """A `Network` for each worker on `devices`, for windows of `window_tokens` tokens.

    Workers take the rank's parts of a pass in turn. How many windows go through a layer together depends on the model
    and on the kind of device alone: matmuls of other shapes may end in other bits.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        spec: ModelSpec,
        *,
        dtype: torch.dtype,
        window_tokens: int,
        devices: Sequence[str] = ("cpu",),
        ranks: Ranks = ALONE,
        most: int = MOST_WORKERS,
    ) -> None:
        self.ranks = ranks
        self.devices = tuple(torch.device(device) for device in devices)
        check_gpus(self.devices)
        places = self.devices
        if self.devices == (torch.device("cpu"),):
            places *= min(most, cpu_workers(spec.intermediate_size, ranks.size))
        on_cpu = self.devices[0].type == "cpu" and spec.intermediate_size <= WORKERS_UP_TO
        batch_tokens = cpu_batch_tokens(spec.intermediate_size) if on_cpu else BATCH_TOKENS
        self.windows_each = max(1, batch_tokens // window_tokens)
        self.networks = [Network(config, spec, dtype=dtype, device=device) for device in places]

    def __len__(self) -> int:
        return len(self.networks)

    @property
    def first(self) -> Network:
        return self.networks[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    def fill(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put one layer's parameters in place, converted to the compute dtype; the former layer's are let go."""
        self.first.fill(state)
        for network in self.networks[1:]:
            network.fill(self.first.parameters())

    def set_parameter(self, path: str, value: torch.Tensor) -> None:
        """Replace a parameter of the layer by its relative name."""
        self.first.set_parameter(path, value)
        for network in self.networks[1:]:
            network.set_parameter(path, self.first.parameters()[path])

    def release(self) -> None:
        """Let go of the layer's parameters."""
        for network in self.networks:
            network.release()

    def each(
        self,
        function: Callable[[Network, slice], object],
        share: Share,
        windows: range,
        sums: Sequence[PartSums] = (),
    ) -> None:
        """Call `function` with a worker's network and some of the rank's windows, until all of a pass had their turn.

        sums: what it adds to. After an error, or when interrupted, workers stop behind the windows they are at.
        """
        own, parts = share.parts(windows), len(parts_of(windows))
        count = len(self.networks)
        held = max(1, min([PARTS, *(HELD_VALUES // each.values for each in sums)]))  # parts of a worker, added together
        turn = self.ranks.size * count * held
        stopped = threading.Event()

        def walk(network: Network, own: list[Part]) -> None:
            try:
                for part in own:
                    for each in sums:
                        each.begin(network, part.number)
                    for start in range(part.own.start, part.own.stop, self.windows_each):
                        if stopped.is_set():
                            return
                        function(network, slice(start, min(start + self.windows_each, part.own.stop)))
            except BaseException:
                stopped.set()
                raise

        for first in range(0, parts, turn):
            numbers = range(first, min(first + turn, parts))
            now = [part for part in own if part.number in numbers]
            try:
                side_by_side([partial(walk, network, now[k::count]) for k, network in enumerate(self.networks)])
            finally:
                stopped.set()
            stopped.clear()
            for each in sums:
                each.fold(numbers)

    def run_layer(self, h_NTH: torch.Tensor, share: Share) -> None:
        """Send hidden states [windows, tokens, hidden] through the layer as it stands, in place."""

        def forward(network: Network, part: slice) -> None:
            h_NTH[part].copy_(network.forward(h_NTH[part].to(network.device)))

        for windows in share.passes:
            self.each(forward, share, windows)


class PartSums:
    """A sum over windows, of float32 values in a flat tensor: parts of the windows by themselves, then in their order.

    A part is one worker's, on its device; the sum so far lies on the first one, and of several ranks a piece on each.
    So besides the part that is being added to only one sum is held, whatever the number of parts.
    """

    def __init__(self, workers: Workers, values: int) -> None:
        self.values, self._ranks = values, workers.ranks
        self._device = workers.first.device
        self._at: dict[Network, torch.Tensor] = {}
        self._parts: dict[int, torch.Tensor] = {}
        self._sum: torch.Tensor | None = None

    def begin(self, network: Network, number: int) -> None:
        """What the worker of `network` adds from now on is of part `number`."""
        self._at[network] = self._parts[number] = torch.zeros(self.values, dtype=torch.float32, device=network.device)

    def of(self, network: Network) -> torch.Tensor:
        """The part that the worker of `network` adds to."""
        return self._at[network]

    def fold(self, numbers: range) -> None:
        """Add parts that are done, this rank's and others'."""
        self._at.clear()
        self._sum = self._ranks.fold(self._sum, self._parts, numbers, self.values, self._device)
        self._parts.clear()

    def total(self) -> torch.Tensor:
        """The sum so far, on the first worker's device; more may be added, so it is not to be changed."""
        assert self._sum is not None, "nothing was added"
        return self._ranks.whole(self._sum, self.values)

    def take(self) -> torch.Tensor:
        """The sum, which is let go of here."""
        total, self._sum = self.total(), None
        return total


def summed_products(
    workers: Workers,
    h_NTH: torch.Tensor,
    share: Share,
    width: int,
    entering: Callable[[Network, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Sum of x x' over a rank's windows: a Triangle's values on the first worker's device.

    entering: a network's x [..., width] of hidden states, in its dtype.
    """
    triangle = Triangle(width)
    sums = PartSums(workers, triangle.size)

    def collect(network: Network, part: slice) -> None:
        h = h_NTH[part].to(device=network.device, dtype=network.dtype)
        triangle.add_products(sums.of(network), entering(network, h))

    for windows in share.passes:
        workers.each(collect, share, windows, [sums])
    return sums.take()
