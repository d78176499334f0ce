"""The same job over several processes: the same bytes and figures, and an end in one line when one of them is lost."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tied_copy
from test_quantize import FORKS, assert_same

from qwenq.checkpoint.manifest import MANIFEST_NAME
from qwenq.errors import RunError, UsageError
from qwenq.launch import read_launch
from qwenq.pipeline.ranks import Ranks, _meet

TIMEOUT_S = 3.0  # of a rank without a sign of life
LENGTH = ["--device", "cpu", "--sequence-length", "64"]
TEXT = ["--builtin-share", "0", "-n", "11", *LENGTH]


@dataclass
class Ended:
    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port


def run_rank(words: list[str], environment: dict[str, str], said: str, before: Callable[[], None] | None) -> None:
    """`qwenq` with these words, its output in files."""
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before is not None:
        before()
    from qwenq.cli.main import main

    sys.argv = ["qwenq", *words]
    main()


class Started:
    """Ranks of one job on this machine; rank 0 keeps the store, as without torchrun."""

    def __init__(
        self,
        place: Path,
        size: int,
        words: Sequence[object] | Callable[[int], Sequence[object]],
        before: dict[int, Callable[[], None]] | None = None,
        **environment: str,
    ) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.place, port = place, free_port()
        self.processes = []
        for rank in range(size):
            variables = {
                "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "QWENQ_RANK_TIMEOUT": str(TIMEOUT_S),
                "COLUMNS": "200",
            } | environment  # fmt: skip
            own = words(rank) if callable(words) else words
            process = FORKS.Process(
                target=run_rank, args=([*map(str, own)], variables, str(place / f"{rank}"), (before or {}).get(rank))
            )
            process.start()
            self.processes.append(process)

    def ended(self, within_s: float = 60) -> list[Ended]:
        """What each rank said and ended with."""
        end = time.monotonic() + within_s
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        said = [Ended(p.exitcode, *self._said(rank)) for rank, p in enumerate(self.processes)]
        assert not alive, (alive, said)
        return said

    def _said(self, rank: int) -> tuple[str, str]:
        out, err = ((self.place / f"{rank}.{name}") for name in ("out", "err"))
        return (out.read_text() if out.exists() else ""), (err.read_text() if err.exists() else "")

    def wait_until(self, words: str, rank: int = 0) -> None:
        """Until a rank has said something."""
        end = time.monotonic() + 60
        while words not in self._said(rank)[1]:
            assert time.monotonic() < end and self.processes[rank].is_alive(), self._said(rank)
            time.sleep(0.02)


def over(place: Path, size: int, *words: object) -> list[Ended]:
    """A command over ranks, which all end well; all but the first are silent."""
    said = Started(place, size, words).ended(120)
    assert [each.code for each in said] == [0] * size, said
    assert all(not each.out and not each.err for each in said[1:]), said
    return said


def alone(place: Path, *words: object) -> Ended:
    return over(place, 1, *words)[0]


@pytest.fixture(scope="module")
def text(calib: Path, heldout: Path) -> list[object]:
    return [*TEXT, "--calibration", calib, "--eval-text", heldout, "--eval-samples", "5"]


def job(tiny: Path, text: list[object], out: Path) -> list[object]:
    return ["quantize", tiny, *text, "--error-correction", "0", "-o", out]


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, text: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of that job; not to be changed."""
    place = tmp_path_factory.mktemp("undisturbed")
    alone(place / "said", *job(tiny, text, place / "out"))
    return place / "out"


# ---------------------------------------------------------------------- the same bytes and figures

KINDS: dict[str, list[object]] = {
    "error correction": ["--group-size", "32", "--error-correction", "1"],
    "symmetric": ["--bits", "4", "--error-correction", "0", "--calibration-dtype", "bfloat16"],
    "gguf": ["--format", "gguf", "--gguf-type", "Q4_K_M", "--error-correction", "1"],
    "gguf, tied": ["--format", "gguf", "--gguf-type", "Q4_K_M"],
    "asymmetric, bfloat16": ["--format", "awq", "--group-size", "64", "--compute-dtype", "bfloat16"],
    "rotated": ["--rotate", "--group-size", "64"],
    "rounded": ["--method", "rtn"],
    "bitsandbytes": ["--format", "bnb-nf4"],
}


