"""The manifest and `qwenq verify`: a flipped byte anywhere is named, two runs of one command have one digest."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import forge, run, small_job

from qwenq.checkpoint.manifest import JOURNAL_NAME, MANIFEST_NAME, canonical, encode_manifest, read_manifest, verify
from qwenq.errors import CheckpointError
from qwenq.pipeline.quantize import quantize

Make = Callable[..., Path]


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def flip(path: Path, at: int, mask: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))


def test_canonical_form_by_hand() -> None:
    assert canonical({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'.encode()


def test_literal_bytes_and_digests() -> None:
    """The digest is that of sorted JSON without `run`, computed here from text."""
    text = encode_manifest({"z": 1, "a": {"q": 2, "b": 3}, "files": {}}, {"seconds": 1.5, "files": {}}).decode()
    content = hashlib.sha256(b'{"a":{"b":3,"q":2},"files":{},"manifest":1,"z":1}').hexdigest()
    run = hashlib.sha256(b'{"files":{},"seconds":1.5}').hexdigest()
    assert json.loads(text)["digest"] == content and json.loads(text)["run"]["digest"] == run
    assert text.startswith('{\n  "manifest": 1,\n  "z": 1,\n') and text.endswith("  }\n}\n")


def test_what_it_says(finished: Path, tiny: Path) -> None:
    manifest, findings = read_manifest(finished)
    assert findings == []
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in finished.iterdir()}
    assert manifest["files"] | manifest["run"]["files"] == {n: d for n, d in digests.items() if n != MANIFEST_NAME}
    assert list(manifest["run"]["files"]) == [JOURNAL_NAME]
    source = manifest["job"]["source"]
    assert {*(p.name for p in tiny.glob("*.safetensors")), "config.json", "tokenizer.json"} <= set(source)
    assert all(hashlib.sha256((tiny / name).read_bytes()).hexdigest() == digest for name, digest in source.items())
    assert set(manifest["job"]["numerics"]) == {"torch", "transformers", "threads", "instructions", "sums"}
    assert manifest["job"]["calibration"]["tokens_sha256"] and manifest["job"]["seed"] == 0
    assert set(manifest["versions"]) >= {"qwenq", "python", "torch", "transformers", "tokenizers", "safetensors"}
    assert {"seconds", "peak_rss_bytes", "resumed", "processor", "finished", "digest"} <= set(manifest["run"])
    assert len(manifest["layers"]) == 4 and manifest["drift"]["kl"]["mean"] > 0


def test_two_runs_of_one_command(finished: Path, tiny: Path, tmp_path: Path) -> None:
    """Identical trees but for `run` and the journal; the digest is that of both."""
    quantize(small_job(tiny, tmp_path / "again"))
    again = tmp_path / "again"
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in finished.iterdir())
    for path in again.iterdir():
        if path.name not in (MANIFEST_NAME, JOURNAL_NAME):
            assert path.read_bytes() == (finished / path.name).read_bytes(), path.name
    one, other = (json.loads((d / MANIFEST_NAME).read_text()) for d in (finished, again))
    assert one.pop("run")["finished"] and other.pop("run")["finished"]
    assert one == other and one["digest"] == other["digest"]


def test_nothing_to_find(finished: Path, tiny: Path) -> None:
    result = verify(finished, tiny)
    assert result.findings == () and result.files == len(list(finished.iterdir())) - 1
    assert result.source_files == len(read_manifest(finished)[0]["job"]["source"])


def test_any_flipped_byte_of_any_file_is_named(copy: Path) -> None:
    """Each file's first and last byte, and some between, one bit or all of them."""
    draw = random.Random(1)
    for path in sorted(copy.iterdir()):
        size = path.stat().st_size
        for at in {0, size - 1, *(draw.randrange(size) for _ in range(4))}:
            mask = draw.choice((1, 0x80, 0xFF))
            flip(path, at, mask)
            assert [f.file for f in verify(copy).findings] == [path.name], (path.name, at, mask)
            flip(path, at, mask)
    assert verify(copy).findings == ()


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    """Also those of the spaces between values, and of the times in `run`."""
    content = {"drift": {"kl": 0.25, "text": "é"}, "files": {}, "layers": [1, None, True]}
    data = encode_manifest(content, {"seconds": 1.5, "files": {}})
    (tmp_path / MANIFEST_NAME).write_bytes(data)
    assert read_manifest(tmp_path)[1] == []
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        (tmp_path / MANIFEST_NAME).write_bytes(changed)
        assert [f.file for f in verify(tmp_path).findings] == [MANIFEST_NAME], at


