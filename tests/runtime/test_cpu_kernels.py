"""This project's CPU kernels against float64 products of dequantized weights, and machines where they can't be built.

The kernels are compiled here, for this machine's instructions and, where it has AVX-512, for AVX2 and for AVX-512
without VNNI too.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf_bytes import tiny_file
from random_codes import random_q
from torch import Tensor

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.errors import RunError
from qwenq.formats.base import PackedShape, Recipe, Scheme
from qwenq.formats.gguf import CODES, WRITTEN, Blocks, type_scheme
from qwenq.machine import compiler, lacks_for_cpu_kernels
from qwenq.model.spec import LinearSpec
from qwenq.planning.kernels import Choice, kept_bytes
from qwenq.planning.models import load_spec
from qwenq.planning.placement import host_map
from qwenq.runtime import cpu_kernels, linear
from qwenq.runtime.generate import Sampling, Session, Timing
from qwenq.runtime.linear import CpuLinear, StoredLinear, packed_linear
from qwenq.runtime.load import LoadOptions, loaded
from qwenq.runtime.model import RunningModel, build_model
from qwenq.runtime.synthetic import SyntheticWeights, synthetic_config
from qwenq.solver.grid import QTensor

CPU, BF16 = torch.device("cpu"), torch.bfloat16
pytestmark = pytest.mark.skipif(bool(lacks_for_cpu_kernels()), reason=lacks_for_cpu_kernels() or "-")
INSTRUCTIONS = {
    "native": cpu_kernels.FLAGS,
    "AVX-512 without VNNI": (*cpu_kernels.FLAGS, "-mno-avx512vnni"),
    "AVX2": (*cpu_kernels.FLAGS, "-mno-avx512f"),
}


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels for each set of instructions that this machine has."""
    built = cpu_kernels._built(INSTRUCTIONS[request.param])
    assert not isinstance(built, str), built
    monkeypatch.setattr(cpu_kernels, "_library", lambda: built)
    yield request.param


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


CASES = [
    (4, 32, 64, 192, True),
    (4, 64, 40, 128, False),  # 8 outputs in the last block
    (4, 128, 33, 256, True),
    (4, -1, 48, 896, True),  # one group a row, cut into kernel groups of 128
    (4, 48, 16, 96, True),  # cut into groups of 16
    (8, 32, 64, 192, True),
    (8, 256, 80, 512, False),
    (8, -1, 42, 112, True),
]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 131])
@pytest.mark.parametrize(("bits", "group", "outputs", "inputs", "sym"), CASES)
def test_products(
    bits: int, group: int, outputs: int, inputs: int, sym: bool, rows: int, instructions: str
) -> None:
    q = random_q(bits, group, outputs, inputs, sym)
    shape = PackedShape(bits, q.grid.group_width(inputs), outputs, inputs, sym)
    bias, x = torch.randn(outputs).to(BF16), torch.randn(2, rows, inputs).to(BF16)
    module, choice = packed_linear(q, shape, bias, BF16, CPU)
    assert choice == Choice("cpu")
    kept = sorted(p.numel() * p.element_size() for p in module.parameters())
    assert kept == sorted([2 * outputs, *kept_bytes(shape, "cpu")])
    wanted = x.double() @ q.dequantize().double().T + bias.double()
    found = module(x)
    assert found.dtype == BF16 and found.shape == wanted.shape
    assert relative(found, wanted) < 2**-8  # of the result alone: half of 2**-8 at most
    head = CpuLinear(q, shape, bias, BF16, is_head=True)
    assert relative(head(x), wanted) < 1e-4, "float32 out shows that nothing else is rounded to bfloat16"


