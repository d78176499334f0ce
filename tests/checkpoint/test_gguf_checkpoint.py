"""GGUF files as checkpoints: values, evaluation, planning, running, conversion; against gguf-py and the directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import run
from gguf_bytes import tiny_file
from safetensors.numpy import load_file

from qwenq import api
from qwenq.checkpoint.reader import GGUFCheckpoint, open_checkpoint, open_source
from qwenq.errors import CheckpointError, PlanError
from qwenq.formats.base import PackedShape, Recipe, Scheme
from qwenq.formats.gguf import WRITTEN, Blocks, dequantize_blocks
from qwenq.io.gguf import TYPES
from qwenq.machine import Compute
from qwenq.pipeline.convert import convert
from qwenq.pipeline.evaluate import evaluate
from qwenq.planning.kernels import Choice, choose
from qwenq.runtime.linear import BlockEmbedding, BlockLinear, Int4Linear, packed_linear
from qwenq.solver.grid import QTensor
from qwenq.text.calibration import load_windows
from qwenq.text.tokens import ModelTokenizer

FIVE = {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_1", "ffn_gate": "Q5_0", "ffn_up": "Q8_0", "ffn_down": "Q4_0",
        "token_embd": "Q8_0", "output": "Q5_0"}  # fmt: skip
READ_BY_GGUF_PY = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "MXFP4",
                   "NVFP4")  # fmt: skip


@pytest.fixture
def five(tiny: Path, tmp_path: Path) -> Path:
    return tiny_file(tiny, layers=4, types=FIVE).write(tmp_path / "five.gguf")


def random_rows(kind: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Bytes of a type with sane scales: gguf-py says what they mean, and what is not finite is drawn again."""
    found, rng = TYPES[kind], np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // found.values, found.n_bytes), np.uint8)
    while True:
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        bad = ~(np.abs(values).max(1) < 1e4)
        if not bad.any():
            return torch.from_numpy(blocks.reshape(rows, -1))
        blocks[bad] = rng.integers(0, 256, (int(bad.sum()), found.n_bytes), np.uint8)


@pytest.mark.parametrize("kind", [*WRITTEN, *READ_BY_GGUF_PY])
def test_every_type_as_gguf_py_dequantizes_it(kind: str) -> None:
    data = random_rows(kind, 6, 512)
    wanted = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(dequantize_blocks(kind, data).view(torch.int32), torch.from_numpy(wanted).view(torch.int32))


def test_blocks_by_hand() -> None:
    """Q4_0: scale 0.5, codes 0 to 15 low, then 15 to 0 high; Q4_1 with minimum -1; Q8_0: scale 2."""
    codes = bytes(k | (15 - k) << 4 for k in range(16))
    half = np.float16(0.5).tobytes()
    low, high = [0.5 * (k - 8) for k in range(16)], [0.5 * (7 - k) for k in range(16)]
    found = dequantize_blocks("Q4_0", torch.tensor([list(half + codes)], dtype=torch.uint8))
    assert found.tolist() == [low + high]
    data = half + np.float16(-1).tobytes() + codes
    found = dequantize_blocks("Q4_1", torch.tensor([list(data)], dtype=torch.uint8))
    assert found.tolist() == [[w + 3 for w in low + high]]
    data = np.float16(2).tobytes() + bytes(range(112, 144))
    found = dequantize_blocks("Q8_0", torch.tensor([list(data)], dtype=torch.uint8))
    assert found.tolist() == [[2 * (k if k < 128 else k - 256) for k in range(112, 144)]]