@pytest.mark.parametrize("kind", [
    kind if kind == "error correction" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS
])  # fmt: skip
def test_bytes_do_not_depend_on_the_number_of_ranks(
    kind: str, two_layers: Path, text: list[object], tmp_path: Path
) -> None:
    read = [*LENGTH, *text[-4:]] if kind in ("rounded", "bitsandbytes") else text
    model = tied_copy(two_layers, tmp_path / "tied") if kind == "gguf, tied" else two_layers
    command = ["quantize", model, *KINDS[kind], *read]
    for size in (1, 2, 4):
        over(tmp_path / f"said-{size}", size, *command, "-o", tmp_path / f"{size}")
    for size in (2, 4):
        assert_same(tmp_path / "1", tmp_path / f"{size}")
        run = json.loads((tmp_path / f"{size}" / MANIFEST_NAME).read_text())["run"]
        if kind in ("error correction", "gguf", "gguf, tied"):
            dry = json.loads(alone(tmp_path / "dry", *command, "--dry-run", "--ranks", size, "--json").out)
            received = [rank["received_bytes"] for rank in run["ranks"]]
            assert (dry["wire_head_bytes"] > 0) == (kind != "error correction")
            told = 2 * dry["wire_layer_bytes"] + dry["wire_head_bytes"]
            assert received == pytest.approx([told] * size, rel=0.1)
        assert [rank["device"] for rank in run["ranks"]] == ["cpu"] * size
        assert {rank["host"] for rank in run["ranks"]} == {socket.gethostname()}
        assert {rank["threads"] for rank in run["ranks"]} == {1} and run["ranks"][1]["peak_rss_bytes"] > 1e8


@pytest.mark.slow
def test_a_mixed_recipe_from_sensitivities_measured_together(tiny: Path, text: list[object], tmp_path: Path) -> None:
    for size in (1, 2, 4):
        places = ["--save-imatrix", tmp_path / f"imatrix-{size}", "-o", tmp_path / f"{size}"]
        over(tmp_path / f"said-{size}", size, "quantize", tiny, *text, "--bpw", "5", *places)
    for size in (2, 4):
        assert_same(tmp_path / "1", tmp_path / f"{size}")
        assert (tmp_path / f"imatrix-{size}").read_bytes() == (tmp_path / "imatrix-1").read_bytes()


def test_eval_and_sensitivity_give_the_same_figures(
    tiny: Path, finished: Path, calib: Path, heldout: Path, tmp_path: Path
) -> None:
    words = ["eval", finished, "--reference", tiny, "--text", heldout, "--sequence-length", "64", "-n", "5"]
    words += ["--device", "cpu", "--compute-dtype", "bfloat16", "--json"]
    logits = [tmp_path / f"logits-{size}" for size in (1, 2)]
    found = [
        over(tmp_path / f"eval-{size}", size, *words, "--save-reference-logits", path)[0].out
        for size, path in zip((1, 2), logits, strict=True)
    ]
    one, two = (json.loads(text.replace(f"logits-{k}", "logits")) for k, text in zip((1, 2), found, strict=True))
    assert one == two and one["noise_floor_kl"] > 0 and one["kl"]["mean"] > 0
    assert logits[0].read_bytes() == logits[1].read_bytes()
    words = ["sensitivity", tiny, "--calibration", calib, "--sequence-length", "64", "-n", "9", "--device", "cpu"]
    for size in (1, 2):
        over(tmp_path / f"sensitivity-{size}", size, *words, "-o", tmp_path / f"table-{size}")
    assert (tmp_path / "table-1").read_bytes() == (tmp_path / "table-2").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("format", "tied"), [("gptq", False), ("gguf", False), ("gguf", True)])
