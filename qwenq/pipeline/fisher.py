r"""Sensitivity of each fused group to each scheme, as KL at the head: two streamed passes over the layers.

    forward:   tokens --> layer 0 --> ... --> layer n-1 --> head: gradients of log p(y), y ~ p   (states kept on disk)
    backward:  layer n-1 --> ... --> layer 0: gradients at each linear's output; GPTQ's error E of each group and scheme

A weight error E changes the log likelihood of a window's labels by s = sum over its tokens of dY . (E x), and the KL a
token is E[s**2] / (2 tokens) to second order (see `sampled_gradients`). All schemes of all groups share the two passes,
so the cost is linear in the number of layers. Tokens that E is solved on and tokens that s is read on are not the same.

Few samples make a scheme's own figure noisy, and its rounding luck is not that of a later run. So schemes of a group
share one factor: KL = factor * relative output error of the scheme, the factor fitted over all of the group's schemes.
Rows do not depend on each other, so both are read from some rows of a linear (`sensitivity_rows`): their error stands
for that of all, scaled to as much energy.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import torch

from qwenq.checkpoint.reader import Checkpoint, row_slices
from qwenq.errors import CalibrationError, JobError
from qwenq.formats.base import Scheme, get_format
from qwenq.io.safetensors import fingerprint
from qwenq.io.tensors import fill, raw_bytes
from qwenq.machine import free_disk, keep_freed_memory, versions
from qwenq.model.architectures import Stage
from qwenq.model.layer import Network
from qwenq.model.spec import ModelSpec
from qwenq.pipeline.activations import embed
from qwenq.pipeline.block import solve_on_ranks
from qwenq.pipeline.config import BACKWARD_TOKENS, HEAD_STRIDE, PROBE_TOKENS, PROBE_WINDOWS, SAMPLES, SOLVER_WINDOWS
from qwenq.pipeline.evaluate import HeadWeights
from qwenq.pipeline.head import head_hessian, solved_slices
from qwenq.pipeline.monitor import memory_errors
from qwenq.pipeline.preflight import sensitivity_rows
from qwenq.pipeline.ranks import ALONE, Ranks
from qwenq.pipeline.shares import Share, refuse_few
from qwenq.pipeline.workers import Workers, summed_products
from qwenq.planning.sensitivity import (
    OUTER,
    PRIOR_8_BIT,
    ROTATED,
    TIED_HEAD,
    FusedGroup,
    Sensitivity,
    fused_groups,
    options_of,
    schemes_for,
    solved_as,
    tied_head,
)
from qwenq.solver.gptq import DAMP_PERCENT, damping_of_products, round_rows
from qwenq.solver.grid import Grid
from qwenq.solver.parallel import Solved
from qwenq.solver.triangle import Triangle
from qwenq.text.tokens import TokenWindows
from qwenq.units import format_gb

_STORED = torch.bfloat16  # of hidden states kept on disk between the passes
WINDOW_LIMIT = 10  # medians of the windows' mean squares


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


def split_windows(windows: TokenWindows, seed: int = 0, asymmetric: bool = False, format: str = "gptq") -> Probe:
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
    return Probe(ids_NT[:solver], pieces_NT[picked], windows.to_json(), SAMPLES, seed, asymmetric, format)


@torch.no_grad()
def measure_sensitivity(
    source: Checkpoint,
    probe: Probe,
    *,
    compute_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    scratch: Path,
    listen: Callable[[str], None] = lambda line: None,
    ranks: Ranks = ALONE,
) -> Sensitivity:
    """Measure every group under every scheme the probe asks for.

    scratch: a directory of this rank's that keeps hidden states of its share of both token sets. ranks: that measure
    together, each with the same arguments but for device and scratch; all come to the same table.
    """
    refuse_few(ranks.size, **{name: len(ids_NT) for name, ids_NT in _token_sets(probe).items()})
    keep_freed_memory()
    spec = source.spec
    needed, free = -(-state_bytes(spec, probe) // ranks.size), free_disk(scratch)
    if needed > free:
        raise JobError(
            f"{scratch}: hidden states of the sensitivity passes need {format_gb(needed)} of disk, "
            f"{format_gb(free)} are free",
            hint="free some space, or fewer windows (--num-samples)",
        )
    length = max(probe.solver_NT.shape[1], probe.probe_NT.shape[1])
    workers = Workers(
        source.config, spec, dtype=compute_dtype, window_tokens=length, devices=(device,), ranks=ranks, most=1
    )
    network = workers.first
    shares = {name: ranks.share(range(len(ids))) for name, ids in _token_sets(probe).items()}
    hint = "make room, or fewer windows (-n)"
    try:
        with (
            memory_errors("measuring sensitivity", network.device, None, hint),
            _States(scratch) as states,
        ):
            last = _forward(source, workers, probe, shares, states, listen)
            last_NTH = last["probe"]
            listen("sensitivity: gradients at the head")
            head, share = HeadWeights(source), shares["probe"]
            gradient = sampled_gradients(network, head, last_NTH, probe.samples, probe.seed, share).cpu()
            hessian = None
            if get_format(probe.format).outer:  # then the head is solved too
                hessian = head_hessian(workers, head.norm, last.pop("solver"), shares["solver"])
            outer, looked_up = _head_losses(workers, head, hessian, last_NTH, probe, share)
            del last, hessian
            scores: dict[FusedGroup, dict[Scheme, torch.Tensor]] = {}
            noise: dict[FusedGroup, dict[Scheme, float]] = {}
            for layer in reversed(range(spec.num_hidden_layers)):
                network.fill(source.finite_layer_state(layer))
                errors, lost = _errors(workers, states.read("solver", layer), shares["solver"], probe)
                found, gradient = _backward(network, errors, states.read("probe", layer), gradient, share)
                found = _of_all_windows(found, share, ranks)
                scores |= {(layer, name): by_scheme for name, by_scheme in found.items()}
                noise |= {(layer, name): by_scheme for name, by_scheme in lost.items()}
                network.release()
                source.refuse_changed()
                listen(f"sensitivity: layer {layer} measured, {layer} to go")
            _add_embedding_losses(outer, looked_up, source, gradient, probe, share, ranks)
    except OSError as error:
        raise JobError(
            f"{error.filename or scratch}: {error.strerror or error}", hint="free some space, then try again"
        ) from error
    kl = outer | {fused: _by_error(spec, fused, probe, scores[fused], noise[fused]) for fused in scores}
    kl = {fused: kl[fused] for fused in fused_groups(spec, probe.format)}
    table = Sensitivity(spec.name, fingerprint(source.directory), kl, _provenance(source, probe, compute_dtype))
    source.refuse_changed()
    return table


def _by_error(
    spec: ModelSpec,
    fused: FusedGroup,
    probe: Probe,
    scores: Mapping[Scheme, torch.Tensor],
    noise: Mapping[Scheme, float],
) -> dict[Scheme | None, float]:
    """KL a token of a fused group by scheme: each scheme's relative output error, times the factor fitted over all."""
    squares = sum(_mean_square(score_SN) for score_SN in scores.values())
    factor = squares / (2 * probe.probe_NT.shape[1]) / max(sum(noise.values()), 1e-30)
    return {
        scheme: factor * noise[solved_as(scheme)] * (PRIOR_8_BIT if scheme != solved_as(scheme) else 1.0)
        for scheme in _offered(spec, fused, probe)
    }


