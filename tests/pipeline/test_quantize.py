"""The whole job on small models: what is written, what it costs, and every way to stop and go on."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import all_tensors, make_random_model, predicted, small_job, text_windows
from safetensors.torch import load_file, save_file

import qwenq.pipeline.quantize
from qwenq.checkpoint.manifest import JOURNAL_NAME, LOCK_NAME, MANIFEST_NAME
from qwenq.checkpoint.reader import Checkpoint, open_checkpoint, open_source
from qwenq.errors import CheckpointError, JobError, PlanError, QwenqError, UsageError
from qwenq.formats.base import Recipe, Scheme
from qwenq.pipeline import config
from qwenq.pipeline import job as job_module
from qwenq.pipeline.evaluate import evaluate
from qwenq.pipeline.job import QuantizeJob
from qwenq.pipeline.preflight import partial_directory
from qwenq.pipeline.quantize import VRAM_KEPT_FREE, SourceLayers, gpu_for_states, preflight_of, quantize
from qwenq.solver.gptq import DAMP_PERCENT
from qwenq.text.tokens import TokenWindows

Make = Callable[..., Path]
UNFOLDED = {"fold": False, "error_correction": 0.0}
MIXED = Recipe(
    Scheme(4, 32),
    (
        ("model.layers.0.mlp.down_proj", Scheme(8, 32)),
        ("model.layers.1.self_attn.o_proj", None),
        ("model.layers.2.mlp.gate_proj", Scheme(8, -1)),
        ("model.layers.2.mlp.up_proj", Scheme(8, -1)),
    ),
)


def manifest(out: Path) -> dict[str, Any]:
    """The manifest without the facts of this one run."""
    found: dict[str, Any] = json.loads((out / MANIFEST_NAME).read_text())
    assert "seconds" in found.pop("run")
    return found


def assert_same(a: Path, b: Path) -> None:
    """Byte for byte, but for times in the manifest and the journal."""
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir())
    for name in names:
        if name not in (JOURNAL_NAME, MANIFEST_NAME):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert manifest(a) == manifest(b)


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recipe", [Recipe(Scheme(4, 32)), Recipe(Scheme(8, -1)), MIXED], ids=["4", "8", "mixed"])
def test_predicted_bytes_are_written_bytes(recipe: Recipe, tied: bool, random_model: Make, tmp_path: Path) -> None:
    source = random_model(tie_word_embeddings=tied)
    job = small_job(source, tmp_path / "out", recipe=recipe)
    check = predicted(job)
    result = quantize(job)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert check.file_bytes == result.file_bytes == sum(f.stat().st_size for f in files)
    stored = sum(t.numel() * t.element_size() for t in all_tensors(tmp_path / "out").values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert check.tensor_bytes == result.tensor_bytes == stored == index["metadata"]["total_size"]
    whole = sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert whole <= check.disk_needed_bytes
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    assert open_checkpoint(tmp_path / "out").recipe == recipe


def test_what_is_not_quantized_is_the_sources_bytes(random_model: Make, tmp_path: Path) -> None:
    source = random_model(dtype=torch.bfloat16)
    (source / "generation_config.json").write_text('{"odd":   "spacing"}')
    quantize(small_job(source, tmp_path / "out", **UNFOLDED))
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    kept = [name for name in after if name in before]
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].view(torch.int16), before[name].view(torch.int16)), name
    gone = {name for name in before if name not in after}
    assert gone == {name for name in before if name.endswith("_proj.weight")}
    for layer in range(3):
        assert {f"model.layers.{layer}.self_attn.{x}_proj.bias" for x in "qkv"} <= set(kept)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_folding_changes_norms_alone(random_model: Make, tmp_path: Path) -> None:
    """And only those before units that are quantized whole; the function stays, as the drift at 8 bits shows."""
    source = random_model(dtype=torch.bfloat16)
    plain = quantize(small_job(source, tmp_path / "plain", recipe=Recipe(Scheme(8, 32)), **UNFOLDED))
    folded = quantize(small_job(source, tmp_path / "folded", recipe=Recipe(Scheme(8, 32))))
    assert folded.drift.kl.mean < 2 * plain.drift.kl.mean < 1e-3
    quantize(small_job(source, tmp_path / "out", recipe=MIXED))
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    changed = {name for name in set(before) & set(after) if not torch.equal(before[name], after[name])}
    norms = {f"model.layers.{k}.{x}_layernorm.weight" for k in range(3) for x in ("input", "post_attention")}
    assert changed == norms
    assert all(after[name].dtype == torch.bfloat16 for name in norms)
    in_16_bit = ("self_attn.k_proj", "mlp.up_proj")
    some = Recipe(Scheme(4, 32), tuple((f"model.layers.1.{path}", None) for path in in_16_bit))
    quantize(small_job(source, tmp_path / "some", recipe=some))
    after = all_tensors(tmp_path / "some")
    changed = {name for name in set(before) & set(after) if not torch.equal(before[name], after[name])}
    assert changed == {name for name in norms if ".1." not in name}


def test_folding_and_error_correction_each_lose_less(tiny: Path, calib: Path, heldout: Path, tmp_path: Path) -> None:
    kl = {}
    for fold, correction in ((False, 0.0), (True, 0.0), (True, 1.0)):
        job = small_job(
            tiny, tmp_path / f"{fold}-{correction}", fold=fold, error_correction=correction,
            recipe=Recipe(Scheme(4, 64)),
            calibration=text_windows(calib, tiny, 128, 32), evaluation=text_windows(heldout, tiny, 128, 16),
        )  # fmt: skip
        kl[fold, correction] = quantize(job).drift.kl.mean
    assert kl[True, 0.0] < kl[False, 0.0]
    assert kl[True, 1.0] < 0.85 * kl[True, 0.0]


def test_the_format_as_loaders_read_it(random_model: Make, tmp_path: Path) -> None:
    source = random_model()
    quantize(small_job(source, tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert config.items() >= json.loads((source / "config.json").read_text()).items()
    tensors = all_tensors(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"  # [64, 96]
    found = {part: (tensors[f"{name}.{part}"].dtype, list(tensors[f"{name}.{part}"].shape))
             for part in ("qweight", "qzeros", "scales", "g_idx")}  # fmt: skip
    assert found == {
        "qweight": (torch.int32, [12, 64]), "qzeros": (torch.int32, [3, 8]),
        "scales": (torch.float16, [3, 64]), "g_idx": (torch.int32, [96]),
    }  # fmt: skip
    assert bool((tensors[f"{name}.qzeros"] == 0x77777777).all())
    assert tensors[f"{name}.g_idx"].tolist() == [i // 32 for i in range(96)]


def test_manifest_is_strict_json_and_its_hashes_hold(random_model: Make, tmp_path: Path) -> None:
    from qwenq.io.durable import file_sha256
    from qwenq.io.json import read_object

    job = small_job(random_model(), tmp_path / "out")
    one = TokenWindows(job.evaluation.ids[:1], "one window", {})  # a standard error of one window is not a number
    quantize(small_job(job.source.directory, job.out, evaluation=one, overlap=0.25))
    found = read_object(tmp_path / "out" / MANIFEST_NAME)
    assert found["drift"]["perplexity_se"] is None
    assert found["warnings"] == ["25.0 % of the evaluation text also occurs in the calibration text"]
    for name, digest in found["files"].items():
        assert file_sha256(tmp_path / "out" / name) == digest
    assert set(found["files"]) == {p.name for p in job.out.iterdir()} - {JOURNAL_NAME, MANIFEST_NAME}
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    assert found["job"]["scheme"] == {"bits": 4, "group_size": 32, "sym": True, "codes": "int"}


def test_events(random_model: Make, tmp_path: Path) -> None:
    events: list[Any] = []
    result = quantize(small_job(random_model(), tmp_path / "out"), listen=events.append)
    assert [e.layer for e in events if not isinstance(e, str)] == [0, 1, 2]
    assert result.layers == tuple(e for e in events if not isinstance(e, str))
    assert {r.name.rsplit(".", 1)[1] for r in result.layers[0].linears} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all(r.error_db < -5 and not r.fallback for block in result.layers for r in block.linears)


def test_a_fallback_is_recorded_and_shown(random_model: Make, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("qwenq.solver.gptq.factor_lower", lambda h, damp: False)
    result = quantize(small_job(random_model(num_hidden_layers=1), tmp_path / "out"))
    assert all("rounded to nearest" in r.fallback for r in result.layers[0].linears)
    assert len(result.warnings) == 1  # of one kind
    told = "7 linears (model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj and 5 more): fell back"
    assert result.warnings[0].startswith(f"{told} to rounding to nearest (no Cholesky")
    assert manifest(tmp_path / "out")["warnings"] == list(result.warnings)


def test_down_is_damped_by_tokens_per_column_unless_told_otherwise(random_model: Make, tmp_path: Path) -> None:
    source = random_model(num_hidden_layers=1)
    columns, tokens = open_source(source).spec.intermediate_size, 6 * 32
    by_rule = round((columns / tokens) ** 0.5, 3)
    assert by_rule > DAMP_PERCENT
    for given, corrected, down in ((None, 0.0, by_rule), (None, 1.0, DAMP_PERCENT), (0.05, 0.0, 0.05)):
        out = tmp_path / f"{given}-{corrected}"
        (block,) = quantize(small_job(source, out, damp_percent=given, error_correction=corrected)).layers
        other = DAMP_PERCENT if given is None else given
        assert {r.damp_percent for r in block.linears if r.name.endswith("down_proj")} == {down}
        assert {r.damp_percent for r in block.linears if not r.name.endswith("down_proj")} == {other}
        assert manifest(out)["job"]["options"]["damp_percent"] == given


def test_spilled_hidden_states_change_nothing(random_model: Make, tmp_path: Path, monkeypatch: Any) -> None:
    source = random_model()
    quantize(small_job(source, tmp_path / "a"))
    monkeypatch.setattr("qwenq.pipeline.activations.SPILL_BYTES", 0)
    quantize(small_job(source, tmp_path / "b"))
    assert_same(tmp_path / "a", tmp_path / "b")


# ---------------------------------------------------------------------- --dtype


@pytest.mark.parametrize(
    ("stored", "target"), [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "bfloat16")]
)
def test_conversion_of_what_is_not_quantized(stored: str, target: str, random_model: Make, tmp_path: Path) -> None:
    source = random_model(dtype=getattr(torch, stored))
    job = small_job(source, tmp_path / "out", dtype=target, recipe=MIXED, **UNFOLDED)
    result = quantize(job)
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    for name in set(before) & set(after):
        assert torch.equal(after[name], before[name].to(getattr(torch, target))), name
        assert after[name].dtype == getattr(torch, target)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == target  # in both spellings
    assert result.drift == evaluate(open_checkpoint(job.out), job.source, job.evaluation)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.bias", "model.norm.weight", "lm_head.weight"]
)
def test_an_overflow_is_named(name: str, random_model: Make, tmp_path: Path) -> None:
    source = random_model(dtype=torch.bfloat16)
    change_tensor(source, name, 70000.0)
    with pytest.raises(CheckpointError) as caught:
        quantize(small_job(source, tmp_path / "out", dtype="float16"))
    assert f": {name} holds a value of 70144, which does not fit float16" in caught.value.message
    assert caught.value.message.startswith("model-0000") and caught.value.hint == "--dtype bfloat16 holds it"
    assert_nothing_looks_whole(tmp_path / "out")


# ---------------------------------------------------------------------- drift


def test_quantize_and_eval_agree_exactly(random_model: Make, tmp_path: Path) -> None:
    job = small_job(random_model("qwen3", "qwen3", head_dim=32), tmp_path / "out", recipe=MIXED)
    assert quantize(job).drift == evaluate(open_checkpoint(job.out), job.source, job.evaluation)


@pytest.mark.parametrize("bits", [4, 8])
def test_drift_is_that_of_transformers_full_models(bits: int, tiny: Path, heldout: Path, tiny_result: Any) -> None:
    """The oracle: both models whole, the quantized one with weights dequantized, logits in float32, sums in float64."""
    from transformers import Qwen2ForCausalLM

    result = tiny_result(bits, "gptq")
    ids = text_windows(heldout, tiny, 128, 20).ids
    reference = Qwen2ForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    checkpoint = open_checkpoint(result.out)
    state = {f"model.layers.{k}.{name}": t.float() for k in range(4) for name, t in checkpoint.layer_state(k).items()}
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        state[name] = checkpoint.read(name).float()
    quantized = Qwen2ForCausalLM(reference.config).eval()
    quantized.load_state_dict(state, strict=True)
    with torch.no_grad():
        log_p, log_q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (reference, quantized))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    nll_p, nll_q = (-x.gather(2, ids[:, 1:, None])[..., 0] for x in (log_p, log_q))
    drift = result.drift
    assert drift.kl.mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert drift.kl_median == pytest.approx(float(kl.quantile(0.5)), rel=1e-2)
    assert drift.reference_perplexity == pytest.approx(float(nll_p.mean().exp()), rel=1e-5)
    assert drift.perplexity == pytest.approx(float(nll_q.mean().exp()), rel=1e-5)
    assert drift.perplexity_increase_percent.mean == pytest.approx(
        100 * float((nll_q.mean() - nll_p.mean()).expm1()), abs=1e-3
    )
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert drift.top1_agreement.mean == pytest.approx(float(same), abs=1e-3)
    assert (drift.tokens, drift.windows, drift.non_finite) == (20 * 127, 20, 0)


def test_reported_errors_are_those_of_the_outputs(random_model: Make, tmp_path: Path) -> None:
    """The oracle: transformers' quantized model on the calibration tokens; each linear sees there what it was solved
    for, inputs that went through every linear quantized before it. E = ||X (W - Q)'||^2 / ||X W'||^2, where tokens of
    o and down count by the inverse mean square of the states that come of adding X W'.
    """
    from transformers import Qwen2ForCausalLM

    source = random_model()
    job = small_job(source, tmp_path / "out", recipe=MIXED, **UNFOLDED)
    result = quantize(job)
    assert job.calibration is not None
    checkpoint = open_checkpoint(job.out)
    model = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    state = {f"model.layers.{k}.{name}": t.float() for k in range(3) for name, t in checkpoint.layer_state(k).items()}
    model.load_state_dict(state, strict=False)
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, arguments: inputs.update({name: arguments[0].reshape(-1, arguments[0].shape[-1])})

    for name, module in model.named_modules():
        if name.endswith(("_proj", "layernorm")):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(job.calibration.ids)
    told = {r.name: r.error_db for block in result.layers for r in block.linears}
    assert len(told) == 3 * 7 - 1
    for name, error_db in told.items():
        added_to = {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}.get(name.rsplit(".", 1)[1])
        x = inputs[name].double()
        w = job.source.read(name + ".weight").double()
        if added_to is not None:
            after = inputs[f"{name.rsplit('.', 2)[0]}.{added_to}"].double() + x @ w.T
            x = x * after.square().mean(-1, keepdim=True).rsqrt()
        q = state[name + ".weight"].double()
        wanted = 10 * math.log10(float((x @ (w - q).T).square().sum() / (x @ w.T).square().sum()))
        assert error_db == pytest.approx(wanted, abs=0.02), name


def test_quality_on_text_not_calibrated_on(tiny_result: Any) -> None:
    """8 bits lose almost nothing, 4 bits by GPTQ clearly less than by rounding."""
    eight, four, rounded = (tiny_result(*kind).drift for kind in ((8, "gptq"), (4, "gptq"), (4, "rtn")))
    assert eight.kl.mean < 1e-4 < four.kl.mean < 0.02
    assert rounded.kl.mean > 2 * four.kl.mean
    assert eight.top1_agreement.mean > four.top1_agreement.mean > rounded.top1_agreement.mean
    assert eight.noise_floor_kl == 0.0


def test_bfloat16_compute_reports_its_noise_floor(random_model: Make, tmp_path: Path) -> None:
    job = small_job(random_model(), tmp_path / "out", compute_dtype="bfloat16", recipe=Recipe(Scheme(8, 32)))
    drift = quantize(job).drift
    assert 0 < drift.noise_floor_kl < 0.01 and drift.compute_dtype == "bfloat16"
    assert drift == evaluate(open_checkpoint(job.out), job.source, job.evaluation, compute_dtype=torch.bfloat16)


def test_batches_that_end_in_other_bits_are_in_the_numerics(
    random_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small_job(random_model(), tmp_path / "out")
    width, before = job.source.spec.intermediate_size, job.numerics
    monkeypatch.setattr(config, "CPU_BATCH_VALUES", 64 * width)
    assert job.numerics["sums"] == before["sums"] + ", batches of 2 windows"
    monkeypatch.setattr(config, "CPU_BATCH_VALUES", 16 * width)
    assert job.numerics["sums"] == before["sums"] + ", batches of 1 window"
    monkeypatch.setattr(config, "CPU_BATCH_TOKENS", 16)
    monkeypatch.setattr(job_module, "CPU_BATCH_TOKENS", 16)
    assert job.numerics == before, "windows are longer than either"


# ---------------------------------------------------------------------- stopped and resumed

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([  # each child imports what is not here by itself: a third of a second
    "torch", "qwenq.pipeline.quantize", "transformers.models.qwen2.modeling_qwen2", "qwenq.cli.main", "pytest",
    "typer.testing",
])  # fmt: skip


def run_until(source: str, out: str, step: int, interval: float, resume: bool, changes: dict[str, Any]) -> None:
    """Run a job; SIGKILL this process at its `step`-th fsync or rename, before it happens."""
    torch.set_num_threads(1)
    qwenq.pipeline.quantize._STATE_INTERVAL_S = interval
    steps = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            nonlocal steps
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
            return call(*args, **options)

        return wrapper

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    quantize(small_job(source, out, **changes), resume=resume)


def killed_at(step: int, job: QuantizeJob, interval: float, resume: bool = False, **changes: Any) -> bool:
    """False when the job was done before."""
    arguments = (str(job.source.directory), str(job.out), step, interval, resume, changes)
    child = FORKS.Process(target=run_until, args=arguments)
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), child.exitcode
    return child.exitcode != 0


@pytest.mark.parametrize(
    ("interval", "strides", "changes"),  # of the fast tests, of the slow ones
    [
        (0.0, (17, 2), {}),  # hidden states saved after every layer
        (1e9, (19, 3), {"dtype": "bfloat16"}),  # never saved: layers are replayed, from tensors as they were written
        (0.0, (31, 8), {"compute_dtype": "bfloat16"}),
        (1e9, (31, 8), {"compute_dtype": "bfloat16", "recipe": MIXED}),
        (1e9, (31, 6), {"method": "rtn", "calibration": None}),
    ],
    ids=["states", "replay", "bfloat16 states", "bfloat16 replay", "rounding"],
)
@pytest.mark.parametrize("fine", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_anywhere_and_resumed_is_the_same(
    fine: bool, interval: float, strides: tuple[int, int], changes: dict[str, Any],
    random_model: Make, tmp_path: Path, monkeypatch: Any,
) -> None:  # fmt: skip
    source = random_model(hidden_size=32, intermediate_size=64)
    quantize(small_job(source, tmp_path / "whole", **changes))
    monkeypatch.setattr(qwenq.pipeline.quantize, "_STATE_INTERVAL_S", interval)
    step, replays = 0, []
    while True:
        job = small_job(source, tmp_path / "out", **changes)
        if not killed_at(step, job, interval, **changes):
            break
        if job.out.exists():  # killed between the last rename and the end: all that is left is the lock's file
            (job.out / LOCK_NAME).unlink()
            assert_same(tmp_path / "whole", job.out)
            break
        said: list[Any] = []
        quantize(job, resume=True, listen=said.append)
        assert_same(tmp_path / "whole", job.out)
        replays.append(any("replaying" in line for line in said if isinstance(line, str)))
        shutil.rmtree(job.out)
        step += strides[fine]
    assert step > 30
    assert any(replays) if interval else not any(replays)


def test_killed_again_and_again(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    job = small_job(made / "model", tmp_path / "out")
    monkeypatch.setattr(qwenq.pipeline.quantize, "_STATE_INTERVAL_S", 0.0)
    assert all(killed_at(14, job, 0.0, resume=attempt > 0) for attempt in range(2))
    quantize(job, resume=True)
    assert_same(made / "whole", job.out)


class Stop(Exception):
    pass


def stop_after(layer: int) -> Callable[[Any], None]:
    def listen(event: Any) -> None:
        if not isinstance(event, str) and event.layer == layer:
            raise Stop

    return listen


def make_stopped(place: Path, recipe: Recipe, **shape: Any) -> Path:
    """A model, `whole`, which an undisturbed job makes of it, and `out.partial`, a job stopped after layer 1 of 3.

    Hidden states are saved after each layer.
    """
    source = make_random_model(place / "model", **shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwenq.pipeline.quantize, "_STATE_INTERVAL_S", 0.0)
        quantize(small_job(source, place / "whole", recipe=recipe))
        with pytest.raises(Stop):
            quantize(small_job(source, place / "out", recipe=recipe), listen=stop_after(1))
    return place


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; not to be changed."""
    return make_stopped(tmp_path_factory.mktemp("made"), Recipe(Scheme(4, 32)))


