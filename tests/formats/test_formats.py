"""Every format, written by the whole job: sizes, what it says of itself, and other people's loaders on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import all_tensors, answer, predicted, small_job
from families import model
from test_quantize import MIXED

from qwenq.checkpoint.reader import Checkpoint, open_checkpoint
from qwenq.errors import PlanError
from qwenq.formats.base import FORMATS, Recipe, Scheme
from qwenq.formats.bitsandbytes import INT8_ROWS, NF4
from qwenq.model.layer import model_config
from qwenq.model.spec import ModelSpec
from qwenq.pipeline.evaluate import evaluate
from qwenq.pipeline.quantize import quantize

Make = Callable[..., Path]

KEPT = (("model.layers.1.self_attn.o_proj", None), ("model.layers.2.mlp.down_proj", None))
RECIPES = {
    "gptq asymmetric": Recipe(Scheme(4, 32, sym=False)),
    "awq": Recipe(Scheme(4, 32, sym=False), KEPT, "awq"),
    "awq per channel": Recipe(Scheme(4, -1, sym=False), (), "awq"),
    "compressed": Recipe(Scheme(4, 32), (), "compressed-tensors"),
    "compressed mixed": replace(MIXED, format="compressed-tensors"),
    "compressed asymmetric": Recipe(Scheme(8, 32, sym=False), KEPT, "compressed-tensors"),
    "nf4": Recipe(NF4, KEPT, "bnb-nf4"),
    "int8": Recipe(INT8_ROWS, KEPT, "bnb-int8"),
}


def job_of(recipe: Recipe, source: Path, out: Path, **changes: Any) -> Any:
    if recipe.format.startswith("bnb"):
        changes |= {"calibration": None, "method": "rtn"}
    return small_job(source, out, recipe=recipe, **changes)


def our_logits(checkpoint: Checkpoint, ids: torch.Tensor, rounded: torch.dtype = torch.float32) -> torch.Tensor:
    """transformers' model class in float32 on the weights this project reads, these rounded first."""
    import transformers

    spec = checkpoint.spec
    model = transformers.AutoModelForCausalLM.from_config(model_config(checkpoint.config, spec)).float().eval()
    state = {t.name: checkpoint.read(t.name).float() for t in spec.outer_tensors()}
    for layer in range(spec.num_hidden_layers):
        state |= {f"model.layers.{layer}.{n}": t.to(rounded).float() for n, t in checkpoint.layer_state(layer).items()}
    model.load_state_dict(state)
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("kind", RECIPES)
def test_predicted_bytes_are_written_bytes_and_the_recipe_is_read_back(
    kind: str, random_model: Make, tmp_path: Path
) -> None:
    recipe = RECIPES[kind]
    job = job_of(recipe, random_model(dtype=torch.bfloat16), tmp_path / "out", method="rtn", calibration=None)
    check = predicted(job)
    result = quantize(job)
    files = (tmp_path / "out").glob("*.safetensors")
    assert check.file_bytes == result.file_bytes == sum(f.stat().st_size for f in files)
    stored = sum(t.numel() * t.element_size() for t in all_tensors(tmp_path / "out").values())
    assert check.tensor_bytes == result.tensor_bytes == stored
    written = open_checkpoint(tmp_path / "out")
    assert written.recipe == recipe
    assert (tmp_path / "out" / "quantize_config.json").exists() == (recipe.format == "gptq")
    again = evaluate(written, job.source, job.evaluation)  # what is read is what the job computed with
    assert again.kl.mean == pytest.approx(result.drift.kl.mean, rel=1e-4)
    assert 0 < again.kl.mean < 0.5


# ---------------------------------------------------------------------- other people's loaders


def loaded_by_transformers(path: Path, **how: Any) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu", **how).eval()


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


IDS = torch.randint(0, 1000, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.filterwarnings("ignore:You passed .quantization_config.")
@pytest.mark.parametrize("kind", ["compressed", "compressed mixed", "compressed asymmetric"])
def test_transformers_reads_compressed_tensors_as_we_do(kind: str, random_model: Make, tmp_path: Path) -> None:
    """As it comes; zero points by `dequantize`: as it comes, compressed-tensors 0.20.0 wants them unpacked.

    (Not the other way round: `dequantize` of transformers 5.23 takes the first group's scheme for every linear.)
    """
    import transformers

    quantize(job_of(RECIPES[kind], random_model(), tmp_path / "out"))
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    dense = kind == "compressed asymmetric"
    model = loaded_by_transformers(tmp_path / "out", **(how if dense else {}))
    rounded = torch.float16 if dense else torch.float32  # `dequantize` computes in the scales' type
    wanted = our_logits(open_checkpoint(tmp_path / "out"), IDS, rounded)
    torch.testing.assert_close(logits_of(model, IDS), wanted, rtol=0, atol=1e-5)


def test_transformers_reads_nf4_as_we_do(random_model: Make, tmp_path: Path) -> None:
    import transformers

    source = random_model(intermediate_size=128)  # bitsandbytes' own CPU product wants rows of whole blocks
    quantize(job_of(Recipe(NF4, format="bnb-nf4"), source, tmp_path / "out"))
    wanted = our_logits(open_checkpoint(tmp_path / "out"), IDS)
    model = loaded_by_transformers(tmp_path / "out")
    torch.testing.assert_close(logits_of(model.dequantize().float(), IDS), wanted, rtol=0, atol=1e-5)
    # and what transformers itself would have saved is the same, byte for byte
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=how, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "out")


