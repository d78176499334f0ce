"""What a decoder-only model is made of, read from its config alone: shapes, names, counts. No tensors, no torch."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwenq.errors import CheckpointError
from qwenq.io.json import shown
from qwenq.io.safetensors import TensorSpec

_FAMILIES = Path(__file__).parents[1] / "data" / "families.json"
SUPPORTED_MODEL_TYPES = ("qwen2", "qwen3", "llama")

# Linears of one unit read the same input and are fused by engines, so they share bits, group size and Hessian.
UNITS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class LinearSpec:
    """One linear of a decoder layer: `weight` is [out_features, in_features]."""

    name: str  # model.layers.3.mlp.down_proj
    unit: str  # one of UNITS
    layer: int
    in_features: int
    out_features: int
    bias: bool

    @property
    def kind(self) -> str:
        """`q_proj`, `down_proj`, ..."""
        return self.name.rsplit(".", 1)[1]

    @property
    def parameters(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class ModelSpec:
    """Shapes of a Qwen2, Qwen2.5, Qwen3 (dense) or Llama model, under Hugging Face's names."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    extended_context: int  # the longest context the model's card allows, YaRN included
    name: str = ""
    attention_bias: bool = False  # q, k, v (Qwen2; Llama when its config says so)
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    official_quantized_intermediate_size: int | None = None  # padded width of the publisher's own GPTQ and AWQ files

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def layer_linears(self, layer: int) -> tuple[LinearSpec, ...]:
        """The seven linears of decoder layer `layer`, in the order they run."""
        h, i, q, kv = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        shape = {
            "q_proj": (h, q, self.attention_bias),
            "k_proj": (h, kv, self.attention_bias),
            "v_proj": (h, kv, self.attention_bias),
            "o_proj": (q, h, self.o_bias),
            "gate_proj": (h, i, self.mlp_bias),
            "up_proj": (h, i, self.mlp_bias),
            "down_proj": (i, h, self.mlp_bias),
        }
        return tuple(
            LinearSpec(f"model.layers.{layer}.{path}", unit, layer, *shape[path.rsplit(".", 1)[1]])
            for unit, paths in UNITS.items()
            for path in paths
        )

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every quantizable linear, layer by layer."""
        return tuple(lin for layer in range(self.num_hidden_layers) for lin in self.layer_linears(layer))

    def layer_tensors(self, layer: int, dtype: str = "BF16") -> Iterator[TensorSpec]:
        """Tensors of one 16-bit decoder layer."""
        prefix = f"model.layers.{layer}."
        yield TensorSpec(prefix + "input_layernorm.weight", dtype, (self.hidden_size,))
        for lin in self.layer_linears(layer):
            yield TensorSpec(lin.name + ".weight", dtype, (lin.out_features, lin.in_features))
            if lin.bias:
                yield TensorSpec(lin.name + ".bias", dtype, (lin.out_features,))
        if self.qk_norm:
            yield TensorSpec(prefix + "self_attn.q_norm.weight", dtype, (self.head_dim,))
            yield TensorSpec(prefix + "self_attn.k_norm.weight", dtype, (self.head_dim,))
        yield TensorSpec(prefix + "post_attention_layernorm.weight", dtype, (self.hidden_size,))

    def outer_tensors(self, dtype: str = "BF16") -> Iterator[TensorSpec]:
        """Tensors outside the decoder layers: embedding, final norm and, when untied, head."""
        yield TensorSpec("model.embed_tokens.weight", dtype, (self.vocab_size, self.hidden_size))
        yield TensorSpec("model.norm.weight", dtype, (self.hidden_size,))
        if not self.tie_word_embeddings:
            yield TensorSpec("lm_head.weight", dtype, (self.vocab_size, self.hidden_size))

    def tensors(self, dtype: str = "BF16") -> Iterator[TensorSpec]:
        """Every tensor of the 16-bit checkpoint."""
        yield from self.outer_tensors(dtype)
        for layer in range(self.num_hidden_layers):
            yield from self.layer_tensors(layer, dtype)

    @cached_property
    def parameters(self) -> int:
        """Stored parameters; a tied head counts once."""
        return sum(t.nbytes for t in self.tensors("I8"))

    @property
    def linear_parameters(self) -> int:
        """Parameters of the quantizable linears' weights."""
        return self.num_hidden_layers * sum(lin.parameters for lin in self.layer_linears(0))

    def kv_bytes_per_token(self, bytes_per_value: float = 2.0) -> float:
        """Bytes of key and value cache one token takes over all layers (16 bit: 2 bytes a value)."""
        return 2 * self.num_hidden_layers * self.kv_size * bytes_per_value


