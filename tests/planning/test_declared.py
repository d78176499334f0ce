"""What config.json declares of a checkpoint, as its estimate reads it: mixtures, legacy keys, lies, unread schemes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from families import model

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.errors import CheckpointError, PlanError
from qwenq.formats.base import Recipe, Scheme, quantization_config
from qwenq.io.safetensors import TensorSpec
from qwenq.model.spec import ModelSpec
from qwenq.planning.placement import cutting_reasons
from qwenq.planning.weights import Weights, declared_by_config, header_weights, published_weights, recipe_weights
from tests.conftest import run

TINY = Path(__file__).parents[1] / "data" / "tiny-qwen2"
HOSTILE = r"-:(?:\w+\.?)+!"


B7, B72 = model("Qwen2.5-7B"), model("Qwen2.5-72B")


def of_headers(recipe: Recipe, spec: ModelSpec = B7) -> Weights:
    """A recipe's own checkpoint, seen only by its headers and by config.json."""
    config = {"quantization_config": quantization_config(recipe, spec)}
    return header_weights(spec, {t.name: t for t in recipe.tensors(spec)}, config)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_a_mixture_has_all_its_groups(format: str) -> None:
    """g32, with down in g128 in some layers, whose groups two GPUs would share: 29568 / 2 = 115.5 x 128."""
    wide = tuple((f"model.layers.{layer}.mlp.down_proj", Scheme(8, 128)) for layer in range(20, 28))
    kept = (("model.layers.0.self_attn.o_proj", None),)
    recipe = Recipe(Scheme(4, 32), wide + kept, format)
    found, planned = of_headers(recipe, B72), recipe_weights(B72, recipe)
    assert found.row_groups == planned.row_groups == {"o": (32,), "down": (32, 128)}
    assert (found.method, found.bits, found.group_size) == (format, 4, 128)
    assert found.total_bytes == planned.total_bytes and found.parts == planned.parts
    assert "29568 / 2 = 14784 is not a multiple of the group size 128" in cutting_reasons(B72, found, 2)[0]


def test_zero_points_are_declared_linear_by_linear() -> None:
    recipe = Recipe(Scheme(4, 64), (("model.layers.3.mlp.up_proj", Scheme(4, 64, sym=False)),))
    packed = {(s.sym, s.out_features) for s in of_headers(recipe).parts[3].packed}
    assert {shape for shape in packed if not shape[0]} == {(False, 18944)}


LEGACY: dict[str, tuple[dict[str, Any], tuple[str, int, int]]] = {
    "bitsandbytes unnamed": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, ("bitsandbytes", 4, 64)),
    "its own spelling": (
        {"quant_method": "bitsandbytes", "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        ("bitsandbytes", 4, 64),
    ),
    "bitsandbytes in 8 bits": ({"load_in_8bit": True}, ("bitsandbytes", 8, -1)),
    "AutoAWQ's": ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}, ("awq", 4, 64)),
}


@pytest.mark.parametrize("kind", LEGACY)
def test_legacy_keys(kind: str) -> None:
    config, wanted = LEGACY[kind]
    found = declared_by_config(B7, {"quantization_config": config}, "config.json")
    assert (found.method, found.bits, found.group_size) == wanted and not found.unread


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64}
REFUSED: dict[str, tuple[Any, str]] = {
    "hostile": (GPTQ | {"dynamic": {HOSTILE: {}}}, "dynamic has the pattern .* could take forever"),
    "bad pattern": (GPTQ | {"dynamic": {"-:(": {}}}, r"dynamic has a bad pattern '\('"),
    "list": (GPTQ | {"dynamic": ["-:x"]}, "dynamic is list, wanted an object"),
    "text": (GPTQ | {"dynamic": "-:x"}, "dynamic is str, wanted an object"),
    "number": (GPTQ | {"dynamic": 3}, "dynamic is int, wanted an object"),
    "no method": ({"bits": 4, "group_size": 64}, "quant_method is 'None', wanted one of gptq"),
    "method of another type": ({"quant_method": 4}, "quant_method is '4', wanted one of gptq"),
    "no object": (["gptq"], "quantization_config is list, wanted an object"),
    "bits of another type": (GPTQ | {"bits": "4"}, "bits is '4' and group_size 64, wanted whole numbers"),
    "bits nobody packs": (GPTQ | {"bits": 40}, "bits is 40, wanted 4 or 8"),
    "group 0": (GPTQ | {"group_size": 0}, "group size is 0, wanted 128, 64, 32 or -1"),
    "group that does not divide": (GPTQ | {"group_size": 100}, "group size 100 does not divide its 128 input"),
    "both widths": ({"load_in_4bit": True, "load_in_8bit": True}, "wanted one of load_in_4bit and load_in_8bit"),
    "no config groups": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "config_groups is missing or empty",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_opening_refuses_the_estimate_refuses(kind: str, tmp_path: Path) -> None:
    config, message = REFUSED[kind]
    said = json.loads((TINY / "config.json").read_text()) | {"quantization_config": config}
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(said))
    started = time.process_time()
    result = run("vram", tmp_path, "-c", "64")
    assert time.process_time() - started < 2
    with pytest.raises((CheckpointError, PlanError), match=message) as caught:
        open_checkpoint(tmp_path)
    assert result.exit_code == 1 and result.stderr.splitlines()[0] == f"error: {caught.value.message}"


