"""Quantized to GGUF: read by gguf-py, sized to the byte, split, resumed, verified, evaluated."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import all_tensors, answer, forge, make_random_model, run, small_job
from test_quantize import FORKS, Stop, assert_same, change_tensor, stop_after
from transformers import AutoModelForCausalLM

import qwenq.checkpoint.reader
import qwenq.pipeline.job
import qwenq.pipeline.quantize
from qwenq.checkpoint.manifest import verify
from qwenq.checkpoint.reader import open_checkpoint
from qwenq.errors import CheckpointError, JobError
from qwenq.formats.base import Recipe, Scheme, get_format
from qwenq.formats.gguf import type_scheme
from qwenq.io.durable import file_sha256
from qwenq.pipeline.container import size_label
from qwenq.pipeline.evaluate import evaluate
from qwenq.pipeline.job import QuantizeJob
from qwenq.pipeline.journal import Journal
from qwenq.pipeline.preflight import partial_directory
from qwenq.pipeline.quantize import quantize
from qwenq.runtime.chat import Chat
from qwenq.solver.gptq import ROW_BLOCK, STAT_BLOCKS, round_rows

Make = Callable[..., Path]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}


def gguf_job(source: Path, out: Path, mixture: str = "Q4_K_M", **changes: Any) -> QuantizeJob:
    job = small_job(source, out, format="gguf", gguf_type=mixture, **changes)
    recipe = get_format("gguf").mixture(mixture, job.source.spec)
    return QuantizeJob(job.source, job.out, recipe, job.config, job.calibration, job.evaluation)


def values(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file in float32, by gguf-py."""
    reader = gguf.GGUFReader(file)
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[Path, Path]]:
    """whole(tied): a random model, and the checkpoint that an undisturbed job makes of it; neither to be changed."""

    @cache
    def make(tied: bool) -> tuple[Path, Path]:
        place = tmp_path_factory.mktemp("whole")
        source = make_random_model(place / "model", **WIDE, tie_word_embeddings=tied)
        return source, quantize(gguf_job(source, place / "out")).out

    return make


@pytest.fixture(scope="module")
def stopped(whole: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the job of the tied model leaves when it is stopped after layer 1 of 3; not to be changed."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(Stop):
        quantize(gguf_job(whole(True)[0], out), listen=stop_after(1))
    return partial_directory(out)


@pytest.fixture
def text(calib: Path) -> list[object]:
    return ["--calibration", calib, "--eval-text", calib, "-n", 4, "--sequence-length", 64, "--eval-samples", 2]


@pytest.fixture
def rounding(calib: Path) -> list[object]:
    """Without a calibration, where how codes were found is of no matter."""
    return ["--method", "rtn", "--eval-text", calib, "--sequence-length", 64, "--eval-samples", 2]


@pytest.mark.parametrize(("mixture", "source_dtype"), [("F16", torch.bfloat16), ("BF16", torch.float16)])
def test_a_mixture_of_16_bits_is_that_whatever_the_source_has(
    mixture: str, source_dtype: torch.dtype, random_model: Make, tmp_path: Path
) -> None:
    source = random_model(num_hidden_layers=1, dtype=source_dtype)
    quantize(gguf_job(source, tmp_path / "out", mixture))
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / f"model-{mixture}.gguf").tensors}
    assert kinds == {mixture, "F32"}
    said = answer("quantize", source, "-o", tmp_path / "x", "--format", "gguf", "--gguf-type", mixture,
               "--dtype", "float16", "--dry-run", code=2)  # fmt: skip
    assert f"--dtype does not apply: {mixture} sets the type of every tensor" in said


def test_the_hint_for_what_16_bits_do_not_hold_is_a_mixture(random_model: Make, tmp_path: Path) -> None:
    """--dtype does not apply there."""
    source = random_model(num_hidden_layers=1, dtype=torch.bfloat16)
    change_tensor(source, "model.embed_tokens.weight", 70000.0)
    with pytest.raises(CheckpointError, match="which does not fit float16") as caught:
        quantize(gguf_job(source, tmp_path / "out", "F16"))
    assert caught.value.hint == "--gguf-type BF16 holds it"


