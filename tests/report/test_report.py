"""`qwenq report`: the figures are the manifests', in Markdown and on the page; hostile manifests stay text."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from report_runs import changed, manifest, write_72b, write_run

from qwenq.errors import CheckpointError
from qwenq.formats.base import Scheme, Variant
from qwenq.report.benchmarks import gpu_peaks, read_benchmarks, read_measurements
from qwenq.report.compose import Extras, compose
from qwenq.report.html import to_html
from qwenq.report.machines import loaders_of
from qwenq.report.runs import load_runs, read_run
from qwenq.report.writing import to_markdown
from tests.conftest import run

BENCHMARK = {
    "tool": "GPTQModel", "version": "7.7.0", "setting": "default", "text": "heldout", "kl": 0.05, "kl_low": 0.04,
    "kl_high": 0.06, "bits_per_linear_weight": 4.3, "bytes": 172_000_000, "perplexity": 17.0, "top1": 0.7,
    "seconds": 100.0, "peak_rss_bytes": 1_500_000_000, "date": "2026-11-23",
}  # fmt: skip


def runs_of(tmp_path: Path, **manifests: dict[str, Any]) -> list[Path]:
    return [write_run(tmp_path / name, content) for name, content in manifests.items()]


def texts(directories: list[Path], **extras: Any) -> tuple[str, str]:
    """Page and Markdown."""
    document = compose(load_runs(directories), Extras(**extras))
    return to_html(document), to_markdown(document)


class Page(HTMLParser):
    """Elements of a page; fails for tags that do not nest."""

    void = frozenset(("meta", "path", "br", "img", "link", "input"))

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        return "".join(self.said)


# ---------------------------------------------------------------------- Markdown, golden pieces


def test_markdown_says_the_manifests_figures(tmp_path: Path) -> None:
    directories = runs_of(tmp_path, good=manifest(), base=manifest(method="rtn", kl=0.1))
    _, text = texts(directories, title="A title", command="make it", notes=("A note.",))
    lines = text.splitlines()
    assert lines[0] == "# A title"
    heads = [line for line in lines if line.startswith("## ")]
    assert heads == [
        "## Warnings and fallbacks", "## What was lost", "## Read this with it", "## KL against size",
        "## Where it was lost", "## Which rigs hold it", "## Memory against context",
        "## Engines and tensor parallelism", "## Time and memory of the job", "## Provenance",
    ]  # fmt: skip
    for wanted in (
        "None. All 42 linears were quantized as asked, none fell back, and every figure below is finite.",
        "|  | good | base |",
        "| scheme | 4-bit g64 | 4-bit g64 |",
        "| method | gptq | rtn |",
        "| size of all files | 171.3 MB | 171.3 MB |",
        "| bits per linear weight | 4.312 | 4.312 |",
        "| mean KL | 0.02000 (0.01800 to 0.02400) | 0.1000 (0.0900 to 0.1200) |",
        "| KL, 99th percentile | 0.2000 | 1.000 |",
        "| top-1 agreement | 80.00 % (78.00 to 82.00) | 80.00 % (78.00 to 82.00) |",
        "| perplexity | 16.500 (SE 0.600) | 16.500 (SE 0.600) |",
        "| perplexity increase | +10.00 % (+8.00 to +12.00) | +10.00 % (+8.00 to +12.00) |",
        "- good has 0.20 of the KL of rounding to nearest, base.",
        "- A note.",
        "| v_proj | −23.0 (worst −22.0, layer 0) | – |",
        "| 2 | −28.0 | −28.0 |",
        "| wall time | 2m05s | 2m05s |",
        "| peak memory | 1.20 GB | 1.20 GB |",
        "| forward | 1m01s | 1m01s |",
        "Command: `make it`.",
        "| options.method | gptq | rtn |",
        "| seed | 7 |",
        f"| tokens\\_sha256 | `{'c' * 64}` |".replace("\\_", "_"),
        f"| `model.safetensors` | `{'5' * 64}` |",
        "- not computed for good: no tensors beside its manifest",
    ):
        assert wanted in lines, wanted
    assert "16-bit model's perplexity there is 15.000 (standard error 0.500)" in text
    assert "20 windows of 512 tokens, computed in float32" in text


def test_warnings_come_first_and_fallbacks_are_never_lost(tmp_path: Path) -> None:
    fallen = changed(manifest(), "layers.1.linears.6.fallback", "not positive definite")
    told = fallen | {"warnings": ["model.layers.1.x.down_proj: fell back to rounding to nearest (why)"]}
    other = changed(manifest(), "drift.text_sha256", "f" * 64)
    unlike = manifest() | {"warnings": [f"w{k}" for k in range(30)]}
    unlike["drift"] = unlike["drift"] | {"compute_dtype": "bfloat16", "noise_floor_kl": 0.0003}
    unlike["job"]["source"] = {"config.json": "1" * 64}
    page, text = texts(runs_of(tmp_path, fallen=fallen, told=told, other=other, unlike=unlike))
    first = text.split("## What was lost")[0].splitlines()[4:]
    assert first[2] == "- `fallen`: 1 linear fell back to rounding to nearest: model.layers.1.x.down_proj, ..."
    assert "- `told`: model.layers.1.x.down\\_proj: fell back" not in text  # underscores within words mean nothing
    assert "- `told`: model.layers.1.x.down_proj: fell back to rounding to nearest (why)" in first
    assert "- `unlike`: w19" in first and "- `unlike`: w20" not in first
    assert "- `unlike`: and 10 more, in its manifest" in first
    assert "- `other` has its drift measured on different tokens than `fallen`: do not compare their figures" in first
    narrow = "has its drift computed in bfloat16, `fallen` in float32: differences of KL below 0.0006 mean nothing"
    assert f"- `unlike` {narrow}" in first
    assert "- `unlike` was made from different source files than `fallen`: do not compare their figures" in first
    assert page.index('<section id="warnings">') < page.index('<section id="summary">')


def test_a_changed_manifest_is_the_first_warning(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, run=manifest() | {"warnings": ["something else"]})
    file = run / "qwenq-manifest.json"
    file.write_text(file.read_text().replace('"mean": 0.02', '"mean": 0.01'))
    _, text = texts([run])
    first = text.split("## What was lost")[0].splitlines()[4:]
    assert first[2] == "- `run`: qwenq-manifest.json: changed: its digest does not match its content"
    assert first[3] == "- `run`: something else"


def test_figures_that_are_no_numbers_say_so(tmp_path: Path) -> None:
    broken = manifest()
    for name in ("kl", "top1_agreement", "perplexity_increase_percent"):
        broken["drift"][name] = {"mean": None, "low": None, "high": None}
    broken["drift"] |= {"perplexity": None, "perplexity_se": None, "kl_p99": None, "non_finite": 3}
    page, text = texts(runs_of(tmp_path, broken=broken))
    assert "| mean KL | not finite |" in text and "| perplexity | not finite (SE –) |" in text
    assert "- `broken`: its drift is not a finite number" in text
    assert not re.search(r"\bnan\b", Page(page).text, re.I)


def test_a_layer_beyond_any_model_is_refused(tmp_path: Path) -> None:
    """A plot's ticks go to the last layer: 2^61 of them would not end."""
    content = manifest()
    content["layers"][-1]["layer"] = 1 << 61
    with pytest.raises(CheckpointError, match=r"layer .*whole number below 1000"):
        load_runs([write_run(tmp_path / "run", content)])


