"""Conversions keep codes, scales and zero points bit for bit, there and back; the rest is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import answer, forge, run, small_job
from safetensors.torch import load_file, save_file
from test_quantize import MIXED

from qwenq.checkpoint.manifest import MANIFEST_NAME, verify
from qwenq.checkpoint.reader import Checkpoint, open_checkpoint
from qwenq.errors import CheckpointError, JobError, PlanError, QwenqError
from qwenq.formats.base import FORMATS, Recipe, Scheme
from qwenq.formats.bitsandbytes import NF4
from qwenq.pipeline.convert import convert
from qwenq.pipeline.quantize import quantize
from qwenq.report.runs import load_runs
from qwenq.solver.grid import QTensor

Make = Callable[..., Path]
DIFFER = ("quantize_config.json", "README.md")
ASYMMETRIC = Recipe(Scheme(4, 32, sym=False), (("model.layers.1.self_attn.o_proj", None),))


def grids(checkpoint: Checkpoint) -> dict[str, QTensor | torch.Tensor]:
    return {lin.name: checkpoint.linear(lin) for lin in checkpoint.spec.linears}


def assert_same_codes(a: Path, b: Path) -> None:
    """Also what is not quantized, and so the logits: every weight is the same to the bit."""
    one, two = open_checkpoint(a), open_checkpoint(b)
    for name, found in grids(one).items():
        other = grids(two)[name]
        if isinstance(found, torch.Tensor):
            assert isinstance(other, torch.Tensor) and torch.equal(found, other), name
        else:
            assert isinstance(other, QTensor) and torch.equal(found.codes_OI, other.codes_OI), name
            assert torch.equal(found.scales_OG, other.scales_OG) and torch.equal(found.zeros_OG, other.zeros_OG), name
    for layer in range(one.spec.num_hidden_layers):
        theirs = two.layer_state(layer)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.layer_state(layer).items())
    for tensor in one.spec.outer_tensors():
        assert torch.equal(one.read(tensor.name), two.read(tensor.name))


def assert_same_files(a: Path, b: Path) -> None:
    for name in sorted(p.name for p in a.iterdir() if "qwenq" not in p.name and p.name not in DIFFER):
        if name == "config.json":
            one, two = (json.loads((d / name).read_text()) for d in (a, b))
            one["quantization_config"].pop("meta", None), two["quantization_config"].pop("meta", None)
            assert one == two
        else:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize(
    ("recipe", "ways"),
    [
        (MIXED, ["compressed-tensors", "gptq"]),
        (Recipe(Scheme(8, 32)), ["compressed-tensors", "gptq"]),
        (ASYMMETRIC, ["awq", "compressed-tensors", "gptq"]),
        (ASYMMETRIC, ["compressed-tensors", "awq", "gptq"]),
        (Recipe(Scheme(4, 32), (), "compressed-tensors"), ["gptq", "compressed-tensors"]),
    ],
)
def test_round_trips_end_where_they_began(recipe: Recipe, ways: list[str], random_model: Make, tmp_path: Path) -> None:
    source = random_model(dtype=torch.bfloat16, hidden_size=32, intermediate_size=64)
    quantize(small_job(source, tmp_path / "0", recipe=recipe))
    for k, format in enumerate(ways):
        made = convert(open_checkpoint(tmp_path / str(k)), tmp_path / str(k + 1), format)
        shards = list((tmp_path / str(k + 1)).glob("*.safetensors"))
        assert made.file_bytes == sum(f.stat().st_size for f in shards)
        assert open_checkpoint(tmp_path / str(k + 1)).recipe == replace(recipe, format=format)
        assert_same_codes(tmp_path / "0", tmp_path / str(k + 1))
    assert_same_files(tmp_path / "0", tmp_path / str(len(ways)))


def test_a_symmetric_grid_as_awq(random_model: Make, tmp_path: Path) -> None:
    """Zero points of 8 everywhere; scales of both signs stay."""
    quantize(small_job(random_model(), tmp_path / "a"))
    made = convert(open_checkpoint(tmp_path / "a"), tmp_path / "b", "awq")
    assert_same_codes(tmp_path / "a", tmp_path / "b")
    found = [q for q in grids(open_checkpoint(tmp_path / "b")).values() if isinstance(q, QTensor)]
    assert made.scheme == "4-bit g32 asym" and all(bool((q.zeros_OG == 8).all()) for q in found)
    assert any(bool((q.scales_OG < 0).any()) for q in found)
    back = convert(open_checkpoint(tmp_path / "b"), tmp_path / "c", "gptq")
    assert back.scheme == "4-bit g32"
    assert_same_files(tmp_path / "a", tmp_path / "c")
    assert convert(open_checkpoint(tmp_path / "b"), tmp_path / "d", "compressed-tensors").scheme == "4-bit g32"
    shift_one_zero_point(tmp_path / "b")
    assert convert(open_checkpoint(tmp_path / "b"), tmp_path / "e", "gptq").scheme == "4-bit g32 asym"


def shift_one_zero_point(checkpoint: Path) -> None:
    """An AWQ checkpoint's very last zero point, 7 instead of 8."""
    shard = sorted(checkpoint.glob("*.safetensors"))[-2]  # the last layer
    tensors = load_file(shard)
    name = sorted(name for name in tensors if name.endswith(".qzeros"))[-1]
    tensors[name][-1, -1] ^= 0xF  # of the first of eight outputs
    save_file(tensors, shard)


