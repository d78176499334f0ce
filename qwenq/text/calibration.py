"""Calibration and evaluation text: the built-in set, named hub sets, and local files.

`builtin` is the text under calibration/builtin, written for this project, with a share read from the running Python's
own documentation and library. `heldout` is other text of the same kinds, for measuring drift. A recipe
(calibration/NAME.toml) names a hub data set. A file may be text or rows of any kind that `corpus` and `conversation`
read, or .npy (int64 token ids [windows, tokens], used as they are).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenq.errors import CalibrationError
from qwenq.io.json import open_regular, shown
from qwenq.model.spec import ModelSpec
from qwenq.text.conversation import Document
from qwenq.text.corpus import ENDINGS, Corpus, Sample, read_corpus, read_jsonl, read_rows
from qwenq.text.tokens import ModelTokenizer, TokenWindows, TooShort, check_length, check_windows, pack_windows
from qwenq.units import counted

PYTHON_SHARE = 0.25  # of the built-in set's characters; the rest is written for this project
_PYTHON_MODULES = ("argparse", "textwrap", "statistics", "fractions", "heapq", "json.decoder", "csv", "shlex")
_SHINGLE_WORDS = 13
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\s\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")
_OVERLAP_CHARACTERS = 4 << 20  # of a large file
_MOST_CHARACTERS = 64 << 20  # of a large file, for as many windows as are asked for
_ENOUGH = 4  # documents are read until they hold this many times the characters that are likely to be needed


def load_windows(
    name: str,
    tokenizer: ModelTokenizer,
    spec: ModelSpec,
    *,
    length: int,
    count: int | None,
    seed: int | None,
    up_to: int | None = None,
    strict: bool = False,
) -> TokenWindows:
    """Windows of `length` tokens from the set or file `name`.

    seed: shuffles documents and spreads windows over the text; None keeps order (evaluation). count: exactly so many;
    None: all there are, at most `up_to`. A row that is no document, or a conversation that the chat template refuses,
    is left out and counted (`skipped_rows`), unless `strict` or more than BAD_ROWS_IN_100 are such.
    Raises CalibrationError for text that is missing, empty or too short.
    """
    if name.endswith(".npy"):
        ids = _token_file(Path(name), count, up_to)
        check_windows(ids, spec.vocab_size, spec.extended_context, name)
        return TokenWindows(ids, Path(name).name, {"kind": "token ids"})
    check_length(length, spec.extended_context, name)
    asked = _Asked(name, length, count, seed, up_to, strict)
    enough = asked.enough
    while True:
        corpus = _corpus(name, Sample(enough, seed, max(4096, 2 * _ENOUGH * length)), strict)
        try:
            return asked.windows(corpus, enough, tokenizer, spec)
        except TooShort:
            if not corpus.sampled or enough is None or enough > _MOST_CHARACTERS:
                raise
            enough *= 4  # of a large file there is more: a table of spaces has few tokens


@dataclass(frozen=True)
class _Asked:
    """The windows that are wanted of a text."""

    name: str
    length: int
    count: int | None
    seed: int | None
    up_to: int | None
    strict: bool

    @property
    def enough(self) -> int | None:
        """Characters that are likely to hold the windows _ENOUGH times; None: all there are."""
        target = self.count or self.up_to
        return None if target is None else target * self.length * _ENOUGH * 4

    def windows(self, corpus: Corpus, enough: int | None, tokenizer: ModelTokenizer, spec: ModelSpec) -> TokenWindows:
        documents = corpus.documents
        if not any(d.text.strip() or d.messages for d in documents):
            raise CalibrationError(f"{self.name}: no text in it", hint="is it the right file?")
        if self.seed is not None:
            order = np.random.default_rng(self.seed).permutation(len(documents))
            documents = [documents[k] for k in order]
        if enough is not None:
            documents = _first(documents, enough)
        documents, texts, refused = _texts(documents, tokenizer)
        if refused and self.strict:
            raise refused[0]
        provenance = Corpus(documents, corpus.provenance).without(refused).provenance
        streams = _encoded(documents, texts, tokenizer)
        ids = pack_windows(streams, tokenizer.separator, self.length, self.count, spread=self.seed, where=self.name)
        if self.count is None and self.up_to is not None:
            ids = ids[: self.up_to]
        check_windows(ids, spec.vocab_size, spec.extended_context, self.name)
        if any(d.messages for d in documents):
            provenance = provenance | {"chat": "model's template" if tokenizer.has_chat_template else "ChatML"}
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        shown = self.name if self.name in set_names() else Path(self.name).name
        return TokenWindows(ids, shown, provenance | {"text_sha256": digest, "characters": sum(map(len, texts))})


def with_builtin(
    windows: TokenWindows, count: int, tokenizer: ModelTokenizer, spec: ModelSpec, *, seed: int
) -> TokenWindows:
    """`windows`, `count` of them replaced by windows of the built-in set, or as many as it has, at even distances.

    A text of one kind leaves directions of the inputs unseen that other kinds use; the built-in set has some of each.
    """
    if count == 0:
        return windows
    total, length = windows.ids.shape
    try:
        found = load_windows("builtin", tokenizer, spec, length=length, count=None, seed=seed)
    except TooShort:
        return replace(windows, provenance=windows.provenance | {"builtin": {"windows": 0}})
    number = min(count, len(found.ids))
    taken, places = (((torch.arange(number) + 0.5) * there / number).long() for there in (len(found.ids), total))
    other = replace(found, ids=found.ids[taken])
    ids = windows.ids.clone()
    ids[places] = other.ids
    return TokenWindows(ids, windows.text, windows.provenance | {"builtin": other.to_json()})


def _texts(
    documents: Sequence[Document], tokenizer: ModelTokenizer
) -> tuple[list[Document], list[str], list[CalibrationError]]:
    """Documents and their texts, conversations through the chat template; and why those it refuses are not there."""
    kept, texts, refused = [], [], []
    rendered = tokenizer.render_chats([d for d in documents if d.messages])
    for document in documents:
        text = next(rendered) if document.messages else document.text
        if isinstance(text, CalibrationError):
            refused.append(text)
        else:
            kept.append(document)
            texts.append(text)
    return kept, texts, refused


def _encoded(documents: Sequence[Document], texts: Sequence[str], tokenizer: ModelTokenizer) -> list[list[int]]:
    """Token ids of each text: plain ones as the tokenizer begins and ends them, chats as the template does."""
    plain = iter(tokenizer.encode([t for d, t in zip(documents, texts, strict=True) if not d.messages], special=True))
    chats = iter(tokenizer.encode([t for d, t in zip(documents, texts, strict=True) if d.messages]))
    return [next(chats if document.messages else plain) for document in documents]


def overlap(calibration: str, evaluation: str, *more: str) -> float:
    """Share of the evaluation text's 13-word shingles that also occur in the calibration text, or in `more` of it.

    Scripts written without spaces count every character as a word. Of large files a sample is compared.
    """
    sample = Sample(_OVERLAP_CHARACTERS, 0)

    def shingles(name: str) -> Iterator[int]:
        for document in _corpus(name, sample).documents:
            words = _WORD.findall(document.words)
            yield from (hash(tuple(words[i : i + _SHINGLE_WORDS])) for i in range(len(words) - _SHINGLE_WORDS + 1))

    held = set(shingles(evaluation))
    found = {shingle for name in (calibration, *more) for shingle in shingles(name) if shingle in held}
    return len(found) / max(len(held), 1)


def set_names() -> list[str]:
    """The names `--calibration` knows."""
    return ["builtin", "heldout", *sorted(p.stem for p in _directory().glob("*.toml"))]


def _directory() -> Path:
    packaged = Path(str(resources.files("qwenq"))) / "data" / "calibration"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent.parent / "calibration"


def _corpus(name: str, sample: Sample = Sample(), strict: bool = False) -> Corpus:
    if name == "builtin":
        written = [d for path in sorted((_directory() / "builtin").glob("*.jsonl")) for d in read_jsonl(path)]
        size = sum(document.characters for document in written)
        python, provenance = _python_documents(round(size * PYTHON_SHARE / (1 - PYTHON_SHARE)))
        return Corpus(written + python, provenance)
    if name == "heldout":
        files = sorted((_directory() / "heldout").glob("*.jsonl"))
        return Corpus([d for path in files for d in read_jsonl(path)], {"kind": "set"})
    recipe = _directory() / f"{name}.toml"
    if "/" not in name and recipe.is_file():
        return _hub_corpus(recipe, strict)
    check_text(name)
    return read_corpus(Path(name), sample, strict)


def check_text(name: str) -> None:
    """CalibrationError for what names neither a set nor a file."""
    if name not in set_names() and not os.path.lexists(name):
        raise CalibrationError(
            f"{name}: no such file, nor a set of that name", hint=f"sets: {', '.join(set_names())}; files: {ENDINGS}"
        )


def _hub_corpus(recipe: Path, strict: bool) -> Corpus:
    wanted = tomllib.loads(recipe.read_text(encoding="utf-8"))
    try:
        dataset, split, rows, columns = (wanted[key] for key in ("dataset", "split", "rows", "columns"))
    except KeyError as error:
        raise CalibrationError(f"{recipe}: no {error} in it", hint="wanted dataset, split, rows and columns") from None
    try:
        import datasets
    except ModuleNotFoundError:
        raise CalibrationError(
            f"calibration set {recipe.stem} comes from the hub ({dataset}), which needs the datasets package",
            hint="pip install 'qwenq[hub]', or --calibration builtin",
        ) from None
    try:
        stream = datasets.load_dataset(
            dataset, wanted.get("subset"), split=split, revision=wanted.get("revision"), streaming=True
        )
        taken = [{key: row.get(column) for key, column in columns.items()} for row in stream.take(rows)]
    except Exception as error:  # the library raises what its many backends raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(
            f"calibration set {recipe.stem}: {dataset} could not be read ({reason})",
            hint="check the network and HF_ENDPOINT, or --calibration builtin",
        ) from None
    known = ("dataset", "subset", "split", "revision", "rows")
    provenance = {"kind": "hub"} | {key: wanted[key] for key in known if key in wanted}
    corpus = Corpus.collect(read_rows(taken, lambda number: f"{recipe.stem}, row {number}"), provenance, strict)
    if wanted.get("join") is not None:  # rows are lines of longer texts: put them together again
        return replace(corpus, documents=[Document(str(wanted["join"]).join(d.text for d in corpus.documents))])
    return corpus


def _python_documents(characters: int) -> tuple[list[Document], dict[str, Any]]:
    """About `characters` of the running Python's documentation topics and library sources."""
    topics = importlib.import_module("pydoc_data.topics").topics
    texts = [topics[key] for key in sorted(topics) if len(topics[key]) > 1500]
    sources = []
    for module in _PYTHON_MODULES:
        found = importlib.util.find_spec(module)
        if found is not None and found.origin:
            sources.append(Path(found.origin).read_text(encoding="utf-8"))
    picked: list[str] = []
    used = 0
    half = characters // 2
    for pool, budget in ((texts, half), (sources, characters - half)):
        share = max(2000, budget // max(len(pool), 1))
        for text in pool:
            part = text[: min(share, characters - used)]
            if used >= characters or len(part) < 500:
                break
            picked.append(part)
            used += len(part)
            if used >= (half if pool is texts else characters):
                break
    digest = hashlib.sha256("\0".join(picked).encode()).hexdigest()
    return [Document(t) for t in picked], {
        "kind": "set",
        "python": platform.python_version(),
        "python_text_sha256": digest,
        "python_characters": used,
    }


def _first(documents: Sequence[Document], characters: int) -> list[Document]:
    kept, total = [], 0
    for document in documents:
        kept.append(document)
        total += document.characters
        if total >= characters:
            break
    return kept


def _token_file(path: Path, count: int | None, up_to: int | None) -> torch.Tensor:
    """The first `count` windows of a token file, int64 [windows, tokens]; or all, at most `up_to`."""
    open_regular(path, CalibrationError).close()
    try:
        array = np.load(
            path, mmap_mode="r", allow_pickle=False
        )  # mapped: a header that lies about the size allocates nothing
    except Exception as error:  # its header is Python text, and what reading that raises is of many kinds
        raise CalibrationError(f"{path}: not a NumPy array ({shown(str(error))})") from None
    if not isinstance(array, np.ndarray):
        raise CalibrationError(f"{path}: an archive, wanted one NumPy array")
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
        raise CalibrationError(f"{path}: {array.dtype} {list(array.shape)}, wanted whole numbers [windows, tokens]")
    if count is not None and count > len(array):
        found = counted(len(array), "window")
        raise CalibrationError(f"{path}: {found}, {count} asked for", hint=f"--num-samples {len(array)}")
    return torch.from_numpy(array[: count or up_to].astype(np.int64))
