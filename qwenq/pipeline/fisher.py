r"""Sensitivity of each fused group to each scheme, as KL at the head: two streamed passes over the layers.

    forward:   tokens --> layer 0 --> ... --> layer n-1 --> head: gradients of log p(y), y ~ p   (states kept on disk)
    backward:  layer n-1 --> ... --> layer 0: gradients at each linear's output; GPTQ's error E of each group and scheme

A weight error E changes the log likelihood of a window's labels by s = sum over its tokens of dY . (E x), and the KL a
token is E[s**2] / (2 tokens) to second order (see `sampled_gradients`). All schemes of all groups share the two passes,
so the cost is linear in the number of layers. Tokens that E is solved on and tokens that s is read on are not the same.

Few samples make a scheme's own figure noisy, and its rounding luck is not that of a later run. So schemes of a group
share one factor: KL = factor * relative output error of the scheme, the factor fitted over all of the group's schemes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwenq.checkpoint.reader import SLICE_ROWS, Checkpoint
from qwenq.errors import CalibrationError, JobError
from qwenq.formats.base import Scheme, get_format
from qwenq.io.durable import new_file
from qwenq.io.safetensors import fingerprint
from qwenq.io.tensors import raw_bytes, read_into
from qwenq.machine import free_disk, keep_freed_memory, versions
from qwenq.model.architectures import Stage
from qwenq.model.layer import Network
from qwenq.model.spec import ModelSpec
from qwenq.pipeline.activations import embed
from qwenq.pipeline.block import batches
from qwenq.pipeline.config import BACKWARD_TOKENS, PROBE_TOKENS, PROBE_WINDOWS, SAMPLES, SOLVER_WINDOWS
from qwenq.pipeline.evaluate import HeadWeights
from qwenq.pipeline.monitor import memory_errors
from qwenq.planning.sensitivity import (
    OUTER,
    PRIOR_8_BIT,
    FusedGroup,
    Sensitivity,
    fused_groups,
    options_of,
    schemes_for,
)
from qwenq.solver.gptq import DAMP_PERCENT, add_to_hessian, round_rows, solve_linears
from qwenq.solver.grid import Grid
from qwenq.text.tokens import TokenWindows
from qwenq.units import format_gb

_STORED = torch.bfloat16  # of hidden states kept on disk between the passes


@dataclass(frozen=True)
class Probe:
    """How to measure: tokens to solve on, tokens to read the effect on, labels a position and their seed."""

    solver_NT: torch.Tensor
    probe_NT: torch.Tensor
    calibration: Mapping[str, Any]
    samples: int = SAMPLES
    seed: int = 0
    asymmetric: bool = False  # 4 bits with zero points too
    format: str = "gptq"  # whose schemes


def state_bytes(spec: ModelSpec, probe: Probe) -> int:
    """Disk for what enters each layer, kept between the passes."""
    tokens = probe.solver_NT.numel() + probe.probe_NT.numel()
    return tokens * spec.hidden_size * _STORED.itemsize * spec.num_hidden_layers


def split_windows(
    windows: TokenWindows, samples: int = SAMPLES, seed: int = 0, asymmetric: bool = False, format: str = "gptq"
) -> Probe:
    """Part calibration windows: the first for the solver, pieces of the others, evenly spread, for the effect."""
    ids_NT = windows.ids
    solver = min(SOLVER_WINDOWS, len(ids_NT) // 2)
    if solver == 0:
        raise CalibrationError(
            f"{windows.text}: one window, sensitivities need at least two (to solve on, and to read the effect on)",
            hint="more text, or a smaller --sequence-length",
        )
    length = min(PROBE_TOKENS, ids_NT.shape[1])
    pieces_NT = ids_NT[solver:, : ids_NT.shape[1] // length * length].reshape(-1, length)
    count = min(PROBE_WINDOWS, len(pieces_NT))
    picked = torch.arange(count) * len(pieces_NT) // count
    return Probe(ids_NT[:solver], pieces_NT[picked], windows.to_json(), samples, seed, asymmetric, format)


@torch.no_grad()
def measure_sensitivity(
    source: Checkpoint,
    probe: Probe,
    *,
    compute_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    scratch: Path,
    listen: Callable[[str], None] = lambda line: None,
) -> Sensitivity:
    """Measure every group under every scheme the probe asks for. `scratch` keeps hidden states of both token sets."""
    keep_freed_memory()
    spec = source.spec
    needed, free = state_bytes(spec, probe), free_disk(scratch)
    if needed > free:
        raise JobError(
            f"{scratch}: hidden states of the sensitivity passes need {format_gb(needed)} of disk, "
            f"{format_gb(free)} are free",
            hint="free some space, or fewer windows (--num-samples)",
        )
    network = Network(source.config, spec, dtype=compute_dtype, device=device)
    hint = "make room, or fewer windows (-n)"
    try:
        with (
            memory_errors("measuring sensitivity", network.device, None, hint),
            tempfile.TemporaryDirectory(prefix=".qwenq-sensitivity-", dir=scratch) as directory,
        ):
            states = _States(Path(directory), spec)
            last_NTH = _forward(source, network, probe, states, listen)
            listen("sensitivity: gradients at the head")
            head = HeadWeights(source)
            gradient = sampled_gradients(network, head, last_NTH, probe.samples, probe.seed).cpu()
            outer = _head_losses(network, head, last_NTH, probe)
            scores: dict[FusedGroup, dict[Scheme, torch.Tensor]] = {}
            noise: dict[FusedGroup, dict[Scheme, float]] = {}
            for layer in reversed(range(spec.num_hidden_layers)):
                network.fill(source.finite_layer_state(layer))
                errors, lost = _errors(network, states.read("solver", layer), probe)
                found, gradient = _backward(network, errors, states.read("probe", layer), gradient)
                scores |= {(layer, name): by_scheme for name, by_scheme in found.items()}
                noise |= {(layer, name): by_scheme for name, by_scheme in lost.items()}
                network.release()
                source.refuse_changed()
                listen(f"sensitivity: layer {layer} measured, {layer} to go")
            _add_embedding_losses(outer, source, network.device, gradient, probe)
    except OSError as error:
        raise JobError(
            f"{error.filename or scratch}: {error.strerror or error}", hint="free some space, then try again"
        ) from error
    tokens = probe.probe_NT.shape[1]
    kl: dict[FusedGroup, dict[Scheme | None, float]] = {}
    for unit, by_scheme in scores.items():
        squares = sum(float(s.double().square().mean()) for s in by_scheme.values())
        factor = squares / (2 * tokens) / max(sum(noise[unit].values()), 1e-30)
        kl[unit] = {
            scheme: factor * noise[unit][_solved(scheme)] * (PRIOR_8_BIT if scheme != _solved(scheme) else 1.0)
            for scheme in _offered(spec, unit, probe)
        }
    kl |= outer
    kl = {unit: kl[unit] for unit in fused_groups(spec, probe.format)}
    provenance = {
        "calibration": dict(probe.calibration),
        "solver_windows": list(probe.solver_NT.shape),
        "probe_windows": list(probe.probe_NT.shape),
        "samples": probe.samples,
        "seed": probe.seed,
        "damp_percent": DAMP_PERCENT,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "versions": versions(),
    }
    if not get_format(probe.format).outer:
        provenance["eight_bit"] = f"{PRIOR_8_BIT:.6f} of 4 bits in the same groups"
    table = Sensitivity(spec.name, fingerprint(source.directory), kl, provenance)
    source.refuse_changed()
    return table


class _States:
    """Hidden states entering each layer, in files."""

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        self.directory, self.hidden = directory, spec.hidden_size
        self.shapes: dict[str, torch.Size] = {}

    def write(self, name: str, layer: int, h_NTH: torch.Tensor) -> None:
        self.shapes[name] = h_NTH.shape
        with new_file(self.directory / f"{name}-{layer}") as file:
            file.write(raw_bytes(h_NTH.to(_STORED)))

    def read(self, name: str, layer: int) -> torch.Tensor:
        """The states as written; their file is deleted."""
        h_NTH = torch.empty(self.shapes[name], dtype=_STORED)
        path = self.directory / f"{name}-{layer}"
        read_into(path, 0, h_NTH)
        path.unlink()
        return h_NTH


def _forward(
    source: Checkpoint, network: Network, probe: Probe, states: _States, listen: Callable[[str], None]
) -> torch.Tensor:
    """Keep what enters each layer; returns what leaves the last one, for the probe's windows."""
    spec = source.spec
    hidden = {
        name: (torch.empty(*ids.shape, spec.hidden_size, dtype=network.dtype), ids)
        for name, ids in (("solver", probe.solver_NT), ("probe", probe.probe_NT))
    }
    embed(source, hidden)
    for layer in range(spec.num_hidden_layers):
        network.fill(source.finite_layer_state(layer))
        for name, (h_NTH, _) in hidden.items():
            states.write(name, layer, h_NTH)
            for part in batches(*h_NTH.shape[:2]):
                h_NTH[part] = network.forward(h_NTH[part].to(network.device)).to(h_NTH.device)
        network.release()
        source.refuse_changed()
        listen(f"sensitivity: layer {layer} read, of {spec.num_hidden_layers}")
    return hidden["probe"][0]


