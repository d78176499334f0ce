"""Options that several commands take, or that are many; each with its help and the panel of the help it stands in."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from qwenq.api import LoadWords
from qwenq.cli.console import print_step, warn
from qwenq.pipeline.source import model_directory

BITS, BUDGET, TEXT, SOLVER, MACHINE, JOB = "Bits", "Bits to a budget", "Text", "Solver", "Machine", "Job"
ENGINE, ANSWER, SERVER, WEIGHTS = "Engine", "Answer", "Server", "Weights"

# ---------------------------------------------------------------------- everywhere

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A checkpoint directory, or a hub name such as Qwen/Qwen2.5-7B-Instruct."),
]
JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of tables.", rich_help_panel=JOB)
]
Device = Annotated[
    str,
    typer.Option(help="auto: every GPU there is, else cpu; or cpu, cuda:N, cuda:N,cuda:M.", rich_help_panel=MACHINE),
]
OneDevice = Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N.", rich_help_panel=MACHINE)]
ComputeDtype = Annotated[
    str,
    typer.Option(help="float32 or bfloat16; auto: float32 on a CPU, bfloat16 on a GPU.", rich_help_panel=MACHINE),
]
SequenceLength = Annotated[int, typer.Option(min=2, help="Tokens a window.", rich_help_panel=TEXT)]
Calibration = Annotated[
    str, typer.Option(help="A set's name, or a .txt, .jsonl, .parquet or .npy file.", rich_help_panel=TEXT)
]

# ---------------------------------------------------------------------- quantize

Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to make.", rich_help_panel=JOB)]
Bits = Annotated[int | None, typer.Option(help="4 or 8, for every linear. Default 4.", rich_help_panel=BITS)]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Columns that share a scale: 128, 64, 32, or -1 for the row. Default 128.", rich_help_panel=BITS
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="gptq, awq (4-bit), compressed-tensors, bnb-nf4 or bnb-int8 (no calibration).",
        rich_help_panel=BITS,
    ),
]
Asymmetric = Annotated[
    bool | None,
    typer.Option(
        "--asymmetric/--symmetric",
        help="With or without zero points of each group's own. Default: asymmetric for awq, else symmetric (vLLM).",
        rich_help_panel=BITS,
    ),
]
PadForTp = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Widen the FFN with zeros so that groups never straddle so many GPUs; the function stays.",
        rich_help_panel=BITS,
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        help="Best mixed bits whose shard files are at most so large, e.g. 47GB.", rich_help_panel=BUDGET
    ),
]
BitsPerWeight = Annotated[
    str | None,
    typer.Option(
        "--bpw",
        help="Best mixed bits of at most so many stored bits per linear weight, e.g. 5.",
        rich_help_panel=BUDGET,
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(help='Best mixed bits that fit a rig with --context, e.g. "2x RTX 3090".', rich_help_panel=BUDGET),
]
Context = Annotated[
    str | None,
    typer.Option("--context", "-c", help="Tokens --fit leaves room for. Default 8k.", rich_help_panel=BUDGET),
]
FitEngine = Annotated[
    str | None,
    typer.Option("--engine", help="Engine that --fit plans for: qwenq, transformers or vllm.", rich_help_panel=BUDGET),
]
RecipeFile = Annotated[
    Path | None, typer.Option(help="A recipe file, perhaps edited.", rich_help_panel=BUDGET)
]
SensitivityFile = Annotated[
    Path | None,
    typer.Option(help="A table that `qwenq sensitivity` wrote for this model.", rich_help_panel=BUDGET),
]
SaveRecipe = Annotated[
    Path | None,
    typer.Option(
        help="With --dry-run: write the recipe there, to edit and give back.", rich_help_panel=BUDGET
    ),
]
NumSamples = Annotated[
    int | None,
    typer.Option(
        "--num-samples", "-n", min=1, help="Calibration windows. Default: all, at most 128.", rich_help_panel=TEXT
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, help="Decides which calibration windows are drawn.", rich_help_panel=TEXT)
]
EvalText = Annotated[
    str, typer.Option(help="Held-out text for the drift: a set's name or a file.", rich_help_panel=TEXT)
]
EvalSamples = Annotated[
    int | None, typer.Option(min=1, help="Held-out windows. Default: all, at most 20.", rich_help_panel=TEXT)
]
Method = Annotated[
    str | None,
    typer.Option(
        help="gptq (default), or rtn: round to nearest, the baseline, without calibration.", rich_help_panel=SOLVER
    ),
]
DampPercent = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Damping, as a share of the mean Hessian diagonal. Default: 0.02 (2 %).",
        rich_help_panel=SOLVER,
    ),
]
Fold = Annotated[
    bool,
    typer.Option(
        "--fold/--no-fold",
        help="Fold channel scales into norms and up_proj: less is lost. --no-fold keeps norms as they are, for LoRA "
        "adapters of the original model.",
        rich_help_panel=SOLVER,
    ),
]
ErrorCorrection = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="How far o and down answer for what earlier layers lost. Default: 1; 0 for 8 bits or too few calibration "
        "tokens. 0 saves a pass.",
        rich_help_panel=SOLVER,
    ),
]
ErrorCorrectionShare = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of the calibration windows that it is read from. 1 loses less and takes longer.",
        rich_help_panel=SOLVER,
    ),
]
CalibrationDtype = Annotated[
    str,
    typer.Option(
        help="float32 or bfloat16, of calibration activations; auto: bfloat16 where it is computed natively.",
        rich_help_panel=MACHINE,
    ),
]
StoredDtype = Annotated[
    str,
    typer.Option(
        help="Convert tensors that are not quantized: float16 or bfloat16; auto keeps their bytes.",
        rich_help_panel=MACHINE,
    ),
]
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
        rich_help_panel=ENGINE,
    ),
]  # fmt: skip
PrefillChunk = Annotated[
    int, typer.Option("--prefill-chunk", min=1, help="Prompt tokens computed at once.", rich_help_panel=ENGINE)
]
GpuMemory = Annotated[
    str,
    typer.Option(
        "--gpu-memory", help="Limit per GPU, e.g. 20GiB, or 20GiB,10GiB. Default: what is free.",
        rich_help_panel=MACHINE,
    ),
]  # fmt: skip
CpuMemory = Annotated[
    str,
    typer.Option(
        "--cpu-memory", help="Limit of host memory; what is over goes to disk. Default: free.", rich_help_panel=MACHINE
    ),
]
OffloadDir = Annotated[
    Path | None,
    typer.Option("--offload-dir", help="Where layers on disk are kept while it runs.", rich_help_panel=MACHINE),
]
KvDtype = Annotated[
    str, typer.Option("--kv-cache-dtype", help="auto, bf16, fp16 or fp8.", rich_help_panel=ENGINE)
]
RunDtype = Annotated[
    str,
    typer.Option(
        "--compute-dtype",
        help="bfloat16 (packed kernels) or float32 (exact, slower); auto: bfloat16.",
        rich_help_panel=ENGINE,
    ),
]


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
