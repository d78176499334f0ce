"""Sizes and refusals before anything is read: exact bytes of the 72B, tensor parallelism, disk."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from families import model

from qwenq.checkpoint.shards import stored_files
from qwenq.errors import JobError, PlanError
from qwenq.formats.base import Recipe, Scheme, get_format
from qwenq.machine import free_disk
from qwenq.model.spec import ModelSpec, spec_from_config
from qwenq.pipeline.config import Tokens, head_windows, original_windows
from qwenq.pipeline.preflight import (
    PlannedJob,
    Preflight,
    hidden_state_bytes,
    peak_bytes,
    preflight,
    wire_head_bytes,
    wire_layer_bytes,
)
from qwenq.planning.tensor_parallel import (
    padded_width,
    row_groups,
    tensor_parallel_lines,
    tensor_parallel_reasons,
    tensor_parallel_sizes,
)
from qwenq.planning.weights import published_weights

TOKENS = Tokens(128, 20, 512)


def spec_of(**config: object) -> ModelSpec:
    shape = {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64,
    }  # fmt: skip
    return spec_from_config(shape | config, name="small")


@pytest.fixture(scope="module")
def qwen72() -> ModelSpec:
    return model("Qwen2.5-72B")


def dry_run(spec: ModelSpec, recipe: Recipe) -> Preflight:
    return preflight(PlannedJob(spec, recipe, TOKENS, compute_bytes=4))


@pytest.mark.parametrize(("scheme", "wanted"), [(Scheme(4, 128), 41_489_965_056), (Scheme(8, 128), 76_870_557_696)])
def test_72b_tensor_bytes(scheme: Scheme, wanted: int, qwen72: ModelSpec) -> None:
    check = dry_run(qwen72, Recipe(scheme))
    assert check.tensor_bytes == wanted
    assert 0 < check.file_bytes - wanted < 2_000_000  # headers
    assert check.source_tensor_bytes == 145_412_407_296
    assert check.parameters == 72_706_203_648
    assert check.schemes == dict.fromkeys(("qkv", "o", "gate_up", "down"), scheme.label)
    json.dumps(check.to_json(), allow_nan=False)


@pytest.mark.parametrize(("group", "gb"), [(128, 41.5), (64, 42.9), (32, 45.6)])
def test_72b_sizes_by_group(group: int, gb: float, qwen72: ModelSpec) -> None:
    assert dry_run(qwen72, Recipe(Scheme(4, group))).tensor_bytes / 1e9 == pytest.approx(gb, abs=0.05)


def test_bytes_by_hand() -> None:
    """One layer, hidden 64, FFN 96, 4 heads of 16, 2 key-value heads, g32, 4 bits, BF16 elsewhere."""
    spec = spec_of(num_hidden_layers=1)
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]  # (in, out): q k v o gate up down
    packed = 0
    for columns, rows in shapes:
        groups = columns // 32
        packed += columns * rows // 2 + groups * rows // 2 + groups * rows * 2 + columns * 4
    biases, norms = 2 * (64 + 32 + 32), 2 * 2 * 64
    outer = 2 * (100 * 64 + 64 + 100 * 64)
    check = dry_run(spec, Recipe(Scheme(4, 32)))
    assert check.tensor_bytes == packed + biases + norms + outer
    assert sum(check.stage_bytes.values()) == packed + biases
    linears = sum(columns * rows for columns, rows in shapes)
    assert sum(dry_run(spec, Recipe(None)).stage_bytes.values()) == 2 * linears + biases


def test_bits_per_weight_by_hand() -> None:
    """4 bits, a 16-bit scale and a 4-bit zero point for each group of 64: 4 + 20 / 64."""
    spec = spec_of(hidden_size=128, intermediate_size=256)
    assert dry_run(spec, Recipe(Scheme(4, 64))).bits_per_linear_weight == 4 + 20 / 64
    assert dry_run(spec, Recipe(Scheme(8, 128))).bits_per_linear_weight == 8 + 24 / 128


@pytest.mark.parametrize(
    ("group", "allowed", "reason"),
    [
        (128, {1}, "FFN width 29568 / 2 = 14784 is not a multiple of the group size 128"),
        (64, {1, 2}, "FFN width 29568 / 4 = 7392 is not a multiple of the group size 64"),
        (32, {1, 2, 4}, "FFN width 29568 / 8 = 3696 is not a multiple of the group size 32"),
        (-1, {1, 2, 4, 8}, ""),
    ],
)
def test_tensor_parallel_of_72b(group: int, allowed: set[int], reason: str, qwen72: ModelSpec) -> None:
    found = tensor_parallel_sizes(qwen72, row_groups(qwen72, Recipe(Scheme(4, group))))
    assert {int(n) for n, why in found.items() if not why} == allowed
    refused = [why for why in found.values() if why]
    assert (refused[0] if refused else "").startswith(reason)
    assert all("(--pad-for-tp " in why and " makes it 29696)" in why for why in refused)


def test_tensor_parallel_sizes_with_one_reason_share_a_line(qwen72: ModelSpec) -> None:
    lines = tensor_parallel_lines(qwen72, row_groups(qwen72, Recipe(Scheme(4, 128))))
    assert lines == [
        "1: yes",
        "2, 4, 8: FFN width 29568 is not a multiple of the group size 128 times the ranks, so a quantization group "
        "would straddle ranks; --pad-for-tp 8 (29696) allows all",
    ]
    assert tensor_parallel_lines(qwen72, row_groups(qwen72, Recipe(Scheme(4, 32)))) == [
        "1, 2, 4: yes",
        "8: FFN width 29568 / 8 = 3696 is not a multiple of the group size 32, so a quantization group would straddle "
        "ranks (--pad-for-tp 8 makes it 29696)",
    ]


def test_padding_is_offered_only_where_it_helps() -> None:
    """Attention of 3 x 128 columns: over 2 ranks its groups straddle as well, which the FFN's padding cannot change."""
    spec = spec_of(hidden_size=384, num_attention_heads=4, num_key_value_heads=4, intermediate_size=384)
    groups = row_groups(spec, Recipe(Scheme(4, 128)))
    assert all("FFN" in reason or "attention" in reason for reason in tensor_parallel_reasons(spec, groups, 2))
    assert "--pad-for-tp" not in tensor_parallel_sizes(spec, groups)["2"]
    # an FFN that no rank number divides, with row-wise scales: padding helps
    odd = spec_of(intermediate_size=99)
    found = tensor_parallel_sizes(odd, {"down": (-1,), "o": (-1,)})["2"]
    assert found == "FFN width 99 is not divisible by 2 (--pad-for-tp 2 makes it 112)"


