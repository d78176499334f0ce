#!/usr/bin/env python3
"""Compare `qwenq plan --engine llama.cpp` with llama.cpp's own loader: which layer goes where, and compute buffers.

    check_llamacpp_layers.py [--bin DIR] [--markdown]

Devices are `ggml-rpc-server` processes on this machine's CPU. The model is a GGUF file of the real shapes whose weights
are a hole in the file: `llama-fit-params` loads nothing, but its loader logs each layer's device and what it would
reserve. One JSON line a case, exit code 1 where a layer is elsewhere than planned or weights are off by 0.5 %.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from qwenq.formats.base import get_format
from qwenq.io.gguf import BlockTensor, layout
from qwenq.model.metadata import gguf_names, metadata_of_config
from qwenq.model.spec import ModelSpec, family_spec
from qwenq.planning.case import Case, Workload
from qwenq.planning.engines.base import get_engine
from qwenq.planning.engines.llamacpp import LlamaCppEngine
from qwenq.planning.plan import make_plan
from qwenq.planning.rig import parse_rig
from qwenq.planning.weights import gguf_weights

CASES = (
    ("Qwen2.5-72B", "Q4_K_S", "2x RTX 3090", 8192, "auto"),
    ("Qwen2.5-72B", "Q4_K_M", "2x RTX 3090", 8192, "auto"),
    ("Qwen2.5-72B", "Q4_K_M", "RTX 3090 + RTX 3060 12GB", 4096, "q8_0"),
    ("Qwen2.5-72B", "Q3_K_M", "RTX 4090 + 2x RTX 3060 12GB", 8192, "auto"),
    ("Qwen2.5-72B", "Q8_0", "4x RTX 3090", 16384, "auto"),
    ("Qwen2.5-32B", "Q4_K_M", "RTX 3090 + RTX 3060 12GB", 32768, "auto"),
    ("Qwen2.5-32B", "Q6_K", "RTX 3060 12GB + RTX 3090", 8192, "auto"),
    ("Qwen2.5-14B", "Q5_K_M", "RTX 3060 12GB", 8192, "auto"),
    ("Qwen2.5-7B", "Q4_K_M", "RTX 3060 12GB + RTX 4060", 32768, "auto"),
    ("Qwen2.5-0.5B", "Q8_0", "RTX 3060 12GB + RTX 4060", 4096, "auto"),  # a tied head
)


def hollow_file(spec: ModelSpec, file_type: str, path: Path) -> None:
    """A GGUF of the model's shapes; its weights take no disk."""
    form, names = get_format("gguf"), gguf_names(spec)
    recipe = form.mixture(file_type, spec)
    tensors = list(recipe.outer_tensors(spec, lambda name: form.stored_dtype(name, "F16")))
    for layer in range(spec.num_hidden_layers):
        tensors += recipe.layer_tensors(spec, layer, lambda name: form.stored_dtype(name, "F16"))
    config = {"rms_norm_eps": 1e-6, "rope_theta": 1e6}
    metadata = metadata_of_config(spec, config) | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [f"t{k}" for k in range(spec.vocab_size)],
        "tokenizer.ggml.token_type": [1] * spec.vocab_size,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 1,
    }
    planned = layout(metadata, [BlockTensor(names[t.name], t.dtype, t.shape) for t in tensors])
    with open(path, "wb") as file:
        file.write(planned.header)
        file.truncate(planned.size)


@contextlib.contextmanager
def devices(binary: str, count: int) -> Iterator[list[str]]:
    """Addresses of so many RPC servers."""
    servers, ports = [], []
    try:
        for _ in range(count):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                ports.append(free.getsockname()[1])
            command = [binary, "-H", "127.0.0.1", "-p", str(ports[-1])]
            servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for port in ports:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
        yield [f"127.0.0.1:{port}" for port in ports]
    finally:
        for server in servers:
            server.kill()
            server.wait()


