#!/usr/bin/env python3
"""All that has to be known of a real GPU, in one command: are its kernels right, is the estimate, how fast is it.

    python benchmarks/gpu_check.py --minutes 9 --out DIR [--only triton,decode-4] [--skip vram-4] [--device cpu --tiny]

For a bare machine with one CUDA GPU of 24 GB or more and no network: random weights are made on the spot. Each part
(benchmarks/gpu_parts.py) runs in a process of its own with a time limit of its own, most valuable first; a part that
would not fit into the minutes left is skipped, and says so. DIR/gpu-check.json and DIR/gpu-check.md are written after
every part, and a part that is killed leaves what it had found. Exit code 1 when a part failed, 3 when a check did.

`--device cpu --tiny` tries the script itself, on shapes that take seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_page import page

ROOT = Path(__file__).resolve().parent.parent
LEAST_S = 8  # of a part; with less left nothing is started
RESERVE_S = 5  # kept back from every part, to write the pages
TAIL = 6000  # characters of a part's own output that are kept


@dataclass(frozen=True)
class Part:
    """A part: the seconds it is expected to need on an H100, and may take."""

    name: str
    needs_s: float
    limit_s: float


# Most valuable first: what no GPU has run yet, then what one has found right.
PARTS = (
    Part("triton", 40, 110),
    Part("decode-4", 30, 90),
    Part("kernels", 25, 80),
    Part("decode-8", 30, 80),
    Part("model", 45, 130),
    Part("gguf", 50, 120),
    Part("solver", 20, 60),
    Part("quantize", 60, 140),
    Part("environment", 12, 60),
    Part("layer-72b", 70, 200),
    Part("vram-4", 45, 170),
    Part("vram-8", 40, 130),
    Part("ranks", 25, 120),
)


def main() -> int:
    asked = arguments()
    deadline = time.monotonic() + 60 * asked.minutes
    asked.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "command": command(asked), "commit": commit(), "minutes": asked.minutes, "device": asked.device,
        "tiny": asked.tiny, "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "parts": {},
    }  # fmt: skip
    work = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=asked.work))
    try:
        for part in PARTS:
            if part.name not in asked.parts:
                continue
            left = deadline - time.monotonic() - RESERVE_S
            found["parts"][part.name] = run_part(part, left, work, found, asked)
            found["seconds"] = round(60 * asked.minutes - (deadline - time.monotonic()), 1)
            write(asked.out, found)
            print(summary(part.name, found["parts"][part.name]), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    results = found["parts"].values()
    if any(result["status"] in ("failed", "timed out") for result in results):
        return 1
    return 3 if any(not check["ok"] for result in results for check in result["checks"]) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ",".join(part.name for part in PARTS)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts together")
    parser.add_argument("--out", type=Path, required=True, help="directory for gpu-check.json and gpu-check.md")
    parser.add_argument("--only", "--parts", dest="parts", default=names, help=f"parts, with commas between: {names}")
    parser.add_argument("--skip", default="", help="parts to leave out, with commas between")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes that take seconds on a CPU")
    parser.add_argument("--work", type=Path, help="where scratch files go; default: the system's temporary directory")
    asked = parser.parse_args()
    only, skipped = ([name for name in text.split(",") if name] for text in (asked.parts, asked.skip))
    for option, given in (("--only", only), ("--skip", skipped)):
        if unknown := sorted(set(given) - {part.name for part in PARTS}):
            parser.error(f"{option} {','.join(unknown)}: wanted some of {names}")
    asked.parts = [part.name for part in PARTS if part.name in only and part.name not in skipped]
    return asked


def command(asked: argparse.Namespace) -> str:
    """The command without the directories of this machine."""
    words = ["python benchmarks/gpu_check.py", f"--minutes {asked.minutes:g}"]
    if len(asked.parts) < len(PARTS):
        words.append("--only " + ",".join(asked.parts))
    words += [f"--device {asked.device}"] if asked.device != "cuda" else []
    return " ".join([*words, *(["--tiny"] if asked.tiny else []), "--out DIR"])


def run_part(part: Part, left: float, work: Path, found: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """One part in a process group of its own: its notes, its status, the end of what it printed."""
    needs = LEAST_S if asked.tiny else part.needs_s
    if left < needs:
        why = f"{left:.0f} s were left, it needs about {needs:.0f}"
        return {"status": "skipped", "why": why, "checks": [], "facts": {}, "seconds": 0.0}
    limit = min(left, part.limit_s)
    notes, facts, scratch = work / f"{part.name}.json", work / "found.json", work / part.name
    facts.write_text(json.dumps(found))
    scratch.mkdir()
    command = [
        sys.executable, str(ROOT / "benchmarks" / "gpu_parts.py"), part.name, "--device", asked.device,
        "--notes", str(notes), "--found", str(facts), "--work", str(scratch), "--seconds", str(limit - 2),
        *(["--tiny"] if asked.tiny else []),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    began, log = time.monotonic(), work / f"{part.name}.log"
    with open(log, "wb") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = child.wait(limit)
            status = "done" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = None, "timed out"
        except BaseException:  # interrupted: leave no process behind
            end(child)
            raise
        end(child)
    try:
        result = json.loads(notes.read_text())
    except (OSError, ValueError):
        result = {"checks": [], "facts": {}}
    result |= {"status": status, "seconds": round(time.monotonic() - began, 1), "limit_s": round(limit, 1)}
    if code is not None and code < 0:
        result["signal"] = signal.Signals(-code).name
    result["output"] = log.read_text(errors="replace")[-TAIL:]
    shutil.rmtree(scratch, ignore_errors=True)
    return result


def end(child: subprocess.Popen[bytes]) -> None:
    """End a part and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def commit() -> str:
    """The commit that is checked out, or "unknown": a copied tree may have no history."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def write(out: Path, found: dict[str, Any]) -> None:
    """Both files, each written beside and renamed."""
    for name, content in (("gpu-check.json", json.dumps(found, indent=1) + "\n"), ("gpu-check.md", page(found))):
        beside = out / f".{name}"
        beside.write_text(content, encoding="utf-8")
        beside.replace(out / name)


def summary(name: str, result: dict[str, Any]) -> str:
    """One line a part, and one for each check that failed."""
    wrong = [check for check in result["checks"] if not check["ok"]]
    line = f"{name}: {result['status']}, {result['seconds']:.0f} s, {len(result['checks'])} checks, {len(wrong)} wrong"
    if result.get("why"):
        line += f" ({result['why']})"
    lines: Sequence[str] = [f"  wrong: {check['name']}: {check['got']}, wanted {check['wanted']}" for check in wrong]
    for place, trace in result.get("errors", {}).items():
        lines = [*lines, f"  error in {place}: {trace.strip().splitlines()[-1][:300]}"]
    if result["status"] in ("failed", "timed out"):
        lines = [*lines, *("  | " + text[:300] for text in result["output"].strip().splitlines()[-6:])]
    return "\n".join([line, *lines])


if __name__ == "__main__":
    sys.exit(main())
