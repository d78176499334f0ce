"""Patterns out of a config: what other tools write is read, what could take forever is refused."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.checkpoint.reader import read_config
from qwenq.errors import CheckpointError
from qwenq.formats.base import Scheme, read_quantization_config
from qwenq.formats.config import read_pattern
from qwenq.model.spec import spec_from_config

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
    assert read_pattern(pattern, "config.json: dynamic").expression.pattern == pattern


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
        start = time.process_time()
        found.match(name)
        assert time.process_time() - start < 1.0, pattern


def test_the_slow_ones_are_slow() -> None:
    """What is refused really would take long: the guard is not for nothing."""
    start = time.process_time()
    re.compile(r"(a+)+$").match("a" * 22 + "!")
    assert time.process_time() - start > 0.05


GROUP = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
MANY: dict[str, dict[str, object]] = {
    "dynamic": {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {f"-:a{k}": {} for k in range(5000)}},
    "modules_to_not_convert": {
        "quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": [f"a{k}" for k in range(5000)],
    },
    "ignore": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [f"re:a{k}" for k in range(5000)],
        "config_groups": {"group_0": GROUP | {"targets": ["Linear"]}},
    },
    "config_groups": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {f"{k}": GROUP | {"targets": [f"re:a{k}"]} for k in range(5000)},
    },
    "llm_int8_skip_modules": {"load_in_8bit": True, "llm_int8_skip_modules": [f"a{k}" for k in range(5000)]},
}  # fmt: skip


@pytest.mark.parametrize("key", MANY)
def test_too_many_patterns_are_refused_before_they_are_compiled(key: str) -> None:
    start = time.process_time()
    with pytest.raises(CheckpointError, match=rf"^config.json: {key} has \d+ patterns, more than 4000: refused$"):
        read_quantization_config(MANY[key], "config.json")
    assert time.process_time() - start < 1.0


def test_many_slow_patterns_are_refused_by_what_they_would_take(tiny: Path) -> None:
    """Each of them is fast enough for one name."""
    spec = replace(spec_from_config(read_config(tiny)), num_hidden_layers=80)
    few = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {f"-:.*.*.*{k}!": {} for k in range(50)}}
    assert read_quantization_config(few, "config.json").recipe(spec).default == Scheme(4, 32)
    few["dynamic"] = {f"-:.*.*.*.*{k}!": {} for k in range(50)}
    with pytest.raises(CheckpointError, match="50 patterns for the names of 560 linears could take long: refused"):
        read_quantization_config(few, "config.json").recipe(spec)


def test_names_written_out_may_be_many(tiny: Path) -> None:
    spec = replace(spec_from_config(read_config(tiny)), num_hidden_layers=1000)
    names = [lin.name for lin in spec.linears]
    config = MANY["ignore"] | {"ignore": names[1:]}
    start = time.process_time()
    found = read_quantization_config(config, "config.json")
    assert [name for name in names if found.scheme_of(name) is not None] == names[:1]
    assert time.process_time() - start < 2.0
