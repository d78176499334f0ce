"""Every option of a quantization, and their resolution on a model: one for command line, dry run and job. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from qwenq.checkpoint.manifest import MANIFEST_NAME, current_names, renamed_options
from qwenq.checkpoint.shards import NOTHING, Beside
from qwenq.errors import CheckpointError, PlanError, UsageError
from qwenq.formats.base import FORMATS, Recipe, Scheme, get_format, mixing, names_of
from qwenq.io.safetensors import FLOATS
from qwenq.machine import has_bfloat16
from qwenq.model.spec import ModelSpec
from qwenq.planning.budget import (
    Budgeted,
    choose_for_bits,
    choose_for_bytes,
    choose_for_rig,
    cut_by,
    describe_choice,
    widened,
    widened_to,
)
from qwenq.planning.sensitivity import Sensitivity, prior, read_sensitivity
from qwenq.units import parse_size, parse_tokens

SPILL_BYTES = 6 << 30  # token buffers beyond this live in a memory-mapped file
DEFAULT_WINDOWS = 128  # of calibration, at most, where no number is given
DEFAULT_EVALUATION_WINDOWS = 20  # likewise
SINK_WEIGHT = 64.0  # of tokens with massive states (reports/LOG.md)
BUILTIN_SHARE = 0.2  # of the windows of another calibration text, that the built-in set replaces (reports/LOG.md)
SET_TOKENS = {"builtin": 156_200, "heldout": 12_300}  # about so many by Qwen2.5's tokenizer
BATCH_TOKENS = 2048  # that go through a layer together
CPU_BATCH_TOKENS = 1024  # likewise, by each worker of a CPU, at most
CPU_BATCH_VALUES = 5 << 19  # of such a batch in the FFN: more take memory and save no time (reports/LOG.md)
HELD_VALUES = 1 << 21  # of parts of a sum that wait to be added together: small ones cost more to add than to hold
ERROR_CORRECTION_SHARE = 0.5  # of the calibration windows, which run through the 16-bit layers too
CORRECTION_TOKENS_A_COLUMN = 8  # but at least so many tokens for each input column of down, where there are so many
CORRECTION_LEAST_A_COLUMN = 2  # with fewer they say too little to be worth that pass, unless asked for (reports/LOG.md)
PARTS = 8  # of the windows of a pass, summed apart and then in order, which ranks and workers share (docs/scale-out.md)
MOST_WORKERS = 4  # of a CPU, that share the windows which go through a layer together, each with its own Hessian
WORKERS_UP_TO = 8192  # wide FFNs: beyond, matmuls alone keep cores busy, and Hessians are large
NARROW_UP_TO = 4.75  # bits of a linear weight, scales included: those of 4 bits in groups of 32 and more
NOISE_WINDOWS = 2  # evaluation windows that are also run in float32, when computing in a narrower type
HEAD_WINDOWS = 16  # of calibration, that run through the 16-bit model first where a solved head is the embedding
HEAD_TOKENS_A_COLUMN = 8  # but at least so many tokens for each of its columns, where there are so many
SOLVER_WINDOWS = 16  # of calibration, at most, for the Hessians that sensitivities' errors are solved with
PROBE_WINDOWS, PROBE_TOKENS = 32, 128  # and other, shorter ones, at most, that the errors' effect is read on
SAMPLES = 4  # labels a position, of a sensitivity
SENSITIVITY_ROWS = 256  # of a linear, about, that errors are solved of; all below three times as many
HEAD_STRIDE = 4  # of the probe tokens, one in so many is read for what a rounded head costs
BACKWARD_TOKENS = 1024  # that go backward through a layer together
_OF_CALIBRATION = {
    "calibration": "names a calibration text",
    "num_samples": "counts windows of calibration",
    "builtin_share": "is of calibration",
    "seed": "draws windows of calibration",
    "damp_percent": "damps what calibration measures",
    "error_correction": "is read from calibration",
    "error_correction_share": "is of calibration",
    "sink_weight": "weighs tokens of calibration",
    "calibration_dtype": "is of calibration",
}  # options that do nothing without it, and why
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Tokens:
    """Calibration and evaluation windows of a job: counts and widths only."""

    calibration_windows: int
    evaluation_windows: int
    length: int
    calibration_bytes: int = 4  # of a value in the calibration windows' hidden states
    error_correction_share: float = ERROR_CORRECTION_SHARE  # 0 without error correction

    @property
    def calibration(self) -> int:
        return self.calibration_windows * self.length

    @property
    def evaluation(self) -> int:
        return self.evaluation_windows * self.length

    def original(self, spec: ModelSpec) -> int:
        """Calibration tokens that run through the 16-bit layers too."""
        return original_windows(spec, self.calibration_windows, self.length, self.error_correction_share) * self.length


def default_error_correction(recipe: Recipe, spec: ModelSpec, tokens: int) -> float:
    """1 where anything is in fewer than 8 bits and calibration tokens are enough for the columns of down, else 0.

    8 bits lose about as much as bfloat16 hidden states blur; what few tokens say of many columns is mostly noise.
    """
    if tokens < CORRECTION_LEAST_A_COLUMN * spec.intermediate_size:
        return 0.0
    schemes = (recipe.default, *(scheme for _, scheme in recipe.overrides))
    return 1.0 if any(scheme is not None and scheme.bits < 8 for scheme in schemes) else 0.0


def chosen_error_correction(
    asked: float | None, recipe: Recipe, spec: ModelSpec, *, windows: int, length: int, share: float
) -> float:
    """Strength of error correction: as asked, else by default; 0 where there are no two halves to compare.

    PlanError where it is asked for and one window is all there is.
    """
    if windows == 0 or share == 0:
        return 0.0
    if windows < 2:
        if asked:
            raise PlanError(
                f"--error-correction {asked:g}: one window of calibration has no two halves", hint="more text"
            )
        return 0.0
    return default_error_correction(recipe, spec, windows * length) if asked is None else asked


def original_windows(spec: ModelSpec, windows: int, length: int, share: float = ERROR_CORRECTION_SHARE) -> int:
    """How many calibration windows, the first ones, run through the 16-bit layers too, for error correction.

    A whole number of batches, or all windows, and of these an even number: halves are compared, as large as each other.
    Two at least, where there are two; none for a share of 0.
    """
    if share == 0:
        return 0
    step = max(1, BATCH_TOKENS // length)
    enough = CORRECTION_TOKENS_A_COLUMN * spec.intermediate_size / length
    found = min(windows, max(2, math.ceil(max(windows * share, enough) / step) * step))
    return found // 2 * 2


def head_windows(spec: ModelSpec, windows: int, length: int) -> int:
    """How many calibration windows, the first ones, a solved head that is the embedding gets its Hessian from."""
    return min(windows, max(HEAD_WINDOWS, math.ceil(HEAD_TOKENS_A_COLUMN * spec.hidden_size / length)))


@dataclass(frozen=True)
class QuantizeConfig:
    """Every option of `qwenq quantize` but the model and the place of the output.

    Values are the command line's: sizes, budgets and contexts in words ("47GB", "5", "16k"), None or "auto" for a
    choice that depends on the model or the machine. UsageError for values and combinations that mean nothing.
    """

    # bits: one scheme, or the best mixture within a budget
    bits: int | None = None  # 4 or 8; 4 by default
    group_size: int | None = None  # columns that share a scale: 128, 64, 32 or -1, the row; 128 by default
    format: str = "gptq"
    gguf_type: str | None = None  # one of llama.cpp's mixtures, in any case: Q4_K_M
    split_size: str | None = None  # of a GGUF file's tensors, at most; a larger one has a file of its own
    asymmetric: bool | None = None  # zero points of each group's own; for awq by default
    target_size: str | None = None  # bytes of the shard files, at most
    bpw: str | None = None  # stored bits a linear weight, at most
    fit: str | None = None  # a rig
    context: str | None = None  # tokens `fit` leaves room for; 8k by default
    engine: str | None = None  # that `fit` plans for; qwenq by default
    recipe: Path | None = None  # a recipe file
    sensitivity: Path | None = None  # a table that `qwenq sensitivity` wrote
    rotate: bool | None = None  # the hidden states; by default where `may_rotate` and massive activations are found
    pad_for_tp: int | None = None  # GPUs whose cuts no group straddles, once the FFN is widened; 1 for gguf
    # text
    calibration: str = "builtin"  # a set's name, or a file
    num_samples: int | None = None  # windows; all by default, at most DEFAULT_WINDOWS
    builtin_share: float | None = None  # of the windows of another text, replaced by those of the built-in set
    sequence_length: int = 512  # tokens a window
    seed: int = 0
    eval_text: str = "heldout"
    eval_samples: int | None = None  # windows; all by default, at most DEFAULT_EVALUATION_WINDOWS
    strict: bool = False  # a bad row of a text is an error, else it is left out and counted
    # solver
    method: str | None = None  # gptq, or rtn: rounding to nearest
    damp_percent: float | None = None  # share of the mean Hessian diagonal; DAMP_PERCENT, or by tokens for down_proj
    fold: bool = True  # channel scales into norms and up_proj
    error_correction: float | None = None  # 0 to 1, of o_proj and down_proj
    error_correction_share: float = ERROR_CORRECTION_SHARE  # of the calibration windows that it is read from
    sink_weight: float = SINK_WEIGHT  # of tokens with massive activations, 1 to 1024
    # beside the checkpoint
    save_imatrix: Path | None = None  # an importance matrix of the model, in llama.cpp's form
    # machine
    device: str = "auto"  # cpu, or GPUs: cuda:0,cuda:1
    dtype: str = "auto"  # of tensors that are not quantized; auto keeps their bytes
    compute_dtype: str = "auto"  # of evaluation activations
    calibration_dtype: str = "auto"  # of calibration activations

    def __post_init__(self) -> None:
        self.solver  # noqa: B018
        if self.dtype not in ("auto", "float16", "bfloat16"):
            raise UsageError(f"--dtype {self.dtype}: wanted auto, float16 or bfloat16")
        pick_compute_dtype(self.compute_dtype, self.device)
        pick_calibration_dtype(self.calibration_dtype, self.device)
        self._check_numbers()
        self._check_together()

    def _check_numbers(self) -> None:
        """Ranges that the command line states too."""
        for name, least, most in (
            ("num_samples", 1, math.inf), ("eval_samples", 1, math.inf), ("sequence_length", 2, math.inf),
            ("seed", 0, math.inf), ("damp_percent", 0, 1), ("error_correction", 0, 1),
            ("error_correction_share", 0, 1), ("builtin_share", 0, 1), ("sink_weight", 1, 1024),
            ("pad_for_tp", 1, math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                wanted = f"at least {least}" if most == math.inf else f"{least} to {most}"
                raise UsageError(f"{flag(name)} {value}: wanted {wanted}")

    def _check_together(self) -> None:
        ways = {flag(name): getattr(self, name) for name in ("target_size", "bpw", "fit", "recipe")}
        given = [name for name, value in ways.items() if value is not None]
        for name in ("bits", "group_size", "gguf_type"):
            if getattr(self, name) is not None and given:
                raise UsageError(
                    f"{flag(name)} and {given[0]} exclude each other: one scheme, or the best mixture"
                )
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other")
        if self.asymmetric is not None and self.recipe is not None:
            raise UsageError("--asymmetric and --recipe exclude each other: the recipe says it group by group")
        form = get_format(self.format)
        for name in ("group_size", "asymmetric"):
            if form.mixtures and getattr(self, name) is not None:
                raise UsageError(f"--format {self.format}: {flag(name)} does not apply: each type has its own")
        if self.asymmetric and given and not form.mixes_zero_points:
            raise UsageError(
                f"--asymmetric with {given[0]} wants --format {carry_zero_points()}: no other mixed format's zero "
                "points are read by engines"
            )
        if given and not form.mixes:
            raise UsageError(f"{given[0]} wants a --format that mixes bits: {names_of(mixing())}")
        for name in ("context", "engine"):
            if getattr(self, name) is not None and self.fit is None:
                raise UsageError(f"{flag(name)} goes with --fit")
        if self.sensitivity is not None and not given:
            raise UsageError("--sensitivity goes with --target-size, --bpw, --fit or --recipe")
        if self.save_imatrix is not None and self.solver == "rtn":
            raise UsageError("--save-imatrix comes from calibration: rounding to nearest reads none")
        if self.rotate and self.save_imatrix is not None:
            raise UsageError("--save-imatrix is of the model's own weights, --rotate makes others")
        if self.builtin_share and self.calibration == "builtin":
            raise UsageError("--builtin-share goes with a --calibration text other than the built-in set")
        if self.target_size is not None:
            parse_size(self.target_size)
        if self.bpw is not None:
            _bits(self.bpw)
        if self.fit is not None and self.context is not None:
            parse_tokens(self.context)
        for name in ("gguf_type", "split_size"):
            if getattr(self, name) is not None and not form.whole_file:
                raise UsageError(f"{flag(name)} goes with --format gguf")
        if self.split_size is not None and parse_size(self.split_size) == 0:
            raise UsageError(f"--split-size {self.split_size}: wanted more than 0 bytes")
        if form.widened_to is not None and self.pad_for_tp not in (None, 1):
            raise UsageError(
                f"--pad-for-tp {self.pad_for_tp}: --format {self.format} pads for no number of GPUs, but to whole "
                f"blocks of {form.widened_to}",
                hint="--pad-for-tp 1",
            )
        if form.mixtures:
            if self.mixture and self.dtype != "auto":
                raise UsageError(f"--dtype does not apply: {self.mixture} sets the type of every tensor")
        elif not self.mixed:
            self.scheme()

    def refuse_idle(self, given: Collection[str] = ()) -> None:
        """UsageError for an option that was given and does nothing; a settled configuration has values for all.

        given: names of options that were, whatever their value; others were where they are not as by default.
        """
        if self.solver != "rtn":
            if self.error_correction == 0 and "error_correction_share" in given:
                raise UsageError("--error-correction-share is of what --error-correction 0 turns off")
            return
        plain = self.mixture in get_format(self.format).unquantized
        none = f"{self.mixture} needs none" if plain else "rounding to nearest reads none"
        for name, idle in _OF_CALIBRATION.items():
            value, default = getattr(self, name), getattr(QuantizeConfig, name)
            if value != default or (name in given and value is not None):
                raise UsageError(f"{flag(name)} {idle}: {none}")
        if "fold" in given and self.fold:
            raise UsageError(f"--fold takes channel scales from calibration: {none}")

    @property
    def idle_share(self) -> str:
        """A line on a share of windows that a settled configuration has for error correction, and no correction."""
        share = self.error_correction_share
        if self.solver != "gptq" or self.error_correction or share in (0, ERROR_CORRECTION_SHARE):
            return ""
        return (
            f"--error-correction-share {share:g} does nothing: by default errors are not corrected at 8 bits, nor "
            f"with fewer than {CORRECTION_LEAST_A_COLUMN} tokens per column of down_proj (--error-correction 1 does)"
        )

    def may_rotate(self, spec: ModelSpec) -> bool:
        """Whether the model is rotated, unless told otherwise, where massive activations are found in it.

        Not where that was not measured or gains nothing (mixtures, GGUF: reports/qwen25.md) or would cost something: a
        tied head, an adapter or an importance matrix of the original.
        """
        if self.solver != "gptq" or self.mixed or get_format(self.format).mixtures or spec.tie_word_embeddings:
            return False
        return self.fold and self.save_imatrix is None

    @property
    def mixed(self) -> bool:
        """Not one scheme, but a mixture."""
        return any(value is not None for value in (self.target_size, self.bpw, self.fit, self.recipe))

    @property
    def budgeted(self) -> bool:
        """A budget to optimize for, which needs sensitivities; a recipe file needs none."""
        return self.mixed and self.recipe is None

    def builtin_windows(self, windows: int, *, tokenizer: bool) -> int:
        """How many windows of the calibration text the built-in set replaces, as far as it has so many.

        tokenizer: whether the model's directory has a tokenizer.json: without it none are, unless asked for.
        """
        if self.calibration == "builtin":
            return 0
        share = (BUILTIN_SHARE if tokenizer else 0.0) if self.builtin_share is None else self.builtin_share
        return round(share * windows)

    @property
    def solver(self) -> str:
        """gptq unless told otherwise, or nothing is quantized; some formats are always rounded."""
        if self.method not in (None, "gptq", "rtn"):
            raise UsageError(f"--method {self.method}: wanted gptq or rtn")
        form = get_format(check_format(self.format))
        if not form.solved:
            if self.method == "gptq":
                raise UsageError(
                    f"--format {self.format} rounds by {form.method}' own functions", hint="leave --method out"
                )
            return "rtn"
        plain = self.mixture in form.unquantized and self.save_imatrix is None  # which calibration would only delay
        return self.method or ("rtn" if plain else "gptq")

    @property
    def mixture(self) -> str:
        """The format's own mixture that is asked for; empty where it has none, or for a budget."""
        form = get_format(self.format)
        if not form.mixtures or self.mixed:
            return ""
        if self.gguf_type is None:
            bits = 4 if self.bits is None else self.bits
            if bits not in form.mixture_of_bits:
                wanted = " or ".join(map(str, form.mixture_of_bits))
                raise UsageError(f"--bits {bits}: wanted {wanted}", hint="--gguf-type names any mixture")
            return form.mixture_of_bits[bits]
        if self.bits is not None:
            raise UsageError("--bits and --gguf-type exclude each other")
        name = self.gguf_type.upper()  # as llama-quantize reads it
        if name not in form.mixtures:
            near = [known for known in form.mixtures if name and known.startswith(name)]
            raise UsageError(
                f"--gguf-type {self.gguf_type[:40]}: wanted one of {', '.join(form.mixtures)}",
                hint=f"is it {' or '.join(near)}?" if near else "",
            )
        return name

    def uniform(self, spec: ModelSpec) -> Recipe:
        """The recipe where there is no budget: one scheme for all linears, or one of the format's own mixtures."""
        if self.mixture:
            return get_format(self.format).mixture(self.mixture, spec)
        return Recipe(self.scheme(), format=self.format)

    def scheme(self) -> Scheme:
        """One scheme for all linears: 4-bit g128 unless said otherwise, or the format's own.

        UsageError when the format cannot hold it.
        """
        form = get_format(self.format)
        if (fixed := form.fixed) is not None:
            only = {"bits": fixed.bits, "group_size": fixed.group_size, "asymmetric": False}
            for name, value in only.items():
                if getattr(self, name) not in (None, value):
                    raise UsageError(
                        f"--format {self.format} is {fixed.label}: {flag(name)} does not apply", hint="leave it out"
                    )
            return fixed
        asymmetric = form.asymmetric if self.asymmetric is None else self.asymmetric
        bits, group_size = 4 if self.bits is None else self.bits, 128 if self.group_size is None else self.group_size
        scheme = Scheme(bits, group_size, not asymmetric)
        form.check_scheme(scheme)
        return scheme

    def widened(self, spec: ModelSpec) -> ModelSpec:
        """The model with its FFN padded as asked, so that no group straddles ranks; PlanError when that cannot help."""
        if self.pad_for_tp is None:
            return spec
        if (block := get_format(self.format).widened_to) is not None:
            wide = widened_to(spec, block)
            if self.mixture and self.uniform(wide) == self.uniform(spec):
                raise PlanError(
                    f"--pad-for-tp: every tensor of {self.mixture} has the same type without it",
                    hint="leave it out",
                )
            return wide
        return widened(spec, self.pad_for_tp, None if self.mixed else Recipe(self.scheme(), format=self.format))

    def choose(
        self,
        spec: ModelSpec,
        table: Sensitivity | None,
        dtype_of: Callable[[str], str],
        beside: Callable[[Recipe], Beside] = lambda recipe: NOTHING,
    ) -> Budgeted:
        """The mixture asked for; sensitivities are the prior's when there is no table. Zero points only if asked for.

        dtype_of: of each tensor that is not quantized, as it will be written. beside: what its files hold beside them.
        """
        form = get_format(self.format)
        table = table or prior(spec, self.format, asymmetric=bool(self.asymmetric))
        if not self.asymmetric and self.recipe is None and not form.outer:
            kept = {fused: {s: kl for s, kl in row.items() if s is None or s.sym} for fused, row in table.kl.items()}
            table = replace(table, kl=kept)
        held = beside(Recipe(form.options[0] if form.options else None, (), self.format))  # the same for any recipe
        if self.pad_for_tp is not None and form.widened_to is None:
            table = cut_by(spec, table, self.pad_for_tp)
        if self.recipe is not None:
            from qwenq.planning.recipefile import read_recipe

            choice = read_recipe(self.recipe, spec, self.format)
            return describe_choice(spec, table.covering(spec, choice), choice, dtype_of, self.format, beside=held)
        if self.target_size is not None:
            return choose_for_bytes(spec, table, parse_size(self.target_size), dtype_of, self.format, beside=held)
        if self.bpw is not None:
            return choose_for_bits(spec, table, _bits(self.bpw), dtype_of, self.format, beside=held)
        from qwenq.planning.case import Case, Workload, default_context
        from qwenq.planning.engines.base import engine_names, get_engine
        from qwenq.planning.rig import parse_rig
        from qwenq.planning.weights import recipe_weights

        assert self.fit is not None
        engine = get_engine(self.engine or form.engine)
        if engine.needs_gguf != form.whole_file:
            raise PlanError(
                f"--engine {engine.name}: --fit plans --format {self.format} for other engines",
                hint=form.engine if form.whole_file else engine_names(checkpoints=True),
            )
        work = Workload(parse_tokens(self.context) if self.context else default_context(spec), 1)
        case = Case(spec, recipe_weights(spec, Recipe(None)), engine, work, parse_rig(self.fit))
        return choose_for_rig(case, table, dtype_of, self.format, held)

    def same_everywhere(self) -> dict[str, Any]:
        """What every rank has to be given alike: all but places of files, whose content counts, and its own device."""
        own = ("device", "calibration", "eval_text", "recipe", "sensitivity", "save_imatrix")
        return {name: value for name, value in self.to_json().items() if name not in own}

    def to_json(self) -> dict[str, Any]:
        """Every option by its name; paths as text."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_json(options: Mapping[str, Any]) -> QuantizeConfig:
        """The configuration that `to_json` gave; TypeError for an option that there is not, or of another type."""
        given = renamed_options(options)
        kinds = get_type_hints(QuantizeConfig)
        for name, value in given.items():
            wanted = get_args(kinds[name]) or (kinds[name],) if name in kinds else ()
            wanted = (*wanted, str) if Path in wanted else (*wanted, int) if float in wanted else wanted
            if type(value) not in wanted:
                raise TypeError(f"{name} is {value!r}" if name in kinds else f"no option {name}")
        places = ("recipe", "sensitivity", "save_imatrix")
        paths = {name: Path(given[name]) for name in places if given.get(name) is not None}
        return QuantizeConfig(**given | paths)

    @staticmethod
    def from_manifest(job: Mapping[str, Any]) -> QuantizeConfig:
        """The options that a manifest's `job` names: the solver's, dtypes, device and seed, and a mixture.

        Other bits and format are in its recipe, windows in its texts. CheckpointError for what makes no configuration.
        """
        kept = ("device", "compute_dtype", "calibration_dtype", "dtype", "seed")
        mixture = ("format", "gguf_type")  # which decide dtypes of what is not quantized
        try:
            names = (*kept, *mixture) if job.get("gguf_type") else kept
            options = dict(current_names(job)["options"])
            return QuantizeConfig.from_json({name: job[name] for name in names} | options)
        except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
            raise unreadable(error) from None


def unreadable(error: Exception) -> CheckpointError:
    """The refusal of a manifest whose job makes none."""
    return CheckpointError(
        f"{MANIFEST_NAME}: its job cannot be read ({type(error).__name__}: {error})",
        hint="another version of qwenq wrote it",
    )


def flag(option: str) -> str:
    """An option as the command line spells it."""
    return "--" + option.replace("_", "-")


def check_format(format: str) -> str:
    """The format; UsageError for one that there is not."""
    if format not in FORMATS:
        raise UsageError(f"--format {format}: wanted one of {', '.join(FORMATS)}")
    return format


def carry_zero_points() -> str:
    """Names of formats that mix bits and zero points."""
    return names_of(form for form in FORMATS.values() if form.mixes_zero_points)


def _bits(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"--bpw {text[:40]}: not a number of bits", hint="for instance 5.0") from None


# ---------------------------------------------------------------------- on a model, on a machine


@dataclass(frozen=True)
class Windows:
    """Calibration and evaluation windows: how many, and their length in tokens."""

    calibration: int  # 0 for rounding to nearest, which reads none
    evaluation: int
    length: int
    counted: bool = True  # in the texts themselves, by the model's tokenizer


@dataclass(frozen=True)
class Resolution:
    """A configuration on a model and a device: dry run and job choose bits, dtypes and error correction here.

    config: with method, device and dtypes chosen, and rotation unless the model's activations decide it. spec: of the
    model as it is written, FFN padded. table: sensitivities that are known beforehand. budgeted: the mixture, by a
    prior's sensitivities where there is no table yet.
    """

    config: QuantizeConfig
    spec: ModelSpec
    dtype_of: Callable[[str], str]
    table: Sensitivity | None
    budgeted: Budgeted | None
    beside: Callable[[Recipe], Beside] = lambda recipe: NOTHING

    @staticmethod
    def of(
        config: QuantizeConfig,
        spec: ModelSpec,
        source_dtype_of: Callable[[str], str],
        *,
        device: str,
        fingerprint: str = "",
        measured: Path | None = None,
        beside: Callable[[ModelSpec, Recipe], Beside] = lambda spec, recipe: NOTHING,
    ) -> Resolution:
        """Apply `config` to a 16-bit model; PlanError for what it does not allow.

        device: `cpu` or `cuda...`, what `auto` has become. fingerprint: of the source's files, empty when they are not
        here. measured: sensitivities that a stopped job has measured already. beside: what files hold beside tensors.
        """
        method, wide = config.solver, config.widened(spec)
        if config.rotate:
            check_rotatable(spec)
        stored_dtype = get_format(config.format).stored_dtype

        def dtype_of(name: str) -> str:
            dtype = source_dtype_of(name) if config.dtype == "auto" else FLOATS[config.dtype]
            return stored_dtype(name, dtype, config.mixture)

        table = _table(config, wide, fingerprint, measured) if config.mixed else None
        if config.budgeted and table is None and method == "rtn":
            raise PlanError("--method rtn measures no sensitivities", hint="give them with --sensitivity FILE")
        held = partial(beside, wide)
        budgeted = config.choose(wide, table, dtype_of, held) if config.mixed else None
        recipe = budgeted.recipe if budgeted else config.uniform(wide)
        recipe.check(wide)
        bits = math.inf if config.budgeted else recipe.uniform_bits(wide)  # sensitivities are measured in that dtype
        settled = replace(
            config,
            method=method,
            fold=config.fold and method == "gptq",
            rotate=config.rotate if config.rotate is not None or config.may_rotate(spec) else False,
            device=device,
            compute_dtype=pick_compute_dtype(config.compute_dtype, device, bits),
            calibration_dtype=pick_calibration_dtype(config.calibration_dtype, device),
        )
        return Resolution(settled, wide, dtype_of, table, budgeted, held)

    @property
    def recipe(self) -> Recipe:
        return self.budgeted.recipe if self.budgeted else self.config.uniform(self.spec)

    @property
    def compute_bytes(self) -> int:
        """Bytes of a value in evaluation activations."""
        return _BYTES[self.config.compute_dtype]

    def measures(self, windows: Windows) -> bool:
        """Whether sensitivities have to be measured first."""
        return self.config.budgeted and self.table is None and windows.calibration > 0

    def measured(self, table: Sensitivity) -> Resolution:
        """With the mixture chosen by measured sensitivities."""
        chosen = self.config.choose(self.spec, table, self.dtype_of, self.beside)
        return replace(self, table=table, budgeted=chosen)

    def settled(self, windows: Windows) -> QuantizeConfig:
        """The configuration with error correction chosen too.

        PlanError where it is asked for and cannot be had from so few windows.
        """
        strength = chosen_error_correction(
            self.config.error_correction, self.recipe, self.spec,
            windows=windows.calibration, length=windows.length, share=self.config.error_correction_share,
        )  # fmt: skip
        return replace(self.config, error_correction=strength)


def check_rotatable(spec: ModelSpec) -> None:
    """PlanError for a model whose hidden states cannot be rotated."""
    if spec.tie_word_embeddings:
        raise PlanError(
            "--rotate: the head is the embedding too, and would become a matrix of its own", hint="leave it out"
        )


def of_builtin(windows: int) -> str:
    """Words that follow a calibration text where so many of its windows are not its own."""
    return f", {windows} of them replaced by the built-in set's (--builtin-share)" if windows else ""


def tokens_of(settled: QuantizeConfig, windows: Windows) -> Tokens:
    """Counts and widths that sizes and peaks are predicted from."""
    share = settled.error_correction_share if settled.error_correction else 0.0
    return Tokens(windows.calibration, windows.evaluation, windows.length, _BYTES[settled.calibration_dtype], share)


def _table(config: QuantizeConfig, spec: ModelSpec, fingerprint: str, measured: Path | None) -> Sensitivity | None:
    """The table given, or the one measured before, checked to be this model's; None without one."""
    path = config.sensitivity or measured
    if path is None:
        return None
    found = read_sensitivity(path)
    try:
        found.check(spec, fingerprint, config.format, bool(config.rotate))
    except PlanError as error:
        hint = error.hint if config.sensitivity else "resume with the options it was begun with"
        raise PlanError(f"{path}: {error.message}", hint=hint) from None
    if config.asymmetric and config.budgeted and all(s is None or s.sym for row in found.kl.values() for s in row):
        raise PlanError(
            f"{path}: it has no asymmetric schemes", hint="measure them: qwenq sensitivity MODEL --asymmetric"
        )
    return found


