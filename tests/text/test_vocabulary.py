"""Tokenizers as GGUF metadata: the same tokens as tokenizer.json's, both ways, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_bytes import entry, tiny_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qwenq.errors import CheckpointError
from qwenq.io.gguf import GGUFFile
from qwenq.text.tokens import ModelTokenizer, write_tokenizer
from qwenq.text.vocabulary import SPLITTINGS, metadata_of_tokenizer, vocabulary_of_metadata

TEXTS = (
    "one two  three\n\n\tfour", "école 12345 don't WE'LL",
    "日本語 😀 \u200b", "<|im_start|>user\nx<|im_end|>", " ",
)


def file_at(path: Path, tiny: Path, **changes: Any) -> Path:
    """The tiny model with entries of its tokenizer changed or, with None, left out."""
    file = tiny_file(tiny)
    for key, value in changes.items():
        name = f"tokenizer.{key}" if key.startswith("chat_template") else f"tokenizer.ggml.{key}"
        file.entries = [each for each in file.entries if each[0] != name]
        file.entries += [] if value is None else [entry(name, value)]
    path.write_bytes(file.encode())
    return path


def test_the_same_tokens_as_the_directory(tiny: Path, tmp_path: Path) -> None:
    ours, theirs = ModelTokenizer(file_at(tmp_path / "m.gguf", tiny)), ModelTokenizer(tiny)
    assert ours.vocabulary == theirs.vocabulary
    assert ours.encode(TEXTS) == theirs.encode(TEXTS)
    assert ours.encode(TEXTS, special=True) == theirs.encode(TEXTS, special=True)
    assert (ours.separator, ours.eos) == (theirs.separator, theirs.eos)
    chat = [{"role": "user", "content": "x"}]
    assert ours.render_chat(chat, answer=True) == theirs.render_chat(chat, answer=True)
    assert "".join(ours.stream(ours.encode([TEXTS[2]])[0])) == TEXTS[2]


def test_there_and_back(tiny: Path, tmp_path: Path) -> None:
    """metadata of tokenizer.json, and tokenizer.json of that: the same ids; a directory written of it, too."""
    metadata = metadata_of_tokenizer(tiny, 1030)
    assert metadata["tokenizer.ggml.tokens"][1024:] == [f"[PAD{k}]" for k in range(1024, 1030)]
    assert metadata["tokenizer.ggml.token_type"][1020:] == [1, 3, 3, 3, *[5] * 6]
    found = vocabulary_of_metadata(metadata, "x")
    again = Tokenizer.from_str(json.dumps(found.document))
    original = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert again.get_vocab() == original.get_vocab()  # unused tokens are none of its own
    for text in TEXTS:
        assert again.encode(text).ids == original.encode(text).ids
    written = write_tokenizer(file_at(tmp_path / "m.gguf", tiny), tmp_path)
    assert set(written) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert ModelTokenizer(tmp_path).encode(TEXTS) == ModelTokenizer(tiny).encode(TEXTS)


def with_templates(path: Path, tiny: Path, **templates: Any) -> Path:
    """The tiny model with chat templates under their names besides its own."""
    file = tiny_file(tiny)
    file.entries += [entry(f"tokenizer.chat_template.{name}", text) for name, text in templates.items()]
    path.write_bytes(file.encode())
    return path


def test_named_templates_become_the_files_that_transformers_keeps(tiny: Path, tmp_path: Path) -> None:
    path = with_templates(tmp_path / "m.gguf", tiny, tool_use="T {{ tools | length }}", rag="R")
    out = tmp_path / "out"
    out.mkdir()
    written = write_tokenizer(path, out)
    assert {name for name in written if "template" in name} == {
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja",
    }  # fmt: skip
    loaded = PreTrainedTokenizerFast.from_pretrained(out)
    assert set(loaded.chat_template) == {"default", "tool_use", "rag"}
    assert loaded.chat_template["rag"] == "R"
    again = Path(tmp_path / "saved")
    loaded.save_pretrained(again)
    for name in written:
        if name.endswith(".jinja"):
            assert (again / name).read_bytes() == (out / name).read_bytes()
    chat = [{"role": "user", "content": "x"}]
    for tools in ((), [{"type": "function"}]):  # with tools the template of that name, in the file and the directory
        ours, theirs = (ModelTokenizer(each).render_chat(chat, tools=tools) for each in (path, out))
        assert ours == theirs and ours == loaded.apply_chat_template(chat, tools=list(tools) or None, tokenize=False)
    assert ours == "T 1"


@pytest.mark.parametrize("name", ["../../x", "a/b", ".hidden", "x" * 65, "a b", ""])
def test_a_template_whose_name_is_no_file_is_not_written(name: str, tiny: Path, tmp_path: Path) -> None:
    path = with_templates(tmp_path / "m.gguf", tiny, **{name: "x"})
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="a chat template's name is"):
        write_tokenizer(path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("split", SPLITTINGS, ids=lambda split: split.names[0])
def test_every_splitting_goes_both_ways(split: Any, model: Path, edit_json: Any) -> None:
    steps = {"type": "Sequence", "pretokenizers": split.steps}
    document = edit_json(model / "tokenizer.json", pre_tokenizer=steps)
    metadata = metadata_of_tokenizer(model, 1024)
    assert metadata["tokenizer.ggml.pre"] == split.names[0]
    found = vocabulary_of_metadata(metadata, "x").document
    assert found["pre_tokenizer"] == document["pre_tokenizer"]
    Tokenizer.from_str(json.dumps(found))


def test_llama_3_begins_with_its_token(tiny: Path, tmp_path: Path) -> None:
    path = file_at(tmp_path / "m.gguf", tiny, pre="llama-bpe", add_bos_token=None)
    tokenizer = ModelTokenizer(path)
    assert tokenizer.encode(["one"], special=True)[0][0] == 1021
    assert tokenizer.encode(["one"])[0][0] != 1021
    silent = ModelTokenizer(file_at(tmp_path / "n.gguf", tiny, pre="llama-bpe", add_bos_token=False))
    assert silent.encode(["one"], special=True) == silent.encode(["one"])


def test_what_is_put_around_a_text_goes_both_ways(tiny: Path, tmp_path: Path) -> None:
    for bos, eos in ((True, True), (False, True), (True, False), (False, False)):
        path = file_at(tmp_path / "m.gguf", tiny, add_bos_token=bos, add_eos_token=eos)
        (ids,) = ModelTokenizer(path).encode(["one"], special=True)
        (plain,) = ModelTokenizer(path).encode(["one"])
        assert ids == [*[1021] * bos, *plain, *[1023] * eos]
        out = tmp_path / f"{bos}{eos}"
        out.mkdir()
        write_tokenizer(path, out)
        (out / "config.json").write_text("{}")
        found = metadata_of_tokenizer(out, 1024)
        assert [found[f"tokenizer.ggml.add_{name}_token"] for name in ("bos", "eos")] == [bos, eos]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"model": None}, "no tokenizer in its metadata"),
    "SentencePiece": ({"model": "llama"}, "is 'llama', wanted gpt2: only byte-level BPE"),
    "WordPiece": ({"model": "bert"}, "is 'bert', wanted gpt2"),
    "unknown splitting": ({"pre": "tekken"}, "pre is 'tekken', wanted one of qwen2, llama-bpe"),
    "no splitting": ({"pre": None}, "pre is None, wanted one of"),
    "no merges": ({"merges": None}, "merges is None, wanted an array of texts"),
    "merges of nothing": ({"merges": ["zzz yyy"]}, "has zzz yyy, not two tokens that form a third"),
    "merges of one": ({"merges": ["ab"]}, "has ab, not two tokens that form a third"),
    "a merge twice": ({"merges": ["Ġ Ġ", "Ġ Ġ"]}, "has 1 merges twice"),
    "types for others": ({"token_type": [1, 1]}, "2 token types for 1024 tokens"),
    "an id too large": ({"eos_token_id": 5000}, "eos_token_id is 5000, wanted the id of one of 1024 tokens"),
    "tokens twice": ({"tokens": ["a"] * 1024}, "has a twice, as 0 and 1"),
    "a named template of 1 MB": ({"chat_template.rag": "x" * 1_000_000}, "chat_template.rag is no text of at most"),
    "a template of 1 MB": ({"chat_template": "x" * 1_000_000}, "chat_template is no text of at most"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tiny: Path, tmp_path: Path) -> None:
    changes, words = REFUSED[case]
    path = file_at(tmp_path / "m.gguf", tiny, **changes)
    with pytest.raises(CheckpointError, match=words) as error:
        ModelTokenizer(path).encode(["x"])
    assert error.value.message.isprintable()


def test_a_template_that_breaks_out_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Templates of a GGUF file are rendered where all templates are: in time, memory and a sandbox."""
    path = file_at(tmp_path / "m.gguf", tiny, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(Exception, match="chat template refused") as error:
        ModelTokenizer(path).render_chat([{"role": "user", "content": "x"}])
    assert "unsafe" in str(error.value) or "access" in str(error.value)


def test_what_cannot_be_written(model: Path) -> None:
    path = model / "tokenizer.json"
    document = json.loads(path.read_bytes())
    for change, words in (
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "of type Unigram, wanted byte-level BPE"),
        ({"decoder": {"type": "Metaspace"}}, "of type BPE, wanted byte-level BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre-tokenizer has no name known here"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 5}}, "pretokenizers is 5, wanted a list"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}},
         "its normalizer of type Lowercase changes text"),
        ({"decoder": {"type": "Sequence", "decoders": "x"}}, "decoders is 'x', wanted a list"),
        ({"post_processor": {"type": "Sequence", "processors": {"a": 1}}}, "processors is {'a': 1}, wanted a list"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [5]}}, "single begins with 5, wanted an object"),
        ({"model": document["model"] | {"merges": None}}, "merges is None, wanted a list"),
        ({"model": document["model"] | {"merges": [1]}}, "merges has 1, wanted two tokens"),
        ({"model": document["model"] | {"merges": [[1, 2]]}}, r"merges has \[1, 2\], wanted two tokens"),
    ):
        path.write_text(json.dumps(document | change))
        with pytest.raises(CheckpointError, match=words):
            metadata_of_tokenizer(model, 1024)
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="the embedding has 1000 rows"):
        metadata_of_tokenizer(model, 1000)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        metadata_of_tokenizer(model, 1024)


