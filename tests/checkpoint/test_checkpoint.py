"""Checkpoints as they are read: against the safetensors library, against the format's own words, and every refusal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import all_tensors, rewrite

from qwenq.checkpoint.reader import open_checkpoint, open_source
from qwenq.errors import CheckpointError
from qwenq.model.layer import Network
from qwenq.pipeline.activations import embed
from qwenq.solver.grid import QTensor

Q = "model.layers.0.self_attn.q_proj.qweight"
Edit = Callable[..., dict[str, Any]]
Make = Callable[..., Path]


def refusal(directory: Path, opener: Callable[[Path], Any] = open_checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        opener(directory)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reading_equals_the_reference_library(dtype: torch.dtype, random_model: Make) -> None:
    path = random_model(dtype=dtype)
    checkpoint = open_checkpoint(path)
    wanted = all_tensors(path)
    assert set(checkpoint.tensors) == set(wanted) and len(checkpoint.files) > 2
    for name, tensor in wanted.items():
        read = checkpoint.read(name)
        assert read.dtype == dtype and torch.equal(read, tensor), name


def test_read_is_a_private_copy(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    checkpoint.read("model.norm.weight").zero_()
    assert checkpoint.read("model.norm.weight").any()


def test_embedded_tokens_are_rows_of_the_table(random_model: Make) -> None:
    checkpoint = open_checkpoint(random_model(vocab_size=9000))
    table = all_tensors(checkpoint.directory)["model.embed_tokens.weight"]
    ids = torch.randint(0, 9000, (3, 40))
    ids[0, :6] = torch.tensor([0, 4095, 4096, 8191, 8192, 8999])
    states = {"a": torch.empty(3, 40, 64), "b": torch.empty(3, 40, 64, dtype=torch.bfloat16)}
    for source in (checkpoint, checkpoint.hash_files([])):
        embed(source, {name: (h, ids) for name, h in states.items()}, lambda name, rows: rows + 1)
        for h in states.values():
            assert torch.equal(h, (table + 1)[ids].to(h.dtype))


def test_a_slice_is_compared_with_what_was_hashed(random_model: Make) -> None:
    """Slices of 4,096 rows, and whatever lies inside them; a flipped byte is found by those that hold it."""
    checkpoint = open_checkpoint(random_model(vocab_size=9000)).hash_files([])
    name = "lm_head.weight"
    table, location = all_tensors(checkpoint.directory)[name], checkpoint.tensors[name]
    for start, stop in ((0, 4096), (4096, 8192), (8192, 9000), (5000, 6000), (4000, 8300), (0, 9000), (7, 7)):
        assert torch.equal(checkpoint.read_slice(name, start, stop), table[start:stop])
    with open(location.file, "r+b") as file:
        file.seek(location.start + 8200 * 128)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    assert torch.equal(checkpoint.read_slice(name, 100, 8192), table[100:8192])
    for start, stop in ((8192, 9000), (8500, 8600), (0, 9000)):
        with pytest.raises(CheckpointError, match=r"changed while it was being read$"):
            checkpoint.read_slice(name, start, stop)


def test_a_file_that_changes_between_opening_and_hashing(random_model: Make) -> None:
    """Its time is set back, and hashing sees the new bytes only: they are not those the header was read from."""
    checkpoint = open_checkpoint(random_model())
    path = checkpoint.files[1]
    data, times = path.read_bytes(), os.stat(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.hash_files([])
    assert caught.value.message == f"{path}: changed while it was being read"


def test_slices(tiny: Path) -> None:
    checkpoint, tensors = open_checkpoint(tiny), all_tensors(tiny)
    for start, stop in ((0, 1), (3, 900), (1000, 1024), (7, 7)):
        assert torch.equal(checkpoint.read_slice("lm_head.weight", start, stop), tensors["lm_head.weight"][start:stop])


def test_layer_state_has_the_layers_own_names(tiny: Path) -> None:
    checkpoint, tensors = open_checkpoint(tiny), all_tensors(tiny)
    state = checkpoint.layer_state(2)
    prefix = "model.layers.2."
    assert set(state) == {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    assert "self_attn.q_proj.bias" in state
    assert all(torch.equal(value, tensors[prefix + name]) for name, value in state.items())


def test_head_of_tied_and_untied(random_model: Make) -> None:
    assert open_checkpoint(random_model("a")).spec.head_tensor == "lm_head.weight"
    assert open_checkpoint(random_model("b", tie_word_embeddings=True)).spec.head_tensor == "model.embed_tokens.weight"


# ---------------------------------------------------------------------- packed weights


def plain_dequantization(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int, minus_one: bool
) -> torch.Tensor:
    """W[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o]), read off word by word; float64 [out, in]."""
    per_word, mask = 32 // bits, (1 << bits) - 1
    columns, rows = qweight.shape[0] * per_word, qweight.shape[1]
    words, zero_words = qweight.tolist(), qzeros.tolist()
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(columns):
        group = int(g_idx[i])
        for o in range(rows):
            code = (words[i // per_word][o] >> (bits * (i % per_word))) & mask
            zero = (zero_words[group][o // per_word] >> (bits * (o % per_word))) & mask
            zero = (zero + 1) & mask if minus_one else zero
            weight[o, i] = float(scales[group, o]) * (code - zero)
    return weight


def pack_by_hand(path: Path, edit_json: Edit, bits: int, group: int, version: str, shuffled: bool) -> Path:
    """Turn the linears of a checkpoint into random words; asymmetric zero points, and g_idx out of order if asked."""
    generator = torch.Generator().manual_seed(bits)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int64).to(torch.int32)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            rows, columns = tensors.pop(name).shape
            module = name.removesuffix(".weight")
            index = torch.arange(columns, dtype=torch.int32) // group
            tensors[module + ".qweight"] = words(columns * bits // 32, rows)
            tensors[module + ".qzeros"] = words(columns // group, rows * bits // 32)
            tensors[module + ".scales"] = (torch.rand(columns // group, rows, generator=generator) + 0.1).half()
            tensors[module + ".g_idx"] = index[torch.randperm(columns, generator=generator)] if shuffled else index

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": version, "sym": False}
    edit_json(path / "config.json", quantization_config=config)
    return rewrite(path, change)


@pytest.mark.parametrize(
    ("bits", "version", "shuffled"),
    [(4, "gptq", False), (8, "gptq", False), (4, "gptq_v2", True), (8, "gptq_v2", True)],
)
def test_packed_linears_mean_what_the_format_says(
    bits: int, version: str, shuffled: bool, random_model: Make, edit_json: Edit
) -> None:
    path = pack_by_hand(random_model(num_hidden_layers=1), edit_json, bits, 32, version, shuffled)
    checkpoint, tensors = open_checkpoint(path), all_tensors(path)
    state = checkpoint.layer_state(0)
    for lin in checkpoint.spec.layer_linears(0):
        parts = [tensors[f"{lin.name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
        wanted = plain_dequantization(*parts, bits, version == "gptq")
        got = state[lin.name.removeprefix("model.layers.0.") + ".weight"]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)
        stored = checkpoint.linear(lin)
        assert isinstance(stored, QTensor) and (stored.order_I is not None) == shuffled
        assert torch.equal(stored if isinstance(stored, torch.Tensor) else stored.dequantize(), got)
    assert torch.equal(state["self_attn.v_proj.bias"], tensors["model.layers.0.self_attn.v_proj.bias"])


def test_a_module_excluded_by_the_config_is_read_as_stored(random_model: Make, edit_json: Edit) -> None:
    path = random_model(num_hidden_layers=1)
    plain = all_tensors(path)["model.layers.0.mlp.up_proj.weight"]
    pack_by_hand(path, edit_json, 4, 32, "gptq", False)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"model.layers.0.mlp.up_proj.{part}"]
        tensors["model.layers.0.mlp.up_proj.weight"] = plain

    rewrite(path, change)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.up_proj" in refusal(path)
    edit_json(path / "config.json", quantization_config=config | {"dynamic": {r"-:.*\.up_proj$": {}}})
    assert torch.equal(open_checkpoint(path).layer_state(0)["mlp.up_proj.weight"], plain)


# ---------------------------------------------------------------------- refusals


def test_missing_tensor(random_model: Make) -> None:
    path = rewrite(random_model(), lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"))
    assert refusal(path) == f"{path}: tensor model.layers.1.self_attn.k_proj.bias is in no shard"
    rewrite(path, lambda t: t.pop("lm_head.weight"))
    assert refusal(path) == f"{path}: tensor lm_head.weight and 1 more is in no shard"


def test_wrong_shape(random_model: Make, edit_json: Edit) -> None:
    path = random_model()
    edit_json(path / "config.json", intermediate_size=128)
    message = refusal(path)
    assert "model.layers.0.mlp.gate_proj.weight has shape [96, 64], config.json wants [128, 64]" in message
    assert message.startswith("model-0000")


@pytest.mark.parametrize(("dtype", "said"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_8_bit_sources(dtype: torch.dtype, said: str, random_model: Make) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    path = rewrite(random_model(), lambda t: t.update({name: t[name].to(dtype)}))
    assert refusal(path) == f"model.safetensors: {name} has dtype {said}, wanted F16 or BF16 or F32"


def test_extra_tensors(random_model: Make) -> None:
    path = rewrite(random_model(), lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert open_checkpoint(path).ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    rewrite(path, lambda t: t.update({"score.weight": torch.ones(1, 64)}))
    assert refusal(path) == "model.safetensors: tensor score.weight has no place in a qwen2 model"


def test_more_layers_than_the_config_says(random_model: Make, edit_json: Edit) -> None:
    path = random_model()
    edit_json(path / "config.json", num_hidden_layers=2)
    assert "tensor model.layers.2." in refusal(path) and "has no place in a qwen2 model" in refusal(path)


def test_a_tied_model_may_store_its_head(random_model: Make) -> None:
    path = random_model(tie_word_embeddings=True)
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert open_checkpoint(path).ignored == ("lm_head.weight",)


def test_truncated_shard(random_model: Make) -> None:
    path = random_model()
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refusal(path)
    assert message.startswith(f"{shard.name}: tensor ") and "ends at byte" in message
    shard.write_bytes(b"")
    assert refusal(path) == f"{shard.name}: 0 bytes, too short for a safetensors file"


def test_already_quantized(random_model: Make, edit_json: Edit) -> None:
    path = random_model()
    rewrite(path, lambda t: t.update({Q: torch.zeros(2, dtype=torch.int32)}) or t.pop(Q.replace("qweight", "weight")))
    for method, shown in (("awq", "awq"), ("gptq", "gptq"), (None, "unknown method")):
        edit_json(path / "config.json", quantization_config={"quant_method": method, "bits": 4})
        assert refusal(path, open_source) == f"{path}: already quantized ({shown})"
    edit_json(path / "config.json", quantization_config="fp8")
    assert refusal(path, open_source) == f"{path}: already quantized (unknown method)"
    assert "quantization_config is str" in refusal(path)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen2_5_vl", "qwen3_next", None])
def test_unsupported_architecture(model_type: str | None, random_model: Make, edit_json: Edit) -> None:
    path = random_model()
    edit_json(path / "config.json", model_type=model_type)
    assert refusal(path) == (
        f"{path / 'config.json'}: model_type {model_type!r} is not supported "
        "(wanted one of qwen2, qwen3, llama, mistral)"
    )


def test_sliding_window(random_model: Make, edit_json: Edit) -> None:
    path = random_model()
    edit_json(path / "config.json", use_sliding_window=True, sliding_window=64)
    refused = "config.json: use_sliding_window with a window of {} tokens is not supported, the model reads {}"
    assert refusal(path) == f"{path}/" + refused.format(64, 256)
    edit_json(path / "config.json", use_sliding_window=False)
    open_checkpoint(path)
    edit_json(path / "config.json", use_sliding_window=True, sliding_window=256)
    open_checkpoint(path)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    edit_json(path / "config.json", rope_parameters=yarn)
    assert refusal(path) == f"{path}/" + refused.format(256, 1024)


def test_sliding_window_that_the_config_leaves_to_transformers(random_model: Make, edit_json: Edit) -> None:
    from transformers import AutoConfig

    path = random_model()
    edit_json(
        path / "config.json",
        use_sliding_window=True, sliding_window=None, layer_types=None, max_window_layers=0,
        max_position_embeddings=4096,
    )  # fmt: skip
    config = AutoConfig.from_pretrained(path)
    assert (config.sliding_window, set(config.layer_types)) == (4096, {"sliding_attention"})
    open_checkpoint(path)
    edit_json(path / "config.json", max_position_embeddings=4097)
    assert refusal(path).endswith("with a window of 4096 tokens is not supported, the model reads 4097")
    config = json.loads((path / "config.json").read_text()) | {"sliding_window": None}  # null: no window
    (path / "config.json").write_text(json.dumps(config))
    open_checkpoint(path)


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        ("qwen2", {"num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 64}),
        ("qwen3", {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}),
        ("qwen3", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    ],
)
def test_shapes_that_the_config_leaves_to_transformers(
    model_type: str, shape: dict[str, int], random_model: Make, edit_json: Edit
) -> None:
    from transformers import AutoConfig

    path = random_model("model", model_type, **shape)
    heads = None if shape["num_key_value_heads"] == shape["num_attention_heads"] else 1
    edit_json(path / "config.json", head_dim=None, num_key_value_heads=heads)
    source = open_checkpoint(path)
    theirs = AutoConfig.from_pretrained(path)
    assert source.spec.num_key_value_heads == theirs.num_key_value_heads == shape["num_key_value_heads"]
    assert source.spec.head_dim == (getattr(theirs, "head_dim", None) or 64 // theirs.num_attention_heads)
    Network(source.config, source.spec, dtype=torch.float32).fill(source.layer_state(0))


def test_tensors_of_another_shape_than_transformers_default(random_model: Make, edit_json: Edit) -> None:
    path = random_model("model", "qwen3", head_dim=32)
    edit_json(path / "config.json", head_dim=None)
    assert refusal(path).endswith("self_attn.q_proj.weight has shape [128, 64], config.json wants [512, 64]")
    path = random_model("other", "qwen2")
    edit_json(path / "config.json", num_key_value_heads=None)
    assert refusal(path).endswith("num_attention_heads 4 is not a multiple of num_key_value_heads 32")


def test_a_publishers_width_that_is_none(random_model: Make, edit_json: Edit) -> None:
    """Only shipped models have one, but any config.json may say so."""
    path = random_model()
    for value, said in (("x", "'x', wanted a positive whole number"), (10**9, "1e+09, more than any model has")):
        edit_json(path / "config.json", official_quantized_intermediate_size=value)
        assert refusal(path).startswith(f"{path}/config.json: official_quantized_intermediate_size is {said}")


def test_no_directory_and_no_config(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: no such directory"
    assert refusal(tmp_path) == f"{tmp_path}: no config.json"
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not JSON" in refusal(tmp_path)


def test_a_tensor_that_is_not_finite_is_refused_by_name(random_model: Make) -> None:
    source, name = open_checkpoint(random_model()), "model.norm.weight"
    for value in (float("nan"), float("-inf")):
        with pytest.raises(CheckpointError, match=rf"\.safetensors: {name} holds a NaN or an infinity"):
            source.refuse_non_finite(name, torch.tensor([1.0, value]))
    good = torch.ones(3)
    assert source.refuse_non_finite(name, good) is good
