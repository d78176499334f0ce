"""A short run of `make fuzz`: eight hundred damaged inputs, none of which may escape, hang or print two lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.__main__ import run, workplace


@pytest.mark.filterwarnings("default")
def test_a_short_fuzz_run(tmp_path: Path) -> None:
    result = run(workplace(tmp_path), cases=800, seed=2026)
    assert result["findings"] == []
    assert 790 < result["cases"] < 810
    for name, counts in result["outcomes"].items():  # the damage is neither nil nor hopeless
        few = sum(counts.values()) < 10  # slow targets get a case or two of a short run
        assert few or name == "manifest" or counts.get("refused", 0) > 0, name  # verify tells what it finds
    assert sum(counts.get("read", 0) for counts in result["outcomes"].values()) > 60
