"""Rotated hidden states: an orthogonal matrix, the same function, and jobs that fold it in."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import qwenq.pipeline.prepare
import qwenq.pipeline.quantize
from qwenq.checkpoint.reader import open_checkpoint
from qwenq.solver.rotation import Rotation
from tests.conftest import DATA, all_tensors, answer, rewrite, run, text_windows

Make = Callable[..., Path]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


# Widths of Qwen2, Qwen2.5, Qwen3, Llama and SmolLM2: each has a Hadamard matrix by one of Paley's constructions.
WIDTHS = (1, 8, 96, 576, 896, 960, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120)


@pytest.mark.parametrize("size", [*WIDTHS, 184])
def test_it_is_orthogonal_and_spreads_a_channel(size: int) -> None:
    matrix = Rotation(size).turned(torch.eye(size))
    assert torch.allclose(Rotation(size).turned_columns(matrix), torch.eye(size), atol=1e-5), "Q'Q"
    most = float(matrix.abs().max()) * size**0.5
    assert most == pytest.approx(1 if size in WIDTHS else 2**0.5, abs=1e-5), "a massive channel ends in all of them"
    assert not torch.equal(matrix, Rotation(size, seed=3).turned(torch.eye(size))) or size == 1


def test_many_vectors_are_turned_like_each_alone() -> None:
    x = torch.randn(2, 1500, 96, generator=torch.Generator().manual_seed(0))
    turned = Rotation(96).turned(x)
    assert torch.allclose(turned[1, 1400], Rotation(96).turned(x[1, 1400]), atol=1e-6)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    columns = Rotation(96).turned_columns(x.flatten(0, 1).T)
    assert columns.is_contiguous() and torch.allclose(columns.T, turned.flatten(0, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen2", {}),
        ("qwen3", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),  # biases of what adds to the hidden states, too
    ],
)
def test_transformers_computes_the_same_logits(model_type: str, options: dict[str, bool], random_model: Make) -> None:
    source = random_model(model_type=model_type, hidden_size=96, dtype=torch.float32, **options)  # 3 x 32
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    rotated = open_checkpoint(source).rotated()
    spec = rotated.spec
    state = {name: rotated.read(name) for name in (spec.embedding_tensor, spec.norm_tensor, spec.head_tensor)}
    assert torch.equal(rotated.read_slice(spec.head_tensor, 3, 9), state[spec.head_tensor][3:9])
    for layer in range(spec.num_hidden_layers):
        state |= {spec.layer_prefix(layer) + name: tensor for name, tensor in rotated.layer_state(layer).items()}
    ids = torch.randint(0, spec.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        assert set(model.state_dict()) == set(state)
        weights = model.state_dict()[f"{spec.layer_prefix(0)}mlp.down_proj.weight"].clone()
        model.load_state_dict(state)
        after = model(ids).logits
    assert not torch.allclose(weights, state[f"{spec.layer_prefix(0)}mlp.down_proj.weight"], atol=0.01)
    assert torch.allclose(before, after, atol=1e-3 * float(before.std())), float((before - after).abs().max())


@pytest.mark.parametrize("options", [["--bits", 8], ["--format", "gguf", "--gguf-type", "Q8_0"]], ids=["gptq", "gguf"])
def test_a_rotated_checkpoint_is_made_read_and_made_again(
    options: list[object], two_layers: Path, tmp_path: Path
) -> None:
    calib, heldout = DATA / "calib.txt", DATA / "heldout.txt"
    text = ["--calibration", calib, "--eval-text", heldout, "-n", 8, "--sequence-length", 64, "--eval-samples", 4]
    out = tmp_path / "out"
    ask = ["quantize", two_layers, "-o", out, "--rotate", *options, *text]
    planned, made = answer(*ask, "--dry-run"), answer(*ask)
    assert planned["file_bytes"] == made["file_bytes"] and 0 < made["drift"]["kl"]["mean"] < 0.01
    assert json.loads((out / "qwenq-manifest.json").read_text())["job"]["options"]["rotate"] is True
    file = next(out.glob("*.gguf"), out)
    written, source = open_checkpoint(file), open_checkpoint(two_layers)
    embedding = source.spec.embedding_tensor
    away = written.read(embedding).float() - source.rotated().read(embedding)
    assert float(away.norm() / source.read(embedding).float().norm()) < 0.01
    read = answer("eval", file, "--reference", two_layers, "--text", heldout, "--sequence-length", 64, "-n", 4)
    assert read["kl"]["mean"] == pytest.approx(made["drift"]["kl"]["mean"], rel=1e-3)
    again = run("verify", out, "--source", two_layers, "--calibration", calib, "--layers", "0,1")
    assert again.exit_code == 0 and "layers 0 to 1 recomputed" in again.stdout, again.output
    card = (out / "README.md").read_text()
    assert "are rotated by an orthogonal matrix" in card
    if file == out:
        assert "embedding, norms and head rotated" in card or "embedding and head rotated" in card, card
        assert run("convert", out, tmp_path / "ct", "--format", "compressed-tensors").exit_code == 0
        assert "as in the original" not in (tmp_path / "ct" / "README.md").read_text()


def test_what_cannot_be_rotated_is_refused(two_layers: Path, random_model: Make, tmp_path: Path) -> None:
    tied = random_model(tie_word_embeddings=True)
    for more in ([], ["--dry-run"]):
        result = run("quantize", tied, "-o", tmp_path / "out", "--rotate", *more)
        said = "error: --rotate: the head is the embedding too, and would become a matrix of its own\n"
        assert result.exit_code == 1 and said in result.stderr
    result = run("sensitivity", tied, "-o", tmp_path / "s.json", "--rotate")
    assert result.exit_code == 1 and said in result.stderr
    result = run("quantize", two_layers, "-o", tmp_path / "out", "--rotate", "--save-imatrix", tmp_path / "i.gguf")
    said = "error: --save-imatrix is of the model's own weights, --rotate makes others\n"
    assert result.exit_code == 2 and result.stderr == said, result.stderr


@pytest.mark.parametrize(
    "options", [["--bpw", 5.5], ["--format", "gguf", "--bpw", 5.5]], ids=["gptq", "embedding and head too"]
)
def test_a_budget_is_chosen_by_sensitivities_of_the_rotated_model(
    options: list[object], two_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ["--calibration", DATA / "calib.txt", "-n", 8, "--sequence-length", 64]
    kind = options[:-2]
    name = kind[-1] if kind else "gptq"
    table, plain = tmp_path / "table.json", tmp_path / "plain.json"
    rotated = answer("sensitivity", two_layers, "-o", table, "--rotate", *kind, *text)
    before = answer("sensitivity", two_layers, "-o", plain, *kind, *text)
    assert rotated["provenance"]["rotated"] is True and "rotated" not in before["provenance"]
    assert rotated["kl_nats_per_token"] != before["kl_nats_per_token"]
    total = [sum(max(row.values()) for row in found["kl_nats_per_token"].values()) for found in (rotated, before)]
    assert 0.5 < total[0] / total[1] < 2, "the same function, rounded otherwise"
    ask = ["quantize", two_layers, "-o", tmp_path / "out", *options, *text, "--eval-text", DATA / "heldout.txt",
           "--eval-samples", 4]  # fmt: skip
    for more, state, hint in (
        (["--rotate", "--sensitivity", plain], "before", f"{name} --rotate"),
        (["--sensitivity", table], "after", name),
    ):
        result = run(*ask, *more)
        file = more[-1]
        assert result.exit_code == 1 and result.stderr == (
            f"error: {file}: the sensitivity table is of the model {state} it is rotated\n"
            f"hint: measure it again: qwenq sensitivity MODEL --format {hint}\n"
        ), result.stderr
    with monkeypatch.context() as patch:
        patch.setattr(qwenq.pipeline.quantize._Run, "_drift", interrupted)
        assert run(*ask, "--rotate").exit_code == 130
    result = run(*ask, "--resume")
    assert result.exit_code == 1, result.stderr
    assert result.stderr.endswith("is rotated\nhint: resume with the options it was begun with\n"), result.stderr
    made = answer(*ask, "--rotate", "--resume")
    measured = json.loads((tmp_path / "out" / "qwenq-sensitivity.json").read_text())
    assert measured == json.loads(table.read_text()), "as the job measures it"
    assert made["drift"]["kl"]["mean"] < 0.02


def test_a_job_is_not_resumed_with_or_without_it(
    two_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ["quantize", two_layers, "-o", tmp_path / "out", "--method", "rtn", "--eval-text", DATA / "heldout.txt",
           "--sequence-length", 64, "--eval-samples", 2]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(qwenq.pipeline.quantize._Run, "_drift", interrupted)
        assert run(*ask, "--rotate").exit_code == 130
    result = run(*ask, "--resume")
    assert result.exit_code == 1 and "rotate" in result.stderr, result.stderr
    assert run(*ask, "--resume", "--rotate").exit_code == 0


@pytest.fixture
def massive(two_layers: Path, calib: Path, tmp_path: Path) -> tuple[Path, list[object]]:
    """The trained model with massive activations at one token, and options of a small job on windows that begin so."""
    model = Path(shutil.copytree(two_layers, tmp_path / "model"))
    windows = text_windows(calib, model, 64).ids[:8]
    rare = int(windows.flatten().bincount(minlength=1024).argmin())  # in none of them
    windows[:, 0] = rare

    def change(tensors: dict[str, torch.Tensor]) -> None:  # one channel, which no linear sees
        tensors["model.embed_tokens.weight"][rare, 5] = 5000
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor[5] = 0

    rewrite(model, change)
    np.save(tmp_path / "calibration.npy", windows.numpy())
    return model, ["--calibration", tmp_path / "calibration.npy", "--eval-text", DATA / "heldout.txt",
                   "--sequence-length", 64, "--eval-samples", 2, "--group-size", 32]  # fmt: skip


def options_of(out: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "qwenq-manifest.json").read_text())["job"]["options"]
    return found


def test_massive_activations_are_rotated_away_unless_told_otherwise(
    massive: tuple[Path, list[object]], two_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, job = massive
    out, asked, begun = tmp_path / "out", tmp_path / "asked", tmp_path / "begun"
    made = run("quantize", source, "-o", out, *job)
    assert made.exit_code == 0 and re.search(
        r"massive activations after layer 1 \(\d[\d,]* times the median token's mean square\): rotating the hidden",
        made.stderr.replace("\n", " "),
    ), made.stderr
    assert options_of(out)["rotate"] is True
    asked_for = run("quantize", source, "-o", asked, *job, "--rotate")
    assert asked_for.exit_code == 0 and "massive" not in asked_for.stderr
    named, chosen = all_tensors(asked), all_tensors(out)
    assert named.keys() == chosen.keys() and all(torch.equal(named[name], chosen[name]) for name in named)
    plain = run("quantize", two_layers, "-o", tmp_path / "plain", *job)
    assert plain.exit_code == 0 and "looking for massive activations" in plain.stderr
    assert "no massive activations: the hidden states are not rotated" in plain.stderr.replace("\n", " ")
    assert "rotating" not in plain.stderr and options_of(tmp_path / "plain")["rotate"] is False
    dry = answer("quantize", source, "-o", tmp_path / "dry", *job, "--dry-run")
    assert dry["assumed"]["rotated"] is None
    assert dry["peak_ram_bytes"] == answer("quantize", source, *job, "--dry-run", "--rotate")["peak_ram_bytes"]
    with monkeypatch.context() as patch:
        patch.setattr(qwenq.pipeline.quantize._Run, "_drift", interrupted)
        assert run("quantize", source, "-o", begun, *job).exit_code == 130

    def exhausted(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(qwenq.pipeline.prepare, "find_massive", exhausted)
        small = run("quantize", source, "-o", tmp_path / "small", *job)
    said = "error: CPU: out of memory while looking for massive activations: "
    assert small.exit_code == 1 and said in small.stderr and "hint: --no-rotate" in small.stderr, small.stderr
    with monkeypatch.context() as patch:  # the journal knows
        patch.setattr(qwenq.pipeline.prepare, "find_massive", interrupted)
        assert run("quantize", source, "-o", begun, *job, "--resume").exit_code == 0
    assert all(torch.equal(tensor, chosen[name]) for name, tensor in all_tensors(begun).items())


@pytest.mark.parametrize(
    "kept",
    [
        ["--no-rotate"], ["--no-fold"], ["--save-imatrix", "i.gguf"], ["--format", "gguf"], ["--bpw", 6],
    ],
    ids=lambda kept: " ".join(map(str, kept)).strip("-"),
)  # fmt: skip
def test_it_is_left_to_the_user_where_it_gains_nothing_or_costs_something(
    kept: list[object], massive: tuple[Path, list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, job = massive
    monkeypatch.chdir(tmp_path)
    job = job[:-2] if kept[0] == "--bpw" or "gguf" in kept else job
    made = run("quantize", source, "-o", tmp_path / "out", *job, *kept)
    assert made.exit_code == 0 and "massive" not in made.stderr, made.stderr
    assert options_of(tmp_path / "out")["rotate"] is False
    assert answer("quantize", source, *job, *kept, "--dry-run")["assumed"]["rotated"] is False


@pytest.mark.parametrize(
    "kind",
    [["--bits", 8], ["--format", "awq"], ["--format", "compressed-tensors", "--asymmetric"]],
    ids=lambda kind: " ".join(map(str, kind)).strip("-"),
)
def test_massive_activations_are_rotated_away_at_8_bits_and_with_zero_points(
    kind: list[object], massive: tuple[Path, list[object]], tmp_path: Path
) -> None:
    source, job = massive
    made = run("quantize", source, "-o", tmp_path / "out", *job, *kind)
    assert made.exit_code == 0 and "massive activations after layer 1" in made.stderr, made.stderr
    assert options_of(tmp_path / "out")["rotate"] is True


def test_a_tied_head_is_never_rotated(random_model: Make) -> None:
    ask = ["--sequence-length", 64, "--group-size", 32, "--dry-run"]
    made = answer("quantize", random_model(tie_word_embeddings=True), *ask)
    assert made["assumed"]["rotated"] is False
