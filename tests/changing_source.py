"""A source that changes while it is quantized, and damage to an unfinished job: random cases, judged by the bytes.

Every case ends as the undisturbed run does, byte for byte, or is refused by a QwenqError of one line; wrong bytes under
a good name, and any other exception, are what a case is there to find. The file is changed at a random one of the
moments at which the run opens a file of the source, reads from it, or tells an event, as it does after each layer.

    PYTHONPATH=tests:tests/pipeline python -m changing_source --sources 300 --damages 1000
"""

from __future__ import annotations

import argparse
import builtins
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from conftest import make_random_model, small_job
from test_quantize import Stop, assert_same

import qwenq.pipeline.quantize
from qwenq.errors import QwenqError
from qwenq.formats.base import Recipe, Scheme
from qwenq.pipeline.job import QuantizeJob
from qwenq.pipeline.preflight import partial_directory
from qwenq.pipeline.quantize import quantize

_SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE", "generation_config.json")
_HOW = ("flip in place", "overwrite in place", "replace", "cut in place", "remove")


class Wrong(AssertionError):
    """A case that ended as none may."""


class Moments:
    """Counts the moments of a run; `act` is called at each with its number. events: those that are no reading."""

    def __init__(self, source: Path, act: Callable[[int], None]) -> None:
        self.source, self.act, self.count = source, act, 0
        self.events: list[int] = []

    def tick(self) -> None:
        self.count += 1
        self.act(self.count - 1)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Tick before and after a file of the source is opened, and before each of its readings."""
        opening, os_opening, wrapping, moments = builtins.open, os.open, os.fdopen, self
        handles: set[int] = set()

        class File:
            """A file of the source; a change in place is seen through what is open, a replaced file is not."""

            def __init__(self, file: Any) -> None:
                self._file = file

            def read(self, *size: int) -> bytes:
                moments.tick()
                found: bytes = self._file.read(*size)
                return found

            def readinto(self, buffer: Any) -> int:
                moments.tick()
                count: int = self._file.readinto(buffer)
                return count

            def __enter__(self) -> File:
                return self

            def __exit__(self, *error: object) -> None:
                self._file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

        def told(make: Callable[..., Any], file: Any, *arguments: Any, **options: Any) -> tuple[Any, bool]:
            inside = isinstance(file, str | Path) and Path(file).parent == self.source
            if inside:
                self.tick()
            found = make(file, *arguments, **options)
            if inside:
                self.tick()
            return found, inside

        def opened(*arguments: Any, **options: Any) -> Any:
            return told(opening, *arguments, **options)[0]

        def os_opened(*arguments: Any, **options: Any) -> int:
            handle, inside = told(os_opening, *arguments, **options)
            (handles.add if inside else handles.discard)(handle)
            return int(handle)

        def wrapped(handle: int, *arguments: Any, **options: Any) -> Any:
            file = wrapping(handle, *arguments, **options)
            return File(file) if handle in handles else file

        builtins.open, os.open, os.fdopen = opened, os_opened, wrapped
        try:
            yield
        finally:
            builtins.open, os.open, os.fdopen = opening, os_opening, wrapping

    def listen(self, event: Any) -> None:
        self.events.append(self.count)
        self.tick()


class Place:
    """A small model, the checkpoint an undisturbed run makes of it, and a copy of both that each case may harm."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.kept = make_random_model(root / "kept", hidden_size=32, intermediate_size=64)
        (self.kept / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
        (self.kept / "LICENSE").write_text("MIT License\n\nCopyright\n")
        self.source, self.out, self.whole = root / "source", root / "place" / "out", root / "whole"
        self.fresh()
        moments = Moments(self.source, lambda moment: None)
        job = self.job(self.whole)
        with moments.watching():
            quantize(job, listen=moments.listen)
        self.moments, self.events = moments.count, moments.events
        assert self.moments > 200, "the run's readings are not seen"
        self.files = [path.name for path in sorted(self.kept.glob("*.safetensors"))]

    def fresh(self) -> None:
        for path in (self.source, self.out.parent):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.kept, self.source)  # times as they were
        self.out.parent.mkdir()

    def job(self, out: Path | None = None) -> QuantizeJob:
        files = (("qwenq-sensitivity.json", b"{}\n" * 40),)  # as a budgeted job keeps its table
        return small_job(self.source, out or self.out, recipe=Recipe(Scheme(4, 32)), beside=files)

    # ------------------------------------------------------------------ the source

    def put_back(self, name: str) -> None:
        path = self.source / name
        shutil.copy2(self.kept / name, path.with_name("beside"))
        os.replace(path.with_name("beside"), path)

    def put_back_in_place(self, name: str) -> None:
        data, times = (self.kept / name).read_bytes(), os.stat(self.kept / name)
        (self.source / name).write_bytes(data)
        os.utime(self.source / name, ns=(times.st_atime_ns, times.st_mtime_ns))

    def change(self, draw: Random, name: str, how: str, keep_times: bool) -> None:
        path = self.source / name
        data, times = bytearray(path.read_bytes()), os.stat(path)
        at = draw.randrange(len(data))
        if how == "remove":
            path.unlink()
            return
        if how == "cut in place":
            os.truncate(path, at)
        elif how == "replace":
            data[at] ^= 1 << draw.randrange(8)
            path.with_name("beside").write_bytes(data)
            os.replace(path.with_name("beside"), path)
        else:
            width = 1 if how == "flip in place" else 4096
            for k in range(at, min(at + width, len(data))):
                data[k] ^= 1 << draw.randrange(8)
            with path.open("r+b") as file:
                file.write(data)
        if keep_times:
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def changing(self, draw: Random) -> str:
        """One case of a source that changes; the outcome in a few words, Wrong for one that may not be."""
        self.fresh()
        name = draw.choice(self.files) if draw.random() < 0.8 else draw.choice([n for n in _SMALL if self.has(n)])
        how, keep_times = draw.choice(_HOW), draw.random() < 0.5
        at = draw.choice(self.events) if draw.random() < 0.3 else draw.randrange(self.moments)
        back = draw.choice(("never", "before resuming", "meanwhile"))
        back_at = at + draw.randrange(1, 40) if back == "meanwhile" else -1
        in_place, interval = draw.random() < 0.5, draw.choice((0.0, 1e9))
        case = f"{name}: {how} at moment {at}, times {'kept' if keep_times else 'new'}, put back {back} {back_at}, " \
               f"state {'saved' if interval == 0 else 'not saved'}"  # fmt: skip

        def act(moment: int) -> None:
            if moment == at:
                self.change(draw, name, how, keep_times)
            elif moment == back_at:
                (self.put_back_in_place if in_place else self.put_back)(name)

        with saved_every(interval):
            job = self.job()
            told = self.run(job, Moments(self.source, act), case, resume=False)
            if not told:
                return "identical at once"
            if back == "never" and (self.source / name).exists() and partial_directory(job.out).exists():
                refused = self.run_again(case)
                if refused:
                    self.put_back(name)
                    return self.ended(case, "refused, again when resumed, then")
                return "refused, then identical"
            self.put_back(name)
            return self.ended(case, "refused, then")

    def has(self, name: str) -> bool:
        return (self.kept / name).is_file()

    def ended(self, case: str, outcome: str) -> str:
        """Go on with everything put back: there is nothing left to refuse, unless the changed file was hashed."""
        refused = self.run_again(case)
        if not refused:
            return f"{outcome} identical"
        if " cannot resume, source." in refused:
            return f"{outcome} refused by name"
        raise Wrong(f"{case}: {refused}")

    def run_again(self, case: str) -> str:
        try:
            job = self.job()
        except QwenqError as error:
            return one_line(error, case)
        resume = partial_directory(job.out).exists()
        return self.run(job, Moments(self.source, lambda moment: None), case, resume=resume)

    def run(self, job: QuantizeJob, moments: Moments, case: str, *, resume: bool) -> str:
        """"" when the job ended with the right bytes, else its refusal."""
        try:
            with moments.watching():
                quantize(job, resume=resume, listen=moments.listen)
        except QwenqError as error:
            return one_line(error, case)
        except Exception as error:
            raise Wrong(f"{case}: {type(error).__name__}: {error}") from error
        self.compare(case)
        return ""

    def compare(self, case: str) -> None:
        try:
            assert_same(self.whole, self.out)
        except AssertionError as error:
            first = (str(error) or "another set of files").splitlines()[0]
            raise Wrong(f"{case}: other bytes than an undisturbed run's: {first}") from error

    # ------------------------------------------------------------------ an unfinished job

    def damaging(self, draw: Random) -> str:
        """One case of an unfinished job with a file damaged, or one too many; the outcome in a few words."""
        stopped = self.stopped(draw.choice((0, 1, 2)), draw.choice((0.0, 1e9)))
        self.fresh()
        shutil.copytree(stopped, self.out.parent, dirs_exist_ok=True)
        work = partial_directory(self.out)
        (work / ".qwenq-lock").write_text(f"process 4711 on {os.uname().nodename}\n")
        path = draw.choice(sorted(path for path in work.iterdir() if path.stat().st_size))
        data = bytearray(path.read_bytes())
        at, how = draw.randrange(len(data)), draw.choice(("flip",) * 3 + ("cut", "cut", "noise", "empty", "extra"))
        case = f"{path.name}: {how} at byte {at}"
        if how == "flip":
            data[at] ^= 1 << draw.randrange(8)
        elif how == "noise":
            data[at : at + 16] = draw.randbytes(len(data[at : at + 16]))
        elif how == "extra":
            path = path.with_name(draw.choice(("notes.txt", "LICENCE", "model.safetensors", "é")))
        path.write_bytes({"cut": data[:at], "empty": b""}.get(how, data))
        kind = "extra file" if how == "extra" else path.name.partition("-0")[0]
        with saved_every(1e9):
            told = self.run_again(case)
        return f"{kind}: {'refused' if told else 'identical'}"

    def stopped(self, layer: int, interval: float) -> Path:
        """The directory of a job stopped after a layer of three, the last one: before it got its name. Made once."""
        kept = self.root / f"stopped-{layer}-{interval:g}"
        if not kept.exists():
            self.fresh()

            def stop(event: Any) -> None:
                if not isinstance(event, str) and event.layer == layer < 2:
                    raise Stop

            replacing = os.replace

            def replace(source: Any, target: Any, **folders: Any) -> None:
                if Path(target) == self.out:
                    raise Stop
                replacing(source, target, **folders)

            os.replace = replace
            try:
                with saved_every(interval):
                    quantize(self.job(), listen=stop)
            except Stop:
                shutil.copytree(self.out.parent, kept)
            finally:
                os.replace = replacing
        return kept


