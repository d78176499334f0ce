"""The CUDA paths without a GPU: the real code over fake tensors, torch checking shapes, dtypes and devices.

Values are not computed there (tinygemm's layout is checked against a packer written from its description), and what
happens inside kernels is not seen. What torch allocates is, and must be what the estimator predicts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fake_gpus import MIB, Allocator, FakeGpus
from families import model
from torch import Tensor

from qwenq.formats.base import PackedShape, Recipe, Scheme
from qwenq.formats.bitsandbytes import Nf4Blocks
from qwenq.formats.gguf import GGUF, Blocks, type_scheme
from qwenq.io.gguf import TYPES
from qwenq.machine import SCORE_BYTES, Compute
from qwenq.model.attention import causal_attention
from qwenq.model.spec import LinearSpec, ModelSpec
from qwenq.planning.kernels import ROW_BLOCK_BYTES, choose, kept_bytes, row_block_bytes, row_block_weights
from qwenq.planning.profile import MeasuredRow
from qwenq.planning.weights import allocated_bytes, recipe_weights
from qwenq.runtime import linear, measure
from qwenq.runtime.linear import Nf4Linear, packed_linear, tile_order
from qwenq.runtime.load import Loaded, LoadOptions, load_from
from qwenq.runtime.model import RunningModel
from qwenq.runtime.synthetic import SyntheticWeights, synthetic_config
from qwenq.solver.grid import QTensor

CPU = torch.device("cpu")


def of(name: str, layers: int, **changes: Any) -> ModelSpec:
    return model(name, num_hidden_layers=layers, **changes)


def loading(
    spec: ModelSpec, recipe: Recipe, context: int, source: type[SyntheticWeights] = SyntheticWeights, **options: Any
) -> AbstractContextManager[Loaded]:
    """A model as `qwenq vram measure --synthetic` loads it."""
    asked = LoadOptions(max_model_len=context, **options)
    return load_from(source(spec, recipe), recipe_weights(spec, recipe), synthetic_config(spec), spec, asked)


def traced(
    spec: ModelSpec, recipe: Recipe, gpus: list[str], contexts: list[int], capability: tuple[int, int] = (8, 6),
    **options: Any,
) -> tuple[list[MeasuredRow], RunningModel]:  # fmt: skip
    """Rows of `qwenq vram measure --synthetic`, and its model."""
    with FakeGpus(gpus, capability), loading(spec, recipe, max(contexts), **options) as found:
        rows, ended = measure.measure(found, recipe_weights(spec, recipe), contexts)
        assert not ended, ended
        return rows, found.model


def assert_counted(rows: list[MeasuredRow], percent: float = 1.0) -> None:
    """Each estimate is within so much of what was allocated."""
    for row in rows:
        assert abs(row.error_percent) < percent, (row.context, row.phase, row.device, f"{row.error_percent:+.2f} %")


FOUR, EIGHT = Recipe(Scheme(4, 64)), Recipe(Scheme(8, 64))
MIXED = Recipe(Scheme(4, 128), (("model.layers.1.mlp.down_proj", Scheme(8, 128)),))
CASES: list[tuple[str, ModelSpec, Recipe, dict[str, Any]]] = [
    ("4-bit", of("Qwen2.5-7B", 2, vocab_size=32768), FOUR, {}),
    ("8-bit", of("Qwen2.5-7B", 2, vocab_size=32768), EIGHT, {}),
    ("8-bit rows", of("Qwen2.5-7B", 2, vocab_size=32768), Recipe(Scheme(8, -1)), {}),
    ("mixed, fp8 cache", of("Qwen3-8B", 2, vocab_size=32768), MIXED, {"kv_dtype": "fp8"}),
    ("16-bit, tied", of("Qwen2.5-3B", 4), Recipe(None), {"prefill_chunk": 512}),
    ("short chunks", of("Qwen2.5-3B", 4), FOUR, {"prefill_chunk": 96}),
]
SLOW = ("8-bit", "8-bit rows")  # the mixed model has 8 bits too, and rows are of the row blocks below


@pytest.mark.parametrize(
    ("spec", "recipe", "options"),
    [pytest.param(*c[1:], id=c[0], marks=[pytest.mark.slow] if c[0] in SLOW else []) for c in CASES],
)
def test_the_estimate_is_what_torch_allocates(spec: ModelSpec, recipe: Recipe, options: dict[str, Any]) -> None:
    contexts = [200, 600] if options.get("prefill_chunk") == 96 else [600, 3000]
    rows, found = traced(spec, recipe, ["RTX 3090"], contexts, **options)
    assert {row.phase for row in rows} == {"prefill", "decode"} and set(found.device_map.values()) == {0}
    assert_counted(rows)
    assert all(row.reserved_bytes >= row.allocated_bytes for row in rows)


@pytest.mark.parametrize("kept", ["fp8", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_cache_of_another_dtype_is_counted_when_it_is_read_back(kept: str) -> None:
    spec = of("Qwen2.5-14B", 1, vocab_size=4096)  # 5 % of the 330 MiB are what is read back
    assert_counted(traced(spec, FOUR, ["RTX 3090"], [4000], prefill_chunk=512, kv_dtype=kept)[0], 2.0)


@pytest.mark.slow
def test_the_cache_leaves_no_holes() -> None:
    """Layers' caches made one by one between activations each spoil a block: 18 % more reserved than allocated here."""
    spec = of("Qwen2.5-7B", 12)
    rows, _ = traced(spec, FOUR, ["RTX 3090"], [32768], prefill_chunk=16384)
    decode = next(row for row in rows if row.phase == "decode")
    assert decode.reserved_bytes < 1.05 * decode.allocated_bytes


