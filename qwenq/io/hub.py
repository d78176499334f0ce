"""Models by hub name: a config or headers alone for planning, whole checkpoints for work; every failure is a HubError.

Files come through huggingface_hub into its cache, under its variables: HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN, HF_HOME.
The library is imported inside the functions, since its import takes longer than a plan.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from qwenq.errors import CheckpointError, HubError, QwenqError
from qwenq.io.json import TEMPLATES, open_regular, read_object, shown
from qwenq.io.safetensors import (
    INDEX_NAME,
    MAX_HEADER_BYTES,
    PICKLED_ENDINGS,
    SAMPLE_BYTES,
    SINGLE_NAME,
    TensorLocation,
    checkpoint_tensors,
)
from qwenq.units import counted, format_gb

# Fetched beside the weights. No Python: nothing from the hub is ever run.
SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "tokenizer.model",
    "LICENSE", "README.md",
)  # fmt: skip
_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[\w][\w.-]{0,95}", re.ASCII)
_FIRST_BYTES = 1 << 16  # one request is enough for most headers
_MOST_SKIPPED = 64 << 20  # bytes read for nothing from an endpoint that knows no ranges
_REPORT_SECONDS = 30
_THREADS = 8
Listener = Callable[[str], None]


@dataclass(frozen=True)
class _Repo:
    """Files of a repository at one commit, with their sizes in bytes (None: the endpoint does not say)."""

    name: str
    commit: str
    files: dict[str, int | None]


def is_hub_name(model: str) -> bool:
    """Whether `model` reads as owner/name and is no path on this machine."""
    return _NAME.fullmatch(model) is not None and not model.endswith((".", "-", ".git")) and not os.path.exists(model)


def fetch_config(name: str) -> Path:
    """A directory with the model's config.json, the only file fetched; raises HubError."""
    with _hub_errors(name):
        if _offline():
            return _cached(name)
        return _fetch_config(_list_files(name))


def fetch_headers(name: str) -> dict[str, TensorLocation]:
    """Every tensor of the model by name, from the first bytes of its shards; `file` is the shard's name alone.

    Headers are put at the head of sparse files of the shards' sizes, so that the one strict reader checks them.
    Raises HubError, also for headers that do not add up.
    """
    with _hub_errors(name):
        if _offline():
            return _whole(_cached(name), name)
        repo = _list_files(name)
        weights = _weight_files(repo)
        with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(_THREADS) as pool:
            if weights != [SINGLE_NAME] and INDEX_NAME in repo.files:
                shutil.copyfile(_fetch_file(name, INDEX_NAME, repo.commit), Path(scratch) / INDEX_NAME)
            for file, (head, size) in zip(weights, pool.map(lambda f: _fetch_header(repo, f), weights), strict=True):
                with open(Path(scratch) / file, "wb") as sparse:
                    sparse.write(head)
                    sparse.truncate(size)
            tensors = checkpoint_tensors(Path(scratch))
        return {n: dataclasses.replace(t, file=Path(t.file.name)) for n, t in tensors.items()}


def same_start(name: str, one: TensorLocation, other: TensorLocation) -> bool:
    """Whether two tensors of a model, as `fetch_headers` gives them, agree in dtype, shape and first bytes.

    Trained weights that differ anywhere differ there. Raises HubError.
    """
    if (one.spec.dtype, one.spec.shape) != (other.spec.dtype, other.spec.shape):
        return False
    with _hub_errors(name):
        return _first_bytes(name, one) == _first_bytes(name, other)


