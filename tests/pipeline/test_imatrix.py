"""Importance matrices: the sums of squared inputs that transformers' own model gives, in llama.cpp's file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import small_job, text_windows
from transformers import AutoModelForCausalLM

import qwenq.pipeline.quantize
from qwenq.checkpoint.reader import open_source
from qwenq.errors import JobError, UsageError
from qwenq.formats.base import Recipe, Scheme
from qwenq.pipeline.config import QuantizeConfig
from qwenq.pipeline.imatrix import check_imatrix, write_gguf
from qwenq.pipeline.quantize import quantize
from qwenq.text.tokens import TokenWindows

Make = Callable[..., Path]
NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
         "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip


def read(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


@torch.no_grad()
def sums_by_transformers(directory: Path, windows: TokenWindows) -> dict[str, np.ndarray]:
    """Sums of squares of what enters each linear of the 16-bit model, float64, by GGUF's name of its weight."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    sums: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind not in NAMES:
            continue
        key = f"blk.{name.split('.')[2]}.{NAMES[kind]}.weight"

        def add(_: object, args: tuple[torch.Tensor], key: str = key) -> None:
            sums[key] = sums.get(key, 0) + args[0].double().square().sum((0, 1)).numpy()

        module.register_forward_pre_hook(add)
    for window in windows.ids:
        model(window[None])
    return sums


@pytest.mark.parametrize("fold", [True, False])
def test_sums_are_those_of_the_16_bit_model(fold: bool, tiny: Path, calib: Path, tmp_path: Path) -> None:
    """8 bits blur hardly anything, so folded channel scales would show in `down`, weights of tokens in `o`."""
    windows = text_windows(calib, tiny, 128, 12)
    path = tmp_path / "imatrix.gguf"
    quantize(
        small_job(tiny, tmp_path / "out", recipe=Recipe(Scheme(8, 32)), calibration=windows, fold=fold,
                  save_imatrix=path, error_correction_share=0.5)
    )  # fmt: skip
    found, wanted = read(path), sums_by_transformers(tiny, windows)
    assert set(found) == {f"{name}.{part}" for name in wanted for part in ("in_sum2", "counts")}
    for name, sums in wanted.items():
        assert found[f"{name}.counts"].tolist() == [12 * 128]
        tolerance = 2e-6 if name == "blk.0.attn_q.weight" else 0.02
        np.testing.assert_allclose(found[f"{name}.in_sum2"], sums, rtol=tolerance, atol=1e-3 * sums.mean())
        error = np.abs(found[f"{name}.in_sum2"] - sums).sum() / sums.sum()
        assert error < 3e-3, name


def test_the_file_is_what_llama_cpp_writes(tiny: Path, calib: Path, tmp_path: Path) -> None:
    """Keys and kinds of llama-imatrix: save_imatrix in tools/imatrix/imatrix.cpp."""
    path = tmp_path / "imatrix.gguf"
    quantize(small_job(tiny, tmp_path / "out", calibration=text_windows(calib, tiny, 64, 4), save_imatrix=path))
    fields = {name: field for name, field in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")}
    assert {name: field.contents() for name, field in fields.items()} == {
        "general.type": "imatrix",
        "imatrix.datasets": ["calib.txt"],
        "imatrix.chunk_count": 4,
        "imatrix.chunk_size": 64,
    }
    assert [kind.name for kind in fields["imatrix.chunk_count"].types] == ["UINT32"]
    assert [kind.name for kind in fields["imatrix.datasets"].types] == ["ARRAY", "STRING"]


def test_the_checkpoint_is_the_same_without(random_model: Make, tmp_path: Path) -> None:
    source = random_model()
    for name, path in (("with", tmp_path / "imatrix.gguf"), ("without", None)):
        quantize(small_job(source, tmp_path / name, save_imatrix=path))
    for file in (tmp_path / "without").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "with" / file.name).read_bytes()
    assert not list((tmp_path / "with").glob("*imatrix*"))


