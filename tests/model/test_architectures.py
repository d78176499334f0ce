"""Architectures are entries of a table: Mistral and Qwen3 as they stand, Phi-3 and one that nobody has added here."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import answer, small_job
from safetensors.torch import save_file
from test_stream import full_logits, some_ids, streamed_logits
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding

from qwenq.checkpoint.manifest import read_manifest
from qwenq.checkpoint.reader import open_checkpoint, open_source
from qwenq.errors import CheckpointError
from qwenq.formats.base import Recipe, Scheme
from qwenq.model.architectures import ARCHITECTURES, Architecture, Linear, SlidingWindow, Stage
from qwenq.model.layer import Network, model_config
from qwenq.model.spec import spec_from_config
from qwenq.pipeline.quantize import quantize
from qwenq.pipeline.reproduce import reproduce

Make = Callable[..., Path]
SHAPES = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "pad_token_id": 0,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip


def checked(source: Path, out: Path, recipe: Recipe) -> None:
    """Quantized; better than rounded; every layer made again has the same bytes."""
    job = small_job(source, out, recipe=recipe)
    kl = quantize(job).drift.kl.mean
    rtn = small_job(source, out.with_name("rtn"), recipe=recipe, calibration=None, method="rtn")
    rounded = quantize(rtn).drift.kl.mean
    assert 0 < kl < rounded
    assert reproduce(rtn.out, source, read_manifest(rtn.out)[0], range(2))[1] == []
    written = open_checkpoint(out)
    assert written.recipe == recipe and written.spec == replace(job.source.spec, name=written.spec.name)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("mistral", {"sliding_window": 256}), ("qwen3", {"head_dim": 32, "attention_bias": True}), ("llama", {})],
)
def test_entries_alone_are_enough(model_type: str, config: dict[str, Any], random_model: Make, tmp_path: Path) -> None:
    overrides = ("model.layers.0.mlp.down_proj", None), ("model.layers.1.mlp.up_proj", Scheme(8, 32))
    mixed = Recipe(Scheme(4, 32), overrides)
    checked(random_model("model", model_type, **config), tmp_path / "out", mixed)


def test_a_window_that_slides_is_refused_by_name(random_model: Make, edit_json: Callable[..., Any]) -> None:
    path = random_model("model", "mistral", sliding_window=64)
    with pytest.raises(CheckpointError, match="sliding_window with a window of 64 tokens is not supported"):
        open_source(path)
    edit_json(path / "config.json", sliding_window=None)  # the key is missing: transformers takes 4,096
    open_source(path)
    edit_json(path / "config.json", max_position_embeddings=8192)
    with pytest.raises(CheckpointError, match="a window of 4096 tokens is not supported, the model reads 8192"):
        open_source(path)
    config = json.loads((path / "config.json").read_text()) | {"sliding_window": None}
    (path / "config.json").write_text(json.dumps(config))
    assert open_source(path).spec.extended_context == 8192


# ---------------------------------------------------------------------- settings that no entry says


@pytest.mark.parametrize(
    ("model_type", "classes", "settings", "said"),
    [
        ("granite", "Granite", {"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0, wanted 1"),
        ("granite", "Granite", {"residual_multiplier": 0.22}, "residual_multiplier is 0.22, wanted 1"),
        ("granite", "Granite", {"logits_scaling": 8.0}, "logits_scaling is 8.0, wanted 1"),
        ("cohere", "Cohere", {}, "logit_scale is 0.0625, wanted 1"),
        ("gemma2", "Gemma2", {}, "final_logit_softcapping is 30.0, wanted null"),
        ("gemma2", "Gemma2", {"final_logit_softcapping": None}, "attn_logit_softcapping is 50.0, wanted null"),
        ("smollm3", "SmolLM3", {}, r"no_rope_layers is \[1, 1, 1, 0\], wanted 1"),
    ],
)
def test_settings_that_no_entry_says_are_refused(
    model_type: str, classes: str, settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By config.json or by transformers' own default, as in the last four."""
    monkeypatch.setitem(
        ARCHITECTURES, model_type, replace(ARCHITECTURES["llama"], model_type=model_type, classes=classes)
    )
    with pytest.raises(CheckpointError, match=f"config.json: {said}: the entry of {model_type} cannot express it"):
        model_config(SHAPES | settings, spec_from_config(SHAPES | {"model_type": model_type}))


def test_neutral_settings_and_those_of_other_families_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for model_type, classes, settings in (
        ("granite", "Granite", {"embedding_multiplier": 1.0, "logits_scaling": 1}),
        ("smollm3", "SmolLM3", {"no_rope_layers": [1, 1, 1, 1]}),
        ("llama", "Llama", {"embedding_multiplier": 12.0}),  # transformers' Llama does not read it
    ):
        entry = replace(ARCHITECTURES["llama"], model_type=model_type, classes=classes)
        monkeypatch.setitem(ARCHITECTURES, model_type, entry)
        model_config(SHAPES | settings, spec_from_config(SHAPES | {"model_type": model_type}))


