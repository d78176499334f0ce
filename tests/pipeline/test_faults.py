"""Everything that can go wrong in a long run, for every output format: it recovers to the same bytes, or says why not.

Kills at any moment are in test_quantize.py and test_random_kills.py.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_job, text_windows
from faulty_disk import Cut, FailingWrites, PowerCut
from test_quantize import assert_same, change_tensor, make_stopped

import qwenq.pipeline.quantize
from qwenq.checkpoint.manifest import JOURNAL_NAME
from qwenq.checkpoint.reader import open_checkpoint
from qwenq.errors import CheckpointError, JobError, QwenqError, RunError
from qwenq.formats.base import Recipe, Scheme
from qwenq.formats.bitsandbytes import NF4
from qwenq.pipeline.evaluate import evaluate
from qwenq.pipeline.job import QuantizeJob
from qwenq.pipeline.preflight import partial_directory
from qwenq.pipeline.quantize import quantize
from qwenq.planning.rig import find_gpu

Make = Callable[..., Path]

# A new output format is one more line here.
FORMATS = {
    "gptq": Recipe(Scheme(4, 32)),
    "awq": Recipe(Scheme(4, 32, sym=False), format="awq"),
    "compressed-tensors": Recipe(Scheme(4, 32), format="compressed-tensors"),
    "bnb-nf4": Recipe(NF4, format="bnb-nf4"),
    "bnb-int8": Recipe(Scheme(8, -1), format="bnb-int8"),
}


class Case:
    """One format: a source, the checkpoint an undisturbed run makes of it, and jobs for an output of their own."""

    def __init__(self, recipe: Recipe, made: Path, root: Path) -> None:
        self.recipe, self.made, self.whole, self.place = recipe, made, made / "whole", root / "place"
        self.source = Path(shutil.copytree(made / "model", root / "model"))

    def job(self) -> QuantizeJob:
        return small_job(self.source, self.place / "out", recipe=self.recipe)

    def fresh(self) -> QuantizeJob:
        """A job in an empty directory."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        return self.job()

    def stopped(self) -> QuantizeJob:
        """A job stopped after two of three layers."""
        job = self.fresh()
        shutil.copytree(partial_directory(self.made / "out"), partial_directory(job.out))
        return job

    def resumed(self) -> list[Any]:
        """Go on, from nothing if nothing is there; the bytes must be those of the undisturbed run. Returns events."""
        job = self.job()
        said: list[Any] = []
        quantize(job, resume=partial_directory(job.out).exists(), listen=said.append)
        assert_same(self.whole, job.out)
        assert [path.name for path in self.place.iterdir()] == ["out"]
        return said


def layers_in(events: list[Any]) -> set[int]:
    return {event.layer for event in events if not isinstance(event, str)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What `make_stopped` makes for a format, once; not to be changed."""

    @cache
    def make(name: str) -> Path:
        return make_stopped(tmp_path_factory.mktemp(name), FORMATS[name], hidden_size=32, intermediate_size=64)

    return make


@pytest.fixture(params=FORMATS)
def case(request: Any, made: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> Case:
    monkeypatch.setattr(qwenq.pipeline.quantize, "_STATE_INTERVAL_S", 0.0)  # hidden states are saved after every layer
    return Case(FORMATS[request.param], made(request.param), tmp_path)


def one_line(error: QwenqError) -> str:
    assert "\n" not in error.message and error.hint
    return error.message


# ---------------------------------------------------------------------- the disk


def steps_of(disk: Any, job: QuantizeJob) -> int:
    with disk.watching():
        quantize(job)
    return int(disk.steps)


# Some steps in the fast tests, more in the slow ones; fewer for the other formats, which differ in a shard's contents.
FINE = pytest.mark.parametrize("fine", [False, pytest.param(True, marks=pytest.mark.slow)])


def stride(case: Case, fine: bool, *strides: tuple[int, int]) -> int:
    """Of (first format, others) for the fast tests and for the slow ones."""
    return strides[fine][case.recipe.format != "gptq"]


@FINE
def test_power_cut_at_any_moment(fine: bool, case: Case) -> None:
    """Whatever was not synced is gone: with its name, or with the name left behind. Either way the job goes on."""
    steps = steps_of(PowerCut(case.place, -1), case.fresh())
    for step in range(0, steps, stride(case, fine, (13, 41), (3, 13))):
        for names_kept in (False, True):
            disk = PowerCut(case.place, step)
            job = case.fresh()
            done: list[Any] = []
            with pytest.raises(Cut), disk.watching():
                quantize(job, listen=done.append)
            disk.restore(names_kept=names_kept)
            if job.out.exists():  # nothing but the last sync was missing
                lock = job.out / ".qwenq-lock"
                lock.unlink(missing_ok=True)
                assert_same(case.whole, job.out)
            else:
                assert not layers_in(done) & layers_in(case.resumed()), "a layer that was told as done was lost"


def test_the_power_cut_does_lose_what_is_not_synced(tmp_path: Path) -> None:
    """The layer's own test: a renamed file without a directory sync, and one whose bytes were not synced."""
    for names_kept, wanted in ((False, {"a": b"kept"}), (True, {"a": b"kept", "b": b"synced", "c": b""})):
        root = tmp_path / str(names_kept)
        root.mkdir()
        disk = PowerCut(root, 4)
        with pytest.raises(Cut), disk.watching():
            for name, data in (("a", b"kept"), ("b", b"synced")):
                with open(root / f"{name}.tmp", "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(root / f"{name}.tmp", root / name)
                if name == "a":
                    handle = os.open(root, os.O_RDONLY)
                    os.fsync(handle)
                    os.close(handle)
                    disk.step += 1
            (root / "c").write_bytes(b"never synced")
            os.replace(root / "c", root / "c")
        disk.restore(names_kept=names_kept)
        assert {p.name: p.read_bytes() for p in root.iterdir()} == wanted


@FINE
def test_full_disk_at_any_file(fine: bool, case: Case) -> None:
    """First and last writes of each: one line naming it or the directory, then --resume goes on to the same."""
    counting = FailingWrites(case.place, -1)
    assert steps_of(counting, case.fresh()) > 100
    first = {name: step for step, name in reversed([*enumerate(counting.touched)])}
    last = {name: step for step, name in enumerate(counting.touched)}
    assert {".qwenq-lock", JOURNAL_NAME, "config.json.tmp", "qwenq-manifest.json.tmp"} <= set(first)
    chosen = sorted({*first.values(), *last.values()})
    for step in chosen[:: stride(case, fine, (3, 11), (1, 5))]:
        disk = FailingWrites(case.place, step)
        job = case.fresh()
        with pytest.raises(JobError) as caught, disk.watching():
            quantize(job)
        if job.out.exists():  # the last sync of all
            assert one_line(caught.value).startswith(f"{job.out}: finished, but the disk could not confirm its name")
            assert_same(case.whole, job.out)
            continue
        assert one_line(caught.value).endswith("No space left on device")
        work = partial_directory(job.out)
        assert str(work) in caught.value.message
        assert "--resume" in caught.value.hint or not work.exists()
        case.resumed()


def test_read_only_directory(case: Case, monkeypatch: Any) -> None:
    job = case.fresh()

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(JobError) as caught:
            quantize(job)
    assert one_line(caught.value) == f"{partial_directory(job.out)}: Read-only file system"
    assert list(case.place.iterdir()) == []
    case.stopped()  # and one that becomes read-only while the job is stopped
    disk = FailingWrites(case.place, 0, errno.EROFS)
    with pytest.raises(JobError) as caught, disk.watching():
        quantize(job, resume=True)
    assert one_line(caught.value).endswith("Read-only file system")
    case.resumed()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_directory_without_permission(random_model: Make, tmp_path: Path) -> None:
    job = small_job(random_model(), tmp_path / "locked" / "out")
    job.out.parent.mkdir(mode=0o555)
    with pytest.raises(JobError, match="Permission denied"):
        quantize(job)


# ---------------------------------------------------------------------- the source


@pytest.mark.parametrize(  # a source is read before a format is asked for
    "case", ["gptq", *(pytest.param(name, marks=pytest.mark.slow) for name in FORMATS if name != "gptq")], indirect=True
)
@pytest.mark.parametrize("file", ["weights", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_source_replaced_between_kill_and_resume(file: str, case: Case) -> None:
    job = case.stopped()
    if file == "weights":
        path = change_tensor(case.source, "model.layers.0.mlp.up_proj.weight", 0.5)
    else:
        path = case.source / file
        path.write_bytes((path.read_bytes() if path.exists() else b"{}") + b"\n")
    with pytest.raises(JobError) as caught:
        quantize(case.job(), resume=True)
    digest = "'[0-9a-f]{64}'"
    assert re.search(rf"source\.{re.escape(path.name)} was {digest}, now {digest}", one_line(caught.value))
    assert partial_directory(job.out).is_dir()


@pytest.mark.parametrize("file", ["weights", "tokenizer.json"])
def test_a_source_replaced_during_the_run(file: str, case: Case) -> None:
    """Put back, the job goes on; a checkpoint of half one source and half another never gets its name."""
    job = case.fresh()
    path = job.source.files[0] if file == "weights" else case.source / file
    kept = path.read_bytes()

    def replace_after_layer_1(event: Any) -> None:
        if not isinstance(event, str) and event.layer == 1:
            beside = path.with_name("beside")
            beside.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
            os.replace(beside, path)

    with pytest.raises(CheckpointError) as caught:
        quantize(job, listen=replace_after_layer_1)
    assert one_line(caught.value) == f"{path}: changed while it was being read"
    assert not job.out.exists()
    path.write_bytes(kept)
    case.resumed()


# ---------------------------------------------------------------------- what is there already


@pytest.mark.parametrize(
    ("case", "block", "damage"),
    [
        *(("gptq", block, damage) for block in (0, 1, 2) for damage in ("flip", "cut", "empty", "gone")),
        *((name, at % 3, "flip") for at, name in enumerate(FORMATS) if name != "gptq"),
        *(
            pytest.param(name, block, damage, marks=pytest.mark.slow)
            for at, name in enumerate(FORMATS) if name != "gptq"
            for block in (0, 1, 2) for damage in ("flip", "cut", "empty", "gone") if (block, damage) != (at % 3, "flip")
        ),
    ],
    indirect=["case"],
)
def test_a_damaged_block_is_done_again(case: Case, block: int, damage: str) -> None:
    """Block 0 is the embedding, 1 and 2 are layers."""
    job = case.stopped()
    path = partial_directory(job.out) / f"model-{block + 1:05d}-of-00005.safetensors"
    data = path.read_bytes()
    middle = len(data) // 2
    damaged = {"flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], "cut": data[:-1], "empty": b""}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    said = case.resumed()
    told = f"layer {block - 1}: its file is missing or damaged, it and what follows is done again"
    assert (told in said) == (block > 0)
    assert not any("replaying" in str(event) for event in said), "states before it were saved"


def test_a_stale_lock_is_explained(case: Case) -> None:
    job = case.stopped()
    (partial_directory(job.out) / ".qwenq-lock").write_text(f"process 4711 on {os.uname().nodename}\n")
    assert f"process 4711 on {os.uname().nodename} left the job unfinished: going on" in case.resumed()


def test_out_of_memory_is_one_line_and_the_job_goes_on_later(
    random_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random_model()
    whole = quantize(small_job(source, tmp_path / "whole"))
    job = small_job(source, tmp_path / "out")
    said = 'CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 23.99 GiB'
    with monkeypatch.context() as patched:
        patched.setattr("torch.cuda.mem_get_info", lambda device: (1 << 30, 24 << 30))
        patched.setattr("qwenq.pipeline.monitor.gpu_at", lambda index: find_gpu("RTX 3090"))
        real, calls = qwenq.pipeline.quantize.make_layer, []

        def full(*args: Any) -> Any:
            calls.append(args)
            if len(calls) == 2:
                raise torch.OutOfMemoryError(said)
            return real(*args)

        patched.setattr("qwenq.pipeline.quantize.make_layer", full)
        with pytest.raises(RunError) as caught:
            quantize(job)
    short = "needs 2.50 GiB more, 1.00 GiB are free: 1.50 GiB short"
    assert caught.value.message == f"GPU 1 RTX 3090: out of memory while quantizing: {short}"
    assert "--resume" in caught.value.hint
    assert quantize(job, resume=True).drift.kl == whole.drift.kl


def test_out_of_memory_of_a_cpu_says_how_much(monkeypatch: pytest.MonkeyPatch, tiny: Path, heldout: Path) -> None:
    def full(*args: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes.")

    checkpoint = open_checkpoint(tiny)
    monkeypatch.setattr("qwenq.pipeline.workers.Workers.run_layer", full)
    monkeypatch.setattr("qwenq.pipeline.monitor.available_ram", lambda: 1 << 30)
    with pytest.raises(RunError) as caught:
        evaluate(checkpoint, checkpoint, text_windows(heldout, tiny, 64, 2))
    short = "needs 3.00 GiB more, 1.00 GiB are free: 2.00 GiB short"
    assert caught.value.message == f"CPU: out of memory while evaluating: {short}"
