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
from qwenq.planning.case import Case, Workload, even_shares, rank_shares
from qwenq.planning.engines.base import ENGINES, ServerEngine, get_engine
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
SERVER_COLUMNS = ("model", "quant")  # of a table with one of SERVER_MARKS
SERVER_MARKS = {"kv_tokens", "gpu", "log"}  # `log`: start-up logs


class LeftOut(PlanError):
    """A row that states nothing the estimator predicts."""


@dataclass(frozen=True)
class ValidatedRow:
    """One published measurement beside the prediction, GiB.

    The sum over GPUs of torch's allocator peak; of a server the room of a GPU's KV cache, and its tokens.
    """

    model: str
    quant: str
    input_len: int
    predicted_gib: float
    mem_gib: float
    engine: str = DEFAULT_ENGINE
    predicted_tokens: int | None = None
    kv_tokens: int | None = None

    @property
    def error_percent(self) -> float:
        """Error of the tokens if they were logged, which has more digits; else of the bytes."""
        if self.predicted_tokens is not None and self.kv_tokens:
            return 100 * (self.predicted_tokens / self.kv_tokens - 1)
        return 100 * (self.predicted_gib / self.mem_gib - 1)


def read_rows(path: Path) -> tuple[list[ValidatedRow], list[str]]:
    """Every row of a CSV file, predicted, and why rows were left out (a model or format nobody here knows).

    PlanError names the line that cannot be read, and is raised when no row is left.
    """
    reader = csv.DictReader(_lines(path), strict=True)
    try:
        present = reader.fieldnames or ()
        wanted = SERVER_COLUMNS if SERVER_MARKS & set(present) else COLUMNS
        missing = [name for name in wanted if name not in present]
        table = [(f"{path} line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise PlanError(f"{path} line {reader.line_num}: {error}", hint="is a quotation mark left open?") from None
    if missing:
        raise PlanError(f"{path}: no column {', '.join(missing)}", hint=f"wanted at least {', '.join(wanted)}")
    rows: list[ValidatedRow] = []
    skipped: list[str] = []
    known: dict[tuple[str, str], tuple[ModelSpec, Weights] | QwenqError] = {}
    for where, row in table:
        key = (row["model"] or "").strip(), (row["quant"] or "").strip()
        if key not in known:
            if len(known) == MAX_MODELS:
                raise PlanError(f"{where}: more than {MAX_MODELS} models and formats in one table")
            try:
                spec = load_spec(key[0])
                known[key] = spec, published_weights(spec, key[1])
            except QwenqError as error:
                known[key] = error
        found = known[key]
        if isinstance(found, QwenqError):
            skipped.append(f"{where} left out: {found.message}")
            continue
        spec, weights = found
        try:
            stated = log_columns(row.get("log") or "")
            rows.append(_predicted(row | {k: text for k, text in stated.items() if not row.get(k)}, spec, weights))
        except ValueError as error:
            raise PlanError(f"{where}: {error}", hint="numbers are written as 6144 or 39.91") from None
        except LeftOut as error:
            skipped.append(f"{where} left out: {error.message}")
        except QwenqError as error:
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
            | ({} if row.engine == DEFAULT_ENGINE else {"engine": row.engine})
            | ({} if row.kv_tokens is None else {"predicted_tokens": row.predicted_tokens, "kv_tokens": row.kv_tokens})
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
    name = name.split(" ")[0] if name.split(" ")[0] in ENGINES else name
    if name not in ENGINES:
        raise LeftOut(f"engine is {shown(name, 40)!r}, wanted one of {', '.join(ENGINES)}")
    libraries = {library: text for library, text in environment.items() if library not in ENGINES}
    engine = get_engine(name, _cell(row, "version") or environment.get(name, ""), libraries)
    if isinstance(engine, ServerEngine):
        return _served(row, spec, weights, engine)
    if not engine.states_peak:
        stating = " and ".join(kind.name for kind in ENGINES.values() if kind.states_peak)
        raise LeftOut(f"engine is {shown(name, 40)!r}; an allocator peak is of {stating}, a cache's room of servers")
    if not _cell(row, "input_len"):
        raise LeftOut("input_len is empty")
    prompt, measured = _whole(row, "input_len"), _gib(row)
    gpus = _whole(row, "gpu_num", 1)
    if not 1 <= gpus <= spec.num_hidden_layers:
        raise PlanError(f"gpu_num is {gpus}, wanted 1 to {spec.num_hidden_layers}")
    generated = _whole(row, "generated_tokens", GENERATED_TOKENS)
    attention = _cell(row, "attention").lower()
    if attention not in ("", *FLASH):
        raise LeftOut(f"attention is {shown(attention, 40)!r}, counted is {FLASH[0]}")
    batch, chunk = _whole(row, "batch_size", 1), _whole(row, "prefill_chunk", 0)
    work = Workload(context=prompt + generated, batch=batch, prompt=prompt, prefill_chunk=chunk)
    spec = replace(spec, extended_context=max(spec.extended_context, work.context))  # the run was made, limit or not
    card = "H100 SXM5 80GB" if "H100" in (row.get("env") or "") else "A100 SXM4 80GB"
    found = estimate(Case(spec, weights, engine, work, Rig((find_gpu(card),) * gpus)), even_shares(spec, gpus))
    return ValidatedRow(row["model"], row["quant"], prompt, found.allocated_bytes / GIB, measured)


def _served(row: dict[str, str], spec: ModelSpec, weights: Weights, engine: ServerEngine) -> ValidatedRow:
    """The room of a server's cache: `kv_tokens`, or `mem_gib` a GPU, at `gpu_memory_utilization` of `gpu`.

    The part is taken as it was asked for: the server did, whatever found room beside it later.
    """
    logged = [name for name in ("kv_tokens", "mem_gib") if _cell(row, name)]
    if not logged or not _cell(row, "gpu"):
        raise LeftOut("no " + ("gpu" if logged else "kv_tokens or mem_gib") + " for the room of a server's cache")
    gpus, stages = _whole(row, "gpu_num", 1), _whole(row, "pipeline_parallel_size", 1)
    if not 1 <= gpus <= 64 or gpus % stages:
        raise PlanError(f"gpu_num is {gpus} and pipeline_parallel_size {stages}, wanted whole stages of 1 to 64 GPUs")
    asked = _cell(row, "gpu_memory_utilization")
    context = _whole(row, "max_model_len", _whole(row, "input_len", 4096))
    eager = (row.get("enforce_eager") or "false").strip().lower()
    if eager not in _TRUTHS:
        raise PlanError(f"enforce_eager is {shown(eager, 40)!r}, wanted true or false")
    work = Workload(
        context,
        kv_dtype=_cell(row, "kv_cache_dtype") or "auto",
        prefill_chunk=_whole(row, "prefill_chunk", 0),
        max_num_seqs=_whole(row, "max_num_seqs", 0),
        gpu_memory_utilization=float(asked) if asked else None,
        enforce_eager=_TRUTHS[eager],
    )
    spec = replace(spec, extended_context=max(spec.extended_context, context))
    case = Case(spec, weights, engine, work, Rig((find_gpu(row["gpu"]),) * gpus))
    shares = rank_shares(spec, gpus // stages, stages, engine.spared_stages)
    tokens, room = engine.cache_room(case, shares)
    kv_tokens = _whole(row, "kv_tokens") if "kv_tokens" in logged else None
    measured = _gib(row) if "mem_gib" in logged else (kv_tokens or 0) * room / max(1, tokens) / GIB
    return ValidatedRow(row["model"], row["quant"], context, room / GIB, measured, engine.name, tokens, kv_tokens)


_TRUTHS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
FLASH = ("flash attention 2", "flash_attention_2", "fa2", "flash")


def _cell(row: dict[str, str], column: str) -> str:
    return (row.get(column) or "").strip()


def _gib(row: dict[str, str]) -> float:
    if not _cell(row, "mem_gib"):
        raise LeftOut("mem_gib is empty")
    found = float(row["mem_gib"])
    if not 0.001 <= found < 1e6:
        raise PlanError(f"mem_gib is {shown(row['mem_gib'], 40)!r}, wanted a positive number of GiB")
    return found


def _whole(row: dict[str, str], column: str, default: int | None = None) -> int:
    """A whole number; `default` for an empty cell."""
    text = _cell(row, column)
    if not text and default is not None:
        return default
    if not _NUMBER.fullmatch(text):
        raise PlanError(f"{column} is {shown(text, 40)!r}, wanted a whole number")
    return int(text)


# Lines that vLLM logs while it starts, and the column each states.
_LOGGED = {
    "version": re.compile(r"(?:LLM engine \(v|API server version:? v?|vLLM version:? v?)(\d+\.\d+(?:\.\d+)?)"),
    "kv_tokens": re.compile(r"GPU KV cache size: ([\d,]+) tokens"),
    "mem_gib": re.compile(r"Available KV cache memory: (-?[\d.]+) GiB"),
    "max_model_len": re.compile(r"max_(?:model_len|seq_len)['\"]?[=:] ?(\d+)"),
    "gpu_memory_utilization": re.compile(r"gpu_memory_utilization['\"]?[=:] ?(0?\.\d+|1\.0)"),
    "max_num_seqs": re.compile(r"max_num_seqs['\"]?[=:] ?(\d+)"),
    "prefill_chunk": re.compile(r"max_num_batched_tokens['\"]?[=:] ?(\d+)"),
    "enforce_eager": re.compile(r"enforce_eager['\"]?[=:] ?(True|False)"),
    "gpu_num": re.compile(r"tensor_parallel_size['\"]?[=:] ?(\d{1,4})"),  # of one stage
    "pipeline_parallel_size": re.compile(r"pipeline_parallel_size['\"]?[=:] ?(\d{1,4})"),
}


def log_columns(text: str) -> dict[str, str]:
    """Columns of a row, as a server's start-up log states them; what it does not say is left out."""
    found = {column: match[1].replace(",", "") for column, line in _LOGGED.items() if (match := line.search(text))}
    if "gpu_num" in found:
        found["gpu_num"] = str(int(found["gpu_num"]) * int(found.get("pipeline_parallel_size", "1")))
    return {column: value for column, value in found.items() if not (column == "mem_gib" and value.startswith("-"))}
