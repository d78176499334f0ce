"""GPTQ (Frantar et al. 2023): round a weight column by column, each rounding error made good by later columns.

The form used here is the one of QuIP (Chee et al. 2023, theorem 6), which gives the same codes from one triangular
factor of the Hessian and needs no inverse: with H = L L' (L lower triangular) and columns taken from the last to the
first, the value to round for column k is  w_k + sum over j > k of (w_j - q_j) L[j, k] / L[k, k].

What is solved first is then improved by coordinate descent on tr(E (H + damp) E'): in turn each group's scale is
fitted to its codes, and each column rounded again with all others as they stand.

Shapes: I input columns, O output rows, K columns of one group, T tokens, G groups. Work tensors are transposed,
[I, O], so that a column of the weight is contiguous; weights of one unit lie side by side along O.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenq.errors import QwenqError
from qwenq.formats.base import Scheme
from qwenq.formats.qtensor import QTensor
from qwenq.solver.grid import absmax_grid, float16_scale, round_to_grid, search_grid

DAMP_PERCENT = 0.02  # of the mean of the Hessian's diagonal, as a fraction: the field's name for it
DAMP_TRIES = 4  # each ten times the last, and from the second on at least ten times LEAST_DAMP
LEAST_DAMP = 1e-4
FACTOR_BLOCK = 1024
SPAN = 128  # columns whose corrections from all earlier columns are fetched in one product
LEAF = 16  # columns corrected one by one
SWEEPS = 2  # of coordinate descent
STAT_ROWS = 1024  # rows of a weight from which its output error is estimated, evenly spaced
ROWS_AT_ONCE = 4096  # on a CPU: what a core's cache holds
_OVERFLOWED = "activations overflowed: compute in bfloat16 or float32"


@dataclass(frozen=True)
class SolveStats:
    """What one linear, or some of its rows, lost. dB figures are 10 log10 of error over signal; -inf for no error."""

    error: float  # tr(E H E') over STAT_ROWS rows: of outputs on calibration inputs; nan without H
    signal: float  # tr(W H W') over the same rows
    weight_error: float
    weight_signal: float
    damp_percent: float  # the damping that worked
    fallback: str = ""  # why the factorization was given up and weights were only rounded, or ""

    @property
    def error_db(self) -> float:
        return decibel(self.error, self.signal)

    @property
    def weight_error_db(self) -> float:
        return decibel(self.weight_error, self.weight_signal)


@dataclass(frozen=True)
class ResidualCovariance:
    """What outputs of the unrounded weights are short of: sums of x r' over tokens, float32 [in, out]."""

    whole_IO: Tensor
    half_IO: Tensor  # over the first half of the tokens alone, as many as in the other half

    def rows(self, low: int, high: int, device: torch.device) -> ResidualCovariance:
        """That of outputs low to high."""
        return ResidualCovariance(self.whole_IO[:, low:high].to(device), self.half_IO[:, low:high].to(device))


def decibel(error: float, signal: float) -> float:
    """10 log10(error / signal), with -inf for no error and nan where one is."""
    if math.isnan(error):
        return error
    if error <= 0:
        return -math.inf
    return 10 * math.log10(error / signal) if signal > 0 else math.inf


