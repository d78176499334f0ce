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
from qwenq.quant.gptq import DAMP_PERCENT, add_to_hessian, solve_unit
from qwenq.results import LayerResult
from qwenq.scheme import Recipe, Scheme
from qwenq.spec import UNITS, LinearSpec, ModelSpec
from qwenq.stream import Network


@dataclass(frozen=True)
class SolverOptions:
    """What the solver is asked to do, the same for every layer."""

    method: str = "gptq"  # gptq, or rtn: round to nearest with absmax scales, the baseline, without calibration
    damp_percent: float = DAMP_PERCENT  # share of the mean Hessian diagonal added to the diagonal


@dataclass
class StageClock:
    """Seconds by stage of the current layer."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def batches(windows: int, tokens: int, budget_tokens: int = 2048) -> Iterator[slice]:
    """Slices over the first dimension that hold about `budget_tokens` tokens each."""
    step = max(1, budget_tokens // tokens)
    for start in range(0, windows, step):
        yield slice(start, min(start + step, windows))


def run_layer(network: Network, h_NTH: torch.Tensor) -> None:
    """Send hidden states through the layer as it stands, in place."""
    for part in batches(h_NTH.shape[0], h_NTH.shape[1]):
        h_NTH[part] = network.forward(h_NTH[part].to(network.device)).to(h_NTH.device)


def quantize_block(
    network: Network,
    spec: ModelSpec,
    layer: int,
    recipe: Recipe,
    h_NTH: torch.Tensor,
    scratch: torch.Tensor,
    options: SolverOptions,
    clock: StageClock,
) -> tuple[dict[str, torch.Tensor], list[LayerResult]]:
    """Quantize the layer that `network` holds; returns its packed tensors by full name, and one result a linear.

    h_NTH: calibration hidden states entering the layer, [windows, tokens, hidden], advanced in place to the output of
    the quantized layer. scratch: flat buffer of the same dtype, at least windows * tokens * the widest linear input.
    Afterwards the network holds the dequantized weights.
    """
    windows, tokens, _ = h_NTH.shape
    packed: dict[str, torch.Tensor] = {}
    results: list[LayerResult] = []

    def buffer(width: int) -> torch.Tensor:
        return scratch[: windows * tokens * width].view(windows, tokens, width)

    def parts() -> Iterator[slice]:
        return batches(windows, tokens)

    def solve(unit: str, produce: Callable[[slice], torch.Tensor]) -> None:
        members = _members(spec, layer, unit)
        with clock.time("forward"):
            hessian = _collect(produce, parts(), next(iter(members.values())).in_features, network, clock)
        with clock.time(f"solve {unit}"):
            schemes = _by_scheme(members, recipe)
            for scheme, group in schemes.items():
                own = hessian if scheme == list(schemes)[-1] else hessian.clone()
                _solve(network, group, own, recipe, scheme, options, packed, results)

    def on_device(part: slice) -> torch.Tensor:
        return h_NTH[part].to(network.device)

    attended = buffer(spec.q_size)
    solve("qkv", lambda part: network.attention_input(on_device(part)))

    def attend(part: slice) -> torch.Tensor:
        a = network.attend(network.attention_input(on_device(part)))
        attended[part] = a.to(attended.device)
        return a

    solve("o", attend)

    def after_attention(part: slice) -> torch.Tensor:
        h = network.add_attention(on_device(part), attended[part].to(network.device))
        h_NTH[part] = h.to(h_NTH.device)
        return network.mlp_input(h)

    solve("gate_up", after_attention)
    gated = buffer(spec.intermediate_size)

    def gate(part: slice) -> torch.Tensor:
        m = network.gate(network.mlp_input(on_device(part)))
        gated[part] = m.to(gated.device)
        return m

    solve("down", gate)
    with clock.time("forward"):
        for part in parts():
            h_NTH[part] = network.add_mlp(on_device(part), gated[part].to(network.device)).to(h_NTH.device)
    return packed, results


def round_block(
    network: Network, spec: ModelSpec, layer: int, recipe: Recipe, options: SolverOptions
) -> tuple[dict[str, torch.Tensor], list[LayerResult]]:
    """Round the layer that `network` holds to nearest, without calibration; returns what `quantize_block` does."""
    packed: dict[str, torch.Tensor] = {}
    results: list[LayerResult] = []
    for unit in UNITS:
        for scheme, group in _by_scheme(_members(spec, layer, unit), recipe).items():
            _solve(network, group, None, recipe, scheme, options, packed, results)
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


def _collect(
    produce: Callable[[slice], torch.Tensor], parts: Iterator[slice], width: int, network: Network, clock: StageClock
) -> torch.Tensor:
    """Run a stage over all tokens and sum x x^T of its outputs, float32 [width, width]."""
    hessian = torch.zeros(width, width, dtype=torch.float32, device=network.device)
    for part in parts:
        x = produce(part)
        with clock.time("hessian"):
            add_to_hessian(hessian, x.reshape(-1, width))
    return hessian


def _solve(
    network: Network,
    group: list[tuple[str, LinearSpec]],
    hessian: torch.Tensor | None,
    recipe: Recipe,
    scheme: Scheme,
    options: SolverOptions,
    packed: dict[str, torch.Tensor],
    results: list[LayerResult],
) -> None:
    """Solve linears of one scheme, put the dequantized weights into the network, and add to `packed` and `results`."""
    if hessian is not None and not bool(torch.isfinite(hessian.diagonal()).all()):
        names = ", ".join(lin.kind for _, lin in group)
        raise CheckpointError(
            f"layer {group[0][1].layer}: the activations entering {names} are not finite",
            hint="compute in bfloat16 or float32 (--compute-dtype), and check the source's weights",
        )
    weights = {lin.name: network.weight(path).float() for path, lin in group}
    solved = solve_unit(weights, hessian, scheme, damp_percent=options.damp_percent, method=options.method)
    for path, lin in group:
        qtensor, stats = solved[lin.name]
        error_db = None if hessian is None else stats.error_db
        results.append(
            LayerResult(lin.name, scheme.label, error_db, stats.weight_error_db, stats.damp_percent, stats.fallback)
        )
        network.set_parameter(path + ".weight", qtensor.dequantize())
        for part, tensor in pack_linear(recipe, qtensor).items():
            packed[f"{lin.name}.{part}"] = tensor.cpu()
