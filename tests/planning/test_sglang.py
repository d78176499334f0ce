"""SGLang: its own formulas by hand, a published start-up log, and commands that its flags understand."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest
from families import model

from qwenq.formats.base import Recipe, Scheme
from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case, Workload, rank_shares
from qwenq.planning.engines.base import plan_commands
from qwenq.planning.engines.sglang import SglangEngine
from qwenq.planning.engines.torch import OWN
from qwenq.planning.memory import estimate
from qwenq.planning.placement import parallel_options
from qwenq.planning.plan import make_plan
from qwenq.planning.rig import Rig, find_gpu, parse_rig, reserved
from qwenq.planning.weights import Weights, recipe_weights
from qwenq.units import GIB

SGLANG = SglangEngine(SglangEngine.latest)


B72, QWQ = model("Qwen2.5-72B"), model("QwQ-32B")
INT4 = recipe_weights(B72, Recipe(Scheme(4, 128)))


def case(rig: Rig, work: Workload, spec: ModelSpec = B72, weights: Weights = INT4) -> Case:
    return Case(spec, weights, SGLANG, work, rig)


# server_args by hand: MiB of the GPU, less 512, 1.5 a token of a chunk of at least 2,048, 2 a sequence of the largest
# CUDA graph, 1,024 / 8 a GPU; from 60 GiB on at least 10,240.
@pytest.mark.parametrize(
    ("gpu", "tensor", "pipeline", "reserved"),
    [
        ("Tesla T4", 1, 1, 512 + 3072 + 16 + 128),
        ("RTX 3090", 1, 1, 512 + 3072 + 48 + 128),
        ("RTX 3090", 2, 2, 512 + 3072 + 48 + 512),
        ("RTX 3090", 4, 1, 512 + 3072 + 160 + 512),
        ("A100 SXM4 40GB", 1, 2, 512 + 6144 + 64 + 256),
        ("A100 SXM4 80GB", 1, 1, 512 + 12288 + 512 + 128),
        ("H200", 8, 1, 512 + 12288 + 1024 + 1024),
    ],
)
def test_the_fraction_without_one_asked_for(gpu: str, tensor: int, pipeline: int, reserved: int) -> None:
    kind = find_gpu(gpu)
    share = rank_shares(B72, tensor, pipeline)[0]
    total = 1024 * kind.memory_gib
    found = SGLANG.own_part(case(Rig((kind,)), Workload(4096)), share, kind)
    assert found == round((total - reserved) / total, 3)


def test_stages_of_a_pipeline_decide_the_fraction_of_a_logged_run() -> None:
    """Of 4 GPUs, 2 ranks in 2 stages capture smaller graphs than 4 ranks, and so take more of each GPU."""
    kind = find_gpu("RTX 3090")
    logged = case(Rig((kind,) * 4), Workload(4096))
    rooms = {}
    for tensor, kept_free in ((2, 512 + 3072 + 48 + 512), (4, 512 + 3072 + 160 + 512)):
        shares, total = rank_shares(B72, tensor, 4 // tensor), 1024 * kind.memory_gib
        said = logged.asking(gpu_memory_utilization=round((total - kept_free) / total, 3))
        rooms[tensor] = SGLANG.cache_room(logged, shares)
        assert rooms[tensor] == SGLANG.cache_room(said, shares)
    assert rooms[2] != rooms[4]


def test_large_gpus_keep_ten_gib_free() -> None:
    kind = find_gpu("A100 SXM4 80GB")
    asked = case(Rig((kind,)), Workload(4096, prefill_chunk=2048))
    assert SGLANG.own_part(asked, rank_shares(B72, 1)[0], kind) == round(70 / 80, 3)


def test_a_published_log_step_by_step() -> None:
    """QwQ-32B in BF16 on four A10G, --mem-fraction-static 0.85: 21.63 GiB free, 15.54 of weights, 46,611 tokens."""
    a10g = replace(find_gpu("A10"), name="A10G", usable_gib=21.63 + 0.65)  # context and NCCL, as estimated
    weights = recipe_weights(QWQ, Recipe(None))
    asked = case(Rig((a10g,) * 4), Workload(131072, gpu_memory_utilization=0.85), QWQ, weights)
    found = estimate(asked, rank_shares(QWQ, 4))
    gpu = found.gpus[0]
    assert gpu.term("context") == pytest.approx(0.65 * GIB, abs=2)
    assert gpu.term("weights") / GIB == pytest.approx(15.54, rel=0.02)
    assert gpu.term("kv_cache") == 131072 * 2 * 2 * 128 * 64 * 2  # two of eight heads, keys and values, 64 layers
    left = 0.85 * 21.63 * GIB - gpu.term("weights")
    assert found.kv_capacity_tokens == int(left // 65536)
    assert found.kv_capacity_tokens == pytest.approx(46_611, rel=0.1)  # 2.84 GiB: 2 % of the weights are a tenth of it
    # of the 2,049 rows of the log's table 1.0 GiB; between weights and graphs 1.16 + 0.64 GiB went besides the cache
    assert gpu.term("non_torch") / GIB == pytest.approx(1.16 + 0.64, rel=0.02)
    assert gpu.term("graphs") / GIB == pytest.approx(0.93)
    assert found.gpu_memory_utilization == 0.85  # the server ran, with 0.53 GiB to spare


def test_the_pool_holds_weights_and_cache_and_the_rest_comes_on_top() -> None:
    plan = make_plan(case(parse_rig("4x RTX 3090"), Workload(16384)))
    assert plan.fits and plan.memory.gpu_memory_utilization is not None
    for gpu, kind in zip(plan.memory.gpus, plan.case.hardware.gpus, strict=True):
        beside = sum(t.n_bytes for t in gpu.terms if t.name not in ("weights", "kv_cache"))
        pool = plan.memory.gpu_memory_utilization * (kind.limit_bytes - gpu.term("context"))
        assert gpu.term("weights") + gpu.term("kv_cache") <= pool + 1
        assert pool + beside <= kind.limit_bytes and gpu.limit_bytes == pytest.approx(pool + beside, abs=2)
    assert plan.largest_context == plan.memory.kv_capacity_tokens


def command_of(plan_case: Case) -> tuple[str, dict[str, str]]:
    """Comment and options of the plan's own command."""
    *comment, line = plan_commands(make_plan(plan_case))["sglang"].splitlines()
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    eager = [word for word in words if word == "--disable-cuda-graph"]
    rest = [word for word in words[3:] if word not in eager]
    return "\n".join(comment), dict(zip(rest[::2], rest[1::2], strict=True)) | dict.fromkeys(eager, "")


