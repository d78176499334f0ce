"""What `plan` offers where vLLM does not fit as asked: each offer is planned again, as a user would."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
from families import model

from qwenq.errors import HonestNo, PlanError, UsageError
from qwenq.formats.base import Recipe, Scheme
from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case, Workload, rank_shares
from qwenq.planning.engines.base import get_engine, plan_commands
from qwenq.planning.engines.vllm import VllmEngine, default_batch
from qwenq.planning.escapes import Escape
from qwenq.planning.memory import estimate
from qwenq.planning.placement import padded_weights
from qwenq.planning.plan import Plan, make_plan
from qwenq.planning.rig import Rig, parse_rig, reserved
from qwenq.planning.weights import Weights, published_weights, recipe_weights
from qwenq.units import GIB

VLLM = VllmEngine((0, 19))  # graphs beside its part


B72 = model("Qwen2.5-72B")
INT4 = recipe_weights(B72, Recipe(Scheme(4, 128)))


def planned(rig: str | Rig, work: Workload, spec: ModelSpec = B72, weights: Weights = INT4) -> Plan:
    return make_plan(Case(spec, weights, VLLM, work, parse_rig(rig) if isinstance(rig, str) else rig))


def command_of(plan: Plan) -> dict[str, str]:
    """Options of the last line, which is the command."""
    words = shlex.split(VLLM.command(plan).splitlines()[-1])
    assert words[:3] == ["vllm", "serve", "CHECKPOINT"]
    eager = [word for word in words if word == "--enforce-eager"]
    rest = [word for word in words[3:] if word != "--enforce-eager"]
    return dict(zip(rest[::2], rest[1::2], strict=True)) | dict.fromkeys(eager, "")


def obeys(plan: Plan, weights: Weights = INT4) -> bool:
    """Whether the printed command fits by an estimate of its own, with nothing taken back by the GPU's own limit."""
    options = command_of(plan)
    work = Workload(
        int(options["--max-model-len"]),
        plan.case.work.batch,
        kv_dtype=options.get("--kv-cache-dtype", "auto"),
        gpu_memory_utilization=float(options["--gpu-memory-utilization"]),
        enforce_eager="--enforce-eager" in options,
        max_num_seqs=int(options.get("--max-num-seqs", 0)),
    )
    shares = rank_shares(B72, int(options["--tensor-parallel-size"]), int(options["--pipeline-parallel-size"]))
    rig = plan.case.hardware
    found = estimate(replace(plan.case, weights=weights, work=work), shares)
    part = float(options["--gpu-memory-utilization"])
    filled = all(  # vLLM fills its part with cache; graphs and context come on top
        part * kind.limit_bytes + gpu.term("graphs") + gpu.term("context") <= limit
        for kind, gpu, limit in zip(rig.gpus, found.gpus, rig.limits, strict=True)
    )
    return found.fits is True and filled and (found.kv_capacity_tokens or 0) >= work.context * work.batch


@pytest.mark.parametrize(
    ("rig", "context", "part", "first"),
    [
        ("2x RTX 3090", 8192, 0.9, "--gpu-memory-utilization 0.91 at 8k"),
        ("2x RTX 3090", 12288, 0.9, "--gpu-memory-utilization 0.93 and --max-num-seqs 4 at 12k"),
        ("2x RTX 3090", 20480, 0.9, "--gpu-memory-utilization 0.93 and --kv-cache-dtype fp8 at 20k"),
        ("2x RTX 3090", 32768, 0.9, "--gpu-memory-utilization 0.95 and --max-num-seqs 4 and --kv-cache-dtype fp8"),
        ("2x RTX 3090", 65536, 0.9, "--max-model-len 7136"),
        ("2x RTX 3090", 2048, 0.5, "--gpu-memory-utilization 0.87 at 2k"),
        ("4x RTX 3090", 32768, 0.5, "--gpu-memory-utilization 0.6 at 32k"),
        ("RTX 5090 + RTX 3090", 8192, 0.9, "--gpu-memory-utilization 0.91 at 8k"),
    ],
)
def test_the_command_fits(rig: str, context: int, part: float, first: str) -> None:
    plan = planned(rig, Workload(context, gpu_memory_utilization=part))
    assert not plan.fits and plan.instead[0].startswith(first), plan.instead
    comment, command = VLLM.command(plan).splitlines()
    assert comment.startswith("# does not fit as asked (") and plan.instead[0] in comment
    assert command.startswith("vllm serve ") and obeys(plan)
    with pytest.raises(HonestNo) as refused:
        VLLM.plan_words(plan, "CHECKPOINT")
    assert plan.instead[0] in refused.value.hint


