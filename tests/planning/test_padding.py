"""`--pad-for-tp`: a wider FFN of the same function, streamed, resumed, and read back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwenq.checkpoint.reader import open_checkpoint, open_source
from qwenq.formats.base import Recipe, Scheme
from qwenq.model.layer import Network
from qwenq.pipeline.evaluate import evaluate
from qwenq.pipeline.quantize import quantize
from qwenq.solver.equalize import channel_scales
from tests.conftest import answer, run, small_job, text_windows


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_a_padded_layer_computes_the_same(model_type: str, random_model: Callable[..., Path]) -> None:
    bias = {"mlp_bias": True} if model_type == "llama" else {}
    narrow = open_source(random_model(model_type=model_type, dtype=torch.float32, **bias))
    wide = narrow.padded(128)
    assert wide.config["intermediate_size"] == 128 and narrow.config["intermediate_size"] == 96
    h = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    out = []
    for source in (narrow, wide):
        network = Network(source.config, source.spec, dtype=torch.float32)
        network.fill(source.layer_state(1))
        out.append(network.forward(h))
    assert torch.allclose(*out, rtol=1e-6, atol=1e-6)
    state = wide.layer_state(1)
    assert state["mlp.up_proj.weight"].shape == (128, 64) and not state["mlp.up_proj.weight"][96:].any()
    assert state["mlp.down_proj.weight"].shape == (64, 128) and not state["mlp.down_proj.weight"][:, 96:].any()


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_padded_checkpoint_is_the_unpadded_one(
    method: str, tiny: Path, calib: Path, heldout: Path, tmp_path: Path
) -> None:
    """Rounded to nearest, logits are equal. GPTQ's first layer has equal codes, folded and corrected; after that

    sums over more columns are rounded in another way, and one code that falls otherwise moves those that follow.
    """
    texts = {"calibration": text_windows(calib, tiny, 128, 12), "evaluation": text_windows(heldout, tiny, 128, 2)}
    options = {"recipe": Recipe(Scheme(4, 128)), "method": method} | texts
    if method == "rtn":
        options["calibration"] = None
    plain = quantize(small_job(tiny, tmp_path / "plain", **options))
    padded = quantize(replace(small_job(tiny, tmp_path / "padded", **options), source=open_source(tiny).padded(512)))
    narrow, wide = open_checkpoint(tmp_path / "plain"), open_checkpoint(tmp_path / "padded")
    assert wide.spec.intermediate_size == 512
    drift = evaluate(wide, narrow, texts["evaluation"])
    if method == "rtn":
        assert drift.kl.mean < 1e-9 and drift.top1_agreement.mean == 1
    assert padded.drift.kl.mean == pytest.approx(plain.drift.kl.mean, rel=0.1)
    for lin in narrow.spec.layer_linears(0):
        ours = wide.linear_weight(lin)
        if lin.stage in ("gate_up", "down"):
            rows, columns = (384, 128) if lin.stage == "gate_up" else (128, 384)
            assert not ours[rows:].any() and not ours[:, columns:].any()
            ours = ours[:rows, :columns]
        assert float((ours == narrow.linear_weight(lin)).float().mean()) > 0.999, lin.name


def test_the_command_pads_resumes_and_refuses(
    random_model: Callable[..., Path], calib: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = random_model(), tmp_path / "out"
    command = ["quantize", model, "-o", out, "--group-size", 32, "--pad-for-tp", 2, "--calibration", calib,
               "--eval-text", heldout, "-n", 4, "--eval-samples", 1, "--sequence-length", 64]  # fmt: skip
    dry = answer(*command, "--dry-run")
    assert dry["tensor_parallel"]["2"] == "" and dry["source_tensor_bytes"] == sum(
        t.spec.nbytes for t in open_source(model).tensors.values()
    )

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("qwenq.pipeline.quantize._Run._drift", stop)
        assert run(*command).exit_code == 130
    changed = run(*[a for a in command if a not in ("--pad-for-tp", 2)], "--resume")
    assert changed.exit_code == 1 and "intermediate_size was 128, now 96" in changed.stderr
    assert answer(*command, "--resume")["file_bytes"] == dry["file_bytes"]
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 128
    inspected = answer("inspect", out)
    assert inspected["tensor_parallel"]["2"] == "" and inspected["disagreements"] == []
    refused = run("quantize", model, "--group-size", 32, "--pad-for-tp", 3, "--dry-run")
    assert refused.exit_code == 1 and "4 heads are not divisible by 3" in refused.stderr


def test_a_mixed_recipe_for_tensor_parallel_splits_no_group() -> None:
    result = run("quantize", "Qwen2.5-72B", "--target-size", "47GB", "--pad-for-tp", 8, "--dry-run", "--json")
    found = json.loads(result.stdout)
    assert set(found["tensor_parallel"].values()) == {""} and 46.7e9 <= found["file_bytes"] <= 47e9


def test_plan_says_which_sizes_work() -> None:
    result = run("plan", "Qwen2.5-72B", "--gpu", "2x RTX 3090", "--json")
    sizes = json.loads(result.stdout)["tensor_parallel"]
    assert sizes["1"] == "" and "is not a multiple of the group size 128" in sizes["2"]
    shown = run("plan", "Qwen2.5-72B", "--gpu", "2x RTX 3090").stdout
    assert "tensor-parallel sizes of these weights:\n  1: yes\n  2, 4, 8: FFN width 29568 is not a multiple" in shown
    assert "--pad-for-tp 8 (29696) allows all" in shown


def test_padding_has_no_say_in_channel_scales() -> None:
    power, moment = torch.rand(24) + 0.1, torch.rand(24) + 0.1
    padded = channel_scales(*(torch.cat([x, torch.zeros(8)]) for x in (power, moment)))
    assert torch.allclose(padded[:24], channel_scales(power, moment)) and torch.equal(padded[24:], torch.ones(8))


def test_pad_model_refuses_norms_of_heads(tmp_path: Path) -> None:
    """benchmarks/pad_model.py would scale Qwen3's norms of single heads like those of the residual stream."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    script = Path(__file__).parents[2] / "benchmarks" / "pad_model.py"
    words = [sys.executable, str(script), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"error: {tmp_path} is a qwen3 model, wanted qwen2 or llama\n"
    assert not (tmp_path / "out").exists()
