"""llama.cpp's own tools on what is written here; they are built by `make interop-llamacpp`, which runs these."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import settled, text_windows

from qwenq.checkpoint.reader import open_checkpoint, open_source
from qwenq.formats.base import Recipe, Scheme, get_format
from qwenq.pipeline.evaluate import evaluate
from qwenq.pipeline.job import QuantizeJob
from qwenq.pipeline.quantize import quantize
from qwenq.pipeline.reference_logits import SavedLogits

pytestmark = pytest.mark.llamacpp
WINDOWS, LENGTH = 6, 128


def tool(name: str, *words: object) -> str:
    """Run a tool; both of its outputs."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on PATH: interop/build_llamacpp.sh builds it")
    command = [found, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


def as_gguf(source: Path, out: Path, mixture: str, calib: Path, heldout: Path) -> Path:
    checkpoint = open_source(source)
    recipe = get_format("gguf").mixture(mixture, checkpoint.spec)
    config = settled(format="gguf", gguf_type=mixture)
    windows = text_windows(calib, source, 64, 4), text_windows(heldout, source, 64, 2)
    quantize(QuantizeJob(checkpoint, out, recipe, config, *windows))
    (file,) = out.glob("*.gguf")
    return file


def mean_kl(file: Path, logits: Path) -> float:
    for _ in range(8):  # on busy cores the end of its log is lost in one run of three
        said = tool("llama-perplexity", "-m", file, "--kl-divergence", "--kl-divergence-base", logits, "-c", LENGTH)
        if found := re.search(r"Mean +KLD: +([-0-9.]+)", said):
            return float(found[1])
    raise AssertionError(said)


def test_llama_quantize_takes_the_importance_matrix(tiny: Path, calib: Path, heldout: Path, tmp_path: Path) -> None:
    """And it decides: with one column that alone counts, that column is kept best."""
    matrix, sixteen = tmp_path / "imatrix.gguf", as_gguf(tiny, tmp_path / "f16", "F16", calib, heldout)
    calibration, evaluation = text_windows(calib, tiny, 128, 12), text_windows(heldout, tiny, 64, 2)
    recipe, config = Recipe(Scheme(4, 32)), settled(save_imatrix=matrix)
    quantize(QuantizeJob(open_source(tiny), tmp_path / "out", recipe, config, calibration, evaluation))
    said = tool("llama-quantize", "--imatrix", matrix, sixteen, tmp_path / "with.gguf", "Q4_0")
    linears = len(open_source(tiny).spec.linears)
    assert f"loaded {linears} importance matrix entries" in said and "computed on 12 chunks" in said
    assert "did not find weights" not in "".join(line for line in said.splitlines(True) if "blk." in line)
    tool("llama-quantize", sixteen, tmp_path / "without.gguf", "Q4_0")
    name = "blk.0.ffn_down.weight"
    with_it, without = ({t.name: t for t in gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors}[name]
                        for kind in ("with", "without"))  # fmt: skip
    assert not np.array_equal(with_it.data, without.data)


@pytest.mark.parametrize(("mixture", "tolerance"), [("F16", 2e-5), ("Q8_0", 2e-4)])
def test_llama_perplexity_finds_the_kl_of_eval(
    mixture: str, tolerance: float, tiny: Path, calib: Path, heldout: Path, tmp_path: Path
) -> None:
    """On a 16-bit file to what float16 loses; on others it rounds activations to 8 bits too."""
    file = as_gguf(tiny, tmp_path / "out", mixture, calib, heldout)
    saved = SavedLogits(tmp_path / "reference.logits")
    windows = text_windows(heldout, tiny, LENGTH, WINDOWS)
    evaluate(open_checkpoint(file), open_checkpoint(tiny), windows, saved=saved)
    assert mean_kl(file, saved.path) == pytest.approx(saved.kl, abs=tolerance)