def test_two_gpus_are_both_used_and_activations_move() -> None:
    limit = 15 << 28  # which holds one of the layers
    rows, found = traced(of("Qwen2.5-72B", 2), FOUR, ["RTX 3060 12GB"] * 2, [512], gpu_memory=(limit, limit))
    places = found.device_map
    assert [places[f"model.layers.{layer}"] for layer in range(2)] == [0, 1] and places["lm_head"] == 1
    assert len({row.device for row in rows}) == 2
    assert all(row.allocated_bytes > 2 << 30 for row in rows)


def test_layers_in_host_memory_are_counted() -> None:
    """One GPU that holds half of the layers: the others come when their turn is, one at a time."""
    rows, found = traced(of("Qwen2.5-7B", 4), FOUR, ["RTX 3060 12GB"], [3000], gpu_memory=(49 << 26,))
    assert 1 < sum(place == "cpu" for place in found.device_map.values()) < 4
    assert_counted(rows)


def test_a_tensor_on_the_wrong_gpu_is_an_error() -> None:
    spec = of("Qwen2.5-3B", 1)
    with FakeGpus(["RTX 3090", "RTX 3090"]):
        source = SyntheticWeights(spec, FOUR)
        module, choice = source.linear(spec.layer_linears(0)[0], torch.bfloat16, torch.device("cuda", 1))
        assert choice is not None and choice.kind == "int4"
        assert module(torch.zeros(1, 2048, dtype=torch.bfloat16, device="cuda:1")).device == torch.device("cuda", 1)
        for rows in (1, 200):
            with pytest.raises(RuntimeError, match="same device"):
                module(torch.zeros(rows, 2048, dtype=torch.bfloat16, device="cuda:0"))


@pytest.mark.slow
def test_older_gpus_and_float32_are_counted_too() -> None:
    """No tinygemm, no flash kernel; FakeGpus refuses torch's own attention where it would write out all scores."""
    spec = of("Qwen2.5-7B", 2)
    for gpu, capability, dtype in (("Tesla T4", (7, 5), "auto"), ("RTX 3090", (8, 6), "float32")):
        rows, found = traced(spec, FOUR, [gpu], [600, 3000], capability, compute_dtype=dtype)
        assert found.kernels() == {"tiled": 14}
        (reason,) = found.fallbacks()
        assert ("capability" in reason) == (dtype == "auto") and ("float32" in reason) == (dtype == "float32")
        assert_counted(rows, 1.5)


@pytest.mark.slow
def test_what_older_gpus_copy_of_a_long_cache_is_counted() -> None:
    """Keys and values in float32, at a block of a prompt and at each new token."""
    rows, _ = traced(of("Qwen2.5-14B", 1), FOUR, ["Tesla T4"], [16_000], (7, 5), prefill_chunk=512)
    for row in rows:  # keys alone, or values, are 62.5 MiB in float32; at 8,000 tokens written out weights take more
        error = row.predicted_bytes - row.allocated_bytes
        assert abs(error) < 16 * MIB, (row.phase, error / MIB)


