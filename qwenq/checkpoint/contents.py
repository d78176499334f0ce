"""Config and headers of a checkpoint, a directory of shards or a GGUF file: names without `model.`, a head that is not
the embedding, settings left over. No torch, no weights: planning asks too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenq.errors import CheckpointError, UnreadScheme
from qwenq.escaping import shown
from qwenq.formats.base import method_of, read_quantization_config
from qwenq.io.gguf import ENDING, is_gguf
from qwenq.io.json import inside, model_name, open_regular, read_object
from qwenq.io.safetensors import FLOATS, INDEX_NAME, SINGLE_NAME, TensorLocation, TensorSpec, checkpoint_tensors
from qwenq.model.metadata import open_gguf
from qwenq.model.spec import ModelSpec, spec_from_config

# Stored by some checkpoints, read by none: buffers that transformers computes itself.
_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
PACKED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight.absmax", ".SCB")
# Where other tools describe it, in older versions at least.
_OTHER_CONFIGS = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
_CHUNK = 1 << 20  # bytes compared at once
_WRAPPED = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # around a layer, say
Same = Callable[[TensorLocation, TensorLocation], bool]


@dataclass(frozen=True)
class Contents:
    """Tensors by the architecture's names; spec and config with the head that is stored."""

    spec: ModelSpec
    config: dict[str, Any]
    tensors: dict[str, TensorLocation]
    notes: tuple[str, ...] = ()  # a line for each thing that is read otherwise than config.json says


def same_bytes(one: TensorLocation, other: TensorLocation) -> bool:
    """Whether two stored tensors are of one dtype and shape, and the same bytes."""
    if (one.spec.dtype, one.spec.shape) != (other.spec.dtype, other.spec.shape):
        return False
    with open_regular(one.file) as first, open_regular(other.file) as second:
        first.seek(one.start)
        second.seek(other.start)
        for at in range(0, one.spec.nbytes, _CHUNK):
            size = min(_CHUNK, one.spec.nbytes - at)
            if first.read(size) != second.read(size):
                return False
    return True


def read_headers(path: Path) -> Contents:
    """Config, shapes and tensors of a checkpoint, by Hugging Face's names; CheckpointError for what cannot be read."""
    if is_gguf(path):
        found = open_gguf(path)
        return Contents(found.spec, found.config, dict(found.tensors))
    config = read_config(path)
    spec = spec_from_config(config, where=str(path / "config.json"), name=model_name(path))
    contents = read_contents(spec, config, checkpoint_tensors(path), str(path))
    return replace(contents, notes=(*_unread(path, config), *contents.notes))


