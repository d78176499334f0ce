"""Every failure a user can cause or meet.

    QwenqError            exit code 1: one line, and a hint
    |-- CheckpointError   a model directory, its config, index or tensors are not usable
    |   `-- UnreadScheme  it is quantized in a way that this version does not read
    |-- CalibrationError  calibration or evaluation text is not usable
    |-- HubError          a model cannot be had from the hub
    |-- PlanError         a rig, context or scheme cannot be planned with
    |   `-- UsageError    exit code 2: options, or one's value, that mean nothing whatever the model
    |-- JobError          an output directory or a resumed job is not usable
    |-- RunError          a model cannot be loaded, run or served on this machine
    `-- HonestNo          exit code 3: the answer is no (does not fit, drift over the limit)

A message says what, where, got and wanted in one line; `hint` says what to do about it.
"""

from __future__ import annotations

from qwenq.escaping import shown

_LONGEST = 2000  # characters of a message or a hint
_NO_MEMORY = (
    "can't allocate memory", "Cannot allocate memory", "out of memory", "ALLOC_FAILED", "failed to map segment",
)  # fmt: skip


def out_of_memory(error: BaseException | None) -> BaseException | None:
    """The error by which Python, torch, its allocators or the loader of libraries say that memory does not suffice.

    That is `error`, or one behind it: a CUDA graph whose capture ran out of memory fails once more as it is ended.
    """
    if isinstance(error, MemoryError):
        return error
    if not isinstance(error, RuntimeError | ImportError):
        return None
    said = any(words in str(error) for words in _NO_MEMORY)
    return error if said else out_of_memory(error.__context__)


class QwenqError(Exception):
    """One clear line for the user, with an optional hint; the command line exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message, self.hint = shown(message, _LONGEST), shown(hint, _LONGEST)
        super().__init__(self.message)


class CheckpointError(QwenqError):
    """A model directory, its config, index or tensors are not usable."""


class UnreadScheme(CheckpointError):
    """A checkpoint is quantized in a way that this version does not read; other engines may."""


class CalibrationError(QwenqError):
    """Calibration or evaluation text is not usable."""


class HubError(QwenqError):
    """A model cannot be had from the hub."""


class PlanError(QwenqError):
    """A rig, context or scheme cannot be planned with."""


class UsageError(PlanError):
    """An option's value, or options together, that mean nothing whatever the model and the machine are."""

    exit_code = 2


class JobError(QwenqError):
    """An output directory or a resumed job is not usable."""


class RunError(QwenqError):
    """A model cannot be loaded, run or served on this machine."""


class HonestNo(QwenqError):
    """The work was done and the answer is no: it does not fit, or the drift is over the limit."""

    exit_code = 3
