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
from qwenq.quant.gptq import QTensor, add_to_hessian, solve_unit
from qwenq.quant.pack import pack_gptq
from qwenq.results import LayerResult
from qwenq.scheme import Recipe, Scheme
from qwenq.spec import UNITS, LinearSpec, ModelSpec
from qwenq.stream import Network


@dataclass(frozen=True)
class SolverOptions:
    """What the solver is asked to do, the same for every layer."""

    method: str = "gptq"  # gptq, or rtn: round to nearest with absmax scales, the baseline
    damp_percent: float = 0.01  # share of the mean Hessian diagonal added to the diagonal


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
    linears = {lin.name.rsplit(".", 2)[-2] + "." + lin.kind: lin for lin in spec.layer_linears(layer)}
    windows, tokens, _ = h_NTH.shape
    packed: dict[str, torch.Tensor] = {}
    results: list[LayerResult] = []

    def buffer(width: int) -> torch.Tensor:
        return scratch[: windows * tokens * width].view(windows, tokens, width)

    def parts() -> Iterator[slice]:
        return batches(windows, tokens)

    def solve(unit: str, produce: Callable[[slice], torch.Tensor]) -> None:
        members = {path: linears[path] for path in UNITS[unit]}
        with clock.time("forward"):
            hessian = _collect(produce, parts(), next(iter(members.values())).in_features, network, clock)
        with clock.time(f"solve {unit}"):
            for scheme, group in _by_scheme(members, recipe).items():
                last = scheme == list(_by_scheme(members, recipe))[-1]
                solved = _solve(network, group, hessian if last else hessian.clone(), scheme, options, layer)
                for path, (qtensor, result) in solved.items():
                    results.append(result)
                    network.set_parameter(path + ".weight", qtensor.dequantize())
                    for part, tensor in pack_gptq(qtensor).items():
                        packed[f"{members[path].name}.{part}"] = tensor.cpu()

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
    hessian: torch.Tensor,
    scheme: Scheme,
    options: SolverOptions,
    layer: int,
) -> dict[str, tuple[QTensor, LayerResult]]:
    if not bool(torch.isfinite(hessian.diagonal()).all()):
        names = ", ".join(lin.kind for _, lin in group)
        raise CheckpointError(
            f"layer {layer}: the activations entering {names} are not finite",
            hint="compute in bfloat16 or float32 (--compute-dtype), and check the source's weights",
        )
    weights = {lin.name: network.weight(path).float() for path, lin in group}
    solved = solve_unit(weights, hessian, scheme, damp_percent=options.damp_percent, method=options.method)
    outcome = {}
    for path, lin in group:
        qtensor, stats = solved[lin.name]
        result = LayerResult(
            lin.name, scheme.label, stats.error_db, stats.weight_error_db, stats.damp_percent, stats.fallback
        )
        outcome[path] = (qtensor, result)
    return outcome
