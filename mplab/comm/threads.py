"""Ranks of one process: CPU threads, CUDA streams on one GPU, one GPU each.

Peers read each other's tensors where they lie. A collective is a *meeting*: every rank brings its call and its tensor.
Up to `SMALL_BYTES` the last one to come computes the results of all, so that each of the others is woken once and
nothing else. Above it all go on together: each computes its share, and they meet once more before anyone may change
what another still reads.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from mplab.comm import collectives
from mplab.comm.calls import Call
from mplab.comm.coalesced import reduce_share
from mplab.comm.communicator import Communicator, Handle
from mplab.comm.hub import Hub, Meeting
from mplab.comm.ledger import Ledger, Message
from mplab.comm.link import sleep_until
from mplab.comm.meetings import Meetings
from mplab.comm.memory import CudaMemory, HostMemory, new_like
from mplab.plan.cost import Link
from mplab.plan.traffic import Traffic, direct_traffic
from mplab.trace.recorder import Mark, Recorder


class ThreadCommunicator(Communicator):
    """One thread rank's end of the channels.

    Args:
        rank: this rank's place in the group.
        ranks: world ranks of the group, in order.
        device: where its tensors live.
        ledger: counts messages and bytes.
        trace: writes down when.
        hub: what the ranks of this run share.
        link: delays messages like a slower network; None: as fast as memory.
        rendezvous: a send waits until it is received.
    """

    def __init__(
        self,
        rank: int,
        ranks: tuple[int, ...],
        device: torch.device,
        ledger: Ledger,
        trace: Recorder,
        hub: Hub,
        link: Link | None = None,
        rendezvous: bool = False,
    ) -> None:
        super().__init__(rank, ranks, device, ledger, trace)
        self._hub, self._link, self._rendezvous = hub, link, rendezvous
        self._me = ranks[rank]
        self._memory = CudaMemory(device) if device.type == "cuda" else HostMemory()
        self._meetings = Meetings(rank, ranks, hub, self._memory)
        self._devices = [hub.devices[r] for r in ranks]
        self._link_free_ns = 0
        self._traffic: dict[Call, list[Traffic]] = {}
        self._num_sent: dict[Hashable, int] = {}
        self._num_received: dict[Hashable, int] = {}
        # One for each list of ranks, however it is reached: its calls and messages are numbered once.
        self._groups: dict[tuple[int, ...], ThreadCommunicator] = {ranks: self}

    def group(self, ranks: Sequence[int]) -> ThreadCommunicator:
        members = self._check_group(ranks)
        if members not in self._groups:
            group = self._groups[members] = ThreadCommunicator(
                members.index(self._me),
                members,
                self.device,
                self.ledger,
                self.trace,
                self._hub,
                self._link,
                self._rendezvous,
            )
            group._meetings.count_with([other._meetings for other in self._groups.values()])
            group._groups = self._groups
        return self._groups[members]

    # -- one rank to another ------------------------------------------------------------------------------------------

    def _start_send(self, x: Tensor, dst: int, tag: int) -> Handle[None]:
        begin, mark = time.perf_counter_ns(), self.trace.now()
        what = f"send(dst={dst}, tag={tag})"
        self._check_running(what)
        peer, key = self.ranks[dst], _next_number(self._num_sent, dst, tag)
        copy = self._memory.handover(x, self._hub.devices[peer])
        size = x.nbytes
        arrival = 0 if self._link is None else self._hub.ports.reserve(self._me, peer, self._link.time_s(1, size))
        self._hub.channel(self._me, peer, ("send", self.ranks)).put((key, copy, self._memory.publish(), arrival))
        self.ledger.add(Message("send", self.ranks, (peer,), 1, size, 0, begin, time.perf_counter_ns()))
        self.trace.add("message", "send", mark, self.trace.now(), size)
        return Handle(partial(self._await_received, peer, key, what) if self._rendezvous else _nothing)

    def _await_received(self, peer: int, key: Hashable, what: str) -> None:
        mark = self.trace.now()
        self._hub.take(
            self._me, peer, self._hub.channel(peer, self._me, ("received", self.ranks)), key, what, self.ranks
        )
        self.trace.add("wait", "send", mark, self.trace.now())

    def _start_recv(self, src: int, tag: int) -> Handle[Tensor]:
        key = _next_number(self._num_received, src, tag)
        if self._rendezvous:  # the receive is there, and that is what the send waits for
            self._hub.channel(self._me, self.ranks[src], ("received", self.ranks)).put((key, None, None, 0))
        return Handle(partial(self._finish_recv, src, tag, key))

    def _finish_recv(self, src: int, tag: int, key: Hashable) -> Tensor:
        begin, mark = time.perf_counter_ns(), self.trace.now()
        peer = self.ranks[src]
        channel = self._hub.channel(peer, self._me, ("send", self.ranks))
        what = f"recv(src={src}, tag={tag})"
        received: Tensor
        _, received, event, arrival = self._hub.take(self._me, peer, channel, key, what, self.ranks)
        self._memory.observe(received, event)
        handed_over = self.trace.now()
        self.trace.add("wait", "recv", mark, handed_over)
        if self._link is not None:
            if event is not None:
                event.synchronize()  # the emulated wire starts with what the GPU has written
            sleep_until(arrival)
            self.trace.add("message", "recv", handed_over, self.trace.now())
        size = received.nbytes
        self.ledger.add(Message("recv", self.ranks, (peer,), 0, 0, size, begin, time.perf_counter_ns()))
        return received

    # -- all ranks of the group ---------------------------------------------------------------------------------------

    def _check_running(self, what: object) -> None:
        if self._hub.failure is not None:
            self._hub.stop(self._me, what)

    def _start(self, call: Call, x: Tensor | None) -> Handle[Tensor]:
        begin_ns = time.perf_counter_ns()
        meeting, _ = self._bring(call, x)
        if meeting.last == self.rank and meeting.results is not None:
            self.trace.add("message", call.name, meeting.met, self.trace.now())
        return Handle(partial(self._finish, call, meeting, x, begin_ns))

    def _run(self, call: Call, x: Tensor | None) -> Tensor:
        begin_ns, mark = time.perf_counter_ns(), self.trace.now()
        meeting, is_last = self._bring(call, x, waits=True)
        if not is_last:
            self._hub.end_wait(self._me, call)
        return self._finish(call, meeting, x, begin_ns, mark)

    def _bring(self, call: Call, x: Tensor | None, waits: bool = False) -> tuple[Meeting, bool]:
        """Bring a tensor to the next meeting; the last one wakes the others, with their results if they are small."""
        self._check_running(call)
        shared = target = None
        if x is not None:
            if x.requires_grad:
                x = x.detach()
            shared = x.contiguous()
            if call.name in ("all_reduce_", "all_gather_"):
                target = shared  # of one that is not contiguous a copy, which `_finish` puts back
            elif call.name == "all_reduce" and x.nbytes > collectives.SMALL_BYTES:
                target = new_like(shared)
        meeting, is_last = self._meetings.come(call, (shared, target), waits)
        if is_last:
            is_small = all(item[0] is None or item[0].nbytes <= collectives.SMALL_BYTES for item in meeting.items)
            if is_small:
                self._meetings.observe(meeting)
                meeting.met, meeting.last = self.trace.now(), self.rank
                meeting.results = collectives.results_of_all(meeting.call, meeting.items, self._devices, self._memory)
                meeting.events = [self._memory.publish()] * self.size
            self._hub.complete(meeting)
        return meeting, is_last

    def _finish(self, call: Call, meeting: Meeting, x: Tensor | None, begin_ns: int, mark: Mark = None) -> Tensor:
        is_asynchronous = mark is None
        mark = self.trace.now() if is_asynchronous else mark
        self._meetings.wait(meeting, call)
        if meeting.results is not None:
            out: Tensor = meeting.results[self.rank]
            if meeting.events[self.rank] is not None:
                self._memory.observe(out, meeting.events[self.rank])
            # An asynchronous call may have been over before this rank began to wait.
            if self._memory.is_host:
                met = max(mark, meeting.met)
            elif meeting.last == self.rank and not is_asynchronous:
                met = meeting.met
            else:
                met = self.trace.now()
        else:
            self._meetings.observe(meeting)
            met = self.trace.now()
            out = collectives.result_of_one(meeting.call, meeting.items, self.rank, self._memory)
            self._meetings.meet_again(meeting, call)
            given, _ = meeting.items[self.rank]
            if given is not None:  # its memory is this rank's again, though slower ranks have still to read its shape
                meeting.items[self.rank] = given.to("meta"), None
        if x is not None and call.name == "all_reduce_" and not x.is_contiguous():
            out = x.detach().copy_(out)
        self._end(call, meeting, begin_ns, mark, met, is_asynchronous)
        return out

    def _end(self, call: Call, meeting: Meeting, begin_ns: int, mark: Mark, met: Mark, is_asynchronous: bool) -> None:
        """A collective is over, as soon as an emulated link has carried it."""
        traffic, on_the_way = self._traffic_of_all(meeting), None
        if self._link is not None:
            on_the_way = self._wait_for_link(meeting, traffic)
        is_known = self._memory.is_host and is_asynchronous
        self._write_down(call.name, traffic[self.rank], begin_ns, mark, met, on_the_way if is_known else None)

    def _start_coalesced(self, call: Call, xs: list[Tensor]) -> Handle[None]:
        self._check_running(call)
        return _CoalescedReduction(self, call, xs)

    def _traffic_of_all(self, meeting: Meeting) -> list[Traffic]:
        """Every rank's traffic; training repeats its calls, so it is worked out once where the call decides it."""
        call = meeting.call
        traffic = self._traffic.get(call)
        if traffic is None:
            block_bytes = collectives.block_bytes(call, meeting.items)
            traffic = [direct_traffic(call.name, r, block_bytes, call.root) for r in range(self.size)]
            if call.name not in ("all_gather", "gather"):
                self._traffic[call] = traffic
        return traffic

    def _start_all_to_all(self, call: Call, xs: list[Tensor]) -> Handle[list[Tensor]]:
        self._check_running(call)
        begin_ns = time.perf_counter_ns()
        # A copy for each receiver, which keeps it: one copy in all, and no second meeting.
        copies = [self._memory.handover(x, self._hub.devices[r]) for x, r in zip(xs, self.ranks, strict=True)]
        meeting, is_last = self._meetings.come(call, copies)
        if is_last:
            self._hub.complete(meeting)
        return Handle(partial(self._finish_all_to_all, call, meeting, begin_ns))

    def _finish_all_to_all(self, call: Call, meeting: Meeting, begin_ns: int) -> list[Tensor]:
        mark = self.trace.now()
        self._meetings.wait(meeting, call)
        received = []
        for copies, event in zip(meeting.items, meeting.events, strict=True):
            received.append(copies[self.rank])
            if event is not None:
                self._memory.observe(received[-1], event)
        met = self.trace.now()
        sizes, num_peers = [[x.nbytes for x in copies] for copies in meeting.items], self.size - 1
        traffic = [
            Traffic(num_peers, sum(sizes[r]) - sizes[r][r], num_peers, sum(row[r] for row in sizes) - sizes[r][r])
            for r in range(self.size)
        ]
        if self._link is not None:
            self._wait_for_link(meeting, traffic)
        self._write_down(call.name, traffic[self.rank], begin_ns, mark, met)
        return received

    def _wait_for_link(self, meeting: Meeting, traffic: list[Traffic]) -> tuple[int, int]:
        """Make a collective take as long as its busiest rank's messages one after another, once all have called it.

        Returns:
            From when to when the link was busy with it, `perf_counter_ns`.
        """
        assert self._link is not None
        if not self._memory.is_host:
            self._memory.publish().synchronize()
        busiest_s = max(max(self._link.time_s(*t[:2]), self._link.time_s(*t[2:])) for t in traffic)
        start_ns = max(meeting.latest_ns, self._link_free_ns)
        self._link_free_ns = start_ns + round(busiest_s * 1e9)
        sleep_until(self._link_free_ns)
        return start_ns, self._link_free_ns