def test_a_checkpoint_tensor_by_tensor(five: Path, tiny: Path) -> None:
    """Whole tensors, rows of them, and linears; against gguf-py, and within a step of what was quantized."""
    found = open_checkpoint(five)
    stored = {t.name: t for t in gguf.GGUFReader(five).tensors}
    original: dict[str, Any] = {}
    for shard in tiny.glob("*.safetensors"):
        original |= load_file(shard)
    names = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
             "model.norm.weight": "output_norm.weight", "model.layers.2.mlp.up_proj.weight": "blk.2.ffn_up.weight",
             "model.layers.3.self_attn.q_proj.bias": "blk.3.attn_q.bias",
             "model.layers.3.self_attn.k_proj.weight": "blk.3.attn_k.weight"}  # fmt: skip
    for ours, theirs in names.items():
        tensor = stored[theirs]
        wanted = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        assert torch.equal(found.read(ours), wanted), ours
        np.testing.assert_allclose(found.read(ours).numpy(), original[ours].astype(np.float32), atol=0.05)
    assert torch.equal(found.read_slice("lm_head.weight", 5, 9), found.read("lm_head.weight")[5:9])
    for lin in found.spec.layer_linears(1):
        stored_linear = found.linear(lin)
        weight = stored_linear.dequantize() if isinstance(stored_linear, QTensor) else stored_linear.float()
        assert torch.equal(weight, found.linear_weight(lin).float()), lin.name
    assert found.recipe.label == "mixed, mostly Q4_0" and found.quantized is not None


def test_hashed_reads_and_changed_files(five: Path) -> None:
    found = open_checkpoint(five).hash_files(["README.md"])
    assert isinstance(found, GGUFCheckpoint) and found.hashed is not None and set(found.hashed.hashes) == {"five.gguf"}
    before = found.read("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(before, found.read("model.layers.0.mlp.down_proj.weight"))
    location = found.tensors["model.layers.0.mlp.down_proj.weight"]
    with open(five, "r+b") as file:
        file.seek(location.start + 5)
        file.write(b"\xaa\xbb")
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        found.read("model.layers.0.mlp.down_proj.weight")
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        found.refuse_changed()


def test_evaluation_equals_that_of_the_same_values(five: Path, tiny: Path, tmp_path: Path) -> None:
    """A GGUF file in F32 is the model itself; a quantized one loses what a directory of the same values loses."""
    windows = load_windows("heldout", ModelTokenizer(tiny), open_checkpoint(tiny).spec, length=32, count=2, seed=None)
    same = tiny_file(tiny, layers=4).write(tmp_path / "same.gguf")
    reference = open_checkpoint(tiny)
    assert evaluate(open_checkpoint(same), reference, windows).kl.mean == 0
    lost = evaluate(open_checkpoint(five), reference, windows).kl.mean
    assert 1e-6 < lost < 0.5
    assert evaluate(open_checkpoint(five), open_checkpoint(five), windows).kl.mean == 0


def test_a_scale_that_is_no_number(five: Path) -> None:
    found = open_checkpoint(five)
    location = found.tensors["model.layers.1.self_attn.q_proj.weight"]
    data = bytearray(five.read_bytes())
    data[location.start : location.start + 2] = b"\x00\x7e"  # NaN in float16
    five.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"five\.gguf: model\.layers\.1\.self_attn\.q_proj\.weight holds a NaN"):
        open_checkpoint(five).finite_layer_state(1)


def test_a_file_without_a_tokenizer(tiny: Path, tmp_path: Path) -> None:
    """Everything but text works."""
    file = tiny_file(tiny, layers=4, types=FIVE)
    file.entries = [each for each in file.entries if not each[0].startswith("tokenizer.")]
    path = file.write(tmp_path / "m.gguf")
    assert api.inspect(path).disagreements == ()
    assert api.plan(path, gpu="RTX 3090", context=256).fits
    with pytest.raises(CheckpointError, match="no tokenizer in its metadata"):
        api.evaluate(path, tiny, num_samples=1, sequence_length=32)
    with pytest.raises(CheckpointError, match="no tokenizer in its metadata"), api.load(path) as model:
        model.generate("x")