def test_transformers_reads_int8_as_we_do(random_model: Make, tmp_path: Path) -> None:
    """Its weights are ours; its own forward pass also rounds activations, so they are compared dequantized."""
    import transformers

    source = random_model()
    quantize(job_of(Recipe(INT8_ROWS, format="bnb-int8"), source, tmp_path / "out"))
    wanted = our_logits(open_checkpoint(tmp_path / "out"), IDS)
    model = loaded_by_transformers(tmp_path / "out").dequantize().float()
    torch.testing.assert_close(logits_of(model, IDS), wanted, rtol=0, atol=1e-5)
    how = transformers.BitsAndBytesConfig(load_in_8bit=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=how, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "out")


def assert_same_tensors(theirs: Path, ours: Path) -> None:
    a, b = all_tensors(theirs), all_tensors(ours)
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def test_double_quantization_of_others_is_read(tiny: Path, tmp_path: Path) -> None:
    import transformers

    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = loaded_by_transformers(tiny, quantization_config=how)
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = open_checkpoint(tmp_path / "theirs")
    assert checkpoint.recipe.default == Scheme(4, 64, codes="nf4-nested")
    theirs = logits_of(model.dequantize(torch.float32), IDS)
    torch.testing.assert_close(theirs, our_logits(checkpoint, IDS), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------- what a format cannot hold


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(Scheme(8, 32, sym=False), (), "awq"), "format awq cannot hold 8-bit g32 asym"),
        (Recipe(Scheme(4, 32), (), "awq"), "format awq cannot hold 4-bit g32"),
        (
            Recipe(Scheme(4, 32, sym=False), (("model.layers.0.mlp.down_proj", Scheme(4, -1, sym=False)),), "awq"),
            "format awq holds one scheme per checkpoint, got 4-bit g32 asym, 4-bit per channel asym",
        ),
        (Recipe(NF4), "format gptq cannot hold NF4 g64"),
        (Recipe(NF4, (), "compressed-tensors"), "format compressed-tensors cannot hold NF4 g64"),
        (Recipe(Scheme(4, 32), (), "bnb-nf4"), "format bnb-nf4 cannot hold 4-bit g32"),
        (Recipe(Scheme(8, 32), (), "bnb-int8"), "format bnb-int8 cannot hold 8-bit g32"),
    ],
)
def test_refusals_name_format_and_scheme(recipe: Recipe, message: str, random_model: Make) -> None:
    with pytest.raises(PlanError) as caught:
        recipe.check(open_checkpoint(random_model()).spec)
    assert caught.value.message == message and caught.value.hint
    with pytest.raises(PlanError, match="format is 'ggml', wanted one of gptq, awq"):
        Recipe(Scheme(4), format="ggml")


def tensor_bytes(recipe: Recipe, spec: ModelSpec) -> int:
    return sum(tensor.nbytes for tensor in recipe.tensors(spec))


def test_72b_sizes_by_format() -> None:
    """Bytes by hand: codes, scales and zero points of each group, and what each format keeps a linear or a column."""
    spec = model("Qwen2.5-72B")
    weights = spec.linear_parameters
    rest = 2 * (spec.parameters - weights)
    rows = sum(lin.out_features for lin in spec.linears)
    columns = sum(lin.in_features for lin in spec.linears)
    count = len(spec.linears)
    groups = weights // 128
    assert tensor_bytes(Recipe(Scheme(4, 128)), spec) == rest + weights // 2 + groups * 5 // 2 + 4 * columns
    assert tensor_bytes(Recipe(Scheme(4, 128, False), (), "awq"), spec) == rest + weights // 2 + groups * 5 // 2
    compressed = Recipe(Scheme(4, 128), (), "compressed-tensors")
    assert tensor_bytes(compressed, spec) == rest + weights // 2 + groups * 2 + 16 * count
    assert tensor_bytes(Recipe(INT8_ROWS, (), "bnb-int8"), spec) == rest + weights + 4 * rows + count
    state = sum(len(json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16",
                                "shape": [lin.out_features, lin.in_features]})) for lin in spec.linears)  # fmt: skip
    nf4 = Recipe(NF4, (), "bnb-nf4")
    assert tensor_bytes(nf4, spec) == rest + weights // 2 + weights // 64 * 4 + 64 * count + state


# ---------------------------------------------------------------------- the command line


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_inspect_and_eval(
    format: str, two_layers: Path, heldout: Path, calib: Path, tmp_path: Path
) -> None:
    size = [] if format.startswith("bnb") or format == "gguf" else ["--group-size", 32]
    ask = ["quantize", two_layers, "-o", tmp_path / "out", "--format", format, *size]
    predicted = answer(*ask, "--dry-run")
    text = ["--eval-text", heldout, "--sequence-length", 64, "--eval-samples", 2]
    text += ["--calibration", calib, "-n", 4] if FORMATS[format].solved else []
    made = answer(*ask, *text)
    assert predicted["format"] == format and predicted["file_bytes"] == made["file_bytes"]
    written = next((tmp_path / "out").glob("*.gguf"), tmp_path / "out")
    inspected = answer("inspect", written)
    assert inspected["disagreements"] == [] and inspected["scheme"] == f"{predicted['scheme']}, {format}"
    ask = ["eval", written, "--reference", two_layers, "--text", heldout, "-n", 2, "--sequence-length", 64]
    assert answer(*ask)["kl"]["mean"] == pytest.approx(made["drift"]["kl"]["mean"], rel=1e-4)
