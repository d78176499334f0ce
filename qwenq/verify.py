"""A finished checkpoint against its manifest, and the manifest against the source it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwenq.errors import CheckpointError
from qwenq.files import file_sha256
from qwenq.headers import inside, shown
from qwenq.manifest import MANIFEST_NAME, Finding, check_files, read_manifest


@dataclass(frozen=True)
class Verification:
    """What was checked, and everything that is not as the manifest says."""

    digest: str  # the manifest's own: equal for two runs of one command
    files: int
    source_files: int  # 0 without a source
    findings: tuple[Finding, ...]
    layers_made_again: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"ok": not self.findings} | asdict(self)


def verify(directory: Path, source: Path | None = None) -> Verification:
    """Hash every file of `directory`, and of `source` those the manifest names; raises CheckpointError without one."""
    try:
        manifest, findings = read_manifest(directory)
    except CheckpointError as error:
        if not (directory / MANIFEST_NAME).exists():
            raise
        problem = error.message.removeprefix(f"{MANIFEST_NAME}: ")
        return Verification("", 0, 0, (Finding(MANIFEST_NAME, problem),))
    findings += check_files(directory, manifest)
    named: Mapping[str, str] = {}
    if source is not None:
        named = source_hashes(manifest)
        findings += check_source(source, named)
    files = len(manifest["files"]) + len(manifest["run"]["files"])
    return Verification(str(manifest.get("digest")), files, len(named), tuple(findings))


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
            yield Finding(str(path), "missing: the manifest names it as a file of the source")
        elif (found := file_sha256(path)) != digest:
            yield Finding(str(path), f"another file: SHA-256 {found}, quantized was {shown(digest, 64)}")
