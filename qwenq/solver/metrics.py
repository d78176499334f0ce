"""Perplexity, KL divergence and top-1 agreement per token, and their summary with intervals over windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qwenq.results import DriftReport, Interval

METRICS_VERSION = 1  # raise it when a definition below changes: older figures are then not comparable
_RESAMPLES = 2000


@dataclass(frozen=True)
class TokenDrift:
    """Per predicted token, float64: loss under reference and checkpoint (nats), KL (nats), 1 for the same top token.

    NaN where a logit of either was not finite.
    """

    reference_nll: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    same_top1: torch.Tensor
    non_finite: int


class LogitComparison:
    """Compares two models' logits slice by slice of the vocabulary, so that no row is ever held whole.

    With logits a (reference) and b, normalisers A = sum_v exp a_v and B = sum_v exp b_v, and p_v = exp(a_v) / A:
    KL(p || q) = sum_v p_v (a_v - b_v) - log A + log B. Sums are kept relative to the largest logit so far.
    """

    def __init__(self, targets_T: torch.Tensor) -> None:
        rows = len(targets_T)

        def column(value: float) -> torch.Tensor:
            return torch.full((rows,), value, dtype=torch.float64, device=targets_T.device)

        self.targets_T = targets_T  # int64
        self.top = [column(-torch.inf), column(-torch.inf)]
        self.top_token = [torch.zeros_like(targets_T), torch.zeros_like(targets_T)]
        self.normaliser = [column(0.0), column(0.0)]
        self.target_logit = [column(torch.nan), column(torch.nan)]
        self.weighted = column(0.0)  # sum of exp(a - top) (a - b)
        self.finite = torch.ones(rows, dtype=torch.bool, device=targets_T.device)

    def add(self, rows: slice, start: int, a_TV: torch.Tensor, b_TV: torch.Tensor) -> None:
        """Take in float32 logits of tokens `rows` for the vocabulary slice that begins at `start`."""
        targets = self.targets_T[rows]
        inside = (targets >= start) & (targets < start + a_TV.shape[1])
        local = (targets - start).clamp(0, a_TV.shape[1] - 1)[:, None]
        exponentials = []
        for k, logits in enumerate((a_TV, b_TV)):
            self.finite[rows] &= torch.isfinite(logits.sum(-1))
            top, token = logits.max(-1)
            better = top > self.top[k][rows]
            self.top_token[k][rows] = torch.where(better, token + start, self.top_token[k][rows])
            new_top = torch.where(better, top.double(), self.top[k][rows])
            rescale = torch.exp(self.top[k][rows] - new_top)
            self.top[k][rows] = new_top
            exponential = torch.exp(logits - new_top.float()[:, None])
            self.normaliser[k][rows] = self.normaliser[k][rows] * rescale + exponential.sum(-1).double()
            found = logits.gather(1, local)[:, 0].double()
            self.target_logit[k][rows] = torch.where(inside, found, self.target_logit[k][rows])
            exponentials.append((exponential, rescale))
        exponential, rescale = exponentials[0]
        self.weighted[rows] = self.weighted[rows] * rescale + exponential.mul_(a_TV - b_TV).sum(-1).double()

    def result(self) -> TokenDrift:
        """Once every slice was taken in; a row with a logit that is not finite has NaN for every figure."""
        log_a, log_b = (top + total.log() for top, total in zip(self.top, self.normaliser, strict=True))
        kl = (self.weighted / self.normaliser[0] - log_a + log_b).clamp_min(0.0)
        same = (self.top_token[0] == self.top_token[1]).double()
        figures = log_a - self.target_logit[0], log_b - self.target_logit[1], kl, same
        reference_nll, nll, kl, same = (torch.where(self.finite, figure, torch.nan) for figure in figures)
        return TokenDrift(reference_nll, nll, kl, same, int((~self.finite).sum()))


@dataclass(frozen=True)
class Reading:
    """The text that both models read, and how it was computed."""

    text: str
    text_sha256: str
    windows: int
    window_tokens: int
    compute_dtype: str
    noise_floor_kl: float = 0.0  # of the reference in that dtype against float32


@np.errstate(over="ignore", invalid="ignore")  # beyond 709 nats a token a perplexity is infinite, without an interval
def summarise(tokens: TokenDrift, reading: Reading) -> DriftReport:
    """Summarise; the tokens of each window are resampled together, since they are not independent."""
    windows = reading.windows

    def per_window(name: str) -> np.ndarray:
        values: torch.Tensor = getattr(tokens, name)
        return values.double().cpu().numpy().reshape(windows, -1)

    ref_nll, nll, kl, same = (per_window(n) for n in ("reference_nll", "nll", "kl", "same_top1"))
    picks = np.random.default_rng(0).integers(0, windows, (_RESAMPLES, windows))
    delta = (nll - ref_nll).mean(1)

    def interval(values: np.ndarray, point: float) -> Interval:
        if windows == 1:
            return Interval(float(point), float("nan"), float("nan"))
        low, high = np.percentile(values, [2.5, 97.5])  # NaN when any is: a mean that is no number has no interval
        return Interval(float(point), float(low), float(high))

    def perplexity(losses: np.ndarray) -> tuple[float, float]:
        means = losses.mean(1)
        ppl = float(np.exp(means.mean()))
        se = float(means.std(ddof=1) / np.sqrt(windows)) * ppl if windows > 1 else float("nan")
        return ppl, se

    ref_ppl, ref_se = perplexity(ref_nll)
    ppl, se = perplexity(nll)
    return DriftReport(
        reference_perplexity=ref_ppl,
        reference_perplexity_se=ref_se,
        perplexity=ppl,
        perplexity_se=se,
        perplexity_increase_percent=interval(100 * np.expm1(delta[picks].mean(1)), 100 * float(np.expm1(delta.mean()))),
        kl=interval(kl.mean(1)[picks].mean(1), kl.mean()),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.percentile(kl, 99)),
        top1_agreement=interval(same.mean(1)[picks].mean(1), same.mean()),
        noise_floor_kl=reading.noise_floor_kl,
        non_finite=tokens.non_finite,
        tokens=int(kl.size),
        windows=windows,
        window_tokens=reading.window_tokens,
        text=reading.text,
        text_sha256=reading.text_sha256,
        compute_dtype=reading.compute_dtype,
        metrics_version=METRICS_VERSION,
    )
