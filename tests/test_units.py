"""Sizes and counts as people write them, both ways."""

from __future__ import annotations

import pytest

from qwenq.errors import UsageError
from qwenq.units import format_gb, format_gib, format_seconds, format_tokens, parse_size, parse_tokens


def test_sizes_and_counts_are_read() -> None:
    sizes = {"47GB": 47 * 10**9, "44 GiB": 44 << 30, "1.5k": 1500, "1500000000": 1_500_000_000, "2tb": 2 * 10**12}
    sizes |= {"0": 0, "10000": 10_000, "47B": 47}
    assert {text: parse_size(text) for text in sizes} == sizes
    tokens = {"8192": 8192, "32k": 32768, "0.5k": 512, "1M": 1 << 20}
    assert {text: parse_tokens(text) for text in tokens} == tokens


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 IB", "1e9", "nan", "1,5GB", "47", " 1.5", "9999"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "0", "0.0001k", "-8k", "8kb"])
def test_what_is_no_context(text: str) -> None:
    with pytest.raises(UsageError, match="not a context length"):
        parse_tokens(text)


def test_figures_are_written() -> None:
    assert [format_gb(n) for n in (41_490_000_000, 10**9, 10**8, 50_000, 49_999, 50, 47, 0)] == [
        "41.49 GB", "1.00 GB", "100.0 MB", "0.1 MB", "50.0 kB", "0.1 kB", "47 bytes", "0.0 MB",
    ]  # fmt: skip
    assert [format_gib(n) for n in (38 << 30, 1 << 29)] == ["38.00 GiB", "512.0 MiB"]
    assert [format_tokens(n) for n in (32768, 1000, 1025)] == ["32k", "1000", "1025"]
    assert [format_seconds(s) for s in (3720, 185, 4.2)] == ["1h02m", "3m05s", "4.2s"]
