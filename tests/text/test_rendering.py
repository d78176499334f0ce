"""Chat templates made to hang, to fill memory and to flood: each ends in seconds, in one line, and the next works."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwenq.errors import CalibrationError, CheckpointError
from qwenq.text import rendering
from qwenq.text.calibration import load_windows
from qwenq.text.conversation import Document
from qwenq.text.rendering import MAX_TEMPLATE_BYTES
from qwenq.text.tokens import ModelTokenizer
from tests.conftest import run

ASK = [{"role": "user", "content": "hello"}]
OVER = "its chat template exceeded a limit on a conversation"
REFUSED = "its chat template refused a conversation"


@pytest.fixture(autouse=True)
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processor time, not three."""
    monkeypatch.setattr(rendering, "CPU_S", 1)


@pytest.fixture
def with_template(tiny: Path, tmp_path: Path) -> Any:
    def make(template: str) -> ModelTokenizer:
        shutil.copyfile(tiny / "tokenizer.json", tmp_path / "tokenizer.json")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return ModelTokenizer(tmp_path)

    return make


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}"
HOSTILE = {
    "loops": (LOOP + "{% endfor %}{% endfor %}", "processor time"),
    "loops that set": (LOOP + "{% set x = a * b %}{% endfor %}{% endfor %}", "processor time"),
    "loops that write": (LOOP + "xxxxxxxxxx{% endfor %}{% endfor %}", "memory|processor time"),
    "text multiplied": ("{{ 'x' * 10000000000 }}", "memory"),
    "text multiplied in steps": ("{% set x = 'x' * 100000 %}{{ x * 100000 }}", "memory"),
    "a list multiplied": ("{{ ([0] * 10000000000) | length }}", "memory"),
    "a list of lists": ("{% set x = [[0] * 100000] * 100000 %}{{ x | string }}", "memory|processor time"),
    "text doubled": (
        "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}", "memory"
    ),
    "padding": ("{{ 'x' | center(9999999999) }}", "memory"),
    "padding by a format": ("{{ '%09999999999d' | format(1) }}", "memory"),
    "padding by a method": ("{{ 'x'.ljust(9999999999) }}", "memory"),
    "indenting": ("{{ ('a\n' * 100000) | indent(1000000) }}", "memory|processor time"),
    "a power": ("{{ (9 ** (9 ** 9)) | string | length }}", "processor time|memory"),
    "wrapping": ("{{ ('a ' * 10000000) | wordwrap(1) | length }}", "processor time|memory"),
    "sorting": ("{{ range(99999) | map('string') | map('center', 100000) | sort | length }}", "processor time|memory"),
    "a flood": ("{{ 'x' * 100000000 }}", "characters of output, more than the"),
    "a macro without end": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion|ended the process"),
    "nesting": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "recursion|nested|ended the process|parenthes"),
    "a long refusal": ("{{ raise_exception('y' * 50000000) }}", "y{100}"),
}  # fmt: skip