def add_to_hessian(h_II: Tensor, x_TI: Tensor) -> None:
    """Add x' x to the upper triangle of `h_II` (float32, in place); what lies below the diagonal means nothing.

    The triangle is added in block rows, which saves almost half of the work. `solve_unit` reads the upper triangle.
    """
    width = h_II.shape[0]
    x_TI = x_TI.reshape(-1, width).float()
    step = max(256, -(-width // 16))
    for start in range(0, width, step):
        h_II[start : start + step, start:].addmm_(x_TI[:, start : start + step].T, x_TI[:, start:])


def mirror_upper(h_II: Tensor) -> None:
    """Make `h_II` symmetric by copying its upper triangle below the diagonal, in place."""
    width = h_II.shape[0]
    for start in range(0, width, FACTOR_BLOCK):
        stop = min(start + FACTOR_BLOCK, width)
        h_II[start:stop, :start] = h_II[:start, start:stop].T
        corner = h_II[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)


def permute_symmetric(h_II: Tensor, order_I: Tensor) -> None:
    """h[order][:, order], in place, with one strip of extra memory."""
    width = h_II.shape[0]
    for start in range(0, width, FACTOR_BLOCK):
        h_II[start : start + FACTOR_BLOCK] = h_II[start : start + FACTOR_BLOCK, order_I]
    for start in range(0, width, FACTOR_BLOCK):
        h_II[:, start : start + FACTOR_BLOCK] = h_II[order_I, start : start + FACTOR_BLOCK]


def factor_lower(h_II: Tensor, damp: float) -> bool:
    """Cholesky factor of h + damp * identity into the lower triangle of `h_II`, diagonal included, in place.

    Above the diagonal `h_II` stays as it was. False when the matrix is not positive definite (lower triangle then
    undefined).
    """
    width = h_II.shape[0]
    for start in range(0, width, FACTOR_BLOCK):
        stop = min(start + FACTOR_BLOCK, width)
        done_KI = h_II[start:stop, :start]
        corner_KK = h_II[start:stop, start:stop] - done_KI @ done_KI.T
        corner_KK.diagonal().add_(damp)
        corner_KK, info = torch.linalg.cholesky_ex(corner_KK)
        if int(info) != 0 or not bool(corner_KK.isfinite().all()):
            return False
        target_KK = h_II[start:stop, start:stop]
        target_KK.copy_(target_KK.triu(1) + corner_KK)
        if stop < width:
            below_IK = h_II[stop:, start:stop]
            below_IK.addmm_(h_II[stop:, :start], done_KI.T, alpha=-1)
            below_IK.copy_(torch.linalg.solve_triangular(corner_KK.T, below_IK, upper=True, left=False))
    return True


def processing_order(diagonal_I: Tensor, scheme: Scheme) -> Tensor:
    """Column order in which the most active column comes last and groups stay whole: `g_idx` remains trivial."""
    width = scheme.group_width(diagonal_I.numel())
    diagonal_GK = diagonal_I.view(-1, width)
    first_G1 = width * torch.arange(diagonal_GK.shape[0], device=diagonal_I.device)[:, None]
    order_GK = diagonal_GK.argsort(dim=1, stable=True) + first_G1
    return order_GK[diagonal_GK.sum(1).argsort(stable=True)].reshape(-1)


def _solve_columns(
    t_KO: Tensor,
    e_KO: Tensor,
    codes_KO: Tensor,
    r_KK: Tensor,
    inverse_O: Tensor,
    scale_O: Tensor,
    zero_O: Tensor,
    top: int,
) -> None:
    """Round columns from the last to the first, halving recursively so that most corrections are matrix products.

    In: `e_KO` the weights, `t_KO` the weights plus the corrections from columns outside this range.
    Out: `e_KO` weights minus rounded weights, `t_KO` the values that were rounded, `codes_KO` codes in float32.
    """
    columns = t_KO.shape[0]
    if columns > LEAF:
        half = columns // 2
        _solve_columns(t_KO[half:], e_KO[half:], codes_KO[half:], r_KK[half:, half:], inverse_O, scale_O, zero_O, top)
        t_KO[:half].addmm_(r_KK[half:, :half].T, e_KO[half:])
        _solve_columns(t_KO[:half], e_KO[:half], codes_KO[:half], r_KK[:half, :half], inverse_O, scale_O, zero_O, top)
        return
    for k in range(columns - 1, -1, -1):
        value_O, code_O = t_KO[k], codes_KO[k]
        if k + 1 < columns:
            value_O.addmv_(e_KO[k + 1 :].T, r_KK[k + 1 :, k])
        torch.addcmul(zero_O, value_O, inverse_O, out=code_O)
        code_O.round_().clamp_(0, top)
        e_KO[k].addcmul_(code_O - zero_O, scale_O, value=-1)


def _solve_gptq(e_IO: Tensor, h_II: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [I, O], scales and zeros float32 [G, O].

    `h_II` holds L below and on the diagonal. `e_IO` comes in as the weights and leaves as weights - rounded weights.
    With all corrections made, an error e of column k costs (L[k, k] e)**2: the weight of the scale search.
    """
    columns, rows = e_IO.shape
    width = scheme.group_width(columns)
    span = max(width, SPAN // width * width)
    at_once = ROWS_AT_ONCE if e_IO.device.type == "cpu" else rows
    pivots_I = h_II.diagonal().clone()
    codes_IO = torch.empty(columns, rows, dtype=torch.uint8, device=e_IO.device)
    scales_GO, zeros_GO = (torch.empty(columns // width, rows, device=e_IO.device) for _ in range(2))
    for start in range((columns - 1) // span * span, -1, -span):
        stop = min(start + span, columns)
        r_SS = h_II[start:stop, start:stop].tril() / pivots_I[start:stop]
        p_SO = h_II[stop:, start:stop].T @ e_IO[stop:]  # corrections from all columns already rounded
        p_SO.div_(pivots_I[start:stop, None])
        for first in range(0, rows, at_once):
            part = slice(first, first + at_once)
            for low in range(stop - start - width, -1, -width):
                group = slice(low, low + width)
                whole = slice(start + low, start + low + width)
                r_KK, w_KO = r_SS[group, group], e_IO[whole, part]
                # the weights as they stand when this group's turn comes, were the group itself not rounded
                moved_KO = torch.linalg.solve_triangular(r_KK.T, p_SO[group, part], upper=True, unitriangular=True)
                e_KO = w_KO + moved_KO
                scale_O, zero_O = search_grid(e_KO, pivots_I[whole].square(), scheme)
                q_KO = torch.empty_like(e_KO)
                _solve_columns(e_KO.clone(), e_KO, q_KO, r_KK, 1 / scale_O, scale_O, zero_O, scheme.levels - 1)
                codes_IO[whole, part] = q_KO
                index = (start + low) // width
                scales_GO[index, part], zeros_GO[index, part] = scale_O, zero_O
                w_KO.copy_(e_KO.sub_(moved_KO))
                if low:
                    p_SO[:low, part].addmm_(r_SS[group, :low].T, w_KO)
    return codes_IO, scales_GO, zeros_GO


def _descend(
    e_IO: Tensor,
    codes_IO: Tensor,
    scales_GO: Tensor,
    zeros_GO: Tensor,
    h_II: Tensor,
    diagonal_I: Tensor,
    damp: float,
    scheme: Scheme,
) -> None:
    """One sweep of descent on tr(E (H + damp) E') over scales and codes, all in place.

    `h_II` holds H above its diagonal, which is `diagonal_I`. For column k, all else fixed, the best value to round is
    q_k + (H E)_k / H_kk. A scale keeps its sign.
    """
    columns, rows = e_IO.shape
    width = scheme.group_width(columns)
    at_once = ROWS_AT_ONCE if e_IO.device.type == "cpu" else rows
    for index in range(columns // width - 1, -1, -1):
        start, stop = index * width, (index + 1) * width
        group = slice(start, stop)
        corner_KK = h_II[group, group].triu(1)
        corner_KK += corner_KK.T.clone()
        corner_KK.diagonal().copy_(diagonal_I[group] + damp)
        pull_KO = corner_KK @ e_IO[group]
        pull_KO.addmm_(h_II[:start, group].T, e_IO[:start]).addmm_(h_II[group, stop:], e_IO[stop:])
        r_KK = corner_KK / corner_KK.diagonal()
        for first in range(0, rows, at_once):
            part = slice(first, first + at_once)
            zero_O, scale_O, e_KO = zeros_GO[index, part], scales_GO[index, part], e_IO[group, part]
            code_KO = codes_IO[group, part].float()
            unit_KO = code_KO - zero_O
            spread_KO = corner_KK @ unit_KO
            step_O = (unit_KO * pull_KO[:, part]).sum(0) / (unit_KO * spread_KO).sum(0)
            fitted_O = float16_scale(scale_O + step_O.nan_to_num_(0.0, 0.0, 0.0))
            fitted_O = torch.where((fitted_O < 0) == (scale_O < 0), fitted_O, scale_O)
            change_O = scale_O - fitted_O
            e_KO.addcmul_(unit_KO, change_O)
            pull_KO[:, part].addcmul_(spread_KO, change_O)
            scale_O.copy_(fitted_O)
            moved_KO = unit_KO.mul_(fitted_O)  # in: the rounded weights; out: how much they fell
            t_KO = moved_KO + pull_KO[:, part] / corner_KK.diagonal()[:, None]
            _solve_columns(t_KO, moved_KO, code_KO, r_KK, 1 / fitted_O, fitted_O, zero_O, scheme.levels - 1)
            e_KO.add_(moved_KO)
            codes_IO[group, part] = code_KO


def _solve_lower(b_IO: Tensor, h_II: Tensor) -> Tensor:
    """L^-1 b, in place, for the factor below and on the diagonal of `h_II`."""
    for start in range(0, h_II.shape[0], FACTOR_BLOCK):
        part_KO, corner_KK = b_IO[start : start + FACTOR_BLOCK], h_II[start : start + FACTOR_BLOCK][:, start:]
        part_KO.addmm_(h_II[start : start + FACTOR_BLOCK, :start], b_IO[:start], alpha=-1)
        corner_KK = corner_KK[:, :FACTOR_BLOCK].tril()
        part_KO.copy_(torch.linalg.solve_triangular(corner_KK, part_KO, upper=False))
    return b_IO


def _solve_upper(b_IO: Tensor, h_II: Tensor) -> Tensor:
    """L'^-1 b, in place, for the same factor."""
    columns = h_II.shape[0]
    for start in reversed(range(0, columns, FACTOR_BLOCK)):
        stop = min(start + FACTOR_BLOCK, columns)
        part_KO = b_IO[start:stop]
        part_KO.addmm_(h_II[stop:, start:stop].T, b_IO[stop:], alpha=-1)
        corner_KK = h_II[start:stop, start:stop].tril()
        part_KO.copy_(torch.linalg.solve_triangular(corner_KK.T, part_KO, upper=True))
    return b_IO


def _corrected(residual: ResidualCovariance, order_I: Tensor, h_II: Tensor) -> Tensor:
    """How weights [in, out], in processing order, should move for their outputs to be less short; overwrites its input.

    The damped least-squares fit (L L')^-1 s of few tokens is mostly noise. The difference of the two halves' sums has
    as much noise as their sum has and nothing else, so 1 - |L^-1 (s1 - s2)|^2 / |L^-1 (s1 + s2)|^2 estimates for each
    output the share of the fit that is not: the share that is kept (the positive-part rule of James and Stein, with a
    noise level that is measured, since tokens of a window are no independent draws).
    """
    noise_IO = residual.half_IO.mul_(2).sub_(residual.whole_IO)
    noise_O = _solve_lower(noise_IO.copy_(noise_IO[order_I]), h_II).square_().sum(0)
    fit_IO = _solve_lower(residual.whole_IO.copy_(residual.whole_IO[order_I]), h_II)
    share_O = (1 - noise_O / fit_IO.square().sum(0)).nan_to_num_(0.0, 0.0, 0.0).clamp_(0, 1)
    return _solve_upper(fit_IO.mul_(share_O), h_II)


def _solve_rounding(e_IO: Tensor, weight_I: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros by rounding to nearest: absmax scales, or searched ones when weights are given."""
    columns, rows = e_IO.shape
    width = scheme.group_width(columns)
    codes_IO = torch.empty(columns, rows, dtype=torch.uint8, device=e_IO.device)
    scales_GO, zeros_GO = (torch.empty(columns // width, rows, device=e_IO.device) for _ in range(2))
    for index in range(columns // width):
        group = slice(index * width, (index + 1) * width)
        w_KO = e_IO[group]
        grid = absmax_grid(w_KO, scheme) if weight_I is None else search_grid(w_KO, weight_I[group], scheme)
        scales_GO[index], zeros_GO[index] = grid
        q_KO = round_to_grid(w_KO, *grid, scheme)
        codes_IO[group] = q_KO
        w_KO.sub_(q_KO.sub_(grid[1]).mul_(grid[0]))
    return codes_IO, scales_GO, zeros_GO


def mean_of_live(diagonal_I: Tensor) -> float:
    """Mean of the Hessian's diagonal over columns that any input reached: padded columns change nothing. 0 for none."""
    live_I = diagonal_I[diagonal_I > 0]
    return float(live_I.mean()) if live_I.numel() else 0.0


def _factor(h_II: Tensor, diagonal_I: Tensor, damp_percent: float) -> tuple[float, str]:
    """Factor `h_II` in place with the least damping that works; what it was, and why none did (h_II restored) or ""."""
    mean, tried = mean_of_live(diagonal_I), damp_percent
    if mean <= 0:
        return tried, "no calibration input reached it: rounded to nearest"
    for attempt in range(DAMP_TRIES):
        tried = max(damp_percent, LEAST_DAMP if attempt else 0.0) * 10**attempt
        if factor_lower(h_II, tried * mean):
            return tried, ""
        h_II.diagonal().copy_(diagonal_I)
        mirror_upper(h_II)
    return tried, f"no Cholesky factor up to a damping of {tried:g}: rounded to nearest"


def _quadratic(x_IO: Tensor, h_II: Tensor, diagonal_I: Tensor) -> float:
    """Trace of x' h x for a symmetric h with diagonal `diagonal_I`, read above its diagonal alone."""
    total = float((x_IO.square().sum(1) * diagonal_I).sum())
    for start in range(0, h_II.shape[0], FACTOR_BLOCK):
        stop = min(start + FACTOR_BLOCK, h_II.shape[0])
        y_KO = h_II[start:stop, start:stop].triu(1) @ x_IO[start:stop]
        y_KO.addmm_(h_II[start:stop, stop:], x_IO[stop:])
        total += 2 * float(y_KO.mul_(x_IO[start:stop]).sum())
    return total


def _check_finite(
    weights: Mapping[str, Tensor], h_II: Tensor | None, residuals: Mapping[str, ResidualCovariance] | None
) -> None:
    for name, w_OI in weights.items():
        if not math.isfinite(float(w_OI.abs().max())):
            bad = int((~w_OI.isfinite()).sum())
            raise QwenqError(
                f"{name}: {bad} of {w_OI.numel()} weights are not finite",
                hint="the checkpoint is damaged or was converted to a dtype too small for it",
            )
    if h_II is not None:
        for start in range(0, h_II.shape[0], FACTOR_BLOCK):
            if not math.isfinite(float(h_II[start : start + FACTOR_BLOCK, start:].abs().max())):
                raise QwenqError(
                    f"{', '.join(weights)}: the Hessian of their inputs is not finite", hint=_OVERFLOWED
                )
    for name, residual in (residuals or {}).items():
        for sums_IO in (residual.whole_IO, residual.half_IO):
            for part_KO in sums_IO.split(FACTOR_BLOCK):
                if not math.isfinite(float(part_KO.abs().max())):
                    raise QwenqError(f"{name}: what its outputs are short of is not finite", hint=_OVERFLOWED)


def solve_unit(
    weights: Mapping[str, Tensor],
    h_II: Tensor | None,
    scheme: Scheme,
    *,
    damp_percent: float = DAMP_PERCENT,
    method: str = "gptq",
    sweeps: int = SWEEPS,
    residuals: Mapping[str, ResidualCovariance] | None = None,
    error_correction: float = 0.0,
) -> dict[str, tuple[QTensor, SolveStats]]:
    """Quantize linears [out, in] that read the same input, sharing one factorization.

    `h_II` (float32 [in, in]) is the sum of x x' over calibration tokens, not normalised; its upper triangle is read
    and **it is overwritten**. `damp_percent` is a fraction of the mean diagonal, raised tenfold while the factor does
    not exist (0: from LEAST_DAMP on); after DAMP_TRIES weights are rounded to the nearest value of a searched grid and
    `fallback` says so.
    `residuals` (by name, overwritten): sums over as many tokens of what outputs are short of. Weights are first moved
    by the share `error_correction` of what `_corrected` makes of them, and error figures count from there.
    `method` "rtn" rounds to nearest with absmax scales and takes the Hessian, if any, for the statistics alone.
    Raises QwenqError, naming tensors, for non-finite or ill-fitting input, and for scales that overflowed from it.
    """
    columns = next(iter(weights.values())).shape[1]
    width = scheme.group_width(columns)
    for name, w_OI in weights.items():
        if w_OI.shape[1] != columns or columns % width or (h_II is not None and h_II.shape != (columns, columns)):
            raise QwenqError(
                f"{name}: shape {list(w_OI.shape)} does not fit {columns} columns in groups of {width} and a Hessian "
                f"of shape {None if h_II is None else list(h_II.shape)}"
            )
    if method not in ("gptq", "rtn") or (h_II is None and method == "gptq"):
        raise QwenqError(f"{', '.join(weights)}: method {method!r} with{'out' if h_II is None else ''} a Hessian")
    _check_finite(weights, h_II, residuals)

    device = next(iter(weights.values())).device
    sizes = [w_OI.shape[0] for w_OI in weights.values()]
    e_IO = torch.empty(columns, sum(sizes), device=device)
    for part_IO, w_OI in zip(e_IO.split(sizes, dim=1), weights.values(), strict=True):
        part_IO.copy_(w_OI.T)
    del part_IO  # it would keep what is permuted below alive
    diagonal_I = torch.zeros(columns, device=device) if h_II is None else h_II.diagonal().clone()
    order_I = torch.arange(columns, device=device)
    if h_II is not None:
        mirror_upper(h_II)
        order_I = processing_order(diagonal_I, scheme)
        permute_symmetric(h_II, order_I)
        e_IO, diagonal_I = e_IO[order_I], diagonal_I[order_I]
    parts = [slice(stop - size, stop) for stop, size in zip(itertools.accumulate(sizes), sizes, strict=True)]
    samples = [slice(p.start, p.stop, -(-(p.stop - p.start) // STAT_ROWS)) for p in parts]
    signals = [math.nan if h_II is None else _quadratic(e_IO[:, rows], h_II, diagonal_I) for rows in samples]
    weight_norm_O = torch.linalg.vector_norm(e_IO, dim=0).square()

    tried, fallback = 0.0, ""
    if h_II is None or method == "rtn":
        codes_IO, scales_GO, zeros_GO = _solve_rounding(e_IO, None, scheme)
    else:
        tried, fallback = _factor(h_II, diagonal_I, damp_percent)
        damp = tried * mean_of_live(diagonal_I)
        if fallback:
            weight_I = diagonal_I.clamp(min=0) + max(1e-3 * float(diagonal_I.mean()), 1e-12)
            codes_IO, scales_GO, zeros_GO = _solve_rounding(e_IO, weight_I, scheme)
        else:
            for part_IO, name in zip(e_IO.split(sizes, dim=1), weights, strict=True):
                if residuals is not None and name in residuals:
                    part_IO.add_(_corrected(residuals[name], order_I, h_II), alpha=error_correction)
            codes_IO, scales_GO, zeros_GO = _solve_gptq(e_IO, h_II, scheme)
            for _ in range(sweeps):
                _descend(e_IO, codes_IO, scales_GO, zeros_GO, h_II, diagonal_I, damp, scheme)
    errors = [math.nan if h_II is None else _quadratic(e_IO[:, rows], h_II, diagonal_I) for rows in samples]
    weight_error_O = torch.linalg.vector_norm(e_IO, dim=0).square()
    groups_G = order_I.view(-1, width)[:, 0].div(width, rounding_mode="floor").argsort()
    codes_IO, scales_GO, zeros_GO = codes_IO[order_I.argsort()], scales_GO[groups_G], zeros_GO[groups_G]

    out: dict[str, tuple[QTensor, SolveStats]] = {}
    for name, part, error, signal in zip(weights, parts, errors, signals, strict=True):
        tensor = QTensor(
            codes_IO[:, part].T.contiguous(),
            scales_GO[:, part].T.half().contiguous(),
            zeros_GO[:, part].T.to(torch.uint8).contiguous(),
            scheme,
        )
        if not bool(tensor.scales_OG.isfinite().all()):
            raise QwenqError(f"{name}: scales are not finite", hint="its weights or inputs are too large for float32")
        weight_error, weight_signal = (float(x_O[part].double().sum()) for x_O in (weight_error_O, weight_norm_O))
        out[name] = (tensor, SolveStats(error, signal, weight_error, weight_signal, tried, fallback))
    return out
