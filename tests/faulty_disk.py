"""A disk that fails on demand, for the tests: full, read-only, or without power.

`PowerCut` keeps what the disk would hold if the power went now: a file's bytes as they were when it was last synced,
a directory's names as they were when it was last synced. Files that were synced are kept open, so that the system
gives their inode numbers to no other file meanwhile.
"""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Cut(BaseException):
    """The power went."""


class PowerCut:
    """Follows every fsync and rename below `root`; at the `step`-th of them the power goes."""

    def __init__(self, root: Path, step: int) -> None:
        self.root, self.step, self.steps = root, step, 0
        self.bytes: dict[int, bytes] = {}  # inode -> what was synced of it
        self.names: dict[int, dict[str, int]] = {}  # directory's inode -> names in it, when it was synced
        self.kept: list[int] = []
        self.lost: tuple[dict[str, bytes | None], dict[str, bytes | None]] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        fsync, replace = os.fsync, os.replace
        self._remember_directory(os.open(self.root, os.O_RDONLY))

        def synced(handle: int) -> None:
            self._tick()
            fsync(handle)
            copy = os.dup(handle)
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                self._remember_directory(copy)
            else:
                self.kept.append(copy)
                path = os.readlink(f"/proc/self/fd/{handle}")
                self.bytes[os.fstat(handle).st_ino] = Path(path).read_bytes()

        def renamed(source: Any, target: Any, **folders: Any) -> None:
            self._tick()
            replace(source, target, **folders)

        os.fsync, os.replace = synced, renamed
        try:
            yield
        finally:
            os.fsync, os.replace = fsync, replace
            for handle in self.kept:
                os.close(handle)

    def _remember_directory(self, handle: int) -> None:
        self.kept.append(handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        self.names[os.fstat(handle).st_ino] = {e.name: e.inode() for e in os.scandir(path)}

    def _tick(self) -> None:
        if self.steps == self.step:
            synced_names = dict(self._tree(self.root, "", lambda path: self.names.get(os.stat(path).st_ino, {})))
            names_now = dict(self._tree(self.root, "", lambda path: {e.name: e.inode() for e in os.scandir(path)}))
            self.lost = synced_names, names_now
            self.step = -1  # what the dying program still does is not on the disk
            raise Cut
        self.steps += 1

    def _tree(self, path: Path, prefix: str, names: Callable[[Path], dict[str, int]]) -> Iterator[Any]:
        """Every file below, with its synced bytes (b"" if it never was), directories with None."""
        inodes = {e.inode(): Path(e.path) for top, folders, _ in os.walk(self.root) for e in os.scandir(top)}
        for name, inode in names(path).items():
            there = inodes.get(inode)
            if there is not None and there.is_dir():
                yield prefix + name, None
                yield from self._tree(there, f"{prefix}{name}/", names)
            elif there is not None or inode in self.bytes:
                yield prefix + name, self.bytes.get(inode, b"")

    def restore(self, *, names_kept: bool) -> None:
        """Make `root` what a restart finds: unsynced names gone, or kept with their unsynced bytes gone."""
        assert self.lost is not None
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, data in self.lost[names_kept].items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if data is None else path.write_bytes(data)


class FailingWrites:
    """Makes the `step`-th write, sync or opening for writing below `root` fail with `code`; counts them."""

    def __init__(self, root: Path, step: int, code: int = errno.ENOSPC) -> None:
        self.root, self.step, self.code, self.steps = root, step, code, 0
        self.touched: list[str] = []  # the file of each step

    def _tick(self, path: Path, *, named: bool) -> None:
        self.touched.append(path.name)
        self.steps += 1
        if self.steps - 1 == self.step:
            raise OSError(self.code, os.strerror(self.code), *((str(path),) if named else ()))

    @contextmanager
    def watching(self) -> Iterator[None]:
        fsync, opening = os.fsync, builtins.open
        disk = self

        class File:
            """A file whose writes count."""

            def __init__(self, file: Any, path: Path) -> None:
                self._file, self._path = file, path

            def write(self, data: Any) -> Any:
                disk._tick(self._path, named=False)
                return self._file.write(data)

            def __enter__(self) -> File:
                return self

            def __exit__(self, *error: object) -> None:
                self._file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            path = Path(file) if isinstance(file, str | Path) else None
            if path is None or "r" in mode or self.root not in path.absolute().parents:
                return opening(file, mode, *arguments, **options)
            disk._tick(path, named=True)
            return File(opening(file, mode, *arguments, **options), path)

        def synced(handle: int) -> None:
            disk._tick(Path(os.readlink(f"/proc/self/fd/{handle}")), named=False)
            fsync(handle)

        os.fsync, builtins.open = synced, opened
        try:
            yield
        finally:
            os.fsync, builtins.open = fsync, opening