@pytest.mark.parametrize("mixture", [
    "Q4_K_M", "Q2_K", "IQ4_XS", "Q8_0", "BF16",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("Q3_K_M", "Q5_1")),
])  # fmt: skip
def test_what_gguf_py_reads_is_what_was_evaluated(mixture: str, random_model: Make, tmp_path: Path) -> None:
    shape = WIDE | {"num_hidden_layers": 2, "tie_word_embeddings": mixture == "Q2_K"}
    source = random_model(**shape, dtype=torch.bfloat16)
    job = gguf_job(source, tmp_path / "out", mixture)
    result = quantize(job)
    file = tmp_path / "out" / f"model-{mixture}.gguf"
    assert job.files.names == [file.name] and job.files.file_bytes == file.stat().st_size == result.file_bytes
    reader = gguf.GGUFReader(file)
    assert sum(int(t.n_bytes) for t in reader.tensors) == result.tensor_bytes
    written = open_checkpoint(file)
    theirs = values(file)
    assert len(theirs) == len(list(written.spec.tensors()))
    assert np.array_equal(written.read("model.embed_tokens.weight").float().numpy(), theirs["token_embd.weight"])
    state = written.layer_state(1)
    for path, name in (("mlp.down_proj.weight", "ffn_down.weight"), ("self_attn.q_proj.bias", "attn_q.bias")):
        assert np.array_equal(state[path].float().numpy(), theirs[f"blk.1.{name}"].reshape(state[path].shape))
    drift = evaluate(written, job.source, job.evaluation)
    assert drift.kl.mean == pytest.approx(result.drift.kl.mean, rel=1e-6, abs=1e-12)
    assert drift.kl.mean < (1e-6 if mixture == "BF16" else 3.0)


def test_metadata(random_model: Make, tmp_path: Path) -> None:
    source = random_model("Owner", **WIDE, num_hidden_layers=1)
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    (source / "generation_config.json").write_text(json.dumps(sampling))
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# It\n")
    quantize(gguf_job(source, tmp_path / "out"))
    reader = gguf.GGUFReader(tmp_path / "out" / "Owner-Q4_K_M.gguf")
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert found["general.architecture"] == "qwen2" and found["general.name"] == "Owner"
    assert found["general.file_type"] == 15 and found["general.quantization_version"] == 2
    assert found["general.license"] == "apache-2.0"
    named = {key.removeprefix("general.sampling."): found[key] for key in found if "sampling" in key}
    assert named == pytest.approx({"temp": 0.7, "top_p": 0.8, "top_k": 20, "penalty_repeat": 1.1})
    settings = Chat(tmp_path / "out" / "Owner-Q4_K_M.gguf", 1024).sampling(top_p=0.5)
    assert settings == Chat(source, 1024).sampling(top_p=0.5) and (settings.temperature, settings.top_k) == (0.7, 20)
    assert found["qwen2.block_count"] == 1 and found["qwen2.feed_forward_length"] == 512
    assert found["tokenizer.ggml.model"] == "gpt2" and len(found["tokenizer.ggml.tokens"]) == 1024
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "Owner-Q4_K_M.gguf", "README.md", "qwenq-journal.jsonl", "qwenq-manifest.json",
    ]  # fmt: skip


def test_size_labels_are_gguf_pys() -> None:
    for parameters in (1, 950, 7_500, 99_600, 134_515_008, 494_032_768, 1_543_714_304, 72_706_203_648, 2 * 10**12):
        assert size_label(parameters) == gguf.size_label(parameters, 0, 0, 0)


def test_sampling_is_kept_by_a_conversion(random_model: Make, tmp_path: Path) -> None:
    """Into a file and out of it again; transformers takes end tokens from generation_config.json where it is there."""
    source = random_model(num_hidden_layers=1)
    settings = {"do_sample": True, "top_k": -1, "temperature": 0.6, "min_p": 0.05}
    (source / "generation_config.json").write_text(json.dumps(settings))
    quantize(gguf_job(source, tmp_path / "out", "Q8_0"))
    (file,) = (tmp_path / "out").glob("*.gguf")
    answer("convert", file, tmp_path / "back", "--format", "gptq")
    found = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    tokens = {key: value for key, value in open_checkpoint(file).config.items() if key.endswith("_token_id")}
    assert tokens["eos_token_id"] == 1023 and found == tokens | settings | {"top_k": 0}
    assert verify(tmp_path / "back").findings == ()


def test_sampling_that_is_no_number(random_model: Make, tmp_path: Path) -> None:
    source = random_model()
    (source / "generation_config.json").write_text('{"top_k": "many"}')
    with pytest.raises(CheckpointError, match="top_k is 'many', wanted a number from 0 on"):
        quantize(gguf_job(source, tmp_path / "out", "Q8_0"))


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_other_families(model_type: str, random_model: Make, tmp_path: Path) -> None:
    """Llama's heads are interleaved in the file, and read back as they were."""
    source = random_model(model_type=model_type, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    job = gguf_job(source, tmp_path / "out", "Q8_0")
    result = quantize(job)
    (file,) = (tmp_path / "out").glob("*.gguf")
    drift = evaluate(open_checkpoint(file), job.source, job.evaluation)
    assert drift.kl.mean == pytest.approx(result.drift.kl.mean, rel=1e-6) and drift.kl.mean < 0.01
    q = job.source.read("model.layers.0.self_attn.q_proj.weight").float().numpy()
    theirs = values(file)["blk.0.attn_q.weight"]
    head = len(q) // 4
    paired = q.reshape(4, 2, head // 2, -1).swapaxes(1, 2).reshape(q.shape) if model_type == "llama" else q
    assert np.abs(theirs - paired).max() < 0.1 * np.abs(q).max()


def test_predicted_bytes_are_written_bytes_and_parts_verify(
    random_model: Make, calib: Path, text: list[object], tmp_path: Path
) -> None:
    source, out = random_model(**WIDE), tmp_path / "out"
    ask = ["quantize", source, "-o", out, "--format", "gguf", "--bits", 4, "--split-size", "500KB"]
    predicted = answer(*ask, *text, "--dry-run")
    made = answer(*ask, *text)
    files = sorted(out.glob("*.gguf"))
    assert len(files) > 2 and files[0].name == f"model-Q4_K_M-00001-of-{len(files):05d}.gguf"
    assert predicted["file_bytes"] == made["file_bytes"] == sum(f.stat().st_size for f in files)
    assert predicted["tensor_bytes"] == made["tensor_bytes"]
    assert not verify(out, source).findings
    evaluated = answer("eval", files[0], "--reference", source, "--text", calib, "-n", 2, "--sequence-length", 64)
    assert evaluated["kl"]["mean"] == pytest.approx(made["drift"]["kl"]["mean"], rel=1e-4)
    data = bytearray(files[1].read_bytes())
    data[-70] ^= 1
    files[1].write_bytes(data)
    assert [f.file for f in verify(out).findings] == [files[1].name]


@pytest.mark.parametrize("tied", [False, True])
def test_layers_are_made_again_from_the_source(
    tied: bool, random_model: Make, calib: Path, text: list[object], tmp_path: Path
) -> None:
    layers = 2 if tied else 1
    source = random_model(**WIDE, num_hidden_layers=layers, tie_word_embeddings=tied)
    out = tmp_path / "out"
    answer("quantize", source, "-o", out, "--format", "gguf", *text)
    made_again = answer("verify", out, "--source", source, "--calibration", calib)["layers_made_again"]
    assert made_again == [*range(layers)]


def test_a_forged_embedding_that_is_the_head_too_is_named(
    random_model: Make, calib: Path, text: list[object], tmp_path: Path
) -> None:
    """Every hash made right again: only making it again shows it."""
    source = random_model(**WIDE, num_hidden_layers=1, tie_word_embeddings=True)
    out = tmp_path / "out"
    answer("quantize", source, "-o", out, "--format", "gguf", *text)
    file = out / "model-Q4_K_M.gguf"
    damage_embedding(file)
    forge(out, lambda manifest: manifest["files"].update({file.name: file_sha256(file)}))
    ask = ["verify", out, "--source", source, "--calibration", calib]
    assert answer(*ask, "--layers", "none")["findings"] == []
    said = run(*ask, "--layers", "0", "--json")
    (finding,) = json.loads(said.stdout)["findings"]
    assert said.exit_code == 1 and finding["file"] == file.name
    wanted = "the embedding, recomputed, differs in 1 of 215040 bytes, first in model.embed_tokens.weight"
    assert finding["problem"] == wanted
    forge(out, lambda manifest: manifest["job"].pop("head_windows"))
    said = answer(*ask, code=1)
    assert "its embedding was made in another way (head_windows None, here 4)" in said


@pytest.mark.parametrize("model_type", ["qwen2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_type_for_each_tensor_within_a_size(model_type: str, random_model: Make, calib: Path, tmp_path: Path) -> None:
    source, out = random_model(model_type=model_type, **WIDE, num_hidden_layers=1), tmp_path / "out"
    text = ["--calibration", calib, "--eval-text", calib, "-n", 6, "--sequence-length", 64, "--eval-samples", 2]
    ask = ["quantize", source, "-o", out, "--format", "gguf", "--target-size", "0.6MB", *text]
    planned, made = answer(*ask, "--dry-run"), answer(*ask)
    size = next(out.glob("*.gguf")).stat().st_size
    assert 590_000 < made["file_bytes"] == size <= 600_000
    assert 590_000 < planned["file_bytes"] <= 600_000
    tensors = gguf.GGUFReader(next(out.glob("*.gguf"))).tensors
    assert len({t.tensor_type.name for t in tensors}) > 3
    table = json.loads((out / "qwenq-sensitivity.json").read_text())["kl_nats_per_token"]
    assert set(table["outer.head"]) == set(table["0.q_proj"]) == {
        "Q8_0", "Q6_K", "Q5_K", "IQ4_NL", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K",
    }  # fmt: skip
    assert table["0.q_proj"]["Q2_K"] > table["0.q_proj"]["Q4_K"] > table["0.q_proj"]["Q6_K"] > 0
    recipe = out / "qwenq-recipe.toml"
    again = answer("quantize", source, "-o", tmp_path / "again", "--format", "gguf", "--recipe", recipe,
                *text)  # fmt: skip
    assert again["file_bytes"] == made["file_bytes"] and again["drift"]["kl"] == made["drift"]["kl"]


@pytest.mark.parametrize(("bits", "group", "kind"), [(4, 32, "Q4_0"), (4, 128, "Q4_0"), (8, 64, "Q8_0")])
def test_integers_are_converted_bit_for_bit(
    bits: int, group: int, kind: str, random_model: Make, rounding: list[object], tmp_path: Path
) -> None:
    source, ints, out = random_model(**WIDE, num_hidden_layers=1), tmp_path / "ints", tmp_path / "out"
    answer("quantize", source, "-o", ints, "--bits", bits, "--group-size", group, *rounding)
    made = answer("convert", ints, out, "--format", "gguf")
    (file,) = out.glob("*.gguf")
    assert file.name == f"ints-{kind}.gguf" and made["file_bytes"] == file.stat().st_size
    before, after = open_checkpoint(ints), open_checkpoint(file)
    theirs = values(file)
    assert all(torch.equal(before.linear_weight(lin), after.linear_weight(lin)) for lin in before.spec.linears)
    first, *_, last = before.spec.layer_linears(0)
    assert np.array_equal(before.linear_weight(first).numpy(), theirs["blk.0.attn_q.weight"])
    assert np.array_equal(before.linear_weight(last).numpy(), theirs["blk.0.ffn_down.weight"])
    tensors = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert tensors["blk.0.ffn_down.weight"] == kind and tensors["token_embd.weight"] == "F16"
    assert tensors["blk.0.attn_norm.weight"] == "F32"
    assert f"\nllama-server -m {file.name} -c " in (out / "README.md").read_text()
    assert not verify(out).findings
    answer("convert", file, tmp_path / "back", "--format", "gptq")
    back = open_checkpoint(tmp_path / "back")
    assert back.recipe.default == Scheme(bits, 32)
    assert all(torch.equal(before.linear_weight(lin), back.linear_weight(lin)) for lin in before.spec.linears)


def test_cards_say_what_embedding_and_head_are_once_converted(
    random_model: Make, rounding: list[object], tmp_path: Path
) -> None:
    """Unpacked, or in the dtype that was asked for; still so after a second conversion."""
    source = random_model(**WIDE, num_hidden_layers=1, dtype=torch.bfloat16)
    text = [*rounding, "--no-fold"]

    def said(place: str) -> str:
        (line,) = (line for line in (tmp_path / place / "README.md").read_text().splitlines() if "- Scheme: " in line)
        return line.partition("; ")[2]

    answer("quantize", source, "-o", tmp_path / "file", "--format", "gguf", "--gguf-type", "Q4_0", *text)
    (file,) = (tmp_path / "file").glob("*.gguf")
    assert said("file") == "embedding Q4_0, head Q6_K, norms as in the original."
    answer("convert", file, tmp_path / "codes", "--format", "gptq")
    answer("convert", tmp_path / "codes", tmp_path / "again", "--format", "compressed-tensors")
    unpacked = "embedding Q4_0 unpacked to float16, head Q6_K unpacked to float16, norms as in the original."
    assert said("codes") == said("again") == unpacked
    for place, scheme in (("file", "Q4_0"), ("codes", "4-bit g32"), ("again", "4-bit g32")):
        assert (tmp_path / place / "README.md").read_text().partition("\n# ")[2].startswith(f"model, {scheme}\n")
    kept = all_tensors(tmp_path / "codes")
    assert kept["model.embed_tokens.weight"].dtype == kept["lm_head.weight"].dtype == torch.float16

    answer("quantize", source, "-o", tmp_path / "half", "--group-size", 32, "--dtype", "float16", *text)
    answer("convert", tmp_path / "half", tmp_path / "other", "--format", "compressed-tensors")
    assert said("half") == said("other") == "embedding, norms and head in float16."
    answer("quantize", source, "-o", tmp_path / "same", "--group-size", 32, *text)
    assert said("same") == "embedding, norms and head as in the original."


def test_a_converted_file_keeps_the_licence_of_its_card(random_model: Make, tmp_path: Path) -> None:
    source = random_model(num_hidden_layers=1)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# It\n")
    quantize(gguf_job(source, tmp_path / "blocks", "Q8_0"))
    answer("convert", tmp_path / "blocks" / "model-Q8_0.gguf", tmp_path / "out", "--format", "compressed-tensors")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "apache-2.0"\n' in card and "Quantized in the gguf format, then converted bit for bit." in card


def test_what_no_type_holds_is_not_converted(random_model: Make, tmp_path: Path) -> None:
    source = random_model(num_hidden_layers=1)
    quantize(small_job(source, tmp_path / "ints", recipe=Recipe(Scheme(4, 32, sym=False))))
    said = answer("convert", tmp_path / "ints", tmp_path / "out", "--format", "gguf", code=1)
    assert said.startswith("error: 4-bit g32 asym to gguf: no type of GGUF holds its codes")


def test_padding_to_whole_blocks(random_model: Make, text: list[object], tmp_path: Path) -> None:
    """An FFN of 448 falls back; padded to 512 its rows are whole, and the function is the same."""
    source = random_model(**(WIDE | {"intermediate_size": 448}), num_hidden_layers=2)
    ask = ["quantize", source, "--format", "gguf", "--gguf-type", "Q4_K_S", "--pad-for-tp", 1, *text]
    made = answer(*ask, "-o", tmp_path / "out")
    assert not any("whole blocks" in line for line in made["warnings"])
    reader = gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf")))
    assert reader.fields["qwen2.feed_forward_length"].contents() == 512
    down = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    assert down.tensor_type.name == "Q4_K" and list(down.shape) == [512, 256]
    assert not gguf.quants.dequantize(down.data, down.tensor_type)[:, 448:].any()
    whole = random_model("whole", **WIDE)
    said = answer("quantize", whole, "--format", "gguf", "--pad-for-tp", 1, "--dry-run", *text, code=1)
    assert "the FFN of 512 already consists of whole blocks of 256" in said
    said = answer("quantize", source, "--format", "gguf", "--pad-for-tp", 2, "--dry-run", *text, code=2)
    assert "--pad-for-tp 2: --format gguf pads for no number of GPUs, but to whole blocks of 256" in said
    said = answer("quantize", source, "--format", "gguf", "--bits", 8, "--pad-for-tp", 1, "--dry-run", *text, code=1)
    assert "--pad-for-tp: every tensor of Q8_0 has the same type without it" in said


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_of_many_slices(
    tied: bool, random_model: Make, text: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 151,936 rows are read: some slices hold no row that the head's error is estimated from."""
    rows = ROW_BLOCK * (2 * STAT_BLOCKS + 1)  # of which every third block
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": tied}
    source = random_model(vocab_size=rows, **shape)
    heads, files = [], []
    for slice_rows in (4096, ROW_BLOCK):
        monkeypatch.setattr(qwenq.checkpoint.reader, "SLICE_ROWS", slice_rows)
        out = tmp_path / f"out-{slice_rows}"
        answer("quantize", source, "-o", out, "--format", "gguf", "--gguf-type", "Q4_0", *text)
        heads.append(json.loads((out / "qwenq-manifest.json").read_text())["head"])
        files.append(next(out.glob("*.gguf")).read_bytes())
    assert files[0] == files[1] and heads[0] == heads[1] and -60 < heads[0]["error_db"] < -10
    table = tmp_path / "sensitivity.json"
    answer("sensitivity", source, "-o", table, "--format", "gguf", *text[:2], "-n", 4, "--sequence-length", 64)
    losses = json.loads(table.read_text())["kl_nats_per_token"]["outer.embedding" if tied else "outer.head"]
    assert losses["IQ4_NL"] > losses["Q8_0"] > 0


def test_fallbacks_are_said(tiny: Path, calib: Path, heldout: Path, tmp_path: Path) -> None:
    text = ["--calibration", calib, "--eval-text", heldout, "-n", 2, "--sequence-length", 64, "--eval-samples", 2]
    ask = ["quantize", tiny, "-o", tmp_path / "out", "--format", "gguf", *text]
    wanted = "rows of 384 are not whole blocks of Q4_K: down_proj in Q5_0 (2 tensors), as in llama.cpp"
    assert wanted in answer(*ask, "--dry-run")["warnings"]
    assert wanted in answer(*ask)["warnings"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\n# tiny-qwen2, Q4_K_M\n" in card, "by the name it was asked for"
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert wanted in card and f"\nllama-server -m {file.name} -c 512\n" in card and "vllm" not in card


def run_until(source: str, out: str, after: int, resume: bool) -> None:
    """Quantize, and be killed once `after` layers are in the journal."""
    qwenq.pipeline.quantize._STATE_INTERVAL_S = 0.0
    done = 0

    def listen(event: Any) -> None:
        nonlocal done
        done += not isinstance(event, str)
        if done == after:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    quantize(gguf_job(Path(source), Path(out)), resume=resume, listen=listen)


@pytest.mark.parametrize("mixture", ["Q4_K_M", "F16"])
def test_16_bits_of_a_mixture_are_made_again_as_they_were(
    mixture: str, random_model: Make, rounding: list[object], tmp_path: Path
) -> None:
    """In float16, though the source has bfloat16."""
    source = random_model(intermediate_size=100, num_hidden_layers=2, dtype=torch.bfloat16)
    answer("quantize", source, "-o", tmp_path / "out", "--format", "gguf", "--gguf-type", mixture, *rounding)
    assert answer("verify", tmp_path / "out", "--source", source)["findings"] == []


@pytest.mark.parametrize(("after", "tied"), [pytest.param(1, False, marks=pytest.mark.slow), (2, True), (3, False)])
def test_killed_and_resumed_is_the_same(after: int, tied: bool, whole: Any, tmp_path: Path) -> None:
    source, undisturbed = whole(tied)
    child = FORKS.Process(target=run_until, args=(str(source), str(tmp_path / "out"), after, False))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    quantize(gguf_job(source, tmp_path / "out"), resume=True)
    assert_same(undisturbed, tmp_path / "out")


def damage_embedding(file: Path) -> None:
    """Change a bit of the lowest of a code."""
    (tensor,) = (t for t in gguf.GGUFReader(file).tensors if t.name == "token_embd.weight")
    with file.open("r+b") as stream:
        stream.seek(int(tensor.data_offset) + 5)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("harm", ["none", "before its line", "file", "another's line"])
def test_a_solved_embedding_is_kept_or_made_again(
    harm: str, whole: Any, stopped: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Resuming takes it from the file; where that is damaged the same comes out, and layers of it are kept."""
    source, undisturbed = whole(True)
    job = gguf_job(source, tmp_path / "out")
    work = tmp_path / "out.partial"

    def killed(self: Any, row: Any) -> None:
        raise Stop

    if harm == "before its line":
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(Journal, "append", killed)
            quantize(job)
    else:
        shutil.copytree(stopped, work)
    if harm == "file":
        damage_embedding(work / "model-Q4_K_M.gguf")
    if harm == "another's line":
        journal = Journal.load(work)
        layers = journal.layers
        row = {"embedding": journal.embedding | {"sha256": "0" * 64}}
        journal.begin_again()
        for each in (row, *layers):
            journal.append(each)
    said: list[Any] = []
    quantize(job, resume=True, listen=said.append)
    assert_same(undisturbed, tmp_path / "out")
    lines = [line for line in said if isinstance(line, str)]
    solved = "solving the embedding, which is the head too, on 6 windows" in lines
    layers_made = [event.layer for event in said if not isinstance(event, str)]
    made_anew = [0, 1, 2] if harm in ("before its line", "another's line") else [2]
    assert (solved, layers_made) == (harm != "none", made_anew)


def test_another_split_of_as_many_files_is_no_same_job(random_model: Make, tmp_path: Path) -> None:
    """It would lay the files out anew, over the layers that are done."""
    source = random_model(**WIDE, num_hidden_layers=2)
    jobs = [gguf_job(source, tmp_path / "out", split_size=size) for size in ("500KB", "510KB")]
    assert jobs[0].files.names == jobs[1].files.names

    with pytest.raises(Stop):
        quantize(jobs[0], listen=stop_after(0))
    with pytest.raises(JobError, match="cannot resume, split_size was '500KB', now '510KB'"):
        quantize(jobs[1], resume=True)
    quantize(jobs[0], resume=True)


def test_a_damaged_layer_is_done_again(whole: Any, tmp_path: Path) -> None:
    source, undisturbed = whole(False)
    job = gguf_job(source, tmp_path / "out")

    with pytest.raises(Stop):
        quantize(job, listen=stop_after(1))
    work = tmp_path / "out.partial"
    location = job.files.locations(work, 1)["model.layers.0.mlp.up_proj.weight"]
    with open(location.file, "r+b") as file:
        file.seek(location.start + 5)
        file.write(b"\xff\x00")
    lines: list[str] = []
    quantize(job, resume=True, listen=lambda event: lines.append(str(event)))
    assert "layer 0: its file is missing or damaged, it and what follows is done again" in lines
    assert_same(undisturbed, tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gguf-type", "Q4_K_X"], "--gguf-type Q4_K_X: wanted one of F16, BF16, Q8_0"),
        (["--gguf-type", "q4_k"], "hint: is it Q4_K_M or Q4_K_S?"),
        (["--split-size", "0"], "--split-size 0: wanted more than 0 bytes"),
        (["--bits", "5"], "--bits 5: wanted 4 or 8"),
        (["--bits", "4", "--gguf-type", "Q8_0"], "--bits and --gguf-type exclude each other"),
        (["--group-size", "64"], "--format gguf: --group-size does not apply: each type has its own"),
        (["--asymmetric"], "--format gguf: --asymmetric does not apply: each type has its own"),
        (["--asymmetric", "--bpw", "5"], "--format gguf: --asymmetric does not apply: each type has its own"),
        (["--symmetric", "--target-size", "1MB"], "--format gguf: --asymmetric does not apply: each type has its own"),
    ],
)
def test_what_cannot_be_asked_for(words: list[str], line: str, tiny: Path) -> None:
    assert line in answer("quantize", tiny, "--dry-run", "--format", "gguf", *words, code=2)
    assert "--gguf-type goes with --format gguf" in answer("quantize", tiny, "--dry-run", "--gguf-type", "Q8_0", code=2)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Q2_K", "MOSTLY_Q2_K"), ("Q3_K", "MOSTLY_Q3_K_M"), ("Q4_K", "MOSTLY_Q4_K_M"), ("Q5_K", "MOSTLY_Q5_K_M"),
        ("Q6_K", "MOSTLY_Q6_K"), ("IQ4_XS", "MOSTLY_IQ4_XS"), ("Q8_0", "MOSTLY_Q8_0"),
    ],
)  # fmt: skip
def test_a_file_of_types_of_ones_own_is_called_as_llama_cpp_would_guess(kind: str, name: str) -> None:
    """The type that most tensors have, and of several mixtures the middle one: llama-model-loader.cpp."""
    metadata = get_format("gguf").file_metadata(Recipe(type_scheme(kind), format="gguf"), "")
    assert metadata["general.file_type"] == gguf.LlamaFileType[name]


def test_what_quantizes_nothing_calibrates_only_for_an_importance_matrix(tiny: Path, tmp_path: Path) -> None:
    ask = ["quantize", tiny, "--dry-run", "--format", "gguf", "--gguf-type"]
    assert answer(*ask, "bf16")["assumed"]["calibration_windows"] == 0
    assert answer(*ask, "Q8_0")["assumed"]["calibration_windows"] > 0
    saved = ["--save-imatrix", tmp_path / "imatrix.gguf", "-n", 4]
    assert answer(*ask, "BF16", *saved)["assumed"]["calibration_windows"] == 4
    said = answer(*ask, "F16", "-n", 4, code=2)
    assert "--num-samples counts windows of calibration: F16 needs none" in said


def test_types_are_read_in_any_case(tiny: Path, tmp_path: Path) -> None:
    path, ask = tmp_path / "r.toml", ["quantize", tiny, "--dry-run", "--format", "gguf"]
    small, large = (answer(*ask, "--gguf-type", name) for name in ("q4_k_m", "Q4_K_M"))
    for found in (small, large):
        del found["disk_free_bytes"]  # others write to it meanwhile
    assert small == large
    planned = ["vram", "Qwen2.5-7B", "--engine", "llama.cpp", "--format"]
    assert answer(*planned, "iq4_xs") == answer(*planned, "IQ4_XS")
    chosen = answer(*ask, "--target-size", "700KB", "--save-recipe", path)
    path.write_text(path.read_text().replace('"IQ4_NL"', '"iq4_nl"'))
    assert '"iq4_nl"' in path.read_text()
    assert answer(*ask, "--recipe", path)["recipe"]["layers"] == chosen["recipe"]["layers"]


def test_a_recipe_that_names_no_type_is_told_which_there_are(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    ask = ["quantize", tiny, "--dry-run", "--format", "gguf"]
    answer(*ask, "--target-size", "700KB", "--save-recipe", path)
    for wrong in ('"Q4_K_M"', "4", '"4-bit g128"'):
        edited = tmp_path / "edited.toml"
        edited.write_text(path.read_text().replace('"IQ4_NL"', wrong, 1))
        said = answer(*ask, "--recipe", edited, code=1)
        assert "hint: one of Q8_0, Q6_K, Q5_1, " in said and said.endswith(" Q2_K, 16-bit\n"), said


def test_a_rig_is_planned_for_by_llama_cpp_alone() -> None:
    ask = ["quantize", "Qwen2.5-7B", "--dry-run", "--fit", "RTX 4070", "--format"]
    said = answer(*ask, "gguf", "--engine", "vllm", code=1)
    assert said == "error: --engine vllm: --fit plans --format gguf for other engines\nhint: llama.cpp\n"
    said = answer(*ask, "gptq", "--engine", "llama.cpp", code=1)
    assert "--fit plans --format gptq for other engines\nhint: qwenq, transformers, vllm or sglang" in said


def test_files_that_are_not_there_or_not_alone(tiny: Path, tmp_path: Path) -> None:
    assert "x.gguf: neither a directory nor a shipped model" in answer("inspect", tmp_path / "x.gguf", code=1)
    assert "owner/x.gguf: no such file" in answer("eval", "owner/x.gguf", "--reference", tiny, code=1)
    (tmp_path / "x.gguf").touch()
    assert "x.gguf: not a GGUF file (it is empty)" in answer("inspect", tmp_path / "x.gguf", code=1)
    (tmp_path / "y.gguf").touch()
    said = answer("inspect", tmp_path, code=1)
    assert "2 GGUF models (x.gguf, y.gguf)" in said and "hint: name one of the files" in said


def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused(
    random_model: Make, edit_json: Callable[..., Any], tmp_path: Path
) -> None:
    source = random_model()
    edit_json(source / "tokenizer.json", model={"type": "Unigram", "vocab": []})
    with pytest.raises(CheckpointError, match="a tokenizer of type Unigram, wanted byte-level BPE"):
        quantize(gguf_job(source, tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()


def test_dry_run_of_the_72b() -> None:
    """Without a tokenizer at hand: its 6 MB are missing."""
    for words, wanted in ((["--bits", "4"], 47.41), (["--bits", "8"], 77.26), (["--gguf-type", "Q2_K"], 29.81)):
        found = answer("quantize", "Qwen2.5-72B", "--dry-run", "--format", "gguf", *words)
        assert found["file_bytes"] / 1e9 == pytest.approx(wanted, rel=1e-3)


def test_a_head_that_is_the_embedding_is_solved_with_the_16_bit_models_outputs(
    random_model: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    """Against transformers' states of the source, on the first windows alone; all that follows reads what was solved.
    """
    monkeypatch.setattr(qwenq.pipeline.job, "head_windows", lambda spec, windows, length: 4)
    source = random_model(**WIDE, num_hidden_layers=2, tie_word_embeddings=True)
    job = gguf_job(source, tmp_path / "out")
    result = quantize(job)
    assert job.calibration is not None and job.head_scheme is not None and result.head is not None
    written = open_checkpoint(next((tmp_path / "out").glob("*.gguf")))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        x_TI = model.model(job.calibration.ids[:4]).last_hidden_state.flatten(0, 1)
    stored = job.source.read("model.embed_tokens.weight").float()
    solved, nearest = written.read("model.embed_tokens.weight"), round_rows(stored, job.head_scheme.grid()).dequantize()

    def error(weight: torch.Tensor) -> float:
        return float((x_TI @ (weight - stored).T).square().sum())

    assert error(solved) < 0.8 * error(nearest)
    outputs = float((x_TI @ stored.T).square().sum())
    assert result.head.error_db == pytest.approx(10 * np.log10(error(solved) / outputs), abs=0.3)
    assert result.head.name == "model.embed_tokens" and result.head.scheme == "Q6_K"
    drift = evaluate(written, job.source, job.evaluation)
    assert drift.kl.mean == pytest.approx(result.drift.kl.mean, rel=1e-6)
    manifest = json.loads((tmp_path / "out" / "qwenq-manifest.json").read_text())
    assert manifest["job"]["head_windows"] == 4
    assert gguf_job(source, tmp_path / "x", calibration=None).head_windows == 0
    assert gguf_job(source, tmp_path / "x", "BF16").head_windows == 0


def test_a_head_of_its_own_is_solved_with_the_last_norms_outputs(random_model: Make, tmp_path: Path) -> None:
    """Against transformers' states of the layers as written: less output error than rounding to nearest leaves."""
    source = random_model(**WIDE, num_hidden_layers=2)
    job = gguf_job(source, tmp_path / "out")
    result = quantize(job)
    assert job.calibration is not None and job.head_scheme is not None and result.head is not None
    written = open_checkpoint(next((tmp_path / "out").glob("*.gguf")))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    layers = {f"model.layers.{k}.": written.layer_state(k) for k in range(2)}
    state = {prefix + name: tensor.float() for prefix, layer in layers.items() for name, tensor in layer.items()}
    state["model.embed_tokens.weight"] = written.read("model.embed_tokens.weight").float()
    model.load_state_dict(state, strict=False)
    with torch.inference_mode():
        x_TI = model.model(job.calibration.ids).last_hidden_state.flatten(0, 1)
    stored = job.source.read("lm_head.weight").float()
    nearest = round_rows(stored, job.head_scheme.grid()).dequantize()

    def error(weight: torch.Tensor) -> float:
        return float((x_TI @ (weight - stored).T).square().sum())

    solved = written.read("lm_head.weight")
    assert error(solved) < 0.8 * error(nearest)
    outputs = float((x_TI @ stored.T).square().sum())
    assert result.head.error_db == pytest.approx(10 * np.log10(error(solved) / outputs), abs=0.3)
    assert json.loads((tmp_path / "out" / "qwenq-manifest.json").read_text())["head"]["name"] == "lm_head"
