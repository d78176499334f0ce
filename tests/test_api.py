"""The Python API: the examples of docs/api.md, what it agrees on with the command line, and what it imports."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import qwenq
import qwenq.api
from qwenq.checkpoint.manifest import current_names
from qwenq.errors import CheckpointError, UsageError
from qwenq.pipeline.config import EvaluateConfig, QuantizeConfig
from qwenq.pipeline.ranks import Ranks
from qwenq.planning.questions import Question
from qwenq.results import BlockResult
from tests.conftest import answer, rewrite

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def here(two_layers: Path, calib: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a tiny model of two layers and two texts in it."""
    shutil.copytree(two_layers, tmp_path / "my-model")
    shutil.copy(calib, tmp_path / "calib.txt")
    shutil.copy(heldout, tmp_path / "heldout.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "api.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), scope)
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    assert scope["made"].drift.kl.mean < 0.2 and scope["checked"].layers_made_again == (0,)
    assert scope["checked"].findings == () and scope["same"].format == "compressed-tensors"
    assert scope["drift"].windows == 4 and scope["mixed"].bits_per_linear_weight <= 5
    assert scope["answer"].timing.new_tokens == 8 and scope["plan"].fits
    assert "layer 1: " in said.out and "Qwen2.5-71B" in said.out


def test_names() -> None:
    assert set(qwenq.__all__) == {*qwenq.api.__all__, "QwenqError"}
    assert set(qwenq.__all__) <= set(dir(qwenq))
    for name in qwenq.api.__all__:
        assert getattr(qwenq, name) is getattr(qwenq.api, name) and getattr(qwenq, name).__doc__
    with pytest.raises(AttributeError):
        qwenq.nothing  # noqa: B018
    assert (Path(qwenq.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize(
    ("options", "kind", "apart"),
    [
        (qwenq.api.QuantizeOptions, QuantizeConfig, set()),
        (qwenq.api.EvaluateOptions, EvaluateConfig, set()),
        (qwenq.api.PlanOptions, Question, {"model", "gpu", "rig"}),
    ],
)
def test_options_by_name_are_those_of_the_object(options: Any, kind: Any, apart: set[str]) -> None:
    wanted = {field.name: get_type_hints(kind)[field.name] for field in fields(kind) if field.name not in apart}
    assert get_type_hints(options) == wanted


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, qwenq\n"
        "assert qwenq.estimate('Qwen2.5-72B', gpu='2x RTX 3090', context=[1024, '8k']).estimates[1].gpus[1].fits\n"
        "qwenq.plan('Qwen2.5-7B', gpu='RTX 3090'); qwenq.recommend('Qwen2.5-7B'); qwenq.inspect('Qwen2.5-72B')\n"
        "qwenq.dry_run('Qwen2.5-72B', bits=4)\n"
        "assert not {'torch', 'transformers', 'numpy', 'typer', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_same_answers_as_the_command_line(here: Path) -> None:
    def as_read(value: Any) -> Any:
        return json.loads(json.dumps(value)) | {"disk_free_bytes": None}

    def said(*words: str) -> Any:
        return as_read(answer(*words))

    rig = "2x RTX 3090"
    words = ("--gpu", rig, "--kv-cache-dtype", "fp8")
    spread = qwenq.estimate("Qwen2.5-72B", rig, "1k,8k", kv_cache_dtype="fp8")
    assert as_read(spread.to_json()) == said("vram", "Qwen2.5-72B", *words, "-c", "1k,8k")
    plan = said("plan", "Qwen2.5-32B", *words, "-c", "16k")
    del plan["flags"]
    assert as_read(qwenq.plan("Qwen2.5-32B", rig, 16384, kv_cache_dtype="fp8").to_json()) == plan
    assert as_read(qwenq.inspect("Qwen2.5-72B").to_json()) == said("inspect", "Qwen2.5-72B")
    dry = ("quantize", "my-model", "--dry-run", "--target-size", "1.1MB", "--calibration", "calib.txt")
    made = qwenq.dry_run("my-model", target_size="1.1MB", calibration="calib.txt").to_json()
    assert as_read(made) == said(*dry)


def test_what_is_left_out_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the work begins; ranks get to each of its steps."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(here / "my-model", lambda tensors: tensors.update({name: torch.ones(16)}))
    told: list[str] = []
    reached: list[bool] = []
    ranks = Ranks()
    for step in ("qwenq.pipeline.prepare.prepare", "qwenq.pipeline.quantize.quantize"):
        place, _, call = step.rpartition(".")
        whole = getattr(importlib.import_module(place), call)

        def noted(*given: Any, whole: Any = whole, **options: Any) -> Any:
            reached.append(options["ranks"] is ranks)
            return whole(*given, **options)

        monkeypatch.setattr(step, noted)
    texts: dict[str, Any] = {"eval_text": "heldout.txt", "sequence_length": 64, "eval_samples": 1}
    qwenq.quantize("my-model", "out", method="rtn", group_size=32, **texts, warn=told.append, ranks=ranks)
    assert told == [f"{name}: stored but not used by the model, left out"] and reached == [True, True]


def test_progress_and_refusals(here: Path) -> None:
    events: list[Any] = []
    texts: dict[str, Any] = {"eval_text": "heldout.txt", "sequence_length": 64}
    qwenq.quantize("my-model", "out", method="rtn", group_size=32, **texts, progress=events.append)
    assert [event.layer for event in events if isinstance(event, BlockResult)] == [0, 1]
    assert "hashing the source" in events
    steps: list[tuple[int, int]] = []
    qwenq.evaluate(
        "out", "my-model", text="heldout.txt", num_samples=2, progress=lambda *step: steps.append(step)
    )
    assert steps == [(1, 2), (2, 2)]
    with pytest.raises(UsageError, match="--bits and --bpw exclude each other"):
        qwenq.quantize("my-model", "again", bits=4, bpw="5")
    with pytest.raises(UsageError, match="--error-correction 2: wanted 0 to 1"):
        qwenq.dry_run("Qwen2.5-72B", error_correction=2)
    for rounded in ({"method": "rtn"}, {"format": "bnb-int8"}):
        for call in (qwenq.quantize, qwenq.dry_run):
            with pytest.raises(UsageError, match=r"^--error-correction is read from calibration: rounding"):
                call("owner/never-fetched", "again", error_correction=0.0, **rounded)
            for config, options in ((None, {"sink_weight": 64.0}), (QuantizeConfig(sink_weight=32), {})):
                with pytest.raises(UsageError, match=r"^--sink-weight weighs tokens of calibration: rounding"):
                    call("owner/never-fetched", "again", config, **rounded, **options)
    with pytest.raises(UsageError, match="layers is 'some'"):
        qwenq.verify("out", "my-model", layers="some")
    with pytest.raises(CheckpointError, match="no such directory"):
        qwenq.verify("nowhere")
    for name, value in (("layers", [0]), ("layers", "all"), ("calibration", "x")):
        with pytest.raises(UsageError, match=f"^{name} goes with source"):
            qwenq.verify("out", **{name: value})  # type: ignore[arg-type]
    assert qwenq.verify("out", layers=[]).findings == ()
    assert qwenq.verify("out", "my-model", layers=[]).layers_made_again == ()
    with pytest.raises(UsageError, match="--kv-cache-dtype q8: wanted auto"):
        qwenq.load("owner/never-fetched", kv_cache_dtype="q8")
    with pytest.raises(TypeError, match="no option kv_dtype, max_len"):
        qwenq.load("out", max_len=64, kv_dtype="fp8")  # type: ignore[call-arg]
    loaded = qwenq.load("out", max_model_len=64)
    loaded.close()
    with pytest.raises(UsageError, match="closed"):
        loaded.generate("The sea")


# ---------------------------------------------------------------------- the configuration


def test_a_configuration_survives_json() -> None:
    config = QuantizeConfig(
        target_size="47GB", sensitivity=Path("s.json"), error_correction=0.5, damp_percent=0.1, fold=False, seed=3
    )
    kept = json.loads(json.dumps(config.to_json()))
    assert QuantizeConfig.from_json(kept) == config
    assert set(kept) == {field.name for field in fields(QuantizeConfig)}
    for wrong in ({"bitz": 4}, {"bits": "4"}, {"bits": True}, {"fold": 1}, {"seed": None}):
        with pytest.raises(TypeError):
            QuantizeConfig.from_json(wrong)


def test_old_names_are_read() -> None:
    assert QuantizeConfig.from_json({"pull": 0.5, "pull_share": 1.0}) == QuantizeConfig(
        error_correction=0.5, error_correction_share=1.0
    )
    old = {
        "options": {"method": "gptq", "damp_percent": 0.02, "fold": True, "pull": 1.0, "pull_share": 0.5},
        "format": "gptq", "device": "cpu", "compute_dtype": "float32", "calibration_dtype": "bfloat16",
        "dtype": "auto", "seed": 0, "model": "m",
    }  # fmt: skip
    config = QuantizeConfig.from_manifest(old)
    assert (config.error_correction, config.error_correction_share, config.calibration_dtype) == (1.0, 0.5, "bfloat16")
    assert config == QuantizeConfig.from_manifest(current_names(old))
    assert current_names(old)["options"] == {
        "method": "gptq", "damp_percent": 0.02, "fold": True, "error_correction": 1.0, "error_correction_share": 0.5,
        "sink_weight": 1.0, "rotate": False,
    }  # fmt: skip
    for broken in (old | {"seed": "0"}, old | {"options": {"sweeps": 1}}, old | {"compute_dtype": "float8"}, {}):
        with pytest.raises(CheckpointError, match="its job cannot be read"):
            QuantizeConfig.from_manifest(broken)