def _mean_square(score_SN: torch.Tensor) -> float:
    """Mean square of scores [samples, windows]; no window counts as more than WINDOW_LIMIT times their median.

    The first tokens of a window that begins in the middle of a sentence may change its labels' likelihood by many nats
    in the first layers of a real Qwen2.5, where the second order says twenty times the KL that it is
    (reports/budget.md).
    """
    square_N = score_SN.double().square().mean(0)
    limit = WINDOW_LIMIT * float(square_N.median())
    return float(square_N.clamp(max=limit or math.inf).mean())


def _provenance(source: Checkpoint, probe: Probe, compute_dtype: torch.dtype) -> dict[str, Any]:
    found: dict[str, Any] = {
        "calibration": dict(probe.calibration),
        "solver_windows": list(probe.solver_NT.shape),
        "probe_windows": list(probe.probe_NT.shape),
        "samples": probe.samples,
        "seed": probe.seed,
        "damp_percent": DAMP_PERCENT,
        "down_damp_percent": _down_damping(source.spec, probe),
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "versions": versions(),
    }
    if source.rotation is not None:
        found[ROTATED] = True
    if tied_head(source.spec, probe.format):
        found[TIED_HEAD] = "solved"
    if not get_format(probe.format).outer:
        found["eight_bit"] = f"{PRIOR_8_BIT:.6f} of 4 bits in the same groups"
    return found