@contextmanager
def saved_every(seconds: float) -> Iterator[None]:
    before = qwenq.pipeline.quantize._STATE_INTERVAL_S
    qwenq.pipeline.quantize._STATE_INTERVAL_S = seconds
    try:
        yield
    finally:
        qwenq.pipeline.quantize._STATE_INTERVAL_S = before


def one_line(error: QwenqError, case: str) -> str:
    if "\n" in error.message or len(error.message) > 1000:
        raise Wrong(f"{case}: more than a line: {error.message[:200]}")
    return error.message


def tried(cases: int, case: Callable[[Random], str], seed: int) -> tuple[Counter[str], list[str]]:
    """Outcomes counted, and those that may not be."""
    outcomes: Counter[str] = Counter()
    wrong = []
    for number in range(cases):
        try:
            outcomes[case(Random(seed * 1_000_003 + number))] += 1
        except Wrong as error:
            wrong.append(f"case {number}: {error}")
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sources", type=int, default=300)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=2026)
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as root:
        place = Place(Path(root))
        for title, count, case in (
            ("sources that change", given.sources, place.changing),
            ("unfinished jobs damaged", given.damages, place.damaging),
        ):
            outcomes, wrong = tried(count, case, given.seed)
            print(f"{title}: {count} cases, {len(wrong)} wrong")
            for outcome, number in sorted(outcomes.items()):
                print(f"  {number:5d} {outcome}")
            for line in wrong:
                print(f"  WRONG {line}")
            failed += len(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