def test_norms_that_add_one_to_their_weight_are_refused(random_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's: scales folded into the weight would be another function."""
    entry = replace(ARCHITECTURES["llama"], model_type="gemma", classes="Gemma")
    monkeypatch.setitem(ARCHITECTURES, "gemma", entry)
    opened = open_source(random_model("model", "gemma", head_dim=16, pad_token_id=0, tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match="GemmaRMSNorm does not multiply by its weight alone: the entry of gemma"):
        Network(opened.config, opened.spec, dtype=torch.float32)


def test_a_family_without_such_norms_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(ARCHITECTURES["llama"], model_type="starcoder2", classes="Starcoder2")
    monkeypatch.setitem(ARCHITECTURES, "starcoder2", entry)
    with pytest.raises(CheckpointError, match=r"transformers cannot build a layer from it .*Starcoder2RMSNorm"):
        Network(SHAPES, spec_from_config(SHAPES | {"model_type": "starcoder2"}), dtype=torch.float32)


# ---------------------------------------------------------------------- merged projections, as Phi-3 has them

PHI3 = Architecture(
    "phi3",
    "Phi3",
    (
        Stage("qkv", (Linear("self_attn.qkv_proj", ("q_size", "kv_size", "kv_size")),), "hidden_size",
              "input_layernorm", folds_into="input_layernorm"),
        Stage("o", (Linear("self_attn.o_proj", ("hidden_size",)),), "q_size", adds=True, cut="row"),
        Stage("gate_up", (Linear("mlp.gate_up_proj", ("intermediate_size", "intermediate_size")),), "hidden_size",
              "post_attention_layernorm", folds_into="post_attention_layernorm"),
        Stage("down", (Linear("mlp.down_proj", ("hidden_size",)),), "intermediate_size", adds=True, cut="row"),
    ),
    window=SlidingWindow(switch="", default=None),
)  # fmt: skip


def test_merged_projections(
    random_model: Make, tmp_path: Path, calib: Path, heldout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "phi3", PHI3)
    path, ids = random_model("model", "phi3", pad_token_id=0), some_ids(2, 100)
    streamed = streamed_logits(open_checkpoint(path), ids)
    torch.testing.assert_close(streamed, full_logits(path, ids), rtol=1e-5, atol=1e-5)
    checked(path, tmp_path / "out", Recipe(Scheme(4, 32)))
    text = ["--calibration", calib, "--eval-text", heldout, "-n", 8, "--sequence-length", 64, "--eval-samples", 2]
    budget = ["quantize", path, "-o", tmp_path / "mixed", "--bpw", "6", *text]
    predicted = answer(*budget, "--dry-run")
    assert list(predicted["schemes"]) == ["qkv", "o", "gate_up", "down"]
    made = answer(*budget)
    assert made["bits_per_linear_weight"] <= 6
    recipe = (tmp_path / "mixed" / "qwenq-recipe.toml").read_text()
    assert "# A qwenq recipe: the scheme of each fused group.\n" in recipe
    assert answer("vram", tmp_path / "mixed", "-c", 64, "--gpu", "RTX 3090")["weights"]["bytes"] == made["tensor_bytes"]


# ---------------------------------------------------------------------- another prefix, more stages


class MadeUpConfig(LlamaConfig):
    model_type = "madeup"


class MadeUpFfn(nn.Module):
    """Three linears one after the other."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.one = nn.Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.two = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.three = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.three(torch.tanh(self.two(self.one(x))))
        return out


class MadeUpMixer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.mix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mix(x)
        return out


class MadeUpDecoderLayer(nn.Module):
    """A mixer that is one linear behind a norm, then attention, then the network above."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.norm_0, self.norm_1, self.norm_2 = (LlamaRMSNorm(config.hidden_size) for _ in range(3))
        self.mixer, self.attn, self.ffn = MadeUpMixer(config), LlamaAttention(config, layer_idx), MadeUpFfn(config)

    def forward(self, h: torch.Tensor, attention_mask: None, position_embeddings: Any) -> torch.Tensor:
        h = h + self.mixer(self.norm_0(h))
        h = h + self.attn(self.norm_1(h), attention_mask=None, position_embeddings=position_embeddings)[0]
        out: torch.Tensor = h + self.ffn(self.norm_2(h))
        return out


MADE_UP = Architecture(
    "madeup",
    "MadeUp",
    (
        Stage("mix", (Linear("mixer.mix", ("hidden_size",)),), "hidden_size", "norm_0", adds=True, cut="row"),
        Stage("qkv", (Linear("attn.q_proj", ("q_size",)), Linear("attn.k_proj", ("kv_size",)),
                      Linear("attn.v_proj", ("kv_size",))), "hidden_size", "norm_1", folds_into="norm_1"),
        Stage("o", (Linear("attn.o_proj", ("hidden_size",)),), "q_size", adds=True, cut="row"),
        Stage("one", (Linear("ffn.one", ("intermediate_size",), bias=True),), "hidden_size", "norm_2",
              folds_into="norm_2"),
        Stage("two", (Linear("ffn.two", ("hidden_size",)),), "intermediate_size", folds_into="ffn.one"),
        Stage("three", (Linear("ffn.three", ("hidden_size",)),), "hidden_size", adds=True, cut="row"),
    ),
    package="made_up",
    attention="attn",
    layers="decoder.blocks",
    embedding="decoder.wte",
    norm="decoder.ln_f",
    head="output",
)  # fmt: skip


@pytest.fixture
def made_up(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random checkpoint of an architecture that nobody has."""
    monkeypatch.setitem(ARCHITECTURES, "madeup", MADE_UP)
    for name in ("configuration_madeup", "modeling_madeup"):
        module = ModuleType(f"made_up.{name}")
        for member in (MadeUpConfig, MadeUpDecoderLayer):
            setattr(module, member.__name__, member)
        module.__dict__.update(MadeUpRMSNorm=LlamaRMSNorm, MadeUpRotaryEmbedding=LlamaRotaryEmbedding)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "made_up", ModuleType("made_up"))
    config = {
        "model_type": "madeup", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    path = tmp_path / "made-up"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for t in spec_from_config(config).tensors():
        noise = torch.randn(t.shape, generator=generator)
        tensors[t.name] = noise * t.shape[1] ** -0.5 if len(t.shape) == 2 else 1 + 0.1 * noise
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / file, path / file)
    return path


def test_another_prefix_and_more_stages(made_up: Path, tmp_path: Path, calib: Path, heldout: Path) -> None:
    checkpoint = open_source(made_up)
    network = Network(checkpoint.config, checkpoint.spec, dtype=torch.float32)
    network.fill(checkpoint.finite_layer_state(1))
    h = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(2))
    staged = h
    for stage in MADE_UP.stages:
        if stage.adds:
            staged = network.add(stage, staged, network.within(stage, network.normed(stage, staged)))
    assert torch.equal(network.forward(h), staged)
    checked(made_up, tmp_path / "out", Recipe(Scheme(4, 32), (("decoder.blocks.0.ffn.three", Scheme(8, 32)),)))
    text = ["--calibration", calib, "--eval-text", heldout, "-n", 8, "--sequence-length", 64, "--eval-samples", 2]
    table = tmp_path / "s.json"
    answer("sensitivity", made_up, "-o", table, *text[:2], *text[4:8])
    made = answer("quantize", made_up, "-o", tmp_path / "mixed", "--bpw", 6, "--sensitivity", table, *text)
    assert {row["name"].split(".")[-1] for row in made["layers"][0]["linears"]} <= {
        "mix", "q_proj", "k_proj", "v_proj", "o_proj", "one", "two", "three"
    }  # fmt: skip
    answer("verify", tmp_path / "mixed", "--source", made_up, "--layers", "none")
    answer("convert", tmp_path / "out", tmp_path / "ct", "--format", "compressed-tensors")
    planned = answer("vram", tmp_path / "mixed", "-c", 64, "--gpu", "RTX 3090")
    assert planned["weights"]["bytes"] == made["tensor_bytes"]


def test_folding_leaves_the_function_of_a_made_up_layer(made_up: Path, tmp_path: Path) -> None:
    """In 8 bits nearly nothing is lost, whatever is folded: scales went where they belong."""
    kl, norms = [], []
    for fold in (False, True):
        recipe = Recipe(Scheme(8, 32))
        job = small_job(made_up, tmp_path / str(fold), recipe=recipe, fold=fold, error_correction=0.0)
        kl.append(quantize(job).drift.kl.mean)
        written = open_checkpoint(job.out)
        norms.append([written.read(f"decoder.blocks.0.{name}") for name in ("norm_1.weight", "ffn.one.bias")])
    assert kl[1] < 1.5 * kl[0] < 1e-4
    assert not any(torch.equal(plain, folded) for plain, folded in zip(*norms, strict=True)), "and they did go there"


# ---------------------------------------------------------------------- entries that cannot be


def linear(path: str, *outputs: str) -> tuple[Linear, ...]:
    return (Linear(path, outputs or ("hidden_size",)),)


FIRST = Stage("a", linear("m.a"), "hidden_size", "n")


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([Stage("a", linear("m.a"), "hidden_size", adds=True)], "a block begins with a norm"),
        ([FIRST], "its last stage does not add"),
        ([FIRST, Stage("b", linear("k.b"), "hidden_size", adds=True)], "the linears of a block are in one module"),
        ([replace(FIRST, linears=linear("m.a") + linear("m.b"), adds=True)], "one linear of hidden_size"),
        ([replace(FIRST, adds=True, cut="rows")], "cut is 'rows', wanted column or row"),
        ([replace(FIRST, adds=True, folds_into="n")], "scales fold into the norm before"),
        ([FIRST, Stage("b", linear("m.b"), "q_size", adds=True, folds_into="m.a")], "of as many outputs"),
    ],
)
def test_stages_that_cannot_run_are_refused(stages: list[Stage], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Architecture("odd", "Odd", tuple(stages))
