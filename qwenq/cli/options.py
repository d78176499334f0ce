"""Options shared by several commands, and those of quantize, each with its help text and panel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwenq.api import LoadWords
from qwenq.cli.console import warn
from qwenq.cli.plain import FOLLOW_LINKS, follow_links, print_step
from qwenq.formats.base import FORMATS, names_of
from qwenq.pipeline.source import model_directory
from qwenq.planning.engines.base import engine_names

ASYMMETRIC = names_of((form for form in FORMATS.values() if form.asymmetric), "and")
BITS, BUDGET, TEXT, SOLVER, MACHINE, JOB = "Bits", "Bits to a budget", "Text", "Solver", "Machine", "Job"
ENGINE, ANSWER, SERVER, WEIGHTS = "Engine", "Answer", "Server", "Weights"


def option(panel: str, *names: str, help: str, **more: Any) -> Any:
    """An option in a panel of its command's help; without `names` it is named after its parameter."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


# ---------------------------------------------------------------------- everywhere

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A checkpoint directory, a GGUF file, or a hub name (Qwen/Qwen2.5-7B-Instruct)."
    ),
]
Original = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A 16-bit checkpoint: a directory or a hub name (Qwen/Qwen2.5-7B-Instruct)."),
]
JsonFlag = Annotated[bool, option(JOB, "--json", help="Print one JSON object instead of tables.")]
FollowLinks = Annotated[bool, option(JOB, "--follow-links", help=FOLLOW_LINKS, callback=follow_links)]
Strict = Annotated[bool, option(TEXT, "--strict", help="Fail on any bad row of a text.")]
Device = Annotated[
    str,
    option(
        MACHINE,
        "--device",  # typer 0.27 takes a metavar that is the parameter's name for the option's spelling
        metavar="DEVICE",
        help="cpu, cuda:N or cuda:N,cuda:M; auto: every GPU, or cpu.",
        show_default=False,
    ),
]
OneDevice = Annotated[
    str, option(MACHINE, "--device", metavar="DEVICE", help="auto, cpu or cuda:N.", show_default=False)
]
ComputeDtype = Annotated[
    str,
    option(
        MACHINE, metavar="DTYPE", help="Activations: float32, bfloat16; auto: by device and task.", show_default=False
    ),
]
SequenceLength = Annotated[int, option(TEXT, metavar="N", help="Tokens per window.", min=2)]
Calibration = Annotated[
    str, option(TEXT, metavar="TEXT", help="A set, or .txt, .jsonl, .json (also .gz), .parquet, .npy.")
]

# ---------------------------------------------------------------------- quantize

