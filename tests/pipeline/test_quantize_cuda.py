"""Quantizing a layer on GPUs, without one: the real code over fake tensors, and what it would allocate.

Rounding column by column is left out: it takes time and no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fake_gpus import Allocator, FakeGpus
from families import model

from qwenq.formats.base import Recipe, Scheme, get_format
from qwenq.model.layer import Network
from qwenq.model.spec import ModelSpec
from qwenq.pipeline import monitor as clock_module
from qwenq.pipeline import workers as workers_module
from qwenq.pipeline.activations import LayerRunner
from qwenq.pipeline.block import BlockSolver, CalibrationStates, SolverOptions, round_block
from qwenq.pipeline.config import Tokens, original_windows
from qwenq.pipeline.monitor import StageClock
from qwenq.pipeline.preflight import gpu_state_bytes, peak_bytes, scratch_width
from qwenq.pipeline.ranks import ALONE
from qwenq.pipeline.shares import passes
from qwenq.pipeline.workers import Workers
from qwenq.runtime.synthetic import synthetic_config
from qwenq.solver import gptq
from qwenq.solver import parallel as rows
from qwenq.solver.equalize import FoldedLayer
from qwenq.solver.gptq import round_rows
from qwenq.solver.grid import IntegerGrid

LENGTH = 512


def of(name: str) -> ModelSpec:
    return replace(model(name), num_hidden_layers=1)


def one_after_the_other(calls: list[Callable[[], Any]]) -> list[Any]:
    """Fake tensors are a matter of one thread."""
    return [call() for call in calls]


def layer(spec: ModelSpec) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A layer's tensors in host memory, and those that are not weights of linears."""
    prefix = spec.layer_prefix(0)
    state = {
        t.name.removeprefix(prefix): torch.empty(t.shape, dtype=torch.bfloat16) for t in spec.layer_tensors(0)
    }
    weights = {lin.path + ".weight" for lin in spec.layer_linears(0)}
    return state, {name: tensor for name, tensor in state.items() if name not in weights}


def traced_layer(
    spec: ModelSpec, recipe: Recipe, gpus: list[str], windows: int, correction: float, states_there: bool = False
) -> tuple[list[Allocator], int, dict[str, torch.Tensor]]:
    """Quantize a layer: what each GPU's allocator saw, the dry run's prediction in bytes, and the packed tensors."""
    tokens = Tokens(windows, 4, LENGTH, calibration_bytes=2, **({} if correction else {"error_correction_share": 0.0}))
    count = original_windows(spec, windows, LENGTH, tokens.error_correction_share)
    with ExitStack() as stack:
        for module in (workers_module, rows):
            stack.enter_context(patch.object(module, "side_by_side", one_after_the_other))
        stack.enter_context(patch.object(gptq.ColumnSolver, "__call__", lambda *operands: None))
        fake = stack.enter_context(FakeGpus(gpus))
        stack.enter_context(torch.inference_mode())
        devices = [f"cuda:{index}" for index in range(len(gpus))]
        held = Workers(synthetic_config(spec), spec, dtype=torch.bfloat16, window_tokens=LENGTH, devices=devices)
        state, kept = layer(spec)
        held.fill(state)
        place = devices[0] if states_there else "cpu"
        hidden = torch.empty(windows, LENGTH, spec.hidden_size, dtype=torch.bfloat16, device=place)
        scratch = torch.empty(windows * LENGTH * scratch_width(spec), dtype=torch.bfloat16, device=place)
        share, corrected = ALONE.share(*passes(windows, count)), ALONE.share(*passes(count, count))
        states = CalibrationStates(hidden, hidden[:count].clone() if count else None, scratch, share, corrected)
        folded = FoldedLayer(state, kept, devices[0])
        options = SolverOptions(error_correction=correction)
        packed, _ = BlockSolver(held, spec, 0, recipe, folded, states, options, StageClock()).run()
        predicted = peak_bytes(spec, tokens, 2, on_gpu=True)[1]
        return fake.allocators, predicted + (gpu_state_bytes(spec, tokens) if states_there else 0), packed


@pytest.mark.parametrize(
    ("name", "gpus", "correction"),
    [
        ("Qwen2.5-0.5B", 1, 1.0),
        pytest.param("Qwen2.5-0.5B", 1, 0.0, marks=pytest.mark.slow),
        pytest.param("Qwen3-0.6B", 1, 1.0, marks=pytest.mark.slow),
        pytest.param("Qwen2.5-3B", 1, 0.0, marks=pytest.mark.slow),
        pytest.param("Qwen2.5-1.5B", 2, 1.0, marks=pytest.mark.slow),
    ],
)
def test_a_layer_takes_what_the_dry_run_says(name: str, gpus: int, correction: float) -> None:
    spec, recipe = of(name), Recipe(Scheme(4, 128))
    allocators, predicted, packed = traced_layer(spec, recipe, ["RTX 3090"] * gpus, 16, correction)
    assert {tensor.device.type for tensor in packed.values()} == {"cpu"}
    stored = {t.name for lin in spec.layer_linears(0) for t in recipe.linear_tensors(lin)}
    assert set(packed) == {name for name in stored if not name.endswith(".bias")}
    peaks = [allocator.allocated_peak for allocator in allocators]
    assert 0.85 < max(peaks) / predicted < 1.01, (peaks, predicted)
    assert min(peaks) > 0.5 * max(peaks)  # no GPU idles


