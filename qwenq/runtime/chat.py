"""Words to tokens and back for a running model: its chat template, its stop tokens, text as it is finished."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwenq.checkpoint.contents import read_config
from qwenq.errors import CheckpointError, UsageError
from qwenq.io.gguf import GGUFFile, is_gguf
from qwenq.io.json import inside, read_object, shown
from qwenq.model.metadata import GENERATION_NAME, generation_of_metadata
from qwenq.runtime.generate import Sampling
from qwenq.text.conversation import Message
from qwenq.text.tokens import ModelTokenizer

_MOST = {"temperature": 1000, "top_p": 1, "top_k": 1 << 31, "min_p": 1, "repetition_penalty": 100}
_DRAWS = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0}  # of no meaning unless tokens are drawn; none: greedy
_LIMITS = {"max_new_tokens": "usual_new_tokens", "max_length": "usual_length"}  # the second without the first alone
# Settings of transformers' GenerationConfig that change an answer and are not done here, with what asks for nothing.
_UNDONE: Mapping[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "bad_words_ids": ([],),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "sequence_bias": ({}, []), "exponential_decay_length_penalty": (), "encoder_repetition_penalty": (1,),
    "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0,), "typical_p": (1,), "epsilon_cutoff": (0,),
    "eta_cutoff": (0,), "top_h": (), "guidance_scale": (1,), "min_length": (0,), "min_new_tokens": (0,),
    "stop_strings": ([],), "watermarking_config": (), "dola_layers": (), "constraints": (), "force_words_ids": (),
}  # fmt: skip


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

    def prompt_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """A conversation up to where the model answers, tokens as the template writes them.

        settings: what the template is told beside it (`chat_template_kwargs`). CalibrationError for what the template
        refuses or would leave out, and for messages that are none.
        """
        text = self.tokenizer.render_chat(messages, tools=tools, settings=settings, answer=True)
        return self.tokenizer.encode([text])[0]

    def text_ids(self, text: str) -> list[int]:
        """Plain text, begun as the tokenizer begins one: with a BOS token, if its post-processor adds that."""
        return self.tokenizer.encode([text], special=True)[0]

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """End tokens of generation_config.json, config.json and the tokenizer, and the usual ends of a turn."""
        found: set[int] = set()
        for config in (self._generation, read_config(self.directory)):
            ids = config.get("eos_token_id")
            found |= {self._token(i) for i in (ids if isinstance(ids, list) else [ids]) if i is not None}
        ends = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")
        found |= {i for end in ends if (i := self.tokenizer.id_of(end)) is not None}
        return frozenset(found | ({self.tokenizer.eos} if self.tokenizer.eos is not None else set()))

    def sampling(self, **asked: Any) -> Sampling:
        """The model's own generation_config.json, overridden by what is asked (None: not asked).

        Tokens are drawn, with all that the file says of it, if it has `do_sample` or if what is asked means drawing; at
        a temperature of 1 where none is named, as OpenAI, vLLM and transformers have it.

        UsageError for what is asked and cannot be, CheckpointError for what the file says so.
        """
        for key, unasked in _UNDONE.items():
            value = self._generation.get(key)
            if value is not None and value not in unasked:
                raise CheckpointError(
                    f"{self._settings_file}: {key} is {shown(repr(value), 40)}, which is not supported",
                    hint=f"remove {key} from it to sample without it",
                )
        asked = {key: value for key, value in asked.items() if value is not None}
        drawn = any(asked.get(key, greedy) != greedy for key, greedy in _DRAWS.items())
        draws = drawn or bool(self._generation.get("do_sample"))
        known = [key for key in _MOST if draws or key not in _DRAWS]
        settings: dict[str, Any] = {key: self._setting(key) for key in known if self._generation.get(key) is not None}
        if draws:
            settings.setdefault("temperature", 1.0)
        for key in [key for key in _LIMITS if self._generation.get(key) is not None][:1]:
            settings[_LIMITS[key]] = self._limit(key)
        try:
            Sampling(**settings)
        except UsageError as error:  # the file's own, not what was asked
            raise CheckpointError(f"{self._settings_file}: {error.message}", hint="fix it") from None
        return Sampling(**settings | asked)

    def stream(self, ids: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
        """Text of token ids as soon as it is whole characters, special tokens left out, following `prompt`."""
        return self.tokenizer.stream(ids, prompt)

    def _setting(self, key: str) -> int | float:
        """A number of generation_config.json, `top_k` as a whole one however it is written."""
        value, path = self._generation[key], self._settings_file
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{path}: {key} is {shown(repr(value))}, wanted a number", hint="fix it")
        if abs(value) > _MOST[key] or (key == "top_k" and value != int(value)):
            wanted = f"{'a whole number' if key == 'top_k' else 'a number'} of at most {_MOST[key]:,}"
            raise CheckpointError(f"{path}: {key} is {shown(repr(value), 40)}, wanted {wanted}", hint="fix it")
        return max(0, int(value)) if key == "top_k" else float(value)  # -1 is vLLM's word for all

    def _limit(self, key: str) -> int:
        """A number of tokens of generation_config.json."""
        value, path = self._generation[key], self._settings_file
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < 1:
            raise CheckpointError(
                f"{path}: {key} is {shown(repr(value), 40)}, wanted a whole number from 1 on", hint="fix it"
            )
        return int(value)

    def _token(self, value: Any) -> int:
        """A token id of a configuration, however its number is written."""
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise CheckpointError(
                f"{self.directory}: eos_token_id has {shown(repr(value), 40)}, wanted token ids",
                hint="answers would never end: fix generation_config.json and config.json",
            )
        return int(value)

    @cached_property
    def _generation(self) -> dict[str, Any]:
        if is_gguf(self.directory):
            return generation_of_metadata(GGUFFile.open(self.directory).metadata, read_config(self.directory))
        path = inside(self.directory, GENERATION_NAME)
        return read_object(path) if path.is_file() else {}

    @property
    def _settings_file(self) -> Path:
        """Where the model's own settings are."""
        return self.directory if is_gguf(self.directory) else self.directory / GENERATION_NAME
