"""A running model's tokenizer: its end tokens, its generation settings, plain text against chats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_bytes import entry, tiny_file
from tokenizers import Tokenizer, processors

from qwenq.errors import CheckpointError
from qwenq.runtime.chat import Chat
from qwenq.runtime.generate import Sampling, new_tokens, next_token


def test_an_end_token_that_only_the_tokenizer_names(model: Path, edit_json: Any) -> None:
    content = (model / "tokenizer.json").read_text().replace("<|im_end|>", "<|turn_end|>")
    (model / "tokenizer.json").write_text(content)
    settings = (model / "tokenizer_config.json").read_text().replace("<|im_end|>", "<|turn_end|>")
    (model / "tokenizer_config.json").write_text(settings)
    edit_json(model / "config.json", eos_token_id=1021)
    (model / "generation_config.json").unlink(missing_ok=True)
    assert Chat(model, 1024).stop_ids == {1021, 1023}


def test_plain_text_begins_with_bos_and_a_chat_as_its_template_says(model: Path) -> None:
    own = Tokenizer.from_file(str(model / "tokenizer.json"))
    own.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 1021)]
    )
    own.save(str(model / "tokenizer.json"))
    chat = Chat(model, 1024)
    assert chat.text_ids("The sea") == own.encode("The sea").ids and chat.text_ids("The sea")[0] == 1021
    prompt = chat.prompt_ids([{"role": "user", "content": "Hi"}])
    assert 1021 not in prompt and prompt[0] == 1022


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"top_k": 20.0}, {"top_k": 20}),
        ({"top_k": 20, "top_p": 1, "temperature": 1}, {"top_k": 20, "top_p": 1.0, "temperature": 1.0}),
        ({"top_k": -1, "min_p": 0.05}, {"top_k": 0, "min_p": 0.05}),  # vLLM's word for all of them
        ({"do_sample": False, "temperature": 0.7, "min_p": 0.1}, {"temperature": 0.0, "min_p": 0.0}),
        ({"do_sample": False, "repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"no_repeat_ngram_size": 0, "num_beams": 1, "bad_words_ids": None, "max_length": 9, "chat_format": "chatml"},
         {"temperature": 1.0}),
        ({"top_k": None, "top_p": 1e-320}, {"top_k": 0, "top_p": 1e-320, "temperature": 1.0}),
    ],
)
def test_generation_settings_however_they_are_written(settings: Any, wanted: Any, model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True} | settings))
    found = Chat(model, 1024).sampling()
    assert {key: getattr(found, key) for key in wanted} == wanted and type(found.top_k) is int
    token = next_token(torch.tensor([0.0, 3.0, 1.0, 2.0]), [0], found, torch.Generator().manual_seed(0))
    assert 0 <= token < 4 and (found.top_p > 0.5 or token == 1)


@pytest.mark.parametrize("sampling", [{}, {"temp": 0.0}, {"penalty_repeat": 1.1}])
def test_end_tokens_and_sampling_of_a_gguf_file(sampling: Any, tiny: Path, tmp_path: Path) -> None:
    file = tiny_file(tiny)
    plain = Chat(file.write(tmp_path / "plain.gguf"), 1024)
    ends = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 1023}
    added = ends | {f"general.sampling.{key}": value for key, value in sampling.items()}
    file.entries += [entry(key, value) for key, value in added.items()]
    chat = Chat(file.write(tmp_path / "m.gguf"), 1024)
    assert 1023 in plain.stop_ids and chat.stop_ids == plain.stop_ids | {7}
    wanted = {"temperature": 0.0, "repetition_penalty": sampling.get("penalty_repeat", 1.0)}
    assert chat.sampling() == Sampling(**wanted) and plain.sampling() == Sampling()
    bad = [entry("general.sampling.top_p", 1.5), entry("general.sampling.temp", "hot")]
    for line in bad:
        broken = replace(file, entries=[each for each in file.entries if each[0] != line[0]] + [line])
        path = broken.write(tmp_path / "bad.gguf")
        with pytest.raises(CheckpointError, match=f"^{path}: (top_p is 1.5|temperature is 'hot')"):
            Chat(path, 1024).sampling()


@pytest.mark.parametrize(
    ("file", "asked", "wanted"),
    [
        ({}, {"top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({}, {"top_k": 40, "min_p": None}, {"temperature": 1.0, "top_k": 40}),
        ({}, {"min_p": 0.05}, {"temperature": 1.0, "min_p": 0.05}),
        ({}, {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 3, "repetition_penalty": 1.1}, {"temperature": 0.0}),
        ({}, {"top_p": 0.9, "temperature": 0.0}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {"top_p": 0.9}, {"temperature": 0.6, "top_k": 20}),
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 20}),
        ({"do_sample": False, "top_k": 20}, {"temperature": 0.0}, {"temperature": 0.0, "top_k": 0}),
    ],
)
def test_asking_for_a_draw_draws(file: Any, asked: Any, wanted: Any, model: Path) -> None:
    """Without a temperature there was none, and top_p, top_k and min_p did nothing."""
    (model / "generation_config.json").write_text(json.dumps(file))
    found = Chat(model, 1024).sampling(**asked)
    assert {key: getattr(found, key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("file", "prompt", "wanted"),
    [
        ({}, 10, 512), ({"max_new_tokens": 2048}, 10, 2048), ({"max_new_tokens": 7.0}, 10, 7),
        ({"max_new_tokens": 2048}, 3000, 1096), ({"max_length": 100}, 10, 90), ({"max_length": 100}, 200, 1),
        ({"max_length": 8000}, 10, 512), ({"max_length": 100, "max_new_tokens": 300}, 10, 300),
    ],
)  # fmt: skip
def test_length_of_an_answer_where_none_is_asked_for(file: Any, prompt: int, wanted: int, model: Path) -> None:
    """In a context of 4,096: the model's own number, which what is asked for replaces."""
    (model / "generation_config.json").write_text(json.dumps(file))
    chat = Chat(model, 1024)
    assert new_tokens(prompt, chat.sampling(), 4096) == wanted
    assert new_tokens(prompt, chat.sampling(max_new_tokens=20), 4096) == 20
    for wrong in (0, -1, 2.5, "20", True):
        (model / "generation_config.json").write_text(json.dumps({"max_new_tokens": wrong}))
        with pytest.raises(CheckpointError, match=r"max_new_tokens is .*, wanted a whole number from 1 on"):
            Chat(model, 1024).sampling()


