"""Ranks: processes that do one job together, each its share of the windows and of a weight's rows.

A job's windows are cut into parts by a rule that knows nothing of ranks (pipeline/shares.py), and sums over windows are
taken part by part, in their order: bytes are the same over any number of ranks. A single process is one rank of one.

Every rank shows by a counter in torch.distributed's store that it lives. Whoever stops, stops them all: see `_Watch`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from qwenq import __version__
from qwenq.errors import JobError, QwenqError, RunError, UsageError
from qwenq.launch import JOIN_TIMEOUTS, Launch
from qwenq.machine import numerics, versions
from qwenq.pipeline.config import PARTS, device_names
from qwenq.pipeline.shares import Share

_NEVER = timedelta(days=30)  # collectives do not time out: a rank may read, solve or write for hours, while it lives
_GRACE_S = 10.0  # for a rank that computes to see that another is lost, and to end in order
_TERMINATE_S = 3.0  # after a SIGTERM, for the reason to be known
_PIECE = 1 << 22  # values that ranks exchange at a time


class Ranks:
    """This process among those that do the job with it; alone unless it is given a group.

    All ranks make the same calls in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: _Group | None = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    def scratch(self, first: Path) -> Path:
        """A directory for this rank's temporary data: `first` on rank 0, which alone need see it, else TMPDIR."""
        return first if self.first else Path(tempfile.gettempdir())

    def share(self, *passes: range) -> Share:
        """This rank's share of windows that go through a layer in these passes."""
        return Share(passes, self.rank, self.size)

    def facts(self, peak: int) -> list[dict[str, Any]]:
        """What each rank computes on, and its peak of memory and what it received so far, in bytes; alone nothing."""
        if self._group is None:
            return []
        own = {"peak_rss_bytes": peak, "received_bytes": self._group.received_bytes}
        kept = ("host", "device", "threads", "instructions")
        measured = self.gathered(own)
        return [
            {name: facts[name] for name in kept} | more
            for facts, more in zip(self._group.facts, measured, strict=True)
        ]

    # ------------------------------------------------------------------ values

    def gathered(self, value: Any) -> list[Any]:
        """What every rank gives, as JSON holds it, by rank."""
        return self._group.gathered(value) if self._group else [value]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, as JSON holds it; elsewhere `make` is not called."""
        value = make() if self.first else None
        return self.gathered(value)[0] if self._group else value

    def refuse_others(self, what: str, value: Any) -> None:
        """JobError, naming the rank, where another one has another value: what it would do is another job."""
        if self._group is None:
            return
        for rank, other in enumerate(found := self.gathered(value)):
            if other != found[0]:
                name, mine, theirs = _difference(found[0], other, what)
                raise JobError(
                    f"{self.name(rank)} has another {name} than {self.name(0)}: {theirs}, not {mine}",
                    hint="every rank needs the same command, the same files and the same versions",
                )

    def name(self, rank: int) -> str:
        """`rank 1 on host-b`."""
        return self._group.watch.name(rank) if self._group else f"rank {rank}"

    # ------------------------------------------------------------------ tensors

    def exchange(self, sent: Tensor) -> Tensor:
        """[size, ...], row k for rank k -> [size, ...], row k from rank k."""
        return self._group.exchange(sent) if self._group else sent

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of rank `source`, in place in those of the others, which have its shape and dtype."""
        if self._group:
            self._group.broadcast(tensor, source)
        return tensor

    def all_windows(self, own: Tensor, share: Share) -> Tensor:
        """Values of the rank's own windows [windows, ...] -> of all of them, in the job's order, on every rank."""
        if self._group is None:
            return own
        whole = own.new_empty(share.count, *own.shape[1:])
        for rank in range(self.size):
            windows = share.of_rank(rank).windows
            part = own.contiguous() if rank == self.rank else own.new_empty(len(windows), *own.shape[1:])
            if windows:
                whole[windows] = self.broadcast(part, rank)
        return whole

    def send(self, tensor: Tensor, source: int, target: int) -> None:
        """Put the tensor of rank `source` in place of that of rank `target`, of the same shape; all ranks call it."""
        if self._group and source != target:
            self._group.send(tensor, source, target)

    def fold(
        self, shard: Tensor | None, parts: dict[int, Tensor], numbers: range, values: int, device: torch.device
    ) -> Tensor:
        """The sum so far and parts of it, flat tensors of so many values, added in the order of their numbers.

        parts: this rank's, every `size`-th of `numbers`; emptied. shard: of the sum so far this rank's share, the whole
        of a process alone; None before the first part. Returns it, on `device`.
        """
        if self._group is None:
            for number in numbers:
                part = parts.pop(number)
                shard = part.to(device) if shard is None else _added(shard, part)
            assert shard is not None
            return shard
        begun, turns = shard is not None, -(-len(numbers) // self.size)
        if shard is None:
            shard = torch.zeros(-(-values // self.size), device=device)
        step = max(1, min(len(shard), _PIECE // (self.size * turns)))
        for at in range(0, len(shard), step):
            stop = min(at + step, len(shard))
            sent = torch.zeros(self.size, turns, stop - at)
            for number, part in parts.items():
                for rank in range(self.size):
                    piece = part[rank * len(shard) + at : min(rank * len(shard) + stop, values)]
                    sent[rank, (number - numbers.start) // self.size, : len(piece)] = piece
            found = self.exchange(sent).to(device)
            for k in range(len(numbers)):
                piece = found[k % self.size, k // self.size]
                shard[at:stop] = shard[at:stop] + piece if begun or k else piece
        parts.clear()
        return shard

    def whole(self, shard: Tensor, values: int) -> Tensor:
        """A sum of so many values, of all ranks' shards, on every rank."""
        if self._group is None:
            return shard
        found = shard.new_empty(values)
        for rank in range(self.size):
            part = found[rank * len(shard) : (rank + 1) * len(shard)]  # empty behind the end
            if rank == self.rank:
                part.copy_(shard[: len(part)])
            for piece in part.split(_PIECE):
                self.broadcast(piece, rank)
        return found


def _added(total: Tensor, part: Tensor) -> Tensor:
    """The sum, in place, piece by piece: a copy of the part from another device may not fit beside it."""
    for here, piece in zip(total.split(_PIECE), part.split(_PIECE), strict=True):
        here.add_(piece.to(total.device))
    return total


ALONE = Ranks()


def _difference(first: Any, other: Any, where: str) -> tuple[str, Any, Any]:
    """The first value that differs: its name, and what it is in either."""
    if isinstance(first, dict) and isinstance(other, dict):
        for key in sorted({*first, *other}):
            if first.get(key) != other.get(key):
                return _difference(first.get(key), other.get(key), key)
    return where, first, other


# ---------------------------------------------------------------------- joining


def own_device(asked: str, launch: Launch) -> str:
    """The device of a rank: the GPU of its local number, or of several named ones that of its turn."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        if count == 0:
            return "cpu"
        if launch.local_rank >= count:
            raise UsageError(
                f"local rank {launch.local_rank} has no GPU of its own: torch sees {count}",
                hint=f"--nproc-per-node {count}, or --device cpu, or --device cuda:0 for all of them on one",
            )
        return f"cuda:{launch.local_rank}"
    names = device_names(asked)
    if len(names) > 1 and len(names) < launch.local_size:
        raise UsageError(f"--device {asked}: {len(names)} devices for {launch.local_size} ranks of a host")
    return names[launch.local_rank % len(names)]


@contextmanager
def joined(
    launch: Launch | None, device: str = "cpu", told: Callable[[str], None] = lambda line: None
) -> Iterator[Ranks]:
    """This process among its ranks, all of them there and of one version, until the block ends; alone without launch.

    device: that this rank computes on. told: gets the line that this process ends with where its main thread cannot
    raise it. An error in the block stops every rank; RunError for a rank that was lost.
    """
    if launch is None:
        yield ALONE
        return
    if launch.size > PARTS or PARTS % launch.size:
        raise UsageError(
            f"{launch.size} ranks: wanted 2, 4 or {PARTS}, which windows can be shared among evenly",
            hint=f"--nproc-per-node and --nnodes make {launch.size} together",
        )
    group = _Group(launch, device)
    group.watch.told = told
    before = signal.signal(signal.SIGTERM, group.watch.terminate)
    try:
        yield Ranks(launch.rank, launch.size, group)
        group.leave()
    except BaseException as error:
        own = not group.watch.lost  # others end when they have heard of it, and are lost then
        group.fail(error)
        if isinstance(error, QwenqError) and launch.rank and own:
            error.message = f"{group.watch.name(launch.rank)}: {error.message}"
        raise
    finally:
        group.watch.over.set()
        signal.signal(signal.SIGTERM, before)


class _Group:
    """The connections between ranks: torch.distributed's store, and its process groups."""

    def __init__(self, launch: Launch, device: str) -> None:
        self.launch, self.device = launch, torch.device(device)
        self.received_bytes = 0
        self.store = _open_store(launch)
        own = _own_facts(device)
        self.facts = _meet(self.store, launch, own)
        self.watch = _Watch(launch, self.store, self.facts)
        try:
            self._check_versions()
            dist.init_process_group(
                "gloo", store=PrefixStore("gloo", self.store), rank=launch.rank, world_size=launch.size,
                timeout=_NEVER,
            )  # fmt: skip
            places = [(fact["host"], fact["boot"], fact["device"]) for fact in self.facts]
            nccl = self.device.type == "cuda" and len(set(places)) == launch.size
            self._place = self.device if nccl else torch.device("cpu")
            if nccl:
                torch.cuda.set_device(self.device)
            self._tensors = dist.new_group(backend="nccl", timeout=_NEVER) if nccl else dist.group.WORLD
        except RuntimeError as error:
            found = RunError(
                f"{self.watch.name(launch.rank)}: no connection to the other ranks ({_one_line(error)})",
                hint="GLOO_SOCKET_IFNAME names the network interface to use",
            )
            self.fail(found)
            raise found from None
        except QwenqError as error:
            self.fail(error)
            raise

    def _check_versions(self) -> None:
        for rank, facts in enumerate(self.facts):
            for name, version in facts["versions"].items():
                if version != (mine := self.facts[0]["versions"][name]):
                    raise JobError(
                        f"{self.watch.name(rank)} has {name} {version}, {self.watch.name(0)} has {mine}",
                        hint="ranks need the same versions: other ones end in other bytes",
                    )

    # ------------------------------------------------------------------ collectives

    def gathered(self, value: Any) -> list[Any]:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.launch.size)]
        self._wait(lambda: dist.all_gather(sizes, torch.tensor([len(data)]), async_op=True))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.empty_like(padded) for _ in sizes]
        self._wait(lambda: dist.all_gather(found, padded, async_op=True))
        return [json.loads(bytes(t[: int(n)].numpy())) for t, n in zip(found, sizes, strict=True)]

    def exchange(self, sent: Tensor) -> Tensor:
        here = sent.to(self._place)
        found = torch.empty_like(here)
        self._wait(lambda: dist.all_to_all_single(found, here, group=self._tensors, async_op=True))
        self.received_bytes += found.nbytes * (self.launch.size - 1) // self.launch.size
        return found.to(sent.device)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        if tensor.numel() == 0:
            return
        data = _bytes_of(tensor)
        here = data.to(self._place)
        self._wait(lambda: dist.broadcast(here, source, group=self._tensors, async_op=True))
        if source != self.launch.rank:
            self.received_bytes += data.nbytes
            if here.data_ptr() != data.data_ptr():
                data.copy_(here)

    def send(self, tensor: Tensor, source: int, target: int) -> None:
        if tensor.numel() == 0:
            return
        rank, none = self.launch.rank, [0] * self.launch.size
        data = _bytes_of(tensor).cpu()
        sent, given = none.copy(), data[:0]
        if rank == source:
            sent[target], given = len(data), data
        due, found = none.copy(), data[:0]
        if rank == target:
            due[source], found = len(data), torch.empty_like(data)
        # not isend and irecv: gloo does not tell when these are done without being waited for
        self._wait(lambda: dist.all_to_all_single(found, given, due, sent, async_op=True))
        if rank == target:
            _bytes_of(tensor).copy_(found)
            self.received_bytes += len(data)

    def _wait(self, begin: Callable[[], Any]) -> None:
        """Until a collective is done, or a rank is lost."""
        try:
            work, tries = begin(), 0
            while not work.is_completed():
                self.watch.check()
                time.sleep(0.0 if (tries := tries + 1) < 200 else 0.0005)
            work.wait()
        except RuntimeError as error:  # the other end is gone: the watch knows who that was, or will
            raise self.watch.reason(_one_line(error)) from None

    # ------------------------------------------------------------------ the end

    def leave(self) -> None:
        """Wait for every rank to be done; then none watches another any more."""
        self.gathered("done")
        self.watch.over.set()
        with suppress(QwenqError, RuntimeError):
            self.gathered("gone")
            dist.destroy_process_group()

    def fail(self, error: BaseException) -> None:
        """Have every rank know why this one stops; waits a little for them to have heard it."""
        if self.watch.lost:
            return
        if isinstance(error, KeyboardInterrupt):
            error = QwenqError("interrupted")
        said = error.message if isinstance(error, QwenqError) else f"{type(error).__name__}: {_one_line(error)}"
        with suppress(RuntimeError):
            self.watch.post(f"{self.watch.name(self.launch.rank)}: {said}")


def _bytes_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor's own memory, uint8."""
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _own_facts(device: str) -> dict[str, Any]:
    def read(path: str) -> str:
        try:
            return os.readlink(path) if path.startswith("/proc/self/ns") else Path(path).read_text().strip()
        except OSError:
            return ""

    counted = numerics([device])
    return {
        "host": socket.gethostname(),
        "boot": read("/proc/sys/kernel/random/boot_id") + read("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "device": device,
        "threads": counted["threads"],
        "instructions": counted["instructions"],
        "versions": {"qwenq": __version__} | {name: versions()[name] for name in ("torch", "transformers")},
    }


def _started(pid: int) -> str:
    """When a process of this machine started, in ticks since the machine did; empty for one that is no more."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def _open_store(launch: Launch) -> Any:
    timeout = timedelta(seconds=JOIN_TIMEOUTS * launch.timeout_s)
    try:
        return TCPStore(
            launch.host, launch.port, launch.size, launch.keeps_store, timeout=timeout, wait_for_workers=False
        )
    except RuntimeError as error:
        where = f"{launch.host}:{launch.port}"
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise RunError(f"{where}: the port is in use", hint="another --master-port (MASTER_PORT)") from None
        raise RunError(
            f"{where}: rank {launch.rank} on {socket.gethostname()} cannot meet the others there ({_one_line(error)})",
            hint="rank 0 listens there: is it started, is the name right, is the port open between hosts?",
        ) from None


def _meet(store: Any, launch: Launch, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Facts of every rank, by rank, once all of them are there; RunError for those that did not come in time, and where
    the store is gone.
    """
    where, within_s = f"{launch.host}:{launch.port}", JOIN_TIMEOUTS * launch.timeout_s
    keys = [f"qwenq/facts/{rank}" for rank in range(launch.size)]
    end = time.monotonic() + within_s
    try:
        store.set(keys[launch.rank], json.dumps(own))
        while not store.check(keys):
            if time.monotonic() > end:
                missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
                raise RunError(
                    f"{where}: {launch.size - len(missing)} of {launch.size} ranks came within {within_s:g} s, "
                    f"missing: {', '.join(missing)}",
                    hint="every host starts torchrun with the same --nnodes, --master-addr and --master-port",
                )
            time.sleep(0.05)
        return [json.loads(store.get(key)) for key in keys]
    except RuntimeError as error:
        raise RunError(
            f"{where}: rank {launch.rank} waited for others there, and it went away ({_one_line(error)})",
            hint="rank 0 or its torchrun has ended: it says why",
        ) from None


@dataclass
class _Watch:
    """Whether every rank lives: each adds to a counter in the store, and looks after those of the others.

    Two threads: one talks to the store, which may itself hang; the other judges by the clock, and ends this process
    where its main thread does not within _GRACE_S, in a collective that will never be done.
    """

    launch: Launch
    store: Any
    facts: list[dict[str, Any]]
    over: threading.Event = field(default_factory=threading.Event)
    lost: str = ""  # who, and why, once one is
    told: Callable[[str], None] = lambda line: None  # of the line that this process ends with, where it has to be ended

    def __post_init__(self) -> None:
        self._beat_s = min(1.0, self.launch.timeout_s / 10)
        now = time.monotonic()
        self._seen = dict.fromkeys(range(self.launch.size), ("", now))
        self._answered, self._posted, self._ended = now, "", False
        self._terminated_s = 0.0
        self._own = self.store.clone()  # a connection of its own: the first one may be waiting
        for run in (self._beat, self._judge):
            threading.Thread(target=run, daemon=True, name="qwenq-watch").start()

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.facts[rank]['host']}"

    def check(self) -> None:
        """RunError once a rank is lost."""
        if self.lost:
            raise RunError(self.lost, hint="put that right, then go on with --resume")

    def terminate(self, *signalled: Any) -> None:
        """Handler of SIGTERM: torchrun sends one when a rank of its host has ended, whose name is to be told first."""
        self._terminated_s = time.monotonic()

    def reason(self, otherwise: str) -> RunError:
        """Why a connection broke: the watch knows within its timeout."""
        end = time.monotonic() + self.launch.timeout_s + 2 * self._beat_s
        while not self.lost and time.monotonic() < end:
            time.sleep(0.05)
        self.lost = self.lost or f"{self.name(self.launch.rank)}: lost the other ranks ({otherwise})"
        return RunError(self.lost, hint="put that right, then go on with --resume")

    def post(self, reason: str) -> None:
        """Tell every rank why this one stops, and wait until they have heard it, a few seconds at most."""
        self.store.compare_set("qwenq/failed", "", reason)
        end = time.monotonic() + min(5.0, self.launch.timeout_s)
        others = [f"qwenq/heard/{rank}" for rank in range(self.launch.size) if rank != self.launch.rank]
        while time.monotonic() < end and not self.store.check(others):
            time.sleep(0.05)

    # ------------------------------------------------------------------ in threads

    def _beat(self) -> None:
        count = 0
        with suppress(RuntimeError):
            while not self.over.wait(self._beat_s):
                count += 1
                self._own.set(f"qwenq/beat/{self.launch.rank}", str(count))
                if self._own.check(["qwenq/failed"]):
                    self._posted = self._own.get("qwenq/failed").decode()
                    self._own.set(f"qwenq/heard/{self.launch.rank}", "")
                for rank in self._seen:
                    if rank != self.launch.rank and self._own.check([f"qwenq/beat/{rank}"]):
                        beat = self._own.get(f"qwenq/beat/{rank}").decode()
                        if beat != self._seen[rank][0]:
                            self._seen[rank] = beat, time.monotonic()
                self._answered = time.monotonic()
        self._ended = True  # the store is gone

    def _judge(self) -> None:
        while not self.over.wait(min(0.25, self._beat_s)):
            if reason := self._found():
                self.lost = self.lost or reason
                break
        if self.over.wait(_GRACE_S):
            return
        self.told(self.lost)
        os._exit(RunError.exit_code)

    def _found(self) -> str:
        """Who is lost, and why; empty while nobody is."""
        if self._posted:
            return self._posted
        now, limit = time.monotonic(), self.launch.timeout_s
        mine = self.facts[self.launch.rank]
        for rank, facts in enumerate(self.facts):
            if rank == self.launch.rank:
                continue
            here = (facts["host"], facts["boot"]) == (mine["host"], mine["boot"])
            if here and facts["started"] and _started(facts["pid"]) != facts["started"]:
                return f"{self.name(rank)} ended without a word: it was killed, or ran out of memory"
            if now - self._seen[rank][1] > limit and now - self._answered < limit / 2:
                return f"{self.name(rank)} gave no sign of life for {limit:g} s"
        if self._terminated_s and now - self._terminated_s > _TERMINATE_S:
            return f"{self.name(self.launch.rank)} was told to stop (SIGTERM)"
        if now - self._answered > limit or self._ended:
            store = f"{self.launch.host}:{self.launch.port}"
            return f"{store}, where ranks meet, does not answer: rank 0 or torchrun on {self.facts[0]['host']} is gone"
        return ""
