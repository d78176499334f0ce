"""The estimator against numbers worked by hand and against published measurements."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from families import model
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.errors import PlanError
from qwenq.formats.base import Recipe, Scheme
from qwenq.model.spec import ModelSpec, family_configs
from qwenq.planning.case import Case, Share, Workload, check_context, even_shares, rank_shares, whole
from qwenq.planning.engines.base import ENGINES, get_engine
from qwenq.planning.engines.llamacpp import compute_buffer
from qwenq.planning.engines.torch import EXLLAMA_V1, Pass, TorchEngine, TransformersEngine, parse_environment
from qwenq.planning.engines.vllm import VllmEngine
from qwenq.planning.memory import GpuMemory, Term, estimate
from qwenq.planning.rig import Rig, find_gpu
from qwenq.planning.validate import errors, read_rows
from qwenq.planning.weights import Weights, allocated_bytes, gguf_weights, published_weights, recipe_weights
from qwenq.units import GIB, MIB

PUBLISHED = Path(__file__).parents[1] / "data" / "published"


B72 = model("Qwen2.5-72B")
INT4 = recipe_weights(B72, Recipe(Scheme(4, 128)))


# KV facts: 2 (key, value) x layers x KV heads x head size x 2 bytes.
@pytest.mark.parametrize(
    ("name", "n_bytes"),
    [
        ("Qwen2.5-0.5B", 12_288),
        ("Qwen2.5-1.5B", 28_672),
        ("Qwen2.5-3B", 36_864),
        ("Qwen2.5-7B", 57_344),
        ("Qwen2.5-14B", 196_608),
        ("Qwen2.5-32B", 262_144),
        ("Qwen2.5-72B", 327_680),  # 2 x 80 x 8 x 128 x 2
    ],
)
def test_kv_bytes_per_token(name: str, n_bytes: int) -> None:
    spec = model(name)
    found = estimate(Case(spec, published_weights(spec, "BF16"), get_engine("transformers"), Workload(32768)))
    assert found.kv_bytes_per_token == n_bytes
    assert found.term("kv_cache") == 32768 * n_bytes


def test_kv_of_72b_in_gib() -> None:
    at = {
        c: estimate(Case(B72, INT4, get_engine("qwenq"), Workload(c))).term("kv_cache") / GIB
        for c in (1024, 32768, 131072)
    }
    assert at == {1024: 0.3125, 32768: 10, 131072: 40}


def test_llama_cpp_quantized_cache_of_32b() -> None:
    # llama.cpp#11337: 32B, 32,768 tokens, q8_0: 4352 MiB
    spec = model("Qwen2.5-32B")
    work = Workload(32768, kv_dtype="q8_0")
    found = estimate(Case(spec, gguf_weights(spec, "Q4_K_M"), get_engine("llama.cpp"), work))
    assert found.term("kv_cache") == 4352 * MIB


@pytest.mark.parametrize(
    ("name", "mib"),
    [("Qwen2.5-72B", 313.0), ("Qwen2.5-32B", 307.0), ("Qwen2.5-7B", 304.0)],  # ollama#5913, llama.cpp#11337
)
def test_llama_cpp_compute_buffer(name: str, mib: float) -> None:
    spec = model(name)
    assert compute_buffer(spec, gguf_weights(spec, "Q4_K_M"), 512, last=True).n_bytes == mib * MIB


def test_a_gguf_file_that_llama_cpp_made() -> None:
    """The tensors of a Q4_K_M file of a 135M model, quantized by llama.cpp (llama-cpp-python 0.3.36), to the byte.

    Rows of 576 have no 256-value blocks: 181 of its 363 tensors fall back to other types.
    """
    spec = replace(
        model("Qwen2.5-0.5B"), hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, vocab_size=49152, tie_word_embeddings=False,
    )  # fmt: skip
    weights = gguf_weights(spec, "Q4_K_M")
    assert sum(weights.embed + weights.norm + weights.head) + sum(weights.layer_bytes) == 123_247_872


def test_llama_cpp_mask_on_two_devices() -> None:
    # unsloth PR#7637: 72B, two GPUs, 32k, ubatch 512: 128 MiB a device
    weights = gguf_weights(B72, "Q4_K_M")
    rig = Rig((find_gpu("RTX 3090"),) * 2)
    found = estimate(Case(B72, weights, get_engine("llama.cpp"), Workload(32768), rig), even_shares(B72, 2))
    assert [gpu.term("logits") for gpu in found.gpus] == [128 * MIB, 128 * MIB]


def torch_engine(version: str, libraries: dict[str, str] | None = None) -> TorchEngine:
    engine = get_engine("transformers", version, libraries)
    assert isinstance(engine, TransformersEngine)
    return engine


def prefill(
    weights: Weights, engine: TorchEngine, rows: int, share: Share = whole(B72), spec: ModelSpec = B72
) -> Pass:
    """A prompt of so many tokens, computed at once."""
    return Pass(Case(spec, weights, engine, Workload(rows)), share, rows, rows)


def test_prefill_peak_of_72b_by_hand() -> None:
    # 6144 rows in 16-bit: embeddings, layer input, residual, normed input (4 x 8192), cosine and sine (2 x 128),
    # and silu(gate), up, product (3 x 29568).
    engine = torch_engine("4.46.0")
    weights = published_weights(B72, "BF16")
    peak = engine.prefill_peak(prefill(weights, engine, 6144))
    assert peak.moment == "gate times up in the MLP"
    assert peak.n_bytes == 6144 * 2 * (4 * 8192 + 2 * 128 + 3 * 29568) == 1_495_793_664
    other = engine.prefill_peak(prefill(weights, engine, 6144, even_shares(B72, 2)[1]))
    assert peak.n_bytes - other.n_bytes == 6144 * 2 * 8192  # the input embeddings live on the first GPU only


def test_auto_awq_dequantizes_during_up_proj() -> None:
    # At 6,144 rows a dequantized 29696 x 8192 matrix is larger than the third MLP tensor; at 30,720 it is not.
    engine = torch_engine("4.46.0", {"autoawq": "0.2.6"})
    weights = published_weights(B72, "AWQ")
    short = engine.prefill_peak(prefill(weights, engine, 6144))
    assert (short.moment, short.dequantization) == ("up_proj", 2 * 29696 * 8192)
    assert engine.prefill_peak(prefill(weights, engine, 30720)).dequantization == 0
    assert engine.prefill_peak(prefill(weights, engine, 1000)).dequantization == 0  # below 1,024 rows


def test_old_transformers_keeps_every_logit() -> None:
    old, new = torch_engine("4.38.2"), torch_engine("4.46.0")
    rows = 30720
    peak = old.logits_peak(prefill(INT4, old, rows))
    assert peak.n_bytes == rows * (152064 * 6 + 8192 * 2)  # 26.1 GiB of logits, and the normed hidden states
    assert old.logits_peak(prefill(INT4, old, rows, even_shares(B72, 2)[0])).n_bytes == rows * 152064 * 4
    assert new.logits_peak(prefill(INT4, new, rows)).n_bytes == 152064 * 14


def test_versions_change_what_is_kept() -> None:
    spec = model("Qwen2-72B")
    weights = published_weights(spec, "GPTQ-Int4")
    libraries = {"autogptq": "0.7.1"}

    def at(version: str) -> GpuMemory:
        work = Workload(2049, prompt=1)
        return estimate(Case(spec, weights, get_engine("transformers", version, libraries), work)).gpus[0]

    kv = 2049 * 327_680
    assert at("4.38.2").term("kv_cache") == 2 * kv  # the tuple cache and the one being built
    assert at("4.44.2").term("kv_cache") == kv
    assert at("4.44.2").term("weights") - at("4.45.2").term("weights") == 80 * 2 * 32768 * 128 * 2  # rotary tables
    assert at("4.46.0").term("activations") == 2 * 2 * 8192 * 2049  # repeated keys and values, 16-bit
    assert at("4.48.0").term("activations") == 2049 * 1024 * 2  # one layer's keys while they grow


def test_decode_without_grouped_heads_repeats_nothing() -> None:
    spec = replace(B72, num_key_value_heads=64)
    old = torch_engine("4.38.2")
    step = Pass(Case(spec, INT4, old, Workload(4096)), even_shares(spec, 2)[0], 1, 4096)
    assert old.decode_peak(step).n_bytes == 4096 * 8192 * 2


def test_allocator_by_hand() -> None:
    assert allocated_bytes([1, 513]) == 512 + 1024
    # 14B's down_proj: 135 MiB in a segment of 136, the rest of 1 MiB is not split off
    assert allocated_bytes([135 * MIB]) == 136 * MIB
    assert allocated_bytes([3 * MIB] * 6) == 18 * MIB  # one 20 MiB segment, six times 3 MiB
    assert allocated_bytes([19 * MIB // 2]) == 19 * MIB // 2  # half of 20 MiB is given back
    assert allocated_bytes([57 * MIB // 2, 3 * MIB // 2]) == 57 * MIB // 2 + 3 * MIB // 2  # the rest is used


def test_exllama_buffer() -> None:
    engine = torch_engine("4.46.0", {"autogptq": "0.7.1"})
    weights = published_weights(B72, "GPTQ-Int4")
    assert engine.kernel_for(weights) == EXLLAMA_V1
    assert estimate(Case(B72, weights, engine, Workload(2049, prompt=1))).term("dequantization") == 2 * 29696 * 8192


def test_published_transformers_table() -> None:
    rows, skipped = read_rows(PUBLISHED / "qwen25_transformers_memory.csv")
    assert len(rows) == 60 and not skipped
    mean, largest = errors([row for row in rows if row.input_len >= 6144])
    assert mean <= 0.25 and largest <= 1.9  # the bar: 0.8 and 3
    mean, largest = errors([row for row in rows if row.input_len == 1])
    assert mean <= 0.3 and largest <= 1.4  # the bar: 1.5 and 4.5
    mean, largest = errors([row for row in rows if "0.5B" not in row.model])
    assert mean <= 0.04 and largest <= 0.12  # two decimals are published; only the 0.5B rows feel the rounding


def _vllm_rows() -> list[dict[str, str]]:
    with open(PUBLISHED / "vllm019_h100_memory.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["status"] == "ok"]


@pytest.mark.parametrize("row", _vllm_rows(), ids=lambda row: row["log_file"])
def test_published_vllm_logs(row: dict[str, str]) -> None:
    spec = B72 if "72B" in row["model"] else model("Qwen2.5-7B")
    if "Kimi" in row["model"]:
        spec = replace(spec, max_position_embeddings=131072)  # its config.json
    ranks = int(row["tp"])
    work = Workload(
        int(row["max_model_len"]),
        kv_dtype="fp8" if row["kv_cache_dtype"] == "fp8" else "auto",
        gpu_memory_utilization=float(row["gpu_memory_utilization"]),
    )
    rig = Rig((find_gpu("H100 SXM5 80GB"),) * ranks)
    engine = VllmEngine((0, 19))
    found = estimate(Case(spec, published_weights(spec, "BF16"), engine, work, rig), rank_shares(spec, ranks))
    gpu = found.gpus[0]
    assert gpu.term("weights") / GIB == pytest.approx(float(row["weights_memory_gib"]), abs=0.02)
    assert gpu.term("activations") / GIB == pytest.approx(float(row["activation_memory_gib"]), rel=0.01)
    assert gpu.term("non_torch") / GIB == pytest.approx(float(row["non_torch_forward_gib"]), rel=0.03)
    assert gpu.term("graphs") / GIB == pytest.approx(float(row["cuda_graph_actual_gib"]), rel=0.06)
    assert gpu.term("context") / GIB == pytest.approx(float(row["init_cuda_memory_gib"]), rel=0.02)
    assert engine.inside_bytes(gpu.terms) / GIB == pytest.approx(float(row["total_non_kv_cache_gib"]), rel=0.01)
    assert found.kv_capacity_tokens == pytest.approx(int(row["kv_cache_tokens"]), rel=0.012)


def test_vllm_copies_heads_beyond_their_number() -> None:
    work, engine = Workload(4096), get_engine("vllm")
    weights = published_weights(B72, "BF16")
    per_rank = [
        estimate(Case(B72, weights, engine, work), rank_shares(B72, ranks)[:1]).term("kv_cache") for ranks in (4, 8, 16)
    ]
    assert per_rank == [4096 * 327_680 // 4, 4096 * 327_680 // 8, 4096 * 327_680 // 8]


def test_parse_environment() -> None:
    text = "A100-80GB cu121 torch2.3.1 FA2.5.8 transformers4.38.2 AutoGPTQ0.7.1 AutoAWQ0.2.6"
    assert parse_environment(text) == {"transformers": "4.38.2", "autogptq": "0.7.1", "autoawq": "0.2.6"}
    assert parse_environment("Transformers==4.51.3, GPTQModel 2.2.0+cu128") == {
        "transformers": "4.51.3",
        "gptqmodel": "2.2.0",
    }
    assert parse_environment("") == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Workload(0), "context is 0"),
        (lambda: Workload(-5), "context is -5"),
        (lambda: Workload(10, batch=0), "batch size is 0"),
        (lambda: Workload(10, prompt=11), "prompt is 11 tokens"),
        (lambda: Workload(10, prefill_chunk=-1), "prefill chunk is -1"),
        (lambda: Workload(10, gpu_memory_utilization=1.2), "gpu_memory_utilization is 1.2"),
        (lambda: check_context(B72, Workload(131073)), "131073 tokens, Qwen2.5-72B allows 131072"),
        (lambda: get_engine("tgi"), "unknown engine 'tgi'"),
        (lambda: get_engine("vllm", "new"), "not a version"),
        (lambda: published_weights(B72, "Q3"), "unknown quantization 'Q3'"),
        (
            lambda: estimate(Case(B72, INT4, get_engine("vllm"), Workload(1, kv_dtype="q8_0"))),
            "vllm is not planned with KV cache dtype 'q8_0'",
        ),
    ],
)
def test_bad_questions(make: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()  # type: ignore[operator]


specs = st.sampled_from([name for name in family_configs() if "1M" not in name])


@settings(max_examples=60, deadline=None)
@given(
    name=specs,
    engine=st.sampled_from(list(ENGINES)),
    context=st.integers(1, 16000),
    more=st.integers(0, 16000),
    batch=st.integers(1, 4),
    chunk=st.sampled_from([0, 256, 2048]),
    data=st.data(),
)
def test_estimates_are_sane(
    name: str, engine: str, context: int, more: int, batch: int, chunk: int, data: st.DataObject
) -> None:
    """Parts add up, ranges hold the figure, and more context or more sequences never need less."""
    spec = model(name)
    context = min(context, spec.extended_context)
    more = min(more, spec.extended_context - context)
    kv = data.draw(st.sampled_from(list(get_engine(engine).kv_dtypes)))
    weights = gguf_weights(spec, "Q4_K_M") if engine == "llama.cpp" else published_weights(spec, "GPTQ-Int4")

    def at(tokens: int, sequences: int) -> GpuMemory:
        work = Workload(tokens, sequences, kv_dtype=kv, prefill_chunk=chunk)
        return estimate(Case(spec, weights, get_engine(engine), work)).gpus[0]

    one = at(context, batch)
    assert one.total_bytes == sum(term.n_bytes for term in one.terms)
    assert one.low_bytes <= one.total_bytes <= one.high_bytes
    assert all(term.low_bytes <= term.n_bytes <= term.high_bytes and term.source for term in one.terms)
    assert one.term("weights") >= 0.95 * (weights.total_bytes - sum(weights.embed))
    assert at(context + more, batch).total_bytes >= one.total_bytes
    assert at(context, batch + 1).total_bytes >= one.total_bytes


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 200 * MIB), max_size=60))
def test_allocator_never_gives_less_nor_much_more(sizes: list[int]) -> None:
    assert sum(sizes) <= allocated_bytes(sizes) <= sum(sizes) + len(sizes) * (MIB + 512)


def test_terms_add_up_to_certainty() -> None:
    def gpu(limit: int) -> GpuMemory:
        return GpuMemory("x", (Term("weights", 100, "exact", "s", 90, 120),), limit, "m")

    base = estimate(Case(B72, INT4, get_engine("qwenq"), Workload(1024)))
    for limit, word, fits in (
        (120, "fits", True),
        (119, "tight", True),
        (99, "tight", False),
        (89, "does not fit", False),
    ):
        found = replace(base, gpus=(gpu(limit),))
        assert (found.certainty, found.fits) == (word, fits)
    assert base.certainty == "" and base.fits is None


def test_weights_type_is_shared() -> None:
    assert isinstance(INT4, Weights)
    assert INT4.total_bytes == 41_489_965_056
    assert recipe_weights(B72, Recipe(Scheme(8, 128))).total_bytes == 76_870_557_696


def test_the_first_step_of_old_transformers_holds_the_prompts_logits() -> None:
    """Before 4.42: weights, the cache twice, and four bytes a logit of every prompt position (Qwen1.5's table)."""
    spec = replace(model("Qwen2.5-7B"), num_key_value_heads=28)  # as many as heads: the cache is what counts
    weights, n = published_weights(spec, "BF16"), 30720
    kv = n * 2 * 28 * spec.kv_size * 2

    def at(version: str) -> GpuMemory:
        return estimate(Case(spec, weights, get_engine("transformers", version), Workload(n + 1, prompt=n))).gpus[0]

    old = at("4.38.2")
    assert old.moment == "first step: the cache copied beside the prompt's logits"
    assert (old.term("kv_cache"), old.term("logits")) == (2 * kv, 4 * n * spec.vocab_size)
    assert at("4.42.4").term("kv_cache") <= kv + 2 * 28 * spec.kv_size * 2
    shares = even_shares(spec, 2)  # logits are brought back to the first GPU
    case = Case(spec, weights, get_engine("transformers", "4.38.2"), Workload(n + 1, prompt=n))
    first, last = estimate(case, shares).gpus
    assert first.term("logits") == 4 * n * spec.vocab_size and last.moment != old.moment


def test_a_tied_awq_head_is_counted_twice_with_4_46_alone() -> None:
    spec = model("Qwen2.5-1.5B")
    weights, libraries = published_weights(spec, "AWQ"), {"autoawq": "0.2.6"}
    moments = {}
    for version in ("4.38.2", "4.45.2", "4.46.0", "4.51.3"):
        case = Case(spec, weights, get_engine("transformers", version, libraries), Workload(2, prompt=1))
        moments[version] = estimate(case).gpus[0].moment.startswith("loading: the tied head")
    assert moments == {"4.38.2": False, "4.45.2": False, "4.46.0": True, "4.51.3": False}


def test_a_tied_fp8_checkpoint_holds_its_head_twice() -> None:
    engine = get_engine("transformers", "4.51.3")
    for name, twice in (("Qwen2.5-1.5B", True), ("Qwen2.5-7B", False)):
        spec = model(name)
        weights = published_weights(spec, "FP8")
        held = estimate(Case(spec, weights, engine, Workload(64))).term("weights")
        assert (held > weights.total_bytes + 2 * spec.vocab_size * spec.hidden_size * 0.99) == twice
