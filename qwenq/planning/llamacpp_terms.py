"""Memory of llama.cpp with every layer on a GPU and flash attention: compute buffers sized by the ubatch.

Sources: ollama#5913 (72B, 313.0 MiB), llama.cpp#11337 (32B, 307.0 MiB; q8_0 cache 4352 MiB), unsloth PR#7637 (mask).
"""

from __future__ import annotations

from qwenq.model.spec import ModelSpec
from qwenq.planning.engines import LLAMA_CPP_UBATCH, Engine, kv_bytes_per_value
from qwenq.planning.terms import Share, Term, Workload, merged
from qwenq.planning.weights import Weights

MIB = 1 << 20


def llamacpp_terms(
    spec: ModelSpec, weights: Weights, engine: Engine, work: Workload, share: Share
) -> tuple[tuple[Term, ...], str]:
    """Terms of one device; the embedding stays in host memory, a tied head is a second copy on the device."""
    tokens = -(-work.context // 256) * 256 * work.batch
    ubatch = min(work.prefill_chunk or LLAMA_CPP_UBATCH, tokens)
    held = sum(weights.layer_bytes[layer] for layer in share.layers)
    if share.head:
        held += sum(weights.norm) + sum(weights.head or weights.embed)
    value = kv_bytes_per_value(engine, work.kv_dtype)
    kv = int(2 * len(share.layers) * spec.kv_size * value * tokens)
    mask = 2 * ubatch * tokens * (4 if share.gpus > 1 else 1)
    scratch = int(1.3 * spec.hidden_size * tokens) if value != 2.0 else 0
    first = share.embed
    terms = [
        Term("weights", held, "exact", weights.source),
        Term("kv_cache", kv, "exact", f"2 x layers x KV width x tokens, {work.kv_dtype}; tokens in steps of 256"),
        compute_buffer(spec, weights, ubatch, share.head),
        Term("logits", mask, "reported", "attention mask, 2 bytes x ubatch x tokens, x 4 when split (unsloth#7637)"),
        Term(
            "dequantization", scratch, "reported", "scratch for a quantized cache, 0.74 to 2.02 x hidden a token",
            int(0.74 / 1.3 * scratch), int(2.02 / 1.3 * scratch),
        ),
        Term(
            "context", 325 * MIB if first else 600 * MIB, "reported",
            "320 to 330 MiB on the first device; up to 0.9 GB on each further one (one 27B measurement, unsloth)",
            256 * MIB, 400 * MIB if first else 900 * MIB,
        ),
    ]  # fmt: skip
    return merged(terms), f"a ubatch of {ubatch} tokens"


def compute_buffer(spec: ModelSpec, weights: Weights, ubatch: int, last: bool) -> Term:
    """llama.cpp's compute buffer: float32 logits and a hidden state on the last device, the MLP's tensors elsewhere."""
    if last:
        n_bytes = 4 * ubatch * (spec.vocab_size + spec.hidden_size)
        return Term("activations", n_bytes, "fitted", "4 bytes x ubatch x (vocabulary + hidden), ollama#5913")
    mlp = 4 * ubatch * (2 * weights.intermediate_size + 2 * spec.hidden_size)
    return Term("activations", mlp, "reported", "gate, up, two hidden states, float32; not measured", mlp // 2, 2 * mlp)
