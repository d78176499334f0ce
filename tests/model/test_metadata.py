"""Config and names of GGUF models against transformers' own GGUF loader, and what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf_bytes as raw
import numpy as np
import pytest
import torch
from gguf_bytes import File, entry, tensor_data, tiny_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.errors import CheckpointError
from qwenq.model.layer import model_config
from qwenq.model.metadata import config_of_metadata, gguf_names, metadata_of_config, open_gguf, rope_factors
from qwenq.model.spec import family_configs, spec_from_config, spelled_twice

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 128}  # fmt: skip


def model_file(model: Any, architecture: str, *, tied: bool = False, extra: dict[str, Any] | None = None) -> File:
    """A transformers model as llama.cpp's converter writes it, in F32; q and k of a Llama have their rows permuted."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layer = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}  # fmt: skip
    tensors = []
    for name, value in model.state_dict().items():
        module, _, part = name.rpartition(".")
        if tied and module == "lm_head":
            continue
        values = value.float().numpy()
        if module in names:
            ours = names[module]
        else:
            _, _, number, path = module.split(".", 3)
            ours = f"blk.{number}.{layer[path]}"
            if architecture == "llama" and path in ("self_attn.q_proj", "self_attn.k_proj"):
                n = heads if path.endswith("q_proj") else kv_heads
                shape = values.shape
                values = values.reshape(n, 2, shape[0] // n // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        tensors.append((f"{ours}.{part}", list(values.shape[::-1]), 0, np.ascontiguousarray(values).tobytes()))
    metadata = {
        "general.architecture": architecture,
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
        f"{architecture}.attention.key_length": config.head_dim,
        f"{architecture}.attention.value_length": config.head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.freq_base": config.rope_parameters["rope_theta"],
        f"{architecture}.vocab_size": config.vocab_size,
        **(extra or {}),
    }
    found = tensor_data(tensors)
    found.entries = [entry(key, value) for key, value in metadata.items()]
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_weights_as_transformers_reads_them(family: str, tmp_path: Path) -> None:
    """Llama's q and k rows are put back, Qwen3's stay; every tensor equals transformers' own reading of the file."""
    torch.manual_seed(0)
    if family == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    path = model_file(model, family).write(tmp_path / "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").state_dict()
    found = open_checkpoint(path)
    assert found.spec.model_type == family and found.quantized is None
    assert set(found.tensors) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(found.read(name), value), name
        assert torch.equal(found.read(name), model.state_dict()[name]), name
    layer = found.layer_state(1)
    assert torch.equal(layer["self_attn.k_proj.weight"], theirs["model.layers.1.self_attn.k_proj.weight"])


def test_a_llama_with_biases(tmp_path: Path) -> None:
    """Biases of q and k are permuted like their rows, and config says that they are there."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True))
    for name, value in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(value)
    found = open_checkpoint(model_file(model, "llama").write(tmp_path / "m.gguf"))
    assert found.config["attention_bias"] is True and found.config["mlp_bias"] is False
    for name, value in model.state_dict().items():
        assert torch.equal(found.read(name), value), name


def test_a_tied_head(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    found = open_checkpoint(model_file(model, "llama", tied=True).write(tmp_path / "m.gguf"))
    assert found.spec.tie_word_embeddings and found.spec.head_tensor == "model.embed_tokens.weight"
    assert torch.equal(found.read_slice(found.spec.head_tensor, 3, 7), model.lm_head.weight[3:7])


@pytest.mark.parametrize("name", [name for name, config in family_configs().items() if config.get("model_type")])
def test_shipped_configs_survive(name: str) -> None:
    """config to metadata and back: the same shapes, and the same rotary embedding as transformers reads it."""
    config = family_configs()[name]
    config.setdefault("rms_norm_eps", 1e-6)
    spec = spec_from_config(config, name=name)
    metadata = {key: round_f32(value) for key, value in metadata_of_config(spec, config).items()}
    names = gguf_names(spec)
    shapes = {names[tensor.name]: tensor.shape for tensor in spec.tensors()}
    factors = rope_factors(spec, config)
    again = config_of_metadata(metadata, shapes, None if factors is None else list(map(round_f32, factors)), "x")
    found = spec_from_config(again)
    assert found.model_type == spec.model_type or (found.model_type, spec.model_type) == ("llama", "mistral")
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "head_dim", "vocab_size", "tie_word_embeddings", "max_position_embeddings"):  # fmt: skip
        assert getattr(found, key) == getattr(spec, key), key
    ours, theirs = (model_config(c, s) for c, s in ((again, found), (config, spec)))
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_parameters == pytest.approx(theirs.rope_parameters)


def round_f32(value: Any) -> Any:
    return float(np.float32(value)) if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("low", "high", "length"),
    [(1.0, 4.0, 8192), (1.0, 4.0, 4096), (1.0, 4.0, 1000), (1.0, 32.0, 8192), (2.0, 6.0, 8192)],
)
def test_factors_of_llama_3_are_transformers(low: float, high: float, length: int, tmp_path: Path) -> None:
    """The frequencies that transformers computes, divided by these factors' own, are those without scaling; parameters
    that give the same ones are read back.
    """
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": length}  # fmt: skip
    sizes = SIZES | {"hidden_size": 256, "max_position_embeddings": 131072}
    config = LlamaConfig(**sizes, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    spec = spec_from_config(config.to_dict())
    factors = rope_factors(spec, config.to_dict())
    assert factors is not None
    np.testing.assert_allclose((plain / torch.tensor(factors, dtype=torch.float64)).numpy(), scaled.numpy(), rtol=2e-6)
    torch.manual_seed(0)
    file = model_file(LlamaForCausalLM(config), "llama")
    size = len(file.data)
    file.tensors.append(["rope_freqs.weight", [32], 0, size])
    file.data += np.array(factors, np.float32).tobytes()
    found = open_checkpoint(file.write(tmp_path / "m.gguf"))
    read = found.config["rope_scaling"]
    assert read == {key: rope[key] for key in ("rope_type", "factor")} | {
        "low_freq_factor": 1.0, "high_freq_factor": high / low, "original_max_position_embeddings": length / low,
    }  # fmt: skip
    again = LlamaConfig(**sizes, rope_parameters=read | {"rope_theta": 500000.0})
    np.testing.assert_allclose(ROPE_INIT_FUNCTIONS["llama3"](again, "cpu")[0].numpy(), scaled.numpy(), rtol=2e-6)
    file.data = file.data[:size] + np.array([*factors[:-1], 31.0], np.float32).tobytes()
    with pytest.raises(CheckpointError, match=r"other factors than Llama 3\.1's"):
        open_checkpoint(file.write(tmp_path / "m.gguf"))


@pytest.mark.parametrize("base", [1.0, 0.1, 1e29])
def test_factors_that_nothing_gives_are_refused(base: float) -> None:
    """Bases of which waves are equal, or fall, and factors in no order."""
    config = family_configs()["Llama-3.1-8B"]
    spec = spec_from_config(config)
    metadata = metadata_of_config(spec, config) | {"llama.rope.freq_base": base}
    shapes = {gguf_names(spec)[tensor.name]: tensor.shape for tensor in spec.tensors()}
    for some in ([1.5, 2.5], [2.5, 1.5], [1.0000001, 4.0], [3.0, 2.0]):
        with pytest.raises(CheckpointError, match=r"^x: rope_freqs.weight holds other factors than Llama 3\.1's"):
            config_of_metadata(metadata, shapes, [*some * 31, 4.0, 1.0], "x")


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}


LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, YARN, LLAMA3])
def test_the_spelling_of_transformers_5_and_that_of_4_beside_it(rope: dict[str, Any], tiny: Path) -> None:
    """Version 4 takes a base of 10000, in silence, where it finds none under its own name."""
    config = json.loads((tiny / "config.json").read_text())
    del config["rope_theta"]
    spec = spec_from_config(config | {"rope_parameters": rope | {"rope_theta": 5e5}})
    written = spelled_twice(config | {"rope_parameters": rope | {"rope_theta": 5e5}})
    old = {key: written.get(key) for key in ("rope_theta", "rope_scaling")}
    assert old == {"rope_theta": 5e5, "rope_scaling": None if rope["rope_type"] == "default" else rope}
    assert spec_from_config(written) == spec
    for each in (written, config | old):  # as version 5 reads both, and the old one alone
        assert model_config(each, spec).rope_parameters == rope | {"rope_theta": 5e5}
        assert metadata_of_config(spec, each)["qwen2.rope.freq_base"] == 5e5
    assert spelled_twice(config) == config


def test_spellings_that_contradict_each_other_are_refused(tiny: Path) -> None:
    """YaRN added as Qwen's cards say, to a config.json that transformers 5 saved: read with a base of 10000 there.
    """
    config = json.loads((tiny / "config.json").read_text())
    del config["rope_theta"]
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": {**YARN, "type": "yarn"}}
    with pytest.raises(CheckpointError, match="rope_type is 'yarn' by rope_scaling and 'default' by rope_parameters"):
        spec_from_config(config)
    with pytest.raises(CheckpointError, match=r"rope_theta is 10000\.0 by .* and 1000000\.0 by rope_par"):
        spec_from_config(config | {"rope_parameters": {**YARN, "rope_theta": 1e6}})


def test_yarn(tmp_path: Path, tiny: Path) -> None:
    file = tiny_file(tiny)
    file.entries += [entry("qwen2.rope.scaling.type", "yarn"), entry("qwen2.rope.scaling.factor", 4.0),
                     entry("qwen2.rope.scaling.original_context_length", 512)]  # fmt: skip
    found = open_gguf(file.write(tmp_path / "m.gguf"))
    assert found.spec.extended_context == 2048
    assert found.config["rope_scaling"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
    }  # fmt: skip
    config = json.loads((tiny / "config.json").read_bytes())
    config["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    written = metadata_of_config(spec_from_config(config), config)
    assert {k: v for k, v in written.items() if "scaling" in k} == {
        "qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 512,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 64}}, "with beta_fast 64 have no GGUF metadata"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.5}}, "attention_factor 1.5 have no"),
        ({"rope_scaling": {"type": "yarn", "factor": None}}, "factor is None, wanted a positive number"),
        ({"partial_rotary_factor": 0.5}, "with partial_rotary_factor 0.5 have no GGUF metadata"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', GGUF has silu"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x', wanted a positive number"),
        ({"rope_theta": None}, "rope_theta is None, wanted a positive number"),
    ],
)
def test_what_metadata_has_no_words_for_is_refused(changes: dict[str, Any], words: str, tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_bytes())
    spec = spec_from_config(config)
    with pytest.raises(CheckpointError, match=words):
        metadata_of_config(spec, config | changes)
    neutral = {"type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1.0, "attention_factor": None}
    assert metadata_of_config(spec, config | {"rope_scaling": neutral})["qwen2.rope.scaling.type"] == "yarn"


def test_a_bias_that_llama_cpp_has_no_place_for_is_refused(tiny: Path) -> None:
    """Its loader of Qwen3 makes no attn_output.bias, and ends with "wrong number of tensors"; Llama's does."""
    config = json.loads((tiny / "config.json").read_bytes()) | {"attention_bias": True}
    qwen3, llama = config | {"model_type": "qwen3"}, config | {"model_type": "llama"}
    with pytest.raises(CheckpointError, match=r"self_attn\.o_proj has a bias, llama\.cpp reads none of a qwen3"):
        metadata_of_config(spec_from_config(qwen3), qwen3)
    assert metadata_of_config(spec_from_config(llama), llama)["general.architecture"] == "llama"
    plain = qwen3 | {"attention_bias": False}
    assert metadata_of_config(spec_from_config(plain), plain)["general.architecture"] == "qwen3"


def with_key(file: File, key: str, value: Any) -> None:
    file.entries = [each for each in file.entries if each[0] != key] + ([] if value is None else [entry(key, value)])


REFUSED: dict[str, tuple[str, Any, str]] = {
    "another architecture": ("general.architecture", "gemma3", "general.architecture is 'gemma3', wanted one of"),
    "no architecture": ("general.architecture", None, "general.architecture is None"),
    "an adapter": ("general.type", "adapter", "general.type is 'adapter', wanted model"),
    "experts": ("qwen2.expert_count", 8, "qwen2.expert_count is 8, which is not supported"),
    "no layers": ("qwen2.block_count", None, "no qwen2.block_count in its metadata"),
    "zero layers": ("qwen2.block_count", 0, "block_count is 0, wanted a positive whole number"),
    "a million layers": ("qwen2.block_count", 1_000_000, "more than any model has"),
    "heads by layer": ("qwen2.attention.head_count", [4, 4], "is \\[4, 4\\], wanted a positive whole number"),
    "heads that do not divide": ("qwen2.attention.head_count_kv", 3, "not a multiple of num_key_value_heads 3"),
    "half of a head rotated": ("qwen2.rope.dimension_count", 16, "rope.dimension_count is 16, the heads have 32"),
    "a wide FFN": ("qwen2.feed_forward_length", 768, "ffn_gate.weight has shape \\[384, 128\\], its metadata wants"),
    "no epsilon": ("qwen2.attention.layer_norm_rms_epsilon", math.inf, "wanted a positive number"),
    "a steeper YaRN": ("qwen2.rope.scaling.yarn_beta_fast", 64.0, "yarn_beta_fast is 64.0, which is not supported"),
    "an old linear scale": ("qwen2.rope.scale_linear", 4.0, "rope.scale_linear is 4.0, which is not supported"),
    "long rotary": ("qwen2.rope.scaling.type", "longrope", "'longrope', wanted linear or yarn"),
    "a layer more": ("qwen2.block_count", 2, "no tensor blk.1.attn_norm.weight"),
    "half the vocabulary": ("tokenizer.ggml.tokens", ["a", "b"], "2 tokens in its metadata, .* has 1024 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tiny: Path, tmp_path: Path) -> None:
    key, value, words = REFUSED[case]
    file = tiny_file(tiny)
    with_key(file, key, value)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(file.write(tmp_path / "m.gguf"))


def test_tensors_that_have_no_place(tiny: Path, tmp_path: Path) -> None:
    file = tiny_file(tiny)
    file.tensors.append(["blk.0.ffn_gate_exps.weight", [32], 0, len(file.data)])
    file.data += bytes(128)
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.ffn_gate_exps\.weight has no place in a qwen2 model"):
        open_checkpoint(file.write(tmp_path / "m.gguf"))
    file = tiny_file(tiny)
    assert file.tensors[0][2] == raw.GGML["F16"]
    file.tensors[0][2] = raw.GGML["BF16"]  # of as many bytes
    assert open_checkpoint(file.write(tmp_path / "m.gguf")).quantized is None
