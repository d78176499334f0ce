"""Quantize one decoder layer in one pass: each token goes through each linear once, after that linear is quantized.

h -> norm -> [q k v] -> attention -> [o] -> + -> norm -> [gate up] -> act * -> [down] -> +
     collect, solve               collect, solve    collect, solve          collect, solve
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwenq.errors import CheckpointError
from qwenq.formats.base import Recipe, Scheme, get_format
from qwenq.model.layer import Network
from qwenq.model.spec import UNITS, LinearSpec, ModelSpec
from qwenq.pipeline.monitor import StageClock
from qwenq.pipeline.preflight import BATCH_TOKENS, PULL_SHARE
from qwenq.pipeline.workers import LaneSums, Replicas
from qwenq.results import LayerResult
from qwenq.solver.equalize import FoldedLayer
from qwenq.solver.gptq import DAMP_PERCENT, Shortfall, add_to_hessian, decibel, mirror_upper
from qwenq.solver.grid import QTensor
from qwenq.solver.parallel import solve_rows

MOMENT_STRIDE = 16  # of the tokens from which down's input moments are estimated: they count by their 16th root


@dataclass(frozen=True)
class SolverOptions:
    """What the solver is asked to do, the same for every layer."""

    method: str = "gptq"  # gptq, or rtn: round to nearest with absmax scales, the baseline, without calibration
    damp_percent: float = DAMP_PERCENT  # share of the mean Hessian diagonal added to the diagonal
    fold: bool = True  # fold channel scales into norms and up_proj (quant/fold.py)
    pull: float = 1.0  # how far o and down are moved towards what the 16-bit stream has, before they are rounded
    pull_share: float = PULL_SHARE  # of the calibration windows that stream has: it costs a pass of theirs


def batches(windows: int, tokens: int, budget_tokens: int = BATCH_TOKENS) -> Iterator[slice]:
    """Slices over the first dimension that hold about `budget_tokens` tokens each."""
    step = max(1, budget_tokens // tokens)
    for start in range(0, windows, step):
        yield slice(start, min(start + step, windows))


def passes(windows: int, pulled: int = 0) -> list[range]:
    """Ranges of windows that go through a layer one after the other: both halves of the pulled ones, then the rest.

    Whoever replays a layer goes through it in the same ranges: parts of other sizes may end in other last bits.
    """
    cuts = [0, pulled // 2, pulled, windows]
    return [range(start, stop) for start, stop in itertools.pairwise(cuts) if start < stop]


@dataclass(frozen=True)
class CalibrationStreams:
    """Hidden states of the calibration tokens, [windows, tokens, hidden], and flat working space of the same dtype.

    `scratch` holds at least windows * tokens * max(q_size + hidden, intermediate) values.
    """

    quantized_NTH: Tensor  # through quantized layers
    original_NTH: Tensor | None  # the first windows, through 16-bit layers; None when nothing is pulled there
    scratch: Tensor

    def buffer(self, width: int, after: int = 0) -> Tensor:
        """[windows, tokens, width] of the scratch, behind `after` values a token."""
        windows, tokens, _ = self.quantized_NTH.shape
        count = windows * tokens
        return self.scratch[count * after : count * (after + width)].view(windows, tokens, width)


@dataclass
class BlockSolver:
    """Quantizes the layer that `replicas` hold, unit by unit; each sees what those before it make of the tokens.

    folded: the layer's tensors with nothing folded yet; afterwards `folded.kept` has what is to be written as it is.
    Streams are advanced in place to the output of the layer. Afterwards the replicas hold the dequantized weights.
    """

    replicas: Replicas
    spec: ModelSpec
    layer: int
    recipe: Recipe
    folded: FoldedLayer
    streams: CalibrationStreams
    options: SolverOptions
    clock: StageClock
    packed: dict[str, Tensor] = field(default_factory=dict)
    results: list[LayerResult] = field(default_factory=list)

    def run(self) -> tuple[dict[str, Tensor], list[LayerResult]]:
        """Packed tensors by full name, and one result a linear."""
        h_NTH = self.h_NTH
        attended = self.streams.buffer(self.spec.q_size)
        middle = self.streams.buffer(self.spec.hidden_size, after=self.spec.q_size)
        gated = self.streams.buffer(self.spec.intermediate_size)  # takes the place of both
        original = self.streams.original_NTH
        if original is not None:
            self._advance_original(original, middle)
        self._take_kept()

        def attention_input(network: Network, part: slice) -> Tensor:
            return network.attention_input(_on(network, h_NTH[part]))

        def attend(network: Network, part: slice) -> Tensor:
            a = network.attend(attention_input(network, part))
            attended[part] = a.to(attended.device)
            return a

        down_moments = LaneSums(self.replicas, 1, self.spec.intermediate_size)

        def after_attention(network: Network, part: slice) -> Tensor:
            h = network.add_attention(_on(network, h_NTH[part]), _on(network, attended[part]))
            h_NTH[part] = h.to(h_NTH.device)
            x = network.mlp_input(h)
            if self._folds("down"):  # scales of down's inputs are scales of up's rows: needed before up is rounded
                sample = x[:, ::MOMENT_STRIDE]
                down_moments.of(network).add_(network.gate(sample).float().square().sum((0, 1)))
            return x

        def gate(network: Network, part: slice) -> Tensor:
            m = network.gate(network.mlp_input(_on(network, h_NTH[part])))
            gated[part] = m.to(gated.device)
            return m

        def add_mlp(network: Network, part: slice) -> None:
            h = network.add_mlp(_on(network, h_NTH[part]), _on(network, gated[part]))
            h_NTH[part] = h.to(h_NTH.device)

        self._solve_inner("qkv", attention_input)
        after_o = None if original is None else middle[: len(original)]
        self._solve_outer("o", attend, Network.add_attention, after_o)
        self._solve_inner("gate_up", after_attention, down_moments)
        self._solve_outer("down", gate, Network.add_mlp, original)
        self._pass(add_mlp)
        return self.packed, self.results

    @property
    def h_NTH(self) -> Tensor:
        return self.streams.quantized_NTH

    def _advance_original(self, original_NTH: Tensor, middle_NTH: Tensor) -> None:
        """Send the 16-bit stream through the 16-bit layer, in place; `middle` gets its states after attention."""

        def advance(network: Network, part: slice) -> None:
            h = _on(network, original_NTH[part])
            h = network.add_attention(h, network.attend(network.attention_input(h)))
            middle_NTH[part] = h.to(middle_NTH.device)
            original_NTH[part] = network.add_mlp(h, network.gate(network.mlp_input(h))).to(original_NTH.device)

        self._pass(advance, passes(len(original_NTH), len(original_NTH)))

    def _pass(self, function: Callable[[Network, slice], object], ranges: Sequence[range] | None = None) -> None:
        original = self.streams.original_NTH
        if ranges is None:
            ranges = passes(len(self.h_NTH), 0 if original is None else len(original))
        with self.clock.time("forward"):
            for windows in ranges:
                self.replicas.each(function, windows)

    def _in_lane(self, stage: str, network: Network) -> AbstractContextManager[None]:
        lanes = len(self.replicas.networks)
        return self.clock.time_in_lane(stage, of="forward", lanes=lanes, device=network.device)

    def _solve_inner(
        self, unit: str, produce: Callable[[Network, slice], Tensor], down_moments: LaneSums | None = None
    ) -> None:
        """Solve a unit that reads a norm: q, k, v or gate, up."""
        members = _members(self.spec, self.layer, unit)
        if not _by_scheme(members, self.recipe):
            return self._pass(produce)
        hessians = LaneSums(self.replicas, self.spec.hidden_size, self.spec.hidden_size)

        def collect(network: Network, part: slice) -> None:
            x = produce(network, part)
            with self._in_lane("hessian", network):
                add_to_hessian(hessians.of(network), x)

        self._pass(collect)
        hessian = hessians.total()
        with self.clock.time(f"solve {unit}"):
            if down_moments is not None and self._folds("down"):
                self.folded.fold_down(down_moments.total()[0])
            if self._folds(unit):
                scales_I = self.folded.fold_norm(unit, hessian.diagonal())
                hessian.div_(scales_I[:, None]).div_(scales_I)
            self._take_kept()
            self._solve(members, hessian, None)

    def _solve_outer(
        self,
        unit: str,
        produce: Callable[[Network, slice], Tensor],
        add: Callable[[Network, Tensor, Tensor], Tensor],
        wanted_NTH: Tensor | None,
    ) -> None:
        """Solve a unit whose output `add` adds to the residual stream, o or down.

        Tokens count by the inverse of the mean square of their states after it: what the next norm makes of an error.
        The states that the first windows should come to are `wanted_NTH`; they say what the unrounded weights are
        short of.
        """
        ((path, lin),) = _members(self.spec, self.layer, unit).items()
        if self.recipe.scheme_of(lin) is None:
            return self._pass(produce)
        self.replicas.set_parameter(f"{path}.weight", self.folded.weight(path))
        hessians = LaneSums(self.replicas, lin.in_features, lin.in_features)

        def add_weighted(network: Network, x: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
            root_T1 = (after.flatten(0, 1).float().square().mean(-1, keepdim=True) + 1e-8).rsqrt()
            x_TI = (x.flatten(0, 1) * root_T1).to(x.dtype)
            add_to_hessian(hessians.of(network), x_TI)
            return x_TI, root_T1

        def collect(network: Network, part: slice) -> None:
            x = produce(network, part)
            after = add(network, _on(network, self.h_NTH[part]), x)
            with self._in_lane("hessian", network):
                add_weighted(network, x, after)

        shortfall, pulled = None, 0
        if wanted_NTH is not None:
            pulled = len(wanted_NTH)
            products = LaneSums(self.replicas, lin.in_features, lin.out_features)
            found = []
            for windows in passes(pulled, pulled):
                self._add_wanted(lin, path, produce, add_weighted, wanted_NTH, windows, products)
                hessian = hessians.total()  # of the same tokens
                with self.clock.time("pull"):
                    mirror_upper(hessian)
                    short = torch.addmm(products.total(), hessian, self.folded.weight(path).T, alpha=-1)
                    found.append(short.mul_(len(self.h_NTH) / pulled))
            shortfall = Shortfall(whole_IO=found[1], half_IO=found[0])
            del products
        self._pass(collect, [range(pulled, len(self.h_NTH))])
        hessian = hessians.total()
        with self.clock.time(f"solve {unit}"):
            self._solve({path: lin}, hessian, None if shortfall is None else {lin.name: shortfall})

    def _add_wanted(
        self,
        lin: LinearSpec,
        path: str,
        produce: Callable[[Network, slice], Tensor],
        add_weighted: Callable[[Network, Tensor, Tensor], tuple[Tensor, Tensor]],
        wanted_NTH: Tensor,
        windows: range,
        products: LaneSums,
    ) -> None:
        """Add `windows` of `wanted` to the Hessian and to sums of x y', y being what a linear's outputs should be."""

        def collect(network: Network, part: slice) -> None:
            x, wanted = produce(network, part), _on(network, wanted_NTH[part])
            with self._in_lane("hessian", network):
                x_TI, root_T1 = add_weighted(network, x, wanted)
            with self._in_lane("pull", network):
                missing = wanted.flatten(0, 1).float() - _on(network, self.h_NTH[part]).flatten(0, 1)
                if lin.bias:
                    missing -= self.folded.state[f"{path}.bias"].to(missing)
                products.of(network).add_(x_TI.T @ missing.mul_(root_T1).to(x.dtype))

        self._pass(collect, [windows])

    def _solve(
        self,
        members: Mapping[str, LinearSpec],
        hessian: Tensor,
        shortfalls: Mapping[str, Shortfall] | None,
    ) -> None:
        schemes = _by_scheme(members, self.recipe)
        for scheme, group in schemes.items():
            own = hessian if scheme == list(schemes)[-1] else hessian.clone()
            weights = {lin.name: self.folded.weight(path) for path, lin in group}
            solved = _solve(group, weights, own, shortfalls, scheme, self.options, self.replicas.devices)
            for (path, _), (qtensor, _) in zip(group, solved, strict=True):
                self.replicas.set_parameter(path + ".weight", qtensor.dequantize())
                self.folded.release(path)
            _keep(solved, self.recipe, self.packed, self.results)

    def _take_kept(self) -> None:
        """What is not quantized is computed with as it will be stored."""
        for name, tensor in self.folded.kept.items():
            self.replicas.set_parameter(name, tensor)

    def _folds(self, unit: str) -> bool:
        """Whether scales are folded into the inputs of a unit: all that they scale has to be rounded afterwards."""
        scaled = ("mlp.up_proj", "mlp.down_proj") if unit == "down" else UNITS[unit]
        linears = {lin.name: lin for lin in self.spec.layer_linears(self.layer)}
        return self.options.fold and all(
            self.recipe.scheme_of(linears[f"model.layers.{self.layer}.{path}"]) is not None for path in scaled
        )


def _on(network: Network, tensor: Tensor) -> Tensor:
    return tensor.to(network.device)


def round_block(
    spec: ModelSpec, layer: int, recipe: Recipe, folded: FoldedLayer, options: SolverOptions
) -> tuple[dict[str, Tensor], list[LayerResult]]:
    """Round a layer's linears to nearest, without calibration; returns what `BlockSolver.run` does."""
    packed: dict[str, Tensor] = {}
    results: list[LayerResult] = []
    for unit in UNITS:
        for scheme, group in _by_scheme(_members(spec, layer, unit), recipe).items():
            weights = {lin.name: folded.weight(path) for path, lin in group}
            solved = _solve(group, weights, None, None, scheme, options, [torch.device(folded.device)])
            _keep(solved, recipe, packed, results)
    return packed, results


