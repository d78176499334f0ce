"""A format that nobody has, added in a few lines: quantized, sized, read back, refused where it must be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import answer
from made_up_grids import SuperBlockGrid
from torch import Tensor

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.errors import PlanError
from qwenq.formats.base import (
    CODES,
    FORMATS,
    Codes,
    Format,
    Quantization,
    Recipe,
    Scheme,
    Solved,
    StoredDtype,
)
from qwenq.io.safetensors import TensorSpec
from qwenq.model.spec import LinearSpec, ModelSpec
from qwenq.solver.grid import QTensor


class SuperCodes(Codes):
    name = "super"

    def label(self, scheme: Scheme) -> str:
        return "S4"

    def parse(self, label: str) -> Scheme | None:
        return Scheme(4, 256, codes="super") if label == "S4" else None

    def check_linear(self, scheme: Scheme, lin: LinearSpec) -> None:
        if lin.in_features % 256:
            raise PlanError(f"{lin.name}: super-blocks of 256 do not divide its {lin.in_features} inputs")

    def grid(self, scheme: Scheme) -> SuperBlockGrid:
        return SuperBlockGrid()


class Super(Format):
    """4-bit codes one a byte, 6-bit scales of 32 columns one a byte, a float16 for each 256; a file beside."""

    name = method = "super"
    tags = ("super",)
    integer_codes = False

    def check_scheme(self, scheme: Scheme) -> None:
        if scheme.codes != "super":
            raise PlanError(f"format super cannot hold {scheme.label}", hint="S4 is all it holds")

    def tensors(self, scheme: Scheme, lin: LinearSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
        yield TensorSpec(lin.name + ".codes", "U8", (lin.out_features, lin.in_features))
        yield TensorSpec(lin.name + ".scale", "F16", (lin.out_features, lin.in_features // 256))
        yield TensorSpec(lin.name + ".scale_codes", "I8", (lin.out_features, lin.in_features // 32))

    def config(self, recipe: Recipe, spec: ModelSpec, solved: Solved | None = None) -> dict[str, Any]:
        return {"quant_method": "super", "kept": [name for name, scheme in recipe.overrides if scheme is None]}

    def read_config(self, config: Mapping[str, Any], where: str) -> Quantization:
        return Quantization("super", Scheme(4, 256, codes="super"))

    def small_files(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        return {"super.json": {"blocks": 256}}

    def pack(self, q: QTensor, version: str = "") -> dict[str, Tensor]:
        return dict(zip(("codes", "scale", "scale_codes"), (q.codes_OI, *q.parameters), strict=True))

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, lin: LinearSpec, version: str = "") -> QTensor:
        return QTensor(tensors["codes"], (tensors["scale"], tensors["scale_codes"]), scheme.grid())  # type: ignore[arg-type]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODES, "super", SuperCodes())
    monkeypatch.setattr(Super, "fixed", Scheme(4, 256, codes="super"))
    monkeypatch.setitem(FORMATS, "super", Super())


@pytest.mark.usefixtures("made_up")
def test_a_format_of_ones_own(random_model: Any, calib: Path, heldout: Path, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    source, out = random_model(**shape, dtype=torch.bfloat16), tmp_path / "out"
    ask = ["quantize", source, "-o", out, "--format", "super"]
    predicted = answer(*ask, "--sequence-length", 64, "--dry-run")
    held_out = ["--eval-text", heldout, "--sequence-length", 64, "--eval-samples", 2]
    made = answer(*ask, *held_out, "--calibration", calib, "-n", 8)
    assert predicted["scheme"] == "S4" and predicted["file_bytes"] == made["file_bytes"]
    assert predicted["file_bytes"] == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert made["bits_per_linear_weight"] == 8 + 8 / 32 + 16 / 256
    assert json.loads((out / "super.json").read_text()) == {"blocks": 256}
    assert "super" in (out / "README.md").read_text()
    inspected = answer("inspect", out)
    assert inspected["disagreements"] == [] and inspected["scheme"] == "S4, super"
    evaluated = answer("eval", out, "--reference", source, "--text", heldout, "-n", 2, "--sequence-length", 64)
    assert evaluated["kl"]["mean"] == pytest.approx(made["drift"]["kl"]["mean"], rel=1e-4)
    rounded = answer(*ask[:3], tmp_path / "rtn", *ask[4:], *held_out, "--method", "rtn")
    assert made["drift"]["kl"]["mean"] < rounded["drift"]["kl"]["mean"]
    answer("verify", out)
    planned = answer("vram", out, "-c", 64, "--gpu", "RTX 3090")
    assert planned["weights"]["bytes"] == made["tensor_bytes"]
    checkpoint = open_checkpoint(out)
    assert isinstance(checkpoint.linear(checkpoint.spec.linears[0]), QTensor)


@pytest.mark.usefixtures("made_up")
def test_what_it_cannot_do_is_said(random_model: Any, tiny: Path, tmp_path: Path) -> None:
    narrow = answer("quantize", tiny, "-o", tmp_path / "out", "--format", "super", "--dry-run", code=1)
    assert narrow.startswith("error: model.layers.0.self_attn.q_proj: super-blocks of 256 do not divide its 128 inputs")
    assert "error: --format super is S4: --bits does not apply" in answer(
        "quantize", tiny, "-o", tmp_path / "out", "--format", "super", "--bits", 8, "--dry-run", code=2
    )
    with pytest.raises(PlanError, match="format gptq cannot hold S4"):
        Recipe(Scheme(4, 256, codes="super")).check(open_checkpoint(random_model(hidden_size=256)).spec)
