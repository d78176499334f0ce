#!/usr/bin/env python3
"""Quantize a Qwen2 model with llama.cpp, write what its file holds as a float32 checkpoint, print what it cost.

    llamacpp_quantize.py MODEL OUT [--type Q4_K_M] [--no-keep-outer] [--pad-columns]

Runs inside the environment of interop/requirements-llamacpp.txt. The 16-bit weights go into a GGUF file without loss,
llama.cpp quantizes that with its default parameters (no importance matrix), and gguf-py dequantizes the result into
OUT/model.safetensors; OUT/TYPE.gguf is kept. Bits are the stored bits of the layers' linears, counted in that file.

llama.cpp quantizes embedding and head as well. --keep-outer (the default) puts the 16-bit ones back, so that only the
linears differ from MODEL; --no-keep-outer leaves the file's own.

Rows that no 256-value block divides get a 32-value type with more bits (Q5_0 for Q4_K, Q8_0 for Q6_K). --pad-columns
adds zero columns up to the next multiple of 256 before quantizing and cuts them off after: what llama.cpp does to a
model of rounder widths. The kept file is then of no model that runs, and a weight's bits are those of its row's type.
One JSON line on stdout; llama.cpp's own log goes to stderr.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from foreign_run import (
    check_paths,
    copy_tokenizer,
    directory_bytes,
    fail,
    peak_rss_bytes,
    print_figures,
    process_age_s,
    versions,
)

OUTER = ("model.embed_tokens.weight", "lm_head.weight")
SUPER_BLOCK = 256  # values that share a scale of scales in the K types


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="16-bit model directory")
    parser.add_argument("out", type=Path, help="directory for the checkpoint and the GGUF file; new or empty")
    parser.add_argument("--type", default="Q4_K_M", help="llama.cpp's name of a mix: Q4_K_M, Q4_K_S, Q5_K_M, Q4_0, ...")
    parser.add_argument(
        "--keep-outer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="embedding and head as in MODEL, not as quantized (on)",
    )
    parser.add_argument("--pad-columns", action="store_true", help="zero columns up to a multiple of 256")
    return parser.parse_args()


def read_tensors(model: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of every stored tensor: float16 and float32 mapped as stored, bfloat16 as float32."""
    for file in sorted(model.glob("*.safetensors")):
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        data = np.memmap(file, np.uint8, "r", offset=8 + length)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            if entry["dtype"] == "BF16":
                values = (data[start:stop].view("<u2").astype(np.uint32) << 16).view(np.float32)
            elif entry["dtype"] in ("F16", "F32"):
                values = data[start:stop].view({"F16": "<f2", "F32": "<f4"}[entry["dtype"]])
            else:
                fail(f"{file.name}: {name} is {entry['dtype']}, wanted F16, BF16 or F32")
            yield name, values.reshape(entry["shape"])


def write_gguf(model: Path, config: dict[str, Any], file: Path, pad_columns: bool) -> dict[str, str]:
    """The model as a GGUF file without a tokenizer; the checkpoint's name of each of its tensors.

    Matrices [out, in] are float16 where the model's are, float32 else; vectors are float32. Qwen2 rotates halves of a
    head in llama.cpp too, so no row changes its place.
    """
    import gguf

    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN2])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    names = {}
    for name, values in read_tensors(model):
        found = name_map.get_name(name, (".weight", ".bias"))
        if found is None:
            fail(f"{name} has no place in a GGUF file of a Qwen2 model")
        if values.ndim == 1:
            values = values.astype(np.float32)
        elif pad_columns:
            values = np.pad(values, ((0, 0), (0, -values.shape[1] % SUPER_BLOCK)))
        writer.add_tensor(found, values)
        names[found] = name
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return names


def quantize_gguf(source: Path, file: Path, kind: str) -> None:
    """llama.cpp's own quantization of a GGUF file; everything but the type is its default."""
    import llama_cpp

    if (file_type := getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}", None)) is None:
        fail(f"llama.cpp knows no type {kind}; Q4_K_M is one")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    if code := llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(file), ctypes.byref(params)):
        fail(f"llama_model_quantize returned {code}")


def quantize(args: argparse.Namespace) -> dict[str, object]:
    """Quantize, dequantize and save; the figures of the JSON line."""
    check_paths(args.model, args.out)
    config = json.loads((args.model / "config.json").read_text())
    if config["model_type"] != "qwen2":
        fail(f"{args.model} is a {config['model_type']} model, wanted qwen2")

    import gguf
    from safetensors.numpy import save_file

    args.out.mkdir(parents=True, exist_ok=True)
    source, file = args.out / "source.gguf", args.out / f"{args.type}.gguf"
    names = write_gguf(args.model, config, source, args.pad_columns)
    start_s = time.perf_counter()
    quantize_gguf(source, file, args.type)
    quantize_s = time.perf_counter() - start_s
    source.unlink()

    originals = dict(read_tensors(args.model))
    tensors: dict[str, np.ndarray] = {}
    types: dict[str, Counter[str]] = {}
    linear_bits, linear_weights, outer_bytes = 0.0, 0, 0
    for tensor in gguf.GGUFReader(file).tensors:
        name = names.pop(tensor.name)
        shape = originals[name].shape
        values = gguf.dequantize(tensor.data, tensor.tensor_type)[..., : shape[-1]]
        if values.shape != shape:
            fail(f"{name} came back as {list(values.shape)}, wanted {list(shape)}")
        if len(shape) > 1:
            module = name.removesuffix(".weight").rpartition(".")[2]
            types.setdefault(module, Counter())[tensor.tensor_type.name] += 1
        if args.keep_outer and name in OUTER:
            values = originals[name]
            outer_bytes += 2 * values.size - int(tensor.n_bytes)
        elif name not in OUTER and len(shape) > 1:
            weights = int(np.prod(shape))
            linear_bits += 8 * int(tensor.n_bytes) / int(tensor.n_elements) * weights
            linear_weights += weights
        tensors[name] = np.ascontiguousarray(values, dtype=np.float32)
    if names:
        fail(f"llama.cpp's file lacks {', '.join(names)}")
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    config.pop("torch_dtype", None)
    (args.out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    copy_tokenizer(args.model, args.out)

    gguf_bytes = directory_bytes(args.out, ".gguf")
    found_versions = versions("llama-cpp-python", "gguf", "safetensors", "numpy")
    rest = (", padded columns" if args.pad_columns else "") + ("" if args.keep_outer else ", embedding and head too")
    return {
        "tool": "llamacpp",
        "model": args.model.name,
        "setting": args.type + rest,
        "keep_outer": args.keep_outer,
        "pad_columns": args.pad_columns,
        "bits_per_linear_weight": round(linear_bits / linear_weights, 4),
        "linear_weights": linear_weights,
        "types": types,
        "bytes": None if args.pad_columns else gguf_bytes + outer_bytes,  # with the embedding and head that are in OUT
        "gguf_bytes": gguf_bytes,
        "quantize_s": round(quantize_s, 2),
        "process_s": round(process_age_s(), 2),
        "peak_rss_bytes": peak_rss_bytes(),
        "versions": found_versions | {"llamacpp": found_versions["llama-cpp-python"]},
    }


if __name__ == "__main__":
    print_figures(parse_args(), quantize)