# Ended by the same limit as another, whose renderer takes a second to start again.
SAME_LIMIT = ("loops that set", "text multiplied in steps", "a list multiplied", "text doubled", "padding",
              "padding by a format", "indenting")  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in SAME_LIMIT else []) for kind in HOSTILE]
)
def test_hostile_templates_end_in_seconds(kind: str, with_template: Any) -> None:
    template, reason = HOSTILE[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock = time.process_time()
    with pytest.raises(CalibrationError, match=rf"{OVER}|{REFUSED}") as caught:
        with_template(template).render_chat(ASK)
    assert re.search(reason, caught.value.message), caught.value.message
    assert len(caught.value.message) < 400 and caught.value.message.isprintable()
    assert time.process_time() - clock < 3  # of this process: the work is the renderer's
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert with_template("{{ messages[0].content }}").render_chat(ASK) == "hello"


def test_the_renderer_is_held_to_its_limits() -> None:
    """CPU time and memory as the kernel keeps them, not as the template tells."""
    rendering._renderer().render(rendering.Rendering("x", ASK, None, False, {}))
    process = rendering._renderer()._process
    assert process is not None
    limits = {
        row[:25].strip(): row[26:].split() for row in Path(f"/proc/{process.pid}/limits").read_text().splitlines()
    }
    assert int(limits["Max address space"][0]) < 1 << 30
    assert int(limits["Max cpu time"][0]) < 60
    assert limits["Max file size"][0] == limits["Max core file size"][0] == "0"


def test_a_renderer_that_was_killed_is_started_again(with_template: Any) -> None:
    tokenizer = with_template("{{ messages | length }}")
    assert tokenizer.render_chat(ASK) == "1"
    process = rendering._renderer()._process
    assert process is not None
    process.kill()
    process.wait()
    assert tokenizer.render_chat(ASK * 2) == "2"


def test_two_processes_do_not_share_a_renderer() -> None:
    """A fork answers for itself: its parent's pipes are left alone."""
    rendering.render(rendering.Rendering("x", ASK, None, False, {}))
    child = os.fork()
    if not child:
        good = rendering.render(rendering.Rendering("y", ASK, None, False, {}))[0] == "y"
        rendering._renderer().close()
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert rendering.render(rendering.Rendering("z", ASK, None, False, {}))[0] == "z"


def test_templates_have_a_size(with_template: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=f"bytes, more than the {MAX_TEMPLATE_BYTES} a template can need"):
        with_template("x" * (MAX_TEMPLATE_BYTES + 1)).render_chat(ASK)
    (tmp_path / "chat_template.jinja").write_text("x" * (MAX_TEMPLATE_BYTES + 1))
    with pytest.raises(CheckpointError, match=rf"chat_template.jinja: \d+ bytes, more than the {MAX_TEMPLATE_BYTES}"):
        ModelTokenizer(tmp_path).render_chat(ASK)


def test_slow_conversations_together_have_a_limit(with_template: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = with_template("x")
    monkeypatch.setattr("qwenq.text.tokens.render", lambda asked: ("x", 3.9))
    documents = [Document("", tuple(ASK))] * 100
    with pytest.raises(CalibrationError, match=r"its chat template took 12 s for 3 of 100 conversations"):
        list(tokenizer.render_chats(documents))


def test_quantize_and_run_with_a_template_that_hangs(model: Path, tmp_path: Path, edit_json: Any) -> None:
    """Calibration on conversations, and the command line."""
    edit_json(model / "tokenizer_config.json", chat_template=HOSTILE["loops"][0])
    for arguments in (["quantize", str(model), "-o", str(tmp_path / "out")], ["run", str(model), "-p", "hello"]):
        answer = run(*arguments)
        assert answer.exit_code == 1 and OVER in answer.stderr, answer.output


def test_a_refused_conversation_in_many_is_left_out(with_template: Any, tmp_path: Path, tiny: Path) -> None:
    from qwenq.checkpoint.reader import read_config
    from qwenq.model.spec import spec_from_config

    spec = spec_from_config(read_config(tiny))
    refuse = "{% if 'bad' in m.content %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = with_template("{% for m in messages %}" + refuse + "{{ m.content }}{% endfor %}")

    def windows(bad: int, **options: Any) -> Any:
        rows = [{"messages": [{"role": "user", "content": f"Row {k} has some words."}]} for k in range(40)]
        rows[3:3] = [{"messages": [{"role": "user", "content": "bad row"}]}] * bad
        (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return load_windows(str(tmp_path / "x.jsonl"), tokenizer, spec, length=16, count=None, seed=None, **options)

    found = windows(2)
    assert found.provenance["skipped_rows"] == 2 and "(no)" in found.provenance["first_skipped"]
    assert found.ids.tolist() == windows(0).ids.tolist() and "skipped_rows" not in windows(0).provenance
    for options in ({"bad": 2, "strict": True}, {"bad": 30}):
        with pytest.raises(CalibrationError, match=r"refused a conversation \(no\)"):
            windows(**options)


def test_the_renderer_takes_no_module_from_the_folder_it_stands_in(tmp_path: Path) -> None:
    """And imports no torch: it starts in a second."""
    for name in ("json", "transformers", "jinja2"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('from the folder')")
    code = (
        "from qwenq.text import rendering; rendering.render(rendering.Rendering('x', [], None, False, {}));"
        "print(open(f'/proc/{rendering._renderer()._process.pid}/maps').read().count('libtorch'))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"
