"""benchmarks/count_house.py: what it counts."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import count_house as house


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