class _CoalescedReduction(Handle[None]):
    """A reduction of many tensors under way. They stay where they are: who reduces reads and writes those of all ranks.

    Args:
        comm: this rank's communicator.
        call: what it calls.
        xs: its tensors.
    """

    __slots__ = ("_begin_ns", "_call", "_comm", "_done", "_meeting", "_xs")

    def __init__(self, comm: ThreadCommunicator, call: Call, xs: list[Tensor]) -> None:
        super().__init__(self._end)
        self._begin_ns = time.perf_counter_ns()
        self._comm, self._call, self._xs = comm, call, xs
        self._done: Meeting | None = None  # where the ranks meet whose share is reduced
        shared = [x.contiguous() for x in xs]
        if xs[0].is_complex():
            shared = [x.resolve_conj() for x in shared]
        self._meeting, is_last = comm._meetings.come(call, shared)
        if not is_last:
            return
        if sum(x.nbytes for x in shared) <= collectives.SMALL_BYTES:
            comm._meetings.observe(self._meeting)
            met = comm.trace.now()
            reduce_share(call.op or "", self._meeting.items, 0, 1, comm._memory)
            self._meeting.results = self._meeting.items
            self._meeting.events = [comm._memory.publish()] * comm.size
            comm.trace.add("message", call.name, met, comm.trace.now())
        comm._hub.complete(self._meeting)

    def advance(self) -> None:
        """Reduce this rank's share if all ranks have brought their tensors."""
        meeting, comm = self._meeting, self._comm
        if self._done is not None or meeting.results is not None or not meeting.is_complete:
            return
        comm._meetings.observe(meeting)
        start = comm.trace.now()
        reduce_share(self._call.op or "", meeting.items, comm.rank, comm.size, comm._memory)
        comm.trace.add("message", self._call.name, start, comm.trace.now())
        self._done, is_last = comm._meetings.come_again(meeting, self._call)
        if is_last:
            comm._hub.complete(self._done)

    def _end(self) -> None:
        comm, call = self._comm, self._call
        mark = comm.trace.now()
        comm._meetings.wait(self._meeting, call)
        self.advance()
        met = comm.trace.now()
        if self._done is None:
            comm._meetings.observe(self._meeting)
        else:
            comm._meetings.wait(self._done, call)
            comm._meetings.observe(self._done)
        for x, shared in zip(self._xs, self._meeting.items[comm.rank], strict=True):
            if x is not shared:
                x.copy_(shared)
        comm._end(call, self._meeting, self._begin_ns, mark, met, is_asynchronous=True)


def _next_number(counts: dict[Hashable, int], peer: int, tag: int) -> Hashable:
    """Messages of one pair and tag are numbered on both sides, so that they match in order."""
    number = counts.get((peer, tag), 0)
    counts[peer, tag] = number + 1
    return tag, number


def _nothing() -> None:
    """A send has nothing left to do: its tensor is already with the receiver."""
