"""`qwenq-manifest.json`: what was made from what. Written and read here, and compared with the files beside it.

The document is JSON, indented by two. `digest` is the SHA-256 of its canonical form (keys sorted, no spaces, UTF-8)
without `digest` and `run`: two runs of one command have the same. `run` holds the times, facts of the host, the
journal's hash, and a digest of its own. A byte that is not as it was written, a space even, is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwenq.errors import CheckpointError, JobError
from qwenq.io.durable import TORN_ENDING, file_sha256, write_bytes
from qwenq.io.gguf import check_file, is_gguf
from qwenq.io.json import (
    MAX_SMALL_BYTES,
    TEMPLATES,
    check_regular,
    inside,
    open_regular,
    parse_object,
    read_limited,
    shown,
)
from qwenq.io.safetensors import read_header

MANIFEST_NAME = "qwenq-manifest.json"
JOURNAL_NAME = "qwenq-journal.jsonl"
LOCK_NAME = ".qwenq-lock"
SCRATCH_PREFIX = ".qwenq-"  # states, spilled buffers and the lock: gone before the directory gets its name
_KEPT_BY_OTHERS = (".cache", ".git", ".gitattributes")  # by `hf download` and `git clone`, of no model
_VERSION = 1
_MAX_BYTES = 32_000_000  # 1,000 decoder layers have 5 MB
_CHUNK = 1 << 20  # bytes: hashed while they are in the processor's cache


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the manifest says."""

    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, UTF-8: equal values have equal bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest_of(section: Mapping[str, Any]) -> str:
    """SHA-256 of a section's canonical form, its `digest` and `run` left out."""
    kept = {key: value for key, value in section.items() if key not in ("digest", "run")}
    return hashlib.sha256(canonical(kept)).hexdigest()


def encode_manifest(content: Mapping[str, Any], run: Mapping[str, Any]) -> bytes:
    """The file's bytes for what was made (`content`) and how this run went (`run`)."""
    document = {"manifest": _VERSION, **content}
    document |= {"digest": digest_of(document), "run": {**run, "digest": digest_of(run)}}
    return _encode(document)


