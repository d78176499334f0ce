"""The journal of a long job: one JSON line for the job, then one for each finished layer, each line synced.

Before the layers comes the embedding, where that is solved.

A line counts once it is whole: its last field, `check`, is the SHA-256 of the `check` before it and of the line without
it. From the first line that is torn, changed or out of order on, lines are dropped. Lines name files by SHA-256, so a
damaged file is seen.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from qwenq.checkpoint.manifest import JOURNAL_NAME, LOCK_NAME, current_names
from qwenq.errors import JobError
from qwenq.escaping import printable
from qwenq.io.durable import TORN_ENDING, append_synced, opened_directory, write_bytes
from qwenq.io.json import read_limited

_MAX_BYTES = 64_000_000  # a layer's line has 2,000


class Journal:
    """Rows of `qwenq-journal.jsonl`, kept in step with the file."""

    def __init__(self, path: Path, rows: list[dict[str, Any]], dropped: int = 0) -> None:
        self.path = path
        self.rows = rows
        self.dropped = dropped  # lines that were torn or damaged, and those after them
        self._check = ""  # of the last line

    @staticmethod
    def create(directory: Path, job: Mapping[str, Any], beside: Mapping[str, str] | None = None) -> Journal:
        """Begin a journal; its first line is there whole or not at all. beside: SHA-256 of files put in as they are."""
        journal = Journal(directory / JOURNAL_NAME, [{"job": dict(job), "beside": dict(beside or {})}])
        journal.keep_layers(0)
        return journal

    @staticmethod
    def load(directory: Path) -> Journal:
        """Read the journal; raises JobError when there is none to resume from."""
        path = directory / JOURNAL_NAME
        if not os.path.lexists(path):
            raise JobError(f"{directory}: no {JOURNAL_NAME} in it, so nothing to resume", hint="leave --resume out")
        lines = [line for line in read_limited(path, _MAX_BYTES, JobError, follow=False).split(b"\n") if line]
        checked = not (lines and _without_checksums(lines[0]))
        rows: list[dict[str, Any]] = []
        check = ""
        for line in lines:
            try:
                row = json.loads(line)
                if checked:
                    del row["check"]
                    wanted, check = _line(row, check)
                    whole = line == wanted
                else:
                    whole = isinstance(row, dict) and "check" not in row
            except (ValueError, RecursionError, KeyError, TypeError):
                break
            if not whole:
                break
            rows.append(row)
        first = rows[0] if rows else {}
        if not isinstance(first.get("job"), dict) or not isinstance(first.get("beside", {}), dict):
            raise JobError(f"{path}: its first line is damaged", hint=f"delete {directory} and start anew")
        journal = Journal(path, rows, len(lines) - len(rows))
        journal._check = check
        rows[0]["job"] = current_names(rows[0]["job"])
        return journal

    @property
    def job(self) -> dict[str, Any]:
        """Everything that decides the output, as `QuantizeJob.describe` gives it."""
        job: dict[str, Any] = self.rows[0]["job"]
        return job

    @property
    def beside(self) -> dict[str, str] | None:
        """SHA-256 of the files that the job put into the directory as they are, by name; None where 0.1.0 began it."""
        beside: dict[str, str] | None = self.rows[0].get("beside")
        return beside

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Rows of finished layers, in order."""
        return [row for row in self.rows if "layer" in row]

    @property
    def embedding(self) -> dict[str, Any]:
        """SHA-256 and result of an embedding that was solved; empty where there is none yet."""
        found: Any = next((row["embedding"] for row in self.rows if "embedding" in row), {})
        return found if isinstance(found, dict) else {}

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and sync it."""
        line, check = _line(row, self._check)
        append_synced(self.path, line + b"\n")
        self.rows.append(dict(row))
        self._check = check

    def keep_layers(self, count: int) -> None:
        """Drop all rows after the first `count` layers: what follows is done again."""
        kept, layers = [], 0
        for row in self.rows:
            if "layer" in row and (layers := layers + 1) > count:
                break
            kept.append(row)
        self._rewrite(kept)

    def begin_again(self) -> None:
        """Drop all rows but the job's."""
        if len(self.rows) > 1:
            self._rewrite(self.rows[:1])

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self._check = rows, ""
        text = b""
        for row in rows:
            line, self._check = _line(row, self._check)
            text += line + b"\n"
        write_bytes(self.path, text)


