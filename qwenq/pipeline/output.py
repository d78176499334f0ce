"""The end of every job that writes a checkpoint: what is not a shard, the manifest last, and the directory's name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq.checkpoint.manifest import LOCK_NAME, SCRATCH_PREFIX, write_manifest
from qwenq.checkpoint.shards import encode_index
from qwenq.errors import JobError
from qwenq.formats.base import Recipe
from qwenq.io.durable import copy_synced, sync_directory, write_bytes, write_json
from qwenq.io.json import inside
from qwenq.io.safetensors import INDEX_NAME, TensorSpec
from qwenq.pipeline.card import CARD_NAME
from qwenq.text.tokens import TOKENIZER_FILES

COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE")


@dataclass(frozen=True)
class Output:
    """A checkpoint in the making: written in `work`, which becomes `out` when all of it is whole."""

    work: Path
    out: Path
    recipe: Recipe
    config: Mapping[str, Any]  # config.json as it is written
    files: Mapping[str, list[TensorSpec]]  # the shards

    def copy_small_files(self, source: Path, hashes: Mapping[str, str], doing: str, hint: str = "") -> None:
        """Tokenizer and licence of the source; JobError where one is not that in `hashes`, changed while `doing`."""
        for name in COPIED_FILES:
            path = inside(source, name)
            if path.is_file() and copy_synced(path, self.work / name) != hashes.get(name):
                raise JobError(f"{path}: changed while it was being {doing}", hint=hint)

    def write_configs(self) -> None:
        """The index and the configuration."""
        write_json(self.work / INDEX_NAME, encode_index(self.files))
        write_json(self.work / "config.json", self.config)
        if self.recipe.format == "gptq":  # GPTQModel and AutoGPTQ look here first
            write_json(self.work / "quantize_config.json", self.config["quantization_config"])

    def finish(self, described: Mapping[str, Any], hashes: Mapping[str, str], card: str | None) -> None:
        """Write the card and the manifest, which hashes whatever lies there, and rename the directory."""
        if card is not None:
            write_bytes(self.work / CARD_NAME, card.encode())
        write_manifest(self.work, described, hashes)
        give_name(self.work, self.out)


def give_name(work: Path, out: Path) -> None:
    """Remove what was needed to resume, and rename the finished directory."""
    for leftover in work.glob(SCRATCH_PREFIX + "*"):
        if leftover.name != LOCK_NAME:  # held until the directory has its name
            leftover.unlink()
    sync_directory(work)
    os.replace(work, out)
    try:
        sync_directory(out.parent)
    except OSError as error:
        raise JobError(
            f"{out}: finished, but the disk could not confirm its name ({error.strerror})",
            hint="look after the disk, then `qwenq verify` it",
        ) from error