def fetch_model(name: str, listen: Listener = lambda line: None) -> Path:
    """A local directory with the model's safetensors, config and tokenizer, each file whole; downloads what is missing.

    listen: gets a line when a download starts, every half minute and at its end, from a thread of its own.
    Raises HubError. A download that stops early is taken up again by the next call: finished files are kept.
    """
    with _hub_errors(name):
        if _offline():
            directory = _cached(name)
            _whole(directory, name)
            return directory
        repo = _list_files(name)
        weights = _weight_files(repo)
        directory = _fetch_config(repo)
        index = [INDEX_NAME] if weights != [SINGLE_NAME] and INDEX_NAME in repo.files else []
        templates = [f for f in repo.files if re.fullmatch(rf"{TEMPLATES}/[^/]+\.jinja", f)]
        wanted = [f for f in SMALL_FILES if f in repo.files] + templates + index + weights
        missing = [f for f in wanted if not (directory / f).is_file()]
        if missing:
            _download(repo, directory, missing, listen)
        for file in wanted:
            have, want = (directory / file).stat().st_size, repo.files[file]
            if want is not None and have != want:
                raise HubError(
                    f"{name}: {file} has {have:,} bytes in the cache, {want:,} on the hub",
                    hint=f"delete {(directory / file).resolve()} and run it again",
                )
        _whole(directory, name)
        return directory


def _download(repo: _Repo, directory: Path, files: Sequence[str], listen: Listener) -> None:
    from huggingface_hub import snapshot_download

    total = sum(repo.files[f] or 0 for f in files)
    free = shutil.disk_usage(directory).free
    if total > free:
        raise HubError(
            f"{repo.name}: {format_gb(total)} to download, {format_gb(free)} free in {directory.parent.parent}",
            hint="HF_HOME puts the cache on another disk",
        )
    listen(f"downloading {repo.name}: {counted(len(files), 'file')}, {format_gb(total)}")
    blobs = directory.parent.parent / "blobs"
    before, done = _folder_bytes(blobs), threading.Event()

    def report() -> None:
        while not done.wait(_REPORT_SECONDS):
            listen(f"downloading {repo.name}: {format_gb(_folder_bytes(blobs) - before)} of {format_gb(total)}")

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        snapshot_download(
            repo.name, revision=repo.commit, endpoint=_endpoint(), allow_patterns=[escape(f) for f in files]
        )
    finally:
        done.set()
        reporter.join()
    absent = [f for f in files if not (directory / f).is_file()]
    if absent:
        raise HubError(f"{repo.name}: {absent[0]} did not arrive", hint="run it again: finished files are kept")
    listen(f"downloaded {repo.name}, commit {repo.commit[:12]}")


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # renamed meanwhile
            continue
    return total


def _fetch_config(repo: _Repo) -> Path:
    """The snapshot's directory, its config.json fetched.

    It is asked for without the commit, for then the cache also notes which commit is the latest: offline, that note is
    all there is.
    """
    if "config.json" not in repo.files:
        raise HubError(f"{repo.name}: no config.json in it", hint="adapters and GGUF repositories are not checkpoints")
    directory = _fetch_file(repo.name, "config.json").parent
    if directory.name != repo.commit:
        raise HubError(f"{repo.name}: changed while it was being read", hint="run it again")
    return directory


def _fetch_file(name: str, file: str, commit: str | None = None) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file, revision=commit, endpoint=_endpoint()))


def _list_files(name: str) -> _Repo:
    from huggingface_hub import HfApi, constants

    timeout = constants.HF_HUB_ETAG_TIMEOUT  # without one, a stalled server would hang the call for good
    info = HfApi(endpoint=_endpoint()).model_info(name, files_metadata=True, timeout=timeout)
    if not info.sha or not info.siblings:
        raise HubError(f"{name}: the repository is empty")
    return _Repo(name, info.sha, {sibling.rfilename: sibling.size for sibling in info.siblings})


def _weight_files(repo: _Repo) -> list[str]:
    """The shards to fetch, chosen as `checkpoint_tensors` reads a directory; pickled weights alone are refused."""
    if SINGLE_NAME in repo.files:
        return [SINGLE_NAME]
    if INDEX_NAME in repo.files:
        index = read_object(_fetch_file(repo.name, INDEX_NAME, repo.commit), limit=MAX_HEADER_BYTES)
        weight_map = index.get("weight_map")
        shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        if not shards:
            raise HubError(f"{repo.name}: {INDEX_NAME} names no file")
        for shard in shards:
            if shard not in repo.files or "/" in shard or not shard.endswith(".safetensors"):
                raise HubError(f"{repo.name}: {INDEX_NAME} names {shown(shard)}, which the repository does not have")
        return shards
    found = sorted(f for f in repo.files if f.endswith(".safetensors") and "/" not in f)
    if len(found) == 1:
        return found
    if found:
        raise HubError(f"{repo.name}: {len(found)} safetensors files but no {INDEX_NAME}")
    pickled = sorted(f for f in repo.files if f.endswith(PICKLED_ENDINGS))
    if pickled:
        raise HubError(
            f"{repo.name}: only pickled weights ({shown(pickled[0])}), which can run code when they are read: refused",
            hint="look for a repository with safetensors files, or convert it on a machine you can lose",
        )
    raise HubError(f"{repo.name}: no safetensors files in it", hint=f"wanted {SINGLE_NAME} or {INDEX_NAME}")


