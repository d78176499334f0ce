"""Triton kernels without a GPU: their layout against loops, their choice and fallbacks, and themselves interpreted.

Triton's interpreter computes in float32 and float16 only, and where triton is not installed those tests are skipped;
the others then import the kernels over a stand-in for it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from families import model as family
from random_codes import random_q
from torch import Tensor, nn

from qwenq import machine
from qwenq.formats.base import PackedShape, Recipe, Scheme
from qwenq.formats.gguf import Blocks
from qwenq.io.gguf import TYPES
from qwenq.machine import Compute
from qwenq.planning.kernels import Choice, choose, compute_on, kept_bytes
from qwenq.planning.placement import host_map
from qwenq.planning.rig import known_gpu
from qwenq.runtime import decode, generate, linear
from qwenq.runtime.cache import KvCache
from qwenq.runtime.cpu_kernels import KernelRefused
from qwenq.runtime.decode import DecodeStep
from qwenq.runtime.generate import Session, Timing
from qwenq.runtime.linear import BlockLinear, pack_codes, packed_linear, unpack_codes
from qwenq.runtime.model import RunningModel, build_model
from qwenq.runtime.synthetic import SyntheticWeights, synthetic_config
from qwenq.solver.grid import QTensor
from qwenq.units import GIB

NAME = "qwenq.runtime.triton_kernels"
HERE = find_spec("triton") is not None
interpreted = pytest.mark.skipif(not HERE, reason="triton is not installed: its kernels are not interpreted")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter
CPU = torch.device("cpu")


def stand_in() -> ModuleType:
    """As much of triton as importing the kernels takes."""
    triton, language = ModuleType("triton"), ModuleType("triton.language")

    def jit(function: Any = None, **options: Any) -> Any:
        return function if function is not None else lambda decorated: decorated

    class TritonError(Exception):
        pass

    triton.__spec__ = ModuleSpec("triton", None)
    triton.__dict__.update(jit=jit, TritonError=TritonError, language=language)
    language.__dict__["constexpr"] = lambda value: value
    return triton


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of kernels, interpreted where triton is there."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    if not HERE:
        triton = stand_in()
        monkeypatch.setitem(sys.modules, "triton", triton)
        monkeypatch.setitem(sys.modules, "triton.language", triton.language)
    module = importlib.import_module(NAME)
    monkeypatch.setattr("qwenq.runtime.triton_kernels", module, raising=False)
    yield module
    sys.modules.pop(NAME, None)


def shape_of(q: QTensor) -> PackedShape:
    outputs, inputs = q.codes_OI.shape
    return PackedShape(q.integers.bits, q.grid.group_width(inputs), outputs, inputs, q.integers.sym)


def error_of(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# ---------------------------------------------------------------------- layout


def test_a_unit_packed_by_hand() -> None:
    """Word u of a unit holds columns u, 8 + u, 16 + u and 24 + u from its low bits up."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, [0, 8, 16, 24]] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    codes[0, [7, 31]] = torch.tensor([15, 9], dtype=torch.uint8)
    packed = pack_codes(codes, 4)
    assert packed.tolist() == [[0x21, 0x43, *[0] * 12, 0x0F, 0x90]]


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (3, 64), (8, 192), (5, 448)])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_come_back(bits: int, outputs: int, inputs: int) -> None:
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (outputs, inputs * bits // 8) and packed.is_contiguous()
    assert torch.equal(unpack_codes(packed, bits), codes)
    if bits == 4:
        words = packed.view(torch.int16).int() & 0xFFFF
        for column in range(inputs):
            word = words[:, column // 32 * 8 + column % 8]
            assert torch.equal((word >> (column % 32 // 8 * 4)) & 15, codes[:, column].int())


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize(("bits", "group", "sym"), [(4, 32, True), (4, 128, False), (8, 64, True), (8, 256, False)])
def test_one_row_as_the_kernel_goes_through_it(bits: int, group: int, sym: bool, columns: int) -> None:
    """Block by block of columns, tile by tile of a word, group by group of a block: the product of the codes."""
    q, x = random_q(bits, group, 24, 512, sym), torch.randn(512).double()
    packed = pack_codes(q.codes_OI, bits)
    words, tiles = (packed.view(torch.int16).int() & 0xFFFF, 4) if bits == 4 else (packed.int(), 1)
    scales, shifts = q.scales_OG.double(), q.zeros_OG.double() - q.integers.zero
    t = torch.arange(columns // tiles)
    column = t // 8 * 32 + t % 8 if bits == 4 else t
    y = torch.zeros(24).double()
    for step in range(512 // columns):
        word = words[:, step * (columns // tiles) + t]
        for part in range(max(1, columns // group)):
            seen = t // (group // tiles) == part if columns > group else torch.ones(len(t), dtype=torch.bool)
            at, sums = step * columns // group + part, 0.0
            product = torch.zeros(24).double()
            for tile in range(tiles):
                code = ((word >> (4 * tile)) & 15) - 8 if bits == 4 else word - 128
                read = x[step * columns + column + 8 * tile] * seen
                product += code.double() @ read
                sums += float(read.sum())
            y += (product - sums * shifts[:, at]) * scales[:, at]
    assert error_of(y, q.dequantize().double() @ x) < 1e-6


# ---------------------------------------------------------------------- which linears


def test_which_linears_they_take() -> None:
    shape, ampere = PackedShape(4, 128, 1024, 4096, True), Compute("bfloat16", "cuda", (8, 6))
    assert choose(shape, ampere) == Choice("triton")
    assert choose(replace(shape, bits=8, group=4096), ampere) == Choice("triton")
    assert choose(replace(shape, out_features=1001), ampere) == Choice("triton"), "any number of outputs"
    assert choose(shape, replace(ampere, triton=False)) == Choice("int4", "Triton is not installed")
    assert choose(shape, replace(ampere, capability=(7, 5))).kind == "tiled"
    assert choose(shape, replace(ampere, dtype="float32")).kind == "tiled"
    assert choose(shape, replace(ampere, device="cpu")) == Choice("cpu")
    assert choose(shape, replace(ampere, device="cpu", compiler=False)) == Choice("int4")
    found = choose(replace(shape, group=32, in_features=4096 + 32), ampere)
    assert found.kind == "int4" and "4128 inputs in groups of 32" in found.reason


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 3090", "NVIDIA of another name"])
def test_a_plan_for_this_machine_knows_whether_triton_is_there(
    name: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's kernel is the one that loading takes on this rig."""
    monkeypatch.setattr(machine, "find_spec", lambda name: object() if there else None)
    planned = choose(PackedShape(8, 128, 1024, 4096, False), compute_on(known_gpu(name, 24 * GIB, (8, 6)), 2))
    assert planned.kind == ("triton" if there else "int4 halves")
    assert Compute("bfloat16", "cuda", (8, 6), machine.has_triton()) == compute_on(
        known_gpu(name, 24 * GIB, (8, 6)), 2
    )


# ---------------------------------------------------------------------- tilings


@pytest.mark.parametrize("limit", [48 << 10, 64 << 10, 99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_tilings_fit_the_gpus_shared_memory(kernels: Any, group: int, limit: int) -> None:
    for bits in (4, 8):
        for rows in (1, 16, 17, 64):
            for outputs, inputs in ((29568, 8192), (8192, 29568), (3584, 3584), (512, 896), (64, 192)):
                tiling = kernels.tiling_for(rows, outputs, inputs, bits)
                assert inputs % tiling.columns == 0, "columns that do not divide the inputs give wrong results"
                steps = kernels.ladder(tiling, rows, bits, group, limit)
                assert steps and all(step.shared_bytes(rows, bits, group) <= limit for step in steps)
                assert all(inputs % step.columns == 0 for step in steps)
                if tiling.shared_bytes(rows, bits, group) <= limit:
                    assert steps[0] == tiling


def test_what_did_not_fit_an_h200_is_not_tried_there(kernels: Any) -> None:
    """64 rows in groups of 32 took 269,312 bytes of shared memory of 232,448."""
    tiling = kernels.Tiling(16, 128, 1, 2, 4)
    assert tiling.shared_bytes(64, 4, 32) > 232448
    assert tiling not in kernels.ladder(tiling, 64, 4, 32, 232448)


def test_the_smallest_tiling_is_tried_where_none_should_fit(kernels: Any) -> None:
    (only,) = kernels.ladder(kernels.Tiling(128, 128, 8, 4, 3), 1, 8, 128, 100)
    assert (only.outputs, only.columns, only.stages) == (16, 64, 1)


def test_columns_that_do_not_divide_the_inputs_are_refused(kernels: Any) -> None:
    codes, pairs = torch.zeros(64, 29568 // 2, dtype=torch.uint8), torch.zeros(2, 231, 64).half()
    with pytest.raises(ValueError, match="256 columns at a time do not divide 29568 inputs"):
        kernels.multiply(torch.zeros(1, 29568), codes, pairs, None, True, kernels.Tiling(64, 256))


def failing(kernels: Any, smallest: int, error: Callable[[str], Exception], tried: list[int]) -> Callable[[int], None]:
    def launch(size: int) -> None:
        tried.append(size)
        if size > smallest:
            raise error(f"out of resource: shared memory, Required: {size}\nmore")

    return launch


@pytest.mark.parametrize("kind", ["triton", "torch", "compiler"])
def test_a_kernel_that_cannot_be_launched_falls_back(kernels: Any, kind: str) -> None:
    triton_error = sys.modules["triton"].TritonError
    error = {"triton": triton_error, "torch": RuntimeError, "compiler": FileNotFoundError}[kind]
    tried: list[int] = []
    launch = failing(kernels, 2, error, tried)
    assert kernels.launched(("k", kind), [4, 3, 2, 1], launch) == 2 and tried == [4, 3, 2]
    assert kernels.launched(("k", kind), [4, 3, 2, 1], launch) == 2 and tried == [4, 3, 2, 2], "remembered"
    with pytest.raises(kernels.KernelRefused, match=r"^Triton kernel other: out of resource: .* Required: 3$"):
        kernels.launched(("other", kind), [4, 3], launch)


def test_memory_that_runs_out_is_not_a_refusal(kernels: Any) -> None:
    tried: list[int] = []
    with pytest.raises(torch.OutOfMemoryError):
        kernels.launched(("k",), [4, 3], failing(kernels, 2, torch.OutOfMemoryError, tried))
    assert tried == [4]


def test_a_refused_linear_goes_to_torchs_kernel_with_the_reason(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Tensor:
        raise kernels.KernelRefused("Triton kernel multiply: out of resource")

    def on_cuda(shape: PackedShape, compute: Compute) -> Choice:
        return choose(shape, replace(compute, device="cuda", triton=compute.triton))

    monkeypatch.setattr(machine, "find_spec", lambda name: object())
    monkeypatch.setattr(linear, "choose", on_cuda)
    monkeypatch.setattr(kernels, "multiply", refuse)
    q = random_q(4, 64, 64, 128, True)
    module, choice = packed_linear(q, shape_of(q), None, torch.bfloat16, CPU)
    assert choice == Choice("int4", "Triton kernel multiply: out of resource")
    x = torch.randn(2, 128).bfloat16()
    assert error_of(module(x), x.double() @ q.dequantize().double().T) < 0.01


# ---------------------------------------------------------------------- interpreted


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("bits", "group", "outputs", "inputs", "sym", "rows"),
    [
        (4, 128, 48, 256, True, 1), (4, 32, 40, 256, False, 3), (8, 64, 40, 256, True, 17), (8, 32, 32, 192, False, 1),
        (4, 256, 48, 512, False, 2), (8, -1, 24, 384, True, 5),
    ],
)  # fmt: skip
def test_products(
    kernels: Any, bits: int, group: int, outputs: int, inputs: int, sym: bool, rows: int, dtype: torch.dtype
) -> None:
    q, bias = random_q(bits, group, outputs, inputs, sym), torch.randn(outputs)
    module = linear.TritonLinear(q, bias, dtype, CPU)
    kept = [p.numel() * p.element_size() for name, p in module.named_parameters() if name != "bias"]
    assert sorted(kept) == sorted(kept_bytes(shape_of(q), "triton"))
    x, limit = torch.randn(rows, inputs).to(dtype), 1e-5 if dtype == torch.float32 else 1e-3
    wanted = x.double() @ q.dequantize().double().T + module.bias.double()
    assert error_of(module(x), wanted) < limit
    module.dense_from = 1
    assert error_of(module(x), wanted) < limit
    assert torch.equal(module.weight_rows(8, outputs), q.dequantize()[8:].T), "weights written out are exact"


@interpreted
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_splits_that_columns_do_not_fill(kernels: Any, splits: int) -> None:
    q = random_q(4, 64, 48, 448, False)
    module, x = linear.TritonLinear(q, None, torch.float32, CPU), torch.randn(2, 448)
    tiling = kernels.Tiling(16, 64, splits)
    got = kernels.multiply(x, module.codes, module.pairs, None, False, tiling)
    assert error_of(got, x.double() @ q.dequantize().double().T) < 1e-5


@interpreted
def test_a_row_count_no_tiling_takes_is_written_out(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_q(4, 64, 48, 128, True)
    module, x = linear.TritonLinear(q, torch.randn(48), torch.float32, CPU), torch.randn(3, 128)
    wanted = module(x)

    def refuse(*args: Any) -> Tensor:
        raise kernels.KernelRefused("Triton kernel multiply: no")

    monkeypatch.setattr(kernels, "multiply", refuse)
    with pytest.warns(RuntimeWarning, match="weights dequantized from 3 rows on: Triton kernel multiply: no"):
        assert error_of(module(x), wanted) < 1e-5
    assert module.dense_from == 3


@interpreted
@pytest.mark.parametrize("length", [1, 70, 200])
def test_attention_of_one_token(kernels: Any, length: int) -> None:
    q, (k, v) = torch.randn(6, 64), torch.randn(2, 1, 2, 200, 64)
    got = kernels.attend_one(q, (k, v), torch.tensor([length], dtype=torch.int32), 0.125, parts=8)
    k_H, v_H = (x[0, :, :length].double().repeat_interleave(3, 0) for x in (k, v))
    scores = torch.einsum("hd,hsd->hs", q.double(), k_H) * 0.125
    assert error_of(got, torch.einsum("hs,hsd->hd", torch.softmax(scores, -1), v_H)) < 1e-5


def built(name: str) -> RunningModel:
    spec = family(
        name, num_hidden_layers=2, vocab_size=256, hidden_size=128, intermediate_size=192, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    source = SyntheticWeights(spec, Recipe(Scheme(4, 64)))
    return build_model(source, synthetic_config(spec), spec, host_map(spec), dtype=torch.float32)


@interpreted
@pytest.mark.parametrize("kept", [None, torch.float16])
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen3-0.6B"])
def test_a_step_is_that_of_transformers_modules(kernels: Any, name: str, kept: torch.dtype | None) -> None:
    """Logits of three tokens behind a prompt, with norms of heads and biases."""
    model = built(name)
    cache = KvCache([CPU] * 2, 32, model.spec.num_key_value_heads, model.spec.head_dim, kept or torch.float32)
    tokens = [5, 7, 100]
    with torch.inference_mode():
        model.network(torch.randint(0, 256, (1, 9)), past_key_values=cache, use_cache=True)
        step = DecodeStep(model, cache, kernels)
        step.graphed = False
        got = [step(token).clone() for token in tokens]
        assert cache.get_seq_length() == 12
        cache.crop(9)
        for token, logits in zip(tokens, got, strict=True):
            out = model.network(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            assert error_of(logits, out.logits[0, -1]) < (1e-5 if kept is None else 1e-4)


# ---------------------------------------------------------------------- fallbacks of a step


class Refusing:
    """A step whose kernels are refused once it has counted its token."""

    def __init__(self, model: RunningModel, cache: KvCache) -> None:
        self.cache, self.graphed, self.reason = cache, True, ""

    def __call__(self, token: int) -> Tensor:
        self.cache.make_room()
        raise KernelRefused("Triton kernel attend_one: no tiling")


def test_a_refused_step_goes_on_with_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("Qwen2.5-0.5B")
    plain = Session(model, 32)
    plain.prefill([1, 2, 3], Timing())
    wanted = plain.forward([4])
    assert plain.decoding == "transformers' modules: the CPU kernels need activations and a cache in bfloat16"
    monkeypatch.setattr(generate, "why_not", lambda model, kept: "")
    monkeypatch.setattr(generate, "DecodeStep", Refusing)
    session = Session(model, 32)
    session.prefill([1, 2, 3], Timing())
    with pytest.warns(RuntimeWarning, match="tokens by transformers' modules: Triton kernel attend_one: no tiling"):
        assert torch.equal(session.forward([4]), wanted)
    assert session.decoding == "transformers' modules: Triton kernel attend_one: no tiling"
    assert torch.equal(session.forward([5]), plain.forward([5])), "the cache holds each token once"


@contextmanager
def capture(error: Exception | None) -> Iterator[None]:
    yield
    if error is not None:
        raise error


class Graph:
    def replay(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "falls_back"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("operation not permitted when stream is capturing"), False), (None, False),
    ],
)  # fmt: skip
def test_no_memory_for_a_graph(
    kernels: Any, error: Exception | None, falls_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built("Qwen2.5-0.5B")
    cache = KvCache([CPU] * 2, 32, 1, 8, torch.float32)
    for name, value in {
        "device": lambda device: nullcontext(), "current_stream": lambda: None, "CUDAGraph": Graph,
        "graph": lambda graph, **options: capture(error), "set_stream": lambda stream: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    step = DecodeStep(model, cache, kernels)
    monkeypatch.setattr(step, "_step", lambda: torch.ones(3))
    if error is not None and not falls_back:
        with pytest.raises(RuntimeError, match="not permitted"):
            [step(token) for token in range(5)]
        return
    assert [step(token).tolist() for token in range(5)] == [[1.0] * 3] * 5
    assert (step._graph is None) == falls_back
    assert step.reason == ("no memory for a CUDA graph" if falls_back else "")
    assert cache.get_seq_length() == 5


def test_no_graph_where_a_weight_is_dequantized_in_host_memory(kernels: Any) -> None:
    """A capture allows no copy from or to the host."""
    reasons = {}
    for kind in ("IQ4_XS", "IQ2_S"):
        model, found = built("Qwen2.5-0.5B"), TYPES[kind]
        data_OB = torch.zeros(64, 256 // found.values * found.n_bytes, dtype=torch.uint8)
        model.network.set_submodule("lm_head", BlockLinear(Blocks(kind, data_OB), None, torch.bfloat16, CPU))
        step = DecodeStep(model, KvCache([CPU] * 2, 32, 1, 8, torch.float32), kernels)
        reasons[kind] = step.graphed, step.reason
    assert reasons == {"IQ4_XS": (True, ""), "IQ2_S": (False, "IQ2_S is dequantized in host memory")}


def test_models_that_a_step_does_not_know() -> None:
    model = built("Qwen2.5-0.5B")
    assert decode.why_not(model, None) == "the CPU kernels need activations and a cache in bfloat16"
    assert decode.why_not(replace(model, device_map=model.device_map | {"lm_head": 0}), None) == (
        "layers outside GPU memory"
    )
    on_gpu = replace(model, device_map=dict.fromkeys(model.device_map, 0))
    network: Any = nn.Module()
    network.config = SimpleNamespace(hidden_act="gelu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "find_spec", lambda name: object())
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        known = replace(on_gpu, network=network, dtype=torch.bfloat16)
        assert decode.why_not(known, None) == "the layers of qwen2 with gelu"
        assert "bfloat16" in decode.why_not(on_gpu, None)
        patch.setattr(machine, "find_spec", lambda name: None)
        assert decode.why_not(known, None) == "Triton is not installed"
