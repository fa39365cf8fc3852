"""What thread ranks share: channels and meetings, who waits where, and the first failure.

Every wait in the library is a wait for a message on a `Channel` or for the others at a `Meeting`. A rank writes down
which one before it blocks, so that whoever watches (the caller of `World.run`) can tell at once that nobody can go on,
and who waits for whom.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Hashable, Sequence
from queue import SimpleQueue
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch

from mplab.comm.link import Ports
from mplab.errors import CommError, CommTimeout, Deadlock, MplabError, PeerFailure

# This package and torch, through whose modules and autograd a layer's collectives are called.
_NOT_THE_USERS = tuple(
    os.path.dirname(os.path.abspath(path)) + os.sep for path in (os.path.dirname(__file__), torch.__file__)
)
_STOP = (None, None, None, 0)
OVER = MplabError("its run is over; call it inside World.run, and what outlives a run after connect(rank.comm)")
"""What a hub fails with in the end, when all is well: nobody would come to a meeting any more."""


class Channel:
    """A queue from one rank to another, which counts: an item on its way is no deadlock.

    An item is (key, payload, event, time): which message it is, a tensor, the mark after which a GPU has written it,
    and when it arrives over an emulated link, in `perf_counter_ns`.
    """

    __slots__ = ("_early", "_queue", "num_got", "num_put")

    def __init__(self) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._early: dict[Hashable, Any] = {}
        self.num_put = 0
        self.num_got = 0

    def put(self, item: Any) -> None:
        """Hand an item over. Counted first: the watcher must never see a message arrive that was not sent."""
        self.num_put += 1
        self._queue.put(item)

    def kept(self, key: Hashable) -> Any:
        """The item with this key if it has come before another one that was waited for, else None."""
        return self._early.pop(key, None) if self._early else None

    def take(self, key: Hashable) -> Any:
        """The item with this key, waiting for it; earlier ones are kept. `_STOP` when the world has failed."""
        while True:
            item = self._queue.get()
            if item is _STOP:
                self._queue.put(_STOP)  # for every later wait on this channel
                return item
            if item[0] == key:
                return item
            self._early[item[0]] = item

    def stop(self) -> None:
        """Wake whoever waits here."""
        self._queue.put(_STOP)

    def is_stuck(self) -> bool:
        """True when nothing is on its way: every item was taken, or lies here because it is not what is waited for."""
        return self.num_put == self.num_got + len(self._early)


class Meeting:
    """One collective under way: what each rank of the group brought, until the last one is there.

    Args:
        call: what the first rank called.
        group: world ranks of the group, in the first rank's order.
        number: which of the group's collectives it is.
    """

    __slots__ = (
        "call",
        "calls",
        "events",
        "group",
        "is_complete",
        "items",
        "last",
        "latest_ns",
        "met",
        "num_missing",
        "number",
        "results",
        "waiting",
    )

    def __init__(self, call: Any, group: tuple[int, ...], number: Hashable) -> None:
        size = len(group)
        self.call = call
        self.group = group
        self.number = number
        self.calls: dict[int, Any] = {}
        self.items: list[Any] = [None] * size
        self.events: list[Any] = [None] * size
        self.results: list[Any] | None = None
        self.num_missing = size
        self.is_complete = False
        self.latest_ns = 0
        self.last = -1  # who computed the results of all, and when it began to (a mark of its recorder)
        self.met: Any = None
        self.waiting: list[int] = []

    def is_stuck(self) -> bool:
        """True while a rank is missing."""
        return self.num_missing > 0


class Wait(NamedTuple):
    """A blocked rank: where, in which call, of which world ranks, since when."""

    place: Channel | Meeting
    what: object
    group: tuple[int, ...]
    src: int | None
    since_ns: int

    def missing(self) -> list[int]:
        """World ranks that it waits for."""
        if isinstance(self.place, Meeting):
            return [r for r in self.group if r not in self.place.calls]
        return [] if self.src is None else [self.src]


class Hub:
    """The shared state of one run of thread ranks.

    Args:
        devices: every rank's device.
        timeout_s: the longest that a rank may wait.
    """

    def __init__(self, devices: Sequence[torch.device], timeout_s: float) -> None:
        self.num_ranks = num_ranks = len(devices)
        self.devices = devices
        self.timeout_s = timeout_s
        self.ports = Ports(num_ranks)
        self.failure: BaseException | None = None
        self.failed_rank: int | None = None
        self.failed_at = ""
        self.waits: list[Wait | None] = [None] * num_ranks
        self.is_done = [False] * num_ranks
        self.threads: list[int | None] = [None] * num_ranks
        self.lock = threading.RLock()
        self._wake = [threading.Lock() for _ in devices]
        for lock in self._wake:
            lock.acquire()
        self._channels: dict[Hashable, Channel] = {}
        self._meetings: dict[tuple[int, ...], dict[Hashable, Meeting]] = {}

    # -- one rank to another ------------------------------------------------------------------------------------------

    def channel(self, src: int, dst: int, purpose: Hashable) -> Channel:
        """The channel from world rank `src` to `dst` for one purpose; made when first asked for."""
        key = (src, dst, purpose)
        with self.lock:
            if key not in self._channels:
                self._channels[key] = Channel()
                if self.failure is not None:
                    self._channels[key].stop()
            return self._channels[key]

    def take(self, rank: int, src: int, channel: Channel, key: Hashable, what: object, group: tuple[int, ...]) -> Any:
        """Wait for an item from `src` on behalf of `rank`.

        Raises:
            PeerFailure: the world has failed meanwhile.
        """
        # A kept item counts as one that nobody wants: whoever wants it must not be seen waiting.
        item = channel.kept(key)
        if item is None:
            self.waits[rank] = Wait(channel, what, group, src, time.perf_counter_ns())
            item = channel.take(key)
            if item is _STOP:
                self.stop(rank, what)
            # In this order: between the two the watcher sees an item on its way, never a rank that waits for nothing.
            self.waits[rank] = None
        channel.num_got += 1
        return item

    # -- all ranks of a group -----------------------------------------------------------------------------------------

    def meetings(self, group: tuple[int, ...]) -> dict[Hashable, Meeting]:
        """The collectives under way among the ranks of a group."""
        with self.lock:
            return self._meetings.setdefault(group, {})

    def complete(self, meeting: Meeting) -> None:
        """All are there: wake those who wait."""
        with self.lock:
            meeting.is_complete = True
            if self.failure is None:  # else they are awake already
                for rank in meeting.waiting:
                    self.waits[rank] = None
                    self._wake[rank].release()

    def wait(self, rank: int, meeting: Meeting, what: object, group: tuple[int, ...]) -> None:
        """Wait until all are there."""
        with self.lock:
            if meeting.is_complete:
                return
            self.begin_wait(rank, meeting, what, group)
        self.end_wait(rank, what)

    def begin_wait(self, rank: int, meeting: Meeting, what: object, group: tuple[int, ...]) -> None:
        """Write down that a rank waits; the caller holds the lock, and `end_wait` follows without it."""
        if self.failure is not None:
            self.stop(rank, what)
        self.waits[rank] = Wait(meeting, what, group, None, time.perf_counter_ns())
        meeting.waiting.append(rank)

    def end_wait(self, rank: int, what: object) -> None:
        """Wait until woken."""
        self._wake[rank].acquire()
        if self.waits[rank] is not None:
            self.stop(rank, what)

    # -- failure ------------------------------------------------------------------------------------------------------

    def fail(self, error: BaseException, rank: int | None) -> bool:
        """Make `error` the world's failure and wake all ranks; the first one counts. True if it was the first."""
        with self.lock:
            if self.failure is not None:
                return False
            self.failure, self.failed_rank = error, rank
            if rank is not None and (wait := self.waits[rank]) is not None:
                self.failed_at = str(wait.what)
            self.wake()
            return True

    def wake(self) -> None:
        """Wake all ranks that wait, because the world has failed: again, if whoever did it may have been stopped."""
        with self.lock:
            for channel in self._channels.values():
                channel.stop()
            for blocked, wait in enumerate(self.waits):
                is_meeting = wait is not None and isinstance(wait.place, Meeting) and not wait.place.is_complete
                if is_meeting and self._wake[blocked].locked():
                    self._wake[blocked].release()

    def stop(self, rank: int, what: object) -> NoReturn:
        """Raise in `rank` because the world has failed: the failure itself where it is its own, else `PeerFailure`."""
        assert self.failure is not None
        if self.failure is OVER:
            raise MplabError(f"rank {rank} can't do {what}: {OVER}")
        if self.failed_rank == rank and isinstance(self.failure, CommError):
            raise self.failure
        who = "the run was stopped from outside" if self.failed_rank is None else f"rank {self.failed_rank} failed"
        said = "".join(traceback.format_exception_only(self.failure)).strip()
        raise PeerFailure(f"rank {rank} stopped in {what}: {who} with {said}", self.failed_rank)

    def leave(self, rank: int) -> None:
        """A rank's thread is about to end; its number may soon be another's."""
        with self.lock:
            self.threads[rank] = None

    # -- who waits where ----------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Look once for a deadlock or a wait that is too long, and fail the world if there is one."""
        if self.failure is not None or not any(self.waits):
            return
        # Read "done" before the waits: a rank that is done sends nothing more.
        done, before = list(self.is_done), list(self.waits)
        stuck = [wait is not None and wait.place.is_stuck() for wait in before]
        missing = [wait.missing() if wait is not None else [] for wait in before]
        # A rank whose wait is the same object before and after was blocked all the time between.
        nobody_moved = all(a is b for a, b in zip(before, self.waits, strict=True))
        for rank, wait in enumerate(before):
            if wait is None or not stuck[rank] or self.waits[rank] is not wait:
                continue
            finished = [r for r in missing[rank] if done[r]]
            if finished:
                self._fail(Deadlock, rank, f"rank {rank} waits for rank {finished[0]}, which has finished")
            elif nobody_moved and all(d or s for d, s in zip(done, stuck, strict=True)):
                self._fail(Deadlock, rank, "no rank can go on")
            elif (time.perf_counter_ns() - wait.since_ns) * 1e-9 > self.timeout_s:
                running = [r for r in range(self.num_ranks) if before[r] is None and not done[r]]
                late = ", ".join(f"rank {r}" for r in running or missing[rank])
                self._fail(CommTimeout, rank, f"rank {rank} waited {self.timeout_s:g} s in {wait.what}; late: {late}")

    def _fail(self, kind: type[MplabError], rank: int, why: str) -> None:
        with self.lock:
            self.fail(kind(f"{why}\n{self.table()}"), rank)

    def table(self) -> str:
        """One line a rank: finished, waiting (in what, where, for whom) or running (where)."""
        lines = []
        for rank, wait in enumerate(self.waits):
            if self.is_done[rank]:
                lines.append(f"  rank {rank} has finished")
            elif wait is not None:
                peers = ", ".join(map(str, wait.missing()))
                where = f"{wait.what} of group {list(wait.group)} at {self.line_of(rank)}"
                lines.append(f"  rank {rank} waits for rank {peers} in {where}")
            else:
                lines.append(f"  rank {rank} runs at {self.line_of(rank)}")
        return "\n".join(lines)

    def line_of(self, rank: int) -> str:
        """Where the user's code of a rank is now."""
        return user_line(sys._current_frames().get(self.threads[rank] or -1))


def user_line(frame: FrameType | None) -> str:
    """File, line and function of the innermost frame outside of this package and of torch."""
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    name = frame.f_code.co_filename
    # A notebook cell's file name is a hash that says nothing to anyone.
    place = "this notebook" if "ipykernel" in name or name.startswith("<") else os.path.basename(name)
    return f"{place}, line {frame.f_lineno}, in {frame.f_code.co_name}"