def _members(spec: ModelSpec, layer: int, unit: str) -> dict[str, LinearSpec]:
    """Linears of one unit, by their name within the layer."""
    prefix = f"model.layers.{layer}."
    return {lin.name.removeprefix(prefix): lin for lin in spec.layer_linears(layer) if lin.unit == unit}


def _by_scheme(members: Mapping[str, LinearSpec], recipe: Recipe) -> dict[Scheme, list[tuple[str, LinearSpec]]]:
    """Members of a unit grouped by scheme; those that stay in 16 bit are left out."""
    groups: dict[Scheme, list[tuple[str, LinearSpec]]] = {}
    for path, lin in members.items():
        scheme = recipe.scheme_of(lin)
        if scheme is not None:
            groups.setdefault(scheme, []).append((path, lin))
    return groups


def _solve(
    group: list[tuple[str, LinearSpec]],
    weights: Mapping[str, Tensor],
    hessian: Tensor | None,
    shortfalls: Mapping[str, Shortfall] | None,
    scheme: Scheme,
    options: SolverOptions,
    devices: Sequence[torch.device],
) -> list[tuple[QTensor, LayerResult]]:
    """Solve linears that share inputs and scheme; in their order."""
    if hessian is not None and not bool(torch.isfinite(hessian.diagonal()).all()):
        names = ", ".join(lin.kind for _, lin in group)
        raise CheckpointError(
            f"layer {group[0][1].layer}: the activations entering {names} are not finite",
            hint="compute in bfloat16 or float32 (--calibration-dtype), and check the source's weights",
        )
    solved = solve_rows(
        devices,
        weights,
        hessian,
        scheme.grid(),
        damp_percent=options.damp_percent,
        method=options.method,
        shortfalls=shortfalls,
        pull=options.pull,
    )
    rows = []
    for _, lin in group:
        qtensor, stats = solved[lin.name]
        error_db = None if hessian is None else stats.error_db
        row = LayerResult(lin.name, scheme.label, error_db, stats.weight_error_db, stats.damp_percent, stats.fallback)
        rows.append((qtensor, row))
    return rows


