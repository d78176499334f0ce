"""The `qwenq` command: every failure of ours becomes one line, a hint and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qwenq import __version__
from qwenq.cli.convert import convert
from qwenq.cli.demo import demo
from qwenq.cli.evaluate import evaluate
from qwenq.cli.inspect import inspect
from qwenq.cli.measure import measure
from qwenq.cli.plan import plan
from qwenq.cli.quantize import quantize
from qwenq.cli.report import report
from qwenq.cli.run import run
from qwenq.cli.sensitivity import sensitivity
from qwenq.cli.serve import serve
from qwenq.cli.verify import verify
from qwenq.cli.vram import vram_app
from qwenq.errors import QwenqError


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except QwenqError as error:
            print(f"error: {error.message}", file=sys.stderr)
            if error.hint:
                print(f"hint: {error.hint}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize Qwen2.5-72B-class models on machines that cannot hold them; plan, measure and run them on yours.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qwenq {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("quantize")(quantize)
app.command("eval")(evaluate)
app.command("run")(run)
app.command("sensitivity")(sensitivity)
app.command("serve")(serve)
app.command("inspect")(inspect)
app.command("convert")(convert)
app.command("verify")(verify)
app.command("report")(report)
app.command("demo")(demo)
vram_app.command("measure")(measure)
app.add_typer(vram_app, name="vram")
app.command("plan")(plan)


def main() -> None:
    """Console entry: run the command line."""
    app()
