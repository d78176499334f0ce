"""From a configuration and a model's directory to a job that can run: texts read, bits and devices chosen."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qwenq.checkpoint.manifest import JOURNAL_NAME
from qwenq.checkpoint.reader import Checkpoint, open_source
from qwenq.errors import JobError
from qwenq.escaping import several
from qwenq.io.durable import file_sha256
from qwenq.io.safetensors import fingerprint
from qwenq.model.layer import Network
from qwenq.pipeline.activations import find_massive
from qwenq.pipeline.config import (
    DEFAULT_EVALUATION_WINDOWS,
    DEFAULT_WINDOWS,
    QuantizeConfig,
    Resolution,
    of_builtin,
    pick_device,
)
from qwenq.pipeline.container import containers
from qwenq.pipeline.fisher import measure_sensitivity, split_windows
from qwenq.pipeline.job import DTYPES, QuantizeJob, windows_of
from qwenq.pipeline.journal import Journal
from qwenq.pipeline.monitor import memory_errors
from qwenq.pipeline.preflight import check_output, partial_directory, refuse_place
from qwenq.pipeline.quantize import check_places
from qwenq.pipeline.ranks import ALONE, Ranks
from qwenq.pipeline.shares import refuse_few
from qwenq.planning.budget import Budgeted
from qwenq.planning.recipefile import RECIPE_NAME, encode_recipe
from qwenq.planning.sensitivity import SENSITIVITY_NAME, encode_sensitivity
from qwenq.text.calibration import check_text, load_windows, overlap, with_builtin
from qwenq.text.tokens import ModelTokenizer, TokenWindows


@dataclass(frozen=True)
class Preparation:
    """A job whose bits are a prior's choice, where a budget has no sensitivities yet, until these are measured."""

    resolution: Resolution
    source: Checkpoint  # FFN padded as asked
    out: Path
    calibration: TokenWindows | None
    evaluation: TokenWindows
    overlap: float | None

    @property
    def budgeted(self) -> Budgeted | None:
        """The mixture; None for one scheme."""
        return self.resolution.budgeted

    @property
    def notes(self) -> tuple[str, ...]:
        """The job's, after a line on stored tensors that the model does not use, if there are any."""
        ignored = self.source.ignored
        unused = [f"{several(ignored)}: stored but not used by the model, left out"] if ignored else []
        return (*unused, *self.job.notes)

    @property
    def calibrates(self) -> str:
        """A line on the calibration text, and on windows of it that the built-in set replaces; empty without one."""
        if self.calibration is None:
            return ""
        windows, length = self.calibration.ids.shape
        replaced = of_builtin(self.calibration.builtin_windows)
        return f"calibrating on {windows} windows of {length} tokens of {self.calibration.text}{replaced}"

    @property
    def job(self) -> QuantizeJob:
        found, files = self.resolution, {}
        if found.budgeted:
            files[RECIPE_NAME] = encode_recipe(self.source.spec, found.budgeted).encode()
        if found.budgeted and found.table:
            files[SENSITIVITY_NAME] = encode_sensitivity(found.table)
        return QuantizeJob(
            source=self.source,
            out=self.out,
            recipe=found.recipe,
            config=found.settled(windows_of(self.calibration, self.evaluation)),
            calibration=self.calibration,
            evaluation=self.evaluation,
            overlap=self.overlap,
            beside=tuple(files.items()),
        )

    def measured(
        self, *, resume: bool = False, listen: Callable[[str], None] = lambda line: None, ranks: Ranks = ALONE
    ) -> Preparation:
        """With sensitivities measured, if a budget needs them; `listen` gets a line of text at each step."""
        if self.calibration is None or not self.resolution.measures(windows_of(self.calibration, self.evaluation)):
            return self
        beside = self.out.absolute().parent
        if ranks.first:
            check_places(self.job, resume)
            beside.mkdir(parents=True, exist_ok=True)
        config = self.resolution.config
        table = measure_sensitivity(
            self.source,
            split_windows(
                self.calibration, seed=config.seed, asymmetric=bool(config.asymmetric), format=config.format
            ),
            compute_dtype=DTYPES[config.compute_dtype],
            device=config.device.split(",")[0],
            scratch=ranks.scratch(beside),
            listen=listen,
            ranks=ranks,
        )
        return replace(self, resolution=self.resolution.measured(table))


def _measured_before(work: Path) -> Path | None:
    """The sensitivities that a stopped job measured; None without, JobError where they are not those in its journal."""
    path = work / SENSITIVITY_NAME
    if not path.is_file():
        return None
    beside = Journal.load(work).beside
    if beside is not None and file_sha256(path) != beside.get(SENSITIVITY_NAME):
        raise JobError(
            f"{path}: damaged, it is not what the journal says was measured",
            hint="delete it, and it is measured again",
        )
    return path


def _told_of(work: Path, place: Path, ranks: Ranks) -> Path | None:
    """`_measured_before` of rank 0; on the others a copy at `place`."""
    before = _measured_before(work) if ranks.first else None
    content = ranks.from_first(lambda: None if before is None else before.read_text(encoding="utf-8"))
    if ranks.first or content is None:
        return before
    (place / SENSITIVITY_NAME).write_text(content, encoding="utf-8")
    return place / SENSITIVITY_NAME