def test_long_names_get_short_labels(tmp_path: Path) -> None:
    names = {f"Qwen2.5-72B-Instruct-{end}": manifest() for end in ("4bit", "8bit-g128")}
    assert [run.label for run in load_runs(runs_of(tmp_path / "a", **names))] == ["4bit", "8bit-g128"]
    names = {"one-very-long-name-here": manifest(), "another-quite-long-name": manifest()}
    runs = load_runs(runs_of(tmp_path / "b", **names))
    assert [run.label for run in runs] == ["A", "B"]
    text = to_markdown(compose(runs, Extras()))
    assert "The runs: A is `one-very-long-name-here`, B is `another-quite-long-name`." in text
    deep = load_runs([write_run(tmp_path / k / "run" / "out", manifest()) for k in ("x", "y")])
    assert [run.name for run in deep] == ["x/run/out", "y/run/out"]
    same = load_runs([write_run(tmp_path / k / "out", manifest()) for k in ("x", "y")])
    assert [run.name for run in same] == ["x/out", "y/out"]


# ---------------------------------------------------------------------- plots


def tick_positions(svg: str) -> dict[float, float]:
    """y of each label of the vertical axis, by its value."""
    found = re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end" class="tick">([^<]+)</text>', svg)
    return {float(text.replace("−", "-")): float(y) - 4.5 for y, text in found}


