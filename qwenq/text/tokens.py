"""Text to windows of token ids, with the model's own tokenizer."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from qwenq.checkpoint.contents import read_config
from qwenq.errors import CalibrationError, CheckpointError, out_of_memory
from qwenq.io.durable import make_directory, write_bytes, write_json
from qwenq.io.gguf import GGUFFile, is_gguf
from qwenq.io.json import LFS_POINTER, TEMPLATES, check_regular, inside, read_limited, read_object, shown
from qwenq.text.conversation import Document, Message, fitted, read_messages
from qwenq.text.rendering import MAX_TEMPLATE_BYTES, Rendering, TemplateFault, render
from qwenq.text.vocabulary import (
    MAX_TOKENIZER_BYTES,
    Vocabulary,
    has_tokenizer,
    template_file,
    template_files,
    vocabulary_of_metadata,
)
from qwenq.units import counted

_LARGEST = {  # bytes
    "tokenizer.json": MAX_TOKENIZER_BYTES, "tokenizer_config.json": 10_000_000, "vocab.json": 50_000_000,
    "merges.txt": 50_000_000, "special_tokens_map.json": 1_000_000, "added_tokens.json": 10_000_000,
    "chat_template.jinja": MAX_TEMPLATE_BYTES, "chat_template.json": 10_000_000, "tokenizer.model": 50_000_000,
}  # fmt: skip
TOKENIZER_FILES = tuple(_LARGEST)
_TRANSFORMERS_READS = _LARGEST | {"config.json": 10_000_000}
_PLACES = ("fast_tokenizer_files", "tokenizer_file", "vocab_file", "merges_file", "spm_file", "gguf_file",
           "tokenizer_object", "init_inputs")  # fmt: skip
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>")
_PIECE_CHARACTERS = 1 << 20  # encoded at once: some 160 MB of the library's memory, for ASCII
_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes that byte-level BPE writes as themselves
_BYTES = {chr(byte): byte for byte in _PLAIN} | {  # the rest in order, behind the last
    chr(256 + k): byte for k, byte in enumerate(byte for byte in range(256) if byte not in _PLAIN)
}
_CONTEXT_TOKENS = 8  # the last one alone may be a byte of a character, or a space
_CHAT_S, _CHAT_S_PER_MB = 10, 1  # processor time of all conversations of a text


def _of_the_machine(error: BaseException) -> bool:
    """Whether memory or handles of files did not suffice, which is no fault of the tokenizer's files."""
    handles = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return handles or out_of_memory(error) is not None


@contextmanager
def _at_fault(say: Callable[[BaseException], CheckpointError]) -> Iterator[None]:
    """Turn transformers' exceptions, and panics of the library beneath it, into errors about the tokenizer's files."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | CheckpointError) or _of_the_machine(error):
            raise
        raise say(error) from None


@contextmanager
def _silenced() -> Iterator[None]:
    """Send stdout and stderr to the null device meanwhile, by their file descriptors.

    The library beneath prints its panics, and names of options that it does not know, as they are in the file.
    """
    kept: dict[int, int] = {}
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for handle, stream in ((1, sys.stdout), (2, sys.stderr)):
            if stream is not None:  # closed before Python began
                with suppress(ValueError):  # closed since
                    stream.flush()
            try:
                kept[handle] = os.dup(handle)
            except OSError as error:
                if error.errno != errno.EBADF:  # closed
                    raise
            else:
                os.dup2(null, handle)
        yield
    finally:
        for handle, copy in kept.items():
            os.dup2(copy, handle)
            os.close(copy)
        os.close(null)


@dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer of a checkpoint, as transformers reads it: no code of the model's is run.

    `tokenizer.json` decides: AutoTokenizer would build Qwen's own splitting for every `model_type: qwen2`, whatever
    the file says, and a model is run with the tokens it was trained on. AutoTokenizer's class reads the directories
    that have `vocab.json` and `merges.txt` alone, or `tokenizer.model`. A GGUF file's is in its metadata.
    """

    directory: Path  # or a GGUF file

    @cached_property
    def _fast(self) -> Any:
        """transformers' tokenizer, padding and truncation that the file was saved with put off."""
        vocabulary = self._vocabulary
        if vocabulary is None:
            self._check_files()
        with _silenced():
            return self._loaded() if vocabulary is None else _tokenizer_of(vocabulary, self.directory)

    def _loaded(self) -> Any:
        with _at_fault(self._unreadable):
            import transformers  # which imports the class that is asked for alone

            kind: Any = transformers.PreTrainedTokenizerFast if self.present else transformers.AutoTokenizer
            fast = kind.from_pretrained(str(self.directory), local_files_only=True, trust_remote_code=False)
            fast.backend_tokenizer.no_padding()
            fast.backend_tokenizer.no_truncation()
        return fast

    @cached_property
    def _vocabulary(self) -> Vocabulary | None:
        """Of a GGUF file."""
        if not is_gguf(self.directory):
            return None
        return vocabulary_of_metadata(GGUFFile.open(self.directory).metadata, shown(str(self.directory)))

    def _unreadable(self, error: BaseException) -> CheckpointError:
        """The error of a directory that transformers does not read, naming the file at fault."""
        reason = shown(" ".join(str(error).split()) or type(error).__name__)
        path = self.directory / "tokenizer.json"
        if not self.present:
            return CheckpointError(f"{self.directory}: transformers cannot build a tokenizer from its files ({reason})")
        content = read_limited(path, MAX_TOKENIZER_BYTES)
        if content.startswith(LFS_POINTER):
            return CheckpointError(
                f"{path}: a git-lfs pointer, not the file", hint="run `git lfs pull` in its directory"
            )
        with _at_fault(lambda cause: CheckpointError(f"{path}: not a tokenizer ({shown(str(cause))})")):
            Tokenizer.from_str(content.decode("utf-8"))
        config = self.directory / "tokenizer_config.json"
        return CheckpointError(f"{config}: not a tokenizer's configuration ({reason})")

    def _check_files(self) -> None:
        """Raise CheckpointError unless what transformers will open is regular, small enough and in the directory."""
        try:
            str(self.directory).encode()
        except UnicodeEncodeError:
            raise CheckpointError(
                f"{shown(str(self.directory))}: its name is not UTF-8, so transformers cannot open its tokenizer",
                hint="rename it",
            ) from None
        present = {name for name in _TRANSFORMERS_READS if os.path.lexists(inside(self.directory, name))}
        if not present & {"tokenizer.json", "tokenizer.model"} and not present >= {"vocab.json", "merges.txt"}:
            raise CheckpointError(
                f"{self.directory}: no tokenizer.json",
                hint="save the fast tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            )
        for name in sorted(present):
            check_regular(self.directory / name, _TRANSFORMERS_READS[name])
        for name in template_files(self.directory):
            check_regular(inside(self.directory, name), MAX_TEMPLATE_BYTES)
        if "tokenizer_config.json" in present:
            settings = read_object(self.directory / "tokenizer_config.json")
            for key in _PLACES if "tokenizer.json" not in present else _PLACES[:1]:
                if settings.get(key):
                    raise CheckpointError(f"tokenizer_config.json: {key} names other files: refused")

    @property
    def present(self) -> bool:
        """Whether the directory has a tokenizer.json."""
        return (self.directory / "tokenizer.json").is_file()

    @property
    def _tokenizer(self) -> Tokenizer:
        backend: Tokenizer = self._fast.backend_tokenizer
        return backend

    @cached_property
    def sha256(self) -> str:
        """Digest of `tokenizer.json`, or of what is in its place."""
        if self._vocabulary is not None:
            return hashlib.sha256(json.dumps(self._vocabulary.document, sort_keys=True).encode()).hexdigest()
        self._check_files()
        names = ["tokenizer.json"] if self.present else ["vocab.json", "merges.txt", "tokenizer.model"]
        digest = hashlib.sha256()
        for name in names:
            if (self.directory / name).is_file():
                digest.update(read_limited(self.directory / name, _TRANSFORMERS_READS[name]))
        return digest.hexdigest()

    @property
    def vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    @cached_property
    def eos(self) -> int | None:
        """The end token that the tokenizer's own files name."""
        token = self._fast.eos_token
        return None if token is None else self.id_of(str(token))

    @cached_property
    def separator(self) -> int:
        """The token put between documents: the end-of-text token, else config.json's or the tokenizer's end token."""
        for text in _SEPARATORS:
            if (token := self.id_of(text)) is not None:
                return token
        there = self._vocabulary is not None or inside(self.directory, "config.json").exists()
        eos = read_config(self.directory).get("eos_token_id") if there else None
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if type(eos) is int:
            return eos
        if self.eos is None:
            raise CheckpointError(f"{self.directory}: no end-of-text token in tokenizer.json or config.json")
        return self.eos

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Token ids of each text; with `special` what the tokenizer puts around plain text too, a BOS token say."""
        found: list[list[int]] = []
        tokenizer = self._tokenizer  # what is refused as it is read says so itself
        where = f"{self.directory}: its tokenizer.json cannot encode"
        with _at_fault(lambda error: CheckpointError(f"{where} ({shown(str(error))})")):
            for batch in _batches(texts, _PIECE_CHARACTERS):
                encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=special)
                found += [encoding.ids for encoding in encodings]
        return found

    def id_of(self, token: str) -> int | None:
        """The id of a token by its text."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 of a token by itself, special ones too; of a part of a character, byte-level BPE and byte fallback
        say which it is.
        """
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        piece: str = self._tokenizer.id_to_token(token) or ""
        if "\ufffd" not in text:
            return text.encode()
        if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(fallback[1])
        known = all(character in _BYTES for character in piece)
        return bytes(_BYTES[character] for character in piece) if known else text.encode()

    def stream(self, ids: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
        """Text of ids as soon as it is whole characters, special tokens left out.

        The last tokens of `prompt` are its context: a first word keeps the space that a text's first word has not.
        """
        decoder = DecodeStream(ids=list(prompt[-_CONTEXT_TOKENS:]), skip_special_tokens=True)
        for token in ids:
            text: str | None = decoder.step(self._tokenizer, token)
            if text is not None:
                yield text

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] = (),
        settings: Mapping[str, Any] | None = None,
        answer: bool = False,
    ) -> str:
        """A conversation as the model's chat template writes it; ChatML when the checkpoint has no template.

        settings: what the template is told beside it. With `answer`, up to where the model's answer begins.
        CalibrationError for what it refuses, would leave out, or takes too much time, memory or output for.
        """
        document = Document("", read_messages(messages), tuple(tools), settings or {})
        text, _ = self._rendered(document, "messages", answer)
        return text

    def render_chats(self, documents: Sequence[Document]) -> Iterator[str | CalibrationError]:
        """Each conversation as the template writes it, or why not; CalibrationError when all take too long."""
        characters = sum(document.characters for document in documents)
        seconds, limit = 0.0, _CHAT_S + _CHAT_S_PER_MB * characters / 1e6
        for number, document in enumerate(documents, 1):
            try:
                text, took = self._rendered(document, f"conversation {number}", False)
            except _Refusal as error:
                yield error
                continue
            seconds += took
            if seconds > limit:
                raise CalibrationError(
                    f"{self.directory}: its chat template took {seconds:.0f} s for {number} of {len(documents)} "
                    f"conversations",
                    hint="plain `text` needs no template",
                )
            yield text

    def _rendered(self, document: Document, where: str, answer: bool) -> tuple[str, float]:
        template = self._template(bool(document.tools))
        try:
            messages = fitted(document, template, where)
        except CalibrationError as error:
            raise _Refusal(error.message, hint=error.hint) from None
        if template is None:
            turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
            return "".join(turns) + ("<|im_start|>assistant\n" if answer else ""), 0.0
        try:
            settings = {**self._fast.special_tokens_map, **document.settings}
            return render(Rendering(template, messages, document.tools or None, answer, settings))
        except TemplateFault as fault:
            reason, hint = shown(" ".join(str(fault).split())), "plain `text` needs no template"
            if fault.limit:
                message = f"{self.directory}: its chat template exceeded a limit on a conversation ({reason})"
                raise CalibrationError(message, hint=hint) from None
            message = f"{self.directory}: its chat template refused a conversation ({reason})"
            raise _Refusal(message, hint=hint) from None

    def _template(self, tools: bool) -> str | None:
        if not self.has_chat_template:
            return None
        try:
            found = self._fast.get_chat_template(None, [{}] if tools else None)
        except ValueError as error:  # several templates and no default
            raise CheckpointError(f"{self.directory}: {shown(' '.join(str(error).split()))}") from None
        if not isinstance(found, str):
            raise CheckpointError(f"{self.directory}: its chat template is a {type(found).__name__}, wanted text")
        return found

    @property
    def has_chat_template(self) -> bool:
        return bool(self._fast.chat_template)


def _tokenizer_of(vocabulary: Vocabulary, path: Path) -> Any:
    """transformers' tokenizer of a GGUF file's metadata."""
    from transformers import PreTrainedTokenizerFast

    where = f"{path}: no tokenizer can be built from its metadata"
    with _at_fault(lambda error: CheckpointError(f"{where} ({shown(str(error))})")):
        backend = Tokenizer.from_str(json.dumps(vocabulary.document, ensure_ascii=False))
        templates: Any = vocabulary.chat_templates
        if templates.keys() <= {"default"}:
            templates = templates.get("default")
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=templates, **vocabulary.special)


def write_tokenizer(source: Path, directory: Path) -> dict[str, str]:
    """Write the tokenizer of a GGUF file, its chat templates too, as a directory's files; their SHA-256 by name.

    Nothing for another source, or a file without a tokenizer; CheckpointError for one that is not read.
    """
    if not is_gguf(source):
        return {}
    metadata = GGUFFile.open(source).metadata
    if not has_tokenizer(metadata):
        return {}
    found = vocabulary_of_metadata(metadata, shown(str(source)))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **found.special}
    content = {"tokenizer.json": found.document, "tokenizer_config.json": settings}
    templates = {
        template_file(name, shown(str(source))): text.encode() for name, text in found.chat_templates.items()
    }
    if any(name.startswith(TEMPLATES + "/") for name in templates):
        make_directory(directory / TEMPLATES, exist_ok=True)
    hashes = {name: write_json(directory / name, value) for name, value in content.items()}
    return hashes | {name: write_bytes(directory / name, data) for name, data in templates.items()}


class _Refusal(CalibrationError):
    """One conversation is refused; the next one may not be."""


def _batches(texts: Sequence[str], characters: int) -> Iterator[list[str]]:
    """The texts in order, about so many characters at a time."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > characters:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


@dataclass(frozen=True)
class TokenWindows:
    """Full windows of token ids, int64 [windows, tokens], and where they come from."""

    ids: torch.Tensor
    text: str  # what the user asked for: a set's name or a file
    provenance: dict[str, Any]

    @cached_property
    def sha256(self) -> str:
        """Digest of the token ids and their shape."""
        shape = json.dumps(list(self.ids.shape)).encode()
        return hashlib.sha256(shape + self.ids.numpy().tobytes()).hexdigest()

    @property
    def builtin_windows(self) -> int:
        """Number of windows taken from the built-in set instead of the text."""
        return int(self.provenance.get("builtin", {}).get("windows", 0))

    @property
    def left_out(self) -> str:
        """A line on rows of the text that were no documents; empty where there were none."""
        rows, first = self.provenance.get("skipped_rows", 0), self.provenance.get("first_skipped", "")
        said = f"{self.text}: {rows} {'row' if rows == 1 else 'rows'} left out ({first}); --strict refuses them"
        return said if rows else ""

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "windows": self.ids.shape[0],
            "window_tokens": self.ids.shape[1],
            "tokens_sha256": self.sha256,
            **self.provenance,
        }


