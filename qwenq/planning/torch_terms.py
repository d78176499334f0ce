"""Memory of transformers, and of this project's own engine built on its modules: torch tensors, layer by layer."""

from __future__ import annotations

from qwenq.model.spec import ModelSpec
from qwenq.planning.activations import attention_by_blocks, decode_peak, logits_peak, prefill_peak
from qwenq.planning.allocator import allocated_bytes
from qwenq.planning.engines import Engine, kernel_for, kv_bytes_per_value, prefill_chunk
from qwenq.planning.kernels import compute_on
from qwenq.planning.rig import Gpu
from qwenq.planning.terms import Share, Term, Workload, context_term, merged, ranged, slack_term
from qwenq.planning.weights import Weights

CUBLAS_WORKSPACE = 8_519_680  # discuss.pytorch.org/t/178671; 32 MiB on Hopper (pytorch#120925)
CUBLAS_WORKSPACE_HOPPER = 32 << 20


def torch_terms(
    spec: ModelSpec, weights: Weights, engine: Engine, work: Workload, share: Share, gpu: Gpu, phase: str = ""
) -> tuple[tuple[Term, ...], str]:
    """Terms of one GPU at its worst moment, and the name of that moment; with `phase`, of `prefill` or `decode`."""
    weights = run_weights(weights, engine, work, gpu)
    kernel = kernel_for(engine, weights.method, weights.bits)
    wide = work.value_bytes // 2  # activations are counted in 16 bit
    value = kv_bytes_per_value(engine, work.kv_dtype) * (wide if work.kv_dtype == "auto" else 1)
    n_layers = len(share.layers)
    per_token = 2 * n_layers * spec.kv_size * value * work.batch
    prompt = work.prompt_tokens
    rows, cached = prefill_chunk(engine, work.prefill_chunk, prompt) * work.batch, prompt * work.batch
    held = held_bytes(weights, share)
    static = int(kernel.static * weights.widest_linear) if n_layers else 0
    tables = 4 * n_layers * spec.max_position_embeddings * spec.head_dim if engine.rotary_per_layer else 0

    kv_prompt, kv_end = int(per_token * prompt), int(per_token * work.context)
    if engine.name == "qwenq":  # made at once for the whole context, a tensor of keys and one of values a layer
        if gpu.name != "CPU" and n_layers:
            kv_end = allocated_bytes([kv_end // (2 * n_layers)] * (2 * n_layers))
        kv_prompt = kv_end
    moments: list[tuple[int, int, int, int, str]] = []  # kv, activations, logits, dequantization, moment
    compute = compute_on(gpu, work.value_bytes)
    reads_back = 2 * spec.kv_size * work.value_bytes if engine.name == "qwenq" and _converted(work) else 0  # a token
    if n_layers:
        layer = prefill_peak(
            spec, weights, engine, kernel, rows, cached, share.embed, work.value_bytes,
            widens=compute.widens and engine.name == "qwenq", reads_back=reads_back * cached,
        )  # fmt: skip
        moments.append((kv_prompt, layer.n_bytes - layer.dequantization, 0, layer.dequantization, layer.moment))
        if engine.name == "qwenq" and gpu.name != "CPU" and not compute.has_flash:
            states = wide * 2 * rows * (3 * spec.hidden_size + spec.q_size + 2 * spec.head_dim)
            own = states + attention_by_blocks(spec, rows, cached, compute.widens) + reads_back * cached
            moments.append((kv_prompt, own, 0, 0, "attention by blocks"))
        strip = weights.strip_bytes if work.batch >= weights.strip_rows else 0
        tokens = work.context * work.batch
        copied = reads_back + (8 * spec.kv_size if compute.widens else 0)  # keys and values for a product in float32
        step = decode_peak(
            spec, engine, tokens, work.batch, share.head, value / wide, strip, copied * tokens // wide
        )
        kv_now = kv_end * (2 if engine.copies_cache else 1)
        stepping = wide * (step.n_bytes - step.dequantization)
        moments.append((kv_now, stepping, 0, step.dequantization, f"decoding: {step.moment}"))
    logits = logits_peak(spec, engine, rows, work.batch, first=share.embed, last=share.head, gpus=share.gpus)
    moments.append((kv_prompt, 0, logits.n_bytes, 0, logits.moment))
    if weights.method == "awq" and engine.name == "transformers" and spec.tie_word_embeddings and share.embed:
        moments.append((0, sum(weights.embed), 0, 0, "loading: the tied head before it is tied"))
    asked = [m for m in moments if not phase or m[4].startswith("decoding") == (phase == "decode")]
    kv, activations, head, dequantized, moment = max(asked or [(kv_end, 0, 0, 0, phase)], key=lambda m: sum(m[:4]))

    workspace = CUBLAS_WORKSPACE_HOPPER if any(part in gpu.name for part in ("H100", "H200")) else CUBLAS_WORKSPACE
    terms = [
        Term("weights", held + tables, "exact", _weights_source(weights, tables)),
        Term("kv_cache", kv, "exact", _kv_source(engine, work)),
        ranged("activations", activations, "fitted", f"tensors alive: {moment}", 0.98, 1.03),
        ranged("logits", head, "fitted", logits.moment, 0.98, 1.02),
        ranged("dequantization", static + dequantized, "fitted", f"{kernel.name}: {kernel.source}", 0.9, 1.0),
        Term("non_torch", workspace, "reported", "cuBLAS workspace, pytorch forum 178671 and pytorch#120925"),
        context_term(gpu.name),
        slack_term(kv + activations + head + dequantized, held if weights.strip_bytes else 0),
    ]
    return merged(engine.profile.corrected(gpu.name, terms) if engine.profile else terms), moment


def _converted(work: Workload) -> bool:
    """Whether the cache has another dtype than the activations, and is read back in theirs layer by layer."""
    return work.kv_dtype not in ("auto", "bf16" if work.value_bytes == 2 else "")


def run_weights(weights: Weights, engine: Engine, work: Workload, gpu: Gpu) -> Weights:
    """Weights as the engine keeps them on `gpu`: all but this project's own keep them about as stored."""
    return weights.kept(compute_on(gpu, work.value_bytes)) if engine.name == "qwenq" else weights


def held_bytes(weights: Weights, share: Share) -> int:
    """Bytes of the share's weights on the GPU, with what the allocator adds to each tensor."""
    embed, layers, head = weights.allocated
    return (embed if share.embed else 0) + sum(layers[layer] for layer in share.layers) + (head if share.head else 0)


def _weights_source(weights: Weights, tables: int) -> str:
    return weights.source + "; torch's allocator rounding" + ("; rotary tables of each layer" if tables else "")


def _kv_source(engine: Engine, work: Workload) -> str:
    text = f"2 x layers x KV width x tokens, {work.kv_dtype}"
    return text + ("; twice at the end of a step" if engine.copies_cache else "")
