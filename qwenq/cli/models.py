"""Arguments that several commands take, and how a MODEL argument becomes a directory."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenq.errors import PlanError, UsageError
from qwenq.io.json import shown
from qwenq.model.spec import ModelSpec, family_spec

if TYPE_CHECKING:
    from qwenq.planning.questions import Question

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A checkpoint directory, or a hub name such as Qwen/Qwen2.5-7B-Instruct."),
]
Device = Annotated[str, typer.Option(help="auto: every GPU there is, else cpu; or cpu, cuda:N, cuda:N,cuda:M.")]
OneDevice = Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N.")]
ComputeDtype = Annotated[
    str, typer.Option("--compute-dtype", help="float32 or bfloat16; auto: float32 on a CPU, bfloat16 on a GPU.")
]
CalibrationDtype = Annotated[
    str,
    typer.Option(
        "--calibration-dtype",
        help="float32 or bfloat16, of calibration activations; auto: bfloat16 where it is computed natively.",
    ),
]
StoredDtype = Annotated[
    str, typer.Option(help="Convert tensors that are not quantized: float16 or bfloat16; auto keeps their bytes.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def resolve_model(model: str, hint: str = "") -> Path:
    """A local directory for MODEL, downloaded from the hub when it is a hub name; else PlanError, with `hint`."""
    path = Path(model)
    if path.is_dir():
        return path
    from qwenq.io.hub import fetch_model, is_hub_name

    if is_hub_name(model):
        return fetch_model(model, listen=lambda line: print(line, file=sys.stderr, flush=True))
    raise _no_checkpoint(model, hint)


def _no_checkpoint(model: str, hint: str = "") -> PlanError:
    family = family_spec(model)
    if not hint and family is not None:
        hint = f"{family.name} is a family, for sizes and plans; a checkpoint is Qwen/{family.name} or a directory"
    return PlanError(
        f"{shown(model)}: neither a directory nor a hub name (owner/name)",
        hint=hint or "give the folder that holds config.json, or for instance Qwen/Qwen2.5-7B-Instruct",
    )


def stored_question(model: str, engine: str, **asked: Any) -> Question:
    """A question to the planner about a checkpoint as it is stored, downloading nothing.

    Headers of a directory, or of the hub; a shipped model's hub name stands for the shipped shapes, in 16 bits unless
    it says otherwise.
    """
    from qwenq.io.hub import is_hub_name
    from qwenq.planning.models import load_model
    from qwenq.planning.questions import Question

    if Path(model).is_dir():
        return Question(model, checkpoint=Path(model), engine=engine, **asked)
    if not is_hub_name(model):
        raise _no_checkpoint(model)
    found = load_model(model)
    if not found.hub:
        warn_of_shipped(model)
    bits = None if found.hub or found.published else 16
    return Question(model, bits=bits, engine=engine, **asked)


def warn_of_shipped(model: str) -> None:
    """Say that a hub name's shapes are those shipped with qwenq. A family's bare name asks for nothing else."""
    from qwenq.cli.console import warn

    if "/" in model:
        warn(f"{model}: shapes as shipped with qwenq, no header was read")


def stored_dtypes(model: str) -> tuple[ModelSpec, Callable[[str], str]]:
    """Shapes of MODEL and the dtype each of its tensors is stored in, from headers alone (a family: BF16)."""
    spec = None if Path(model).is_dir() else family_spec(model)
    if spec is not None:
        warn_of_shipped(model)
        return spec, lambda name: "BF16"
    from qwenq.io.hub import is_hub_name

    if not Path(model).is_dir() and is_hub_name(model):
        from qwenq.planning.models import load_model, source_dtypes

        found = load_model(model)
        return found.spec, source_dtypes(found)
    from qwenq.checkpoint.reader import open_source

    hint = "for sizes alone a family name works: qwenq quantize Qwen2.5-72B --bits 4 --dry-run"
    source = open_source(resolve_model(model, hint))
    return source.spec, source.dtype_of


def device_names(device: str) -> list[str]:
    """The devices that --device names, one by one; UsageError for what names none."""
    names = device.split(",")
    if device != "cpu" and not all(name == "cuda" or re.fullmatch(r"cuda:\d+", name) for name in names):
        raise UsageError(f"--device {device}: wanted auto, cpu, cuda:N or cuda:N,cuda:M")
    return names


def pick_device(device: str, *, several: bool = True) -> str:
    """What is computed on: cpu, or GPUs with commas between them. `auto` becomes all (without `several` the first of
    them) that torch sees, or cpu where it sees none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return ",".join(f"cuda:{k}" for k in range(count if several else min(count, 1))) or "cpu"
    names = device_names(device)
    if device == "cpu":
        return device
    if count == 0:
        raise PlanError(f"--device {device}: no CUDA GPU is visible to torch", hint="--device cpu")
    numbers = [0 if name == "cuda" else int(name.removeprefix("cuda:")) for name in names]
    if max(numbers) >= count or len(set(numbers)) < len(numbers):
        raise PlanError(f"--device {device}: torch sees cuda:0 to cuda:{count - 1}, each can be named once")
    if len(numbers) > 1 and not several:
        raise UsageError(f"--device {device}: this command uses one GPU", hint=f"--device {names[0]}")
    return ",".join(f"cuda:{number}" for number in numbers)


def check_stored_dtype(dtype: str) -> None:
    """Raise UsageError for a --dtype that is not offered."""
    if dtype not in ("auto", "float16", "bfloat16"):
        raise UsageError(f"--dtype {dtype}: wanted auto, float16 or bfloat16")


def pick_compute_dtype(compute_dtype: str, device: str) -> str:
    """The dtype activations are computed in; float16 is refused: Qwen2.5 overflows it, and CPUs crawl in it."""
    if compute_dtype == "auto":
        return "float32" if device == "cpu" else "bfloat16"
    if compute_dtype not in ("float32", "bfloat16"):
        raise UsageError(
            f"--compute-dtype {compute_dtype}: wanted float32, bfloat16 or auto",
            hint="float16 overflows in Qwen2.5's activations and is very slow on CPUs",
        )
    return compute_dtype


def pick_calibration_dtype(calibration_dtype: str, device: str) -> str:
    """The dtype calibration activations are computed in; auto: bfloat16, unless this CPU has no instructions for it."""
    if calibration_dtype not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"--calibration-dtype {calibration_dtype}: wanted float32, bfloat16 or auto")
    if calibration_dtype != "auto":
        return calibration_dtype
    return "bfloat16" if device.startswith("cuda") or _cpu_has_bfloat16() else "float32"


def _cpu_has_bfloat16() -> bool:
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
