"""The streamed network against transformers' whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenq.checkpoint.reader import Checkpoint, open_checkpoint
from qwenq.model.layer import Network

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 untied": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama with attention and mlp biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window of all it reads": ("mistral", {"sliding_window": 256, "num_key_value_heads": 4}),
}


def streamed_logits(checkpoint: Checkpoint, ids_BT: torch.Tensor) -> torch.Tensor:
    network = Network(checkpoint.config, checkpoint.spec, dtype=torch.float32)
    h = checkpoint.read("model.embed_tokens.weight")[ids_BT.reshape(-1)].float().view(*ids_BT.shape, -1)
    for layer in range(checkpoint.spec.num_hidden_layers):
        network.fill(checkpoint.layer_state(layer))
        h = network.forward(h)
    head = checkpoint.read(checkpoint.spec.head_tensor).float()
    return network.final_norm(h, checkpoint.read("model.norm.weight")) @ head.T


def full_logits(path: Path, ids_BT: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(ids_BT).logits


def some_ids(windows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 1024, (windows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", MODELS)
def test_layers_chained_give_the_whole_models_logits(kind: str, random_model: Callable[..., Path]) -> None:
    model_type, config = MODELS[kind]
    path = random_model("model", model_type, **config)
    ids = some_ids(2, 100)
    got, wanted = streamed_logits(open_checkpoint(path), ids), full_logits(path, ids)
    assert wanted.abs().max() > 1
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_trained_model_too(tiny: Path) -> None:
    ids = some_ids(1, 64)
    got = streamed_logits(open_checkpoint(tiny), ids)
    torch.testing.assert_close(got, full_logits(tiny, ids), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["qwen2 untied", "qwen3", "llama"])
def test_float32_states_between_bfloat16_blocks_blur_less(kind: str, random_model: Callable[..., Path]) -> None:
    model_type, config = MODELS[kind]
    checkpoint = open_checkpoint(random_model("model", model_type, num_hidden_layers=6, **config))
    ids_BT, distance = some_ids(4, 64), {}
    embedded = checkpoint.read("model.embed_tokens.weight")[ids_BT.reshape(-1)].view(*ids_BT.shape, -1).float()

    def states(compute: torch.dtype, between: torch.dtype) -> torch.Tensor:
        network, h = Network(checkpoint.config, checkpoint.spec, dtype=compute), embedded.to(between)
        for layer in range(checkpoint.spec.num_hidden_layers):
            network.fill(checkpoint.layer_state(layer))
            h = network.forward(h)
            assert h.dtype == between
        return h.float()

    exact = states(torch.float32, torch.float32)
    for between in (torch.bfloat16, torch.float32):
        distance[between] = float((states(torch.bfloat16, between) - exact).norm() / exact.norm())
    assert 0 < distance[torch.float32] < 0.9 * distance[torch.bfloat16] < 0.05


def test_yarn_as_model_cards_write_it(random_model: Callable[..., Path], edit_json: Callable[..., Any]) -> None:
    """`rope_scaling` beside `rope_theta`, as Qwen2.5's cards say; and it makes a difference, so it was read."""
    path = random_model()
    ids = some_ids(1, 100)
    plain = streamed_logits(open_checkpoint(path), ids)
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    edit_json(path / "config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling)
    stretched = streamed_logits(open_checkpoint(path), ids)
    assert (plain - stretched).abs().max() > 0.1
    torch.testing.assert_close(stretched, full_logits(path, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen2 untied", "qwen3", "llama with attention and mlp biases", "mistral"])
def test_stage_by_stage_is_the_whole_layer_bit_for_bit(
    kind: str, dtype: torch.dtype, random_model: Callable[..., Path]
) -> None:
    """Resuming rests on it: layers are solved stage by stage and replayed whole."""
    model_type, config = MODELS[kind]
    checkpoint = open_checkpoint(random_model("model", model_type, **config))
    network = Network(checkpoint.config, checkpoint.spec, dtype=dtype)
    network.fill(checkpoint.layer_state(1))
    h = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    whole = network.forward(h)
    staged = h
    for stage in checkpoint.spec.architecture.stages:
        assert torch.equal(network.entering(stage, h), network.within(stage, network.normed(stage, staged)))
        if stage.adds:
            staged = network.add(stage, staged, network.within(stage, network.normed(stage, staged)))
    assert torch.equal(whole, staged)
    assert torch.equal(network.forward(h), whole)  # nothing stops it any more


def test_attention_sees_no_later_token(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    ids = some_ids(1, 32)
    changed = ids.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 1024
    a, b = streamed_logits(checkpoint, ids), streamed_logits(checkpoint, changed)
    torch.testing.assert_close(a[:, :20], b[:, :20], rtol=0, atol=1e-5)
    assert (a[:, 20:] - b[:, 20:]).abs().max() > 0.1


def test_parameters_live_on_meta_but_for_the_filled_layer(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    network = Network(checkpoint.config, checkpoint.spec, dtype=torch.bfloat16)

    def devices() -> set[str]:
        return {p.device.type for p in network._layer.parameters()}

    assert devices() == {"meta"}
    network.fill(checkpoint.layer_state(0))
    assert devices() == {"cpu"} and network.weight("mlp.down_proj").dtype == torch.bfloat16
    network.set_parameter("mlp.down_proj.weight", torch.zeros(128, 384))
    assert not network.weight("mlp.down_proj").any()
    network.release()
    assert devices() == {"meta"}


def test_a_missing_or_foreign_parameter_is_refused(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    network = Network(checkpoint.config, checkpoint.spec, dtype=torch.float32)
    state = checkpoint.layer_state(0)
    bias = state.pop("self_attn.q_proj.bias")
    with pytest.raises(RuntimeError, match=r"Missing key.*q_proj\.bias"):
        network.fill(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*o_proj\.bias"):
        network.fill(state | {"self_attn.q_proj.bias": bias, "self_attn.o_proj.bias": bias})


def test_saved_configs_say_what_these_tests_mean(random_model: Callable[..., Path]) -> None:
    config = json.loads((random_model("model", "qwen2", rope_parameters=YARN) / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn"
    spec = open_checkpoint(random_model("other", "llama", attention_bias=True)).spec
    biased = {lin.kind for lin in spec.layer_linears(0) if lin.bias}
    assert biased == {"q_proj", "k_proj", "v_proj", "o_proj"}
