"""Layouts of a case on its rig: layers split over GPUs that may differ, or tensor and pipeline parallel ranks.

Engines without tensor parallelism run GPU after GPU: contiguous layers each, embedding on the first, head on the last
(a tied head on the first). Servers cut every layer over equal ranks, in stages of layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwenq.errors import HonestNo, PlanError
from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case, Share, check_context, rank_shares
from qwenq.planning.memory import MemoryEstimate, Term, estimate
from qwenq.planning.tensor_parallel import helpful_width, tensor_parallel_reasons
from qwenq.planning.weights import Weights

DeviceMap = dict[str, int | str]
NEARLY = 0.9  # of the largest cache, for which ranks side by side, who are faster, are not given up


@dataclass(frozen=True)
class Layout(ABC):
    """A share for each GPU, in device order, and the memory they need."""

    shares: tuple[Share, ...]
    memory: MemoryEstimate

    @property
    @abstractmethod
    def fits(self) -> bool:
        """Everything is on the GPUs and within their limits."""

    @property
    @abstractmethod
    def how(self) -> str:
        """`one GPU`, `layers split`, `TP 2 x PP 1`."""

    @property
    def certainty(self) -> str:
        """`fits`, `tight` or `does not fit` over the whole range."""
        return self.memory.certainty


def how_split(case: Case) -> str:
    """A layout of layers that fits a case's rig."""
    return "layers split" if case.rig is not None and len(case.rig.gpus) > 1 else "one GPU"


@dataclass(frozen=True)
class Placement(Layout):
    """Layers split over GPUs, and why so. The others are in host memory."""

    gpu_layers: int
    offloaded_bytes: int  # weights in host memory
    reason: str

    @property
    def fits(self) -> bool:
        return bool(self.memory.fits) and self.offloaded_bytes == 0

    @property
    def host_layers(self) -> range:
        return host_range(self.memory.case, self.gpu_layers)

    @property
    def how(self) -> str:
        return how_split(self.memory.case)

    def device_map(self) -> DeviceMap:
        """transformers' device_map: module name to GPU index or `cpu`."""
        spec = self.memory.case.spec
        names = spec.architecture
        devices: DeviceMap = {}
        head: int | str = "cpu"
        for index, share in enumerate(self.shares):
            if share.embed:
                devices |= {names.embedding: index, names.rotary: index}
            devices |= {spec.layer_name(layer): index for layer in share.layers}
            if share.head:
                head = index
        devices |= {spec.layer_name(layer): "cpu" for layer in self.host_layers}
        return devices | {names.norm: head, names.head: head}

    def to_json(self) -> dict[str, Any]:
        return {
            "gpus": [share.to_json() for share in self.shares],
            "gpu_layers": self.gpu_layers,
            "offloaded_bytes": self.offloaded_bytes,
            "reason": self.reason,
            "device_map": self.device_map(),
        }


def host_map(spec: ModelSpec) -> DeviceMap:
    """Everything on the CPU, under transformers' module names."""
    names = spec.architecture
    layers = [spec.layer_name(layer) for layer in range(spec.num_hidden_layers)]
    return dict.fromkeys((names.embedding, names.rotary, *layers, names.norm, names.head), "cpu")


def spill_to_disk(spec: ModelSpec, devices: DeviceMap, weights: Weights, room_bytes: int) -> DeviceMap:
    """The same map with the last of the CPU's layers on `disk`, so that the others take at most `room_bytes`."""
    found, taken, full = dict(devices), 0, False
    for layer, n_bytes in enumerate(weights.layer_bytes):
        name = spec.layer_name(layer)
        if devices[name] == "cpu":
            taken += n_bytes
            full = full or taken > room_bytes
            if full:
                found[name] = "disk"
    return found


def host_range(case: Case, gpu_layers: int) -> range:
    """The layers in host memory where so many are on the GPUs: the last ones, or as the engine has it the first."""
    layers = case.spec.num_hidden_layers
    return range(layers - gpu_layers) if case.engine.host_layers_first else range(gpu_layers, layers)


def host_layers_term(case: Case, layer_bytes: Sequence[int], gpu_layers: int) -> Term:
    """Memory that layers in host memory need on the first GPU."""
    n_bytes = host_layers_bytes(case, layer_bytes, gpu_layers)
    return Term("kv_cache", n_bytes, "fitted", "KV of the layers in host memory, and one such layer at work")


def host_layers_bytes(case: Case, layer_bytes: Sequence[int], gpu_layers: int) -> int:
    """Bytes that layers in host memory still take on the first GPU: their KV cache, and one of them while it runs."""
    out = case.spec.num_hidden_layers - gpu_layers
    if out == 0 or case.engine.host_layers_stay:
        return 0
    return round(out * case.layer_kv_bytes) + max(layer_bytes[gpu_layers:])