def as_loaded(words: list[str], binary: str, file: Path, addresses: list[str]) -> tuple[dict[str, list[int]], dict]:
    """Layers by device (the output is the last one), and MiB of (weights, cache, compute) by device."""
    kept = {"-ngl", "-c", "-ts", "-ctk", "-ctv", "-ub", "-sm", "-fa"}
    flags = [part for word, value in itertools.pairwise(words) if word in kept for part in (word, value)]
    command = [binary, "-m", str(file), "--rpc", ",".join(addresses), *flags, "-fitp", "on", "-v"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    log = done.stdout + done.stderr
    layers: dict[str, list[int]] = {}
    for layer, device in re.findall(r"load_tensors: layer +(\d+) assigned to device (\w+)", log):
        layers.setdefault(device, []).append(int(layer))
    sizes = {row[0]: [int(n) for n in row[1:4]] for line in done.stdout.splitlines()
             if len(row := line.split()) >= 4 and row[0].startswith(("RPC", "Host"))}  # fmt: skip
    if not layers or not sizes:
        sys.exit(f"llama-fit-params failed: {log[-500:]}")
    return layers, sizes


def check(case: tuple[str, str, str, int, str], tools: dict[str, str], directory: Path) -> dict:
    name, file_type, rig, context, kv = case
    spec, engine = family_spec(name), get_engine("llama.cpp")
    assert spec is not None and isinstance(engine, LlamaCppEngine)
    plan = make_plan(Case(spec, gguf_weights(spec, file_type), engine, Workload(context, kv_dtype=kv), parse_rig(rig)))
    words = engine.command(plan).partition("  #")[0].split()
    words = words[next(k for k, word in enumerate(words) if "=" not in word) :]
    placed = plan.placement if plan.fits else plan.offload
    assert placed is not None
    file = directory / f"{name}-{file_type}.gguf"
    hollow_file(spec, file_type, file)
    gpus = plan.case.hardware.gpus
    with devices(tools["ggml-rpc-server"], len(gpus)) as addresses:
        layers, sizes = as_loaded(words, tools["llama-fit-params"], file, addresses)
    file.unlink()
    end = spec.num_hidden_layers
    wanted = {"CPU": list(placed.host_layers)} if placed.host_layers else {}
    for k, share in enumerate(placed.shares):
        if held := [*share.layers, *([end] if share.head else [])]:
            wanted[f"RPC{k}"] = held
    rows = []
    for k, gpu in enumerate(placed.memory.gpus):
        ours = [gpu.term(term) / (1 << 20) for term in ("weights", "kv_cache")]
        ours.append((gpu.term("activations") + gpu.term("logits")) / (1 << 20))
        rows.append({"device": k, "planned_mib": [round(n, 1) for n in ours], "llama_cpp_mib": sizes[f"RPC{k}"]})
    exact = all(abs(row["planned_mib"][0] - row["llama_cpp_mib"][0]) <= max(1, 0.005 * row["llama_cpp_mib"][0])
                for row in rows)  # fmt: skip
    flags = " ".join(words[words.index("-ngl") :])
    return {
        "model": name, "type": file_type, "rig": rig, "context": context, "kv": kv, "flags": flags,
        "layers_as_planned": layers == wanted, "weights_as_planned": exact, "devices": rows,
        "placed": {device: f"{found[0]}-{found[-1]}" for device, found in layers.items()},
    }  # fmt: skip


def markdown(found: dict) -> str:
    words = found["flags"].split()
    split = words[words.index("-ts") + 1] if "-ts" in words else ""
    cells = ["; ".join(str(row[key][part]) for row in found["devices"])
             for part in range(3) for key in ("planned_mib", "llama_cpp_mib")]  # fmt: skip
    places = ", ".join(f"{device} {span}" for device, span in found["placed"].items())
    said = f"{found['model']} {found['type']}, {found['rig']}, {found['context'] // 1024}k {found['kv']}"
    same = "yes" if found["layers_as_planned"] else "**no**"
    return f"| {said} | {words[1]} | {split} | {places} | {same} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bin", type=Path, help="directory of llama.cpp's tools; else they are looked for on PATH")
    parser.add_argument("--markdown", action="store_true", help="rows of a table instead of JSON")
    args = parser.parse_args()
    tools = {}
    for tool in ("ggml-rpc-server", "llama-fit-params"):
        found = shutil.which(tool, path=str(args.bin) if args.bin else None)
        if found is None:
            sys.exit(f"error: {tool} is not there\nhint: interop/build_llamacpp.sh builds it; --bin DIR")
        tools[tool] = found
    good = True
    with tempfile.TemporaryDirectory() as directory:
        for case in CASES:
            answer = check(case, tools, Path(directory))
            print(markdown(answer) if args.markdown else json.dumps(answer), flush=True)
            good = good and answer["layers_as_planned"] and answer["weights_as_planned"]
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
