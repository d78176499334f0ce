"""Documents of a local file: whole where it is small, drawn from all over it by the seed where it is large.

Kinds: .txt and .md (one document), .jsonl, .json (an array, or values one after another), .parquet; all but the last
also as .gz. Memory and time do not grow with the file: text over SMALL_TEXT_BYTES and rows over SMALL_ROWS_BYTES are
sampled. What has no places to jump to (.gz and .json) is read once through, up to MAX_STREAM_BYTES.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import heapq
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from qwenq.errors import CalibrationError
from qwenq.io.json import open_regular, shown
from qwenq.text.conversation import COLUMNS, Document, read_row

SMALL_TEXT_BYTES = 4 << 20
SMALL_ROWS_BYTES = 16 << 20
MAX_ROW_BYTES = 16 << 20
MAX_DOCUMENT_CHARACTERS = 1 << 20  # encoded at once, in up to 270 bytes of memory each
MAX_STREAM_BYTES = 1 << 30
MAX_WHOLE_BYTES = 256 << 20  # of a large file that is asked for whole
BAD_ROWS_IN_100 = 10  # more, and the file is another than it seems
ENDINGS = ".txt, .md, .jsonl, .json, .parquet, .npy; .gz of the first four"
_SHARES = 256  # rows come from at least so many places, where there are
_BLOCK_BYTES = (4 << 10, 64 << 10)
_PLACES = 1 << 16
_CHUNK_BYTES = 1 << 16
_GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)

Item = Document | CalibrationError  # a row's document, or why there is none


@dataclass(frozen=True)
class Sample:
    """Sample of a text: about this many characters (None: all), drawn with `seed` or (None) from its beginning."""

    characters: int | None = None
    seed: int | None = None
    piece: int = 4 << 10  # bytes of running text taken at one place, where there are no rows


@dataclass(frozen=True)
class Corpus:
    """Documents, where they come from, and the rows that were left out."""

    documents: list[Document]
    provenance: dict[str, Any]
    sampled: bool = False

    @classmethod
    def collect(cls, items: Iterable[Item], provenance: dict[str, Any], strict: bool, sampled: bool = False) -> Corpus:
        """The documents of rows; CalibrationError at the first bad row with `strict`, or for too many."""
        found: list[Document] = []
        bad: list[CalibrationError] = []
        for item in items:
            if isinstance(item, Document):
                found.append(item)
                continue
            if strict:
                raise item
            bad.append(item)
            if len(bad) > 10_000 and _too_many(bad, found):
                break
        return cls(found, provenance, sampled).without(bad)

    def without(self, bad: list[CalibrationError]) -> Corpus:
        """The same with so many bad rows noted; CalibrationError when they are too many."""
        if not bad:
            return self
        if _too_many(bad, self.documents):
            rows = len(bad) + len(self.documents)
            count = f"{len(bad)} of {rows} rows are like this one; " if len(bad) > 1 else ""
            raise CalibrationError(bad[0].message, hint=count + bad[0].hint)
        noted = self.provenance.get("skipped_rows", 0) + len(bad)
        first = self.provenance.get("first_skipped", bad[0].message)
        return Corpus(self.documents, self.provenance | {"skipped_rows": noted, "first_skipped": first}, self.sampled)


def read_corpus(path: Path, sample: Sample = Sample(), strict: bool = False) -> Corpus:
    """The documents of a file, or a sample of a large one; CalibrationError for what is no text.

    A bad row in many is left out and counted; with `strict` it is an error.
    """
    ending, packed = path.suffix.lower(), False
    if ending == ".gz":
        ending, packed = path.with_suffix("").suffix.lower(), True
    if path.is_dir():
        raise CalibrationError(f"{path}: a directory, wanted a file", hint=ENDINGS)
    if ending not in _KINDS and (packed or ending != ".parquet"):
        raise CalibrationError(f"{path}: cannot read {path.suffix or 'a file without an ending'}", hint=ENDINGS)
    with open_regular(path, CalibrationError) as file:
        size = os.fstat(file.fileno()).st_size
        if ending == ".parquet":
            return _parquet(path, file, size, sample, strict)
        kind = _KINDS[ending]
        try:
            content = _small_content(file, size, packed, kind.small_bytes)
            if content is not None:
                provenance = {"kind": "file", "file_sha256": _sha256(file)}
                return Corpus.collect(kind.whole(_unmarked(content, path), path), provenance, strict)
            stream = _stream(file, packed)
            _unmarked(stream.read(4), path)
            stream.seek(0)
            items = kind.large(stream, size, packed, path, sample)
            return Corpus.collect(items, {"kind": "file", "file_bytes": size}, strict, sampled=True)
        except _GZIP_ERRORS as error:
            raise CalibrationError(f"{path}: not a whole gzip file ({shown(str(error))})") from None


def read_jsonl(path: Path) -> Iterator[Document]:
    """The rows of a JSON Lines file that ships with this package."""
    for item in _jsonl(path.read_bytes(), path):
        if isinstance(item, CalibrationError):
            raise item
        yield item


def read_rows(rows: Iterable[Any], where: Callable[[int], str]) -> Iterator[Item]:
    """Documents of rows already parsed, numbered from 1; one too long for a document is several."""
    for number, row in enumerate(rows, 1):
        yield from _row(row, where(number))


def _row(row: Any, where: str) -> Iterator[Item]:
    try:
        document = read_row(row, where)
    except CalibrationError as error:
        yield error
        return
    size, most = document.characters, MAX_DOCUMENT_CHARACTERS
    if size <= most:
        yield document
    elif document.messages:
        yield CalibrationError(f"{where}: a conversation of {size:,} characters, wanted at most {most:,}")
    else:
        yield from (Document(document.text[start : start + most]) for start in range(0, size, most))


def _small_content(file: io.BufferedReader, size: int, packed: bool, limit: int) -> bytes | None:
    """All bytes of a file, unpacked, when they are at most `limit`; the file is left at its beginning."""
    if size > limit:
        return None
    content = _stream(file, packed).read(limit + 1)
    file.seek(0)
    return content if len(content) <= limit else None


def _stream(file: io.BufferedReader, packed: bool) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=file) if packed else file)


def _sha256(file: io.BufferedReader) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _unmarked(content: bytes, path: Path) -> bytes:
    """Without a byte order mark; CalibrationError for UTF-16's, which is another encoding."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise CalibrationError(f"{path}: not UTF-8 text (byte 0)", hint="it is UTF-16: save it as UTF-8")
    return content.removeprefix(codecs.BOM_UTF8)


