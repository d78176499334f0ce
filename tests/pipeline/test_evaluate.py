"""Drift between two checkpoints: what may differ, what may not, and limits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import rewrite, small_job, text_windows
from test_gguf_output import gguf_job

import qwenq
from qwenq.checkpoint.reader import open_checkpoint
from qwenq.errors import CalibrationError, CheckpointError, HonestNo, JobError, QwenqError
from qwenq.pipeline.evaluate import check_limits, evaluate, split_otherwise
from qwenq.pipeline.quantize import quantize
from qwenq.results import DriftReport
from qwenq.text.tokens import TokenWindows

Make = Callable[..., Path]


def windows(count: int = 3, tokens: int = 32, top: int = 1000) -> TokenWindows:
    return TokenWindows(torch.randint(0, top, (count, tokens), generator=torch.Generator().manual_seed(3)), "ids", {})


def refusal(checkpoint: Path, reference: Path, ids: TokenWindows | None = None) -> str:
    with pytest.raises(QwenqError) as caught:
        evaluate(open_checkpoint(checkpoint), open_checkpoint(reference), ids or windows())
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_against_itself(tied: bool, random_model: Make) -> None:
    a = open_checkpoint(random_model("a", tie_word_embeddings=tied))
    b = open_checkpoint(random_model("b", tie_word_embeddings=tied))
    drift = evaluate(a, b, windows())
    assert drift.kl.mean == 0 and drift.top1_agreement.mean == 1 and drift.perplexity == drift.reference_perplexity


def test_hidden_states_spill_to_the_current_directory(
    random_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is on a disk where /tmp may be memory; files have no name, and go with the process however that ends."""
    a = open_checkpoint(random_model("a"))
    b = open_checkpoint(rewrite(random_model("b"), lambda t: t["lm_head.weight"].mul_(1.5)))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    seen: list[tuple[int, list[Path]]] = []

    def look(layer: int) -> None:
        mapped = Path("/proc/self/maps").read_text().splitlines()
        seen.append((sum(f" {here}/" in line and line.endswith(" (deleted)") for line in mapped), list(here.iterdir())))

    kept = evaluate(b, a, windows(), listen=look)
    monkeypatch.setattr("qwenq.pipeline.activations.SPILL_BYTES", 0)
    assert evaluate(b, a, windows(), listen=look) == kept and kept.kl.mean > 1e-4
    assert seen == [(0, [])] * 3 + [(2, [])] * 3, "reference and quantized, in each of three layers"
    monkeypatch.setattr("qwenq.pipeline.activations.free_disk", lambda where: 49_151)  # 2 * 3 * 32 tokens of 64 floats
    with pytest.raises(JobError, match=f"^{here}: hidden states need 49.2 kB of disk, 49.2 kB are free$"):
        evaluate(b, a, windows())


def test_every_part_of_the_model_counts(random_model: Make) -> None:
    """Change one tensor at a time: whatever it is, the drift sees it."""
    reference = open_checkpoint(random_model("a"))
    parts = [
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight", "model.layers.2.self_attn.k_proj.weight",
        "model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.v_proj.bias",
        "model.layers.2.mlp.up_proj.weight",
    ]  # fmt: skip
    for k, name in enumerate(parts):
        path = rewrite(random_model(f"b{k}"), lambda t, n=name: t[n].mul_(1.5))
        assert evaluate(open_checkpoint(path), reference, windows()).kl.mean > 1e-4, name


def test_padding_of_the_vocabulary_is_no_difference(random_model: Make, edit_json: Callable[..., Any]) -> None:
    """151,936 against 152,064: rows of zeros below the embedding and the head."""
    plain, padded = random_model("a"), random_model("b")

    def pad(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.full((128, 64), 9.0).half()])

    rewrite(padded, pad)
    edit_json(padded / "config.json", vocab_size=1152)
    for a, b in ((plain, padded), (padded, plain)):
        drift = evaluate(open_checkpoint(a), open_checkpoint(b), windows())
        assert drift.kl.mean == 0 and drift.perplexity == drift.reference_perplexity
    assert refusal(plain, padded, windows(top=1152)).endswith("is outside the vocabulary of 1024")


