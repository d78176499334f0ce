"""A model as llama.cpp's GGUF files describe it: config.json as metadata, tensor names, both ways. No torch.

Keys, names and the order of rows are those of llama.cpp's own converter. Qwen2 and Qwen3 rotate halves of a head there
too; of Llama's q and k the rows are reordered, so that what are two halves here are neighbouring pairs there.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from qwenq.errors import CheckpointError
from qwenq.escaping import printable, shown
from qwenq.io.gguf import GGUFFile, Number, split_stem
from qwenq.io.safetensors import TensorLocation
from qwenq.model.architectures import ARCHITECTURES, Architecture, GGUFNames
from qwenq.model.spec import ModelSpec, rotary_parameters, spec_from_config

METHOD = "gguf"  # `quant_method` of a config that `config_of_gguf` makes
PLAIN_TYPES = ("F32", "F16", "BF16")  # of weights that are not quantized
ROPE_FACTORS = "rope_freqs.weight"  # F32 [head_dim / 2]: divisors of Llama 3.1's frequencies
# What all published models with such factors have beside the largest one.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ROPE_ALWAYS = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings")
_ROPE_KEYS = {
    "llama3": (*_ROPE_ALWAYS, "low_freq_factor", "high_freq_factor"),
    **dict.fromkeys(("default", "linear", "yarn"), _ROPE_ALWAYS),
}
ROPE_NEUTRAL = {"partial_rotary_factor": 1.0, "beta_fast": 32, "beta_slow": 1}  # with these they change nothing
# Keys that change what is computed, and the values with which they do not.
_HARMLESS = {
    "expert_count": (0,), "attention.causal": (True,), "attention.scale": (0.0,), "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,), "attn_logit_softcapping": (0.0,), "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0), "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,), "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_beta_fast": (32.0,), "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}  # fmt: skip

GENERATION_NAME = "generation_config.json"
# Its settings, and what llama.cpp's programs take for their defaults.
_SAMPLING = {
    "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp", "repetition_penalty": "penalty_repeat",
}  # fmt: skip
_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


@dataclass(frozen=True)
class GGUFModel:
    """An opened GGUF model under Hugging Face's names: `tensors` as stored, rows of q and k in llama.cpp's order.

    `config` is what its config.json would say; `quantization_config` in it has `quant_method` "gguf" and `types`, the
    GGML type of each linear, the embedding and the head by its name, where any is quantized.
    """

    config: dict[str, Any]
    spec: ModelSpec
    tensors: dict[str, TensorLocation]


def open_gguf(path: Path) -> GGUFModel:
    """Read the headers of a GGUF model; CheckpointError for an architecture or a tensor that has no place here."""
    file = GGUFFile.open(path)
    where = shown(str(path))
    factors = file.numbers(ROPE_FACTORS) if ROPE_FACTORS in file.tensors else None
    shapes = {name: location.spec.shape for name, location in file.tensors.items()}
    config = config_of_metadata(file.metadata, shapes, factors, where)
    name = file.metadata.get("general.name")
    name = printable(name) if isinstance(name, str) and name else printable(split_stem(path))
    spec = spec_from_config(config, where=where, name=name)
    names = gguf_names(spec)
    known = set(names.values()) | {ROPE_FACTORS}
    for stored in file.tensors:
        if stored not in known:
            raise CheckpointError(f"{where}: tensor {shown(stored)} has no place in a {spec.model_type} model")
    tensors = {}
    for tensor in spec.tensors():
        location = file.tensors.get(names[tensor.name])
        if location is None:
            raise CheckpointError(f"{where}: no tensor {names[tensor.name]}", hint="is it a whole model?")
        if location.spec.shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {names[tensor.name]} has shape {list(location.spec.shape)}, "
                f"its metadata wants {list(tensor.shape)}"
            )
        tensors[tensor.name] = replace(location, spec=replace(location.spec, name=tensor.name))
    modules = [lin.name for lin in (*spec.outer_linears, *spec.linears)]
    types = {module: tensors[module + ".weight"].spec.dtype for module in modules}
    if any(kind not in PLAIN_TYPES for kind in types.values()):
        config["quantization_config"] = {"quant_method": METHOD, "types": types}
    return GGUFModel(config, spec, tensors)


# ---------------------------------------------------------------------- names


def names_in_gguf(architecture: Architecture) -> GGUFNames:
    """llama.cpp's names for a family; CheckpointError where there are none."""
    if architecture.gguf is None:
        raise CheckpointError(f"{architecture.model_type}: no GGUF names are known for its tensors")
    return architecture.gguf


