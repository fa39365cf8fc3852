"""A world of ranks in this process: `World(n).run(fn)` calls `fn(rank)` on every rank and returns their results."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mplab.comm.hub import OVER, Hub
from mplab.comm.ledger import Ledger
from mplab.comm.threads import ThreadCommunicator
from mplab.errors import MplabError, PeerFailure
from mplab.plan.cost import Link
from mplab.trace.profiler import RankProfiler
from mplab.trace.recorder import Recorder
from mplab.trace.timeline import Timeline
from mplab.world import rungs
from mplab.world.out_of_memory import out_of_memory_note
from mplab.world.output import RankOutput
from mplab.world.rank import Rank
from mplab.world.state import ThreadState, keep_freed_memory, on_device, zero_marks
from mplab.world.stop import stop

if TYPE_CHECKING:
    from mplab.world.launch import ProcessWorld

T = TypeVar("T")

WATCH_EVERY_S = 0.02


class World:
    """`n` ranks on the best rung that this machine has: a GPU each, streams of one GPU, or CPU threads.

    From the first world with ranks on a CPU on, the process keeps the memory that tensors free (`keep_freed_memory`).

    Args:
        n: number of ranks; more than cores or GPUs is fine, and the figures say so.
        device: "auto", "cpu", "cuda" or one GPU such as "cuda:0".
        slices: run each rank of one GPU on a share of its SMs (green contexts).
        link: slow messages down to those of another network; None: as fast as this machine is.
        rendezvous: a send waits until it is received, which shows deadlocks that buffers hide.
        timeout_s: the longest that a rank may wait for another.

    Raises:
        MplabError: a world that this machine cannot make.
    """

    def __init__(
        self,
        n: int,
        device: str = "auto",
        slices: bool = False,
        link: Link | None = None,
        rendezvous: bool = False,
        timeout_s: float = 30.0,
    ) -> None:
        if not (isinstance(timeout_s, int | float) and timeout_s > 0):
            raise MplabError(f"timeout_s={timeout_s!r}: a time-out is a positive number of seconds")
        if link is not None and not isinstance(link, Link):
            raise MplabError(f"link={link!r}: give a Link(latency_s=..., bandwidth_bytes_s=...), or None")
        self.rung = rungs.choose(n, device, slices)
        self.size = n
        self.devices = self.rung.devices
        if any(device.type == "cpu" for device in self.devices):
            keep_freed_memory()
        self.link, self.rendezvous, self.timeout_s = link, rendezvous, timeout_s
        self._profiler: RankProfiler | None = None
        self._recorders: list[Recorder] = []
        self._ledgers: list[Ledger] = []

    @staticmethod
    def from_env(timeout_s: float = 30.0) -> ProcessWorld:
        """The world that torchrun or mpirun started this process in: the same `run`, on this process's rank.

        Raises:
            MplabError: this process was not started by a launcher.
        """
        from mplab.world.launch import ProcessWorld

        return ProcessWorld.from_env(timeout_s)

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def notes(self) -> tuple[str, ...]:
        """What every figure of this world must say about its times."""
        notes = [f"{self.rung.sharing}: times are not speed-ups"] if self.rung.sharing else []
        if self.link is not None:
            notes.append(f"emulated link: {self.link}")
        return tuple(notes)

    def __str__(self) -> str:
        counts = {str(d): self.devices.count(d) for d in dict.fromkeys(self.devices)}
        where = ", ".join(f"{count} on {device}" for device, count in counts.items())
        lines = [f"World of {self.size} rank{'s' * (self.size > 1)}: {self.rung.name} ({where})"]
        if self.rung.num_sms:
            lines.append(f"  each rank runs on a share of {self.rung.num_sms} SMs")
        if self.rung.sharing:
            lines.append(f"  {self.rung.sharing}")
        if self.link is not None:
            lines.append(f"  messages are slowed down to an emulated link: {self.link}")
        if self.rendezvous:
            lines.append("  every send waits for its receive")
        lines.append(f"  timings here can prove: {self.rung.proves}")
        return "\n".join(lines)

    __repr__ = __str__

    # -- what happened ------------------------------------------------------------------------------------------------

    @property
    def timeline(self) -> Timeline:
        """The last run's events, one row a rank."""
        events = [event for recorder in self._last(self._recorders) for event in recorder.events()]
        return Timeline(events, self.size, notes=self.notes)

    @property
    def ledgers(self) -> list[Ledger]:
        """Every rank's messages in the last run, in rank order."""
        return self._last(self._ledgers)

    def _last(self, of: list[T]) -> list[T]:
        if not of:
            raise MplabError("this world has not run yet: call world.run(fn) first")
        return of

    @contextmanager
    def profile(self, logdir: str | os.PathLike[str]) -> Iterator[RankProfiler]:
        """`with world.profile("logs") as p:` runs torch's profiler over all ranks of the runs inside.

        Leaves one trace file a rank in `logdir` (`p.files`), as TensorBoard's PyTorch Profiler plug-in reads them.

        Raises:
            MplabError: the folder cannot be written, or a profiler runs already.
        """
        if self._profiler is not None:
            raise MplabError("this world is being profiled already: leave the outer `with world.profile(...)` first")
        with RankProfiler(logdir, self.size, self.devices) as profiler:
            self._profiler = profiler
            try:
                yield profiler
            finally:
                self._profiler = None

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self, fn: Callable[..., T], *args: Any) -> list[T]:
        """Call `fn(rank, *args)` on every rank and wait for all.

        Args:
            fn: any function or closure; its first argument is a `Rank`. All ranks share its other arguments.
            args: passed on.

        Returns:
            What each rank returned, in rank order.

        Raises:
            Exception: the first one that a rank raised, with a note that says which rank, and what to lower if it ran
                out of memory; the other ranks were stopped.
            Deadlock, CommTimeout, CollectiveMismatch: ranks could not go on.
            KeyboardInterrupt: Ctrl-C; all ranks were stopped.
        """
        hub = Hub(self.devices, self.timeout_s)
        ranks = [self._rank(r, hub) for r in range(self.size)]
        self._recorders, self._ledgers = [rank.trace for rank in ranks], [rank.comm.ledger for rank in ranks]
        inherited, zeros = ThreadState(), zero_marks(self.devices)
        num_threads = torch.get_num_threads()
        results: list[Any] = [None] * self.size
        done: SimpleQueue[int] = SimpleQueue()

        with RankOutput(self.size) as output:

            def main(rank: Rank) -> None:
                # Told to stop just as it ends, a rank has nothing left to stop; starting late, it has nothing to do.
                with suppress(PeerFailure):
                    try:
                        if hub.failure is None:
                            work(rank)
                    finally:
                        hub.leave(rank.index)

            def work(rank: Rank) -> None:
                r = rank.index
                output.register(r)
                hub.threads[r] = threading.get_ident()
                try:
                    with inherited.applied(), on_device(rank.device, self.rung.num_sms, r):
                        rank.trace.start(zeros[rank.device])
                        if self._profiler is not None:
                            self._profiler.register(r, rank.trace)
                            rank.trace.profiling = True
                        results[r] = fn(rank, *args)
                except BaseException as error:
                    hub.fail(error, r)
                finally:
                    hub.is_done[r] = True
                    output.unregister()
                    done.put(r)

            threads = [
                threading.Thread(target=main, args=(rank,), name=f"mplab-rank{rank.index}", daemon=True)
                for rank in ranks
            ]
            try:
                for thread in threads:
                    thread.start()
                self._watch(hub, done, output)
            except BaseException as error:  # Ctrl-C, above all
                hub.fail(error, None)
                raise
            finally:
                try:
                    if hub.failure is not None:
                        stop(threads, hub)
                    else:
                        for thread in threads:
                            thread.join()
                finally:
                    # Each rank took one core, and torch would give new threads no more from now on.
                    torch.set_num_threads(num_threads)
        if hub.failure is not None:
            raise _explained(hub, ranks)
        hub.fail(OVER, None)  # nobody watches any more: who still waited would do so for ever
        return results

    def _rank(self, index: int, hub: Hub) -> Rank:
        device, everyone = self.devices[index], tuple(range(self.size))
        trace, ledger = Recorder(index, device), Ledger(index)
        comm = ThreadCommunicator(index, everyone, device, ledger, trace, hub, self.link, self.rendezvous)
        return Rank(index, self.size, device, torch.Generator(device).manual_seed(index), comm, trace)

    def _watch(self, hub: Hub, done: SimpleQueue[int], output: RankOutput) -> None:
        """Wait until all ranks are done or one has failed; this is where Ctrl-C arrives."""
        num_running = self.size
        while num_running and hub.failure is None:
            try:
                done.get(timeout=WATCH_EVERY_S)
                num_running -= 1
            except Empty:
                hub.watch()
                output.show_if_due()


def _explained(hub: Hub, ranks: list[Rank]) -> BaseException:
    """The world's failure, with a note that says which rank, in which action."""
    error, rank = hub.failure, hub.failed_rank
    assert error is not None
    if rank is not None:
        doing = hub.failed_at or ranks[rank].trace.failed_in
        where = f" in {doing}" if doing else ""
        error.add_note(f"(rank {rank} of {hub.num_ranks}{where}; all other ranks were stopped)")
        if note := out_of_memory_note(error, rank, ranks[rank].device):
            error.add_note(note)
    return error
