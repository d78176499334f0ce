"""One decoder layer held by every worker, and parts of the token windows sent through it side by side.

A worker is a GPU, or a thread with its share of the CPU's cores: what lies between a layer's matmuls does not keep
cores busy, parts of the tokens do. Workers of one device share the layer's tensors.
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
from qwenq.pipeline.config import BATCH_TOKENS, MOST_WORKERS, WORKERS_UP_TO
from qwenq.solver.parallel import side_by_side


def cpu_workers(windows: int, intermediate_size: int) -> int:
    """Workers for so many windows at a time: as many as share these and torch's threads evenly, up to MOST_WORKERS."""
    if intermediate_size > WORKERS_UP_TO:
        return 1
    threads = torch.get_num_threads()
    return max(n for n in range(1, MOST_WORKERS + 1) if threads % n == 0 and max(1, windows) % n == 0)


class Workers:
    """A `Network` for each worker on `devices`, for windows of `window_tokens` tokens.

    A GPU takes BATCH_TOKENS tokens at a time; so do the workers of a CPU together.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        spec: ModelSpec,
        *,
        dtype: torch.dtype,
        window_tokens: int,
        devices: Sequence[str] = ("cpu",),
    ) -> None:
        self.devices = tuple(torch.device(device) for device in devices)
        check_gpus(self.devices)
        self.windows_each = max(1, BATCH_TOKENS // window_tokens)
        places = self.devices
        if self.devices == (torch.device("cpu"),):
            places *= cpu_workers(self.windows_each, spec.intermediate_size)
            self.windows_each //= len(places)
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

    def each(self, function: Callable[[Network, slice], object], windows: range) -> None:
        """Call `function` with a worker's network and a part of the windows, until every part had its turn.

        After an error, or when interrupted, workers stop behind the part they are at. Which worker gets which parts
        does not depend on time, so what a worker sums up is the same in every run.
        """
        starts = windows[:: self.windows_each]
        parts = [slice(start, min(start + self.windows_each, windows.stop)) for start in starts]

        stopped = threading.Event()

        def walk(network: Network, own: list[slice]) -> None:
            try:
                for part in own:
                    if stopped.is_set():
                        return
                    function(network, part)
            except BaseException:
                stopped.set()
                raise

        count = len(self.networks)
        try:
            side_by_side([partial(walk, network, parts[k::count]) for k, network in enumerate(self.networks)])
        finally:
            stopped.set()

    def run_layer(self, h_NTH: torch.Tensor, passes: Sequence[range] | None = None) -> None:
        """Send hidden states [windows, tokens, hidden] through the layer as it stands, in place.

        passes: ranges of windows that go one after the other, to be divided among workers as they were before.
        """

        def forward(network: Network, part: slice) -> None:
            h_NTH[part] = network.forward(h_NTH[part].to(network.device)).to(h_NTH.device)

        for windows in passes or [range(len(h_NTH))]:
            self.each(forward, windows)


_ROWS_MOVED = 1024


class WorkerSums:
    """A sum over tokens, float32 [rows, columns]: each worker adds to a part of its own, on its device."""

    def __init__(self, workers: Workers, rows: int, columns: int) -> None:
        self._networks, self._shape = workers.networks, (rows, columns)
        self._parts: dict[Network, torch.Tensor] = {}

    def of(self, network: Network) -> torch.Tensor:
        """The part of the worker that `network` belongs to."""
        if network not in self._parts:
            self._parts[network] = torch.zeros(*self._shape, dtype=torch.float32, device=network.device)
        return self._parts[network]

    def total(self) -> torch.Tensor:
        """The sum so far, on the first worker's device: its part from now on."""
        total = self.of(self._networks[0])
        for network in self._networks[1:]:  # in the same order each time
            if network in self._parts:
                part = self._parts.pop(network)
                for start in range(0, len(part), _ROWS_MOVED):  # a whole copy beside the sum may not fit
                    total[start : start + _ROWS_MOVED] += part[start : start + _ROWS_MOVED].to(total.device)
        return total
