"""One rank against several on this machine, one thread each, in turns: wall time, CPU seconds, peak memory, bytes.

    python benchmarks/scale_out.py MODEL --ranks 1,2 --turns 3 --json scale.json -- -n 64 --group-size 64
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MANIFEST = "qwenq-manifest.json"


def run(model: str, size: int, out: Path, options: list[str]) -> dict[str, Any]:
    """One job over so many ranks: wall seconds, and by rank CPU seconds and peak bytes of the process."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    command = [sys.executable, "-m", "qwenq", "quantize", model, "-o", str(out), "--device", "cpu", *options]
    variables = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    ranks = [
        subprocess.Popen(
            command, env=os.environ | variables | {"RANK": str(k), "LOCAL_RANK": str(k)}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if k else None,
        )
        for k in range(size)
    ]  # fmt: skip
    cpu, peaks = [], []
    for rank in ranks:
        _, status, usage = os.wait4(rank.pid, 0)
        rank.returncode = os.waitstatus_to_exitcode(status)
        if rank.returncode:
            raise SystemExit(f"{size} ranks: exit code {rank.returncode}")
        cpu.append(usage.ru_utime + usage.ru_stime)
        peaks.append(usage.ru_maxrss * 1024)
    wall = time.perf_counter() - begun
    manifest = json.loads((out / MANIFEST).read_text())
    stages = {name: round(seconds, 1) for name, seconds in manifest["run"]["stages_s"].items()}
    return {"ranks": size, "wall_s": wall, "cpu_s": cpu, "peak_bytes": peaks, "digest": manifest["digest"],
            "load": os.getloadavg()[0], "stages_s": stages}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write")
    asked, options = parser.parse_known_args()  # options of `qwenq quantize` come behind --
    sizes = [int(size) for size in asked.ranks.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for turn in range(asked.turns):
            for size in sizes:
                out = Path(place) / f"{turn}-{size}"
                rows.append(run(asked.model, size, out, [word for word in options if word != "--"]))
                shutil.rmtree(out)
                print(json.dumps(rows[-1]), flush=True)
                if asked.json:
                    asked.json.write_text(json.dumps(rows, indent=2) + "\n")
    if len({row["digest"] for row in rows}) > 1:
        raise SystemExit("the runs wrote different bytes")


if __name__ == "__main__":
    main()
