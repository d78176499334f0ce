"""The order of rooms: a file imports only from layers before its own; planning never imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qwenq"

# Words, arithmetic and tensor maths, disk, network, work, telling, door. Within a layer files may use each other as
# long as nothing goes round; between layers only upwards on this page.
LAYERS: tuple[tuple[str, frozenset[str]], ...] = tuple(
    (name, frozenset(rooms.split()))
    for name, rooms in (
        ("words", "__init__ errors units spec layout scheme results markdown"),
        (
            "arithmetic, and what it reads: headers and configurations",
            "headers fingerprint hub preflight planning planning.allocator planning.activations planning.engines "
            "planning.kernels "
            "planning.rig planning.weights planning.terms planning.torch_terms planning.vllm_terms "
            "planning.llamacpp_terms planning.memory planning.placement planning.parallel planning.plan "
            "planning.speed planning.flags planning.escapes planning.families planning.ggufsize planning.models "
            "planning.validate "
            "planning.detect planning.chart planning.asking planning.knapsack planning.sensitivity planning.budget "
            "planning.recipefile planning.fitting planning.tensor_parallel planning.offload planning.profile "
            "planning.declared planning.written "
            "formats formats.config formats.quantization formats.patterns formats.gptq formats.awq formats.compressed "
            "formats.bnb",
        ),
        ("tensor maths", "lanes devices quant quant.* metrics"),
        ("disk", "files manifest provenance card shards journal formats.storage tokens calibration checkpoint audit"),
        ("network", "attention stream replicas"),
        (
            "work",
            "runtime runtime.* streams clock block bnb head fisher sensitivity job host finish layer rederive quantize "
            "convert verify evaluate demo web",
        ),
        ("telling", "report report.* page page.*"),
        ("door", "cli cli.* __main__"),
    )
)

HEAVY = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")
PLANNING = LAYERS[0][1] | LAYERS[1][1] | {"journal", "audit"}
PLANNING |= {"cli.vram", "cli.plan", "cli.recipe", "cli.sensitivity"}
PLANNING |= {"report.compose", "cli.report"}
PLANNING |= {"files", "manifest", "verify", "cli.verify"}  # hashing needs no torch either

LONG = {
    "hub": "a directory for a hub name: downloads, their resumption and their errors belong together",
    "quant.gptq": "one algorithm; what it needs of a Hessian is of no use elsewhere",
}


def rooms() -> dict[str, Path]:
    def name(path: Path) -> str:
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)

    return {name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


ROOMS = rooms()


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
    """Rooms of this package that a file imports."""
    found = (name.removeprefix("qwenq.") for name in imports(path, everywhere=everywhere) if name.startswith("qwenq"))
    return {name for name in found if name in ROOMS}


def layer_of(room: str) -> int | None:
    """The room's layer; `quant.*` stands for every file of that folder."""
    folder = room.rpartition(".")[0] + ".*"
    return next((k for k, (_, names) in enumerate(LAYERS) if room in names or folder in names), None)


def test_every_file_has_a_layer() -> None:
    listed = [room for _, names in LAYERS for room in names]
    assert len(listed) == len(set(listed))
    missing = [room for room in ROOMS if layer_of(room) is None]
    assert not missing, f"put {missing} into a layer above"


@pytest.mark.parametrize("room", ROOMS)
def test_a_file_imports_only_from_layers_before_its_own(room: str) -> None:
    for used in own(ROOMS[room], everywhere=True) - {room}:
        ours, theirs = layer_of(room), layer_of(used)
        if ours is not None and theirs is not None:  # else test_every_file_has_a_layer says so
            assert theirs <= ours, f"{room} imports {used}"


def test_nothing_goes_round() -> None:
    edges = {room: own(path, everywhere=False) - {room} for room, path in ROOMS.items()}
    done: set[str] = set()

    def visit(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, " -> ".join((*trail, room))
        if room not in done:
            for used in sorted(edges[room]):
                visit(used, (*trail, room))
            done.add(room)

    for room in edges:
        visit(room, ())


def test_planning_never_imports_torch_directly_or_through_others() -> None:
    reach: dict[str, set[str]] = {}

    def heavy(room: str) -> set[str]:
        if room not in reach:
            reach[room] = set()
            direct = {name.split(".")[0] for name in imports(ROOMS[room], everywhere=False)} & set(HEAVY)
            reach[room] = direct.union(*(heavy(used) for used in own(ROOMS[room], everywhere=False)))
        return reach[room]

    assert {room: heavy(room) for room in sorted(PLANNING & set(ROOMS)) if heavy(room)} == {}
    assert "torch" in heavy("quantize")  # the search finds what is there


def test_the_door_opens_without_torch() -> None:
    code = f"import sys, qwenq.cli.main; found = set({HEAVY!r}) & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("room", ROOMS)
def test_a_file_over_400_lines_is_two_rooms(room: str) -> None:
    lines = len(ROOMS[room].read_text(encoding="utf-8").splitlines())
    assert lines <= 400 or LONG.get(room), f"{room} has {lines} lines"


@pytest.mark.parametrize("room", [room for room in ROOMS if not room.startswith("cli")])
def test_the_library_is_silent(room: str) -> None:
    tree = ast.parse(ROOMS[room].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "sys.stdout.write", "sys.stderr.write", "breakpoint"), (room, node.lineno)


@pytest.mark.parametrize("room", ROOMS)
def test_a_file_begins_with_what_it_is(room: str) -> None:
    tree = ast.parse(ROOMS[room].read_text(encoding="utf-8"))
    text = ast.get_docstring(tree)
    assert text and text.splitlines()[0].strip(), room


def test_tensor_maths_touches_no_files() -> None:
    for room in (room for room in ROOMS if layer_of(room) == 2):
        names = {node.id for node in ast.walk(ast.parse(ROOMS[room].read_text())) if isinstance(node, ast.Name)}
        assert not names & {"open", "Path", "os"}, room
