import pytest
import torch

from qwenq.model.spec import spec_from_config
from qwenq.solver.equalize import LIMIT, FoldedLayer, channel_scales

CONFIG = {
    "model_type": "qwen2", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 32,
}  # fmt: skip
SPEC = spec_from_config(CONFIG)


def random_state(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    state = {
        t.name.removeprefix("model.layers.0."): torch.randn(t.shape, generator=generator) * 0.3
        for t in SPEC.layer_tensors(0)
    }
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        state[norm] = torch.rand(48, generator=generator) * 4 + 0.1
        state[norm][::5] *= 20  # outlier channels
    return {name: tensor.to(dtype) for name, tensor in state.items()}


STAGES = ("down", "qkv", "gate_up")


def fold(state, moments, stages=STAGES, dtype=None):
    """All tensors of the layer after folding, weights in float32."""
    kept = {n: t if dtype is None else t.to(dtype) for n, t in state.items() if "proj.weight" not in n}
    layer = FoldedLayer(state, kept)
    for name in stages:
        stage = SPEC.architecture.stage(name)
        scales_I = layer.fold(stage, moments[name])
        if stage.folds_into == stage.norm:
            ratio_I = state[f"{stage.norm}.weight"].float() / layer.kept[f"{stage.norm}.weight"].float()
            torch.testing.assert_close(scales_I, ratio_I.nan_to_num(1.0))  # what its inputs are divided by
    weights = {n: layer.weight(n.removesuffix(".weight")) for n in state if "proj.weight" in n}
    return weights | layer.kept


def run_layer(state, h_TH):
    """One Qwen2 layer without rotary embedding; also the inputs of each stage."""
    s = {name: tensor.double() for name, tensor in state.items()}
    tokens, d = h_TH.shape[0], SPEC.head_dim

    def norm(h, weight):
        return h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    def linear(path, x):
        return x @ s[f"{path}.weight"].T + s.get(f"{path}.bias", torch.zeros(()).double())

    x = norm(h_TH.double(), s["input_layernorm.weight"])
    q = linear("self_attn.q_proj", x).view(tokens, 6, d)
    k, v = (linear(f"self_attn.{p}_proj", x).view(tokens, 2, d).repeat_interleave(3, dim=1) for p in "kv")
    scores = torch.einsum("thd,shd->hts", q, k) / d**0.5
    scores += torch.full((tokens, tokens), -1e9).triu(1)
    a = torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(tokens, -1)
    h = h_TH + linear("self_attn.o_proj", a)
    y = norm(h, s["post_attention_layernorm.weight"])
    m = torch.nn.functional.silu(linear("mlp.gate_proj", y)) * linear("mlp.up_proj", y)
    inputs = {"qkv": x, "o": a, "gate_up": y, "down": m}
    return h + linear("mlp.down_proj", m), {stage: t.square().mean(0) for stage, t in inputs.items()}


@pytest.mark.parametrize("stages", [STAGES, ("qkv",), ("down",), ("down", "gate_up")])
def test_the_function_stays(stages):
    h_TH = torch.randn(20, 48, generator=torch.Generator().manual_seed(1))
    state = random_state()
    before, moments = run_layer(state, h_TH)
    after, _ = run_layer(fold(state, moments, stages), h_TH)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_what_changes():
    state = random_state(torch.bfloat16)
    _, moments = run_layer(state, torch.randn(20, 48))

    def changed(stages):
        new = fold(state, moments, stages)
        return {name for name in state if not torch.equal(new[name].float(), state[name].float())}

    assert changed(["qkv"]) == {f"self_attn.{p}_proj.weight" for p in "qkv"} | {"input_layernorm.weight"}
    assert changed(["down"]) == {"mlp.up_proj.weight", "mlp.down_proj.weight"}
    untouched = {f"self_attn.{p}_proj.bias" for p in "qkv"} | {"self_attn.o_proj.weight"}
    assert set(state) - changed(STAGES) == untouched
    new = fold(state, moments, dtype=torch.float16)
    for name, tensor in new.items():
        wanted = torch.float32 if "proj.weight" in name else torch.float16
        assert tensor.dtype == wanted and tensor.shape == state[name].shape, name


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_rounding_of_a_stored_norm_is_made_good(dtype):
    """In bfloat16 a scaled norm moves by up to 0.4 %; the product with the weights behind it does not."""
    state = random_state(torch.bfloat16)
    _, moments = run_layer(state, torch.randn(20, 48))
    new = fold(state, moments, ["qkv", "gate_up"], dtype)
    for norm, path in (("input_layernorm", "self_attn.k_proj"), ("post_attention_layernorm", "mlp.up_proj")):
        before = state[f"{norm}.weight"].float() * state[f"{path}.weight"].float()
        after = new[f"{norm}.weight"].float() * new[f"{path}.weight"]
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-8)


def test_zero_norm_channels_stay():
    state = random_state(torch.float16)
    state["input_layernorm.weight"][3] = 0
    _, moments = run_layer(state, torch.randn(20, 48))
    new = fold(state, moments, ["qkv"])
    assert new["input_layernorm.weight"][3] == 0
    assert all(t.isfinite().all() for t in new.values())
    assert torch.equal(new["self_attn.q_proj.weight"][:, 3], state["self_attn.q_proj.weight"][:, 3].float())


def test_up_bias_is_scaled():
    state = random_state() | {"mlp.up_proj.bias": torch.randn(64)}
    h_TH = torch.randn(20, 48)
    before, moments = run_layer(state, h_TH)
    new = fold(state, moments, ["down"])
    assert not torch.equal(new["mlp.up_proj.bias"], state["mlp.up_proj.bias"])
    after, _ = run_layer(new, h_TH)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_scales_by_hand():
    """moment**(1/16) / power**(1/4), over the geometric mean."""
    scales = channel_scales(torch.tensor([1.0, 1.0, 16.0, 16.0]), torch.tensor([1.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(scales, torch.tensor([2.0, 2, 1, 1]) / 2**0.5)
    scales = channel_scales(torch.ones(2), torch.tensor([2.0**16, 1.0]))
    torch.testing.assert_close(scales, torch.tensor([2.0, 1]) / 2**0.5)


def test_scales_stay_within_bounds():
    moment = torch.tensor([1e12, 1.0, 0.0, 1.0])
    scales = channel_scales(torch.tensor([1e-9, 1.0, 0.0, 1e9]), moment)
    assert scales.isfinite().all()
    assert (scales <= LIMIT).all() and (scales >= 1 / LIMIT).all()
    assert channel_scales(torch.zeros(3), torch.zeros(3)).isfinite().all()
