"""Quantize one decoder layer in one pass: each token goes through each linear once, after that linear is quantized.

h -> norm -> [q k v] -> attention -> [o] -> + -> norm -> [gate up] -> act * -> [down] -> +
     collect, solve               collect, solve    collect, solve          collect, solve
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from qwenq.errors import CheckpointError
from qwenq.formats.storage import pack_linear
from qwenq.preflight import BATCH_TOKENS, PULL_SHARE
from qwenq.quant.fold import FoldedLayer
from qwenq.quant.gptq import DAMP_PERCENT, QTensor, add_to_hessian, mirror_upper, solve_unit
from qwenq.results import LayerResult
from qwenq.scheme import Recipe, Scheme
from qwenq.spec import UNITS, LinearSpec, ModelSpec
from qwenq.stream import Network

MOMENT_STRIDE = 16  # of the tokens from which down's input moments are estimated: they count by their 16th root


@dataclass(frozen=True)
class SolverOptions:
    """What the solver is asked to do, the same for every layer."""

    method: str = "gptq"  # gptq, or rtn: round to nearest with absmax scales, the baseline, without calibration
    damp_percent: float = DAMP_PERCENT  # share of the mean Hessian diagonal added to the diagonal
    fold: bool = True  # fold channel scales into norms and up_proj (quant/fold.py)
    pull: float = 0.5  # how far o and down are moved towards what the 16-bit stream has, before they are rounded
    pull_share: float = PULL_SHARE  # of the calibration windows that stream has: it costs a pass of theirs


@dataclass
class StageClock:
    """Seconds by stage of the current layer; a stage within a stage counts for itself alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    _inner_s: list[float] = field(default_factory=lambda: [0.0])

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inner_s.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed - self._inner_s.pop()
            self._inner_s[-1] += elapsed


