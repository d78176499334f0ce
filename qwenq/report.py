"""Reports of real runs as Markdown; the manifests' JSON is the source of every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwenq.units import format_gb, format_seconds

Manifest = Mapping[str, Any]


def markdown_report(title: str, runs: Mapping[str, Manifest], *, notes: Sequence[str] = (), command: str = "") -> str:
    """One page for several runs of one model, by name of their output: warnings, what was lost, sizes, provenance."""
    first = next(iter(runs.values()))
    lines = [f"# {title}", ""]
    warnings = [f"- {name}: {line}" for name, run in runs.items() for line in run["warnings"]]
    lines += ["## Warnings and fallbacks", "", *(warnings or ["None."]), ""]
    lines += ["## What was lost", ""]
    drift = first["drift"]
    lines += [
        f"Against the 16-bit model, on `{drift['text']}`: {drift['windows']} windows of {drift['window_tokens']} "
        f"tokens, computed in {drift['compute_dtype']}. Intervals are 95 %, from a bootstrap over windows. 16-bit "
        f"perplexity {drift['reference_perplexity']:.3f}; {_floor(drift)}.",
        "",
        "| run | scheme | bits per linear weight | files | mean KL | top-1 agreement | perplexity | increase |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, run in runs.items():
        lines.append(_row(name, run))
    lines += ["", *_ratios(runs)]
    if notes:
        lines += ["## Read this with it", "", *(f"- {note}" for note in notes), ""]
    lines += ["## Error by kind of linear", "", "Output error on the calibration inputs, dB, mean over layers.", ""]
    lines += _kinds(runs)
    lines += ["## Time and memory", "", "| run | wall time | peak memory | time by stage |", "|---|---:|---:|---|"]
    for name, run in runs.items():
        host = run["run"]
        stages = ", ".join(f"{k} {v:.1f}s" for k, v in host["stages_s"].items())
        seconds, peak = format_seconds(host["seconds"]), format_gb(host["peak_rss_bytes"])
        lines.append(f"| {name} | {seconds} | {peak} | {stages} |")
    lines += ["", "## Provenance", "", *_provenance(first, command)]
    return "\n".join(lines) + "\n"


def _floor(drift: Mapping[str, Any]) -> str:
    """The noise floor as measured; computing in float32 is what the floor is measured against, so it has none."""
    if drift["compute_dtype"] == "float32":
        return "no noise floor, since float32 is what a narrower type is compared with"
    return f"noise floor of KL {drift['noise_floor_kl']:.2g}"


def _row(name: str, run: Manifest) -> str:
    drift = run["drift"]
    kl, top, rise = drift["kl"], drift["top1_agreement"], drift["perplexity_increase_percent"]
    return (
        f"| {name} | {_scheme(run)} | {run['bits_per_linear_weight']:.3f} | {format_gb(run['file_bytes'])} "
        f"| {kl['mean']:.5f} ({kl['low']:.5f} to {kl['high']:.5f}) | {100 * top['mean']:.2f} % "
        f"| {drift['perplexity']:.3f} | {rise['mean']:+.2f} % ({rise['low']:+.2f} to {rise['high']:+.2f}) |"
    )


def _scheme(run: Manifest) -> str:
    scheme = run["job"]["scheme"]
    group = "per channel" if scheme["group_size"] == -1 else f"g{scheme['group_size']}"
    return f"{scheme['bits']}-bit {group}, {run['job']['options']['method']}"


def _ratios(runs: Mapping[str, Manifest]) -> list[str]:
    """KL of round-to-nearest over KL of GPTQ, for runs of one scheme."""
    lines = []
    for name, run in runs.items():
        for other, baseline in runs.items():
            same = run["job"]["scheme"] == baseline["job"]["scheme"]
            methods = (run["job"]["options"]["method"], baseline["job"]["options"]["method"])
            if same and methods == ("gptq", "rtn"):
                ratio = run["drift"]["kl"]["mean"] / baseline["drift"]["kl"]["mean"]
                lines.append(f"`{name}` has {ratio:.2f} of the KL of rounding to nearest (`{other}`).")
    return [*lines, ""] if lines else []


def _kinds(runs: Mapping[str, Manifest]) -> list[str]:
    kinds: dict[str, dict[str, list[float]]] = {}
    for name, run in runs.items():
        for layer in run["layers"]:
            for linear in layer["linears"]:
                if linear["error_db"] is not None:
                    kinds.setdefault(linear["name"].rsplit(".", 1)[1], {}).setdefault(name, []).append(
                        linear["error_db"]
                    )
    lines = [f"| linear | {' | '.join(runs)} |", "|---|" + "---:|" * len(runs)]
    for kind, figures in kinds.items():
        cells = [f"{sum(v) / len(v):.1f}" if (v := figures.get(name)) else "" for name in runs]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return [*lines, ""]


def _provenance(run: Manifest, command: str) -> list[str]:
    job, host = run["job"], run["run"]
    calibration, evaluation = job["calibration"], job["evaluation"]
    overlap = job["overlap"]
    read = (
        f"`{calibration['text']}`, {calibration['windows']} x {calibration['window_tokens']} tokens, "
        f"seed {job['seed']}, tokens SHA-256 `{calibration['tokens_sha256']}`"
        if calibration
        else "none"
    )
    lines = [
        f"- Command: `{command}`" if command else "",
        f"- qwenq {job['qwenq']}, torch {host['torch']}, Python {host['python']}, {host['system']}, "
        f"{host['threads']} threads, finished {host['finished']}",
        f"- Calibration: {read}",
        f"- Evaluation: `{evaluation['text']}`, tokens SHA-256 `{evaluation['tokens_sha256']}`"
        + ("" if overlap is None else f"; {100 * overlap:.1f} % of it also in the calibration text"),
        "- Source, SHA-256:",
        *(f"  - `{file}` `{digest}`" for file, digest in job["source"].items()),
    ]
    return [line for line in lines if line]
