"""Tables to stdout, warnings and progress to stderr, by rich."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qwenq.cli.plain import print_step
from qwenq.escaping import printable, printable_lines
from qwenq.results import BlockResult, DriftReport, Interval
from qwenq.units import format_seconds


class _PlainConsole(Console):
    """A console to which every string means itself: no markup, no emoji, and nothing that moves the cursor."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable_lines(text), **options)


out = _PlainConsole()
err = _PlainConsole(stderr=True)


def warn(line: str) -> None:
    """One line to stderr, however long."""
    err.print(Text.assemble(("warning:", "yellow"), " ", printable(line)), soft_wrap=True)


class LayerProgress:
    """A live bar on a terminal, one plain line per layer elsewhere; both to stderr."""

    def __init__(self, total: int | None = None, *, quiet: bool = False) -> None:
        self.total, self.quiet, self.done = total, quiet, 0  # None: told later, or never
        self.fallbacks: set[str] = set()  # kinds that were told
        self.started = 0.0  # when the first layer began: what goes before it is not repeated by the others
        self.live = sys.stderr.isatty() and not quiet
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
        )
        self.task = self.bar.add_task("starting", total=total)

    def __enter__(self) -> LayerProgress:
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *args: object) -> None:
        if self.live:
            self.bar.stop()

    def __call__(self, event: BlockResult | str) -> None:
        """A step's line, or a finished layer's figures."""
        if isinstance(event, str):
            self.say(event)
        else:
            self.layer(event)

    def say(self, line: str) -> None:
        """A step that is not a layer."""
        if self.live:
            self.bar.update(self.task, description=printable(line))
        elif not self.quiet:
            print_step(line)

    def layer(self, result: BlockResult) -> None:
        """A finished layer: its worst linear's error, seconds, time left."""
        self.started = self.started or time.perf_counter() - result.seconds
        self.done += 1
        worst = result.worst if result.linears else None
        errors = f"worst {worst.shown_db:.1f} dB ({worst.name.rsplit('.', 1)[1]})" if worst else "kept in 16 bit"
        for linear in result.linears:
            if linear.fallback and linear.fallback not in self.fallbacks:
                self.fallbacks.add(linear.fallback)  # the job's own warnings count how many there were
                warn(f"{linear.name}: rounded to nearest ({linear.fallback}); further ones are counted at the end")
        if self.live:
            self.bar.update(self.task, completed=result.layer + 1, description=f"layer {result.layer} {errors}")
        elif not self.quiet:
            assert self.total is not None
            left = (self.total - result.layer - 1) * (time.perf_counter() - self.started) / self.done
            states = f", hidden states {result.stream_error_db:.1f} dB" if result.stream_error_db is not None else ""
            print_step(
                f"layer {result.layer + 1}/{self.total}  {errors}{states}  {format_seconds(result.seconds)}  "
                f"left {format_seconds(left)}"
            )

    def step(self, done: int, total: int) -> None:
        """A finished layer without figures."""
        if self.live:
            self.bar.update(self.task, total=total, completed=done, description="evaluating")


def drift_table(drift: DriftReport, reference: str = "16-bit") -> Table:
    """The drift report as a table of one figure a row; `reference` says what it was measured against."""
    size = f"{drift.windows} x {drift.window_tokens} tokens, {drift.compute_dtype}"
    table = Table(title=f"drift on {drift.text} ({size})")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    ppl, kl, top = drift.perplexity_increase_percent, drift.kl, drift.top1_agreement

    none = "one window" if drift.windows == 1 else "not finite"

    def between(interval: Interval, spec: str, unit: str = "", scale: float = 1.0) -> str:
        known = math.isfinite(interval.low) and math.isfinite(interval.high)
        return f"{scale * interval.low:{spec}} to {scale * interval.high:{spec}}{unit}" if known else none

    def error(se: float) -> str:
        return f"SE {se:.3f}" if math.isfinite(se) else none

    table.add_row("mean KL (nats/token)", f"{kl.mean:.5f}", between(kl, ".5f"))
    table.add_row("median KL, 99th percentile", f"{drift.kl_median:.5f}, {drift.kl_p99:.4f}", "")
    table.add_row("top-1 agreement", f"{100 * top.mean:.2f} %", between(top, ".2f", " %", 100))
    table.add_row(
        f"perplexity, {reference}", f"{drift.reference_perplexity:.3f}", error(drift.reference_perplexity_se)
    )
    table.add_row("perplexity, quantized", f"{drift.perplexity:.3f}", error(drift.perplexity_se))
    table.add_row("perplexity increase (paired)", f"{ppl.mean:+.2f} %", between(ppl, "+.2f", " %"))
    table.add_row("noise floor (KL)", f"{drift.noise_floor_kl:.2g}", "")
    if drift.non_finite:
        table.add_row("logit rows not finite", f"{drift.non_finite} of {drift.tokens}", "")
    return table