@pytest.mark.parametrize(
    ("config", "ranks", "reason"),
    [
        ({}, 8, "4 heads are not divisible by 8"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96}, 2, "3 KV heads cannot be shared"),
        ({"vocab_size": 101}, 2, ""),  # engines pad it
        ({"intermediate_size": 99}, 2, "FFN width 99 is not divisible by 2"),
        ({"num_key_value_heads": 1}, 2, ""),  # key-value heads may be copied
    ],
)
def test_tensor_parallel_reasons(config: dict, ranks: int, reason: str) -> None:
    found = "; ".join(tensor_parallel_reasons(spec_of(**config), {}, ranks))
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_groups_are_looked_at_where_they_are_cut() -> None:
    """A mixed checkpoint: only o and down are cut by input, each with its own group sizes."""
    spec = spec_of(hidden_size=128, intermediate_size=384)
    names = {lin.kind: lin.name for lin in spec.layer_linears(1)}
    recipe = Recipe(Scheme(4, 32), ((names["up_proj"], Scheme(4, 128)), (names["o_proj"], Scheme(8, 128))))
    assert row_groups(spec, recipe) == {"o": (32, 128), "down": (32,)}
    found = tensor_parallel_sizes(spec, row_groups(spec, recipe))
    assert found["1"] == ""
    assert found["2"].startswith("attention width 128 / 2 = 64 is not a multiple of the group size 128")
    assert "pad-for-tp" not in found["2"], "padding the FFN does not help there"


