"""A byte-level BPE tokenizer as GGUF metadata, both ways: tokens, their types, merges, splitting, special tokens.

GGUF names how text is split before merges (`tokenizer.ggml.pre`) where tokenizer.json spells it out, so only known
splittings can go either way; SPLITTINGS has them. Types of tokens: 1 normal, 3 control (left out of what is shown), 4
of the user's (matched whole), 5 unused, which pads a vocabulary to the rows of the embedding. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq.errors import CheckpointError
from qwenq.io.json import TEMPLATES, inside, read_limited, read_object, shown
from qwenq.text.rendering import MAX_TEMPLATE_BYTES

MAX_TOKENIZER_BYTES = 100_000_000  # the largest published ones have 35 MB
MAX_TOKENIZER_VALUES = 5_000_000  # and 1,300,000 values
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_MODEL, _TOKENS, _TYPES, _MERGES = (f"tokenizer.ggml.{key}" for key in ("model", "tokens", "token_type", "merges"))
_TEMPLATE = "tokenizer.chat_template"
_TEMPLATE_NAME_CHARACTERS = 64
_TEMPLATE_FILE = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{_TEMPLATE_NAME_CHARACTERS - 1}}}")
_LOOKS_CONTROL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # in tokenizer_config.json, and in GGUF

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@dataclass(frozen=True)
class Splitting:
    """Pre-tokenizers under llama.cpp's names, the first of which is written."""

    names: tuple[str, ...]
    pattern: str = ""  # empty: GPT-2's, which is the byte-level pre-tokenizer's own
    digits: bool = False  # one by one, before that
    normalizer: str = ""  # of tokenizer.json, which llama.cpp does without
    ignore_merges: bool = False  # a piece that is a token is taken whole
    begins: bool = False  # with a BOS token, unless the metadata says otherwise

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The pre-tokenizers of tokenizer.json."""
        found: list[dict[str, Any]] = []
        if self.digits:
            found.append({"type": "Digits", "individual_digits": True})
        if self.pattern:
            pattern = {"Regex": self.pattern}
            found.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
        return [*found, _byte_level(use_regex=not self.pattern)]


# Of llama.cpp's unicode and vocabulary sources; the patterns are those of the publishers' own tokenizer.json.
SPLITTINGS = (
    Splitting(("qwen2", "deepseek-r1-qwen"), _QWEN2, normalizer="NFC"),
    Splitting(("llama-bpe", "llama3", "llama-v3"), _LLAMA3, ignore_merges=True, begins=True),
    Splitting(("smollm",), digits=True),
    Splitting(("gpt-2",)),
)


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


# ---------------------------------------------------------------------- from metadata


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer out of GGUF metadata: `document` is its tokenizer.json, `special` its named tokens (`bos_token`).

    chat_templates: by name; "default" is the one that llama.cpp keeps without a name.
    """

    document: dict[str, Any]
    special: dict[str, str]
    chat_templates: dict[str, str]


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether a GGUF file has a tokenizer at all."""
    return metadata.get(_MODEL) is not None


def vocabulary_of_metadata(metadata: Mapping[str, Any], where: str) -> Vocabulary:
    """The tokenizer of a GGUF file; CheckpointError where there is none, or one that is no known byte-level BPE."""
    kind = metadata.get(_MODEL)
    if not has_tokenizer(metadata):
        raise CheckpointError(
            f"{where}: no tokenizer in its metadata",
            hint="use a file with one; inspect, vram, plan and convert work without it",
        )
    if kind != "gpt2":
        raise CheckpointError(
            f"{where}: {_MODEL} is {shown(repr(kind), 40)}, wanted gpt2: only byte-level BPE tokenizers are read"
        )
    split = _named_splitting(metadata, where)
    tokens, merges = _list(metadata, _TOKENS, str, where), _list(metadata, _MERGES, str, where)
    types = _list(metadata, _TYPES, int, where) if _TYPES in metadata else [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{where}: {len(types)} token types for {len(tokens)} tokens")
    ids: dict[str, int] = {}
    for place, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ != UNUSED and ids.setdefault(token, place) != place:
            raise CheckpointError(f"{where}: {_TOKENS} has {shown(token, 40)} twice, as {ids[token]} and {place}")
    if len(set(merges)) != len(merges):
        raise CheckpointError(f"{where}: {_MERGES} has {len(merges) - len(set(merges))} merges twice")
    pairs = [merge.split(" ") for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2 or pair[0] not in ids or pair[1] not in ids or pair[0] + pair[1] not in ids:
            raise CheckpointError(f"{where}: {_MERGES} has {shown(merge, 40)}, not two tokens that form a third")
    special = {
        f"{ours}_token": tokens[number]
        for ours, theirs in _SPECIAL.items()
        if (number := _token_id(metadata, theirs, len(tokens), where)) is not None
    }
    added = [
        {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": type_ == CONTROL}
        for number, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ in (CONTROL, USER_DEFINED) and token
    ]  # fmt: skip
    bos, eos = (
        token
        if metadata.get(f"tokenizer.ggml.add_{name}_token", usual) is True
        and (token := special.get(f"{name}_token")) in ids
        else None
        for name, usual in (("bos", split.begins), ("eos", False))
    )
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": split.normalizer} if split.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split.steps},
        "post_processor": _around(bos, eos, ids),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split.ignore_merges,
            "vocab": ids,
            "merges": pairs,
        },
    }
    return Vocabulary(document, special, _templates_of_metadata(metadata, where))


def _templates_of_metadata(metadata: Mapping[str, Any], where: str) -> dict[str, str]:
    named = {key.removeprefix(_TEMPLATE + "."): key for key in metadata if key.startswith(_TEMPLATE + ".")}
    if _TEMPLATE in metadata:
        named["default"] = _TEMPLATE
    for key in named.values():
        if not isinstance(metadata[key], str) or len(metadata[key].encode()) > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"{where}: {shown(key)} is no text of at most {MAX_TEMPLATE_BYTES} bytes")
    return {name: metadata[key] for name, key in named.items()}


def template_file(name: str, where: str) -> str:
    """transformers' file for a named chat template; CheckpointError if the name cannot be a file name."""
    if name == "default":
        return "chat_template.jinja"
    if not _TEMPLATE_FILE.fullmatch(name):
        raise CheckpointError(
            f"{where}: a chat template's name is {shown(repr(name), 80)}, wanted at most {_TEMPLATE_NAME_CHARACTERS} "
            "letters, digits, _, - and . to make a file of it"
        )
    return f"{TEMPLATES}/{name}.jinja"