def _keep(
    solved: list[tuple[QTensor, LayerResult]],
    recipe: Recipe,
    packed: dict[str, Tensor],
    results: list[LayerResult],
) -> None:
    form = get_format(recipe.format)
    for qtensor, result in solved:
        results.append(result)
        tensors = form.pack(qtensor, form.version(recipe))
        packed |= {f"{result.name}.{part}": tensor.cpu() for part, tensor in tensors.items()}


def round_layer(
    spec: ModelSpec, layer: int, recipe: Recipe, state: Mapping[str, torch.Tensor], device: str
) -> tuple[dict[str, torch.Tensor], list[LayerResult]]:
    """Round a layer's linears by a format's own functions: their packed tensors by full name, and one result a linear.

    state: the layer's weights in the dtype they would be stored in, under names relative to the layer: bitsandbytes
    keeps that dtype and computes in it.
    """
    form = get_format(recipe.format)
    packed: dict[str, torch.Tensor] = {}
    results: list[LayerResult] = []
    prefix = f"model.layers.{layer}."
    for lin in spec.layer_linears(layer):
        scheme = recipe.scheme_of(lin)
        if scheme is None:
            continue
        path = lin.name.removeprefix(prefix) + ".weight"
        weight = state[path].to(device)
        tensors = form.round(weight, lin)
        found = form.unpack(tensors, scheme, lin)
        dequantized = found.dequantize() if isinstance(found, QTensor) else found.float()
        error = float((weight.float() - dequantized).square().sum(dtype=torch.float64))
        error_db = decibel(error, float(weight.float().square().sum(dtype=torch.float64)))
        results.append(LayerResult(lin.name, scheme.label, None, error_db, 0.0))
        packed |= {f"{lin.name}.{part}": tensor.cpu().contiguous() for part, tensor in tensors.items()}
    return packed, results
