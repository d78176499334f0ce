"""Solving for sensitivities on a GPU, without one: what the real code would allocate, over fake tensors.

Rounding is left out: it takes time and little memory. The backward pass needs a GPU that is there.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from fake_gpus import FakeGpus
from test_quantize_cuda import layer, of
from torch import Tensor

from qwenq.formats.base import get_format
from qwenq.pipeline.fisher import Probe, _errors
from qwenq.pipeline.preflight import errors_bytes
from qwenq.pipeline.ranks import ALONE
from qwenq.pipeline.workers import Workers
from qwenq.planning.sensitivity import schemes_for
from qwenq.runtime.synthetic import synthetic_config
from qwenq.solver import gptq
from qwenq.solver.grid import Grid


def rounded(
    e_IO: Tensor, h_II: Tensor, grid: Grid, products: torch.dtype
) -> tuple[Tensor, gptq._GroupParameters]:
    columns, rows = e_IO.shape
    parameters = gptq._GroupParameters(columns // grid.group_width(columns), rows)
    for group in range(parameters.groups):
        parameters.put(group, slice(None), (e_IO.new_empty(1, rows), e_IO.new_empty(1, rows)))
    return torch.empty_like(e_IO, dtype=torch.uint8), parameters


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", pytest.param("Qwen2.5-72B", marks=pytest.mark.slow)])
def test_a_layer_is_solved_in_what_the_dry_run_says(name: str) -> None:
    spec = of(name)
    with patch.object(gptq, "_solve_gptq", rounded), FakeGpus(["H200"]) as fake, torch.no_grad():
        workers = Workers(
            synthetic_config(spec), spec, dtype=torch.bfloat16, window_tokens=512, devices=("cuda:0",), most=1
        )
        workers.fill(layer(spec)[0])
        gpu = fake.allocators[0]
        before = gpu.allocated
        h_NTH = torch.empty(16, 512, spec.hidden_size, dtype=torch.bfloat16)
        errors, _ = _errors(workers, h_NTH, ALONE.share(range(16)), Probe(h_NTH, h_NTH, {}))
        held = gpu.allocated - before
    offered = {stage: schemes_for(spec, (0, stage), get_format("gptq")) for stage in ("qkv", "o", "gate_up", "down")}
    assert {stage: len(by_scheme) for stage, by_scheme in errors.items()} == {
        stage: sum(scheme.bits == 4 for scheme in schemes) for stage, schemes in offered.items()
    }
    kinds = {(e.device.type, e.dtype) for rows in errors.values() for row in rows.values() for e in row.values()}
    assert kinds == {("cpu", torch.bfloat16)}
    assert held < 20 << 20, "cuBLAS' workspace and position embeddings stay; no Hessian and no error does"
    predicted = errors_bytes(spec, 512, 2)
    assert 0.85 < gpu.allocated_peak / predicted < 1.01
