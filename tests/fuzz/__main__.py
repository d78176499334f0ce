"""Run many damaged inputs through the readers: `PYTHONPATH=tests python -m fuzz --cases 100000 [--json FILE]`.

Every case must be read or refused by a QwenqError, of one line, within TIME_S seconds of this processor's time and
WAITING_S of anybody's, and within MEMORY_BYTES of address space more than the program takes before the first case. Case
k of a target depends on (seed, target, k) alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

TESTS = Path(__file__).parent.parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from conftest import small_job  # noqa: E402

from fuzz.targets import Target, Workplace, make_workplace  # noqa: E402
from qwenq.errors import QwenqError  # noqa: E402
from qwenq.escaping import printable  # noqa: E402
from qwenq.formats.base import Recipe, Scheme  # noqa: E402

TIME_S = 5.0
WAITING_S = 60.0  # a machine that others use too has its pauses; a file that never answers has no end
MEMORY_BYTES = 1 << 30
RECIPES = {
    "gptq": Recipe(Scheme(4, 32)),
    "awq": Recipe(Scheme(4, 32, sym=False), format="awq"),
    "compressed-tensors": Recipe(Scheme(4, 32), format="compressed-tensors"),
    "bnb-nf4": Recipe(Scheme(4, 64, codes="nf4"), format="bnb-nf4"),
    "bnb-int8": Recipe(Scheme(8, -1), format="bnb-int8"),
}


class TooSlow(BaseException):
    """A case ran past its time; no reader catches this."""


def workplace(root: Path) -> Workplace:
    tiny = TESTS / "data" / "tiny-qwen2"
    rounding: dict[str, Any] = {"method": "rtn", "calibration": None}  # one manifest with a calibration is enough
    jobs = {n: small_job(tiny, root / n, recipe=r, **({} if n == "gptq" else rounding)) for n, r in RECIPES.items()}
    return make_workplace(root / "cases", tiny, jobs, small_job(tiny, root / "unfinished"))


def run(place: Workplace, cases: int, seed: int, only: str = "", part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Spread `cases` over the targets; returns counts and every finding (an escape, a hang, a message of two lines).

    part: one of several processes, each of which takes every `parts`-th case.
    """
    targets = [t for t in place.targets() if only in t.name]
    total = sum(t.share for t in targets)
    findings: list[dict[str, Any]] = []
    outcomes: dict[str, Counter[str]] = {}
    slowest: dict[str, float] = {}
    started = time.perf_counter()
    for target in targets:
        outcomes[target.name], slowest[target.name] = Counter(), 0.0
        for number in range(part, round(cases * target.share / total), parts):
            begun = time.process_time()
            problem = _one(target, Random(f"{seed} {target.name} {number}"), outcomes[target.name])
            slowest[target.name] = max(slowest[target.name], time.process_time() - begun)
            if problem:
                findings.append({"target": target.name, "case": number, "problem": problem})
                print(f"{target.name} {number}: {problem}", flush=True)
        print(f"{target.name}: {dict(outcomes[target.name])}, slowest {slowest[target.name]:.2f} s", flush=True)
    return {
        "cases": sum(sum(counts.values()) for counts in outcomes.values()),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": sum(os.times()[:4]),  # with children
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "outcomes": {name: dict(counts) for name, counts in outcomes.items()},
        "slowest_s": slowest,
        "findings": findings,
    }


def _one(target: Target, draw: Random, counts: Counter[str]) -> str:
    def expire(*_: object) -> None:
        raise TooSlow

    for kind in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(kind, expire)
    signal.setitimer(signal.ITIMER_REAL, WAITING_S)
    signal.setitimer(signal.ITIMER_PROF, TIME_S)
    try:
        target.case(draw)
    except target.refusals as error:
        counts["refused"] += 1
        message = f"{error.message}{error.hint}" if isinstance(error, QwenqError) else printable(str(error))
        return "" if message.isprintable() else f"not one printable line: {message[:200]!r}"
    except TooSlow:
        counts["hung"] += 1
        return f"still running after {TIME_S:g} s, or waiting after {WAITING_S:g} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        counts["escaped"] += 1
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/qwenq/" in f.filename]
        at = ours[-1] if ours else frame
        return f"{type(error).__name__}: {str(error)[:200]!r} at {Path(at.filename).name}:{at.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    counts["read"] += 1
    return ""


def limit_memory() -> None:
    """No case may take more address space than MEMORY_BYTES beyond what is taken now: a MemoryError is an escape."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_in_parts(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same cases in several processes, and what they found together."""
    words = [sys.executable, "-m", "fuzz", "--cases", str(options.cases), "--seed", str(options.seed)]
    files = [folder / f"{part}.json" for part in range(options.jobs)]
    processes = [
        subprocess.Popen([*words, "--only", options.only, "--part", f"{part}/{options.jobs}", "--json", str(file)])
        for part, file in enumerate(files)
    ]
    ended = [process.wait() for process in processes]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    lost = [
        {"target": "all", "case": part, "problem": f"the process of part {part} ended with status {status}"}
        for part, status in enumerate(ended)
        if not files[part].exists()
    ]
    outcomes: dict[str, Counter[str]] = {}
    for each in found:
        for name, counts in each["outcomes"].items():
            outcomes.setdefault(name, Counter()).update(counts)
    return {
        "cases": sum(each["cases"] for each in found),
        "seconds": max((each["seconds"] for each in found), default=0.0),
        "cpu_seconds": sum(each["cpu_seconds"] for each in found),
        "peak_rss_bytes": max((each["peak_rss_bytes"] for each in found), default=0),
        "outcomes": {name: dict(counts) for name, counts in outcomes.items()},
        "slowest_s": {name: max(each["slowest_s"][name] for each in found) for name in outcomes},
        "findings": lost + [finding for each in found for finding in each["findings"]],
    }


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--cases", type=int, default=100_000)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--only", default="", help="targets with this in their name")
    asked.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    asked.add_argument("--part", help=argparse.SUPPRESS)
    asked.add_argument("--json", type=Path, help="write counts and findings here")
    options = asked.parse_args()
    warnings.simplefilter("error")
    scratch = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="qwenq-fuzz-", dir=scratch) as folder:
        if options.part is None and options.jobs > 1:
            result = run_in_parts(options, Path(folder))
        else:
            place = workplace(Path(folder))
            limit_memory()
            part, parts = map(int, (options.part or "0/1").split("/"))
            result = run(place, options.cases, options.seed, options.only, part, parts)
    spent = f"{result['seconds']:.0f} s, {result['cpu_seconds']:.0f} s of processors"
    print(f"{result['cases']} cases in {spent}, {len(result['findings'])} findings")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