def gguf_names(spec: ModelSpec) -> dict[str, str]:
    """GGUF names of all tensors of a model, by Hugging Face's; a tied head has none of its own."""
    entry = spec.architecture
    found = names_in_gguf(entry)
    modules = {entry.embedding: found.embedding, entry.norm: found.norm, entry.head: found.head}
    names = {}
    for tensor in spec.tensors():
        module, _, part = tensor.name.rpartition(".")
        if module in modules:
            names[tensor.name] = f"{modules[module]}.{part}"
        else:
            layer, _, path = module.removeprefix(entry.layers + ".").partition(".")
            names[tensor.name] = f"blk.{layer}.{found.modules[path]}.{part}"
    return names


def paired_heads(spec: ModelSpec, name: str) -> int:
    """Heads whose rows a GGUF file has in pairs, of the tensor called `name` here; 0 for one in the same order.

    Row 2 i + k of a head there, k 0 or 1, is row i + k * head_dim / 2 here.
    """
    entry = spec.architecture
    module = name.rpartition(".")[0]
    for path in names_in_gguf(entry).paired:
        if module.startswith(entry.layers + ".") and module.endswith("." + path):
            linear = next(linear for linear in entry.linears if linear.path == path)
            return spec.size(*linear.outputs) // spec.head_dim
    return 0


# ---------------------------------------------------------------------- config.json


def metadata_of_config(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's keys for the shapes and constants of a model, `general.architecture` first.

    CheckpointError for what they have no words for. Llama 3.1's rotary embeddings are a tensor: `rope_factors`.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"config.json: hidden_act is {shown(repr(config['hidden_act']), 40)}, GGUF has silu for such a model"
        )
    names = names_in_gguf(spec.architecture)
    for lin in spec.layer_linears(0):
        if lin.bias and lin.path in names.unbiased:
            raise CheckpointError(f"config.json: {lin.path} has a bias, llama.cpp reads none of a {spec.model_type}")
    found = {
        "block_count": spec.num_hidden_layers,
        "context_length": spec.max_position_embeddings,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_attention_heads,
        "attention.head_count_kv": spec.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": _number(config, "rms_norm_eps", 1e-6),
        "rope.freq_base": _number(rotary_parameters(config), "rope_theta"),
    }
    if spec.head_dim * spec.num_attention_heads != spec.hidden_size or config.get("head_dim") is not None:
        found |= {"attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim}
    if names.paired:
        found |= {"rope.dimension_count": spec.head_dim, "vocab_size": spec.vocab_size}
    found |= {f"rope.scaling.{key}": value for key, value in _scaling_metadata(spec, config).items()}
    name = names.architecture
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in found.items()}


def rope_factors(spec: ModelSpec, config: Mapping[str, Any]) -> list[float] | None:
    """Values of the tensor ROPE_FACTORS, float32 [head_dim / 2]; None for a model that has none."""
    rope = rotary_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    return _llama3_factors(spec.head_dim, _number(rope, "rope_theta"), _LLAMA3 | rope)


