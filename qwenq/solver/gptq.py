"""GPTQ (Frantar et al. 2023): round a weight column by column, each rounding error made good by later columns.

The form used here is the one of QuIP (Chee et al. 2023, theorem 6), which gives the same codes from one triangular
factor of the Hessian and needs no inverse: with H = L L' (L lower triangular) and columns taken from the last to the
first, the value to round for column k is  w_k + sum over j > k of (w_j - q_j) L[j, k] / L[k, k].

What is solved first is then improved by coordinate descent on tr(E (H + damp) E'): in turn each group's parameters are
fitted to its codes, and each column rounded again with all others as they stand. What values a group may take, and how
its parameters are found, is the grid's own business (solver/grid.py).

Shapes: I input columns, O output rows, K columns of one group, T tokens, G groups. Work tensors are transposed,
[I, O], so that a column of the weight is contiguous; weights of one fused group lie side by side along O.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenq.errors import QwenqError
from qwenq.io.tensors import all_finite
from qwenq.model.devices import multiplies_bfloat16
from qwenq.solver.columns import ColumnSolver
from qwenq.solver.grid import Grid, Parameters, QTensor

DAMP_PERCENT = 0.1  # of the mean of the Hessian's diagonal, as a fraction: the field's name for it
DAMP_TRIES = 4  # each ten times the last, and from the second on at least ten times LEAST_DAMP
LEAST_DAMP = 1e-4
FACTOR_BLOCK = 1024
SPAN = 128  # columns whose corrections from all earlier columns are fetched in one matmul
SWEEPS = 2  # of coordinate descent
ROW_BLOCK = 64  # rows: weights are cut between blocks, where what becomes of a row does not depend on the others
STAT_BLOCKS = 16  # of rows, evenly spaced, from which a weight's output error is estimated
NARROW_FROM = 2048  # rows: with fewer bfloat16 products are no faster (reports/LOG.md)
ROWS_AT_ONCE = 4096  # on a CPU: what a core's cache holds
_OVERFLOWED = "activations overflowed: compute in bfloat16 or float32"


@dataclass(frozen=True)
class SolveStats:
    """Losses of a linear by row, float64, and their sums. dB figures are 10 log10 of error over signal; -inf for none.

    Rows come in blocks: those of a part of a linear, and of the next part behind it, are those of the whole.
    """

    # E H E' and W H W' of STAT_BLOCKS blocks of rows: of outputs on calibration inputs, nan without H; E E' and W W'
    # of all rows
    by_row: tuple[Tensor, ...]
    damp_percent: float  # the damping that worked
    fallback: str = ""  # why the factorization was given up and weights were only rounded, or ""

    @property
    def error(self) -> float:
        return float(self.by_row[0].sum())

    @property
    def signal(self) -> float:
        return float(self.by_row[1].sum())

    @property
    def error_db(self) -> float:
        return decibel(self.error, self.signal)

    @property
    def weight_error_db(self) -> float:
        return decibel(float(self.by_row[2].sum()), float(self.by_row[3].sum()))


@dataclass(frozen=True)
class ResidualCovariance:
    """Cross-covariance of inputs x and residuals r, which outputs of the unrounded weights lack: sums of x r' over
    tokens, float32 [in, out].
    """

    whole_IO: Tensor
    half_IO: Tensor  # over the first half of the tokens alone, as many as in the other half
    first: int = 0  # output of the linear that the first one here is

    def rows(self, rows: range, device: torch.device) -> ResidualCovariance:
        """The cross-covariance of some outputs of the linear."""
        low, high = rows.start - self.first, rows.stop - self.first
        return ResidualCovariance(self.whole_IO[:, low:high].to(device), self.half_IO[:, low:high].to(device))


def decibel(error: float, signal: float) -> float:
    """10 log10(error / signal), with -inf for no error and nan where one is."""
    if math.isnan(error):
        return error
    if error <= 0:
        return -math.inf
    return 10 * math.log10(error / signal) if signal > 0 else math.inf


def mirror_upper(h_II: Tensor) -> None:
    """Make `h_II` symmetric by copying its upper triangle below the diagonal, in place."""
    width = h_II.shape[0]
    for start in range(0, width, FACTOR_BLOCK):
        stop = min(start + FACTOR_BLOCK, width)
        h_II[start:stop, :start] = h_II[:start, start:stop].T
        corner = h_II[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)


def permute_symmetric(h_II: Tensor, order_I: Tensor) -> None:
    """h[order][:, order], in place, with one row block of extra memory."""
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
        if int(info) != 0 or not all_finite(corner_KK):
            return False
        target_KK = h_II[start:stop, start:stop]
        target_KK.copy_(target_KK.triu(1) + corner_KK)
        if stop < width:
            below_IK = h_II[stop:, start:stop]
            below_IK.addmm_(h_II[stop:, :start], done_KI.T, alpha=-1)
            below_IK.copy_(torch.linalg.solve_triangular(corner_KK.T, below_IK, upper=True, left=False))
    return True


def processing_order(diagonal_I: Tensor, grid: Grid) -> Tensor:
    """Column order in which the most active column comes last and groups stay whole: `g_idx` remains trivial."""
    order_UK, active_U = torch.arange(diagonal_I.numel(), device=diagonal_I.device)[:, None], diagonal_I
    for width in reversed(grid.widths(diagonal_I.numel())):  # from columns to sub-groups to groups
        inner = width // order_UK.shape[1]
        active_UN = active_U.view(-1, inner)
        by_activity_UN1 = active_UN.argsort(dim=1, stable=True)[:, :, None]
        order_UK = order_UK.view(-1, inner, order_UK.shape[1]).take_along_dim(by_activity_UN1, 1).view(-1, width)
        active_U = active_UN.sum(1)
    return order_UK[active_U.argsort(stable=True)].reshape(-1)


def correction_dtype(rows: int, device: torch.device) -> torch.dtype:
    """The dtype that corrections between groups are multiplied in, of linears with so many rows together.

    bfloat16 from NARROW_FROM rows on, on a CPU that is faster at it: that moves a correction by some 500th of itself,
    far less than a step of the codes.
    """
    narrow = device.type == "cpu" and rows >= NARROW_FROM and multiplies_bfloat16(device)
    return torch.bfloat16 if narrow else torch.float32


class _GroupParameters:
    """Parameters of all groups, [n, O] each, filled group by group and part by part of the rows."""

    def __init__(self, groups: int, rows: int) -> None:
        self.groups, self.rows = groups, rows
        self.kept: tuple[Tensor, ...] = ()

    def put(self, index: int, part: slice, found: Parameters) -> None:
        """Keep what was found for rows `part` of group `index`."""
        if not self.kept:
            self.kept = tuple(p_NO.new_empty(self.groups * len(p_NO), self.rows) for p_NO in found)
        for kept_NO, p_NO in zip(self.kept, found, strict=True):
            kept_NO[index * len(p_NO) : (index + 1) * len(p_NO), part] = p_NO

    def of(self, index: int, part: slice) -> Parameters:
        """Those of rows `part` of group `index`."""
        counts = [len(kept_NO) // self.groups for kept_NO in self.kept]
        return tuple(kept[index * n : (index + 1) * n, part] for kept, n in zip(self.kept, counts, strict=True))


def _solve_gptq(
    e_IO: Tensor, h_II: Tensor, grid: Grid, products: torch.dtype
) -> tuple[Tensor, _GroupParameters]:
    """Codes uint8 [I, O], and parameters of all groups; `products` as in `solve_linears`.

    `h_II` holds L below and on the diagonal. `e_IO` comes in as the weights and leaves as weights - rounded weights.
    With all corrections made, an error e of column k costs (L[k, k] e)**2: its importance when a group is fitted.
    """
    columns, rows = e_IO.shape
    width = grid.group_width(columns)
    inner = grid.widths(columns)[-1]
    span = max(width, SPAN // width * width)
    at_once = ROWS_AT_ONCE if e_IO.device.type == "cpu" else rows
    solve_columns = ColumnSolver(grid, columns // inner)
    pivots_I = h_II.diagonal().clone()
    codes_IO = torch.empty(columns, rows, dtype=torch.uint8, device=e_IO.device)
    parameters = _GroupParameters(columns // width, rows)
    errors_IO = e_IO.to(products)  # of the columns already rounded
    for start in range((columns - 1) // span * span, -1, -span):
        stop = min(start + span, columns)
        r_SS = h_II[start:stop, start:stop].tril() / pivots_I[start:stop]
        p_SO = (h_II[stop:, start:stop].T.to(products) @ errors_IO[stop:]).float()  # corrections from these columns
        p_SO.div_(pivots_I[start:stop, None])
        for first in range(0, rows, at_once):
            part = slice(first, first + at_once)
            found: Parameters = ()

            def moved(columns: slice, part: slice = part, r_SS: Tensor = r_SS, p_SO: Tensor = p_SO) -> Tensor:
                """How far weights have moved when these columns' turn comes, were they not rounded themselves."""
                r_KK = r_SS[columns, columns]
                one_KK = torch.eye(len(r_KK), device=r_KK.device)
                inverse_KK = torch.linalg.solve_triangular(r_KK.T, one_KK, upper=True, unitriangular=True)
                return inverse_KK @ p_SO[columns, part]  # solving for all rows takes 3 to 7 times as long

            for low in range(stop - start - inner, -1, -inner):
                own, whole = slice(low, low + inner), slice(start + low, start + low + inner)
                moved_KO, w_KO = moved(own), e_IO[whole, part]
                e_KO = w_KO + moved_KO
                if inner == width:
                    found = grid.fit(e_KO, pivots_I[whole].square())
                    narrow = found
                else:
                    if (low + inner) % width == 0:
                        group = slice(low + inner - width, low + inner)
                        at = slice(start + group.start, start + group.stop)
                        found = grid.fit(e_IO[at, part] + moved(group), pivots_I[at].square())
                    found, narrow = grid.fit_within(found, low % width // inner, e_KO, pivots_I[whole].square())
                q_KO = torch.empty_like(e_KO)
                solve_columns(e_KO.clone(), e_KO, q_KO, r_SS[own, own], narrow)
                codes_IO[whole, part] = q_KO
                if low % width == 0:
                    parameters.put((start + low) // width, part, found)
                w_KO.copy_(e_KO.sub_(moved_KO))
                if low:
                    p_SO[:low, part].addmm_(r_SS[own, :low].T, w_KO)
        errors_IO[start:stop] = e_IO[start:stop]
    return codes_IO, parameters


def _descend(
    e_IO: Tensor,
    codes_IO: Tensor,
    parameters: _GroupParameters,
    h_II: Tensor,
    damped_I: Tensor,
    grid: Grid,
    products: torch.dtype,
) -> None:
    """One sweep of descent on tr(E (H + damp) E') over parameters and codes, all in place; see `solve_linears`.

    `h_II` holds H above its diagonal; `damped_I` is the diagonal of H + damp. For column k, all else fixed, the best
    value to round is q_k + (H E)_k / H_kk.
    """
    columns, rows = e_IO.shape
    width = grid.group_width(columns)
    at_once = ROWS_AT_ONCE if e_IO.device.type == "cpu" else rows
    solve_columns = ColumnSolver(grid, columns // width)
    errors_IO = e_IO.to(products)
    for index in range(columns // width - 1, -1, -1):
        start, stop = index * width, (index + 1) * width
        group = slice(start, stop)
        corner_KK = h_II[group, group].triu(1)
        corner_KK += corner_KK.T.clone()
        corner_KK.diagonal().copy_(damped_I[group])
        slope_KO = corner_KK @ e_IO[group]
        slope_KO += h_II[:start, group].T.to(products) @ errors_IO[:start]
        slope_KO += h_II[group, stop:].to(products) @ errors_IO[stop:]
        r_KK = corner_KK / corner_KK.diagonal()
        for first in range(0, rows, at_once):
            part = slice(first, first + at_once)
            e_KO, code_KO = e_IO[group, part], codes_IO[group, part].float()
            found, moved_KO = grid.refit(parameters.of(index, part), code_KO, corner_KK, e_KO, slope_KO[:, part])
            parameters.put(index, part, found)
            # moved_KO in: the values of the codes; out: how much they fell
            t_KO = moved_KO + slope_KO[:, part] / corner_KK.diagonal()[:, None]
            solve_columns(t_KO, moved_KO, code_KO, r_KK, found)
            e_KO.add_(moved_KO)
            codes_IO[group, part] = code_KO
        errors_IO[group] = e_IO[group]


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
    """Correction of weights [in, out], in processing order, that reduces their residual; overwrites its input.

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


def _solve_rounding(e_IO: Tensor, importance_I: Tensor | None, grid: Grid) -> tuple[Tensor, _GroupParameters]:
    """Codes and parameters by rounding to nearest; groups are fitted by `importance_I`, or just spanned without it."""
    columns, rows = e_IO.shape
    width = grid.group_width(columns)
    codes_IO = torch.empty(columns, rows, dtype=torch.uint8, device=e_IO.device)
    parameters = _GroupParameters(columns // width, rows)
    for index in range(columns // width):
        group = slice(index * width, (index + 1) * width)
        w_KO = e_IO[group]
        found = grid.fit(w_KO, None if importance_I is None else importance_I[group])
        parameters.put(index, slice(None), found)
        q_KO = grid.round(w_KO, found)
        codes_IO[group] = q_KO
        w_KO.sub_(grid.dequantize(q_KO, found))
    return codes_IO, parameters


def round_rows(w_OI: Tensor, grid: Grid) -> QTensor:
    """A weight rounded to nearest on fitted grids, all columns counting the same; rows do not depend on each other."""
    e_IO = w_OI.T.contiguous()
    codes_IO, parameters = _solve_rounding(e_IO, torch.ones(len(e_IO), device=e_IO.device), grid)
    kept = zip(parameters.kept, grid.stored_dtypes, strict=True)
    return QTensor(codes_IO.T.contiguous(), tuple(p_NO.T.to(dtype).contiguous() for p_NO, dtype in kept), grid)


def mean_of_live(diagonal_I: Tensor) -> float:
    """Mean of the Hessian's diagonal over columns that any input reached: padded columns change nothing. 0 for none."""
    live_I = diagonal_I[diagonal_I > 0]
    return float(live_I.mean()) if live_I.numel() else 0.0


def damping_of_products(columns: int, tokens: int) -> float:
    """Damping of a linear whose inputs are products of two others' outputs, as those of an FFN's `down`.

    What few tokens leave uncertain of a covariance's eigenvalues, sqrt(columns / tokens) of their mean (Marchenko and
    Pastur 1967), but not less than DAMP_PERCENT. Other linears' inputs vary in few directions, beside which the rest is
    small, and need no more than DAMP_PERCENT (reports/LOG.md).
    """
    return max(DAMP_PERCENT, round(math.sqrt(columns / tokens), 3))


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


def _quadratic(e_IO: Tensor, rows: list[int], h_II: Tensor | None, diagonal_I: Tensor) -> Tensor:
    """x' h x of columns `rows`, float64 [O], for a symmetric h with diagonal `diagonal_I`, read above it alone.

    nan without h.
    """
    if h_II is None:
        return e_IO.new_full((len(rows),), math.nan, dtype=torch.float64)
    whole = rows + [0] * (-len(rows) % ROW_BLOCK)  # whole blocks again: see ROW_BLOCK
    x_IO = e_IO[:, torch.tensor(whole, dtype=torch.int64, device=e_IO.device)]
    total_O = e_IO.new_zeros(len(whole), dtype=torch.float64)
    for start in range(0, h_II.shape[0], FACTOR_BLOCK):
        stop = min(start + FACTOR_BLOCK, h_II.shape[0])
        total_O += x_IO[start:stop].square().mul_(diagonal_I[start:stop, None]).sum(0)
        y_KO = h_II[start:stop, start:stop].triu(1) @ x_IO[start:stop]
        y_KO.addmm_(h_II[start:stop, stop:], x_IO[stop:])
        total_O += 2 * y_KO.mul_(x_IO[start:stop]).sum(0)
    return total_O[: len(rows)]


def _squared_norms(e_IO: Tensor) -> Tensor:
    """Sum of squares of each column, float32 [O]."""
    return torch.stack([part_KO.square().sum(0) for part_KO in e_IO.split(SPAN)]).sum(0)


def _sampled(first: int, whole: int, rows: int) -> list[int]:
    """From which rows the output error is estimated, of `rows` from `first` on of a weight of `whole` rows."""
    step = math.ceil(math.ceil(whole / ROW_BLOCK) / STAT_BLOCKS)
    return [row - first for row in range(first, first + rows) if row // ROW_BLOCK % step == 0]


def _check_finite(
    weights: Mapping[str, Tensor], h_II: Tensor | None, residuals: Mapping[str, ResidualCovariance] | None
) -> None:
    for name, w_OI in weights.items():
        if not all_finite(w_OI):
            bad = int((~w_OI.isfinite()).sum())
            raise QwenqError(
                f"{name}: {bad} of {w_OI.numel()} weights are not finite",
                hint="the checkpoint is damaged or was converted to a dtype too small for it",
            )
    if h_II is not None:
        for start in range(0, h_II.shape[0], FACTOR_BLOCK):
            if not all_finite(h_II[start : start + FACTOR_BLOCK, start:]):
                raise QwenqError(f"{', '.join(weights)}: the Hessian of their inputs is not finite", hint=_OVERFLOWED)
    for name, residual in (residuals or {}).items():
        for sums_IO in (residual.whole_IO, residual.half_IO):
            if not all_finite(sums_IO):
                raise QwenqError(f"{name}: the cross-covariance of its residual is not finite", hint=_OVERFLOWED)


def solve_linears(
    weights: Mapping[str, Tensor],
    h_II: Tensor | None,
    grid: Grid,
    *,
    damp_percent: float = DAMP_PERCENT,
    method: str = "gptq",
    sweeps: int = SWEEPS,
    residuals: Mapping[str, ResidualCovariance] | None = None,
    error_correction: float = 0.0,
    parts: Mapping[str, tuple[int, int]] | None = None,
    products: torch.dtype = torch.float32,
) -> dict[str, tuple[QTensor, SolveStats]]:
    """Quantize linears [out, in] that read the same input, sharing one factorization.

    `h_II` (float32 [in, in]) is the sum of x x' over calibration tokens, not normalised; its upper triangle is read
    and **it is overwritten**. `damp_percent` is a fraction of the mean diagonal, raised tenfold while the factor does
    not exist (0: from LEAST_DAMP on); after DAMP_TRIES weights are rounded to the nearest value of a fitted grid and
    `fallback` says so.
    `residuals` (by name, overwritten): sums over as many tokens of what outputs are short of. Weights are first moved
    by the share `error_correction` of what `_corrected` makes of them, and error figures count from there.
    `method` "rtn" rounds to nearest with absmax scales and takes the Hessian, if any, for the statistics alone.
    `parts` (by name): of a weight that is a part of the rows of another, its first row there and how many that has.
    `products`: the dtype that corrections between groups are multiplied in, of `correction_dtype`.
    Raises QwenqError, naming tensors, for non-finite or ill-fitting input, and for scales that overflowed from it.
    """
    columns = next(iter(weights.values())).shape[1]
    width = grid.group_width(columns)
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
    places, end = [], 0  # each weight's rows begin a block: what becomes of a row depends on its place in one
    for w_OI in weights.values():
        places.append(slice(end, end + len(w_OI)))
        end += math.ceil(len(w_OI) / ROW_BLOCK) * ROW_BLOCK
    padded = end > sum(map(len, weights.values()))
    e_IO = (torch.zeros if padded else torch.empty)(columns, end, device=device)
    for place, w_OI in zip(places, weights.values(), strict=True):
        e_IO[:, place] = w_OI.T
    diagonal_I = torch.zeros(columns, device=device) if h_II is None else h_II.diagonal().clone()
    order_I = torch.arange(columns, device=device)
    if h_II is not None:
        mirror_upper(h_II)
        order_I = processing_order(diagonal_I, grid)
        permute_symmetric(h_II, order_I)
        e_IO, diagonal_I = e_IO[order_I], diagonal_I[order_I]
    samples = [
        [place.start + row for row in _sampled(*(parts or {}).get(name, (0, len(w_OI))), rows=len(w_OI))]
        for (name, w_OI), place in zip(weights.items(), places, strict=True)
    ]
    signals = [_quadratic(e_IO, rows, h_II, diagonal_I) for rows in samples]
    weight_norm_O = _squared_norms(e_IO)

    tried, fallback = 0.0, ""
    if h_II is None or method == "rtn":
        codes_IO, parameters = _solve_rounding(e_IO, None, grid)
    else:
        tried, fallback = _factor(h_II, diagonal_I, damp_percent)
        damp = tried * mean_of_live(diagonal_I)
        if fallback:
            importance_I = diagonal_I.clamp(min=0) + max(1e-3 * float(diagonal_I.mean()), 1e-12)
            codes_IO, parameters = _solve_rounding(e_IO, importance_I, grid)
        else:
            for place, name in zip(places, weights, strict=True):
                if residuals is not None and name in residuals:
                    e_IO[:, place].add_(_corrected(residuals[name], order_I, h_II), alpha=error_correction)
            codes_IO, parameters = _solve_gptq(e_IO, h_II, grid, products)
            for _ in range(sweeps):
                _descend(e_IO, codes_IO, parameters, h_II, diagonal_I + damp, grid, products)
    errors = [_quadratic(e_IO, rows, h_II, diagonal_I) for rows in samples]
    weight_error_O = _squared_norms(e_IO)
    codes_IO, found = codes_IO[order_I.argsort()], [_in_column_order(p_NO, order_I) for p_NO in parameters.kept]

    out: dict[str, tuple[QTensor, SolveStats]] = {}
    for name, part, error_O, signal_O in zip(weights, places, errors, signals, strict=True):
        stored = [p[:, part].T.to(dtype).contiguous() for p, dtype in zip(found, grid.stored_dtypes, strict=True)]
        if not all(all_finite(p_ON) for p_ON in stored):
            raise QwenqError(f"{name}: scales are not finite", hint="its weights or inputs are too large for float32")
        tensor = QTensor(codes_IO[:, part].T.contiguous(), tuple(stored), grid)
        weight_losses = weight_error_O[part].double().cpu(), weight_norm_O[part].double().cpu()
        out[name] = (tensor, SolveStats((error_O.cpu(), signal_O.cpu(), *weight_losses), tried, fallback))
    return out


def _in_column_order(p_NO: Tensor, order_I: Tensor) -> Tensor:
    """Parameters found in processing order, sorted by the columns they belong to."""
    width = len(order_I) // len(p_NO)
    return p_NO[order_I.view(-1, width)[:, 0].div(width, rounding_mode="floor").argsort()]
