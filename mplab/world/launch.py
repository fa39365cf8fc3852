"""The same world when its ranks are processes that a launcher started: torchrun, or anything that sets its variables."""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from mplab.comm.guard import Guard
from mplab.comm.ledger import Ledger
from mplab.comm.processes import ProcessCommunicator
from mplab.errors import MplabError
from mplab.trace.event import Event
from mplab.trace.recorder import Recorder
from mplab.trace.timeline import Timeline
from mplab.world import rungs
from mplab.world.rank import Rank
from mplab.world.state import on_device, zero_marks

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Processes of one launch start seconds apart, whatever time-out their messages have.
JOIN_TIMEOUT_S = 30.0
# At the end, for the others to end as well.
LEAVE_TIMEOUT_S, LEAVE_AFTER_FAILURE_S = 5.0, 0.5

_num_joined = 0  # worlds that this process has joined: each has its own names in the store


class Member(NamedTuple):
    """What each process tells the others when it joins."""

    host: str
    device: str
    trouble: str


class ProcessWorld:
    """The world that this process is one rank of; made by `World.from_env()`.

    Args:
        rank: this process's rank.
        members: all processes, in rank order.
        store: through which they found each other; kept while they are connected.
        timeout_s: the longest that a rank may wait for another.
    """

    def __init__(self, rank: int, members: list[Member], store: dist.Store, timeout_s: float) -> None:
        self.size, self.timeout_s = len(members), timeout_s
        self.devices = tuple(torch.device(m.device) for m in members)
        self.backend = "nccl" if self.devices[rank].type == "cuda" else "gloo"
        self._hosts, self._store = [m.host for m in members], store
        self._num_local = self._hosts.count(self._hosts[rank])
        if self._num_local > 1:
            torch.set_num_threads(1)
        self._guard = Guard(rank, self.size, timeout_s)
        self.rank = self._new_rank()
        self._events: list[torch.Tensor] = []
        self._is_open = True
        atexit.register(self.close)

    @classmethod
    def from_env(cls, timeout_s: float = 30.0) -> ProcessWorld:
        """Join the other processes that the launcher started.

        Args:
            timeout_s: the longest that a rank may wait for another; joining may take 30 s in any case.

        Raises:
            MplabError: no launcher started this process, one of the others did not come, or GPUs are too few.
        """
        if not (isinstance(timeout_s, int | float) and timeout_s > 0):
            raise MplabError(f"timeout_s={timeout_s!r}: a time-out is a positive number of seconds")
        rank, size, local_rank, port = _environment()
        if dist.is_initialized():
            raise MplabError(
                "torch.distributed is initialised in this process already: use the world that World.from_env() returned, or leave "
                "it with world.close() first"
            )
        members, store = _interruptibly(lambda: _join(rank, size, local_rank, port, max(timeout_s, JOIN_TIMEOUT_S)))
        return cls(rank, members, store, timeout_s)

    def _new_rank(self) -> Rank:
        me, device = self._guard.rank, self.devices[self._guard.rank]
        trace, everyone = Recorder(me, device), tuple(range(self.size))
        backend = self.backend if device.type == "cuda" else None
        comm = ProcessCommunicator(me, everyone, device, Ledger(me), trace, self._guard, backend)
        return Rank(me, self.size, device, torch.Generator(device).manual_seed(me), comm, trace)

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self, fn: Callable[..., T], *args: Any) -> list[T]:
        """Call `fn(rank, *args)` on this process's rank, and wait until all processes have done so.

        What it prints is left alone.

        Returns:
            A list with this rank's result alone.

        Raises:
            Exception: what `fn` raised here; the launcher sees it too, when nobody catches it.
            PeerFailure: another rank failed.
            Deadlock, CommTimeout, CollectiveMismatch: ranks could not go on; raised in each of them.
        """
        if not self._is_open:
            raise MplabError("this world is closed: call World.from_env() again")
        self._guard.start()
        self.rank = rank = self._new_rank()
        try:
            # Backward runs in the rank's own thread, so that collectives inside it keep their order.
            with torch.autograd.set_multithreading_enabled(False), on_device(rank.device, 0):
                rank.trace.start(zero_marks((rank.device,))[rank.device])
                zero_ns = time.perf_counter_ns()
                result = fn(rank, *args)
            events = [[e.lane, e.name, e.start_s, e.end_s, e.size_bytes, e.microbatch] for e in rank.trace.events()]
            text = json.dumps([zero_ns, events]).encode()
            self._events = self._guard.finish(torch.from_numpy(np.frombuffer(text, np.uint8).copy()))
        except BaseException as error:
            self._guard.fail(error)
            if self._guard.failure is not None and self._guard.failure.rank == rank.index:
                doing = f" in {rank.trace.failed_in}" if rank.trace.failed_in else ""
                error.add_note(f"(rank {rank.index} of {self.size}{doing}; all other ranks were told to stop)")
            raise
        return [result]

    def close(self) -> None:
        """Leave: wait a moment until the others are through as well, and disconnect. Done at exit if nobody does it before."""
        if self._is_open:
            self._is_open = False
            atexit.unregister(self.close)
            self._guard.leave(LEAVE_TIMEOUT_S if self._guard.failure is None else LEAVE_AFTER_FAILURE_S)
            dist.destroy_process_group()

    def __enter__(self) -> ProcessWorld:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            self._guard.fail(error)
        self.close()

    # -- what it is, and what happened --------------------------------------------------------------------------------

    @property
    def notes(self) -> tuple[str, ...]:
        """What every figure of this world must say about its times."""
        notes = [f"{sharing}: times are not speed-ups"] if (sharing := self._sharing) else []
        if len(set(self._hosts)) > 1:
            notes.append("several hosts: each rank's times count from its own start")
        return tuple(notes)

    @property
    def _sharing(self) -> str:
        num_cores = rungs.num_cores()
        return f"{self._num_local} ranks share {num_cores} cores" if self._num_local > num_cores else ""

    @property
    def timeline(self) -> Timeline:
        """The last run's events of all ranks.

        Ranks on one host share a clock, and their times are on one axis. Clocks of several hosts differ by more than a message
        takes: there each rank counts from its own start.
        """
        if not self._events:
            raise MplabError("this world has not finished a run yet: call world.run(fn) first")
        said = [json.loads(x.numpy().tobytes()) for x in self._events]
        first_ns = min(zero_ns for zero_ns, _ in said)
        events = []
        for rank, (zero_ns, rows) in enumerate(said):
            later_s = (zero_ns - first_ns) * 1e-9 if len(set(self._hosts)) == 1 else 0.0
            for lane, name, start_s, end_s, *rest in rows:
                events.append(Event(rank, lane, name, start_s + later_s, end_s + later_s, *rest))
        return Timeline(events, self.size, notes=self.notes)

    @property
    def ledgers(self) -> list[Ledger]:
        """This rank's messages in the last run, as a list with one element."""
        return [self.rank.comm.ledger]

    def __str__(self) -> str:
        num_hosts = len(set(self._hosts))
        where = f"{num_hosts} host{'s' * (num_hosts > 1)}; this one is rank {self.rank.index}, on {self.rank.device}"
        lines = [f"World of {self.size} rank{'s' * (self.size > 1)}: processes ({self.backend}) on {where}"]
        if self._sharing:
            lines.append(f"  {self._sharing}")
        proves = "correctness, bytes and order; times are not speed-ups" if self._sharing else "everything that these links allow"
        return "\n".join([*lines, f"  timings here can prove: {proves}"])

    __repr__ = __str__


