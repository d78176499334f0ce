"""Sensitivities against what they predict: the model's own KL when one fused group, or a recipe, is quantized."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import answer, make_random_model, run, settled, text_windows, tied_copy

import qwenq.checkpoint.reader
from qwenq.checkpoint.reader import open_source
from qwenq.errors import CalibrationError, CheckpointError, JobError, PlanError
from qwenq.formats.base import Scheme
from qwenq.formats.gguf import type_scheme
from qwenq.io.safetensors import fingerprint
from qwenq.model.layer import Network
from qwenq.pipeline import fisher
from qwenq.pipeline.evaluate import HeadWeights
from qwenq.pipeline.fisher import _mean_square, _States, measure_sensitivity, sampled_gradients, split_windows
from qwenq.pipeline.job import QuantizeJob
from qwenq.pipeline.preflight import sensitivity_rows
from qwenq.pipeline.quantize import quantize
from qwenq.pipeline.ranks import Ranks
from qwenq.planning.budget import recipe_of
from qwenq.planning.sensitivity import (
    OUTER,
    SENSITIVITY_NAME,
    Sensitivity,
    encode_sensitivity,
    fused_groups,
    read_sensitivity,
)
from qwenq.solver.gptq import DAMP_PERCENT
from qwenq.text.tokens import TokenWindows


@pytest.fixture(scope="module")
def table(tiny: Path, calib: Path, tmp_path_factory: pytest.TempPathFactory) -> Sensitivity:
    scratch = tmp_path_factory.mktemp("scratch")
    found = measure_sensitivity(open_source(tiny), split_windows(text_windows(calib, tiny, 256)), scratch=scratch)
    assert list(scratch.iterdir()) == []
    return found


@pytest.fixture(scope="module")
def measured_kl(
    tiny: Path, calib: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict], float]:
    """KL of a choice on text that neither solver nor table has seen, by the pipeline."""
    calibration, evaluation = text_windows(calib, tiny, 256), text_windows(heldout, tiny, 128, 20)

    def measure(choice: dict, **options: Any) -> float:
        source = open_source(tiny)
        out = tmp_path_factory.mktemp("recipe") / "out"
        recipe = recipe_of(source.spec, choice)
        job = QuantizeJob(source, out, recipe, settled(**options), calibration, evaluation)
        return quantize(job).drift.kl.mean

    return measure


def test_a_tied_head_is_solved_and_looked_up(
    tiny: Path, calib: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the table says of the embedding that is the head too, and what it costs when it alone is quantized."""
    path = tied_copy(tiny, tmp_path / "tied")
    source, fused, scheme = open_source(path), (OUTER, "embedding"), type_scheme("Q5_0")
    monkeypatch.setattr("qwenq.pipeline.fisher.schemes_for", lambda *_: (scheme,))  # of a dozen, the one asked for
    probe = split_windows(text_windows(calib, path, 256), format="gguf")
    table = measure_sensitivity(source, probe, scratch=tmp_path)
    choice = {each: scheme if each == fused else None for each in fused_groups(source.spec, "gguf")}
    windows = text_windows(calib, path, 256), text_windows(heldout, path, 128, 8)
    kl = {}
    for solver in ("gptq", "rtn"):
        calibration = windows[0] if solver == "gptq" else None
        recipe, config = recipe_of(source.spec, choice, "gguf"), settled(method=solver, format="gguf")
        kl[solver] = quantize(
            QuantizeJob(source, tmp_path / solver, recipe, config, calibration, windows[1])
        ).drift.kl.mean
    assert table.loss(fused, scheme) == pytest.approx(kl["gptq"], rel=0.25)
    assert kl["gptq"] < kl["rtn"]
    table.check(source.spec, table.fingerprint, "gguf")


def test_fewer_windows_than_ranks_are_refused(tiny: Path, calib: Path, tmp_path: Path) -> None:
    probe = split_windows(text_windows(calib, tiny, 256, 3))
    with pytest.raises(PlanError, match=r"^1 solver windows for 2 ranks$"):
        measure_sensitivity(open_source(tiny), probe, scratch=tmp_path, ranks=Ranks(0, 2))


def rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@pytest.mark.parametrize(
    ("fused", "scheme"),
    [((0, "qkv"), Scheme(4, 64)), ((1, "o"), Scheme(4, 128)), ((3, "gate_up"), Scheme(4, 32)),
     ((2, "down"), Scheme(4, 128)), pytest.param((0, "down"), Scheme(4, 32), marks=pytest.mark.slow)],
)  # fmt: skip
def test_one_unit_alone_costs_what_the_table_says(
    fused: tuple[int, str], scheme: Scheme, table: Sensitivity, measured_kl: Callable, tiny: Path
) -> None:
    choice = dict.fromkeys(fused_groups(open_source(tiny).spec))
    found = measured_kl(choice | {fused: scheme})
    assert 0.6 < table.loss(fused, scheme) / found < 1.6


def test_eight_bits_cost_the_square_of_the_step(table: Sensitivity, measured_kl: Callable, tiny: Path) -> None:
    """All fused groups in 8 bits: far below what any one costs in 4, and predicted within a factor of two."""
    choice = dict.fromkeys(fused_groups(open_source(tiny).spec), Scheme(8, 64))
    predicted = sum(table.loss(fused, scheme) for fused, scheme in choice.items())
    assert 0.5 < predicted / measured_kl(choice) < 2


def test_a_window_far_from_all_others_does_not_decide() -> None:
    """As one of 32 did in the first layer of a real Qwen2.5. Windows within a factor of five are not limited."""
    score_SN = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.6, 1.4, 32)
    plain = float(score_SN.double().square().mean())
    assert _mean_square(score_SN) == plain
    score_SN[:, 6] *= 100
    assert score_SN.square().mean() > 20 * plain and plain < _mean_square(score_SN) < 1.5 * plain
    score_SN[:, ::2] = score_SN[:, 7] = 0
    assert _mean_square(torch.zeros(4, 3)) == 0 and _mean_square(score_SN) > 0, "a median of zero limits nothing"