Output = Annotated[Path, option(JOB, "--output", "-o", metavar="DIR", help="Output directory.", show_default=False)]
Bits = Annotated[int | None, option(BITS, metavar="N", help="4 or 8, for every linear. Default: 4.")]
GroupSize = Annotated[int | None, option(BITS, metavar="N", help="Columns per scale: 128 (default), 64, 32, -1 (row).")]
Format = Annotated[str, option(BITS, "--format", metavar="NAME", help=", ".join(FORMATS) + ".")]
GgufType = Annotated[str | None, option(BITS, metavar="NAME", help="A llama.cpp mixture, e.g. Q5_K_M.")]
SplitSize = Annotated[
    str | None, option(BITS, metavar="SIZE", help="Split GGUF into files of at most this, e.g. 50GB.")
]
Asymmetric = Annotated[
    bool | None,
    option(BITS, "--asymmetric/--symmetric", help=f"Zero points per group. Default: only for {ASYMMETRIC}."),
]
Rotate = Annotated[
    bool | None, option(BITS, "--rotate/--no-rotate", help="Rotate hidden states. Default: if some are massive.")
]
PadForTp = Annotated[
    int | None, option(BITS, metavar="GPUS", help="Pad the FFN to split over this many GPUs; gguf: 1.", min=1)
]
TargetSize = Annotated[
    str | None, option(BUDGET, metavar="SIZE", help="Best mixed bits within this file size, e.g. 47GB.")
]
BitsPerWeight = Annotated[
    str | None, option(BUDGET, "--bpw", metavar="BITS", help="Best mixed bits within this mean per linear weight: 5.")
]
Fit = Annotated[str | None, option(BUDGET, metavar="RIG", help='Best mixed bits that fit a rig, e.g. "2x RTX 3090".')]
Context = Annotated[
    str | None, option(BUDGET, "--context", "-c", metavar="N", help="Context that --fit leaves room for. Default: 8k.")
]
FitEngine = Annotated[str | None, option(BUDGET, "--engine", metavar="NAME", help=f"For --fit: {engine_names()}.")]
RecipeFile = Annotated[Path | None, option(BUDGET, metavar="FILE", help="A recipe file, perhaps edited.")]
SensitivityFile = Annotated[
    Path | None, option(BUDGET, metavar="FILE", help="This model's table, from `qwenq sensitivity`.")
]
SaveRecipe = Annotated[
    Path | None, option(BUDGET, metavar="FILE", help="With --dry-run: write the recipe there, to edit and use.")
]
NumSamples = Annotated[
    int | None,
    option(TEXT, "--num-samples", "-n", metavar="N", help="Calibration windows. Default: all, at most 128.", min=1),
]
BuiltinShare = Annotated[
    float | None, option(TEXT, metavar="SHARE", help="Share of windows from the built-in set. Default: 0.2.")
]
Seed = Annotated[int, option(TEXT, metavar="N", help="Selects the windows.", min=0)]
EvalText = Annotated[str, option(TEXT, metavar="TEXT", help="Held-out text for the divergence.")]
EvalSamples = Annotated[
    int | None, option(TEXT, metavar="N", help="Held-out windows. Default: all, at most 20.", min=1)
]
Method = Annotated[str | None, option(SOLVER, metavar="NAME", help="gptq, or rtn: rounding to nearest.")]
DampPercent = Annotated[
    float | None,
    option(SOLVER, metavar="SHARE", help="Damping. Default: 0.1, for down by tokens.", min=0.0, max=1.0),
]
Fold = Annotated[
    bool, option(BITS, "--fold/--no-fold", help="Fold channel scales; --no-fold: LoRA still fits.", show_default=False)
]
ErrorCorrection = Annotated[
    float | None,
    option(SOLVER, metavar="X", help="For o and down. Default: 1; 0 at 8 bits or with little text.", min=0.0, max=1.0),
]
SinkWeight = Annotated[float, option(SOLVER, metavar="X", help="Weight of attention sinks, 1 to 1024.")]
ErrorCorrectionShare = Annotated[
    float,
    option(
        SOLVER,
        metavar="SHARE",
        help="Share of the calibration windows used for it; 1 loses less but is slower.",
        min=0.0,
        max=1.0,
    ),
]
CalibrationDtype = Annotated[
    str,
    option(MACHINE, metavar="DTYPE", help="Calibration: float32, bfloat16 (auto where native).", show_default=False),
]
StoredDtype = Annotated[
    str,
    option(
        MACHINE,
        "--dtype",
        metavar="DTYPE",
        help="Unquantized tensors: float16, bfloat16; auto: kept as is.",
        show_default=False,
    ),
]
SaveImatrix = Annotated[Path | None, option(JOB, metavar="FILE", help="Write an importance matrix for llama-quantize.")]
DryRun = Annotated[bool, option(JOB, "--dry-run", help="Read only headers; print sizes, memory and disk.")]
RankCount = Annotated[int, option(JOB, "--ranks", metavar="N", help="With --dry-run: number of processes.", min=1)]
Network = Annotated[
    str, option(JOB, "--network", metavar="RATE", help="With --ranks: their network, e.g. 10gbps.", show_default=False)
]
Resume = Annotated[bool, option(JOB, "--resume", help="Continue a stopped job: same command plus this.")]

# ---------------------------------------------------------------------- load, run and serve

MaxModelLen = Annotated[
    str, option(ENGINE, "--context", "--max-model-len", "-c", metavar="N", help="In tokens, e.g. 16k. Default: 4k.")
]
PrefillChunk = Annotated[
    int, option(ENGINE, "--prefill-chunk", metavar="N", help="Prompt tokens computed at once.", min=1)
]
GpuMemory = Annotated[
    str,
    option(
        MACHINE, "--gpu-memory", metavar="SIZE", help="Limit per GPU, e.g. 20GiB or 20GiB,10GiB. Default: free memory."
    ),
]
CpuMemory = Annotated[
    str,
    option(MACHINE, "--cpu-memory", metavar="SIZE", help="Host memory limit; the rest goes to disk. Default: free."),
]
OffloadDir = Annotated[
    Path | None,
    option(MACHINE, "--offload-dir", metavar="DIR", help="Directory for layers that are kept on disk. Default: here."),
]
KvDtype = Annotated[
    str, option(ENGINE, "--kv-cache-dtype", metavar="DTYPE", help="auto, bf16, fp16 or fp8.", show_default=False)
]
RunDtype = Annotated[
    str,
    option(
        ENGINE,
        "--compute-dtype",
        metavar="DTYPE",
        help="bfloat16 (auto; packed kernels) or float32 (exact, slower).",
        show_default=False,
    ),
]


# ---------------------------------------------------------------------- interpreting them


def load_words(context: typer.Context) -> LoadWords:
    """Load options from a command's parameters."""
    given: Any = {name: context.params[name] for name in LoadWords.__annotations__ if name in context.params}
    return given


def fetched(model: str) -> Path:
    """The directory of MODEL, downloaded if needed, with progress; PlanError if there is none."""
    return model_directory(model, print_step)


def warn_of_shipped(model: str) -> None:
    """Warn that a hub name's shapes are those shipped with qwenq; for a family name that goes without saying."""
    if "/" in model:
        warn(f"{model}: using the shapes shipped with qwenq; no header was read")
