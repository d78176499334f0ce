r"""The main job: 16-bit shards in, quantized shards out, one decoder layer at a time, journalled and resumable.

    source --> layer i --> reference states             (16-bit layer, evaluation tokens)
                      \--> original states              (16-bit layer, calibration windows, half or all)
                      \--> calibration states, solve --> shard i, journal line i
    shard i ----------------> quantized states           (the layer as written, evaluation tokens)
    final norm, head --> DriftReport   (a head of its own is solved then, where the format quantizes it; one that is the
                                        embedding too is solved before all else)

Work happens in OUT.partial, which becomes OUT by one rename when everything in it is whole.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwenq.checkpoint.manifest import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    SCRATCH_PREFIX,
    check_files,
    current_names,
    read_manifest,
    refuse_strangers,
)
from qwenq.checkpoint.reader import Checkpoint, GGUFCheckpoint, Relay, joined_slices, row_slices
from qwenq.errors import CheckpointError, JobError, QwenqError
from qwenq.escaping import several
from qwenq.formats.base import get_format, quantization_config, read_quantization_config
from qwenq.io.durable import make_directory, write_bytes
from qwenq.io.fields import Fields
from qwenq.machine import forget_peak_rss, host_facts, keep_freed_memory, peak_rss_bytes, return_freed_memory, versions
from qwenq.pipeline.activations import HiddenStates, LayerRunner, embed_tokens
from qwenq.pipeline.block import BlockSolver, CalibrationStates, round_block, round_layer
from qwenq.pipeline.card import CARD_NAME, model_card
from qwenq.pipeline.config import tokens_of
from qwenq.pipeline.evaluate import HeadWeights, measure_drift
from qwenq.pipeline.head import head_hessian, solve_head, tied_hessian
from qwenq.pipeline.imatrix import InputSquares, check_imatrix, is_kept, keep_layer, write_imatrix
from qwenq.pipeline.job import DTYPES, QuantizeJob, QuantizeResult
from qwenq.pipeline.journal import Journal, locked, never_begun, refuse_changes
from qwenq.pipeline.monitor import StageClock, memory_errors
from qwenq.pipeline.output import Output, copied_files, give_name
from qwenq.pipeline.preflight import (
    PlannedJob,
    Preflight,
    check_output,
    partial_directory,
    preflight,
    refuse_place,
    unfinished,
)
from qwenq.pipeline.ranks import ALONE, Ranks
from qwenq.pipeline.shares import NO_WINDOWS
from qwenq.pipeline.workers import Workers
from qwenq.results import BlockResult, DriftReport, LayerResult, finite_json
from qwenq.solver.equalize import FoldedLayer

_STATE_FILES = (".qwenq-state-0.safetensors", ".qwenq-state-1.safetensors")
VRAM_KEPT_FREE = 2 << 30  # bytes: the allocator's slack, libraries' workspaces
_STATE_INTERVAL_S = 30.0  # hidden states are saved to disk this often; layers done since are replayed on resume
_NO_MEMORY = "make room, then go on with --resume; or start again with fewer windows (-n)"
Listener = Callable[[BlockResult | str], None]


def quantize(
    job: QuantizeJob, *, resume: bool = False, listen: Listener = lambda event: None, ranks: Ranks = ALONE
) -> QuantizeResult:
    """Run or resume a job. `listen` gets a line of text at each step and a BlockResult for each layer.

    ranks: that do it together, each calling this with the same job; the first one alone reads and writes the output.
    """
    started = time.perf_counter()
    return_freed_memory()  # the tokenizer's
    forget_peak_rss()
    keep_freed_memory()
    work = partial_directory(job.out)
    try:
        with memory_errors("quantizing", torch.device(job.devices[0]), None, _NO_MEMORY):
            if ranks.first:
                return _quantize_at(work, job, resume, listen, ranks, started)
            with tempfile.TemporaryDirectory(prefix="qwenq-rank-") as scratch:
                return _Run(job, Path(scratch), resume, listen, ranks).run(started)
    except OSError as error:
        again = "go on with --resume" if work.exists() else "start again"
        raise JobError(
            f"{error.filename or work}: {error.strerror or error}", hint=f"put that right, then {again}"
        ) from error


def _quantize_at(
    work: Path, job: QuantizeJob, resume: bool, listen: Listener, ranks: Ranks, started: float
) -> QuantizeResult:
    check_places(job, resume)
    try:
        make_directory(work, exist_ok=resume)
    except FileExistsError:
        raise unfinished(work) from None
    except OSError as error:
        raise JobError(f"{work}: {error.strerror}", hint="choose another --output") from None
    with locked(work) as left:
        if left:
            listen(f"{left} left the job unfinished: going on")
        try:
            return _Run(job, work, resume, listen, ranks).run(started)
        finally:
            if not resume and work.exists() and never_begun(work):
                shutil.rmtree(work)  # leave nothing behind


def check_places(job: QuantizeJob, resume: bool) -> None:
    """Raise JobError when the output, an unfinished job or a disk too small is in the way."""
    refuse_place(job.out, job.source.directory)
    if job.config.save_imatrix is not None:
        check_imatrix(job.config.save_imatrix, job.source.spec, resume=resume)
    check_output(job.out, resume)
    check, work = preflight_of(job), partial_directory(job.out)
    written = sum(p.stat().st_size for p in work.rglob("*") if p.is_file()) if work.exists() else 0
    replace(check, disk_needed_bytes=max(check.disk_needed_bytes - written, 0)).check_disk(job.out)


def preflight_of(job: QuantizeJob) -> Preflight:
    """Sizes and predicted peaks of a job, of one process."""
    return preflight(
        PlannedJob(
            job.source.spec,
            job.recipe,
            tokens_of(job.config, job.windows),
            compute_bytes=DTYPES[job.config.compute_dtype].itemsize,
            on_gpu=job.config.device != "cpu",
            several_gpus=len(job.devices) > 1,
            out=job.out,
            dtype_of=job.stored_dtype,
            source_dtype_of=job.source.dtype_of,
            rotated=bool(job.config.rotate),
            beside=job.container,
        )
    )


def gpu_for_states(job: QuantizeJob, devices: Sequence[torch.device]) -> torch.device | None:
    """The job's one GPU, where the calibration tokens' hidden states fit beside all else: to copy them there and back
    takes longer than a layer's matmuls.
    """
    if job.calibration is None or len(devices) > 1 or devices[0].type != "cuda":
        return None
    check = preflight_of(job)
    torch.cuda.empty_cache()  # what measuring sensitivities left to the allocator is free too
    free, _ = torch.cuda.mem_get_info(devices[0])
    fits = check.peak_vram_bytes + check.state_vram_bytes + VRAM_KEPT_FREE <= free
    return devices[0] if fits else None


class SourceLayers:
    """A source's layers, one after the other. ahead: the next is read and checked while the GPU works on this one."""

    def __init__(self, source: Checkpoint, *, ahead: bool) -> None:
        self._source, self._closed = source, threading.Event()
        self._reader = ThreadPoolExecutor(1, "qwenq-reader") if ahead else None
        self._next: tuple[int, Future[dict[str, torch.Tensor]]] | None = None

    def take(self, layer: int) -> dict[str, torch.Tensor]:
        """The layer's tensors by their names within it; CheckpointError for one that is not finite."""
        if self._next is not None and self._next[0] == layer:
            state = self._next[1].result()
        else:
            state = self._source.finite_layer_state(layer)
        self._next = None
        if layer + 1 < self._source.spec.num_hidden_layers:
            if self._reader is None:
                self._source.prefetch(layer + 1)
            else:
                source = replace(self._source, relay=self._read_ahead)
                self._next = layer + 1, self._reader.submit(source.finite_layer_state, layer + 1)
        return state

    def close(self) -> None:
        """Have the reader stop behind the tensor it is at: Python waits for its threads before a process ends."""
        self._closed.set()
        if self._reader is not None:
            self._reader.shutdown(wait=False, cancel_futures=True)

    def _read_ahead(self, path: Path, start: int, end: int) -> torch.Tensor:
        if self._closed.is_set():
            raise CancelledError
        return Checkpoint.read_bytes(path, start, end, self._source.hashed)