def device_names(device: str) -> list[str]:
    """The devices that --device names, one by one; UsageError for what names none."""
    names = device.split(",")
    if device != "cpu" and not all(name == "cuda" or re.fullmatch(r"cuda:\d+", name) for name in names):
        raise UsageError(f"--device {device}: wanted auto, cpu, cuda:N or cuda:N,cuda:M")
    return names


def pick_device(device: str, *, several: bool = True) -> str:
    """What is computed on: cpu, or GPUs with commas between them; imports torch.

    `auto` becomes all (without `several` the first of them) that torch sees, or cpu where it sees none.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return ",".join(f"cuda:{k}" for k in range(count if several else min(count, 1))) or "cpu"
    names = device_names(device)
    if device == "cpu":
        return device
    if count == 0:
        raise PlanError(f"--device {device}: no CUDA GPU is visible to torch", hint="--device cpu")
    numbers = [0 if name == "cuda" else int(name.removeprefix("cuda:")) for name in names]
    if max(numbers) >= count or len(set(numbers)) < len(numbers):
        raise PlanError(f"--device {device}: torch sees cuda:0 to cuda:{count - 1}, each can be named once")
    if len(numbers) > 1 and not several:
        raise UsageError(f"--device {device}: this command uses one GPU", hint=f"--device {names[0]}")
    return ",".join(f"cuda:{number}" for number in numbers)


def cpu_batch_tokens(intermediate_size: int) -> int:
    """Tokens that each worker of a CPU sends through a layer together, in whole windows, or one that is longer."""
    if intermediate_size > WORKERS_UP_TO:
        return BATCH_TOKENS
    return min(CPU_BATCH_TOKENS, CPU_BATCH_VALUES // intermediate_size)


def pick_compute_dtype(compute_dtype: str, device: str, bits: float = math.inf) -> str:
    """The dtype activations are computed in; float16 is refused: Qwen2.5 overflows it, and CPUs crawl in it.

    bits: of a linear weight, where it is the divergence from a 16-bit model that is computed. Up to NARROW_UP_TO a CPU
    with instructions for bfloat16 takes that: its noise was a hundredth of what so few bits lose (reports/LOG.md).
    """
    if compute_dtype == "auto":
        return "bfloat16" if device != "cpu" or (bits <= NARROW_UP_TO and has_bfloat16()) else "float32"
    if compute_dtype not in ("float32", "bfloat16"):
        raise UsageError(
            f"--compute-dtype {compute_dtype}: wanted float32, bfloat16 or auto",
            hint="float16 overflows in Qwen2.5's activations and is very slow on CPUs",
        )
    return compute_dtype


def pick_calibration_dtype(calibration_dtype: str, device: str) -> str:
    """The dtype calibration activations are computed in; auto: bfloat16, unless this CPU has no instructions for it."""
    if calibration_dtype not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"--calibration-dtype {calibration_dtype}: wanted float32, bfloat16 or auto")
    if calibration_dtype != "auto":
        return calibration_dtype
    return "bfloat16" if device.startswith("cuda") or has_bfloat16() else "float32"


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of `qwenq eval` but the two checkpoints; UsageError for values that mean nothing."""

    text: str = "heldout"  # a set's name, or a file
    num_samples: int | None = None  # windows; all by default, at most DEFAULT_EVALUATION_WINDOWS
    sequence_length: int = 512  # tokens a window
    device: str = "auto"  # cpu, or GPUs: cuda:0,cuda:1
    compute_dtype: str = "auto"  # of activations
    strict: bool = False  # a bad row of the text is an error, else it is left out and counted

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("sequence_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{flag(name)} {value}: wanted at least {least}")