def _llama3_factors(head_dim: int, base: float, rope: Mapping[str, Any]) -> list[float]:
    """Divisors of frequencies, transformers' llama3: 1 for short waves, `factor` for long ones, blended between."""
    factor, low, high = (_number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    length = _number(rope, "original_max_position_embeddings")
    found = []
    for pair in range(head_dim // 2):
        wave = 2 * math.pi * base ** (2 * pair / head_dim)
        if wave < length / high:
            found.append(1.0)
        elif wave > length / low:
            found.append(factor)
        else:
            smooth = (length / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number of config.json; CheckpointError naming the key for anything else."""
    value = values.get(key, default)
    if not _is_positive(value):
        raise CheckpointError(f"config.json: {key} is {shown(repr(value), 40)}, wanted a positive number")
    return float(value)


def _is_positive(value: object) -> TypeGuard[int | float]:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < 1e30


def _scaling_metadata(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    rope = rotary_parameters(config)
    kind = str(rope["rope_type"])
    for key, value in {"partial_rotary_factor": config.get("partial_rotary_factor"), **rope}.items():
        if value is not None and key not in _ROPE_KEYS.get(kind, ()) and value != ROPE_NEUTRAL.get(key):
            raise CheckpointError(
                f"config.json: rotary embeddings with {shown(key, 40)} {shown(repr(value), 40)} have no GGUF metadata "
                "here"
            )
    if kind in ("default", "llama3"):
        return {}
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"config.json: rotary embeddings of type {shown(kind, 40)} have no GGUF metadata here")
    found = {"type": kind, "factor": _number(rope, "factor")}
    if kind == "yarn":
        found["original_context_length"] = rope.get("original_max_position_embeddings", spec.max_position_embeddings)
    return found


def config_of_metadata(
    metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], factors: Sequence[float] | None, where: str
) -> dict[str, Any]:
    """The equivalent config.json; `shapes` by GGUF name, `factors` of ROPE_FACTORS where it is there."""
    entry = _architecture(metadata, where)
    names = names_in_gguf(entry)
    read = _Keys(metadata, names.architecture + ".", where)
    for key, harmless in _HARMLESS.items():
        if read.found(key) not in (None, *harmless):
            raise CheckpointError(
                f"{where}: {read.prefix}{key} is {shown(repr(read.found(key)), 40)}, which is not supported",
                hint="mixture-of-experts and vision models are not supported" if "expert" in key else "",
            )
    embedding = shapes.get(names.embedding + ".weight", ())
    if len(embedding) != 2:
        raise CheckpointError(f"{where}: no tensor {names.embedding}.weight", hint="is it a whole model?")
    heads, hidden = read.whole("attention.head_count"), read.whole("embedding_length")
    head_dim = read.whole("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if read.whole(key, head_dim) != head_dim:
            raise CheckpointError(f"{where}: {read.prefix}{key} is {read.found(key)}, the heads have {head_dim}")
    vocabulary = read.whole("vocab_size", embedding[0])
    tokens = metadata.get("tokenizer.ggml.tokens")
    for count in (vocabulary, len(tokens) if isinstance(tokens, list) else vocabulary):
        if count != embedding[0]:
            raise CheckpointError(
                f"{where}: {count} tokens in its metadata, {names.embedding}.weight has {embedding[0]} rows"
            )
    config = {
        "architectures": [entry.classes + "ForCausalLM"],
        "model_type": entry.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": read.whole("feed_forward_length"),
        "num_hidden_layers": read.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": read.whole("context_length"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": read.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": names.head + ".weight" not in shapes,
        "use_sliding_window": False,
        "torch_dtype": "float16",
    }
    if scaling := _scaling_of_metadata(read, factors, config):
        config["rope_scaling"] = scaling
    for linear in entry.linears:
        if isinstance(linear.bias, str):
            config[linear.bias] = f"blk.0.{names.modules[linear.path]}.bias" in shapes
    for ours, theirs in _TOKENS.items():
        token = metadata.get(_token_key(theirs))
        if type(token) is int:
            config[ours + "_token_id"] = token
    return config


# ---------------------------------------------------------------------- generation_config.json


def metadata_of_generation(settings: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """llama.cpp's keys for how a model's publisher samples; CheckpointError for what is no number."""
    for ours, theirs in _SAMPLING.items():
        value = settings.get(ours)
        if value is None:
            continue
        value = 0 if ours == "top_k" and value == -1 else value  # vLLM's word for all
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 31:
            raise CheckpointError(f"{where}: {ours} is {shown(repr(value), 40)}, wanted a number from 0 on")
        number = Number("i32", int(value)) if ours == "top_k" else Number("f32", float(value))
        yield f"general.sampling.{theirs}", number


def generation_of_metadata(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The equivalent generation_config.json; empty where the file says nothing beside what config.json has.

    config: as `config_of_metadata` gives it. Its tokens are repeated: transformers takes them from config.json only
    where there is no generation_config.json. llama.cpp's tokens that end a turn (`eot`) or a message (`eom`) end an
    answer as `eos` does.
    """
    found = {ours: metadata.get(f"general.sampling.{theirs}") for ours, theirs in _SAMPLING.items()}
    settings = {key: _shortest(v) if isinstance(v, float) else v for key, v in found.items() if v is not None}
    tokens = {key: config[key] for name in _TOKENS if (key := f"{name}_token_id") in config}
    ends = [token for name in ("eos", "eot", "eom") if type(token := metadata.get(_token_key(name))) is int]
    if len(set(ends)) > 1:
        tokens["eos_token_id"] = list(dict.fromkeys(ends))
    elif not settings:
        return {}
    return tokens | {"do_sample": not settings.keys() <= {"repetition_penalty"}} | settings


def _token_key(name: str) -> str:
    return f"tokenizer.ggml.{name}_token_id"


def _architecture(metadata: Mapping[str, Any], where: str) -> Architecture:
    name = metadata.get("general.architecture")
    known = {entry.gguf.architecture: entry for entry in reversed(ARCHITECTURES.values()) if entry.gguf}
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(
            f"{where}: general.architecture is {shown(repr(name), 40)}, wanted one of {', '.join(sorted(known))}",
            hint="mixture-of-experts and vision models are not supported",
        )
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{where}: general.type is {shown(repr(kind), 40)}, wanted model")
    return known[name]


def _scaling_of_metadata(
    read: _Keys, factors: Sequence[float] | None, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    kind = read.found("rope.scaling.type")
    if kind in (None, "none"):
        plain = factors is None or all(factor == 1 for factor in factors)
        return None if plain else _llama3_of_factors(factors or (), config, read.where)
    if kind not in ("linear", "yarn") or factors is not None:
        raise CheckpointError(
            f"{read.where}: {read.prefix}rope.scaling.type is {shown(repr(kind), 40)}"
            f"{f' with a tensor {ROPE_FACTORS}' if factors is not None else ''}, wanted linear or yarn"
        )
    found = {"rope_type": kind, "factor": read.number("rope.scaling.factor")}
    if kind == "yarn":
        original = read.whole("rope.scaling.original_context_length", config["max_position_embeddings"])
        found["original_max_position_embeddings"] = original
    return found


def _llama3_of_factors(factors: Sequence[float], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The only published way to come by such a tensor, where its values are of it; with a low_freq_factor of 1, for
    only ratios of the other parameters to it count.
    """
    head_dim, base = config["head_dim"], config["rope_theta"]
    if 2 * len(factors) == head_dim and all(1 <= factor < 1e6 for factor in factors):
        most = max(factors)  # not 1: such a tensor changes nothing
        waves = [2 * math.pi * base ** (2 * pair / head_dim) for pair in range(len(factors))]
        shares = [(wave, (1 / f - 1 / most) / (1 - 1 / most)) for wave, f in zip(waves, factors, strict=True)]
        blended = [(wave, share) for wave, share in shares if 0 < share < 1]
        for guess in _llama3_guesses(blended):
            rope = {"rope_type": "llama3", "factor": _shortest(most)} | _LLAMA3 | guess
            wanted = _llama3_factors(head_dim, base, rope)
            if all(abs(a / b - 1) <= 1e-4 for a, b in zip(factors, wanted, strict=True)):
                return rope
    raise CheckpointError(f"{where}: {ROPE_FACTORS} holds other factors than Llama 3.1's: not supported")


def _llama3_guesses(blended: Sequence[tuple[float, float]]) -> Iterator[dict[str, Any]]:
    """Parameters to try: the published ones, and those of the waves between, each with its share of the unscaled
    frequency: (length / wave - low) / (high - low), of which one gives the length and two the high factor too.
    """
    yield {}
    if blended:
        wave, share = blended[0]
        yield {"original_max_position_embeddings": max(1, round(wave * (1 + 3 * share)))}
    if len(blended) > 1 and blended[0][0] < blended[-1][0]:
        (first, most), (last, least) = blended[0], blended[-1]
        slope = (most - least) / (1 / first - 1 / last)
        offset = slope / first - most
        if 1e-6 < offset < slope:
            length, high = round(slope / offset), float(f"{1 + 1 / offset:.6g}")
            yield {"original_max_position_embeddings": length, "high_freq_factor": high}


@dataclass(frozen=True)
class _Keys:
    """An architecture's metadata; CheckpointError naming the key for a value of another kind."""

    metadata: Mapping[str, Any]
    prefix: str
    where: str

    def found(self, key: str) -> Any:
        return self.metadata.get(self.prefix + key)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(self.prefix + key, default)
        if type(value) is not int or value < 1:
            raise self._wrong(key, value, "a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; of a float32 the shortest decimal that means the same."""
        value = self.metadata.get(self.prefix + key, default)
        if not _is_positive(value):
            raise self._wrong(key, value, "a positive number")
        return _shortest(float(value))

    def _wrong(self, key: str, value: object, wanted: str) -> CheckpointError:
        if value is None:
            return CheckpointError(f"{self.where}: no {self.prefix}{key} in its metadata")
        return CheckpointError(f"{self.where}: {self.prefix}{key} is {shown(repr(value), 40)}, wanted {wanted}")


def _shortest(value: float) -> float:
    """The decimal of fewest digits that rounds to the same float32: 1e-06 for 9.999999974752427e-07."""
    try:
        bits = struct.pack("<f", value)
    except OverflowError:
        return value
    return next(f for digits in range(1, 18) if struct.pack("<f", f := float(f"{value:.{digits}g}")) == bits)
