"""Files that never end, never answer, or are another one: refused by name, and never written through."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import answer, run, small_job
from fuzz.commands import special
from test_quantize import Stop, stop_after

from qwenq.checkpoint.manifest import JOURNAL_NAME, LOCK_NAME, verify
from qwenq.errors import CheckpointError, JobError, QwenqError
from qwenq.io.durable import append_synced, make_directory, new_file, write_bytes
from qwenq.io.json import MAX_SMALL_BYTES, inside, read_object
from qwenq.pipeline.journal import Journal, locked
from qwenq.pipeline.preflight import partial_directory
from qwenq.pipeline.quantize import quantize


def invoke(*words: str | Path) -> tuple[int, str]:
    """Exit code and what was said of a command that answers within seconds."""
    start = time.perf_counter()
    result = run(*words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert time.perf_counter() - start < 10
    return result.exit_code, result.stderr


# ---------------------------------------------------------------------- nothing is written through a link


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


def test_a_temporary_file_is_made_anew(victim: Path, tmp_path: Path) -> None:
    for lay in (lambda path: path.symlink_to(victim), lambda path: path.hardlink_to(victim), os.mkfifo):
        lay(tmp_path / "x.json.tmp")
        write_bytes(tmp_path / "x.json", b"new")
        assert victim.read_text() == "precious" and not (tmp_path / "x.json.tmp").exists()
        assert (tmp_path / "x.json").read_bytes() == b"new" and not (tmp_path / "x.json").is_symlink()


def test_a_target_that_is_a_link_is_replaced(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").symlink_to(victim)
    write_bytes(tmp_path / "x.json", b"new")
    assert victim.read_text() == "precious" and not (tmp_path / "x.json").is_symlink()


def test_a_file_in_the_place_of_a_link_is_made_anew(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "state").symlink_to(victim)
    with new_file(tmp_path / "state") as file:
        file.write(b"x")
    assert victim.read_text() == "precious" and (tmp_path / "state").read_bytes() == b"x"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        new_file(tmp_path / "folder")
    assert caught.value.filename == str(tmp_path / "folder")


def test_a_journal_that_is_a_link_is_neither_read_nor_written(victim: Path, tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).symlink_to(victim)
    with pytest.raises(JobError, match="a link"):
        Journal.load(tmp_path)
    with pytest.raises(OSError):
        append_synced(tmp_path / JOURNAL_NAME, b"x")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("kind", ["symbolic", "hard", "pipe", "folder"])
def test_a_lock_that_is_none(kind: str, victim: Path, tmp_path: Path) -> None:
    lock = tmp_path / LOCK_NAME
    {"symbolic": lambda: lock.symlink_to(victim), "hard": lambda: lock.hardlink_to(victim),
     "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()  # fmt: skip
    with pytest.raises(JobError, match="wanted a lock"), locked(tmp_path):
        pass
    assert victim.read_text() == "precious" and os.path.lexists(lock)


def test_the_working_directory_may_be_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to("elsewhere")
    with pytest.raises(NotADirectoryError, match="is a link"):
        make_directory(tmp_path / "out.partial", exist_ok=True)


@pytest.mark.parametrize("name", ["config.json.tmp", "LICENSE", "model-00002-of-00006.safetensors", "notes.tmp"])
def test_no_link_is_resumed_into_the_output(name: str, tiny: Path, victim: Path, tmp_path: Path) -> None:
    job = small_job(tiny, tmp_path / "out", method="rtn", calibration=None)
    with pytest.raises(Stop):
        quantize(job, listen=stop_after(1))
    work = partial_directory(job.out)
    before = {path.name for path in tmp_path.iterdir()}
    moved = tmp_path / "moved"
    if (work / name).exists():
        shutil.move(work / name, moved)
    (work / name).symlink_to(moved if moved.exists() else victim)
    with pytest.raises(JobError, match=f"{name}: a link or not a regular file"):
        quantize(job, resume=True)
    assert victim.read_text() == "precious" and not job.out.exists()
    assert {path.name for path in tmp_path.iterdir()} - {"moved"} == before
    (work / name).unlink()
    if moved.exists():
        shutil.move(moved, work / name)
    quantize(job, resume=True)
    assert not verify(job.out).findings


# ---------------------------------------------------------------------- files that never end or never answer


@pytest.mark.parametrize("kind", ["pipe", "zero", "sparse", "folder", "circle", "nowhere"])
@pytest.mark.parametrize("name", ["LICENSE", "README.md", "config.json", "generation_config.json", "tokenizer.json"])
def test_files_of_a_source(name: str, kind: str, model: Path, tmp_path: Path) -> None:
    special(model / name, kind)
    start = time.perf_counter()
    with pytest.raises(QwenqError) as caught:
        quantize(small_job(model, tmp_path / "out"))
    assert name in caught.value.message and time.perf_counter() - start < 10
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


OPTIONS: dict[str, tuple[str, ...]] = {
    "validate": ("vram", "validate"),
    "profile": ("vram", "Qwen2.5-7B", "--gpu", "RTX 3090", "--profile"),
    "recipe": ("quantize", "MODEL", "-o", "OUT", "--dry-run", "--recipe"),
    "sensitivity": ("quantize", "MODEL", "-o", "OUT", "--dry-run", "--target-size", "1.5MB", "--sensitivity"),
    "calibration": ("quantize", "MODEL", "-o", "OUT", "--dry-run", "--group-size", "32", "--calibration"),
    "directory": ("inspect",),
    "checkpoint": ("verify",),
}


@pytest.mark.parametrize("kind", ["pipe", "zero", "sparse", "circle", "nowhere", "tty"])
@pytest.mark.parametrize("option", OPTIONS)
def test_files_given_as_options(option: str, kind: str, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / ("x.txt" if option == "calibration" else "x")
    special(path, kind)
    words = [{"MODEL": str(tiny), "OUT": str(tmp_path / "out")}.get(word, word) for word in OPTIONS[option]]
    code, said = invoke(*words, path)
    if (option, kind) != ("calibration", "sparse"):  # of a large text a sample is read
        assert code == 1 and "error: " in said
    assert len(said) < 2000


@pytest.mark.parametrize("kind", ["pipe", "zero", "sparse", "folder", "circle", "nowhere"])
@pytest.mark.parametrize("name", ["LICENSE", "config.json", "model-00002-of-00006.safetensors", "qwenq-manifest.json"])
def test_files_of_a_checkpoint(name: str, kind: str, finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    special(out / name, kind)
    code, _ = invoke("verify", out)
    assert code == 1
    invoke("report", out, "-o", tmp_path / "page")


def test_a_small_file_of_the_source_has_a_limit(model: Path, tmp_path: Path) -> None:
    special(model / "LICENSE", "sparse")
    with pytest.raises(CheckpointError, match=f"LICENSE: 20000000000 bytes, more than the {MAX_SMALL_BYTES}"):
        quantize(small_job(model, tmp_path / "out"))


def test_links_in_a_circle_and_long_paths(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(CheckpointError, match="links in a circle"):
        inside(tmp_path, "a")
    with pytest.raises(CheckpointError, match="File name too long"):
        read_object(inside(tmp_path / ("y/" * 3000), "a"))


def test_directories_that_are_links_to_themselves(tiny: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for words in (("inspect", loop), ("verify", loop), ("report", loop, "-o", tmp_path / "page"), ("vram", loop),
                  ("plan", loop, "--gpu", "A100"), ("convert", loop, tmp_path / "c", "--format", "awq"),
                  ("quantize", tiny, "-o", loop), ("quantize", tiny, "-o", loop / "out", "--group-size", "32")):
        code, said = invoke(*words)
        assert code == 1 and said.startswith("error: ")


@pytest.mark.parametrize("path", ["/", "x" * 300, "x/" * 2500, "a\udcffb", "/dev/null/x", "[/x]", "\x1b[31m"])
def test_paths_that_are_none(path: str, tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (("inspect", path), ("verify", path), ("report", path, "-o", "page"), ("plan", path, "--gpu", "A100"),
                  ("convert", path, "out", "--format", "awq"), ("vram", "validate", path)):  # fmt: skip
        code, said = invoke(*words)
        assert code == 1 and said.startswith("error: ") and "\x1b" not in said
    if path == "/" or len(path) > 100 or path.startswith("/dev"):
        text = str(tiny.parent / "heldout.txt")
        few = ("--group-size", "32", "-n", "2", "--sequence-length", "16", "--calibration", text, "--eval-text", text)
        code, said = invoke("quantize", tiny, "-o", path, *few)
        assert code == 1 and "error: " in said


def test_undecodable_names_are_kept_and_escaped(tiny: Path, tmp_path: Path) -> None:
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xffb"))
    quantize(small_job(tiny, out, method="rtn", calibration=None))
    assert not verify(out).findings
    code, _ = invoke("inspect", out)
    assert code == 0
    assert answer("inspect", out)["spec"]["name"] == r"a\xdcffb"
    assert invoke("report", out, "-o", tmp_path / "page")[0] == 0
    assert "a\\xdcffb" in (tmp_path / "page" / "report.html").read_text()