def test_points_stand_where_their_values_are(tmp_path: Path) -> None:
    """The oracle is the drawn axis itself: marks are read off between its ticks."""
    file = tmp_path / "benchmarks.jsonl"
    file.write_text(json.dumps(BENCHMARK) + "\n\n")
    directories = runs_of(tmp_path, good=manifest(), base=manifest(method="rtn", kl=0.1))
    page, _ = texts(directories, benchmarks=read_benchmarks(file))
    svg = re.search(r'<svg[^>]*aria-labelledby="kl-size-0-w-t.*?</svg>', page, re.S)[0]  # type: ignore[index]
    ticks = sorted(tick_positions(svg).items())
    (a, at_a), (b, at_b) = ticks[0], ticks[-1]
    circle = float(re.search(r'class="mark s0" d="M[\d.]+ ([\d.]+)', svg)[1])  # type: ignore[index]
    read = math.exp(math.log(a) + (circle - at_a) / (at_b - at_a) * math.log(b / a))
    assert read == pytest.approx(0.02, rel=0.01)
    assert svg.count('class="mark s0"') == 1 and svg.count('class="mark s1"') == 1
    assert svg.count('class="hollow s2"') == 1 and ">GPTQModel default</text>" in svg
    assert svg.count('class="stroke s') == 9  # three bars with two ends each
    assert "log scale" in svg and "size of all files, MB" in svg
    caption = "circles: this project's solver, squares: rounding to nearest, hollow marks: other tools."
    assert caption in Page(page).text and "squares" not in texts(directories[:1])[1]


def test_other_texts_get_a_figure_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.jsonl"
    file.write_text("\n".join(json.dumps(BENCHMARK | change) for change in ({}, {"text": "wikitext", "bytes": None})))
    page, text = texts(runs_of(tmp_path, good=manifest()), benchmarks=read_benchmarks(file))
    assert "### Read on heldout" in text and "### Read on wikitext" in text
    assert "stored bits per linear weight</text>" in page  # where some size is unknown
    assert "| GPTQModel 7.7.0 | default | – | 4.300 | 0.05000 (0.04000 to 0.06000) | 70.00 % |" in text