def fp8_tensors(spec: ModelSpec) -> dict[str, TensorSpec]:
    """A block-quantized FP8 checkpoint as its publishers store it."""
    linears = {lin.name + ".weight": lin for lin in spec.linears}
    found = {}
    for tensor in spec.tensors():
        lin = linears.get(tensor.name)
        if lin is not None:
            blocks = (-(-lin.out_features // 128), -(-lin.in_features // 128))
            found[lin.name + ".weight_scale_inv"] = TensorSpec(lin.name + ".weight_scale_inv", "F32", blocks)
        found[tensor.name] = tensor if lin is None else TensorSpec(tensor.name, "F8_E4M3", tensor.shape)
    return found


UNREAD: dict[str, tuple[dict[str, Any], tuple[str, int, int], str]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8", 8, 128), "quant_method is 'fp8'"),
    "fp8 without blocks": ({"quant_method": "fp8", "weight_block_size": None}, ("fp8", 8, 0), "quant_method is 'fp8'"),
    "floats": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "group_size": None}}},
        },
        ("compressed-tensors", 8, 0),
        "format is 'float-quantized', wanted 'pack-quantized'",
    ),
    "GPTQ in 3 bits": (GPTQ | {"bits": 3}, ("gptq", 3, 64), "bits is 3, wanted 4 or 8"),
    "AWQ for gemv": (
        {"quant_method": "awq", "version": "gemv", "w_bit": 4, "q_group_size": 64}, ("awq", 4, 64),
        "AWQ version is 'gemv', wanted 'gemm'",
    ),
    "FP4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bitsandbytes", 4, 0), "4-bit type 'fp4'"),
    "a method of its own": ({"quant_method": "hqq", "bits": [4]}, ("hqq", 16, 0), "quant_method is 'hqq'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREAD)
def test_what_this_version_does_not_read_is_sized_and_said(kind: str) -> None:
    config, wanted, reason = UNREAD[kind]
    tensors = fp8_tensors(B7)
    found = header_weights(B7, tensors, {"quantization_config": config}, "there/config.json")
    assert (found.method, found.bits, found.group_size) == wanted
    published = published_weights(B7, "FP8")
    assert found.total_bytes == sum(t.nbytes for t in tensors.values()) == published.total_bytes
    assert published.label == "FP8 that qwenq itself does not read"
    assert reason in found.source and "there/config.json" in found.source
    assert "qwenq itself does not read" in found.label
    groups = (wanted[2],) if wanted[2] else ()
    assert found.row_groups == {"o": groups, "down": groups}


def test_all_groups_of_an_unread_mixture_are_met() -> None:
    groups = {
        name: {"weights": {"num_bits": bits, "group_size": size}, "input_activations": {"num_bits": 8}}
        for name, bits, size in (("a", 4, 32), ("b", 4, 128), ("c", 8, -1))
    }
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups | {"d": 3}}
    found = declared_by_config(B7, {"quantization_config": config}, "config.json")
    assert (found.bits, found.group_size) == (4, 128) and "quantized activations are not supported" in found.unread
    assert found.row_groups == {"o": (-1, 32, 128), "down": (-1, 32, 128)}
