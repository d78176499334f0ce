"""Sections on how the runs were made: time and memory, then every argument, version and hash."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwenq.io.json import shown
from qwenq.report.document import MISSING, Block, Code, Items, Paragraph, Section, Table, Text
from qwenq.report.runs import Run
from qwenq.units import format_gb, format_seconds

_OWN_TABLES = ("source", "calibration", "evaluation", "overrides")
_HOST_TABLES = ("stages_s", "layer_seconds", "seconds", "peak_rss_bytes")
MAX_ROWS = 60


def cost_section(runs: Sequence[Run]) -> Section:
    """Wall time by stage, and peak memory."""
    stages = list(dict.fromkeys(stage for run in runs for stage in _numbers(run.host.get("stages_s"))))[:MAX_ROWS]
    rows: list[tuple[Text, ...]] = [
        ("wall time", *(_seconds(run.host.get("seconds")) for run in runs)),
        ("peak memory", *(_bytes(run.host.get("peak_rss_bytes")) for run in runs)),
    ]
    for stage in stages:
        rows.append((shown(stage, 40), *(_seconds(_numbers(run.host.get("stages_s")).get(stage)) for run in runs)))
    resumed = [run.name for run in runs if run.host.get("resumed")]
    blocks: list[Block] = [Table.of("Time by stage, peak memory of the process", _head(runs), rows)]
    if resumed:
        blocks.append(Paragraph(f"Resumed, so the wall time covers only the last part: {', '.join(resumed)}."))
    converted = [run.name for run in runs if run.converted]
    if converted:
        blocks.append(Paragraph(f"Converted, so time and memory cover only the conversion: {', '.join(converted)}."))
    return Section("cost", "Time and memory of the job", tuple(blocks))


def provenance_section(runs: Sequence[Run], command: str) -> Section:
    """Arguments, texts, machine and hashes; what all runs share is said once."""
    blocks: list[Block] = []
    if command:
        blocks.append(Paragraph(("Command: ", Code(command), ".")))
    blocks.extend(_grid("Arguments", runs, [_flat(run.job, _OWN_TABLES) for run in runs]))
    texts = ("calibration", "Facts of the calibration text"), ("evaluation", "Facts of the evaluation text")
    for key, caption in texts:
        tables = [_flat(value, ()) if isinstance(value := run.job.get(key), Mapping) else {} for run in runs]
        if any(tables):
            blocks.extend(_grid(caption, runs, tables))
    blocks.extend(_grid("Facts of machine and versions", runs, [_flat(run.host, _HOST_TABLES) for run in runs]))
    groups: dict[str, list[Run]] = {}
    for run in runs:
        source = run.job.get("source")
        if isinstance(source, Mapping):
            groups.setdefault(json.dumps(source, sort_keys=True), []).append(run)
    for text, members in groups.items():
        names = ", ".join(run.name for run in members)
        files = json.loads(text)
        rows: list[tuple[Text, ...]] = [
            (Code(shown(str(file))), Code(shown(str(digest), 80))) for file, digest in list(files.items())[:200]
        ]
        blocks.append(Table.of(f"SHA-256 of the source files of {names}", ("file", "SHA-256"), rows, "ll"))
    return Section("provenance", "Provenance", tuple(blocks))


def _head(runs: Sequence[Run]) -> tuple[Text, ...]:
    return ("", *(run.label for run in runs))


def _grid(caption: str, runs: Sequence[Run], tables: Sequence[Mapping[str, str]]) -> list[Block]:
    """One row a key: those on which all runs agree in one column, the others in a column a run."""
    keys = list(dict.fromkeys(key for table in tables for key in table))[:MAX_ROWS]
    agreed = [key for key in keys if len({table.get(key) for table in tables}) == 1]
    common: list[tuple[Text, ...]] = [(key, _value(tables[0].get(key))) for key in agreed]
    other: list[tuple[Text, ...]] = [
        (key, *(_value(table.get(key)) for table in tables)) for key in keys if key not in agreed
    ]
    blocks: list[Block] = []
    if other:
        blocks.append(Table.of(f"{caption} that differ", _head(runs), other, "l" * (1 + len(runs))))
    if common:
        same = caption if len(runs) == 1 else f"{caption}, the same for all"
        blocks.append(Table.of(same, ("", "value"), common, "ll"))
    return blocks


def _value(text: str | None) -> Text:
    if text is None:
        return MISSING
    return Code(text) if len(text) >= 40 and " " not in text else text


def _flat(value: Mapping[str, Any], without: Sequence[str], prefix: str = "") -> dict[str, str]:
    """Nested objects as `a.b: value`, each a plain line."""
    found: dict[str, str] = {}
    for key, item in value.items():
        name = shown(f"{prefix}{key}", 60)
        if not prefix and key in without:
            continue
        if isinstance(item, Mapping) and prefix.count(".") < 3:
            found |= _flat(item, (), f"{name}.")
        elif isinstance(item, bool):
            found[name] = "yes" if item else "no"
        elif isinstance(item, float):
            found[name] = f"{item:.6g}"
        elif isinstance(item, list):
            found[name] = shown(", ".join(map(str, item[:20])), 200) or MISSING
        else:
            found[name] = MISSING if item is None else shown(str(item), 200)
    return found


def _numbers(value: object) -> dict[str, float]:
    if not isinstance(value, Mapping):
        return {}
    return {str(k): float(v) for k, v in value.items() if isinstance(v, int | float) and math.isfinite(v)}


def _seconds(value: object) -> str:
    return format_seconds(value) if isinstance(value, int | float) and 0 <= value < 1e9 else MISSING


def _bytes(value: object) -> str:
    return format_gb(value) if isinstance(value, int) and 0 < value < 1 << 62 else MISSING


def notes_section(notes: Sequence[str]) -> Section:
    """Notes about these runs in particular."""
    return Section("notes", "Read this with it", (Items(tuple(notes)),))
