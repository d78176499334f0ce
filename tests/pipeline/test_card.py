"""The model card: golden text, metadata as a YAML parser reads it, licences, and names that try to break out."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import DATA, answer, run, small_job
from families import model
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from report_runs import changed, manifest
from test_report import NASTY

from qwenq.escaping import yaml_text
from qwenq.formats.base import Recipe, Scheme, get_format
from qwenq.io.json import model_name
from qwenq.pipeline.card import model_card, source_license
from qwenq.pipeline.quantize import quantize

SPEC = model("Qwen2.5-72B")
MIXED = Recipe(Scheme(4, 64), (("model.layers.0.mlp.down_proj", Scheme(8, 64)), ("model.layers.1.mlp.up_proj", None)))


def card(described: dict[str, Any], source: Path, recipe: Recipe = Recipe(Scheme(4, 64))) -> tuple[dict[str, Any], str]:
    """Metadata and text."""
    text = model_card(described, source, SPEC, recipe)
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: qwen\nlanguage:\n- en\n---\n# A model\n")
    metadata, body = card(changed(manifest(), "job.model", "Qwen/Qwen2.5-72B-Instruct"), tmp_path)
    assert metadata == {
        "base_model": "Qwen/Qwen2.5-72B-Instruct",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "qwen",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gptq", "4-bit", "qwenq"],
        "quantized_by": "qwenq",
    }
    lines = body.splitlines()
    for wanted in (
        "# Qwen/Qwen2.5-72B-Instruct, 4-bit g64",
        "None: every linear was quantized as requested.",
        "Measured on `heldout`: 20 windows of 512 tokens, computed in float32.",
        "| KL divergence from the 16-bit model, nats per token | 0.02000 | 0.01800 to 0.02400 |",
        "| top-1 agreement | 80.00 % | 78.00 to 82.00 |",
        "| perplexity increase | +10.00 % | +8.00 to +12.00 |",
        "| perplexity of the 16-bit model | 15.000 |  |",
        "transformers, after `pip install optimum gptqmodel`:",
        "vllm serve . --max-model-len 8192",
        "Tensor-parallel sizes (`--tensor-parallel-size`) that the shapes allow: 1, 2.",
        "- Not 4: FFN width 29568 / 4 = 7392 is not a multiple of the group size 64, so a quantization group would "
        "straddle ranks (--pad-for-tp 4 makes it 29696).",
        "- Scheme: 560 linears 4-bit g64; embedding, norms and head as in the original.",
        "- Options: method gptq, damp_percent 0.02, seed 7.",
        f"- Calibration: `builtin`, 64 x 512 tokens, SHA-256 `{'c' * 64}`.",
    ):
        assert wanted in lines, wanted
    assert "to 4.312 bits per linear weight: 171.3 MB of tensors in the gptq format." in body
    assert "folded" not in body
    folded = card(changed(manifest(), "job.options", {"method": "gptq", "fold": True}), tmp_path)[1]
    assert "; embedding and head as in the original." in folded and "Channel scales are folded" in folded
    told = changed(manifest(), "warnings", ["layer 3 fell back"])
    assert "## Warnings and fallbacks\n\n- layer 3 fell back\n\n" in card(told, tmp_path)[1]


def test_the_example_serves_no_more_than_the_model_was_trained_on(tmp_path: Path) -> None:
    text = model_card(manifest(), tmp_path, replace(SPEC, max_position_embeddings=512), Recipe(Scheme(4, 64)))
    assert "vllm serve . --max-model-len 512\n" in text


def test_the_card_of_a_gguf_file_is_for_llama_cpp(tmp_path: Path) -> None:
    """vLLM and tensor-parallel ranks take none; embedding and head are quantized there."""
    recipe = get_format("gguf").mixture("Q4_K_M", SPEC)
    body = model_card(manifest(), tmp_path, SPEC, recipe, file="It is-Q4_K_M.gguf")
    assert "\nllama-server -m 'It is-Q4_K_M.gguf' -c 8192\nqwenq run . -p 'Hello'\n" in body
    assert "vllm serve" not in body and "tensor-parallel-size" not in body
    assert "; embedding Q4_K, head Q6_K, norms as in the original." in body
    folded = changed(manifest(), "job.options", {"method": "gptq", "fold": True})
    assert "; embedding Q4_K, head Q6_K." in card(folded, tmp_path, recipe)[1]


def test_a_mixed_recipe_does_not_promise_transformers(tmp_path: Path) -> None:
    metadata, body = card(manifest(), tmp_path, MIXED)
    assert metadata["tags"] == ["gptq", "mixed-bits", "qwenq"] and "license" not in metadata
    assert "transformers does not read mixed bits in this format; GPTQModel does." in body
    assert "from transformers import" not in body
    assert "- Scheme: 558 linears 4-bit g64, 1 linear 8-bit g64, 1 linear 16-bit;" in body


def test_the_hub_takes_a_gguf_file_for_what_it_is(tmp_path: Path) -> None:
    """No model of transformers'; and of one type throughout, embedding and head too, it is not mixed."""
    form = get_format("gguf")
    for mixture, bits in (("Q4_K_M", "mixed-bits"), ("Q8_0", "8-bit"), ("F16", "16-bit")):
        metadata, body = card(manifest(), tmp_path, form.mixture(mixture, SPEC))
        assert "library_name" not in metadata and metadata["tags"] == ["gguf", bits, "qwenq"]
        assert ("mixed" in body) == (mixture == "Q4_K_M")


