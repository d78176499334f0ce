"""Text to windows of token ids, with the model's own tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from qwenq.errors import CalibrationError, CheckpointError
from qwenq.io.json import inside, read_object, shown

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "tokenizer.model",
)  # fmt: skip
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>")
_MAX_TOKENIZER_BYTES = 200_000_000


@dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer of a checkpoint directory, read from `tokenizer.json` alone: no code of the model's is run."""

    directory: Path

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        path = inside(self.directory, "tokenizer.json")
        if not path.is_file():
            raise CheckpointError(
                f"{self.directory}: no tokenizer.json",
                hint="save the fast tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            )
        if path.stat().st_size > _MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too large for a tokenizer")
        try:
            return Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except BaseException as error:  # the library raises bare Exception for malformed files, and panics on some
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise CheckpointError(f"{path}: not a tokenizer ({shown(str(error))})") from None

    @cached_property
    def sha256(self) -> str:
        """Digest of `tokenizer.json`."""
        return hashlib.sha256(inside(self.directory, "tokenizer.json").read_bytes()).hexdigest()

    @property
    def vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    @cached_property
    def separator(self) -> int:
        """The token put between documents: the end-of-text token, else the config's eos_token_id."""
        for text in _SEPARATORS:
            if (token := self._tokenizer.token_to_id(text)) is not None:
                return int(token)
        eos = read_object(inside(self.directory, "config.json")).get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if not isinstance(eos, int):
            raise CheckpointError(f"{self.directory}: no end-of-text token in tokenizer.json or config.json")
        return eos

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without added special tokens."""
        try:
            self._tokenizer.no_truncation()
            return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            reason = shown(str(error))
            raise CheckpointError(f"{self.directory}: its tokenizer.json cannot encode ({reason})") from None

    def id_of(self, token: str) -> int | None:
        """The id of a token by its text."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def step(self, decoder: Any, token: int) -> str | None:
        """Feed one id to a DecodeStream of the tokenizers library: new whole characters, or None."""
        text: str | None = decoder.step(self._tokenizer, token)
        return text

    def render_chat(self, messages: list[dict[str, str]], *, answer: bool = False) -> str:
        """A conversation as the model's chat template writes it; ChatML when the checkpoint has no template.

        With `answer`, up to where the model's answer begins.
        """
        if self._chat is not None:
            try:
                return str(self._chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
            except Exception as error:  # whatever the template's own code raises
                reason = " ".join(str(error).split()) or type(error).__name__
                raise CalibrationError(
                    f"{self.directory}: its chat template refused a conversation ({reason})",
                    hint="plain `text` needs no template",
                ) from None
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        return "".join(turns) + ("<|im_start|>assistant\n" if answer else "")

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    @cached_property
    def _chat(self) -> Any:
        for name in TOKENIZER_FILES:
            inside(self.directory, name)  # transformers follows links anywhere
        config = self.directory / "tokenizer_config.json"
        jinja = self.directory / "chat_template.jinja"
        if not jinja.is_file() and not (config.is_file() and read_object(config).get("chat_template")):
            return None
        from transformers import PreTrainedTokenizerFast

        try:
            return PreTrainedTokenizerFast.from_pretrained(str(self.directory), local_files_only=True)
        except Exception as error:  # whatever a malformed tokenizer_config.json makes transformers raise
            reason = shown(" ".join(str(error).split()) or type(error).__name__)
            raise CheckpointError(f"{config}: not a tokenizer's configuration ({reason})") from None


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

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "windows": self.ids.shape[0],
            "window_tokens": self.ids.shape[1],
            "tokens_sha256": self.sha256,
            **self.provenance,
        }


def check_length(length: int, limit: int, where: str) -> None:
    """Raise CalibrationError for windows longer than the model reads."""
    if length > limit:
        raise CalibrationError(
            f"{where}: windows of {length} tokens, the model reads {limit}", hint=f"--sequence-length {limit} or less"
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
    first ones. Raises CalibrationError when the text is too short.
    """
    stream = np.fromiter(
        (t for k, ids in enumerate(documents) for t in ((separator, *ids) if k else ids)), dtype=np.int64
    )
    available = len(stream) // length
    if available == 0:
        raise CalibrationError(
            f"{where}: {len(stream)} tokens, shorter than one window of {length}",
            hint=f"--sequence-length {max(len(stream), 2)} or less, or more text",
        )
    wanted = available if count is None else count
    if wanted > available:
        raise CalibrationError(
            f"{where}: {available} windows of {length} tokens, {wanted} asked for",
            hint=f"--num-samples {available}, or more text",
        )
    windows = stream[: available * length].reshape(available, length)
    if spread is None:
        picked = np.arange(wanted)
    else:
        picked = np.sort(np.random.default_rng(spread).choice(available, wanted, replace=False))
    return torch.from_numpy(windows[picked].copy())
