"""gpu_check.py's Markdown page: what was found, wrong checks and tracebacks first, every figure of the JSON after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GIB = 1 << 30


def page(found: Mapping[str, Any]) -> str:
    """The page of a run's JSON."""
    lines = [f"# GPU check: {_title(found)}", ""]
    lines += [f"`{found['command']}`, commit {found['commit']}, begun {found['began']}.", ""]
    lines += _overview(found["parts"])
    lines += _wrong(found["parts"])
    for name, part in found["parts"].items():
        lines += ["", f"## {name}", ""]
        if part.get("why"):
            lines += [f"Skipped: {part['why']}.", ""]
        lines += _tables(name, part["facts"])
        lines += _rest(part["facts"], TABLES.get(name, ()))
        lines += _checks(part["checks"])
        if part["status"] in ("failed", "timed out"):
            lines += ["", "The end of what it printed:", "", "```", part.get("output", "").strip(), "```"]
    return "\n".join(lines).rstrip() + "\n"


def _title(found: Mapping[str, Any]) -> str:
    facts = found["parts"].get("environment", {}).get("facts", {})
    return str(facts.get("gpu", {}).get("name") or ("CPU" if found["device"] == "cpu" else "an unknown GPU"))


def _overview(parts: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, part in parts.items():
        wrong = sum(not check["ok"] for check in part["checks"])
        signal = f" ({part['signal']})" if part.get("signal") else ""
        errors = ", ".join(part.get("errors", {}))
        rows.append([name, part["status"] + signal, part["seconds"], len(part["checks"]), wrong, errors])
    return table(["part", "status", "s", "checks", "wrong", "errors in"], rows)


def _wrong(parts: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, check["name"], check["got"], check["wanted"]]
        for name, part in parts.items()
        for check in part["checks"]
        if not check["ok"]
    ]
    lines = ["", "## Wrong", "", *table(["part", "check", "got", "wanted"], rows)] if rows else []
    for name, part in parts.items():
        for step, trace in part.get("errors", {}).items():
            lines += ["", f"Error in {name}, {step}:", "", "```", trace.strip(), "```"]
    return lines


def _checks(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [[check["name"], check["got"], check["wanted"], "yes" if check["ok"] else "**no**"] for check in checks]
    return ["", *table(["check", "got", "wanted", "good"], rows)] if rows else []


# Facts that have a table of their own, by part.
TABLES = {
    "environment": ("rates",),
    "kernels": ("linear_errors", "linear_speed", "attention_speed"),
    "triton": ("best", "rows", "written_out", "attention_speed"),
    "decode-4": ("decoding", "prefill", "rows", "token_profile", "chunk_profile"),
    "decode-8": ("decoding", "prefill", "rows", "token_profile", "chunk_profile"),
    "vram-4": ("rows", "times", "decode", "token_profile", "chunk_profile"),
    "vram-8": ("rows", "times", "decode", "token_profile", "chunk_profile"),
    "quantize": ("runs",),
    "gguf": ("runs", "logits"),
    "layer-72b": ("work",),
    "model": ("logits", "host_memory_rows"),
    "solver": ("solve_profile",),
}


def _tables(name: str, facts: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for key in TABLES.get(name, ()):
        if key in facts:
            lines += [f"{key.replace('_', ' ')}:", "", *_table_of(key, facts[key]), ""]
    return lines


def _table_of(key: str, value: Any) -> list[str]:
    if key in ("rates", "decode"):
        return table(["figure", "value"], [[name, figure] for name, figure in value.items()])
    if key == "linear_errors":
        rows = [[label, ", ".join(f"{count}: {e:g}" for count, e in found.items())] for label, found in value.items()]
        return table(["linear", "relative error by rows"], rows)
    if key == "linear_speed" or (key == "rows" and isinstance(value, dict)):
        return [line for label, rows in value.items() for line in (f"{label}:", "", *_records(rows), "")]
    if key in ("rows", "host_memory_rows"):
        return table(
            ["setting", "context", "phase", "peak GiB", "estimate GiB", "error %", "reserved GiB", "driver GiB"],
            [
                [row.get("setting", ""), row["context"], row["phase"],
                 *(f"{row[k] / GIB:.3f}" for k in ("allocated_bytes", "predicted_bytes")),
                 f"{row['error_percent']:+.2f}" if row["error_percent"] is not None else "",
                 *(f"{row[k] / GIB:.3f}" for k in ("reserved_bytes", "driver_bytes"))]
                for row in value
            ],
        )  # fmt: skip
    if key in ("runs", "logits", "work", "best"):
        return _records([{"": name} | dict(row) for name, row in value.items()])
    if key.endswith("_profile"):
        took = f"{value['device_ms']} ms on the device of {value['wall_ms_under_profiler']} ms under the profiler."
        return [took, "", *_records(value["kernels"])]
    return _records(value)


def _records(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return table([key.replace("_", " ") for key in columns], [[row.get(key, "") for key in columns] for row in rows])


def _rest(facts: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for key, value in facts.items():
        if key in shown:
            continue
        if isinstance(value, dict):
            lines.append(f"- {key}: " + "; ".join(f"{name}: {_plain(each)}" for name, each in value.items()))
        else:
            lines.append(f"- {key}: {_plain(value)}")
    return lines


def _plain(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10**6 else str(value)
    text = " / ".join(text.split("\n"))
    return text if len(text) <= 1500 else text[:1500] + " ..."


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + " --- |" * len(head), *map(line, rows)]
