"""Models whose files are links to another disk or into a hub's cache; what clones and downloads leave beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run, small_job

import qwenq
from qwenq.checkpoint.manifest import verify
from qwenq.checkpoint.reader import open_checkpoint, open_source
from qwenq.errors import CheckpointError
from qwenq.io.json import inside
from qwenq.pipeline.convert import convert
from qwenq.pipeline.quantize import quantize

Make = Callable[..., Path]


@pytest.fixture
def linked(random_model: Make, tmp_path: Path) -> Path:
    """A directory of links to files on another disk, shards and all."""
    source, path = random_model("disk"), tmp_path / "linked"
    path.mkdir()
    for file in source.iterdir():
        (path / file.name).symlink_to(file)
    return path


def test_links_out_are_refused_with_a_way_out_and_read_where_it_is_taken(linked: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_source(linked)
    assert caught.value.hint.startswith("--follow-links reads it anyway")
    with qwenq.followed_links():
        result = quantize(small_job(linked, tmp_path / "out"))
    plain = quantize(small_job(tmp_path / "disk", tmp_path / "plain"))
    assert result.drift == plain.drift
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    with pytest.raises(CheckpointError):  # outside the context it is as before
        open_source(linked)


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "{}"],
        ["vram", "{}", "-c", "128"],
        ["plan", "{}", "-c", "128", "--gpu", "RTX 3090"],
        ["quantize", "{}", "--group-size", "32", "--dry-run", "--sequence-length", "16", "--num-samples", "2"],
        ["eval", "{}", "--reference", "{}", "--sequence-length", "16", "--num-samples", "2", "--device", "cpu"],
        ["run", "{}", "--dry-run", "--max-model-len", "64"],
        ["serve", "{}", "--dry-run", "--engine", "qwenq", "--max-model-len", "64"],
    ],
)
def test_commands_follow_links_when_told_to(words: list[str], linked: Path) -> None:
    asked = [word.format(linked) for word in words]
    refused = run(*asked)
    assert refused.exit_code == 1 and "links to a file outside" in refused.stderr, refused.output
    assert "hint: --follow-links reads it anyway" in refused.stderr
    done = run(*asked, "--follow-links")
    assert done.exit_code == 0, done.output
    assert run(*asked).exit_code == 1  # the permission ends with the command


def test_what_a_link_leads_to_is_still_checked(linked: Path) -> None:
    (linked / "config.json").unlink()
    (linked / "config.json").symlink_to("/dev/zero")
    with qwenq.followed_links(), pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(linked)
    for name in ("../linked", "a/b", "additional_chat_templates/../x", "additional_chat_templates/a/b"):
        with qwenq.followed_links(), pytest.raises(CheckpointError, match="leads out of the checkpoint"):
            inside(linked, name)


# ---------------------------------------------------------------------- what others leave in a directory


def test_verify_leaves_alone_what_clones_and_downloads_keep(random_model: Make, tmp_path: Path) -> None:
    out = quantize(small_job(random_model(), tmp_path / "out")).out
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (out / ".cache" / "huggingface").mkdir(parents=True)
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert verify(out).findings == ()
    done = run("verify", out)
    assert done.exit_code == 0
    (out / ".gitignore").write_text("x")
    assert [str(found) for found in verify(out).findings] == [".gitignore: extra: not in the manifest"]


# ---------------------------------------------------------------------- chat templates in a folder


@pytest.fixture
def templated(random_model: Make) -> Path:
    path = random_model("templated")
    (path / "additional_chat_templates").mkdir()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (path / "additional_chat_templates" / "tool_use.jinja").write_text(template)
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return path


def test_chat_templates_in_a_folder_are_copied_hashed_and_verified(templated: Path, tmp_path: Path) -> None:
    out = quantize(small_job(templated, tmp_path / "out")).out
    name = "additional_chat_templates/tool_use.jinja"
    assert (out / name).read_bytes() == (templated / name).read_bytes()
    manifest = json.loads((out / "qwenq-manifest.json").read_text())
    assert name in manifest["files"] and name in manifest["job"]["source"]
    assert verify(out, templated).findings == ()
    made = convert(open_checkpoint(out), tmp_path / "converted", "compressed-tensors").out
    assert verify(made).findings == () and (made / name).is_file()
    (out / name).write_text("{{ other }}")
    (out / "additional_chat_templates" / "more.jinja").write_text("x")
    assert [found.file for found in verify(out).findings] == [name, "additional_chat_templates/more.jinja"]


def test_a_job_with_a_folder_of_templates_is_resumed(templated: Path, tmp_path: Path) -> None:
    job = small_job(templated, tmp_path / "out")

    def stop(event: object) -> None:
        if event == "measuring drift at the head":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(job, listen=stop)
    assert verify(quantize(job, resume=True).out).findings == ()


def test_a_folder_of_templates_that_is_a_link_is_refused(templated: Path, tmp_path: Path) -> None:
    shutil.move(templated / "additional_chat_templates", tmp_path / "elsewhere")
    (templated / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="additional_chat_templates links to a file outside"):
        quantize(small_job(templated, tmp_path / "out"))
