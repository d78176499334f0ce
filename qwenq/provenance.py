"""Which bytes a job reads: SHA-256 of every file of its source, and whether they are still the same at its end."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qwenq.errors import CheckpointError, JobError
from qwenq.files import file_sha256
from qwenq.headers import inside

Stamp = tuple[int, int, int, int]  # device, inode, bytes, time of the last change in ns


@dataclass(frozen=True)
class SourceFiles:
    """Files of a source directory as they were when they were hashed."""

    directory: Path
    hashes: dict[str, str]
    stamps: dict[str, Stamp]

    @staticmethod
    def read(directory: Path, names: Iterable[str]) -> SourceFiles:
        """Hash the named files of `directory`; names that are not there are left out."""
        hashes, stamps = {}, {}
        for name in names:
            path = inside(directory, name)
            if path.is_file():
                stamps[name] = _stamp(path)
                hashes[name] = file_sha256(path)
        return SourceFiles(directory, hashes, stamps)

    def refuse_replaced(self) -> None:
        """Raise JobError naming the first file that was replaced or written to since it was hashed."""
        for name, stamp in self.stamps.items():
            try:
                same = _stamp(inside(self.directory, name)) == stamp
            except (OSError, CheckpointError):
                same = False
            if not same:
                raise JobError(
                    f"{self.directory / name}: changed while it was being quantized",
                    hint="put the file back and go on with --resume, which hashes it again, or start anew",
                )


def _stamp(path: Path) -> Stamp:
    info = os.stat(path)
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns
