"""The loaded model: its logits against eval's dequantized layers and transformers', its placement, its memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import small_job
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwenq.checkpoint.reader import Checkpoint, open_checkpoint
from qwenq.errors import CheckpointError, RunError, UsageError
from qwenq.formats.base import Recipe, Scheme
from qwenq.formats.bitsandbytes import INT8_ROWS, NF4
from qwenq.model.layer import model_config
from qwenq.pipeline import monitor
from qwenq.pipeline.quantize import quantize
from qwenq.planning.case import Case
from qwenq.planning.engines.torch import OWN
from qwenq.planning.placement import host_map, spill_to_disk
from qwenq.planning.weights import header_weights
from qwenq.runtime import cpu_kernels, load
from qwenq.runtime.cache import FP8, KvCache
from qwenq.runtime.generate import Sampling, Session, Timing, next_token
from qwenq.runtime.load import LoadOptions, loaded, plan_load
from qwenq.runtime.model import CheckpointWeights, RunningModel, build_model

Make = Callable[..., Path]
BF16 = torch.bfloat16
IDS = torch.randint(0, 1000, (1, 70), generator=torch.Generator().manual_seed(5))


def build(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, **options: Any) -> RunningModel:
    where = options.pop("device_map", host_map(checkpoint.spec))
    return build_model(
        CheckpointWeights(checkpoint), checkpoint.config, checkpoint.spec, where, dtype=dtype, **options
    )


@torch.inference_mode()
def logits(model: RunningModel, pieces: tuple[int, ...] = (70,), kv: torch.dtype | None = None) -> Tensor:
    """All logits [70, vocabulary], the prompt computed in pieces."""
    spec = model.spec
    layers = [torch.device("cpu")] * spec.num_hidden_layers
    cache = KvCache(layers, 70, spec.num_key_value_heads, spec.head_dim, kv or model.dtype)
    parts = [model.network(part, past_key_values=cache).logits[0].float() for part in IDS.split(list(pieces), 1)]
    return torch.cat(parts)


@torch.inference_mode()
def reference(checkpoint: Checkpoint) -> Tensor:
    """transformers' own model filled with the float32 weights that `eval` computes with."""
    import transformers

    name = checkpoint.spec.architecture.classes
    model = getattr(transformers, name + "ForCausalLM")(model_config(checkpoint.config, checkpoint.spec))
    outer = {n: checkpoint.read(n).float() for n in ("model.embed_tokens.weight", "model.norm.weight")}
    state = outer | {"lm_head.weight": checkpoint.read(checkpoint.spec.head_tensor).float()}
    for layer in range(checkpoint.spec.num_hidden_layers):
        parts = checkpoint.layer_state(layer).items()
        state |= {f"model.layers.{layer}.{key}": value.float() for key, value in parts}
    model.load_state_dict(state)
    return model.float().eval()(IDS).logits[0]


def close(found: Tensor, wanted: Tensor, limit: float) -> bool:
    return float((found - wanted).norm() / wanted.norm()) < limit


def quantized(source: Path, out: Path, recipe: Recipe, **changes: Any) -> Checkpoint:

    quantize(small_job(source, out, recipe=recipe, calibration=None, method="rtn", **changes))
    return open_checkpoint(out)


MIXED = Recipe(
    Scheme(4, 32),
    (
        *((f"model.layers.0.self_attn.{p}_proj", Scheme(8, 32)) for p in "qkv"),
        ("model.layers.1.mlp.down_proj", None),
        ("model.layers.2.mlp.down_proj", Scheme(8, 32)),
    ),
)


