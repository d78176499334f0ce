"""Checkpoints made to harm: nothing of theirs is run, no link is followed, and what the fuzz run found stays mended."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_job

from qwenq.checkpoint.reader import open_checkpoint, read_config
from qwenq.cli.plain import escape_logs
from qwenq.errors import CalibrationError, CheckpointError, QwenqError
from qwenq.io.json import inside, parse_object
from qwenq.model.layer import Network
from qwenq.model.spec import spec_from_config
from qwenq.pipeline.evaluate import evaluate
from qwenq.pipeline.quantize import quantize
from qwenq.planning.validate import read_rows
from qwenq.text.calibration import load_windows
from qwenq.text.tokens import ModelTokenizer
from tests.conftest import run

# ---------------------------------------------------------------------- code

CANARY = """
from pathlib import Path
Path(__file__).with_name("canary").write_text("was run")
class Model: pass
"""


def test_remote_code_is_never_run(model: Path, edit_json: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A module in the directory, named by every auto_map there is, through quantize, chat templates and eval."""
    (model / "modeling_canary.py").write_text(CANARY)
    (model / "tokenization_canary.py").write_text(CANARY)
    edit_json(
        model / "config.json",
        auto_map=dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_canary.Model"),
        trust_remote_code=True,
        custom_pipelines={"x": {"impl": "modeling_canary.Model"}},
    )
    edit_json(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_canary.Model", "tokenization_canary.Model"]},
        tokenizer_class="Model",
        trust_remote_code=True,
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
    monkeypatch.syspath_prepend(str(tmp_path))  # even where the directory could be imported from
    job = small_job(model, tmp_path / "out")
    quantize(job)
    assert ModelTokenizer(model).render_chat([{"role": "user", "content": "hello"}]) == "hello"
    evaluate(open_checkpoint(job.out), job.source, job.evaluation)
    assert not list(tmp_path.rglob("canary"))
    assert not [name for name in sys.modules if "canary" in name]
    assert not list(job.out.glob("*.py"))


def test_no_compiled_code_is_fetched(tmp_path: Path) -> None:
    """bitsandbytes asks the package `kernels` for code from the hub while it is imported: it must not find it."""
    pytest.importorskip("bitsandbytes")
    (tmp_path / "kernels.py").write_text(CANARY + "\ndef get_kernel(*a, **k): pass\n")
    code = (
        "import torch; from qwenq.formats.bitsandbytes import _functional; "
        "_functional().int8_vectorwise_quant(torch.ones(64, 64).half()); "
        f"import os; assert not os.path.exists({str(tmp_path / 'canary')!r}), 'imported'; "
        "import kernels"  # it is there for others afterwards
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "kernels" not in done.stderr, done.stderr
    assert (tmp_path / "canary").exists()


def test_a_template_cannot_reach_python(model: Path, edit_json: Any) -> None:
    reach = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    edit_json(model / "tokenizer_config.json", chat_template=reach)
    with pytest.raises(CalibrationError, match="its chat template refused a conversation"):
        ModelTokenizer(model).render_chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", "consolidated.pth"])
def test_pickles_are_refused_by_name_and_not_opened(name: str, model: Path) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / name).mkdir()  # opening it would fail in another way
    answer = run("quantize", model, "-o", model.parent / "out")
    assert answer.exit_code == 1
    assert f"only pickled weights ({name}), which can run code: refused" in answer.stderr


# ---------------------------------------------------------------------- links

LINKED = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "vocab.json"]