def _offered(spec: ModelSpec, unit: FusedGroup, probe: Probe) -> tuple[Scheme, ...]:
    """Schemes the table has of a unit; where nothing is offered, 4 bits per channel, which only a recipe file asks
    for.
    """
    form = get_format(probe.format)
    return schemes_for(spec, unit, form, None if form.outer else options_of(probe.asymmetric)) or (Scheme(4, -1),)


def _solved(scheme: Scheme) -> Scheme:
    """The scheme that errors are solved of: integers' in 8 bits follow from those in 4."""
    return replace(scheme, bits=4) if scheme.codes == "int" else scheme


def _errors(
    network: Network, h_NTH: torch.Tensor, probe: Probe
) -> tuple[dict[str, dict[Scheme, dict[str, torch.Tensor]]], dict[str, dict[Scheme, float]]]:
    """GPTQ's weight errors [out, in] of each linear, by unit, scheme and path in the layer, in bfloat16 on the CPU;

    and by unit and scheme the energy of the output errors relative to the outputs, summed over the unit's linears.
    One Hessian at a time is on the network's device: the layer's windows go through it up to each stage anew.
    """
    errors: dict[str, dict[Scheme, dict[str, torch.Tensor]]] = {}
    lost: dict[str, dict[Scheme, float]] = {}
    for stage in network.spec.architecture.stages:
        hessian_II = _hessian(network, stage, h_NTH).cpu()
        weights = {path: network.weight(path).float() for path in stage.paths}
        free = get_format(probe.format).outer  # then each linear is a unit of its own
        units = {path: path.rpartition(".")[2] if free else stage.name for path in stage.paths}
        offered = _offered(network.spec, (0, units[stage.paths[0]]), probe)
        schemes = list(dict.fromkeys(map(_solved, offered)))
        for scheme in schemes:
            own_II = hessian_II.to(network.device, copy=scheme != schemes[-1])  # overwritten
            solved = solve_linears(weights, own_II, scheme.grid(), damp_percent=DAMP_PERCENT, sweeps=0)
            del own_II
            for path, (qtensor, stats) in solved.items():
                error = qtensor.dequantize().sub_(weights[path]).to(torch.bfloat16).cpu()
                errors.setdefault(units[path], {}).setdefault(scheme, {})[path] = error
                of_unit = lost.setdefault(units[path], {})
                of_unit[scheme] = of_unit.get(scheme, 0.0) + 10 ** (stats.error_db / 10)
            del solved, qtensor, stats  # codes and scales are on the device
    return errors, lost