def test_what_may_not_differ(random_model: Make, edit_json: Callable[..., Any]) -> None:
    a = random_model("a")
    assert "differ in num_hidden_layers: 2 and 3" in refusal(random_model("b", num_hidden_layers=2), a)
    assert "differ in model_type: llama and qwen2" in refusal(random_model("c", "llama"), a)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    assert "differ in rope_type: 'yarn' and 'default'" in refusal(random_model("e", rope_parameters=rope), a)
    assert refusal(random_model("g", rms_norm_eps=1e-5), a).endswith(f"{a} differ in rms_norm_eps: 1e-05 and 1e-06")
    left_out = random_model("h", rms_norm_eps=1e-6)
    edit_json(left_out / "config.json", rms_norm_eps=None)
    evaluate(open_checkpoint(left_out), open_checkpoint(a), windows())
    other = random_model("f")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|im_begin|>"))
    assert "have different tokenizers" in refusal(other, a)
    (other / "tokenizer.json").write_text(json.dumps(json.loads(text)))  # the same, written differently
    evaluate(open_checkpoint(other), open_checkpoint(a), windows())


def test_a_tokenizer_that_splits_otherwise_is_told(
    random_model: Make, edit_json: Callable[..., Any], heldout: Path
) -> None:
    """Merges that are missing: the same vocabulary, and other tokens in use."""
    a, b = random_model("a"), random_model("b")
    text = text_windows(heldout, a, 32, 4)
    both = open_checkpoint(b), open_checkpoint(a)
    tokenizer = json.loads((b / "tokenizer.json").read_text())
    (b / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert split_otherwise(*both, text) == "", "the same, written differently"
    edit_json(b / "tokenizer.json", model=tokenizer["model"] | {"merges": tokenizer["model"]["merges"][:-200]})
    said = split_otherwise(*both, text)
    assert split_otherwise(*both, replace(text, provenance={"kind": "token ids"})) == ""
    assert said.startswith(f"{b}: its tokenizer splits the text otherwise than the reference's (4 of 4 windows)")
    told: list[str] = []
    qwenq.evaluate(b, a, text=str(heldout), sequence_length=32, num_samples=4, warn=told.append)
    assert told == [said]


def test_constants_may_be_spelled_otherwise(random_model: Make, edit_json: Callable[..., Any], tmp_path: Path) -> None:
    """YaRN as Qwen's cards have it (`type`), in full, and as a GGUF file has it."""
    yarn = {"factor": 2.0, "original_max_position_embeddings": 128}
    source, other = random_model("a"), random_model("b")
    edit_json(source / "config.json", rope_parameters=None, rope_theta=1e6, rope_scaling={"type": "yarn", **yarn})
    full = {"rope_type": "yarn", "rope_theta": 1e6, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None}
    edit_json(other / "config.json", rope_parameters=full | yarn)
    quantize(gguf_job(source, tmp_path / "out", "Q8_0"))
    for checkpoint in (other, tmp_path / "out" / "a-Q8_0.gguf"):
        drift = evaluate(open_checkpoint(checkpoint), open_checkpoint(source), windows())
        assert drift.kl.mean < 1e-3
    edit_json(other / "config.json", rope_parameters=full | yarn | {"beta_fast": 16.0})
    assert "differ in beta_fast: 16.0 and None" in refusal(other, source)


def test_a_mistral_as_gguf_is_compared_with_its_source(random_model: Make, tmp_path: Path) -> None:
    """llama.cpp calls both families llama, so the file is read as a Llama."""
    source = random_model("m", "mistral", sliding_window=None)
    quantize(gguf_job(source, tmp_path / "out", "Q8_0"))
    made, original = open_checkpoint(tmp_path / "out" / "m-Q8_0.gguf"), open_checkpoint(source)
    assert (made.spec.model_type, original.spec.model_type) == ("llama", "mistral")
    assert 0 < evaluate(made, original, windows()).kl.mean < 1e-3


def test_bad_numbers_are_named(random_model: Make) -> None:
    a = random_model("a")
    name = "model.layers.1.mlp.down_proj.weight"
    bad = rewrite(random_model("b"), lambda t: t[name].view(-1)[:1].fill_(float("nan")))
    assert refusal(bad, a) == f"{bad}/model.safetensors: {name} holds a NaN or an infinity"
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        blank = rewrite(random_model(name), lambda t, name=name: t[name].zero_())
        for pair in ((blank, a), (a, blank)):
            assert refusal(*pair) == f"{blank}/model.safetensors: {name} holds nothing but zeros"
    head = rewrite(random_model("c"), lambda t: t["lm_head.weight"][5].fill_(float("inf")))
    drift = evaluate(open_checkpoint(head), open_checkpoint(a), windows())
    assert drift.non_finite == drift.tokens
    with pytest.raises(HonestNo, match="93 of 93 logit rows are not finite"):
        check_limits(drift, None, None)


def test_windows_longer_than_the_model(random_model: Make) -> None:
    a = random_model("a")
    assert "windows of 300 tokens, the model reads 256" in refusal(a, a, windows(1, 300))


def test_a_quantized_reference_will_do(random_model: Make, tmp_path: Path) -> None:
    source = random_model()
    quantize(small_job(source, tmp_path / "q"))
    q = open_checkpoint(tmp_path / "q")
    forward, back = evaluate(q, open_checkpoint(source), windows()), evaluate(open_checkpoint(source), q, windows())
    assert forward.perplexity == back.reference_perplexity and forward.kl.mean != back.kl.mean


@pytest.mark.parametrize("harm", ["flip", "cut", "replace"])
@pytest.mark.parametrize("which", ["checkpoint", "reference"])
def test_a_model_that_changes_meanwhile(which: str, harm: str, random_model: Make) -> None:
    both = {name: open_checkpoint(random_model(name)) for name in ("checkpoint", "reference")}
    path = both[which].files[-1]
    data, times = path.read_bytes(), os.stat(path)

    def change(layer: int) -> None:
        if layer == 1:
            if harm == "replace":
                path.rename(path.with_name("before"))
            with open(path, "wb" if harm == "replace" else "r+b") as file:
                file.write(data[:-1] + bytes([data[-1] ^ 1]))
                file.truncate(1000 if harm == "cut" else len(data))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    with pytest.raises(CheckpointError) as caught:
        evaluate(both["checkpoint"], both["reference"], windows(), listen=change)
    assert caught.value.message == f"{path}: changed while it was being read"


def test_limits() -> None:
    from qwenq.solver.metrics import Reading, TokenDrift, summarise

    nll = torch.linspace(1, 2, 20)
    drift: DriftReport = summarise(
        TokenDrift(nll, nll + 0.01, torch.full((20,), 0.005), torch.ones(20), 0), Reading("t", "", 4, 6, "float32")
    )
    check_limits(drift, None, None)
    check_limits(drift, 0.0051, 1.1)
    with pytest.raises(HonestNo, match=r"^mean KL is 0\.0050, the limit 0\.004$") as caught:
        check_limits(drift, 0.004, None)
    assert caught.value.exit_code == 3
    with pytest.raises(HonestNo, match=r"^perplexity rose by 1\.01 %, the limit is 1 %$"):
        check_limits(drift, None, 1.0)
    nan = replace(drift, kl=replace(drift.kl, mean=float("nan")))
    with pytest.raises(HonestNo):  # not a number is never under a limit
        check_limits(nan, 1.0, None)


def test_layers_are_told(tiny: Path) -> None:
    done: list[int] = []
    checkpoint = open_checkpoint(tiny)
    evaluate(checkpoint, checkpoint, windows(), listen=done.append)
    assert done == [0, 1, 2, 3]
    with pytest.raises(CalibrationError, match="outside the vocabulary of 1024"):
        evaluate(checkpoint, checkpoint, windows(top=10**6))