def batches(windows: int, tokens: int, budget_tokens: int = BATCH_TOKENS) -> Iterator[slice]:
    """Slices over the first dimension that hold about `budget_tokens` tokens each."""
    step = max(1, budget_tokens // tokens)
    for start in range(0, windows, step):
        yield slice(start, min(start + step, windows))


def run_layer(network: Network, h_NTH: torch.Tensor) -> None:
    """Send hidden states through the layer as it stands, in place."""
    for part in batches(h_NTH.shape[0], h_NTH.shape[1]):
        h_NTH[part] = network.forward(h_NTH[part].to(network.device)).to(h_NTH.device)


@dataclass(frozen=True)
class CalibrationStreams:
    """Hidden states of the calibration tokens, [windows, tokens, hidden], and flat working space of the same dtype.

    `scratch` holds at least windows * tokens * max(q_size + hidden, intermediate) values.
    """

    quantized_NTH: torch.Tensor  # through quantized layers
    original_NTH: torch.Tensor | None  # the first windows, through 16-bit layers; None when nothing is pulled there
    scratch: torch.Tensor

    def buffer(self, width: int, after: int = 0) -> torch.Tensor:
        """[windows, tokens, width] of the scratch, behind `after` values a token."""
        windows, tokens, _ = self.quantized_NTH.shape
        count = windows * tokens
        return self.scratch[count * after : count * (after + width)].view(windows, tokens, width)


@dataclass
class BlockSolver:
    """Quantizes the layer that `network` holds, unit by unit; each sees what those before it make of the tokens.

    folded: the layer's tensors with nothing folded yet; afterwards `folded.kept` has what is to be written as it is.
    Streams are advanced in place to the output of the layer. Afterwards the network holds the dequantized weights.
    """

    network: Network
    spec: ModelSpec
    layer: int
    recipe: Recipe
    folded: FoldedLayer
    streams: CalibrationStreams
    options: SolverOptions
    clock: StageClock
    packed: dict[str, torch.Tensor] = field(default_factory=dict)
    results: list[LayerResult] = field(default_factory=list)

    def run(self) -> tuple[dict[str, torch.Tensor], list[LayerResult]]:
        """Packed tensors by full name, and one result a linear."""
        network, h_NTH = self.network, self.h_NTH
        attended = self.streams.buffer(self.spec.q_size)
        middle = self.streams.buffer(self.spec.hidden_size, after=self.spec.q_size)
        gated = self.streams.buffer(self.spec.intermediate_size)  # takes the place of both
        original = self.streams.original_NTH
        if original is not None:
            with self.clock.time("forward"):
                self._advance_original(original, middle)
        self._take_kept()

        def attend(part: slice) -> torch.Tensor:
            a = network.attend(network.attention_input(self._on_device(h_NTH, part)))
            attended[part] = a.to(attended.device)
            return a

        down_moment_I = torch.zeros(self.spec.intermediate_size, device=network.device)

        def after_attention(part: slice) -> torch.Tensor:
            h = network.add_attention(self._on_device(h_NTH, part), self._on_device(attended, part))
            h_NTH[part] = h.to(h_NTH.device)
            x = network.mlp_input(h)
            if self._folds("down"):  # scales of down's inputs are scales of up's rows: needed before up is rounded
                sample = x[:, ::MOMENT_STRIDE]
                down_moment_I.add_(network.gate(sample).float().square().sum((0, 1)))
            return x

        def gate(part: slice) -> torch.Tensor:
            m = network.gate(network.mlp_input(self._on_device(h_NTH, part)))
            gated[part] = m.to(gated.device)
            return m

        self._solve_inner("qkv", lambda part: network.attention_input(self._on_device(h_NTH, part)))
        after_o = None if original is None else middle[: len(original)]
        self._solve_outer("o", attend, network.add_attention, after_o)
        self._solve_inner("gate_up", after_attention, down_moment_I)
        self._solve_outer("down", gate, network.add_mlp, original)
        with self.clock.time("forward"):
            for part in self._parts():
                h = network.add_mlp(self._on_device(h_NTH, part), self._on_device(gated, part))
                h_NTH[part] = h.to(h_NTH.device)
        return self.packed, self.results

    @property
    def h_NTH(self) -> torch.Tensor:
        return self.streams.quantized_NTH

    def _advance_original(self, original_NTH: torch.Tensor, middle_NTH: torch.Tensor) -> None:
        """Send the 16-bit stream through the 16-bit layer, in place; `middle` gets its states after attention."""
        network = self.network
        for part in batches(*original_NTH.shape[:2]):
            h = self._on_device(original_NTH, part)
            h = network.add_attention(h, network.attend(network.attention_input(h)))
            middle_NTH[part] = h.to(middle_NTH.device)
            original_NTH[part] = network.add_mlp(h, network.gate(network.mlp_input(h))).to(original_NTH.device)

    def _solve_inner(
        self, unit: str, produce: Callable[[slice], torch.Tensor], down_moment_I: torch.Tensor | None = None
    ) -> None:
        """Solve a unit that reads a norm: q, k, v or gate, up."""
        members = _members(self.spec, self.layer, unit)
        if not _by_scheme(members, self.recipe):
            return self._produce(produce)
        width = self.spec.hidden_size
        hessian = torch.zeros(width, width, dtype=torch.float32, device=self.network.device)
        with self.clock.time("forward"):
            for part in self._parts():
                x = produce(part)
                with self.clock.time("hessian"):
                    add_to_hessian(hessian, x)
        with self.clock.time(f"solve {unit}"):
            if unit == "gate_up" and self._folds("down") and down_moment_I is not None:
                self.folded.fold_down(down_moment_I)
            if self._folds(unit):
                scales_I = self.folded.fold_norm(unit, hessian.diagonal())
                hessian.div_(scales_I[:, None]).div_(scales_I)
            self._take_kept()
            self._solve(members, hessian, None)

    def _solve_outer(
        self,
        unit: str,
        produce: Callable[[slice], torch.Tensor],
        add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        wanted_NTH: torch.Tensor | None,
    ) -> None:
        """Solve a unit whose output `add` adds to the residual stream, o or down.

        Tokens count by the inverse of the mean square of their states after it: what the next norm makes of an error.
        The states that the first windows should come to are `wanted_NTH`; they say what the unrounded weights are
        short of.
        """
        ((path, lin),) = _members(self.spec, self.layer, unit).items()
        if self.recipe.scheme_of(lin) is None:
            return self._produce(produce)
        width, device = lin.in_features, self.network.device
        hessian = torch.zeros(width, width, dtype=torch.float32, device=device)
        short = None if wanted_NTH is None else torch.zeros(width, lin.out_features, device=device)
        self.network.set_parameter(f"{path}.weight", self.folded.weight(path))
        with self.clock.time("forward"):
            for part in self._parts():
                x = produce(part)
                h = self._on_device(self.h_NTH, part)
                pulled = wanted_NTH is not None and part.stop <= len(wanted_NTH)
                after = self._on_device(wanted_NTH, part) if pulled and wanted_NTH is not None else add(h, x)
                with self.clock.time("hessian"):
                    after = after.flatten(0, 1).float()
                    root_T1 = (after.square().mean(-1, keepdim=True) + 1e-8).rsqrt()
                    x_TI = (x.flatten(0, 1) * root_T1).to(x.dtype)
                    add_to_hessian(hessian, x_TI)
                if short is not None and wanted_NTH is not None and pulled:
                    with self.clock.time("pull"):
                        missing = after - h.flatten(0, 1)
                        if lin.bias:
                            missing -= self.folded.state[f"{path}.bias"].to(missing)
                        short += x_TI.T @ missing.mul_(root_T1).to(x.dtype)
                        if part.stop == len(wanted_NTH):  # the Hessian is of the same tokens now
                            mirror_upper(hessian)
                            short.addmm_(hessian, self.folded.weight(path).T, alpha=-1)
                            short.mul_(len(self.h_NTH) / len(wanted_NTH))
        with self.clock.time(f"solve {unit}"):
            self._solve({path: lin}, hessian, None if short is None else {lin.name: short})

    def _produce(self, produce: Callable[[slice], torch.Tensor]) -> None:
        """Only what later stages need of a unit that stays in 16 bit."""
        with self.clock.time("forward"):
            for part in self._parts():
                produce(part)

    def _solve(
        self,
        members: Mapping[str, LinearSpec],
        hessian: torch.Tensor,
        shortfalls: Mapping[str, torch.Tensor] | None,
    ) -> None:
        schemes = _by_scheme(members, self.recipe)
        for scheme, group in schemes.items():
            own = hessian if scheme == list(schemes)[-1] else hessian.clone()
            weights = {lin.name: self.folded.weight(path) for path, lin in group}
            solved = _solve(group, weights, own, shortfalls, scheme, self.options)
            for (path, _), (qtensor, _) in zip(group, solved, strict=True):
                self.network.set_parameter(path + ".weight", qtensor.dequantize())
                self.folded.release(path)
            _keep(solved, self.recipe, self.packed, self.results)

    def _take_kept(self) -> None:
        """What is not quantized is computed with as it will be stored."""
        for name, tensor in self.folded.kept.items():
            self.network.set_parameter(name, tensor)

    def _folds(self, unit: str) -> bool:
        """Whether scales are folded into the inputs of a unit: all that they scale has to be rounded afterwards."""
        scaled = ("mlp.up_proj", "mlp.down_proj") if unit == "down" else UNITS[unit]
        linears = {lin.name: lin for lin in self.spec.layer_linears(self.layer)}
        return self.options.fold and all(
            self.recipe.scheme_of(linears[f"model.layers.{self.layer}.{path}"]) is not None for path in scaled
        )

    def _parts(self) -> Iterator[slice]:
        return batches(self.h_NTH.shape[0], self.h_NTH.shape[1])

    def _on_device(self, tensor: torch.Tensor, part: slice) -> torch.Tensor:
        return tensor[part].to(self.network.device)


def round_block(
    spec: ModelSpec, layer: int, recipe: Recipe, folded: FoldedLayer, options: SolverOptions
) -> tuple[dict[str, torch.Tensor], list[LayerResult]]:
    """Round a layer's linears to nearest, without calibration; returns what `BlockSolver.run` does."""
    packed: dict[str, torch.Tensor] = {}
    results: list[LayerResult] = []
    for unit in UNITS:
        for scheme, group in _by_scheme(_members(spec, layer, unit), recipe).items():
            weights = {lin.name: folded.weight(path) for path, lin in group}
            _keep(_solve(group, weights, None, None, scheme, options), recipe, packed, results)
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
    weights: Mapping[str, torch.Tensor],
    hessian: torch.Tensor | None,
    shortfalls: Mapping[str, torch.Tensor] | None,
    scheme: Scheme,
    options: SolverOptions,
) -> list[tuple[QTensor, LayerResult]]:
    """Solve linears that share inputs and scheme; in their order."""
    if hessian is not None and not bool(torch.isfinite(hessian.diagonal()).all()):
        names = ", ".join(lin.kind for _, lin in group)
        raise CheckpointError(
            f"layer {group[0][1].layer}: the activations entering {names} are not finite",
            hint="compute in bfloat16 or float32 (--calibration-dtype), and check the source's weights",
        )
    solved = solve_unit(
        weights,
        hessian,
        scheme,
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
    packed: dict[str, torch.Tensor],
    results: list[LayerResult],
) -> None:
    for qtensor, result in solved:
        results.append(result)
        packed |= {f"{result.name}.{part}": tensor.cpu() for part, tensor in pack_linear(recipe, qtensor).items()}