def _hessian(network: Network, stage: Stage, h_NTH: torch.Tensor) -> torch.Tensor:
    """Sum of x x' over what enters a stage's linears, float32 [in, in] on the network's device."""
    columns = network.spec.size(stage.inputs)
    hessian_II = torch.zeros(columns, columns, device=network.device)
    for part in batches(*h_NTH.shape[:2]):
        h = h_NTH[part].to(device=network.device, dtype=network.dtype)
        add_to_hessian(hessian_II, network.entering(stage, h))
    return hessian_II


def _backward(
    network: Network,
    errors: Mapping[str, Mapping[Scheme, Mapping[str, torch.Tensor]]],
    h_NTH: torch.Tensor,
    gradient_SNTH: torch.Tensor,
) -> tuple[dict[str, dict[Scheme, torch.Tensor]], torch.Tensor]:
    """Scores [samples, windows] of each stage and scheme, and the gradients at the layer's input."""
    samples, windows = gradient_SNTH.shape[:2]
    scores = {
        stage: {scheme: torch.zeros(samples, windows) for scheme in by_scheme} for stage, by_scheme in errors.items()
    }
    before_SNTH = torch.empty_like(gradient_SNTH)
    paths = [linear.path for linear in network.spec.architecture.linears]
    for part in batches(h_NTH.shape[0], h_NTH.shape[1], BACKWARD_TOKENS):
        with torch.enable_grad(), network.recorded(paths) as recorded:
            h = h_NTH[part].to(device=network.device, dtype=network.dtype).requires_grad_(True)
            leaving = network.forward(h)
        wanted = [h, *(recorded[path][1] for path in paths)]
        changes = {
            (stage, scheme, path): recorded[path][0].detach() @ error.to(network.device, network.dtype).T
            for stage, by_scheme in errors.items()
            for scheme, by_path in by_scheme.items()
            for path, error in by_path.items()
        }
        for s in range(samples):
            g = gradient_SNTH[s, part].to(network.device, network.dtype)
            entering, *outputs = torch.autograd.grad(leaving, wanted, g, retain_graph=s + 1 < samples)
            before_SNTH[s, part] = entering.float()
            at = dict(zip(paths, outputs, strict=True))
            for (stage, scheme, path), change in changes.items():
                scores[stage][scheme][s, part] += (at[path] * change).sum((1, 2), dtype=torch.float32).cpu()
    return scores, before_SNTH


