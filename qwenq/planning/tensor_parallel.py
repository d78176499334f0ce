"""Over how many GPUs tensor parallelism can cut a checkpoint, why not over others, and how far to pad for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from qwenq.formats.base import Recipe, get_format
from qwenq.model.architectures import Stage
from qwenq.model.spec import ModelSpec

SIZES = (1, 2, 4, 8)  # that tables show
UNCUT = "bitsandbytes"  # a method whose weights vLLM and SGLang load whole (BitsAndBytesModelLoader of both)
RowGroups = Mapping[str, tuple[int, ...]]  # stage ("o", "down") -> group sizes met in linears cut by input


def tensor_parallel_reasons(spec: ModelSpec, groups: RowGroups, ranks: int, method: str = "") -> list[str]:
    """Why `ranks` GPUs cannot cut the model, quantized by `method`; empty when they can.

    Linears before attention and activation split by output (heads, FFN width), those after (o, down) by input, where no
    quantization group may straddle two ranks. With one scale per row (group size -1) every rank has all scales. Engines
    pad the vocabulary themselves.
    """
    return [problem.here for problem in _problems(spec, groups, ranks, method)]


def tensor_parallel_sizes(spec: ModelSpec, groups: RowGroups, method: str = "") -> dict[str, str]:
    """`1`, `2`, `4` and `8` with why not, or nothing where it works; what padding the FFN would allow is said."""
    found = {}
    for ranks in SIZES:
        reasons = tensor_parallel_reasons(spec, groups, ranks, method)
        if reasons and (wider := helpful_width(spec, groups, [ranks], method)):
            reasons[0] += f" (--pad-for-tp {ranks} makes it {wider})"
        found[str(ranks)] = "; ".join(reasons)
    return found


def tensor_parallel_lines(spec: ModelSpec, groups: RowGroups, method: str = "") -> list[str]:
    """The same to read: sizes with the same reason on one line."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for ranks in SIZES:
        reasons = tuple(problem.anywhere for problem in _problems(spec, groups, ranks, method))
        alike.setdefault(reasons, []).append(ranks)
    lines = []
    for reasons, sizes in alike.items():
        if not reasons:
            text = "yes"
        elif len(sizes) == 1:
            text = tensor_parallel_sizes(spec, groups, method)[str(sizes[0])]
        else:
            text = "; ".join(reasons)
            if wider := helpful_width(spec, groups, sizes, method):
                text += f"; --pad-for-tp {max(sizes)} ({wider}) allows all"
        lines.append(f"{', '.join(map(str, sizes))}: {text}")
    return lines


def helpful_width(spec: ModelSpec, groups: RowGroups, sizes: Sequence[int], method: str = "") -> int:
    """FFN width, padded for the most ranks, that lets each of `sizes` cut the model; 0 when padding does not help."""
    padded = [stage.name for stage in cut_by_input(spec) if widens_with_ffn(stage)]
    group = max((size for name in padded for size in groups.get(name, ())), default=1)
    wider = padded_width(spec.intermediate_size, group, max(sizes))
    wide = replace(spec, intermediate_size=wider)
    return 0 if any(tensor_parallel_reasons(wide, groups, ranks, method) for ranks in sizes) else wider


class _Problem(NamedTuple):
    """Why some number of ranks cannot cut a model, with that number and without."""

    here: str
    anywhere: str


def _problems(spec: ModelSpec, groups: RowGroups, ranks: int, method: str) -> list[_Problem]:
    if method == UNCUT and ranks > 1:
        return [_Problem(said := f"vLLM and SGLang cut no {UNCUT} weights", said)]
    heads, kv_heads, inner = spec.num_attention_heads, spec.num_key_value_heads, spec.intermediate_size
    texts = []
    if heads % ranks:
        texts.append(f"{heads} heads are not divisible by ")
    if kv_heads % ranks and ranks % kv_heads:
        texts.append(f"{kv_heads} KV heads cannot be shared out or copied evenly over ")
    if inner % ranks:
        texts.append(f"FFN width {inner} is not divisible by ")
    if texts:
        return [_Problem(f"{text}{ranks}", f"{text}the ranks") for text in texts]
    found = []
    for stage in reversed(cut_by_input(spec)):
        width, what = spec.size(stage.inputs), _WIDTHS.get(stage.inputs, stage.inputs)
        straddling = [g for g in sorted(groups.get(stage.name, ()), reverse=True) if g > 0 and (width // ranks) % g]
        if straddling:
            so = ", so a quantization group would straddle ranks"
            no = f"is not a multiple of the group size {straddling[0]}"
            here = f"{what} {width} / {ranks} = {width // ranks} {no}{so}"
            found.append(_Problem(here, f"{what} {width} {no} times the ranks{so}"))
    return found


def sizes_of_recipe(spec: ModelSpec, recipe: Recipe) -> dict[str, str]:
    """`tensor_parallel_sizes` of a recipe's checkpoint; none of a file that its engine cuts between layers."""
    form = get_format(recipe.format)
    return {} if form.whole_file else tensor_parallel_sizes(spec, row_groups(spec, recipe), form.method)


def lines_of_recipe(spec: ModelSpec, recipe: Recipe) -> list[str]:
    """`tensor_parallel_lines` likewise."""
    form = get_format(recipe.format)
    return [] if form.whole_file else tensor_parallel_lines(spec, row_groups(spec, recipe), form.method)


def row_groups(spec: ModelSpec, recipe: Recipe) -> RowGroups:
    """Group sizes of the linears that tensor parallelism cuts by input."""
    found: dict[str, set[int]] = {stage.name: set() for stage in cut_by_input(spec)}
    for lin in (lin for layer in set(recipe.layer_kinds(spec)) for lin in spec.layer_linears(layer)):
        scheme = recipe.scheme_of(lin)
        if lin.stage in found and scheme is not None:
            found[lin.stage].add(scheme.group_size)
    return {stage: tuple(sorted(sizes)) for stage, sizes in found.items()}


def same_groups(spec: ModelSpec, sizes: Iterable[int]) -> RowGroups:
    """Groups of unknown place: met everywhere."""
    return dict.fromkeys((stage.name for stage in cut_by_input(spec)), tuple(sizes))


_WIDTHS = {"intermediate_size": "FFN width", "q_size": "attention width"}


def cut_by_input(spec: ModelSpec) -> list[Stage]:
    """Stages that tensor parallelism cuts by input: o, down."""
    return [stage for stage in spec.architecture.stages if stage.cut == "row"]


def widens_with_ffn(stage: Stage) -> bool:
    """Whether padding the FFN pads the stage's inputs."""
    return stage.inputs == "intermediate_size"


def padded_width(width: int, group: int, ranks: int) -> int:
    """Smallest FFN width from `width` on whose groups no rank shares (29696 for 29568, g128 and up to 8 ranks).

    Without groups (-1, or 16 bit) widths stay multiples of the 8 codes of an int32 word.
    """
    step = max(group, 8) * ranks
    return -(-width // step) * step
