"""`qwenq verify --source`: layers made again from the source have the written bytes, and a wrong one is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import answer, forge, run, small_job, text_windows
from safetensors.torch import load_file
from test_faults import FORMATS

from qwenq.checkpoint.manifest import MANIFEST_NAME, read_manifest, verify
from qwenq.checkpoint.reader import open_source
from qwenq.errors import CalibrationError, CheckpointError, JobError, QwenqError
from qwenq.io.tensors import write_shard
from qwenq.pipeline.job import QuantizeJob
from qwenq.pipeline.quantize import quantize
from qwenq.pipeline.reproduce import reproduce, sample
from qwenq.text.calibration import load_windows, with_builtin
from qwenq.text.tokens import ModelTokenizer

Make = Callable[..., Path]


def made_again(out: Path, source: Path, **options: Any) -> Any:
    return reproduce(out, source, read_manifest(out)[0], **options)


def calibrated(source: Path, out: Path, calib: Path, **changes: Any) -> Path:
    quantize(small_job(source, out, calibration=text_windows(calib, source, 32, 6), **changes))
    return out


def test_a_padded_checkpoint_is_made_from_the_padded_source(tiny: Path, tmp_path: Path) -> None:
    job = small_job(tiny, tmp_path / "out", calibration=None, method="rtn")
    quantize(replace(job, source=open_source(tiny).padded(512)))
    assert made_again(tmp_path / "out", tiny) == ((0, 2, 3), [])
    assert made_again(tmp_path / "out", tiny, layers=[2]) == ((2,), [])


@pytest.fixture
def four_layers(random_model: Make) -> Path:
    """Of a smaller model than the trained one."""
    return random_model(num_hidden_layers=4, hidden_size=32, intermediate_size=64)


def test_sample() -> None:
    assert [sample(n) for n in (1, 2, 3, 80)] == [(0,), (0, 1), (0, 1, 2), (0, 40, 79)]


@pytest.mark.parametrize("kind", [*FORMATS, "rtn"])
def test_layers_made_again_are_the_written_ones(kind: str, four_layers: Path, calib: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"recipe": FORMATS[kind]} if kind in FORMATS else {}
    if kind == "rtn":
        changes = {"method": "rtn", "calibration": None}
    elif not kind.startswith("bnb"):
        spec = open_source(four_layers).spec
        changes["calibration"] = load_windows(
            str(calib), ModelTokenizer(four_layers), spec, length=32, count=6, seed=0, up_to=None
        )
    else:
        changes["calibration"] = None
    quantize(small_job(four_layers, tmp_path / "out", **changes))
    assert made_again(tmp_path / "out", four_layers, calibration=str(calib)) == ((0, 2, 3), [])


def test_windows_of_the_builtin_set_are_found_again(four_layers: Path, calib: Path, tmp_path: Path) -> None:
    spec, tokenizer = open_source(four_layers).spec, ModelTokenizer(four_layers)
    own = load_windows(str(calib), tokenizer, spec, length=32, count=6, seed=0)
    windows = with_builtin(own, 2, tokenizer, spec, seed=0)
    assert windows.sha256 != own.sha256
    quantize(small_job(four_layers, tmp_path / "out", calibration=windows))
    assert made_again(tmp_path / "out", four_layers, calibration=str(calib), layers=[0]) == ((0,), [])
    manifest = read_manifest(tmp_path / "out")[0]
    forgeries = [{"builtin": {"windows": windows}} for windows in (-1, 7, "2", None)] + [{"window_tokens": -1}]
    for forged in forgeries:
        job = manifest["job"] | {"calibration": manifest["job"]["calibration"] | forged}
        with pytest.raises(CheckpointError, match="does not say which text was read"):
            reproduce(tmp_path / "out", four_layers, manifest | {"job": job}, calibration=str(calib))


def test_a_forged_layer_is_named(tiny: Path, tmp_path: Path) -> None:
    """One code of layer 1 changed, and every hash of the manifest made right again: only making it again shows it."""
    out = tmp_path / "out"
    quantize(small_job(tiny, out, method="rtn", calibration=None))
    name = "model-00003-of-00006.safetensors"
    tensors = load_file(out / name)
    tensors["model.layers.1.mlp.up_proj.qweight"][3, 5] ^= 1
    digest = write_shard(out / name, tensors)
    forge(out, lambda manifest: manifest["files"].update({name: digest}))
    assert verify(out, tiny).findings == ()
    assert made_again(out, tiny, layers=[0, 2])[1] == []
    (finding,) = made_again(out, tiny, layers=range(4))[1]
    assert finding.file == name
    assert finding.problem.startswith("layer 1, recomputed, differs in 1 of ")
    assert finding.problem.endswith(" bytes, first in model.layers.1.mlp.up_proj.qweight")


def test_the_same_bytes_as_another_dtype_are_another_layer(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(small_job(tiny, out, method="rtn", calibration=None))
    path, name = out / "model-00003-of-00006.safetensors", "model.layers.1.input_layernorm.weight"
    tensors = load_file(path)
    assert tensors[name].dtype == torch.float16
    write_shard(path, tensors | {name: tensors[name].view(torch.bfloat16)})
    (finding,) = made_again(out, tiny, layers=[1])[1]
    assert finding.problem.startswith(
        f"layer 1, recomputed, has {name} as [128] torch.float16, written is [128] torch.bfloat16"
    )


def test_what_cannot_be_made_again_says_why(four_layers: Path, calib: Path, heldout: Path, tmp_path: Path) -> None:
    out = calibrated(four_layers, tmp_path / "out", calib)
    with pytest.raises(CalibrationError, match=r"calibrated on 'calib.txt', a file whose path is not known") as caught:
        made_again(out, four_layers)
    assert caught.value.hint == "pass it with --calibration FILE"
    with pytest.raises(CalibrationError, match="gives other tokens than those that were calibrated on"):
        made_again(out, four_layers, calibration=str(heldout))
    with pytest.raises(JobError, match="the model has layers 0 to 3"):
        made_again(out, four_layers, layers=[4])


def test_a_forged_job_is_refused_in_one_line(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever changes a manifest can make its digests right too."""
    out, linear = tmp_path / "out", "model.layers.0.mlp.up_proj"
    quantize(small_job(tiny, out, method="rtn", calibration=None))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    manifest = read_manifest(out)[0]
    unread = "its job cannot be read"
    for key, value, said in (
        ("scheme", {"bits": 3}, unread),
        ("scheme", {"bits": 4.0, "group_size": 32}, unread),
        ("scheme", {"bits": 4, "group_size": 32.0}, unread),
        ("overrides", {linear: {"bits": 4, "group_size": 32, "sym": []}}, unread),
        ("overrides", 3, unread),
        ("options", {"x": 1}, unread),
        ("dtype", "float8", unread),
        ("seed", "0", unread),
        ("files", [[]], unread),
        ("intermediate_size", 10**9, "intermediate_size is 1e+09, more than any model has"),
        ("device", "cuda", "made on cuda, which is not here"),
    ):
        with pytest.raises(QwenqError) as caught:
            reproduce(out, tiny, manifest | {"job": manifest["job"] | {key: value}})
        assert caught.value.message.startswith(f"{MANIFEST_NAME}: {said}"), (key, value)


