"""Temporary memory of one forward pass: which tensors are alive together at the worst moment, in bytes, per GPU.

Counted from transformers' modelling code (Qwen2Model, Qwen2DecoderLayer, Qwen2MLP, Qwen2FlashAttention2; the same
variables live in 4.38 to 5.x, in Qwen3 and Llama). Symbols: n rows (batch x tokens of the chunk), H hidden size,
I intermediate size, Q query width, K key width, d head size, V vocabulary, c cached tokens. 2 bytes a value or as said.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwenq.machine import SCORE_BYTES
from qwenq.model.spec import ModelSpec
from qwenq.planning.engines import Engine, Kernel
from qwenq.planning.kernels import strip_weights
from qwenq.planning.weights import Weights


@dataclass(frozen=True)
class Peak:
    """Bytes alive at one moment besides weights and KV cache, and which moment that is."""

    n_bytes: int
    moment: str
    dequantization: int = 0  # the part of `n_bytes` that is dequantized weights


def prefill_peak(
    spec: ModelSpec,
    weights: Weights,
    engine: Engine,
    kernel: Kernel,
    rows: int,
    cached: int,
    first: bool,
    value_bytes: int = 2,
    *,
    widens: bool = False,
    reads_back: int = 0,
) -> Peak:
    """Worst moment inside a decoder layer: `rows` rows in flight, `cached` tokens x batch in the cache (with them).

    `widens`: products of 16-bit values are computed in float32. `reads_back`: bytes of all cached keys and values in
    the activations' dtype, where the cache has another.

    Alive throughout: the model's input embeddings (first GPU only), the layer's input, and inside the layer the
    residual and the normed input of the block that runs, with the rotary cosine and sine.
    """
    h, i, q, k = spec.hidden_size, weights.intermediate_size, spec.q_size, spec.kv_size
    outside = (h if first else 0) + h + (0 if engine.rotary_per_layer else 2 * spec.head_dim)
    dequantize = rows >= kernel.min_rows
    before = int(kernel.peak * weights.widest_linear) if dequantize else 0  # temporaries before the output exists
    during = int(kernel.hold * weights.widest_linear) if dequantize else 0
    if rows >= weights.strip_rows:
        during += weights.strip_bytes

    each = rows * value_bytes  # bytes of one value of every row
    in_mlp = (outside + 2 * h) * each  # and the residual and the normed input
    in_attention = (outside + h) * each  # there the layer's input is the residual itself
    moments = [
        Peak(in_mlp + 3 * i * each, "gate times up in the MLP"),  # silu(gate), up, product
        Peak(in_mlp + i * each + before, "dequantizing up_proj", before),
        Peak(in_mlp + 2 * i * each + during + _wide(h, i, rows, widens), "up_proj", during),
        Peak(in_mlp + (i + h) * each + during + _wide(i, h, rows, widens), "down_proj", during),
        Peak(in_attention + (3 * q + 2 * k) * each + reads_back, "cached keys and values read back"),
        Peak(in_attention + (2 * q + h) * each + reads_back + during, "o_proj"),  # while keys and values are held
        Peak(in_attention + (4 * q + 2 * k) * each, "rotary embedding"),  # q, q cos, rotated q sin, sum; k, v
        Peak((outside + 5 * h) * each, "norm in float32"),  # residual, float32 copy, its square or product
    ]
    if spec.qk_norm:
        moments.append(Peak(in_attention + 5 * q * each, "query norm"))  # q, float32 copy, its square or product
    if engine.repeats_kv and k != q:
        repeated = 2 * q * (each + cached * value_bytes)
        moments.append(Peak(in_attention + repeated, "repeated keys and values"))
    return max(moments, key=lambda peak: peak.n_bytes)


def _wide(columns: int, outputs: int, rows: int, widens: bool) -> int:
    """Bytes of a product's inputs in float32, and of a strip of its outputs."""
    return 4 * rows * (columns + min(outputs, strip_weights(columns, "cuda") // columns)) if widens else 0


def logits_peak(spec: ModelSpec, engine: Engine, rows: int, batch: int, *, first: bool, last: bool, gpus: int) -> Peak:
    """Logits after a prompt of `rows` rows: all positions in old transformers, the last one of each sequence now."""
    v = spec.vocab_size
    if not engine.full_logits:
        return Peak(batch * v * (2 + 4 + 4 + 4) if last else 0, "logits of the last position, float32, probabilities")
    if last:
        return Peak(rows * (v * (2 + 4) + spec.hidden_size * 2), "logits of every position and their float32 copy")
    # accelerate brings the output back to the device of the input (AlignDevicesHook, io_same_device)
    return Peak(rows * v * 4 if first and gpus > 1 else 0, "float32 logits of every position, brought back")


def attention_by_blocks(spec: ModelSpec, rows: int, cached: int, widens: bool = False) -> int:
    """Bytes of attention without a flash kernel (qwenq/attention.py): float32 keys and queries, output, scores.

    Where the device `widens` 16-bit products, values are copied in float32 too, and probabilities are not rounded.
    """
    scores = max(SCORE_BYTES, 16 * 4 * spec.num_attention_heads * cached)
    copied, alive = (2, 2) if widens else (1, 3)
    return copied * 4 * spec.kv_size * cached + (4 + 2 + 2) * spec.q_size * rows + alive * scores


def decode_peak(
    spec: ModelSpec,
    engine: Engine,
    cached: int,
    batch: int,
    last: bool,
    kv_bytes: float,
    strip_bytes: int = 0,
    reads_back: int = 0,
) -> Peak:
    """One new token a sequence with `cached` tokens x batch in the cache: growing one layer's keys, expanding them.

    `strip_bytes`: of weights written out even for one row.
    """
    # torch.cat has old and new keys of a layer side by side; this project's own cache is allocated once
    grown = reads_back if engine.name == "qwenq" else int(cached * spec.kv_size * kv_bytes)
    repeated = 4 * spec.q_size * cached if engine.repeats_kv and spec.kv_size != spec.q_size else 0
    logits = batch * spec.vocab_size * (2 + 4 + 4 + 4) if last else 0
    worst = max(grown, repeated, logits, strip_bytes)
    moment = "keys and values repeated to all heads" if worst == repeated else "a layer's keys while they grow"
    if worst == strip_bytes > 0:
        return Peak(worst, "weights written out", strip_bytes)
    return Peak(worst, "sampling" if worst == logits else moment)