def test_the_command() -> None:
    work = Workload(65536, kv_dtype="fp8_e5m2", max_num_seqs=8, prefill_chunk=1024, gpu_memory_utilization=0.8)
    comment, options = command_of(case(parse_rig("4x RTX 3090"), work))
    overrides = json.loads(options.pop("--json-model-override-args"))
    assert comment == "" and options == {
        "--model-path": "CHECKPOINT",
        "--tp-size": "1",
        "--pp-size": "4",
        "--context-length": "65536",
        "--mem-fraction-static": "0.8",
        "--kv-cache-dtype": "fp8_e5m2",
        "--max-running-requests": "8",
        "--chunked-prefill-size": "1024",
    }
    assert overrides["rope_scaling"]["factor"] == 2.0
    # SGLang takes the longest context from max_position_embeddings where rope_scaling names the original
    assert overrides["max_position_embeddings"] == 65536


def test_escapes_speak_of_its_own_flags() -> None:
    plan = make_plan(case(parse_rig("2x RTX 3090"), Workload(8192)))
    assert not plan.fits and plan.instead[0].startswith("--mem-fraction-static 0.9")
    longer = make_plan(case(parse_rig("2x RTX 3090"), Workload(65536)))
    assert any("--context-length" in text and "--kv-cache-dtype fp8_e4m3" in text for text in longer.instead)
    comment, options = command_of(longer.case)
    assert longer.instead[0] in comment
    work = Workload(
        int(options["--context-length"]),
        kv_dtype=options["--kv-cache-dtype"],
        gpu_memory_utilization=float(options["--mem-fraction-static"]),
        enforce_eager="--disable-cuda-graph" in options,
        max_num_seqs=int(options["--max-running-requests"]),
    )
    shares = rank_shares(B72, int(options["--tp-size"]), int(options["--pp-size"]))
    assert estimate(replace(longer.case, work=work), shares).fits


def test_a_plan_of_another_engine_can_be_served_too() -> None:
    work = Workload(8192, kv_dtype="fp8")
    plan = make_plan(replace(case(parse_rig("4x RTX 3090"), work), engine=OWN))
    assert "sglang" not in plan_commands(plan)
    assert SGLANG.command(plan).endswith("--kv-cache-dtype fp8_e4m3")


def test_the_pool_is_a_part_of_what_is_free() -> None:
    """With 4 GiB held by others SGLang counts its fraction of the rest, unlike vLLM, whose part is of the whole GPU."""
    rig = parse_rig("4x RTX 3090")
    alone, beside = (estimate(case(r, Workload(8192, gpu_memory_utilization=0.7)), rank_shares(B72, 1, 4))
                     for r in (rig, reserved(rig, 4 * GIB)))  # fmt: skip
    assert alone.gpu_memory_utilization == beside.gpu_memory_utilization == 0.7
    first, second = (found.gpus[0].limit_bytes or 0 for found in (alone, beside))
    assert first - second == pytest.approx(0.7 * 4 * GIB, abs=2)


def test_the_longest_context_is_of_the_layout_that_has_it() -> None:
    spec = model("Qwen2.5-32B")
    asked = case(parse_rig("4x RTX 4090"), Workload(8192), spec, recipe_weights(spec, Recipe(None)))
    each = [option.longest_context(asked) for option in parallel_options(asked)]
    assert SGLANG.longest_context(asked) == max(each) == each[1] > each[0]
    long = asked.at(spec.extended_context)  # no layout fits there: any is tried
    assert SGLANG.how_held(long) == "" and SGLANG.longest_context(long) == max(each)