def place(case: Case, *, offload: bool = False) -> Placement:
    """The split that leaves the most room on the fullest GPU; the least bad one when nothing fits.

    With `offload`, a model that does not fit keeps as many layers on the GPUs as they hold, the rest in host memory;
    HonestNo when they hold not even none. Raises PlanError for a server, whose ranks are not free to choose.
    """
    spec, engine = case.spec, case.engine
    check_context(spec, case.work)
    if not engine.layered:
        raise PlanError(f"{engine.title} places its own layers", hint="see tensor and pipeline parallel options")
    split = _Splitter(case)
    layers = spec.num_hidden_layers
    fits = split.fill(layers, 0) is not None
    if fits or not offload:
        shares = split.widest(layers)
        if fits:
            balanced = "layers balanced so that the fullest GPU keeps the most room"
            reason = "all on one GPU" if len(shares) == 1 else balanced
        else:
            reason = "does not fit" + ("" if len(shares) == 1 else "; this split exceeds the limits the least")
        return split.placement(shares, layers, reason)
    kept = split.most_layers()
    filled = split.fill(kept, 0) if kept >= 0 else None
    if filled is None:
        raise HonestNo(
            f"{case.hardware.label}: not even the embedding and head of {spec.name or 'the model'} fit beside the "
            "working memory",
            hint="a larger first GPU, a smaller --prefill-chunk or a shorter context",
        )
    reason = f"{kept} of {layers} layers fit on the GPUs, {layers - kept} stay in host memory"
    return split.placement(filled, kept, reason)


Costs = dict[Hashable, Callable[[range], int]]  # of a case, by GPUs that are alike and what else they hold


def splits(case: Case, costs: Costs | None = None) -> bool:
    """Whether some split keeps every layer on the GPUs; `costs` is kept between calls for the same case."""
    split = _Splitter(case, costs)
    return sum(split.limits) >= sum(split.layer_bytes) and split.fill(case.spec.num_hidden_layers, 0) is not None


def search_context(fits: Callable[[int], bool], limit: int) -> int:
    """Largest context in 1..limit that `fits`, which is true below and false above it; 0 when it never is."""
    low, high = 0, limit
    if fits(limit):
        return limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _with(share: Share, layers: int) -> Share:
    """The share with so many layers from its start."""
    start = share.layers.start
    return Share(range(start, start + layers), share.embed, share.head, share.ranks, share.gpus, share.offloads)


