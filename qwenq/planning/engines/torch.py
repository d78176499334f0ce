"""transformers, and this project's own engine built on its modules: torch tensors, layer by layer.

Facts by version are read from the sources of transformers 4.38.2, 4.41.2, 4.42.4, 4.43.4, 4.44.2, 4.45.2, 4.46.0,
4.48.3, 4.51.3 and 5.23.0 and of AutoGPTQ and AutoAWQ; each says which.

Temporary memory is counted from transformers' modelling code (Qwen2Model, Qwen2DecoderLayer, Qwen2MLP,
Qwen2FlashAttention2; the same variables live in 4.38 to 5.x, in Qwen3 and Llama): tensors alive together at the worst
moment. Symbols: n rows (batch x tokens of the chunk), H hidden size, I intermediate size, Q query width, K key width,
d head size, V vocabulary, c cached tokens. 2 bytes a value or as said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from qwenq.errors import HonestNo
from qwenq.machine import SCORE_BYTES
from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case, Share, Workload, whole
from qwenq.planning.engines.base import LayeredEngine, register, yarn_of, yarn_reach
from qwenq.planning.kernels import choose, compute_on, row_block_weights
from qwenq.planning.memory import NOT_ALLOCATED, Term, context_term, merged, ranged, slack_bytes, slack_term
from qwenq.planning.placement import Placement, place
from qwenq.planning.plan import Plan
from qwenq.planning.rig import Gpu, device
from qwenq.planning.speed import SpeedFit
from qwenq.planning.weights import Weights, allocated_equal
from qwenq.units import GIB

if TYPE_CHECKING:
    from qwenq.planning.profile import Profile  # read where one is given

CUBLAS_WORKSPACE = 8_519_680  # discuss.pytorch.org/t/178671; 32 MiB on Hopper (pytorch#120925)
CUBLAS_WORKSPACE_HOPPER = 32 << 20
QWENQ_PREFILL_CHUNK = 2048
REPEATED_KV_TRAFFIC = 3.9  # times the bytes of repeated keys and values; fitted


class Kernel(NamedTuple):
    """An engine's matmul with packed weights; bytes per weight of the widest linear.

    `static`: a buffer kept for good. `peak`: temporaries while dequantizing, before the output exists. `hold`: the
    dequantized matrix kept during the multiplication. Temporaries only from `min_rows` rows on.
    """

    name: str
    methods: tuple[str, ...] = ()  # of weights that go to it whatever the libraries
    static: float = 0.0
    peak: float = 0.0
    hold: float = 0.0
    min_rows: int = 1
    source: str = ""


DENSE = Kernel("16-bit matmul", ("none", "fp8"), source="no dequantization")
EXLLAMA_V1 = Kernel("ExLlama v1", static=2, source="AutoGPTQ autogptq_post_init: temp_dq, fp16")
CUDA_OLD = Kernel(
    "AutoGPTQ cuda_old",
    peak=6,  # int32 shift (4) and its int16 copy (2), then int16, difference, fp16 values (2 + 2 + 2)
    hold=2,
    min_rows=128,
    source="AutoGPTQ qlinear_cuda_old.py, from kernel_switch_threshold = 128 rows on",
)
AWQ_GEMM = Kernel(
    "AutoAWQ gemm", ("awq",), peak=2, hold=2, min_rows=1024, source="AutoAWQ WQLinearMMFunction, from 1,024 rows on"
)
PER_LINEAR = Kernel(
    "dequantize per linear", ("bitsandbytes", "compressed-tensors"), peak=2, hold=2,
    source="one linear in 16 bit at a time, its upper bound",
)  # fmt: skip
MARLIN = Kernel("Marlin", source="repacked weights, workspace of a few KB")
ROW_BLOCKS = Kernel("row blocks", source="weights written out in row blocks")  # how much: Weights.kept
KERNELS = {method: kernel for kernel in (DENSE, AWQ_GEMM, PER_LINEAR) for method in kernel.methods}


class Peak(NamedTuple):
    """Bytes alive at one moment besides weights and KV cache, and which moment that is."""

    n_bytes: int
    moment: str
    dequantization: int = 0  # the part of `n_bytes` that is dequantized weights


@dataclass(frozen=True)
class Pass:
    """A forward pass on one GPU: `rows` rows in flight, `cached` tokens x batch in the cache (with them)."""

    case: Case  # with weights as the engine keeps them
    share: Share
    rows: int
    cached: int
    widens: bool = False  # matmuls of 16-bit values are computed in float32
    read_back_bytes: int = 0  # of cached keys and values in the activations' dtype, where the cache has another


class Moment(NamedTuple):
    """Bytes of each kind that are alive at one moment, beside so many KV caches of the prompt and of the context."""

    name: str
    at_prompt: int = 0
    at_end: int = 0
    activations: int = 0
    logits: int = 0
    dequantization: int = 0

    @property
    def rest(self) -> int:
        """Without the caches."""
        return self.activations + self.logits + self.dequantization

    def working(self, cached: tuple[int, int]) -> int:
        """All of it, with a cache of so many bytes after the prompt and at the end."""
        return self.kv_cache(cached) + self.rest

    def kv_cache(self, cached: tuple[int, int]) -> int:
        return self.at_prompt * cached[0] + self.at_end * cached[1]


class TorchEngine(LayeredEngine):
    """An engine of transformers' modules; its kinds and versions differ in what the properties say."""

    @property
    def full_logits(self) -> bool:
        """Logits of every prompt position, then a float32 copy."""
        return False

    @property
    def rotary_per_layer(self) -> bool:
        """Each layer keeps cosine and sine tables of the model's whole context."""
        return False

    @property
    def copies_cache(self) -> bool:
        """The previous cache is held while the next is built."""
        return False

    @property
    def repeats_kv(self) -> bool:
        """Attention expands keys and values to all heads."""
        return False

    def kernel_for(self, weights: Weights) -> Kernel:
        """The kernel that multiplies with weights of such a method and bits."""
        return KERNELS.get(weights.method, MARLIN)

    def terms(self, case: Case, share: Share, gpu: Gpu, phase: str = "") -> tuple[tuple[Term, ...], str]:
        """Terms of one GPU at its worst moment, and the name of that moment; with `phase`, of `prefill` or `decode`."""
        case = replace(case, weights=self.kept(case.weights, case.work, gpu))
        weights, kernel = case.weights, self.kernel_for(case.weights)
        held, tables, static = held_bytes(weights, share), self._tables(case, share), self._static(case, share)
        moments, cached = self.moments(case, share, gpu), self.cache_bytes(case, share, gpu)
        asked = [m for m in moments if not phase or m.name.startswith("decoding") == (phase == "decode")]
        worst = max(asked or [Moment(phase, at_end=1)], key=lambda moment: moment.working(cached))
        last_logits = self.logits_peak(self.prefill_pass(case, share, gpu)).moment
        of_weights = f"{weights.source}; torch's allocator rounding"
        of_weights += "; rotary tables of each layer" if tables else ""
        of_cache = f"2 x layers x KV width x tokens, {case.work.kv_dtype}"
        of_cache += "; twice at the end of a step" if self.copies_cache else ""
        terms = [
            Term("weights", held + tables, "exact", of_weights),
            Term("kv_cache", worst.kv_cache(cached), "exact", of_cache),
            ranged("activations", worst.activations, "fitted", f"tensors alive: {worst.name}", 0.98, 1.03),
            ranged("logits", worst.logits, "fitted", last_logits, 0.98, 1.02),
            ranged(
                "dequantization", static + worst.dequantization, "fitted", f"{kernel.name}: {kernel.source}", 0.9, 1.0
            ),
            Term("non_torch", workspace(gpu), "reported", "cuBLAS workspace, pytorch forum 178671 and pytorch#120925"),
            context_term(gpu.name),
            slack_term(worst.working(cached), held if weights.row_block_bytes else 0),
        ]
        return merged(self.corrected(terms, gpu)), worst.name

    def layer_costs(self, case: Case, share: Share, gpu: Gpu) -> Callable[[range], int]:
        """In closed form: weights by sums, and the worst of moments whose bytes grow with the cache alone."""
        case = replace(case, weights=self.kept(case.weights, case.work, gpu))
        around = workspace(gpu) + context_term(gpu.name).n_bytes
        packed = case.weights.row_block_bytes > 0
        known: dict[bool, list[tuple[int, int, int]]] = {}
        beside: dict[int, tuple[int, int]] = {}  # by the number of layers: bytes at work, and all but the weights

        def grown(here: Share) -> tuple[int, int]:
            if bool(here.layers) not in known:
                found = self.moments(case, here, gpu)
                known[bool(here.layers)] = [(moment.at_prompt, moment.at_end, moment.rest) for moment in found]
            prompt, end = self.cache_bytes(case, here, gpu)
            working = max(p * prompt + e * end + rest for p, e, rest in known[bool(here.layers)])
            return working, working + around + self._tables(case, here) + self._static(case, here)

        def cost(layers: range) -> int:
            here = Share(layers, share.embed, share.head, share.ranks, share.gpus)
            if len(layers) not in beside:
                beside[len(layers)] = grown(here)
            working, rest = beside[len(layers)]
            held = held_bytes(case.weights, here)
            return held + rest + slack_bytes(working, held if packed else 0)

        return cost

    def alike(self, case: Case, gpu: Gpu) -> Hashable:
        return compute_on(gpu, case.work.value_bytes), workspace(gpu), context_term(gpu.name).n_bytes

    def _tables(self, case: Case, share: Share) -> int:
        """Bytes of the layers' own rotary tables."""
        spec = case.spec
        return 4 * len(share.layers) * spec.max_position_embeddings * spec.head_dim if self.rotary_per_layer else 0

    def _static(self, case: Case, share: Share) -> int:
        """Bytes of the kernel's buffer."""
        return int(self.kernel_for(case.weights).static * case.weights.widest_linear) if share.layers else 0

    def corrected(self, terms: Sequence[Term], gpu: Gpu) -> Sequence[Term]:
        """Terms as measurements of this kind of GPU have them, where there are any."""
        return terms

    def moments(self, case: Case, share: Share, gpu: Gpu) -> list[Moment]:
        """Moments at which one GPU may need the most; `case` has weights as the engine keeps them."""
        prefill, found = self.prefill_pass(case, share, gpu), list[Moment]()
        if share.layers:
            found.append(_moment(self.prefill_peak(prefill), at_prompt=1))
            found += self.attention_moments(prefill, gpu)
            step = self.decode_peak(self.decode_pass(case, share, gpu))
            kept = 2 if self.copies_cache else 1
            found.append(_moment(step, at_end=kept, prefix="decoding: ", wide=case.work.value_bytes // 2))
        logits = self.logits_peak(prefill)
        found.append(Moment(logits.moment, at_prompt=1, logits=logits.n_bytes))
        return found

    def cache_bytes(self, case: Case, share: Share, gpu: Gpu) -> tuple[int, int]:
        """Bytes of the share's KV cache after the prompt, and at the end of the context."""
        wide = case.work.value_bytes // 2 if case.work.kv_dtype == "auto" else 1
        per_token = 2 * len(share.layers) * case.spec.kv_size * (case.kv_bytes * wide) * case.work.batch
        return int(per_token * case.work.prompt_tokens), int(per_token * case.work.context)

    def prefill_pass(self, case: Case, share: Share, gpu: Gpu) -> Pass:
        """The last chunk of the prompt."""
        rows = self.prefill_chunk(case.work) * case.work.batch
        return Pass(case, share, rows, case.work.prompt_tokens * case.work.batch)

    def decode_pass(self, case: Case, share: Share, gpu: Gpu) -> Pass:
        """The last token of each sequence."""
        return Pass(case, share, case.work.batch, case.work.context * case.work.batch)

    def attention_moments(self, prefill: Pass, gpu: Gpu) -> list[Moment]:
        """Moments of attention, where it has no flash kernel."""
        return []

    def prefill_peak(self, prefill: Pass) -> Peak:
        """Worst moment inside a decoder layer.

        Alive throughout: the model's input embeddings (first GPU only), the layer's input, and inside the layer the
        residual and the normed input of the block that runs, with the rotary cosine and sine.
        """
        spec, weights, rows = prefill.case.spec, prefill.case.weights, prefill.rows
        value_bytes, kernel = prefill.case.work.value_bytes, self.kernel_for(weights)
        h, i, q, k = spec.hidden_size, weights.intermediate_size, spec.q_size, spec.kv_size
        outside = (h if prefill.share.embed else 0) + h + (0 if self.rotary_per_layer else 2 * spec.head_dim)
        dequantize = rows >= kernel.min_rows
        before = int(kernel.peak * weights.widest_linear) if dequantize else 0  # temporaries before the output exists
        during = int(kernel.hold * weights.widest_linear) if dequantize else 0
        if rows >= weights.dense_from:
            during += weights.row_block_bytes

        def wide(columns: int, outputs: int) -> int:
            """Bytes of a matmul's inputs in float32, and of a row block of its outputs."""
            block = min(outputs, row_block_weights(columns, "cuda") // columns)
            return 4 * rows * (columns + block) if prefill.widens else 0

        each = rows * value_bytes  # bytes of one value of every row
        in_mlp = (outside + 2 * h) * each  # and the residual and the normed input
        in_attention = (outside + h) * each  # there the layer's input is the residual itself
        back = prefill.read_back_bytes
        moments = [
            Peak(in_mlp + 3 * i * each, "gate times up in the MLP"),  # silu(gate), up, product
            Peak(in_mlp + i * each + before, "dequantizing up_proj", before),
            Peak(in_mlp + 2 * i * each + during + wide(h, i), "up_proj", during),
            Peak(in_mlp + (i + h) * each + during + wide(i, h), "down_proj", during),
            Peak(in_attention + (3 * q + 2 * k) * each + back, "cached keys and values read back"),
            Peak(in_attention + (2 * q + h) * each + back + during, "o_proj"),  # while keys and values are held
            Peak(in_attention + (4 * q + 2 * k) * each, "rotary embedding"),  # q, q cos, rotated q sin, sum; k, v
            Peak((outside + 5 * h) * each, "norm in float32"),  # residual, float32 copy, its square or product
        ]
        if spec.architecture.qk_norms:
            moments.append(Peak(in_attention + 5 * q * each, "query norm"))  # q, float32 copy, its square or product
        if self.repeats_kv and k != q:
            repeated = 2 * q * (each + prefill.cached * value_bytes)
            moments.append(Peak(in_attention + repeated, "repeated keys and values"))
        return max(moments, key=lambda peak: peak.n_bytes)

    def logits_peak(self, prefill: Pass) -> Peak:
        """Logits after a prompt: of all positions in old transformers, of the last one of each sequence now."""
        spec, share, rows = prefill.case.spec, prefill.share, prefill.rows
        v = spec.vocab_size
        if not self.full_logits:
            n_bytes = prefill.case.work.batch * v * (2 + 4 + 4 + 4) if share.head else 0
            return Peak(n_bytes, "logits of the last position, float32, probabilities")
        if share.head:
            return Peak(rows * (v * (2 + 4) + spec.hidden_size * 2), "logits of every position and their float32 copy")
        # accelerate brings the output back to the device of the input (AlignDevicesHook, io_same_device)
        n_bytes = rows * v * 4 if share.embed and share.gpus > 1 else 0
        return Peak(n_bytes, "float32 logits of every position, brought back")

    def grown_bytes(self, step: Pass) -> int:
        """Bytes alive in one layer beside its cache while a token is added: torch.cat has old and new keys together."""
        return int(step.cached * step.case.spec.kv_size * step.case.kv_bytes)

    def decode_peak(self, step: Pass) -> Peak:
        """One new token a sequence: growing one layer's keys, expanding them, or writing weights out."""
        spec, weights = step.case.spec, step.case.weights
        written = weights.row_block_bytes if step.rows >= weights.dense_from else 0
        repeated = 4 * spec.q_size * step.cached if self.repeats_kv and spec.kv_size != spec.q_size else 0
        logits = step.rows * spec.vocab_size * (2 + 4 + 4 + 4) if step.share.head else 0
        worst = max(self.grown_bytes(step), repeated, logits, written)
        moment = "keys and values repeated to all heads" if worst == repeated else "a layer's keys while they grow"
        if worst == written > 0:
            return Peak(worst, "weights written out", written)
        return Peak(worst, "sampling" if worst == logits else moment)


def _moment(peak: Peak, at_prompt: int = 0, at_end: int = 0, prefix: str = "", wide: int = 1) -> Moment:
    """A peak beside caches; activations of `wide` times 16 bits."""
    rest = wide * (peak.n_bytes - peak.dequantization)
    return Moment(prefix + peak.moment, at_prompt, at_end, rest, dequantization=peak.dequantization)


def workspace(gpu: Gpu) -> int:
    """Bytes of cuBLAS's workspace."""
    return CUBLAS_WORKSPACE_HOPPER if any(part in gpu.name for part in ("H100", "H200")) else CUBLAS_WORKSPACE


def held_bytes(weights: Weights, share: Share) -> int:
    """Bytes of the share's weights on the GPU, with what the allocator adds to each tensor."""
    embed, _, head = weights.allocated
    upto, layers = weights.allocated_sums, share.layers
    return (embed if share.embed else 0) + upto[layers.stop] - upto[layers.start] + (head if share.head else 0)


@register
@dataclass(frozen=True)
class QwenqEngine(TorchEngine):
    """This project's own engine: packed kernels, a cache made at once, attention by blocks without a flash kernel."""

    name = "qwenq"
    latest = (0, 1)
    versioned = False
    kv_dtypes: ClassVar = {"auto": 2.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0}
    smaller_kv = "fp8"
    own_chunk = QWENQ_PREFILL_CHUNK
    started = True

    profile: Profile | None = None  # measured on the rig

    def with_profile(self, path: Path) -> QwenqEngine:
        from qwenq.planning.profile import read_profile

        return replace(self, profile=read_profile(path))

    def corrected(self, terms: Sequence[Term], gpu: Gpu) -> Sequence[Term]:
        return self.profile.corrected(gpu.name, terms) if self.profile else terms

    def layer_costs(self, case: Case, share: Share, gpu: Gpu) -> Callable[[range], int]:
        """Term by term where measurements correct the terms."""
        of_terms = LayeredEngine.layer_costs
        return of_terms(self, case, share, gpu) if self.profile else super().layer_costs(case, share, gpu)

    def alike(self, case: Case, gpu: Gpu) -> Hashable:
        return gpu.name if self.profile else super().alike(case, gpu)

    def kept(self, weights: Weights, work: Workload, gpu: Gpu) -> Weights:
        return weights.kept(compute_on(gpu, work.value_bytes))

    def kernel_for(self, weights: Weights) -> Kernel:
        return DENSE if weights.method in DENSE.methods else ROW_BLOCKS

    def cache_bytes(self, case: Case, share: Share, gpu: Gpu) -> tuple[int, int]:
        """Made at once for the whole context, a tensor of keys and one of values a layer."""
        _, at_end = super().cache_bytes(case, share, gpu)
        tensors = 2 * len(share.layers)
        if gpu.name != "CPU" and tensors:
            at_end = allocated_equal(at_end // tensors, tensors)
        return at_end, at_end

    def prefill_pass(self, case: Case, share: Share, gpu: Gpu) -> Pass:
        plain = super().prefill_pass(case, share, gpu)
        widens = compute_on(gpu, case.work.value_bytes).widens
        return replace(plain, widens=widens, read_back_bytes=_read_back(case) * plain.cached)

    def decode_pass(self, case: Case, share: Share, gpu: Gpu) -> Pass:
        plain = super().decode_pass(case, share, gpu)
        widens = compute_on(gpu, case.work.value_bytes).widens
        copied = _read_back(case) + (8 * case.spec.kv_size if widens else 0)  # keys and values for a float32 matmul
        return replace(plain, widens=widens, read_back_bytes=copied * plain.cached // (case.work.value_bytes // 2))

    def grown_bytes(self, step: Pass) -> int:
        return step.read_back_bytes

    def attention_moments(self, prefill: Pass, gpu: Gpu) -> list[Moment]:
        """By blocks where there is no flash kernel (qwenq/model/attention.py)."""
        spec, value_bytes = prefill.case.spec, prefill.case.work.value_bytes
        if gpu.name == "CPU" or compute_on(gpu, value_bytes).has_flash:
            return []
        states = value_bytes // 2 * 2 * prefill.rows * (3 * spec.hidden_size + spec.q_size + 2 * spec.head_dim)
        alive = states + _by_blocks(prefill) + prefill.read_back_bytes
        return [Moment("attention by blocks", at_prompt=1, activations=alive)]

    def notes(self, case: Case, gpu: Gpu) -> list[str]:
        """Whether a newer GPU would have a packed kernel for weights that this one writes out."""
        here = compute_on(gpu, case.work.value_bytes)
        packed = {shape for part in case.weights.parts for shape in part.packed}
        newer = replace(here, capability=max(here.capability, (8, 0)))
        if all(choose(shape, here) == choose(shape, newer) for shape in packed):
            return []
        major, minor = gpu.compute_capability or (0, 0)
        return [
            f"{gpu.name}: no packed kernel (compute capability {major}.{minor}, it needs 8.0): "
            "weights are dequantized for every token"
        ]

    def speed_fit(self, weights: Weights) -> SpeedFit:
        """Without a CUDA graph the host starts each kernel."""
        return LAUNCHED

    def run_fit(self, case: Case, shares: Sequence[Share]) -> SpeedFit:
        """On one GPU with Triton a token's step is replayed as a CUDA graph (runtime/decode.py)."""
        spec, work = case.spec, case.work
        *others, (gpu, share) = ((g, s) for g, s in zip(case.hardware.gpus, shares, strict=True) if s.used)
        alone = not others and len(share.layers) == spec.num_hidden_layers
        here = compute_on(gpu, work.value_bytes)
        kernels = {choose(shape, here).kind for part in case.weights.parts for shape in part.packed}
        if work.kv_dtype == "fp8" and here.capability < (8, 9):
            return self.speed_fit(case.weights)
        if not (alone and gpu.vendor in ("nvidia", "") and kernels == {"triton"} and work.batch == 1):
            return self.speed_fit(case.weights)
        return GRAPHED.get(case.weights.bits, GRAPHED[4])

    def host_terms(self, case: Case, phase: str = "") -> tuple[Term, ...]:
        """Weights, cache and working memory of a run on a CPU, beyond the empty process."""
        weights = self.kept(case.weights, case.work, device("CPU"))
        terms, _ = self.terms(case, whole(case.spec), device("CPU"), phase)
        found = []
        for term in terms:
            if term.name not in (*NOT_ALLOCATED, "non_torch"):
                # bytes of the tensors: the additions of a CUDA allocator do not happen here
                n_bytes = weights.total_bytes if term.name == "weights" else term.n_bytes
                found.append(replace(term, n_bytes=n_bytes, low_bytes=n_bytes, high_bytes=n_bytes))
        return tuple(found)


OWN = QwenqEngine(QwenqEngine.latest)
# Qwen2.5-72B on an H200 (reports/gpu.md). A graph's step takes 19.0 ms at 4 bits and 24.0 at 8 after 1k tokens, 21.6
# and 26.6 after 32k. At 8 bits weights are read at the 3,805 GB/s that the card was measured to read, 1.26 times their
# bytes at its nominal 4,800; 0.05 ms per layer are left. At 4 bits, with that overhead, unpacking makes it 1.83 times.
# Elsewhere the kernels were not measured: a card that computes more for each byte it reads may be as fast as at 8 bits.
GRAPHED = {
    4: SpeedFit(0.051e-3, 0, 1.83, 0.75, 1.45, "this engine's 72B on one H200, a step replayed as a CUDA graph"),
    8: SpeedFit(0.051e-3, 0, 1.26, 0.75, 1.25, "this engine's 72B on one H200, a step replayed as a CUDA graph"),
}
# Of the same model at 4 bits without a graph 52.2 ms, with torch's kernels, and 60.5 with Triton's.
LAUNCHED = SpeedFit(0.51e-3, 0, 1.37, 0.6, 1.6, "this engine's 72B on one H200, each kernel started by the host")


def _read_back(case: Case) -> int:
    """Bytes of one token's keys and values read back in the activations' dtype, where the cache has another."""
    same = "bf16" if case.work.value_bytes == 2 else ""
    return 0 if case.work.kv_dtype in ("auto", same) else 2 * case.spec.kv_size * case.work.value_bytes


def _by_blocks(prefill: Pass) -> int:
    """Bytes of attention without a flash kernel: float32 keys and queries, output, scores.

    Where the device widens 16-bit matmuls, values are copied in float32 too, and probabilities are not rounded.
    """
    spec = prefill.case.spec
    scores = max(SCORE_BYTES, 16 * 4 * spec.num_attention_heads * prefill.cached)
    copied, alive = (2, 2) if prefill.widens else (1, 3)
    return copied * 4 * spec.kv_size * prefill.cached + (4 + 2 + 2) * spec.q_size * prefill.rows + alive * scores


_RUNS = "Qwen2.5 A100 runs, transformers 4.46"
SPEEDS = {
    ("none", 16): SpeedFit(0.63e-3, 0, 1.0, 0.75, 1.21, _RUNS),
    ("gptq", 8): SpeedFit(0.94e-3, 0, 1.0, 0.81, 1.20, _RUNS),
    ("gptq", 4): SpeedFit(0.68e-3, 0, 1.37, 0.84, 1.10, _RUNS),
    ("awq", 4): SpeedFit(0.92e-3, 0, 1.0, 0.83, 1.24, _RUNS),
}
UNMEASURED = SpeedFit(0.8e-3, 0, 1.2, 0.7, 1.4, "between transformers' measured formats")


@register
class TransformersEngine(TorchEngine):
    """`AutoModelForCausalLM` with `generate`; by its version and by the libraries of packed weights it loads."""

    name = "transformers"
    oldest = (4, 37)
    latest = (5, 23)
    kv_dtypes: ClassVar = {"auto": 2.0, "fp16": 2.0, "bf16": 2.0}
    unread: ClassVar = {
        "gguf": "transformers dequantizes GGUF to 16 bits while loading: use another format"
    }
    states_peak = True

    @property
    def full_logits(self) -> bool:
        """Before 4.45 (#31292)."""
        return self.version < (4, 45)

    @property
    def rotary_per_layer(self) -> bool:
        """Before 4.45."""
        return self.version < (4, 45)

    @property
    def copies_cache(self) -> bool:
        """`generate` with tuple caches: before 4.42."""
        return self.version < (4, 42)

    @property
    def repeats_kv(self) -> bool:
        """In the flash-attention path: before 4.48."""
        return self.version < (4, 48)

    def kept(self, weights: Weights, work: Workload, gpu: Gpu) -> Weights:
        """A tied head of an FP8 checkpoint is held a second time."""
        return replace(weights, head=weights.embed) if weights.method == "fp8" and not weights.head else weights

    def kernel_for(self, weights: Weights) -> Kernel:
        """GPTQ by the library: AutoGPTQ's where it is one of `libraries`, else GPTQModel's on Ampere and later."""
        if weights.method not in KERNELS and "autogptq" in dict(self.libraries):
            return EXLLAMA_V1 if weights.bits == 4 else CUDA_OLD
        return super().kernel_for(weights)

    def moments(self, case: Case, share: Share, gpu: Gpu) -> list[Moment]:
        found = super().moments(case, share, gpu)
        keeps_logits = share.embed if share.gpus > 1 else share.head
        if self.full_logits and self.copies_cache and share.layers and keeps_logits:
            # `generate` holds the outputs of the step before while the cache is copied: W + 2 KV(n) + 4 V n
            rows = self.prefill_pass(case, share, gpu).rows
            name = "first step: the cache copied beside the prompt's logits"
            found.append(Moment(name, at_prompt=2, logits=4 * rows * case.spec.vocab_size))
        # Seen with 4.46 and AutoAWQ 0.2.6, not with Qwen2's tables (4.38) and Qwen3's (4.51).
        tied = case.spec.tie_word_embeddings and self.version[:2] == (4, 46)
        if tied and self.kernel_for(case.weights) == AWQ_GEMM and share.embed:
            found.append(Moment("loading: the tied head before it is tied", activations=sum(case.weights.embed)))
        return found

    def speed_fit(self, weights: Weights) -> SpeedFit:
        return SPEEDS.get((weights.method, weights.bits), UNMEASURED)

    def moved_in_attention(self, spec: ModelSpec, tokens: int) -> float:
        return REPEATED_KV_TRAFFIC * 4 * spec.q_size * tokens if self.repeats_kv else 0

    def command(self, plan: Plan) -> str:
        """`max_memory` and `device_map` as Python, for `AutoModelForCausalLM.from_pretrained`."""
        if unread := self.refusal(plan.case.weights):
            return f"# {unread}"
        case, rig = plan.case, plan.case.hardware
        placement, lines = None, list[str]()
        if case.engine.name == self.name:
            placement = plan.offload or (plan.placement if plan.fits else None)
        if placement is None:  # of another engine, which needs less for a prompt, say
            work = Workload(case.work.context, case.work.batch, prefill_chunk=case.work.prefill_chunk)
            try:
                placement = place(replace(case, engine=self, work=work), offload=True)
            except HonestNo:
                return "# transformers does not fit, even with layers in host memory"
            if placement.host_layers:
                lines.append(f"# {placement.reason}")
        lines += self.host_comment(placement)
        memory: dict[int | str, str] = {index: f"{limit * 0.97 / GIB:.1f}GiB" for index, limit in enumerate(rig.limits)}
        if placement.offloaded_bytes:
            memory["cpu"] = f"{placement.offloaded_bytes / GIB + 4:.0f}GiB"
        lines += [f"max_memory = {memory}", f"device_map = {_compact(placement)}"]
        if chunk := placement.memory.case.work.prefill_chunk:
            lines.append(f"prefill = {{'prefill_chunk_size': {chunk}}}  # for model.generate(..., **prefill)")
        if rig.needs_pci_order:
            lines.insert(0, 'import os; os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # before torch asks for a GPU')
        if yarn := yarn_of(case):
            lines += [
                f"yarn = {yarn}",
                f"config = AutoConfig.from_pretrained({json.dumps(case.weights.place or 'CHECKPOINT')})",
                "config.rope_parameters = config.rope_parameters | yarn  # transformers 4: config.rope_scaling = yarn",
                f"config.max_position_embeddings = {yarn_reach(yarn)}  # then from_pretrained(..., config=config)",
            ]
        return "\n".join(lines)


def _compact(placement: Placement) -> str:
    """The device map as Python that counts layers in ranges."""
    names, parts = placement.memory.case.spec.architecture, list[str]()
    last: int | str = "cpu"
    for index, share in enumerate(placement.shares):
        if share.embed:
            parts += [f'"{names.embedding}": {index}', f'"{names.rotary}": {index}']
        if share.layers:
            parts.append(_layer_range(names.layers, share.layers, str(index)))
        if share.head:
            last = index
    if placement.host_layers:
        parts.append(_layer_range(names.layers, placement.host_layers, '"cpu"'))
    shown = f'"{last}"' if isinstance(last, str) else str(last)
    return "{" + ", ".join([*parts, f'"{names.norm}": {shown}', f'"{names.head}": {shown}']) + "}"


def _layer_range(prefix: str, layers: range, device: str) -> str:
    return f'**{{f"{prefix}.{{i}}": {device} for i in range({layers.start}, {layers.stop})}}'


_ENV = re.compile(r"([A-Za-z][A-Za-z._-]*?)[ =_-]*v?(\d+(?:\.\d+)+)")
_ENV_NAMES = {"transformers": "transformers", "vllm": "vllm", "autogptq": "autogptq", "auto_gptq": "autogptq",
              "auto-gptq": "autogptq", "gptqmodel": "gptqmodel", "autoawq": "autoawq"}  # fmt: skip


def parse_environment(text: str) -> dict[str, str]:
    """Library versions out of a free text such as `A100-80GB cu121 transformers4.46.0 AutoGPTQ0.7.1`."""
    return {_ENV_NAMES[m[1].lower()]: m[2] for m in _ENV.finditer(text) if m[1].lower() in _ENV_NAMES}
