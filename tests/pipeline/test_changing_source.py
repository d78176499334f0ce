"""A source that changes while it is read, and an unfinished job that is damaged: the same bytes, or one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from changing_source import Place, tried
from conftest import small_job
from test_quantize import assert_same

from qwenq.errors import CheckpointError
from qwenq.pipeline.preflight import partial_directory
from qwenq.pipeline.quantize import quantize

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("changing"))


def test_a_layer_of_changed_bytes_is_never_kept(random_model: Make, tmp_path: Path) -> None:
    """A byte of layer 2 is flipped after layer 0, time and size as they were, then put back, and the job resumed."""
    source = random_model(hidden_size=32, intermediate_size=64)
    quantize(small_job(source, tmp_path / "whole"))
    job = small_job(source, tmp_path / "out")
    location = job.source.tensors["model.layers.2.mlp.up_proj.weight"]
    kept, times = location.file.read_bytes(), os.stat(location.file)
    layers: list[int] = []

    def write(data: bytes) -> None:
        with open(location.file, "r+b") as file:
            file.write(data)
        os.utime(location.file, ns=(times.st_atime_ns, times.st_mtime_ns))

    def flip(event: Any) -> None:
        if not isinstance(event, str):
            layers.append(event.layer)
            if event.layer == 0:
                write(kept[: location.start + 1] + bytes([kept[location.start + 1] ^ 1]) + kept[location.start + 2 :])

    with pytest.raises(CheckpointError) as caught:
        quantize(job, listen=flip)
    assert caught.value.message == f"{location.file}: changed while it was being read"
    assert layers == [0, 1]
    assert partial_directory(job.out).is_dir()
    write(kept)
    quantize(small_job(source, tmp_path / "out"), resume=True)
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_sources_that_change(place: Place) -> None:
    outcomes, wrong = tried(10, place.changing, 1)
    assert wrong == []
    assert outcomes["refused, then identical"] > 0


def test_unfinished_jobs_damaged(place: Place) -> None:
    outcomes, wrong = tried(20, place.damaging, 1)
    assert wrong == []
    assert len(outcomes) > 4


@pytest.mark.slow
def test_three_hundred_sources_that_change(place: Place) -> None:
    outcomes, wrong = tried(300, place.changing, 2026)
    print(dict(outcomes))
    assert wrong == []


@pytest.mark.slow
def test_a_thousand_unfinished_jobs_damaged(place: Place) -> None:
    outcomes, wrong = tried(1000, place.damaging, 2026)
    print(dict(outcomes))
    assert wrong == []