def _fetch_header(repo: _Repo, file: str) -> tuple[bytes, int]:
    """A shard's length field and header, and the shard's size, without its weights."""
    head, wanted, size = bytearray(), _FIRST_BYTES, 0
    while len(head) < wanted:
        with _request(f"{repo.name}/resolve/{repo.commit}/{quote(file)}", len(head), wanted) as response:
            if response.status_code == 206:
                size = int(response.headers["Content-Range"].rpartition("/")[2])
            else:  # the endpoint knows no ranges: read from the start, and hang up after the header
                head.clear()
                size = int(response.headers.get("Content-Length", repo.files[file] or 0))
            before = len(head)
            for chunk in response.iter_bytes():
                head += chunk
                if len(head) >= 8:
                    wanted = min(8 + int.from_bytes(head[:8], "little"), 8 + MAX_HEADER_BYTES, size)
                if len(head) >= wanted:
                    break
            if len(head) == before:
                raise HubError(f"{repo.name}: {file} ended at byte {before}, inside its header", hint="run it again")
    return bytes(head[:wanted]), size


def _first_bytes(name: str, location: TensorLocation) -> bytes:
    """Up to SAMPLE_BYTES of a tensor: of the cached file where the headers are from there, else by one request."""
    end = min(location.start + SAMPLE_BYTES, location.end)
    if location.file.is_absolute():
        with open_regular(location.file) as file:
            file.seek(location.start)
            return file.read(end - location.start)
    with _request(f"{name}/resolve/main/{quote(location.file.name)}", location.start, end) as response:
        skipped = 0 if response.status_code == 206 else location.start  # the endpoint knows no ranges
        if skipped > _MOST_SKIPPED:
            raise HubError(
                f"{name}: {_host()} sends files whole, and a tensor must be read from within {location.file.name}",
                hint="download the model and plan from its directory",
            )
        found = bytearray()
        for chunk in response.iter_bytes():
            found += chunk[skipped:]
            skipped = max(0, skipped - len(chunk))
            if len(found) >= end - location.start:
                break
    return bytes(found[: end - location.start])


@contextmanager
def _request(path: str, start: int, end: int) -> Iterator[Any]:
    """The endpoint's answer, not read yet, when it is asked for bytes start to end of a file."""
    from huggingface_hub import constants, get_session, hf_raise_for_status

    asked = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    request = get_session().stream(
        "GET",
        f"{_endpoint()}/{path}",
        headers=_hub_utils().build_hf_headers() | asked,
        follow_redirects=True,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )
    with request as response:
        if response.status_code >= 400:
            response.read()
            hf_raise_for_status(response)
        yield response


def _cached(name: str) -> Path:
    """The latest snapshot in the cache; HubError if there is none."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        raise HubError(
            f"{name}: not in the cache, and HF_HUB_OFFLINE forbids a download",
            hint="unset HF_HUB_OFFLINE, or give a directory",
        )
    return Path(config).parent


def _whole(directory: Path, name: str) -> dict[str, TensorLocation]:
    try:
        return checkpoint_tensors(directory)
    except CheckpointError as error:
        offline = "unset HF_HUB_OFFLINE and run it again to finish the download"
        hint = offline if _offline() else f"if that does not help, delete {directory.parent.parent} and run it again"
        raise HubError(f"{name}: the copy in the cache is not whole ({error.message})", hint=hint) from None


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _host() -> str:
    """The endpoint as it may be shown: without a user and password."""
    parts = urlsplit(_endpoint())
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _offline() -> bool:
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into one HubError, and keep huggingface_hub from writing to the terminal."""
    utils = _hub_utils()
    bars = not utils.are_progress_bars_disabled() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    verbosity = utils.logging.get_verbosity()
    if bars:
        utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    try:
        yield
    except HubError:
        raise
    except QwenqError as error:
        raise HubError(f"{name}: {error.message}", hint=error.hint) from None
    except Exception as error:
        raise _explain(error, name) from None
    finally:
        utils.logging.set_verbosity(verbosity)
        if bars:
            utils.enable_progress_bars()