@pytest.mark.parametrize(
    ("readme", "license_text", "wanted"),
    [
        ("---\r\nlicense: apache-2.0\r\nlicense_link: https://x.org/a/LICENSE\r\n---\r\n",
         "", {"license": "apache-2.0", "license_link": "https://x.org/a/LICENSE"}),
        ('---\nlicense: "mit"\n---\n', "Apache License\nVersion 2.0", {"license": "mit"}),
        ("# license: mit\n", "      Apache License\n      Version 2.0, January", {"license": "apache-2.0"}),
        ("", "MIT License\n\nCopyright", {"license": "mit"}),
        ("text\n---\nlicense: mit\n---\n", "Some other terms", {}),
        ("---\nlicense: [a, b]\nlicense_name: x\n---\n", "", {}),
        ("---\nlicense: mit\\nbase_model: evil\n---\n", "", {}),
        ("---\nlicense: *anchor\n---\n", "", {}),
        (None, None, {}),
    ],
)  # fmt: skip
def test_the_licence_is_the_sources(
    tmp_path: Path, readme: str | None, license_text: str | None, wanted: dict[str, str]
) -> None:
    for name, text in (("README.md", readme), ("LICENSE", license_text)):
        if text is not None:
            (tmp_path / name).write_text(text, newline="")
    assert source_license(tmp_path) == wanted


def test_a_readme_that_is_no_text_or_endless(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\n" + b"\xff\x00" * 5_000_000 + b"\nlicense: mit\n---\n")
    assert source_license(tmp_path) == {}


@given(st.text())
@example("\\")
@example('a" b\\n')
@example("\x00\x7f\x85\u2028\ufeff\U0001f600")
def test_any_text_is_one_yaml_scalar(text: str) -> None:
    """The oracle is PyYAML, which refuses lone surrogates as UTF-8 does."""
    line = yaml_text(text)
    assert "\n" not in line and "\r" not in line
    if not re.search("[\ud800-\udfff]", text):
        assert yaml.safe_load(f"key: {line}\nnext: 1\n") == {"key": text, "next": 1}


@pytest.mark.parametrize(
    "name", [NASTY, "a\nlicense: evil", "x: y", "", "../../etc", "[a](b)", "---", "a" * 500, "é/x"]
)
def test_hostile_names_stay_in_their_place(tmp_path: Path, name: str) -> None:
    found = changed(manifest(), "job.model", name)
    found["job"]["calibration"]["text"] = found["drift"]["text"] = found["job"]["evaluation"]["text"] = name
    found["warnings"] = [name]
    metadata, body = card(found, tmp_path)
    assert set(metadata) == {"library_name", "pipeline_tag", "tags", "quantized_by"}
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    inline = {child.type for token in tokens for child in token.children or []}
    assert inline <= {"text", "code_inline", "softbreak", "text_special"}
    assert not [token.type for token in tokens if token.type.startswith("html")]
    assert [token.type for token in tokens].count("heading_open") == 6
    assert [token.type for token in tokens].count("fence") == 2


def test_the_hubs_cache_knows_the_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen2.5-7B" / "snapshots" / ("a" * 40)
    assert model_name(snapshot) == "Qwen/Qwen2.5-7B"
    assert model_name(tmp_path / "Qwen2.5-7B") == "Qwen2.5-7B"
    assert model_name(tmp_path / "models--x" / "snapshots" / "abc") == "abc"
    tiny = shutil.copytree(DATA / "tiny-qwen2", tmp_path / "models--org--tiny" / "snapshots" / ("b" * 40))
    assert answer("inspect", tiny)["spec"]["name"] == "org/tiny"
    assert "org/tiny: " in run("serve", tiny, "--dry-run").stdout


def test_engines_that_do_not_read_it_are_not_shown(tmp_path: Path) -> None:
    """vLLM has no zero points in GPTQ."""
    for recipe, read in ((Recipe(Scheme(4, 64)), True), (Recipe(Scheme(4, 64, sym=False)), False),
                         (Recipe(Scheme(4, 64, sym=False), format="awq"), True)):  # fmt: skip
        body = card(manifest(), tmp_path, recipe)[1]
        assert ("vllm serve . " in body) is read and "qwenq run . " in body
        assert ("qwenq (vLLM does not read it: asymmetric):" in body) is not read


def test_a_directory_is_no_base_model(tmp_path: Path) -> None:
    """The hub would look for a model of that name."""
    for name in ("merged", "Qwen2.5-7B-Instruct"):
        assert "base_model" not in card(changed(manifest(), "job.model", name), tmp_path)[0]


def test_a_job_writes_its_card_and_hashes_it(random_model: Callable[..., Path], tmp_path: Path) -> None:
    source = random_model("My: model")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    results = [quantize(small_job(source, tmp_path / out)) for out in ("a", "b")]
    texts = [(result.out / "README.md").read_text() for result in results]
    assert texts[0] == texts[1] and str(tmp_path) not in texts[0]
    metadata = yaml.safe_load(texts[0].split("---\n")[1])
    assert metadata["license"] == "mit" and "base_model" not in metadata
    assert f"{results[0].drift.kl.mean:.5f}" in texts[0]
    written = (results[0].out / "qwenq-manifest.json").read_text()
    assert re.search(r'"README.md": "[0-9a-f]{64}"', written)
    assert not re.search(r"20\d\d-\d\d-\d\d", texts[0])  # no date
