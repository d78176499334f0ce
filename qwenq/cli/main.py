"""The `qwenq` command: a table of commands, each imported when it is asked for; errors as one line and a hint."""

from __future__ import annotations

import errno
import gc
import importlib
import inspect
import io
import os
import re
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from qwenq import __version__
from qwenq.cli.plain import escape_logs, print_line, print_step
from qwenq.errors import QwenqError, UsageError, out_of_memory
from qwenq.launch import refuse_ranks


@dataclass(frozen=True)
class Entry:
    """Module and function of a command, and its line in the list of commands (the first of its docstring)."""

    module: str
    name: str  # of the function, or of a Typer application with subcommands
    help: str


COMMANDS = {
    "quantize": Entry(
        "quantize", "quantize",
        "Turn a 16-bit checkpoint into a 4-bit, 8-bit or mixed one, layer by layer, and measure what it lost.",
    ),
    "eval": Entry(
        "evaluate", "evaluate",
        "Measure what a checkpoint lost against its 16-bit reference: perplexity, KL divergence, top-1 agreement.",
    ),
    "run": Entry(
        "run", "run",
        "Run a checkpoint with packed weights on this machine's GPUs, host memory and disk, and chat with it.",
    ),
    "sensitivity": Entry(
        "sensitivity", "sensitivity",
        "Measure the KL each fused group of MODEL costs at each scheme, for `qwenq quantize --sensitivity FILE`.",
    ),
    "serve": Entry(
        "serve", "serve",
        "Serve a checkpoint over an OpenAI-compatible API: /v1/models, /v1/chat/completions, /v1/completions.",
    ),
    "inspect": Entry(
        "inspect", "inspect",
        "Print shapes, parameters, bytes by part and KV bytes per token; check config, headers and stated totals.",
    ),
    "convert": Entry(
        "convert", "convert",
        "Store a quantized checkpoint's codes in another format, bit for bit, without solving or rounding anything.",
    ),
    "verify": Entry(
        "verify", "verify",
        "Check every file of a checkpoint against its manifest and list missing, changed and extra files.",
    ),
    "report": Entry(
        "report", "report",
        "Write report.html (self-contained) and report.md from the manifests of finished runs.",
    ),
    "demo": Entry(
        "demo", "demo",
        "Fetch a real 135M model, quantize it to 8 and 4 bits, measure the drift, and write a report (HTML, Markdown).",
    ),
    "vram": Entry(
        "vram", "vram_app",
        "Show how much memory a model needs on a rig. `qwenq vram MODEL` is short for `qwenq vram estimate MODEL`.",
    ),
    "plan": Entry(
        "plan", "plan", "Plan MODEL on a rig. Prints the plan either way, and exits with 3 if the model does not fit."
    ),
}  # fmt: skip
# Subcommands that are defined in modules of their own.
SUBCOMMANDS = {
    "vram": {
        "measure": Entry(
            "measure", "measure", "Run a model at each context and compare its real memory peaks with the estimate."
        ),
    },
}  # fmt: skip
OVER_RANKS = ("quantize", "eval", "sensitivity")  # commands that go over several processes
RENAMED_FLAGS = {"--pull": "--error-correction", "--pull-share": "--error-correction-share"}


class _Command(TyperCommand):
    """A command that takes renamed flags by their old names too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = args[: args.index("--")] if "--" in args else args
        renamed = [_renamed(word) for word in options]
        return super().parse_args(ctx, renamed + args[len(options) :])


def _renamed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return RENAMED_FLAGS.get(flag, flag) + equals + value


class _Deferred(TyperCommand):
    """A command's name and help line; its module is imported when it is invoked, or asked how it is completed."""

    def __init__(self, name: str, entry: Entry, more: Iterable[_Deferred] = ()) -> None:
        super().__init__(name=name, help=entry.help)
        self.entry, self.more = entry, more

    def load(self) -> Any:
        """The real command."""
        found = getattr(importlib.import_module(f"qwenq.cli.{self.entry.module}"), self.entry.name)
        if isinstance(found, typer.Typer):
            command: Any = typer.main.get_group(found)
            for deferred in self.more:
                command.add_command(deferred)
        else:
            alone = typer.Typer(add_completion=False)
            alone.command(self.name, cls=_Command)(found)
            command = typer.main.get_command(alone)
        command.name = self.name
        for each in (command, *getattr(command, "commands", {}).values()):
            _read_plainly(each)
            each.help = _unwrapped(each.help or "")
        if not gc.isenabled():  # by `qwenq.__main__`, while modules are imported
            gc.freeze()
            gc.enable()
        return command

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if self.name not in OVER_RANKS:
            refuse_ranks(f"qwenq {self.name}")
        return self.load().make_context(info_name, args, parent=parent, **extra)


