"""What the tests of the pipeline share: the trained tiny model, random tiny checkpoints, and small jobs on them."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# compiled kernels: not into the user's cache, but kept from run to run
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "user")

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from qwenq.checkpoint.manifest import MANIFEST_NAME, encode_manifest
from qwenq.checkpoint.reader import open_source, read_config
from qwenq.cli.main import app
from qwenq.formats.base import Recipe, Scheme
from qwenq.model.architectures import ARCHITECTURES
from qwenq.model.spec import spec_from_config
from qwenq.pipeline.config import QuantizeConfig, Tokens
from qwenq.pipeline.job import QuantizeJob, QuantizeResult
from qwenq.pipeline.preflight import PlannedJob, Preflight, preflight
from qwenq.pipeline.quantize import quantize
from qwenq.text.calibration import load_windows
from qwenq.text.tokens import ModelTokenizer, TokenWindows

torch.set_num_threads(1)  # also makes sums the same on every machine with the same instructions

_fsync = os.fsync


def _checked_fsync(handle: int) -> None:
    """What fsync refuses is refused, and no disk is waited for: 36 times a job, 5 ms each.

    What a job syncs, and when, is seen by those who replace this in their turn: faulty_disk.py.
    """
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        _fsync(handle)


os.fsync = _checked_fsync

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def tiny() -> Path:
    """A trained Qwen2 of 4 layers, hidden 128, FFN 384, vocabulary 1,024, with q/k/v biases."""
    return DATA / "tiny-qwen2"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(scope="session")
def two_layers(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, cut after 2 of its layers; not to be changed."""
    place = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("cut") / "two-layers"))
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(("model.layers.2.", "model.layers.3."))]:
            del tensors[name]

    return rewrite(place, cut)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A finished checkpoint of the trained model; not to be changed."""
    return quantize(small_job(tiny, tmp_path_factory.mktemp("finished") / "out")).out


@pytest.fixture(scope="session")
def calib() -> Path:
    return DATA / "calib.txt"


@pytest.fixture(scope="session")
def heldout() -> Path:
    return DATA / "heldout.txt"


def make_random_model(
    path: Path, model_type: str = "qwen2", *, dtype: torch.dtype = torch.float16, seed: int = 0, **config: Any
) -> Path:
    """A random checkpoint at `path`, saved by transformers in several shards."""
    import transformers

    prefix = ARCHITECTURES[model_type].classes
    shape = {
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "bos_token_id": 1021, "eos_token_id": 1023,
    }  # fmt: skip
    settings = getattr(transformers, prefix + "Config")(**(shape | config))
    model = getattr(transformers, prefix + "ForCausalLM")(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale, mean = (0.1, 1.0) if "norm" in parameter_name else (0.3, 0.0)
            if parameter.ndim == 2 and "embed" not in parameter_name:
                scale = parameter.shape[1] ** -0.5
            parameter.copy_(noise * scale + mean)
    model.to(dtype).save_pretrained(path, max_shard_size="150KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DATA / "tiny-qwen2" / file, path / file)
    return path


@pytest.fixture
def random_model(tmp_path: Path) -> Callable[..., Path]:
    """make(name, model_type, dtype=..., **config): a random checkpoint saved by transformers in several shards."""

    def make(name: str = "model", model_type: str = "qwen2", **options: Any) -> Path:
        return make_random_model(tmp_path / name, model_type, **options)

    return make


@pytest.fixture
def edit_json() -> Callable[..., dict[str, Any]]:
    """edit(path, **changes): change keys of a JSON file; the value None removes one."""

    def edit(path: Path, **changes: Any) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(path.read_text())
        for key, value in changes.items():
            if value is None:
                content.pop(key, None)
            else:
                content[key] = value
        path.write_text(json.dumps(content))
        return content

    return edit


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, as the safetensors library reads them."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Put all tensors, changed, into one file without an index."""
    tensors = all_tensors(directory)
    change(tensors)
    for file in directory.glob("model*safetensors*"):
        file.unlink()
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def tied_copy(source: Path, place: Path) -> Path:
    """A checkpoint whose head is its embedding: the model computes something else."""
    shutil.copytree(source, place)
    (place / "config.json").write_text(
        json.dumps(json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True})
    )
    return rewrite(place, lambda tensors: tensors.pop("lm_head.weight"))


