"""The end of a job: the small files of the checkpoint, then `qwenq-manifest.json`, which hashes all of them.

What was made from what is the same in every run of one command; times and host facts are in `run` alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwenq.headers import INDEX_NAME
from qwenq.host import host_facts
from qwenq.job import MANIFEST_NAME, QuantizeJob, QuantizeResult
from qwenq.journal import JOURNAL_NAME
from qwenq.preflight import output_files
from qwenq.results import BlockResult, DriftReport, finite_json
from qwenq.shards import encode_index, file_sha256, write_json
from qwenq.tokens import TOKENIZER_FILES

COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE")
SCRATCH_PREFIX = ".qwenq-"  # states, spilled buffers and the lock: gone before the directory gets its name


def write_small_files(job: QuantizeJob, work: Path, config: Mapping[str, Any]) -> None:
    """Tokenizer and licence as the source has them, the index, and the configuration."""
    for name in COPIED_FILES:
        path = job.source.directory / name
        if path.is_file():
            shutil.copyfile(path, work / name)
    write_json(work / INDEX_NAME, encode_index(output_files(job.source.spec, job.recipe, job.stored_dtype)))
    write_json(work / "config.json", config)
    if job.recipe.format == "gptq":  # GPTQModel and AutoGPTQ look here first
        write_json(work / "quantize_config.json", config["quantization_config"])


def describe_result(
    job: Mapping[str, Any], parameters: int, result: QuantizeResult, *, resumed: bool
) -> dict[str, Any]:
    """The manifest but for the files' hashes: what the model card is written from. `job` is the journal's."""
    layers = [{"layer": b.layer, "linears": [asdict(r) for r in b.linears], "stream_error_db": b.stream_error_db}
              for b in result.layers]  # fmt: skip
    described: dict[str, Any] = finite_json(
        {
            "job": job,
            "parameters": parameters,
            "tensor_bytes": result.tensor_bytes,
            "file_bytes": result.file_bytes,
            "bits_per_linear_weight": result.bits_per_linear_weight,
            "drift": result.drift.to_json(),
            "warnings": list(result.warnings),
            "layers": layers,
            "run": {
                "seconds": result.seconds,
                "resumed": resumed,
                "peak_rss_bytes": result.peak_rss_bytes,
                "layer_seconds": [b.seconds for b in result.layers],
                "stages_s": _sum_stages(result.layers),
                **host_facts(),
            },
        }
    )
    return described


def write_manifest(work: Path, described: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Hash every file of the checkpoint and write the manifest: the last file to be written.

    Whatever lies in `work` belongs to the checkpoint, but for the journal, scratch files and the manifest itself.
    known: SHA-256 of files hashed while they were written.
    """
    for torn in work.glob("*.tmp"):
        torn.unlink()  # a killed run was writing it
    names = sorted(path.name for path in work.iterdir())
    own = [n for n in names if n not in (JOURNAL_NAME, MANIFEST_NAME) and not n.startswith(SCRATCH_PREFIX)]
    files = {name: known.get(name) or file_sha256(work / name) for name in own}
    run = described["run"]
    content = {key: value for key, value in described.items() if key != "run"}
    write_json(work / MANIFEST_NAME, content | {"files": files, "run": run})


def job_warnings(layers: tuple[BlockResult, ...], drift: DriftReport, overlap: float | None) -> tuple[str, ...]:
    """What a reader must not miss, fallbacks first."""
    fallen = [result for block in layers for result in block.linears if result.fallback]
    lines = [f"{result.name}: fell back to rounding to nearest ({result.fallback})" for result in fallen]
    if drift.non_finite:
        lines.append(f"{drift.non_finite} of {drift.tokens} logit rows are not finite")
    if overlap:
        lines.append(f"{100 * overlap:.1f} % of the evaluation text also occurs in the calibration text")
    return tuple(lines)


def _sum_stages(layers: tuple[BlockResult, ...]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for block in layers:
        for stage, seconds in block.stages_s.items():
            totals[stage] = totals.get(stage, 0.0) + seconds
    return totals