@pytest.mark.parametrize(
    ("key", "value"),
    [("no_repeat_ngram_size", 3), ("suppress_tokens", [1]), ("num_beams", 4), ("stop_strings", ["x"]),
     ("typical_p", 0.9), ("forced_eos_token_id", 5), ("min_new_tokens", 10), ("guidance_scale", 1.5)],
)  # fmt: skip
def test_settings_that_change_an_answer_and_are_not_done_are_refused_by_name(key: str, value: Any, model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, key: value}))
    with pytest.raises(CheckpointError, match=f"{key} is .*, which is not supported") as caught:
        Chat(model, 1024).sampling(temperature=0.5)
    assert caught.value.hint == f"remove {key} from it to sample without it"


def test_end_tokens_however_their_numbers_are_written(model: Path, edit_json: Any) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7.0, 9]}))
    assert {7, 9} <= Chat(model, 1024).stop_ids
    for wrong in ("1023", [1.5], True, [[7]]):
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(CheckpointError, match=r"eos_token_id has .*, wanted token ids") as caught:
            _ = Chat(model, 1024).stop_ids
        assert "would never end" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('"top_k": 50.5', "top_k is 50.5, wanted a whole number of at most"),
        ('"top_k": ' + "9" * 3000, "JSON holds a number of 3000 digits, more than 100"),
        ('"top_k": ' + "9" * 5000, "JSON holds a number of 5000 digits, more than 100"),
        ('"top_k": "20"', "top_k is '20', wanted a number"),
        ('"top_k": true', "top_k is True, wanted a number"),
        ('"temperature": 1e14', "temperature is 100000000000000.0, wanted a number of at most 1,000"),
        ('"temperature": -1', "temperature is -1.0, wanted 0 or more"),
        ('"top_p": 0', "top_p is 0.0, wanted more than 0"),
        ('"repetition_penalty": [1]', r"repetition_penalty is \[1\], wanted a number"),
    ],
)
def test_absurd_generation_settings_are_one_line(settings: str, message: str, model: Path) -> None:
    (model / "generation_config.json").write_text('{"do_sample": true, ' + settings + "}")
    with pytest.raises(CheckpointError, match=message) as caught:
        Chat(model, 1024).sampling()
    assert len(caught.value.message) < 300
    assert Sampling()  # and without the file's settings there are others