class TooShort(CalibrationError):
    """A text has fewer windows than are asked for."""


def check_length(length: int, limit: int, where: str) -> None:
    """Raise CalibrationError for windows longer than the model reads."""
    if length > limit:
        raise CalibrationError(
            f"{where}: windows of {length} tokens, the model reads {limit}",
            hint=f"--sequence-length {limit} or less",
        )


def check_windows(ids: torch.Tensor, vocab_size: int, limit: int, where: str) -> None:
    """Raise CalibrationError for ids outside the vocabulary or windows longer than the model reads."""
    check_length(ids.shape[1], limit, where)
    if ids.shape[1] < 2:
        raise CalibrationError(f"{where}: windows of {ids.shape[1]} token, wanted at least 2")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise CalibrationError(
            f"{where}: token id {high if high >= vocab_size else low} is outside the vocabulary of {vocab_size}",
            hint="the tokenizer belongs to another model",
        )


def pack_windows(
    documents: Sequence[Sequence[int]],
    separator: int,
    length: int,
    count: int | None,
    *,
    spread: int | None,
    where: str,
) -> torch.Tensor:
    """Join documents with `separator` between them and cut full windows [count, length], without padding.

    count None takes all there are. spread: seed for drawing windows from all over a longer text, or None for the
    first ones. Raises TooShort.
    """
    stream = np.fromiter(
        (t for k, ids in enumerate(documents) for t in ((separator, *ids) if k else ids)), dtype=np.int64
    )
    available = len(stream) // length
    if available == 0:
        raise TooShort(
            f"{where}: {len(stream)} tokens, shorter than one window of {length}",
            hint=f"--sequence-length {max(len(stream), 2)} or less, or more text",
        )
    wanted = available if count is None else count
    if wanted > available:
        raise TooShort(
            f"{where}: {counted(available, 'window')} of {length} tokens, {wanted} requested",
            hint=f"--num-samples {available}, or more text",
        )
    windows = stream[: available * length].reshape(available, length)
    if spread is None:
        picked = np.arange(wanted)
    else:
        picked = np.sort(np.random.default_rng(spread).choice(available, wanted, replace=False))
    return torch.from_numpy(windows[picked].copy())
