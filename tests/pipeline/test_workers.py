"""Work done side by side: every part once, results in order, errors kept, the same result with any number of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_job

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.errors import PlanError
from qwenq.model.layer import Network
from qwenq.pipeline.config import cpu_batch_tokens, pick_device
from qwenq.pipeline.quantize import quantize
from qwenq.pipeline.ranks import ALONE
from qwenq.pipeline.shares import Share, parts_of, passes
from qwenq.pipeline.workers import PartSums, Workers, cpu_workers
from qwenq.solver.gptq import ResidualCovariance, solve_linears
from qwenq.solver.grid import IntegerGrid
from qwenq.solver.parallel import cut_rows, joined, side_by_side, solve_rows

CPU = torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("count", "ranks", "workers"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 1), (6, 1, 2), (8, 1, 4), (16, 1, 4), (8, 2, 4), (8, 4, 2), (8, 8, 1), (2, 4, 2)],
)
def test_workers_share_threads_evenly(count: int, ranks: int, workers: int, threads: None) -> None:
    torch.set_num_threads(count)
    assert cpu_workers(8192, ranks) == workers and cpu_workers(8193, ranks) == 1


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


def test_windows_are_cut_into_even_parts_the_larger_ones_first() -> None:
    assert [len(part) for part in parts_of(range(5, 25))] == [3, 3, 3, 3, 2, 2, 2, 2]
    assert parts_of(range(3, 6)) == [range(3, 4), range(4, 5), range(5, 6)] and parts_of(range(0)) == []


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_have_every_window_once_and_about_as_many_each(size: int) -> None:
    shares = [Share((range(10), range(10, 21), range(21, 22)), rank, size) for rank in range(size)]
    assert sorted(w for share in shares for w in share.windows) == list(range(22))
    assert all(share.count == 22 for share in shares)
    counts = [len(share.windows) for share in shares]
    assert max(counts) - min(counts) <= 3
    for share in shares:
        parts = [(windows, part) for windows in share.passes for part in share.parts(windows)]
        assert [part.own.start for _, part in parts] == [0, *(part.own.stop for _, part in parts)][:-1]
        for windows, part in parts:
            assert share.windows[part.own] == list(parts_of(windows)[part.number])
        assert {part.number % size for _, part in parts} <= {share.rank}
    found = [shares[rank].windows[own] for rank, own in shares[0].places]
    assert [w for windows in found for w in windows] == list(range(22)), "in the job's order"


def test_the_first_windows_lie_where_all_of_them_do() -> None:
    for rank in range(2):
        share = Share((range(11),), rank, 2)
        few = share.up_to(3)
        assert few.windows == [w for w in share.windows if w < 3] and few.count == 3
        for part, whole in zip(few.parts(range(11)), share.parts(range(11)), strict=False):
            assert (part.number, part.own.start) == (whole.number, whole.own.start)


def test_batches_of_a_cpu_by_the_ffn() -> None:
    widths = 384, 2560, 2561, 4864, 8192, 8193
    assert [cpu_batch_tokens(width) for width in widths] == [1024, 1024, 1023, 538, 320, 2048]


def test_batches_stay_within_parts() -> None:
    share = Share((range(20), range(20, 23)))
    batches = [(part.start, part.stop) for part in share.batches(2)]
    assert batches[:4] == [(0, 2), (2, 3), (3, 5), (5, 6)] and batches[-3:] == [(20, 21), (21, 22), (22, 23)]


def test_every_window_goes_through_once_and_always_by_the_same_worker(tiny: Path, threads: None) -> None:
    torch.set_num_threads(4)
    source = open_checkpoint(tiny)
    workers = Workers(source.config, source.spec, dtype=torch.float32, window_tokens=512)  # 2 windows at a time
    shares = [[(0, 2), (8, 9)], [(2, 4), (9, 10)], [(4, 6), (10, 11)], [(6, 8), (11, 12)]]
    assert all(parts_of_workers(workers, 12) == shares for _ in range(3))
    two = Workers(source.config, source.spec, dtype=torch.float32, window_tokens=512, devices=("cpu", "cpu"))
    assert parts_of_workers(two, 20)[1] == [(3, 5), (5, 6), (9, 11), (11, 12), (14, 16), (18, 20)]


def parts_of_workers(workers: Workers, windows: int) -> list[list[tuple[int, int]]]:
    """The windows that each worker gets."""
    seen: dict[Network, list[tuple[int, int]]] = {network: [] for network in workers.networks}
    share = ALONE.share(range(windows))
    workers.each(lambda network, part: seen[network].append((part.start, part.stop)), share, range(windows))
    return list(seen.values())


def summed(workers: Workers, share: Share, x_TI: torch.Tensor) -> torch.Tensor:
    sums = PartSums(workers, 3)
    for windows in share.passes:
        workers.each(lambda network, part: sums.of(network).add_(x_TI[part].sum(0)), share, windows, [sums])
    return sums.take()


@pytest.mark.parametrize("held", [1, 1 << 21])
def test_sums_are_of_parts_in_their_order_whoever_makes_them(
    held: int, tiny: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwenq.pipeline.workers.HELD_VALUES", held)
    source, x_TI, found = open_checkpoint(tiny), torch.randn(21, 3) * 1e4, []
    share = ALONE.share(range(11), range(11, 21))
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        workers = Workers(source.config, source.spec, dtype=torch.float32, window_tokens=512)
        assert len(workers.networks) == count
        found.append(summed(workers, share, x_TI))
    by_hand = torch.zeros(3)
    for part in [*parts_of(range(11)), *parts_of(range(11, 21))]:
        by_part = torch.zeros(3)
        for start in range(part.start, part.stop, 2):
            by_part += x_TI[start : min(start + 2, part.stop)].sum(0)
        by_hand += by_part
    assert all(torch.equal(total, by_hand) for total in found)


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
            workers.run_layer(found, ALONE.share(range(5)))
            torch.testing.assert_close(found, network.forward(h_NTH), rtol=1e-5, atol=1e-5)
    workers.release()
    assert {p.device.type for copy in workers.networks for p in copy.parameters().values()} == {"meta"}


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "count"), [((200, 100), 2), ((64, 577, 64), 3), ((64, 64), 4), ((30,), 2)])
def test_shares_of_rows_are_solved_as_the_whole_is(
    rows: tuple[int, ...], count: int, products: torch.dtype
) -> None:
    torch.manual_seed(3)
    x_TI = torch.randn(500, 512) @ torch.randn(512, 512)
    weights = {f"w{k}": torch.randn(n, 512) for k, n in enumerate(rows)}
    halves = {name: (torch.randn(512, len(w_OI)), torch.randn(512, len(w_OI))) for name, w_OI in weights.items()}
    grid = IntegerGrid(4, 64)

    def given() -> tuple[torch.Tensor, dict[str, ResidualCovariance]]:
        # overwritten by who is given it
        return x_TI.T @ x_TI, {name: ResidualCovariance(a + b, a.clone()) for name, (a, b) in halves.items()}

    options: dict[str, Any] = {"error_correction": 0.5, "products": products}
    h_II, residuals = given()
    whole = solve_linears(weights, h_II, grid, residuals=residuals, **options)
    h_II, residuals = given()
    shares = cut_rows({name: len(w_OI) for name, w_OI in weights.items()}, count)
    parts = solve_rows([CPU] * count, weights, h_II, grid, shares, residuals=residuals, **options)
    for name, (q, stats) in whole.items():
        found, found_stats = joined([part[name] for part in parts if name in part], CPU)
        assert torch.equal(found.codes_OI, q.codes_OI) and found.grid == grid
        assert all(torch.equal(a, b) for a, b in zip(found.parameters, q.parameters, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found_stats.by_row, stats.by_row, strict=True))
        assert (found_stats.damp_percent, found_stats.fallback) == (stats.damp_percent, stats.fallback)


def test_rows_are_cut_between_blocks_and_evenly() -> None:
    first, second = cut_rows({"q": 576, "k": 192, "v": 192}, 2)
    assert first == {"q": range(512)} and second == {"q": range(512, 576), "k": range(192), "v": range(192)}
    assert cut_rows({"w": 70}, 4) == [{"w": range(64)}, {}, {"w": range(64, 70)}, {}]
    for count in (1, 2, 3, 4, 8):
        shares = cut_rows({"a": 1000, "b": 64, "c": 5}, count)
        assert sum(len(rows) for share in shares for rows in share.values()) == 1069 and shares[0]
        assert all(rows.start % 64 == 0 for share in shares for rows in share.values())


def test_a_job_on_several_devices_loses_what_it_loses_on_one(two_layers: Path, tmp_path: Path) -> None:
    job = small_job(two_layers, tmp_path / "one")
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
        workers.each(work, ALONE.share(range(40)), range(40))
    assert set(seen) <= {0, 5}


def test_both_halves_of_what_is_corrected_go_by_themselves() -> None:
    assert passes(10) == [range(10)] and passes(10, 10) == [range(5), range(5, 10)]
    assert passes(10, 5) == [range(2), range(2, 5), range(5, 10)]
    assert passes(3, 2) == [range(1), range(1, 2), range(2, 3)]
