"""The order of folders: a file imports only from its own folder and those before it; planning never imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qwenq"

# Stages, in order. Files at the top of the package are words, which every stage may use, but for the doors: `api`, the
# Python API, and `__main__`.
STAGES = (
    "", "io", "model", "solver", "formats", "checkpoint", "text", "planning", "pipeline", "runtime", "report", "page",
    "api", "cli", "__main__",
)  # fmt: skip

HEAVY = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")
# Answer at once: the whole of planning, and what checks, reports and commands beside it need.
LIGHT = ("planning.*", "formats", "formats.base", "formats.config", "formats.gptq", "formats.awq",
         "formats.compressed_tensors", "formats.bitsandbytes", "formats.fp8", "io.json", "io.safetensors", "io.gguf",
         "io.durable", "io.hub", "model.spec", "model.metadata", "checkpoint.manifest", "checkpoint.shards",
         "checkpoint.contents", "pipeline.preflight", "pipeline.journal", "pipeline.config", "pipeline.dryrun",
         "pipeline.source", "pipeline.shares", "launch", "solver.triangle", "report.compose", "api",
         "cli.*")  # fmt: skip


def modules() -> dict[str, Path]:
    def name(path: Path) -> str:
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    return {name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


MODULES = modules()


def imports(path: Path, *, everywhere: bool) -> Iterator[str]:
    """Imported modules; with `everywhere` those inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else ast.walk(ast.Module([n for n in tree.body if not _body(n)], []))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _body(node: ast.stmt) -> bool:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return True
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def own(path: Path, *, everywhere: bool) -> set[str]:
    """Modules of this package that a file imports."""
    found = (name.removeprefix("qwenq.") for name in imports(path, everywhere=everywhere) if name.startswith("qwenq."))
    return {name for name in found if name in MODULES}


def stage_of(module: str) -> int:
    return STAGES.index(module.partition(".")[0]) if "." in module or module in STAGES else 0


def test_every_folder_is_a_stage() -> None:
    folders = {module.partition(".")[0] for module in MODULES if "." in module}
    assert folders <= set(STAGES)


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_a_file_imports_only_from_its_own_stage_and_those_before(module: str) -> None:
    # The package itself is the Python API: it hands calls on to every stage, when they are made.
    later = {used for used in own(MODULES[module], everywhere=True) if stage_of(used) > stage_of(module)}
    assert not later


def test_nothing_goes_round() -> None:
    edges = {module: own(path, everywhere=False) - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for used in sorted(edges[module]):
                visit(used, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def _light(module: str) -> bool:
    return module != "cli.demo_model" and (module in LIGHT or module.rpartition(".")[0] + ".*" in LIGHT)


def test_planning_never_imports_torch_directly_or_through_others() -> None:
    reach: dict[str, set[str]] = {}

    def heavy(module: str) -> set[str]:
        if module not in reach:
            reach[module] = set()
            direct = {name.split(".")[0] for name in imports(MODULES[module], everywhere=False)} & set(HEAVY)
            reach[module] = direct.union(*(heavy(used) for used in own(MODULES[module], everywhere=False)))
        return reach[module]

    assert {module: heavy(module) for module in MODULES if _light(module) and heavy(module)} == {}
    assert "torch" in heavy("pipeline.quantize")  # the search finds what is there


@pytest.mark.parametrize("module", LIGHT)
def test_modules_named_above_exist(module: str) -> None:
    assert module in MODULES or module.removesuffix(".*") in MODULES


def test_the_doors_open_without_torch() -> None:
    code = (
        "import sys, qwenq; assert not {m for m in sys.modules if m.startswith('qwenq.')}, 'import qwenq is instant'\n"
        "import qwenq.api, qwenq.cli.main\n"
        f"found = set({HEAVY!r}) & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("cli")])
def test_the_library_is_silent(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "sys.stdout.write", "sys.stderr.write", "breakpoint"), (module, node.lineno)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_begins_with_what_it_is(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    text = ast.get_docstring(tree)
    assert text and text.splitlines()[0].strip(), module


def test_tensor_maths_touches_no_files() -> None:
    for module in (module for module in MODULES if module.startswith("solver.")):
        names = {node.id for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Name)}
        assert not names & {"open", "Path", "os"}, module
