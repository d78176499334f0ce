"""Writes reports/engine-logs.md. Run: python reports/make_engine_logs.py (no GPU needed)."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
from pathlib import Path

from qwenq import __version__
from qwenq.planning.validate import read_rows

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "data" / "published" / "engine_logs.csv"
# Tokens, or GiB a GPU where none were logged, that the estimator as of b6a6236 predicted for these rows; it knew no
# A10G, for which an A10 stood in.
BEFORE_COMMIT = "b6a6236"
BEFORE = {
    "V1": 7.17, "V5": 414416, "V9": 59648, "V10": 8272, "V11": 75776, "V12": 195152, "V20": 250928, "V21": 1022960,
    "V7": 9248,
}  # fmt: skip
APART = ("V7",)  # four starts of one machine with the same flags differ by half a GiB


def main() -> None:
    rows, skipped = read_rows(TABLE)
    assert not skipped, skipped
    with open(TABLE, newline="") as file:
        facts = list(csv.DictReader(file))
    lines, was, now = [], [], []
    for fact, row in zip(facts, rows, strict=True):
        logged = float(row.kv_tokens or row.mem_gib)
        before, after = 100 * (BEFORE[fact["id"]] / logged - 1), row.error_percent
        if fact["id"] not in APART:
            was.append(abs(before))
            now.append(abs(after))
        unit = "tokens" if row.kv_tokens else "GiB"
        predicted = row.predicted_tokens if row.kv_tokens else round(row.predicted_gib, 2)
        version = fact["version"] or "not given"
        flags = f"{fact['gpu_memory_utilization']}" + (", eager" if fact["enforce_eager"] else "")
        lines.append(
            f"| {fact['id']} | {row.model} {row.quant} | {version} | {fact['gpu_num']}x {fact['gpu']} | {flags} | "
            f"{logged:,.10g} {unit} | {BEFORE[fact['id']]:,.10g} ({before:+.1f} %) | {predicted:,} ({after:+.2f} %) | "
            f"{fact['source']} |"
        )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    text = f"""# The room of vLLM's KV cache, against its own start-up logs

`python reports/make_engine_logs.py`, qwenq {__version__} at {commit.strip()}, Python {platform.python_version()}; no \
GPU needed. The rows are in tests/data/published/engine_logs.csv; before is {BEFORE_COMMIT}. `qwenq vram validate` on \
that file prints the same.

| row | model | vLLM | GPUs | part | logged | before | now | where |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

Mean of all but {", ".join(APART)}: {statistics.mean(was):.1f} % before, {statistics.mean(now):.2f} % now, largest \
{max(now):.2f} %. The twelve logs of vLLM 0.19 on H100 are in [estimator-validation.md](estimator-validation.md),
unchanged.

## What was fitted, and what was not
- Fitted to V9 and V10 (one card at two budgets, which gives its total of 22.30 GiB): a graph's share of vLLM's
  estimate (0.79 GiB for 86 graphs of 48 layers) and 0.143 GiB of non-torch growth. Everything else is counted or from
  other logs: 38 bytes a logit before 0.17, when logits were sorted (1.40 GiB of activations in logs of 0.10.2 and of
  early 2026), 14 since; gate, up and product with three hidden states a token (1.06 GiB at 32,768 tokens in V21);
  packed weights rounded by the allocator tensor by tensor.
- V11 and V12 name no version: they are predicted as the newest. With 0.10 to 0.16 they come out 0.3 and 0.1 % high.
- V20: with 0.19.1 from PyPI the graphs were outside the part, in its container they were inside. The careful side is
  counted, which leaves 1.6 % less.
- V21: the newer model runner had profiled no graphs in 0.26; counted inside they leave 3.5 % less.
- V7 cannot be predicted: vLLM's estimate of the graphs was 0.62, 0.86, 1.59 and 7.34 GiB at four starts with the same
  flags, and what was left 0.54 to 1.08 GiB. A desktop shared the card.
- The logs name neither pipeline stages nor tensor parallelism on PCIe cards with a version since 0.17: 0.07 and
  0.25 GiB of non-torch memory there are others' figures, with a wide range.
"""
    (ROOT / "reports" / "engine-logs.md").write_text(text)


if __name__ == "__main__":
    main()
