"""llama.cpp with flash attention: GGUF weights in whole layers, compute buffers sized by the ubatch, by build.

Sources: llama.cpp's own reservation, read with llama-fit-params of llama-cpp-python 0.3.36 on files of the real shapes
(reports/llamacpp.md), which gives the 119 and 148.09 MiB that newer builds logged for Qwen2.5-14B and 7B; for older
ones ollama#5913 (72B, 313.0 MiB), llama.cpp#11337 (32B, 307.0 MiB; q8_0 cache 4352 MiB), unsloth PR#7637 (mask). Where
layers go: llama-model.cpp, load_tensors.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from qwenq.errors import HonestNo
from qwenq.io.gguf import is_split
from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case, Share, Workload
from qwenq.planning.engines.base import LayeredEngine, pci_order, register, yarn_of
from qwenq.planning.memory import Term, merged
from qwenq.planning.placement import Placement, place
from qwenq.planning.plan import Plan
from qwenq.planning.rig import Gpu
from qwenq.planning.speed import SpeedFit
from qwenq.planning.weights import BITS_TO_TYPE, Weights, gguf_weights
from qwenq.units import MIB, format_gb, format_tokens

# Of other engines' caches; 16 bits otherwise.
NEAREST_KV = {"q4_0": "q4_0"} | dict.fromkeys(("q8_0", "fp8", "fp8_e4m3", "fp8_e5m2"), "q8_0")
# Since about this build the server reserves logits for few outputs (llama.cpp#23861, 29 May 2026; 9272 did not yet).
FEW_OUTPUTS = (9400,)
# Whose allocator leaves old masks beside the logits: seen in logs of April and May 2026, not in January 2025 (b4500).
LOOSE_MASKS = (8000,)
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ (llama-cparams.h)
COPIES = 4  # of what enters a device, where several compute parts of a prompt at once (GGML_SCHED_MAX_COPIES)


@register
class LlamaCppEngine(LayeredEngine):
    """`llama-server`, at a build: 9918 is b9918."""

    name = "llama.cpp"
    latest = (9918,)
    oldest = (3000,)
    kv_dtypes: ClassVar = {"auto": 2.0, "fp16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # blocks of 32 values
    smaller_kv = "q8_0"
    own_chunk = 512
    chunk_word = "ubatch"
    needs_gguf = True
    vendors_without = ()
    rocm_tried = True
    started = True
    host_layers_stay = True
    host_layers_first = True  # and the output is on a GPU even then
    copies_tied_head = True  # the embedding stays in host memory

    @property
    def label(self) -> str:
        return self.name if self.version == self.latest else f"{self.name} b{self.version[0]}"

    @property
    def few_outputs(self) -> bool:
        """Whether logits of the last tokens alone have room, and a quantized cache needs no scratch."""
        return self.version >= FEW_OUTPUTS

    def terms(self, case: Case, share: Share, gpu: Gpu) -> tuple[tuple[Term, ...], str]:
        """Terms of one device; a tied head is a second copy on the device."""
        spec, weights, work = case.spec, case.weights, case.work
        tokens = self._cells(case)
        ubatch = min(work.prefill_chunk or self.own_chunk, tokens)
        kv = int(2 * len(share.layers) * spec.kv_size * case.kv_bytes * tokens)
        first = share.embed
        terms = [
            Term("weights", self._held(case, share), "exact", weights.source),
            Term("kv_cache", kv, "exact", f"2 x layers x KV width x tokens, {work.kv_dtype}; tokens in steps of 256"),
            *(self._compute_buffer if self.few_outputs else self._older_buffer)(case, share, ubatch, tokens),
            Term(
                "context", 325 * MIB if first else 600 * MIB, "reported",
                "320 to 330 MiB on the first device; up to 0.9 GB on each further one (one 27B measurement, unsloth)",
                256 * MIB, 400 * MIB if first else 900 * MIB,
            ),
        ]  # fmt: skip
        if not self.few_outputs and case.kv_bytes != 2.0:
            scratch = int(1.3 * spec.hidden_size * tokens)
            source = "scratch for a quantized cache, 0.74 to 2.02 x hidden a token"
            low, high = int(0.74 / 1.3 * scratch), int(2.02 / 1.3 * scratch)
            terms.append(Term("dequantization", scratch, "reported", source, low, high))
        return merged(terms), f"a ubatch of {ubatch} tokens"

    def layer_costs(self, case: Case, share: Share, gpu: Gpu) -> Callable[[range], int]:
        """In closed form: weights by sums, the cache by layers; nothing else depends on which layers a device has."""
        terms, _ = self.terms(case, share, gpu)
        beside = sum(term.n_bytes for term in terms if term.name not in ("weights", "kv_cache"))
        beside += self._held(case, replace(share, layers=range(0)))
        upto, cells, kv_size, kv_bytes = case.weights.layer_sums, self._cells(case), case.spec.kv_size, case.kv_bytes

        def cost(layers: range) -> int:
            cache = int(2 * len(layers) * kv_size * kv_bytes * cells)
            return beside + upto[layers.stop] - upto[layers.start] + cache

        return cost

    def alike(self, case: Case, gpu: Gpu) -> Hashable:
        """The terms are of no kind of device in particular."""
        return ""

    def _cells(self, case: Case) -> int:
        """Tokens that the cache has room for."""
        return -(-case.work.context // 256) * 256 * case.work.batch

    def _held(self, case: Case, share: Share) -> int:
        weights, layers = case.weights, share.layers
        held = weights.layer_sums[layers.stop] - weights.layer_sums[layers.start]
        return held + (sum(weights.norm) + sum(weights.head or weights.embed) if share.head else 0)

    def _compute_buffer(self, case: Case, share: Share, ubatch: int, tokens: int) -> Iterator[Term]:
        """The FFN's gate, up and their product beside hidden states, float32, and the mask.

        Parts of a prompt are computed on several devices at once where all layers and the output are on them
        (llama-context.cpp, pipeline_parallel): then what enters a device has copies.
        """
        hidden, copies = 3, 1
        if share.offloads:
            hidden = 2
        elif share.gpus > 1:
            hidden, copies = 7 if share.embed else 11, COPIES
        n_bytes = 4 * ubatch * (3 * case.weights.intermediate_size + hidden * case.spec.hidden_size)
        source = f"4 bytes x ubatch x (3 x FFN + {hidden} x hidden), as llama-fit-params reserves"
        yield Term("activations", n_bytes, "fitted", source, n_bytes, round(1.05 * n_bytes))
        source = "attention mask, 2 bytes x ubatch x tokens" + (f", x {COPIES} when split" if copies > 1 else "")
        yield Term("logits", 2 * ubatch * tokens * copies, "fitted", source)

    def _older_buffer(self, case: Case, share: Share, ubatch: int, tokens: int) -> Iterator[Term]:
        """Builds before FEW_OUTPUTS: on the last device logits of a whole ubatch, elsewhere the FFN's tensors.

        Masks were float32, and copied to 16 bits (until llama.cpp#23764). On one device the allocator finds room for
        both in what the logits need later, but for some sizes: then their float32 and two hidden states come on top.
        """
        term = compute_buffer(case.spec, case.weights, ubatch, share.head)
        mask = 2 * ubatch * tokens * (COPIES if share.gpus > 1 else 1)
        if share.gpus > 1 or not share.head:
            yield term
            source = "attention mask, 2 bytes x ubatch x tokens, x 4 when split (unsloth#7637)"
            yield Term("logits", mask, "reported", source)
            return
        apart = 4 * ubatch * (2 * case.spec.hidden_size + tokens)
        loose = self.version >= LOOSE_MASKS and tokens >= 4 * case.spec.hidden_size
        source = f"{term.source}; up to {apart / MIB:.0f} MiB more by how masks lie, as 382 and 391 MiB were logged"
        n_bytes = term.n_bytes + (apart if loose else 0)
        yield Term("activations", n_bytes, term.provenance, source, term.n_bytes, term.n_bytes + apart)

    def speed_fit(self, weights: Weights) -> SpeedFit:
        """No published run: weights are read at 50 to 90 % of the bandwidth."""
        return SpeedFit(0.0, 0, 1.5, 0.75, 1.35, "assumed: weights read at 50 to 90 % of the bandwidth")

    def matrix_rate(self, gpu: Gpu) -> float:
        """By integer products on recent NVIDIA cards.

        llama-bench of February 2025 read 512 tokens at 988 tokens/s on RTX 3090s, one after the other, with the shapes
        of Qwen2.5-32B in Q4_K_M: 0.87 of their rate.
        """
        return 0.85 if (gpu.compute_capability or (0, 0)) >= (8, 0) else super().matrix_rate(gpu)

    def uniform_instead(self, case: Case) -> Iterator[str]:
        """The largest smaller type that fits as asked, and a larger one that fits with a smaller KV cache."""
        at, plain = f"at {format_tokens(case.work.context)}", self._largest_type(case)
        if plain is not None:
            yield f"{plain.label}, {format_gb(plain.total_bytes)}, {at}"
        small = case.asking(kv_dtype=self.smaller_kv)
        if small.kv_bytes >= case.kv_bytes or self.how_held(small):  # then these weights need no change
            return
        both = self._largest_type(small)
        if both is not None and (plain is None or both.total_bytes > plain.total_bytes):
            yield f"{both.label}, {format_gb(both.total_bytes)}, and --kv-cache-dtype {self.smaller_kv} {at}"

    def _largest_type(self, case: Case) -> Weights | None:
        """Of the types in ADVISED that are smaller than the case's weights, the largest that fits."""
        types = sorted((gguf_weights(case.spec, name) for name in ADVISED), key=lambda w: w.total_bytes, reverse=True)
        smaller = (weights for weights in types if weights.total_bytes < case.weights.total_bytes)
        return next((weights for weights in smaller if self.how_held(replace(case, weights=weights))), None)

    def own_case(self, case: Case) -> Case:
        """A case of another engine under this one: its GGUF file, or the nearest type of Q4_K_M, Q8_0 and F16; the
        nearest KV cache.
        """
        if case.engine.needs_gguf:
            return case
        weights = case.weights
        if weights.method != "gguf":
            weights = gguf_weights(case.spec, BITS_TO_TYPE.get(weights.bits, BITS_TO_TYPE[4]))
        kv = NEAREST_KV.get(case.work.kv_dtype, "auto")
        work = Workload(case.work.context, case.work.batch, kv_dtype=kv)
        return Case(case.spec, weights, self, work, case.hardware)

    def words(self, case: Case, placement: Placement | None, file: str) -> list[str]:
        """The words of the command that serves the GGUF `file` so, on the CPU without a placement.

        `-ngl` counts layers and the output, of which the first layers stay on the CPU; `-ts` shares these out.
        """
        work, offloaded = case.work, self._offloaded(placement)
        words = ["llama-server", "-m", file, "-ngl", str(offloaded), "-c", str(work.context * work.batch)]
        words += ["-fa", "on"]
        if self.few_outputs:
            words += ["--fit", "off"]  # else it changes what is not said
        if work.batch > 1:
            words += ["-np", str(work.batch)]
        if placement is not None and len(placement.shares) > 1:
            counts = [len(share.layers) + share.head for share in placement.shares]
            words += ["-sm", "layer", "-ts", ",".join(map(str, counts))]
        if work.kv_dtype not in ("auto", "fp16"):
            words += ["-ctk", work.kv_dtype, "-ctv", work.kv_dtype]
        if work.prefill_chunk:
            words += ["-ub", str(work.prefill_chunk)]
            if work.prefill_chunk > 2048:
                words += ["-b", str(work.prefill_chunk)]
        if yarn := yarn_of(case):
            words += ["--rope-scaling", "yarn", "--rope-scale", f"{yarn['factor']:g}"]
            words += ["--yarn-orig-ctx", str(yarn["original_max_position_embeddings"])]
        return words

    def modelfile(self, case: Case, placement: Placement | None, file: str) -> str:
        """Ollama's Modelfile for the same; how it splits layers over GPUs is its own choice."""
        work = case.work
        lines = [f"FROM {file}", f"PARAMETER num_ctx {work.context}", f"PARAMETER num_gpu {self._offloaded(placement)}"]
        if work.prefill_chunk:
            lines.append(f"PARAMETER num_batch {work.prefill_chunk}")
        if work.kv_dtype not in ("auto", "fp16"):
            lines.insert(0, f"# start ollama with OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE={work.kv_dtype}")
        if yarn_of(case):  # llm/server.go lowers num_ctx to the file's own context
            trained = case.spec.max_position_embeddings
            lines.insert(0, f"# Ollama has no YaRN: it lowers num_ctx to the {trained} tokens of training")
        if is_split(Path(file)):  # ollama#5245
            lines.insert(
                0, "# Ollama does not load split files: FROM the output of `llama-gguf-split --merge`"
            )
        return "\n".join(lines)

    def _offloaded(self, placement: Placement | None) -> int:
        """Layers on the GPUs, the output counted."""
        return 0 if placement is None else placement.gpu_layers + 1

    def command(self, plan: Plan) -> str:
        case = self.own_case(plan.case)
        if case.work.batch > MAX_SEQUENCES:
            return f"# llama.cpp runs at most {MAX_SEQUENCES} sequences at once"
        try:
            placement = place(case, offload=True)
        except HonestNo:
            return "# llama.cpp does not fit: the first GPU does not hold even its output"
        file = case.weights.place or "MODEL.gguf"
        note = f"{case.weights.label}, {format_gb(case.weights.total_bytes)}"
        if out := len(placement.host_layers):
            note += f"; {out} layer{'s' if out > 1 else ''} on the CPU"
        command = pci_order(case) + shlex.join(self.words(case, placement, file)) + f"  # {note}"
        return "\n".join([*self.host_comment(placement), command])


# The types that are published most; not Q5_0, Q5_1, Q4_1 and IQ4_NL.
ADVISED = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
)  # fmt: skip


def compute_buffer(spec: ModelSpec, weights: Weights, ubatch: int, last: bool) -> Term:
    """The compute buffer of builds before FEW_OUTPUTS: float32 logits and a hidden state on the last device, the MLP's
    tensors elsewhere.
    """
    if last:
        n_bytes = 4 * ubatch * (spec.vocab_size + spec.hidden_size)
        return Term("activations", n_bytes, "fitted", "4 bytes x ubatch x (vocabulary + hidden), ollama#5913")
    mlp = 4 * ubatch * (2 * weights.intermediate_size + 2 * spec.hidden_size)
    return Term("activations", mlp, "reported", "gate, up, two hidden states, float32; not measured", mlp // 2, 2 * mlp)
