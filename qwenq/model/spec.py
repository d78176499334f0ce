"""Shapes, names and counts of a decoder-only model, read from its config alone. No tensors, no torch."""

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
from qwenq.model.architectures import ARCHITECTURES, Architecture, Stage

_FAMILIES = Path(__file__).parents[1] / "data" / "families.json"


@dataclass(frozen=True)
class LinearSpec:
    """One linear of a decoder layer: `weight` is [out_features, in_features]."""

    name: str  # model.layers.3.mlp.down_proj
    path: str  # mlp.down_proj
    stage: str  # of the architecture: linears of one stage are fused by engines
    layer: int
    in_features: int
    out_features: int
    bias: bool

    @property
    def kind(self) -> str:
        """`q_proj`, `down_proj`, ..."""
        return self.path.rpartition(".")[2]

    @property
    def parameters(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class ModelSpec:
    """Shapes of a model of one of the ARCHITECTURES, under Hugging Face's names."""

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
    bias_keys: tuple[str, ...] = ()  # of the architecture's, those that config.json sets
    official_quantized_intermediate_size: int | None = None  # padded width of the publisher's own GPTQ and AWQ files

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def architecture(self) -> Architecture:
        """The entry of the model's family."""
        return ARCHITECTURES[self.model_type]

    def layer_name(self, layer: int) -> str:
        """`model.layers.3`"""
        return f"{self.architecture.layers}.{layer}"

    def layer_prefix(self, layer: int) -> str:
        """The beginning of the names of a layer's tensors: `model.layers.3.`"""
        return self.layer_name(layer) + "."

    def size(self, *names: str) -> int:
        """The sum of sizes by their names: ("q_size", "kv_size")."""
        return sum(getattr(self, name) for name in names)

    def stage_linears(self, layer: int, stage: Stage | str) -> tuple[LinearSpec, ...]:
        """The linears of one stage of decoder layer `layer`."""
        if isinstance(stage, str):
            stage = self.architecture.stage(stage)
        prefix, columns = self.layer_prefix(layer), self.size(stage.inputs)
        return tuple(
            LinearSpec(
                prefix + linear.path,
                linear.path,
                stage.name,
                layer,
                columns,
                self.size(*linear.outputs),
                linear.bias is True or linear.bias in self.bias_keys,
            )
            for linear in stage.linears
        )

    def layer_linears(self, layer: int) -> tuple[LinearSpec, ...]:
        """The linears of decoder layer `layer`, in the order they run."""
        if layer not in self._linears:
            stages = self.architecture.stages
            self._linears[layer] = tuple(lin for stage in stages for lin in self.stage_linears(layer, stage))
        return self._linears[layer]

    @cached_property
    def _linears(self) -> dict[int, tuple[LinearSpec, ...]]:
        return {}

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every quantizable linear, layer by layer."""
        return tuple(lin for layer in range(self.num_hidden_layers) for lin in self.layer_linears(layer))

    @cached_property
    def outer_linears(self) -> tuple[LinearSpec, ...]:
        """Embedding and, when untied, head as linears of layer -1: some formats quantize them too."""
        entry, shape = self.architecture, (-1, self.hidden_size, self.vocab_size, False)
        names = [(entry.embedding, "embedding"), *([] if self.tie_word_embeddings else [(entry.head, "head")])]
        return tuple(LinearSpec(name, name, stage, *shape) for name, stage in names)

    def layer_tensors(self, layer: int, dtype: str = "BF16") -> Iterator[TensorSpec]:
        """Tensors of one 16-bit decoder layer."""
        prefix, entry = self.layer_prefix(layer), self.architecture
        first, *others = (stage.norm for stage in entry.stages if stage.norm)
        yield TensorSpec(f"{prefix}{first}.weight", dtype, (self.hidden_size,))
        for lin in self.layer_linears(layer):
            yield TensorSpec(lin.name + ".weight", dtype, (lin.out_features, lin.in_features))
            if lin.bias:
                yield TensorSpec(lin.name + ".bias", dtype, (lin.out_features,))
        for norm in entry.qk_norms:
            yield TensorSpec(f"{prefix}{norm}.weight", dtype, (self.head_dim,))
        for norm in others:
            yield TensorSpec(f"{prefix}{norm}.weight", dtype, (self.hidden_size,))

    @property
    def embedding_tensor(self) -> str:
        """`model.embed_tokens.weight`"""
        return self.architecture.embedding + ".weight"

    @property
    def norm_tensor(self) -> str:
        """Weight of the norm after the last layer: `model.norm.weight`"""
        return self.architecture.norm + ".weight"

    @property
    def head_tensor(self) -> str:
        """`lm_head.weight`, or the embedding's where they are tied."""
        return self.embedding_tensor if self.tie_word_embeddings else self.architecture.head + ".weight"

    def outer_tensors(self, dtype: str = "BF16") -> Iterator[TensorSpec]:
        """Tensors outside the decoder layers: embedding, final norm and, when untied, head."""
        yield TensorSpec(self.embedding_tensor, dtype, (self.vocab_size, self.hidden_size))
        yield TensorSpec(self.norm_tensor, dtype, (self.hidden_size,))
        if not self.tie_word_embeddings:
            yield TensorSpec(self.head_tensor, dtype, (self.vocab_size, self.hidden_size))

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
_PADDED = "official_quantized_intermediate_size"
_LARGEST = {"num_hidden_layers": 1000, "vocab_size": 1 << 24, "hidden_size": 1 << 18, "intermediate_size": 1 << 20,
            "head_dim": 1 << 14, "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12,
            _PADDED: 1 << 20}  # fmt: skip
_LONGEST_CONTEXT = 1 << 40
_ROPE_THETA = 10_000.0  # transformers', for each of the ARCHITECTURES


def _whole(config: Mapping[str, Any], key: str, where: str, default: Any = None) -> int:
    value, most = config.get(key, default), _LARGEST.get(key, _LONGEST_CONTEXT)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {key} is {repr(value)[:40]}, wanted a positive whole number")
    if value > most:
        raise CheckpointError(f"{where}: {key} is {min(value, 10**300):.6g}, more than any model has ({most})")
    return value


def rotary_parameters(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """Parameters of rotary embeddings, `rope_type` and `rope_theta` among them: transformers 5 has all of them in
    `rope_parameters`; older versions have `rope_theta` at the top, and the others, if any, in `rope_scaling`.

    CheckpointError where config.json has both objects and they differ: transformers 5 reads `rope_scaling` alone.
    """

    def read(key: str) -> dict[str, Any]:
        rope = config.get(key) or {}
        if not isinstance(rope, Mapping):
            raise CheckpointError(f"{where}: {key} is {type(rope).__name__}, wanted an object")
        said = {name: value for name, value in rope.items() if name != "type" and value is not None}
        return {"rope_type": rope.get("type", "default"), "rope_theta": config.get("rope_theta", _ROPE_THETA)} | said

    old, new = read("rope_scaling"), read("rope_parameters")
    if not config.get("rope_scaling"):
        return new
    for name in {**old, **new} if config.get("rope_parameters") else ():
        if old.get(name) != new.get(name):
            raise CheckpointError(
                f"{where}: {name} is {shown(repr(old.get(name)), 40)} by rope_scaling and "
                f"{shown(repr(new.get(name)), 40)} by rope_parameters",
                hint="transformers 5 reads rope_scaling alone: write all that is meant into rope_parameters and remove "
                "rope_scaling",
            )
    return old


def spelled_twice(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the rotary parameters and the dtype in transformers 4's spelling too, where only 5's is there.

    Engines that know transformers 4 alone find no `rope_theta` otherwise, and take 10000 in silence; or no
    `torch_dtype`, and compute in float32 or float16, in which Qwen2.5's activations overflow.
    """
    if config.get("dtype") is not None:
        config = {**config, "torch_dtype": config.get("torch_dtype") or config["dtype"]}
    if not config.get("rope_parameters"):
        return dict(config)
    rope = rotary_parameters(config)
    theta = rope.pop("rope_theta")
    scaling = {} if rope["rope_type"] == "default" else {"rope_scaling": rope}
    return {**config, "rope_theta": theta, **scaling}


def _with_yarn(config: Mapping[str, Any], max_position: int, where: str) -> int:
    """The longest context that rotary embeddings are scaled to; `max_position` where YaRN does not scale them."""
    rope = rotary_parameters(config, where)
    if rope["rope_type"] != "yarn":
        return max_position
    factor, original = rope.get("factor", 1), rope.get("original_max_position_embeddings", max_position)
    numbers = isinstance(factor, int | float) and isinstance(original, int)
    if not numbers or not 0 < factor <= 1 << 20 or not 0 < original <= _LONGEST_CONTEXT:
        raise CheckpointError(
            f"{where}: rope_scaling has factor {repr(factor)[:40]} and original length {repr(original)[:40]}"
        )
    return max(max_position, round(factor * original))


def spec_from_config(config: Mapping[str, Any], where: str = "config.json", name: str = "") -> ModelSpec:
    """Read a Hugging Face `config.json`; raises CheckpointError for what is unsupported or contradicts itself."""
    model_type = config.get("model_type")
    architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if architecture is None:
        raise CheckpointError(
            f"{where}: model_type {repr(model_type)[:40]} is not supported "
            f"(wanted one of {', '.join(ARCHITECTURES)})",
            hint="mixture-of-experts and vision models are not supported",
        )
    heads = _whole(config, "num_attention_heads", where)
    hidden = _whole(config, "hidden_size", where)
    given = {"num_key_value_heads": None, "head_dim": None, **architecture.defaults, **config}
    kv_heads = heads if given["num_key_value_heads"] is None else _whole(given, "num_key_value_heads", where)
    if given["head_dim"] is None and hidden % heads:
        raise CheckpointError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = hidden // heads if given["head_dim"] is None else _whole(given, "head_dim", where)
    if heads % kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    max_position = _whole(config, "max_position_embeddings", where)
    extended = _with_yarn(config, max_position, where)
    spec = ModelSpec(
        model_type=architecture.model_type,
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
        bias_keys=tuple(key for key in architecture.bias_keys if config.get(key, False)),
        official_quantized_intermediate_size=None if config.get(_PADDED) is None else _whole(config, _PADDED, where),
    )
    architecture.window.refuse(config, spec.extended_context, where)
    return spec


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
            hint=f"dense models of these types are: {', '.join(ARCHITECTURES)}",
        )


def near_names(name: str) -> str:
    """A suggestion in the place of a name that is neither a directory nor shipped."""
    families = {family.lower(): family for family in family_configs()}
    near = difflib.get_close_matches(name.lower().rpartition("/")[2], families, n=3, cutoff=0.75)
    if near:
        return f"near: {', '.join(families[key] for key in near)}"
    return "a shipped name such as Qwen2.5-72B or Llama-3.1-8B, a hub name such as Qwen/Qwen2.5-72B, or a directory"
