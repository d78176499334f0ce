"""Patterns out of a config: what other tools write is read, what could take forever is refused."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.errors import CheckpointError
from qwenq.formats.config import read_pattern

NAME = "model.layers.17.self_attn.q_proj"

# As GPTQModel's and llm-compressor's own documentation and this project write them.
USUAL = [
    r".*\.18\..*gate.*",
    r"^model\.layers\.(?:0|1|17)\.self_attn\.(?:q_proj|k_proj|v_proj)$",
    r".*mlp\.gate$",
    r"^(?!.*lm_head).*",
    r"model\.layers\.\d+\.mlp\.(gate|up)_proj",
    r"(?:model\.layers\.1)(?:(?<=\.)|(?=\.|$))|.*model\.layers\.1$",
    r"model\.layers\.[0-9]{1,2}\.self_attn",
    r"(?i:MODEL)\..*?q_proj",
    "",
]

FOREVER = [
    r"(a+)+$", r"(\w|\w)*!", r"(.*)*x", r"([a-z.]+)*\d!", r"(?:a?){40}b", r"(a|aa)+$", r"(?:(?:\w)+\.?)+!",
    r".*.*.*.*.*!", r"(\w+)\1!", r"(?>x)", r"(?#c)a", r"((x*))*y", r"x{5000}", r"(?:\w{1,40}){1,40}!", r"(?=(a+))*b",
    r"(?P<n>a+)+!", r"[]a](b+)+",
]  # fmt: skip


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_are_read(pattern: str) -> None:
    assert read_pattern(pattern, "config.json: dynamic").pattern == pattern


@pytest.mark.parametrize("pattern", FOREVER)
def test_slow_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match=r"^config.json: dynamic has (the|a) pattern .*: refused$"):
        read_pattern(pattern, "config.json: dynamic")


def test_bad_and_long_patterns_are_refused() -> None:
    for pattern in ("(", "[", "a{2,1}", "*", 3, None, ["a"], "(" * 5000 + ")" * 5000):
        with pytest.raises(CheckpointError, match=r"has (a|the) (bad )?pattern"):
            read_pattern(pattern, "x")
    with pytest.raises(CheckpointError, match="a pattern of 20001 characters"):
        read_pattern("a" * 20_001, "x")


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=r"a.\w*+?{}1,2()[]|^$!:=<", max_size=24))
def test_whatever_is_read_matches_at_once(pattern: str) -> None:
    try:
        found = read_pattern(pattern, "x")
    except CheckpointError as error:
        assert "\n" not in error.message
        return
    for name in (NAME, "a" * 60, "a." * 30):
        start = time.perf_counter()
        found.match(name)
        assert time.perf_counter() - start < 1.0, pattern


def test_the_slow_ones_are_slow() -> None:
    """What is refused really would take long: the guard is not for nothing."""
    start = time.perf_counter()
    re.compile(r"(a+)+$").match("a" * 22 + "!")
    assert time.perf_counter() - start > 0.05
