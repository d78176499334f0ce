"""JSON and small files from anywhere, read as hostile input: strict, bounded, inside the directory they belong to."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from qwenq.errors import CheckpointError, QwenqError
from qwenq.escaping import printable
from qwenq.escaping import shown as shown

MAX_VALUES = 1_000_000  # of a JSON file: the header of 100,000 tensors has 800,000
MAX_SMALL_BYTES = 100_000_000  # of a file beside the weights: the largest tokenizers have 35 MB
MAX_DIGITS = 100  # of a whole number: more than any size, and little enough that it still is a float
LFS_POINTER = b"version https://git-lfs"  # the beginning of what a clone without git-lfs has in a file's place
TEMPLATES = "additional_chat_templates"  # the one folder that a checkpoint may have
_MAX_NAME_BYTES = 255  # what file systems take


def read_object(path: Path, limit: int = 10_000_000, most: int = MAX_VALUES) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes and `most` values: no repeated keys, no NaN; CheckpointError otherwise."""
    return parse_object(read_limited(path, limit), shown(path.name), most)


def open_regular(
    path: Path, error: type[QwenqError] = CheckpointError, *, follow: bool = True
) -> BufferedReader:
    """A regular file, opened for reading without waiting; `error` for a FIFO, a device, a folder or no file.

    follow: through a symbolic link too.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags)
    except OSError as reason:
        linked = not follow and reason.errno == errno.ELOOP
        raise error(f"{shown(str(path))}: {'a link' if linked else reason.strerror}") from None
    except ValueError:  # a zero byte, or half of a surrogate pair, in its name
        raise error(f"{shown(str(path))}: no name a file can have") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise error(f"{shown(str(path))}: not a regular file")
    return os.fdopen(handle, "rb")


def read_limited(
    path: Path, limit: int, error: type[QwenqError] = CheckpointError, *, follow: bool = True
) -> bytes:
    """All of a regular file of at most `limit` bytes; `error` for a larger one, before its content is read."""
    with open_regular(path, error, follow=follow) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, limit, error)
        data = file.read(limit + 1)
    _check_size(path, len(data), limit, error)  # it grew, or it is one of those that have no size
    return data


def check_regular(path: Path, limit: int) -> None:
    """Raise CheckpointError unless `path` is a regular file of at most `limit` bytes: others' code is to open it."""
    with open_regular(path) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, limit, CheckpointError)


def _check_size(path: Path, size: int, limit: int, error: type[QwenqError]) -> None:
    if size > limit:
        raise error(f"{shown(path.name)}: {size} bytes, more than the {limit} such a file can need")


def parse_object(text: bytes, where: str, most: int = MAX_VALUES) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no repeated keys, no NaN or infinity, no absurd nesting, number or count."""
    if text.startswith(LFS_POINTER):
        raise CheckpointError(f"{where}: a git-lfs pointer, not the file", hint="run `git lfs pull` in its directory")
    values = text.count(b",") + text.count(b"[") + text.count(b"{")  # at least; counted before any is made
    if values > most:
        raise CheckpointError(f"{where}: JSON of {values} values or more, more than the {most} it can need")

    def refuse_constant(token: str) -> Any:
        raise CheckpointError(f"{where}: JSON holds {token}, which is not a JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{where}: {shown(key)} appears twice")
            found[key] = value
        return found

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else refuse_constant(shown(number, 40))

    def whole(number: str) -> int:
        if len(number) > MAX_DIGITS:
            raise CheckpointError(f"{where}: JSON holds a number of {len(number)} digits, more than {MAX_DIGITS}")
        return int(number)

    hooks: dict[str, Any] = {"object_pairs_hook": unique, "parse_constant": refuse_constant}
    hooks |= {"parse_float": finite, "parse_int": whole}
    try:
        value = json.loads(text.decode("utf-8"), **hooks)
    except RecursionError:
        raise CheckpointError(f"{where}: JSON nested too deep") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{where}: not JSON ({error})") from None
    if rb"\ud" in text.lower():  # half of a surrogate pair can be written in JSON, and nowhere else
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"{where}: JSON holds half of a surrogate pair, which is not valid text") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: JSON is a {type(value).__name__}, wanted an object")
    return value


def inside(directory: Path, name: str) -> Path:
    """The file `name` of `directory`; CheckpointError if the name, or a link, leads out of it.

    The hub's cache keeps `<repo>/snapshots/<revision>/name` as a link into `<repo>/blobs`, which is let through; any
    other link inside `followed_links`. A name may have one folder, TEMPLATES.
    """
    folder, slash, rest = name.partition("/")
    if slash and folder == TEMPLATES:
        inside(directory, folder)
        return inside(directory / folder, rest)
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(f"file name {shown(name)} leads out of the checkpoint's directory: refused")
    if len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES:
        raise CheckpointError(f"file name {shown(name)} is too long: refused")
    path = directory / name
    root, target = resolved(directory), resolved(path)
    if target.parent not in (root, *_blobs(root)) and not _Followed.count:
        raise CheckpointError(
            f"{shown(name)} links to a file outside the checkpoint's directory: refused",
            hint="--follow-links reads it anyway; only for links that you made or trust",
        )
    return path


def resolved(path: Path, error: type[QwenqError] = CheckpointError) -> Path:
    """`path` with its links followed, whether it is there or not; `error` where they lead in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        raise error(f"{shown(str(path))}: links in a circle, or too long a path: refused") from None


def _blobs(root: Path) -> list[Path]:
    """The hub cache's directory for the files of a snapshot or of its templates folder."""
    place = root.parent if root.name == TEMPLATES else root
    return [place.parent.parent / "blobs"] if place.parent.name == "snapshots" else []


class _Followed:
    count = 0  # open contexts of followed_links


@contextmanager
def followed_links() -> Iterator[None]:
    """Read files of checkpoints that are links out of their directories, for as long as the context lasts.

    Of the whole process, all its threads included. What a link leads to still has to be a regular file.
    """
    _Followed.count += 1
    try:
        yield
    finally:
        _Followed.count -= 1


def model_name(directory: Path) -> str:
    """`owner/name` for a snapshot in the hub's cache, else the directory's own name."""
    place = directory.absolute()
    repository = place.parent.parent.name
    if place.parent.name == "snapshots" and repository.startswith("models--") and repository.count("--") == 2:
        return repository.removeprefix("models--").replace("--", "/")
    return printable(place.name)

