"""llama.cpp with every layer on a GPU and flash attention: GGUF weights, compute buffers sized by the ubatch.

Sources: ollama#5913 (72B, 313.0 MiB), llama.cpp#11337 (32B, 307.0 MiB; q8_0 cache 4352 MiB), unsloth PR#7637 (mask).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case, Share, Workload
from qwenq.planning.engines.base import LayeredEngine, pci_order, register, yarn_of
from qwenq.planning.ggufsize import gguf_weights
from qwenq.planning.memory import Term, merged
from qwenq.planning.placement import place
from qwenq.planning.plan import Plan
from qwenq.planning.rig import Gpu
from qwenq.planning.speed import SpeedFit
from qwenq.planning.weights import Weights

MIB = 1 << 20
NEAREST_KV = {"fp8": "q8_0", "q8_0": "q8_0", "q4_0": "q4_0"}  # of other engines' caches; 16 bits otherwise


@register
@dataclass(frozen=True)
class LlamaCppEngine(LayeredEngine):
    """`llama-server`, in whatever build."""

    name = "llama.cpp"
    latest = (0,)
    versioned = False
    kv_dtypes: ClassVar = {"auto": 2.0, "fp16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # blocks of 32 values
    smaller_kv = "q8_0"
    own_chunk = 512
    chunk_word = "ubatch"
    needs_gguf = True
    vendors_without = ()
    rocm_tried = True
    host_layers_stay = True
    copies_tied_head = True  # the embedding stays in host memory

    def terms(self, case: Case, share: Share, gpu: Gpu) -> tuple[tuple[Term, ...], str]:
        """Terms of one device; a tied head is a second copy on the device."""
        spec, weights, work = case.spec, case.weights, case.work
        tokens = -(-work.context // 256) * 256 * work.batch
        ubatch = min(work.prefill_chunk or self.own_chunk, tokens)
        held = sum(weights.layer_bytes[layer] for layer in share.layers)
        if share.head:
            held += sum(weights.norm) + sum(weights.head or weights.embed)
        kv = int(2 * len(share.layers) * spec.kv_size * case.kv_bytes * tokens)
        mask = 2 * ubatch * tokens * (4 if share.gpus > 1 else 1)
        scratch = int(1.3 * spec.hidden_size * tokens) if case.kv_bytes != 2.0 else 0
        first = share.embed
        terms = [
            Term("weights", held, "exact", weights.source),
            Term("kv_cache", kv, "exact", f"2 x layers x KV width x tokens, {work.kv_dtype}; tokens in steps of 256"),
            compute_buffer(spec, weights, ubatch, share.head),
            Term(
                "logits", mask, "reported", "attention mask, 2 bytes x ubatch x tokens, x 4 when split (unsloth#7637)"
            ),
            Term(
                "dequantization", scratch, "reported", "scratch for a quantized cache, 0.74 to 2.02 x hidden a token",
                int(0.74 / 1.3 * scratch), int(2.02 / 1.3 * scratch),
            ),
            Term(
                "context", 325 * MIB if first else 600 * MIB, "reported",
                "320 to 330 MiB on the first device; up to 0.9 GB on each further one (one 27B measurement, unsloth)",
                256 * MIB, 400 * MIB if first else 900 * MIB,
            ),
        ]  # fmt: skip
        return merged(terms), f"a ubatch of {ubatch} tokens"

    def speed_fit(self, weights: Weights) -> SpeedFit:
        """No published run: weights are read at 50 to 90 % of the bandwidth."""
        return SpeedFit(0.0, 0, 1.5, 0.75, 1.35, "assumed: weights read at 50 to 90 % of the bandwidth")

    def command(self, plan: Plan) -> str:
        """`llama-server ...` for the nearest GGUF type: Q4_K_M, Q8_0 or F16."""
        spec, work, rig = plan.case.spec, plan.case.work, plan.case.hardware
        file_type = {16: "F16", 8: "Q8_0"}.get(plan.case.weights.bits, "Q4_K_M")
        kv = NEAREST_KV.get(work.kv_dtype, "auto")
        case = Case(spec, gguf_weights(spec, file_type), self, Workload(work.context, work.batch, kv_dtype=kv), rig)
        placement, layers = place(case), 99
        note = f"GGUF {file_type}, {case.weights.total_bytes / 1e9:.1f} GB"
        if not placement.fits:
            placement = place(case, offload=True)
            layers = placement.gpu_layers
            out = spec.num_hidden_layers - layers
            note += f"; {out} layer{'s' if out > 1 else ''} on the CPU"
        words = ["llama-server", "-m", "MODEL.gguf", "-ngl", str(layers), "-c", str(work.context * work.batch)]
        words += ["-fa", "on"]
        if len(rig.gpus) > 1:
            words += ["-sm", "layer", "-ts", ",".join(str(len(share.layers)) for share in placement.shares)]
        if kv != "auto":
            words += ["--cache-type-k", kv, "--cache-type-v", kv]
        if yarn := yarn_of(case):
            words += ["--rope-scaling", "yarn", "--rope-scale", f"{yarn['factor']:g}"]
            words += ["--yarn-orig-ctx", str(yarn["original_max_position_embeddings"])]
        return pci_order(case) + " ".join(words) + f"  # {note}"


def compute_buffer(spec: ModelSpec, weights: Weights, ubatch: int, last: bool) -> Term:
    """llama.cpp's compute buffer: float32 logits and a hidden state on the last device, the MLP's tensors elsewhere."""
    if last:
        n_bytes = 4 * ubatch * (spec.vocab_size + spec.hidden_size)
        return Term("activations", n_bytes, "fitted", "4 bytes x ubatch x (vocabulary + hidden), ollama#5913")
    mlp = 4 * ubatch * (2 * weights.intermediate_size + 2 * spec.hidden_size)
    return Term("activations", mlp, "reported", "gate, up, two hidden states, float32; not measured", mlp // 2, 2 * mlp)
