"""Weight bytes of recipes, published formats, GGUF and real headers."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from families import model
from hypothesis import given
from hypothesis import strategies as st

from qwenq.errors import CheckpointError, PlanError
from qwenq.formats.base import Recipe, Scheme
from qwenq.model.spec import family_configs
from qwenq.planning import weights
from qwenq.planning.models import WeightsAsked, load_model, load_spec, model_weights
from qwenq.planning.weights import (
    MIB,
    allocated_bytes,
    allocated_equal,
    allocated_groups,
    gguf_weights,
    header_weights,
    published_weights,
    recipe_weights,
)

TINY = Path(__file__).parents[1] / "data" / "tiny-qwen2"


# Computed from the published configs; AWQ of the 72B is published with 41.57 GB of shards, GPTQ-Int4 with 41.65.
@pytest.mark.parametrize(
    ("name", "quant", "n_bytes"),
    [
        ("Qwen2.5-0.5B", "BF16", 988_065_536),
        ("Qwen2.5-0.5B", "GPTQ-Int4", 459_297_536),
        ("Qwen2.5-7B", "AWQ", 5_570_747_392),
        ("Qwen2.5-14B", "GPTQ-Int8", 16_646_219_776),
        ("Qwen2.5-72B", "BF16", 145_412_407_296),
        ("Qwen2.5-72B", "GPTQ-Int8", 77_128_155_136),
        ("Qwen2.5-72B", "GPTQ-Int4", 41_620_750_336),
        ("Qwen2.5-72B", "AWQ", 41_595_518_976),
    ],
)
def test_published_formats(name: str, quant: str, n_bytes: int) -> None:
    assert published_weights(model(name), quant).total_bytes == n_bytes


def test_official_72b_files_are_padded() -> None:
    spec = model("Qwen2.5-72B")
    assert published_weights(spec, "GPTQ-Int4").intermediate_size == 29_696
    assert published_weights(spec, "AWQ").intermediate_size == 29_696
    assert published_weights(spec, "BF16").intermediate_size == 29_568
    assert recipe_weights(spec, Recipe(Scheme(4, 128))).intermediate_size == 29_568


# Published file sizes in GB (bartowski, mradermacher, lmstudio-community on Hugging Face); files add a header of MBs.
@pytest.mark.parametrize(
    ("name", "file_type", "gb"),
    [
        ("Qwen2.5-72B", "Q4_K_M", 47.42),
        ("Qwen2.5-72B", "Q5_K_M", 54.45),
        ("Qwen2.5-72B", "Q6_K", 64.35),
        ("Qwen2.5-72B", "Q8_0", 77.26),
        ("Qwen2.5-32B", "Q4_K_M", 19.9),
        ("Qwen2.5-7B", "Q4_K_M", 4.68),
        ("Qwen2.5-7B", "Q4_0", 4.44),
        ("Qwen2.5-3B", "Q8_0", 3.29),
    ],
)
def test_gguf_sizes(name: str, file_type: str, gb: float) -> None:
    assert gguf_weights(model(name), file_type).total_bytes / 1e9 == pytest.approx(gb, rel=0.004)


def test_gguf_layers_with_more_bits() -> None:
    # llama.cpp's use_more_bits for 28 layers: the first 3, the last 4, and 5, 8, 11, ... between
    layers = gguf_weights(model("Qwen2.5-7B"), "Q4_K_M").layer_bytes
    assert [i for i, size in enumerate(layers) if size == max(layers)] == [
        0,
        1,
        2,
        5,
        8,
        11,
        14,
        17,
        20,
        23,
        24,
        25,
        26,
        27,
    ]


def test_gguf_type_must_be_known() -> None:
    with pytest.raises(PlanError, match="unknown GGUF type 'Q9'"):
        gguf_weights(model("Qwen2.5-7B"), "Q9")


def test_headers_of_a_real_directory() -> None:
    found = load_model(str(TINY))
    weights = model_weights(found)
    assert weights.method == "none" and weights.source == "the checkpoint's own headers"
    assert len(weights.layers) == found.spec.num_hidden_layers
    stored = sum(weights.embed) + sum(weights.norm) + sum(weights.head) + sum(weights.layer_bytes)
    assert weights.total_bytes == stored


def test_headers_of_another_model_are_refused() -> None:
    found = load_model("Qwen2.5-72B")
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight is .*, the config says \[152064, 8192\]"):
        model_weights(found, WeightsAsked(checkpoint=TINY))


def test_missing_layer_is_named() -> None:
    spec = model("Qwen2.5-0.5B")
    tensors = {t.name: t for t in spec.tensors() if ".layers.7." not in t.name}
    with pytest.raises(CheckpointError, match="no tensor of layer 7"):
        header_weights(spec, tensors, {})


def test_quantized_headers_tell_their_scheme() -> None:
    spec, recipe = model("Qwen2.5-0.5B"), Recipe(Scheme(8, 64))
    tensors = {t.name: t for t in recipe.tensors(spec)}
    config = {"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": 64}}
    weights = header_weights(spec, tensors, config)
    assert (weights.method, weights.bits, weights.group_size) == ("gptq", 8, 64)
    assert weights.total_bytes == recipe_weights(spec, recipe).total_bytes


def test_names_people_use() -> None:
    assert load_spec("Qwen/Qwen2.5-72B-Instruct").name == "Qwen2.5-72B"
    published = load_model("Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4")
    assert model_weights(published).intermediate_size == 29_696
    assert model_weights(published, WeightsAsked(gguf=True)).label == "GGUF Q4_K_M"
    assert model_weights(published, WeightsAsked(gguf=True, format="gguf", bits=8)).label == "GGUF Q8_0"
    assert model_weights(load_model("qwen2.5-7b"), WeightsAsked(bits=16)).method == "none"


def _config(**changes: object) -> dict[str, object]:
    config: dict[str, object] = {
        "model_type": "qwen2",
        "hidden_size": 12288,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    }
    return config | changes


def test_spec_sheet_that_contradicts_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_config(num_parameters=72.7e9)))
    with pytest.raises(
        CheckpointError, match=r"contradicts itself: hidden_size 12288, 128 heads, 80 layers make .* B"
    ) as c:
        load_model(str(tmp_path))
    assert "num_parameters says 72.7 B" in c.value.message and "8192 with 64 heads" in c.value.hint
    (tmp_path / "config.json").write_text(json.dumps(_config()))
    with pytest.raises(CheckpointError, match=r"--expect-params says 72.7 B"):
        load_model(str(tmp_path), expect_parameters=72.7e9)
    (tmp_path / "config.json").write_text(json.dumps(_config(_name_or_path="Qwen/Qwen2.5-72B")))
    with pytest.raises(CheckpointError, match=r"Qwen2\.5-72B has hidden_size 8192"):
        load_model(str(tmp_path))
    assert load_model("Qwen2.5-72B", expect_parameters=72.7e9).spec.parameters == 72_706_203_648


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(CheckpointError, match="neither a directory nor a shipped model") as caught:
        load_model("Phoenix")
    assert "a shipped name such as Qwen2.5-72B" in caught.value.hint
    with pytest.raises(CheckpointError, match="neither a directory") as caught:
        load_model("Qwen2.5-77B")
    assert caught.value.hint.startswith("near: ") and "Qwen2.5-7B" in caught.value.hint
    for experts in ("Qwen3-235B-A22B", "Qwen/Qwen3-30B-A3B-Instruct-2507", "mistralai/Mixtral-8x7B-v0.1"):
        with pytest.raises(CheckpointError, match="mixture-of-experts models are not supported"):
            load_model(experts)
    with pytest.raises(CheckpointError, match="neither a directory"):
        load_model("./nowhere/at/all")


# parameters as the model cards or the files' headers state them
@pytest.mark.parametrize(
    ("name", "family", "stated"),
    [
        ("Qwen/Qwen2.5-Coder-7B-Instruct", "Qwen2.5-Coder-7B", 7.62e9),
        ("Qwen2.5-Coder-32B", "Qwen2.5-Coder-32B", 32.8e9),
        ("Qwen2.5-Math-1.5B", "Qwen2.5-Math-1.5B", 1.54e9),
        ("QwQ-32B", "QwQ-32B", 32.8e9),
        ("Qwen3-4B-Instruct-2507", "Qwen3-4B-Instruct-2507", 4.02e9),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-1.5B", 1.78e9),  # untied
        ("DeepSeek-R1-Distill-Qwen-14B", "DeepSeek-R1-Distill-Qwen-14B", 14.8e9),
        ("DeepSeek-R1-Distill-Llama-70B", "DeepSeek-R1-Distill-Llama-70B", 70.6e9),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B", 8.03e9),
        ("llama-3.1-70b", "Llama-3.1-70B", 70.6e9),
        ("Llama-3.3-70B", "Llama-3.3-70B-Instruct", 70.6e9),
    ],
)
def test_more_families(name: str, family: str, stated: float) -> None:
    spec = load_model(name).spec
    assert spec.name == family and spec.parameters == pytest.approx(stated, rel=0.005)


def test_every_family_has_a_source_and_its_own_context() -> None:
    assert all(config["source"] for config in family_configs().values())
    limits = {name: load_model(name).spec.extended_context for name in ("Qwen2.5-Math-7B", "QwQ-32B", "Llama-3.1-8B")}
    assert limits == {"Qwen2.5-Math-7B": 4096, "QwQ-32B": 131072, "Llama-3.1-8B": 131072}


@given(size=st.integers(1, 64 * MIB), count=st.integers(0, 200))
def test_equal_tensors_in_closed_form(size: int, count: int) -> None:
    """As the allocator's rules say, block by block."""
    assert allocated_equal(size, count) == allocated_bytes([size] * count)


@given(
    kinds=st.lists(st.lists(st.integers(1, 40 * MIB), max_size=5).map(tuple), min_size=1, max_size=3),
    order=st.lists(st.integers(0, 2), max_size=40),
)
def test_groups_of_tensors_are_counted_as_one_by_one(kinds: list[tuple[int, ...]], order: list[int]) -> None:
    groups = [kinds[k % len(kinds)] for k in order]
    upto = [allocated_bytes(size for group in groups[:n] for size in group) for n in range(len(groups) + 1)]
    assert allocated_groups(groups) == [after - before for before, after in pairwise(upto)]


def test_equal_layers_are_gone_through_once_they_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, allocated = [], weights.allocated_bytes
    monkeypatch.setattr(weights, "allocated_bytes", lambda *given: seen.append(1) or allocated(*given))
    assert recipe_weights(model("Qwen2.5-72B"), Recipe(Scheme(4))).allocated[1][-1] > 0
    assert len(seen) < 20  # of 82 groups
