"""Decode and prefill speed as a range, from bandwidth, compute and a per-layer overhead fitted to published runs.

Fitted to Qwen's A100-80GB table (batch 1, prompt plus 2,048 tokens; transformers 4.46, vLLM 0.6.3): seconds per step
    = overhead x layers + traffic x weight bytes / (ranks x bandwidth) + KV bytes / (ranks x bandwidth) + prefill / 2048
(transformers before 4.48 also moves its repeated keys and values, 3.9 times). The fit, and the error of every group of
rows, is in reports/estimator-validation.md; a range covers the worst row of its group.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case, Share
from qwenq.planning.rig import Gpu

MATRIX_RATE = 0.4  # of the dense tensor rate, in prefill; fitted 0.37 to 0.47 in vLLM
_PCIE_LANE_GB_S = {3: 0.985, 4: 1.969, 5: 3.938}  # one direction


class SpeedFit(NamedTuple):
    """Seconds of overhead a layer (and more with several ranks), traffic per weight byte, and the worst ratios seen."""

    layer_s: float
    rank_layer_s: float
    traffic: float
    low: float  # predicted time / published time, smallest and largest
    high: float
    source: str


LEAST = SpeedFit(0, 0, 1, 1, 1, "weights and cache read once, at the whole bandwidth")  # no range goes beyond
HOST_GB_S = (25, 80)  # a desktop CPU reading host memory: two channels of DDR4 or DDR5
# The fit is of one card and host; elsewhere the range widens by this. Qwen3-14B in BF16 on an L40S takes 42.4 ms a
# token where 44.5 are predicted, a 4B model on an L4 33.6 where 39.7 are (logs of vLLM, reports/engine-logs.md).
OTHER_CARD = 1.18
NARROW = 2.2  # times the least: a wider range is said as one figure and a factor


class Speed(NamedTuple):
    """Tokens a second of all requests together, low and high; None where a GPU's figure is unknown."""

    decode: tuple[float, float] | None
    prefill: tuple[float, float] | None
    basis: str
    batch: int = 1  # requests at once

    def text(self) -> str:
        """`decode 57.1 to 98.2 tokens/s, prefill 1,010 to 2,130 tokens/s (basis)`; `unknown (why)` where both are.

        Of several requests: `decode 228 to 393 tokens/s in all, 57.1 to 98.2 for each of 4, prefill ... in all`.
        """
        if self.decode is self.prefill is None:
            return f"unknown ({self.basis})"
        if self.batch == 1:
            return f"decode {_said(self.decode)}, prefill {_said(self.prefill)} ({self.basis})"
        decode = _said(self.decode, unit=" tokens/s in all", parts=self.batch)
        return f"decode {decode}, prefill {_said(self.prefill, unit=' tokens/s in all')} ({self.basis})"

    def short(self) -> dict[str, str]:
        """The same where there is little room: `57.1 to 98.2`, `≈ 9.61 (×÷ 1.9)`; empty where it is unknown."""
        return {"decode": _said(self.decode, short=True), "prefill": _said(self.prefill, short=True)}

    def to_json(self) -> dict[str, Any]:
        return {
            "decode_tokens_per_s": _rounded(self.decode),
            "prefill_tokens_per_s": _rounded(self.prefill),
            "basis": self.basis,
        }


def decode_seconds(case: Case, shares: Sequence[Share], fit: SpeedFit | None = None) -> float | None:
    """Fitted seconds of one step, a token for every sequence, at the full context; None when a bandwidth is unknown.

    Ranks of a stage run together. Weights that a kernel writes out in 16 bit are written and read once more.
    """
    spec, weights, engine, work = case.spec, case.weights, case.engine, case.work
    fit = fit or engine.run_fit(case, shares)
    tokens = work.context * work.batch
    seconds = 0.0
    for gpu, share, computed in zip(case.hardware.gpus, shares, _computed(case, shares), strict=True):
        if not share.used and not computed:
            continue
        if gpu.bandwidth_gb_s is None:
            return None
        layers, held = len(computed), engine.kept(weights, work, gpu)
        read = sum(held.layer_bytes[layer] for layer in computed) * fit.traffic
        if held.row_block_bytes and work.batch >= held.dense_from:
            read += 4 * layers * spec.linear_parameters / spec.num_hidden_layers
        if share.head:
            read += sum(weights.head or weights.embed) * fit.traffic
        read += 2 * layers * spec.kv_size * case.kv_bytes * tokens
        read += layers * engine.moved_in_attention(spec, tokens)
        overhead = (fit.layer_s + (fit.rank_layer_s if share.ranks > 1 else 0)) * layers
        seconds += (overhead + read / share.ranks / (gpu.bandwidth_gb_s * 1e9)) / share.ranks
    return seconds


