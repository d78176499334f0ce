#!/usr/bin/env python3
"""How a checkout of this project is built, in numbers: one Markdown table, a column for each checkout.

    count_house.py CHECKOUT... [--json counts.json] [--places]

--places lists the finds behind the numbers, one a line. Definitions:

- a floor: files that import none of the package at module level are on floor 1, every other file one above the highest
  that it imports;
- an arrow: one folder imports from another, at module level, in a function or for types. Folders are the first below
  qwenq/; loose files are one folder, but the doors, which are one each: `api`, `__main__` and the package itself. The
  package hands calls on to the API and holds the version, which any file may read: no arrow leads to it;
- backward arrows: the fewest that point up in the best order of the folders there is;
- a parameter: any but self, cls, *args and **kwargs; a command is a function that Typer calls, in cli/ also one called
  like its file;
- a comparison: ==, !=, in, not in, is, isinstance, match, startswith, a table or a lookup against names of formats or
  engines, outside their homes: literals, constants that hold such names, objects and classes called so (VLLM,
  AwqFormat). `method == "gptq"` and `solver == "gptq"` are of the solver, and lookups by the name of a package are of
  versions: neither counts.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

FORMATS = {"gptq", "awq", "compressed-tensors", "bnb-nf4", "bnb-int8", "bitsandbytes", "gguf"}
ENGINES = {"qwenq", "transformers", "vllm", "llama.cpp", "sglang"}
PACKAGES = {"qwenq", "transformers", "bitsandbytes"}  # whose versions are looked up by these names too
FORMAT_HOMES, ENGINE_HOMES = ("formats/",), ("planning/engines/", "planning/engines.py")
SHORT, MANY = 60, 6  # lines of a short file, parameters of a function
DOORS = ("api", "__init__", "__main__")
LOOSE = "(loose)"


@dataclass(frozen=True)
class Module:
    """One Python file of the package."""

    path: str  # below the package: cli/main.py
    name: str  # cli.main
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def folder(self) -> str:
        first, slash, _ = self.path.partition("/")
        return first if slash else self.name if self.name in DOORS else LOOSE


@dataclass
class Counts:
    """Numbers of one checkout, and the places behind them."""

    checkout: str
    modules: list[Module]
    places: dict[str, list[str]] = field(default_factory=dict)

    @cached_property
    def numbers(self) -> dict[str, str]:
        """Row of the table -> what is in it."""
        modules, lines = self.modules, sum(module.lines for module in self.modules)
        level = floors(modules)
        highest = max(level.values(), default=0)
        arrows = folder_imports(modules)
        backward = backward_arrows(arrows)
        wide = wide_functions(modules)
        commands = [place for place, command in wide if command]
        repeated = Counter(Path(module.path).stem for module in modules if not module.path.endswith("__init__.py"))
        imports = sum(map(import_lines, modules))
        layer_names = {m.path: m.text.count("model.layers.") for m in modules if "model.layers." in m.text}
        what = [f"{m.path}:{line}" for m in modules for line in what_docstrings(m.tree)]
        self.places = {
            "highest floor": sorted(name for name, floor in level.items() if floor == highest),
            "short files": [
                f"{m.path}: {m.lines}" for m in modules if m.lines < SHORT and not m.path.endswith("__init__.py")
            ],
            "arrows": [f"{a} -> {b}: {len(files)}" for (a, b), files in sorted(arrows.items())],
            "backward arrows": [f"{a} -> {b}: {', '.join(sorted(arrows[a, b]))}" for a, b in backward],
            "wide functions": [place + (" (command)" if command else "") for place, command in wide],
            "format comparisons": list(comparisons(modules, FORMATS, FORMAT_HOMES)),
            "engine comparisons": list(comparisons(modules, ENGINES, ENGINE_HOMES)),
            "repeated basenames": [f"{name}: {n}" for name, n in sorted(repeated.items()) if n > 1],
            "model.layers.": [f"{path}: {n}" for path, n in sorted(layer_names.items())],
            "docstrings with What": what,
        }
        found = {name: len(places) for name, places in self.places.items()}
        empty = sum(module.path.endswith("__init__.py") for module in modules)
        homes = {place.split(":")[0] for place in self.places["format comparisons"]}
        engine_files = {place.split(":")[0] for place in self.places["engine comparisons"]}
        crossing = sum(len(arrows[pair]) for pair in backward)
        return {
            "Python files but for __init__.py": f"{len(modules) - empty}",
            "lines": f"{lines:,}",
            f"files under {SHORT} lines": f"{found['short files']}",
            "loose files in qwenq/": f"{sum('/' not in module.path for module in modules)}",
            "import floors": f"{highest}",
            "import floors that loose files are on": f"{len({level[m.name] for m in modules if m.folder == LOOSE})}",
            "share of import lines": f"{100 * imports / max(lines, 1):.1f} %",
            "arrows between folders": f"{len(arrows)}",
            "backward arrows (imports behind them)": f"{len(backward)} ({crossing})",
            f"functions of more than {MANY} parameters": f"{len(wide)}",
            "of these not commands": f"{len(wide) - len(commands)}",
            "format comparisons outside formats/ (files)": f"{found['format comparisons']} ({len(homes)})",
            "engine comparisons outside planning/engines (files)": (
                f"{found['engine comparisons']} ({len(engine_files)})"
            ),
            "repeated basenames": f"{found['repeated basenames']}",
            "`model.layers.` in files (times)": f"{len(layer_names)} ({sum(layer_names.values())})",
            "docstrings that open with What": f"{len(what)}",
        }

    def to_json(self) -> dict[str, Any]:
        return {"checkout": self.checkout, "numbers": self.numbers, "places": self.places}


def count(checkout: Path) -> Counts:
    """Everything counted of the package in a checkout."""
    return Counts(checkout.name, read_modules(checkout / "qwenq"))


def read_modules(package: Path) -> list[Module]:
    """Every .py file of a package, in the order of their paths."""
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        parts = list(place.with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        text = path.read_text(encoding="utf-8")
        found.append(Module(place.as_posix(), name, text, ast.parse(text, str(path))))
    return found


# ---------------------------------------------------------------------- imports


def imported(module: Module, names: set[str], *, everywhere: bool) -> set[str]:
    """Modules of the package that one imports; without `everywhere` only when it is itself imported."""
    found: set[str] = set()
    for node in ast.walk(module.tree) if everywhere else _at_import(module.tree.body):
        if isinstance(node, ast.Import):
            said = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.path.removesuffix(".py").split("/")[: -node.level]
                base = ".".join(["qwenq", *parts, *([base] if base else [])])
            said = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        inner = {"__init__" if name == "qwenq" else name.removeprefix("qwenq.") for name in said
                 if name == "qwenq" or name.startswith("qwenq.")}  # fmt: skip
        if isinstance(node, ast.ImportFrom) and len(inner & names) > 1:
            inner.discard("__init__")  # `from qwenq import units` wants units
        found |= inner & names
    return found - {module.name}


def _at_import(body: Iterable[ast.stmt]) -> Iterator[ast.AST]:
    """Statements that run when a module is imported: not those of functions, nor those for types alone."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _at_import(node.orelse)
            continue
        yield node
        for name in ("body", "orelse", "finalbody", "handlers"):
            yield from _at_import(getattr(node, name, []))


