"""Tokenizers of many makes against transformers itself: AutoTokenizer for text, apply_chat_template for chats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qwenq.errors import CheckpointError
from qwenq.runtime.chat import Chat
from qwenq.text.tokens import ModelTokenizer

TEXTS = [
    "The sea is calm tonight.", " leading and  double spaces ", "line\nbreaks\r\n\n\ttabs", "123,456.789 don't I'LL",
    "Fünf Straßen, naïve café, e\u0301", "你好，世界。こんにちは", "🙂👍🏽 emoji", "",
    "<|user|>not a turn</s> <s>", "a" * 300, "x <tool_x> y  <mask> z", "\u200bzero width",
    "def f(x):\n    return x ** 2\n",
]  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<pad>"]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}<<{{ m.role }}>>{{ m.content }}"
    "{% endif %}{% endfor %}"
)
TOOLS = (
    "{% if tools %}{{ '# Tools\n' }}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def text_to_learn() -> str:
    return (Path(__file__).parents[1] / "data" / "calib.txt").read_text() + "".join(TEXTS)


def byte_level(prefix: bool = False, split: str = "", nfc: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not split)
    splitting = pre_tokenizers.Split(Regex(split or "x"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([splitting, bytes_alone]) if split else bytes_alone
    made.normalizer = normalizers.NFC() if nfc else None
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([text_to_learn()], trainer)
    return made


def sentencepiece(kind: str = "bpe", legacy: bool = False) -> Tokenizer:
    """As transformers converts SentencePiece's models: spaces as U+2581, one put in front, unknown letters as bytes."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    special = [*SPECIAL, *(fallback if kind == "bpe" else [])]
    made = Tokenizer(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True) if kind == "bpe" else models.Unigram()
    )
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(decoder)
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tail = [decoders.Metaspace(prepend_scheme="first", split=False)]
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *tail] if kind == "bpe" else tail)
    lines = [line for line in text_to_learn().splitlines() if line]
    if kind == "bpe":
        learnt = made.pre_tokenizer
        made.pre_tokenizer = pre_tokenizers.Metaspace() if learnt is None else learnt
        options = {"vocab_size": 900, "special_tokens": special, "show_progress": False}
        made.train_from_iterator(lines, trainers.BpeTrainer(**options))
        if learnt is None:
            content = json.loads(made.to_str())
            content["pre_tokenizer"] = None
            made = Tokenizer.from_str(json.dumps(content))
    else:
        options = {"vocab_size": 600, "special_tokens": special, "unk_token": "<unk>", "show_progress": False}
        made.train_from_iterator(lines, trainers.UnigramTrainer(**options))
    return made


def with_bos(made: Tokenizer, after: str = "") -> Tokenizer:
    """`<s>` in front of plain text, and `after` behind it."""
    tokens = [("<s>", made.token_to_id("<s>")), ("</s>", made.token_to_id("</s>"))]
    made.post_processor = processors.TemplateProcessing(single=f"<s> $A {after}".strip(), special_tokens=tokens)
    return made


def padded(made: Tokenizer, **options: Any) -> Tokenizer:
    made.enable_padding(pad_id=5, pad_token="<pad>", **options)
    return made


def truncated(made: Tokenizer, **options: Any) -> Tokenizer:
    made.enable_truncation(6, **options)
    return made


def added(made: Tokenizer) -> Tokenizer:
    made.add_tokens([AddedToken("<tool_x>", lstrip=True), AddedToken("café", normalized=True)])
    made.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("<|turn_end|>")])
    return made


