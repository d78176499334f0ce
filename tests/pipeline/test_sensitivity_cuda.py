"""Measuring sensitivities on a GPU, without one: what the real code would allocate, over fake tensors.

Rounding is left out: it takes time and little memory. The backward pass needs a GPU that is there.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fake_gpus import FakeGpus
from test_quantize_cuda import layer, of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from qwenq.formats.base import get_format
from qwenq.pipeline.config import PROBE_TOKENS, PROBE_WINDOWS, SAMPLES
from qwenq.pipeline.fisher import Probe, _errors, sampled_gradients
from qwenq.pipeline.preflight import errors_bytes, gradients_bytes
from qwenq.pipeline.ranks import ALONE
from qwenq.pipeline.shares import Share
from qwenq.pipeline.workers import Workers
from qwenq.planning.sensitivity import schemes_for
from qwenq.runtime.synthetic import synthetic_config
from qwenq.solver import gptq
from qwenq.solver.grid import Grid


class Held(TorchDispatchMode):
    """Counts bytes of the tensors that are made under it, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.give, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def give(self, n_bytes: int) -> None:
        self.now -= n_bytes


@pytest.mark.parametrize(("hidden", "ranks"), [(896, 1), (8192, 1), (896, 8)])
def test_gradients_at_the_head_take_what_the_dry_run_says(hidden: int, ranks: int) -> None:
    """Two slices of the head: the second is read while the first one's logits are held."""
    spec = replace(of("Qwen2.5-0.5B"), hidden_size=hidden, vocab_size=8192)
    with FakeTensorMode(), torch.no_grad():
        norm = Qwen2RMSNorm(hidden)
        network: Any = SimpleNamespace(device=torch.device("cpu"), final_norm=lambda x, weight: norm(x))
        head: Any = SimpleNamespace(
            checkpoint=SimpleNamespace(spec=spec), norm=None, rows=lambda start, stop: torch.empty(stop - start, hidden)
        )
        h_NTH = torch.empty(PROBE_WINDOWS // ranks, PROBE_TOKENS, hidden, dtype=torch.bfloat16)
        share = Share((range(PROBE_WINDOWS),), 0, ranks)
        with Held() as held:
            sampled_gradients(network, head, h_NTH, SAMPLES, 0, share)
    assert 0.95 < (held.peak - h_NTH.nbytes) / gradients_bytes(spec, ranks) <= 1.001  # h itself is the caller's


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