def _head_losses(
    network: Network, head: HeadWeights, h_NTH: torch.Tensor, probe: Probe
) -> dict[FusedGroup, dict[Scheme | None, float]]:
    """KL that rounding the head causes, by scheme, to second order: half the variance of the logits' changes under p.

    Empty for a format that leaves it in 16 bit; under the embedding's name where they are tied.
    """
    spec = head.checkpoint.spec
    if not get_format(probe.format).outer:
        return {}
    unit = OUTER, spec.outer_linears[-1].stage
    schemes = _offered(spec, unit, probe)
    x_PH = network.final_norm(h_NTH.reshape(-1, h_NTH.shape[2]).float().to(network.device), head.norm)
    log_total_P = torch.full((len(x_PH),), -torch.inf, device=network.device)
    for w_VH in _head_slices(head, network.device):
        for part in _chunks(len(x_PH)):
            log_total_P[part] = torch.logaddexp(log_total_P[part], (x_PH[part] @ w_VH.T).logsumexp(1))
    moments = {scheme: torch.zeros(2, len(x_PH), device=network.device) for scheme in schemes}
    for w_VH in _head_slices(head, network.device):
        wrong = {scheme: round_rows(w_VH, scheme.grid()).dequantize().sub_(w_VH) for scheme in schemes}
        for part in _chunks(len(x_PH)):
            p_PV = (x_PH[part] @ w_VH.T - log_total_P[part, None]).exp_()
            for scheme, e_VH in wrong.items():
                change_PV = x_PH[part] @ e_VH.T
                moments[scheme][0, part] += (p_PV * change_PV).sum(1)
                moments[scheme][1, part] += (p_PV * change_PV.square_()).sum(1)
    return {unit: {scheme: float((b - a * a).mean()) / 2 for scheme, (a, b) in moments.items()}}


def _head_slices(head: HeadWeights, device: torch.device) -> Iterator[torch.Tensor]:
    """The head's rows in float32, some at a time."""
    vocab = head.checkpoint.spec.vocab_size
    for start in range(0, vocab, SLICE_ROWS):
        yield head.rows(start, min(start + SLICE_ROWS, vocab)).to(device)