def _environment() -> tuple[int, int, int, int]:
    """Rank, world size, local rank and port, as the launcher says."""
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise MplabError(
            f"World.from_env() needs a launcher, and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: start the "
            "script with `torchrun --nproc-per-node=2 script.py`, or use World(n) for ranks in this process"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        try:
            numbers[name] = int(os.environ[name])
        except ValueError:
            raise MplabError(f"{name}={os.environ[name]!r} is no whole number: the launcher sets it, leave it alone") from None
    rank, size, local_rank, port = numbers.values()
    if not 0 <= rank < size:
        raise MplabError(f"RANK={rank} with WORLD_SIZE={size}: ranks go from 0 to {size - 1}")
    return rank, size, local_rank, port


def _join(rank: int, size: int, local_rank: int, port: int, timeout_s: float) -> tuple[list[Member], dist.Store]:
    """Find the others, agree on devices, connect."""
    global _num_joined
    end, host = time.monotonic() + timeout_s, os.environ["MASTER_ADDR"]
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own server, which outlives restarts
    patience = timedelta(seconds=timeout_s)
    try:
        server = dist.TCPStore(host, port, size, rank == 0 and not has_agent, patience, wait_for_workers=False)
    except RuntimeError as error:
        raise MplabError(f"rank {rank} could not reach {host}:{port} (MASTER_ADDR:MASTER_PORT) in {timeout_s:g} s: {error}") from error
    _num_joined += 1
    store = dist.PrefixStore(f"mplab/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{_num_joined}", server)
    store.set(f"member/{rank}", json.dumps(_member(local_rank)))
    keys = [f"member/{r}" for r in range(size)]
    try:
        store.wait(keys, timedelta(seconds=max(0.1, end - time.monotonic())))
    except RuntimeError as error:
        missing = [r for r, key in enumerate(keys) if not store.check([key])]
        raise MplabError(
            f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {size} did not join at {host}:{port} in "
            f"{timeout_s:g} s: look at what {'they' if len(missing) > 1 else 'it'} wrote, and at the other hosts' launchers"
        ) from error
    members = [Member(*json.loads(store.get(key))) for key in keys]
    for r, member in enumerate(members):
        if member.trouble:
            raise MplabError(f"rank {r} on {member.host}: {member.trouble}")
    if len({member.device.split(":")[0] for member in members}) > 1:
        said = ", ".join(f"rank {r} {m.device} on {m.host}" for r, m in enumerate(members))
        raise MplabError(f"some ranks have a GPU and some have none ({said}): set CUDA_VISIBLE_DEVICES= to run all on CPUs")
    with _loopback(len({m.host for m in members}) == 1):
        backend = "cpu:gloo,cuda:nccl" if members[rank].device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("torch", store), rank=rank, world_size=size, timeout=patience)
    return members, store


def _member(local_rank: int) -> Member:
    host = socket.gethostname()
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not num_gpus:
        return Member(host, "cpu", "")
    if local_rank >= num_gpus:
        few = f"its local rank is {local_rank}, but this host has {num_gpus} GPU{'s' * (num_gpus > 1)}: start at most one process "
        return Member(host, "", few + "for each, or set CUDA_VISIBLE_DEVICES= to run all on CPUs")
    return Member(host, f"cuda:{local_rank}", "")


@contextmanager
def _loopback(is_wanted: bool) -> Iterator[None]:
    """While gloo connects ranks of one host, it listens there alone, unless the user chose another network."""
    name, device = "GLOO_SOCKET_IFNAME", {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if not is_wanted or device is None or name in os.environ:
        yield
        return
    os.environ[name] = device
    try:
        yield
    finally:
        del os.environ[name]


def _interruptibly(work: Callable[[], T]) -> T:
    """Do something that would ignore Ctrl-C, in another thread."""
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True, name="mplab-join")
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]
    return results[0]
