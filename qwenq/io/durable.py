"""Files that last: written beside the target, synced, renamed, and their directory synced; then hashed by SHA-256.

A name that survives a power cut always names whole bytes: the file is synced before it gets its name, the directory
after. What is read back later is compared with the digest that was returned when it was written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

TORN_ENDING = ".tmp"  # of a file that is being written
_CHUNK = 1 << 24  # bytes


def write_synced(path: Path, produce: Callable[[Callable[[Any], None]], None]) -> str:
    """Write a file through `produce(put)` beside `path`, sync it, rename it into place; returns its SHA-256."""
    beside = path.with_name(path.name + TORN_ENDING)
    digest = hashlib.sha256()
    try:
        with open(beside, "wb") as file:

            def put(data: Any) -> None:
                file.write(data)
                digest.update(data)

            produce(put)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)  # a full disk is not helped by half a shard
        raise
    os.replace(beside, path)
    sync_directory(path.parent)
    return digest.hexdigest()


def write_bytes(path: Path, data: bytes) -> str:
    """Write `data` at `path`, synced and renamed into place; returns its SHA-256."""
    return write_synced(path, lambda put: put(data))


def write_json(path: Path, value: Any) -> str:
    """Write JSON, indented by two, at `path`; returns its SHA-256."""
    return write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def copy_synced(source: Path, target: Path) -> str:
    """Copy a file's bytes; returns their SHA-256."""

    def chunks(put: Callable[[Any], None]) -> None:
        with open(source, "rb") as file:
            while data := file.read(_CHUNK):
                put(data)

    return write_synced(target, chunks)


def make_directory(path: Path, *, exist_ok: bool) -> None:
    """Make a directory and those above it, so that they last; on a failure it is not there."""
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=exist_ok)
    try:
        for made in missing:
            sync_directory(made.parent)
    except OSError:
        if new:
            path.rmdir()
        raise


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` last through a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