def _named_splitting(metadata: Mapping[str, Any], where: str) -> Splitting:
    name = metadata.get("tokenizer.ggml.pre")
    for split in SPLITTINGS:
        if name in split.names:
            return split
    raise CheckpointError(
        f"{where}: tokenizer.ggml.pre is {shown(repr(name), 40)}, wanted one of "
        f"{', '.join(split.names[0] for split in SPLITTINGS)}: text would be split differently from training"
    )


def _around(bos: str | None, eos: str | None, ids: Mapping[str, int]) -> dict[str, Any]:
    """The post-processor that puts these tokens before and after a text."""
    byte_level = _byte_level(use_regex=True)
    if bos is None and eos is None:
        return byte_level

    def text(name: str, type_id: int) -> list[Any]:
        begin, end = ([{"SpecialToken": {"id": token, "type_id": type_id}}] if token else [] for token in (bos, eos))
        return [*begin, {"Sequence": {"id": name, "type_id": type_id}}, *end]

    template = {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (bos, eos) if token
        },
    }
    return {"type": "Sequence", "processors": [byte_level, template]}


def _list(metadata: Mapping[str, Any], key: str, kind: type, where: str) -> list[Any]:
    found = metadata.get(key)
    if not isinstance(found, list) or not all(type(value) is kind for value in found):
        wanted = {str: "texts", int: "whole numbers"}[kind]
        raise CheckpointError(f"{where}: {key} is {shown(repr(found)[:60], 40)}, wanted an array of {wanted}")
    return found


