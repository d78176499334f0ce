"""What a job says at its start about the texts that it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwenq import api
from qwenq.pipeline import config, fisher
from qwenq.pipeline.config import QuantizeConfig
from qwenq.pipeline.prepare import prepare
from qwenq.pipeline.quantize import quantize
from qwenq.text import calibration
from qwenq.text.tokens import TooShort


def test_windows_that_the_builtin_set_lacks_are_told(
    tiny: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = QuantizeConfig(
        device="cpu", calibration=str(calib), sequence_length=64, num_samples=16, eval_samples=2,
        error_correction_share=1.0,
    )  # fmt: skip

    def notes(**options: Any) -> list[str]:
        job = prepare(tiny, tmp_path / "out", replace(plain, **options)).job
        return [note for note in job.notes if "built-in" in note]

    assert notes() == notes(builtin_share=0.0) == notes(builtin_share=1.0) == notes(calibration="builtin") == []
    real = calibration.load_windows

    def few(name: str, *given: Any, length: int, **asked: Any) -> Any:
        if name == "builtin" and length == 32:
            raise TooShort("builtin: shorter than one window")
        return real(name, *given, length=length, **(asked | ({"count": 2} if name == "builtin" else {})))

    monkeypatch.setattr(calibration, "load_windows", few)
    assert notes() == ["2 of 3 windows asked of the built-in set: it has no more of 64 tokens"]
    short = notes(builtin_share=0.5, sequence_length=32)
    assert short == ["0 of 8 windows asked of the built-in set: it has no more of 32 tokens"]
    told: list[str] = []
    monkeypatch.setattr(fisher, "measure_sensitivity", lambda *_, **__: "measured")
    assert api.sensitivity(tiny, config=replace(plain, builtin_share=0.5, sequence_length=32), warn=told.append)
    assert told[-1:] == short, "sensitivities too"
    assert notes(builtin_share=0.125) == []


def test_the_divergence_of_few_bits_is_computed_in_bfloat16(
    tiny: Path, calib: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a CPU has instructions for it; `eval` of the checkpoint then comes to the same figures."""

    def job(**options: Any) -> Any:
        read = {"calibration": str(calib), "eval_text": str(heldout), "sequence_length": 64, "num_samples": 4}
        options = {"eval_samples": 3, "device": "cpu", "calibration_dtype": "float32"} | read | options
        return prepare(tiny, tmp_path / "out", QuantizeConfig(**options)).job

    monkeypatch.setattr(config, "has_bfloat16", lambda: False)
    assert job(bits=4, group_size=32).config.compute_dtype == "float32"
    monkeypatch.setattr(config, "has_bfloat16", lambda: True)
    assert job(bits=8, group_size=32).config.compute_dtype == "float32"
    assert job(format="gguf", gguf_type="Q5_0").config.compute_dtype == "float32"
    assert job(format="gguf", gguf_type="Q4_0").config.compute_dtype == "bfloat16"
    assert job(bits=4, group_size=32, compute_dtype="float32").config.compute_dtype == "float32"
    drift = quantize(job(bits=4, group_size=32)).drift
    assert drift.compute_dtype == "bfloat16" and 0 < 2 * drift.noise_floor_kl < 0.1 * drift.kl.mean
    read: Any = {"text": str(heldout), "sequence_length": 64, "num_samples": 3, "device": "cpu"}
    assert api.evaluate(tmp_path / "out", tiny, **read) == drift
    for exact in (  # what may be far smaller, and what is read elsewhere
        api.evaluate(tmp_path / "out", tmp_path / "out", **read),
        api.evaluate(tmp_path / "out", tiny, save_reference_logits=tmp_path / "logits", **read | {"num_samples": 5}),
    ):
        assert exact.compute_dtype == "float32" and exact.noise_floor_kl == 0


@pytest.mark.parametrize("rest", ["4-bit g32", "8-bit g32"])
def test_a_recipes_divergence_is_computed_as_eval_would(
    rest: str, tiny: Path, calib: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "has_bfloat16", lambda: True)
    recipe = tmp_path / "recipe.toml"
    units = f'qkv = "4-bit g32", o = "4-bit g32", gate_up = "4-bit g32", down = "{rest}"'
    layers = "".join(f"{k} = {{ {units} }}\n" for k in range(4))
    recipe.write_text(f'version = 1\nmodel = "tiny-qwen2"\n[layer]\n{layers}')
    job = prepare(tiny, tmp_path / "out", QuantizeConfig(
        device="cpu", recipe=recipe, calibration=str(calib), eval_text=str(heldout), sequence_length=64, num_samples=4,
        eval_samples=3, calibration_dtype="float32",
    )).job  # fmt: skip
    drift = quantize(job).drift
    assert drift.compute_dtype == ("bfloat16" if rest == "4-bit g32" else "float32")
    again = api.evaluate(tmp_path / "out", tiny, text=str(heldout), sequence_length=64, num_samples=3, device="cpu")
    assert again == drift