def test_padding_of_the_ffn_is_left_out(random_model: Make, tmp_path: Path) -> None:
    """Whoever gives the file to llama-quantize has the source's widths."""
    job = small_job(random_model(), tmp_path / "out", save_imatrix=tmp_path / "imatrix.gguf")
    width = job.source.spec.intermediate_size
    quantize(replace(job, source=job.source.padded(width + 32)))
    assert len(read(tmp_path / "imatrix.gguf")["blk.0.ffn_down.weight.in_sum2"]) == width


@pytest.mark.parametrize("damage", ["none", "lost", "changed"])
def test_stopped_and_resumed_is_the_same(
    damage: str, random_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = random_model(hidden_size=32, intermediate_size=64), tmp_path / "imatrix.gguf"
    job = small_job(source, tmp_path / "out", save_imatrix=path)
    quantize(job)
    whole = path.read_bytes()
    path.unlink()
    job = small_job(source, tmp_path / "again", save_imatrix=path)
    real, layers = qwenq.pipeline.quantize.make_layer, []

    def twice(*args: object, **others: object) -> object:
        layers.append(args)
        if len(layers) > 2:
            raise KeyboardInterrupt
        return real(*args, **others)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(qwenq.pipeline.quantize, "make_layer", twice)
        quantize(job)
    assert not path.exists()
    kept = tmp_path / "again.partial" / ".qwenq-imatrix-0.safetensors"
    if damage == "lost":
        kept.unlink()
    elif damage == "changed":
        kept.write_bytes(kept.read_bytes()[:-1] + b"\0")
    said: list[object] = []
    quantize(job, resume=True, listen=said.append)
    assert path.read_bytes() == whole
    again = "layer 0: its part of the importance matrix is missing or damaged, it and what follows is done again"
    assert (again in said) == (damage != "none")


def test_asked_for_at_the_end_only_everything_is_done_again(
    random_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = random_model(), tmp_path / "imatrix.gguf"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(qwenq.pipeline.quantize, "measure_drift", stop)
        quantize(small_job(source, tmp_path / "out"))
    said: list[object] = []
    quantize(small_job(source, tmp_path / "out", save_imatrix=path), resume=True, listen=said.append)
    assert any(str(line).startswith("layer 0: its part of the importance matrix") for line in said)
    assert path.is_file()


@pytest.mark.parametrize("there", ["text", "GGUF", "empty", "directory", "imatrix"])
def test_on_resume_only_an_importance_matrix_is_written_over(there: str, tiny: Path, tmp_path: Path) -> None:
    path, spec = tmp_path / "any.name", open_source(tiny).spec
    if there == "directory":
        path.mkdir()
    elif there in ("text", "empty"):
        path.write_text("a letter" * (there == "text"))
    else:
        kind = {"GGUF": "model", "imatrix": "imatrix"}[there]
        write_gguf(path, {"general.type": kind}, {"x": torch.zeros(1)})
    with pytest.raises(JobError, match="already exists"):
        check_imatrix(path, spec, resume=False)
    if there == "imatrix":
        check_imatrix(path, spec, resume=True)
    else:
        with pytest.raises(JobError, match="already exists"):
            check_imatrix(path, spec, resume=True)


def test_places_and_methods_that_cannot_be(random_model: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="reads none"):
        QuantizeConfig(method="rtn", save_imatrix=Path("imatrix.gguf"))
    with pytest.raises(UsageError, match="reads none"):
        QuantizeConfig(format="bnb-nf4", save_imatrix=Path("imatrix.gguf"))
    (tmp_path / "there").write_bytes(b"")
    for place, wanted in (("there", "already exists"), ("none/imatrix.gguf", "no place for a file")):
        with pytest.raises(JobError, match=wanted):
            quantize(small_job(random_model(f"model-{place[:4]}"), tmp_path / "out", save_imatrix=tmp_path / place))
        assert not (tmp_path / "out.partial").exists()
    assert (tmp_path / "there").read_bytes() == b""