def test_threads_are_set_as_they_were(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    quantize(small_job(tiny, out, method="rtn", calibration=None))
    manifest = read_manifest(out)[0]
    manifest["job"]["numerics"]["threads"] = 2
    seen: list[int] = []
    reproduce(out, tiny, manifest, [0], listen=lambda line: seen.append(torch.get_num_threads()))
    assert seen == [2] and torch.get_num_threads() == 1

    def without_memory(*operands: Any) -> None:
        seen.append(torch.get_num_threads())
        raise MemoryError

    monkeypatch.setattr(QuantizeJob, "workers", without_memory)
    with pytest.raises(MemoryError):
        reproduce(out, tiny, manifest, [0])
    assert seen == [2, 2] and torch.get_num_threads() == 1


def test_the_command(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(small_job(tiny, out, method="rtn", calibration=None))
    words = ["verify", str(out), "--source", str(tiny)]
    good = run(*words, "--layers", "1")
    assert good.exit_code == 0 and "layer 1 recomputed, all matching the manifest" in good.stdout
    assert run(*words, "--layers", "x").exit_code == 2
    asked = answer(*words, "--all-layers")
    assert asked["ok"] and asked["layers_made_again"] == [0, 1, 2, 3]
    assert asked["layers_not_made_again"] == []
    none = answer(*words, "--layers", "none")
    assert none["layers_made_again"] == [] and none["layers_not_made_again"] == [0, 1, 2, 3]
    assert "not recomputed: layers 0, 2 to 3 (--all-layers recomputes every layer)" in good.stdout