@pytest.mark.parametrize(("width", "group", "ranks", "wanted"), [(29568, 128, 8, 29696), (29568, 128, 1, 29568),
    (29568, 64, 2, 29568), (29568, 32, 8, 29696), (384, 128, 2, 512), (96, -1, 4, 96), (100, -1, 2, 112)])  # fmt: skip
def test_padded_widths(width: int, group: int, ranks: int, wanted: int) -> None:
    assert padded_width(width, group, ranks) == wanted


def test_the_padded_72b_has_the_size_of_the_published_one(qwen72: ModelSpec) -> None:
    wide = replace(qwen72, intermediate_size=padded_width(29568, 128, 8))
    check = preflight(PlannedJob(wide, Recipe(Scheme(4)), TOKENS, compute_bytes=4, source_spec=qwen72))
    assert check.tensor_bytes == published_weights(qwen72, "GPTQ-Int4").total_bytes == 41_620_750_336
    assert check.source_tensor_bytes == 145_412_407_296
    assert set(check.tensor_parallel.values()) == {""}


def test_files_hold_every_tensor_once() -> None:
    for tied in (False, True):
        spec = spec_of(tie_word_embeddings=tied)
        recipe = Recipe(Scheme(4, 32), (("model.layers.1.mlp.down_proj", None),))
        stored = stored_files(spec, recipe, lambda name: "F16")
        files = dict(zip(stored.names, stored.parts, strict=True))
        assert list(files) == [f"model-{k:05d}-of-00005.safetensors" for k in range(1, 6)]
        names = [t.name for tensors in files.values() for t in tensors]
        assert sorted(names) == sorted(t.name for t in recipe.tensors(spec)) and len(names) == len(set(names))
        kept = {t.name: t.dtype for tensors in files.values() for t in tensors if t.dtype != "I32"}
        assert set(kept.values()) == {"F16"} and "model.layers.1.mlp.down_proj.weight" in kept


def test_a_group_that_divides_nothing_names_tensor_and_sizes() -> None:
    with pytest.raises(PlanError) as caught:
        dry_run(spec_of(), Recipe(Scheme(4, 64)))
    assert caught.value.message == ("model.layers.0.mlp.down_proj: group size 64 does not divide its 96 input features")
    assert caught.value.hint == "sizes that divide it: 32, -1 (-1: one group per row)"
    with pytest.raises(PlanError, match="does not pack into int32 words of 8 codes"):
        dry_run(spec_of(intermediate_size=92), Recipe(Scheme(4, -1)))


def test_a_disk_too_small_is_refused(tmp_path: Path, qwen72: ModelSpec) -> None:
    check = dry_run(qwen72, Recipe(Scheme(4)))
    check.check_disk(tmp_path)  # unknown free space refuses nothing
    small = Preflight(**{**check.to_json(), "disk_free_bytes": 10_000_000_000})
    with pytest.raises(JobError) as caught:
        small.check_disk(tmp_path / "out")
    needed = check.disk_needed_bytes / 1e9
    assert caught.value.message == f"{tmp_path / 'out'}: needs {needed:.2f} GB of disk, 10.00 GB are free"
    assert check.disk_needed_bytes > check.file_bytes + check.state_bytes


def test_free_disk_of_a_directory_to_be_made(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "a" / "b" / "c") == pytest.approx(free_disk(tmp_path), abs=1 << 28)


def test_hidden_states_by_hand() -> None:
    """Three calibration and two evaluation windows of ten tokens, 64 values a token, the latter and two of the
    former through two models; and the noise floor's.
    """
    spec = spec_of()
    assert hidden_state_bytes(spec, Tokens(3, 2, 10), 4) == (3 + 2 + 2 + 2) * 10 * 64 * 4
    assert hidden_state_bytes(spec, Tokens(3, 2, 10, 2), 4) == (3 + 2) * 10 * 64 * 2 + (2 + 2) * 10 * 64 * 4
    assert hidden_state_bytes(spec, Tokens(3, 2, 10, 2), 2) == (3 + 2) * 10 * 64 * 2 + (2 + 2 + 2) * 10 * 64 * 4
    assert hidden_state_bytes(spec, Tokens(3, 1, 10, 2), 2) == (3 + 2) * 10 * 64 * 2 + (1 + 1 + 1) * 10 * 64 * 4
    assert hidden_state_bytes(spec, Tokens(3, 2, 10, error_correction_share=0), 4) == (3 + 2 + 2) * 10 * 64 * 4