@pytest.mark.parametrize("name", LINKED)
def test_no_file_is_read_through_a_link_that_leads_out(name: str, model: Path, tmp_path: Path) -> None:
    """Not even to be copied into the output: a link to a private file would be published with it."""
    secret = tmp_path / "secret"
    shutil.copyfile(model / name, secret) if (model / name).exists() else secret.write_text("{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"^{name} links to a file outside the checkpoint's directory: refused$"):
        quantize(small_job(model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_hub_caches_own_links_are_followed(tiny: Path, tmp_path: Path) -> None:
    """As huggingface_hub lays it out: snapshots/COMMIT/name -> ../../blobs/HASH."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for k, file in enumerate(sorted(tiny.iterdir())):
        shutil.copyfile(file, blobs / str(k))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(k))
    assert quantize(small_job(snapshot, tmp_path / "out")).drift.kl.mean > 0
    (tmp_path / "other").write_text("{}")
    (snapshot / "LICENSE").symlink_to("../../../other")
    with pytest.raises(CheckpointError, match="LICENSE links to a file outside"):
        quantize(small_job(snapshot, tmp_path / "again"))


# ---------------------------------------------------------------------- what the fuzz run found


def changed(config: Path, **changes: Any) -> dict[str, Any]:
    return json.loads(config.read_text()) | changes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("vocab_size", 1 << 62),
        ("hidden_size", 1 << 40),
        ("max_position_embeddings", 10**30),
        ("extended_context", "long"),
        ("extended_context", [1]),
        ("rope_scaling", {"type": "yarn", "factor": 1e308}),
        ("rope_scaling", {"type": "yarn", "factor": 4, "original_max_position_embeddings": 10**30}),
        ("model_type", ["qwen2"]),
    ],
)
def test_absurd_configurations(key: str, value: Any, tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^config.json: ") as caught:
        spec_from_config(changed(tiny / "config.json", **{key: value}))
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_cache", "\x1b[31m"),
        ("rms_norm_eps", [True]),
        ("hidden_act", "no such function"),
        ("rope_scaling", {"rope_type": "nothing"}),
        ("layer_types", 3),
    ],
)
def test_what_transformers_does_not_take(key: str, value: Any, tiny: Path) -> None:
    import torch

    config = changed(tiny / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=r"^config.json: transformers cannot build a layer from it \(") as caught:
        Network(config, spec_from_config(config), dtype=torch.float32)
    assert caught.value.message.isprintable()


def test_a_rotary_base_that_torch_does_not_take(model: Path, edit_json: Any) -> None:
    """A number below the limit of digits, and above what torch converts; by every way to a network."""
    edit_json(model / "config.json", rope_theta=10**98)
    few = ["-n", "2", "--sequence-length", "16", "-o", str(model / "s")]
    for words in (["run", "-p", "x"], ["vram", "measure", "-c", "64"], ["sensitivity", *few]):
        result = run(*words, model)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: config.json: transformers cannot build a layer from it (int too big"), (
            words
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (rb'{"a": "\ud800"}', "half of a surrogate pair"),
        (rb'{"\uDFFF": 1}', "half of a surrogate pair"),
        (b'{"a": 1e999}', "1e999, which is not a JSON number"),
        (b'{"a": -1e999}', "-1e999, which is not a JSON number"),
    ],
)
def test_json_that_cannot_be_written_again(text: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_object(text, "x.json")
    assert parse_object(rb'{"a": "\ud83d\ude00", "b": "\\ud800"}', "x") == {"a": "😀", "b": r"\ud800"}


def test_names_too_long_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is too long: refused"):
        inside(tmp_path, "é" * 128)


def test_sliding_window_of_any_type(model: Path, edit_json: Any) -> None:
    edit_json(model / "config.json", use_sliding_window=True, sliding_window="4096")
    with pytest.raises(CheckpointError, match="with a window of 4096 tokens is not supported"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    "data",
    [
        b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (4, 16,".ljust(128),
        b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (1 << 40, 16)}".ljust(128),
        b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776, 16), }".ljust(128),
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1, 1), }".ljust(128),
        b"",
        b"\x93NUMPY",
        b"\x80\x04.",
    ],
    ids=["cut", "expression", "a terabyte", "objects", "empty", "magic", "pickle"],
)
def test_token_files_that_are_none(data: bytes, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(data)
    spec = spec_from_config(read_config(tiny))
    with pytest.raises(CalibrationError, match=r"x\.npy: not a NumPy array") as caught:
        load_windows(str(tmp_path / "x.npy"), ModelTokenizer(tiny), spec, length=16, count=None, seed=None)
    assert caught.value.message.isprintable()
    np.savez(tmp_path / "y.npy", a=np.zeros(3))
    (tmp_path / "y.npy.npz").rename(tmp_path / "y.npy")
    with pytest.raises(CalibrationError, match="an archive"):
        load_windows(str(tmp_path / "y.npy"), ModelTokenizer(tiny), spec, length=16, count=None, seed=None)


def test_text_that_is_none(tiny: Path, tmp_path: Path) -> None:
    spec = spec_from_config(read_config(tiny))
    for row in (r'{"text": "\ud800"}', r'{"messages": [{"role": "\ud800", "content": "x"}]}'):
        (tmp_path / "x.jsonl").write_text(row)
        with pytest.raises(CalibrationError, match=r"x.jsonl, line 1: half of a surrogate pair"):
            load_windows(str(tmp_path / "x.jsonl"), ModelTokenizer(tiny), spec, length=16, count=None, seed=None)


def test_tokenizer_configurations_that_are_none(model: Path) -> None:
    path = model / "tokenizer_config.json"
    path.write_text('{"chat_template": "x", "additional_special_tokens": true}')
    with pytest.raises(QwenqError) as caught:
        ModelTokenizer(model).render_chat([{"role": "user", "content": "x"}])
    assert caught.value.message.isprintable()


def test_measurements_cut_short(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("model,quant,input_len,mem_gib\nQwen2.5-7B,GPTQ-Int4\n")
    with pytest.raises(QwenqError):
        read_rows(tmp_path / "x.csv")


def test_logs_of_libraries_move_no_cursor() -> None:
    """transformers' own warnings quote config.json."""
    before = logging.getLogRecordFactory()
    try:
        escape_logs()
        log = logging.getLogger("somebody's")
        record = log.makeRecord(log.name, logging.WARNING, "", 1, "unknown %s\nof %d", ("\x1b[31m", 1), None)
        assert record.getMessage() == "unknown \\x1b[31m\nof 1"
        assert log.makeRecord(log.name, logging.WARNING, "", 1, "%d", ("x",), None).args == ("x",)  # as it was
    finally:
        logging.setLogRecordFactory(before)


def test_every_message_is_one_printable_line() -> None:
    error = QwenqError("a\n\x1b[31mb", hint="c\r\u2028d")
    assert (error.message, error.hint, str(error)) == ("a\\x0a\\x1b[31mb", "c\\x0d\\x2028d", "a\\x0a\\x1b[31mb")
