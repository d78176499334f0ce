"""The model card: `README.md` with the hub's metadata, written from what a finished job has to say.

Equal jobs have equal cards: no date, no place, nothing of the host. Names and texts may come from anywhere, so they are
quoted in the metadata and escaped in the text.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenq.checkpoint.manifest import changed
from qwenq.escaping import code, markdown, shown, table, yaml_text
from qwenq.formats.base import Recipe, Scheme, Variant, get_format, label_of
from qwenq.io.json import MAX_SMALL_BYTES, inside, read_limited
from qwenq.model.spec import ModelSpec
from qwenq.planning.tensor_parallel import sizes_of_recipe
from qwenq.units import counted, format_gb

CARD_NAME = "README.md"
_README_BYTES = 1 << 16  # metadata comes first
_MAX_WARNINGS = 50
_KEPT = "as in the original"
_OUTSIDE = ("embedding", "norms", "head")
SERVED_CONTEXT = 8192  # of the example, where the model was trained on so much
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95})/([A-Za-z0-9][\w.-]{0,95})", re.ASCII)  # owner and name
_METADATA = re.compile(r"---\r?\n(.*?)\r?\n---\s*\n", re.DOTALL)
_LICENSE = re.compile(
    r"^(license(?:_name|_link)?):[ \t]*[\"']?([\w.:/+-]{1,200})[\"']?[ \t]*\r?$", re.ASCII | re.MULTILINE
)


def model_card(
    described: Mapping[str, Any],
    source: Path,
    spec: ModelSpec,
    recipe: Recipe,
    *,
    hashes: Mapping[str, str] | None = None,
    converted_from: str = "",
    file: str = "",
    outside: Mapping[str, str] | None = None,
) -> str:
    """The card of the checkpoint that `described` (the manifest but for the files' hashes) tells of.

    source: the 16-bit model's directory, whose licence is kept. hashes: SHA-256 of its files; CheckpointError
    where what is read has another. converted_from: the format it was quantized in, where that is another. file: the
    first one, where files alone are the model. outside: what `embedding`, `norms` and `head` are, those that are not as
    in the original though the recipe leaves them alone: `in float16`.
    """
    job = described["job"]
    name = shown(str(job["model"]))
    converted = [f"- Quantized in the {markdown(converted_from)} format, then converted bit for bit."]
    lines = ["---", *_metadata(job, source_license(source, hashes), recipe), "---", ""]
    mixture = "" if converted_from else str(job.get("gguf_type") or "")
    called = shown(mixture) or recipe.label
    lines += [f"# {markdown(name)}, {markdown(called)}", ""]
    lines += [
        f"{markdown(name)} quantized by qwenq {markdown(str(job['qwenq']))} to "
        f"{described['bits_per_linear_weight']:.3f} bits per linear weight: {format_gb(described['file_bytes'])} of "
        f"tensors in the {markdown(recipe.format)} format. Its loss against the 16-bit model was measured and is shown "
        "below.",
        "",
        "## Warnings and fallbacks",
        "",
        *_warnings(described["warnings"]),
        "",
        "## What was lost",
        "",
        *_drift(described["drift"]),
        "",
        "## Loading it",
        "",
        *_loading(spec, recipe, file),
        "",
        "## How it was made",
        "",
        *_provenance(job, described, spec, recipe, outside or {}),
        *(converted if converted_from else ()),
        "",
        "## Limits",
        "",
        "- The loss was measured on one text. Other languages or tasks can lose more; `qwenq eval` measures it on text "
        "like your own.",
        "- Nothing else was evaluated, neither tasks nor safety. Results known for the original are an upper bound.",
        "- qwenq's `docs/limits.md` lists which engines were tested with such checkpoints.",
    ]
    return "\n".join(lines) + "\n"


def _metadata(job: Mapping[str, Any], licence: Mapping[str, str], recipe: Recipe) -> Iterator[str]:
    """Lines of the hub's front matter; a base model only where its name is one there, not a directory's."""
    name = str(job["model"])
    if HUB_NAME.fullmatch(name):
        yield f"base_model: {yaml_text(name)}"
        yield "base_model_relation: quantized"
    for key, value in licence.items():
        yield f"{key}: {yaml_text(value)}"
    if not get_format(recipe.format).whole_file:  # the hub knows such files by themselves
        yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    bits = "mixed-bits" if recipe.mixed else f"{recipe.default.bits}-bit" if recipe.default else "16-bit"
    yield "tags:"
    yield from (f"- {yaml_text(tag)}" for tag in (*get_format(recipe.format).tags, bits, "qwenq"))
    yield "quantized_by: qwenq"


def source_license(source: Path, hashes: Mapping[str, str] | None = None) -> dict[str, str]:
    """`license`, and its name and link, as the source's README says; else as its LICENSE begins; else nothing."""
    readme = _beginning(source, CARD_NAME, hashes)
    if metadata := _METADATA.match(readme):
        found: dict[str, str] = dict(_LICENSE.findall(metadata[1]))
        if "license" in found:
            return {key: found[key] for key in ("license", "license_name", "license_link") if key in found}
    words = " ".join(_beginning(source, "LICENSE", hashes)[:400].split())
    if words.startswith("Apache License Version 2.0"):
        return {"license": "apache-2.0"}
    return {"license": "mit"} if words.startswith("MIT License") else {}


def _beginning(directory: Path, name: str, hashes: Mapping[str, str] | None) -> str:
    path = inside(directory, name)
    text, digest = b"", None
    if os.path.lexists(path):
        text = read_limited(path, MAX_SMALL_BYTES)
        digest = hashlib.sha256(text).hexdigest()
    if hashes is not None and hashes.get(name) != digest:
        raise changed(path)
    return text[:_README_BYTES].decode("utf-8", errors="replace").removeprefix("\ufeff")


def _warnings(warnings: Sequence[str]) -> Iterator[str]:
    yield from (f"- {markdown(shown(str(line), 300))}" for line in warnings[:_MAX_WARNINGS])
    if len(warnings) > _MAX_WARNINGS:
        yield f"- and {len(warnings) - _MAX_WARNINGS} more, in `qwenq-manifest.json`"
    if not warnings:
        yield "None: every linear was quantized as requested."


def _drift(drift: Mapping[str, Any]) -> Iterator[str]:
    def figure(value: float | None, spec: str, unit: str = "") -> str:
        return "not finite" if value is None else f"{value:{spec}}{unit}"

    def row(label: str, key: str, spec: str, scale: float = 1.0, unit: str = "") -> list[str]:
        mean, low, high = (None if (v := drift[key][k]) is None else scale * v for k in ("mean", "low", "high"))
        interval = "" if low is None or high is None else f"{low:{spec}} to {high:{spec}}"
        return [label, figure(mean, spec, unit), interval]

    windows = counted(drift["windows"], "window")
    yield (
        f"Measured on {code(shown(str(drift['text'])))}: {windows} of {drift['window_tokens']} tokens, "
        f"computed in {markdown(str(drift['compute_dtype']))}."
    )
    yield ""
    yield from table(
        ["", "mean", "95 % interval"],
        [
            row("KL divergence from the 16-bit model, nats per token", "kl", ".5f"),
            row("top-1 agreement", "top1_agreement", ".2f", 100, " %"),
            row("perplexity increase", "perplexity_increase_percent", "+.2f", 1, " %"),
            ["perplexity", figure(drift["perplexity"], ".3f"), ""],
            ["perplexity of the 16-bit model", figure(drift["reference_perplexity"], ".3f"), ""],
        ],
        "lrr",
    )


def _loading(spec: ModelSpec, recipe: Recipe, file: str) -> Iterator[str]:
    """For each engine the commands, run in this directory; transformers only where it reads the recipe."""
    there = get_format(recipe.format).by_transformers(recipe, recipe.schemes(spec))
    if there.reason:
        yield there.reason
    else:
        yield f"transformers, after `pip install {there.install}`:"
        yield ""
        yield "```python"
        more = f", {there.config.partition('(')[0]}" if there.config else ""
        yield f"from transformers import AutoModelForCausalLM, AutoTokenizer{more}"
        yield ""
        if there.config:
            yield f"how = {there.config}"
        how = ", quantization_config=how" if there.config else ""
        yield f'model = AutoModelForCausalLM.from_pretrained(".", device_map="auto"{how})'
        yield 'tokenizer = AutoTokenizer.from_pretrained(".")'
        yield "```"
    served = min(SERVED_CONTEXT, spec.max_position_embeddings)
    if file:
        yield from ("", "llama.cpp, and qwenq itself:", "", "```")
        yield f"llama-server -m {shlex.quote(shown(file))} -c {served}"
        yield from ("qwenq run . -p 'Hello'", "```")
        return
    reasons = sizes_of_recipe(spec, recipe)
    allowed = ", ".join(ranks for ranks, reason in reasons.items() if not reason)
    no = _not_by_vllm(recipe, recipe.schemes(spec))
    yield ""
    yield f"qwenq (vLLM does not read it: {markdown(no)}):" if no else "vLLM, and qwenq itself:"
    yield ""
    yield "```"
    if not no:
        yield f"vllm serve . --max-model-len {served}"
    yield "qwenq run . -p 'Hello'"
    yield "```"
    yield ""
    yield f"Tensor-parallel sizes (`--tensor-parallel-size`) that the shapes allow: {allowed}."
    yield from (f"- Not {ranks}: {markdown(reason)}." for ranks, reason in reasons.items() if reason)


def _not_by_vllm(recipe: Recipe, schemes: Collection[Scheme]) -> str:
    """Why vLLM does not read such a checkpoint; empty where it does."""
    if not schemes:
        return ""
    form, of_all = get_format(recipe.format), max(schemes, key=lambda scheme: scheme.group_size)
    variant = Variant(of_all.bits, of_all.group_size, recipe.mixed, form.version(recipe))
    return next((loader.reason for loader in form.loaders(variant) if loader.name == "vLLM"), "")


def _provenance(
    job: Mapping[str, Any], described: Mapping[str, Any], spec: ModelSpec, recipe: Recipe, outside: Mapping[str, str]
) -> Iterator[str]:
    counts = Counter(label_of(recipe.scheme_of(lin)) for lin in spec.linears)
    schemes = ", ".join(
        f"{count} linear{'' if count == 1 else 's'} {label}"
        for label, count in counts.most_common()
    )
    folded = job["options"].get("fold") and job["calibration"] is not None
    yield f"- Scheme: {markdown(schemes)}; {_outside_layers(spec, recipe, outside, bool(folded))}."
    if folded:
        yield "- Channel scales are folded into norms and `up_proj`: adapters trained on the original do not fit it."
    if job["options"].get("rotate"):
        yield (
            "- Hidden states, and the weights around them, are rotated by an orthogonal matrix: the same function, but "
            "adapters trained on the original do not fit it."
        )
    options = ", ".join(f"{key} {value}" for key, value in job["options"].items() if value is not None)
    yield f"- Options: {markdown(shown(options, 2000))}, seed {job['seed']}."
    calibration = job["calibration"]
    if calibration is None:
        yield "- Calibration: none."
    else:
        yield (
            f"- Calibration: {code(shown(str(calibration['text'])))}, {calibration['windows']} x "
            f"{calibration['window_tokens']} tokens{_of_builtin(calibration)}, SHA-256 "
            f"{code(shown(str(calibration['tokens_sha256'])))}."
        )
    evaluation = job["evaluation"]
    hashed = code(shown(str(evaluation["tokens_sha256"])))
    yield f"- Evaluation: {code(shown(str(evaluation['text'])))}, SHA-256 {hashed}."
    yield f"- {described['parameters']:,} parameters; {len(job['source'])} source files."
    yield (
        "- `qwenq-manifest.json` has the SHA-256 of every source and output file, and the error of every linear; "
        "`qwenq verify .` checks this directory against it."
    )


def rotated_too(outside: Mapping[str, str]) -> dict[str, str]:
    """What became of embedding, norms and head, all of which were rotated as well."""
    return {part: ", ".join(filter(None, ("rotated", outside.get(part)))) for part in _OUTSIDE}


def _outside_layers(spec: ModelSpec, recipe: Recipe, outside: Mapping[str, str], folded: bool) -> str:
    """What became of embedding, norms and head: `embedding Q4_K, head Q6_K, norms as in the original`."""
    schemes = {lin.stage: recipe.outer_scheme(lin) for lin in spec.outer_linears}
    schemes.setdefault("head", schemes["embedding"])  # tied: one matrix
    became: dict[str, list[str]] = {}
    for part in _OUTSIDE:
        scheme = schemes.get(part)
        said = label_of(scheme) if scheme else outside.get(part, _KEPT)
        if part != "norms" or not folded:  # folded ones are told of elsewhere
            became.setdefault(said, []).append(part)
    order = sorted(became, key=lambda said: said == _KEPT)
    return ", ".join(f"{_listed(became[said])} {markdown(said)}" for said in order)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _of_builtin(calibration: Mapping[str, Any]) -> str:
    """How many of the windows are the built-in set's, if any."""
    taken = calibration.get("builtin")
    return f" ({taken['windows']} of these windows from the built-in set)" if taken else ""
