"""The readers of untrusted input, each with valid input to damage: a case is read, or refused by a QwenqError."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from gguf_bytes import File, tiny_file

from fuzz.commands import Commands
from fuzz.mutate import NUMBERS, encode, mutate_bytes, mutate_json, mutate_value
from fuzz.templates import Templates
from qwenq.checkpoint.manifest import JOURNAL_NAME, MANIFEST_NAME, encode_manifest, verify
from qwenq.checkpoint.reader import open_checkpoint, read_config
from qwenq.errors import QwenqError
from qwenq.formats.base import parse_scheme, read_quantization_config
from qwenq.io.gguf import GGUFFile
from qwenq.io.json import read_object
from qwenq.io.safetensors import INDEX_NAME, checkpoint_tensors, fingerprint, read_header
from qwenq.model.layer import Network
from qwenq.model.spec import ModelSpec, spec_from_config
from qwenq.pipeline.journal import Journal
from qwenq.pipeline.quantize import quantize
from qwenq.planning.audit import audit, index_total
from qwenq.planning.models import load_model, model_weights
from qwenq.planning.recipefile import read_recipe
from qwenq.planning.sensitivity import prior
from qwenq.planning.validate import read_rows
from qwenq.report.compose import Extras, compose, write_report
from qwenq.report.runs import load_runs
from qwenq.text.calibration import load_windows
from qwenq.text.rendering import TemplateFault
from qwenq.text.tokens import ModelTokenizer

Case = Callable[[Random], Any]


@dataclass
class Target:
    """One reader. `case(draw)` writes a damaged input and reads it."""

    name: str
    case: Case
    share: float = 1.0  # of the cases, relative
    refusals: tuple[type[Exception], ...] = (QwenqError,)


class Workplace:
    """Valid inputs, made once, and a directory in which each case is written."""

    def __init__(self, root: Path, tiny: Path, finished: dict[str, Path]) -> None:
        self.root, self.tiny, self.finished = root, tiny, finished
        self.spec: ModelSpec = spec_from_config(read_config(tiny))
        self.config = json.loads((tiny / "config.json").read_bytes())
        self.index = json.loads((tiny / INDEX_NAME).read_bytes())
        self.shard = min(tiny.glob("*.safetensors"), key=lambda path: path.stat().st_size).read_bytes()
        kinds = {"attn_q": "Q4_0", "attn_k": "Q8_0", "ffn_gate": "Q5_0", "ffn_down": "Q5_1", "output": "Q8_0"}
        self.gguf_file = tiny_file(tiny, types=kinds)
        self.sensitivity = prior(self.spec).to_json() | {"fingerprint": fingerprint(tiny)}
        self.commands = Commands(self)
        self.templates = Templates(tiny)
        self.unfinished_job: Any = None
        self.configs = [json.loads((p / "config.json").read_bytes()) for p in finished.values()]

    def targets(self) -> list[Target]:
        return [
            Target("safetensors header", self.header, 4),
            Target("index", self.shard_index, 3),
            Target("GGUF file", self.gguf, 3),
            Target("split GGUF file", self.split_gguf, 0.5),
            Target("config.json", self.model_config, 3),
            Target("quantization_config", self.quantization, 3),
            Target("network of a config", self.network, 0.5),
            Target("16-bit checkpoint", self.checkpoint, 0.5),
            Target("packed tensors", self.packed, 0.4),
            Target("tokenizer.json", self.tokenizer, 0.4),
            Target("token file", self.npy, 2),
            Target("calibration text", self.jsonl, 2),
            Target("manifest", self.manifest, 2),
            Target("report of a manifest", self.report, 0.5),
            Target("journal", self.journal, 2),
            Target("recipe file", self.recipe, 2),
            Target("measurements", self.measurements, 2),
            Target("labels", self.labels, 1),
            Target("commands on a checkpoint", self.commands.checkpoint, 0.6),
            Target("commands on a signed manifest", self.commands.signed, 0.6),
            Target("commands with a table", self.commands.tables, 0.6),
            Target("names of tensors", self.commands.names, 0.3),
            Target("special files", self.commands.special_files, 0.3),
            Target("special files as options", self.commands.special_options, 0.3),
            Target("paths", self.commands.places, 0.3),
            Target("journal with right checksums", self.commands.rows, 0.03),
            Target("chat templates", self.templates.case, 0.02, (TemplateFault,)),
        ]

    def write(self, name: str, data: bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def header(self, draw: Random) -> Any:
        return read_header(self.write("model.safetensors", self.damaged_shard(draw, self.shard)))

    def damaged_shard(self, draw: Random, data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        if draw.random() < 0.2:
            return mutate_bytes(draw, data[: 8 + length]) + data[8 + length :]
        text = mutate_json(draw, json.loads(data[8 : 8 + length]))
        size = len(text) if draw.random() < 0.9 else draw.choice((0, 1, len(text) - 1, len(text) + 1, 10**8, 2**63))
        return size.to_bytes(8, "little") + text + data[8 + length :]

    def gguf(self, draw: Random) -> Any:
        """A whole model: its metadata, tensors, tokenizer and one layer's values."""
        path = self.write("model.gguf", self.damaged_gguf(draw, self.gguf_file))
        found = open_checkpoint(path)
        tokenizer = ModelTokenizer(path)
        said = tokenizer.encode(["one two", ""]), tokenizer.separator
        if draw.random() < 0.2:
            said += (tokenizer.render_chat([{"role": "user", "content": "x"}]),)
        weights = model_weights(load_model(str(path))).total_bytes
        return said, weights, found.finite_layer_state(0), found.read_slice(found.spec.head_tensor, 0, 2)

    def split_gguf(self, draw: Random) -> Any:
        """The same cut in three, one of which is damaged."""
        half, parts = len(self.gguf_file.tensors) // 3, []
        for number in range(3):
            split = [["split.no", 2, number], ["split.count", 2, 3], ["split.tensors.count", 5, 3 * half]]
            entries = (self.gguf_file.entries if number == 0 else []) + split
            tensors = [[name, sizes, 24, 0] for name, sizes, _, _ in self.gguf_file.tensors[half * number :][:half]]
            for entry in tensors:  # bytes, in the place of all types
                entry[1:] = [[4], 24, 32 * tensors.index(entry)]
            parts.append(replace(self.gguf_file, entries=entries, tensors=tensors, data=bytes(32 * half)))
        broken = draw.randrange(3)
        paths = [
            self.write(f"split-0000{k + 1}-of-00003.gguf", self.damaged_gguf(draw, p) if k == broken else p.encode())
            for k, p in enumerate(parts)
        ]
        return GGUFFile.open(paths[draw.choice((0, 0, 0, 0, 1))])

    def damaged_gguf(self, draw: Random, file: File) -> bytes:
        kind = draw.randrange(10)
        if kind < 7:
            part = draw.choice(("entries", "entries", "tensors", "both"))
            entries, tensors = file.entries, file.tensors
            if part != "tensors":
                entries = mutate_value(draw, entries, draw.choice((1, 1, 2, 5)))
            if part != "entries":
                tensors = mutate_value(draw, tensors, draw.choice((1, 1, 2, 5)))
            lists = [value if isinstance(value, list) else [] for value in (entries, tensors)]
            return replace(file, entries=lists[0], tensors=lists[1]).encode()
        if kind == 7:
            number = draw.choice(NUMBERS)
            field = draw.choice(("version", "tensor_count", "entry_count"))
            return replace(file, **{field: number}).encode()
        header = file.header()
        if kind == 8:
            return mutate_bytes(draw, header) + bytes(-len(header) % 32) + file.data
        return mutate_bytes(draw, file.encode())

    def shard_index(self, draw: Random) -> Any:
        folder = self.root / "indexed"
        if not folder.exists():
            shutil.copytree(self.tiny, folder)
        (folder / INDEX_NAME).write_bytes(mutate_json(draw, self.index))
        return checkpoint_tensors(folder), index_total(folder)

    def model_config(self, draw: Random) -> Any:
        path = self.write("config/config.json", mutate_json(draw, self.config))
        config = read_object(path)
        spec = spec_from_config(config)
        return spec.parameters, audit(spec, config, None)

    def quantization(self, draw: Random) -> Any:
        config = json.loads(json.dumps(draw.choice(self.configs)["quantization_config"]))
        return read_quantization_config(mutate_value(draw, config, 2), "config.json").recipe(self.spec)

    def network(self, draw: Random) -> Any:
        import torch

        config = mutate_value(draw, self.config, 2)
        if not isinstance(config, dict):
            return None  # read_object lets nothing else through
        return Network(config, spec_from_config(config), dtype=torch.float32)

    def checkpoint(self, draw: Random) -> Any:
        return self.damaged_checkpoint(draw, self.tiny)

    def packed(self, draw: Random) -> Any:
        name = draw.choice(list(self.finished))
        found = self.damaged_checkpoint(draw, self.finished[name])
        return found.layer_state(0)

    def damaged_checkpoint(self, draw: Random, source: Path) -> Any:
        folder = self.root / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        if draw.random() < 0.4:
            path = folder / "config.json"
            path.write_bytes(mutate_json(draw, json.loads(path.read_bytes())))
        else:
            path = draw.choice(sorted(folder.glob("*.safetensors")))
            data = path.read_bytes()
            if draw.random() < 0.5:
                path.write_bytes(self.damaged_shard(draw, data))
            else:  # tensors: any codes, scales and group indices
                start = 8 + int.from_bytes(data[:8], "little")
                noise = bytes(draw.randrange(256) for _ in range(64))
                at = draw.randrange(start, len(data))
                path.write_bytes(data[:at] + noise[: len(data) - at] + data[at + 64 :])
        return open_checkpoint(folder)

    def tokenizer(self, draw: Random) -> Any:
        folder = self.root / "tokenizer"
        if not folder.exists():
            shutil.copytree(self.tiny, folder)
        data = json.loads((self.tiny / "tokenizer.json").read_bytes())
        settings = json.loads((self.tiny / "tokenizer_config.json").read_bytes())
        if draw.random() < 0.7:
            (folder / "tokenizer.json").write_bytes(mutate_json(draw, data))
            (folder / "tokenizer_config.json").write_bytes(encode(settings))
        else:
            (folder / "tokenizer.json").write_bytes(encode(data))
            (folder / "tokenizer_config.json").write_bytes(mutate_json(draw, settings))
        found = ModelTokenizer(folder)
        return found.encode(["one two", ""]), found.separator, found.render_chat([{"role": "user", "content": "x"}])

    def npy(self, draw: Random) -> Any:
        buffer = io.BytesIO()
        np.save(buffer, np.arange(64, dtype=np.int64).reshape(4, 16))
        path = self.write("tokens.npy", mutate_bytes(draw, buffer.getvalue()))
        return self.windows(path)

    def jsonl(self, draw: Random) -> Any:
        rows = [{"text": "one two three " * 20}, {"messages": [{"role": "user", "content": "four five " * 20}]}]
        lines = [mutate_json(draw, draw.choice(rows)) for _ in range(draw.choice((1, 2)))]
        return self.windows(self.write("text.jsonl", b"\n".join([encode(rows[0]), *lines])))

    def windows(self, path: Path) -> Any:
        return load_windows(str(path), ModelTokenizer(self.tiny), self.spec, length=16, count=None, seed=None)

    def manifest(self, draw: Random) -> Any:
        return verify(self.run_with_manifest(draw), self.tiny)

    def report(self, draw: Random) -> Any:
        """A manifest whose digests are right again: whoever can change the values can do that too."""
        document = json.loads((self.finished["gptq"] / MANIFEST_NAME).read_bytes())
        run = document.pop("run")
        document, run = mutate_value(draw, document), mutate_value(draw, run) if draw.random() < 0.3 else run
        if not isinstance(document, dict) or not isinstance(run, dict) or "\\ud800" in json.dumps([document, run]):
            return None
        for section in (document, run):
            section.pop("digest", None)
        document.pop("manifest", None)
        self.write("run/" + MANIFEST_NAME, encode_manifest(document, run))
        write_report(
            compose(load_runs([self.root / "run"]), Extras()), self.root / "report.html", self.root / "report.md"
        )
        return None

    def run_with_manifest(self, draw: Random) -> Path:
        folder = self.root / "run"
        document = json.loads((self.finished["gptq"] / MANIFEST_NAME).read_bytes())
        self.write("run/" + MANIFEST_NAME, mutate_json(draw, document))
        return folder

    def journal(self, draw: Random) -> Any:
        lines = (self.finished["gptq"] / JOURNAL_NAME).read_bytes().splitlines()
        at = draw.randrange(len(lines))
        lines[at] = mutate_json(draw, json.loads(lines[at]))
        self.write("journal/" + JOURNAL_NAME, b"\n".join(lines))
        return Journal.load(self.root / "journal").layers

    def recipe(self, draw: Random) -> Any:
        rows = "".join(
            f'{k} = {{ qkv = "8-bit g32", o = "4-bit g64", gate_up = "4-bit g128", down = "16-bit" }}\n'
            for k in range(self.spec.num_hidden_layers)
        )
        data = f'version = 1\nmodel = "tiny"\n[layer]\n{rows}'.encode()
        return read_recipe(self.write("recipe.toml", mutate_bytes(draw, data)), self.spec)

    def labels(self, draw: Random) -> Any:
        label = draw.choice(("4-bit g128", "8-bit per channel", "4-bit g32 asym", "16-bit", "NF4 g64"))
        return parse_scheme(mutate_bytes(draw, label.encode()).decode("utf-8", "replace"))

    def measurements(self, draw: Random) -> Any:
        data = b"model,quant,input_len,mem_gib\nQwen2.5-7B-Instruct,GPTQ-Int4,6144,7.23\nQwen2.5-7B,BF16,1,14.92\n"
        return read_rows(self.write("runs.csv", mutate_bytes(draw, data)))


def make_workplace(root: Path, tiny: Path, jobs: dict[str, Any], unfinished: Any) -> Workplace:
    """Quantize the tiny model once for each format in `jobs`, then damage what came out.

    unfinished: a job to be stopped and resumed.
    """
    finished = {}
    for name, job in jobs.items():
        quantize(job)
        finished[name] = job.out
    place = Workplace(root, tiny, finished)
    place.unfinished_job = unfinished
    return place
