"""The end of every job that writes a checkpoint: what is not a shard, the manifest last, and the directory's name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq.checkpoint.manifest import LOCK_NAME, SCRATCH_PREFIX, changed, write_manifest
from qwenq.checkpoint.shards import Shards, StoredFiles
from qwenq.errors import JobError
from qwenq.formats.base import Recipe, get_format
from qwenq.io.durable import copy_synced, sync_directory, write_bytes, write_json
from qwenq.io.json import MAX_SMALL_BYTES, TEMPLATES, check_regular, inside
from qwenq.io.safetensors import INDEX_NAME
from qwenq.model.metadata import GENERATION_NAME
from qwenq.model.spec import spelled_twice
from qwenq.pipeline.card import CARD_NAME
from qwenq.text.tokens import TOKENIZER_FILES
from qwenq.text.vocabulary import template_files

_COPIED_FILES = (*TOKENIZER_FILES, GENERATION_NAME, "LICENSE")


def copied_files(source: Path) -> tuple[str, ...]:
    """Names of the source's files that a checkpoint has as they are, where they are there."""
    return (*_COPIED_FILES, *template_files(source))


@dataclass(frozen=True)
class Output:
    """A checkpoint in the making: written in `work`, which becomes `out` when all of it is whole."""

    work: Path
    out: Path
    recipe: Recipe
    config: Mapping[str, Any]  # config.json as it is written
    files: StoredFiles
    copied: tuple[str, ...]  # see `copied_files`

    @property
    def names(self) -> set[str]:
        """Every file that a checkpoint may have but those that its job puts beside, and the manifest."""
        configs = () if self.files.whole else (*self._small, INDEX_NAME, "config.json")
        return {*self.files.names, *configs, *self._copied, CARD_NAME}

    @property
    def _small(self) -> dict[str, Mapping[str, Any]]:
        return get_format(self.recipe.format).small_files(self.config["quantization_config"])

    @property
    def _copied(self) -> tuple[str, ...]:
        return ("LICENSE",) if self.files.whole else self.copied

    def copy_small_files(self, source: Path, hashes: Mapping[str, str]) -> dict[str, str]:
        """Tokenizer and licence of the source, and their SHA-256; CheckpointError where one is not that in `hashes`."""
        copied = {}
        for name in self._copied:
            path = inside(source, name)
            if os.path.lexists(path):
                check_regular(path, MAX_SMALL_BYTES)
                (self.work / name).parent.mkdir(exist_ok=True)
                copied[name] = copy_synced(path, self.work / name)
            if copied.get(name) != hashes.get(name):
                raise changed(path)
        return copied

    def write_configs(self) -> dict[str, str]:
        """The index, the configuration and the format's own small files; their SHA-256 by name."""
        if not isinstance(self.files, Shards):
            return {}
        content = {INDEX_NAME: self.files.index, "config.json": spelled_twice(self.config)} | self._small
        return {name: write_json(self.work / name, value) for name, value in content.items()}

    def finish(self, described: Mapping[str, Any], hashes: Mapping[str, str], card: str | None) -> None:
        """Write the card, if any, and the manifest, and rename the directory. hashes: SHA-256 of all other files."""
        beside = {} if card is None else {CARD_NAME: write_bytes(self.work / CARD_NAME, card.encode())}
        write_manifest(self.work, described, {**hashes, **beside})
        give_name(self.work, self.out)


def give_name(work: Path, out: Path) -> None:
    """Remove what was needed to resume, and rename the finished directory."""
    for leftover in work.glob(SCRATCH_PREFIX + "*"):
        if leftover.name != LOCK_NAME:  # held until the directory has its name
            leftover.unlink()
    if (work / TEMPLATES).is_dir():
        sync_directory(work / TEMPLATES)
    sync_directory(work)
    os.replace(work, out)
    try:
        sync_directory(out.parent)
    except OSError as error:
        raise JobError(
            f"{out}: finished, but the disk could not confirm its name ({error.strerror})",
            hint="look after the disk, then `qwenq verify` it",
        ) from error
