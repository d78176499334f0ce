"""Durable files: written beside the target, synced, renamed, and their directory synced; hashed by SHA-256.

A name that survives a power cut always names whole bytes: the file is synced before it gets its name, the directory
after. What is read back later is compared with the digest that was returned when it was written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any

from qwenq.io.json import open_regular

TORN_ENDING = ".tmp"  # of a file that is being written
_CHUNK = 1 << 24  # bytes


def write_synced(path: Path, produce: Callable[[Callable[[Any], None]], None]) -> str:
    """Write a file through `produce(put)` beside `path`, sync it, rename it into place; returns its SHA-256.

    The directory is opened once, and the file beside is made anew in it: no link that lies there is followed.
    """
    beside = path.name + TORN_ENDING
    digest = hashlib.sha256()
    with opened_directory(path.parent) as folder:
        try:
            with new_file(path.with_name(beside), folder) as file:

                def put(data: Any) -> None:
                    file.write(data)
                    digest.update(data)

                produce(put)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(beside, dir_fd=folder)  # a full disk is not helped by half a shard
            raise
        os.replace(beside, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    return digest.hexdigest()


@contextmanager
def opened_directory(directory: Path) -> Iterator[int]:
    """A handle of a directory, for names in it."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def new_file(path: Path, folder: int | None = None) -> BufferedWriter:
    """A file for writing at `path`, made anew: what had the name is gone, and a link there is not followed.

    folder: a handle of the directory, where it is open.
    """

    def create(name: str, flags: int) -> int:
        place = name if folder is None else path.name
        try:
            with suppress(FileNotFoundError):
                os.unlink(place, dir_fd=folder)
            return os.open(place, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=folder)
        except OSError as error:
            error.filename = name
            raise

    return open(path, "xb", opener=create)


def append_synced(path: Path, data: bytes) -> None:
    """Add `data` to a file that is there, not through a link, and sync it."""

    def existing(name: str, flags: int) -> int:
        return os.open(name, flags & ~os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)

    with open(path, "ab", opener=existing) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_bytes(path: Path, data: bytes) -> str:
    """Write `data` at `path`, synced and renamed into place; returns its SHA-256."""
    return write_synced(path, lambda put: put(data))


def write_json(path: Path, value: Any) -> str:
    """Write JSON, indented by two, at `path`; returns its SHA-256."""
    return write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def copy_synced(source: Path, target: Path) -> str:
    """Copy a file's bytes; returns their SHA-256."""

    def chunks(put: Callable[[Any], None]) -> None:
        with open_regular(source) as file:
            while data := file.read(_CHUNK):
                put(data)

    return write_synced(target, chunks)


def make_directory(path: Path, *, exist_ok: bool) -> None:
    """Make a directory and those above it, durably; on a failure it is not there."""
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    new = not path.exists()
    if path.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "is a link, wanted a directory", str(path))
    path.mkdir(parents=True, exist_ok=exist_ok)
    try:
        for made in missing:
            sync_directory(made.parent)
    except OSError:
        if new:
            path.rmdir()
        raise


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` durable."""
    with opened_directory(directory) as handle:
        os.fsync(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