def floors(modules: Sequence[Module]) -> dict[str, int]:
    """Module -> its floor, from 1. Modules that import each other in a circle are counted as far as the circle."""
    names = {module.name for module in modules}
    edges = {module.name: imported(module, names, everywhere=False) for module in modules}
    level: dict[str, int] = {}

    def floor(name: str, trail: tuple[str, ...]) -> int:
        if name not in level:
            below = [floor(used, (*trail, name)) for used in sorted(edges[name]) if used not in trail]
            level[name] = 1 + max(below, default=0)
        return level[name]

    for name in edges:
        floor(name, (name,))
    return level


def folder_imports(modules: Sequence[Module]) -> dict[tuple[str, str], set[str]]:
    """(folder, folder it imports from) -> the imports, as `file -> file`."""
    by_name = {module.name: module for module in modules}
    found: dict[tuple[str, str], set[str]] = {}
    for module in modules:
        for used in imported(module, set(by_name), everywhere=True):
            pair = module.folder, by_name[used].folder
            if pair[0] != pair[1] and used != "__init__":
                found.setdefault(pair, set()).add(f"{module.name} -> {used}")
    return found


def backward_arrows(arrows: dict[tuple[str, str], set[str]]) -> list[tuple[str, str]]:
    """The lightest set of arrows (by imports) that point up in some order of the folders; exact, over subsets."""
    folders = sorted({folder for pair in arrows for folder in pair})
    number = {folder: k for k, folder in enumerate(folders)}
    weight = [[0] * len(folders) for _ in folders]
    for (a, b), files in arrows.items():
        weight[number[a]][number[b]] = len(files)
    best: list[tuple[int, int]] = [(0, -1)] * (1 << len(folders))  # cost of placing a set first, its last folder
    for placed in range(1, 1 << len(folders)):
        inside = [k for k in range(len(folders)) if placed >> k & 1]
        # a folder placed last is above the others: arrows from them to it point up
        best[placed] = min(
            (best[placed & ~(1 << k)][0] + sum(weight[j][k] for j in inside if j != k), k) for k in inside
        )
    up, placed = [], (1 << len(folders)) - 1
    while placed:
        last = best[placed][1]
        placed &= ~(1 << last)
        up += [(a, folders[last]) for a in folders if placed >> number[a] & 1 and (a, folders[last]) in arrows]
    return sorted(up)


