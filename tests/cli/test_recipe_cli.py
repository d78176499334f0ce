"""`qwenq quantize` with a budget or a recipe, from the outside."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from qwenq.errors import PlanError
from qwenq.planning.recipefile import RECIPE_NAME
from qwenq.planning.rig import Rig, parse_rig
from tests.conftest import answer, run


def test_the_47_gb_variant(tmp_path: Path) -> None:
    saved = tmp_path / "r.toml"
    result = run("quantize", "Qwen2.5-72B", "--target-size", "47GB", "--dry-run", "--json", "--save-recipe", saved)
    assert result.exit_code == 0 and result.stderr == ""
    found = json.loads(result.stdout)
    assert 46_700_000_000 <= found["file_bytes"] <= 47_000_000_000
    assert found["recipe"]["file_bytes"] == found["file_bytes"]
    assert found["recipe"]["predicted_kl"] > 0 and "not measured" in found["recipe"]["sensitivity"]
    assert len(found["recipe"]["layers"]) == 80
    kept = answer("quantize", "Qwen2.5-72B", "--recipe", saved, "--dry-run")
    assert kept["file_bytes"] == found["file_bytes"] and kept["recipe"]["layers"] == found["recipe"]["layers"]
    assert kept["recipe"]["predicted_kl"] == pytest.approx(found["recipe"]["predicted_kl"])
    assert run("quantize", "Qwen2.5-72B", "--recipe", saved, "--dry-run", "--save-recipe", saved).exit_code == 1


def test_a_dry_run_prints_recipe_and_prediction() -> None:
    result = run("quantize", "Qwen2.5-7B", "--bpw", "5.0", "--dry-run")
    assert result.exit_code == 0
    assert re.search(r"recipe: \d\.\d\d GB, (4\.99\d|5\.000) bits per linear weight", result.stdout)
    assert "predicted KL 0." in result.stdout
    assert "a prior by kind and depth, not measured on this model" in result.stdout
    assert re.search(r"│ \d+(-\d+)? *│ \S+-bit", result.stdout)


def test_a_rig_is_a_budget() -> None:
    result = run("quantize", "Qwen2.5-7B", "--fit", "RTX 3060 12GB", "--context", "16k", "--dry-run", "--json")
    assert result.exit_code == 0 and 5e9 < json.loads(result.stdout)["file_bytes"] < 12.9e9
    for model, rig in (("Qwen2.5-72B", "RTX 3060 12GB"), ("Qwen2.5-7B", "2x RTX 3090")):
        refused = run("quantize", model, "--fit", rig, "--dry-run")
        assert refused.exit_code == 3 and refused.stdout == "" and refused.stderr.count("\n") == 2


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [("--target-size", "41GB", 3), ("--target-size", "200GB", 3), ("--bpw", "4.1", 3), ("--bpw", "16", 3),
     ("--bpw", "many", 2), ("--target-size", "47 apples", 2), ("--recipe", "none.toml", 1)],
)  # fmt: skip
def test_impossible_targets(option: str, value: str, code: int) -> None:
    result = run("quantize", "Qwen2.5-72B", option, value, "--dry-run")
    assert result.exit_code == code and result.stdout == ""
    assert re.fullmatch(r"error: .*\nhint: .*\n", result.stderr)
    if code == 3:
        assert "reachable: " in result.stderr


def test_a_recipe_is_followed_and_kept(tmp_path: Path, two_layers: Path, calib: Path, heldout: Path) -> None:
    """Dry run, edited recipe, quantization: sizes agree to the byte, and the checkpoint says what it was made by."""
    recipe, out = tmp_path / "r.toml", tmp_path / "out"
    dry = run("quantize", two_layers, "--bpw", "5", "--dry-run", "--json", "--save-recipe", recipe)
    assert dry.exit_code == 0
    lines = recipe.read_text().splitlines()
    row = next(n for n, line in enumerate(lines) if line.startswith("1 "))
    lines[row] = '1 = { qkv = "16-bit", o = "8-bit g32", gate_up = "4-bit per channel", down = "4-bit g64" }'
    recipe.write_text("\n".join(lines) + "\n")
    edited = answer("quantize", two_layers, "--recipe", recipe, "--dry-run")
    texts = ("--calibration", calib, "--eval-text", heldout, "-n", 4, "--eval-samples", 2, "--sequence-length", 64)
    made = answer("quantize", two_layers, "-o", out, "--recipe", recipe, *texts)
    assert made["file_bytes"] == edited["file_bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert made["bits_per_linear_weight"] == edited["bits_per_linear_weight"]
    schemes = {r["name"]: r["scheme"] for block in made["layers"] for r in block["linears"]}
    assert schemes["model.layers.1.mlp.up_proj"] == "4-bit per channel"
    assert "model.layers.1.self_attn.q_proj" not in schemes
    kept = tomllib.loads((out / RECIPE_NAME).read_text())
    written = {"qkv": "16-bit", "o": "8-bit g32", "gate_up": "4-bit per channel", "down": "4-bit g64"}
    assert kept["layer"]["1"] == written
    assert RECIPE_NAME in json.loads((out / "qwenq-manifest.json").read_text())["files"]
    checked = run("eval", out, "--reference", two_layers, "--text", heldout, "-n", 2, "--sequence-length", 64, "--json")
    assert json.loads(checked.stdout)["kl"]["mean"] == pytest.approx(made["drift"]["kl"]["mean"], rel=1e-3)


@pytest.mark.parametrize("bits", ["7.4", "7.9", "8.4"])
def test_a_target_that_is_met_exactly(bits: str) -> None:
    """The recipe has just so many bits: 7.4 as a binary fraction is a little more than 7.4."""
    recipe = answer("quantize", "Qwen2.5-0.5B", "--bpw", bits, "--dry-run")["recipe"]
    assert recipe["bits_per_linear_weight"] <= float(bits) + 1e-12


def test_the_range_that_is_named_can_be_had() -> None:
    low = run("quantize", "Qwen2.5-72B", "--bpw", "4.01", "--dry-run")
    assert low.exit_code == 3
    named = re.search(r"reachable: ([\d.]+) to", low.stderr)[1]  # type: ignore[index]
    assert run("quantize", "Qwen2.5-72B", "--bpw", named, "--dry-run").exit_code == 0


def test_bits_of_a_gguf_file_count_embedding_and_head() -> None:
    """And the table says both figures, for that of the linears alone may be above the budget."""
    found = run("quantize", "Qwen2.5-7B", "--format", "gguf", "--bpw", "4.5", "--dry-run")
    assert found.exit_code == 0, found.output
    alone, both = re.search(  # type: ignore[union-attr]
        r"recipe: 4\.\d\d GB, ([\d.]+) bits per linear weight, ([\d.]+) with embedding and head", found.stdout
    ).groups()
    assert 4.49 < float(both) <= 4.5 < float(alone)
    low = run("quantize", "Qwen2.5-7B", "--format", "gguf", "--bpw", "2", "--dry-run")
    assert low.exit_code == 3 and "2 bits per weight, embedding and head included, are out of reach" in low.stderr


def test_zero_points_come_back_in_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    words = ["quantize", "Qwen2.5-72B", "--dry-run", "--json", "--format", "compressed-tensors"]
    written = run(*words, "--bpw", "4.5", "--asymmetric", "--save-recipe", path)
    assert written.exit_code == 0, written.output
    assert " asym" in path.read_text().split("[layer]")[1]
    again = run(*words, "--recipe", path)
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["recipe"]["layers"] == json.loads(written.stdout)["recipe"]["layers"]
    refused = run("quantize", "Qwen2.5-72B", "--dry-run", "--recipe", path)
    assert refused.exit_code == 1 and "is not offered in mixed gptq checkpoints" in refused.stderr


def test_the_dry_run_counts_what_the_job_reads() -> None:
    """Eight bits alone are not pulled, rounding reads no calibration text: fewer hidden states."""

    def states(*options: str) -> int:
        result = run("quantize", "Qwen2.5-0.5B", "--dry-run", "--json", "--compute-dtype", "float32", *options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["state_bytes"]

    width, calibration, evaluation = 896, 128 * 512, 20 * 512
    drift = 2 * evaluation * 4 * width
    two = 2 if states("--bits", "4") < 2 * (drift + calibration * 6 * width) else 4  # bfloat16 where the CPU has it
    assert states("--bits", "8") == 2 * (drift + calibration * two * width) == states("--bits", "4", "--pull", "0")
    assert states("--bits", "4") == 2 * (drift + (calibration + 76 * 512) * two * width)
    assert states("--bits", "4", "--pull-share", "1") == 2 * (drift + calibration * 2 * two * width)
    assert states("--bits", "4", "--method", "rtn") == 2 * drift == states("--format", "bnb-nf4")


@pytest.mark.parametrize(("gpus", "device"), [(2, "cuda"), (0, "cpu")])
def test_the_dry_run_says_what_it_counts_on(gpus: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's answer (what CUDA_VISIBLE_DEVICES leaves); on a GPU part of the peak is there."""

    def rig() -> Rig:
        if not gpus:
            raise PlanError("the NVIDIA driver sees no GPU")
        return parse_rig(f"{gpus}x RTX 3090")

    monkeypatch.setattr("qwenq.planning.rig.detect_rig", rig)
    result = run("quantize", "Qwen2.5-0.5B", "--dry-run", "--json")
    found = json.loads(result.stdout)
    assert found["device"] == device and (found["peak_vram_bytes"] > 0) == (device == "cuda")
    table = run("quantize", "Qwen2.5-0.5B", "--dry-run").stdout
    assert f"; on {device}" in table and ("peak memory of a GPU" in table) == (device == "cuda")


def test_a_dry_run_refuses_a_device_that_is_none() -> None:
    refused = run("quantize", "Qwen2.5-0.5B", "--dry-run", "--device", "cdua:0")
    assert refused.exit_code == 2
    assert refused.stderr == "error: --device cdua:0: wanted auto, cpu, cuda:N or cuda:N,cuda:M\n"
