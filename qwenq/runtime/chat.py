"""Words to tokens and back for a running model: its chat template, its stop tokens, text as it is finished."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from qwenq.errors import CheckpointError, UsageError
from qwenq.io.json import inside, read_object
from qwenq.runtime.generate import Sampling
from qwenq.text.tokens import ModelTokenizer

Message = dict[str, str]
_GENERATION = "generation_config.json"
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


@dataclass(frozen=True)
class Chat:
    """The tokenizer of a checkpoint as a conversation needs it."""

    directory: Path
    vocab_size: int

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        return ModelTokenizer(self.directory)

    @property
    def has_template(self) -> bool:
        return self.tokenizer.has_chat_template

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """A conversation up to where the model answers. CalibrationError when the template refuses it."""
        return self.text_ids(self.tokenizer.render_chat(messages, answer=True))

    def text_ids(self, text: str) -> list[int]:
        """Plain text, as it stands."""
        return self.tokenizer.encode([text])[0]

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """End tokens of generation_config.json, config.json and, for a chat, the template's end of turn."""
        found: set[int] = set()
        for config in (self._generation, read_object(inside(self.directory, "config.json"))):
            ids = config.get("eos_token_id")
            found |= {i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int}
        ends = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")
        found |= {i for end in ends if (i := self.tokenizer.id_of(end)) is not None}
        return frozenset(found)

    def sampling(self, **asked: Any) -> Sampling:
        """The model's own generation_config.json, overridden by what is asked (None: not asked).

        UsageError for what is asked and cannot be, CheckpointError for what the file says so.
        """
        settings: dict[str, Any] = {}
        if self._generation.get("do_sample"):
            settings = {
                key: value
                for key in _SAMPLING
                if isinstance(value := self._generation.get(key), int | float) and not isinstance(value, bool)
            }
            settings.setdefault("temperature", 1.0)
            try:
                Sampling(**settings)
            except UsageError as error:  # the file's own, not what was asked
                raise CheckpointError(f"{self.directory / _GENERATION}: {error.message}", hint="mend it") from None
        return Sampling(**settings | {key: value for key, value in asked.items() if value is not None})

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of token ids as soon as it is whole characters; special tokens are left out."""
        decoder = DecodeStream(skip_special_tokens=True)
        for token in ids:
            if (text := self.tokenizer.step(decoder, token)) is not None:
                yield text

    @cached_property
    def _generation(self) -> dict[str, Any]:
        path = inside(self.directory, _GENERATION)
        return read_object(path) if path.is_file() else {}
