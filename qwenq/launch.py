"""How this process was started: alone, or as one of several ranks by torchrun, Slurm or Ray. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from qwenq.errors import UsageError

TIMEOUT_NAME = "QWENQ_RANK_TIMEOUT"
TIMEOUT_S = 30.0  # without a sign of life a rank is lost
JOIN_TIMEOUTS = 4  # times as long ranks wait for each other at the start: hosts take their time to import torch


@dataclass(frozen=True)
class Launch:
    """One of several ranks, as the variables that torchrun sets say it (torch.distributed's `env://`)."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str  # of the store
    port: int
    keeps_store: bool  # this rank opens it; torchrun's agent has it open already
    timeout_s: float = TIMEOUT_S


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The launch that WORLD_SIZE and its companions describe; None for a process alone. UsageError for half of one."""
    size = _number(environment, "WORLD_SIZE", 1, "1")
    if size == 1:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {size}, but {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set",
            hint="start it with torchrun, or see docs/scale-out.md for Slurm and Ray; alone: unset WORLD_SIZE",
        )
    rank = _number(environment, "RANK", 0)
    if rank >= size:
        raise UsageError(f"RANK is {rank}, wanted less than WORLD_SIZE, {size}")
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        timeout_s = float(environment.get(TIMEOUT_NAME, TIMEOUT_S))
    except ValueError:
        timeout_s = 0.0
    if not 1 <= timeout_s <= 3600:
        raise UsageError(f"{TIMEOUT_NAME} is {environment[TIMEOUT_NAME]}, wanted 1 to 3600 seconds")
    return Launch(
        rank=rank,
        size=size,
        local_rank=_number(environment, "LOCAL_RANK", 0, "0"),
        local_size=_number(environment, "LOCAL_WORLD_SIZE", 1, "1"),
        host=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT", 0),
        keeps_store=rank == 0 and not agent,
        timeout_s=timeout_s,
    )


def refuse_ranks(command: str, instead: str = "") -> None:
    """UsageError when this process is one of several ranks, which `command` does not go over."""
    launch = read_launch()
    if launch is not None:
        raise UsageError(
            f"`{command}` does not run on several ranks, and WORLD_SIZE is {launch.size}",
            hint=instead or "start it once, without torchrun",
        )


def _number(environment: Mapping[str, str], name: str, least: int, default: str = "") -> int:
    text = environment.get(name, default)
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UsageError(f"{name} is {text[:40]!r}, wanted a whole number from {least} on")
    return int(text)