@pytest.fixture
def stopped(made: Path, tmp_path: Path, monkeypatch: Any) -> QuantizeJob:
    """The stopped job, `whole` beside it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(qwenq.pipeline.quantize, "_STATE_INTERVAL_S", 0.0)
    return small_job(tmp_path / "model", tmp_path / "out")


def resumed(job: QuantizeJob) -> list[str]:
    said: list[Any] = []
    quantize(job, resume=True, listen=said.append)
    assert_same(job.out.parent / "whole", job.out)
    return [line for line in said if isinstance(line, str)]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_states_fall_back_to_older_ones_then_to_replaying(damage: str, stopped: QuantizeJob) -> None:
    work = partial_directory(stopped.out)
    rows = [json.loads(line) for line in (work / JOURNAL_NAME).read_text().splitlines()]
    newest, oldest = (work / rows[k]["state"]["file"] for k in (2, 1))
    assert newest != oldest

    def harm(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-10])
        if damage == "remove":
            path.unlink()

    saved = shutil.copytree(work, work.with_name("saved"))
    harm(newest)
    said = resumed(stopped)
    assert "layer 1: replaying" in said and "layer 0: replaying" not in said
    shutil.rmtree(stopped.out)
    saved.rename(work)
    harm(newest)
    harm(oldest)
    said = resumed(stopped)
    assert "layer 0: replaying" in said and "layer 1: replaying" in said


def test_two_copies_of_states_never_three(random_model: Make, tmp_path: Path, monkeypatch: Any) -> None:
    """Every second layer saved: the last saved copy must not be the one that is written over."""
    ticks = iter(range(0, 100_000, 20))
    monkeypatch.setattr("qwenq.pipeline.quantize.time.perf_counter", lambda: next(ticks))
    monkeypatch.setattr(qwenq.pipeline.quantize, "_STATE_INTERVAL_S", 30.0)
    job = small_job(random_model(num_hidden_layers=6), tmp_path / "out")
    with pytest.raises(Stop):
        quantize(job, listen=stop_after(5))
    work = partial_directory(job.out)
    rows = [json.loads(line) for line in (work / JOURNAL_NAME).read_text().splitlines()]
    files = [row["state"]["file"] for row in rows if "state" in row]
    assert len(files) >= 2 and all(a != b for a, b in pairwise(files))
    assert len(list(work.glob(".qwenq-state*"))) == 2


def test_changes_are_refused_by_name(stopped: QuantizeJob) -> None:
    source, out = stopped.source.directory, stopped.out
    assert stopped.calibration is not None
    other = TokenWindows(stopped.calibration.ids + 1, "other.txt", {"kind": "random"})
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "seed": ({"seed": 3}, "seed was 0, now 3"),
        "bits": ({"recipe": Recipe(Scheme(8, 32))}, "scheme.bits was 4, now 8"),
        "damping": ({"damp_percent": 0.05}, "options.damp_percent was None, now 0.05"),
        "method": ({"method": "rtn"}, "options.method was 'gptq', now 'rtn'"),
        "dtype": ({"dtype": "bfloat16"}, "dtype was 'auto', now 'bfloat16'"),
        "compute dtype": ({"compute_dtype": "bfloat16"}, "compute_dtype was 'float32', now 'bfloat16'"),
        "calibration": ({"calibration": other}, "calibration.text was 'calibration', now 'other.txt'"),
    }
    for kind, (change, message) in changes.items():
        with pytest.raises(JobError) as caught:
            quantize(small_job(source, out, **change), resume=True)
        assert message in caught.value.message, kind
        assert caught.value.message.startswith(f"{partial_directory(out)}: cannot resume, ")
    resumed(stopped)


# ---------------------------------------------------------------------- places


def assert_nothing_looks_whole(out: Path) -> None:
    assert not out.exists()
    work = partial_directory(out)
    assert not work.exists() or not (work / "config.json").exists()


def refused(job: QuantizeJob, **options: Any) -> str:
    before = sorted(job.out.parent.rglob("*"))
    with pytest.raises(QwenqError) as caught:
        quantize(job, **options)
    assert sorted(job.out.parent.rglob("*")) == before, "something was left behind"
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value.message


def test_where_out_may_be(random_model: Make, tmp_path: Path) -> None:
    source = random_model()
    assert "may not be the model's own directory or inside it" in refused(small_job(source, source))
    assert "may not be the model's own directory or inside it" in refused(small_job(source, source / "out"))
    (tmp_path / "link").symlink_to(source)
    assert "may not be the model's own" in refused(small_job(source, tmp_path / "link" / "out"))
    (tmp_path / "there").mkdir()
    assert refused(small_job(source, tmp_path / "there")) == f"{tmp_path / 'there'}: already exists"
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert refused(small_job(source, tmp_path / "dangling")) == f"{tmp_path / 'dangling'}: already exists"
    (tmp_path / "file").touch()
    assert "Not a directory" in refused(small_job(source, tmp_path / "file" / "out"))


def test_unfinished_jobs(random_model: Make, tmp_path: Path) -> None:
    source = random_model()
    job = small_job(source, tmp_path / "out")
    work = partial_directory(job.out)
    assert refused(job, resume=True) == f"{work}: no unfinished job there to resume"
    work.mkdir()
    (work / "thesis.txt").write_text("somebody's own")
    assert refused(job) == f"{work}: an unfinished job is there"
    assert "no qwenq-journal.jsonl in it, so nothing to resume" in refused_keeping_the_lock(job)
    assert (work / "thesis.txt").read_text() == "somebody's own"


def refused_keeping_the_lock(job: QuantizeJob) -> str:
    with pytest.raises(JobError) as caught:
        quantize(job, resume=True)
    return caught.value.message


def test_disk_too_small(random_model: Make, tmp_path: Path, monkeypatch: Any) -> None:
    job = small_job(random_model(), tmp_path / "out")
    monkeypatch.setattr("qwenq.pipeline.preflight.free_disk", lambda out: 100_000)
    assert "MB of disk, 0.1 MB are free" in refused(job)


def test_a_group_that_divides_nothing(random_model: Make, tmp_path: Path) -> None:
    job = small_job(random_model(), tmp_path / "out", recipe=Recipe(Scheme(4, 64)))
    with pytest.raises(PlanError) as caught:
        quantize(job)
    assert caught.value.message.startswith("model.layers.0.mlp.down_proj: group size 64 does not divide its 96")
    assert "32, -1" in caught.value.hint
    assert_nothing_looks_whole(job.out)


def test_one_directory_one_run(made: Path, tmp_path: Path) -> None:
    """A second run, resumed or not, while the first still hashes its source: refused, and the first goes on."""
    job = small_job(made / "model", tmp_path / "out")
    begun, go_on = threading.Event(), threading.Event()

    def listen(event: Any) -> None:
        begun.set()
        assert go_on.wait(60)

    first = threading.Thread(target=quantize, args=(job,), kwargs={"listen": listen})
    first.start()
    assert begun.wait(60)
    assert refused(job) == f"{partial_directory(job.out)}: an unfinished job is there"
    assert f"in use by process {os.getpid()} on" in refused(job, resume=True)
    go_on.set()
    first.join()
    assert_same(made / "whole", job.out)


def test_threads_racing_for_one_directory(made: Path, tmp_path: Path) -> None:
    outcomes: list[Any] = []
    gate = threading.Barrier(3)

    def run() -> None:
        job = small_job(made / "model", tmp_path / "out")
        gate.wait()
        try:
            outcomes.append(quantize(job).out)
        except JobError as error:
            outcomes.append(error.message)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(tmp_path / "out") == 1
    assert all("unfinished job" in o or "already exists" in o for o in outcomes if isinstance(o, str))
    assert_same(made / "whole", tmp_path / "out")


# ---------------------------------------------------------------------- numbers that are none


def change_tensor(source: Path, name: str, value: float, every: bool = False) -> Path:
    """Put `value` into one element, or every one, of a stored tensor."""
    file = open_source(source).tensors[name].file
    tensors = load_file(file)
    tensors[name].view(-1)[slice(None) if every else 3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.self_attn.v_proj.bias",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(name: str, value: float, random_model: Make, tmp_path: Path) -> None:
    source = random_model()
    file = change_tensor(source, name, value)
    with pytest.raises(CheckpointError) as caught:
        quantize(small_job(source, tmp_path / "out"))
    assert caught.value.message == f"{file}: {name} holds a NaN or an infinity"
    assert_nothing_looks_whole(tmp_path / "out")


@pytest.mark.parametrize(
    "name", [
        "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight",
        "model.norm.weight", "lm_head.weight",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_weights_of_zeros_are_no_model(name: str, method: str, random_model: Make, tmp_path: Path) -> None:
    """A file of its full size that was never filled; uniform against uniform would be a perfect score."""
    source = random_model()
    file = change_tensor(source, name, 0.0, every=True)
    with pytest.raises(CheckpointError) as caught:
        quantize(small_job(source, tmp_path / "out", method=method, calibration=None) if method == "rtn"
                 else small_job(source, tmp_path / "out"))  # fmt: skip
    assert caught.value.message == f"{file}: {name} holds nothing but zeros"
    assert_nothing_looks_whole(tmp_path / "out")


def test_activations_that_are_not_finite_are_named(random_model: Make, tmp_path: Path) -> None:
    source = random_model(dtype=torch.bfloat16)
    change_tensor(source, "model.layers.1.post_attention_layernorm.weight", 3e38)
    with pytest.raises(CheckpointError) as caught:
        quantize(small_job(source, tmp_path / "out"))
    assert caught.value.message == "layer 1: the activations entering gate_proj, up_proj are not finite"
    assert_nothing_looks_whole(tmp_path / "out")


def test_float16_calibrates_nothing(random_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--calibration-dtype float16: wanted float32, bfloat16 or auto$"):
        small_job(random_model(), tmp_path / "out", calibration_dtype="float16")


def test_the_next_layer_read_ahead_is_the_same_and_its_fault_is_told_in_its_turn(
    random_model: Make, tmp_path: Path
) -> None:
    source = open_checkpoint(random_model("m", num_hidden_layers=3))
    file = next(iter(source.files))
    plain, ahead = (SourceLayers(source, ahead=ahead) for ahead in (False, True))
    for layer in (0, 1):
        one, two = plain.take(layer), ahead.take(layer)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    restarted = SourceLayers(source, ahead=True)
    restarted.take(0)
    wanted = source.layer_state(2)["mlp.up_proj.weight"]
    assert torch.equal(restarted.take(2)["mlp.up_proj.weight"], wanted), "not layer 1, which was read ahead"
    damaged = tmp_path / "damaged"
    shutil.copytree(file.parent, damaged)
    at = source.tensors["model.layers.1.mlp.down_proj.weight"]
    with open(damaged / at.file.name, "r+b") as content:
        content.seek(at.start)
        content.write(b"\xff" * (at.end - at.start))  # NaN, in any float
    layers = SourceLayers(open_checkpoint(damaged), ahead=True)
    layers.take(0)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj"):
        layers.take(1)


def test_a_job_that_ends_early_does_not_read_on(random_model: Make, tmp_path: Path, monkeypatch: Any) -> None:
    """Interrupted while layer 1 is read ahead: the thread ends behind the tensor it is at, not behind the layer."""
    read_bytes, reading, read_on = Checkpoint.read_bytes, threading.Event(), threading.Event()
    readers: list[threading.Thread] = []  # that of each tensor read ahead

    def slowly(path: Path, start: int, end: int, hashed: Any = None) -> torch.Tensor:
        if threading.current_thread().name.startswith("qwenq-reader"):
            readers.append(threading.current_thread())
            reading.set()
            assert read_on.wait(60)
        return read_bytes(path, start, end, hashed)

    def interrupted(*operands: Any) -> None:
        assert reading.wait(60)
        raise KeyboardInterrupt

    job = small_job(random_model("m"), tmp_path / "out")
    monkeypatch.setattr(Checkpoint, "read_bytes", staticmethod(slowly))
    monkeypatch.setattr(qwenq.pipeline.quantize, "make_layer", interrupted)
    monkeypatch.setattr(qwenq.pipeline.quantize, "SourceLayers", lambda source, ahead: SourceLayers(source, ahead=True))
    with pytest.raises(KeyboardInterrupt):
        quantize(job)
    read_on.set()
    readers[0].join(60)
    assert len(readers) == 1 and not readers[0].is_alive()


def test_hidden_states_stay_on_one_gpu_with_room(random_model: Make, tmp_path: Path, monkeypatch: Any) -> None:
    job = small_job(random_model("m"), tmp_path / "out")
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    on_gpu = replace(job, config=replace(job.config, device="cuda:0"))
    check = preflight_of(on_gpu)
    assert check.state_vram_bytes >= (6 + 3) * 32 * job.source.spec.hidden_size * 4, "calibration, half of it original"
    wanted = check.peak_vram_bytes + check.state_vram_bytes + VRAM_KEPT_FREE
    for free, place in ((wanted, gpu), (wanted - 1, None)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        assert gpu_for_states(on_gpu, [gpu]) == place
    left = {"cached": 1 << 30}  # by an earlier step of this process
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (wanted - left["cached"], 1 << 40))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.update(cached=0))
    assert gpu_for_states(on_gpu, [gpu]) == gpu
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    assert gpu_for_states(on_gpu, [gpu, torch.device("cuda", 1)]) is None
    two = replace(job, config=replace(job.config, device="cuda:0,cuda:1"))
    assert preflight_of(two).state_vram_bytes == 0, "several GPUs send them through host memory"
    assert gpu_for_states(job, [cpu]) is None
    assert gpu_for_states(replace(on_gpu, calibration=None), [gpu]) is None