class _Commands(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, entry in COMMANDS.items():
            more = tuple(_Deferred(sub, found) for sub, found in SUBCOMMANDS.get(name, {}).items())
            self.add_command(_Deferred(name, entry, more))
        _read_plainly(self)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            return super().parse_args(ctx, args)  # prints the help
        try:
            return super().parse_args(ctx, args)
        except _MisusedCommand as error:
            raise _told(_plain_usage(error)) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.Exit:  # a RuntimeError: of a command that has said why
            raise
        except _MisusedCommand as error:
            if not error.format_message():  # a group of commands without one: its help was printed
                raise typer.Exit(error.exit_code) from None
            raise _told(_plain_usage(error)) from None
        except QwenqError as error:
            raise _told(error) from None
        except (OSError, MemoryError, RuntimeError, UnicodeError, ImportError) as error:
            if _interrupts:
                raise _interrupted() from None
            if (refused := _refused_by_system(error)) is None:
                raise
            raise _told(refused) from None
        except KeyboardInterrupt:
            raise _interrupted() from None
        except Exception:
            if not _interrupts:
                raise
            raise _interrupted() from None  # an import was cut short, and what needed it failed


# click's UsageError, of the click that Typer brings or of the installed one.
_MisusedCommand: Any = typer.BadParameter.__base__


def _plain_usage(error: Any) -> UsageError:
    """What click says of a mistaken command line as an error of this program: one line, and a hint."""
    message, _, options = error.format_message().partition(" (Possible options: ")
    asked = f"did you mean {options.removesuffix(')').replace(', ', ' or ')}? " if options else ""
    message = re.sub("^Invalid value for (.+?): ", lambda found: found[1].replace("'", "") + ": ", message)
    if message[1:2].islower():
        message = message[0].lower() + message[1:].removesuffix(".")
    path = f"{error.ctx.command_path} " if error.ctx else ""
    return UsageError(message, hint=f"{asked}`{path}-h` lists what there is")


_interrupts: list[int] = []  # of this process; libraries swallow some while they are imported


def _interrupt(signalled: int, frame: Any) -> None:
    _interrupts.append(signalled)
    raise KeyboardInterrupt


def _interrupted() -> typer.Exit:
    print_step("interrupted")
    return typer.Exit(130)


def _told(error: QwenqError) -> typer.Exit:
    """Print an error's line and hint; the exit with its code."""
    print_step(f"error: {error.message}")
    if error.hint:
        print_step(f"hint: {error.hint}")
    return typer.Exit(error.exit_code)


def _refused_by_system(error: Exception) -> QwenqError | None:
    """A one-line error for failures of files, memory or encoding; None for a bug in this program."""
    if isinstance(error, UnicodeError):
        return QwenqError(f"text that is not UTF-8 ({error})")
    if isinstance(error, OSError):
        if error.errno in (None, errno.EPIPE):  # `qwenq ... | head` ends quietly: click knows how
            return None
        hint = "raise the limit: ulimit -n" if error.errno == errno.EMFILE else ""
        where = f"{error.filename}: " if error.filename else ""
        return QwenqError(f"{where}{error.strerror or os.strerror(error.errno)}", hint=hint)
    if out_of_memory(error):
        return QwenqError("out of memory", hint="close other programs, or ask for less at once")
    if "Too many open files" in str(error):
        return QwenqError("Too many open files", hint="raise the limit: ulimit -n")
    return None


def _unwrapped(text: str) -> str:
    """A help text whose lines end with its paragraphs: Typer breaks them where a docstring does, too."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))


def _read_plainly(command: Any) -> None:
    """Make a command take plain values as they are: Typer reads each by pydantic, whose import outlasts a plan.

    Whatever is not plainly right is left to Typer, which says what is wrong. Older versions of it know no pydantic.
    """
    listed = command.get_params

    def get_params(ctx: Any) -> list[Any]:
        parameters = list(listed(ctx))
        for parameter in parameters:
            descriptor = getattr(parameter, "type_descriptor", None)
            if descriptor is not None and not parameter.multiple and parameter.nargs == 1:
                parameter.process_value = _Plainly(parameter, descriptor.annotation)
        return parameters

    command.get_params = get_params


@dataclass(frozen=True)
class _Plainly:
    """The value of a parameter of type `kind`, plain or else as Typer reads it."""

    parameter: Any
    kind: Any

    def __call__(self, ctx: Any, value: Any) -> Any:
        parameter = self.parameter
        if isinstance(value, str) and not ctx.resilient_parsing and (wanted := self.missed(value)):
            raise typer.BadParameter(f"{value[:40]!r}, wanted {wanted}", ctx=ctx, param=parameter)
        plain = _plain(self.kind, value, parameter.min, parameter.max)
        if plain is None and (value is not None or parameter.required):
            return type(parameter).process_value(parameter, ctx, value)
        return parameter.callback(ctx, parameter, plain) if parameter.callback is not None else plain

    def missed(self, text: str) -> str:
        """The number, or the argument, that was wanted in the place of a text that is none, in words; else nothing."""
        least, most, names = self.parameter.min, self.parameter.max, {int: "a whole number", float: "a number"}
        if self.kind not in names:
            return "a name or a path" if text == "" and self.parameter.param_type_name == "argument" else ""
        try:
            number = self.kind(text)
        except ValueError:
            number = None
        if number is not None and (least is None or number >= least) and (most is None or number <= most):
            return ""
        low = "" if least is None else f" from {least:g}" if most is not None else f" of at least {least:g}"
        return names[self.kind] + low + ("" if most is None else f" to {most:g}")


def _plain(kind: Any, value: Any, least: float | None, most: float | None) -> Any:
    """`value` as the plain type `kind`; None where that takes more than a look."""
    if kind is Path and isinstance(value, str | Path):
        path = Path(value)
        return path if not path.exists() or os.access(path, os.R_OK) else None
    if kind is int and isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        value = int(value)
    if kind is float and isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]{1,18})?", value):
        value = float(value)
    if type(value) is not kind or kind not in (str, int, float):
        return None
    inside = (least is None or value >= least) and (most is None or value <= most)
    return value if inside else None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize Qwen2.5-72B-class models on machines that cannot hold them; plan, measure and run them.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_line(f"qwenq {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def command(name: str, *subcommands: str) -> Any:
    """A command as Typer has it, for instance `command("vram", "estimate")`."""
    found: Any = typer.main.get_command(app).commands[name].load()  # type: ignore[attr-defined]
    for subcommand in subcommands:
        found = found.commands[subcommand]
        found = found.load() if isinstance(found, _Deferred) else found
    return found


class _Messages(io.FileIO):
    """Standard error that ends no job of hours: what a closed terminal or a full disk does not take is lost."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno == errno.EPIPE:  # `qwenq ... 2>&1 | head` ends
                raise
            return len(data)


def _open_messages() -> None:
    """Make `sys.stderr` one that nothing fails for; where it was closed, the null device in its place."""
    handle, encoding = 0, "utf-8"
    if isinstance(sys.stderr, io.TextIOWrapper):
        handle, encoding = sys.stderr.fileno(), sys.stderr.encoding
    elif sys.stderr is None:  # its number is free, and would be the next file's
        handle = os.open(os.devnull, os.O_WRONLY)
    if handle:
        raw = _Messages(handle, "w", closefd=False)
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)


def main() -> None:
    """Console entry: run the command line."""
    _open_messages()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding does not hold
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    escape_logs()
    app()