def test_windows_that_run_through_the_16_bit_layers() -> None:
    """Half of them in whole batches of 2048 tokens, 8 tokens a column of down at least, not more than there are."""
    spec = spec_of(intermediate_size=1536)  # 12,288 tokens
    assert original_windows(spec, 128, 512) == 64
    assert original_windows(spec, 85, 512) == 44
    assert original_windows(spec, 40, 512) == 24
    assert original_windows(spec, 6, 32) == 6
    assert original_windows(spec, 3, 40_000) == 2
    assert original_windows(spec, 128, 512, 1.0) == 128
    assert original_windows(spec, 128, 512, 0.0) == 0
    assert original_windows(spec_of(intermediate_size=4864), 128, 512) == 76
    assert original_windows(spec_of(intermediate_size=29568), 128, 512) == 128
    large = spec_of(intermediate_size=29568)
    for windows, length in [(85, 512), (3, 512), (50, 400), (2, 512)]:  # all of them: halves of as many windows
        assert original_windows(large, windows, length) == windows // 2 * 2
    assert original_windows(spec, 90, 400) == 44, "nine batches of five make two unequal halves"
    assert original_windows(large, 1, 512) == 0
    assert original_windows(spec_of(), 2, 2048) == 2, "half of two is no pair of halves"


def test_predicted_peaks_do_not_know_the_number_of_layers() -> None:
    few, many = (peak_bytes(spec_of(num_hidden_layers=n), TOKENS, 4, False) for n in (8, 80))
    assert few == many
    host, gpu = peak_bytes(spec_of(), TOKENS, 2, True)
    assert host > 0 and gpu > 0


def test_a_source_in_float32_is_held_as_it_is(qwen72: ModelSpec) -> None:
    plan = PlannedJob(qwen72, Recipe(Scheme(4)), TOKENS, compute_bytes=2, on_gpu=True)
    narrow, wide = preflight(plan), preflight(replace(plan, source_dtype_of=lambda name: "F32"))
    parameters = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 29568
    assert wide.peak_ram_bytes - narrow.peak_ram_bytes == 2 * 2 * parameters, "a layer, and the next"
    assert preflight(replace(plan, rotated=True)).peak_ram_bytes == wide.peak_ram_bytes
    assert wide.peak_vram_bytes == narrow.peak_vram_bytes


def test_an_embedding_larger_than_layers_is_held_once() -> None:
    few = Tokens(2, 2, 8)
    for on_gpu in (False, True):
        large, larger = (peak_bytes(spec_of(vocab_size=n), few, 2, on_gpu)[0] for n in (4_000_000, 5_000_000))
        assert larger - large == 2 * 64 * 1_000_000, on_gpu


def test_error_correction_takes_two_sums_of_down(qwen72: ModelSpec) -> None:
    """On top of a Hessian of 29568 and 13 bytes a weight: more than gate and up, whose 13 bytes are twice as many."""
    corrected, without = (peak_bytes(qwen72, Tokens(64, 8, 512, 2, share), 4, True)[1] for share in (0.5, 0.0))
    layer = 2 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 29568)  # 13: float32 weights, errors twice, codes
    assert corrected == layer + 4 * 29568**2 + 21 * 8192 * 29568
    assert without == layer + max(4 * 29568**2 + 13 * 8192 * 29568, 4 * 8192**2 + 26 * 8192 * 29568)