def forge(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and make its digests right again: only what it says can give it away."""
    document = json.loads((directory / MANIFEST_NAME).read_text())
    change(document)
    run = document.pop("run")
    (directory / MANIFEST_NAME).write_bytes(encode_manifest(document, run))


def run(*words: object, stdin: str | bytes | None = None, **environment: str) -> Result:
    """A command line of qwenq, on a terminal of 120 columns without colours."""
    runner = CliRunner(env={"COLUMNS": "120", "TERM": "dumb"} | environment)
    return runner.invoke(app, [str(word) for word in words], input=stdin)


def answer(*words: object, code: int = 0) -> Any:
    """What a command says in JSON; what it says on stderr where it ends with another exit code."""
    result = run(*words, "--json")
    assert result.exit_code == code, (result.output, result.exception)
    return json.loads(result.stdout) if code == 0 else result.stderr


def small_job(source: Path | str, out: Path | str, **changes: Any) -> QuantizeJob:
    """4 bits g32 of a random tiny checkpoint on 6 calibration and 3 evaluation windows of 32 random tokens.

    changes: of the job, or of its configuration.
    """
    generator = torch.Generator().manual_seed(7)
    draws = {"calibration": (6, 32), "evaluation": (3, 32)}
    tokens = {
        name: TokenWindows(torch.randint(0, 1000, shape, generator=generator), name, {"kind": "random"})
        for name, shape in draws.items()
    }
    parts = {field.name for field in fields(QuantizeJob)}
    job = {name: value for name, value in changes.items() if name in parts}
    config = settled(**{name: value for name, value in changes.items() if name not in parts})
    return QuantizeJob(
        **(
            {"source": open_source(Path(source)), "out": Path(out), "recipe": Recipe(Scheme(4, 32)), "config": config}
            | tokens
            | job
        )
    )


def predicted(job: QuantizeJob) -> Preflight:
    """Sizes and peaks of a small job, predicted from the shapes and dtypes of its source."""
    return preflight(
        PlannedJob(
            job.source.spec, job.recipe, Tokens(6, 3, 32), compute_bytes=4, out=job.out.parent,
            dtype_of=job.stored_dtype, source_dtype_of=job.source.dtype_of,
        )
    )  # fmt: skip


def settled(**options: Any) -> QuantizeConfig:
    """A configuration of a job on a CPU, in float32, with error correction."""
    chosen = {
        "device": "cpu", "compute_dtype": "float32", "calibration_dtype": "float32", "error_correction": 1.0,
        "rotate": False,
    }  # fmt: skip
    return QuantizeConfig(**(chosen | options))


@pytest.fixture
def load(tiny: Path) -> Callable[..., TokenWindows]:
    """load(text, **options): the text's windows of 16 tokens of the tiny model, all of them unless told otherwise."""
    spec = spec_from_config(read_config(tiny))

    def load(text: str | Path, **options: Any) -> TokenWindows:
        asked = {"length": 16, "count": None, "seed": None} | options
        return load_windows(str(text), ModelTokenizer(tiny), spec, **asked)

    return load


def text_windows(text: Path, source: Path, length: int, count: int | None = None) -> TokenWindows:
    """The first windows of a text."""
    spec = open_source(source).spec
    return load_windows(str(text), ModelTokenizer(source), spec, length=length, count=count, seed=None)


@pytest.fixture(scope="session")
def tiny_result(tiny: Path, calib: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory):
    """result(bits, method): the trained model quantized in groups of 32, once a session; drift on text not seen."""
    calibration, evaluation = text_windows(calib, tiny, 128), text_windows(heldout, tiny, 128, 20)

    @cache
    def make(bits: int, method: str) -> QuantizeResult:
        out = tmp_path_factory.mktemp("tiny") / f"{bits}-{method}"
        job = QuantizeJob(
            open_source(tiny), out, Recipe(Scheme(bits, 32)), settled(method=method), calibration, evaluation
        )
        return quantize(job)

    return make


@pytest.fixture(scope="module")
def service(tiny: Path) -> Any:
    """A server's model, the trained one, in this process."""
    from serving import make_service  # whose libraries are an extra's

    return make_service(tiny)


@pytest.fixture(scope="module")
def address(service: Any) -> Iterator[str]:
    """Where it is served."""
    from serving import served

    from qwenq.runtime.server import make_app

    with served(make_app(service)) as found:
        yield found