def test_sensitivities_over_four_ranks(format: str, tied: bool, tiny: Path, calib: Path, tmp_path: Path) -> None:
    model = tied_copy(tiny, tmp_path / "tied") if tied else tiny
    words = ["sensitivity", model, "--calibration", calib, "--sequence-length", "64", "-n", "9", "--device", "cpu"]
    for size in (1, 4):
        over(tmp_path / f"said-{size}", size, *words, "--format", format, "-o", tmp_path / f"table-{size}")
    assert (tmp_path / "table-1").read_bytes() == (tmp_path / "table-4").read_bytes()


def test_hidden_states_are_saved_for_any_number_of_ranks(tiny: Path, text: list[object], tmp_path: Path) -> None:
    command = ["quantize", tiny, *text, "--error-correction", "1", "--compute-dtype", "bfloat16"]
    alone(tmp_path / "said", *command, "-o", tmp_path / "whole")
    for size, next_size in ((2, 1), (1, 4)):
        out, slow = tmp_path / f"out-{size}", dict.fromkeys(range(2), save_often)
        started = Started(tmp_path / f"stopped-{size}", size, [*command, "-o", out], slow)
        started.wait_until("layer 3/4")
        os.kill(started.processes[0].pid, signal.SIGKILL)
        started.ended()
        again = over(tmp_path / f"again-{size}", next_size, *command, "-o", out, "--resume")[0].err
        assert "layer 1: replaying" not in again, "read from the saved states"
        assert_same(tmp_path / "whole", out)


def test_torchrun_starts_it(tiny: Path, text: list[object], undisturbed: Path, tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "qwenq", *job(tiny, text, tmp_path / "2")]
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("layer 4/4") == 1 and done.stdout.count("mean KL") == 1
    assert_same(undisturbed, tmp_path / "2")


# ---------------------------------------------------------------------- ranks that are lost


