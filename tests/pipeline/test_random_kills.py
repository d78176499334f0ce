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
from conftest import small_job, text_windows
from test_quantize import FORKS, assert_same

import qwenq.pipeline.quantize
from qwenq.formats.base import Recipe, Scheme
from qwenq.pipeline.job import QuantizeJob
from qwenq.pipeline.quantize import quantize

KILLS = 30


def tiny_job(source: Path, calib: Path, heldout: Path, out: Path) -> QuantizeJob:
    return small_job(
        source,
        out,
        recipe=Recipe(Scheme(4, 64)),
        calibration=text_windows(calib, source, 256, 12),
        evaluation=text_windows(heldout, source, 256, 4),
    )


def run(source: str, calib: str, heldout: str, out: str, interval: float, resume: bool) -> None:
    qwenq.pipeline.quantize._STATE_INTERVAL_S = interval
    quantize(tiny_job(Path(source), Path(calib), Path(heldout), Path(out)), resume=resume)


@pytest.mark.slow
def test_thirty_random_kills(tiny: Path, calib: Path, heldout: Path, tmp_path: Path, record_property: Any) -> None:
    quantize(tiny_job(tiny, calib, heldout, tmp_path / "whole"))

    def start(interval: float, resume: bool) -> Any:
        arguments = (str(tiny), str(calib), str(heldout), str(tmp_path / "out"), interval, resume)
        child = FORKS.Process(target=run, args=arguments)
        child.start()
        return child

    begun = time.perf_counter()
    start(1e9, False).join()
    whole_s = time.perf_counter() - begun
    shutil.rmtree(tmp_path / "out")
    draw, killed, identical = random.Random(2026), 0, 0
    while killed < KILLS:
        interval = draw.choice((0.0, 1e9))  # hidden states saved after each layer, or never
        child = start(interval, False)
        time.sleep(draw.uniform(0.1, 0.95) * whole_s)
        with suppress(ProcessLookupError):  # it may be done already
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        if child.exitcode == 0 or (tmp_path / "out").exists():
            shutil.rmtree(tmp_path / "out")  # done before the kill came: draw again
            continue
        killed += 1
        again = start(interval, (tmp_path / "out.partial").exists())
        again.join()
        assert again.exitcode == 0
        assert_same(tmp_path / "whole", tmp_path / "out")
        identical += 1
        shutil.rmtree(tmp_path / "out")
    record_property("identical", identical)
    print(f"{identical} of {KILLS} identical")
    assert identical == KILLS