@pytest.mark.slow
def test_a_layer_whose_hidden_states_stay_on_the_gpu_takes_what_the_dry_run_says() -> None:
    spec, recipe = of("Qwen2.5-0.5B"), Recipe(Scheme(4, 64))
    (allocator,), predicted, packed = traced_layer(spec, recipe, ["RTX 3090"], 16, 1.0, states_there=True)
    assert {tensor.device.type for tensor in packed.values()} == {"cpu"}
    assert 0.85 < allocator.allocated_peak / predicted < 1.01, (allocator.allocated_peak, predicted)


def test_a_layer_read_back_on_its_gpu_takes_no_more_than_the_dry_run_says() -> None:
    """As `--resume` replays it: dequantized to float32, and calibration states sent through it."""
    spec, windows = of("Qwen3-0.6B"), 32
    predicted = peak_bytes(spec, Tokens(windows, 1, LENGTH, 2, error_correction_share=0.0), 2, on_gpu=True)[1]
    with FakeGpus(["RTX 3090"]) as fake, torch.inference_mode(), patch.object(Network, "release"):  # no fake is swapped
        held = Workers(synthetic_config(spec), spec, dtype=torch.bfloat16, window_tokens=LENGTH, devices=["cuda:0"])
        states = torch.empty(windows, LENGTH, spec.hidden_size, dtype=torch.bfloat16)
        share = ALONE.share(range(windows))
        runner = LayerRunner({"calibration": states}, {"calibration": share}, {"calibration": held})
        prefix = spec.layer_prefix(0)
        runner.advance(
            {t.name.removeprefix(prefix): torch.empty(t.shape, device="cuda:0") for t in spec.layer_tensors(0)},
            "calibration",
        )
    assert 0.85 < fake.allocators[0].allocated_peak / predicted < 1, (fake.allocators[0].allocated_peak, predicted)


def test_stages_wait_for_what_gpus_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's work is done 5 s after it was given: these belong to the stage that gave it."""
    now = {"now": 100.0}
    given: dict[int, float] = {}
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now["now"])

    def wait(device: torch.device) -> None:
        now["now"] = max(now["now"], given.pop(device.index, 0.0) + 5)

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    clock = StageClock(["cuda:0", "cuda:1"])
    given[1] = now["now"]
    with clock.time("whole"):  # what was given before the stage is not its own
        given[0] = now["now"]
        with clock.time("part"):
            given[1] = now["now"]
            now["now"] += 1
        with clock.time_in_worker("worker", of="whole", workers=2, device=torch.device("cuda:1")):
            given[1] = now["now"]
    assert clock.seconds == {"part": 5.0, "worker": 2.5, "whole": 7.5}
    quiet = StageClock(["cpu"])
    with quiet.time("part"):
        given[0] = now["now"]
    assert quiet.seconds == {"part": 0.0} and given


def test_linear_algebra_is_loaded_before_gpus_ask_for_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows._load_linalg.cache_clear()
    asked: list[str] = []
    real = torch.linalg.cholesky_ex

    def cholesky(x: torch.Tensor) -> Any:
        asked.append(str(x.device) if x.numel() == 1 else "work")
        return real(x)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky)
    monkeypatch.setattr(rows, "side_by_side", one_after_the_other)
    monkeypatch.setattr(gptq.ColumnSolver, "__call__", lambda *operands: None)
    for _ in range(2):
        with FakeGpus(["RTX 3090", "RTX 3090"]):
            devices = [torch.device(f"cuda:{k}") for k in range(2)]
            weights = {"w": torch.empty(128, 64, device=devices[0])}
            h_II, shares = torch.empty(64, 64, device=devices[0]), rows.cut_rows({"w": 128}, 2)
            rows.solve_rows(devices, weights, h_II, IntegerGrid(4, 64), shares)
    assert asked == ["cuda:0", "cuda:1", *["work"] * 4], "on each, before any work, and once a process"


def test_rounding_to_nearest_stays_on_its_gpu() -> None:
    spec, recipe = of("Qwen2.5-0.5B"), Recipe(Scheme(4, 64))
    with FakeGpus(["RTX 3090", "RTX 3090"]) as fake:
        state, kept = layer(spec)
        folded = FoldedLayer(state, kept, "cuda:1")
        packed, results = round_block(spec, 0, recipe, folded)
        assert fake.allocators[0].allocated_peak == 0 < fake.allocators[1].allocated_peak
    assert len(results) == 7 and {tensor.device.type for tensor in packed.values()} == {"cpu"}


@pytest.mark.parametrize(
    "mixture", ["Q4_K_M", pytest.param("Q2_K", marks=pytest.mark.slow), pytest.param("IQ4_XS", marks=pytest.mark.slow)]
)
def test_ggufs_types_are_solved_and_packed_on_their_gpu(mixture: str) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 32}
    spec, form = replace(of("Qwen2.5-0.5B"), **shape), get_format("gguf")
    recipe = form.mixture(mixture, spec)
    _, _, packed = traced_layer(spec, recipe, ["RTX 3090"], 4, 0.0 if mixture == "Q4_K_M" else 1.0)
    stored = {t.name: t for lin in spec.layer_linears(0) for t in recipe.linear_tensors(lin)}
    assert set(packed) == {name for name in stored if not name.endswith(".bias")}
    for name, tensor in packed.items():
        assert tensor.dtype == torch.uint8 and tensor.nbytes == stored[name].nbytes, name
    outer = spec.outer_linears[0]
    scheme = recipe.outer_scheme(outer)
    assert scheme is not None
    with FakeGpus(["RTX 3090"]):
        rows = round_rows(torch.empty(64, outer.in_features, device="cuda:0"), scheme.grid())
        assert form.pack(rows)["weight"].device == torch.device("cuda", 0)
        assert rows.dequantize().shape == (64, outer.in_features)
