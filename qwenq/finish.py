"""The end of a job: the small files of the checkpoint, what there is to say about it, and its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwenq.errors import JobError, QwenqError
from qwenq.files import copy_synced, sync_directory, write_json
from qwenq.headers import INDEX_NAME, inside
from qwenq.host import host_facts, versions
from qwenq.job import QuantizeJob, QuantizeResult
from qwenq.journal import LOCK_NAME, Journal
from qwenq.manifest import SCRATCH_PREFIX, check_files, read_manifest
from qwenq.preflight import output_files
from qwenq.results import BlockResult, DriftReport, finite_json
from qwenq.shards import encode_index
from qwenq.tokens import TOKENIZER_FILES

COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE")


def write_small_files(job: QuantizeJob, work: Path, config: Mapping[str, Any], source: Mapping[str, str]) -> None:
    """Tokenizer and licence as the source has them (`source`: their SHA-256), the index, and the configuration."""
    for name in COPIED_FILES:
        path = inside(job.source.directory, name)
        if path.is_file() and copy_synced(path, work / name) != source.get(name):
            raise JobError(f"{path}: changed while it was being quantized", hint="put the file back, then --resume")
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
            "versions": versions(),
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


def give_name(work: Path, out: Path) -> None:
    """Remove what was needed to resume, and rename the finished directory."""
    for leftover in work.glob(SCRATCH_PREFIX + "*"):
        if leftover.name != LOCK_NAME:  # held until the directory has its name
            leftover.unlink()
    sync_directory(work)
    os.replace(work, out)
    try:
        sync_directory(out.parent)
    except OSError as error:
        raise JobError(
            f"{out}: finished, but the disk could not confirm its name ({error.strerror})",
            hint="look after the disk, then `qwenq verify` it",
        ) from error


def finished_before(work: Path, out: Path, journal: Journal) -> QuantizeResult | None:
    """What a run made that was killed after its manifest was written; None when anything is not as it says."""
    try:
        manifest, findings = read_manifest(work)
    except QwenqError:
        return None
    scratch = SCRATCH_PREFIX
    if findings or any(not finding.file.startswith(scratch) for finding in check_files(work, manifest)):
        return None
    return QuantizeResult(
        out=out,
        drift=DriftReport.from_json(manifest["drift"]),
        layers=tuple(BlockResult.from_json(row["result"]) for row in journal.layers),
        tensor_bytes=manifest["tensor_bytes"],
        file_bytes=manifest["file_bytes"],
        bits_per_linear_weight=manifest["bits_per_linear_weight"],
        seconds=manifest["run"]["seconds"],
        peak_rss_bytes=manifest["run"]["peak_rss_bytes"],
        warnings=tuple(manifest["warnings"]),
    )


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