@pytest.mark.parametrize(
    "recipe",
    [
        *(Recipe(Scheme(bits, group)) for bits in (4, 8) for group in (32, 64, 128, -1)),
        Recipe(Scheme(4, 32, sym=False)),
        MIXED,
    ],
    ids=lambda recipe: "mixed" if recipe.overrides else recipe.default.label,
)
def test_logits_are_those_of_the_dequantized_weights(recipe: Recipe, random_model: Make, tmp_path: Path) -> None:
    source = random_model(hidden_size=128, intermediate_size=256)
    checkpoint = quantized(source, tmp_path / "out", recipe)
    wanted = reference(checkpoint)
    assert close(logits(build(checkpoint)), wanted, 1e-5)
    packed = build(checkpoint, BF16)
    assert sum(packed.kernels().values()) == 21 - ("mixed" in str(recipe) or recipe is MIXED)
    assert not packed.fallbacks()
    assert close(logits(packed), wanted, 0.03)


@pytest.mark.parametrize(
    ("recipe", "kernel"),
    [
        (Recipe(Scheme(4, 32, sym=False), format="awq"), "cpu"),
        (Recipe(Scheme(4, 64), MIXED.overrides[-2:], "compressed-tensors"), "cpu"),
        (Recipe(Scheme(8, 64), format="compressed-tensors"), "cpu"),
        (Recipe(NF4, (), "bnb-nf4"), "nf4"),
        (Recipe(INT8_ROWS, (), "bnb-int8"), "cpu"),
    ],
    ids=lambda value: value.format if isinstance(value, Recipe) else value,
)
def test_other_formats_stay_packed_too(recipe: Recipe, kernel: str, random_model: Make, tmp_path: Path) -> None:
    source = random_model(hidden_size=128, intermediate_size=256)
    checkpoint = quantized(source, tmp_path / "out", recipe)
    wanted = reference(checkpoint)
    assert close(logits(build(checkpoint)), wanted, 1e-5)
    packed = build(checkpoint, BF16)
    assert packed.kernels()[kernel] >= 19 and bool(packed.fallbacks()) == (kernel == "nf4")
    assert close(logits(packed), wanted, 0.03)
    weights = sum(p.numel() * p.element_size() for p in packed.network.model.layers[0].mlp.up_proj.parameters())
    assert weights < 2 * 128 * 256 * (0.45 if recipe.default.bits == 4 else 0.75)  # against 16 bit


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_sixteen_bit_models_and_chunks(kind: str, tied: bool, random_model: Make) -> None:
    checkpoint = open_checkpoint(random_model(model_type=kind, tie_word_embeddings=tied))
    wanted = reference(checkpoint)
    model = build(checkpoint)
    for pieces in ((70,), (32, 32, 6), (1,) * 70, (69, 1), (1, 68, 1)):
        assert close(logits(model, pieces), wanted, 1e-5), pieces
    assert close(logits(build(checkpoint, BF16)), wanted, 0.03)


def test_act_order_and_version_2(random_model: Make, tmp_path: Path) -> None:
    """Another tool's checkpoint: columns of a group lie anywhere; `eval` reads it by g_idx."""
    out = quantized(random_model(), tmp_path / "out", Recipe(Scheme(4, 32))).directory
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [n for n in tensors if n.endswith(".g_idx")]:
            tensors[name] = tensors[name][torch.randperm(tensors[name].numel())].contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(out)
    wanted = reference(checkpoint)
    assert close(logits(build(checkpoint)), wanted, 1e-5) and close(logits(build(checkpoint, BF16)), wanted, 0.03)
    broken = next(iter(out.glob("*00002*")))
    tensors = load_file(broken)
    name = next(n for n in tensors if n.endswith("q_proj.g_idx"))
    tensors[name][0] = 1 - tensors[name][0]
    save_file(tensors, broken, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj: g_idx makes groups of 31 to 33 columns"):
        build(open_checkpoint(out))


def test_fp8_cache(random_model: Make) -> None:
    model = build(open_checkpoint(random_model()))
    exact, rounded = logits(model, (69, 1)), logits(model, (69, 1), FP8)
    assert close(rounded, exact, 0.1) and not close(rounded, exact, 1e-4)


@pytest.mark.parametrize(("kind", "most"), [(torch.float16, 65504.0), (FP8, 448.0)])
def test_a_narrow_cache_clamps_to_its_range(kind: torch.dtype, most: float) -> None:
    """bfloat16 reaches further than float16: what is beyond would be stored as infinity and come back as NaN."""
    cache = KvCache([torch.device("cpu")], 4, 1, 4, kind)
    new = torch.tensor([1e30, -1e30, 65536.0, 1.5], dtype=torch.bfloat16).view(1, 1, 1, 4)
    keys, values = cache.update(new, new, 0)
    assert cache.stored(0)[0][0, 0, 0].tolist() == [most, -most, most, 1.5]
    assert keys.dtype == torch.bfloat16 and bool(keys.isfinite().all()) and torch.equal(keys, values)


def test_a_cache_too_small_says_so() -> None:
    cache = KvCache([torch.device("cpu")], 4, 2, 8, torch.float32)
    cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    with pytest.raises(ValueError, match="5 tokens in a cache of 4"):
        cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)