def test_planning_needs_no_torch() -> None:
    code = "import sys, qwenq.pipeline.preflight; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_two_ranks_share_what_grows_with_text(qwen72: ModelSpec) -> None:
    tokens = Tokens(128, 20, 512, 2, 0.5)
    one, two, four = (peak_bytes(qwen72, tokens, 4, False, ranks)[0] for ranks in (1, 2, 4))
    assert two < 0.75 * one and four < two
    states = [hidden_state_bytes(qwen72, tokens, 4, ranks) for ranks in (1, 2, 4)]
    assert states[0] == (2 * 128 * 2 + 2 * 20 * 4) * 512 * 8192, "all windows are corrected: 8 tokens a column of down"
    assert states[1] == states[0] // 2 and states[2] == (2 * 32 * 2 + 2 * 5 * 4) * 512 * 8192, "five of 20"


def test_bytes_on_the_wire_by_hand() -> None:
    """Two ranks, one stage's sums written out: parts of the other one's, and half of each total."""
    spec = spec_of(hidden_size=256, intermediate_size=512, num_attention_heads=4)
    assert wire_layer_bytes(spec, TOKENS, 1000, 1) == 0
    tokens = Tokens(16, 4, 32, 4, 0.0)
    square, wide = 256 * 256, 256 * 512 + 256 * 256  # qkv, o and gate_up; down: two block rows
    sums = 4 * (3 * square + wide) * (8 / 4 + 1 / 2)  # of eight parts half are the other's, half of these are ours
    codes = (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512) // 2
    assert wire_layer_bytes(spec, tokens, 1000, 2) == sums + codes + 1000
    corrected = wire_layer_bytes(spec, replace(tokens, error_correction_share=0.5), 1000, 2)
    assert corrected > wire_layer_bytes(spec, tokens, 1000, 2)


def test_a_solved_head_on_the_wire_by_hand() -> None:
    """Its Hessian's parts and total, half of its codes, and all of it as written, with the last norm."""
    spec = spec_of(hidden_size=256, intermediate_size=512, num_attention_heads=4, vocab_size=1000)
    tokens = Tokens(16, 4, 32, 4, 0.0)
    assert wire_head_bytes(spec, tokens, 1000, 1) == 0
    by_hand = 4 * 256 * 256 * (8 / 4 + 1 / 2) + 1000 * 256 // 2
    assert wire_head_bytes(spec, tokens, 1000, 2) == by_hand + 1000
    q8, written = get_format("gguf").mixture("Q8_0", spec), 2 * 256 + 1000 * 256 // 32 * 34
    found = preflight(PlannedJob(spec, q8, tokens, compute_bytes=4, ranks=2))
    assert found.wire_head_bytes == by_hand + written
    sixteen, none = Recipe(Scheme(8, 32)), Tokens(0, 4, 32)
    for recipe, text in ((sixteen, tokens), (q8, none)):
        check = preflight(PlannedJob(spec, recipe, text, compute_bytes=4, ranks=2))
        assert check.wire_head_bytes == 0 < check.wire_layer_bytes, "in 16 bits, or rounded"


def test_windows_of_a_head_that_is_the_embedding() -> None:
    """16, or eight tokens a column, or all there are."""
    asked = ((576, 128, 512), (2560, 128, 512), (2560, 128, 2048), (896, 40, 128), (896, 6, 512))
    found = [head_windows(spec_of(hidden_size=hidden), *windows) for hidden, *windows in asked]
    assert found == [16, 40, 16, 40, 6]


def test_a_solved_head_that_is_the_embedding_on_the_wire_by_hand() -> None:
    """Parts of the few windows it is solved on; read for the first states and for the divergence."""
    spec = spec_of(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, vocab_size=1000, tie_word_embeddings=True
    )
    q8 = get_format("gguf").mixture("Q8_0", spec)
    for windows, parts in ((64, 8), (4, 4)):
        found = preflight(PlannedJob(spec, q8, Tokens(windows, 4, 32, 4, 0.0), compute_bytes=4, ranks=2))
        sums = 4 * 256 * 256 * (parts / 4 + 1 / 2)
        written = 2 * 256 + 2 * (1000 * 256 // 32 * 34)
        assert found.wire_head_bytes == sums + 1000 * 256 // 2 + written