class _States:
    """Hidden states entering each layer, of each token set in a file without a name: it goes with the process, however
    that ends.

    Layers are read from the last to the first, and a file ends before the last one that was read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, IO[bytes]] = {}
        self.shapes: dict[str, torch.Size] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.files.values():
            file.close()

    def write(self, name: str, h_NTH: torch.Tensor) -> None:
        """Add what enters the next layer."""
        if name not in self.files:
            self.files[name] = tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115 - open between the passes
            self.shapes[name] = h_NTH.shape
        file = self.files[name]
        file.write(raw_bytes(h_NTH.to(_STORED)))
        file.flush()

    def read(self, name: str, layer: int) -> torch.Tensor:
        """What entered a layer, as written; its disk is free again."""
        h_NTH = torch.empty(self.shapes[name], dtype=_STORED)
        start = layer * h_NTH.nbytes
        fill(h_NTH, self.files[name], start, self.directory)
        self.files[name].truncate(start)
        return h_NTH


def _token_sets(probe: Probe) -> dict[str, torch.Tensor]:
    return {"solver": probe.solver_NT, "probe": probe.probe_NT}


def _forward(
    source: Checkpoint,
    workers: Workers,
    probe: Probe,
    shares: Mapping[str, Share],
    states: _States,
    listen: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """Keep what enters each layer; returns what leaves the last one, of the rank's share of either token set."""
    spec = source.spec
    own = {name: ids_NT[shares[name].windows] for name, ids_NT in _token_sets(probe).items()}
    hidden = {
        name: (torch.empty(*ids_NT.shape, spec.hidden_size, dtype=workers.dtype), ids_NT)
        for name, ids_NT in own.items()
    }
    embed(source, hidden)
    for layer in range(spec.num_hidden_layers):
        workers.fill(source.finite_layer_state(layer))
        for name, (h_NTH, _) in hidden.items():
            states.write(name, h_NTH)
            workers.run_layer(h_NTH, shares[name])
        workers.release()
        source.refuse_changed()
        listen(f"sensitivity: layer {layer} read, of {spec.num_hidden_layers}")
    return {name: h_NTH for name, (h_NTH, _) in hidden.items()}


def _offered(spec: ModelSpec, fused: FusedGroup, probe: Probe) -> tuple[Scheme, ...]:
    """The table's schemes of a fused group; without any on offer 4 bits per channel, which only a recipe asks for."""
    form = get_format(probe.format)
    return schemes_for(spec, fused, form, None if form.outer else options_of(probe.asymmetric)) or (Scheme(4, -1),)


def _errors(
    workers: Workers, h_NTH: torch.Tensor, share: Share, probe: Probe
) -> tuple[dict[str, dict[Scheme, dict[str, torch.Tensor]]], dict[str, dict[Scheme, float]]]:
    """GPTQ's weight errors [rows, in] by fused group, scheme and path in the layer, in bfloat16 on the CPU; and by
    group and scheme the energy of the output errors relative to the outputs, summed over the group's linears.

    Errors are of `sensitivity_rows`, times the square root of all rows over these.

    One Hessian at a time is on the network's device: the layer's windows go through it up to each stage anew. Ranks
    share windows and rows.
    """
    network = workers.first
    errors: dict[str, dict[Scheme, dict[str, torch.Tensor]]] = {}
    lost: dict[str, dict[Scheme, float]] = {}
    for stage in network.spec.architecture.stages:
        last = stage == network.spec.architecture.stages[-1]
        damping = _down_damping(network.spec, probe) if last else DAMP_PERCENT
        triangle, hessian = Triangle(network.spec.size(stage.inputs)), _hessian(workers, stage, h_NTH, share).cpu()
        whole = {path: network.weight(path) for path in stage.paths}
        weights = {path: w_OI[_rows(len(w_OI))].float() for path, w_OI in whole.items()}
        free = get_format(probe.format).outer  # then each linear is a group of its own
        groups = {path: path.rpartition(".")[2] if free else stage.name for path in stage.paths}
        offered = _offered(network.spec, (0, groups[stage.paths[0]]), probe)
        schemes = list(dict.fromkeys(map(solved_as, offered)))
        for scheme in schemes:
            solved = _solved(workers, weights, hessian, triangle, scheme.grid(), damping)
            for path, (qtensor, stats) in solved.items():
                error = qtensor.dequantize().sub_(weights[path]).mul_(math.sqrt(len(whole[path]) / len(weights[path])))
                error = error.to(torch.bfloat16).cpu()
                errors.setdefault(groups[path], {}).setdefault(scheme, {})[path] = error
                of_group = lost.setdefault(groups[path], {})
                of_group[scheme] = of_group.get(scheme, 0.0) + 10 ** (stats.error_db / 10)
            del solved, qtensor, stats  # codes and scales are on the device
    return errors, lost


