"""Ranks that are processes, under torchrun, mpirun or another launcher: over gloo or MPI, and NCCL between GPUs.

Ranks talk directly, as the ledger counts: each gives every other one its part, and reduces in rank order what it gets,
so that the results are those of thread ranks, bit for bit. What a rank calls travels with its part and is compared
before anything is written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mplab.comm import collectives, fabric, parts
from mplab.comm.calls import Call
from mplab.comm.communicator import Communicator, Handle
from mplab.comm.guard import Guard
from mplab.comm.hub import user_line
from mplab.comm.ledger import Ledger, Message
from mplab.comm.reduction import reduce_in_order
from mplab.comm.wire import FRAME_BYTES, Parcel
from mplab.errors import CollectiveMismatch
from mplab.plan.traffic import Traffic, direct_traffic
from mplab.private import add_each_
from mplab.trace.recorder import Mark, Recorder

Parts = list[Tensor | None]  # one for each rank of a group
Given = Sequence[Tensor | Sequence[Tensor] | None]  # what each is given, which may be several tensors


class ProcessCommunicator(Communicator):
    """One process rank's end of the connections.

    An operation that is started sends this rank's part at once and receives the others' in the background; `wait()`
    compares the calls, and only then computes and writes. Over NCCL only the calls are exchanged in the background.

    Args:
        rank: this rank's place in the group.
        ranks: world ranks of the group, in order.
        device: where its tensors live.
        ledger: counts messages and bytes.
        trace: writes down when.
        guard: this process's mail and watch.
        has_fabric: tensors of collectives travel over NCCL, and not by mail, which goes through the CPU's memory.
    """

    def __init__(
        self,
        rank: int,
        ranks: tuple[int, ...],
        device: torch.device,
        ledger: Ledger,
        trace: Recorder,
        guard: Guard,
        has_fabric: bool = False,
    ) -> None:
        super().__init__(rank, ranks, device, ledger, trace)
        self._guard, self._has_fabric = guard, has_fabric
        self._me = ranks[rank]
        # The same ranks in another order are a mistake to be found, so their collectives are counted together.
        self._name = ",".join(map(str, ranks))
        self._set = ",".join(map(str, sorted(ranks)))
        self._traffic: dict[Call, Traffic] = {}
        # One for each list of ranks, however it is reached.
        self._groups: dict[tuple[int, ...], ProcessCommunicator] = {ranks: self}

    def group(self, ranks: Sequence[int]) -> ProcessCommunicator:
        members = self._check_group(ranks)
        if members not in self._groups:
            rank = members.index(self._me)
            group = ProcessCommunicator(
                rank, members, self.device, self.ledger, self.trace, self._guard, self._has_fabric
            )
            group._groups = self._groups
            self._groups[members] = group
        return self._groups[members]

    # -- one rank to another ------------------------------------------------------------------------------------------

    def _start_send(self, x: Tensor, dst: int, tag: int) -> Handle[None]:
        begin, mark = time.perf_counter_ns(), self.trace.now()
        peer = self.ranks[dst]
        self._guard.check_running(f"send(dst={dst}, tag={tag})")
        self._guard.send([peer], self._number(f"m{self._name} {peer} {tag}", f"{self._name} {tag}"), None, x)
        size = x.nbytes
        self.ledger.add(Message("send", self.ranks, (peer,), 1, size, 0, begin, time.perf_counter_ns()))
        self.trace.add("message", "send", mark, self.trace.now(), size)
        return Handle(_nothing)

    def _start_recv(self, src: int, tag: int) -> Handle[Tensor]:
        key = self._number(f"m{self._name} from {self.ranks[src]} {tag}", f"{self._name} {tag}")
        return Handle(partial(self._finish_recv, src, tag, key))

    def _finish_recv(self, src: int, tag: int, key: str) -> Tensor:
        begin, mark = time.perf_counter_ns(), self.trace.now()
        peer = self.ranks[src]
        parcel = self._guard.collect([peer], key, f"recv(src={src}, tag={tag})", self.ranks)[peer]
        assert parcel.x is not None
        met = self._met(mark, [parcel])
        self.trace.add("wait", "recv", mark, met)
        if parcel.x.untyped_storage().nbytes() == FRAME_BYTES:
            x = parcel.x.clone()  # it is small, and lies in a frame that is much larger
        else:
            x = parcel.x
            self.trace.add("message", "recv", met, self.trace.now())
        x = x.to(self.device)
        size = x.nbytes
        self.ledger.add(Message("recv", self.ranks, (peer,), 0, 0, size, begin, time.perf_counter_ns()))
        return x

    # -- collectives --------------------------------------------------------------------------------------------------

    def _start(self, call: Call, x: Tensor | None) -> Handle[Tensor]:
        begin_ns, x = time.perf_counter_ns(), None if x is None else x.detach()
        given = parts.given(call, x, self.rank, self.size)
        key = self._announce(call, given, None if x is None else x.shape)
        return Handle(partial(self._finish, call, x, given, key, begin_ns))

    def _finish(self, call: Call, x: Tensor | None, given: Parts, key: str, begin_ns: int) -> Tensor:
        mark = self.trace.now()
        agreed, shapes, came = self._meet(call, key, None if x is None else x.shape)
        met = self._met(mark, came.values())
        received = self._received(given, came, lambda: self._expected(agreed, shapes))
        if x is not None and call.name.startswith("all_reduce"):
            out = self._all_reduced(call, x, received, f"{key} chunks")
        elif x is not None and call.name == "all_gather_":
            out = x
            for chunk, part in zip(x.tensor_split(self.size), received, strict=True):
                if part is not None and part is not given[self.rank]:
                    chunk.copy_(part)
        else:
            out = parts.made(agreed, received)
        self._guard.reuse(came)
        self._write_down(call.name, self._traffic_of(agreed, shapes), begin_ns, mark, met)
        return out

    def _all_reduced(self, call: Call, x: Tensor, received: Parts, key: str) -> Tensor:
        """The reduction of what came: of whole tensors, or of chunks, which are then swapped."""
        in_place = call.name.endswith("_")
        can_write = in_place and x.is_contiguous() and not x.is_conj() and not x.is_neg()
        out = x if can_write else torch.empty_like(x, memory_format=torch.contiguous_format)
        if not parts.in_chunks(call, x, self.size):
            parts.made(call, received, out)
        else:
            chunks = list(out.view(-1).tensor_split(self.size))
            mine = parts.made(call, received, chunks[self.rank])
            reduced: Parts = [mine] * self.size
            self._send(reduced, key, None)
            came = {} if self._has_fabric else self._guard.collect(self._others, key, call, self.ranks)
            for chunk, part in zip(chunks, self._received(reduced, came, lambda: chunks), strict=True):
                if part is not mine and part is not None:
                    chunk.copy_(part)
            self._guard.reuse(came)
        return x.copy_(out) if in_place and not can_write else out

    def _start_coalesced(self, call: Call, xs: list[Tensor]) -> Handle[None]:
        """Where whole tensors are mailed they are joined in the parcel alone, and what comes is added to them."""
        total = sum(x.nbytes for x in xs)
        is_direct = self.size <= 2 or total <= parts.SMALL_BYTES
        if self._has_fabric or not is_direct or self.device.type != "cpu" or any(x.is_conj() for x in xs):
            return super()._start_coalesced(call, xs)
        begin_ns = time.perf_counter_ns()
        key = self._announce(call, [xs] * self.size, [total // xs[0].element_size()])
        return Handle(partial(self._finish_coalesced, call, xs, key, begin_ns))

    def _finish_coalesced(self, call: Call, xs: list[Tensor], key: str, begin_ns: int) -> None:
        mark = self.trace.now()
        agreed, shapes, came = self._meet(call, key, [sum(x.numel() for x in xs)])
        met = self._met(mark, came.values())
        lengths = [x.numel() for x in xs]
        theirs = {
            peer: [part.view(x.shape) for x, part in zip(xs, parcel.x.split(lengths), strict=True)]
            for peer, parcel in came.items()
            if parcel.x is not None
        }
        if call.op == "sum" and len(theirs) == 1:  # in either order it is the same sum
            add_each_(xs, *theirs.values())
        else:
            for i, x in enumerate(xs):
                out = x.contiguous()
                reduce_in_order(
                    call.op or "", [out if r == self._me else theirs[r][i].contiguous() for r in self.ranks], out
                )
                if out is not x:
                    x.copy_(out)
        self._guard.reuse(came)
        self._write_down(call.name, self._traffic_of(agreed, shapes), begin_ns, mark, met)

    def _start_all_to_all(self, call: Call, xs: list[Tensor]) -> Handle[list[Tensor]]:
        begin_ns = time.perf_counter_ns()
        given: Parts = list(xs)
        key = self._announce(call, given, [list(x.shape) for x in xs])
        return Handle(partial(self._finish_all_to_all, call, given, key, begin_ns))

    def _finish_all_to_all(self, call: Call, given: Parts, key: str, begin_ns: int) -> list[Tensor]:
        mark = self.trace.now()
        agreed, shapes, came = self._meet(call, key, [None if x is None else x.shape for x in given])
        met = self._met(mark, came.values())
        expected = lambda: [_like(row[self.rank], agreed) for row in shapes]  # noqa: E731
        received = [_copy(x) for x in self._received(given, came, expected) if x is not None]
        self._guard.reuse(came)
        sizes = [[x.nbytes for x in xs if x is not None] for xs in (given, received)]
        sent_bytes, received_bytes = (sum(row) - row[self.rank] for row in sizes)
        traffic = Traffic(self.size - 1, sent_bytes, self.size - 1, received_bytes)
        self._write_down(call.name, traffic, begin_ns, mark, met)
        return received

    # -- what a rank calls, and what it gives -------------------------------------------------------------------------

    def _announce(self, call: Call, given: Given, shape: Any) -> str:
        """Tell the others what this rank calls and, unless another backend carries it, give them their parts."""
        self._guard.check_running(call)
        key = self._number(f"c{self._set}", f"c{self._set}")
        dtype = None if call.dtype is None else str(call.dtype).removeprefix("torch.")
        words = [[*call[:5], dtype, call.shapes], self.ranks, shape, user_line(sys._getframe(1))]
        self._send(given, key, words)
        return key

    def _send(self, given: Given, key: str, words: object) -> None:
        """Mail what the others are given; where the fabric carries it, the words alone."""
        if self._has_fabric:
            if words is not None:
                self._guard.send(self._others, key, words)
            return
        of_others = {id(x) for r, x in enumerate(given) if r != self.rank}
        if len(of_others) == 1:
            self._guard.send(self._others, key, words, given[self.rank - 1], borrowed=True)
            return
        for peer, x in zip(self.ranks, given, strict=True):
            if peer != self._me:
                self._guard.send([peer], key, words, x, borrowed=True)

    def _meet(self, call: Call, key: str, shape: Any) -> tuple[Call, list[Any], dict[int, Parcel]]:
        """Wait until all have called the same: the call with the shape that is agreed on, and all ranks' shapes."""
        called = {self._me: (call, self.ranks)}
        agreed = call

        def agrees(peer: int, words: Any) -> bool:
            nonlocal agreed
            theirs, ranks = _call(words[0]), tuple(words[1])
            called[peer] = theirs, ranks
            agreed = agreed.with_shape_of(theirs)
            return ranks == self.ranks and theirs.agrees(agreed)

        came = self._guard.collect(self._others, key, call, self.ranks, agrees)
        if not all(ranks == self.ranks and theirs.agrees(agreed) for theirs, ranks in called.values()):
            lines = {r: parcel.words[3] for r, parcel in came.items()} | {self._me: user_line(sys._getframe(1))}
            said = [
                f"  rank {r} called {theirs}{_of_group(ranks, self.ranks)} at {lines[r]}"
                for r, (theirs, ranks) in sorted(called.items())
            ]
            which = f"collective {key.split('#')[1]} of group {list(self.ranks)}"
            error = CollectiveMismatch("\n".join([f"{which} differs between ranks:", *said]))
            self._guard.fail(error)
            raise error
        shapes = [shape if r == self._me else came[r].words[2] for r in self.ranks]
        return agreed, shapes, came

    def _received(
        self, given: Parts, came: dict[int, Parcel], expected: Callable[[], Sequence[Tensor | None]]
    ) -> Parts:
        """What each rank gave to this one."""
        if self._has_fabric:
            return fabric.exchange(self.ranks, given, expected(), self.device)
        xs = [given[r] if peer == self._me else came[peer].x for r, peer in enumerate(self.ranks)]
        return [None if x is None else x.to(self.device) for x in xs]

    def _expected(self, call: Call, shapes: Sequence[Any]) -> Parts:
        """The likes of what each rank gives to this one."""
        return [
            parts.given(call, None if s is None else _like(s, call), r, self.size)[self.rank]
            for r, s in enumerate(shapes)
        ]

    def _number(self, what: str, key: str) -> str:
        """Calls and messages are numbered on all sides, so that they match in order."""
        self._guard.numbers[what] += 1
        return f"{key}#{self._guard.numbers[what]}"

    # -- what happened ------------------------------------------------------------------------------------------------

    def _met(self, mark: Mark, came: Any) -> Mark:
        """When the last of the others was here: a message that takes long is no wait for a late rank."""
        if self.device.type == "cuda":
            return self.trace.now()
        return max([mark, *(parcel.came_ns for parcel in came)])

    def _traffic_of(self, call: Call, shapes: Sequence[Any]) -> Traffic:
        """What this rank sends and receives; training repeats its calls, so it is worked out once if that will do."""
        traffic = self._traffic.get(call)
        if traffic is None:
            likes = [None if s is None else _like(s, call) for s in shapes]
            blocks = collectives.block_bytes(call, [(like, None) for like in likes])
            traffic = direct_traffic(call.name, self.rank, blocks, call.root)
            if call.name not in ("all_gather", "gather"):
                self._traffic[call] = traffic
        return traffic


def _call(said: list[Any]) -> Call:
    name, op, root, dim, shape, dtype, shapes = said
    joined = None if shapes is None else tuple(map(tuple, shapes))
    return Call(name, op, root, dim, None if shape is None else tuple(shape), dtype and getattr(torch, dtype), joined)


def _like(shape: Sequence[int], call: Call) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=call.dtype, device="meta")


def _copy(x: Tensor) -> Tensor:
    return x.resolve_conj().clone(memory_format=torch.contiguous_format)


def _of_group(ranks: Sequence[int], mine: Sequence[int]) -> str:
    return "" if ranks == mine else f" of group {list(ranks)}"


def _nothing() -> None:
    """A send has nothing left to do: its tensor was copied."""
