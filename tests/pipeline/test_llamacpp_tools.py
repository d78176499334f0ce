"""llama.cpp's own tools on what is written here; they are built by `make interop-llamacpp`, which runs these."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import settled, text_windows

from qwenq.checkpoint.reader import open_checkpoint, open_source
from qwenq.formats.base import Recipe, Scheme, get_format
from qwenq.formats.gguf import MIXTURES, fallback, wanted_types
from qwenq.model.metadata import gguf_names, metadata_of_config
from qwenq.model.spec import spec_from_config
from qwenq.pipeline.evaluate import evaluate
from qwenq.pipeline.imatrix import write_gguf
from qwenq.pipeline.job import QuantizeJob
from qwenq.pipeline.quantize import quantize
from qwenq.pipeline.reference_logits import SavedLogits

MISSING = [name for name in ("llama-quantize", "llama-perplexity") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(bool(MISSING), reason=f"not on PATH: {MISSING}; interop/build_llamacpp.sh builds them"),
]
WINDOWS, LENGTH = 6, 128


def tool(name: str, *words: object) -> str:
    """Run a tool; both of its outputs."""
    command = [name, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


def as_gguf(source: Path, out: Path, mixture: str, calib: Path, heldout: Path, **options: Any) -> Path:
    checkpoint = open_source(source)
    recipe = get_format("gguf").mixture(mixture, checkpoint.spec)
    config = settled(format="gguf", gguf_type=mixture, **options)
    calibration = None if config.solver == "rtn" else text_windows(calib, source, 64, 4)
    windows = calibration, text_windows(heldout, source, 64, 2)
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


# layers, heads, KV heads, hidden size, FFN size, tied: 80 layers are its "70B"; 288, 144 and 100 are no super-blocks
SHAPES = {
    "qwen2 of 80 layers": ("qwen2", 80, 8, 2, 256, 288, False),
    "llama of 80 layers": ("llama", 80, 8, 2, 256, 256, False),
    "llama of 80 layers, all KV heads": ("llama", 80, 8, 8, 256, 256, True),
    "qwen3": ("qwen3", 28, 8, 4, 256, 256, True),
    "narrow": ("qwen2", 5, 6, 2, 96, 144, True),
    "rows of nothing": ("qwen2", 9, 4, 1, 80, 100, False),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_quantize_gives_every_tensor_the_same_type(shape: str, tmp_path: Path) -> None:
    family, layers, heads, kv_heads, hidden, ffn, tied = SHAPES[shape]
    config = {
        "model_type": family, "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden,
        "num_key_value_heads": kv_heads, "head_dim": hidden // heads, "intermediate_size": ffn, "vocab_size": 32,
        "max_position_embeddings": 512, "tie_word_embeddings": tied,
    }  # fmt: skip
    spec = spec_from_config(config)
    names, linears = gguf_names(spec), [*spec.outer_linears, *spec.linears]
    matrix, sixteen = tmp_path / "imatrix.gguf", tmp_path / "f16.gguf"
    metadata = {"tokenizer.ggml.model": "no_vocab", "general.file_type": 1, f"{family}.vocab_size": 32}
    tensors = {names[t.name]: torch.zeros(t.shape, dtype=(torch.float32, torch.float16)[len(t.shape) - 1])
               for t in spec.tensors()}  # fmt: skip
    write_gguf(sixteen, metadata_of_config(spec, config) | metadata, tensors)
    sums = {names[lin.name + ".weight"]: torch.ones(lin.in_features) for lin in spec.linears}
    entries = {f"{name}.in_sum2": sum_I for name, sum_I in sums.items()}
    entries |= {f"{name}.counts": torch.ones(1) for name in sums}
    about = {"imatrix.datasets": ["x"], "imatrix.chunk_count": 1, "imatrix.chunk_size": 512}
    write_gguf(matrix, {"general.type": "imatrix"} | about, entries)
    line = re.compile(r"(\S+\.weight) +- \[.*?type = +(\w+), size = [^>\n]*?(?:->[^(\n]*\((\w+)\))?\s*$", re.MULTILINE)
    for mixture in MIXTURES:
        said = tool("llama-quantize", "--dry-run", "--imatrix", matrix, sixteen, mixture, 1)
        theirs = {found[1]: (found[3] or found[2]).upper() for found in line.finditer(said)}
        wanted = wanted_types(spec, mixture)
        ours = {names[lin.name + ".weight"]: fallback(wanted[lin.name], lin.in_features).upper() for lin in linears}
        assert {name: theirs.get(name) for name in ours} == ours, mixture


@pytest.fixture(scope="module")
def wide(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model with rows of whole super-blocks, which computes the same."""
    out = tmp_path_factory.mktemp("wide") / "model"
    script = Path(__file__).parents[2] / "benchmarks" / "pad_model.py"
    subprocess.run([sys.executable, script, tiny, out, "--multiple", "256"], check=True, timeout=300)
    return out


@pytest.mark.parametrize("mixture", MIXTURES)
def test_llama_perplexity_reads_every_mixture(mixture: str, wide: Path, heldout: Path, tmp_path: Path) -> None:
    """Its KL is eval's, but for the rounding of its activations; without that, on the values as F32, to 1e-5."""
    file = as_gguf(wide, tmp_path / "out", mixture, heldout, heldout, method="rtn")
    saved = SavedLogits(tmp_path / "reference.logits")
    evaluate(open_checkpoint(file), open_checkpoint(wide), text_windows(heldout, wide, LENGTH, WINDOWS), saved=saved)
    assert mean_kl(file, saved.path) == pytest.approx(saved.kl, abs=0.002)
    tool("llama-quantize", "--allow-requantize", file, tmp_path / "plain.gguf", "F32")
    assert mean_kl(tmp_path / "plain.gguf", saved.path) == pytest.approx(saved.kl, abs=1e-5, rel=1e-3)