def test_every_picture_is_described_and_drawn_twice(tmp_path: Path) -> None:
    page, _ = texts(runs_of(tmp_path, good=manifest()))
    seen = Page(page)
    assert seen.tags["svg"] == seen.tags["title"] - 1 == seen.tags["desc"] == 2 * seen.tags["figure"] == 6
    ids = [value for _, name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    named = [value.split() for tag, name, value in seen.attributes if tag == "svg" and name == "aria-labelledby"]
    assert all(one in ids for pair in named for one in pair)
    links = [value[1:] for tag, name, value in seen.attributes if tag == "a" and name == "href"]
    assert links and set(links) <= set(ids)
    assert ("html", "lang", "en") in seen.attributes


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page, _ = texts(runs_of(tmp_path, good=manifest(layers=80), base=manifest(layers=80, method="rtn", kl=0.1)))
    assert len(page) < 500_000
    assert set(re.findall(r"https?:[^\"' <]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in page and "@import" not in page
    seen = Page(page)
    assert not {name for _, name, _ in seen.attributes} & {"src", "srcset", "action", "data", "poster"}
    assert [value for tag, name, value in seen.attributes if tag == "script" and name == "type"] == ["application/json"]
    data = json.loads(re.search(r'id="figures">(.*?)</script>', page)[1])  # type: ignore[index]
    assert data["runs"][0]["kl"] == [0.02, pytest.approx(0.018), pytest.approx(0.024)]
    assert data["runs"][0]["error_db"]["k_proj"][2] == -23.0 and data["runs"][1]["error_db"]["k_proj"][2] is None


# ---------------------------------------------------------------------- the planner's part


def measured(phase: str, **changes: Any) -> dict[str, Any]:
    """A row as `qwenq vram measure` saves it."""
    driver = 45 << 30 if phase == "prefill" else 42 << 30
    row = {"context": 8192, "phase": phase, "device": "GPU 0", "kind": "A100 PCIe 80GB", "reserved_bytes": 0}
    return row | {"allocated_bytes": 40 << 30, "driver_bytes": driver, "predicted_bytes": 44 << 30} | changes


def test_measurements_add_up_over_gpus_and_leave_the_cpu_out(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    rows = [measured("prefill"), measured("prefill", device="GPU 1", driver_bytes=0), measured("decode")]
    rows.append(measured("decode", device="CPU", kind="CPU", driver_bytes=0))
    file.write_text(json.dumps({"model": "somewhere/else", "rows": rows}))
    found = read_measurements(file)
    assert gpu_peaks(found) == {8192: 85 << 30} and {m.checkpoint for m in found} == {"else"}
    directory = write_72b(tmp_path / "4-bit", manifest(layers=80), Scheme(4, 128))
    _, text = texts([directory], measurements=found)
    assert "A measurement of else was given, which is not one of these runs." in text
    assert "No GPU measurements were given." in text


def test_rigs_engines_and_memory_of_a_72b(tmp_path: Path) -> None:
    """The planner's own figures (checked elsewhere against measurements) reach the page."""
    plain = write_72b(tmp_path / "4-bit", manifest(layers=80), Scheme(4, 128))
    fine = write_72b(tmp_path / "4-bit-g32", manifest(layers=80, scheme="4-bit g32"), Scheme(4, 32))
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"model": str(plain), "rows": [measured(phase) for phase in ("prefill", "decode")]}))
    page, text = texts([plain, fine], rigs=("2x RTX 3090", "RTX 5090"), measurements=read_measurements(file))
    assert "| 2x RTX 3090 | 47.16 GiB | 20,991 | 10,751 |" in text  # as `qwenq plan` says
    assert "| RTX 5090 | 31.35 GiB | no | no |" in text
    assert re.search(r"\| 8k \| 4\d\.\d\d \(4\d\.\d\d to 4\d\.\d\d; measured 45\.00\) \|", text)
    assert "| vLLM | TP 1 | TP 1, 2, 4 | CPU: logits equal |" in text
    assert "| llama.cpp | no (GGUF only) | no (GGUF only) | untried |" in text
    assert "- No TP 8 for 4-bit-g32: FFN width 29568 / 8 = 3696 is not a multiple of the group size 32" in text
    assert "Crosses are measurements" in text and "Crosses are measurements" in Page(page).text
    assert "| 8,192 | GPU 0 | prefill | 40.000 | 45.000 | 44.000 | +10.0 % |" in text
    memory = re.search(r'<svg[^>]*aria-labelledby="memory-context-w-t.*?</svg>', page, re.S)[0]  # type: ignore[index]
    assert "A100 PCIe 80GB</text>" in memory and "RTX 5090</text>" not in memory  # below every curve
    assert memory.count('class="stroke s0"') == 2  # one cross


GPTQ_8 = {"quant_method": "gptq", "bits": 8, "group_size": 64}
GPTQ_4 = GPTQ_8 | {"bits": 4}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64}}},
}
AWQ_4 = {"quant_method": "awq", "bits": 4, "group_size": 64}
NF4_CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("config", "variant", "tried"),
    [
        (GPTQ_4 | {"group_size": -1}, Variant(4, -1, False), "CPU: logits equal"),
        (GPTQ_8, Variant(8, 64, False), "CPU: logits equal, 8-bit products by plain torch"),
        (GPTQ_4, Variant(4, 64, True), "CPU: logits equal, 8-bit products by plain torch"),
        (PACKED, Variant(4, 64, False), "CPU: logits equal"),
        (PACKED, Variant(8, 64, True), "CPU: logits equal, 8-bit products by plain torch"),
        (AWQ_4, Variant(4, 64, False), "CPU: logits equal"),
        (None, Variant(16, 0, False), "CPU: logits equal"),
        (GPTQ_4 | {"checkpoint_format": "gptq_v2"}, Variant(4, 64, False), "untried"),
        (NF4_CONFIG, Variant(4, 64, False), "untried"),
    ],
)
def test_engines_tried_are_those_of_the_readme(config: dict[str, Any] | None, variant: Variant, tried: str) -> None:
    found = {loader.name: loader for loader in loaders_of({"quantization_config": config}, variant)}
    second = bool(config) and config.get("checkpoint_format") == "gptq_v2"
    assert found["vLLM"].tried == tried and bool(found["vLLM"].reason) == second
    assert found["qwenq"].tried == "CPU: in the tests"
    assert all(loader.tried == "untried" for name, loader in found.items() if name in ("SGLang", "ExLlamaV2"))


