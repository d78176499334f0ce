"""Work done side by side: every part once, results in order, errors kept, the same result with any number of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_job

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.errors import PlanError
from qwenq.model.layer import Network
from qwenq.pipeline.block import passes
from qwenq.pipeline.config import pick_device
from qwenq.pipeline.quantize import quantize
from qwenq.pipeline.workers import Workers, WorkerSums, cpu_workers
from qwenq.solver.gptq import ResidualCovariance, solve_linears
from qwenq.solver.grid import IntegerGrid
from qwenq.solver.parallel import side_by_side, solve_rows

CPU = torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("count", "windows", "workers"),
    [
        *[(1, 4, 1), (2, 4, 2), (2, 1, 1), (3, 4, 1), (3, 6, 3), (5, 4, 1), (6, 4, 2), (6, 2, 2), (2, 5, 1)],
        *[(16, 4, 4), (16, 8, 4), (16, 0, 1)],
    ],
)
def test_workers_share_threads_evenly(count: int, windows: int, workers: int, threads: None) -> None:
    torch.set_num_threads(count)
    assert cpu_workers(windows, 8192) == workers and cpu_workers(windows, 8193) == 1


def test_calls_run_at_once_each_with_its_share_of_threads(threads: None) -> None:
    torch.set_num_threads(4)
    together = threading.Barrier(2, timeout=20)  # breaks unless both are there at the same time

    def call() -> tuple[int, bool]:
        together.wait()
        return torch.get_num_threads(), torch.is_inference_mode_enabled()

    with torch.inference_mode():
        assert side_by_side([call, call]) == [(2, True), (2, True)]
    assert side_by_side([call, call]) == [(2, False), (2, False)]
    assert torch.get_num_threads() == 4
    assert side_by_side([torch.get_num_threads]) == [4], "a single call has all of them"


def test_an_error_waits_for_the_others() -> None:
    done = threading.Event()
    failed = threading.Event()

    def slow() -> None:
        assert failed.wait(20)
        done.set()

    def bad() -> None:
        failed.set()
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        side_by_side([bad, slow])
    assert done.is_set()


def test_every_window_goes_through_once_and_always_by_the_same_worker(tiny: Path, threads: None) -> None:
    torch.set_num_threads(4)
    source = open_checkpoint(tiny)
    workers = Workers(source.config, source.spec, dtype=torch.float32, window_tokens=512)  # 4 windows at a time
    shares = [[(2, 3), (6, 7), (10, 11)], [(3, 4), (7, 8), (11, 12)], [(4, 5), (8, 9)], [(5, 6), (9, 10)]]
    assert all(parts_of(workers, range(2, 12)) == shares for _ in range(3))
    two = Workers(source.config, source.spec, dtype=torch.float32, window_tokens=512, devices=("cpu", "cpu"))
    assert parts_of(two, range(14)) == [[(0, 4), (8, 12)], [(4, 8), (12, 14)]], "devices take whole batches"


def parts_of(workers: Workers, windows: range) -> list[list[tuple[int, int]]]:
    """The parts that each worker gets."""
    seen: dict[Network, list[tuple[int, int]]] = {network: [] for network in workers.networks}
    workers.each(lambda network, part: seen[network].append((part.start, part.stop)), windows)
    return list(seen.values())


def test_workers_sum_in_parts(tiny: Path, threads: None) -> None:
    torch.set_num_threads(2)
    source = open_checkpoint(tiny)
    workers = Workers(source.config, source.spec, dtype=torch.float32, window_tokens=512)
    sums, x_TI = WorkerSums(workers, 1, 3), torch.randn(9, 3)
    workers.each(lambda network, part: sums.of(network).add_(x_TI[part].sum(0)), range(6))
    torch.testing.assert_close(sums.total(), x_TI[:6].sum(0, keepdim=True))
    workers.each(lambda network, part: sums.of(network).add_(x_TI[part].sum(0)), range(6, 9))
    torch.testing.assert_close(sums.total(), x_TI.sum(0, keepdim=True))
    assert sums.total().data_ptr() == sums.total().data_ptr()


def test_replicas_share_tensors_and_give_what_a_network_gives(tiny: Path, threads: None) -> None:
    torch.set_num_threads(2)
    source = open_checkpoint(tiny)
    network = Network(source.config, source.spec, dtype=torch.float32)
    workers = Workers(source.config, source.spec, dtype=torch.float32, window_tokens=512)
    assert len(workers.networks) == 2
    state = source.layer_state(1)
    h_NTH = torch.randn(5, 512, source.spec.hidden_size)
    for change in (None, torch.randn_like(state["mlp.up_proj.weight"], dtype=torch.float32)):
        network.fill(state)
        workers.fill(state)
        if change is not None:
            network.set_parameter("mlp.up_proj.weight", change)
            workers.set_parameter("mlp.up_proj.weight", change)
        ups = [copy.weight("mlp.up_proj").data_ptr() for copy in workers.networks]
        assert ups[0] == ups[1], "no second copy on the same device"
        found = h_NTH.clone()
        with torch.inference_mode():
            workers.run_layer(found)
            torch.testing.assert_close(found, network.forward(h_NTH), rtol=1e-5, atol=1e-5)
    workers.release()
    assert {p.device.type for copy in workers.networks for p in copy.parameters().values()} == {"meta"}


def test_shares_of_rows_are_solved_as_the_whole_is() -> None:
    torch.manual_seed(3)
    x_TI = torch.randn(500, 128) @ torch.randn(128, 128)
    weights = {"a": torch.randn(37, 128), "b": torch.randn(5, 128)}
    halves = {name: (torch.randn(128, len(w_OI)), torch.randn(128, len(w_OI))) for name, w_OI in weights.items()}
    grid = IntegerGrid(4, 64)

    def given() -> tuple[torch.Tensor, dict[str, ResidualCovariance]]:
        # overwritten by who is given it
        return x_TI.T @ x_TI, {name: ResidualCovariance(a + b, a.clone()) for name, (a, b) in halves.items()}

    h_II, residuals = given()
    whole = solve_linears(weights, h_II, grid, residuals=residuals, error_correction=0.5)
    h_II, residuals = given()
    shared = solve_rows([CPU] * 3, weights, h_II, grid, residuals=residuals, error_correction=0.5)
    for name, (q, stats) in whole.items():
        found, found_stats = shared[name]
        assert found.codes_OI.shape == q.codes_OI.shape and found.grid == grid
        assert (found.codes_OI != q.codes_OI).float().mean() < 0.002  # a tie in the last bit may fall either way
        torch.testing.assert_close(found.dequantize(), q.dequantize(), rtol=0.05, atol=0.05)
        assert found_stats.error_db == pytest.approx(stats.error_db, abs=0.02)
        assert found_stats.weight_error_db == pytest.approx(stats.weight_error_db, abs=0.02)
        assert found_stats.damp_percent == stats.damp_percent and found_stats.fallback == stats.fallback


def test_a_job_on_several_devices_loses_what_it_loses_on_one(tiny: Path, tmp_path: Path) -> None:
    job = small_job(tiny, tmp_path / "one")
    one = quantize(job)
    two = quantize(replace(job, out=tmp_path / "two", config=replace(job.config, device="cpu,cpu")))
    assert two.drift.kl.mean == pytest.approx(one.drift.kl.mean, rel=0.1)
    for a, b in zip(one.layers, two.layers, strict=True):
        for x, y in zip(a.linears, b.linears, strict=True):
            assert x.name == y.name and x.error_db == pytest.approx(y.error_db, abs=0.1)


@pytest.mark.parametrize(
    ("asked", "gpus", "wanted"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0,cuda:1"),
        ("cuda", 2, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
        ("cuda:1,cuda:0", 2, "cuda:1,cuda:0"),
        ("cpu", 2, "cpu"),
    ],
)
def test_which_devices_are_meant(asked: str, gpus: int, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    assert pick_device(asked) == wanted
    if "," in asked:
        with pytest.raises(PlanError, match="this command uses one GPU"):
            pick_device(asked, several=False)
    else:
        assert pick_device(asked, several=False) == wanted.split(",")[0]


@pytest.mark.parametrize(
    "asked", ["tpu", "cuda:x", "cuda:2", "cuda:0,cuda:0", "cuda:0,cpu", "cuda,cuda:0", "", "cuda:-1"]
)
def test_devices_that_are_none(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(PlanError, match=f"--device {asked}: "):
        pick_device(asked)


def test_an_error_stops_the_other_workers_behind_their_part(tiny: Path, threads: None) -> None:
    torch.set_num_threads(2)
    source = open_checkpoint(tiny)
    workers = Workers(source.config, source.spec, dtype=torch.float32, window_tokens=1024)
    seen: list[int] = []
    failed = threading.Event()

    def work(network: Network, part: slice) -> None:
        seen.append(part.start)
        if part.start == 0:
            failed.set()
            raise ValueError("this one")
        assert failed.wait(20)
        time.sleep(0.05)

    with pytest.raises(ValueError, match="this one"):
        workers.each(work, range(40))
    assert set(seen) <= {0, 1}


def test_a_layer_is_replayed_in_the_ranges_it_was_solved_in() -> None:
    assert passes(10) == [range(10)] and passes(10, 10) == [range(5), range(5, 10)]
    assert passes(10, 5) == [range(2), range(2, 5), range(5, 10)]
    assert passes(3, 2) == [range(1), range(1, 2), range(2, 3)]


def test_few_rows_go_to_few_devices() -> None:
    h_II = torch.eye(64) * 100
    q, stats = solve_rows([CPU] * 3, {"w": torch.randn(2, 64), "v": torch.randn(9, 64)}, h_II, IntegerGrid(4, 32))["w"]
    assert q.codes_OI.shape == (2, 64) and stats.error_db < -10
