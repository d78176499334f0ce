"""Text to windows of token ids: packing, separators, limits, chat templates."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf_bytes import tiny_file
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.errors import CalibrationError, CheckpointError
from qwenq.text.tokens import ModelTokenizer, TokenWindows, check_length, check_windows, pack_windows

SEPARATOR = 99


def pack(documents, length, count=None, spread=None):
    return pack_windows(documents, SEPARATOR, length, count, spread=spread, where="text.txt")


def test_packing_by_hand() -> None:
    """Documents end to end with a separator between them; the tail that fills no window is left out; no padding."""
    assert pack([[1, 2, 3], [4], [5, 6, 7, 8, 9]], 4).tolist() == [[1, 2, 3, 99], [4, 99, 5, 6]]
    assert pack([[1, 2, 3, 4]], 2).tolist() == [[1, 2], [3, 4]]
    assert pack([[1, 2], [3, 4]], 5).tolist() == [[1, 2, 99, 3, 4]]
    assert pack([[1, 2, 3, 4]], 2).dtype == torch.int64


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 98), max_size=12), min_size=1, max_size=8),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(0, 5)),
)
def test_windows_are_pieces_of_the_joined_text(documents, length, spread) -> None:
    stream: list[int] = []
    for k, ids in enumerate(documents):
        stream += ([SEPARATOR] if k else []) + ids
    pieces = [stream[k : k + length] for k in range(0, len(stream) - length + 1, length)]
    if not pieces:
        with pytest.raises(CalibrationError, match="shorter than one window"):
            pack(documents, length, spread=spread)
        return
    assert pack(documents, length, spread=spread).tolist() == pieces
    half = max(1, len(pieces) // 2)
    some = pack(documents, length, half, spread).tolist()
    if spread is None:
        assert some == pieces[:half]
    else:
        at = iter(pieces)
        assert len(some) == half and all(piece in at for piece in some)  # in order, none twice


def test_windows_are_drawn_from_all_over_by_seed() -> None:
    text = [list(range(90)) * 10]
    drawn = {seed: pack(text, 9, 10, spread=seed)[:, 0].tolist() for seed in range(4)}
    assert drawn[0] == pack(text, 9, 10, spread=0)[:, 0].tolist()
    assert len({tuple(d) for d in drawn.values()}) == 4
    wide = pack([list(range(900))], 9, 10, spread=0)
    assert int(wide.max()) > 500 and int(wide.max()) - int(wide.min()) > 400
    assert pack([list(range(900))], 9, 10).tolist()[-1] == list(range(81, 90))


def test_too_short_and_too_many() -> None:
    with pytest.raises(CalibrationError) as caught:
        pack([[1, 2, 3]], 10)
    assert caught.value.message == "text.txt: 3 tokens, shorter than one window of 10"
    assert caught.value.hint == "--sequence-length 3 or less, or more text"
    with pytest.raises(CalibrationError) as caught:
        pack([[1] * 25], 10, 5)
    assert caught.value.message == "text.txt: 2 windows of 10 tokens, 5 requested"
    assert caught.value.hint == "--num-samples 2, or more text"
    with pytest.raises(CalibrationError, match="0 tokens, shorter than one window of 2"):
        pack([[]], 2)


def test_ids_and_lengths_are_checked() -> None:
    check_windows(torch.tensor([[0, 9]]), 10, 2, "x")
    with pytest.raises(CalibrationError) as caught:
        check_windows(torch.zeros(1, 9, dtype=torch.long), 10, 8, "x.npy")
    assert (caught.value.message, caught.value.hint) == (
        "x.npy: windows of 9 tokens, the model reads 8", "--sequence-length 8 or less",
    )  # fmt: skip
    check_length(8, 8, "x")
    with pytest.raises(CalibrationError, match="x: token id 10 is outside the vocabulary of 10"):
        check_windows(torch.tensor([[0, 10]]), 10, 8, "x")
    with pytest.raises(CalibrationError, match="x: token id -1 is outside the vocabulary of 10"):
        check_windows(torch.tensor([[-1, 3]]), 10, 8, "x")
    with pytest.raises(CalibrationError, match="x: windows of 1 token, wanted at least 2"):
        check_windows(torch.tensor([[3]]), 10, 8, "x")


def test_digest_is_of_ids_and_shape() -> None:
    ids = torch.arange(12)
    a, b = TokenWindows(ids.view(3, 4), "a", {}), TokenWindows(ids.view(4, 3), "a", {})
    assert a.sha256 != b.sha256 and a.sha256 == TokenWindows(ids.view(3, 4).clone(), "other", {}).sha256
    assert a.to_json() == {"text": "a", "windows": 3, "window_tokens": 4, "tokens_sha256": a.sha256}


# ---------------------------------------------------------------------- the model's own tokenizer


def test_encoding_adds_nothing(tiny: Path) -> None:
    tokenizer = ModelTokenizer(tiny)
    text = "def parse(line):\n    return line.split(',')  # é"
    (ids,) = tokenizer.encode([text])
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert ids == own.encode(text, add_special_tokens=False).ids and own.decode(ids) == text
    assert tokenizer.encode(["", text])[0] == []
    assert tokenizer.separator == 1021 == tokenizer.vocabulary["<|endoftext|>"]


def test_a_truncating_tokenizer_does_not_truncate(tiny: Path, tmp_path: Path) -> None:
    content = json.loads((tiny / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert ModelTokenizer(tmp_path).encode(["word " * 50]) == ModelTokenizer(tiny).encode(["word " * 50])


def test_chat_template_of_the_model(tiny: Path) -> None:
    tokenizer = ModelTokenizer(tiny)
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    )


def test_chatml_without_a_template(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    tokenizer = ModelTokenizer(tmp_path)
    assert not tokenizer.has_chat_template
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|im_end|>\n"


def test_a_template_that_refuses_is_one_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    template = "{{ raise_exception('roles\\nalternate') }}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CalibrationError, match=r"chat template refused a conversation \(roles alternate\)"):
        ModelTokenizer(tmp_path).render_chat([{"role": "user", "content": "Hi"}])


def test_a_directory_whose_name_is_not_utf8(tiny: Path, tmp_path: Path) -> None:
    """The library beneath takes paths in UTF-8 alone; the tokenizer's own files are not at fault."""
    place = tmp_path / os.fsdecode(b"model-\xff")
    shutil.copytree(tiny, place)
    with pytest.raises(CheckpointError, match="its name is not UTF-8, so transformers cannot open") as caught:
        ModelTokenizer(place).encode(["x"])
    assert caught.value.message.isprintable() and "tokenizer_config" not in caught.value.message


