"""Plans of what `qwenq quantize` would write: by a target size, by a recipe file, with a wider FFN."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenq.checkpoint.reader import open_source
from qwenq.formats.base import Recipe, Scheme
from qwenq.planning.questions import Question, Resolved
from qwenq.planning.weights import recipe_weights
from tests.conftest import answer, run

TINY = Path(__file__).parents[1] / "data" / "tiny-qwen2"


def dry(*args: object) -> dict[str, Any]:
    return answer("quantize", *args, "--dry-run")


def check_planned(question: Resolved, wanted: dict[str, Any]) -> None:
    """The weights planned are the tensors that a dry run of quantize counts."""
    assert question.weights.total_bytes == wanted["tensor_bytes"]
    assert question.weights.label == wanted["scheme"]
    labels = wanted["schemes"]
    for stage in ("o", "down"):
        groups = {int(part.split(" g")[1]) for part in labels[stage].split(", ") if " g" in part}
        assert question.weights.row_groups[stage] == tuple(sorted(groups))


@pytest.mark.parametrize(
    ("model", "size", "ranks"),
    [
        ("Qwen2.5-72B", "47GB", None),
        ("Qwen2.5-72B", "47GB", 8),
        ("Qwen2.5-0.5B", "600MB", None),
        ("Qwen3-8B", "7GB", 2),
    ],
)
def test_a_target_is_planned_as_it_would_be_written(model: str, size: str, ranks: int | None) -> None:
    padding = () if ranks is None else ("--pad-for-tp", ranks)
    wanted = dry(model, "--target-size", size, *padding)
    question = Question(model, target_size=size, pad_for_tp=ranks).resolve()
    check_planned(question, wanted)
    assert question.weights.intermediate_size == question.spec.intermediate_size
    assert "the recipe that the prior chooses" in question.weights.source
    planned = run("plan", model, "--gpu", "8x RTX 3090", "--target-size", size, *padding, "--json")
    found = json.loads(planned.stdout)
    assert found["weights"]["bytes"] == wanted["tensor_bytes"]
    assert found["tensor_parallel"] == wanted["tensor_parallel"]


def test_a_target_that_no_checkpoint_has_is_an_honest_no() -> None:
    for command in (["vram"], ["plan", "--gpu", "3090"]):
        for size in ("1GB", "145.5GB"):
            result = run(command[0], "Qwen2.5-72B", *command[1:], "--target-size", size)
            assert result.exit_code == 3 and result.stdout == "" and "reachable: 41.49 GB to" in result.stderr


def test_groups_that_do_not_divide_are_not_planned() -> None:
    result = run("vram", "Qwen2.5-0.5B", "--group-size", "100")
    assert result.exit_code == 1 and "group size 100 does not divide its 896 input features" in result.stderr


def test_a_narrow_model_gets_groups_that_divide(tmp_path: Path) -> None:
    """576 inputs are 4.5 groups of 128, but 9 of 64."""
    config = json.loads((TINY / "config.json").read_text())
    config |= {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    (tmp_path / "config.json").write_text(json.dumps(config))
    least = int(run("vram", tmp_path, "--target-size", "1MB").stderr.split("(")[1].split()[0])
    weights = Question(str(tmp_path), target_size=str(least + 4000)).resolve().weights
    assert weights.total_bytes <= least + 4000
    assert set(weights.row_groups["o"]) <= {64, 32} and set(weights.row_groups["down"]) <= {128, 64, 32}


def test_a_saved_recipe_is_planned(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    dry("Qwen2.5-7B", "--bpw", "5", "--save-recipe", path)
    text = path.read_text()
    row = next(line for line in text.splitlines() if line.startswith("3 "))
    edited = '3 = { qkv = "16-bit", o = "8-bit g32", gate_up = "4-bit per channel", down = "4-bit g64" }'
    path.write_text(text.replace(row, edited))
    wanted = dry("Qwen2.5-7B", "--recipe", path)
    question = Question("Qwen2.5-7B", recipe=path).resolve()
    assert question.weights.total_bytes == wanted["tensor_bytes"] and question.weights.label == wanted["scheme"]
    assert 64 in question.weights.row_groups["down"] and 32 in question.weights.row_groups["o"]
    estimated = run("vram", "Qwen2.5-7B", "--recipe", path, "-c", "8k", "--json")
    assert json.loads(estimated.stdout)["weights"]["bytes"] == wanted["tensor_bytes"]
    padded = Question("Qwen2.5-7B", recipe=path, pad_for_tp=4).resolve()
    assert padded.weights.total_bytes == dry("Qwen2.5-7B", "--recipe", path, "--pad-for-tp", 4)["tensor_bytes"]
    other = run("plan", "Qwen2.5-0.5B", "--gpu", "3090", "--recipe", path)
    assert other.exit_code == 1 and "layer '24', Qwen2.5-0.5B has 24 layers" in other.stderr
    path.write_text(text.replace(row, edited.replace("8-bit g32", "8-bit g100")))
    refused = run("plan", "Qwen2.5-7B", "--gpu", "3090", "--recipe", path)
    assert refused.exit_code == 1 and "layer 3, o: 8-bit g100 is not offered" in refused.stderr


def test_a_wider_ffn_is_planned_whole() -> None:
    """29,568 to 29,696 at g128: weights, shapes and the sizes over which vLLM can cut them."""
    question = Question("Qwen2.5-72B", pad_for_tp=8).resolve()
    spec = question.spec
    assert spec.intermediate_size == 29_696 == question.weights.intermediate_size
    assert question.weights.total_bytes == recipe_weights(spec, Recipe(Scheme(4, 128))).total_bytes
    assert question.weights.total_bytes == dry("Qwen2.5-72B", "--pad-for-tp", 8)["tensor_bytes"]
    plain, padded = (
        answer("plan", "Qwen2.5-72B", "--gpu", "8x RTX 3090", *more, "--engine", "vllm")
        for more in ((), ("--pad-for-tp", "8"))
    )
    assert plain["tensor_parallel"]["8"] and padded["tensor_parallel"]["8"] == ""
    assert run("vram", "Qwen2.5-72B", "--pad-for-tp", "0").exit_code == 2


def test_a_group_size_alone_is_a_wish_too() -> None:
    """As in quantize: 4 bits in these groups, whatever a directory holds."""
    weights = Question(str(TINY), group_size=32).resolve().weights
    assert weights.label == "4-bit g32" and weights.group_size == 32


def test_tensors_left_as_they_are_keep_their_dtype(random_model: Callable[..., Path], tmp_path: Path) -> None:
    model = random_model()
    source = open_source(model)
    wanted = dry(model, "--bpw", "6", "--sequence-length", 64, "--save-recipe", tmp_path / "r.toml")
    question = Question(str(model), recipe=tmp_path / "r.toml").resolve()
    assert question.weights.total_bytes == wanted["tensor_bytes"]
    assert sum(question.weights.embed) == source.tensors["model.embed_tokens.weight"].spec.nbytes


def test_what_is_quantized_already_is_no_source(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    config = json.loads((TINY / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("vram", tmp_path, "--target-size", "1MB")
    assert result.exit_code == 1 and f"{tmp_path}: already quantized" in result.stderr
