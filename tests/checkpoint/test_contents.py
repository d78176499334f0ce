"""Tensors beside config.json: a tied head that is another, bare names, quantized heads, left-over settings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import all_tensors, rewrite, run, small_job
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qwenq import api
from qwenq.checkpoint.reader import open_checkpoint, open_source
from qwenq.errors import CheckpointError, UnreadScheme
from qwenq.formats.base import Recipe, Scheme
from qwenq.model.spec import family_configs, family_spec, spec_from_config
from qwenq.pipeline.quantize import quantize
from qwenq.planning.models import Model, WeightsAsked, model_weights

Edit = Callable[..., dict[str, Any]]
Make = Callable[..., Path]
HEAD = "lm_head.weight"
NOTE = (
    "config.json ties the head to the embedding, but a different lm_head.weight is stored: it is kept "
    "(tie_word_embeddings false)"
)


def head_of(seed: int) -> torch.Tensor:
    return torch.randn(1024, 64, generator=torch.Generator().manual_seed(seed)).half()


@pytest.fixture
def merged(random_model: Make) -> Path:
    """A model that says its head is the embedding and stores another, as merged adapters are saved."""
    path = random_model("merged", tie_word_embeddings=True)
    return rewrite(path, lambda t: t.update({HEAD: head_of(3)}))


@pytest.fixture
def copied(random_model: Make) -> Path:
    """A tied model that stores its embedding a second time, as its head."""
    path = random_model("copied", tie_word_embeddings=True)
    return rewrite(path, lambda t: t.update({HEAD: t["model.embed_tokens.weight"].clone()}))


# ---------------------------------------------------------------------- a head of its own


def test_a_head_that_is_another_is_kept_and_said_once(merged: Path) -> None:
    found = open_checkpoint(merged)
    assert found.notes == (NOTE,) and found.ignored == () and found.config["tie_word_embeddings"] is False
    assert torch.equal(found.read(found.spec.head_tensor), head_of(3))
    done = run("inspect", merged)
    assert done.exit_code == 0 and done.stderr.count(NOTE) == 1
    assert "head tied to the embedding" in done.stdout


def test_a_head_equal_to_the_embedding_is_no_fault(copied: Path) -> None:
    found = open_checkpoint(copied)
    assert found.notes == () and found.spec.tie_word_embeddings and found.ignored == (HEAD,)
    done = run("inspect", copied)
    assert done.exit_code == 0 and done.stderr == ""


def test_a_head_that_differs_in_its_last_byte_or_its_dtype_is_another(copied: Path, merged: Path) -> None:
    def last(t: dict[str, torch.Tensor]) -> None:
        t[HEAD][-1, -1] += 1

    assert open_checkpoint(rewrite(copied, last)).notes == (NOTE,)
    rewrite(merged, lambda t: t.update({HEAD: t["model.embed_tokens.weight"].float()}))
    assert open_checkpoint(merged).notes == (NOTE,)


def test_quantize_writes_the_head_and_says_that_it_is_not_tied(merged: Path, tmp_path: Path) -> None:
    recipe = Recipe(Scheme(4, 32), format="compressed-tensors")  # transformers reads it on a CPU
    result = quantize(small_job(merged, tmp_path / "out", recipe=recipe))
    assert result.warnings[0] == NOTE
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    written = open_checkpoint(tmp_path / "out")
    assert written.notes == () and torch.equal(written.read(HEAD), head_of(3))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
    ids = torch.randint(0, 1000, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = model(ids, output_hidden_states=True)
    torch.testing.assert_close(found.logits, found.hidden_states[-1] @ head_of(3).float().T, rtol=0, atol=1e-4)


def test_eval_and_run_use_the_stored_head(merged: Path, tmp_path: Path) -> None:
    untied = tmp_path / "untied"
    untied.mkdir()
    for file in merged.iterdir():
        os.link(file, untied / file.name)
    (untied / "config.json").unlink()
    config = json.loads((merged / "config.json").read_text()) | {"tie_word_embeddings": False}
    (untied / "config.json").write_text(json.dumps(config))
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten. " * 60)
    said: list[str] = []
    options: dict[str, Any] = {"text": str(text), "sequence_length": 32, "num_samples": 2, "device": "cpu"}
    drift = api.evaluate(merged, untied, warn=said.append, **options)
    assert drift.kl.mean == 0 and said == [NOTE]
    said.clear()
    with api.load(merged, max_model_len=64, compute_dtype="float32", warn=said.append) as model:
        answer = model.generate("one two", raw=True, max_new_tokens=1, temperature=0)
        asked = model._chat.text_ids("one two")
    assert said == [NOTE]
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    with torch.inference_mode():
        assert answer.token_ids == (int(model(torch.tensor([asked])).logits[0, -1].argmax()),)


def test_convert_keeps_the_head(merged: Path, tmp_path: Path, edit_json: Edit) -> None:
    quantize(small_job(merged, tmp_path / "gptq"))
    edit_json(tmp_path / "gptq" / "config.json", tie_word_embeddings=True)  # another tool's mistake
    said: list[str] = []
    api.convert(tmp_path / "gptq", tmp_path / "ct", "compressed-tensors", warn=said.append)
    found = open_checkpoint(tmp_path / "ct")
    assert said == [NOTE] and found.notes == () and torch.equal(found.read(HEAD), head_of(3))


def test_sizes_count_the_head(merged: Path, copied: Path) -> None:
    def size(path: Path, *options: str) -> tuple[int, str]:
        done = run("vram", path, "-c", "128", "--json", *options)
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)["weights"]["bytes"], done.stderr

    for options in ((), ("--bits", "4", "--group-size", "32")):
        with_head, said = size(merged, *options)
        assert said == f"warning: {NOTE}\n"
        assert (with_head - size(copied, *options)[0], size(copied)[1]) == (2 * 1024 * 64, "")
    assert size(merged, "--checkpoint", str(merged)) == size(merged)
    dry = api.dry_run(merged, bits=4, group_size=32, sequence_length=32)
    assert dry.warnings[0] == NOTE


def test_sizes_of_a_checkpoint_that_unties_a_tied_familys_head(tmp_path: Path) -> None:
    """`vram FAMILY --checkpoint DIR`: the directory's own config.json decides."""
    spec = family_spec("Qwen2.5-0.5B")
    assert spec is not None and spec.tie_word_embeddings
    small = {"num_hidden_layers": 1, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    config = family_configs()["Qwen2.5-0.5B"] | small | {"tie_word_embeddings": False, "num_attention_heads": 2}
    untied = spec_from_config(config)
    tensors = {t.name: torch.zeros(t.shape, dtype=torch.bfloat16) for t in untied.tensors()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = model_weights(Model(replace(untied, tie_word_embeddings=True), {}), WeightsAsked(checkpoint=tmp_path))
    assert weights.head == (2 * 64 * 64,)


# ---------------------------------------------------------------------- bare names


def bare(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def test_names_without_model_are_read(random_model: Make, tmp_path: Path) -> None:
    """As embedding models are saved, from the class without a head: `layers.0...`, `embed_tokens.weight`."""
    path = random_model("bare", "qwen3", tie_word_embeddings=True, head_dim=16)
    wanted = open_checkpoint(path).read("model.layers.1.mlp.up_proj.weight")
    rewrite(path, bare)
    found = open_checkpoint(path)
    assert torch.equal(found.read("model.layers.1.mlp.up_proj.weight"), wanted) and found.ignored == ()
    assert api.inspect(path).disagreements == ()
    quantize(small_job(path, tmp_path / "out", recipe=Recipe(Scheme(4, 32))))
    assert open_checkpoint(tmp_path / "out").recipe.default == Scheme(4, 32)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, wanted)


def test_an_embedding_model_without_a_head_is_named(random_model: Make) -> None:
    path = random_model("bare")
    rewrite(path, lambda t: (t.pop(HEAD), bare(t)))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.message == f"{path}: tensor lm_head.weight is in no shard"
    assert "embedding model" in caught.value.hint


# ---------------------------------------------------------------------- quantized heads, left-over settings


@pytest.fixture
def four_bits(random_model: Make, tmp_path: Path) -> Path:
    quantize(small_job(random_model("source"), tmp_path / "four"))
    return tmp_path / "four"


@pytest.mark.parametrize("part", ["qweight", "weight_packed", "weight.absmax", "SCB"])
def test_a_quantized_head_is_refused_by_name(part: str, four_bits: Path) -> None:
    def pack(t: dict[str, torch.Tensor]) -> None:
        t[f"lm_head.{part}"] = torch.zeros(8, 1024, dtype=torch.int32)
        if "weight." not in part and part != "SCB":
            del t[HEAD]

    rewrite(four_bits, pack)
    with pytest.raises(UnreadScheme) as caught:
        open_checkpoint(four_bits)
    assert caught.value.message.startswith(f"{four_bits}: the head is quantized (lm_head.")
    done = run("vram", four_bits, "-c", "128", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["weights"]["bytes"]  # sizes are known all the same


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8", "compressed-tensors", "mystery"])
@pytest.mark.parametrize("opener", [open_source, open_checkpoint])
def test_a_left_over_quantization_config_is_called_that(
    method: str, opener: Callable[[Path], Any], random_model: Make, edit_json: Edit
) -> None:
    path = random_model()
    said = {"quant_method": method, "bits": 4, "group_size": 32, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_json(path / "config.json", quantization_config=said | {"format": "float-quantized"})
    with pytest.raises(CheckpointError) as caught:
        opener(path)
    assert caught.value.message == (
        f"{path}: config.json says quantized ({method}), but every linear is stored in 16 bits"
    )
    assert "remove quantization_config from config.json" in caught.value.hint


def test_a_bias_that_a_quantizer_added_is_left_out_only_when_it_is_zero(four_bits: Path) -> None:
    """AutoGPTQ writes zero biases for linears that have none; others (bias correction) would be lost."""
    name = "model.layers.1.mlp.up_proj.bias"
    rewrite(four_bits, lambda t: t.update({name: torch.zeros(96, dtype=torch.float16)}))
    assert open_checkpoint(four_bits).ignored == (name,)
    rewrite(four_bits, lambda t: t[name].__setitem__(7, 0.5))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(four_bits)
    assert caught.value.message.startswith(f"model.safetensors: {name} is stored and not zero")


# ---------------------------------------------------------------------- AutoRound, GPTQ without order, no config


@pytest.mark.parametrize(("packing", "asymmetric"), [("auto_round:auto_gptq", False), ("auto_round:gptqmodel", True)])
def test_auto_round_is_read_value_for_value(
    packing: str, asymmetric: bool, random_model: Make, tmp_path: Path, edit_json: Edit
) -> None:
    """The tensors of GPTQ without `g_idx`, of version 1 or 2; and they run."""
    recipe = Recipe(Scheme(4, 32, sym=not asymmetric), (("model.layers.1.mlp.up_proj", None),))
    out = quantize(small_job(random_model(), tmp_path / "out", recipe=recipe)).out
    wanted = [open_checkpoint(out).layer_state(layer) for layer in range(3)]
    rewrite(out, lambda t: [t.pop(name) for name in list(t) if name.endswith(".g_idx")])
    config = {
        "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": not asymmetric, "data_type": "int",
        "packing_format": packing, "autoround_version": "0.9.2", "iters": 200, "seqlen": 2048, "nsamples": 128,
        "block_name_to_quantize": "model.layers", "extra_config": {"model.layers.1.mlp.up_proj": {"bits": 16}},
    }  # fmt: skip
    edit_json(out / "config.json", quantization_config=config)
    found = open_checkpoint(out)
    for layer, state in enumerate(wanted):
        read = found.layer_state(layer)
        assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert api.inspect(out).disagreements == ()
    with api.load(out, max_model_len=64) as model:
        assert model.generate("one two", raw=True, max_new_tokens=3, temperature=0).token_ids


def test_gptq_out_of_order_needs_its_order(four_bits: Path, edit_json: Edit) -> None:
    rewrite(four_bits, lambda t: [t.pop(name) for name in list(t) if name.endswith("0.mlp.up_proj.g_idx")])
    assert open_checkpoint(four_bits).linear_weight(open_checkpoint(four_bits).spec.linears[0]).shape == (64, 64)
    config = json.loads((four_bits / "config.json").read_text())["quantization_config"]
    edit_json(four_bits / "config.json", quantization_config=config | {"desc_act": True})
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.up_proj.g_idx is in no shard"):
        open_checkpoint(four_bits)


def test_a_config_that_is_wrong_about_what_is_quantized(four_bits: Path, edit_json: Edit, random_model: Make) -> None:
    """Not a shard is missing."""
    config = json.loads((four_bits / "config.json").read_text())["quantization_config"]
    edit_json(four_bits / "config.json", quantization_config=config | {"dynamic": {"-:.*mlp.*": {}}})
    linear = "model.layers.0.mlp.gate_proj"
    with pytest.raises(CheckpointError, match=rf"{linear}.weight and 8 more is in no shard") as caught:
        open_checkpoint(four_bits)
    assert caught.value.hint.startswith(f"{linear}.qweight is there: quantization_config is wrong about which")
    edit_json(four_bits / "config.json", quantization_config=config)
    whole = all_tensors(random_model("whole"))[linear + ".weight"]

    def unpacked(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(linear)]:
            del tensors[name]
        tensors[linear + ".weight"] = whole

    rewrite(four_bits, unpacked)
    with pytest.raises(CheckpointError, match=rf"{linear}\.\w+ and \d more is in no shard") as caught:
        open_checkpoint(four_bits)
    assert caught.value.hint.startswith(f"{linear}.weight is there: quantization_config is wrong about which")


@pytest.mark.parametrize("beside", [True, False])
def test_quantized_tensors_that_config_json_does_not_describe(beside: bool, four_bits: Path, edit_json: Edit) -> None:
    """Older tools wrote quantize_config.json alone."""
    edit_json(four_bits / "config.json", quantization_config=None)
    if not beside:
        (four_bits / "quantize_config.json").unlink()
    for opener in (open_source, open_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            opener(four_bits)
        assert "is a quantized tensor, but config.json has no quantization_config" in caught.value.message
        assert caught.value.hint.startswith("quantize_config.json says how" if beside else "take config.json from")


# ---------------------------------------------------------------------- what is no model, or not of this kind


def test_an_adapter_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    for words in (["inspect"], ["vram"], ["quantize", "-o", str(tmp_path / "out")]):
        done = run(words[0], tmp_path, *words[1:])
        assert done.exit_code == 1 and f"error: {tmp_path}: a PEFT adapter, not a model" in done.stderr
        assert "hint: merge it into its base model" in done.stderr


def test_what_lies_beside_the_weights_and_is_not_read(random_model: Make, edit_json: Edit, tmp_path: Path) -> None:
    """Other loaders take the shards of an index that was left there, or the adapter too: the card tells of them."""
    model = random_model()
    assert open_checkpoint(model).notes == ()
    save_file(all_tensors(model), model / "model.safetensors")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    edit_json(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    told = open_checkpoint(model)
    assert {location.file.name for location in told.tensors.values()} == {"model.safetensors"}
    first = ["model.safetensors", "adapter_config.json", "config.json"]
    assert [note.partition(" ")[0] for note in told.notes] == first
    assert "not the files of model.safetensors.index.json" in told.notes[0]
    assert "which is not run: a plain qwen2 is read" in told.notes[2]
    out = quantize(small_job(model, tmp_path / "out")).out
    assert set(told.notes) <= set(json.loads((out / "qwenq-manifest.json").read_text())["warnings"])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_that_a_wrapper_saved_are_recognized(prefix: str, random_model: Make) -> None:
    path = rewrite(random_model(), lambda t: [t.__setitem__(prefix + name, t.pop(name)) for name in list(t)])
    with pytest.raises(CheckpointError, match="is in no shard") as caught:
        open_source(path)
    assert caught.value.hint.startswith(f"the tensors are there under {prefix}..., as a wrapper")


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_names_of_wrapped_layers_are_recognized(wrapper: str, random_model: Make) -> None:
    """Layers compiled or checkpointed one by one."""

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers." in name]:
            parts = name.split(".")
            tensors[".".join(parts[:3]) + f".{wrapper}" + ".".join(parts[3:])] = tensors.pop(name)

    with pytest.raises(CheckpointError, match="is in no shard") as caught:
        open_source(rewrite(random_model(), wrap))
    assert caught.value.hint.startswith("the tensors are there under model.layers.")
    assert f".{wrapper}..., as a wrapper" in caught.value.hint


def test_an_adapter_that_was_not_merged_is_recognized(random_model: Make) -> None:
    def wrap(t: dict[str, torch.Tensor]) -> None:
        for name in [name for name in t if name.endswith("q_proj.weight")]:
            t[name.replace(".weight", ".base_layer.weight")] = t.pop(name)

    with pytest.raises(CheckpointError, match="is in no shard") as caught:
        open_source(rewrite(random_model(), wrap))
    assert "of a PEFT adapter: merge it into its base model" in caught.value.hint


def test_mlx_is_named(random_model: Make, edit_json: Edit) -> None:
    """It writes `quantization` beside, in newer versions, a `quantization_config` without a method."""
    path = random_model()
    rewrite(path, lambda t: t.update({"model.layers.0.mlp.up_proj.scales": torch.zeros(96, 1)}))
    found = {"group_size": 64, "bits": 4}
    for more in ({}, {"quantization_config": found}):
        edit_json(path / "config.json", quantization=found, **more)
        for opener in (open_source, open_checkpoint):
            with pytest.raises(UnreadScheme, match=r"quantized by MLX \(4 bits\)"):
                opener(path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_pointer_of_git_lfs_is_called_one(file: str, model: Path) -> None:
    (model / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 11\n")
    done = run("run", model, "-p", "hi", "--max-model-len", "64")
    assert done.exit_code == 1 and f"{file}: a git-lfs pointer, not the file" in done.stderr
    assert "hint: run `git lfs pull`" in done.stderr


@pytest.mark.parametrize(("kind", "said"), [("qwen3", False), ("qwen2", False), ("qwen2", True)])
def test_layers_that_attend_otherwise_are_refused(
    kind: str, said: bool, random_model: Make, edit_json: Edit
) -> None:
    """transformers takes `layer_types` at its word: it raises without a window, and has another function with one."""
    path = random_model("m", kind, **({"head_dim": 16} if kind == "qwen3" else {}))
    types = ["full_attention", "sliding_attention", "full_attention"]
    edit_json(path / "config.json", layer_types=types, sliding_window=8, use_sliding_window=said)
    with pytest.raises(CheckpointError, match="layer_types has 'sliding_attention', wanted only full_attention"):
        open_checkpoint(path)
    edit_json(path / "config.json", layer_types=["full_attention"] * 3, sliding_window=None, use_sliding_window=False)
    assert open_checkpoint(path).spec.num_hidden_layers == 3