def test_scores_stay_small_without_a_flash_kernel() -> None:
    """40 heads, 512 rows at 30,000 keys; torch would write out 2.5 GB of scores."""
    with FakeGpus(["RTX 3090"]) as gpus, torch.inference_mode():
        query = torch.empty(1, 40, 512, 128, device="cuda:0")
        key = torch.empty(1, 8, 30000, 128, device="cuda:0")
        before = gpus.allocators[0].allocated
        assert causal_attention(query, key, key, 0.1).shape == (1, 512, 40, 128)
        scores = max(SCORE_BYTES, 16 * 4 * 40 * 30000)
        assert gpus.allocators[0].allocated_peak - before < 4 * key.numel() + 8 * query.numel() + 3 * scores


ROW_BLOCKS: list[tuple[Scheme | str, bool, tuple[int, int]]] = [
    (Scheme(4, 128), True, (8, 6)),
    (Scheme(4, 128), False, (8, 6)),
    (Scheme(8, 128), True, (8, 6)),
    (Scheme(8, 128), False, (8, 6)),
    (Scheme(8, -1), True, (8, 6)),
    (Scheme(8, -1), True, (7, 5)),
    (Scheme(4, 128), True, (7, 5)),
    (Scheme(4, 128), False, (7, 5)),
    ("nf4", True, (8, 6)),
]