def test_rotary_parameters_and_dtype_are_written_as_both_versions_of_transformers_read_them(
    random_model: Make, tmp_path: Path
) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    source = random_model("model", "llama", rope_parameters=rope | {"rope_theta": 5e5}, num_hidden_layers=1)
    assert "rope_theta" not in json.loads((source / "config.json").read_text())
    made = quantize(small_job(source, tmp_path / "a", dtype="bfloat16")).out
    convert(open_checkpoint(made), tmp_path / "b", "compressed-tensors")
    for out in ("a", "b"):
        config = json.loads((tmp_path / out / "config.json").read_text())
        assert (config["rope_theta"], config["rope_scaling"]) == (5e5, rope)
        assert config["rope_parameters"] == rope | {"rope_theta": 5e5}
        assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_the_manifest_says_what_it_was_made_from(random_model: Make, tmp_path: Path) -> None:
    quantize(small_job(random_model(), tmp_path / "a"))
    convert(open_checkpoint(tmp_path / "a"), tmp_path / "b", "compressed-tensors")
    assert not verify(tmp_path / "b", tmp_path / "a").findings
    first, second = (json.loads((tmp_path / d / "qwenq-manifest.json").read_text()) for d in "ab")
    assert second["job"]["convert"] == {"from": "gptq", "to": "compressed-tensors"}
    assert second["made_from"]["digest"] == first["digest"] and second["made_from"]["drift"] == first["drift"]
    one, two = load_runs([tmp_path / "a", tmp_path / "b"])  # which a report reads of both
    assert (two.drift, two.layers, two.warnings) == (one.drift, one.layers, one.warnings) and two.converted
    assert two.file_bytes == second["file_bytes"] and two.job["convert"] == second["job"]["convert"]
    assert not (tmp_path / "b" / "quantize_config.json").exists()
    card = (tmp_path / "b" / "README.md").read_text()
    assert "Quantized in the gptq format, then converted bit for bit." in card and "compressed-tensors" in card
    convert(open_checkpoint(tmp_path / "b"), tmp_path / "c", "awq")
    assert json.loads((tmp_path / "c" / "qwenq-manifest.json").read_text())["made_from"] == second["made_from"]
    for source in (tmp_path / "a", random_model()):
        again = answer("verify", tmp_path / "b", "--source", source, code=1)
        assert again.startswith(f"error: {tmp_path / 'b'}: converted from a gptq checkpoint; no layer was solved here")
        assert again.endswith("and this one with that checkpoint as --source and --layers none\n")
    assert answer("verify", tmp_path / "b", "--source", tmp_path / "a", "--layers", "none")["ok"]
    (tmp_path / "a" / "config.json").write_text("{}")
    assert [f.problem[:12] for f in verify(tmp_path / "b", tmp_path / "a").findings] == ["another file"]