# More than any model has, and little enough that no list by layer and no product of two shapes is a danger.
_LARGEST = {"num_hidden_layers": 1000, "vocab_size": 1 << 24, "hidden_size": 1 << 18, "intermediate_size": 1 << 20,
            "head_dim": 1 << 14, "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12}  # fmt: skip
_LONGEST_CONTEXT = 1 << 40

# What transformers takes for a key that config.json lacks (5.23, configuration_*.py): None follows from other keys.
_DEFAULTS: dict[str, dict[str, int | None]] = {
    "qwen2": {"num_key_value_heads": 32, "head_dim": None},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "llama": {"num_key_value_heads": None, "head_dim": None},
}
SLIDING_WINDOW = 4096  # likewise, where use_sliding_window is set


def _whole(config: Mapping[str, Any], key: str, where: str, default: Any = None) -> int:
    value, most = config.get(key, default), _LARGEST.get(key, _LONGEST_CONTEXT)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {key} is {repr(value)[:40]}, wanted a positive whole number")
    if value > most:
        raise CheckpointError(f"{where}: {key} is {value:.6g}, more than any model has ({most})")
    return value


def spec_from_config(config: Mapping[str, Any], where: str = "config.json", name: str = "") -> ModelSpec:
    """Read a Hugging Face `config.json`; raises CheckpointError for what is unsupported or contradicts itself."""
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise CheckpointError(
            f"{where}: model_type {repr(model_type)[:40]} is not supported "
            f"(wanted one of {', '.join(SUPPORTED_MODEL_TYPES)})",
            hint="mixture-of-experts and vision models are outside this tool",
        )
    heads = _whole(config, "num_attention_heads", where)
    hidden = _whole(config, "hidden_size", where)
    given = {**_DEFAULTS[model_type], **config}
    kv_heads = heads if given["num_key_value_heads"] is None else _whole(given, "num_key_value_heads", where)
    if given["head_dim"] is None and hidden % heads:
        raise CheckpointError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = hidden // heads if given["head_dim"] is None else _whole(given, "head_dim", where)
    if heads % kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    max_position = _whole(config, "max_position_embeddings", where)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{where}: rope_scaling is {type(rope).__name__}, wanted an object")
    extended = max_position
    if rope.get("rope_type", rope.get("type")) == "yarn":
        factor, original = rope.get("factor", 1), rope.get("original_max_position_embeddings", max_position)
        numbers = isinstance(factor, int | float) and isinstance(original, int)
        if not numbers or not 0 < factor <= 1 << 20 or not 0 < original <= _LONGEST_CONTEXT:
            raise CheckpointError(
                f"{where}: rope_scaling has factor {repr(factor)[:40]} and original length {repr(original)[:40]}"
            )
        extended = max(extended, round(factor * original))
    llama_bias = model_type == "llama" and bool(config.get("attention_bias", False))
    qwen3_bias = model_type == "qwen3" and bool(config.get("attention_bias", False))
    return ModelSpec(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=_whole(config, "intermediate_size", where),
        num_hidden_layers=_whole(config, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_whole(config, "vocab_size", where),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=max_position,
        extended_context=_whole(config, "extended_context", where, default=extended),
        name=name,
        attention_bias=model_type == "qwen2" or llama_bias or qwen3_bias,
        o_bias=llama_bias or qwen3_bias,
        mlp_bias=model_type == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=model_type == "qwen3",
        official_quantized_intermediate_size=config.get("official_quantized_intermediate_size"),
    )


_OWNER = re.compile(r"qwen/|deepseek-ai/|meta-llama/(meta-)?")


def family_configs() -> dict[str, dict[str, Any]]:
    """Shipped configurations by family name (`Qwen2.5-72B`), each with the source of its figures.

    One written as `like` another has that one's figures but for its own.
    """
    text = _FAMILIES.read_text(encoding="utf-8")
    configs: dict[str, dict[str, Any]] = json.loads(text)
    return {name: configs.get(config.pop("like", ""), {}) | config for name, config in configs.items()}


def family_spec(name: str) -> ModelSpec | None:
    """The shipped model called `name`, or None. Case, its owner (`Qwen/`) and an `-Instruct` ending do not matter."""
    wanted = _OWNER.sub("", name.lower()).removesuffix("-instruct")
    for family, config in family_configs().items():
        if family.lower().removesuffix("-instruct") == wanted or family.lower().replace("-instruct", "") == wanted:
            return spec_from_config(config, where=f"family {family}", name=family)
    return None


_EXPERTS = re.compile(r"-A\d+(\.\d+)?B(-|$)|\d+x\d+(\.\d+)?B|(^|/)DeepSeek-(V[23]|R1)(-\d+)?$", re.I)


def refuse_experts(name: str) -> None:
    """CheckpointError for the name of a mixture-of-experts model, such as Qwen3-235B-A22B or Mixtral-8x7B."""
    if _EXPERTS.search(name):
        raise CheckpointError(
            f"{shown(name)}: mixture-of-experts models are not supported",
            hint="dense Qwen2, Qwen2.5, Qwen3 and Llama models are",
        )


def near_names(name: str) -> str:
    """What to write instead of a name that is neither a directory nor shipped."""
    families = {family.lower(): family for family in family_configs()}
    near = difflib.get_close_matches(name.lower().rpartition("/")[2], families, n=3, cutoff=0.75)
    if near:
        return f"near: {', '.join(families[key] for key in near)}"
    return "a shipped name such as Qwen2.5-72B or Llama-3.1-8B, a hub name such as Qwen/Qwen2.5-72B, or a folder"
