"""An engine that nobody has, added in a few lines: estimated, planned, recommended, on the page, and gone again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import ClassVar

import pytest

from qwenq.planning.case import Case, Share
from qwenq.planning.engines.base import ENGINES, LayeredEngine, ServerEngine, register
from qwenq.planning.memory import Term
from qwenq.planning.placement import ParallelOption
from qwenq.planning.plan import Plan
from qwenq.planning.rig import Gpu
from qwenq.planning.speed import SpeedFit
from qwenq.planning.weights import Weights
from tests.conftest import run

GIB = 1 << 30


class Abacus(LayeredEngine):
    """Weights, cache and half a GiB."""

    name = "abacus"
    latest = (3, 1)
    kv_dtypes: ClassVar = {"auto": 2.0, "beads": 0.5}
    smaller_kv = "beads"
    own_chunk = 64

    def terms(self, case: Case, share: Share, gpu: Gpu) -> tuple[tuple[Term, ...], str]:
        layers = sum(case.weights.layer_bytes[layer] for layer in share.layers)
        ends = sum(case.weights.embed) * share.embed + sum(case.weights.norm + case.weights.head) * share.head
        kv = round(2 * len(share.layers) * case.spec.kv_size * case.kv_bytes * case.work.context * case.work.batch)
        terms = (
            Term("weights", layers + ends, "exact", "shapes"),
            Term("kv_cache", kv, "exact", "beads"),
            Term("context", GIB // 2, "reported", "counted on fingers"),
        )
        return terms, "always"

    def speed_fit(self, weights: Weights) -> SpeedFit:
        return SpeedFit(1e-3, 0, 1.0, 0.5, 2.0, "by hand")

    def command(self, plan: Plan) -> str:
        return f"abacus --beads {plan.case.work.context}"


class Choir(ServerEngine):
    """Ranks that sing: a part of each GPU for weights and cache, a GiB on top."""

    name = "choir"
    title = "Choir"
    latest = (1,)
    kv_dtypes: ClassVar = {"auto": 2.0, "fp8": 1.0}
    smaller_kv = "fp8"
    inside = ("weights",)
    outside = ("context",)
    utilization_flag = "--loudness"
    context_flag = "--verses"

    def own_part(self, case: Case, share: Share, gpu: Gpu) -> float:
        return 0.8

    def terms(self, case: Case, share: Share, gpu: Gpu) -> tuple[tuple[Term, ...], str]:
        weights = Term("weights", self.rank_weights(case, share), "exact", "cut by rank")
        kv = Term("kv_cache", self.cache_bytes(case, share), "exact", "a verse a token")
        return (weights, kv, Term("context", GIB, "reported", "breath")), "crescendo"

    def speed_fit(self, weights: Weights) -> SpeedFit:
        return SpeedFit(1e-4, 1e-5, 1.0, 0.5, 2.0, "by ear")

    def words(self, case: Case, option: ParallelOption, checkpoint: str) -> list[str]:
        return ["choir", checkpoint, self.context_flag, str(case.work.context), "--voices", str(option.tensor)]


class Unison(Choir):
    """A choir without stages: all voices in every layer."""

    name = "unison"
    title = "Unison"
    stages = False


@pytest.fixture(autouse=True)
def engines() -> Iterator[None]:
    added = (Abacus, Choir, Unison)
    for engine in added:
        register(engine)
    yield
    for engine in added:
        del ENGINES[engine.name]


def said(*words: str, code: int = 0) -> str:
    found = run(*words)
    assert found.exit_code == code, found.output
    return found.stdout


def test_a_layered_engine_is_estimated_and_planned() -> None:
    rows = json.loads(said("vram", "Qwen2.5-7B", "--engine", "abacus", "-c", "4k,8k", "--json"))["estimates"]
    assert rows[1]["total_bytes"] - rows[0]["total_bytes"] == 4096 * 2 * 28 * 512 * 2
    assert rows[0]["engine"] == "abacus 3.1" and rows[0]["gpus"][0]["peak_moment"] == "always"
    asked = ("Qwen2.5-72B", "--engine", "abacus", "--gpu", "2x RTX 3090", "--json")
    plan = json.loads(said("plan", *asked))
    assert plan["fits"] and plan["flags"]["abacus"] == "abacus --beads 8192"
    assert [len(range(*gpu["layers"])) for gpu in plan["placement"]["gpus"]] == [40, 40]
    longer = json.loads(said("plan", *asked, "-c", str(plan["largest_context"] + 1), code=3))
    assert longer["largest_context"] == plan["largest_context"]
    assert any(text.startswith("--kv-cache-dtype beads") for text in longer["instead"])


def test_a_server_is_planned_with_its_own_flags() -> None:
    asked = ("Qwen2.5-72B", "--engine", "choir", "--gpu", "4x RTX 3090", "--bits", "4")
    plan = json.loads(said("plan", *asked, "--json"))
    assert plan["fits"] and plan["parallel"][-1]["fits"] and plan["placement"] is None
    assert plan["flags"]["choir"] == "choir CHECKPOINT --verses 8192 --voices 1"
    text = said("plan", *asked, "-c", "128k", code=3)
    assert "--loudness 0." in text and "--verses" in text and "Choir, tensor x pipeline parallel:" in text


def test_a_server_without_stages_has_all_ranks_side_by_side() -> None:
    asked = ("Qwen2.5-7B", "--gpu", "4x RTX 3090", "--json", "--engine")
    options = json.loads(said("plan", *asked, "unison"))["parallel"]
    assert [(o["tensor_parallel_size"], o["possible"]) for o in options] == [(4, True), (2, False), (1, False)]
    assert {o["verdict"] for o in options[1:]} == {"no: Unison has no pipeline parallelism"}
    assert all(o["possible"] for o in json.loads(said("plan", *asked, "choir"))["parallel"])
    ranks = ("Qwen2.5-7B", "--gpu", "4x RTX 3090", "--engine", "unison", "--tensor-parallel-size")
    said("vram", *ranks, "4")
    refused = run("vram", *ranks, "2")
    assert refused.exit_code == 1 and "4 GPUs would be 2 stages, Unison has none" in refused.stderr


def test_shapes_that_cannot_be_cut_leave_a_server_without_stages_no_layout() -> None:
    """The 72B at 4 bits in groups of 128: its FFN is not cut in two or four, and stages are out."""
    asked = ("Qwen2.5-72B", "--gpu", "4x RTX 3090", "--bits", "4", "--json", "--engine")
    assert json.loads(said("plan", *asked, "choir"))["fits"]
    plan = json.loads(said("plan", *asked, "unison", code=3))
    assert not any(option["possible"] for option in plan["parallel"])


def test_it_is_offered_where_engines_are_offered() -> None:
    from qwenq.page.app import Ask, answer, choices, recommended

    assert {"abacus", "choir"} <= set(choices()["engines"])
    ask = Ask(model="Qwen2.5-7B", engine="abacus", kv_cache_dtype="beads")
    assert "--engine abacus" in answer(ask)["command"] and recommended(ask)
    missing = run("vram", "Qwen2.5-7B", "--engine", "organ")
    assert missing.exit_code == 2 and "abacus, choir" in missing.stderr
