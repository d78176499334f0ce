"""Manifests and checkpoints for the tests of reports, made by hand: every figure in them is known."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from qwenq.checkpoint.manifest import MANIFEST_NAME, encode_manifest
from qwenq.checkpoint.shards import stored_files
from qwenq.formats.base import Recipe, Scheme, quantization_config
from qwenq.io.safetensors import encode_header
from qwenq.model.spec import family_configs, family_spec

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def interval(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


def manifest(*, layers: int = 3, method: str = "gptq", kl: float = 0.02, scheme: str = "4-bit g64") -> dict[str, Any]:
    """What `qwenq quantize` writes, with errors of -20 - layer - kind dB."""
    return {
        "job": {
            "qwenq": "0.1.0",
            "model": "some-model",
            "scheme": {"bits": 4, "group_size": 64, "sym": True},
            "overrides": {},
            "options": {"method": method, "damp_percent": 0.02},
            "device": "cpu",
            "compute_dtype": "float32",
            "dtype": "auto",
            "seed": 7,
            "calibration": {"text": "builtin", "windows": 64, "window_tokens": 512, "tokens_sha256": "c" * 64},
            "evaluation": {"text": "heldout", "windows": 20, "window_tokens": 512, "tokens_sha256": "e" * 64},
            "overlap": 0.0,
            "source": {"model.safetensors": "5" * 64, "config.json": "0" * 64},
        },
        "parameters": 1000,
        "tensor_bytes": 170_000_000,
        "file_bytes": 171_309_384,
        "bits_per_linear_weight": 4.3125,
        "drift": {
            "reference_perplexity": 15.0,
            "reference_perplexity_se": 0.5,
            "perplexity": 16.5,
            "perplexity_se": 0.6,
            "perplexity_increase_percent": interval(10.0, 8.0, 12.0),
            "kl": interval(kl, 0.9 * kl, 1.2 * kl),
            "kl_median": kl / 2,
            "kl_p99": 10 * kl,
            "top1_agreement": interval(0.8, 0.78, 0.82),
            "noise_floor_kl": 0.0,
            "non_finite": 0,
            "tokens": 10220,
            "windows": 20,
            "window_tokens": 512,
            "text": "heldout",
            "text_sha256": "e" * 64,
            "compute_dtype": "float32",
            "metrics_version": 1,
        },
        "warnings": [],
        "layers": [
            {
                "layer": layer,
                "linears": [
                    {
                        "name": f"model.layers.{layer}.x.{kind}",
                        "scheme": scheme,
                        "error_db": -20.0 - layer - k if method == "gptq" else None,
                        "weight_error_db": -19.0,
                        "damp_percent": 0.02,
                        "fallback": "",
                    }
                    for k, kind in enumerate(KINDS)
                ],
                "stream_error_db": -30.0 + layer,
            }
            for layer in range(layers)
        ],
        "files": {"config.json": "0" * 64},
        "run": {
            "seconds": 125.0,
            "resumed": False,
            "peak_rss_bytes": 1_200_000_000,
            "layer_seconds": [40.0] * layers,
            "stages_s": {"load": 1.0, "forward": 61.0},
            "threads": 2,
            "torch": "2.13.0",
            "python": "3.11.7",
            "machine": "x86_64",
            "system": "Linux",
            "finished": "2026-11-23T18:00:14Z",
        },
    }


def changed(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the value at a dotted path replaced; numbers index lists."""
    found = copy.deepcopy(base)
    *way, last = path.split(".")
    place: Any = found
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[int(last) if last.isdigit() else last] = value
    return found


def write_run(directory: Path, content: dict[str, Any]) -> Path:
    """A directory that holds a manifest alone."""
    directory.mkdir(parents=True)
    made = {key: value for key, value in content.items() if key != "run"}
    (directory / MANIFEST_NAME).write_bytes(encode_manifest(made, {**content["run"], "files": {}}))
    return directory


def write_72b(directory: Path, content: dict[str, Any], scheme: Scheme) -> Path:
    """A checkpoint of Qwen2.5-72B's shapes: true headers, and files that take no room on the disk."""
    spec = family_spec("Qwen2.5-72B")
    assert spec is not None
    recipe = Recipe(scheme)
    write_run(directory, content)
    quantization = {"quantization_config": quantization_config(recipe, spec, damp_percent=0.02, method="gptq")}
    (directory / "config.json").write_text(json.dumps(family_configs()["Qwen2.5-72B"] | quantization))
    index = {}
    files = stored_files(spec, recipe, lambda name: "BF16")
    for file, tensors in zip(files.names, files.parts, strict=True):
        header, _ = encode_header({t.name: t for t in tensors})
        with open(directory / file, "wb") as written:
            written.write(header)
            written.truncate(len(header) + sum(t.nbytes for t in tensors))
        index |= {t.name: file for t in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory
