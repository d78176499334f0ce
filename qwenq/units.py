"""Sizes and counts as people write them: `47GB` is 47e9 bytes, `22.5GiB` is 22.5 * 2**30, `32k` tokens is 32,768."""

from __future__ import annotations

import re

from qwenq.errors import UsageError

MIB, GIB = 1 << 20, 1 << 30
GB = 10**9
LEAST_BARE = 10_000  # bytes without a unit
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", re.IGNORECASE)
_TOKENS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of `47GB` (decimal), `44GiB` (binary) or `1500000000`; raises UsageError for anything else.

    A number without a unit that is less than LEAST_BARE but not 0 is none: nobody means 47 bytes.
    """
    match, hint = _SIZE.fullmatch(text), "write for instance 47GB, 44GiB or 500MB"
    if not match or (match[3] and not match[2]):
        raise UsageError(f"not a size: {text!r}", hint=hint)
    if text.strip() == match[1] and 0 < float(match[1]) < LEAST_BARE:
        raise UsageError(f"not a size: {text!r} has no unit", hint=hint)
    base = 1024 if match[3] else 1000
    return round(float(match[1]) * base ** ("", "K", "M", "G", "T").index(match[2].upper()))


def parse_tokens(text: str) -> int:
    """Tokens of `8192` or `8k` (k = 1,024, as context lengths are named); raises UsageError below 1."""
    match = _TOKENS.fullmatch(text)
    tokens = round(float(match[1]) * {"": 1, "k": 1024, "m": 1 << 20}[match[2].lower()]) if match else 0
    if tokens < 1:
        raise UsageError(f"not a context length: {text!r}", hint="write tokens, for instance 8192 or 32k")
    return tokens


def counted(number: int, noun: str) -> str:
    """`1 layer`, `80 layers`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_gb(n_bytes: float) -> str:
    """`41.49 GB` (1e9 bytes), or MB below one; kB where that would be 0.0 MB, bytes where that would be 0.0 kB."""
    if 0 < abs(n_bytes) < 50:
        return f"{n_bytes:g} bytes"
    if 0 < abs(n_bytes) < 5e4:
        return f"{n_bytes / 1e3:.1f} kB"
    return f"{n_bytes / GB:.2f} GB" if abs(n_bytes) >= GB else f"{n_bytes / 1e6:.1f} MB"


def format_gib(n_bytes: float) -> str:
    """`38.64 GiB` (2**30 bytes), or MiB below one."""
    return f"{n_bytes / GIB:.2f} GiB" if abs(n_bytes) >= GIB else f"{n_bytes / MIB:.1f} MiB"


def format_tokens(tokens: int) -> str:
    """`32k` for whole multiples of 1,024, else the number."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def format_seconds(seconds: float) -> str:
    """`1h02m`, `3m05s` or `4.2s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
    if seconds >= 60:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{seconds:.1f}s"
