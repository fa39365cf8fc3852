"""Parcels over MPI, one message each, by way of mpi4py.

MPI knows no time-outs, and a rank inside one of its blocking calls ignores Ctrl-C. So nothing here ever blocks: one
thread asks again and again what has come and what has been sent, and asks less often the longer nothing happens.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mplab.comm.bell import Bell
from mplab.comm.wire import Deliver, Lose, Wire, opened

if TYPE_CHECKING:
    from mpi4py import MPI

# How late a message is met at the most: this, and this share of the time that the thread has been idle for.
LATEST_S, LATE_SHARE = 1e-3, 0.25
# A sleep shorter than this is no sleep, since it takes about as long to fall asleep.
SHORTEST_SLEEP_S = 50e-6
_LOOK_S = 1e-3

# What the others never received: MPI may read it for as long as the process lives.
_unread: list[_Sent] = []


class _Sent(NamedTuple):
    """Memory on its way to some peers."""

    requests: list[MPI.Request]
    memory: Tensor


class _Coming(NamedTuple):
    """A parcel that is being received."""

    request: MPI.Request
    peer: int
    memory: Tensor
    came_ns: int


class MpiWire(Wire):
    """One process's connections to all others in an MPI communicator.

    Args:
        comm: of this world alone, where no other messages are.
        rank: this process's rank in it.
        size: ranks in it.
        deliver: see `Wire`.
        lose: see `Wire`.
    """

    def __init__(self, comm: MPI.Comm, rank: int, size: int, deliver: Deliver, lose: Lose) -> None:
        super().__init__(rank, size, deliver, lose)
        self._comm = comm
        # One MPI call at a time: so it does with libraries that are not made for several threads at once.
        self._calling = threading.Lock()
        self._sent: deque[_Sent] = deque()
        self._coming: deque[_Coming] = deque()
        self._talking = set(self.peers)  # they have not said their last word
        self._woken = Bell()
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True, name="mplab-mpi")
        self._thread.start()

    def expect(self) -> None:
        self._woken.ring()

    def flush(self, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while self._sent and self._thread.is_alive() and time.monotonic() < end_s:
            time.sleep(_LOOK_S)

    def close(self, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while (self._sent or self._talking) and self._thread.is_alive() and time.monotonic() < end_s:
            time.sleep(_LOOK_S)
        self._is_closed = True
        self._woken.ring()
        self._thread.join()
        _unread.extend(self._sent)

    def _post(self, peers: Sequence[int], memory: Tensor, num_bytes: int, borrowed: bool) -> None:
        data = memory.numpy()[:num_bytes]
        requests, broken = [], []
        with self._calling:
            for peer in peers:
                try:  # the tag tells the receiver where to put it
                    requests.append(self._comm.Isend(data, peer, tag=int(borrowed)))
                except RuntimeError as error:
                    broken.append((peer, str(error)))
            self._sent.append(_Sent(requests, memory))
        self._woken.ring()
        for peer, reason in broken:
            self._lose(peer, reason)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        last_s = time.monotonic()
        try:
            while not self._is_closed:
                if any([self._meet(), self._receive(), self._release(), self._woken.wait(0)]):
                    last_s = time.monotonic()
                sleep_s = min(LATEST_S, LATE_SHARE * (time.monotonic() - last_s))
                if sleep_s < SHORTEST_SLEEP_S:
                    os.sched_yield()
                elif self._woken.wait(sleep_s):
                    last_s = time.monotonic()
        except Exception as error:  # MPI's, above all; most libraries rather end all processes
            for peer in self._talking:
                self._lose(peer, str(error))

    def _meet(self) -> bool:
        """Begin to receive what has come; True if there is any."""
        from mpi4py import MPI

        status = MPI.Status()
        with self._calling:
            message = self._comm.Improbe(status=status)
            if message is None:
                return False
            num_bytes = status.Get_count(MPI.BYTE)
            memory = self._room(num_bytes, bool(status.Get_tag()))
            request = message.Irecv(memory.numpy()[:num_bytes])
        self._coming.append(_Coming(request, status.Get_source(), memory, time.perf_counter_ns()))
        return True

    def _receive(self) -> bool:
        """Deliver what is complete, each peer's in the order in which it came; True if there is any."""
        rest: deque[_Coming] = deque()
        late: set[int] = set()  # peers whose next parcel is not complete, which holds up nobody else's
        num_coming = len(self._coming)
        while self._coming:
            request, peer, memory, came_ns = coming = self._coming.popleft()
            if peer in late or not self._is_done([request]):
                late.add(peer)
                rest.append(coming)
            elif not self._deliver(peer, opened(memory, came_ns)):
                self._talking.discard(peer)
        self._coming = rest
        return len(rest) < num_coming

    def _release(self) -> bool:
        """Free what has been sent; True if there is any."""
        is_any = False
        while self._sent and self._is_done(self._sent[0].requests):
            self._spare.give(self._sent.popleft().memory)
            is_any = True
        return is_any

    def _is_done(self, requests: list[MPI.Request]) -> bool:
        with self._calling:
            return all(request.Test() for request in requests)