@pytest.mark.parametrize(("scheme", "sym", "capability"), ROW_BLOCKS)
def test_row_blocks_take_what_is_counted(scheme: Scheme | str, sym: bool, capability: tuple[int, int]) -> None:
    outputs, inputs, tokens = 8192, 8192, 128
    cuda, bf16 = torch.device("cuda", 0), torch.bfloat16
    with FakeGpus(["RTX 3090"], capability) as gpus, patch.object(linear, "_symmetric", lambda q: sym):
        module: torch.nn.Module
        if isinstance(scheme, Scheme):
            codes = torch.empty(outputs, inputs, dtype=torch.uint8, device=cuda)
            scales, zeros = (
                torch.empty(outputs, scheme.groups(inputs), dtype=dtype, device=cuda)
                for dtype in (torch.float16, torch.uint8)
            )
            shape = PackedShape(scheme.bits, scheme.group_width(inputs), outputs, inputs, sym)
            module, _ = packed_linear(QTensor(codes, (scales, zeros), scheme.grid()), shape, None, bf16, cuda)
            del codes, scales, zeros
        else:
            count = outputs * inputs
            blocks = Nf4Blocks(
                (outputs, inputs), torch.empty(count // 2, dtype=torch.uint8, device=cuda),
                torch.empty(16, device=cuda), torch.empty(count // 64, device=cuda), torch.float16,
            )  # fmt: skip
            module = Nf4Linear(blocks, None, bf16, cuda)
            del blocks
            shape = PackedShape(4, 64, outputs, inputs, True, table=True)
        compute = Compute(capability=capability)
        kind = choose(shape, compute).kind
        x = torch.empty(tokens, inputs, dtype=bf16, device=cuda)
        module(x)  # cuBLAS's workspace
        gpu = gpus.allocators[0]
        gpu.forget_peaks()
        before = gpu.allocated
        module(x)
        found = gpu.allocated_peak - before - 2 * tokens * outputs
    block = row_block_weights(inputs, "cuda")
    wanted = row_block_bytes(shape, compute) / block
    if compute.widens:  # float32 copies of the inputs, and of a row block's outputs
        wanted += 4 * tokens * (inputs + (2 if kind == "int8" else 1) * block // inputs) / block
    else:
        assert wanted == ROW_BLOCK_BYTES[kind][0 if sym else 1]
    assert wanted - 0.3 < found / block < wanted + 0.15, (kind, sym, found / block)


class RandomBlocks(SyntheticWeights):
    """What a GGUF file would have: bytes, in the types of a mixture."""

    def table(self, name: str, device: torch.device) -> Any:
        return self.blocks(dict(self.recipe.overrides)[name.removesuffix(".weight")], self.shapes[name], device)

    def blocks(self, scheme: Scheme | None, shape: tuple[int, ...], device: torch.device) -> Blocks:
        assert scheme is not None
        found = TYPES[scheme.codes]
        data_OB = torch.empty(shape[0], shape[1] // found.values * found.n_bytes, dtype=torch.uint8, device=device)
        return Blocks(scheme.codes, data_OB)

    def linear(self, lin: LinearSpec, dtype: torch.dtype, device: torch.device) -> Any:
        bias = self.tensor(lin.name + ".bias", device) if lin.bias else None
        scheme, shape = self.recipe.scheme_of(lin), self.shapes[lin.name + ".weight"]
        assert scheme is not None
        described = GGUF.packed_shape(scheme, lin)
        return packed_linear(self.blocks(scheme, shape, device), described, bias, dtype, device)


@pytest.mark.parametrize(
    ("mixture", "kernels"),
    [
        ("Q4_K_M", {"int4", "blocks"}),
        ("Q8_0", {"int4 halves"}),
        pytest.param("IQ4_XS", {"blocks"}, marks=pytest.mark.slow),
    ],
)
def test_a_gguf_file_runs_on_a_gpu(mixture: str, kernels: set[str]) -> None:
    spec = of("Qwen2.5-3B", 1, vocab_size=4096, tie_word_embeddings=False)
    rows, found = traced(spec, GGUF.mixture(mixture, spec), ["RTX 3090"], [150], source=RandomBlocks)
    assert set(found.kernels()) == kernels and [row.phase for row in rows] == ["prefill", "decode"]


@pytest.mark.parametrize(
    ("kind", "wanted"), [("Q2_K", 9.6), ("Q3_K", 9.4), ("Q5_K", 9.4), ("Q6_K", 9.4), ("IQ4_XS", 13.2)]
)
def test_row_blocks_of_ggufs_types_take_no_more_than_is_counted(kind: str, wanted: float) -> None:
    outputs, inputs, tokens = 4096, 8192, 16
    found, cuda, bf16 = TYPES[kind], torch.device("cuda", 0), torch.bfloat16
    shape = PackedShape(type_scheme(kind).bits, 32, outputs, inputs, True, table=True, blocks=kind)
    with FakeGpus(["RTX 3090"]) as gpus:
        data_OB = torch.empty(outputs, inputs // found.values * found.n_bytes, dtype=torch.uint8, device=cuda)
        module, choice = packed_linear(Blocks(kind, data_OB), shape, None, bf16, cuda)
        x = torch.empty(tokens, inputs, dtype=bf16, device=cuda)
        assert choice.kind == "blocks" and module(x).device == cuda
        gpus.allocators[0].forget_peaks()
        before = gpus.allocators[0].allocated
        module(x)
        taken = (gpus.allocators[0].allocated_peak - before) / row_block_weights(inputs, "cuda")
    assert wanted - 0.2 < taken < wanted + 0.1, taken
    assert taken < ROW_BLOCK_BYTES["blocks"][0]


def test_no_room_for_the_cache_is_one_line_with_the_gpu() -> None:
    spec = of("Qwen2.5-7B", 8)
    with FakeGpus(["RTX 3060 12GB", "RTX 3060 12GB"]) as gpus, loading(spec, FOUR, 4096) as found:
        for allocator in gpus.allocators:
            allocator.limit = allocator.reserved  # others came and took the rest
        rows, ended = measure.measure(found, recipe_weights(spec, FOUR), [4096])
    assert not rows and "RTX 3060" in ended and "out of memory while allocating a cache of 4096 tokens" in ended


# ---------------------------------------------------------------------- tinygemm's layout


def tinygemm_pack(codes_OI: Tensor, inner_tiles: int) -> Tensor:
    """int32 [out/8, in/(16 tiles), 32, tiles/2] as the m16n8k16 B operand lies in a warp's registers.

    Lane t of a tile of 8 outputs and 16 columns holds output t // 4; its four values are columns 2c, 2c + 1, 2c + 8 and
    2c + 9 with c = t % 4. Two tiles of columns make one int32: their even columns fill the low half, lowest first, the
    odd ones the high half.
    """
    outputs, columns = codes_OI.shape
    wide = 16 * inner_tiles
    packed = torch.zeros(outputs // 8, columns // wide, 32, inner_tiles // 2, dtype=torch.int64)
    for block in range(outputs // 8):
        for tile in range(columns // wide):
            for lane in range(32):
                row = codes_OI[8 * block + lane // 4]
                for pair in range(inner_tiles // 2):
                    start = tile * wide + pair * 32 + 2 * (lane % 4)
                    evens = [int(row[start + step]) for step in (0, 8, 16, 24)]
                    odds = [int(row[start + step + 1]) for step in (0, 8, 16, 24)]
                    word = sum(code << (4 * at) for at, code in enumerate(evens + odds))
                    packed[block, tile, lane, pair] = word - (1 << 32) if word >> 31 else word
    return packed.int()


@pytest.mark.parametrize(("columns", "tiles"), [(256, 8), (192, 4), (96, 2)])
def test_codes_come_back_out_of_tinygemms_layout(
    columns: int, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert linear._inner_tiles(columns) == tiles
    codes = torch.randint(0, 16, (128, columns), dtype=torch.uint8)
    packed = tinygemm_pack(codes, tiles)
    monkeypatch.setattr(linear, "_tile", lambda device, columns: (8, 16 * tiles))
    order = tile_order(lambda tile: tinygemm_pack(tile, tiles), 8, 16 * tiles, CPU)
    assert order is not None
    monkeypatch.setattr(linear, "_order", lambda rows, width, device: order)
    for start, stop in ((0, 128), (64, 128), (0, 64)):
        found = linear.unpack_int4(packed, start, stop, 128, columns)
        assert found is not None and torch.equal(found.T, codes[start:stop])


# ---------------------------------------------------------------------- the model of the allocator


def test_the_two_models_of_the_allocator_agree() -> None:
    """Written apart: the estimator's knows tensors that stay, the tracing one blocks that come back too."""
    generator = torch.Generator().manual_seed(0)
    sizes = [int(2 ** (30 * float(torch.rand(1, generator=generator)))) for _ in range(400)]
    gpu = Allocator()
    for size in sizes:
        gpu.take(size)
    assert gpu.allocated == allocated_bytes(sizes)


def test_blocks_come_back_whole() -> None:
    gpu = Allocator()
    blocks = [gpu.take(3 * MIB) for _ in range(6)]  # one segment of 20 MiB: six of them, 2 MiB left
    assert (gpu.allocated, gpu.reserved) == (18 * MIB, 20 * MIB)
    for block in (blocks[1], blocks[3], blocks[2]):  # the last one joins both neighbours
        gpu.give(block)
    again = gpu.take(9 * MIB)
    assert again.size == 9 * MIB and (gpu.allocated, gpu.reserved) == (18 * MIB, 20 * MIB)
    assert gpu.take(700).size == 1024 and gpu.reserved == 22 * MIB
    for block in (blocks[0], again, blocks[4], blocks[5]):
        gpu.give(block)
    assert gpu.allocated == 1024 and gpu.take(20 * MIB).size == 20 * MIB and gpu.reserved == 22 * MIB


def test_a_full_gpu_lets_go_of_what_is_free_before_it_gives_up() -> None:
    gpu = Allocator(100 * MIB)
    small, large = gpu.take(4 * MIB), gpu.take(60 * MIB)
    gpu.give(large)
    assert gpu.reserved == 80 * MIB
    assert gpu.take(70 * MIB).size == 70 * MIB and gpu.reserved == 90 * MIB
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        gpu.take(20 * MIB)
    gpu.give(small)
    assert gpu.take(20 * MIB).size == 20 * MIB


def test_eight_bits_keep_one_pair_a_group() -> None:
    assert kept_bytes(PackedShape(8, 64, 4096, 4096, True), "int4 halves") == [4096 * 4096, 4 * 4096 * 64]


def test_fake_gpus_leave_torch_as_it_was() -> None:
    before = torch.cuda.is_available, torch.cuda.mem_get_info, torch.nn.functional.scaled_dot_product_attention
    with FakeGpus(["RTX 3090"]):
        assert torch.cuda.device_count() == 1
    assert before == (
        torch.cuda.is_available, torch.cuda.mem_get_info, torch.nn.functional.scaled_dot_product_attention
    )  # fmt: skip
    assert float(torch.ones(2)[1]) == 1.0
