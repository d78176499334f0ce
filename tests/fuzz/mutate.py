"""Small damages to valid input that knows its structure: JSON values, text and bytes. All drawn from one seed."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

NUMBERS = (-1, 0, 1, 3, 255, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, -(1 << 63), 0.5, -0.0, 1e308, 5e-324,
           10**99, 10**400, -(10**4000), 1e14, 50.5)  # fmt: skip
TEXTS = (
    "", "..", "../../etc/passwd", "/etc/passwd", "a" * 5000, "\x00", "\x1b[31m", "\n", "😀", "\ud800", "NaN", "model",
    "x/y.safetensors", "..\\x.safetensors", "__metadata__", "F64", "I32", "BF16", "gptq", "qwen2", "(a+)+$", ".*" * 30,
    "re:(x|x)*y", "{{ 7 * 7 }}", "%s%n", "null", "model.safetensors", "http://example.invalid/x.py--X", "16-bit",
    "[/x]", "[bold red]x", "[link=http://example.invalid]x[/link]", ":warning:", "\x9b31m", "\u202eabc",
    "<script>", "&lt;", "|x|", "```", "4-bit g" + "9" * 5000, "9" * 5000, "1e999", "0.0", "a.b", ".",
    "/", "\x7f\r", "x" * 20_000, "=HYPERLINK()",
)  # fmt: skip
GROWN = 0.004  # of the cases: they are large, and take their time


def any_value(draw: Random, depth: int = 0) -> Any:
    """Some JSON value, mostly one that a reader does not expect."""
    kind = draw.randrange(8)
    if kind < 3:
        return draw.choice(NUMBERS)
    if kind < 5:
        return draw.choice(TEXTS)
    if kind == 5:
        return draw.choice((None, True, False))
    if depth > 2:
        return []
    if kind == 6:
        return [any_value(draw, depth + 1) for _ in range(draw.choice((0, 1, 2, 17)))]
    return {draw.choice(TEXTS): any_value(draw, depth + 1) for _ in range(draw.choice((0, 1, 3)))}


def mutate_value(draw: Random, value: Any, times: int = 1) -> Any:
    """A copy with some places replaced, removed, doubled or renamed."""
    holder = [copy.deepcopy(value)]
    for _ in range(times):
        parent, key = _place(draw, holder)
        change = draw.randrange(6)
        old = parent[key]
        if change == 0 and len(parent) and parent is not holder:
            del parent[key]
        elif change == 1 and isinstance(old, int) and not isinstance(old, bool):
            parent[key] = old + draw.choice((-1, 1, 8, -8, old, -old, 1 << 32))
        elif change == 2 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(old))
        elif change == 3 and isinstance(parent, dict):
            parent[draw.choice((*TEXTS, *map(str, parent)))] = parent.pop(key)
        elif change == 4 and isinstance(old, str):
            at = draw.randrange(len(old) + 1)
            parent[key] = old[:at] + draw.choice(TEXTS) + old[at + draw.randrange(3) :]
        else:
            parent[key] = any_value(draw)
    return holder[0]


def _place(draw: Random, holder: list[Any]) -> tuple[Any, Any]:
    """A random place in nested lists and objects: the one that holds it, and its key."""
    parent: Any = holder
    key: Any = 0
    while isinstance(parent[key], dict | list) and parent[key] and draw.random() < 0.85:
        parent = parent[key]
        key = draw.choice(list(parent)) if isinstance(parent, dict) else draw.randrange(len(parent))
    return parent, key


def mutate_json(draw: Random, value: Any) -> bytes:
    """JSON text of a damaged value, or damaged text of the value."""
    kind = draw.randrange(10)
    if draw.random() < GROWN:
        return grow(draw, encode(value))
    if kind < 7:
        return encode(mutate_value(draw, value, draw.choice((1, 1, 2, 5))))
    data = encode(value)
    if kind == 7:
        return mutate_bytes(draw, data)
    at = draw.randrange(len(data) + 1)
    bombs = (
        b"[" * draw.choice((10, 2000, 200_000)), b'{"a":' * draw.choice((10, 2000, 100_000)),
        b"9" * draw.choice((20, 5000)), b"1e999", b"-", b"NaN", b"Infinity", b"\xff", b"\x00", b"\\u0000", b'"', b",",
        b'"a":1,"a":2,', b"\xef\xbb\xbf",
    )  # fmt: skip
    return data[:at] + draw.choice(bombs) + data[at:]


def grow(draw: Random, data: bytes) -> bytes:
    """A piece of `data`, up to 64 bytes, repeated up to a million times; some 8 MB at most."""
    at, length = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 5, 8, 20, 64))
    piece = data[at : at + length]
    times = min(draw.choice((1000, 100_000, 1_000_000)), 8_000_000 // max(len(piece), 1))
    return data[:at] + piece * times + data[at:]


def encode(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_bytes(draw: Random, data: bytes) -> bytes:
    """Flipped, cut, doubled, inserted or overwritten bytes."""
    if draw.random() < GROWN:
        return grow(draw, data)
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 3, 20))):
        kind, at = draw.randrange(6), draw.randrange(len(out) + 1)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + draw.randrange(1, 9)]
        elif kind == 3:
            out[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
        elif kind == 4:
            out[at : at + 8] = draw.choice(NUMBERS[:9]).to_bytes(17, "little", signed=True)[:8]
        else:
            other = draw.randrange(len(out) + 1)
            out[at:at] = out[other : other + 64]
    return bytes(out)