@pytest.mark.parametrize(
    ("kv_dtype", "part", "sequences", "first"),
    [
        ("fp8", 0.8, 0, "--gpu-memory-utilization 0.95 and --max-num-seqs 4 at 32k"),
        ("fp8", 0.9, 4, "--gpu-memory-utilization 0.95 at 32k"),
        ("auto", 0.98, 0, "--max-num-seqs 4 and --kv-cache-dtype fp8 at 32k"),
        ("auto", 0.98, 4, "--kv-cache-dtype fp8 at 32k"),
        ("fp8", 0.98, 0, "--max-num-seqs 4 at 32k"),
    ],
)
def test_what_is_at_its_limit_keeps_no_other_change_from_being_tried(
    kv_dtype: str, part: float, sequences: int, first: str
) -> None:
    work = Workload(32768, kv_dtype=kv_dtype, gpu_memory_utilization=part, max_num_seqs=sequences)
    plan = planned("2x RTX 3090", work)
    assert plan.instead[0] == first, plan.instead
    assert obeys(plan)


def test_sequences_and_tokens_of_a_step_that_vllm_refuses_together() -> None:
    """It lowers its own number of sequences to --max-num-batched-tokens, but none that was given."""
    plan = planned("4x RTX 3090", Workload(4096, prefill_chunk=128, max_num_seqs=200))
    assert not plan.fits and "--max-num-batched-tokens 128 is less than --max-num-seqs 200" in VLLM.command(plan)
    assert command_of(plan)["--max-num-seqs"] == "4" and obeys(plan)
    for fine in (Workload(4096, prefill_chunk=128), Workload(4096, prefill_chunk=200, max_num_seqs=200)):
        assert planned("4x RTX 3090", fine).fits
    assert default_batch(parse_rig("RTX 3090").gpus[0], Workload(4096, prefill_chunk=128)) == (128, 128)


def test_a_batch_beyond_the_servers_own_sequences_is_asked_for() -> None:
    assert "--max-num-seqs" not in command_of(planned("4x RTX 3090", Workload(64, 256)))
    assert command_of(planned("4x RTX 3090", Workload(64, 512)))["--max-num-seqs"] == "512"
    with pytest.raises(UsageError, match="batch size is 16, but max_num_seqs lets 4 run at once"):
        Workload(4096, 16, max_num_seqs=4)


@pytest.mark.parametrize(
    ("gpu", "version", "reads"),
    [
        ("Tesla T4", (0, 10), True), ("Tesla T4", (0, 23), True), ("Tesla T4", (0, 24), False),
        ("V100 PCIe 32GB", (0, 10), True), ("V100 PCIe 32GB", (0, 20), False),
        ("RTX 3090", (0, 26), True), ("RTX 4090", (0, 26), True),
    ],
)  # fmt: skip
def test_an_fp8_cache_only_where_vllm_has_one(gpu: str, version: tuple[int, int], reads: bool) -> None:
    """As asked, and among ways to fit."""
    b7, rig = model("Qwen2.5-7B"), parse_rig(f"2x {gpu}")
    weights = recipe_weights(b7, Recipe(Scheme(4, 128)))
    plan = make_plan(Case(b7, weights, VllmEngine(version), Workload(8192, kv_dtype="fp8"), rig))
    verdicts = [option.verdict for option in plan.serving.options]
    told = any("FlashInfer alone" in note for note in plan.notes)
    assert plan.fits == reads and told == (gpu != "RTX 4090" and version >= (0, 11))
    assert reads or all(f"vLLM has no fp8 KV cache on {gpu}" in said for said in verdicts), verdicts
    if not reads:
        with pytest.raises(PlanError, match=f"^vLLM cannot use 2x {gpu}: vLLM has no fp8 KV cache on {gpu}: compute"):
            plan.case.engine.estimate(plan.case)
    batch = sum(rig.limits) // (32768 * 57344)  # whose cache takes all memory in 16 bits, half of it in fp8
    long = make_plan(Case(b7, weights, VllmEngine(version), Workload(32768, batch), rig))
    assert not long.fits and any("fp8" in text for text in long.instead) == reads, long.instead
    assert any("FlashInfer alone" in note for note in long.notes) == (told and reads), "said of ways to fit as well"


@pytest.mark.parametrize("engine", ["qwenq", "sglang"])
def test_another_engines_plan_says_what_vllms_fp8_cache_needs(engine: str) -> None:
    """Above the command, where the plan's own notes do not say it."""
    case = Case(B72, INT4, get_engine(engine), Workload(20480), parse_rig("2x RTX 3090"))
    *comments, command = plan_commands(make_plan(case))["vllm"].splitlines()
    assert "--kv-cache-dtype fp8" in command
    assert sum("FlashInfer alone" in line for line in comments) == 1, comments


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_both_kinds_of_fp8_cache(kv_dtype: str) -> None:
    """Of one byte a value, as fp8; llama.cpp's nearest is q8_0."""
    plan, fp8 = (planned("4x RTX 3090", Workload(8192, kv_dtype=kind)) for kind in (kv_dtype, "fp8"))
    assert plan.fits and plan.memory.kv_capacity_tokens == fp8.memory.kv_capacity_tokens
    assert command_of(plan)["--kv-cache-dtype"] == kv_dtype and obeys(plan)
    assert " -ctk q8_0 -ctv q8_0 " in plan_commands(plan)["llama.cpp"]


def test_nothing_fits() -> None:
    plan = planned("RTX 3090", Workload(8192))
    assert plan.serving.escapes == () and plan.instead == ()
    assert VLLM.command(plan).startswith("# vLLM does not fit with the flags planned here: shapes allow it, but")
    assert "\n" not in VLLM.command(plan)


def test_what_fits_is_printed_as_asked() -> None:
    plan = planned("4x RTX 3090", Workload(8192))
    assert plan.fits and plan.serving.escapes == () and "#" not in VLLM.command(plan) and obeys(plan)


def test_a_padded_checkpoint_only_where_it_fits() -> None:
    """Two ranks: 29,568 / 2 straddles groups of 128; padded they divide, and that is said where the memory allows."""
    short = planned("2x RTX 3090", Workload(65536))
    assert not any("padded" in text for text in short.instead)
    one_layer = replace(B72, num_hidden_layers=1)
    plan = planned("2x RTX 3060 12GB", Workload(8192), one_layer, recipe_weights(one_layer, Recipe(Scheme(4, 128))))
    assert [option.reasons != () for option in plan.serving.options] == [True, True]  # one layer makes no two stages
    assert plan.serving.chosen is None and not plan.fits
    assert plan.certainty == plan.to_json()["certainty"] == "does not fit"
    assert plan.instead[0] == "the FFN padded from 29568 to 29696 (qwenq quantize --pad-for-tp 2) at 8k"
    assert command_of(plan)["--tensor-parallel-size"] == "2"


def test_padded_weights_have_the_size_of_the_published_ones() -> None:
    padded = padded_weights(B72, INT4, 8)
    assert padded is not None and padded.intermediate_size == 29696
    assert padded.total_bytes == pytest.approx(published_weights(B72, "GPTQ-Int4").total_bytes, rel=1e-4)
    assert padded_weights(B72, INT4, 3) is None, "64 heads over 3 ranks"


def test_the_share_leaves_graphs_and_context_their_room() -> None:
    """At 0.96 of a 3090 they would find none: the cache is what really fits, and so is the longest context."""
    plan = planned("2x RTX 3090", Workload(8192, gpu_memory_utilization=0.96))
    part = plan.memory.gpu_memory_utilization
    outside = max(gpu.term("graphs") + gpu.term("context") for gpu in plan.memory.gpus)
    room = (23.58 * GIB - outside) / (23.58 * GIB)
    assert part is not None and room - 0.001 <= part <= room
    assert plan.fits and plan.memory.kv_capacity_tokens == plan.largest_context
    comment, _ = VLLM.command(plan).splitlines()
    assert comment == f"# --gpu-memory-utilization {part:g}, not 0.96: CUDA graphs and context come on top of it"
    assert obeys(plan)


def test_memory_kept_free_is_not_vllms() -> None:
    """vLLM's share is of the whole GPU: what others hold has to come out of what the share leaves."""
    rig = reserved(parse_rig("4x RTX 3090"), 4 * GIB)
    plan = planned(rig, Workload(8192))
    part = plan.memory.gpu_memory_utilization
    assert part is not None and part < 0.9 and obeys(plan)


