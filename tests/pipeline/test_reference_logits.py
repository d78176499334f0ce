"""Reference logits: read as llama-perplexity reads them, against transformers' own."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_job
from transformers import AutoModelForCausalLM

import qwenq.pipeline.reference_logits
from qwenq.checkpoint.reader import open_checkpoint
from qwenq.errors import CheckpointError, JobError, UsageError
from qwenq.formats.base import Recipe, Scheme
from qwenq.pipeline.evaluate import begun_with_bos, evaluate
from qwenq.pipeline.quantize import quantize
from qwenq.pipeline.reference_logits import LogitsFile, SavedLogits
from qwenq.text.tokens import ModelTokenizer, TokenWindows
from qwenq.units import format_gb

Make = Callable[..., Path]
WINDOWS, LENGTH, VOCAB = 4, 64, 1001  # 31 positions a window; an odd vocabulary is padded


def windows() -> TokenWindows:
    ids = torch.randint(0, 1000, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))
    return TokenWindows(ids, "ids", {})


def as_llama_perplexity_reads(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [windows, tokens] and log-probabilities [positions, vocabulary] (kl_divergence in perplexity.cpp)."""
    data = path.read_bytes()
    assert data[:8] == b"_logits_"
    n_ctx, n_vocab, n_chunk = struct.unpack("<Iii", data[8:20])
    tokens = np.frombuffer(data, "<i4", n_ctx * n_chunk, 20).reshape(n_chunk, n_ctx)
    row = 2 * ((n_vocab + 1) // 2) + 4
    rows = np.frombuffer(data, "<u2", offset=20 + tokens.nbytes).reshape(-1, row)
    assert len(rows) == n_chunk * (n_ctx - 1 - n_ctx // 2)
    scale, least = rows[:, :4].copy().view("<f4").T
    return tokens, scale[:, None] * rows[:, 4 : 4 + n_vocab].astype(np.float32) + least[:, None]


@torch.no_grad()
def log_probabilities(directory: Path, ids: torch.Tensor) -> np.ndarray:
    """By transformers, float64, of the second half of each window but its last position."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model(ids).logits[:, LENGTH // 2 : -1].double().log_softmax(-1).flatten(0, 1).numpy()


@pytest.mark.parametrize("at_once", [1 << 26, 7 * VOCAB], ids=["whole", "parts"])
def test_the_file_has_the_log_probabilities_of_the_reference(
    at_once: int, random_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qwenq.pipeline.reference_logits, "_LOGITS_AT_ONCE", at_once)
    reference = random_model("a", vocab_size=VOCAB)
    quantize(small_job(reference, tmp_path / "q", recipe=Recipe(Scheme(4, 32))))
    said: list[str] = []
    saved = SavedLogits(tmp_path / "logits.bin", said.append)
    plain = evaluate(open_checkpoint(tmp_path / "q"), open_checkpoint(reference), windows())
    drift = evaluate(open_checkpoint(tmp_path / "q"), open_checkpoint(reference), windows(), saved=saved)
    assert drift == plain
    assert said == [f"{saved.path}: {format_gb(saved.file.n_bytes)} of reference logits, 124 positions"]
    assert saved.file.n_bytes == saved.path.stat().st_size == 20 + 4 * 256 + 2 * 124 * (4 + 1002)
    tokens, found = as_llama_perplexity_reads(saved.path)
    np.testing.assert_array_equal(tokens, windows().ids)
    wanted = log_probabilities(reference, windows().ids)
    floored = np.maximum(wanted, wanted.max(-1, keepdims=True) - 16)
    steps = (floored.max(-1) - floored.min(-1)) / 65535
    assert np.abs(found - floored).max() < steps.max() / 2 + 1e-5
    other = log_probabilities_of_quantized(tmp_path / "q")
    kl = (np.exp(wanted) * (wanted - other)).sum(-1).mean()
    assert saved.kl == pytest.approx(kl, rel=1e-3)
    assert drift.kl.mean != pytest.approx(kl, rel=1e-3)  # all positions


def log_probabilities_of_quantized(directory: Path) -> np.ndarray:
    """Of what a checkpoint dequantizes to."""
    checkpoint = open_checkpoint(directory)
    model = AutoModelForCausalLM.from_config(_config(checkpoint), dtype=torch.float32)
    state = {f"model.layers.{k}.{name}": tensor.float() for k in range(checkpoint.spec.num_hidden_layers)
             for name, tensor in checkpoint.layer_state(k).items()}  # fmt: skip
    state |= {name: checkpoint.read(name).float()
              for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}  # fmt: skip
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model.eval()(windows().ids).logits
    return logits[:, LENGTH // 2 : -1].double().log_softmax(-1).flatten(0, 1).numpy()


def _config(checkpoint: object) -> object:
    from transformers import Qwen2Config

    given = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}  # type: ignore[attr-defined]
    return Qwen2Config(**given)


def test_a_far_tail_is_floored() -> None:
    """Below 16 nats under the best, llama.cpp has the least it can say."""
    file = LogitsFile(4, 2, 400)
    rows = file._encode(torch.tensor([[0.0, -1.0, -20.0, -16.0], [3.0, 3.0, 3.0, 3.0]]))
    scale, least = rows[:, :4].copy().view("<f4").T
    assert rows[0, 4:].tolist() == [65535, round(65535 * 15 / 16), 0, 0]
    assert scale[0] == pytest.approx(16 / 65535) and least[0] == pytest.approx(-16 - np.log(1 + np.exp(-1)), abs=1e-4)
    assert scale[1] == 0 and least[1] == pytest.approx(-np.log(4)) and rows[1, 4:].tolist() == [0, 0, 0, 0]


def test_windows_begin_as_llama_perplexity_begins_them(tiny: Path) -> None:
    """It puts a BOS token in the place of each window's first one where the tokenizer adds one to a text."""
    assert begun_with_bos(windows(), ModelTokenizer(tiny)).ids.equal(windows().ids)
    for around, first in (([5], [5] * WINDOWS), ([2], windows().ids[:, 0].tolist())):
        tokenizer: Any = SimpleNamespace(encode=lambda texts, special, around=around: [around], eos=2)
        found = begun_with_bos(windows(), tokenizer).ids
        assert found[:, 0].tolist() == first and found[:, 1:].equal(windows().ids[:, 1:])


def test_what_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"99 positions of 9 windows of 24 tokens, .* at least 100"):
        LogitsFile(VOCAB, 9, 24)
    file = LogitsFile(VOCAB, 10, 24)
    (tmp_path / "there").write_bytes(b"")
    for path, wanted in ((tmp_path / "there", "already exists"), (tmp_path / "no" / "x", "no such directory")):
        with pytest.raises(JobError, match=wanted):
            file.check(path)
    monkeypatch.setattr(qwenq.pipeline.reference_logits, "free_disk", lambda path: 1000)
    with pytest.raises(JobError, match="of disk, "):
        file.check(tmp_path / "new")
    with pytest.raises(CheckpointError, match="not finite"):
        file._encode(torch.tensor([[0.0, torch.nan, 0.0]]))