# ---------------------------------------------------------------------- placement


def sizes(checkpoint: Checkpoint) -> Any:
    return header_weights(checkpoint.spec, {n: t.spec for n, t in checkpoint.tensors.items()}, checkpoint.config)


def test_disk_and_memory_give_the_same_logits(random_model: Make, tmp_path: Path) -> None:
    """Layers on disk really live there: accelerate fetches them, and lets go of them, at every call."""
    checkpoint = quantized(random_model(), tmp_path / "out", Recipe(Scheme(4, 32)))
    for dtype in (torch.float32, BF16):
        inside = logits(build(checkpoint, dtype))
        where = host_map(checkpoint.spec) | {"model.layers.1": "disk", "model.layers.2": "disk"}
        (tmp_path / str(dtype)).mkdir()
        model = build(checkpoint, dtype, device_map=where, offload_directory=tmp_path / str(dtype))
        assert torch.equal(logits(model, (70,)), inside)
        assert {p.device.type for p in model.network.model.layers[0].parameters()} == {"cpu"}
        for layer in (1, 2):
            assert {p.device.type for p in model.network.model.layers[layer].parameters()} == {"meta"}
        assert model.network.hf_device_map == where
        assert Session(model, 16).decoding == "transformers' modules: layers on disk"


def test_what_goes_to_disk(random_model: Make) -> None:
    checkpoint = open_checkpoint(random_model())
    weights, everything = sizes(checkpoint), host_map(checkpoint.spec)
    one = weights.layer_bytes[0]
    assert spill_to_disk(checkpoint.spec, everything, weights, 3 * one) == everything
    spilled = spill_to_disk(checkpoint.spec, everything, weights, 2 * one)
    assert [k for k, v in spilled.items() if v == "disk"] == ["model.layers.2"]
    on_gpu = everything | {"model.layers.0": 0, "model.layers.1": 1}
    assert spill_to_disk(checkpoint.spec, on_gpu, weights, 0) == on_gpu | {"model.layers.2": "disk"}