def test_no_tokenizer_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no tokenizer.json"):
        ModelTokenizer(tmp_path).encode(["x"])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer \("):
        ModelTokenizer(tmp_path).encode(["x"])


def test_the_separator_may_come_from_the_config(tiny: Path, tmp_path: Path) -> None:
    text = (tiny / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    for eos, wanted in ((7, 7), ([8, 9], 8)):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert ModelTokenizer(tmp_path).separator == wanted
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no end-of-text token in tokenizer.json or config.json"):
        assert ModelTokenizer(tmp_path).separator


def test_what_the_library_beneath_prints_goes_nowhere(model: Path, edit_json: Any, capfd: Any) -> None:
    """Names of options that it does not know, as they are in the file, and its panics."""
    token = {"content": "<x>", "special": True, "\x1b[31mred": True}
    edit_json(model / "tokenizer_config.json", added_tokens_decoder={"1000": token})
    ModelTokenizer(model).encode(["a"])
    assert capfd.readouterr() == ("", "")
    words = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]], "continuing_subword_prefix": "####"}
    edit_json(model / "tokenizer.json", model=words)
    with pytest.raises(CheckpointError):
        ModelTokenizer(model).encode(["a"])
    assert capfd.readouterr() == ("", "")
    print("heard again")
    assert capfd.readouterr().out == "heard again\n"


def test_memory_that_ends_as_a_bad_file_is_read_again_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(text: str) -> None:
        raise MemoryError

    (tmp_path / "tokenizer.json").write_text("{}")  # which transformers refuses for a reason of its own
    monkeypatch.setattr("qwenq.text.tokens.Tokenizer", SimpleNamespace(from_str=no_memory))
    with pytest.raises(MemoryError):
        ModelTokenizer(tmp_path).encode(["x"])


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "too many")], ids=["memory", "files"])
def test_of_a_gguf_file_too_faults_of_the_machine_are_its_own(
    error: Exception, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def panic(text: str) -> None:
        os.write(2, b"\x1b[31mred")
        raise error

    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_file(tiny).encode())
    monkeypatch.setattr("qwenq.text.tokens.Tokenizer", SimpleNamespace(from_str=panic))
    with pytest.raises(type(error)):
        ModelTokenizer(path).encode(["a"])
    assert capfd.readouterr() == ("", "")


def test_without_a_stdout(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`>&-`: then Python has no stream of that name."""
    monkeypatch.setattr(sys, "stdout", None)
    assert ModelTokenizer(tiny).encode(["a"])
