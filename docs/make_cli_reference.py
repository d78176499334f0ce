"""docs/cli.md from the commands themselves: `python docs/make_cli_reference.py` writes it, `--check` compares."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenq.cli.main import COMMANDS, RENAMED_FLAGS, command

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Command line

Made from the commands by `docs/make_cli_reference.py`; a test keeps it so.

Results go to stdout; progress, warnings and errors to stderr. Exit codes: 0 done, 1 an error in one line with a hint,
2 wrong usage, 3 an honest no (does not fit, or lost more than allowed), 130 interrupted. `qwenq --install-completion`
teaches the shell the commands and their options.
"""


def reference() -> str:
    """The page."""
    old = ", ".join(f"`{then}` for `{now}`" for then, now in RENAMED_FLAGS.items())
    parts = [HEAD, f"Old names of options still work: {old}.\n"]
    for name in COMMANDS:
        found = command(name)
        subcommands = getattr(found, "commands", {})
        if subcommands:
            parts.append(f"## qwenq {name}\n\n{paragraphs(found.help)}\n")
            parts += [section(f"{name} {sub}", command(name, sub), "###") for sub in subcommands]
        else:
            parts.append(section(name, found, "##"))
    return "\n".join(parts)


def section(name: str, found: Any, level: str) -> str:
    """One command: usage, text, and a table of options a panel."""
    arguments = [p for p in found.params if p.param_type_name == "argument"]
    usage = " ".join(["qwenq", *name.split(), *map(shown_argument, arguments), "[OPTIONS]"])
    lines = [f"{level} qwenq {name}", "", f"    {usage}", "", paragraphs(found.help), ""]
    lines += [f"- `{argument_name(p)}`: {p.help or ''}" for p in arguments]
    lines += [""] if arguments else []
    panels: dict[str, list[Any]] = {}
    for parameter in found.params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            panels.setdefault(parameter.rich_help_panel or "Options", []).append(parameter)
    for panel, options in panels.items():
        lines += [f"| {panel} | |", "| --- | --- |"]
        lines += [f"| {names(option)} | {' '.join(meaning(option))} |" for option in options]
        lines += [""]
    return "\n".join(lines)


def argument_name(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def shown_argument(argument: Any) -> str:
    name = argument_name(argument) + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def names(option: Any) -> str:
    """Flags, with the value's name behind the last one."""
    flags = [f"`{flag}`" for flag in (*option.opts, *option.secondary_opts)]
    if not option.is_flag:
        flags[-1] = f"{flags[-1][:-1]} {option.metavar or option.type_descriptor.annotation.__name__.upper()}`"
    return ", ".join(flags)


def meaning(option: Any) -> Iterator[str]:
    """Help, range and default of an option."""
    yield re.sub(r"(?<=\S)\|(?=\S)", r"\\|", option.help or "")
    if option.min is not None or option.max is not None:
        yield f"At least {option.min}." if option.max is None else f"{option.min:g} to {option.max:g}."
    if option.envvar:
        yield f"Environment: `{option.envvar}`."
    if not option.is_flag and option.show_default and option.default not in (None, "", Path()):
        yield f"Default: `{option.default}`."


def paragraphs(text: str) -> str:
    """Text with each paragraph on one line."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def main() -> None:
    made = reference()
    if "--check" in sys.argv:
        raise SystemExit(0 if PAGE.read_text(encoding="utf-8") == made else f"{PAGE} is old: python {sys.argv[0]}")
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