def test_missing_and_extra_files_are_named(copy: Path) -> None:
    (copy / "config.json").unlink()
    (copy / "notes.txt").write_text("mine")
    (copy / "folder").mkdir()
    found = {f.file: f.problem.partition(":")[0] for f in verify(copy).findings}
    assert found == {"config.json": "missing", "notes.txt": "extra", "folder": "extra"}


def test_a_link_out_of_the_directory_is_named(copy: Path, finished: Path) -> None:
    (copy / "config.json").unlink()
    (copy / "config.json").symlink_to(finished / "config.json")
    assert [str(f) for f in verify(copy).findings] == [
        "config.json: config.json links to a file outside the checkpoint's directory: refused"
    ]


def test_names_that_lead_out_are_never_opened(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    secret = hashlib.sha256(b"secret").hexdigest()
    forge(copy, lambda manifest: manifest["files"].update({"../outside": secret}))
    assert [f.problem for f in verify(copy).findings] == [
        "file name ../outside leads out of the checkpoint's directory: refused"
    ]


def test_another_source_is_named(finished: Path, tiny: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny, tmp_path / "source"))
    shard = sorted(other.glob("*.safetensors"))[0]
    flip(shard, shard.stat().st_size - 1, 1)
    (other / "tokenizer.json").unlink()
    found = {f.file: f.problem.partition(":")[0] for f in verify(finished, other).findings}
    assert found == {str(shard): "another file", str(other / "tokenizer.json"): "missing"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "wanted an object"),
        (b'{"manifest": 2}', "version 2, wanted 1"),
        (b'{"manifest": 1, "files": {"a": 3}, "run": {"files": {}}}', "files is not an object of hashes"),
        (b'{"manifest": 1, "files": {}}', "run.files is not an object of hashes"),
        (b'{"manifest": 1, "manifest": 1}', "manifest appears twice"),
    ],
)
def test_manifests_that_are_none(text: bytes, message: str, copy: Path) -> None:
    (copy / MANIFEST_NAME).write_bytes(text)
    (finding,) = verify(copy).findings
    assert finding.file == MANIFEST_NAME and message in finding.problem and MANIFEST_NAME not in finding.problem
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(copy / MANIFEST_NAME))}: "):  # one of several runs
        read_manifest(copy)


def test_the_command(copy: Path, tiny: Path) -> None:
    good = run("verify", copy, "--source", tiny, "--layers", "none")
    assert good.exit_code == 0 and "all matching the manifest" in good.stdout
    flip(copy / "config.json", 5, 1)
    (copy / "extra.bin").touch()
    bad = run("verify", copy)
    assert bad.exit_code == 1
    lines = bad.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["config.json", "extra.bin"]
    asked = run("verify", copy, "--json")
    answer: dict[str, Any] = json.loads(asked.stdout)
    assert asked.exit_code == 1 and answer["ok"] is False
    assert [f["file"] for f in answer["findings"]] == ["config.json", "extra.bin"]
    none = run("verify", tiny)
    assert none.exit_code == 1 and none.stdout == ""


@pytest.mark.parametrize(
    ("words", "error", "code"),
    [
        (["{tiny}", "--layers", "0"], "--layers goes with --source", 2),
        (["{tiny}", "--all-layers"], "--all-layers goes with --source", 2),
        (["{tiny}", "--calibration", "x.txt"], "--calibration goes with --source", 2),
        (["{tiny}", "--source", "{tiny}", "--layers", "0", "--all-layers"], "--layers and --all-layers exclude", 2),
        (["{tiny}", "--source", "{tiny}", "--layers", "some"], "--layers some: not layers", 2),
        (["nope"], "nope: no such directory", 1),
        (["{tiny}", "--source", "nope"], "nope: no such directory", 1),
        (["{tiny}", "--source", "{tiny}/config.json"], "{tiny}/config.json: a file, wanted a checkpoint's", 1),
    ],
)
def test_verify_refuses_what_it_would_ignore(words: list[str], error: str, code: int, tiny: Path) -> None:
    result = run("verify", *(word.format(tiny=tiny) for word in words))
    assert result.exit_code == code and result.stdout == ""
    assert result.stderr.startswith(f"error: {error.format(tiny=tiny)}")
