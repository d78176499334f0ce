"""Commands as a table: options frozen, grouped and documented; old names; start-up; completion in the shell."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.models import OptionInfo

from qwenq.cli.main import COMMANDS, RENAMED_FLAGS, SUBCOMMANDS, command
from qwenq.pipeline.config import QuantizeConfig
from tests.conftest import run

DOCS = Path(__file__).parents[2] / "docs"

# Scripts rely on these: add with care, remove never without a word in the changelog.
OPTIONS = {
    "quantize": "--strict --follow-links "
    "--output -o --bits --group-size --format --gguf-type --split-size --asymmetric --symmetric --fold "
    "--no-fold --rotate --no-rotate --pad-for-tp --save-imatrix --target-size --bpw --fit --context -c --engine "
    "--recipe --sensitivity --save-recipe --calibration --num-samples -n --builtin-share --sequence-length --seed "
    "--eval-text --eval-samples --method --damp-percent --error-correction --error-correction-share --sink-weight "
    "--device --dtype --compute-dtype --calibration-dtype --dry-run --ranks --network --resume --json",
    "eval": "--strict --follow-links --save-reference-logits "
    "--reference --text --num-samples -n --sequence-length --max-kl --max-ppl-increase --device "
    "--compute-dtype --json",
    "run": "--follow-links "
    "--prompt -p --system --raw --max-new-tokens -n --temperature --top-p --top-k --repetition-penalty --seed "
    "--context --max-model-len -c --prefill-chunk --kv-cache-dtype --compute-dtype --engine --gpu-memory --cpu-memory "
    "--offload-dir --dry-run --json",
    "sensitivity": "--strict --follow-links "
    "--output -o --format --calibration --num-samples -n --builtin-share --sequence-length --seed --asymmetric "
    "--rotate --device --compute-dtype --json",
    "serve": "--follow-links "
    "--host --port --allowed-hosts --served-model-name --api-key --max-queue --engine --context --max-model-len -c "
    "--prefill-chunk --kv-cache-dtype --compute-dtype --gpu-memory --cpu-memory --offload-dir --gpu --hosts --dry-run "
    "--json",
    "inspect": "--follow-links "
    "--expect-params --json",
    "convert": "--follow-links "
    "--format --json",
    "verify": "--follow-links "
    "--source --layers --all-layers --calibration --json",
    "report": "--output -o --title --benchmarks --measured --gpu --engine --json",
    "demo": "--output -o --report",
    "plan": "--follow-links "
    "--context --max-model-len -c --gpu --detect --recommend --bits --group-size --format --target-size "
    "--recipe --checkpoint --pad-for-tp --kv-cache-dtype --batch-size --engine --engine-version --prefill-chunk "
    "--reserve --ram --max-num-seqs --gpu-memory-utilization --enforce-eager --expect-params --json",
    "vram estimate": "--follow-links "
    "--context --max-model-len -c --bits --group-size --format --target-size --recipe --checkpoint --pad-for-tp "
    "--kv-cache-dtype --batch-size --engine --engine-version --prefill-chunk --gpu --reserve --tensor-parallel-size "
    "--max-num-seqs --gpu-memory-utilization --enforce-eager --expect-params --profile --json --csv",
    "vram validate": "--json",
    "vram gpus": "--json",
    "vram serve": "--host --port --allowed-hosts",
    "vram export": "--output -o --context --max-model-len -c --bits --kv-cache-dtype --group-size --format "
    "--batch-size --engine --prefill-chunk --gpu",
    "vram measure": "--follow-links "
    "--synthetic --bits --group-size --context --max-model-len -c --prefill-chunk --kv-cache-dtype "
    "--compute-dtype --gpu-memory --cpu-memory --offload-dir --output -o --json",
}


def commands() -> Iterator[tuple[str, Any]]:
    for name in COMMANDS:
        found = command(name)
        subcommands = getattr(found, "commands", {})
        yield from ((f"{name} {sub}", command(name, sub)) for sub in subcommands)
        if not subcommands:
            yield name, found


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_options_are_frozen() -> None:
    found = {
        name: {flag for p in each.params if p.param_type_name == "option" for flag in (*p.opts, *p.secondary_opts)}
        for name, each in commands()
    }
    assert found == {name: set(words.split()) for name, words in OPTIONS.items()}


def test_every_option_of_a_configuration_is_one_of_the_command() -> None:
    parameters = {p.name: p for p in command("quantize").params}
    for field in fields(QuantizeConfig):
        assert parameters[field.name].default == field.default, field.name
        assert "--" + field.name.replace("_", "-") in parameters[field.name].opts


def test_old_names_work_and_are_not_shown() -> None:
    shown = run("quantize", "--help").stdout
    assert "--error-correction " in shown and "--error-correction-share " in shown and "--pull" not in shown
    dry = ("quantize", "Qwen2.5-7B", "--dry-run", "--json")

    def states(*words: object) -> int:
        return json.loads(run(*dry, "-n", 64, *words).stdout)["state_bytes"]

    new = states("--error-correction", 1, "--error-correction-share=1")
    assert new == states("--pull=1", "--pull-share", 1) > states("--pull", 0) == states("--error-correction", 0)
    wrong = run(*dry, "--pull", 2)
    assert wrong.exit_code == 2 and "--error-correction: '2', wanted" in wrong.stderr
    assert set(RENAMED_FLAGS.values()) <= set(OPTIONS["quantize"].split())
    after = run("run", "--", "--pull")  # no option there, but the model's name
    assert after.exit_code == 1 and "--pull: neither a directory" in after.stderr


@pytest.mark.parametrize("name", OPTIONS)
def test_no_metavar_is_taken_for_an_option(name: str) -> None:
    """typer 0.27 spells an option without a name of its own like a metavar that differs in case alone: --DEVICE."""
    callback = command(*name.split()).callback
    assert callback is not None
    for parameter, hint in get_type_hints(inspect.unwrap(callback), include_extras=True).items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo) and info.default is ...:  # typer keeps the first name there
                assert (info.metavar or "").lower().replace("_", "-") != parameter.replace("_", "-"), parameter


@pytest.mark.parametrize("name", OPTIONS)
def test_help_fits_a_screen(name: str) -> None:
    result = run(*name.split(), "--help", COLUMNS="100")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) <= (78 if name == "quantize" else 55) and max(map(len, lines)) <= 100
    prose = [line.strip() for line in itertools.takewhile(lambda line: "╭" not in line, lines)]
    for line, after in itertools.pairwise(prose):
        assert not after or not line or len(line) + len(after.split()[0]) + 1 > 98, "broken where the docstring is"
    assert sum(line.startswith("╭─ Options ") for line in lines) == 1


@pytest.mark.parametrize("name", ["quantize", "run", "serve", "eval", "plan", "vram estimate", "vram measure"])
def test_many_options_are_grouped(name: str) -> None:
    words = name.split()
    options = [p for p in command(*words).params if p.param_type_name == "option"]
    panels = {p.rich_help_panel for p in options}
    assert len(panels) >= 3
    if len(options) > 12:
        assert None not in panels


def test_the_list_of_commands_says_what_each_says_itself() -> None:
    listed = {name: (entry.help, command(name)) for name, entry in COMMANDS.items()}
    listed |= {
        f"{name} {sub}": (entry.help, command(name, sub))
        for name, subs in SUBCOMMANDS.items()
        for sub, entry in subs.items()
    }
    for name, (text, found) in listed.items():
        assert " ".join(inspect.cleandoc(found.help).split("\n\n")[0].split()) == text, name


def test_the_reference_is_made_from_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "make_cli_reference.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- start-up


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        ("--version", {"rich", "pydantic", "qwenq.planning", "qwenq.pipeline", "numpy"}),
        ("--help", {"pydantic", "qwenq.planning", "qwenq.pipeline", "numpy"}),
        ("vram Qwen2.5-72B", {"rich", "pydantic", "torch", "numpy", "qwenq.pipeline", "qwenq.cli.plan"}),
        ("plan Qwen2.5-72B --gpu 2x24GB", {"rich", "pydantic", "torch", "numpy", "qwenq.pipeline"}),
        ("quantize Qwen2.5-72B --dry-run --seed 3", {"pydantic", "torch", "numpy", "qwenq.runtime", "qwenq.report"}),
    ],
)
def test_a_command_imports_what_it_needs(words: str, absent: set[str]) -> None:
    code = (
        f"import sys; sys.argv = ['qwenq', *{words.split()!r}]\n"
        "from qwenq.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end\n"
        f"found = {absent!r} & set(sys.modules); assert not found, found"
    )
    python(code)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("--seed=7", 7), ("--seed=+7", 7), ("--seed= 7", 7), ("--seed=7_0", 70), ("--seed=-1", None),
        ("--seed=x", None), ("--damp-percent=.5", 0.5), ("--damp-percent=5e-1", 0.5), ("--damp-percent=0", 0.0),
        ("--damp-percent=1.01", None), ("--damp-percent=nan", None), ("--sensitivity=", Path()), ("--fit=", ""),
    ],
)  # fmt: skip
def test_values_are_read_as_typer_reads_them(value: str, read: Any) -> None:
    found = command("quantize")
    name = value.partition("=")[0][2:].replace("-", "_")
    if read is None:
        with pytest.raises(Exception, match=r"wanted a (whole )?number"):
            found.make_context("quantize", ["m", value])
    else:
        given = found.make_context("quantize", ["m", value]).params[name]
        assert (given, type(given)) == (read, type(read))


# ---------------------------------------------------------------------- completion


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("qwenq q", ["quantize"]), ("qwenq vram m", ["measure"]), ("qwenq vram measure --syn", ["--synthetic"]),
        ("qwenq quantize --err", ["--error-correction", "--error-correction-share"]),
    ],
)  # fmt: skip
def test_the_shell_completes(typed: str, wanted: list[str]) -> None:
    code = "import sys; sys.argv = ['qwenq']\nfrom qwenq.cli.main import main\nmain()"
    done = python(
        code, _QWENQ_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(len(typed.split()) - 1),
        _TYPER_COMPLETE_ARGS=typed,
    )  # fmt: skip
    assert done.split() == wanted
