r"""The main job: 16-bit shards in, quantized shards out, one decoder layer at a time, journalled and resumable.

    source --> layer i --> reference stream             (16-bit layer, evaluation tokens)
                      \--> original stream              (16-bit layer, calibration windows, half or all)
                      \--> calibration stream, solve --> shard i, journal line i
    shard i ----------------> quantized stream           (the layer as written, evaluation tokens)
    final norm, head --> DriftReport

Work happens in OUT.partial, which becomes OUT by one rename when everything in it is whole.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwenq.card import CARD_NAME, model_card
from qwenq.checkpoint import Checkpoint, non_finite
from qwenq.clock import StageClock
from qwenq.errors import CheckpointError, JobError
from qwenq.files import file_sha256, make_directory, write_bytes
from qwenq.finish import COPIED_FILES, describe_result, finished_before, give_name, job_warnings, write_small_files
from qwenq.formats.config import quantization_config, read_quantization_config
from qwenq.head import HeadWeights, measure_drift
from qwenq.headers import read_header
from qwenq.host import forget_peak_rss, keep_freed_memory, peak_rss_bytes, return_freed_memory
from qwenq.job import DTYPES, QuantizeJob, QuantizeResult, partial_directory, refuse_place
from qwenq.journal import Journal, locked, never_begun, refuse_changes
from qwenq.layer import make_layer
from qwenq.manifest import write_manifest
from qwenq.preflight import Tokens, output_files, preflight
from qwenq.provenance import SourceFiles
from qwenq.results import BlockResult, DriftReport
from qwenq.runtime.memory import memory_errors
from qwenq.shards import write_shard
from qwenq.streams import Streams, new_streams

_STATE_FILES = (".qwenq-state-0.safetensors", ".qwenq-state-1.safetensors")
_STATE_INTERVAL_S = 30.0  # hidden states are saved to disk this often; layers done since are replayed on resume
_NO_MEMORY = "make room, then go on with --resume; or start again with fewer windows (-n)"

Listener = Callable[[BlockResult | str], None]


def quantize(job: QuantizeJob, *, resume: bool = False, listen: Listener = lambda event: None) -> QuantizeResult:
    """Run or resume a job. `listen` gets a line of text at each step and a BlockResult for each layer."""
    started = time.perf_counter()
    forget_peak_rss()
    keep_freed_memory()
    work = partial_directory(job.out)
    check_places(job, resume)
    try:
        make_directory(work, exist_ok=resume)
    except FileExistsError:
        raise _unfinished(work) from None
    except OSError as error:
        raise JobError(f"{work}: {error.strerror}", hint="choose another --output") from None
    try:
        with locked(work) as left:
            if left:
                listen(f"{left} left the job unfinished: going on")
            try:
                with memory_errors("quantizing", torch.device(job.devices[0]), None, _NO_MEMORY):
                    return _Run(job, work, resume, listen).run(started)
            finally:
                if not resume and work.exists() and never_begun(work):
                    shutil.rmtree(work)  # leave nothing behind
    except OSError as error:
        again = "go on with --resume" if work.exists() else "start again"
        raise JobError(
            f"{error.filename or work}: {error.strerror or error}", hint=f"put that right, then {again}"
        ) from error


def check_places(job: QuantizeJob, resume: bool) -> None:
    """Raise JobError when the output, an unfinished job or a disk too small is in the way."""
    work = partial_directory(job.out)
    refuse_place(job.out, job.source.directory)
    if work.exists() and not resume:
        raise _unfinished(work)
    if resume and not work.exists():
        raise JobError(f"{work}: no unfinished job there to resume", hint="leave --resume out")
    check = preflight(
        job.source.spec,
        job.recipe,
        Tokens(
            job.calibration.ids.shape[0] if job.calibration else 0,
            job.evaluation.ids.shape[0],
            job.evaluation.ids.shape[1],
            DTYPES[job.calibration_dtype].itemsize,
            job.options.pull_share if job.options.pull else 0.0,
        ),
        compute_bytes=DTYPES[job.compute_dtype].itemsize,
        on_gpu=job.device != "cpu",
        out=job.out,
        dtype_of=job.stored_dtype,
        source_dtype_of=job.source.dtype_of,
    )
    written = sum(p.stat().st_size for p in work.rglob("*") if p.is_file()) if work.exists() else 0
    replace(check, disk_needed_bytes=max(check.disk_needed_bytes - written, 0)).check_disk(job.out)


def _unfinished(work: Path) -> JobError:
    return JobError(f"{work}: an unfinished job is there", hint="go on with --resume, or delete it")


class _Run:
    """One run of a job over its working directory."""

    def __init__(self, job: QuantizeJob, work: Path, resume: bool, listen: Listener) -> None:
        self.job, self.work, self.listen = job, work, listen
        self.spec = job.source.spec
        self.dtype = DTYPES[job.compute_dtype]
        self.files = list(output_files(self.spec, job.recipe, job.stored_dtype))
        self.config = dict(job.source.config) | {
            "quantization_config": quantization_config(
                job.recipe, self.spec, damp_percent=job.options.damp_percent, method=job.options.method
            )
        }
        if job.dtype != "auto":
            self.config.pop("torch_dtype", None)
            self.config["dtype"] = job.dtype
        self.network = job.replicas(self.dtype, job.evaluation)
        self.float32 = job.replicas(torch.float32, job.evaluation) if self.dtype != torch.float32 else None
        self.calibrator = job.replicas(DTYPES[job.calibration_dtype], job.calibration)
        self.resume = resume

    # -------------------------------------------------------------- the whole

    @torch.inference_mode()
    def run(self, started: float) -> QuantizeResult:
        self.listen("hashing the source")
        names = [*(path.name for path in self.job.source.files), "config.json", CARD_NAME, *COPIED_FILES]
        read = SourceFiles.read(self.job.source.directory, names)
        described = self.job.describe() | {"source": read.hashes}
        if self.resume and not never_begun(self.work):
            journal = Journal.load(self.work)
            refuse_changes(journal.job, described, self.work)
            if (result := finished_before(self.work, self.job.out, journal)) is not None:
                give_name(self.work, self.job.out)
                return result
        else:
            journal = Journal.create(self.work, described)
        for name, content in self.job.beside:
            write_bytes(self.work / name, content)
        streams = new_streams(
            self.job.source,
            self.job.calibration.ids if self.job.calibration else None,
            self.job.evaluation.ids,
            dtype=self.dtype,
            calibration_dtype=self.calibrator.dtype,
            original_windows=self.job.original_windows,
            spill_directory=self.work,
            convert=self.job.convert,
        )
        self.listen("writing the embedding, the last norm and the head")
        last = ["model.norm.weight", *([] if self.spec.tie_word_embeddings else ["lm_head.weight"])]
        outer = {
            "embedding": self._write_outer(0, ["model.embed_tokens.weight"]),
            "head": self._write_outer(len(self.files) - 1, last),
        }
        first = self._recover(journal, streams)
        saved = time.perf_counter()
        for layer in range(first, self.spec.num_hidden_layers):
            row = self._layer(layer, streams)
            if time.perf_counter() - saved > _STATE_INTERVAL_S:
                row["state"] = self._save_state(journal, streams)
                saved = time.perf_counter()
            journal.append(row)
            self.listen(BlockResult.from_json(row["result"]))
        streams = streams.without_calibration()
        return_freed_memory()
        self.listen("measuring drift at the head")
        drift = self._drift(streams)
        read.refuse_replaced()
        return self._finish(journal, outer, drift, started)

    # -------------------------------------------------------------- one layer

    def _layer(self, layer: int, streams: Streams) -> dict[str, Any]:
        start = time.perf_counter()
        clock = StageClock(self.job.devices)
        with clock.time("load"):
            state = self.job.source.finite_layer_state(layer)
            self.job.source.prefetch(layer + 1)
        with clock.time("evaluate"):
            self._reference(streams, state)
        tensors, results = make_layer(self.job, self.calibrator, layer, state, streams, clock)
        with clock.time("write"):
            sha256 = write_shard(self.work / self.files[layer + 1], tensors)
        with clock.time("evaluate"):
            self.network.fill(self._written_layer(layer))
            self.network.run_layer(streams.states["quantized"])
            self.network.release()
            error_db = _error_db(streams.states["reference"], streams.states["quantized"])
        result = BlockResult(layer, tuple(results), error_db, time.perf_counter() - start, clock.seconds)
        return {"layer": layer, "file": self.files[layer + 1], "sha256": sha256, "result": result.to_json()}

    def _reference(self, streams: Streams, state: dict[str, torch.Tensor]) -> None:
        """Send the reference streams through the 16-bit layer."""
        if self.float32 is not None:
            self.float32.fill(state)
            self.float32.run_layer(streams.states["float32"])
            self.float32.release()
        self.network.fill(state)
        self.network.run_layer(streams.states["reference"])
        self.network.release()

    # -------------------------------------------------------------- resuming

    def _recover(self, journal: Journal, streams: Streams) -> int:
        """Bring the streams to the first layer that is not done and whole; returns that layer."""
        rows = journal.layers
        good = 0
        for row in rows:
            path = self.work / row["file"]
            if not path.is_file() or file_sha256(path) != row["sha256"]:
                self.listen(f"layer {row['layer']}: its file is missing or damaged, it and what follows is done again")
                break
            good += 1
        journal.keep_layers(good)
        known = next(
            (k for k in range(good, 0, -1) if (s := rows[k - 1].get("state"))
             and streams.restore(self.work / s["file"], s["sha256"])), 0
        )  # fmt: skip
        for layer in range(known, good):
            self.listen(f"layer {layer}: replaying")
            state, written = self.job.source.finite_layer_state(layer), self._written_layer(layer)
            self._reference(streams, state)
            for network, layer_state, name in (
                (self.calibrator, state, "original"),
                (self.calibrator, written, "calibration"),
                (self.network, written, "quantized"),
            ):
                if name in streams.states:
                    network.fill(layer_state)
                    network.run_layer(streams.states[name], self.job.passes(name))
                    network.release()
        return good

    def _written_layer(self, layer: int) -> dict[str, torch.Tensor]:
        tensors = read_header(self.work / self.files[layer + 1])
        written = read_quantization_config(self.config["quantization_config"], "quantization_config")
        return Checkpoint(self.work, self.config, self.spec, tensors, written, ()).layer_state(layer)

    def _save_state(self, journal: Journal, streams: Streams) -> dict[str, str]:
        """Save hidden states to the one of two files that the journal did not name last: one whole copy stays."""
        last = next((row["state"]["file"] for row in reversed(journal.layers) if "state" in row), None)
        file = _STATE_FILES[0] if last != _STATE_FILES[0] else _STATE_FILES[1]
        (self.work / file).unlink(missing_ok=True)  # two copies on disk, not three
        return {"file": file, "sha256": streams.save(self.work / file)}

    # -------------------------------------------------------------- head, and the end

    def _write_outer(self, number: int, names: list[str]) -> str:
        tensors = {}
        for name in names:
            tensor = self.job.source.read(name)
            if non_finite([(name, tensor)]):
                file = self.job.source.tensors[name].file
                raise CheckpointError(f"{file}: {name} holds a NaN or an infinity", hint="download it again")
            tensors[name] = self.job.convert(name, tensor)
        return write_shard(self.work / self.files[number], tensors)

    def _drift(self, streams: Streams) -> DriftReport:
        reference = HeadWeights(self.job.source)
        quantized = HeadWeights(self.job.source, self.job.convert) if self.job.dtype != "auto" else reference
        return measure_drift(self.network.first, reference, quantized, streams.states, self.job.evaluation)

    def _finish(self, journal: Journal, outer: dict[str, str], drift: DriftReport, started: float) -> QuantizeResult:
        """Write what is not a shard, the manifest last, and give the directory its name."""
        layers = tuple(BlockResult.from_json(row["result"]) for row in journal.layers)
        files = output_files(self.spec, self.job.recipe, self.job.stored_dtype)
        hashes = {self.files[0]: outer["embedding"], self.files[-1]: outer["head"]}
        hashes |= {row["file"]: row["sha256"] for row in journal.layers}
        write_small_files(self.job, self.work, self.config, journal.job["source"])
        result = QuantizeResult(
            out=self.job.out,
            drift=drift,
            layers=layers,
            tensor_bytes=sum(t.nbytes for tensors in files.values() for t in tensors),
            file_bytes=sum((self.work / name).stat().st_size for name in self.files),
            bits_per_linear_weight=self.job.recipe.bits_per_linear_weight(self.spec),
            seconds=time.perf_counter() - started,
            peak_rss_bytes=peak_rss_bytes(),
            warnings=job_warnings(layers, drift, self.job.overlap),
        )
        described = describe_result(journal.job, self.spec.parameters, result, resumed=self.resume)
        card = model_card(described, self.job.source.directory, self.spec, self.job.recipe)
        write_bytes(self.work / CARD_NAME, card.encode())
        write_manifest(self.work, described, hashes)  # hashes whatever lies there: write other files before this
        give_name(self.work, self.job.out)
        return result


def _error_db(reference: torch.Tensor, other: torch.Tensor) -> float | None:
    signal = float(reference.float().square().sum())
    error = float((reference.float() - other.float()).square().sum())
    return 10 * float(torch.tensor(error / signal).log10()) if signal > 0 and error > 0 else None