def _unread(directory: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """A line for each thing beside the weights that other loaders may read instead, or with them."""
    if all(os.path.lexists(directory / name) for name in (SINGLE_NAME, INDEX_NAME)):
        yield f"{SINGLE_NAME} is read, as by transformers, and not the files of {INDEX_NAME}, which is there too"
    if os.path.lexists(directory / "adapter_config.json"):
        yield "adapter_config.json is there too: that adapter is not read, and part of the model only if it was merged"
    if config.get("auto_map"):
        yield f"config.json names code of its own (auto_map), which is not run: a plain {config['model_type']} is read"


def refuse_file(path: Path) -> None:
    """Raise CheckpointError for a file that is no GGUF file, in the place of a checkpoint."""
    if os.path.isfile(path):  # False for a name that no file can have
        raise CheckpointError(
            f"{shown(str(path))}: a file, wanted a checkpoint's directory or a *{ENDING} file",
            hint=f"give the directory that holds it: {shown(str(path.parent))}",
        )


def refuse_no_config(directory: Path) -> None:
    """Raise CheckpointError for a directory without a config.json."""
    if not os.path.lexists(directory / "config.json"):
        raise CheckpointError(
            f"{shown(str(directory))}: no config.json", hint="give the directory of a Hugging Face checkpoint"
        )


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint directory, or what says the same in a GGUF file."""
    if is_gguf(path):
        return open_gguf(path).config
    refuse_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory", hint="give a checkpoint's directory or its GGUF file")
    refuse_adapter(path)
    refuse_no_config(path)
    return read_object(inside(path, "config.json"))


def read_contents(
    spec: ModelSpec,
    config: Mapping[str, Any],
    stored: Mapping[str, TensorLocation],
    where: str,
    same: Same = same_bytes,
) -> Contents:
    """Stored tensors under the model's names. A head counts as tied only if it equals the embedding.

    same: compares embedding and head. Raises CheckpointError, naming `where`, for 16-bit tensors whose config.json
    calls them quantized.
    """
    _refuse_mlx(config, where)
    tensors, notes = _named(spec, stored), []
    _refuse_left_over(spec, config, tensors, where)
    head = spec.architecture.head + ".weight"
    both = spec.tie_word_embeddings and head in tensors and spec.embedding_tensor in tensors
    if both and not same(tensors[spec.embedding_tensor], tensors[head]):
        spec = replace(spec, tie_word_embeddings=False)
        config = {**config, "tie_word_embeddings": False}
        notes.append(
            f"config.json ties the head to the embedding, but a different {head} is stored: it is kept "
            "(tie_word_embeddings false)"
        )
    return Contents(spec, dict(config), tensors, tuple(notes))


def _named(spec: ModelSpec, stored: Mapping[str, TensorLocation]) -> dict[str, TensorLocation]:
    """Tensors of a bare model (`layers.0...`, as embedding models are saved) under the whole model's names."""
    prefix = spec.architecture.embedding.rpartition(".")[0]
    bare = spec.embedding_tensor.removeprefix(prefix + ".")
    if not prefix or spec.embedding_tensor in stored or bare not in stored:
        return dict(stored)
    kept = (prefix + ".", spec.architecture.head + ".")
    names = {name: name if name.startswith(kept) else f"{prefix}.{name}" for name in stored}
    return {names[name]: replace(t, spec=replace(t.spec, name=names[name])) for name, t in stored.items()}


def _refuse_mlx(config: Mapping[str, Any], where: str) -> None:
    """Raise UnreadScheme for MLX's own quantization, which names no method: `quantization: {"bits": 4, ...}`."""
    found = config.get("quantization")
    if isinstance(found, Mapping) and "bits" in found:
        raise UnreadScheme(
            f"{where}: quantized by MLX ({shown(repr(found['bits']), 20)} bits), which this version does not read",
            hint="mlx-lm runs it; use the 16-bit model, or its GPTQ or AWQ version",
        )


def saved_wrapped(stored: Iterable[str], missing: Sequence[str]) -> str:
    """The beginning under which missing tensors are stored, where a wrapper's names were saved; empty otherwise."""
    wanted = set(missing)
    for name in stored:
        within = _WRAPPED.search(name)
        if within and _WRAPPED.sub("", name) in wanted:
            return name[: within.end()]
        if missing and name != missing[0] and name.endswith(missing[0]):
            return name.removesuffix(missing[0])
    return ""


def _refuse_left_over(
    spec: ModelSpec, config: Mapping[str, Any], tensors: Mapping[str, TensorLocation], where: str
) -> None:
    """Raise CheckpointError where config.json has a `quantization_config` and every linear is there in 16 bits."""
    quantization = config.get("quantization_config")
    if not quantization:
        return
    for lin in spec.linears:
        found = tensors.get(lin.name + ".weight")
        if found is None or found.spec.dtype not in FLOATS.values() or len(found.spec.shape) != 2:
            return
    with suppress(UnreadScheme):  # what makes no sense is refused as that
        read_quantization_config(quantization, f"{where}/config.json").recipe(spec).check(spec)
    raise CheckpointError(
        f"{where}: config.json says quantized ({shown(method_of(quantization), 40)}), but every linear is stored in "
        "16 bits",
        hint="the setting was left over when the weights were merged or dequantized: remove quantization_config from "
        "config.json, no loader reads the model with it",
    )


def refuse_quantized_head(spec: ModelSpec, stored: Iterable[str], where: str) -> None:
    """Raise UnreadScheme where the head's weight is stored as codes and scales."""
    head = spec.architecture.head
    parts = sorted(name for name in stored if name.startswith(head + ".") and name != f"{head}.bias")
    if [part for part in parts if part != f"{head}.weight"]:
        raise UnreadScheme(
            f"{where}: the head is quantized ({', '.join(shown(part, 60) for part in parts[:3])}), which this version "
            "does not read",
            hint="the engines it was made for can run it; `qwenq quantize` leaves the head in 16 bits",
        )


def refuse_adapter(directory: Path) -> None:
    """Raise CheckpointError for a PEFT adapter, which has no config.json of its own."""
    if os.path.lexists(directory / "adapter_config.json") and not os.path.lexists(directory / "config.json"):
        raise CheckpointError(
            f"{shown(str(directory))}: a PEFT adapter, not a model",
            hint="merge it into its base model (merge_and_unload), save that, and give its directory",
        )


def refuse_undescribed(stored: Iterable[str], directory: Path) -> None:
    """Raise CheckpointError for quantized tensors beside a config.json that has no `quantization_config`."""
    packed = next((name for name in sorted(stored) if name.endswith(PACKED)), None)
    if packed is None:
        return
    beside = next((name for name in _OTHER_CONFIGS if os.path.lexists(directory / name)), None)
    raise CheckpointError(
        f"{directory}: {shown(packed)} is a quantized tensor, but config.json has no quantization_config",
        hint=f"{beside} says how it is quantized: put its content into config.json as quantization_config, with its "
        "quant_method"
        if beside
        else "take config.json from the weights' own repository",
    )


def is_unused(spec: ModelSpec, tensor: TensorSpec, *, quantized: bool) -> bool:
    """Whether a tensor that the model has no place for changes nothing: a head that equals the embedding, a buffer.

    quantized: linears of quantized checkpoints may have biases of zeros that the model has not.
    """
    copied = spec.tie_word_embeddings and tensor.name == spec.architecture.head + ".weight"
    return copied or tensor.name.endswith(_BUFFERS) or (quantized and tensor.name.endswith(".bias"))
