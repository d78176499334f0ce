"""Which model a directory holds, told from a little of every tensor: names, shapes and first bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qwenq.headers import checkpoint_tensors

SAMPLE_BYTES = 4096  # of each tensor; a fine-tuned model differs in all of them


def fingerprint(directory: Path) -> str:
    """SHA-256 over name, dtype, shape and first bytes of each tensor, by name: the same however files are cut."""
    digest = hashlib.sha256()
    tensors = checkpoint_tensors(directory)
    for name in sorted(tensors):
        location = tensors[name]
        digest.update(f"{name} {location.spec.dtype} {list(location.spec.shape)}\n".encode())
        with open(location.file, "rb") as file:
            file.seek(location.start)
            digest.update(file.read(min(SAMPLE_BYTES, location.end - location.start)))
    return digest.hexdigest()