def _hub_utils() -> Any:
    """huggingface_hub.utils, untyped: it exports its names in a way that type checkers do not see."""
    import huggingface_hub.utils

    return huggingface_hub.utils


def _explain(error: Exception, name: str) -> HubError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return HubError(f"{name}: not in the cache, and the hub cannot be asked", hint="unset HF_HUB_OFFLINE")
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error, name)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error):  # the xet client raises plain RuntimeError
        return HubError(
            f"{name}: the disk is full ({constants.HF_HUB_CACHE})",
            hint="free some space and run it again: finished files are kept; HF_HOME puts the cache on another disk",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return HubError(f"{name}: {error.strerror} ({error.filename or constants.HF_HUB_CACHE})", hint="see HF_HOME")
    kind = type(error).__name__
    if kind in ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol", "InvalidURL"):
        return HubError(
            f"{name}: no directory here, and {_host()} cannot be reached ({_one_line(error)})",
            hint="check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses what is in the cache",
        )
    # Every other transport error of the HTTP library, and the size check that follows a download.
    if type(error).__module__.startswith("httpx") or "Consistency check failed" in str(error):
        return HubError(
            f"{name}: the connection to {_host()} broke or stalled ({kind})",
            hint="run it again: finished files are kept",
        )
    return HubError(f"{name}: cannot be fetched from {_host()} ({kind}: {_one_line(error)})", hint="check HF_ENDPOINT")


def _explain_status(error: Any, name: str) -> HubError:
    """The hub's answers; it says 401 for private and for missing alike to those who show no token."""
    from huggingface_hub import errors, get_token

    response, page, token = error.response, f"{_host()}/{name}", get_token() is not None
    status = response.status_code
    if isinstance(error, errors.GatedRepoError):
        account = "with the account HF_TOKEN belongs to" if token else "then set HF_TOKEN"
        return HubError(
            f"{name}: gated ({status}), its license must be accepted first",
            hint=f"accept the license on the model page, {page}, {account}",
        )
    if isinstance(error, errors.EntryNotFoundError):
        file = shown(urlsplit(str(response.url)).path.rpartition("/")[2])
        return HubError(f"{name}: no {file} in it", hint="adapters and GGUF repositories are not checkpoints")
    if status == 401 and token:
        return HubError(
            f"{name}: no such repository, or HF_TOKEN is not accepted (401)",
            hint=f"check the spelling; a new token is made at {_host()}/settings/tokens",
        )
    if status == 403:
        return HubError(
            f"{name}: access refused (403)", hint=f"accept the license on {page} if it asks for one; check HF_TOKEN"
        )
    if status in (401, 404):
        hint = "check the spelling" if token else "check the spelling; if it is private, set HF_TOKEN"
        return HubError(f"{name}: no such repository on {_host()} ({status}), nor a directory here", hint=hint)
    if status == 429:
        return HubError(f"{name}: too many requests (429)", hint="wait a few minutes, or set HF_TOKEN")
    if status >= 500:
        return HubError(f"{name}: {_host()} is not working ({status})", hint="try again later")
    return HubError(f"{name}: {_host()} answered {status}")


def _one_line(error: Exception) -> str:
    """The error's first line, without what may be secret: queries of signed addresses, tokens, passwords."""
    line = next((part for part in str(error).splitlines() if part.strip()), type(error).__name__)
    line = re.sub(r"(https?://)(?:[^\s/@]*@)?([^\s?]+)\?\S*", r"\1\2", line)
    return shown(re.sub(r"hf_\w{6,}|(?<=://)[^\s/@]+@", "", line), 160)
