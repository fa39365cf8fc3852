"""Thread ranks reduce many tensors as if they were one, where they lie: nothing is joined, nothing is allocated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mplab.comm import collectives
from mplab.comm.communicator import Call, Handle
from mplab.comm.hub import Meeting
from mplab.comm.memory import HostMemory
from mplab.comm.reduction import BLOCK_BYTES, reduce_in_order
from mplab.plan.traffic import chunk_lengths
from mplab.private import add_each_, copy_each_
from mplab.trace.recorder import Mark

if TYPE_CHECKING:
    from mplab.comm.threads import ThreadCommunicator


class CoalescedReduction(Handle[None]):
    """A reduction of many tensors under way. They stay where they are: who reduces reads and writes those of all ranks.

    Args:
        comm: this rank's communicator.
        call: what it calls.
        xs: its tensors.
    """

    __slots__ = ("_begin_ns", "_call", "_comm", "_done", "_is_last", "_meeting", "_met", "_xs")

    def __init__(self, comm: ThreadCommunicator, call: Call, xs: list[Tensor]) -> None:
        super().__init__(self._end)
        self._begin_ns = time.perf_counter_ns()
        self._comm, self._call, self._xs = comm, call, xs
        self._done: Meeting | None = None  # where the ranks meet whose share is reduced
        self._met: Mark = None
        shared = [x.contiguous() for x in xs]
        if xs[0].is_complex():
            shared = [x.resolve_conj() for x in shared]
        self._meeting, is_last = comm._come(next(comm._numbers), call, shared)
        if not is_last:
            return
        if sum(x.nbytes for x in shared) <= collectives.SMALL_BYTES:
            comm._observe(self._meeting)
            self._met = comm.trace.now()
            reduce_share(call.op or "", self._meeting.items, 0, 1, comm._memory)
            self._meeting.results = self._meeting.items
            self._meeting.events = [comm._memory.publish()] * comm.size
            comm.trace.add("message", call.name, self._met, comm.trace.now())
        comm._hub.complete(self._meeting)

    def advance(self) -> None:
        """Reduce this rank's share if all ranks have brought their tensors."""
        meeting, comm = self._meeting, self._comm
        if self._done is not None or meeting.results is not None or not meeting.is_complete:
            return
        comm._observe(meeting)
        start = comm.trace.now()
        reduce_share(self._call.op or "", meeting.items, comm.rank, comm.size, comm._memory)
        comm.trace.add("message", self._call.name, start, comm.trace.now())
        self._done, is_last = comm._come((meeting.number, "done"), self._call, None)
        if is_last:
            comm._hub.complete(self._done)

    def _end(self) -> None:
        comm, call = self._comm, self._call
        mark = comm.trace.now()
        comm._await(self._meeting, call)
        self.advance()
        met = comm.trace.now()
        if self._done is None:
            comm._observe(self._meeting)
        else:
            comm._await(self._done, call)
            comm._observe(self._done)
        for x, shared in zip(self._xs, self._meeting.items[comm.rank], strict=True):
            if x is not shared:
                x.copy_(shared)
        comm._end(call, self._meeting, self._begin_ns, mark, met, is_asynchronous=True)


class Part(NamedTuple):
    """Elements `low` to `high` of one tensor of a list; `high` is None for all of them."""

    place: int
    low: int
    high: int | None


def reduce_share(op: str, tensors: Sequence[Sequence[Tensor]], share: int, num_shares: int, memory: HostMemory) -> None:
    """Reduce one share of the joined elements over all ranks, in rank order, in place in every rank's tensors.

    Args:
        op: one of `reduction.OPS`.
        tensors: of every rank, contiguous, of the same shapes.
        share: which chunk of the joined elements, of `num_shares` as `torch.tensor_split` cuts them.
        num_shares: 1 for everything.
        memory: the calling rank's.
    """
    lengths = tuple(x.numel() for x in tensors[0])
    # On a CPU block by block: what was added up still lies in the cache when it is copied to the others.
    block = BLOCK_BYTES // tensors[0][0].element_size() if memory.device.type == "cpu" else sum(lengths)
    for parts in blocks(lengths, share, num_shares, max(1, block)):
        given = [[_take(xs, part) for part in parts] for xs in tensors]
        # One GPU can't compute on another's memory; on a CPU all of it is at hand.
        local = given if memory.device.type == "cpu" else [[memory.local(x) for x in xs] for xs in given]
        total = local[0]
        if op in ("sum", "mean"):
            for xs in local[1:]:
                add_each_(total, xs)
            if op == "mean":
                for x in total:
                    x.div_(len(tensors))
        else:
            for of_ranks in zip(*local, strict=True):
                reduce_in_order(op, of_ranks, of_ranks[0])
        for xs in given:
            if xs[0] is not total[0]:
                copy_each_(xs, total)


@lru_cache(maxsize=256)
def blocks(lengths: tuple[int, ...], share: int, num_shares: int, max_length: int) -> tuple[tuple[Part, ...], ...]:
    """One share of the elements of tensors of these lengths, in blocks of at most `max_length` elements."""
    of_shares = chunk_lengths(sum(lengths), num_shares)
    start = sum(of_shares[:share])
    end = start + of_shares[share]
    found: list[list[Part]] = []
    room = place = 0
    for index, length in enumerate(lengths):
        low, stop = max(start - place, 0), min(end - place, length)
        while low < stop:
            if not room:
                found.append([])
                room = max_length
            high = min(low + room, stop)
            found[-1].append(Part(index, low, None if (low, high) == (0, length) else high))
            room -= high - low
            low = high
        place += length
    return tuple(map(tuple, found))


def _take(xs: Sequence[Tensor], part: Part) -> Tensor:
    x = xs[part.place]
    return x if part.high is None else x.view(-1)[part.low : part.high]