def _token_id(metadata: Mapping[str, Any], name: str, tokens: int, where: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    found = metadata.get(key)
    if found is not None and (type(found) is not int or not 0 <= found < tokens):
        raise CheckpointError(f"{where}: {key} is {shown(repr(found), 40)}, wanted the id of one of {tokens} tokens")
    return found


# ---------------------------------------------------------------------- to metadata


def metadata_of_tokenizer(directory: Path, vocab_size: int) -> dict[str, Any]:
    """GGUF metadata of a checkpoint directory's tokenizer and chat template; `vocab_size`: rows of the embedding.

    CheckpointError for a tokenizer that is no known byte-level BPE, or has more tokens than that.
    """
    path = inside(directory, "tokenizer.json")
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no tokenizer.json",
            hint="save the fast tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    document = read_object(path, MAX_TOKENIZER_BYTES, MAX_TOKENIZER_VALUES)
    model, where = document.get("model"), shown(str(path))
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not _is_byte_level(document, where):
        kind = model.get("type") if isinstance(model, dict) else None
        raise CheckpointError(
            f"{where}: a tokenizer of type {shown(str(kind), 40)}, wanted byte-level BPE, the only type written to GGUF"
        )
    split = _described_splitting(document, where)
    settings = _settings(directory, document)
    tokens, types = _tokens(document, model, settings, vocab_size, where)
    found: dict[str, Any] = {
        _MODEL: "gpt2",
        "tokenizer.ggml.pre": split.names[0],
        _TOKENS: tokens,
        _TYPES: types,
        _MERGES: _merges(model, where),
    }
    model_config = read_object(inside(directory, "config.json"))
    ids = {token: number for number, token in enumerate(tokens)}
    for ours, theirs in _SPECIAL.items():
        text = _text(settings.get(f"{ours}_token"))
        number = ids.get(text) if isinstance(text, str) else None
        number = model_config.get(f"{ours}_token_id") if number is None else number
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and 0 <= number < vocab_size:
            found[f"tokenizer.ggml.{theirs}_token_id"] = number
    for name, place in (("bos", 0), ("eos", -1)):
        found[f"tokenizer.ggml.add_{name}_token"] = _adds(document.get("post_processor"), place, where)
    return found | dict(_templates(directory, settings))


def _settings(directory: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, and what transformers takes from the older files beside it if it lists no added tokens:
    special_tokens_map.json takes precedence, added_tokens.json has those that `document`, tokenizer.json, has not.
    """
    settings, named, added = (
        read_object(path) if (path := inside(directory, name)).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    if "added_tokens_decoder" in settings:
        return settings
    settings |= named
    own = document.get("added_tokens")
    listed = [each.get("content") for each in own if isinstance(each, dict)] if isinstance(own, list) else []
    special = [_text(value) for key, value in settings.items() if key.endswith("_token")] + [*_further(settings)]
    more = {
        str(number): {"content": text, "special": text in special}
        for text, number in added.items()
        if text not in listed
    }
    return settings | {"added_tokens_decoder": more}


def _further(settings: Mapping[str, Any]) -> Iterator[Any]:
    """Special tokens without a role of their own, as texts unless the files are wrong."""
    for kind in ("additional", "extra"):
        more = settings.get(f"{kind}_special_tokens") or ()
        for token in more.values() if isinstance(more, dict) else more if isinstance(more, list) else ():
            yield _text(token)


def _text(token: Any) -> Any:
    """A named token's text, which stands there as it is or in an object."""
    return token.get("content") if isinstance(token, dict) else token


def _is_byte_level(document: Mapping[str, Any], where: str) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _flat(document.get("decoder"), "decoders", where))


def _flat(found: Any, key: str, where: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a pre-tokenizer, decoder or post-processor, those of a sequence one by one."""
    if isinstance(found, Mapping):
        if found.get("type") == "Sequence":
            steps = found.get(key) or []
            if not isinstance(steps, list):
                raise CheckpointError(f"{where}: {key} is {shown(repr(steps), 40)}, wanted a list")
            for step in steps:
                yield from _flat(step, key, where)
        else:
            yield found


def _signature(steps: Iterator[Mapping[str, Any]]) -> list[Any]:
    """By which two pre-tokenizers are known to be the same."""
    found: list[Any] = []
    for step in steps:
        if step.get("type") == "Digits":
            found.append(("Digits", step.get("individual_digits")))
        elif step.get("type") == "ByteLevel":
            found.append(("ByteLevel", step.get("use_regex", True), step.get("add_prefix_space")))
        else:
            found.append((step.get("type"), str(step.get("pattern")), step.get("behavior"), step.get("invert")))
    return found


def _described_splitting(document: Mapping[str, Any], where: str) -> Splitting:
    for step in _flat(document.get("normalizer"), "normalizers", where):
        if step.get("type") != "NFC":  # which llama.cpp does without
            raise CheckpointError(
                f"{where}: its normalizer of type {shown(str(step.get('type')), 40)} changes text before it is split, "
                "which GGUF cannot express"
            )
    ours = _signature(_flat(document.get("pre_tokenizer"), "pretokenizers", where))
    for split in SPLITTINGS:
        if ours == _signature(iter(split.steps)):
            return split
    raise CheckpointError(
        f"{where}: its pre-tokenizer has no name known here, which GGUF needs ({shown(str(ours), 120)})",
        hint=f"known: {', '.join(split.names[0] for split in SPLITTINGS)}",
    )


def _tokens(
    document: Mapping[str, Any], model: Mapping[str, Any], settings: Mapping[str, Any], vocab_size: int, where: str
) -> tuple[list[str], list[int]]:
    """Tokens by id and their types, those that `settings` adds too; ids that no token has are unused."""
    vocab, added = model.get("vocab"), document.get("added_tokens") or []
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise CheckpointError(f"{where}: no vocabulary")
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    entries = [(text, number, NORMAL) for text, number in vocab.items()]
    for each in added:
        text, number = (each.get("content"), each.get("id")) if isinstance(each, dict) else (None, None)
        entries.append((text, number, CONTROL if _is_control(each) else USER_DEFINED))
    for text, number, _ in entries:
        if not isinstance(text, str) or type(number) is not int:
            raise CheckpointError(f"{where}: token {shown(repr(text), 40)} has the id {shown(repr(number), 40)}")
    entries += _added_beside(settings, {text: number for text, number, _ in entries}, where)
    for text, number, type_ in entries:
        if not 0 <= number < vocab_size:
            raise CheckpointError(
                f"{where}: token {shown(text, 40)} has the id {number}, the embedding has {vocab_size} rows"
            )
        tokens[number], types[number] = text, type_
    return tokens, types


def _added_beside(settings: Mapping[str, Any], known: dict[str, int], where: str) -> list[tuple[str, int, int]]:
    """Text, id and type of the tokens in `settings`, tokenizer_config.json, where transformers looks for further ones,
    and for the type of those in tokenizer.json. known: ids of the latter.

    CheckpointError for a token that tokenizer.json lacks, unless its id is the next one, as transformers numbers them.
    """
    listed, found = settings.get("added_tokens_decoder"), []
    for number, token in sorted(listed.items(), key=lambda each: each[0].zfill(9)) if isinstance(listed, dict) else ():
        text = token.get("content") if isinstance(token, dict) else None
        following = max(known.values(), default=-1) + 1
        if not isinstance(text, str) or (text not in known and number != str(following)):
            raise _lacking(where, text, f" as {shown(number, 40)}")
        known = {text: following} | known
        found.append((text, known[text], CONTROL if _is_control(token) else USER_DEFINED))
    for text in _further(settings):
        if not isinstance(text, str) or text not in known:
            raise _lacking(where, text)
    return found


def _lacking(where: str, token: object, number: str = "") -> CheckpointError:
    return CheckpointError(
        f"{where}: no token {shown(repr(token), 40)}, which the files beside it have{number}",
        hint="save the tokenizer anew: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
    )


def _merges(model: Mapping[str, Any], where: str) -> list[str]:
    """Merges as two tokens with a space between; tokenizer.json has them so, or as pairs."""
    merges = model.get("merges", [])
    if not isinstance(merges, list):
        raise CheckpointError(f"{where}: merges is {shown(repr(merges), 40)}, wanted a list")
    found: list[str] = []
    for merge in merges:
        parts = [merge] if isinstance(merge, str) else merge
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise CheckpointError(f"{where}: merges has {shown(repr(merge), 40)}, wanted two tokens")
        found.append(" ".join(parts))
    return found


def _is_control(token: Any) -> bool:
    """Whether an added token is left out of what is shown: those marked so, and by their looks, as in llama.cpp's
    converter (does_token_look_special in conversion/base.py).
    """
    if not isinstance(token, dict):
        return False
    return bool(token.get("special")) or _LOOKS_CONTROL.fullmatch(str(token.get("content"))) is not None


def _adds(processor: Any, place: int, where: str) -> bool:
    """Whether the tokenizer puts a special token before plain text, place 0, or after it, place -1."""
    for step in _flat(processor, "processors", where):
        single = step.get("single")
        if step.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            if not isinstance(single[place], Mapping):
                end = "begins" if place == 0 else "ends"
                raise CheckpointError(f"{where}: single {end} with {shown(repr(single[place]), 40)}, wanted an object")
            return "SpecialToken" in single[place]
    return False


def template_files(directory: Path) -> list[str]:
    """Chat templates beside the usual one, by name, in the folder where transformers keeps them.

    CheckpointError where that is a link to another directory.
    """
    folder = directory / TEMPLATES
    if not folder.is_dir():
        return []
    inside(directory, TEMPLATES)
    return sorted(f"{TEMPLATES}/{path.name}" for path in folder.glob("*.jinja"))


def _templates(directory: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, str | list[str]]]:
    """The chat template and further ones under their names; a file takes precedence over tokenizer_config.json.

    CheckpointError for a name that no key can have.
    """
    given, named = settings.get("chat_template"), dict[str, str]()
    if isinstance(given, str):
        named = {"default": given}
    elif isinstance(given, list):
        named = {
            each["name"]: each["template"]
            for each in given
            if isinstance(each, dict) and isinstance(each.get("name"), str) and isinstance(each.get("template"), str)
        }
    files = {"default": "chat_template.jinja"} | {Path(name).stem: name for name in template_files(directory)}
    for name, file in files.items():
        path = inside(directory, file)
        if path.is_file():
            named[name] = read_limited(path, MAX_TEMPLATE_BYTES).decode("utf-8", "replace")
    for name in named:  # which becomes part of a key
        if not name.isprintable() or len(name) > _TEMPLATE_NAME_CHARACTERS:
            raise CheckpointError(
                f"{directory}: a chat template's name is {shown(repr(name), 80)}, wanted at most "
                f"{_TEMPLATE_NAME_CHARACTERS} printable characters",
                hint="rename it",
            )
    if "default" in named:
        yield _TEMPLATE, named.pop("default")
    if named:
        yield "tokenizer.chat_templates", list(named)
        yield from ((f"{_TEMPLATE}.{name}", template) for name, template in named.items())
