"""The same world when its ranks are processes that a launcher started.

That is torchrun, or what sets the same variables; else mpirun, or what else starts MPI's processes.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from mplab.comm.gloo import GlooWire
from mplab.comm.guard import Guard
from mplab.comm.ledger import Ledger
from mplab.comm.processes import ProcessCommunicator
from mplab.errors import MplabError
from mplab.trace.event import Event
from mplab.trace.recorder import Recorder
from mplab.trace.timeline import Timeline
from mplab.world import join_mpi, rungs
from mplab.world.join import VARIABLES, Member, join
from mplab.world.out_of_memory import out_of_memory_note
from mplab.world.rank import Rank
from mplab.world.state import keep_freed_memory, on_device, zero_marks

T = TypeVar("T")

# At the end, for the others to end as well.
LEAVE_TIMEOUT_S, LEAVE_AFTER_FAILURE_S = 2.0, 0.5


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return not _missing() or _is_mpi()


def _missing() -> list[str]:
    """What torchrun would have set."""
    return [name for name in VARIABLES if not os.environ.get(name)]


def _is_mpi() -> bool:
    return any(os.environ.get(name) for name in join_mpi.VARIABLES)


class ProcessWorld:
    """The world that this process is one rank of; made by `World.from_env()`.

    Args:
        rank: this process's rank.
        members: all processes, in rank order.
        timeout_s: the longest that a rank may wait for another.
        mpi: the way that messages take, if it is not torch.distributed.
    """

    def __init__(self, rank: int, members: list[Member], timeout_s: float, mpi: join_mpi.Joined | None = None) -> None:
        self.size, self.timeout_s = len(members), timeout_s
        self.devices = tuple(torch.device(m.device) for m in members)
        self._mpi = mpi
        self.backend = "mpi" if mpi is not None else "nccl" if self.devices[rank].type == "cuda" else "gloo"
        places = [member.place for member in members]
        self._num_local, self._num_hosts = places.count(places[rank]), len(set(places))
        if self._num_local > 1:
            torch.set_num_threads(1)
        if self.devices[rank].type == "cpu":
            keep_freed_memory()
        self._guard = Guard(rank, self.size, timeout_s, GlooWire if mpi is None else mpi.make_wire)
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
            MplabError: no launcher started this process, one of the others did not come, or GPUs are too few; or it
                takes mpi4py, which is missing.
        """
        if not (isinstance(timeout_s, int | float) and timeout_s > 0):
            raise MplabError(f"timeout_s={timeout_s!r}: a time-out is a positive number of seconds")
        missing = _missing()
        if missing and _is_mpi():
            mpi = join_mpi.join(timeout_s)
            return cls(mpi.rank, mpi.members, timeout_s, mpi)
        if missing:
            raise MplabError(
                f"World.from_env() needs a launcher, which would have set {', '.join(missing)}: start the script with "
                "`torchrun --nproc-per-node=2 script.py` or `mpirun -n 2 python -m mpi4py script.py`, or use World(n) "
                "for ranks in this process"
            )
        rank, members = join(timeout_s)
        return cls(rank, members, timeout_s)

    def _new_rank(self) -> Rank:
        me, device = self._guard.rank, self.devices[self._guard.rank]
        trace, everyone = Recorder(me, device), tuple(range(self.size))
        comm = ProcessCommunicator(me, everyone, device, Ledger(me), trace, self._guard, self.backend == "nccl")
        return Rank(me, self.size, device, torch.Generator(device).manual_seed(me), comm, trace)

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self, fn: Callable[..., T], *args: Any) -> list[T]:
        """Call `fn(rank, *args)` on this process's rank, and wait until all processes have done so.

        What it prints is left alone.

        Returns:
            A list with this rank's result alone.

        Raises:
            Exception: what `fn` raised here, with a note of what to lower if it ran out of memory; the launcher sees it
                too, when nobody catches it.
            PeerFailure: another rank failed.
            Deadlock, CommTimeout, CollectiveMismatch: ranks could not go on; raised in each of them.
        """
        if not self._is_open:
            raise MplabError("this world is closed: call World.from_env() again")
        self.rank = rank = self._new_rank()
        try:
            self._guard.start()
            # Backward runs in the rank's own thread, so that collectives inside it keep their order.
            with torch.autograd.set_multithreading_enabled(False), on_device(rank.device, 0, rank.index):
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
            if note := out_of_memory_note(error, rank.index, rank.device):
                error.add_note(note)
            raise
        return [result]

    def close(self) -> None:
        """Leave: wait a moment for the others to do so, and disconnect. Done at exit if nobody does it before."""
        if self._is_open and self._guard.is_mine:
            self._is_open = False
            atexit.unregister(self.close)
            has_failed = self._guard.failure is not None
            try:
                self._guard.leave(LEAVE_AFTER_FAILURE_S if has_failed else LEAVE_TIMEOUT_S)
            finally:
                if self._mpi is None:
                    dist.destroy_process_group()
                else:
                    join_mpi.leave(has_failed)

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
        if self._num_hosts > 1:
            notes.append("several hosts: each rank's times count from its own start")
        return tuple(notes)

    @property
    def _sharing(self) -> str:
        num_cores = rungs.num_cores() if self._mpi is None else self._mpi.num_cores
        return f"{self._num_local} ranks share {num_cores} cores" if self._num_local > num_cores else ""

    @property
    def timeline(self) -> Timeline:
        """The last run's events of all ranks.

        Ranks on one host share a clock, and their times are on one axis. Clocks of several hosts differ by more than a
        message takes: there each rank counts from its own start.
        """
        if not self._events:
            raise MplabError("this world has not finished a run yet: call world.run(fn) first")
        said = [json.loads(x.numpy().tobytes()) for x in self._events]
        first_ns = min(zero_ns for zero_ns, _ in said)
        events = []
        for rank, (zero_ns, rows) in enumerate(said):
            later_s = (zero_ns - first_ns) * 1e-9 if self._num_hosts == 1 else 0.0
            for lane, name, start_s, end_s, *rest in rows:
                events.append(Event(rank, lane, name, start_s + later_s, end_s + later_s, *rest))
        return Timeline(events, self.size, notes=self.notes)

    @property
    def ledgers(self) -> list[Ledger]:
        """This rank's messages in the last run, as a list with one element."""
        return [self.rank.comm.ledger]

    def __str__(self) -> str:
        hosts = f"{self._num_hosts} host{'s' * (self._num_hosts > 1)}"
        where = f"{hosts}; this one is rank {self.rank.index}, on {self.rank.device}"
        lines = [f"World of {self.size} rank{'s' * (self.size > 1)}: processes ({self.backend}) on {where}"]
        if self._sharing:
            lines.append(f"  {self._sharing}")
        proves = "everything that these links allow"
        if self._sharing:
            proves = "correctness, bytes and order; times are not speed-ups"
        return "\n".join([*lines, f"  timings here can prove: {proves}"])

    __repr__ = __str__
