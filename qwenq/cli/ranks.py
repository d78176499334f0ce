"""A command as one of several ranks: joining the others, and printing from the first alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qwenq.cli.console import err, out
from qwenq.cli.options import fetched
from qwenq.cli.plain import print_step
from qwenq.launch import read_launch

if TYPE_CHECKING:
    from qwenq.pipeline.ranks import Ranks


@contextmanager
def over_ranks(device: str) -> Iterator[tuple[Ranks, str]]:
    """The ranks that this process was started with, and the device of its own: `device` where it is alone.

    All but the first are silent, up to the error that they end with.
    """
    from qwenq.pipeline.ranks import ALONE, joined, own_device

    launch = read_launch()
    if launch is None:
        yield ALONE, device
        return
    if launch.rank:
        out.quiet = err.quiet = True
        logging.disable(logging.CRITICAL)
    own = own_device(device, launch)
    try:
        with joined(launch, own, told=lambda line: print_step(f"error: {line}")) as ranks:
            yield ranks, own
    except KeyboardInterrupt:
        if launch.rank:
            raise typer.Exit(130) from None
        raise


def fetched_once(model: str, ranks: Ranks) -> Path:
    """The directory of MODEL; of the ranks of a host one downloads it, before the others look."""
    launch = read_launch()
    directory = fetched(model) if launch is None or launch.local_rank == 0 else None
    ranks.gathered("fetched")
    return directory or fetched(model)