def prepare(
    directory: Path,
    out: Path,
    config: QuantizeConfig,
    *,
    resume: bool = False,
    listen: Callable[[str], None] = lambda line: None,
    ranks: Ranks = ALONE,
) -> Preparation:
    """Open the model at `directory`, choose what the configuration leaves open and read the texts.

    listen: gets a line on what decides whether the model is rotated. Raises QwenqError for a model, a text or a
    combination that cannot be used, and where ranks have different ones.
    """
    source = open_source(directory)
    device = pick_device(config.device)
    with tempfile.TemporaryDirectory(prefix="qwenq-rank-") as place:
        found = Resolution.of(
            config,
            source.spec,
            source.dtype_of,
            device=device,
            fingerprint=fingerprint(source.directory) if config.mixed else "",
            measured=_told_of(partial_directory(out), Path(place), ranks) if resume and config.mixed else None,
            beside=containers(source, config),
        )
    if config.pad_for_tp is not None:
        source = source.padded(found.spec.intermediate_size)
    calibration, evaluation = _read_texts(config, source)
    shared = _overlap(config, calibration)
    found.settled(windows_of(calibration, evaluation))  # what cannot be corrected is refused here
    read = {"source": source.sampled(), "calibration": calibration and calibration.to_json()}
    read |= {"evaluation": evaluation.to_json(), "options": config.same_everywhere()}
    ranks.refuse_others("command", read)
    calibrating = None if calibration is None else len(calibration.ids)
    refuse_few(ranks.size, calibration=calibrating, evaluation=len(evaluation.ids))
    if found.config.rotate is None and calibration is not None:
        if ranks.first:  # what is in the way is refused before layers are read
            assumed = replace(found, config=replace(found.config, rotate=True))
            check_places(Preparation(assumed, source, out, calibration, evaluation, shared).job, resume)
        begun = partial_directory(out) if resume else None
        rotate = ranks.from_first(lambda: _rotates(source, found.config, calibration.ids, begun, listen))
        found = replace(found, config=replace(found.config, rotate=rotate))
    if found.config.rotate:
        source = source.rotated()
    return Preparation(found, source, out, calibration, evaluation, shared)


def _rotates(
    source: Checkpoint, config: QuantizeConfig, ids_NT: Tensor, begun: Path | None, listen: Callable[[str], None]
) -> bool:
    """Whether the job that was begun in a directory rotates the hidden states, or where none was, whether they have
    massive activations.
    """
    if begun is not None and (begun / JOURNAL_NAME).exists():
        options = Journal.load(begun).job.get("options")
        return isinstance(options, dict) and options.get("rotate") is True
    listen("looking for massive activations in the first third of the layers")
    device = config.device.split(",")[0]
    with memory_errors("looking for massive activations", torch.device(device), None, "--no-rotate needs no look"):
        network = Network(source.config, source.spec, dtype=DTYPES[config.calibration_dtype], device=device)
        massive = find_massive(source, network, ids_NT)
    if massive is None:
        listen("no massive activations: the hidden states are not rotated")
        return False
    layer, ratio = massive
    listen(
        f"massive activations after layer {layer} ({ratio:,.0f} times the median token's mean square): rotating "
        "the hidden states (--no-rotate leaves them; --no-fold the norms too, so that adapters of the original fit)"
    )
    return True


def check_asked(
    model: str, config: QuantizeConfig, out: Path, *, resume: bool = False, ranks: Ranks = ALONE
) -> None:
    """Refuse what is seen to be wrong before a model is downloaded: JobError for the output, CalibrationError for a
    text that is not there.
    """
    if ranks.first:
        if os.path.isdir(model) and os.path.exists(out) and os.path.samefile(model, out):
            refuse_place(out, Path(model))  # that it exists would be true too, and its hint deletes the model
        check_output(out, resume)
    for text in (config.calibration, config.eval_text) if config.solver == "gptq" else (config.eval_text,):
        check_text(text)


def read_calibration(config: QuantizeConfig, source: Checkpoint, tokenizer: ModelTokenizer) -> TokenWindows:
    """Windows of the calibration text, some of them replaced by the built-in set's."""
    windows = load_windows(
        config.calibration,
        tokenizer,
        source.spec,
        length=config.sequence_length,
        count=config.num_samples,
        seed=config.seed,
        up_to=DEFAULT_WINDOWS,
        strict=config.strict,
    )
    replaced = config.builtin_windows(len(windows.ids), tokenizer=tokenizer.present)
    return with_builtin(windows, replaced, tokenizer, source.spec, seed=config.seed)


def _read_texts(config: QuantizeConfig, source: Checkpoint) -> tuple[TokenWindows | None, TokenWindows]:
    """Windows of calibration, None for rounding to nearest, which reads none; and of evaluation, of the same length."""
    tokenizer = ModelTokenizer(source.directory)
    calibration = read_calibration(config, source, tokenizer) if config.solver == "gptq" else None
    evaluation = load_windows(
        config.eval_text,
        tokenizer,
        source.spec,
        length=calibration.ids.shape[1] if calibration else config.sequence_length,
        count=config.eval_samples,
        seed=None,
        up_to=DEFAULT_EVALUATION_WINDOWS,
        strict=config.strict,
    )
    return calibration, evaluation


def _overlap(config: QuantizeConfig, calibration: TokenWindows | None) -> float | None:
    """Share of the evaluation text that is also in what was calibrated on; None where one of them is no text."""
    texts = [] if calibration is None or config.calibration.endswith(".npy") else [config.calibration]
    if calibration is not None and calibration.builtin_windows:
        texts.append("builtin")
    if not texts or config.eval_text.endswith(".npy"):
        return None
    return overlap(texts[0], config.eval_text, *texts[1:])