def _line(row: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    """A row as a line, and its checksum; `before` is that of the line before."""
    text = json.dumps(row, separators=(",", ":"), ensure_ascii=False)
    check = hashlib.sha256((before + text).encode()).hexdigest()
    return f'{text[:-1]},"check":"{check}"}}'.encode(), check


def _without_checksums(first: bytes) -> bool:
    """Whether a journal's first line is as 0.1.0 wrote it: the job and nothing else. Going on adds checksums."""
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and row.keys() == {"job"}


def never_begun(directory: Path) -> bool:
    """True when a run was stopped before the journal's first line: nothing there but the lock and scraps."""
    return {path.name for path in directory.iterdir()} <= {LOCK_NAME, JOURNAL_NAME + TORN_ENDING}


def refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], directory: Path) -> None:
    """Raise JobError naming every argument or input that differs between the journal and this run."""
    differences = list(_differences(old, new, ""))
    if not differences:
        return
    changes = [f"{where} was {a!r}, now {b!r}" for where, a, b in differences]
    more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
    threads = next((was for where, was, _ in differences if where == "numerics.threads"), None)
    same = "resume with the same command and inputs"
    if threads is not None and len(differences) == 1:
        same = f"sums over another number of threads end in other bits: set OMP_NUM_THREADS={threads}"
    narrower = next((was for where, was, _ in differences if where == "compute_dtype"), None)
    if narrower is not None and len(differences) == 1:
        same = f"its divergence was begun in {narrower}: add --compute-dtype {narrower}"
    if any(where == "numerics.sums" for where, _, _ in differences):
        same = "another version began it, which takes sums over windows in another way: let that one finish it"
    if any(where == "head_windows" for where, _, _ in differences):
        same = "another version began it, which makes a tied head in another way: let that one finish it"
    raise JobError(
        f"{directory}: cannot resume, {'; '.join(changes[:3])}{more}",
        hint=f"{same}, or delete the directory and start anew",
    )


def _differences(old: Any, new: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield where, old, new


@contextmanager
def locked(directory: Path) -> Iterator[str]:
    """Hold the directory against a second run, also while it is renamed; yields who left a lock behind, or "".

    The lock is the system's (flock), so it goes with the process, however that ends; its file only says whose it is.
    Over a network not every file system carries it: a lock left by another machine is refused until it is deleted.
    """
    path = directory / LOCK_NAME
    with opened_directory(directory) as handle, _lock_file(path, handle) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = not _is_at(file, handle)
        except BlockingIOError:
            raise JobError(
                f"{directory}: in use by {_holder(file)[0] or 'another process'}",
                hint="wait for it, or stop that process; then try again",
            ) from None
        if gone:  # its holder ended between our opening and our locking it
            raise JobError(f"{directory}: another run was just ending there", hint="try again")
        left, machine = _holder(file)
        if machine and not machine & {socket.gethostname(), _boot()}:
            raise JobError(
                f"{directory}: locked by {left}, another machine, which cannot be asked from here",
                hint=f"when that run has ended, delete {path} and go on",
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n{_boot()}")
        file.flush()
        try:
            yield left
        finally:
            with suppress(FileNotFoundError):
                os.unlink(LOCK_NAME, dir_fd=handle)  # the directory may have another name by now


def _lock_file(path: Path, directory: int) -> IO[str]:
    """The lock's file, made if it is not there; JobError for a link or anything else that is no file of a lock's."""

    def opener(name: str, flags: int) -> int:
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        handle = os.open(path.name, flags, 0o666, dir_fd=directory)
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:  # another name of a file that is not ours
            os.close(handle)
            raise OSError(errno.ELOOP, "")
        return handle

    try:
        return open(path, "a+", encoding="utf-8", errors="replace", opener=opener)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise JobError(
            f"{path}: a link or not a regular file, wanted a lock", hint="not made by qwenq: look at what it is"
        ) from None


def _is_at(file: IO[str], directory: int) -> bool:
    """Whether an open lock still has its name."""
    try:
        named = os.stat(LOCK_NAME, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), named)


def _holder(file: IO[str]) -> tuple[str, set[str]]:
    """Who wrote a lock file, and what identifies that machine: its name, and this start of its system."""
    file.seek(0)
    first, _, boot = file.read(1000).partition("\n")
    return printable(first), {text for text in (first.rpartition(" on ")[2], boot) if text}


def _boot() -> str:
    """One start of the system, the same in all its containers; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
