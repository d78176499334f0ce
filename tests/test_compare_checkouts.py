"""benchmarks/compare_checkouts.py and count_house.py: what they see, and what their tables let pass."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import compare_checkouts as compare
import count_house as house
from compare_checkouts import Case, compare_answer, compare_made

CASE = Case(("vram", "a model"))


def said(stdout: str, stderr: str = "", exit_code: int = 0) -> dict[str, Any]:
    return {"exit_code": exit_code, "stdout": stdout, "stderr": stderr}


def checkpoint(place: Path, scales: bytes, **manifest: Any) -> None:
    """out/x below `place`: a shard of two tensors, a card and a manifest."""
    made = place / "out" / "x"
    made.mkdir(parents=True)
    entries = {"codes": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
               "scales": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}  # fmt: skip
    header = json.dumps(entries).encode()
    (made / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\1\2" + scales)
    (made / "README.md").write_text("by qwenq 0.1.0: pull 1\n" if "pull" in manifest else "by qwenq 0.2.0: moved 1\n")
    content = {"files": {"README.md": str(place), "model.safetensors": scales.hex()}, "digest": str(place)}
    (made / compare.MANIFEST).write_text(json.dumps(content | {"run": {"seconds": 1}} | manifest))


def test_the_list_of_cases_is_fixed_and_long_enough() -> None:
    cases = compare.answer_cases()
    assert cases == compare.answer_cases()
    assert len({case.line for case in cases}) == len(cases) >= 400
    assert len({case.makes for case in compare.byte_cases() if case.makes}) >= 90


def test_figures_keys_texts_and_exit_codes_are_seen() -> None:
    before = said('{"a": {"b": [1, 2]}, "seconds": 3}', "warning: a  b\n")
    assert compare_answer(CASE, before, before).exact
    faster = compare_answer(CASE, before, said('{"seconds": 2, "a": {"b": [1, 2]}}', "warning: a  b\n"))
    assert faster.same and not faster.exact
    for after, line in (
        (said('{"a": {"b": [1, 3]}}', "warning: a  b\n"), "stdout: a.b[1]: '2' -> '3'"),
        (said('{"a": {"b": [1, 2.0]}}', "warning: a  b\n"), "stdout: a.b[1]: '2' -> '2.0'"),
        (said('{"a": {"c": 1}}', "warning: a  b\n"), "stdout: a.b: only before"),
        (said(before["stdout"], "warning: a b\n"), "stderr: -warning: a  b"),  # no word replaced: layout counts
        (said(before["stdout"], "warning: a  b\n", 1), "exit code: 0 -> 1"),
    ):
        assert line in compare_answer(CASE, before, after).differences


def test_tables_let_pass_what_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = said('{"pull": 1, "flags": {"vllm": "x"}, "says": "o is pulled"}', "| pulled   |\n")
    after = said('{"moved": 1, "flags": {"vllm": "x", "sglang": "y"}, "says": "o is moved"}', "| moved |\nsglang: y\n")
    assert not compare_answer(CASE, before, after).same
    monkeypatch.setattr(compare, "RENAMED_KEYS", {"pull": "moved"})
    monkeypatch.setattr(compare, "REWORDED", [(r"\bpulled\b", "moved")])
    monkeypatch.setattr(compare, "ADDED_KEYS", {"flags.sglang"})
    differences = compare_answer(CASE, before, after).differences
    assert "stderr: +sglang: y" in differences and not any("stdout" in line for line in differences)
    monkeypatch.setattr(compare, "ADDED_TEXT", [r"^sglang: .*\n"])
    outcome = compare_answer(CASE, before, after)
    assert outcome.same and not outcome.exact
    assert not compare_answer(CASE, before, said(after["stdout"].replace("1", "2"), after["stderr"])).same


def test_bytes_and_manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = tmp_path / "before", tmp_path / "after"
    checkpoint(sides[0], b"\5\6", pull=1)
    checkpoint(sides[1], b"\5\7", moved=1)
    monkeypatch.setattr(compare, "RENAMED_KEYS", {"pull": "moved"})

    def differences() -> list[str]:
        outcome = compare.Outcome("", 0, True, True)
        compare_made(outcome, "out/x", *sides)
        assert outcome.same == (outcome.digests["before"] == outcome.digests["after"])
        return outcome.differences

    found = differences()
    assert "model.safetensors: other bytes in scales" in found
    assert "README.md: -by qwenq VERSION: pull 1" in found
    assert any(line.startswith(f"{compare.MANIFEST}: files.model.safetensors: ") for line in found)
    assert any(line.startswith(f"{compare.MANIFEST}: files.README.md: ") for line in found)
    monkeypatch.setattr(compare, "REWORDED", [("pull", "moved")])
    assert not any("README.md" in line for line in differences())
    checkpoint(tmp_path / "same", b"\5\6", moved=1)
    sides = sides[0], tmp_path / "same"
    assert differences() == []
    (tmp_path / "same" / "out" / "x" / "more").touch()
    outcome = compare.Outcome("", 0, True, True)
    compare_made(outcome, "out/x", *sides)
    assert outcome.differences == ["more: only after"]


def test_counts_of_a_small_house(tmp_path: Path) -> None:
    files = {
        "__init__.py": "__version__ = '1'\ndef __getattr__(name):\n    import qwenq.api\n",
        "api.py": "def late():\n    from qwenq.c import top\n",
        "cli/wide.py": "from qwenq import api\ndef wide(a, b, c, d, e, f, g):\n    pass\n",
        "words.py": "from qwenq import __version__\nFORMATS = ('gptq', 'awq')\nOWN = 'qwenq'\n",
        "a/one.py": "from qwenq.words import FORMATS\ndef f(x, method):\n    '''What it is.'''\n"
        "    return x in FORMATS or x == 'gptq' or method == 'gptq' or x == 'other'\n",
        "a/two.py": "from qwenq.a import one\ndef g(self, a, b, c, d, e, f, *, h):\n    return one\n",
        "b/one.py": "def late():\n    from qwenq.a.two import g\n    return g\n\n"
        "def engine(e, VLLM):\n    return e.name != 'vllm' or e is VLLM or {'vllm': 1, 'llama.cpp': 2}[e]\n",
        "b/up.py": "import qwenq.c.top\n",
        "c/top.py": "from qwenq.b import up, one\nname = f'model.layers.{0}.x' + 'model.layers.1'\n",
        "formats/gptq.py": "def here(name):\n    return name == 'gptq'\n",
    }
    for name, text in files.items():
        path = tmp_path / "qwenq" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    counts = house.count(tmp_path)
    numbers = counts.numbers
    assert numbers["Python files but for __init__.py"] == "9" and numbers["loose files in qwenq/"] == "3"
    assert numbers["import floors"] == "4"  # the package, words, a/one, a/two
    assert counts.places["arrows"] == [
        "__init__ -> api: 1", "a -> (loose): 1", "api -> c: 1", "b -> a: 1", "b -> c: 1", "c -> b: 2", "cli -> api: 1",
    ]  # fmt: skip
    assert numbers["backward arrows (imports behind them)"] == "1 (1)"
    assert counts.places["backward arrows"] == ["b -> c: b.up -> c.top"]
    assert counts.places["wide functions"] == ["a/two.py:2 g (7)", "cli/wide.py:2 wide (7) (command)"]
    assert numbers["format comparisons outside formats/ (files)"] == "2 (1)"
    assert numbers["engine comparisons outside planning/engines (files)"] == "3 (1)"
    assert counts.places["repeated basenames"] == ["one: 2"]
    assert counts.places["model.layers."] == ["c/top.py: 2"]
    assert counts.places["docstrings with What"] == ["a/one.py:2"]
    assert house.table([counts, counts])[2] == "| Python files but for __init__.py | 9 | 9 |"