class _Run:
    """One run of a job over its working directory; on ranks but the first that is a place for scratch files alone."""

    def __init__(self, job: QuantizeJob, work: Path, resume: bool, listen: Listener, ranks: Ranks) -> None:
        self.job, self.work, self.listen, self.ranks = job, work, listen, ranks
        self.spec = job.source.spec
        self.files = job.files
        config = dict(job.source.config) | {
            "quantization_config": quantization_config(
                job.recipe, self.spec, damp_percent=job.options.damp_percent, method=job.options.method
            )
        }
        if job.config.dtype != "auto":
            config.pop("torch_dtype", None)
            config["dtype"] = job.config.dtype
        self.output = Output(work, job.out, job.recipe, config, self.files, copied_files(job.source.folder))
        evaluating = job.workers(DTYPES[job.config.compute_dtype], job.evaluation, ranks)
        self.calibrator = job.workers(DTYPES[job.config.calibration_dtype], job.calibration, ranks)
        self.workers = {"reference": evaluating, "quantized": evaluating}
        self.workers |= {"calibration": self.calibrator, "original": self.calibrator}
        if evaluating.dtype != torch.float32:
            self.workers["float32"] = job.workers(torch.float32, job.evaluation, ranks)
        self.resume = resume

    # -------------------------------------------------------------- the whole

    @torch.inference_mode()
    def run(self, started: float) -> QuantizeResult:
        self.listen("hashing the source")
        self.job = replace(self.job, source=self.job.source.hash_files([CARD_NAME, *self.output.copied]))
        read = self.job.source.hashed
        assert read is not None
        described = self.job.describe() | {"source": read.hashes}
        beside = {name: hashlib.sha256(content).hexdigest() for name, content in self.job.beside}
        self.ranks.refuse_others("job", self.job.same_everywhere(described) | {"beside": beside})
        journal = self._journal(described, beside) if self.ranks.first else None
        if (done := self._done_before(journal)) is not None:
            return done
        outer, head = self._write_ends(journal)
        alone = self.ranks.size == 1
        gpu = gpu_for_states(self.job, self.calibrator.devices) if alone else None
        if gpu is not None:
            self.listen(f"hidden states of the calibration tokens stay on {gpu}")
        written = self._written(0) if self.job.head_windows or alone else None  # ranks convert sooner than they send
        states = embed_tokens(self.job.source, self.job.tokens(self.ranks), self.work, self.job.convert, gpu, written)
        runner = LayerRunner(states.states, states.shares, self.workers)
        rows = self._recover(journal, states, runner)
        saved, interval_s = time.perf_counter(), _STATE_INTERVAL_S
        with closing(SourceLayers(self.job.source, ahead=self.job.config.device != "cpu")) as source:
            for layer in range(len(rows), self.spec.num_hidden_layers):
                row = self._layer(layer, source, states, runner)
                began = time.perf_counter()
                if self.ranks.from_first(lambda began=began, due=saved + interval_s: began > due):  # type: ignore[misc]
                    row["state"] = self._save_state(journal, states)
                    saved = time.perf_counter()
                    if not alone:  # states of all ranks go over the network: a tenth of the time at most
                        interval_s = max(_STATE_INTERVAL_S, 10 * (saved - began))
                rows.append(row)
                if journal is not None:
                    journal.append(row)
                self.listen(BlockResult.from_json(row["result"]))
        del runner
        if self.job.head_scheme is not None and not self.job.head_windows:
            return_freed_memory()
            self.listen("solving the head")
            outer[self._end], head = self._solve_head(states)
            self._tell_head(head)
        states = states.without_calibration()
        return_freed_memory()
        self.listen("measuring drift at the head")
        drift = self._drift(states)
        read.refuse_replaced()
        facts = self.ranks.facts(peak_rss_bytes())
        result = self._result(rows, drift, head, started)
        if journal is not None:
            self._finish(journal, outer, beside, result, facts)
        return result

    def _journal(self, described: Mapping[str, Any], beside: Mapping[str, str]) -> Journal:
        """The job's journal, begun or gone on with; JobError for another job's."""
        if not self.resume or never_begun(self.work):
            return Journal.create(self.work, described, beside)
        journal = Journal.load(self.work)
        kept = beside if journal.beside is None else journal.beside
        refuse_changes(journal.job | {"beside": kept}, {**described, "beside": beside}, self.work)
        refuse_strangers(self.work, {*self.output.names, *beside})
        return journal

    def _done_before(self, journal: Journal | None) -> QuantizeResult | None:
        """The result of a run that was killed after its manifest was written, on every rank."""
        found = None
        if journal is not None and (found := finished_before(self.work, self.job.out, journal)) is not None:
            give_name(self.work, self.job.out)
        told = self.ranks.from_first(lambda: None if found is None else finite_json(found.to_json()))
        return found if told is None or found is not None else QuantizeResult.from_json(told)

    def _write_ends(self, journal: Journal | None) -> tuple[dict[int, str], LayerResult | None]:
        """Write what is not in a layer, but for a head of its own that is solved; SHA-256 by part, on the first rank.

        And what became of a head that is the embedding too, where that is solved.
        """
        written: dict[int, str] = {}
        spec, tied, head = self.spec, self.job.head_windows > 0, None
        if self.ranks.first:
            for name, content in self.job.beside:
                write_bytes(self.work / name, content)
            self.files.begin(self.work)
        if tied:
            written[0], head = self._solve_embedding(journal)
        if self.ranks.first and not tied:
            self.listen("writing the embedding" + ("" if self.job.head_scheme else ", the last norm and the head"))
            written[0] = self.files.write(self.work, 0, self._outer([spec.embedding_tensor]))
        if self.ranks.first and (tied or self.job.head_scheme is None):
            last = [spec.norm_tensor, *([] if spec.tie_word_embeddings else [spec.head_tensor])]
            written[self._end] = self.files.write(self.work, self._end, self._outer(last))
        return written, head

    def _solve_embedding(self, journal: Journal | None) -> tuple[str, LayerResult]:
        """Solve and write an embedding that is the head too, unless the journal has it and it is whole."""
        job, known = self.job, {} if journal is None else journal.embedding

        def whole() -> dict[str, Any] | None:
            try:
                LayerResult.from_json(known.get("result"))
            except ValueError:
                return None
            return known if self.files.sha256(self.work, 0) == known.get("sha256") else None

        row: dict[str, Any] | None = self.ranks.from_first(whole)
        if row is None:
            self.listen(f"solving the embedding, which is the head too, on {job.head_windows} windows")
            with closing(SourceLayers(job.source, ahead=job.config.device != "cpu")) as source:
                hessian = tied_hessian(job, self.calibrator, source.take)
            tensors, result = solve_head(job, self.calibrator, hessian)
            sha256 = self.files.write(self.work, 0, tensors) if self.ranks.first else ""
            row = {"sha256": sha256, "result": asdict(result)}
            if journal is not None and known != row:
                journal.begin_again()  # layers, if there are any, were made from another embedding
                journal.append({"embedding": row})
        head = LayerResult.from_json(row["result"])
        self._tell_head(head)
        return row["sha256"], head

    def _tell_head(self, head: LayerResult) -> None:
        self.listen(f"the head: {head.scheme}, output error {head.shown_db:.1f} dB")

    # -------------------------------------------------------------- one layer

    def _layer(
        self, layer: int, source: SourceLayers, states: HiddenStates, runner: LayerRunner
    ) -> dict[str, Any]:
        start = time.perf_counter()
        clock = StageClock(self.job.devices)
        with clock.time("load"):
            state = source.take(layer)
        with clock.time("evaluate"):
            runner.advance(state, "float32", "reference")
        squares = None if self.job.config.save_imatrix is None else InputSquares(self.calibrator, self.spec)
        tensors, results = make_layer(self.job, self.calibrator, layer, state, states, clock, squares)
        totals = None if squares is None else squares.totals()
        sha256, kept = "", dict[str, str]()
        with clock.time("write"):
            if self.ranks.first:
                sha256 = self.files.write(self.work, layer + 1, tensors)
                kept = {} if totals is None else {"imatrix": keep_layer(self.work, layer, totals)}
        del tensors
        with clock.time("evaluate"):
            runner.advance(self._written_layer(layer), "quantized")
            error_db = self._error_db(states)
        result = BlockResult(layer, tuple(results), error_db, time.perf_counter() - start, clock.seconds)
        file = self.files.file_of(layer + 1)
        return {"layer": layer, "file": file, "sha256": sha256, "result": result.to_json()} | kept

    def _error_db(self, states: HiddenStates) -> float | None:
        """Quantized against reference hidden states, window by window, those of all ranks."""
        pairs = zip(states.states["reference"], states.states["quantized"], strict=True)
        sums = [
            torch.stack([a_TH.float().square().sum(), (a_TH.float() - b_TH.float()).square().sum()])
            for a_TH, b_TH in pairs
        ]
        own_N2 = torch.stack(sums).double() if sums else torch.zeros(0, 2, dtype=torch.float64)
        all_N2 = self.ranks.all_windows(own_N2, states.shares["reference"])
        signal, error = (float(total) for total in all_N2.sum(0))
        return 10 * math.log10(error / signal) if signal > 0 and error > 0 else None

    # -------------------------------------------------------------- resuming

    def _recover(self, journal: Journal | None, states: HiddenStates, runner: LayerRunner) -> list[dict[str, Any]]:
        """Bring the hidden states to the first layer that is not done and whole; returns the rows before it."""
        rows: list[dict[str, Any]] = self.ranks.from_first(lambda: [] if journal is None else self._whole_rows(journal))
        known = 0
        for done in range(len(rows), 0, -1):
            saved = rows[done - 1].get("state")
            if saved and states.restore(self.work / saved["file"], str(saved.get("sha256")), self.ranks):
                known = done
                break
        for layer in range(known, len(rows)):
            self.listen(f"layer {layer}: replaying")
            runner.replay(layer, self.job.source.finite_layer_state, self._written_layer)
        return rows

    def _whole_rows(self, journal: Journal) -> list[dict[str, Any]]:
        """Rows of the journal up to the first layer that is not whole; it and what follows is dropped."""
        rows = journal.layers
        good = 0
        if journal.dropped:
            lines = f"{JOURNAL_NAME}: {journal.dropped} of its lines, from line {len(journal.rows) + 1} on"
            self.listen(f"{lines}, torn or damaged: their layers are done again")
        for layer, row in enumerate(rows[: self.spec.num_hidden_layers]):
            if problem := self._problem(layer, row):
                self.listen(f"layer {layer}: {problem}, it and what follows is done again")
                break
            good += 1
        journal.keep_layers(good)
        return rows[:good]

    def _problem(self, layer: int, row: Mapping[str, Any]) -> str:
        """Why a row of the journal is not to be relied on; empty when it is."""
        try:
            whole = BlockResult.from_json(row.get("result")).layer == layer == row["layer"]
        except ValueError:
            whole = False
        state = row.get("state", {"file": _STATE_FILES[0]})
        if not whole or row.get("file") != self.files.file_of(layer + 1) or not isinstance(state, Mapping):
            return "its line in the journal is not a layer's"
        if state.get("file") not in _STATE_FILES:
            return "its line in the journal names a state that is none"
        if self.files.sha256(self.work, layer + 1) != row.get("sha256"):
            return "its file is missing or damaged"
        if self.job.config.save_imatrix is not None and not is_kept(self.work, layer, row.get("imatrix")):
            return "its part of the importance matrix is missing or damaged"
        return ""

    def _written_layer(self, layer: int) -> dict[str, torch.Tensor]:
        return self._written(layer + 1).layer_state(layer)

    def _written(self, *parts: int) -> Checkpoint:
        """Parts as they were written: rank 0 reads them, and every rank dequantizes them, on its device."""
        tensors = {name: at for part in parts for name, at in self.files.locations(self.work, part).items()}
        config = dict(self.output.config)
        written = read_quantization_config(config["quantization_config"], "quantization_config")
        kind, place = (GGUFCheckpoint, self.work / self.files.names[0]) if self.files.whole else (Checkpoint, self.work)
        device = self.job.devices[0]
        return kind(place, config, self.spec, tensors, written, (), relay=self._relay(), device=device)

    def _relay(self) -> Relay | None:
        """Bytes of a file that rank 0 alone can read, for all of them."""
        if self.ranks.size == 1:
            return None
        read = Checkpoint.read_bytes

        def relay(path: Path, start: int, end: int) -> torch.Tensor:
            data = read(path, start, end) if self.ranks.first else torch.empty(end - start, dtype=torch.uint8)
            return self.ranks.broadcast(data)

        return relay

    def _save_state(self, journal: Journal | None, states: HiddenStates) -> dict[str, str]:
        """Save hidden states to the one of two files that the journal did not name last: one whole copy stays."""
        rows = [] if journal is None else journal.layers
        last = next((row["state"]["file"] for row in reversed(rows) if "state" in row), None)
        file = _STATE_FILES[0] if last != _STATE_FILES[0] else _STATE_FILES[1]
        (self.work / file).unlink(missing_ok=True)  # two copies on disk, not three
        return {"file": file, "sha256": states.save(self.work / file, self.ranks)}

    # -------------------------------------------------------------- head, and the end

    @property
    def _end(self) -> int:
        """The last part: norm and head."""
        return len(self.files.parts) - 1

    def _solve_head(self, states: HiddenStates) -> tuple[str, LayerResult]:
        """Solve the head on the calibration tokens and write it, with the last norm; SHA-256 of the part."""
        norm_H = HeadWeights(self.job.source, self.job.convert).norm
        hessian = head_hessian(
            self.calibrator, norm_H, states.states["calibration"], states.shares["calibration"]
        )
        tensors, result = solve_head(self.job, self.calibrator, hessian)
        if not self.ranks.first:
            return "", result
        return self.files.write(self.work, self._end, self._outer([self.spec.norm_tensor]) | tensors), result

    def _outer(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors outside the layers, as they are written: rounded to nearest where they are quantized."""
        source, tensors = self.job.source, {}

        def sound(name: str, start: int, stop: int) -> torch.Tensor:
            w_OI = source.refuse_non_finite(name, source.read_slice(name, start, stop))
            return w_OI if start else source.refuse_blank(name, w_OI)

        for name in names:
            pack = self.job.packer(name)
            changes = source.rotation is not None or source.dtype_of(name) != self.job.stored_dtype(name)
            if pack is None and changes and name != self.spec.norm_tensor:
                pack = partial(self.job.convert, name)  # by slices: beside what is written is little else
            if pack is None:
                whole = source.refuse_blank(name, source.refuse_non_finite(name, source.read(name)))
                tensors[name] = self.job.convert(name, whole)
                continue
            rows = source.tensors[name].spec.shape[0]
            tensors[name] = joined_slices((pack(sound(name, *part)) for part in row_slices(rows)), rows)
        return tensors

    def _drift(self, states: HiddenStates) -> DriftReport:
        reference = quantized = HeadWeights(self.job.source)
        if self.job.head_scheme is not None or (self.job.converts and self.ranks.size == 1):
            quantized = HeadWeights(self._written(*([0] if self.spec.tie_word_embeddings else []), self._end))
            _ = quantized.norm  # rank 0 reads it for all of them, whose windows are not equally many
        elif self.job.converts:
            quantized = HeadWeights(self.job.source, self.job.convert)
        network = self.workers["reference"].first
        return measure_drift(network, reference, quantized, states, self.job.evaluation, self.ranks)

    def _result(
        self, rows: list[dict[str, Any]], drift: DriftReport, head: LayerResult | None, started: float
    ) -> QuantizeResult:
        layers = tuple(BlockResult.from_json(row["result"]) for row in rows)
        return QuantizeResult(
            out=self.job.out,
            drift=drift,
            layers=layers,
            tensor_bytes=self.files.tensor_bytes,
            file_bytes=self.files.file_bytes,
            bits_per_linear_weight=self.job.recipe.bits_per_linear_weight(self.spec),
            seconds=time.perf_counter() - started,
            peak_rss_bytes=peak_rss_bytes(),
            warnings=(*self.job.notes, *job_warnings(layers, head, drift, self.job.overlap)),
            head=head,
        )

    def _finish(
        self,
        journal: Journal,
        outer: Mapping[int, str],
        hashes: dict[str, str],
        result: QuantizeResult,
        facts: list[dict[str, Any]],
    ) -> None:
        """Write what is not a shard, the manifest last, and give the directory its name.

        outer: SHA-256 of the parts that are no layers; hashes: of what the job put beside them; facts: of each rank.
        """
        parts = {**outer, **{row["layer"] + 1: row["sha256"] for row in journal.layers}}
        hashes |= self.files.hashes(self.work, parts)
        hashes |= self.output.copy_small_files(self.job.source.directory, journal.job["source"])
        hashes |= self.output.write_configs()
        if self.job.config.save_imatrix is not None:
            assert self.job.calibration is not None
            write_imatrix(self.job.config.save_imatrix, self.work, self.job.source, self.job.calibration)
        described = describe_result(journal.job, self.spec.parameters, result, resumed=self.resume)
        if facts:
            described["run"]["ranks"] = facts
        read = journal.job["source"]
        card = model_card(
            described, self.job.source.directory, self.spec, self.job.recipe, hashes=read, file=self.files.model_file,
            outside=self.job.outside,
        )  # fmt: skip
        self.output.finish(described, hashes, card)


def make_layer(
    job: QuantizeJob,
    calibrator: Workers,
    layer: int,
    state: dict[str, torch.Tensor],
    states: HiddenStates,
    clock: StageClock,
    squares: InputSquares | None = None,
) -> tuple[dict[str, torch.Tensor], list[LayerResult]]:
    """Quantize a layer as the job says: tensors to be written, by full name, and one result a linear.

    state: the layer's 16-bit tensors by their names within it, emptied on the way. Hidden states of the calibration
    tokens, if the job reads any, are advanced from entering the layer to leaving it; `squares` takes in their inputs.
    """
    spec = job.source.spec
    prefix = spec.layer_prefix(layer)
    folded = FoldedLayer(state, _kept(job, layer, state), job.devices[0])
    if not get_format(job.recipe.format).solved:
        with clock.time("round"):
            stored = {name: job.convert(prefix + name, tensor) for name, tensor in state.items()}
            packed, results = round_layer(spec, layer, job.recipe, stored, job.devices[0])
    elif job.calibration is None:
        with clock.time("round"):
            packed, results = round_block(spec, layer, job.recipe, folded)
    else:
        calibrator.fill(state)
        state.clear()  # the solver lets go of each weight when it is done
        shares = states.shares
        calibration = CalibrationStates(
            states.states["calibration"], states.states.get("original"), states.scratch, shares["calibration"],
            shares.get("original", NO_WINDOWS),
        )  # fmt: skip
        solver = BlockSolver(calibrator, spec, layer, job.recipe, folded, calibration, job.options, clock, squares)
        packed, results = solver.run()
        calibrator.release()
    return packed | {prefix + name: tensor.cpu() for name, tensor in folded.kept.items()}, results


def _kept(job: QuantizeJob, layer: int, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a layer that are not quantized, as they are written."""
    linears = job.source.spec.layer_linears(layer)
    quantized = {lin.path + ".weight" for lin in linears if job.recipe.scheme_of(lin) is not None}
    prefix = job.source.spec.layer_prefix(layer)
    return {name: job.convert(prefix + name, t) for name, t in state.items() if name not in quantized}


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
            "head": asdict(result.head) if result.head else None,
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


def finished_before(work: Path, out: Path, journal: Journal) -> QuantizeResult | None:
    """Result of a run that was killed after its manifest was written; None when anything is not as it says."""
    try:
        manifest, findings = read_manifest(work)
    except QwenqError:
        return None
    scratch = SCRATCH_PREFIX
    if findings or any(not finding.file.startswith(scratch) for finding in check_files(work, manifest)):
        return None
    fields = Fields(manifest, MANIFEST_NAME, "")
    try:
        if current_names(fields.sub("job").value) != journal.job:
            return None
        return QuantizeResult(
            out=out,
            drift=DriftReport.from_json(fields.sub("drift").value),
            layers=tuple(BlockResult.from_json(row.get("result")) for row in journal.layers),
            tensor_bytes=fields.whole("tensor_bytes"),
            file_bytes=fields.whole("file_bytes"),
            bits_per_linear_weight=fields.number("bits_per_linear_weight"),
            seconds=fields.sub("run").number("seconds"),
            peak_rss_bytes=fields.sub("run").whole("peak_rss_bytes"),
            warnings=tuple(fields.texts("warnings")),
            head=None if manifest["head"] is None else LayerResult.from_json(manifest["head"]),
        )
    except (CheckpointError, KeyError, ValueError):
        return None


def job_warnings(
    layers: tuple[BlockResult, ...], head: LayerResult | None, drift: DriftReport, overlap: float | None
) -> tuple[str, ...]:
    """Lines that a reader must not miss, fallbacks first."""
    fallen: dict[str, list[str]] = {}
    for result in (*(linear for block in layers for linear in block.linears), *([head] if head else [])):
        if result.fallback:
            fallen.setdefault(result.fallback, []).append(result.name)
    lines = []
    for reason, names in fallen.items():
        who = f"{len(names)} linears ({several(names)})" if len(names) > 1 else names[0]
        lines.append(f"{who}: fell back to rounding to nearest ({reason})")
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