def import_lines(module: Module) -> int:
    """Lines that import statements take."""
    nodes = (node for node in ast.walk(module.tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes)


# ---------------------------------------------------------------------- functions and words


def wide_functions(modules: Sequence[Module]) -> list[tuple[str, bool]]:
    """(`file:line name (parameters)`, whether Typer calls it) of functions with more than MANY parameters."""
    found = []
    for module in modules:
        commands = command_names(module.tree)
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            number = sum(argument.arg not in ("self", "cls") for argument in arguments)
            if number > MANY:
                typed = " ".join(ast.unparse(a.annotation) for a in arguments if a.annotation)
                command = node.name in commands or "typer.Option" in typed or "typer.Argument" in typed
                command = command or module.path == f"cli/{node.name}.py"
                found.append((f"{module.path}:{node.lineno} {node.name} ({number})", command))
    return found


def command_names(tree: ast.Module) -> set[str]:
    """Functions that a module makes commands: `@app.command()`, `app.command("run")(run)`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(".command" in ast.unparse(d) for d in node.decorator_list):
            found.add(node.name)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Call) and ".command" in ast.unparse(node.func.func):
            found |= {argument.id for argument in node.args if isinstance(argument, ast.Name)}
    return found


def what_docstrings(tree: ast.Module) -> Iterator[int]:
    """Lines of modules, classes and functions whose docstring opens with the word What."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].lower() == "what":
                yield getattr(node, "lineno", 1)


# ---------------------------------------------------------------------- comparisons


def comparisons(modules: Sequence[Module], names: set[str], homes: tuple[str, ...]) -> Iterator[str]:
    """`file:line code` of every comparison with one of `names` outside `homes`."""
    constants = named_constants(modules, names)
    for module in modules:
        if module.path.startswith(homes):
            continue
        for node in ast.walk(module.tree):
            if _compares(node, names, constants):
                code = " ".join(ast.unparse(node).split())
                yield f"{module.path}:{getattr(node, 'lineno', 0)} {code[:100]}"


def named_constants(modules: Sequence[Module], names: set[str]) -> set[str]:
    """Module-level constants that hold several such names and nothing else: FORMATS, BNB_FORMATS, ..."""
    found = set()
    for module in modules:
        for node in module.tree.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and target.id.isupper() and not isinstance(value, ast.Constant):
                held = literals(value)
                if held and held <= names:
                    found.add(target.id)
    return found


def literals(node: ast.AST | None) -> set[str]:
    """Strings that an expression consists of, a constant or a collection of constants; empty for anything else."""
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) else set()
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return set().union(*map(literals, node.elts)) if all(map(literals, node.elts)) else set()
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("frozenset", "set", "tuple") and node.args:
        return literals(node.args[0])
    return set()


def _compares(node: ast.AST, names: set[str], constants: set[str]) -> bool:
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        if any(not isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn | ast.Is | ast.IsNot) for op in node.ops):
            return False
        if any(_is_method(side) or ast.unparse(side) == "sys.modules" for side in sides):
            return False
        return any(literals(side) & names or _called(side) in constants or _object(side, names) for side in sides)
    if isinstance(node, ast.Dict):
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        return len(keys) > 1 and set(keys) <= names
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value in names - PACKAGES
    if isinstance(node, ast.Call) and _called(node.func) in ("get", "startswith"):
        first = node.args[0] if node.args else None
        return isinstance(first, ast.Constant) and first.value in names - PACKAGES
    if isinstance(node, ast.Call) and _called(node.func) == "isinstance":
        classes = ast.walk(node.args[1])
        return any(_object(part, names) for part in classes)
    return isinstance(node, ast.MatchValue) and bool(literals(node.value) & names)


def _called(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _object(node: ast.AST, names: set[str]) -> bool:
    """An object or class called after a format or engine: VLLM, formats.AWQ, LlamaCppEngine, Gptq."""
    called = _called(node)
    if not called[:1].isupper():
        return False
    plain = called.replace("_", "").lower().removesuffix("format").removesuffix("engine")
    return plain in {name.replace("-", "").replace(".", "") for name in names}


def _is_method(node: ast.AST) -> bool:
    """The solver, or its method, which shares the name gptq with a format; `quant_method` is a format's."""
    text = ast.unparse(node)
    return text.rpartition(".")[2].strip("'\"]") in ("method", "solver")


# ---------------------------------------------------------------------- output


def table(counts: Sequence[Counts]) -> list[str]:
    """Markdown, a column for each checkout."""
    names = ["before", "after"] if len(counts) == 2 else [found.checkout for found in counts]
    lines = [f"| count | {' | '.join(names)} |", "|---" * (len(counts) + 1) + "|"]
    rows = [found.numbers for found in counts]
    lines += [f"| {row} | {' | '.join(numbers[row] for numbers in rows)} |" for row in rows[0]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="+", metavar="CHECKOUT")
    parser.add_argument("--json", type=Path, help="File to write numbers and places to.")
    parser.add_argument("--places", action="store_true", help="List what is behind the numbers.")
    asked = parser.parse_args()
    counts = [count(checkout.resolve()) for checkout in asked.checkouts]
    print("\n".join(table(counts)))
    if asked.json:
        asked.json.write_text(json.dumps([found.to_json() for found in counts], indent=1) + "\n", encoding="utf-8")
    if asked.places:
        for found in counts:
            for name, places in found.places.items():
                print(f"\n## {found.checkout}: {name}\n", *places, sep="\n")


if __name__ == "__main__":
    main()
