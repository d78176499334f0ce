"""Options that several commands take, or that are many; each with its help and the panel of the help it stands in."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from qwenq.api import LoadWords
from qwenq.cli.console import print_step, warn
from qwenq.formats.base import FORMATS, names_of
from qwenq.pipeline.source import model_directory

ASYMMETRIC = names_of((form for form in FORMATS.values() if form.asymmetric), "and")
BITS, BUDGET, TEXT, SOLVER, MACHINE, JOB = "Bits", "Bits to a budget", "Text", "Solver", "Machine", "Job"
ENGINE, ANSWER, SERVER, WEIGHTS = "Engine", "Answer", "Server", "Weights"

# ---------------------------------------------------------------------- everywhere

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A checkpoint directory, or a hub name such as Qwen/Qwen2.5-7B-Instruct."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.", rich_help_panel=JOB)]
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda:N or cuda:N,cuda:M; auto: every GPU there is, or cpu.",
        metavar="DEVICE", show_default=False, rich_help_panel=MACHINE,
    ),
]  # fmt: skip
OneDevice = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cpu or cuda:N.", metavar="DEVICE", show_default=False, rich_help_panel=MACHINE
    ),
]
ComputeDtype = Annotated[
    str,
    typer.Option(
        help="Of activations: float32 (auto on a CPU), bfloat16 (on a GPU).",
        metavar="DTYPE", show_default=False, rich_help_panel=MACHINE,
    ),
]  # fmt: skip
SequenceLength = Annotated[int, typer.Option(help="Tokens a window.", min=2, metavar="N", rich_help_panel=TEXT)]
Calibration = Annotated[
    str,
    typer.Option(
        help="A set's name, or a .txt, .jsonl, .json, .parquet (also .gz) or .npy file.",
        metavar="TEXT",
        rich_help_panel=TEXT,
    ),
]

# ---------------------------------------------------------------------- quantize

Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="Directory to make.", metavar="DIR", show_default=False, rich_help_panel=JOB
    ),
]
Bits = Annotated[
    int | None, typer.Option(help="4 or 8, for every linear. Default 4.", metavar="N", rich_help_panel=BITS)
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Columns a scale: 128, 64, 32, -1 (row). Default 128.", metavar="N", rich_help_panel=BITS
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format", help=", ".join(FORMATS) + ".", metavar="NAME", rich_help_panel=BITS
    ),
]
Asymmetric = Annotated[
    bool | None,
    typer.Option(
        "--asymmetric/--symmetric",
        help=f"Zero points for each group. Default: only for {ASYMMETRIC}.",
        rich_help_panel=BITS,
    ),
]
PadForTp = Annotated[
    int | None,
    typer.Option(
        help="Widen the FFN with zeros to split on so many GPUs.", min=1, metavar="GPUS", rich_help_panel=BITS
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        help="Best mixed bits of shard files at most so large, e.g. 47GB.", metavar="SIZE", rich_help_panel=BUDGET
    ),
]
BitsPerWeight = Annotated[
    str | None,
    typer.Option(
        "--bpw", help="Best mixed bits of at most so many a linear weight, e.g. 5.",
        metavar="BITS", rich_help_panel=BUDGET,
    ),
]  # fmt: skip
Fit = Annotated[
    str | None,
    typer.Option(
        help='Best mixed bits that fit a rig, e.g. "2x RTX 3090".', metavar="RIG", rich_help_panel=BUDGET
    ),
]
Context = Annotated[
    str | None,
    typer.Option(
        "--context", "-c", help="Tokens that --fit leaves room for. Default 8k.", metavar="N", rich_help_panel=BUDGET
    ),
]
FitEngine = Annotated[
    str | None,
    typer.Option(
        "--engine", help="Engine of --fit: qwenq, transformers or vllm.", metavar="NAME", rich_help_panel=BUDGET
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option(help="A recipe file, perhaps edited.", metavar="FILE", rich_help_panel=BUDGET)
]
SensitivityFile = Annotated[
    Path | None,
    typer.Option(
        help="A table that `qwenq sensitivity` wrote for this model.", metavar="FILE", rich_help_panel=BUDGET
    ),
]
SaveRecipe = Annotated[
    Path | None,
    typer.Option(
        help="With --dry-run: write the recipe there, to edit and give back.", metavar="FILE", rich_help_panel=BUDGET
    ),
]
NumSamples = Annotated[
    int | None,
    typer.Option(
        "--num-samples", "-n", help="Calibration windows. Default: all, at most 128.",
        min=1, metavar="N", rich_help_panel=TEXT,
    ),
]  # fmt: skip
Seed = Annotated[int, typer.Option(help="Decides which windows are drawn.", min=0, metavar="N", rich_help_panel=TEXT)]
EvalText = Annotated[str, typer.Option(help="Held-out text for the divergence.", metavar="TEXT", rich_help_panel=TEXT)]
EvalSamples = Annotated[
    int | None,
    typer.Option(
        help="Held-out windows. Default: all, at most 20.", min=1, metavar="N", rich_help_panel=TEXT
    ),
]
Method = Annotated[
    str | None, typer.Option(help="gptq (default) or rtn, rounding to nearest.", metavar="NAME", rich_help_panel=SOLVER)
]
DampPercent = Annotated[
    float | None,
    typer.Option(
        help="Damping, of the mean Hessian diagonal. Default 0.02.",
        min=0.0, max=1.0, metavar="SHARE", rich_help_panel=SOLVER,
    ),
]  # fmt: skip
Fold = Annotated[
    bool,
    typer.Option(
        "--fold/--no-fold", help="Channel scales in norms and up_proj; off: LoRA fits.",
        show_default=False, rich_help_panel=BITS,
    ),
]  # fmt: skip
ErrorCorrection = Annotated[
    float | None,
    typer.Option(
        help="Strength, for o and down. Default: 1; 0 where all is in 8 bits or there is little text.",
        min=0.0, max=1.0, metavar="X", rich_help_panel=SOLVER,
    ),
]  # fmt: skip
ErrorCorrectionShare = Annotated[
    float,
    typer.Option(
        help="Share of the calibration windows that it reads; 1 loses less and takes longer.",
        min=0.0, max=1.0, metavar="SHARE", rich_help_panel=SOLVER,
    ),
]  # fmt: skip
CalibrationDtype = Annotated[
    str,
    typer.Option(
        help="Of calibration: float32, bfloat16 (auto where native).",
        metavar="DTYPE", show_default=False, rich_help_panel=MACHINE,
    ),
]  # fmt: skip
StoredDtype = Annotated[
    str,
    typer.Option(
        help="Of unquantized tensors: float16, bfloat16; auto: kept as is.",
        metavar="DTYPE", show_default=False, rich_help_panel=MACHINE,
    ),
]  # fmt: skip
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Read headers only; print sizes, memory and disk.", rich_help_panel=JOB)
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a stopped job: same command, plus this.", rich_help_panel=JOB)
]

# ---------------------------------------------------------------------- load, run and serve

MaxModelLen = Annotated[
    str,
    typer.Option(
        "--max-model-len", "-c", help="Context in tokens, prompt and answer, e.g. 16k. Default 4k.",
        metavar="N", rich_help_panel=ENGINE,
    ),
]  # fmt: skip
PrefillChunk = Annotated[
    int,
    typer.Option(
        "--prefill-chunk", help="Prompt tokens computed at once.", min=1, metavar="N", rich_help_panel=ENGINE
    ),
]
GpuMemory = Annotated[
    str,
    typer.Option(
        "--gpu-memory", help="Limit a GPU, e.g. 20GiB, or 20GiB,10GiB. Default: what is free.",
        metavar="SIZE", rich_help_panel=MACHINE,
    ),
]  # fmt: skip
CpuMemory = Annotated[
    str,
    typer.Option(
        "--cpu-memory", help="Limit of host memory, the rest goes to disk. Default: free.",
        metavar="SIZE", rich_help_panel=MACHINE,
    ),
]  # fmt: skip
OffloadDir = Annotated[
    Path | None,
    typer.Option(
        "--offload-dir", help="Where layers on disk are kept while it runs.", metavar="DIR", rich_help_panel=MACHINE
    ),
]
KvDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype", help="auto, bf16, fp16 or fp8.",
        metavar="DTYPE", show_default=False, rich_help_panel=ENGINE,
    ),
]  # fmt: skip
RunDtype = Annotated[
    str,
    typer.Option(
        "--compute-dtype", help="bfloat16 (auto; packed kernels) or float32 (exact, slower).",
        metavar="DTYPE", show_default=False, rich_help_panel=ENGINE,
    ),
]  # fmt: skip


# ---------------------------------------------------------------------- what they mean


def options_of(context: typer.Context, kind: Any, **others: Any) -> Any:
    """A dataclass of options, `kind`, from a command's parameters of the same names; `others` take precedence."""
    given = {f.name: context.params[f.name] for f in fields(kind) if f.name in context.params}
    return kind(**given | others)


def load_words(context: typer.Context) -> LoadWords:
    """How to load a checkpoint, from a command's parameters."""
    given: Any = {name: context.params[name] for name in LoadWords.__annotations__ if name in context.params}
    return given


def fetched(model: str) -> Path:
    """The directory of MODEL, downloaded with its progress shown; PlanError for what is none."""
    return model_directory(model, print_step)


def warn_of_shipped(model: str) -> None:
    """Say that a hub name's shapes are those shipped with qwenq. A family's bare name asks for nothing else."""
    if "/" in model:
        warn(f"{model}: shapes as shipped with qwenq, no header was read")
