"""Parcels over torch.distributed's `isend` and `irecv`.

A parcel travels as one *frame* of fixed size and, if it is longer, a second message with the rest. One thread for every
peer receives at all times.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mplab.comm.bell import Bell
from mplab.comm.wire import FRAME_BYTES, SPARE_BYTES, Deliver, Lose, Parcel, Wire, lengths, opened

# gloo must never give up by itself, for that breaks the connection: who waits too long is the guard's to say.
_FOREVER = timedelta(days=365)
_FRAME_TAG, _REST_TAG, _NO_TAG = 0, 1, 3
# Small parcels are freed so many at a time: to wake a thread for each takes as long as to send it.
_NUM_KEPT = 16
# For threads to end after their connections were broken.
_BREAK_S = 1.0


class GlooWire(Wire):
    """One process's connections to all others in torch.distributed's default group.

    Args:
        rank: this process's rank in the default group.
        size: ranks in it.
        deliver: see `Wire`; called from the peer's own thread.
        lose: see `Wire`.
    """

    def __init__(self, rank: int, size: int, deliver: Deliver, lose: Lose) -> None:
        super().__init__(rank, size, deliver, lose)
        self._sending = threading.Lock()
        self._in_flight: SimpleQueue[Any] = SimpleQueue()
        self._kept: list[tuple[list[dist.Work | None], Tensor]] = []
        self._ended: SimpleQueue[None] = SimpleQueue()
        works = {f"mplab-from{p}": partial(self._receive, p) for p in self.peers} | {"mplab-sent": self._release_sent}
        self._threads = [
            threading.Thread(target=self._until_end, args=(work,), daemon=True, name=name)
            for name, work in works.items()
        ]
        self._num_running = 0
        for thread in self._threads:
            self._num_running += 1
            thread.start()

    def expect(self) -> None:
        pass  # its threads do nothing else

    def flush(self, timeout_s: float) -> None:
        is_flushed = Bell()
        with self._sending:
            self._free_kept()
        self._in_flight.put(is_flushed)
        is_flushed.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        with self._sending:
            self._free_kept()
        self._in_flight.put(None)
        for peer in self.peers:
            if not self._have_ended(end_s):
                with suppress(RuntimeError):  # a wait that expires breaks all of this process's connections
                    never = torch.empty(1, dtype=torch.uint8, device="cpu")
                    _wait(dist.irecv(never, peer, tag=_NO_TAG), timedelta(milliseconds=1))
                end_s = time.monotonic() + _BREAK_S / len(self.peers)
        if self._have_ended(end_s):
            for thread in self._threads:
                thread.join()

    def _have_ended(self, end_s: float) -> bool:
        """Wait for the threads until then. Not by `Thread.join`: where Ctrl-C ends that, Python 3.11 takes a thread for
        ended that goes on."""
        with suppress(Empty):
            while self._num_running:
                self._ended.get(timeout=max(0.0, end_s - time.monotonic()))
                self._num_running -= 1
        return not self._num_running

    def _until_end(self, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            self._ended.put(None)

    def _post(self, peers: Sequence[int], memory: Tensor, num_bytes: int, borrowed: bool) -> None:
        broken = []
        with self._sending:  # a frame and its rest, of one parcel after the other
            works: list[dist.Work | None] = []
            self._kept.append((works, memory))  # first, for Ctrl-C may come between any two of these
            for peer in peers:
                try:  # the rest first: whoever gets a frame waits for its rest, and hears nothing else meanwhile
                    if num_bytes > FRAME_BYTES:
                        works.append(dist.isend(memory[FRAME_BYTES:num_bytes], peer, tag=_REST_TAG))
                    works.append(dist.isend(memory[:FRAME_BYTES], peer, tag=_FRAME_TAG))
                except RuntimeError as error:
                    broken.append((peer, _reason(error)))
            if len(self._kept) >= _NUM_KEPT or memory.numel() >= SPARE_BYTES:
                self._free_kept()
        for peer, reason in broken:
            self._lose(peer, reason)

    def _free_kept(self) -> None:
        """Free what was sent, once it is; the lock is held."""
        self._in_flight.put(self._kept)
        self._kept = []

    def _receive(self, peer: int) -> None:
        try:
            while self._deliver(peer, self._next(peer)):
                pass
        except Exception as error:  # or it would end unseen, and this rank wait for ever
            self._lose(peer, _reason(error))

    def _next(self, peer: int) -> Parcel:
        memory = torch.empty(FRAME_BYTES, dtype=torch.uint8)
        _wait(dist.irecv(memory, peer, tag=_FRAME_TAG))
        came_ns = time.perf_counter_ns()
        num_bytes, _, borrowed = lengths(memory)
        if num_bytes > FRAME_BYTES:
            frame, memory = memory, self._room(num_bytes, borrowed)
            memory[:FRAME_BYTES] = frame
            _wait(dist.irecv(memory[FRAME_BYTES:num_bytes], peer, tag=_REST_TAG))
        return opened(memory, came_ns)

    def _release_sent(self) -> None:
        """Free what has been sent: in a thread of its own, for gloo tells only who waits for it that a send is over."""
        while (item := self._in_flight.get()) is not None:
            if isinstance(item, Bell):
                item.ring()
                continue
            for works, memory in item:
                for work in works:
                    with suppress(RuntimeError):  # the thread that receives from this peer hears of it too, and tells
                        _wait(work)
                self._spare.give(memory)
            item = works = memory = work = None


def _wait(work: dist.Work | None, timeout: timedelta = _FOREVER) -> None:
    assert work is not None
    work.wait(timeout)


def _reason(error: Exception) -> str:
    """gloo's message without the place in its source, and its first sentence alone."""
    return re.sub(r"^\[[^]]*\] ", "", str(error)).split(". ")[0]