@pytest.mark.parametrize(
    ("text", "type_"), [("<｜User｜>", 3), ("<|x|>", 3), ("<unused7>", 3), ("<mask>", 3), ("<think>", 4), ("<a>", 4)]
)
def test_tokens_that_look_special_are_control_tokens(text: str, type_: int, model: Path) -> None:
    """Though their publisher did not mark them so, as DeepSeek's of Qwen's distilled models: llama.cpp's converter."""
    document = json.loads((model / "tokenizer.json").read_bytes())
    document["added_tokens"].append({"id": 1024, "content": text, "special": False})
    (model / "tokenizer.json").write_text(json.dumps(document))
    found = metadata_of_tokenizer(model, 1030)
    assert found["tokenizer.ggml.tokens"][1024] == text and found["tokenizer.ggml.token_type"][1024] == type_


def test_tokens_that_tokenizer_config_alone_has(model: Path, edit_json: Any) -> None:
    """Those that training added, beside the base model's tokenizer.json: transformers reads them."""
    settings = model / "tokenizer_config.json"
    listed = json.loads(settings.read_text())["added_tokens_decoder"]
    more = {"1024": ("<tool>", True), "1025": ("<think>", False), "1023": ("<|im_end|>", True), "7": ("'", True)}
    listed |= {number: {"content": text, "special": special} for number, (text, special) in more.items()}
    edit_json(settings, added_tokens_decoder=listed, additional_special_tokens=["<tool>"])
    theirs = PreTrainedTokenizerFast.from_pretrained(str(model))
    found = metadata_of_tokenizer(model, 1030)
    for text, type_ in (("<tool>", 3), ("<think>", 4), ("<|im_end|>", 3), ("'", 3)):
        number = theirs.convert_tokens_to_ids(text)
        assert found["tokenizer.ggml.tokens"][number] == text and found["tokenizer.ggml.token_type"][number] == type_
    again = Tokenizer.from_str(json.dumps(vocabulary_of_metadata(found, "x").document))
    for text in ("a<tool>b <think>", "it's"):
        assert again.encode(text).ids == theirs.encode(text, add_special_tokens=False)
    for changes, words in (
        ({"added_tokens_decoder": listed | {"1029": {"content": "<x>"}}}, "no token '<x>', which .* have as 1029"),
        ({"additional_special_tokens": ["<y>"]}, "no token '<y>', which the files beside it have"),
        ({"extra_special_tokens": {"image_token": {"content": "<z>"}}}, "no token '<z>'"),
    ):
        edit_json(settings, added_tokens_decoder=listed, additional_special_tokens=None, extra_special_tokens=None)
        edit_json(settings, **changes)
        with pytest.raises(CheckpointError, match=words):
            metadata_of_tokenizer(model, 1030)


@pytest.mark.parametrize("named", ["<|im_start|>", {"content": "<|im_start|>", "lstrip": False}, None])
def test_special_tokens_of_the_older_files(named: Any, model: Path, edit_json: Any) -> None:
    """special_tokens_map.json and added_tokens.json, as transformers wrote them for years: read unless
    tokenizer_config.json lists the added tokens, and then before it.
    """
    more = {"eos_token": named, "pad_token": "<tool>"}
    (model / "special_tokens_map.json").write_text(json.dumps(more))
    (model / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 1023, "<tool>": 1024, "<think>": 1025}))
    for name in ("config.json", "generation_config.json"):
        edit_json(model / name, eos_token_id=None, bos_token_id=None)
    settings = model / "tokenizer_config.json"
    listed = json.loads(settings.read_text())["added_tokens_decoder"]
    found = metadata_of_tokenizer(model, 1030)
    assert found["tokenizer.ggml.eos_token_id"] == 1023 and found["tokenizer.ggml.tokens"][1024] == "[PAD1024]"
    settings.write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(model))
    found = metadata_of_tokenizer(model, 1030)
    assert found.get("tokenizer.ggml.eos_token_id") == theirs.eos_token_id == ModelTokenizer(model).eos
    assert found["tokenizer.ggml.padding_token_id"] == theirs.pad_token_id == 1024
    types = {number: 3 if token.special else 4 for number, token in theirs.added_tokens_decoder.items()}
    assert types == {1021: 3, 1022: 3, 1023: 3, 1024: 3, 1025: 4}
    for number, type_ in types.items():
        assert found["tokenizer.ggml.tokens"][number] == theirs.convert_ids_to_tokens(number)
        assert found["tokenizer.ggml.token_type"][number] == type_
    (model / "added_tokens.json").write_text(json.dumps({"<late>": 1029}))
    with pytest.raises(CheckpointError, match="no token '<late>', which the files beside it have as 1029"):
        metadata_of_tokenizer(model, 1030)
    settings.write_text(json.dumps({"added_tokens_decoder": listed}))  # which says all
    assert "tokenizer.ggml.eos_token_id" not in metadata_of_tokenizer(model, 1030)


