"""Sizes of llama.cpp's GGUF quantizations, tensor by tensor, by the rules of llama_tensor_get_type
(src/llama-quant.cpp).

Checked against published files of Qwen2.5 (tests/test_weights.py). Which tensors get more bits is llama.cpp's choice.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwenq.errors import PlanError
from qwenq.model.spec import ModelSpec
from qwenq.planning.weights import Weights

# (bytes, values) of a block
BLOCKS = {
    "F32": (4, 1), "F16": (2, 1), "Q8_0": (34, 32), "Q5_1": (24, 32), "Q5_0": (22, 32), "Q4_0": (18, 32),
    "Q6_K": (210, 256), "Q5_K": (176, 256), "Q4_K": (144, 256),
}  # fmt: skip
BASE = {"F16": "F16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "Q4_0": "Q4_0"}
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # rows that no 256-value block divides
BITS_TO_TYPE = {4: "Q4_K_M", 8: "Q8_0", 16: "F16"}


def gguf_weights(spec: ModelSpec, file_type: str) -> Weights:
    """Weights of a GGUF of `file_type` (`Q4_K_M`, `Q8_0`, ...), without the file's header."""
    if file_type not in BASE:
        raise PlanError(f"unknown GGUF type {file_type!r}", hint=f"one of {', '.join(BASE)}")
    base = BASE[file_type]
    plain = base in ("F16", "Q8_0")
    head_type = base if plain else "Q6_K"
    v, h = spec.vocab_size, spec.hidden_size
    embed_type = head_type if spec.tie_word_embeddings else base
    return Weights(
        label=f"GGUF {file_type}",
        method="none" if file_type == "F16" else "gguf",
        bits={"F16": 16, "Q8_0": 8, "Q6_K": 6, "Q5_K_M": 5}.get(file_type, 4),
        group_size=0,
        embed=(_stored(embed_type, v, h),),
        norm=(4 * h,),
        head=() if spec.tie_word_embeddings else (_stored(head_type, v, h),),
        layers=tuple(tuple(_layer(spec, layer, base, file_type)) for layer in range(spec.num_hidden_layers)),
        widest_linear=0,
        intermediate_size=spec.intermediate_size,
        source="llama.cpp's type for each tensor",
    )


def _layer(spec: ModelSpec, layer: int, base: str, file_type: str) -> Iterator[int]:
    more = file_type in ("Q4_K_M", "Q5_K_M") and _use_more_bits(layer, spec.num_hidden_layers)
    for lin in spec.layer_linears(layer):
        kind = base
        if lin.kind == "v_proj":
            kind = "Q6_K" if more else base
            if spec.num_hidden_layers == 80 and kind == "Q4_K":  # LLM_TYPE_70B: eight heads share a value head
                kind = "Q5_K"
        elif lin.kind == "down_proj" and more:
            kind = "Q6_K"
        yield _stored(kind, lin.out_features, lin.in_features)
        if lin.bias:
            yield 4 * lin.out_features
    yield 4 * spec.hidden_size
    yield 4 * spec.hidden_size
    for _ in spec.architecture.qk_norms:
        yield 4 * spec.head_dim


def _use_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _stored(kind: str, rows: int, columns: int) -> int:
    if columns % BLOCKS[kind][1]:
        kind = _FALLBACK.get(kind, "F16")
    n_bytes, values = BLOCKS[kind]
    return rows * columns // values * n_bytes
