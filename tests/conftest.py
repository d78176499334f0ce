"""What the tests of the pipeline share: the trained tiny model, random tiny checkpoints, and small jobs on them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # also makes sums the same on every machine with the same instructions

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def tiny() -> Path:
    """A trained Qwen2 of 4 layers, hidden 128, FFN 384, vocabulary 1,024, with q/k/v biases."""
    return DATA / "tiny-qwen2"


@pytest.fixture(scope="session")
def calib() -> Path:
    return DATA / "calib.txt"


@pytest.fixture(scope="session")
def heldout() -> Path:
    return DATA / "heldout.txt"


@pytest.fixture
def random_model(tmp_path: Path, tiny: Path) -> Callable[..., Path]:
    """make(name, model_type, dtype=..., **config): a random checkpoint saved by transformers in several shards."""

    def make(
        name: str = "model",
        model_type: str = "qwen2",
        *,
        dtype: torch.dtype = torch.float16,
        seed: int = 0,
        **config: Any,
    ) -> Path:
        import transformers

        prefix = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[model_type]
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
        path = tmp_path / name
        model.to(dtype).save_pretrained(path, max_shard_size="150KB")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tiny / file, path / file)
        return path

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