def templates_of(directory: Path) -> dict[str, Any]:
    """Those in the metadata, as llama.cpp looks for them: by "default" the one without a name."""
    metadata = metadata_of_tokenizer(directory, 1024)
    found = {key: value for key, value in metadata.items() if key.startswith("tokenizer.chat_template")}
    names = found.pop("tokenizer.chat_templates", [])
    assert set(found) - {"tokenizer.chat_template"} == {f"tokenizer.chat_template.{name}" for name in names}
    return {key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default": found[key] for key in found}


def test_every_chat_template_is_written(model: Path, edit_json: Any) -> None:
    """A list of tokenizer_config.json, chat_template.jinja and the files of further ones, in any combination."""
    settings, more = model / "tokenizer_config.json", model / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("RAG")
    edit_json(settings, chat_template="usual")
    assert templates_of(model) == {"default": "usual", "rag": "RAG"}
    edit_json(settings, chat_template=[{"name": "default", "template": "usual"}, {"name": "tool_use", "template": "T"},
                                       {"name": "rag", "template": "old"}])  # fmt: skip
    assert templates_of(model) == {"default": "usual", "tool_use": "T", "rag": "RAG"}
    (model / "chat_template.jinja").write_text("file")
    assert templates_of(model) == {"default": "file", "tool_use": "T", "rag": "RAG"}
    (more / "rag.jinja").unlink()
    assert templates_of(model) == {"default": "file", "tool_use": "T", "rag": "old"}
    for name in ("\udcff", "x" * 65):  # as Python spells a byte that is no UTF-8
        (more / f"{name}.jinja").write_text("x")
        with pytest.raises(CheckpointError, match="wanted at most 64 printable characters") as error:
            templates_of(model)
        assert error.value.message.isprintable()
        (more / f"{name}.jinja").unlink()


def test_metadata_survives_the_file(tiny: Path, tmp_path: Path) -> None:
    found = GGUFFile.open(file_at(tmp_path / "m.gguf", tiny)).metadata
    ours = metadata_of_tokenizer(tiny, 1024)
    assert {key: found[key] for key in ours if key in found} == {key: ours[key] for key in ours if key in found}
    assert set(ours) - set(found) == {"tokenizer.ggml.padding_token_id", "tokenizer.ggml.add_eos_token"}
