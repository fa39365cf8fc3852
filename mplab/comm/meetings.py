"""How thread ranks meet: each brings its call and its item, the calls are compared, and who comes early waits.

Whoever comes last goes on first: it may compute for all before it wakes the others.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Hashable
from typing import Any

from mplab.comm.calls import Call
from mplab.comm.hub import Hub, Meeting
from mplab.comm.memory import HostMemory
from mplab.errors import CollectiveMismatch


class Meetings:
    """One rank's side of the meetings of its group.

    Args:
        rank: its place in the group.
        ranks: world ranks of the group, in order.
        hub: what the ranks of this run share.
        memory: how it reads what the others bring.
    """

    def __init__(self, rank: int, ranks: tuple[int, ...], hub: Hub, memory: HostMemory) -> None:
        self._rank, self._ranks, self._hub, self._memory = rank, ranks, hub, memory
        self._me = ranks[rank]
        # The same ranks in another order are a mistake to be found, so their collectives are counted together.
        self._open = hub.meetings(tuple(sorted(ranks)))
        self._numbers = itertools.count(1)

    def count_with(self, others: list[Meetings]) -> None:
        """This rank's meetings of the same ranks, however the group is reached, are numbered once."""
        for other in others:
            if other._open is self._open:
                self._numbers = other._numbers
                return

    def come(self, call: Call, item: Any, waits: bool = False) -> tuple[Meeting, bool]:
        """Bring an item to the next meeting, without waiting.

        Args:
            call: what this rank calls.
            item: a tensor, or some.
            waits: count this rank as waiting from now on, if others are missing; it must call `hub.end_wait` then.

        Returns:
            The meeting, and whether this rank was the last to come.

        Raises:
            CollectiveMismatch: another rank called something else.
            PeerFailure: the world has failed.
        """
        return self._come(next(self._numbers), call, item, waits)

    def come_again(self, meeting: Meeting, call: Call) -> tuple[Meeting, bool]:
        """Come to the meeting of those who are done with the tensors of an earlier one, without waiting."""
        return self._come((meeting.number, "done"), call, None, False)

    def meet_again(self, meeting: Meeting, call: Call) -> None:
        """Wait until all are done with each other's tensors."""
        done, is_last = self.come_again(meeting, call)
        if is_last:
            self._hub.complete(done)
        self.wait(done, call)
        self.observe(done)

    def wait(self, meeting: Meeting, call: Call) -> None:
        """Wait until all are there."""
        if not meeting.is_complete:
            self._hub.wait(self._me, meeting, call, self._ranks)

    def observe(self, meeting: Meeting) -> None:
        """Make what all others brought readable here."""
        if self._memory.is_host:
            return
        for item, event in zip(meeting.items, meeting.events, strict=True):
            if event is not None:
                for x in item if isinstance(item, tuple | list) else (item,):
                    self._memory.observe(x, event)

    def _come(self, key: Hashable, call: Call, item: Any, waits: bool) -> tuple[Meeting, bool]:
        event, hub, is_last = self._memory.publish(), self._hub, False
        with hub.lock:
            meeting = self._open.get(key)
            if meeting is None:
                meeting = self._open[key] = Meeting(call, self._ranks, key)
            meeting.calls[self._me] = call
            if meeting.call != call or meeting.group != self._ranks:
                self._check(key, call, meeting)
            meeting.items[self._rank], meeting.events[self._rank] = item, event
            meeting.num_missing -= 1
            if not meeting.num_missing:
                del self._open[key]
                meeting.latest_ns = time.perf_counter_ns()
                is_last = True
            elif waits:
                hub.begin_wait(self._me, meeting, call, self._ranks)
        return meeting, is_last

    def _check(self, key: Hashable, call: Call, meeting: Meeting) -> None:
        if call.agrees(meeting.call) and meeting.group == self._ranks:
            meeting.call = meeting.call.with_shape_of(call)
            return
        # The lock is held: whoever is in this collective stays in it, so that its line can be told.
        lines = [f"collective {key} of group {list(self._ranks)} differs between ranks:"]
        for rank, called in sorted(meeting.calls.items()):
            group = "" if rank == self._me or meeting.group == self._ranks else f" of group {list(meeting.group)}"
            lines.append(f"  rank {rank} called {called}{group} at {self._hub.line_of(rank)}")
        error = CollectiveMismatch("\n".join(lines))
        if self._hub.fail(error, self._me):
            raise error
        self._hub.stop(self._me, call)