class _Splitter:
    """Fills a case's GPUs in order."""

    def __init__(self, case: Case, costs: Costs | None = None) -> None:
        self.case, self.rig = case, case.hardware
        self.layer_bytes = case.engine.kept(case.weights, case.work, self.rig.gpus[0]).layer_bytes
        self.costs: Costs = {} if costs is None else costs
        self.limits = self.rig.limits
        known = {gpu.name: gpu for gpu in self.rig.gpus}
        alike = {name: case.engine.alike(case, gpu) for name, gpu in known.items()}
        self.alike = [alike[gpu.name] for gpu in self.rig.gpus]
        kinds = list(zip(self.alike, self.limits, strict=True))
        # GPUs at the end that are equal: with the head on another than the last of them they hold no more
        self.equal_from = next((index + 1 for index in range(len(kinds) - 1, -1, -1) if kinds[index] != kinds[-1]), 0)
        self.tied_first = case.spec.tie_word_embeddings and not case.engine.copies_tied_head

    def fill(self, layers: int, room: int) -> tuple[Share, ...] | None:
        """Shares of the first `layers` layers that leave `room` bytes on every GPU in use, or None."""
        count = len(self.rig.gpus)
        for head in (0,) if self.tied_first else (count - 1, *range(self.equal_from - 1, -1, -1)):
            shares = self._fill_before(layers, room, head, count if self.tied_first else head + 1)
            if shares is not None:
                return shares
        return None

    def _fill_before(self, layers: int, room: int, head: int, count: int) -> tuple[Share, ...] | None:
        """Greedy: each of the first `count` GPUs takes as much as it can; the head is on GPU `head`."""
        shares: list[Share] = []
        gpus, out = len(self.rig.gpus), layers < self.case.spec.num_hidden_layers
        first = self.case.spec.num_hidden_layers - layers if self.case.engine.host_layers_first else 0
        start, stop = first, first + layers
        for index in range(gpus):
            share = Share(range(start, start), embed=index == 0, head=index == head, gpus=gpus, offloads=out)
            limit = self.limits[index] - room - (self._offload_bytes(layers) if index == 0 else 0)
            if share.used and self._cost(share, index) > limit:
                return None
            most = self._most(share, index, limit, stop - start) if index < count else 0
            shares.append(_with(share, most))
            start += most
        return tuple(shares) if start == stop else None

    def _most(self, share: Share, index: int, limit: int, layers: int) -> int:
        """Most layers, from the share's start, that take at most `limit` bytes; guessed as if all were alike first."""
        if not layers:
            return 0
        everything = self._cost(_with(share, layers), index)
        if everything <= limit:
            return layers
        one = self._cost(_with(share, 1), index)
        if one > limit:
            return 0
        low, high = 1, layers  # fits, does not fit
        guess = 1 + int((layers - 1) * (limit - one) / max(1, everything - one))
        for tried in (guess, guess + 1):
            if low < tried < high:
                low, high = (tried, high) if self._cost(_with(share, tried), index) <= limit else (low, tried)
        while high - low > 1:
            tried = (low + high) // 2
            low, high = (tried, high) if self._cost(_with(share, tried), index) <= limit else (low, tried)
        return low

    def widest(self, layers: int) -> tuple[Share, ...]:
        """The split with the most room on the fullest GPU (a negative room when it does not fit), to 16 MiB."""
        gpus = len(self.rig.gpus)
        whole = [Share(range(layers), embed=embed, head=True, gpus=gpus) for embed in (True, False)]
        most = max(self._cost(share, index) for share in whole for index in range(gpus)) + self._offload_bytes(layers)
        best = self.fill(layers, 0) or self.fill(layers, min(self.limits) - most)  # any one GPU could hold everything
        assert best is not None
        low, high = self._room(best, layers), self._most_room(layers)
        while high - low > 16 << 20:
            middle = (low + high) // 2
            found = self.fill(layers, middle)
            if found is None:
                high = middle
            else:
                best, low = found, self._room(found, layers)
        return best

    def _room(self, shares: Sequence[Share], layers: int) -> int:
        """Bytes left on the fullest GPU of those in use."""
        left = [
            limit - self._cost(share, index)
            for index, (share, limit) in enumerate(zip(shares, self.limits, strict=True))
            if share.used
        ]
        return min(left[0] - self._offload_bytes(layers), *left)

    def _most_room(self, layers: int) -> int:
        """Upper bound of the room on the fullest GPU: of weights alone, as if they could be split to the byte."""
        held = sum(self.layer_bytes) - sum(self.layer_bytes[layer] for layer in host_range(self.case, layers))
        largest = sorted(self.limits, reverse=True)
        return max((sum(largest[:count]) - held) // count for count in range(1, len(largest) + 1)) + 1

    def most_layers(self) -> int:
        """Most layers that fit on the GPUs beside what offloading itself needs; -1 when not even none do."""
        low, high = -1, self.case.spec.num_hidden_layers - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fill(middle, 0) is not None else (low, middle - 1)
        return low

    def placement(self, shares: tuple[Share, ...], gpu_layers: int, reason: str) -> Placement:
        memory = estimate(self.case, shares)
        term = host_layers_term(self.case, self.layer_bytes, gpu_layers)
        if term.n_bytes:
            first, *others = memory.gpus
            memory = replace(memory, gpus=(replace(first, terms=(*first.terms, term)), *others))
        offloaded = sum(self.layer_bytes[layer] for layer in host_range(self.case, gpu_layers))
        return Placement(shares, memory, gpu_layers, offloaded, reason)

    def _cost(self, share: Share, index: int) -> int:
        gpu = self.rig.gpus[index]
        kind = self.alike[index], share.embed, share.head, min(share.gpus, 2), share.offloads
        if kind not in self.costs:
            self.costs[kind] = self.case.engine.layer_costs(self.case, share, gpu)
        return self.costs[kind](share.layers)

    def _offload_bytes(self, gpu_layers: int) -> int:
        return host_layers_bytes(self.case, self.layer_bytes, gpu_layers)


@dataclass(frozen=True)
class ParallelOption:
    """`tensor` ranks times `pipeline` stages; `reasons` says why not, empty when the shapes allow it."""

    tensor: int
    pipeline: int
    reasons: tuple[str, ...]
    memory: MemoryEstimate | None  # None when the shapes forbid it

    @property
    def works(self) -> bool:
        return not self.reasons and self.memory is not None and self.memory.fits is True

    @property
    def verdict(self) -> str:
        """One line: possible and fits, possible and short by how much, or why not."""
        if self.reasons or self.memory is None:
            return "no: " + "; ".join(self.reasons)
        if self.memory.fits:
            return f"fits, KV cache of {self.memory.kv_capacity_tokens} tokens"
        worst = min(gpu.free_bytes or 0 for gpu in self.memory.gpus)
        return f"shapes allow it, but a GPU lacks {-worst / (1 << 30):.2f} GiB"

    def longest_context(self, case: Case) -> int:
        """Most tokens a sequence can have in this layout; 0 when none."""
        shares = rank_shares(case.spec, self.tensor, self.pipeline, case.engine.spared_stages)
        limit = case.spec.extended_context

        def fits(context: int) -> bool:
            return bool(estimate(case.at(context), shares).fits)

        room = estimate(case.at(1), shares).kv_capacity_tokens or 0
        likely = min(limit, room // case.work.batch)  # right where nothing but the cache grows with the context
        if likely and fits(likely) and (likely == limit or not fits(likely + 1)):
            return likely
        return search_context(fits, limit)

    def to_json(self) -> dict[str, Any]:
        return {
            "tensor_parallel_size": self.tensor,
            "pipeline_parallel_size": self.pipeline,
            "possible": not self.reasons,
            "fits": self.memory.fits if self.memory else False,
            "kv_capacity_tokens": self.memory.kv_capacity_tokens if self.memory else None,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class RankLayout(Layout):
    """Ranks of a server; without an option the shapes forbid every way, and the memory is of stages alone."""

    option: ParallelOption | None

    @property
    def fits(self) -> bool:
        return self.option is not None and self.option.works

    @property
    def how(self) -> str:
        return f"TP {self.option.tensor} x PP {self.option.pipeline}" if self.option else ""

    @property
    def certainty(self) -> str:
        return self.memory.certainty if self.option else "does not fit"


def cutting_reasons(spec: ModelSpec, weights: Weights, ranks: int) -> list[str]:
    """Why `ranks` tensor-parallel ranks cannot cut these weights, padding included; empty when they can."""
    return tensor_parallel_reasons(weights.stored_spec(spec), weights.row_groups, ranks, weights.method)


def padded_weights(spec: ModelSpec, weights: Weights, ranks: int) -> Weights | None:
    """These weights with the FFN padded so that `ranks` ranks can cut them; None when padding cannot bring that about.

    Layers grow in proportion to the weights of their linears.
    """
    stored = weights.stored_spec(spec)
    width = helpful_width(stored, weights.row_groups, [ranks], weights.method)
    if not width:
        return None
    growth = replace(spec, intermediate_size=width).linear_parameters / stored.linear_parameters
    layers = tuple(tuple(round(n_bytes * growth) for n_bytes in layer) for layer in weights.layers)
    return replace(weights, layers=layers, intermediate_size=width, parts=())


def parallel_options(case: Case) -> tuple[ParallelOption, ...]:
    """Every way to use all GPUs of the rig with the case's server, most tensor parallelism first."""
    count = len(case.hardware.gpus)
    gpus = dict.fromkeys(case.hardware.gpus)
    barred = [said for gpu in gpus if (said := case.engine.barred(gpu) or case.engine.cache_barred(case.work, gpu))]
    options = []
    for tensor in sorted((n for n in range(1, count + 1) if count % n == 0), reverse=True):
        stages = count // tensor
        reasons = [*barred, *cutting_reasons(case.spec, case.weights, tensor)]
        if stages > 1 and not case.engine.stages:
            reasons.append(f"{case.engine.title} has no pipeline parallelism")
        if stages > case.spec.num_hidden_layers:
            reasons.append(f"{stages} stages for {case.spec.num_hidden_layers} layers")
        if unread := case.engine.refusal(case.weights):
            reasons.append(unread)
        if contradiction := case.engine.contradiction(case.work):
            reasons.append(contradiction)
        shares = rank_shares(case.spec, tensor, stages, case.engine.spared_stages)
        memory = None if reasons else estimate(case, shares)
        options.append(ParallelOption(tensor, stages, tuple(reasons), memory))
    return tuple(options)


def best_option(options: Sequence[ParallelOption]) -> ParallelOption | None:
    """Of layouts that fit, the one with the most ranks and nearly the largest cache; else one the shapes allow."""
    possible = [option for option in options if not option.reasons]
    fitting = [(option.memory.kv_capacity_tokens or 0, option) for option in possible if option.works and option.memory]
    if fitting:
        enough = NEARLY * max(tokens for tokens, _ in fitting)
        return max((option for tokens, option in fitting if tokens >= enough), key=lambda option: option.tensor)
    return possible[0] if possible else None