@pytest.mark.parametrize("builtin", [{"windows": "3](http://x)"}, {"windows": -1}, {}, 5])
def test_a_forged_count_of_windows_of_the_builtin_set(builtin: Any, random_model: Make, tmp_path: Path) -> None:
    """The card would have it as Markdown."""
    out = tmp_path / "a"
    quantize(small_job(random_model(num_hidden_layers=1), out))
    forge(out, lambda manifest: manifest["job"]["calibration"].update(builtin=builtin))
    with pytest.raises(CheckpointError, match=r"job\.calibration\.builtin"):
        convert(open_checkpoint(out), tmp_path / "b", "awq")
    forge(out, lambda manifest: manifest["job"]["calibration"].update(builtin={"windows": 3}))
    convert(open_checkpoint(out), tmp_path / "b", "awq")
    assert "(3 of these windows from the built-in set)" in (tmp_path / "b" / "README.md").read_text()


def refusal(source: Path, out: Path, format: str, kind: type[QwenqError] = PlanError) -> str:
    with pytest.raises(kind) as caught:
        convert(open_checkpoint(source), out, format)
    assert "\n" not in caught.value.message
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return caught.value.message


def test_what_cannot_be_held_is_refused(random_model: Make, tmp_path: Path) -> None:
    source, out = random_model(), tmp_path / "out"
    assert refusal(source, out, "awq") == f"{source}: not quantized"
    for name, recipe in (("4", Recipe(Scheme(4, 32))), ("8", Recipe(Scheme(8, 32))), ("mixed", MIXED)):
        quantize(small_job(source, tmp_path / name, recipe=recipe, method="rtn", calibration=None))
    assert refusal(tmp_path / "4", out, "gptq") == f"{tmp_path / '4'}: is gptq already"
    assert refusal(tmp_path / "8", out, "awq") == "format awq cannot hold 8-bit g32 asym"
    assert "format awq cannot hold 8-bit" in refusal(tmp_path / "mixed", out, "awq")
    assert refusal(tmp_path / "4", out, "bnb-nf4").startswith("gptq to bnb-nf4: bnb-nf4 stores other values")
    nf4 = small_job(source, tmp_path / "nf4", recipe=Recipe(NF4, (), "bnb-nf4"), calibration=None)
    quantize(nf4)
    assert refusal(tmp_path / "nf4", out, "gptq").startswith("bnb-nf4 to gptq: bnb-nf4 stores other values")
    for name in ("model.layers.0.self_attn.q_proj.scales", "model.layers.1.input_layernorm.weight", "lm_head.weight"):
        blank = shutil.copytree(tmp_path / "4", tmp_path / name)
        file = next(file for file in blank.glob("*.safetensors") if name in load_file(file))
        tensors = load_file(file)
        tensors[name].zero_()
        save_file(tensors, file, metadata={"format": "pt"})
        said = refusal(blank, out, "compressed-tensors", CheckpointError)
        assert said == f"{file}: {name} holds nothing but zeros"


def test_places(random_model: Make, tmp_path: Path) -> None:
    quantize(small_job(random_model(), tmp_path / "a", method="rtn", calibration=None))
    (tmp_path / "there").mkdir()
    for out, message in ((tmp_path / "there", "already exists"), (tmp_path / "a" / "b", "inside it")):
        with pytest.raises(JobError, match=message):
            convert(open_checkpoint(tmp_path / "a"), out, "awq")
    (tmp_path / "b.partial").mkdir()
    with pytest.raises(JobError, match="left by an unfinished job"):
        convert(open_checkpoint(tmp_path / "a"), tmp_path / "b", "awq")


def edited(source: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name]).contiguous()
            save_file(tensors, file, metadata={"format": "pt"})


