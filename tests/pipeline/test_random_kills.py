"""SIGKILL at random moments of a real quantization of the trained model, then resume: the bytes must be the same.

test_quantize.py kills at every sync and rename instead; this one knows nothing of where the job is.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_quantize import FORKS, assert_same

import qwenq.pipeline.quantize
from qwenq import api

# Options, and how often it is killed: 30 times of each format. Of the trained model only a padded FFN has K types.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "gptq": ({"bits": 4, "group_size": 64}, 30),
    "gguf": ({"format": "gguf", "gguf_type": "Q4_K_M", "pad_for_tp": 1}, 8),
    "gguf split": ({"format": "gguf", "gguf_type": "Q4_K_M", "split_size": "100KB"}, 7),
    "gguf knapsack": ({"format": "gguf", "target_size": "760KB"}, 7),
    "gguf knapsack split": (
        {"format": "gguf", "target_size": "760KB", "split_size": "100KB", "pad_for_tp": 1, "sensitivity": "table"}, 8
    ),
}


def run(source: str, out: str, options: dict[str, Any], interval: float, resume: bool) -> None:
    qwenq.pipeline.quantize._STATE_INTERVAL_S = interval
    api.quantize(source, out, resume=resume, **options)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_random_kills(case: str, tiny: Path, calib: Path, heldout: Path, tmp_path: Path, record_property: Any) -> None:
    chosen, kills = CASES[case]
    sample: dict[str, Any] = {"calibration": str(calib), "num_samples": 12, "sequence_length": 256, "device": "cpu"}
    numbers = {"compute_dtype": "float32", "calibration_dtype": "float32"}
    options = {**sample, **numbers, "eval_text": str(heldout), "eval_samples": 4, **chosen}
    if "sensitivity" in options:  # else measured by the job itself, before each kill
        options["sensitivity"] = str(tmp_path / "table.json")
        api.sensitivity(tiny, options["sensitivity"], format="gguf", compute_dtype="float32", **sample)

    def start(out: str, interval: float, resume: bool) -> Any:
        arguments = (str(tiny), str(tmp_path / out), options, interval, resume)
        child = FORKS.Process(target=run, args=arguments)
        child.start()
        return child

    partial = tmp_path / "out.partial"

    def journalled(child: Any) -> float:
        """The time from which on there is something to resume: a knapsack's sensitivities are measured before it."""
        while child.is_alive() and not partial.exists():
            time.sleep(0.01)
        return time.perf_counter()

    start("whole", 0.0, False).join()
    child = start("out", 1e9, False)
    begun = journalled(child)
    child.join()
    whole_s = time.perf_counter() - begun
    assert_same(tmp_path / "whole", tmp_path / "out")  # two undisturbed runs
    shutil.rmtree(tmp_path / "out")
    draw, killed, identical = random.Random(2026), 0, 0
    while killed < kills:
        interval = draw.choice((0.0, 1e9))  # hidden states saved after each layer, or never
        child = start("out", interval, False)
        journalled(child)
        time.sleep(draw.uniform(0.0, 0.95) * whole_s)
        with suppress(ProcessLookupError):  # it may be done already
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        if child.exitcode == 0 or (tmp_path / "out").exists():
            shutil.rmtree(tmp_path / "out")  # done before the kill came: draw again
            continue
        killed += 1
        again = start("out", interval, True)
        again.join()
        assert again.exitcode == 0
        assert_same(tmp_path / "whole", tmp_path / "out")
        identical += 1
        shutil.rmtree(tmp_path / "out")
    record_property("identical", identical)
    print(f"{case}: {identical} of {kills} identical")
    assert identical == kills
