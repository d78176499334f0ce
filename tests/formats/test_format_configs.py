"""`quantization_config` of every format but GGUF: both ways, others' spellings, refusals."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from qwenq import __version__
from qwenq.errors import CheckpointError
from qwenq.formats.base import Recipe, Scheme, quantization_config, read_quantization_config
from qwenq.formats.bitsandbytes import INT8_ROWS, NF4
from qwenq.formats.gptq import GPTQ
from qwenq.model.spec import spec_from_config

SPEC = spec_from_config(
    {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64,
    }
)  # fmt: skip
KEPT = (("model.layers.1.mlp.down_proj", None),)
GPTQ_4 = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(Scheme(4, 32, sym=False), KEPT, "awq"),
        Recipe(Scheme(8, -1), KEPT, "compressed-tensors"),
        Recipe(Scheme(4, 32, sym=False), (), "compressed-tensors"),
        Recipe(Scheme(4, 32), (*KEPT, ("model.layers.11.mlp.down_proj", Scheme(8, 32))), "compressed-tensors"),
        Recipe(NF4, KEPT, "bnb-nf4"),
        Recipe(INT8_ROWS, KEPT, "bnb-int8"),
    ],
    ids=lambda recipe: f"{recipe.format} {recipe.label}",
)
def test_written_configs_are_read_back(recipe: Recipe) -> None:
    """Layer 1 is not taken for layer 11."""
    written = json.loads(json.dumps(quantization_config(recipe, SPEC)))
    assert read_quantization_config(written, "config.json").recipe(SPEC) == recipe


def test_what_is_written() -> None:
    assert quantization_config(Recipe(Scheme(4, 64, sym=False), KEPT, "awq"), SPEC) == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 64, "zero_point": True,
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"],
    }  # fmt: skip
    uniform = quantization_config(Recipe(Scheme(4, 32), (), "compressed-tensors"), SPEC)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    assert uniform["config_groups"] == {
        "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    }
    assert uniform["ignore"] == ["lm_head"] and uniform["format"] == "pack-quantized"
    assert uniform["producer"]["name"] == "qwenq"  # vLLM 0.32 fails on a producer that is no object
    mixed = Recipe(Scheme(4, 32), (("model.layers.3.self_attn.o_proj", Scheme(8, -1)), *KEPT), "compressed-tensors")
    found = quantization_config(mixed, SPEC)
    assert found["config_groups"]["group_1"]["targets"] == ["model.layers.3.self_attn.o_proj"]
    assert found["config_groups"]["group_1"]["weights"]["strategy"] == "channel"
    assert len(found["config_groups"]["group_0"]["targets"]) == 12 * 7 - 2
    assert found["ignore"] == ["lm_head", "model.layers.1.mlp.down_proj"]


def test_other_tools_spellings() -> None:
    """AutoAWQ's older names, llm-compressor's regular expressions, bitsandbytes before it named itself."""
    old = {"quant_method": "awq", "version": "GEMM", "w_bit": 4, "q_group_size": 128, "zero_point": True}
    assert read_quantization_config(old, "x").default == Scheme(4, 128, sym=False)
    partly = old | {"modules_to_not_convert": ["self_attn"]}
    assert read_quantization_config(partly, "x").scheme_of("model.layers.0.self_attn.q_proj") is None

    def group(bits: int, *targets: str) -> dict[str, Any]:
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        return {"targets": list(targets), "weights": weights | {"actorder": "weight", "observer": "minmax"}}

    groups = {
        "a": group(8, "Linear"),
        "b": group(4, r"re:.*mlp\.(gate|up)_proj$"),
        "c": group(8, "model.layers.2.mlp.up_proj"),
    }
    compressed = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    read = read_quantization_config(compressed | {"ignore": ["re:.*layers[.]3[.].*", "lm_head"]}, "x")
    assert read.scheme_of("model.layers.0.mlp.up_proj") == Scheme(4, 32)  # a pattern before the class
    assert read.scheme_of("model.layers.2.mlp.up_proj") == Scheme(8, 32)  # a name before a pattern
    assert read.scheme_of("model.layers.0.mlp.down_proj") == Scheme(8, 32)
    assert read.scheme_of("model.layers.3.mlp.up_proj") is None  # what is ignored before all
    early = read_quantization_config(
        {"load_in_8bit": True, "llm_int8_skip_modules": ["down_proj", "model.layers.1"]}, "x"
    )
    assert early.default == INT8_ROWS and early.scheme_of("model.layers.0.mlp.down_proj") is None
    assert early.scheme_of("model.layers.1.mlp.up_proj") is None
    assert early.scheme_of("model.layers.11.mlp.up_proj") == INT8_ROWS


def test_the_written_config_of_gptq() -> None:
    assert quantization_config(Recipe(Scheme(8, 64)), SPEC, damp_percent=0.05, method="gptq") == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 8,
        "group_size": 64,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {
            "quantizer": [f"qwenq:{__version__}"],
            "damp_percent": 0.05,
            "method": "gptq",
            "true_sequential": True,
        },
    }


@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(8, 32), Scheme(4, -1), Scheme(4, 64, sym=False)])
def test_uniform_gptq_recipes_round_trip(scheme: Scheme) -> None:
    written = json.loads(json.dumps(quantization_config(Recipe(scheme), SPEC, damp_percent=0.01, method="rtn")))
    read = GPTQ.read_config(written, "config.json")
    assert (read.default, read.version, read.rules) == (scheme, "gptq" if scheme.sym else "gptq_v2", ())
    assert read.recipe(SPEC) == Recipe(scheme)


def test_mixed_gptq_recipes_round_trip() -> None:
    """Layer 1 must not be taken for layer 11, nor a dot for any character."""
    recipe = Recipe(
        Scheme(4, 64),
        (
            ("model.layers.1.mlp.down_proj", Scheme(8, 32)),
            ("model.layers.2.self_attn.o_proj", None),
        ),
    )
    written = json.loads(json.dumps(quantization_config(recipe, SPEC, damp_percent=0.01, method="gptq")))
    assert written["dynamic"] == {
        r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 8, "group_size": 32, "sym": True},
        r"-:^model\.layers\.2\.self_attn\.o_proj$": {},
    }
    read = GPTQ.read_config(written, "config.json")
    assert read.recipe(SPEC) == recipe
    assert read.scheme_of("model.layers.11.mlp.down_proj") == Scheme(4, 64)
    assert read.scheme_of("model.layers.1xmlp.down_proj") == Scheme(4, 64)


def test_gptq_patterns_as_other_tools_write_them() -> None:
    """GPTQModel: re.match, so a prefix is enough; the first pattern that matches decides; no sign means an override."""
    read = GPTQ.read_config(
        GPTQ_4
        | {
            "dynamic": {
                r"-:model\.layers\.3\.": {},
                r"model\.layers\.[0-9]\..*down_proj": {"bits": 8},
                r"+:.*down_proj": {"group_size": 32},
            }
        },
        "config.json",
    )
    assert read.scheme_of("model.layers.3.mlp.down_proj") is None
    assert read.scheme_of("model.layers.4.mlp.down_proj") == Scheme(8, 128)
    assert read.scheme_of("model.layers.10.mlp.down_proj") == Scheme(4, 32)
    assert read.scheme_of("model.layers.10.mlp.up_proj") == Scheme(4, 128)
    excluded = {name for name, scheme in read.recipe(SPEC).overrides if scheme is None}
    assert len(excluded) == 7 and all(name.startswith("model.layers.3.") for name in excluded)


def test_old_and_second_versions_of_gptq() -> None:
    auto_gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False}
    assert GPTQ.read_config(auto_gptq, "x").default == Scheme(4, 128, sym=False)
    assert GPTQ.read_config(auto_gptq, "x").version == "gptq"
    assert GPTQ.read_config(GPTQ_4 | {"checkpoint_format": None, "dynamic": None}, "x").version == "gptq"
    assert GPTQ.read_config(GPTQ_4 | {"checkpoint_format": "gptq_v2"}, "x").version == "gptq_v2"


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def compressed(weights: Any = WEIGHTS, **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights} | changes.pop("group", {})
    base = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}}
    return base | changes


BAD: dict[str, tuple[Any, str]] = {
    "another method": (GPTQ_4 | {"quant_method": "hqq"}, "quant_method is 'hqq', wanted one of gptq, awq, compr"),
    "no method": ({"bits": 4}, "quant_method is 'None', wanted one of gptq"),
    "pack dtype": (GPTQ_4 | {"pack_dtype": "int8"}, "pack_dtype is 'int8', wanted 'int32'"),
    "marlin": (GPTQ_4 | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', wanted 'gptq' or 'gptq_v2'"),
    "three bits": (GPTQ_4 | {"bits": 3}, "bits is 3, wanted 4 or 8"),
    "bits in words": (GPTQ_4 | {"bits": "4"}, "bits is '4' and group_size 128, wanted whole numbers"),
    "bits true": (GPTQ_4 | {"bits": True}, "bits is True and group_size 128, wanted whole numbers"),
    "group size null": (GPTQ_4 | {"group_size": None}, "bits is 4 and group_size None, wanted whole numbers"),
    "group size zero": (GPTQ_4 | {"group_size": 0}, "group size is 0, wanted 128, 64, 32 or -1"),
    "override": (GPTQ_4 | {"dynamic": {"x": {"bits": 5}}}, "bits is 5, wanted 4 or 8"),
    "override is a number": (GPTQ_4 | {"dynamic": {"x": 8}}, "dynamic 'x' is int, wanted an object"),
    "bad pattern": (GPTQ_4 | {"dynamic": {"+:(": {}}}, "dynamic has a bad pattern '(' "),
    "dynamic list": (GPTQ_4 | {"dynamic": ["x"]}, "dynamic is list, wanted an object"),
    "not an object": ("gptq", "quantization_config is str, wanted an object"),
    "awq gemv": (AWQ | {"version": "gemv"}, "AWQ version is 'gemv', wanted 'gemm'"),
    "awq bits": (AWQ | {"bits": 3}, "AWQ bits is 3, wanted 4"),
    "awq without zero points": (AWQ | {"zero_point": False}, "AWQ zero_point is False, wanted true"),
    "awq group": (AWQ | {"group_size": "64"}, "bits is 4 and group_size '64', wanted whole numbers"),
    "awq kept": (AWQ | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head', wanted a list"),
    "ct format": (compressed(format="float-quantized"), "compressed-tensors format is 'float-quantized', wanted 'pack"),
    "ct cache": (compressed(kv_cache_scheme={"num_bits": 8}), "a kv_cache_scheme is not supported"),
    "ct no groups": (compressed(config_groups={}), "config_groups is missing or empty"),
    "ct preset": (compressed(config_groups={"W4A16": ["Linear"]}), "config_groups W4A16 is list, wanted an object"),
    "ct activations": (compressed(group={"input_activations": {}}), "config_groups g: quantized activations are not"),
    "ct no weights": (compressed(None), "config_groups g: weights is NoneType, wanted an object"),
    "ct float": (compressed(WEIGHTS | {"type": "float"}), "config_groups g: weights are float by group, wanted static"),
    "ct tensor": (compressed(WEIGHTS | {"strategy": "tensor"}), "config_groups g: weights are int by tensor, wanted"),
    "ct act-order": (compressed(WEIGHTS | {"actorder": "group"}), "config_groups g: actorder is 'group', which"),
    "ct bits": (compressed(WEIGHTS | {"num_bits": 3}), "config_groups g: bits is 3, wanted 4 or 8"),
    "ct pattern": (compressed(group={"targets": ["re:("]}), "config_groups g: targets has a bad pattern '('"),
    "ct ignore": (compressed(ignore=[1]), "ignore is '[1]', wanted a list of names"),
    "bnb both": (BNB | {"load_in_8bit": True}, "wanted one of load_in_4bit and load_in_8bit"),
    "bnb fp4": (BNB | {"bnb_4bit_quant_type": "fp4"}, "4-bit type 'fp4' stored as 'uint8', wanted 'nf4' as 'uint8'"),
    "bnb storage": (BNB | {"bnb_4bit_quant_storage": "bfloat16"}, "4-bit type 'nf4' stored as 'bfloat16', wanted"),
    "bnb pattern": (BNB | {"llm_int8_skip_modules": ["("]}, "llm_int8_skip_modules has a bad pattern"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_configs_are_named(kind: str) -> None:
    config, message = BAD[kind]
    with pytest.raises(CheckpointError, match="^dir/config.json: " + re.escape(message)) as caught:
        read_quantization_config(config, "dir/config.json")
    assert "\n" not in caught.value.message