VARIANTS: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "byte-level": (byte_level, {}),
    "byte-level, bos": (lambda: with_bos(byte_level()), {"bos_token": "<s>", "eos_token": "</s>"}),
    "byte-level, bos and eos": (lambda: with_bos(byte_level(), "</s>"), {"bos_token": "<s>", "eos_token": "</s>"}),
    "byte-level, prefix space": (lambda: byte_level(prefix=True), {}),
    "byte-level, Qwen's splitting": (lambda: byte_level(split=QWEN_SPLIT, nfc=True), {"eos_token": "</s>"}),
    "byte-level, digits in threes": (lambda: byte_level(split=r"\p{N}{1,3}|\p{L}+|\s+|[^\s\p{L}\p{N}]+"), {}),
    "byte-level, padded to a length": (lambda: padded(byte_level(), length=64), {"pad_token": "<pad>"}),
    "byte-level, padded to a multiple": (lambda: padded(byte_level(), pad_to_multiple_of=8), {"pad_token": "<pad>"}),
    "byte-level, padded on the left": (lambda: padded(byte_level(), length=99, direction="left"), {}),
    "byte-level, truncated": (lambda: truncated(byte_level()), {}),
    "byte-level, truncated with a stride": (lambda: truncated(with_bos(byte_level()), stride=2), {"bos_token": "<s>"}),
    "byte-level, both, with bos": (lambda: padded(truncated(with_bos(byte_level())), length=64), {"bos_token": "<s>"}),
    "byte-level, added tokens": (lambda: added(byte_level()), {"eos_token": "<|turn_end|>"}),
    "byte-level, tokens in the configuration alone": (byte_level, {"eos_token": "<new_end>", "bos_token": "<new>"}),
    "byte-level, special tokens as text": (lambda: added(byte_level()), {"split_special_tokens": True}),
    "byte-level, add_bos_token is of no account": (byte_level, {"bos_token": "<s>", "add_bos_token": True}),
    "sentencepiece": (sentencepiece, {"bos_token": "<s>", "eos_token": "</s>"}),
    "sentencepiece, bos": (lambda: with_bos(sentencepiece()), {"bos_token": "<s>", "eos_token": "</s>"}),
    "sentencepiece, legacy": (lambda: with_bos(sentencepiece(legacy=True)), {"bos_token": "<s>", "eos_token": "</s>"}),
    "sentencepiece, legacy, no bos": (lambda: sentencepiece(legacy=True), {"eos_token": "</s>"}),
    "sentencepiece, padded": (lambda: padded(with_bos(sentencepiece()), length=80), {"bos_token": "<s>"}),
    "sentencepiece, added tokens": (lambda: added(with_bos(sentencepiece())), {"eos_token": "<|turn_end|>"}),
    "unigram": (lambda: sentencepiece("unigram"), {"unk_token": "<unk>"}),
    "unigram, bos and eos": (lambda: with_bos(sentencepiece("unigram"), "</s>"), {"bos_token": "<s>"}),
}  # fmt: skip


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make, settings = VARIANTS[request.param]
    make().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_class="PreTrainedTokenizerFast", chat_template=LLAMA, **settings)
    return tmp_path


def write(directory: Path, *, model_type: str = "llama", **settings: Any) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "eos_token_id": 2}))


def theirs(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


def test_text_is_encoded_as_by_transformers(variant: Path) -> None:
    ours, other = ModelTokenizer(variant), theirs(variant)
    assert ours.encode(TEXTS) == other(TEXTS, add_special_tokens=False)["input_ids"]
    assert ours.encode(TEXTS, special=True) == [other(text)["input_ids"] for text in TEXTS]
    chat = Chat(variant, 2000)
    assert [chat.text_ids(text) for text in TEXTS] == [other(text)["input_ids"] for text in TEXTS]


def test_chats_are_rendered_and_encoded_as_by_transformers(variant: Path) -> None:
    """The template writes the BOS token: the post-processor adds no second one."""
    talk = [{"role": "user", "content": " Hi\nthere "}, {"role": "assistant", "content": "Yes."}]
    for messages in (talk[:1], talk, [{"role": "system", "content": "Be brief."}, *talk]):
        wanted = theirs(variant).apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert Chat(variant, 2000).prompt_ids(messages) == wanted


def test_a_continuation_is_decoded_as_in_its_place(variant: Path) -> None:
    """Prompt and continuation decoded together are the prompt's text and the streamed text, first space included."""
    ours, other = ModelTokenizer(variant), theirs(variant)
    for text in ("The sea is calm tonight.", "你好，世界。", "a 🙂 b\n  c"):
        (ids,) = ours.encode([text], special=True)
        for cut in range(1, len(ids)):
            whole, prompt = (other.decode(part, skip_special_tokens=True) for part in (ids, ids[:cut]))
            if prompt.endswith("\ufffd") or not prompt:  # cut within a character, or nothing before it
                continue
            assert "".join(ours.stream(ids[cut:], ids[:cut])) == whole[len(prompt) :], (text, cut)


@pytest.mark.parametrize("make", [byte_level, sentencepiece], ids=["byte-level", "byte fallback"])
def test_a_part_of_a_character_has_its_bytes(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    ours, character = ModelTokenizer(tmp_path), "鑫"
    (ids,) = ours.encode([character])
    assert len(ids) >= 3 and b"".join(map(ours.bytes_of, ids)).strip() == character.encode()


def test_the_end_token_is_the_tokenizers(variant: Path) -> None:
    end = theirs(variant).eos_token_id
    assert ModelTokenizer(variant).eos == end
    assert Chat(variant, 2000).stop_ids >= ({2} if end is None else {2, end})


@pytest.mark.parametrize("template", [CHATML, LLAMA, TOOLS], ids=["ChatML", "Llama", "tools"])
@pytest.mark.parametrize("answer", [True, False])
def test_templates_see_what_transformers_shows_them(template: str, answer: bool, tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>")
    (tmp_path / "chat_template.jinja").write_text(template)
    call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1, "b": "zwei ü"}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    talk: list[dict[str, Any]] = [{"role": "user", "content": "One and two?"}]
    given: dict[str, Any] = {}
    if template == TOOLS:
        talk += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_call_id": "1"},
        ]
        given = {"tools": tools}
    wanted = theirs(tmp_path).apply_chat_template(talk, tokenize=False, add_generation_prompt=answer, **given)
    assert ModelTokenizer(tmp_path).render_chat(talk, answer=answer, **given) == wanted
    if template == TOOLS:  # as OpenAI's clients write them: arguments as the text of an object
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        assert ModelTokenizer(tmp_path).render_chat(talk, answer=answer, **given) == wanted


def test_named_templates_and_settings(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    named = [
        {"name": "default", "template": "plain {{ mood }}"},
        {"name": "tool_use", "template": "{{ tools | length }}"},
    ]
    write(tmp_path, tokenizer_class="PreTrainedTokenizerFast", chat_template=named)
    ours, other, talk = ModelTokenizer(tmp_path), theirs(tmp_path), [{"role": "user", "content": "x"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert ours.render_chat(talk, settings={"mood": "calm"}) == "plain calm"
    assert ours.render_chat(talk, settings={"mood": "calm"}) == other.apply_chat_template(
        talk, tokenize=False, mood="calm"
    )
    assert ours.render_chat(talk, tools=tools) == other.apply_chat_template(talk, tools=tools, tokenize=False) == "1"


# ---------------------------------------------------------------------- which of the files decides


def test_tokenizer_json_decides_whatever_the_model_type(tmp_path: Path) -> None:
    """AutoTokenizer builds Qwen's splitting for every qwen2 that does not name another class, digits one by one."""
    byte_level(split=r"\p{N}{1,3}|\p{L}+|\s+|[^\s\p{L}\p{N}]+").save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, model_type="qwen2")
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    (ids,) = ModelTokenizer(tmp_path).encode(["in 1234567 days"])
    assert ids == own.encode("in 1234567 days").ids
    assert type(theirs(tmp_path)).__name__ == "Qwen2Tokenizer"


def test_qwens_own_tokenizer_is_the_same_both_ways(tmp_path: Path) -> None:
    byte_level(split=QWEN_SPLIT, nfc=True).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, model_type="qwen2", tokenizer_class="Qwen2Tokenizer", eos_token="</s>", pad_token="<pad>")
    assert ModelTokenizer(tmp_path).encode(TEXTS) == theirs(tmp_path)(TEXTS)["input_ids"]


def test_vocabulary_and_merges_alone(tiny: Path, tmp_path: Path) -> None:
    """The files of a Qwen2 checkpoint from before tokenizer.json."""
    model = json.loads((tiny / "tokenizer.json").read_text())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    for name in ("tokenizer_config.json", "config.json"):
        shutil.copyfile(tiny / name, tmp_path / name)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = ModelTokenizer(tmp_path)
    assert ours.encode(TEXTS) == ModelTokenizer(tiny).encode(TEXTS) == theirs(tmp_path)(TEXTS)["input_ids"]
    assert ours.separator == 1021 and ours.eos == 1023 and len(ours.sha256) == 64
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        ModelTokenizer(tmp_path).encode(["x"])


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "gguf_file"])
def test_a_configuration_names_no_other_files(key: str, tiny: Path, tmp_path: Path) -> None:
    for name, content in (("vocab.json", "{}"), ("merges.txt", ""), ("config.json", '{"model_type": "qwen2"}')):
        (tmp_path / name).write_text(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: "/etc/passwd"}))
    with pytest.raises(CheckpointError, match=f"{key} names other files: refused"):
        ModelTokenizer(tmp_path).encode(["x"])
    shutil.copyfile(tiny / "tokenizer.json", tmp_path / "tokenizer.json")  # which is read, and the setting is not
    assert ModelTokenizer(tmp_path).encode(["x"]) == ModelTokenizer(tiny).encode(["x"])
