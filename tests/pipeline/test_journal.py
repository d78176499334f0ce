"""The journal of a long job: torn lines, refusals by name, one process at a time."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest

from qwenq.checkpoint.manifest import JOURNAL_NAME, LOCK_NAME
from qwenq.errors import JobError
from qwenq.pipeline.journal import Journal, locked, never_begun, refuse_changes

JOB = {"seed": 0, "scheme": {"bits": 4, "group_size": 128}}


def started(directory: Path, layers: int) -> Journal:
    journal = Journal.create(directory, JOB)
    for layer in range(layers):
        journal.append({"layer": layer, "file": f"{layer}", "name": "é"})
    return journal


def test_literal_lines(tmp_path: Path) -> None:
    started(tmp_path, 1)
    rows = '{"job":{"seed":0,"scheme":{"bits":4,"group_size":128}},"beside":{}', '{"layer":0,"file":"0","name":"é"'
    check, text = "", ""
    for row in rows:
        check = hashlib.sha256(f"{check}{row}}}".encode()).hexdigest()
        text += f'{row},"check":"{check}"}}\n'
    assert (tmp_path / JOURNAL_NAME).read_text(encoding="utf-8") == text


def test_loading_gives_what_was_written(tmp_path: Path) -> None:
    written = started(tmp_path, 3)
    loaded = Journal.load(tmp_path)
    assert loaded.rows == written.rows
    assert loaded.job == JOB and [row["layer"] for row in loaded.layers] == [0, 1, 2]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    started(tmp_path, 3)
    whole = (tmp_path / JOURNAL_NAME).read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last + 1, len(whole) - 1):  # without its newline a line is whole: nothing is missing from it
        (tmp_path / JOURNAL_NAME).write_bytes(whole[:cut])
        assert len(Journal.load(tmp_path).layers) == 2, cut


def test_going_on_after_a_torn_line_does_not_glue_lines_together(tmp_path: Path) -> None:
    started(tmp_path, 2)
    with open(tmp_path / JOURNAL_NAME, "ab") as file:
        file.write(b'{"layer":2,"fi')
    journal = Journal.load(tmp_path)
    journal.keep_layers(2)
    journal.append({"layer": 2, "file": "2"})
    assert [row["layer"] for row in Journal.load(tmp_path).layers] == [0, 1, 2]


def test_a_flipped_bit_anywhere_costs_its_line_and_what_follows(tmp_path: Path) -> None:
    written = started(tmp_path, 3)
    whole = (tmp_path / JOURNAL_NAME).read_bytes()
    for at in range(len(whole) - 1):  # the last newline may go
        for bit in (0, 3, 7):
            (tmp_path / JOURNAL_NAME).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            line = whole[:at].count(b"\n")
            if line == 0:
                with pytest.raises(JobError, match="its first line is damaged"):
                    Journal.load(tmp_path)
            else:
                found = Journal.load(tmp_path)
                assert found.rows == written.rows[:line] and found.dropped > 0


def test_lines_removed_doubled_or_out_of_order(tmp_path: Path) -> None:
    started(tmp_path, 3)
    a, b, c, d = (tmp_path / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    for lines, layers in (((a, c, d), 0), ((a, b, d), 1), ((a, b, b, c), 1), ((a, c, b, d), 0), ((a, b, c), 2)):
        (tmp_path / JOURNAL_NAME).write_bytes(b"".join(lines))
        found = Journal.load(tmp_path)
        assert len(found.layers) == layers and found.dropped == len(lines) - 1 - layers


def test_a_journal_of_0_1_0_has_no_checksums_and_gets_them(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_NAME
    path.write_text('{"job":{"seed":0,"options":{"pull":1.0,"pull_share":0.5}}}\n{"layer":0}\n{"layer":1}\n{"lay')
    journal = Journal.load(tmp_path)
    options = {"error_correction": 1.0, "error_correction_share": 0.5, "sink_weight": 1.0, "rotate": False}
    assert journal.job == {"seed": 0, "options": options}
    assert [row["layer"] for row in journal.layers] == [0, 1] and journal.dropped == 1 and journal.beside is None
    journal.keep_layers(2)
    journal.append({"layer": 2})
    assert path.read_bytes().count(b'"check":') == 4
    again = Journal.load(tmp_path)
    assert again.rows == journal.rows and again.beside is None and again.job == journal.job
    path.write_bytes(path.read_bytes().replace(b'"layer":1', b'"layer":7'))
    assert [row["layer"] for row in Journal.load(tmp_path).layers] == [0]


def test_keep_layers_drops_what_follows(tmp_path: Path) -> None:
    journal = started(tmp_path, 4)
    journal.keep_layers(2)
    assert [row["layer"] for row in journal.layers] == [0, 1]
    assert Journal.load(tmp_path).rows == journal.rows
    assert [p.name for p in tmp_path.iterdir()] == [JOURNAL_NAME]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[1]\n", b'{"layer":0}\n', b"\x80\n", b"[" * 100_000, b'{"a":' * 100_000]
)
def test_a_damaged_first_line_is_refused(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(damage)
    with pytest.raises(JobError, match="its first line is damaged"):
        Journal.load(tmp_path)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=f"no {JOURNAL_NAME} in it, so nothing to resume"):
        Journal.load(tmp_path)
    assert never_begun(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert not never_begun(tmp_path)


def test_changes_are_named_with_old_and_new_value(tmp_path: Path) -> None:
    refuse_changes(JOB, {"scheme": {"group_size": 128, "bits": 4}, "seed": 0}, tmp_path)
    with pytest.raises(JobError) as caught:
        refuse_changes(JOB, {"seed": 3, "scheme": {"bits": 8, "group_size": 128}, "dtype": "auto"}, tmp_path)
    assert caught.value.message == (
        f"{tmp_path}: cannot resume, dtype was None, now 'auto'; scheme.bits was 4, now 8; seed was 0, now 3"
    )
    with pytest.raises(JobError, match=r"a was 1, now 2; b was 1, now 2; c was 1, now 2 \(and 1 more\)$"):
        refuse_changes(dict.fromkeys("abcd", 1), dict.fromkeys("abcd", 2), tmp_path)
    with pytest.raises(JobError, match=r"scheme was .*, now None"):
        refuse_changes(JOB, {"seed": 0, "scheme": None}, tmp_path)


def hold(directory: str, ready) -> None:
    with locked(Path(directory)):
        ready.send(os.getpid())
        signal.pause()


def test_the_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    holder = context.Process(target=hold, args=(str(tmp_path), theirs), daemon=True)
    holder.start()
    assert ours.poll(60) and ours.recv() == holder.pid
    with pytest.raises(JobError) as caught, locked(tmp_path):
        pass
    assert caught.value.message == f"{tmp_path}: in use by process {holder.pid} on {socket.gethostname()}"
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_left_behind_is_explained(tmp_path: Path) -> None:
    """A killed run's lock is taken over and its owner told; another machine's cannot be judged: refused."""
    lock = tmp_path / LOCK_NAME
    lock.write_text(f"process 123 on {socket.gethostname()}\n")
    with locked(tmp_path) as left:
        assert left == f"process 123 on {socket.gethostname()}"
    with locked(tmp_path) as left:
        assert left == ""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.is_file():  # a container that was started again has another name, but the same system
        lock.write_text(f"process 1 on 0123456789ab\n{boot.read_text().strip()}")
        with locked(tmp_path) as left:
            assert left == "process 1 on 0123456789ab"
    lock.write_text("process 123 on elsewhere\n00000000-0000-0000-0000-000000000000")
    with (
        pytest.raises(JobError, match="locked by process 123 on elsewhere, another machine") as caught,
        locked(tmp_path),
    ):
        pass
    assert caught.value.hint == f"when that run has ended, delete {lock} and go on"
    assert lock.is_file()


def test_a_lock_of_any_bytes_is_taken_over_or_refused_in_one_line(tmp_path: Path) -> None:
    for text in (b"", b"\xff\xfe\x00", b"\n\n\n", b"\xc3", bytes(range(256)) * 20):
        (tmp_path / LOCK_NAME).write_bytes(text)
        try:
            with locked(tmp_path) as left:
                assert left.isprintable()
        except JobError as error:
            assert error.message.isprintable()
            (tmp_path / LOCK_NAME).unlink()


def test_the_lock_follows_the_directory_when_it_is_renamed(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    with locked(work):
        work.rename(out)
        with pytest.raises(JobError, match="in use by"), locked(out):
            pass
    assert list(out.iterdir()) == []


def test_another_number_of_threads_is_refused_with_what_to_set(tmp_path: Path) -> None:
    old = {"seed": 0, "numerics": {"torch": "2.13", "threads": 8}}
    with pytest.raises(JobError, match=r"numerics.threads was 8, now 4$") as caught:
        refuse_changes(old, {"seed": 0, "numerics": {"torch": "2.13", "threads": 4}}, tmp_path)
    assert "set OMP_NUM_THREADS=8, or delete the directory" in caught.value.hint
    with pytest.raises(JobError, match=r"numerics.sums was None, now '8 parts'$") as caught:
        refuse_changes(old, {"seed": 0, "numerics": {"torch": "2.13", "threads": 8, "sums": "8 parts"}}, tmp_path)
    assert caught.value.hint.startswith("another version began it")
    with pytest.raises(JobError, match=r"head_windows was None, now 16$") as caught:
        refuse_changes(old, old | {"head_windows": 16}, tmp_path)
    assert caught.value.hint.startswith("another version began it, which makes a tied head")
    with pytest.raises(JobError, match=r"numerics.torch was '2.13', now '2.14'$"):
        refuse_changes(old, {"seed": 0, "numerics": {"torch": "2.14", "threads": 8}}, tmp_path)


def test_a_divergence_that_was_begun_in_another_dtype(tmp_path: Path) -> None:
    """Of an earlier version, say, whose default it was."""
    with pytest.raises(JobError) as caught:
        refuse_changes({"compute_dtype": "float32"}, {"compute_dtype": "bfloat16"}, tmp_path)
    assert "add --compute-dtype float32, or delete the directory" in caught.value.hint


def test_the_lock_holds_within_one_process_too(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(JobError, match=f"in use by process {os.getpid()}"), locked(tmp_path):
        pass