@pytest.mark.parametrize("rows", [1, 9])
def test_columns_sorted_by_group(rows: int, instructions: str) -> None:
    q = replace(random_q(4, 32, 48, 192, False), order_I=torch.randperm(192))
    module = CpuLinear(q, PackedShape(4, 32, 48, 192, False), None, BF16, is_head=True)
    x = torch.randn(rows, 192).to(BF16)
    assert relative(module(x), x.double() @ q.dequantize().double().T) < 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_codes_and_activations_do_not_overflow(bits: int, instructions: str) -> None:
    """Groups of 256 columns, all of one sign: 256 * 128 * 32767 is half of what 32 bits hold."""
    codes = torch.full((16, 256), 0, dtype=torch.uint8)
    q = QTensor(codes, (torch.ones(16, 1).half(), torch.full((16, 1), 1 << (bits - 1), dtype=torch.uint8)),
                Scheme(bits, 256).grid())  # fmt: skip
    module = CpuLinear(q, PackedShape(bits, 256, 16, 256, True), None, BF16, is_head=True)
    for x in (torch.full((1, 256), 3.0).to(BF16), torch.full((9, 256), -3.0).to(BF16)):
        assert torch.allclose(module(x), x.float() @ q.dequantize().T, rtol=1e-5)


def test_a_large_activation_leaves_the_others_their_digits() -> None:
    """One of 2,000 times the others' size: those of its group are rounded to steps of 2000 / 32767, and no others."""
    q = random_q(4, 128, 64, 512)
    x = torch.randn(1, 512).to(BF16)
    x[0, 7] = 2000
    module = CpuLinear(q, PackedShape(4, 128, 64, 512, True), None, BF16, is_head=True)
    error = module(x).double() - x.double() @ q.dequantize().double().T
    step, size = 2000 / 32767, float(q.dequantize()[:, :128].square().mean().sqrt())
    assert float(error.square().mean().sqrt()) < 1.5 * step / 12**0.5 * size * 128**0.5


def test_numbers_that_are_none_are_seen(instructions: str) -> None:
    module = CpuLinear(random_q(4, 32, 16, 64), PackedShape(4, 32, 16, 64, True), None, BF16)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(2, 64).to(BF16)
        x[1, 40] = bad
        found = module(x)
        assert bool(found[0].isfinite().all()) and not bool(found[1].isfinite().any())


def test_threads_do_not_change_the_bits() -> None:
    module = CpuLinear(random_q(8, 32, 208, 256), PackedShape(8, 32, 208, 256, True), None, BF16)
    x, threads = torch.randn(5, 256).to(BF16), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = module(x)
        torch.set_num_threads(2)
        assert torch.equal(module(x), once)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", WRITTEN)
def test_ggufs_types_are_what_gguf_py_makes_of_them(kind: str) -> None:
    """Codes, scales and minima give gguf-py's values: nothing is rounded on the way to the kernel."""
    found, generator = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]], np.random.default_rng(1)
    per_row = 512 // found[0]
    data = generator.integers(0, 256, (20, per_row, found[1]), dtype=np.uint8)
    halves = {"Q8_0": [0], "Q4_0": [0], "Q5_0": [0], "IQ4_NL": [0], "IQ4_XS": [0], "Q4_1": [0, 2], "Q5_1": [0, 2]}
    halves |= {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "Q3_K": [108], "Q2_K": [80, 82]}
    for at in halves[kind]:  # finite scales
        scale = (generator.standard_normal((20, per_row)) * 0.01).astype(np.float16)
        data[:, :, at : at + 2] = scale[..., None].view(np.uint8)
    flat = data.reshape(20, -1)
    wanted = torch.from_numpy(gguf.quants.dequantize(flat, gguf.GGMLQuantizationType[kind]))
    stored = Blocks(kind, torch.from_numpy(flat))
    shape = PackedShape(type_scheme(kind).bits, 32, 20, 512, CODES[kind].scheme_fields[2], table=True, blocks=kind)
    module, choice = packed_linear(stored, shape, None, BF16, CPU)
    assert isinstance(module, CpuLinear) and choice == Choice("cpu")
    assert sorted(p.numel() * p.element_size() for p in module.parameters()) == sorted(kept_bytes(shape, "cpu"))
    assert torch.allclose(module.rows(torch.arange(20)), wanted, rtol=1e-6, atol=1e-7)
    x = torch.randn(3, 512).to(BF16)
    assert relative(module(x), x.double() @ wanted.double().T) < 2**-8
    head = linear.block_head(stored, BF16, CPU)
    assert isinstance(head, CpuLinear) and relative(head(x), x.double() @ wanted.double().T) < 1e-4


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("inputs", [16, 130, 896])
def test_sixteen_bit_weights_for_one_token(dtype: torch.dtype, inputs: int, instructions: str) -> None:
    weight, x, bias = torch.randn(37, inputs).to(dtype), torch.randn(1, 1, inputs).to(BF16), torch.randn(37)
    wanted = x.double() @ weight.double().T
    head = StoredLinear(weight, None, BF16, is_head=True)
    assert head(x).dtype == torch.float32 and relative(head(x), wanted) < 1e-6
    assert relative(StoredLinear(weight, bias, BF16)(x), wanted + bias.to(BF16).double()) < 2**-8