def test_an_escape_says_what_it_changes() -> None:
    plan = planned("2x RTX 3090", Workload(65536))
    longer = plan.serving.escapes[1]
    assert isinstance(longer, Escape) and longer.work.context > plan.serving.escapes[0].work.context
    assert longer.text.startswith("--gpu-memory-utilization 0.97") and " and --kv-cache-dtype fp8 and " in longer.text


def test_graphs_are_in_the_part_from_0_21_and_grow_with_the_sequences() -> None:
    """Then only the context comes on top, and fewer sequences or --enforce-eager leave the cache more."""
    newest = VllmEngine(VllmEngine.latest)
    spec = model("Qwen2.5-32B")
    case = Case(spec, published_weights(spec, "AWQ"), newest, Workload(2048), parse_rig("RTX 4090"))
    at = {seqs: newest.estimate(case.asking(max_num_seqs=seqs)) for seqs in (256, 64, 4)}
    graphs = {seqs: found.term("graphs") for seqs, found in at.items()}
    assert graphs[256] == round(0.79 * GIB / (86 * 48) * 86 * 64)  # 51 piecewise and 35 full ones, 64 layers
    assert graphs[64] == round(0.79 * GIB / (86 * 48) * (19 + 11) * 64) and graphs[4] < graphs[64] < graphs[256]
    assert at[4].kv_capacity_tokens > at[64].kv_capacity_tokens > at[256].kv_capacity_tokens  # type: ignore[operator]
    assert newest.outside == ("context",) and "graphs" in newest.inside and "graphs" in VllmEngine((0, 19)).outside
    eager = newest.estimate(case.asking(enforce_eager=True))
    assert eager.term("graphs") == 0 and eager.kv_capacity_tokens > at[256].kv_capacity_tokens  # type: ignore[operator]


def test_own_part_by_version() -> None:
    spec = model("Qwen2.5-7B")
    for version, part in (((0, 19), 0.9), ((0, 24), 0.9), ((0, 25), 0.92), (VllmEngine.latest, 0.92)):
        case = Case(spec, published_weights(spec, "AWQ"), VllmEngine(version), Workload(2048), parse_rig("RTX 4090"))
        assert case.engine.asked_part(case) == part


def test_an_eager_escape_is_in_the_command() -> None:
    plan = planned("2x RTX 3090", Workload(38912, kv_dtype="fp8", gpu_memory_utilization=0.9, max_num_seqs=4))
    assert " --kv-cache-dtype fp8 --max-num-seqs 4 --enforce-eager --hf-overrides " in VLLM.command(plan)
    assert obeys(plan)


@pytest.mark.parametrize(("batch", "few"), [(1, 4), (4, 4), (6, 6)])
def test_fewer_sequences_keep_graphs_and_a_16_bit_cache(batch: int, few: int) -> None:
    """Of vLLM's 256, for one user or few: before an fp8 cache, and with one before graphs are given up."""
    case = Case(B72, published_weights(B72, "AWQ"), get_engine("vllm"), Workload(8192), parse_rig("2x RTX 3090"))
    short = make_plan(case.asking(batch=batch, context=8192 // batch))
    assert not short.fits
    assert [text.split(" at ")[0] for text in short.instead].index(f"--max-num-seqs {few}") == 1  # after utilization
    assert make_plan(case.asking(batch=batch, context=8192 // batch, max_num_seqs=few)).fits
    longer = make_plan(case.at(32768))
    changes = {"max_num_seqs": 4, "kv_dtype": "fp8", "gpu_memory_utilization": 0.96}
    assert longer.instead[0] == "--gpu-memory-utilization 0.96 and --max-num-seqs 4 and --kv-cache-dtype fp8 at 32k"
    assert make_plan(case.at(32768).asking(**changes)).fits
    for left in changes:
        assert not make_plan(case.at(32768).asking(**{k: v for k, v in changes.items() if k != left})).fits


def test_vllm_does_not_run_everywhere() -> None:
    plan = make_plan(Case(B72, INT4, get_engine("llama.cpp"), Workload(8192), parse_rig("M2 Ultra")))
    assert VLLM.command(plan) == "# vLLM does not run on Apple M2 Ultra"
    assert [option.verdict for option in plan.serving.options] == ["no: vLLM does not run on Apple M2 Ultra"]
