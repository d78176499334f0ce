"""Keys of a quantization config: what could change values and is not understood is refused, the rest is let through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig

from qwenq.errors import CheckpointError, UnreadScheme
from qwenq.formats.base import Scheme, read_quantization_config

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
AUTO = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}
AUTO |= {"packing_format": "auto_round:auto_gptq"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
GROUP = {"targets": ["Linear"], "weights": WEIGHTS}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": GROUP}}
ALL = {"gptq": GPTQ, "awq": AWQ, "auto-round": AUTO, "bitsandbytes": BNB, "compressed-tensors": CT}
ROTATION = {"config_groups": {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}


def read(config: dict[str, Any]) -> Any:
    return read_quantization_config(config, "dir/config.json")


@pytest.mark.parametrize("kind", ALL)
def test_an_unknown_key_is_refused_by_name_where_it_says_something(kind: str) -> None:
    for value in (1, True, "hadamard", {"a": [0, {"b": 0.5}]}, ["x"]):
        with pytest.raises(UnreadScheme) as caught:
            read(ALL[kind] | {"mystery": value})
        assert caught.value.message.startswith("dir/config.json: mystery is ")
        assert "this version does not understand" in caught.value.message
    for nothing in (None, False, 0, "", [], {}, {"a": None, "b": [{}]}):
        assert read(ALL[kind] | {"mystery": nothing}).default == read(ALL[kind]).default


# Keys that tools do write and that change what the codes mean, from their sources.
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CT | {"transform_config": ROTATION}, "transform_config"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (CT | {"config_groups": {"g": GROUP | {"format": "nvfp4-pack-quantized"}}}, "format"),
        (CT | {"config_groups": {"g": GROUP | {"weights": WEIGHTS | {"actorder": "dynamic"}}}}, "actorder"),
        (CT | {"config_groups": {"g": GROUP | {"weights": WEIGHTS | {"actorder": True}}}}, "actorder"),
        (CT | {"config_groups": {"g": GROUP | {"weights": WEIGHTS | {"rotation": "R1"}}}}, "rotation"),
        (GPTQ | {"adapter": {"name": "lora", "path": "x", "rank": 64}}, "adapter"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format"),
        (GPTQ | {"awq_gemm_checkpoint": True}, "awq_gemm_checkpoint"),
        (GPTQ | {"rotation": "hadamard"}, "rotation"),
        (GPTQ | {"format": "marlin"}, "checkpoint_format"),
        (GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}, "format"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 8, "adapter": {"rank": 8}}}}, "adapter"),
        (AWQ | {"desc_act": True}, "desc_act"),
        (AWQ | {"backend": "llm-awq"}, "backend"),
        (AWQ | {"version": "gemv_fast"}, "version"),
        (AUTO | {"packing_format": "auto_round:auto_awq"}, "packing_format"),
        (AUTO | {"packing_format": "auto_round:llm_compressor"}, "packing_format"),
        (AUTO | {"data_type": "mx_fp"}, "data_type"),
        (AUTO | {"act_bits": 8}, "act_bits"),
        (AUTO | {"super_bits": 6}, "super_bits"),
        (AUTO | {"rotation_configs": [{"hadamard_type": "hadamard"}]}, "rotation_configs"),
        (AUTO | {"extra_config": {"model.layers.0.mlp.up_proj": {"bits": 4, "data_type": "fp"}}}, "data_type"),
        (BNB | {"bnb_4bit_blocksize": 128}, "bnb_4bit_blocksize"),
        (BNB | {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
    ],
)
def test_what_changes_values_is_refused_by_name(config: dict[str, Any], name: str) -> None:
    with pytest.raises(UnreadScheme, match=name):
        read(config)


@pytest.mark.parametrize(
    ("config", "default"),
    [
        (GPTQ | {"checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:2.2"], "mse": 0.0}}, Scheme(4)),
        (GPTQ | {"static_groups": False, "true_sequential": True, "damp_percent": 0.01, "model_name_or_path": "x",
                 "model_file_base_name": "model", "is_marlin_format": False}, Scheme(4)),
        (AWQ | {"modules_to_not_convert": None, "do_fuse": True, "fuse_max_seq_len": 512}, Scheme(4, sym=False)),
        (CT | {"sparsity_config": {}, "transform_config": {}, "global_compression_ratio": 1.4, "version": "0.13.0",
               "quantization_status": "compressed", "kv_cache_scheme": None}, Scheme(4, 32)),
        (CT | {"transform_config": {"config_groups": {}}, "sparsity_config": {"format": "dense", "sparsity": 0.2}},
         Scheme(4, 32)),
    ],
)  # fmt: skip
def test_what_says_nothing_of_values_is_let_through(config: dict[str, Any], default: Scheme) -> None:
    """As AutoGPTQ, GPTQModel, AutoAWQ and llm-compressor have written them."""
    assert read(config).default == default


def test_what_the_libraries_write_is_let_through() -> None:
    double = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    assert read(double.to_dict()).default.codes == "nf4-nested"
    eight = transformers.BitsAndBytesConfig(load_in_8bit=True)
    assert read(eight.to_dict()).default.bits == 8
    gptq = transformers.GPTQConfig(bits=4, dataset="c4", tokenizer=None, model_seqlen=2048, backend="auto")
    assert read(gptq.to_dict()).default == Scheme(4)
    awq = transformers.AwqConfig(bits=4, modules_to_not_convert=["lm_head"])
    assert read(awq.to_dict()).default == Scheme(4, sym=False)
    compressed = QuantizationConfig(config_groups={"W4A16": ["Linear"]}, format="pack-quantized", ignore=["lm_head"])
    assert read(compressed.to_dict()).default == Scheme(4)


# ---------------------------------------------------------------------- AutoRound


def test_auto_rounds_export_for_gptq() -> None:
    """quantization_config as AutoRound 0.16.1 wrote it with format="auto_gptq"."""
    written = GPTQ | {
        "amp": False, "autoround_version": "0.16.1", "damp_percent": 0.01, "data_type": "int", "desc_act": False,
        "group_size": 64, "iters": 50, "lm_head": False, "provider": "auto-round", "true_sequential": False,
    }  # fmt: skip
    found = read(written)
    assert found.default == Scheme(4, 64) and found.version == "gptq"
    for name, value in (("data_type", "mx_fp"), ("act_bits", 8), ("rotation", "x")):
        with pytest.raises(UnreadScheme, match=name):
            read(written | {name: value})
    with pytest.raises(UnreadScheme, match="autoround_version"):
        read({key: value for key, value in written.items() if key != "provider"})


def test_auto_round_overrides_and_blocks() -> None:
    extra = {
        "model.layers.1.mlp.up_proj": {"bits": 8},
        "model.layers.2.mlp.down_proj": {"bits": 16, "data_type": "float", "act_bits": 16},
        ".*layers.3.*k_proj.*": {"group_size": 32, "sym": False},
        "lm_head": {"bits": 16},
    }
    extra["model.layers.2.mlp.down_proj"].pop("data_type")
    found = read(AUTO | {"extra_config": extra, "block_name_to_quantize": "model.layers", "act_bits": 16, "iters": 200})
    wanted = {
        "model.layers.0.mlp.up_proj": Scheme(4),
        "model.layers.1.mlp.up_proj": Scheme(8),
        "model.layers.2.mlp.down_proj": None,
        "model.layers.3.self_attn.k_proj": Scheme(4, 32, sym=False),
        "visual.blocks.0.attn.qkv": None,
    }
    assert {name: found.scheme_of(name) for name in wanted} == wanted
    listed = read(AUTO | {"to_quant_block_names": [["model.layers.0", "model.layers.1"]]})
    assert listed.scheme_of("model.layers.1.mlp.up_proj") == Scheme(4)
    assert listed.scheme_of("model.layers.10.mlp.up_proj") is None and listed.scheme_of("model.layers.2.x") is None


@pytest.mark.parametrize(
    ("packing", "version"),
    [
        ({"packing_format": "auto_round:auto_gptq"}, "gptq"),
        ({"packing_format": "auto_round:gptq"}, "gptq"),
        ({"packing_format": "auto_round"}, "gptq_v2"),
        ({"packing_format": "auto_round:gptqmodel"}, "gptq_v2"),
        ({"packing_format": None, "backend": "auto_round:gptq:exllamav2"}, "gptq"),
    ],
)
def test_auto_rounds_names_of_gptqs_two_versions(packing: dict[str, Any], version: str) -> None:
    for method in ("auto-round", "intel/auto-round"):
        assert read(AUTO | packing | {"quant_method": method}).version == version


def test_gptq_of_some_modules() -> None:
    some = read(GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]})
    assert some.scheme_of("model.layers.0.self_attn.q_proj") == Scheme(4)
    assert some.scheme_of("model.layers.0.self_attn.v_proj") is None
    with pytest.raises(CheckpointError, match="modules_in_block_to_quantize is"):
        read(GPTQ | {"modules_in_block_to_quantize": [[1]]})