# ---------------------------------------------------------------------- one token


def test_norm_and_gate(instructions: str) -> None:
    h, added, weight, up = (torch.randn(1, 100).to(BF16) for _ in range(4))
    total, normed = cpu_kernels.add_norm(h, added, weight[0], 1e-6)
    assert torch.equal(total, h + added)
    f = total.float()
    wanted = (f * torch.rsqrt(f.square().mean() + 1e-6)).to(BF16) * weight
    assert relative(normed, wanted) < 2**-9
    assert torch.equal(cpu_kernels.add_norm(h, None, weight[0], 1e-6)[0], h)
    assert relative(cpu_kernels.gate(h, up), F.silu(h) * up) < 2**-9


@pytest.mark.parametrize("normed", [False, True])
def test_a_token_turned_kept_and_attended(normed: bool, instructions: str) -> None:
    heads, shared, width, capacity, length = 6, 2, 48, 9, 7
    q, k, v = (torch.randn(n, width).to(BF16) for n in (heads, shared, shared))
    keys, values = (torch.randn(1, shared, capacity, width).to(BF16) for _ in "kv")
    angle = torch.rand(width // 2).repeat(2)
    cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
    norms = [torch.randn(width).to(BF16) for _ in "qk"] if normed else [None, None]

    def turned(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = F.rms_norm(x.float(), (width,), eps=1e-6).to(BF16) * norm
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    wanted_keys, wanted_values = keys.clone(), values.clone()
    wanted_keys[0, :, length - 1], wanted_values[0, :, length - 1] = turned(k, norms[1]), v
    head = cpu_kernels.Head(cos, sin, *norms, eps=1e-6)
    found = cpu_kernels.turn_and_keep(q, k, v, head, (keys, values), length)
    assert relative(found, turned(q, norms[0])) < 2**-8 and relative(keys, wanted_keys) < 2**-8
    assert torch.equal(values, wanted_values) and torch.equal(keys[0, :, length:], wanted_keys[0, :, length:])
    out = cpu_kernels.attend_one(found, (keys, values), length, 0.3)
    seen = (t[0, :, :length].double().repeat_interleave(heads // shared, 0) for t in (keys, values))
    near_k, near_v = seen
    p = torch.softmax(torch.einsum("hd,hsd->hs", found.double() * 0.3, near_k), -1)
    assert relative(out, torch.einsum("hs,hsd->hd", p, near_v)) < 2**-8


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen3-0.6B"])
def test_a_step_is_that_of_transformers_modules(name: str) -> None:
    """Logits of tokens behind a prompt, with norms of heads and biases, within what bfloat16 rounds."""
    model = small_model(name, Recipe(Scheme(4, 64)), SyntheticWeights)
    session, modules = Session(model, 32), Session(model, 32)
    assert session.decoding == "this project's CPU kernels"
    prompt = torch.randint(0, 250, (9,)).tolist()
    assert torch.equal(session.prefill(prompt, Timing()), modules.prefill(prompt, Timing()))
    modules._step = None
    for token in (5, 7, 100):
        found, wanted = session.forward([token]), modules.forward([token])
        assert found.dtype == torch.float32 and relative(found, wanted) < 0.02
    assert session._cache is not None and session._cache.get_seq_length() == 12
    for ours, theirs in zip(session._cache.stored(1), modules._cache.stored(1), strict=True):
        assert relative(ours[:, :, :12], theirs[:, :, :12]) < 0.02


class RandomCodes(SyntheticWeights):
    """Synthetic weights with scales that differ, zero points and, in k_proj and down_proj, columns sorted by group."""

    def linear(
        self, lin: LinearSpec, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.nn.Module, Choice | None]:
        scheme = self.recipe.scheme_of(lin)
        if scheme is None:
            return super().linear(lin, dtype, device)
        q = random_q(scheme.bits, scheme.group_size, lin.out_features, lin.in_features, scheme.sym)
        if lin.name.endswith(("k_proj", "down_proj")):
            q = replace(q, order_I=torch.randperm(lin.in_features))
        shape = PackedShape(scheme.bits, scheme.group_size, lin.out_features, lin.in_features, scheme.sym)
        return packed_linear(q, shape, self.tensor(lin.name + ".bias", device) if lin.bias else None, dtype, device)


def small_model(name: str, recipe: Recipe, source: type[SyntheticWeights] = RandomCodes) -> RunningModel:
    """Two layers with the parts of a known model, and random norms."""
    spec = replace(
        load_spec(name), num_hidden_layers=2, vocab_size=250, hidden_size=128, intermediate_size=192,
        num_attention_heads=4, num_key_value_heads=2, head_dim=48,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(source(spec, recipe), synthetic_config(spec), spec, host_map(spec), dtype=BF16)
    for part, parameter in model.network.named_parameters():
        if part.endswith("norm.weight"):
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


def steps(model: RunningModel, *, one_call: bool) -> list[Tensor]:
    """Logits of three tokens behind a prompt, and the cache, with one call a token or one a part of a layer."""
    session = Session(model, 32)
    session.prefill([3, 1, 4, 1, 5], Timing())
    assert session._step is not None and session._cache is not None
    assert session._step.network is not None, "the kernels take all of it"
    if not one_call:
        session._step.network = None
    found = [session.forward([token]) for token in (5, 7, 100)]
    kept = [tensor for layer in range(model.spec.num_hidden_layers) for tensor in session._cache.stored(layer)]
    return found + [tensor[:, :, : session._cache.get_seq_length()] for tensor in kept]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(left, right, strict=True))


MIXED = {"self_attn.k_proj": Scheme(8, 64), "self_attn.o_proj": Scheme(8, 48), "mlp.gate_proj": Scheme(4, 128),
         "mlp.up_proj": None, "mlp.down_proj": Scheme(4, 64, False)}  # fmt: skip
RECIPES = {
    "4-bit": Recipe(Scheme(4, 64)),
    "4-bit with offsets": Recipe(Scheme(4, 32, False)),
    "8-bit": Recipe(Scheme(8, 32)),
    "16-bit": Recipe(None),
    "mixed": Recipe(Scheme(4, 32), tuple((f"model.layers.1.{path}", scheme) for path, scheme in MIXED.items())),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen3-0.6B"])
def test_one_call_a_token_has_the_bits_of_one_a_part(name: str, recipe: str, instructions: str) -> None:
    model = small_model(name, RECIPES[recipe])
    assert same(steps(model, one_call=True), steps(model, one_call=False))


@pytest.mark.parametrize("head", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
def test_one_call_for_a_gguf_file(head: str, tiny: Path, tmp_path: Path) -> None:
    kinds = {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_1", "ffn_gate": "Q5_0", "ffn_down": "Q8_0"}
    file = tmp_path / "model.gguf"
    file.write_bytes(tiny_file(tiny, layers=4, types=kinds | {"output": head}).encode())
    with loaded(open_checkpoint(file), LoadOptions(max_model_len=64)) as found:
        assert same(steps(found.model, one_call=True), steps(found.model, one_call=False))


def test_threads_do_not_change_a_token() -> None:
    model, threads = small_model("Qwen3-0.6B", RECIPES["mixed"]), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = steps(model, one_call=True)
        torch.set_num_threads(3)
        assert same(steps(model, one_call=True), once)
    finally:
        torch.set_num_threads(threads)


def test_a_linear_of_another_kernel_keeps_calls_one_a_part() -> None:
    """Groups of 8 columns, which the CPU kernels do not take, and a head in float32."""
    mixed = Recipe(Scheme(4, 64), (("model.layers.1.self_attn.v_proj", Scheme(4, 8)),))
    models = [small_model("Qwen2.5-0.5B", mixed), small_model("Qwen2.5-0.5B", Recipe(Scheme(4, 64)))]
    models[1].network.lm_head = StoredLinear(models[1].network.lm_head.weight.float(), None, BF16, is_head=True)
    for model in models:
        session, modules = Session(model, 32), Session(model, 32)
        for each in (session, modules):
            each.prefill([3, 1, 4, 1, 5], Timing())
        assert session._step is not None and session._step.network is None
        modules._step = None
        assert relative(session.forward([9]), modules.forward([9])) < 0.02


def test_an_embedding_that_is_no_number_is_seen() -> None:
    model = small_model("Qwen2.5-0.5B", RECIPES["4-bit"])
    model.network.model.embed_tokens.weight[7, 3] = float("nan")
    session = Session(model, 32)
    session.prefill([3, 1, 4], Timing())
    assert bool(session.forward([7]).isnan().all())
    with pytest.raises(RunError, match="not finite"):
        list(Session(model, 32).generate([3, 7], Sampling(max_new_tokens=2)))


# ---------------------------------------------------------------------- where they can't be built


def test_no_compiler_and_one_that_fails_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    q, shape = random_q(4, 32, 64, 64), PackedShape(4, 32, 64, 64, True)
    monkeypatch.setenv("CC", "no-such-compiler")
    module, choice = packed_linear(q, shape, None, BF16, CPU)
    assert choice.kind == "int4" and "need a C compiler" in choice.reason and isinstance(module, linear.Int4Linear)
    monkeypatch.setenv("CC", "false")  # a program that always fails
    cpu_kernels._built.cache_clear()
    try:
        _, choice = packed_linear(q, shape, None, BF16, CPU)
        assert choice == Choice("int4", "false cannot compile the CPU kernels: no message")
    finally:
        cpu_kernels._built.cache_clear()


def test_a_compiler_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*words: object, **more: object) -> None:
        raise subprocess.TimeoutExpired("cc", 60)

    monkeypatch.setattr(subprocess, "run", hangs)
    cpu_kernels._built.cache_clear()
    try:
        assert "timed out" in cpu_kernels.refusal()
    finally:
        cpu_kernels._built.cache_clear()


def test_a_compiler_is_asked_for_english(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it says is looked through for errors; German ones are called Fehler."""
    german = tmp_path / "cc"
    said = '[ "$LC_ALL" = C ] && echo x.c:1: error: no header >&2 || echo Fehler >&2'
    german.write_text(f"#!/bin/sh\n{said}\nexit 1\n")
    german.chmod(0o700)
    monkeypatch.setenv("CC", str(german))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    cpu_kernels._built.cache_clear()
    try:
        assert cpu_kernels.refusal() == f"{german} cannot compile the CPU kernels: no header"
    finally:
        cpu_kernels._built.cache_clear()


# ---------------------------------------------------------------------- where they are kept


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """What a new process does: it loads the kernels, here of a short source. Returns how often something was compiled.

    The compiler is `tmp_path / "cc"`, the cache that of `tmp_path / "caches"`.
    """
    log, caches = tmp_path / "log", tmp_path / "caches"
    script = f'#!/bin/sh\necho "$@" >>"{log}"\nexec {" ".join(compiler())} "$@"\n'
    (tmp_path / "cc").write_text(script)
    (tmp_path / "cc").chmod(0o700)
    source = tmp_path / "kernels.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in cpu_kernels._ARGUMENTS))
    monkeypatch.setattr(cpu_kernels, "SOURCE", source)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))

    def build() -> int:
        log.write_text("")
        built = cpu_kernels._built.__wrapped__()
        assert not isinstance(built, str), built
        built.gate(0, 0, 0, 0)
        return sum(" -c " in line for line in log.read_text().splitlines())

    return build


def kept_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("caches/qwenq/*"))


def test_kernels_are_built_once(builds: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert builds() == 1
    (kept,) = kept_in(tmp_path)
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.chdir(tmp_path)
    assert builds() == 0
    assert kept_in(tmp_path) == [kept]


def test_another_source_compiler_or_processor_builds_anew(builds: Callable[[], int], tmp_path: Path) -> None:
    builds()
    for change in ("source", "version", "-mno-fma"):
        if change == "source":
            with cpu_kernels.SOURCE.open("a") as file:
                file.write("\n")
        else:
            said = "echo version 99 >&2\n" if change == "version" else f'set -- "$@" {change}\n'
            script = (tmp_path / "cc").read_text()
            (tmp_path / "cc").write_text(script.replace("exec", f"{said}exec"))
        assert (builds(), builds()) == (1, 0), change
    assert len(kept_in(tmp_path)) == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "no library", "folder"])
def test_a_damaged_library_is_built_anew(builds: Callable[[], int], tmp_path: Path, damage: str) -> None:
    builds()
    (kept,) = kept_in(tmp_path)
    whole = kept.read_bytes()
    if damage == "cut":
        kept.write_bytes(whole[:4096])
    elif damage == "changed":
        kept.write_bytes(whole.replace(b"gate", b"gone"))
    elif damage == "no library":
        kept.write_bytes(b"text" + hashlib.sha256(b"text").digest())
    else:  # neither read nor replaced
        kept.unlink()
        kept.mkdir()
        assert (builds(), builds()) == (1, 1)
        return
    assert (builds(), builds()) == (1, 0)
    assert kept.read_bytes() == whole


@pytest.mark.parametrize("caches", ["read-only", "open to others", "somebody's", "a link", "relative"])
def test_a_cache_that_is_not_the_users_own_is_not_used(
    builds: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caches: str
) -> None:
    folder = tmp_path / "caches" / "qwenq"
    folder.mkdir(mode=0o755 if caches == "open to others" else 0o700, parents=True)
    if caches == "read-only":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc")  # for root too
    elif caches == "somebody's":
        monkeypatch.setattr("os.geteuid", lambda: 12345)
    elif caches == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif caches == "relative":  # which the XDG specification wants ignored: it would be another in each directory
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", "caches")
        monkeypatch.setenv("HOME", "/proc")
    assert (builds(), builds()) == (1, 1)
    assert not kept_in(tmp_path) and not list(tmp_path.glob("elsewhere/*"))


def test_tests_leave_the_users_cache_alone() -> None:
    kept = cpu_kernels._place(())
    assert kept is None or kept.is_relative_to(Path(__file__).parents[2] / ".pytest_cache")


def test_without_xdg_cache_home_the_home_directory_has_it(
    builds: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (builds(), builds()) == (1, 0)
    assert len(list(tmp_path.glob(".cache/qwenq/cpu-kernels-*.so"))) == 1