def test_a_source_to_quantize_it_is_not(five: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a GGUF file") as error:
        open_source(five)
    assert "original 16-bit checkpoint" in error.value.hint
    with pytest.raises(CheckpointError, match="a GGUF file"):
        api.quantize(five, tmp_path / "out")


# ---------------------------------------------------------------------- planning


def test_planning_counts_every_tensor(five: Path) -> None:
    found = open_checkpoint(five)
    audit = api.inspect(five).audit
    assert audit.scheme == "mixed, mostly Q4_0, gguf"
    stored = sum(t.end - t.start for t in found.tensors.values())
    assert sum(part.stored_bytes for part in audit.parts) == stored
    assert api.estimate(five, "RTX 3090", 256).question.weights.total_bytes == stored


def test_planning_a_gguf_file_imports_neither_torch_nor_numpy_nor_gguf(five: Path) -> None:
    code = (
        "import sys; from qwenq import api; api.plan(sys.argv[1], 'RTX 3090', 256); api.inspect(sys.argv[1]); "
        "print(sorted({'torch', 'numpy', 'gguf', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(five)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_commands_take_the_file(five: Path) -> None:
    for command, *options in (
        ["inspect"], ["vram", "--gpu", "RTX 3090", "-c", 256], ["plan", "--gpu", "RTX 3090", "-c", 256],
        ["run", "--dry-run"], ["serve", "--engine", "qwenq", "--dry-run"],
    ):  # fmt: skip
        done = run(command, five, *options)
        assert done.exit_code == 0, done.output
    assert run("inspect", five.with_name("missing.gguf")).exit_code == 1


# ---------------------------------------------------------------------- running


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_0", "Q6_K", "IQ4_NL", "IQ2_XS"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_multiply_with_the_values_of_gguf_py(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's kernels, and row blocks; this project's CPU kernels are in test_cpu_kernels.py."""
    monkeypatch.setattr("qwenq.runtime.linear.lacks_for_cpu_kernels", lambda: "no compiler")
    data = random_rows(kind, 64, 512)
    weight = torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
    weight_scale = weight.abs().mean()
    kernel = kind in ("Q4_0", "Q4_1", "Q8_0", "Q4_K")
    bits = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8, "Q4_K": 4}.get(kind, 5)
    shape = PackedShape(bits, 32, 64, 512, kind in ("Q4_0", "Q8_0"), table=not kernel, blocks=kind)
    module, choice = packed_linear(Blocks(kind, data), shape, None, dtype, torch.device("cpu"))
    assert isinstance(module, Int4Linear if kernel and dtype == torch.bfloat16 else BlockLinear)
    assert (kind if isinstance(module, BlockLinear) else "no compiler") in choice.reason
    torch.manual_seed(0)
    for rows in (1, 200):
        x = torch.randn(rows, 512)
        wanted, found = x @ weight.T, module(x.to(dtype)).float()
        error = (found - wanted).norm() / wanted.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.03), (rows, float(error), float(weight_scale))


def test_constant_groups_of_q4_1_run() -> None:
    """A scale of zero: all weights are the minimum, which no zero point under that scale says."""
    data = random_rows("Q4_1", 16, 64)
    data.view(16, 2, 20)[:, 0, :2] = 0
    weight = dequantize_blocks("Q4_1", data)
    assert torch.equal(Blocks("Q4_1", data).integers().dequantize()[:, :32], weight[:, :32])
    torch.testing.assert_close(Blocks("Q4_1", data).integers().dequantize(), weight)


def test_kernels_by_type_and_why_not() -> None:
    shape = PackedShape(6, 32, 64, 512, True, table=True, blocks="Q6_K")
    assert choose(shape, Compute("bfloat16", "cuda")) == choose(shape, Compute("bfloat16", "cpu", compiler=False))
    assert choose(shape, Compute("bfloat16", "cpu")) == Choice("cpu")
    assert "Q6_K" in choose(shape, Compute()).reason
    q4_0 = PackedShape(4, 32, 64, 512, True, blocks="Q4_0")
    assert choose(q4_0, Compute("bfloat16", "cuda")).kind == "triton"
    assert choose(q4_0, Compute("bfloat16", "cuda", triton=False)).kind == "int4"
    q4_k = PackedShape(4, 32, 64, 512, False, blocks="Q4_K")  # minima are no whole zero points, which Triton's take
    found = choose(q4_k, Compute("bfloat16", "cuda"))
    assert found.kind == "int4" and found.reason == "Q4_K: Triton kernels need integer zero points"
    assert choose(q4_k, Compute("bfloat16", "cpu", compiler=False)).kind == "int4"
    assert choose(q4_0, Compute("float32", "cuda")).reason.startswith("Q4_0 in row blocks: float32 activations")