def test_llama_cpp_is_tried_on_gguf_files() -> None:
    """By `make interop-llamacpp`; Ollama is not (docs/limits.md)."""
    config = {"quant_method": "gguf", "types": {"model.layers.0.mlp.up_proj": "Q4_K"}}
    found = {loader.name: loader for loader in loaders_of({"quantization_config": config}, Variant(4, 256, True))}
    assert found["llama.cpp"].tried == "CPU: KL as eval's" and found["Ollama"].tried == "untried"
    assert found["vLLM"].reason == found["SGLang"].reason == "GGUF is not its format"


def test_a_config_that_no_format_reads_is_not_taken_for_16_bits(tmp_path: Path) -> None:
    run = write_72b(tmp_path / "4-bit", manifest(layers=80), Scheme(4, 128))
    config = json.loads((run / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "marlin"
    (run / "config.json").write_text(json.dumps(config))
    line = "not computed for 4-bit: config.json: checkpoint_format is 'marlin', wanted 'gptq' or 'gptq_v2'"
    assert texts([run])[1].count(line) == 2  # rigs, engines


def test_what_was_tried_differs_by_variant(tmp_path: Path) -> None:
    four = write_72b(tmp_path / "4-bit", manifest(layers=80), Scheme(4, 128))
    eight = write_72b(tmp_path / "8-bit", manifest(layers=80, scheme="8-bit g128"), Scheme(8, 128))
    _, text = texts([four, eight], rigs=("RTX 5090",))
    assert "| CPU: logits equal; CPU: logits equal, 8-bit products by plain torch |" in text
    assert re.search(r"\| ExLlamaV2 \| by layers \| no \(4 bits only\) \| untried \|", text)


def test_a_real_run_is_reported(tiny_result: Any) -> None:
    """On the trained tiny model: the report's figures are those the job returned."""
    made = {method: tiny_result(4, method) for method in ("gptq", "rtn")}
    page, text = texts([result.out for result in made.values()])
    kl = made["gptq"].drift.kl
    assert f"{kl.mean:.6f} ({kl.low:.6f} to {kl.high:.6f})" in text
    assert "holds every variant at the model's full context of 512 tokens" in text
    assert Page(page).tags["figure"] == 4


# ---------------------------------------------------------------------- hostile manifests

NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>`|`*_[a](javascript:alert(1))</title>&lt;\u202e"


def nasty_run(value: str = NASTY) -> dict[str, Any]:
    found = manifest()
    found["job"] |= {"model": value, value: value, "source": {value: value}, "calibration": {value: {value: value}}}
    found["job"]["options"]["method"] = value
    found["drift"] |= {"text": value, "compute_dtype": value, "text_sha256": value}
    found["warnings"] = [value, value]
    found["run"] |= {"torch": value, value: [value], "stages_s": {value: 1.0}}
    for layer in found["layers"]:
        layer["linears"][0] |= {"name": f"model.layers.0.{value.replace('.', '')}", "scheme": value, "fallback": value}
    return found


def test_a_hostile_manifest_stays_text_on_the_page(tmp_path: Path) -> None:
    directories = runs_of(tmp_path, **{"<b>x": nasty_run(), "y": manifest()})
    plain = Page(texts(runs_of(tmp_path / "plain", **{"bx": nasty_run("harmless"), "y": manifest()}))[0])
    page, _ = texts(directories, title=NASTY, command=NASTY[:-1], notes=(NASTY[:-1],))
    seen = Page(page)
    assert seen.tags["script"] == 1 and seen.tags["img"] == 0 and seen.tags["b"] == 0
    kinds = set(plain.tags) | {"section", "ul", "li"}
    assert set(seen.tags) <= kinds
    assert not [name for _, name, _ in seen.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in seen.text  # said, not run
    assert "\u202e" not in page


def test_a_hostile_manifest_stays_text_in_markdown(tmp_path: Path) -> None:
    """The oracle is a Markdown parser: no link, image, tag or emphasis, and no cell too many."""
    directories = runs_of(tmp_path, **{"x`|`": nasty_run(), "y": manifest()})
    _, text = texts(directories, title=NASTY, command=NASTY, notes=(NASTY,))
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inline = [child.type for token in tokens for child in token.children or []]
    assert set(inline) <= {"text", "code_inline", "softbreak", "text_special"}
    assert not [token.type for token in tokens if token.type.startswith(("html", "fence", "code_block", "blockquote"))]
    cells = Counter(token.type for token in tokens)
    for start in (k for k, token in enumerate(tokens) if token.type == "table_open"):
        end = next(k for k in range(start, len(tokens)) if tokens[k].type == "table_close")
        rows = [token.type for token in tokens[start:end]]
        assert rows.count("td_open") == rows.count("th_open") * (rows.count("tr_open") - 1)
    assert cells["table_open"] >= 8 and cells["heading_open"] == 1 + 10 + 4  # title, sections, figures


def converted(origin: dict[str, Any] | None) -> dict[str, Any]:
    """What `qwenq convert` writes of a checkpoint with this manifest."""
    made = manifest()
    job = {key: made["job"][key] for key in ("model", "scheme", "overrides", "source")}
    job |= {"convert": {"from": "gptq", "to": "awq"}, "format": "awq"}
    kept = {key: made[key] for key in ("parameters", "tensor_bytes", "bits_per_linear_weight", "files")}
    handed_on = origin and {key: origin[key] for key in ("job", "drift", "warnings", "layers")}
    run = {"seconds": 3.0, "peak_rss_bytes": 5_000_000}
    return kept | {"file_bytes": 171_000_000, "job": job, "made_from": handed_on, "run": run}


def test_a_conversion_is_reported_by_what_it_hands_on(tmp_path: Path) -> None:
    origin = changed(manifest(kl=0.05), "warnings", ["something of the solver"])
    run = read_run(converted(origin), "run", Path("run"))
    before = read_run(origin, "run", Path("run"))
    assert (run.drift, run.layers, run.method, run.warnings) == (
        before.drift, before.layers, before.method, before.warnings,
    )  # fmt: skip
    assert run.file_bytes == 171_000_000 and run.converted and run.job["format"] == "awq"
    page, text = texts(runs_of(tmp_path, a=origin, b=converted(origin)))
    assert "Converted, so time and memory cover only the conversion: b." in text
    assert "do not compare" not in text, "both were made from the same source"
    assert "0.0500" in page


def test_a_conversion_of_what_had_no_manifest_is_left_out_and_said(tmp_path: Path) -> None:
    bare, old = converted(None), converted(manifest())
    del old["made_from"]["layers"]  # as versions before wrote it
    directories = runs_of(tmp_path, a=manifest(), b=bare, c=old)
    result = run("report", *directories, "-o", tmp_path / "out")
    assert result.exit_code == 0
    lines = [f"{name}: qwenq-manifest.json: no drift in it, nor errors by layer: left out" for name in "bc"]
    assert result.stderr.splitlines() == [f"warning: {line}" for line in lines]
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(line in text for line in lines) and "quantized: 1 variant" in text
    for given in (directories[1:], directories[1:2]):
        alone = run("report", *given, "-o", tmp_path / "none")
        assert alone.exit_code == 1 and not (tmp_path / "none").exists()
        assert alone.stderr.splitlines()[-1].startswith("hint: it was converted from a checkpoint without them")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("drift.kl.mean", "much", "drift.kl.mean is 'much', wanted a number"),
        ("drift.kl", [1, 2], "drift.kl is [1, 2], wanted an object"),
        ("drift.windows", 2.5, "drift.windows is 2.5, wanted a whole number"),
        ("drift.perplexity", True, "drift.perplexity is True, wanted a number"),
        ("file_bytes", -1, "file_bytes is -1, wanted a whole number"),
        ("layers.2.linears.1.error_db", {}, "layers[2].linears[1].error_db is {}, wanted a number"),
        ("layers", 7, "layers is 7, wanted a list of at most 1000 objects"),
        ("layers.0", None, "wanted a list of at most 1000 objects"),
        ("warnings", ["a", 1], "warnings is ['a', 1], wanted a list of texts"),
        ("job.model", None, "job.model is None, wanted a text"),
        ("job", "x\n" * 100, "wanted an object"),
    ],
)
def test_a_wrong_type_is_named(path: str, value: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_run(changed(manifest(), path, value), "run", Path("run"))
    assert said in error.value.message and error.value.message.startswith("run: qwenq-manifest.json: ")
    assert "\n" not in error.value.message and len(error.value.message) < 200


# ---------------------------------------------------------------------- the command


def test_the_command_writes_both(tmp_path: Path) -> None:
    directories = runs_of(tmp_path, a=manifest(), b=manifest(kl=0.1))
    result = run("report", *directories, "-o", tmp_path / "out")
    assert result.exit_code == 0 and result.stderr == ""
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.md"]
    again = run("report", *directories, "-o", tmp_path / "out", "--json", "--title", "T")
    assert json.loads(again.stdout) == {
        "html": str(tmp_path / "out/report.html"), "markdown": str(tmp_path / "out/report.md"),
    }  # fmt: skip
    assert (tmp_path / "out/report.md").read_text().startswith("# T\n")


def test_errors_of_report(tmp_path: Path) -> None:
    (made,) = runs_of(tmp_path, a=manifest())
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"tool": "x", "text": "y", "kl": 1}\n{"tool": 3}\n')
    (tmp_path / "bad.json").write_text('{"rows": []}')
    (tmp_path / "file").touch()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/qwenq-manifest.json").write_text('{"job": {')
    cases = [
        ([tmp_path / "none"], "none: no such directory"),
        ([tmp_path / "empty"], "empty: no qwenq-manifest.json in it"),
        ([tmp_path / "torn"], "qwenq-manifest.json: not JSON"),
        ([made, made], "the same directory was given twice"),
        ([made, "--gpu", "RTX 9999"], "unknown GPU 'RTX 9999'"),
        ([made, "--engine", "magic"], "unknown engine 'magic'"),
        ([made, "--engine", "llama.cpp"], "llama.cpp reads GGUF, not these checkpoints"),
        ([made, "--benchmarks", tmp_path / "bad.jsonl"], "bad.jsonl line 2: tool is 3, wanted a text"),
        ([made, "--benchmarks", tmp_path / "no.jsonl"], "no.jsonl: No such file or directory"),
        ([made, "--measured", tmp_path / "bad.json"], "bad.json: model is None, wanted a text"),
    ]
    for arguments, said in cases:
        result = run("report", *arguments, "-o", tmp_path / "out")
        code = 2 if {"--gpu", "--engine"} & set(arguments) else 1
        assert result.exit_code == code and result.stdout == "", arguments
        assert said in result.stderr.splitlines()[0] and len(result.stderr.splitlines()) <= 2, result.stderr
        assert not (tmp_path / "out").exists()
    result = run("report", made, "-o", tmp_path / "file")
    assert result.exit_code == 1 and "choose another place" in result.stderr
    assert run("report", made).exit_code == 2 and run("report", "-o", "x").exit_code == 2


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, a=manifest())
    code = (
        f"import sys; sys.argv = ['qwenq', 'report', {str(run)!r}, '-o', {str(tmp_path / 'out')!r}]\n"
        "from qwenq.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
