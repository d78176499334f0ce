"""`qwenq eval`: drift of a checkpoint against a reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from qwenq import api
from qwenq.cli.console import LayerProgress, drift_table, out, warn
from qwenq.cli.options import (
    JOB,
    TEXT,
    ComputeDtype,
    Device,
    FollowLinks,
    JsonFlag,
    Model,
    SequenceLength,
    Strict,
    option,
)
from qwenq.cli.plain import print_json
from qwenq.cli.ranks import fetched_once, over_ranks
from qwenq.errors import UsageError
from qwenq.pipeline.config import EvaluateConfig


def evaluate(
    model: Model,
    reference: Annotated[str, typer.Option(help="The 16-bit checkpoint, or any other; same forms as MODEL.")],
    text: Annotated[
        str,
        option(TEXT, help="Held-out text: a set's name, or a .txt, .jsonl, .json (also .gz), .parquet or .npy file."),
    ] = EvaluateConfig.text,
    num_samples: Annotated[
        int | None, option(TEXT, "--num-samples", "-n", min=1, help="Windows. Default: all, at most 20.")
    ] = EvaluateConfig.num_samples,
    sequence_length: SequenceLength = EvaluateConfig.sequence_length,
    max_kl: Annotated[float | None, option(JOB, min=0.0, help="Exit with 3 if the mean KL exceeds this.")] = None,
    max_ppl_increase: Annotated[
        str | None, option(JOB, metavar="PERCENT", help="Exit with 3 if perplexity rises by more than this, e.g. 2%.")
    ] = None,
    save_reference_logits: Annotated[
        Path | None,
        option(JOB, metavar="FILE", help="Write the reference logits for `llama-perplexity --kl-divergence`."),
    ] = None,
    device: Device = EvaluateConfig.device,
    compute_dtype: ComputeDtype = EvaluateConfig.compute_dtype,
    strict: Strict = EvaluateConfig.strict,
    follow_links: FollowLinks = False,
    json: JsonFlag = False,
) -> None:
    """Measure what a checkpoint lost against its 16-bit reference: perplexity, KL divergence, top-1 agreement.

    Both are streamed layer by layer, so neither has to fit into memory.
    """
    increase = _percent(max_ppl_increase)
    saved = None
    with over_ranks(device) as (ranks, own):
        checkpoint, base = fetched_once(model, ranks), fetched_once(reference, ranks)
        with LayerProgress(quiet=json or not ranks.first) as progress:
            if save_reference_logits is not None:
                from qwenq.pipeline.reference_logits import SavedLogits

                saved = SavedLogits(save_reference_logits, progress.say)
            drift = api.evaluate(
                checkpoint, base, text=text, num_samples=num_samples, sequence_length=sequence_length,
                save_reference_logits=saved, device=own, compute_dtype=compute_dtype, strict=strict,
                progress=progress.step, warn=warn, ranks=ranks,
            )  # fmt: skip
    if not ranks.first:
        return
    if json:
        found = {"file": str(saved.path), "bytes": saved.file.n_bytes, "kl": saved.kl} if saved else None
        print_json(drift.to_json() | ({"reference_logits": found} if found else {}))
    else:
        out.print(drift_table(drift, _name_of(base)))
        if saved is not None:
            line = f"KL at the positions in {saved.path}, those llama-perplexity counts: {saved.kl:.6f}"
            out.print(line, soft_wrap=True)
    from qwenq.pipeline.evaluate import check_limits

    check_limits(drift, max_kl, increase)


def _name_of(reference: Path) -> str:
    from qwenq.checkpoint.reader import open_checkpoint

    base = open_checkpoint(reference)
    return f"reference in {base.recipe.label}" if base.quantized else "16-bit"


def _percent(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = math.nan
    if math.isnan(percent):
        raise UsageError(f"--max-ppl-increase {text}: not a percentage", hint="e.g. 2%")
    return percent
