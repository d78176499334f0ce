"""`quantization_config` of the GPTQ format, both ways."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from qwenq import __version__
from qwenq.errors import CheckpointError
from qwenq.formats.base import Recipe, Scheme, quantization_config, read_quantization_config
from qwenq.formats.gptq import GPTQ
from qwenq.model.spec import spec_from_config

SPEC = spec_from_config(
    {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64,
    }
)  # fmt: skip
BASE = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def test_written_config() -> None:
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
def test_uniform_recipes_round_trip(scheme: Scheme) -> None:
    written = json.loads(json.dumps(quantization_config(Recipe(scheme), SPEC, damp_percent=0.01, method="rtn")))
    read = GPTQ.read_config(written, "config.json")
    assert (read.default, read.version, read.rules) == (scheme, "gptq" if scheme.sym else "gptq_v2", ())
    assert read.recipe(SPEC) == Recipe(scheme)


def test_mixed_recipes_round_trip() -> None:
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


def test_patterns_as_other_tools_write_them() -> None:
    """GPTQModel: re.match, so a prefix is enough; the first pattern that matches decides; no sign means an override."""
    read = GPTQ.read_config(
        BASE
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


def test_old_and_second_versions() -> None:
    auto_gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False}
    assert GPTQ.read_config(auto_gptq, "x").default == Scheme(4, 128, sym=False)
    assert GPTQ.read_config(auto_gptq, "x").version == "gptq"
    assert GPTQ.read_config(BASE | {"checkpoint_format": None, "dynamic": None}, "x").version == "gptq"
    assert GPTQ.read_config(BASE | {"checkpoint_format": "gptq_v2"}, "x").version == "gptq_v2"


BAD: dict[str, tuple[Any, str]] = {
    "another method": (BASE | {"quant_method": "hqq"}, "quant_method is 'hqq', wanted one of gptq, awq, compr"),
    "no method": ({"bits": 4}, "quant_method is 'None', wanted one of gptq"),
    "pack dtype": (BASE | {"pack_dtype": "int8"}, "pack_dtype is 'int8', wanted 'int32'"),
    "marlin": (BASE | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', wanted 'gptq' or 'gptq_v2'"),
    "three bits": (BASE | {"bits": 3}, "bits is 3, wanted 4 or 8"),
    "bits in words": (BASE | {"bits": "4"}, "bits is '4' and group_size 128, wanted whole numbers"),
    "bits true": (BASE | {"bits": True}, "bits is True and group_size 128, wanted whole numbers"),
    "group size null": (BASE | {"group_size": None}, "bits is 4 and group_size None, wanted whole numbers"),
    "group size zero": (BASE | {"group_size": 0}, "group size is 0, wanted 128, 64, 32 or -1"),
    "override": (BASE | {"dynamic": {"x": {"bits": 5}}}, "bits is 5, wanted 4 or 8"),
    "override is a number": (BASE | {"dynamic": {"x": 8}}, "dynamic 'x' is int, wanted an object"),
    "bad pattern": (BASE | {"dynamic": {"+:(": {}}}, "dynamic has a bad pattern '(' "),
    "dynamic list": (BASE | {"dynamic": ["x"]}, "dynamic is list, wanted an object"),
    "not an object": ("gptq", "quantization_config is str, wanted an object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_configs_are_named(kind: str) -> None:
    config, message = BAD[kind]
    with pytest.raises(CheckpointError, match="^dir/config.json: " + re.escape(message)) as caught:
        read_quantization_config(config, "dir/config.json")
    assert "\n" not in caught.value.message
