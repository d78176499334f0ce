"""Perplexity, KL divergence and top-1 agreement per token, and their summary with intervals over windows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from qwenq.results import DriftReport, Interval

METRICS_VERSION = 1  # raise it when a definition below changes: older figures are then not comparable
_RESAMPLES = 2000


@dataclass(frozen=True)
class TokenDrift:
    """Per predicted token, float32 [tokens]: loss under reference and checkpoint (nats), KL (nats), same top token."""

    reference_nll: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    same_top1: torch.Tensor
    non_finite: int


def compare_logits(reference_TV: torch.Tensor, logits_TV: torch.Tensor, targets_T: torch.Tensor) -> TokenDrift:
    """Compare two float32 logit matrices [tokens, vocabulary]; both are overwritten.

    KL(p || q) = sum_v p_v (log p_v - log q_v), with p the reference.
    """
    finite = torch.isfinite(reference_TV).all(-1) & torch.isfinite(logits_TV).all(-1)
    log_p = _log_softmax_(reference_TV)
    log_q = _log_softmax_(logits_TV)
    rows = targets_T[:, None]
    reference_nll = -log_p.gather(1, rows)[:, 0]
    nll = -log_q.gather(1, rows)[:, 0]
    same = (log_p.argmax(-1) == log_q.argmax(-1)).float()
    log_q.neg_().add_(log_p)  # log p - log q
    kl = log_q.mul_(log_p.exp_()).sum(-1).clamp_min_(0.0)
    return TokenDrift(reference_nll, nll, kl, same, int((~finite).sum()))


def _log_softmax_(logits_TV: torch.Tensor) -> torch.Tensor:
    return logits_TV.sub_(torch.logsumexp(logits_TV, dim=-1, keepdim=True))


@dataclass
class DriftMeter:
    """Collects TokenDrift chunk by chunk, in the order of the text's windows."""

    parts: list[TokenDrift] = field(default_factory=list)

    def add(self, part: TokenDrift) -> None:
        self.parts.append(part)

    def report(
        self,
        windows: int,
        *,
        noise_floor_kl: float,
        text: str,
        text_sha256: str,
        compute_dtype: str,
        window_tokens: int,
        seed: int = 0,
    ) -> DriftReport:
        """Summarise; the tokens of each window are resampled together, since they are not independent."""

        def per_window(name: str) -> np.ndarray:
            joined = torch.cat([getattr(p, name).cpu() for p in self.parts]).double().numpy()
            return joined.reshape(windows, -1)

        ref_nll, nll, kl, same = (per_window(n) for n in ("reference_nll", "nll", "kl", "same_top1"))
        picks = np.random.default_rng(seed).integers(0, windows, (_RESAMPLES, windows))
        delta = (nll - ref_nll).mean(1)

        def interval(values: np.ndarray, point: float) -> Interval:
            low, high = np.nanpercentile(values, [2.5, 97.5])
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
            perplexity_increase_percent=interval(
                100 * np.expm1(delta[picks].mean(1)), 100 * float(np.expm1(delta.mean()))
            ),
            kl=interval(kl.mean(1)[picks].mean(1), kl.mean()),
            kl_median=float(np.median(kl)),
            kl_p99=float(np.percentile(kl, 99)),
            top1_agreement=interval(same.mean(1)[picks].mean(1), same.mean()),
            noise_floor_kl=noise_floor_kl,
            non_finite=sum(p.non_finite for p in self.parts),
            tokens=int(kl.size),
            windows=windows,
            window_tokens=window_tokens,
            text=text,
            text_sha256=text_sha256,
            compute_dtype=compute_dtype,
            metrics_version=METRICS_VERSION,
        )