def write_manifest(work: Path, described: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Write the manifest, the last file to be written; JobError when anything lies there that nobody wrote.

    known: SHA-256 of all files, by name, hashed while they were written; but for scratch files, and the journal, whose
    hash goes into `run`, for it holds times.
    """
    for torn in work.glob("*" + TORN_ENDING):
        torn.unlink()  # a killed run was writing it
    refuse_strangers(work, known)
    hashes = dict(sorted(known.items()))
    journal = {JOURNAL_NAME: file_sha256(work / JOURNAL_NAME)} if (work / JOURNAL_NAME).exists() else {}
    content = {key: value for key, value in described.items() if key != "run"} | {"files": hashes}
    write_bytes(work / MANIFEST_NAME, encode_manifest(content, {**described["run"], "files": journal}))


def refuse_strangers(work: Path, names: Collection[str]) -> None:
    """Raise JobError for the first file of `work` that is neither one of `names` nor a job's own, and for any link."""
    for path in files_in(work):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise JobError(f"{path}: a link or not a regular file", hint="move it away, then continue with --resume")
        scratch = path.name.startswith(SCRATCH_PREFIX) or path.name.endswith(TORN_ENDING)
        if not scratch and path.relative_to(work).as_posix() not in (*names, MANIFEST_NAME, JOURNAL_NAME):
            raise JobError(f"{path}: not a file of this job", hint="move it elsewhere, then continue with --resume")


def read_manifest(directory: Path) -> tuple[dict[str, Any], list[Finding]]:
    """The manifest of a checkpoint directory, and what is wrong with its own bytes.

    Raises CheckpointError when there is none, or nothing in it can be relied on.
    """
    path = inside(directory, MANIFEST_NAME)
    if not path.is_file():
        raise CheckpointError(
            f"{shown(str(directory))}: no {MANIFEST_NAME} in it",
            hint="`qwenq quantize` writes one; checkpoints of other tools have none",
        )
    data = read_limited(path, _MAX_BYTES)
    named = shown(str(directory / MANIFEST_NAME))
    document = parse_object(data, named)
    if document.get("manifest") != _VERSION:
        raise CheckpointError(
            f"{named}: version {shown(repr(document.get('manifest')), 40)}, wanted {_VERSION}",
            hint="another version of qwenq wrote it",
        )
    run = document.get("run")
    run = run if isinstance(run, dict) else {}
    for where, files in (("files", document.get("files")), ("run.files", run.get("files"))):
        if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
            raise CheckpointError(f"{named}: {where} is not an object of hashes")
    findings = []
    if document.get("digest") != digest_of(document):
        findings.append(Finding(MANIFEST_NAME, "changed: its digest does not match its content"))
    if run.get("digest") != digest_of(run):
        findings.append(Finding(MANIFEST_NAME, "changed: the digest of `run` does not match its content"))
    if not findings and _encode(document) != data:
        findings.append(Finding(MANIFEST_NAME, "changed: the same values in a different form"))
    return document, findings


_RENAMED_OPTIONS = {"pull": "error_correction", "pull_share": "error_correction_share"}
_LATER_OPTIONS = {"sink_weight": 1.0, "rotate": False}  # and what versions that did not have them did


def renamed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the keys of earlier versions under today's names."""
    return {_RENAMED_OPTIONS.get(key, key): value for key, value in options.items()}


def current_names(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job as a manifest or journal describes it: keys of earlier versions under today's names, and options that
    came later at what these versions did.
    """
    options = job.get("options")
    if not isinstance(options, Mapping):
        return dict(job)
    return {**job, "options": renamed_options(options) | {k: v for k, v in _LATER_OPTIONS.items() if k not in options}}


def check_files(directory: Path, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    """Every file that is missing, changed, or there without being in the manifest."""
    wanted: dict[str, str] = manifest["files"] | manifest["run"]["files"]
    for name, digest in wanted.items():
        try:
            path = inside(directory, name)
        except CheckpointError as error:
            yield Finding(shown(name), error.message)
            continue
        if not path.exists():
            yield Finding(shown(name), "missing")
            continue
        try:
            found = hash_of(path)
        except CheckpointError as error:
            yield Finding(shown(name), f"changed: {error.message.partition(': ')[2] or error.message}")
            continue
        if found != digest:
            yield Finding(shown(name), f"changed: SHA-256 {found}, the manifest has {shown(digest, 64)}")
    for path in files_in(directory):
        name = path.relative_to(directory).as_posix()
        if name not in wanted and name not in (MANIFEST_NAME, LOCK_NAME, *_KEPT_BY_OTHERS):
            yield Finding(shown(name), "extra: not in the manifest")


def files_in(directory: Path) -> list[Path]:
    """Files in a checkpoint's directory by name, with its templates folder replaced by that folder's files."""
    found = []
    for path in sorted(directory.iterdir()):
        folder = path.name == TEMPLATES and path.is_dir() and not path.is_symlink()
        found += sorted(path.iterdir()) if folder else [path]
    return found


def _encode(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


Stamp = tuple[int, int, int, int, int]  # device, inode, bytes, times of the last write and of the last change in ns


@dataclass(frozen=True)
class Cuts:
    """Offsets into a hashed file, rising, and the state of its SHA-256 at each."""

    offsets: list[int]
    states: list[Any]

    def around(self, start: int, end: int) -> tuple[int, int]:
        """The smallest range between two cuts that holds start to end."""
        first, last = bisect_right(self.offsets, start) - 1, bisect_left(self.offsets, end)
        return self.offsets[first], self.offsets[last]

    def state_at(self, offset: int) -> Any:
        """The hash of everything before `offset`, which is a cut: a copy to go on with."""
        return self.states[bisect_left(self.offsets, offset)].copy()


@dataclass(frozen=True)
class SourceFiles:
    """Files of a source directory as they were when they were hashed."""

    directory: Path
    hashes: dict[str, str]
    stamps: dict[str, Stamp | None]
    cuts: dict[Path, Cuts] = field(default_factory=dict)

    @staticmethod
    def read(directory: Path, names: Iterable[str], cuts: Mapping[Path, Iterable[int]]) -> SourceFiles:
        """Hash the named files of `directory`; names that are not there are left out. cuts: offsets, by file."""
        read = SourceFiles(directory, {}, {})
        for name in names:
            path = inside(directory, name)
            if os.path.lexists(path):
                read.stamps[name] = stamp(path)
                if path in cuts:
                    read.hashes[name], read.cuts[path] = _hash_with_cuts(path, sorted({0, *cuts[path]}))
                else:
                    read.hashes[name] = hash_of(path)
        return read

    def refuse_replaced(self) -> None:
        """Raise CheckpointError for the first file that is not the one hashed; a new time alone is no change."""
        for name, digest in self.hashes.items():
            try:
                path = inside(self.directory, name)
                same = stamp(path) == self.stamps[name] or file_sha256(path) == digest
            except (OSError, CheckpointError):
                same = False
            if not same:
                raise changed(self.directory / name)


def hash_of(path: Path) -> str:
    """SHA-256 of a checkpoint's file; CheckpointError for what is none: weights whose size is not that of their header,
    and others that are as large as weights.
    """
    if path.suffix == ".safetensors":
        read_header(path)
    elif is_gguf(path):
        check_file(path)
    else:
        check_regular(path, MAX_SMALL_BYTES)
    return file_sha256(path)


def stamp(path: Path) -> Stamp | None:
    """By which a file is recognized unread, for nobody sets the time of its last change; None where there is none."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(info.st_mode):
        return None
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def changed(path: Path) -> CheckpointError:
    """The error for a file that is not the one that was opened or hashed: some layers would be of another model."""
    return CheckpointError(
        f"{path}: changed while it was being read",
        hint="put the file back and start again; `qwenq quantize --resume` continues, and hashes it again",
    )


def _hash_with_cuts(path: Path, offsets: list[int]) -> tuple[str, Cuts]:
    digest, states = hashlib.sha256(), []
    piece = memoryview(bytearray(_CHUNK))
    with open_regular(path) as file:
        at = 0
        for offset in offsets:
            while at < offset:
                count = file.readinto(piece[: min(_CHUNK, offset - at)])
                if count == 0:
                    raise changed(path)  # cut short since its header was read
                digest.update(piece[:count])
                at += count
            states.append(digest.copy())
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest(), Cuts(offsets, states)


@dataclass(frozen=True)
class Verification:
    """The count of what was checked, and everything that is not as the manifest says."""

    digest: str  # the manifest's own: equal for two runs of one command
    files: int
    source_files: int  # 0 without a source
    findings: tuple[Finding, ...]
    layers_made_again: tuple[int, ...] = ()
    layers_not_made_again: tuple[int, ...] = ()  # with a source: those that only their own hash speaks for

    def to_json(self) -> dict[str, Any]:
        return {"ok": not self.findings} | asdict(self)


def verify(directory: Path, source: Path | None = None) -> Verification:
    """Hash every file of `directory`, and of `source` those the manifest names; raises CheckpointError without one."""
    try:
        manifest, findings = read_manifest(directory)
    except CheckpointError as error:
        if not (directory / MANIFEST_NAME).exists():
            raise
        problem = error.message.removeprefix(f"{shown(str(directory / MANIFEST_NAME))}: ")
        return Verification("", 0, 0, (Finding(MANIFEST_NAME, problem),))
    findings += check_files(directory, manifest)
    named: Mapping[str, str] = {}
    if source is not None:
        named = source_hashes(manifest)
        findings += check_source(source, named)
    files = len(manifest["files"]) + len(manifest["run"]["files"])
    layers = manifest.get("layers")
    left = range(len(layers)) if source is not None and isinstance(layers, list) else ()
    digest = str(manifest.get("digest"))
    return Verification(digest, files, len(named), tuple(findings), layers_not_made_again=tuple(left))


def refuse_converted(directory: Path) -> None:
    """Raise JobError where a manifest says that its checkpoint was converted: no layer of it was solved."""
    try:
        job = read_manifest(directory)[0].get("job")
    except CheckpointError:
        return  # for `verify` to say
    found = job.get("convert") if isinstance(job, dict) else None
    if found is None:
        return
    was = found.get("from") if isinstance(found, dict) else None
    raise JobError(
        f"{shown(str(directory))}: converted from a {shown(str(was), 20)} checkpoint; no layer was solved here",
        hint="verify that checkpoint with its 16-bit source, and this one with that checkpoint as --source and "
        "--layers none",
    )


def source_hashes(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Names and SHA-256 of the source's files, as the manifest has them; CheckpointError when it has none."""
    job = manifest.get("job")
    found = job.get("source") if isinstance(job, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(digest, str) for digest in found.values()):
        raise CheckpointError(f"{MANIFEST_NAME}: job.source is not an object of hashes")
    return found


def check_source(source: Path, named: Mapping[str, str]) -> Iterator[Finding]:
    """Every file of the source that is missing or not the one that was quantized."""
    for name, digest in named.items():
        try:
            path = inside(source, name)
        except CheckpointError as error:
            yield Finding(shown(name), error.message)
            continue
        if not path.is_file():
            yield Finding(shown(str(path)), "missing: the manifest lists it as a source file")
            continue
        try:
            found = hash_of(path)
        except CheckpointError as error:
            yield Finding(shown(str(path)), error.message)
            continue
        if found != digest:
            yield Finding(shown(str(path)), f"another file: SHA-256 {found}, wanted {shown(digest, 64)}")
