"""Values out of other people's configs: schemes, lists of names, and regular expressions, read and checked.

A regular expression is compiled only when no name can make matching it take long. It is refused when a repeat holds
another repeat or a choice, which takes exponential time on the wrong name, when it has many unbounded repeats (each
multiplies the time by the name's length), or a backward reference.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping, Sized
from typing import Any

from qwenq.errors import CheckpointError, PlanError, UnreadScheme
from qwenq.formats.base import NamePattern, Scheme
from qwenq.io.json import shown

PACKED_BITS = range(2, 9)  # that one tool or another packs

# Keys of GPTQ and AWQ that say how codes were found, or with what to run them, and nothing of what they mean.
MAKING = frozenset({
    "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs",
    "damp_auto_increment", "damp_percent", "dataset", "disable_exllama", "exllama_config", "gptaq", "hyb_act",
    "max_input_length", "meta", "model_file_base_name", "model_name_or_path", "model_seqlen",
    "module_name_preceding_first_block", "mse", "pack_impl", "pad_token_id", "quantizer", "static_groups",
    "tokenizer", "true_sequential", "uri", "use_cuda_fp16", "use_exllama", "v2", "v2_alpha",
})  # fmt: skip

MAX_CHARACTERS = 20_000  # a choice of all linears of a large model by their names is half as long
MAX_NAMES = 20_000  # of one list: all linears of the largest model it may be
MAX_PATTERNS = 4000  # of one config, and as many names
MAX_UNBOUNDED = 4  # `.*` and their like; on a name of 60 characters that is half a million steps
_NAME_CHARACTERS = 35  # of a linear's name, by which the steps of a pattern are reckoned
_TOKEN = re.compile(
    r"\\(?P<escape>.)|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<open>\((?:\?(?:P?<[A-Za-z_]\w*>|<?[=!]|[aimsux-]*:|>)?)?)"
    r"|(?P<close>\))|(?P<repeat>[*+]|\{\d*,?\d*\})|(?P<maybe>\?)|(?P<choice>\|)|.",
    re.DOTALL,
)


def read_scheme(bits: Any, group_size: Any, sym: Any, where: str) -> Scheme:
    """A scheme of integer codes; CheckpointError for what this project cannot read."""
    if type(bits) is not int or type(group_size) is not int:
        raise CheckpointError(f"{where}: bits is {bits!r} and group_size {group_size!r}, wanted whole numbers")
    try:
        return Scheme(bits, group_size, bool(sym))
    except PlanError as error:
        other = bits not in (4, 8) and bits in PACKED_BITS
        raise (UnreadScheme if other else CheckpointError)(f"{where}: {error.message}") from None


def refuse_unknown(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """UnreadScheme for the first key outside `known` that says something: it could change what the tensors mean.

    Null, false, 0 and what is empty say nothing.
    """
    for key, value in config.items():
        if key not in known and _says(value):
            raise UnreadScheme(
                f"{where}: {shown(str(key), 40)} is {shown(repr(value), 60)}, which this version does not understand",
                hint="it could change what the stored codes mean; use an engine that supports it",
            )


def _says(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_says(part) for part in value.values())
    if isinstance(value, list):
        return any(_says(part) for part in value)
    return bool(value)


def as_object(value: Any, where: str) -> Mapping[str, Any]:
    """An object of a config; CheckpointError for anything else."""
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where} is {type(value).__name__}, wanted an object")
    return value


def read_names(value: Any, where: str) -> list[str]:
    """A list of texts; None is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{where} is {str(value)[:80]!r}, wanted a list of names")
    if len(value) > MAX_NAMES:
        raise CheckpointError(f"{where} has {len(value)} names, more than {MAX_NAMES}")
    return value


def check_count(patterns: Sized, where: str) -> None:
    """CheckpointError for more patterns than a config has, before one is compiled."""
    if len(patterns) > MAX_PATTERNS:
        raise CheckpointError(f"{where} has {len(patterns)} patterns, more than {MAX_PATTERNS}: refused")


def read_pattern(pattern: Any, where: str) -> NamePattern:
    """A regular expression, to be matched from the start of a module's name."""
    if not isinstance(pattern, str):
        raise CheckpointError(f"{where} has a bad pattern {shown(repr(pattern))} (not text)")
    if len(pattern) > MAX_CHARACTERS:
        raise CheckpointError(f"{where} has a pattern of {len(pattern)} characters, more than {MAX_CHARACTERS}")
    reason, unbounded = _slow(pattern)
    if reason:
        raise CheckpointError(
            f"{where} has the pattern {shown(pattern, 60)}, which could take forever ({reason}): refused",
            hint="write the names out, or avoid nested repeats",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Python may once read otherwise
            return NamePattern(re.compile(pattern), math.comb(_NAME_CHARACTERS + unbounded, unbounded))
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where} has a bad pattern {shown(repr(pattern))} ({error})") from None


def _slow(pattern: str) -> tuple[str, int]:
    """Why matching could take long, empty when it cannot, and the number of unbounded repeats.

    May refuse a harmless pattern, never passes a slow one.
    """
    unbounded = 0
    groups = [False]  # for each open group: whether it holds a repeat or a choice
    closed = False  # the last thing was a group that does
    after_repeat = False
    for token in _TOKEN.finditer(pattern):
        kind, text = token.lastgroup, token[0]
        was_closed, closed = closed, False
        was_repeat, after_repeat = after_repeat, False
        if kind == "escape" and (text[1].isdigit() and text[1] != "0"):
            return "a backward reference", 0
        if kind == "open":
            if text in ("(?", "(?>"):
                return f"the group {shown(pattern[token.start() : token.start() + 6])}", 0
            groups.append(False)
        elif kind == "close" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] = groups[-1] or closed
        elif kind == "choice":
            groups[-1] = True
        elif kind in ("repeat", "maybe"):
            if was_repeat and text in "+?":  # lazy or possessive
                continue
            if was_closed and kind == "repeat":
                return "a repeat or a choice inside a repeat", 0
            groups[-1] = True
            after_repeat = True
            unbounded += kind == "repeat" and not text.startswith("{")
            if text.startswith("{"):
                low, _, high = text[1:-1].partition(",")
                if max((int(n) for n in (low, high) if n), default=0) > 1000:
                    return f"{shown(text, 20)} repeats", 0
                unbounded += "," in text
    return (f"{unbounded} unbounded repeats" if unbounded > MAX_UNBOUNDED else ""), unbounded