def _solved(
    workers: Workers,
    weights: Mapping[str, torch.Tensor],
    hessian: torch.Tensor,
    triangle: Triangle,
    grid: Grid,
    damping: float = DAMP_PERCENT,
) -> Solved:
    """The weights as GPTQ alone rounds them, on the network's device; ranks share their rows.

    hessian: the triangle's values.
    """
    own_II = triangle.square(hessian.to(workers.first.device))  # overwritten
    return solve_on_ranks(workers, weights, own_II, grid, damp_percent=damping, sweeps=0)


def _down_damping(spec: ModelSpec, probe: Probe) -> float:
    return damping_of_products(spec.intermediate_size, probe.solver_NT.numel())


def _rows(rows: int) -> slice:
    found = sensitivity_rows(rows)
    return slice(found.start, found.stop, found.step)


def _hessian(workers: Workers, stage: Stage, h_NTH: torch.Tensor, share: Share) -> torch.Tensor:
    """Sum of x x' over what enters a stage's linears, a Triangle's values on the first worker's device."""
    width = workers.first.spec.size(stage.inputs)
    return summed_products(workers, h_NTH, share, width, lambda network, h: network.entering(stage, h))


def _backward(
    network: Network,
    errors: Mapping[str, Mapping[Scheme, Mapping[str, torch.Tensor]]],
    h_NTH: torch.Tensor,
    gradient_SNTH: torch.Tensor,
    share: Share,
) -> tuple[dict[str, dict[Scheme, torch.Tensor]], torch.Tensor]:
    """Scores [samples, windows] of each stage and scheme, and gradients at the layer's input, of a rank's windows."""
    samples, windows = gradient_SNTH.shape[:2]
    scores = {
        stage: {scheme: torch.zeros(samples, windows) for scheme in by_scheme} for stage, by_scheme in errors.items()
    }
    before_SNTH = torch.empty_like(gradient_SNTH)
    paths = [linear.path for linear in network.spec.architecture.linears]
    for part in share.batches(max(1, BACKWARD_TOKENS // h_NTH.shape[1])):
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
            at = {path: dy[..., _rows(dy.shape[2])] for path, dy in zip(paths, outputs, strict=True)}
            for (stage, scheme, path), change in changes.items():
                scores[stage][scheme][s, part] += (at[path] * change).sum((1, 2), dtype=torch.float32).cpu()
    return scores, before_SNTH


def _of_all_windows(
    scores: dict[str, dict[Scheme, torch.Tensor]], share: Share, ranks: Ranks
) -> dict[str, dict[Scheme, torch.Tensor]]:
    """Scores [samples, windows] of the windows of all ranks, from those of each one's own."""
    keys = [(stage, scheme) for stage, by_scheme in scores.items() for scheme in by_scheme]
    own_NKS = torch.stack([scores[stage][scheme].T for stage, scheme in keys], 1)
    found: dict[str, dict[Scheme, torch.Tensor]] = {stage: {} for stage in scores}
    for (stage, scheme), score_NS in zip(keys, ranks.all_windows(own_NKS, share).unbind(1), strict=True):
        found[stage][scheme] = score_NS.T.contiguous()
    return found


def _head_losses(
    workers: Workers, head: HeadWeights, hessian: torch.Tensor | None, h_NTH: torch.Tensor, probe: Probe, share: Share
) -> tuple[dict[FusedGroup, dict[Scheme | None, float]], dict[Scheme, torch.Tensor]]:
    """KL that the solved head causes, by scheme, to second order: half the variance of the logits' changes under p.

    hessian: that it is solved with; without one, where the format leaves it in 16 bit, nothing. The KL is read for one
    scheme, from one token in HEAD_STRIDE; other schemes have it times their relative output error over that one's, of
    the rows of the probe's tokens. Errors of these rows, [rows, hidden], come with it where the head is the embedding
    too: then the KL is under that name.
    """
    spec = head.checkpoint.spec
    if hessian is None:
        return {}, {}
    fused = OUTER, spec.outer_linears[-1].stage
    rows_UH = _probe_rows(probe, spec, head.rows)
    noise: dict[Scheme, float] = {}
    looked_up: dict[Scheme, torch.Tensor] = {}
    for scheme in _offered(spec, fused, probe):
        solved = _solved(workers, {"head": rows_UH}, hessian, Triangle(spec.hidden_size), scheme.grid())
        qtensor, stats = solved["head"]
        noise[scheme] = 10 ** (stats.error_db / 10)
        if spec.tie_word_embeddings:
            looked_up[scheme] = qtensor.dequantize().cpu().sub_(rows_UH)
    read = sorted(noise, key=lambda scheme: noise[scheme])[len(noise) // 2]
    factor = _head_kl(workers, head, hessian, h_NTH, read.grid(), share) / max(noise[read], 1e-30)
    return {fused: {scheme: factor * relative for scheme, relative in noise.items()}}, looked_up


def _head_kl(
    workers: Workers, head: HeadWeights, hessian: torch.Tensor, h_NTH: torch.Tensor, grid: Grid, share: Share
) -> float:
    """KL a token that the head causes as it is solved for one grid."""
    network = workers.first
    h_NTH = h_NTH[:, (h_NTH.shape[1] - 1) % HEAD_STRIDE :: HEAD_STRIDE]
    windows, tokens, hidden = h_NTH.shape
    x_PH = network.final_norm(h_NTH.reshape(-1, hidden).float().to(network.device), head.norm)
    log_total_P = torch.full((len(x_PH),), -torch.inf, device=network.device)
    for w_VH in _head_slices(head, network.device):
        for part in _chunks(share, tokens):
            log_total_P[part] = torch.logaddexp(log_total_P[part], (x_PH[part] @ w_VH.T).logsumexp(1))
    mean_P, square_P = torch.zeros_like(log_total_P), torch.zeros_like(log_total_P)
    solved = solved_slices(workers, head, hessian, grid, damp_percent=DAMP_PERCENT, sweeps=0)
    for w_VH, (qtensor, _) in zip(_head_slices(head, network.device), solved, strict=True):
        e_VH = qtensor.dequantize() - w_VH
        for part in _chunks(share, tokens):
            p_PV = (x_PH[part] @ w_VH.T - log_total_P[part, None]).exp_()
            change_PV = x_PH[part] @ e_VH.T
            mean_P[part] += (p_PV * change_PV).sum(1)
            square_P[part] += (p_PV * change_PV.square_()).sum(1)
    variance_NT = (square_P - mean_P.square()).view(windows, tokens)
    return float(workers.ranks.all_windows(variance_NT, share).mean()) / 2


def _probe_rows(probe: Probe, spec: ModelSpec, read: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """Rows of embedding or head that the probe's tokens name, each once, by token id, float32 on the CPU.

    read: rows start to stop.
    """
    ids_U, rows = probe.probe_NT.unique(), []
    for start, stop in row_slices(spec.vocab_size):
        here_U = ids_U[(ids_U >= start) & (ids_U < stop)]
        if len(here_U):
            rows.append(read(start, stop)[here_U - start].float().cpu())
    return torch.cat(rows)


def _head_slices(head: HeadWeights, device: torch.device) -> Iterator[torch.Tensor]:
    """The head's rows in float32, some at a time."""
    for start, stop in row_slices(head.checkpoint.spec.vocab_size):
        yield head.rows(start, stop).to(device)


def _add_embedding_losses(
    outer: dict[FusedGroup, dict[Scheme | None, float]],
    looked_up: Mapping[Scheme, torch.Tensor],
    source: Checkpoint,
    gradient_SNTH: torch.Tensor,
    probe: Probe,
    share: Share,
    ranks: Ranks,
) -> None:
    """Add to `outer` what rounding the embedding causes, by scheme; a tied head's is there already.

    looked_up: of `_head_losses`. gradient_SNTH: of log p with respect to what enters the first layer.
    """
    if not outer:
        return
    spec, fused = source.spec, (OUTER, source.spec.outer_linears[0].stage)
    row = outer.setdefault(fused, {})
    places_NT = probe.probe_NT.unique(return_inverse=True)[1][share.windows]
    if not looked_up:
        rows_UH = _probe_rows(probe, spec, lambda start, stop: source.read_slice(spec.embedding_tensor, start, stop))
    for scheme in _offered(spec, fused, probe):
        e_UH = looked_up[scheme] if looked_up else round_rows(rows_UH, scheme.grid()).dequantize() - rows_UH
        sums = [(gradient_SNTH[:, k] * e_UH[places_T]).sum((1, 2)) for k, places_T in enumerate(places_NT)]
        own_NS = torch.stack(sums) if sums else torch.zeros(0, len(gradient_SNTH))
        square = _mean_square(ranks.all_windows(own_NS, share).T)
        row[scheme] = row.get(scheme, 0.0) + square / (2 * probe.probe_NT.shape[1])


_CHUNK_TOKENS = 1024


def sampled_gradients(
    network: Network, head: HeadWeights, h_NTH: torch.Tensor, samples: int, seed: int, share: Share | None = None
) -> torch.Tensor:
    """Gradients of log p(y) with respect to h, float32 [samples, N, T, H]; a label y per position and sample.

    h_NTH: hidden states leaving the last layer. share: which windows they are; all by default. The head is read twice,
    slice by slice of the vocabulary. A slice's label replaces the one before with its share of the probability up to
    there, and is drawn from the slice by its cumulative probability; random numbers are each window's own.
    """
    windows, tokens, hidden = h_NTH.shape
    share = share or ALONE.share(range(windows))
    norm = head.norm
    h_PH = h_NTH.reshape(-1, hidden).float().to(network.device)
    x_PH = network.final_norm(h_PH, norm)
    generators = [torch.Generator().manual_seed((seed << 20) + window & (1 << 63) - 1) for window in share.windows]
    log_total_P = torch.full((len(x_PH),), -torch.inf, device=network.device)
    label_SPH = torch.zeros(samples, len(x_PH), hidden, device=network.device)  # head row of the label
    for w_VH in _head_slices(head, network.device):
        for part in _chunks(share, tokens):
            logits_PV = x_PH[part] @ w_VH.T
            highest_P1 = logits_PV.amax(1, keepdim=True)
            sum_PV = logits_PV.sub_(highest_P1).exp_().cumsum_(1)
            log_slice_P = sum_PV[:, -1].log() + highest_P1[:, 0]
            log_total_P[part] = torch.logaddexp(log_total_P[part], log_slice_P)
            drawn = [
                torch.rand(2, tokens, samples, generator=generators[window])
                for window in range(part.start // tokens, part.stop // tokens)
            ]
            replaces_PS, within_PS = torch.cat(drawn, 1).to(network.device)
            won_PS = replaces_PS < (log_slice_P - log_total_P[part]).exp_()[:, None]
            index_PS = torch.searchsorted(sum_PV, within_PS * sum_PV[:, -1:], right=True).clamp_(max=len(w_VH) - 1)
            for s in range(samples):
                label_SPH[s, part] = torch.where(won_PS[:, s, None], w_VH[index_PS[:, s]], label_SPH[s, part])
    mean_PH = torch.zeros_like(x_PH)  # of the head's rows under p
    for w_VH in _head_slices(head, network.device):
        for part in _chunks(share, tokens):
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


def _chunks(share: Share, tokens: int) -> list[slice]:
    """Positions of a rank's windows of so many tokens, some windows of a part at a time."""
    batches = share.batches(max(1, _CHUNK_TOKENS // tokens))
    return [slice(part.start * tokens, part.stop * tokens) for part in batches]
