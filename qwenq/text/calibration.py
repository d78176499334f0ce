"""Calibration and evaluation text: the built-in set, named hub sets, and local files.

`builtin` is the text under calibration/builtin, written for this project, with a share read from the running Python's
own documentation and library. `heldout` is other text of the same kinds, for measuring drift. A recipe
(calibration/NAME.toml) names a hub data set. A file may be .txt, .jsonl (`text`, or `messages`), .parquet, or .npy
(int64 token ids [windows, tokens], used as they are).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenq.errors import CalibrationError
from qwenq.io.json import shown
from qwenq.model.spec import ModelSpec
from qwenq.text.tokens import ModelTokenizer, TokenWindows, check_length, check_windows, pack_windows

PYTHON_SHARE = 0.25  # of the built-in set's characters; the rest is written for this project
_PYTHON_MODULES = ("argparse", "textwrap", "statistics", "fractions", "heapq", "json.decoder", "csv", "shlex")
_SHINGLE_WORDS = 13
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\s\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")
_ENOUGH = 4  # documents are read until they hold this many times the characters that are likely to be needed


@dataclass(frozen=True)
class Document:
    """One document: plain text, or a conversation for the model's chat template."""

    text: str
    messages: tuple[dict[str, str], ...] = ()

    def render(self, tokenizer: ModelTokenizer) -> str:
        return tokenizer.render_chat(list(self.messages)) if self.messages else self.text


def load_windows(
    name: str,
    tokenizer: ModelTokenizer,
    spec: ModelSpec,
    *,
    length: int,
    count: int | None,
    seed: int | None,
    up_to: int | None = None,
) -> TokenWindows:
    """Windows of `length` tokens from the set or file `name`.

    seed: shuffles documents and spreads windows over the text; None keeps order (evaluation). count: exactly so many;
    None: all there are, at most `up_to`. Raises CalibrationError for text that is missing, empty or too short.
    """
    if name.endswith(".npy"):
        ids = _token_file(Path(name))
        if count is not None and count > len(ids):
            raise CalibrationError(f"{name}: {len(ids)} windows, {count} asked for", hint=f"--num-samples {len(ids)}")
        ids = ids[: count or up_to]
        check_windows(ids, spec.vocab_size, spec.extended_context, name)
        return TokenWindows(ids, Path(name).name, {"kind": "token ids"})
    check_length(length, spec.extended_context, name)
    documents, provenance = _documents(name)
    if not any(d.text.strip() or d.messages for d in documents):
        raise CalibrationError(f"{name}: no text in it", hint="an empty set calibrates nothing")
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(documents))
        documents = [documents[k] for k in order]
    target = count or up_to
    if target is not None:
        documents = _first(documents, target * length * _ENOUGH * 4)
    texts = [d.render(tokenizer) for d in documents]
    ids = pack_windows(tokenizer.encode(texts), tokenizer.separator, length, count, spread=seed, where=name)
    if count is None and up_to is not None:
        ids = ids[:up_to]
    check_windows(ids, spec.vocab_size, spec.extended_context, name)
    if any(d.messages for d in documents):
        provenance = provenance | {"chat": "model's template" if tokenizer.has_chat_template else "ChatML"}
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    shown = name if name in set_names() else Path(name).name
    return TokenWindows(ids, shown, provenance | {"text_sha256": digest, "characters": sum(map(len, texts))})


def overlap(calibration: str, evaluation: str) -> float:
    """Share of the evaluation text's 13-word shingles that also occur in the calibration text.

    Scripts written without spaces count every character as a word.
    """

    def shingles(name: str) -> set[tuple[str, ...]]:
        found: set[tuple[str, ...]] = set()
        for document in _documents(name)[0]:
            text = document.text or " ".join(m["content"] for m in document.messages)
            words = _WORD.findall(text)
            found.update(tuple(words[i : i + _SHINGLE_WORDS]) for i in range(len(words) - _SHINGLE_WORDS + 1))
        return found

    held = shingles(evaluation)
    return len(held & shingles(calibration)) / max(len(held), 1)


def set_names() -> list[str]:
    """The names `--calibration` knows."""
    return ["builtin", "heldout", *sorted(p.stem for p in _directory().glob("*.toml"))]


def _directory() -> Path:
    packaged = Path(str(resources.files("qwenq"))) / "data" / "calibration"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent.parent / "calibration"


def _documents(name: str) -> tuple[list[Document], dict[str, Any]]:
    if name == "builtin":
        written = [d for path in sorted((_directory() / "builtin").glob("*.jsonl")) for d in _jsonl(path)]
        size = sum(len(d.text) + sum(len(m["content"]) for m in d.messages) for d in written)
        python, provenance = _python_documents(round(size * PYTHON_SHARE / (1 - PYTHON_SHARE)))
        return written + python, provenance
    if name == "heldout":
        return [d for path in sorted((_directory() / "heldout").glob("*.jsonl")) for d in _jsonl(path)], {"kind": "set"}
    recipe = _directory() / f"{name}.toml"
    if "/" not in name and recipe.is_file():
        return _hub_documents(recipe)
    path = Path(name)
    if not path.is_file():
        raise CalibrationError(
            f"{name}: no such calibration set or file",
            hint=f"sets: {', '.join(set_names())}; files: .txt, .jsonl, .parquet, .npy",
        )
    readers = {".txt": _plain, ".md": _plain, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise CalibrationError(f"{name}: cannot read {path.suffix or 'a file without an ending'}", hint=".txt, .jsonl")
    file_digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return list(readers[path.suffix](path)), {"kind": "file", "file_sha256": file_digest}


def _plain(path: Path) -> Iterator[Document]:
    try:
        yield Document(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _jsonl(path: Path) -> Iterator[Document]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    raise CalibrationError(f"{path}, line {number}: not JSON ({error})") from None
                yield _row(row, f"{path}, line {number}")


def _row(row: Any, where: str) -> Document:
    if isinstance(row, dict) and isinstance(row.get("messages"), list) and row["messages"]:
        messages = row["messages"]
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages):
            raise CalibrationError(f"{where}: messages want role and content, both text")
        turns = tuple(
            {"role": _unicode(str(m["role"]), where), "content": _unicode(m["content"], where)} for m in messages
        )
        return Document("", turns)
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return Document(_unicode(row["text"], where))
    raise CalibrationError(f"{where}: neither `text` nor `messages` in it")


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CalibrationError(f"{where}: half of a surrogate pair in it, which is no text") from None
    return text


def _parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise CalibrationError(f"{path}: reading Parquet needs pyarrow", hint="pip install 'qwenq[parquet]'") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are children of these
        raise CalibrationError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    for number, row in enumerate(rows, 1):
        yield _row(row, f"{path}, row {number}")


def _hub_documents(recipe: Path) -> tuple[list[Document], dict[str, Any]]:
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
    documents = [_row(row, recipe.stem) for row in taken]
    if wanted.get("join") is not None:  # rows are lines of longer texts: put them together again
        documents = [Document(str(wanted["join"]).join(d.text for d in documents))]
    known = ("dataset", "subset", "split", "revision", "rows")
    return documents, {"kind": "hub"} | {key: wanted[key] for key in known if key in wanted}


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
        total += len(document.text) + sum(len(m["content"]) for m in document.messages)
        if total >= characters:
            break
    return kept


def _token_file(path: Path) -> torch.Tensor:
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
    return torch.from_numpy(array.astype(np.int64))
