"""Predicted against published memory: reads a table like Qwen's speed benchmark and says how far off every row is."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenq.errors import PlanError, QwenqError
from qwenq.escaping import shown
from qwenq.io.json import read_limited
from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case, Workload, even_shares
from qwenq.planning.engines.base import ENGINES, get_engine
from qwenq.planning.engines.torch import parse_environment
from qwenq.planning.memory import estimate
from qwenq.planning.models import load_spec
from qwenq.planning.rig import Rig, find_gpu
from qwenq.planning.weights import Weights, published_weights
from qwenq.units import GIB

GENERATED_TOKENS = 2048  # Qwen's benchmark generates that many after the prompt
DEFAULT_ENGINE = "transformers"  # of a table without such a column
MAX_BYTES, MAX_ROWS, MAX_LINE, MAX_MODELS = 4_000_000, 5000, 4000, 200  # of a table; a line in characters
_NUMBER = re.compile(r"[0-9]{1,12}")
COLUMNS = ("model", "quant", "input_len", "mem_gib")


@dataclass(frozen=True)
class ValidatedRow:
    """One published measurement beside the prediction: the sum over GPUs of torch's allocator peak, in GiB."""

    model: str
    quant: str
    input_len: int
    predicted_gib: float
    mem_gib: float

    @property
    def error_percent(self) -> float:
        return 100 * (self.predicted_gib / self.mem_gib - 1)


def read_rows(path: Path) -> tuple[list[ValidatedRow], list[str]]:
    """Every row of a CSV file, predicted, and why rows were left out (a model or format nobody here knows).

    PlanError names the line that cannot be read, and is raised when no row is left.
    """
    reader = csv.DictReader(_lines(path), strict=True)
    try:
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        table = [(f"{path} line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise PlanError(f"{path} line {reader.line_num}: {error}", hint="is a quotation mark left open?") from None
    if missing:
        raise PlanError(f"{path}: no column {', '.join(missing)}", hint=f"wanted at least {', '.join(COLUMNS)}")
    rows: list[ValidatedRow] = []
    skipped: list[str] = []
    known: dict[tuple[str, str], tuple[ModelSpec, Weights] | QwenqError] = {}
    for where, row in table:
        key = (row["model"] or "").strip(), (row["quant"] or "").strip()
        if key not in known:
            if len(known) == MAX_MODELS:
                raise PlanError(f"{where}: more than {MAX_MODELS} models and formats in one table")
            try:
                known[key] = _weights(*key)
            except QwenqError as error:
                known[key] = error
        found = known[key]
        if isinstance(found, QwenqError):
            skipped.append(f"{where} left out: {found.message}")
            continue
        spec, weights = found
        try:
            rows.append(_predicted(row, spec, weights))
        except ValueError as error:
            raise PlanError(f"{where}: {error}", hint="numbers are written as 6144 or 39.91") from None
        except PlanError as error:
            raise PlanError(f"{where}: {error.message}", hint=error.hint) from None
    if not rows:
        raise PlanError(f"{path}: no row that can be predicted", hint=skipped[0] if skipped else "")
    return rows, skipped


def _lines(path: Path) -> list[str]:
    """The lines of a CSV file; PlanError for more, and longer ones, than a table of measurements has."""
    try:
        lines = read_limited(path, MAX_BYTES, PlanError).decode("utf-8-sig").splitlines()
    except PlanError as error:
        raise PlanError(error.message, hint="wanted a CSV file with a header line") from None
    except UnicodeDecodeError:
        raise PlanError(f"{path}: not UTF-8 text", hint="wanted a CSV file with a header line") from None
    if len(lines) > MAX_ROWS + 1:
        raise PlanError(f"{path}: {len(lines)} lines, more than {MAX_ROWS} rows and their head")
    if (longest := max(map(len, lines), default=0)) > MAX_LINE:
        raise PlanError(f"{path}: a line of {longest} characters, more than {MAX_LINE}")
    return lines


def _weights(model: str, quant: str) -> tuple[ModelSpec, Weights]:
    spec = load_spec(model)
    return spec, published_weights(spec, quant)


def summary(rows: Sequence[ValidatedRow]) -> dict[str, Any]:
    """The JSON of `qwenq vram validate`."""
    mean, largest = errors(rows)
    return {
        "rows": [
            {
                "model": row.model,
                "quant": row.quant,
                "input_len": row.input_len,
                "predicted_gib": round(row.predicted_gib, 4),
                "mem_gib": row.mem_gib,
            }
            for row in rows
        ],
        "mean_abs_error_percent": mean,
        "max_abs_error_percent": largest,
    }


def errors(rows: Sequence[ValidatedRow]) -> tuple[float, float]:
    """Mean and largest absolute error in percent."""
    sizes = [abs(row.error_percent) for row in rows]
    return round(sum(sizes) / len(sizes), 4), round(max(sizes), 4)


def _predicted(row: dict[str, str], spec: ModelSpec, weights: Weights) -> ValidatedRow:
    environment = parse_environment(row.get("env") or "")
    name = (row.get("engine") or DEFAULT_ENGINE).strip().lower()
    if name not in ENGINES or not ENGINES[name].states_peak:
        stating = " and ".join(kind.name for kind in ENGINES.values() if kind.states_peak)
        raise PlanError(f"engine is {shown(name, 40)!r}; only {stating} rows state an allocator peak")
    libraries = {library: text for library, text in environment.items() if library not in ENGINES}
    engine = get_engine(name, environment.get(name, ""), libraries)
    prompt, measured = _whole(row, "input_len"), float(row["mem_gib"] or "")
    if not 0.001 <= measured < 1e6:
        raise PlanError(f"mem_gib is {shown(row['mem_gib'], 40)!r}, wanted a positive number of GiB")
    gpus = _whole(row, "gpu_num") if row.get("gpu_num") else 1
    if not 1 <= gpus <= spec.num_hidden_layers:
        raise PlanError(f"gpu_num is {gpus}, wanted 1 to {spec.num_hidden_layers}")
    work = Workload(context=prompt + GENERATED_TOKENS, prompt=prompt)
    spec = replace(spec, extended_context=max(spec.extended_context, work.context))  # the run was made, limit or not
    card = "H100 SXM5 80GB" if "H100" in (row.get("env") or "") else "A100 SXM4 80GB"
    found = estimate(Case(spec, weights, engine, work, Rig((find_gpu(card),) * gpus)), even_shares(spec, gpus))
    return ValidatedRow(row["model"], row["quant"], prompt, found.allocated_bytes / GIB, measured)


def _whole(row: dict[str, str], column: str) -> int:
    text = (row[column] or "").strip()
    if not _NUMBER.fullmatch(text):
        raise PlanError(f"{column} is {shown(text, 40)!r}, wanted a whole number")
    return int(text)