# ---------------------------------------------------------------------- whole files


def _text(content: bytes, path: Path) -> Iterator[Item]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text (byte {error.start})") from None
    yield Document(_lines_ended(text))


def _lines_ended(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _jsonl(content: bytes, path: Path) -> Iterator[Item]:
    for number, line in enumerate(io.BytesIO(content), 1):
        if line.strip():
            yield from _json_line(line, f"{path}, line {number}")


def _json_line(line: bytes, where: str) -> Iterator[Item]:
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        hint = "an array goes into a .json file" if line.strip() == b"[" else ""
        yield CalibrationError(f"{where}: not JSON ({error})", hint=hint)
        return
    yield from _row(row, where)


def _json(content: bytes, path: Path) -> Iterator[Item]:
    return read_rows(_json_values(io.BytesIO(content), path), lambda number: f"{path}, row {number}")


# ---------------------------------------------------------------------- large files


def _large_text(stream: BinaryIO, size: int, packed: bool, path: Path, sample: Sample) -> Iterator[Item]:
    if sample.seed is None or sample.characters is None:
        limit = MAX_WHOLE_BYTES if sample.characters is None else 4 * sample.characters
        data = stream.read(limit + 1)
        if sample.characters is None and len(data) > limit:
            raise _too_large_whole(path)
        yield Document(_piece(data[:limit], 0, path))
        return
    if packed:
        pieces = _reservoir(_groups(stream, path, sample.piece), sample)
        yield from (Document(_piece(data, at, path)) for data, at in pieces)
        return
    left = sample.characters
    for start in _places(size, sample.piece, sample.seed):
        at = max(start - 1, 0)  # the line break before may be all there is of the line before
        stream.seek(at)
        data = stream.read(2 * sample.piece)
        first = data.find(b"\n", 0, sample.piece) + 1 if start else 0
        end = data.find(b"\n", sample.piece) + 1
        text = _piece(data[first : end or sample.piece], at + first, path)
        yield Document(text)
        left -= len(text)
        if left <= 0:
            return


def _large_jsonl(stream: BinaryIO, size: int, packed: bool, path: Path, sample: Sample) -> Iterator[Item]:
    if sample.seed is None or sample.characters is None:
        yield from _beginning(_numbered(stream, path), sample, path)
        return
    if packed:
        for line, number in _reservoir(_numbered(stream, path), sample):
            yield from _json_line(line, f"{path}, line {number}")
        return
    left, read, share = sample.characters, 0, sample.characters / _SHARES
    block = min(max(int(share), _BLOCK_BYTES[0]), _BLOCK_BYTES[1])
    for start in _places(size, block, sample.seed):
        at, here = max(start - 1, 0), 0.0
        stream.seek(at)
        if start:  # the row that began before, or the line break it ended with
            at += len(stream.readline(MAX_ROW_BYTES))
        while at < start + block and here < share and (line := stream.readline(MAX_ROW_BYTES)):
            for item in _json_line(line, f"{path}, byte {at}") if line.strip() else ():
                yield item
                here += item.characters if isinstance(item, Document) else 0
            at += len(line)
        left, read = left - int(here), read + at - start
        if left <= 0 or read > MAX_WHOLE_BYTES:  # rows without end, or hardly any text in them
            return


def _large_json(stream: BinaryIO, size: int, packed: bool, path: Path, sample: Sample) -> Iterator[Item]:
    numbered = ((json.dumps(row).encode(), number) for number, row in enumerate(_json_values(stream, path), 1))
    if sample.seed is None or sample.characters is None:
        yield from _beginning(numbered, sample, path)
        return
    for line, number in _reservoir(numbered, sample):
        yield from _json_line(line, f"{path}, row {number}")


@dataclass(frozen=True)
class _Kind:
    """Reader for files with one extension."""

    small_bytes: int
    whole: Callable[[bytes, Path], Iterator[Item]]
    large: Callable[[BinaryIO, int, bool, Path, Sample], Iterator[Item]]


_PLAIN = _Kind(SMALL_TEXT_BYTES, _text, _large_text)
_KINDS = {
    ".txt": _PLAIN,
    ".md": _PLAIN,
    ".jsonl": _Kind(SMALL_ROWS_BYTES, _jsonl, _large_jsonl),
    ".json": _Kind(SMALL_ROWS_BYTES, _json, _large_json),
}


def _beginning(numbered: Iterator[tuple[bytes, int]], sample: Sample, path: Path) -> Iterator[Item]:
    """Rows in order until there are characters enough."""
    taken, size = 0, 0
    for line, number in numbered:
        size += len(line)
        if sample.characters is None and size > MAX_WHOLE_BYTES:
            raise _too_large_whole(path)
        for item in _json_line(line, f"{path}, row {number}"):
            yield item
            taken += item.characters if isinstance(item, Document) else 0
        if sample.characters is not None and taken >= sample.characters:
            return


def _reservoir(pieces: Iterator[tuple[bytes, int]], sample: Sample) -> list[tuple[bytes, int]]:
    """A sample of a stream in one pass, each piece as likely as the next, in random order.

    Kept are the pieces with the smallest of random keys, so many that they hold twice the characters asked for.
    """
    assert sample.characters is not None
    random = np.random.default_rng(sample.seed)
    kept: list[tuple[float, int, bytes]] = []
    size, wanted = 0, 2 * sample.characters
    for piece, number in pieces:
        heapq.heappush(kept, (-random.random(), number, piece))
        size += len(piece)
        while size - len(kept[0][2]) >= wanted:
            size -= len(heapq.heappop(kept)[2])
    return [(piece, number) for _, number, piece in sorted(kept, reverse=True)]


def _places(size: int, block: int, seed: int) -> Iterator[int]:
    """Starts of blocks across a whole file, in an order drawn with the seed."""
    count = max(1, min(size // block, _PLACES))
    for k in np.random.default_rng(seed).permutation(count):
        yield int(k) * size // count


def _numbered(stream: BinaryIO, path: Path) -> Iterator[tuple[bytes, int]]:
    """Lines that hold anything, numbered from 1; of one over MAX_ROW_BYTES the beginning, which is no JSON."""
    read, number, begun = 0, 0, False
    while line := stream.readline(MAX_ROW_BYTES):
        read += len(line)
        if read > MAX_STREAM_BYTES:
            raise _too_large_stream(path)
        number += not begun
        if not begun and line.strip():
            yield line, number
        begun = not line.endswith(b"\n")


def _groups(stream: BinaryIO, path: Path, size: int) -> Iterator[tuple[bytes, int]]:
    """Lines, about `size` bytes together, and where they begin."""
    group: list[bytes] = []
    held = read = 0
    while part := stream.readline(size):
        group.append(part)
        held += len(part)
        if read + held > MAX_STREAM_BYTES:
            raise _too_large_stream(path)
        if held >= size:
            yield b"".join(group), read
            read += held
            group, held = [], 0
    if group:
        yield b"".join(group), read


def _piece(data: bytes, at: int, path: Path) -> str:
    """Text of bytes from `at` of a file, cut anywhere: characters that the cuts go through are left out."""
    data = _unmarked(data, path) if at == 0 else data
    start = 0
    while at and start < min(3, len(data)) and data[start] & 0xC0 == 0x80:
        start += 1
    try:
        return _lines_ended(codecs.getincrementaldecoder("utf-8")("strict").decode(data[start:]))
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text (byte {at + start + error.start})") from None


def _json_values(stream: BinaryIO, path: Path) -> Iterator[Any]:
    """The elements of an array, or values one after another; of `{"data": [...]}` alone the elements of that."""
    decoder, text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")("strict")
    held, at, read, ended, array, number = "", 0, 0, False, None, 0
    first: Any = None

    def more(least: int) -> None:
        nonlocal held, at, read, ended
        data = stream.read(max(least, _CHUNK_BYTES))
        read += len(data)
        if read > MAX_STREAM_BYTES:
            raise _too_large_stream(path)
        ended = not data
        if read == len(data):
            _unmarked(data, path)
        try:
            held, at = held[at:] + text.decode(data, final=ended), 0
        except UnicodeDecodeError:
            raise CalibrationError(f"{path}: not UTF-8 text (after {read - len(data)} bytes)") from None

    while True:
        while at < len(held) and held[at] in " \t\r\n,":
            at += 1
        if at == len(held):
            if ended and array:
                raise CalibrationError(f"{path}: not JSON (its array does not end)")
            if ended:
                break
            more(0)
            continue
        if array is None:
            array = held[at] == "["
            at += array
            continue
        if array and held[at] == "]":
            break
        try:
            value, end = decoder.raw_decode(held, at)
        except RecursionError:
            raise CalibrationError(f"{path}, row {number + 1}: JSON nested too deep") from None
        except ValueError as error:
            if ended or len(held) - at > MAX_ROW_BYTES:
                raise CalibrationError(f"{path}, row {number + 1}: not JSON ({shown(str(error))})") from None
            more(len(held) - at)
            continue
        number, at = number + 1, end
        if not array and number == 1:
            first = value
            continue
        if not array and number == 2:
            yield first
        yield value
    if not array and number == 1:
        rows = first.get("data") if isinstance(first, dict) else None
        yield from rows if isinstance(rows, list) else [first]


def _parquet(path: Path, file: io.BufferedReader, size: int, sample: Sample, strict: bool) -> Corpus:
    try:
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise CalibrationError(f"{path}: reading Parquet needs pyarrow", hint="pip install 'qwenq[parquet]'") from None
    try:
        table = parquet.ParquetFile(file, pre_buffer=False)
        unpacked = sum(table.metadata.row_group(k).total_byte_size for k in range(table.num_row_groups))
        small = size <= SMALL_ROWS_BYTES and unpacked <= 4 * SMALL_ROWS_BYTES
        if small:
            provenance: dict[str, Any] = {"kind": "file", "file_sha256": _sha256(file)}
        else:
            provenance = {"kind": "file", "file_bytes": size}
        items = _parquet_items(table, path, Sample() if small else sample)
        return Corpus.collect(items, provenance, strict, sampled=not small)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:  # pyarrow's own errors are their children
        reason = shown(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise CalibrationError(f"{path}: not a Parquet file ({reason})") from None


def _parquet_items(table: Any, path: Path, sample: Sample) -> Iterator[Item]:
    """Rows of all row groups in order, or of some of each, the groups in an order drawn by the seed."""
    columns = [name for name in table.schema_arrow.names if name in COLUMNS] or table.schema_arrow.names[:1]
    groups = list(range(table.num_row_groups))
    drawn = sample.seed is not None and sample.characters is not None
    if drawn:
        groups = [int(k) for k in np.random.default_rng(sample.seed).permutation(len(groups))]
    share = (sample.characters or 0) / max(1, min(len(groups), _SHARES))
    number = taken = 0
    for group in groups:
        here = 0
        for row in _parquet_rows(table, group, columns):
            number += 1
            for item in _row(row, f"{path}, row {number}" + (" of the sample" if drawn else "")):
                yield item
                here += item.characters if isinstance(item, Document) else 0
            if taken + here > MAX_WHOLE_BYTES:
                raise _too_large_whole(path)
            if drawn and here >= share:
                break
        taken += here
        if sample.characters is not None and taken >= sample.characters:
            return


def _parquet_rows(table: Any, group: int, columns: list[str]) -> Iterator[Any]:
    for batch in table.iter_batches(batch_size=64, row_groups=[group], columns=columns):
        yield from batch.to_pylist()


def _too_many(bad: list[CalibrationError], good: list[Document]) -> bool:
    return 100 * len(bad) > BAD_ROWS_IN_100 * (len(bad) + len(good))


def _too_large_whole(path: Path) -> CalibrationError:
    return CalibrationError(
        f"{path}: more than the {MAX_WHOLE_BYTES} bytes that are read whole", hint="ask for a number of windows"
    )


def _too_large_stream(path: Path) -> CalibrationError:
    return CalibrationError(
        f"{path}: more than {MAX_STREAM_BYTES} bytes, which must be read from the beginning",
        hint="unpacked .jsonl or .txt is sampled whatever its size",
    )