def slowly(seconds: float) -> None:
    """Have each layer take longer, so that it can be stopped in one."""
    from qwenq.pipeline import quantize

    make = quantize.make_layer

    def slow(*operands: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return make(*operands, **options)

    quantize.make_layer = slow


def half_a_second() -> None:
    slowly(0.5)


def slow_job(tiny: Path, text: list[object], tmp_path: Path, size: int = 2) -> Started:
    before = dict.fromkeys(range(size), half_a_second)
    return Started(tmp_path / "said", size, job(tiny, text, tmp_path / "out"), before)


def one_line(said: Ended, pattern: str) -> None:
    """A rank's last words: one line with what was wrong, perhaps a hint; exit code 1."""
    lines = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert said.code == 1 and len(lines) == 1 and re.search(pattern, lines[0]), said
    assert "Traceback" not in said.err


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_stops_the_other(
    victim: int, tiny: Path, text: list[object], undisturbed: Path, tmp_path: Path
) -> None:
    started = slow_job(tiny, text, tmp_path)
    started.wait_until("layer 1/4")
    os.kill(started.processes[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    said = started.ended(30)
    assert time.monotonic() - began < 20
    host = re.escape(socket.gethostname())
    one_line(said[1 - victim], f"rank {victim} on {host} ended without a word|rank 0 or torchrun on {host} is gone")
    if victim == 1:
        alone(tmp_path / "again", *job(tiny, text, tmp_path / "out"), "--resume")
        assert_same(undisturbed, tmp_path / "out")


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_given_up(victim: int, tiny: Path, text: list[object], tmp_path: Path) -> None:
    started = slow_job(tiny, text, tmp_path)
    started.wait_until("layer 1/4")
    os.kill(started.processes[victim].pid, signal.SIGSTOP)
    began = time.monotonic()
    started.processes[1 - victim].join(40)
    assert time.monotonic() - began < 30
    with suppress(AssertionError):
        started.ended(0)
    one_line(Ended(started.processes[1 - victim].exitcode, *started._said(1 - victim)),
             f"rank {victim} on .* gave no sign of life for 3 s|rank 0 or torchrun on .* is gone")  # fmt: skip


def test_an_error_of_one_rank_stops_all_with_its_words(tiny: Path, text: list[object], tmp_path: Path) -> None:
    started = Started(tmp_path / "said", 2, job(tiny, text, tmp_path / "out"), {1: out_of_memory})
    said = started.ended()
    for each in said:
        one_line(each, "rank 1 on .*: CPU: out of memory while quantizing: needs 7.* GiB more")


def out_of_memory() -> None:
    from qwenq.pipeline import quantize

    def no_memory(*operands: Any, **options: Any) -> Any:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
            "8053063680 bytes. Error code 12 (Cannot allocate memory)"
        )

    quantize.make_layer = no_memory


def full_disk() -> None:
    import errno

    from qwenq.io import tensors

    def full(path: Path, *operands: Any) -> Any:
        if "00003" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *operands)

    real = tensors.write_synced
    tensors.write_synced = full


def test_a_full_disk_of_the_first_rank_stops_all(tiny: Path, text: list[object], tmp_path: Path) -> None:
    said = Started(tmp_path / "said", 2, job(tiny, text, tmp_path / "out"), {0: full_disk}).ended()
    one_line(said[0], "^error: .*model-00003-of-00006.safetensors: No space left on device")
    one_line(said[1], "^error: rank 0 on .*: .*model-00003-of-00006.safetensors: No space left on device")
    over(tmp_path / "again", 2, *job(tiny, text, tmp_path / "out"), "--resume")


def another_version() -> None:
    from qwenq.pipeline import ranks

    ranks.__version__ = "0.0.9"


def test_ranks_of_other_versions_or_sources_do_not_begin(tiny: Path, text: list[object], tmp_path: Path) -> None:
    from qwenq import __version__

    said = Started(tmp_path / "versions", 2, job(tiny, text, tmp_path / "out"), {1: another_version}).ended()
    for each in said:
        one_line(each, f"rank 1 on .* has qwenq 0.0.9, rank 0 on .* has {re.escape(__version__)}")
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    shard = next(other.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # seen by its hash alone
    shard.write_bytes(data)
    said = Started(
        tmp_path / "sources", 2, lambda rank: job(other if rank else tiny, text, tmp_path / "out")
    ).ended()
    for each in said:
        one_line(each, f"rank 1 on .* has another {shard.name} than rank 0 on ")
    said = Started(
        tmp_path / "options", 2, lambda rank: [*job(tiny, text, tmp_path / "out"), "--seed", str(rank)]
    ).ended()
    for each in said:
        one_line(each, "rank 1 on .* has another .* than rank 0")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_what_cannot_be_joined_is_said_in_a_line(tiny: Path, text: list[object], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        started = Started(tmp_path / "port", 1, job(tiny, text, tmp_path / "out"), WORLD_SIZE="2", MASTER_PORT=port)
        one_line(started.ended()[0], f"127.0.0.1:{port}: the port is in use")
    started = Started(tmp_path / "late", 1, job(tiny, text, tmp_path / "out"), WORLD_SIZE="2", QWENQ_RANK_TIMEOUT="1")
    one_line(started.ended()[0], "1 of 2 ranks came within 4 s, missing: 1")
    (said,) = Started(tmp_path / "many", 1, job(tiny, text, tmp_path / "out"), WORLD_SIZE="3").ended()
    assert said.code == 2 and "3 ranks: wanted 2, 4 or 8" in said.err
    few = [*job(tiny, text, tmp_path / "out"), "-n", "3"]
    for each in Started(tmp_path / "few", 4, few).ended():
        assert each.code == 1 and "3 calibration windows for 4 ranks" in each.err, each
    (said,) = Started(tmp_path / "inspect", 1, ["inspect", tiny], WORLD_SIZE="2").ended()
    assert said.code == 2 and said.err.startswith(
        "error: `qwenq inspect` does not run on several ranks, and WORLD_SIZE is 2\n"
    )


def test_a_place_to_meet_that_goes_away_is_said_in_a_line() -> None:
    class Gone:
        def set(self, key: str, value: str) -> None: ...

        def check(self, keys: list[str]) -> bool:
            raise torch.distributed.DistNetworkError("Connection reset\nby peer")

    launch = read_launch(ENVIRONMENT)
    assert launch is not None
    with pytest.raises(RunError, match=r"^a:29500: rank 1 waited .* went away \(Connection reset by peer\)$"):
        _meet(Gone(), launch, {})


# ---------------------------------------------------------------------- how a process was started

ENVIRONMENT = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def test_ranks_that_may_not_see_the_output_keep_temporary_data_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert [Ranks(rank, 2).scratch(tmp_path) for rank in (0, 1)] == [tmp_path, tmp_path / "temporary"]


def test_a_launch_is_read_from_the_environment() -> None:
    assert read_launch({}) is None and read_launch({"WORLD_SIZE": "1"}) is None
    found = read_launch(ENVIRONMENT)
    assert found is not None and (found.rank, found.size, found.local_rank, found.keeps_store) == (1, 2, 0, False)
    first = read_launch(ENVIRONMENT | {"RANK": "0"})
    assert first is not None and first.keeps_store
    torchrun = read_launch(ENVIRONMENT | {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert torchrun is not None and not torchrun.keeps_store


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": None}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": None, "MASTER_PORT": None}, "WORLD_SIZE is 2, but RANK and MASTER_PORT are not set"),
        ({"RANK": "2"}, "RANK is 2, wanted less than WORLD_SIZE, 2"),
        ({"RANK": "-1"}, "RANK is '-1', wanted a whole number from 0 on"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', wanted a whole number from 1 on"),
        ({"QWENQ_RANK_TIMEOUT": "0"}, "QWENQ_RANK_TIMEOUT is 0, wanted 1 to 3600 seconds"),
    ],
)
def test_half_a_launch_is_refused(changes: dict[str, str | None], said: str) -> None:
    environment = {name: value for name, value in (ENVIRONMENT | changes).items() if value is not None}
    with pytest.raises(UsageError, match=re.escape(said)):
        read_launch(environment)


# ---------------------------------------------------------------------- random kills

KILLS = 20


def save_often() -> None:
    from qwenq.pipeline import quantize

    quantize._STATE_INTERVAL_S = 0.0
    slowly(0.3)


@pytest.mark.slow
def test_twenty_random_kills_resumed_with_another_number_of_ranks(
    tiny: Path, text: list[object], tmp_path: Path
) -> None:
    command = ["quantize", tiny, *text, "--error-correction", "1"]
    alone(tmp_path / "said", *command, "-o", tmp_path / "whole")
    draw, identical = random.Random(2026), 0
    while identical < KILLS:
        out, size, next_size = tmp_path / "out", *draw.sample((1, 2, 4), 2)
        often = dict.fromkeys(range(4), save_often) if draw.random() < 0.5 else None
        started = Started(tmp_path / "killed", size, [*command, "-o", out], often)
        began = draw.uniform(0.5, 2.0 + 2.0 * size)
        time.sleep(began)
        with suppress(ProcessLookupError):
            os.kill(started.processes[draw.randrange(size)].pid, signal.SIGKILL)
        codes = [each.code for each in started.ended()]
        if out.exists():
            shutil.rmtree(out)  # done before the kill came: draw again
            continue
        assert 0 not in codes
        resume = ["--resume"] if (tmp_path / "out.partial").exists() else []
        over(tmp_path / "again", next_size, *command, "-o", out, *resume)
        assert_same(tmp_path / "whole", out)
        identical += 1
        shutil.rmtree(out)
    print(f"{identical} of {KILLS} identical")