def _add_embedding_losses(
    outer: dict[FusedGroup, dict[Scheme | None, float]],
    source: Checkpoint,
    device: torch.device,
    gradient_SNTH: torch.Tensor,
    probe: Probe,
) -> None:
    """Add to `outer` what rounding the embedding causes, by scheme; a tied head's is there already.

    gradient_SNTH: of log p with respect to what enters the first layer.
    """
    if not outer:
        return
    unit = OUTER, source.spec.outer_linears[0].stage
    row = outer.setdefault(unit, {})
    for scheme in _offered(source.spec, unit, probe):
        grid = scheme.grid()

        def wrong(name: str, rows_VH: torch.Tensor, grid: Grid = grid) -> torch.Tensor:
            rows_VH = rows_VH.to(device).float()
            return round_rows(rows_VH, grid).dequantize().sub_(rows_VH).cpu()

        e_NTH = torch.empty(*probe.probe_NT.shape, source.spec.hidden_size)
        embed(source, {"probe": (e_NTH, probe.probe_NT)}, wrong)
        score_SN = (gradient_SNTH * e_NTH).sum((2, 3)).double()
        row[scheme] = row.get(scheme, 0.0) + float(score_SN.square().mean()) / (2 * probe.probe_NT.shape[1])


_CHUNK_TOKENS = 1024


def sampled_gradients(
    network: Network, head: HeadWeights, h_NTH: torch.Tensor, samples: int, seed: int
) -> torch.Tensor:
    """Gradients of log p(y) with respect to h, float32 [samples, N, T, H]; a label y per position and sample.

    h_NTH: hidden states leaving the last layer. The head is read twice, slice by slice of the vocabulary; labels are
    drawn by the largest of logit + Gumbel noise.
    """
    windows, tokens, hidden = h_NTH.shape
    norm = head.norm
    h_PH = h_NTH.reshape(-1, hidden).float().to(network.device)
    x_PH = network.final_norm(h_PH, norm)
    vocab = head.checkpoint.spec.vocab_size
    generator = torch.Generator().manual_seed(seed)
    log_total_P = torch.full((len(x_PH),), -torch.inf, device=network.device)
    best_SP = torch.full((samples, len(x_PH)), -torch.inf, device=network.device)
    label_SPH = torch.zeros(samples, len(x_PH), hidden, device=network.device)  # head row of the label
    for start in range(0, vocab, SLICE_ROWS):
        w_VH = head.rows(start, min(start + SLICE_ROWS, vocab)).to(network.device)
        for part in _chunks(len(x_PH)):
            logits_PV = x_PH[part] @ w_VH.T
            log_total_P[part] = torch.logaddexp(log_total_P[part], logits_PV.logsumexp(1))
            for s in range(samples):
                uniform_PV = torch.rand(logits_PV.shape, generator=generator).clamp_(1e-20, 1 - 1e-7)
                noisy_PV = logits_PV - uniform_PV.to(network.device).log_().neg_().log_()
                value_P, index_P = noisy_PV.max(1)
                won_P = value_P > best_SP[s, part]
                best_SP[s, part] = torch.where(won_P, value_P, best_SP[s, part])
                label_SPH[s, part] = torch.where(won_P[:, None], w_VH[index_P], label_SPH[s, part])
    mean_PH = torch.zeros_like(x_PH)  # of the head's rows under p
    for start in range(0, vocab, SLICE_ROWS):
        w_VH = head.rows(start, min(start + SLICE_ROWS, vocab)).to(network.device)
        for part in _chunks(len(x_PH)):
            p_PV = (x_PH[part] @ w_VH.T - log_total_P[part, None]).exp_()
            mean_PH[part] += p_PV @ w_VH
    with torch.enable_grad():
        h_PH.requires_grad_(True)
        x_PH = network.final_norm(h_PH, norm)
        through = [
            torch.autograd.grad(x_PH, h_PH, label_SPH[s] - mean_PH, retain_graph=s + 1 < samples)[0]
            for s in range(samples)
        ]
    return torch.stack(through).reshape(samples, windows, tokens, hidden)


def _chunks(positions: int) -> list[slice]:
    return [slice(k, min(k + _CHUNK_TOKENS, positions)) for k in range(0, positions, _CHUNK_TOKENS)]
