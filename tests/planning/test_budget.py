"""Recipes to a budget: exact sizes, ranges, the rule of vLLM's fused linears, files that are read back, rigs."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from families import model

from qwenq.checkpoint.shards import Beside
from qwenq.errors import HonestNo, PlanError
from qwenq.formats.base import Recipe, Scheme, get_format, parse_scheme, quantization_config, read_quantization_config
from qwenq.formats.gptq import GPTQ
from qwenq.model.spec import ModelSpec, spec_from_config
from qwenq.planning.budget import (
    choose_for_bits,
    choose_for_bytes,
    choose_for_rig,
    describe_choice,
    file_bytes,
    fixed_bytes,
    group_costs,
    reachable_bytes,
    recipe_of,
)
from qwenq.planning.case import Case, Workload
from qwenq.planning.engines.base import get_engine
from qwenq.planning.recipefile import encode_recipe, read_recipe
from qwenq.planning.rig import parse_rig
from qwenq.planning.sensitivity import (
    Sensitivity,
    encode_sensitivity,
    fused_groups,
    members_of,
    options_of,
    prior,
    read_sensitivity,
    schemes_for,
)
from qwenq.planning.weights import recipe_weights
from qwenq.units import parse_size

B72, B7 = model("Qwen2.5-72B"), model("Qwen2.5-7B")


def bf16(name: str) -> str:
    return "BF16"


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_a_mixture_is_called_by_what_most_weights_have(form: str) -> None:
    """Of 7 linears 3 have 8 bits, which are 9 % of the weights; gate and up alone are 58 %."""
    labels = {"qkv": "8-bit g128", "o": "4-bit g64", "gate_up": "4-bit g32", "down": "4-bit g64"}
    choice = {fused: parse_scheme(labels[fused[1]]) for fused in fused_groups(B7, form)}
    recipe = recipe_of(B7, choice, form)
    assert recipe.label == "mixed, mostly 4-bit g32"
    config = quantization_config(recipe, B7, damp_percent=0.1, method="gptq")
    assert read_quantization_config(config, "config.json").recipe(B7).label == recipe.label
    assert {lin.name: recipe.scheme_of(lin) for lin in B7.linears} == {
        lin.name: parse_scheme(labels[lin.stage]) for lin in B7.linears
    }


def small(layers: int = 1) -> ModelSpec:
    return spec_from_config(
        {"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": layers,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64},
        name="small",
    )  # fmt: skip


def random_table(spec: ModelSpec, seed: int) -> Sensitivity:
    rng = random.Random(seed)
    scale = {fused: rng.uniform(0.1, 10) for fused in fused_groups(spec)}
    rows = {
        fused: {scheme: kl * scale[fused] * rng.uniform(0.9, 1.1) for scheme, kl in row.items()}
        for fused, row in prior(spec).kl.items()
    }
    return Sensitivity(spec.name, "measured", rows)


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("gb", "low"), [(47, 46.7), (42, 41.8), (60, 59.7), (100, 99.5)])
def test_72b_lands_just_below_its_target(gb: int, low: float) -> None:
    found = choose_for_bytes(B72, prior(B72), gb * 10**9, bf16)
    assert low * 1e9 <= found.file_bytes <= gb * 10**9
    assert found.file_bytes == file_bytes(B72, found.recipe, bf16)
    assert found.bound_kl == pytest.approx(found.predicted_kl, rel=1e-9)


@pytest.mark.parametrize("layers", [3, 12])
def test_sizes_are_counted_to_the_byte_of_a_header(layers: int) -> None:
    """What the optimizer adds up is never below the written size, and at most a line of text a layer above it."""
    spec = small(layers)
    rng = random.Random(layers)
    smallest, whole = reachable_bytes(spec, prior(spec), bf16)
    for _ in range(20):
        target = rng.randint(smallest, whole - 1)
        found = choose_for_bytes(spec, random_table(spec, rng.randint(0, 99)), target, bf16)
        assert found.file_bytes <= target
    tight = choose_for_bytes(spec, prior(spec), smallest, bf16)
    assert smallest - tight.file_bytes <= 300 * layers
    assert {s and s.label for s in tight.choice.values()} == {"4-bit g128"}


def test_a_split_file_is_never_counted_too_small() -> None:
    """Where tensors are cut into other files than in 16 bit, headers are filled up otherwise."""
    spec, rng, form = small(4), random.Random(0), get_format("gguf")
    fused = list(fused_groups(spec, "gguf"))

    def stored(name: str) -> str:
        return form.stored_dtype(name, "BF16")

    table, over = prior(spec, "gguf"), []
    for _ in range(150):
        beside = Beside("x", {"general.name": "y" * rng.randrange(32)}, rng.randrange(60_000, 1_200_000))
        fixed = fixed_bytes(spec, stored, "gguf", beside)
        costs = {each: group_costs(spec, table, each, stored, "gguf") for each in fused}
        choice = {each: rng.choice(list(costs[each])) for each in fused}
        counted = fixed + sum(costs[each][scheme] for each, scheme in choice.items())
        recipe = recipe_of(spec, choice, "gguf")
        over.append(counted - file_bytes(spec, recipe, stored, beside))
    assert min(over) >= 0 and max(over) < 20_000


def test_bits_per_weight_are_a_budget_too() -> None:
    for bits in ("4.5", "5.5", "8.1875", "12"):
        found = choose_for_bits(B7, random_table(B7, 1), Fraction(bits), bf16)
        assert float(bits) - 0.01 <= found.bits_per_linear_weight <= float(bits)


def test_a_four_unit_model_by_brute_force() -> None:
    """One layer: every recipe there is, with the sizes of the files themselves."""
    spec = small()
    table = random_table(spec, 3)
    groups = list(fused_groups(spec))
    every = []
    for schemes in itertools.product(*([*table.kl[fused], None] for fused in groups)):
        choice = dict(zip(groups, schemes, strict=True))
        kl = sum(table.loss(fused, choice[fused]) for fused in groups)
        every.append((file_bytes(spec, recipe_of(spec, choice), bf16), kl))
    smallest, whole = reachable_bytes(spec, table, bf16)
    assert min(every)[0] <= smallest <= min(every)[0] + 300 and max(every)[0] == whole
    for target in range(smallest, whole, 997):
        found = choose_for_bytes(spec, table, target, bf16)
        within = [kl for size, kl in every if size <= target]
        headers = [kl for size, kl in every if size <= target - 300]  # sizes of headers are counted from above
        assert min(within) <= found.predicted_kl * (1 + 1e-12)
        assert not headers or found.predicted_kl <= min(headers) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("spec", "bits", "group"),
    [
        *(pytest.param(B7, bits, group, id=f"7B-{bits}-{group}") for bits in (4, 8) for group in (128, 64, 32)),
        pytest.param(B72, 4, 32, id="72B-4-32"),
        pytest.param(B72, 8, 128, id="72B-8-128"),
    ],
)
def test_never_worse_than_a_uniform_recipe_of_the_same_size(spec: ModelSpec, bits: int, group: int) -> None:
    scheme = Scheme(bits, group)
    for table in (prior(spec), random_table(spec, 5)):
        uniform = describe_choice(spec, table, dict.fromkeys(fused_groups(spec), scheme), bf16)
        assert uniform.recipe == Recipe(scheme)
        slack = 300 * spec.num_hidden_layers  # as headers are counted from above
        found = choose_for_bytes(spec, table, uniform.file_bytes + slack, bf16)
        assert found.predicted_kl <= uniform.predicted_kl * (1 + 1e-9)
        by_bits = choose_for_bits(spec, table, Fraction(uniform.bits_per_linear_weight), bf16)
        assert by_bits.predicted_kl <= uniform.predicted_kl * (1 + 1e-9)


@pytest.mark.parametrize(("target", "said"), [(41 * 10**9, "smallest recipe takes 41.49 GB"),
                                              (150 * 10**9, "nothing to quantize")])  # fmt: skip
def test_impossible_targets_say_the_range(target: int, said: str) -> None:
    with pytest.raises(HonestNo, match=said) as caught:
        choose_for_bytes(B72, prior(B72), target, bf16)
    assert caught.value.exit_code == 3
    assert re.match(r"reachable: 41\.49 GB to below 145\.41 GB \(\d+ to \d+ bytes\)", caught.value.hint)
    low, high = (int(n) for n in re.findall(r"(\d+) to (\d+) bytes", caught.value.hint)[0])
    assert choose_for_bytes(B72, prior(B72), low, bf16).file_bytes <= low
    assert choose_for_bytes(B72, prior(B72), high, bf16).file_bytes <= high
    for bits in (Fraction(4), Fraction(16)):
        with pytest.raises(HonestNo, match="out of reach"):
            choose_for_bits(B72, prior(B72), bits, bf16)


# ---------------------------------------------------------------------- what engines load


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def vllm_scheme(config: dict, module: str) -> tuple[int, int, bool] | None:
    """Bits, group and symmetry that a reader of `dynamic` finds for a module; None when it is left in 16 bit.

    Written from the documentation of the key: the first pattern that matches from the start decides.
    """
    for pattern, override in config.get("dynamic", {}).items():
        if re.match(pattern[2:], module):
            if pattern.startswith("-:"):
                return None
            return override["bits"], override["group_size"], override["sym"]
    return config["bits"], config["group_size"], config["sym"]


@pytest.mark.parametrize("seed", range(4))
def test_every_mixed_checkpoint_keeps_the_rule_of_fused_linears(seed: int) -> None:
    """Equal bits and group inside {q, k, v} and {gate, up}, symmetric, group in {-1, 32, 64, 128}; and the name of the

    fused module finds the same as the names of its parts.
    """
    spec = small(12)
    smallest, whole = reachable_bytes(spec, prior(spec), bf16)
    target = random.Random(seed).randint(smallest, whole - 1)
    recipe = choose_for_bytes(spec, random_table(spec, seed), target, bf16).recipe
    config = quantization_config(recipe, spec, damp_percent=0.02, method="gptq")
    seen = set()
    for layer, (block, modules) in itertools.product(
        range(12), (("self_attn", ("qkv_proj", "o_proj")), ("mlp", ("gate_up_proj", "down_proj")))
    ):
        for module in modules:
            prefix = f"model.layers.{layer}.{block}."
            found = {vllm_scheme(config, prefix + name) for name in (module, *FUSED.get(module, ()))}
            assert len(found) == 1, (prefix, module, found)
            scheme = found.pop()
            seen.add(scheme)
            if scheme is not None:
                bits, group, symmetric = scheme
                assert bits in (4, 8) and group in (-1, 32, 64, 128) and symmetric is True
    assert len(seen) > 2, "a mixture"
    assert GPTQ.read_config(config, "config.json").recipe(spec) == recipe


def test_a_unit_whose_linears_differ_is_matched_by_their_names_alone() -> None:
    up, q = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"
    recipe = Recipe(Scheme(4, 128), ((q, Scheme(8, 128)), (up, None)))
    config = quantization_config(recipe, small(2), damp_percent=0.02, method="gptq")
    assert set(config["dynamic"]) == {
        r"+:^model\.layers\.0\.self_attn\.q_proj$", r"-:^model\.layers\.1\.mlp\.up_proj$"
    }  # fmt: skip
    assert GPTQ.read_config(config, "config.json").recipe(small(2)) == recipe


def test_offered_schemes() -> None:
    labels = {s.label for s in schemes_for(B72, (0, "down"), GPTQ)}
    assert labels == {f"{bits}-bit g{group}" for bits in (4, 8) for group in (128, 64, 32)}
    narrow = spec_from_config(
        {"model_type": "qwen2", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1,
         "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 64, "max_position_embeddings": 64}
    )  # fmt: skip
    assert {s.group_size for s in schemes_for(narrow, (0, "qkv"), GPTQ)} == {64, 32}  # 576 = 4.5 x 128
    assert {s.group_size for s in schemes_for(narrow, (0, "down"), GPTQ)} == {128, 64, 32}
    assert any(not s.sym for s in schemes_for(B72, (0, "o"), GPTQ, options_of(True)))
    found = choose_for_bytes(B7, prior(B7, asymmetric=True), 6 * 10**9, bf16, "gptq")
    assert all(scheme is None or scheme.sym for scheme in found.choice.values())
    other = choose_for_bytes(B7, prior(B7, asymmetric=True), 6 * 10**9, bf16, "compressed-tensors")
    assert other.recipe.format == "compressed-tensors" and 0.995 * 6e9 <= other.file_bytes <= 6e9


@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(8, -1), Scheme(4, 32, sym=False), None])
def test_labels_are_read_back(scheme: Scheme | None) -> None:
    assert parse_scheme(scheme.label if scheme else "16-bit") == scheme
    for bad in ("5-bit g128", "4-bit", "4bit g64", "", "4-bit g", "16-bit g128"):
        with pytest.raises(PlanError, match="is not a scheme"):
            parse_scheme(bad)


# ---------------------------------------------------------------------- files


def test_a_recipe_file_says_the_same_when_read_back(tmp_path: Path) -> None:
    found = choose_for_bytes(B7, random_table(B7, 2), 7 * 10**9, bf16)
    path = tmp_path / "r.toml"
    path.write_text(encode_recipe(B7, found))
    shared = {fused: found.recipe.scheme_of(members_of(B7, fused)[0]) for fused in fused_groups(B7)}
    assert read_recipe(path, B7) == found.choice == shared
    lines = path.read_text().splitlines()
    assert sum(1 for line in lines if re.match(r"\d+ +=", line)) == 28 and max(map(len, lines)) < 120


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "scheme": (lambda t: t.replace('o = "4-bit g128"', 'o = "5-bit g128"', 1),
               r"r\.toml, line 12, layer 0, o: '5-bit g128' is not a scheme"),
    "group": (lambda t: t.replace('o = "4-bit g128"', 'o = "4-bit g96"', 1), r"line 12, layer 0, o: .*g96"),
    "asymmetric": (lambda t: t.replace('o = "4-bit g128"', 'o = "4-bit g64 asym"', 1), "layer 0, o: 4-bit g64"),
    "number": (lambda t: t.replace('o = "4-bit g128"', "o = 4", 1), "line 12, layer 0, o: 4 is not a scheme"),
    "name": (lambda t: t.replace("o = ", "q = ", 1), "line 12, layer 0: has qkv, q, gate_up, down, wanted qkv, o"),
    "missing layer": (lambda t: re.sub(r"(?m)^1 .*\n", "", t), "layer 1: missing"),
    "one layer more": (lambda t: t + '7 = { qkv = "16-bit" }\n', r"line 15: layer '7', small has 3 layers \(0 to 2\)"),
    "syntax": (lambda t: t.replace("{", "[", 1), r"at line 12"),
    "version": (lambda t: t.replace("version = 1", "version = 9"), "version is 9, wanted 1"),
    "no table": (lambda t: t[: t.index("[layer]")], r"no \[layer\] table"),
    "no head": (lambda t: t + '[outer]\nhead = "8-bit g128"\n', "outer, which says nothing in a recipe for gptq"),
    "other key": (lambda t: "bits = 4\n" + t, r"r\.toml: bits, which says nothing"),
    "nothing": (lambda t: re.sub(r"\d-bit g\d+", "16-bit", t), "every fused group stays in 16 bit"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_recipe_names_line_and_unit(case: str, tmp_path: Path) -> None:
    spec = small(3)
    table = prior(spec)
    text = encode_recipe(spec, choose_for_bytes(spec, table, reachable_bytes(spec, table, bf16)[0], bf16))
    edit, said = BROKEN[case]
    path = tmp_path / "r.toml"
    path.write_text(edit(text))
    assert path.read_text() != text
    with pytest.raises(PlanError, match=said):
        read_recipe(path, spec)


def test_a_table_from_before_a_tied_head_was_solved_is_refused() -> None:
    tied = replace(B7, tie_word_embeddings=True)
    old = replace(prior(tied, "gguf"), fingerprint="measured")
    with pytest.raises(PlanError, match="from before a tied head was solved") as caught:
        old.check(tied, "measured", "gguf")
    assert caught.value.hint == "measure it again: qwenq sensitivity MODEL --format gguf"
    replace(old, provenance={"tied_head": "solved"}).check(tied, "measured", "gguf")
    prior(tied, "gguf").check(tied, "measured", "gguf")  # of no model
    for spec, format in ((B7, "gguf"), (tied, "gptq")):  # no head that is tied and quantized
        replace(prior(spec, format), fingerprint="measured").check(spec, "measured", format)


def test_a_table_is_read_back_and_refused_for_another_model(tmp_path: Path) -> None:
    table = random_table(B7, 4)
    path = tmp_path / "s.json"
    path.write_bytes(encode_sensitivity(table))
    found = read_sensitivity(path)
    assert found.kl == table.kl and found.measured and not prior(B7).measured
    found.check(B7, "measured")
    with pytest.raises(PlanError, match=r"measured on Qwen2.5-7B \(fingerprint measured\), this model is Qwen2.5-7B"):
        found.check(B7, "other")
    with pytest.raises(PlanError, match=r"with 28 layers, Qwen2\.5-72B has 80"):
        found.check(B72)
    for edit, said in (
        (lambda t: t.replace('"version": 1', '"version": 2'), "version 2, wanted"),
        (lambda t: t.replace('"0.qkv"', '"0.kqv"'), "'0.kqv' is not a fused group"),
        (lambda t: re.sub(r'("4-bit g128": )[\d.e-]+', r"\1-1", t, count=1), "0.qkv, 4-bit g128: -1 is not a KL"),
        (lambda t: t.replace('"measured"', '""'), "lacks kl_nats_per_token or fingerprint"),
    ):
        path.write_text(edit(encode_sensitivity(table).decode()))
        with pytest.raises(PlanError, match=said):
            read_sensitivity(path)


# ---------------------------------------------------------------------- rigs


@pytest.mark.parametrize("engine", ["qwenq", "vllm"])
def test_the_recipe_for_a_rig_fits_it_and_little_more_would(engine: str) -> None:
    rig, work = parse_rig("RTX 3060 12GB"), Workload(8192, 1)
    case = Case(B7, recipe_weights(B7, Recipe(None)), get_engine(engine), work, rig)
    found = choose_for_rig(case, prior(B7), bf16)
    assert case.engine.how_held(replace(case, weights=recipe_weights(B7, found.recipe)))
    more = choose_for_bytes(B7, prior(B7), round(found.file_bytes * 1.02), bf16, exact=False)
    assert not case.engine.how_held(replace(case, weights=recipe_weights(B7, more.recipe)))


def test_a_gguf_file_is_held_with_norms_and_biases_as_it_has_them() -> None:
    """In float32, not as they were."""
    form, table, seen = get_format("gguf"), prior(B7, "gguf"), set[int]()

    def stored(name: str) -> str:
        return form.stored_dtype(name, "BF16")

    class Small(type(get_engine("llama.cpp"))):  # type: ignore[misc]
        def how_held(self, case: Case) -> Any:
            seen.add(case.weights.total_bytes)
            return [0] if case.weights.total_bytes < 6e9 else []

    whole = recipe_weights(B7, Recipe(None))
    case = Case(B7, whole, Small((9918,)), Workload(8192, 1), parse_rig("RTX 3060 12GB"))
    found = choose_for_rig(case, table, stored, "gguf")
    assert sum(t.nbytes for t in found.recipe.tensors(B7, stored)) in seen
    assert max(size for size in seen if size < 6e9) > 5.98e9


def test_rigs_too_small_and_too_large_are_honest() -> None:
    for rig, said in (("RTX 3060 12GB", "even the smallest recipe"), ("8x A100 80GB SXM", "nothing to quantize")):
        with pytest.raises(HonestNo, match=said):
            whole = recipe_weights(B72, Recipe(None))
            case = Case(B72, whole, get_engine("qwenq"), Workload(8192, 1), parse_rig(rig))
            choose_for_rig(case, prior(B72), bf16)


def test_a_rig_that_would_hold_it_with_more_of_each_gpu() -> None:
    """vLLM's own part of the cards is too little for the smallest recipe: the hint has a flag and a size that do."""
    vllm, work = get_engine("vllm"), Workload(12288, 1)
    case = Case(B72, recipe_weights(B72, Recipe(None)), vllm, work, parse_rig("2x RTX 3090"))
    with pytest.raises(HonestNo, match="even the smallest recipe") as caught:
        choose_for_rig(case, prior(B72), bf16)
    found = re.match(
        r"served with --gpu-memory-utilization (0\.\d+) it would: --target-size (\S+) instead of --fit; or a shorter",
        caught.value.hint,
    )
    assert found is not None, caught.value.hint
    part, recipe = float(found[1]), choose_for_bytes(B72, prior(B72), parse_size(found[2]), bf16, exact=False).recipe
    held = replace(case, weights=recipe_weights(B72, recipe))
    assert vllm.how_held(held.asking(gpu_memory_utilization=part))
    assert not vllm.how_held(held.asking(gpu_memory_utilization=part - 0.01))
    with pytest.raises(HonestNo, match="even the smallest recipe") as caught:
        choose_for_rig(case.asking(context=32768), prior(B72), bf16)
    assert caught.value.hint.startswith("a shorter --context")


def test_units_have_the_linears_engines_fuse() -> None:
    names = [[lin.kind for lin in members_of(B7, (3, fused))] for fused in ("qkv", "o", "gate_up", "down")]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