def test_kernels_are_built_while_loading(random_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the first prompt, whose speed would be the compiler's: 16-bit linears ask for them only then."""
    asked: list[str] = []

    def built() -> str:
        asked.append("built")
        return "not here"

    monkeypatch.setattr(cpu_kernels, "_built", built)
    with loaded(open_checkpoint(random_model()), LoadOptions(max_model_len=64)):
        assert asked


def test_a_cpu_too_small_uses_the_disk_or_says_what_is_missing(
    random_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current directory's, unless told otherwise: the system's temporary one may be memory."""
    checkpoint = open_checkpoint(random_model())
    weights = sizes(checkpoint)
    work = LoadOptions(max_model_len=64).work(checkpoint.spec)
    need = plan_load(Case(checkpoint.spec, weights, OWN, work), 1 << 40).predicted["CPU"]
    plan = plan_load(Case(checkpoint.spec, weights, OWN, work), need - 1)
    assert plan.disk_bytes > 0 and plan.predicted["CPU"] <= need - 1
    with pytest.raises(RunError) as caught:
        plan_load(Case(checkpoint.spec, weights, OWN, work), 1000)
    assert caught.value.message.startswith("CPU: needs ") and caught.value.message.endswith("MiB short")
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    options = LoadOptions(max_model_len=64, compute_dtype="float32", cpu_memory=need - 1)
    for asked, place in ((options, here), (replace(options, offload_directory=there), there)):
        with loaded(checkpoint, asked) as found:
            assert "disk" in found.model.network.hf_device_map.values()
            assert close(logits(found.model), logits(build(checkpoint)), 1e-6)
            assert [path.parent for path in tmp_path.rglob("qwenq-offload-*")] == [place]
        assert not list(place.iterdir())
    with loaded(checkpoint, LoadOptions(max_model_len=64)):
        assert not list(here.iterdir()), "nothing goes to disk"
    with pytest.raises(RunError, match=r"file: no place for layers \(Not a directory\)"):
        (tmp_path / "file").touch()
        with loaded(checkpoint, replace(options, offload_directory=tmp_path / "file")):
            pass
    monkeypatch.setattr(load.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"here: needs .* MiB for layers on disk"), loaded(checkpoint, options):
        pass


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory: 9 bytes")])
def test_out_of_memory_is_one_line(failure: Exception, random_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(random_model())
    monkeypatch.setattr(monitor, "available_ram", lambda: 1000)

    def fail(*unused: object, **more: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr("qwenq.runtime.model.StoredLinear", fail)
        with pytest.raises(RunError, match=r"^CPU: out of memory while loading layer 0: needs .* short$"):
            build(checkpoint)
    session = Session(build(checkpoint), 64)
    monkeypatch.setattr(type(session.model.network.model), "forward", fail)
    with pytest.raises(RunError, match=r"^CPU: out of memory while computing 5 tokens: needs .* short$"):
        list(session.generate([1, 2, 3, 4, 5], Sampling(max_new_tokens=2)))


def test_other_failures_are_not_called_out_of_memory() -> None:
    with pytest.raises(RuntimeError, match="mat1"), monitor.memory_errors("x", torch.device("cpu"), 1, ""):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


@pytest.mark.parametrize(("places", "value", "said"), [(3, float("nan"), "a NaN"), (slice(None), 0.0, "nothing but")])
def test_a_damaged_norm_is_named(places: int | slice, value: float, said: str, random_model: Make) -> None:
    path = random_model()
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][places] = value
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model\.norm\.weight holds {said}"):
        build(open_checkpoint(path))


# ---------------------------------------------------------------------- tokens


def test_greedy_text_is_transformers_own(tiny: Path) -> None:
    import transformers

    checkpoint = open_checkpoint(tiny)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    prompt = IDS[0, :20].tolist()
    wanted = theirs.generate(IDS[:, :20], max_new_tokens=24, do_sample=False, eos_token_id=1, pad_token_id=0)
    for chunk in (2048, 7):
        session, timing = Session(build(checkpoint), 64, chunk, stop_ids=frozenset({1})), Timing()
        found = list(session.generate(prompt, Sampling(max_new_tokens=24), timing))
        assert found == [t for t in wanted[0, 20:].tolist() if t != 1]
        assert timing.prompt_tokens == 20 and timing.new_tokens == len(found) and timing.decode_speed > 0


def test_the_cache_of_the_turn_before_is_used(tiny: Path) -> None:
    session = Session(build(open_checkpoint(tiny)), 64)
    first = list(session.generate([5, 6, 7, 8], Sampling(max_new_tokens=6)))
    timing = Timing()
    again = list(session.generate([5, 6, 7, 8], Sampling(max_new_tokens=6), timing))
    assert again == first and timing.cached_tokens == 3
    longer = [5, 6, 7, 8, *first[:3], 9, 9]
    kept = list(session.generate(longer, Sampling(max_new_tokens=6), timing))
    assert timing.cached_tokens == 7
    session.release()
    assert list(session.generate(longer, Sampling(max_new_tokens=6), timing)) == kept and timing.cached_tokens == 0


def test_an_answer_does_not_go_on_in_the_cache_of_another(tiny: Path) -> None:
    session = Session(build(open_checkpoint(tiny)), 64)
    alone = list(session.generate([40, 41, 42], Sampling(max_new_tokens=6)))
    first = session.generate([5, 6, 7, 8], Sampling(max_new_tokens=6))
    second = session.generate([40, 41, 42], Sampling(max_new_tokens=6))
    next(first)
    next(first)  # the second was only made, and has begun nothing
    found = [next(second)]
    with pytest.raises(RunError, match="another answer was started meanwhile"):
        next(first)
    assert [*found, *second] == alone


def test_contexts_too_long(tiny: Path) -> None:
    model = build(open_checkpoint(tiny))
    with pytest.raises(RunError, match="--context 513: the model reads 512 tokens"):
        Session(model, 513)
    session = Session(model, 16)
    with pytest.raises(RunError) as caught:
        list(session.generate([1] * 10, Sampling(max_new_tokens=8)))
    assert caught.value.message == "prompt of 10 tokens and 8 new ones: 18 in a context of 16, 2 too many"
    assert caught.value.hint == "--max-new-tokens 6"
    with pytest.raises(RunError, match="token id 1024 is outside the vocabulary of 1024"):
        list(session.generate([1, 1024], Sampling()))
    with pytest.raises(RunError, match="the prompt is empty"):
        list(session.generate([], Sampling()))


def test_sampling_follows_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([0.0, 2.0, 1.0, -1.0])
    draws = [next_token(scores, [], Sampling(temperature=1.0), generator) for _ in range(4000)]
    found = torch.bincount(torch.tensor(draws), minlength=4) / 4000
    assert torch.allclose(found, scores.softmax(0), atol=0.03)

    def only(**settings: Any) -> set[int]:
        sampling = Sampling(temperature=1.0, **settings)
        return {next_token(scores, [], sampling, generator) for _ in range(300)}

    assert only(top_k=2) == {1, 2} and only(top_p=0.5) == {1} and only(top_p=0.7) == {1, 2}
    assert next_token(scores, [1], Sampling(repetition_penalty=4.0), generator) == 2
    best = int(scores.argmax())
    assert {next_token(scores, [], Sampling(temperature=t), generator) for t in (1e-38, 1e-300)} == {best}
    assert next_token(scores, [], Sampling(temperature=1.0, top_k=len(scores) + 5), generator) in range(len(scores))
    with pytest.raises(RunError, match="logits are not finite"):
        next_token(torch.tensor([0.0, float("nan")]), [], Sampling(), generator)


@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-5, 1e308])
def test_any_temperature_can_be_drawn_at(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([-300.0, 20.0, 40.0, 3e38])
    found = {next_token(scores, [], Sampling(temperature=temperature), generator) for _ in range(200)}
    assert found == ({3} if temperature < 1 else {0, 1, 2, 3})


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0}, {"temperature": math.nan}, {"temperature": -1}, {"top_k": -1}, {"seed": 1 << 63},
        {"seed": -(1 << 63) - 1}, {"repetition_penalty": 0}, {"repetition_penalty": 1e30},
    ],
    ids=str,
)  # fmt: skip
def test_sampling_has_bounds(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(UsageError, match=f"{name} is .*, wanted "):
        Sampling(**settings)


def test_generation_can_be_stopped(tiny: Path) -> None:
    session = Session(build(open_checkpoint(tiny)), 64)
    seen: list[int] = []
    for token in session.generate([5, 6, 7], Sampling(max_new_tokens=30), stopped=lambda: len(seen) >= 2):
        seen.append(token)
    assert len(seen) == 2
    assert list(session.generate([8, 9], Sampling(max_new_tokens=30), stopped=lambda: True)) == []


def test_config_written_by_hand_is_not_needed(tiny: Path) -> None:
    """No tensor of the model is left on `meta`, and everything that is stored is used."""
    checkpoint = open_checkpoint(tiny)
    network = build(checkpoint).network
    assert not [n for n, p in (*network.named_parameters(), *network.named_buffers()) if p.is_meta]
    assert len(list(network.parameters())) == len(checkpoint.tensors)
    assert json.loads((tiny / "config.json").read_text())["model_type"] == "qwen2"
