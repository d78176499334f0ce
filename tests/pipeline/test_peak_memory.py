"""Peak memory (VmHWM, file pages included) does not grow with the number of layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}

JOB = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
from conftest import small_job
from qwenq.pipeline.config import Tokens
from qwenq.pipeline.preflight import peak_bytes
from qwenq.pipeline.quantize import quantize
job = small_job(sys.argv[1], sys.argv[2])
result = quantize(job)
predicted, _ = peak_bytes(job.source.spec, Tokens(6, 3, 32), 4, False)
print(json.dumps({"peak": result.peak_rss_bytes, "predicted": predicted}))
"""


def peaks(source: Path, out: Path) -> dict[str, int]:
    words = [sys.executable, "-c", JOB, str(source), str(out), str(Path(__file__).parents[1])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_8_and_32_layers_need_the_same_memory(random_model: Callable[..., Path], tmp_path: Path) -> None:
    found: dict[int, dict[str, int]] = {}
    sources = {n: random_model(f"m{n}", dtype=torch.float16, num_hidden_layers=n, **SHAPE) for n in (8, 32)}
    for attempt in range(3):  # how much of torch's own files is resident varies by some MB between equal runs
        for layers, source in sources.items():
            once = peaks(source, tmp_path / f"out{layers}-{attempt}")
            found[layers] = min(found.get(layers, once), once, key=lambda f: f["peak"])
        if abs(found[32]["peak"] - found[8]["peak"]) <= 0.03 * found[8]["peak"]:
            break
    block = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768)  # bytes of a layer's linears in float32: 3 MB
    grown = found[32]["peak"] - found[8]["peak"]
    assert grown <= 0.03 * found[8]["peak"], found
    assert grown < 24 * block / 4, found  # 24 more layers, of which not even a quarter may stay
    assert found[8]["peak"] < found[8]["predicted"] * 1.05, found
