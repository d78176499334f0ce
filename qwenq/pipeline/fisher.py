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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwenq.checkpoint.reader import SLICE_ROWS, Checkpoint
from qwenq.errors import CalibrationError, JobError
from qwenq.formats.base import Scheme
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
from qwenq.planning.sensitivity import PRIOR_8_BIT, FusedGroup, Sensitivity, fused_groups, options_of, schemes_for
from qwenq.solver.gptq import DAMP_PERCENT, add_to_hessian, solve_linears
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


def state_bytes(spec: ModelSpec, probe: Probe) -> int:
    """Disk for what enters each layer, kept between the passes."""
    tokens = probe.solver_NT.numel() + probe.probe_NT.numel()
    return tokens * spec.hidden_size * _STORED.itemsize * spec.num_hidden_layers


def split_windows(
    windows: TokenWindows, samples: int = SAMPLES, seed: int = 0, asymmetric: bool = False
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
    return Probe(ids_NT[:solver], pieces_NT[picked], windows.to_json(), samples, seed, asymmetric)


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
            gradient = sampled_gradients(network, HeadWeights(source), last_NTH, probe.samples, probe.seed).cpu()
            scores: dict[FusedGroup, dict[Scheme, torch.Tensor]] = {}
            noise: dict[FusedGroup, dict[Scheme, float]] = {}
            for layer in reversed(range(spec.num_hidden_layers)):
                network.fill(source.finite_layer_state(layer))
                errors, lost = _errors(network, states.read("solver", layer), probe.asymmetric)
                found, gradient = _backward(network, errors, states.read("probe", layer), gradient)
                scores |= {(layer, stage): by_scheme for stage, by_scheme in found.items()}
                noise |= {(layer, stage): by_scheme for stage, by_scheme in lost.items()}
                network.release()
                source.refuse_changed()
                listen(f"sensitivity: layer {layer} measured, {layer} to go")
    except OSError as error:
        raise JobError(
            f"{error.filename or scratch}: {error.strerror or error}", hint="free some space, then try again"
        ) from error
    tokens = probe.probe_NT.shape[1]
    kl: dict[FusedGroup, dict[Scheme | None, float]] = {}
    for unit, by_scheme in scores.items():
        squares = sum(float(s.double().square().mean()) for s in by_scheme.values())
        factor = squares / (2 * tokens) / max(sum(noise[unit].values()), 1e-30)
        in_four = {(scheme.group_size, scheme.sym): factor * lost for scheme, lost in noise[unit].items()}
        kl[unit] = {
            scheme: in_four[scheme.group_size, scheme.sym] * (PRIOR_8_BIT if scheme.bits == 8 else 1.0)
            for scheme in _offered(spec, unit[1], probe.asymmetric)
        }
    kl = {unit: kl[unit] for unit in fused_groups(spec)}
    provenance = {
        "calibration": dict(probe.calibration),
        "solver_windows": list(probe.solver_NT.shape),
        "probe_windows": list(probe.probe_NT.shape),
        "samples": probe.samples,
        "seed": probe.seed,
        "damp_percent": DAMP_PERCENT,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "eight_bit": f"{PRIOR_8_BIT:.6f} of 4 bits in the same groups",
        "versions": versions(),
    }
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


def _offered(spec: ModelSpec, stage: str, asymmetric: bool) -> tuple[Scheme, ...]:
    """Schemes the table has of a stage; where nothing is offered, 4 bits per channel, which only a recipe file asks
    for.
    """
    return schemes_for(spec, stage, options_of(asymmetric)) or (Scheme(4, -1),)


def _errors(
    network: Network, h_NTH: torch.Tensor, asymmetric: bool
) -> tuple[dict[str, dict[Scheme, dict[str, torch.Tensor]]], dict[str, dict[Scheme, float]]]:
    """GPTQ's weight errors [out, in] of each linear, by stage, 4-bit scheme and path in the layer, in bfloat16 on the
    CPU;

    and by stage and scheme the energy of the output errors relative to the outputs, summed over the stage's linears.
    One Hessian at a time is on the network's device: the layer's windows go through it up to each stage anew.
    """
    errors: dict[str, dict[Scheme, dict[str, torch.Tensor]]] = {}
    lost: dict[str, dict[Scheme, float]] = {}
    for stage in network.spec.architecture.stages:
        hessian_II = _hessian(network, stage, h_NTH).cpu()
        weights = {path: network.weight(path).float() for path in stage.paths}
        errors[stage.name], lost[stage.name] = {}, {}
        offered = _offered(network.spec, stage.name, asymmetric)
        schemes = list(dict.fromkeys(replace(scheme, bits=4) for scheme in offered))
        for scheme in schemes:
            own_II = hessian_II.to(network.device, copy=scheme != schemes[-1])  # overwritten
            solved = solve_linears(weights, own_II, scheme.grid(), damp_percent=DAMP_PERCENT, sweeps=0)
            del own_II
            errors[stage.name][scheme] = {
                path: qtensor.dequantize().sub_(weights[path]).to(torch.bfloat16).cpu()
                for path, (qtensor, _) in solved.items()
            }
            lost[stage.name][scheme] = sum(10 ** (stats.error_db / 10) for _, stats in solved.values())
            del solved
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
