"""Whole commands over damaged checkpoints and files: what they print, and that they end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

from typer.testing import CliRunner

from fuzz.mutate import TEXTS, mutate_bytes, mutate_json, mutate_value
from qwenq.checkpoint.manifest import JOURNAL_NAME, MANIFEST_NAME, encode_manifest
from qwenq.cli.main import app
from qwenq.errors import QwenqError
from qwenq.escaping import printable_lines
from qwenq.io.safetensors import INDEX_NAME, checkpoint_tensors, encode_header
from qwenq.pipeline.journal import Journal, _line
from qwenq.pipeline.quantize import quantize

if TYPE_CHECKING:
    from fuzz.targets import Workplace

LONGEST_OUTPUT = 200_000
SPECIAL = ("pipe", "zero", "full", "sparse", "folder", "circle", "nowhere", "outside", "empty", "tty")


def invoke(*words: str | Path) -> None:
    """Run a command: QwenqError for one that it refused, AssertionError for what it should not have printed."""
    with TemporaryFile() as beside:
        with into(beside):
            result = CliRunner().invoke(app, list(map(str, words)))
        beside.seek(0)
        printed = beside.read().decode("utf-8", "backslashreplace")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    said = result.stdout + result.stderr + printed
    assert printable_lines(said) == said, f"control characters from {words}"
    assert len(said) < LONGEST_OUTPUT, f"{len(said)} characters from {words}"
    if result.exit_code not in (0, 3):
        assert result.exit_code == 1 or "lists what there is" not in result.stderr, result.stderr
        said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        raise QwenqError(said[-1] if said else "findings")


@contextmanager
def into(file: IO[bytes]) -> Iterator[None]:
    """stdout and stderr of what writes to them past Python, such as libraries in Rust."""
    kept = {handle: os.dup(handle) for handle in (1, 2)}
    try:
        for handle in kept:
            os.dup2(file.fileno(), handle)
        yield
    finally:
        for handle, copy in kept.items():
            os.dup2(copy, handle)
            os.close(copy)


def special(path: Path, kind: str) -> None:
    """Put what is no usual file at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    links = {"zero": "/dev/zero", "full": "/dev/full", "circle": path.name, "nowhere": "gone", "outside": "/etc/passwd",
             "tty": "/dev/tty"}  # fmt: skip
    if kind in links:
        path.symlink_to(links[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 20_000_000_000 if kind == "sparse" else 0)


class Commands:
    """Cases that run commands in a folder of their own."""

    def __init__(self, place: Workplace) -> None:
        self.place, self.root = place, place.root / "commands"
        self.unfinished: Path | None = None

    def fresh(self, source: Path, name: str = "model") -> Path:
        shutil.rmtree(self.root, ignore_errors=True)
        return Path(shutil.copytree(source, self.root / name))

    def command(self, draw: Random, model: Path, packed: bool) -> tuple[str | Path, ...]:
        out, gpu = self.root / "out", ("--gpu", "2x RTX 3090")
        any_kind: list[tuple[str | Path, ...]] = [
            ("inspect", model), ("inspect", model, "--json"), ("plan", model, *gpu), ("vram", model, *gpu, "-c", "2k"),
            ("run", model, "--dry-run", "-c", "64"), ("verify", model),
        ]  # fmt: skip
        if packed:
            tiny = self.place.tiny
            any_kind += [("report", model, "-o", out), ("verify", model, "--source", tiny, "--layers", "none")]
            any_kind += [("convert", model, out, "--format", form) for form in ("compressed-tensors", "gptq")]
        else:
            any_kind.append(("quantize", model, "-o", out, "--dry-run", "--group-size", "32"))
        return draw.choice(any_kind)

    def checkpoint(self, draw: Random) -> None:
        """A JSON file of a checkpoint damaged, then any command on it."""
        packed = draw.random() < 0.6
        model = self.fresh(self.place.finished["gptq"] if packed else self.place.tiny)
        path = model / draw.choice(["config.json", INDEX_NAME, "generation_config.json", "tokenizer_config.json"])
        if path.exists():
            path.write_bytes(mutate_json(draw, json.loads(path.read_bytes())))
        invoke(*self.command(draw, model, packed))

    def signed(self, draw: Random) -> None:
        """A manifest of any content whose digests are right."""
        model = self.fresh(self.place.finished[draw.choice(["gptq", "awq", "compressed-tensors"])])
        document = json.loads((model / MANIFEST_NAME).read_bytes())
        run = document.pop("run")
        document, run = mutate_value(draw, document, draw.choice((1, 1, 3))), mutate_value(draw, run)
        if not isinstance(document, dict) or not isinstance(run, dict):
            return
        for section in (document, run):
            section.pop("digest", None)
        document.pop("manifest", None)
        try:
            data = encode_manifest(document, run)
        except (UnicodeEncodeError, ValueError):  # half a surrogate pair, a number of 5,000 digits
            return
        (model / MANIFEST_NAME).write_bytes(data)
        out = self.root / "out"
        form = draw.choice(["compressed-tensors", "gptq"])
        ways = [("report", model, "-o", out), ("convert", model, out, "--format", form), ("verify", model)]
        invoke(*draw.choice(ways))

    def names(self, draw: Random) -> None:
        """Names of tensors that would like to be something else on the screen."""
        model = self.root / "named"
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir(parents=True)
        shutil.copyfile(self.place.tiny / "config.json", model / "config.json")
        tensors = {name: found.spec for name, found in checkpoint_tensors(self.place.tiny).items()}
        for _ in range(draw.choice((1, 2, 5))):
            old, new = draw.choice(list(tensors)), draw.choice((*TEXTS, "x" * 5_000_000))
            cut = draw.randrange(len(old) + 1)
            tensors[draw.choice((new, old[:cut] + new + old[cut:]))] = tensors.pop(old)
        tensors.pop("__metadata__", None)
        header, _ = encode_header(tensors)
        with open(model / "model.safetensors", "wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for spec in tensors.values()))
        invoke(*draw.choice([("inspect", model), ("inspect", model, "--json"), ("plan", model, "--gpu", "RTX 3090")]))

    def special_files(self, draw: Random) -> None:
        """What is no usual file, in the place of any file that a command reads."""
        packed = draw.random() < 0.5
        model = self.fresh(self.place.finished["gptq"] if packed else self.place.tiny)
        more = ["LICENSE", "README.md", "chat_template.jinja", "merges.txt", "vocab.json", "generation_config.json"]
        path = model / draw.choice(sorted({*more, *(file.name for file in model.iterdir())}))
        special(path, draw.choice(SPECIAL))
        if draw.random() < 0.3:
            self.quantize(model)
        invoke(*self.command(draw, model, packed))

    def quantize(self, model: Path) -> None:
        text = self.place.tiny.parent / "heldout.txt"
        few = ("-n", "2", "--sequence-length", "16", "--group-size", "32", "--calibration", text, "--eval-text", text)
        invoke("quantize", model, "-o", self.root / "out", *few)

    def special_options(self, draw: Random) -> None:
        """What is no usual file, given as an option."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        path = self.root / draw.choice(["x.csv", "x.json", "x.toml", "x.jsonl"])
        special(path, draw.choice(SPECIAL))
        tiny, packed, out = self.place.tiny, self.place.finished["gptq"], self.root / "out"
        dry = ("quantize", tiny, "-o", out, "--dry-run")
        invoke(*draw.choice([
            ("vram", "validate", path), ("vram", "Qwen2.5-7B", "--gpu", "RTX 3090", "--profile", path),
            (*dry, "--recipe", path), (*dry, "--target-size", "1MB", "--sensitivity", path),
            (*dry, "--calibration", path, "--group-size", "32"),
            ("report", packed, "-o", out, "--benchmarks", path), ("report", packed, "-o", out, "--measured", path),
            ("inspect", path), ("verify", path), ("convert", path, out, "--format", "awq"), ("run", path, "--dry-run"),
            ("vram", path, "--gpu", "RTX 3090"), ("plan", path, "--gpu", "RTX 3090"),
        ]))  # fmt: skip

    def places(self, draw: Random) -> None:
        """Paths that no file can have, or that should not be written to."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        path = draw.choice((
            "/", ".", "..", "", "x" * 300, "x/" * 2500, "a\udcffb", "[/x]", "\x1b[31m", "-", "/dev/null/x",
            "/proc/self/mem/x", str(self.root / "a" / "b"), "/dev/full",
        ))  # fmt: skip
        tiny, packed, out = self.place.tiny, self.place.finished["gptq"], self.root / "o"
        dry = ("quantize", tiny, "--dry-run")
        invoke(*draw.choice([
            ("inspect", path), ("verify", path), ("verify", packed, "--source", path), ("report", path, "-o", out),
            ("convert", path, out, "--format", "awq"), ("plan", path, "--gpu", "RTX 3090"), ("vram", path),
            ("vram", "validate", path), (*dry, "-o", path, "--group-size", "32"), (*dry, "-o", out, "--recipe", path),
            (*dry, "-o", out, "--calibration", path, "--group-size", "32"), ("run", path, "--dry-run"),
            ("plan", "x", "--gpu", path),
        ]))  # fmt: skip

    def rows(self, draw: Random) -> None:
        """A journal with one field changed and right checksums, then `--resume`."""
        job = self.place.unfinished_job
        if self.unfinished is None:
            self.unfinished = self.stop(job)
        work = job.out.with_name(job.out.name + ".partial")
        for path in (work, job.out):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.unfinished, work)
        rows = Journal.load(work).rows
        at = draw.randrange(len(rows))
        rows[at] = mutate_value(draw, rows[at])
        check, text = "", b""
        for row in rows:
            if not isinstance(row, dict):
                return
            try:
                line, check = _line(row, check)
            except (UnicodeEncodeError, ValueError):
                return
            text += line + b"\n"
        (work / JOURNAL_NAME).write_bytes(text)
        if draw.random() < 0.2:
            names = [path.name for path in work.iterdir()] + [".qwenq-lock", JOURNAL_NAME + ".tmp", "config.json.tmp"]
            special(work / draw.choice(names), draw.choice(SPECIAL))
        quantize(job, resume=True)
        assert not job.out.is_symlink() and not any(path.is_symlink() for path in job.out.iterdir())

    def stop(self, job: Any) -> Path:
        """The partial directory of a job that was stopped after two layers."""

        class Stop(Exception):
            pass

        def listen(event: Any) -> None:
            if not isinstance(event, str) and event.layer == 1:
                raise Stop

        kept = self.place.root / "unfinished"
        try:
            quantize(job, listen=listen)
        except Stop:
            shutil.copytree(job.out.with_name(job.out.name + ".partial"), kept)
        return kept

    def tables(self, draw: Random) -> None:
        """A file given as an option, damaged."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        tiny, packed, out = self.place.tiny, self.place.finished["gptq"], self.root / "out"
        kind = draw.randrange(4)
        path = self.root / "table"
        if kind == 0:
            row = {"tool": "x", "version": "1", "setting": "4-bit", "text": "heldout", "kl": 0.01, "kl_low": 0.009,
                   "kl_high": 0.011, "bits_per_linear_weight": 4.1, "bytes": 1000, "top1": 0.9,
                   "date": "2026"}  # fmt: skip
            path.write_bytes(b"\n".join(mutate_json(draw, row) for _ in range(draw.choice((1, 3)))))
            invoke("report", packed, "-o", out, "--benchmarks", path)
        elif kind == 1:
            row = {"context": 8, "phase": "prefill", "device": "GPU 0", "kind": "RTX 3090", "allocated_bytes": 10**9,
                   "reserved_bytes": 10**9, "driver_bytes": 2 * 10**9, "exact_bytes": 10**8,
                   "working_bytes": 10**8}  # fmt: skip
            profile = {"kind": "qwenq-vram-profile", "version": 1, "model": "x", "rows": [row, row]}
            path.write_bytes(mutate_json(draw, profile))
            gpu = ("--gpu", "RTX 3090")
            invoke(*draw.choice([
                ("vram", "Qwen2.5-7B", *gpu, "--profile", path), ("report", packed, "-o", out, "--measured", path)
            ]))  # fmt: skip
        elif kind == 2:
            path.write_bytes(mutate_json(draw, self.place.sensitivity))
            dry = ("quantize", tiny, "-o", out, "--dry-run", "--target-size", "1.2MB")
            invoke(*dry, "--sensitivity", path)
        else:
            text = b"model,quant,input_len,mem_gib,env,gpu_num\nQwen2.5-7B,GPTQ-Int4,6144,7.2,A100 torch2.4.0,1\n"
            path.write_bytes(mutate_bytes(draw, text))
            invoke("vram", "validate", path, *(["--json"] if draw.random() < 0.5 else []))