def prefill_seconds(case: Case, shares: Sequence[Share]) -> float | None:
    """Seconds to read a prompt of the whole context at the engine's matrix rate; None when a tensor rate is unknown.

    Layers in host memory are computed on the first GPU like its own, in every engine.
    """
    spec, work = case.spec, case.work
    n, layers = work.prompt_tokens, spec.num_hidden_layers
    flops_layer = (2 * spec.linear_parameters / layers * n + 2 * n * n * spec.q_size) * work.batch
    seconds = 0.0
    for index, (gpu, share) in enumerate(zip(case.hardware.gpus, shares, strict=True)):
        computed = len(share.layers) + (len(_in_host_memory(spec, shares)) if index == 0 else 0)
        if not computed:
            continue
        if gpu.tensor_tflops is None:
            return None
        seconds += flops_layer * computed / share.ranks**2 / (gpu.tensor_tflops * 1e12 * case.engine.matrix_rate(gpu))
    return seconds


def _in_host_memory(spec: ModelSpec, shares: Sequence[Share]) -> list[int]:
    """Layers that no GPU holds."""
    held = {layer for share in shares for layer in share.layers}
    return [layer for layer in range(spec.num_hidden_layers) if layer not in held]


def _computed(case: Case, shares: Sequence[Share]) -> list[list[int]]:
    """Layers each GPU computes for a token; the first also those in host memory, unless the CPU does."""
    found = [list(share.layers) for share in shares]
    if not case.engine.host_layers_stay:
        found[0] += _in_host_memory(case.spec, shares)
    return found


def estimate_speed(case: Case, shares: Sequence[Share], offloaded_bytes: int = 0) -> Speed:
    """Decode and prefill ranges; weights in host memory cross the bus once a step and once a prefill chunk.

    Where the engine computes with them on the CPU they do so only in prefill: for a token they are read where they are,
    with their KV cache.
    """
    engine, work, gpus = case.engine, case.work, case.hardware.gpus
    fit = engine.run_fit(case, shares)
    wide = 1.0 if all("A100" in gpu.name for gpu in gpus) else OTHER_CARD
    decode, prefill = decode_seconds(case, shares), prefill_seconds(case, shares)
    least = decode_seconds(case, shares, LEAST) or 0
    if decode is prefill is None:
        return Speed(None, None, "neither bandwidth nor compute of these cards is known")
    basis = fit.source
    step = chunk = (0.0, 0.0)  # seconds at least and at most that weights in host memory add
    if offloaded_bytes:
        bus = bus_gb_s(gpus[0])
        if bus is None:
            return Speed(None, None, "the bus to host memory is unknown")
        size = engine.prefill_chunk(work)
        step = chunk = offloaded_bytes / (0.8e9 * bus), offloaded_bytes / (0.3e9 * bus)
        chunks_of = f"{engine.chunk_word} of {size} tokens"
        each = f"step and each {chunks_of}"
        basis += f"; {offloaded_bytes / 1e9:.1f} GB "
        if engine.host_layers_stay:
            low, high = HOST_GB_S
            kv = len(_in_host_memory(case.spec, shares)) * case.layer_kv_bytes
            read = offloaded_bytes + kv
            step, each = (read / (high * 1e9), read / (low * 1e9)), chunks_of
            basis += f"read by the CPU for each step with {kv / 1e9:.1f} GB of KV cache, "
            basis += f"assumed at {low} to {high} GB/s, "
        basis += f"cross the bus for each {each}, at 30 to 80 % of {bus:.0f} GB/s"
        chunks = -(-work.prompt_tokens // size)
        chunk = chunk[0] * chunks, chunk[1] * chunks
    return Speed(
        decode=None
        if decode is None
        else (
            work.batch / (decode / fit.low * wide + step[1]),
            work.batch / (max(least, decode / fit.high / wide) + step[0]),
        ),
        prefill=None
        if prefill is None
        else (
            work.prompt_tokens * work.batch / (prefill * 1.6 * wide + chunk[1]),
            work.prompt_tokens * work.batch / (prefill / 1.25 / wide + chunk[0]),
        ),
        basis=basis,
        batch=work.batch,
    )


def bus_gb_s(gpu: Gpu) -> float | None:
    """Bandwidth of the card's PCIe link in one direction, GB/s, as built; None when it is not PCIe."""
    match = re.fullmatch(r"PCIe (\d)\.0 x(\d+)", gpu.bus)
    return _PCIE_LANE_GB_S[int(match[1])] * int(match[2]) if match and int(match[1]) in _PCIE_LANE_GB_S else None


def three_digits(value: float) -> str:
    """`0.398`, `17.6`, `1,010`."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:#.3g}".rstrip(".")


def _said(pair: tuple[float, float] | None, *, short: bool = False, unit: str = " tokens/s", parts: int = 1) -> str:
    """A range, or where it is too wide for use its middle and how far off that may be; also of each of equal parts."""
    if pair is None:
        return "" if short else "unknown"
    low, high = pair
    narrow = high <= NARROW * low
    values = [low, high] if narrow else [(low * high) ** 0.5]
    said, each = (" to ".join(three_digits(value / n) for value in values) for n in (1, parts))
    factor = f"{(high / low) ** 0.5:.1f}"
    if short:
        return said if narrow else f"≈ {said} (×÷ {factor})"
    said += unit + (f", {each} for each of {parts}" if parts > 1 else "")
    return said if narrow else f"about {said}, within a factor of {factor}"


def _rounded(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else [round(pair[0], 2), round(pair[1], 2)]