def test_what_another_tool_wrote(random_model: Make, tmp_path: Path) -> None:
    """Groups out of order, and scales that float16 does not hold, are refused naming the linear; bfloat16 ones fit."""
    quantize(small_job(random_model(), tmp_path / "a", method="rtn", calibration=None))
    name = "model.layers.1.mlp.up_proj"
    edited(tmp_path / "a", name + ".scales", lambda t: (t.float() + 0.01).bfloat16())
    convert(open_checkpoint(tmp_path / "a"), tmp_path / "b", "compressed-tensors")
    one, two = (grids(open_checkpoint(tmp_path / d))[name] for d in "ab")
    assert isinstance(one, QTensor) and isinstance(two, QTensor)
    assert one.scales_OG.dtype == torch.bfloat16 and torch.equal(one.scales_OG.float(), two.scales_OG.float())
    edited(tmp_path / "a", name + ".scales", lambda t: t.float() * 1.0001)
    message = refusal(tmp_path / "a", tmp_path / "c", "awq", CheckpointError)
    assert message == f"{name}: its scales are torch.float32, and float16 does not hold them"
    edited(tmp_path / "a", name + ".scales", lambda t: t.half())
    edited(tmp_path / "a", name + ".g_idx", lambda t: t.flip(0))
    assert f"{name}: its groups are out of order" in refusal(tmp_path / "a", tmp_path / "c", "awq", CheckpointError)
    edited(tmp_path / "a", name + ".g_idx", lambda t: t.flip(0))
    edited(tmp_path / "a", name + ".qzeros", lambda t: t + 1)
    said = f"{name}: the config says symmetric, its zero points are not all 8"
    assert refusal(tmp_path / "a", tmp_path / "c", "compressed-tensors", CheckpointError) == said
    with pytest.raises(CheckpointError, match=said) as caught:  # a figure would not hold for engines that take 8
        open_checkpoint(tmp_path / "a").layer_state(int(name.split(".")[2]))
    assert caught.value.hint.startswith("checkpoint_format says 'gptq'; ")


def test_the_command(random_model: Make, tmp_path: Path) -> None:
    quantize(small_job(random_model(), tmp_path / "a", method="rtn", calibration=None))
    result = run("convert", tmp_path / "a", tmp_path / "b", "--format", "awq", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["source_format"] == "gptq"
    result = run("convert", tmp_path / "a", tmp_path / "c", "--format", "compressed-tensors", COLUMNS="200")
    assert result.exit_code == 0 and "4-bit g32, gptq to compressed-tensors, 0." in result.stdout
    result = run("convert", tmp_path / "a", tmp_path / "d", "--format", "ggml")
    assert result.exit_code == 2
    assert result.stderr == f"error: --format ggml: wanted one of {', '.join(FORMATS)}\n"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to every value in nested objects; of a list its first."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(min(1, len(value))):
            yield (*path, key)
            yield from places(value[key], (*path, key))


def test_any_field_of_a_manifest_may_be_missing_or_of_another_type(random_model: Make, tmp_path: Path) -> None:
    """Whoever changes a manifest can make its digests right too: a field is used as it should be, or refused."""
    result = quantize(small_job(random_model(num_hidden_layers=1), tmp_path / "whole"))
    text = (result.out / MANIFEST_NAME).read_text()
    changed = [path for path in places(json.loads(text)) if path[0] in ("job", "drift", "warnings")]
    refused = 0
    for number, path in enumerate(changed):

        def change(manifest: dict[str, Any], number: int = number, path: tuple[Any, ...] = path) -> None:
            owner: Any = manifest
            for key in path[:-1]:
                owner = owner[key]
            owner[path[-1]] = (None, "", {}, [], 5)[number % 5]
            if number % 2:
                del owner[path[-1]]

        (result.out / MANIFEST_NAME).write_text(text)
        forge(result.out, change)
        try:
            convert(open_checkpoint(result.out), tmp_path / "converted", "compressed-tensors")
        except QwenqError as error:
            refused += 1
            assert error.message.startswith(MANIFEST_NAME), error.message
        else:
            shutil.rmtree(tmp_path / "converted")
    assert 20 < refused < len(changed)