def test_embeddings_are_looked_up_in_blocks() -> None:
    data = random_rows("Q6_K", 20, 256)
    ids = torch.tensor([[3, 19], [0, 3]])
    table = dequantize_blocks("Q6_K", data)
    assert torch.equal(BlockEmbedding(Blocks("Q6_K", data), torch.float32)(ids), table[ids])


def test_a_model_runs_as_its_values_do(five: Path) -> None:
    """Greedy tokens in float32 equal those of transformers' model filled with gguf-py's values."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(five.parent, gguf_file=five.name, dtype=torch.float32).eval()
    prompt = "one two three"
    with api.load(five, compute_dtype="float32", max_model_len=64) as model:
        kinds = model.loaded.model.kernels()
        assert kinds == {"blocks": 7 * 4}
        found = model.generate(prompt, raw=True, max_new_tokens=8, temperature=0)
    ids = torch.tensor(ModelTokenizer(five).encode([prompt], special=True))
    with torch.no_grad():
        wanted = theirs.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert list(found.token_ids) == wanted[: len(found.token_ids)] and len(found.token_ids) > 2


# ---------------------------------------------------------------------- converting


@pytest.mark.parametrize(("kind", "scheme"), [("Q4_0", Scheme(4, 32)), ("Q8_0", Scheme(8, 32))])
@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_gguf_to_integer_formats_bit_for_bit(
    kind: str, scheme: Scheme, format: str, tiny: Path, tmp_path: Path
) -> None:
    types = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), kind)
    file = tiny_file(tiny, layers=4, types=types | {"token_embd": "Q8_0"})
    source = open_checkpoint(file.write(tmp_path / "m.gguf"))
    made = convert(source, tmp_path / "out", format)
    found = open_checkpoint(tmp_path / "out")
    assert made.format == format and found.recipe == Recipe(scheme, format=format)
    for lin in source.spec.linears:
        ours, theirs = source.linear(lin), found.linear(lin)
        assert isinstance(ours, QTensor) and isinstance(theirs, QTensor)
        assert torch.equal(ours.codes_OI, theirs.codes_OI) and torch.equal(ours.scales_OG, theirs.scales_OG)
        assert torch.equal(ours.dequantize(), theirs.dequantize()), lin.name
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"):
        assert torch.equal(source.read(name).float(), found.read(name).float()), name
    embedding = source.read("model.embed_tokens.weight")
    assert torch.equal(found.read("model.embed_tokens.weight"), embedding.half())
    assert ModelTokenizer(tmp_path / "out").encode(["one two"]) == ModelTokenizer(tiny).encode(["one two"])
    assert api.verify(tmp_path / "out").findings == ()
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["model_type"] == "qwen2" and config["num_hidden_layers"] == 4


def test_what_does_not_convert(five: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"GGUF's Q5_1 stores other values|GGUF's Q5_0 stores other values"):
        convert(open_checkpoint(five), tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


def test_minima_that_are_no_zero_points(tiny: Path, tmp_path: Path) -> None:
    """Q4_1 converts where minima are whole multiples of scales, and is refused, naming the linear, where not."""
    types = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), "Q4_1")
    path = tiny_file(tiny, types=types).write(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj: minima of its Q4_1 groups"):
        convert(open_checkpoint(path), tmp_path / "out", "gptq")
    data = bytearray(path.read_bytes())
    source = open_checkpoint(path)
    for lin in source.spec.linears:
        location = source.tensors[lin.name + ".weight"]
        blocks = np.frombuffer(data, np.uint8)[location.start : location.end].reshape(-1, 20).copy()
        scale = np.float16(2.0**-6)
        blocks[:, :4] = np.frombuffer(scale.tobytes() + np.float16(-7 * scale).tobytes(), np.uint8)
        data[location.start : location.end] = blocks.tobytes()
    path.write_bytes(data)
    source = open_checkpoint(path)
    convert(source, tmp_path / "out", "gptq")
    found = open_checkpoint(tmp_path / "out")
    for lin in source.spec.linears:
        assert torch.equal(source.linear_weight(lin), found.linear_weight(lin)), lin.name