def test_some_rows_tell_what_all_rows_do(
    table: Sensitivity, tiny: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third row of attention and every eleventh of the FFN, where a small model's table is of all rows."""
    assert [len(sensitivity_rows(rows)) for rows in (64, 767, 768, 8192, 29568)] == [64, 767, 256, 264, 257]
    monkeypatch.setattr("qwenq.pipeline.preflight.SENSITIVITY_ROWS", 32)
    assert (len(sensitivity_rows(128)), len(sensitivity_rows(384))) == (43, 35)
    probe = split_windows(text_windows(calib, tiny, 256))
    some = measure_sensitivity(open_source(tiny), probe, scratch=tmp_path)
    pairs = [(kl, some.loss(fused, scheme)) for fused, row in table.kl.items() for scheme, kl in row.items()]
    ratios = [few / every for every, few in pairs]
    assert min(ratios) > 0.5 and max(ratios) < 2 and len(set(ratios)) > 1
    assert rank_correlation(*map(list, zip(*pairs, strict=True))) > 0.95


@pytest.mark.slow
def test_ten_random_recipes_are_ranked_rightly(table: Sensitivity, measured_kl: Callable) -> None:
    """Ranks as the default solver leaves them; levels as the solver leaves them that the table is of, without error

    correction."""
    rng = random.Random(1)
    predicted, found, uncorrected = [], [], []
    for _ in range(10):
        share = rng.random()
        choice: dict = {}
        for fused, row in table.kl.items():
            narrow = [scheme for scheme in row if scheme and scheme.bits == 4]
            wide = [None, *(scheme for scheme in row if scheme and scheme.bits == 8)]
            choice[fused] = rng.choice(narrow if rng.random() < share else wide)
        predicted.append(sum(table.loss(fused, scheme) for fused, scheme in choice.items()))
        found.append(measured_kl(choice))
        uncorrected.append(measured_kl(choice, error_correction=0.0))
    assert rank_correlation(predicted, found) >= 0.9 and rank_correlation(predicted, uncorrected) >= 0.9
    assert all(0.6 < p / f < 1.6 for p, f in zip(predicted, uncorrected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("slice_rows", [4096, 400])  # of a vocabulary of 1,024
def test_sampled_gradients_tell_the_kl_of_a_small_change(
    slice_rows: int, random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean of (g . d)**2 over labels is twice the KL of logits at h and at h + d, for a d small enough."""
    monkeypatch.setattr(qwenq.checkpoint.reader, "SLICE_ROWS", slice_rows)
    source = open_source(random_model(dtype=torch.float32, num_hidden_layers=1))
    network = Network(source.config, source.spec, dtype=torch.float32)
    head = HeadWeights(source)
    h = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(1))
    change = 0.02 * torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(2))
    logs = [
        (network.final_norm(x.reshape(-1, 64), head.norm) @ head.rows(0, 1024).T).double().log_softmax(1)
        for x in (h, h + change)
    ]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(1)
    g = sampled_gradients(network, head, h, 3000, seed=0).double()
    assert g.shape == (3000, 3, 4, 64)
    squares = (g * change).sum(-1).square().mean(0).reshape(-1) / 2
    assert torch.allclose(squares, kl, rtol=0.15)  # 3,000 labels: a standard error of about 3 %
    assert float(g.mean(0).norm() / g.norm(dim=-1).mean() / 12**0.5) < 0.05, "labels of the model itself: no mean"
    windows = (g * change).sum((2, 3)).square().mean(0) / 2  # positions are independent
    assert torch.allclose(windows, kl.reshape(3, 4).sum(1), rtol=0.2)


def test_tokens_to_solve_on_and_to_read_on_are_apart() -> None:
    ids = torch.arange(20 * 300).reshape(20, 300)
    probe = split_windows(TokenWindows(ids, "numbers", {}))
    assert probe.solver_NT.shape == (10, 300) and probe.probe_NT.shape == (20, 128)
    assert not set(probe.solver_NT.flatten().tolist()) & set(probe.probe_NT.flatten().tolist())
    assert len(set(probe.probe_NT.flatten().tolist())) == 20 * 128
    many = split_windows(TokenWindows(torch.arange(100 * 512).reshape(100, 512), "numbers", {}))
    assert many.solver_NT.shape == (16, 512) and many.probe_NT.shape == (32, 128)
    assert int(many.probe_NT[-1, 0]) > 95 * 512, "spread over all that is left"
    with pytest.raises(CalibrationError, match="one window"):
        split_windows(TokenWindows(ids[:1], "numbers", {}))


def test_a_fingerprint_tells_models_apart(random_model: Callable[..., Path]) -> None:
    first, same, other = random_model("a"), random_model("b"), random_model("c", seed=1)
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)


# ---------------------------------------------------------------------- the commands


SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 128, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model than the trained one; not to be changed."""
    return make_random_model(tmp_path_factory.mktemp("source") / "small", **SMALL)


def test_a_table_serves_any_budget(
    tmp_path: Path, small: Path, calib: Path, random_model: Callable[..., Path]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    path = place / "s.json"
    made = answer("sensitivity", small, "-o", path, "--calibration", calib, "--sequence-length", 64, "-n", 6)
    assert made == json.loads(path.read_text())
    assert [p.name for p in place.iterdir()] == ["s.json"]
    again = tmp_path / "again.json"
    run("sensitivity", small, "-o", again, "--calibration", calib, "--sequence-length", 64, "-n", 6)
    assert path.read_bytes() == again.read_bytes()
    for bits in ("5", "6"):
        dry = run("quantize", small, "--bpw", bits, "--sensitivity", path, "--dry-run", "--json")
        assert dry.exit_code == 0 and json.loads(dry.stdout)["recipe"]["sensitivity"] == "measured"
    refused = run("sensitivity", small, "-o", path, "--calibration", calib)
    assert refused.exit_code == 1 and "already exists" in refused.stderr
    other = random_model(**SMALL, seed=1)
    refused = run("quantize", other, "--bpw", "5", "--sensitivity", path, "--dry-run")
    assert refused.exit_code == 1
    assert re.match(r"error: .*s\.json: the sensitivity table was measured on small .* is model", refused.stderr)
    with pytest.raises(PlanError, match="kind 'other'"):
        path.write_text(path.read_text().replace("qwenq sensitivity", "other", 1))
        read_sensitivity(path)


def test_down_is_damped_by_tokens_per_column(small: Path, calib: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """As in jobs without error correction, which sensitivities are solved without."""
    probe, source = split_windows(text_windows(calib, small, 32, 6)), open_source(small)
    wanted = round((source.spec.intermediate_size / probe.solver_NT.numel()) ** 0.5, 3)
    assert wanted > DAMP_PERCENT
    solve, seen = fisher.solve_on_ranks, set()

    def watch(workers: Any, weights: Any, *others: Any, damp_percent: float, **options: Any) -> Any:
        seen.update((path.rpartition(".")[2], damp_percent) for path in weights)
        return solve(workers, weights, *others, damp_percent=damp_percent, **options)

    monkeypatch.setattr(fisher, "solve_on_ranks", watch)
    measure_sensitivity(source, probe, scratch=tmp_path)
    assert {damping for name, damping in seen if name == "down_proj"} == {wanted}
    assert {damping for name, damping in seen if name != "down_proj"} == {DAMP_PERCENT}


@pytest.fixture
def command(small: Path, calib: Path, heldout: Path) -> list[object]:
    return ["quantize", small, "--calibration", calib, "--eval-text", heldout, "-n", 6, "--eval-samples", 2,
            "--sequence-length", 64]  # fmt: skip


def test_a_budget_measures_by_itself(command: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(*command, "-o", out, "--bpw", "5")
    assert result.exit_code == 0, result.stderr
    assert "sensitivity: layer 1 measured" in result.stderr and "(sensitivities: measured)" in result.stderr
    kept = read_sensitivity(out / SENSITIVITY_NAME)
    assert kept.measured and sorted(tmp_path.iterdir()) == [out]
    assert SENSITIVITY_NAME in json.loads((out / "qwenq-manifest.json").read_text())["files"]
    apart = tmp_path / "s.json"
    measuring = [word for word in command[1:] if word not in ("--eval-text", command[5], "--eval-samples", 2)]
    measured = run("sensitivity", *measuring, "-o", apart)
    assert apart.read_bytes() == (out / SENSITIVITY_NAME).read_bytes(), "a table of the same text"
    line = f"measured on 6 windows of 64 tokens of {command[3].name}, 1 of them replaced by the built-in set's"
    assert line in measured.stdout
    own = answer("sensitivity", *measuring, "-o", tmp_path / "own.json", "--builtin-share", 0)
    assert "builtin" not in own["provenance"]["calibration"]
    impossible = run(*command, "-o", tmp_path / "x", "--bpw", "4.01")
    assert impossible.exit_code == 3 and "sensitivity:" not in impossible.stderr, "said before anything is measured"
    taken = run(*command, "-o", out, "--bpw", "5")
    assert taken.exit_code == 1 and "already exists" in taken.stderr and "sensitivity:" not in taken.stderr
    rounding = run(*command[:2], "-o", tmp_path / "x", "--bpw", "5", "--method", "rtn")
    assert rounding.exit_code == 1 and "give them with --sensitivity" in rounding.stderr


def test_a_stopped_job_goes_on_with_the_table_it_measured(
    command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*command, "-o", whole, "--bpw", "5").exit_code == 0

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("qwenq.pipeline.activations.LayerRunner.advance", stop)
        assert run(*command, "-o", out, "--bpw", "5").exit_code == 130
    assert (tmp_path / "out.partial" / SENSITIVITY_NAME).is_file()
    changed = run(*command, "-o", out, "--bpw", "6", "--resume")
    assert changed.exit_code == 1 and "cannot resume" in changed.stderr and "measured," not in changed.stderr
    kept = (tmp_path / "out.partial" / SENSITIVITY_NAME).read_bytes()
    for at in range(40, len(kept), 997):  # a digit changed is a table like any other
        (tmp_path / "out.partial" / SENSITIVITY_NAME).write_bytes(kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :])
        damaged = run(*command, "-o", out, "--bpw", "5", "--resume")
        assert damaged.exit_code == 1 and f"{SENSITIVITY_NAME}: damaged, it is not what the journal" in damaged.stderr
    (tmp_path / "out.partial" / SENSITIVITY_NAME).write_bytes(kept)
    result = run(*command, "-o", out, "--bpw", "5", "--resume")
    assert result.exit_code == 0 and "sensitivity: layer" not in result.stderr
    for name in ("qwenq-recipe.toml", SENSITIVITY_NAME, "config.json", "model-00002-of-00004.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_table_is_one_unit_a_line(table: Sensitivity) -> None:
    lines = encode_sensitivity(table).decode().splitlines()
    assert sum(1 for line in lines if re.match(r'    "\d+\.(qkv|o|gate_up|down)": \{', line)) == 16


def test_zero_points_are_measured_and_used_when_asked_for(
    command: list[object], tmp_path: Path, small: Path
) -> None:
    path, out = tmp_path / "s.json", tmp_path / "out"
    measuring = [w for w in command[1:] if w not in ("--eval-text", command[5], "--eval-samples", 2)]
    made = run("sensitivity", *measuring, "-o", path, "--asymmetric")
    assert made.exit_code == 0, made.stderr
    made_table = read_sensitivity(path)
    kl = made_table.kl
    pairs = [
        (row[s], row[Scheme(s.bits, s.group_size)]) for row in kl.values() for s in row if s is not None and not s.sym
    ]
    assert len(pairs) == len(kl) * 3 and all(0.3 < a / b < 2 for a, b in pairs)

    def labels(*more: object) -> set[str]:
        dry = run("quantize", small, "--bpw", "4.4", "--sensitivity", path, "--dry-run", "--json", *more)
        assert dry.exit_code == 0, dry.stderr
        return {label for row in json.loads(dry.stdout)["recipe"]["layers"] for label in row.values()}

    assert not any(label.endswith("asym") for label in labels("--format", "compressed-tensors"))
    assert any(label.endswith("asym") for label in labels("--format", "compressed-tensors", "--asymmetric"))
    mixed = run("quantize", small, "--bpw", "4.4", "--sensitivity", path, "--dry-run", "--asymmetric")
    assert mixed.exit_code == 2 and "wants --format compressed-tensors" in mixed.stderr.replace("\n", " ")
    symmetric = tmp_path / "symmetric.json"
    rows = {fused: {s: kl for s, kl in row.items() if s is None or s.sym} for fused, row in made_table.kl.items()}
    symmetric.write_bytes(encode_sensitivity(replace(made_table, kl=rows)))
    lacking = run(
        "quantize", small, "--bpw", "4.4", "--sensitivity", symmetric, "--dry-run", "--asymmetric", "--format",
        "compressed-tensors",
    )  # fmt: skip
    assert lacking.exit_code == 1 and "no asymmetric schemes" in lacking.stderr
    result = run(*command, "-o", out, "--bpw", "4.4", "--asymmetric", "--format", "compressed-tensors")
    assert result.exit_code == 0, result.stderr
    assert " asym" in (out / "qwenq-recipe.toml").read_text()


@pytest.mark.parametrize(("row", "said"), [({}, "0.o has no scheme"), ({"16-bit": 0}, "16-bit is not a scheme")])
def test_rows_that_measure_nothing_are_refused(row: dict, said: str, table: Sensitivity, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(
        json.dumps(table.to_json() | {"kl_nats_per_token": table.to_json()["kl_nats_per_token"] | {"0.o": row}})
    )
    with pytest.raises(PlanError, match=said):
        read_sensitivity(path)


def test_fused_groups_that_few_schemes_fit(random_model: Callable[..., Path], calib: Path, tmp_path: Path) -> None:
    """One KV head of 12 rows packs in 8 bits alone; no group divides 100 columns, which are read per channel."""
    model = random_model(num_attention_heads=16, num_key_value_heads=1, head_dim=12, intermediate_size=100)
    path = tmp_path / "s.json"
    made = run("sensitivity", model, "-o", path, "--calibration", calib, "--sequence-length", 64, "-n", 4)
    assert made.exit_code == 0, made.stderr
    assert re.search(r"qkv 8-bit g64 .* o g64 .*down per channel", made.stdout)
    kl = read_sensitivity(path).kl
    qkv, down = kl[0, "qkv"], kl[0, "down"]
    assert list(qkv) == [Scheme(8, 64), Scheme(8, 32)] and list(down) == [Scheme(4, -1)]
    assert 0 < qkv[Scheme(8, 32)] < qkv[Scheme(8, 64)] < 0.1 * down[Scheme(4, -1)]
    asked = ("--bpw", "9", "--sensitivity", path, "--sequence-length", 64)
    layers = answer("quantize", model, *asked, "--dry-run")["recipe"]["layers"]
    chosen = [{name: row[name] for name in ("qkv", "down")} for row in layers]
    assert all(row["down"] == "16-bit" and row["qkv"] in ("8-bit g64", "8-bit g32", "16-bit") for row in chosen)


@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_source_that_changes_meanwhile(step: int, random_model: Callable[..., Path], tmp_path: Path) -> None:
    """A byte changed and put back before the next layer, time and size as they were: forward, backward."""
    source = open_source(random_model())
    path = source.files[1]
    kept, times = path.read_bytes(), os.stat(path)
    told: list[str] = []

    def change(line: str) -> None:
        if len(told) == step:
            path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
            path.write_bytes(kept)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        told.append(line)

    probe = split_windows(TokenWindows(torch.randint(0, 1000, (4, 32)), "ids", {}))
    with pytest.raises(CheckpointError) as caught:
        measure_sensitivity(source, probe, scratch=tmp_path, listen=change)
    assert caught.value.message == f"{path}: changed while it was being read"
    assert step < len(told) <= step + 2


def test_states_that_were_cut_short(tmp_path: Path) -> None:
    with _States(tmp_path) as states:
        first, last = torch.randn(2, 2, 3, 128).bfloat16()
        states.write("probe", first)
        states.write("probe", last)
        assert torch.equal(states.read("probe", 1), last)
        assert os.fstat(states.files["probe"].fileno()).st_size == 1536, "disk is freed layer by layer"
        states.files["probe"].truncate(1000)
        with pytest.raises(JobError, match=r": 1000 bytes from 0 on, wanted 1536$"):
            states.read("probe", 0)


def test_a_process_that_dies_leaves_nothing(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """The system frees what has no name with its process, also after kill -9: so nothing has one at any step."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    seen: list[tuple[list[Path], int]] = []

    def look(line: str) -> None:
        held = {os.path.realpath(f"/proc/self/fd/{handle}") for handle in os.listdir("/proc/self/fd")}
        seen.append((list(scratch.iterdir()), sum(name.startswith(f"{scratch}/") for name in held)))

    probe = split_windows(TokenWindows(torch.randint(0, 1000, (4, 32)), "ids", {}))
    measure_sensitivity(open_source(random_model()), probe, scratch=scratch, listen=look)
    assert [names for names, _ in seen if names] == []
    assert max(held for _, held in seen) == 2, "the states of both token sets are on that disk"


@pytest.mark.parametrize("command", ["quantize", "sensitivity"])
def test_negative_seeds(command: str, tiny: Path, tmp_path: Path) -> None:
    refused = run(command, tiny, "-o", tmp_path / "x", "--seed", -2)
    assert refused.exit_code == 2 and "error: --seed: " in refused.stderr


def test_no_disk_for_the_passes(tiny: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 windows of 256 tokens and 32 of 128, 128 values of 2 bytes, 4 layers: 8.4 MB."""
    probe = split_windows(text_windows(calib, tiny, 256))
    monkeypatch.setattr("qwenq.pipeline.fisher.free_disk", lambda where: 8_000_000)
    with pytest.raises(JobError, match=r"need 8.4 MB of disk"):
        measure_sensitivity(open_source(tiny), probe, scratch=tmp_path)
    assert not list(tmp_path.iterdir())
