"""Parcels between processes: some words and perhaps a tensor, over torch.distributed's `isend` and `irecv`.

A parcel says itself how long it is and what is in it, so that a receiver needs to know nothing. It travels as one
*frame* of fixed size and, if it is longer, a second message with the rest. One thread for every peer receives at all
times: a send never waits for its receiver, and the rank's own thread only ever waits in Python, where Ctrl-C and bad
news reach it.
"""

from __future__ import annotations

import json
import re
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# What fits in here travels in one message: the words of every collective, and some tensors too.
FRAME_BYTES = 2048
# Bytes of the parcel, bytes of its words, and whether the receiver gives the memory back.
_LENGTHS = struct.Struct("<qqq")
_ALIGN_BYTES = 64
# gloo must never give up by itself, for that breaks the connection: who waits too long is the guard's to say.
_FOREVER = timedelta(days=365)
_FRAME_TAG, _REST_TAG, _NO_TAG = 0, 1, 3
# For threads to end after their connections were broken.
_BREAK_S = 1.0
# Memory of this size and more is kept to be used again, so many pieces of it.
SPARE_BYTES, NUM_SPARE = 1 << 16, 16


class Parcel(NamedTuple):
    """What came.

    Args:
        words: anything that JSON can hold.
        x: a tensor on the CPU, or None.
        came_ns: when its first bytes came, `time.perf_counter_ns`.
        memory: where `x` lies, if `Wire.reuse` wants it back.
    """

    words: Any
    x: Tensor | None
    came_ns: int
    memory: Tensor | None


class Wire:
    """One process's connections to all others.

    Args:
        rank: this process's rank in the default group.
        size: ranks in it.
        deliver: called with a peer and its parcel, from that peer's thread, in the order of sending; False: it was the
            last one.
        lose: called with a peer and the reason when its connection breaks.
    """

    def __init__(
        self, rank: int, size: int, deliver: Callable[[int, Parcel], bool], lose: Callable[[int, str], None]
    ) -> None:
        self.peers = tuple(r for r in range(size) if r != rank)
        self._deliver, self._lose = deliver, lose
        self._sending = threading.Lock()
        self._in_flight: SimpleQueue[Any] = SimpleQueue()
        self._spare = _Spare()
        self._receivers = [
            threading.Thread(target=self._receive, args=(p,), daemon=True, name=f"mplab-from{p}") for p in self.peers
        ]
        self._releaser = threading.Thread(target=self._release_sent, daemon=True, name="mplab-sent")
        for thread in (*self._receivers, self._releaser):
            thread.start()

    def send(
        self, peers: Sequence[int], words: object, x: Tensor | Sequence[Tensor] | None = None, borrowed: bool = False
    ) -> None:
        """Send one parcel to some peers, without waiting; `x` is copied.

        Args:
            peers: to whom.
            words: anything that JSON can hold.
            x: any shape, dtype, layout in memory and device; or several of one dtype on the CPU, which travel joined.
            borrowed: the receivers will give the memory back.
        """
        if not peers:
            return
        xs = [] if x is None else [x] if isinstance(x, Tensor) else list(x)
        size = sum(part.nbytes for part in xs)
        shape = list(x.shape) if isinstance(x, Tensor) else [sum(part.numel() for part in xs)]
        about = [words, str(xs[0].dtype).removeprefix("torch."), shape] if xs else [words]
        text = json.dumps(about, separators=(",", ":")).encode()
        start = -(-(_LENGTHS.size + len(text)) // _ALIGN_BYTES) * _ALIGN_BYTES
        num_bytes = start + size
        memory = self._spare.take(max(num_bytes, FRAME_BYTES))
        head = _LENGTHS.pack(num_bytes, len(text), borrowed) + text
        memory.numpy()[: len(head)] = np.frombuffer(head, np.uint8)
        if size:
            place = memory[start:num_bytes].view(xs[0].dtype)
            if isinstance(x, Tensor):
                place.view(x.shape).copy_(x)
            else:
                torch.cat([part.reshape(-1) for part in xs], out=place)
        broken = []
        with self._sending:  # a frame and its rest, of one parcel after the other
            works = []
            for peer in peers:
                try:
                    works.append(dist.isend(memory[:FRAME_BYTES], peer, tag=_FRAME_TAG))
                    if num_bytes > FRAME_BYTES:
                        works.append(dist.isend(memory[FRAME_BYTES:num_bytes], peer, tag=_REST_TAG))
                except RuntimeError as error:
                    broken.append((peer, _reason(error)))
        self._in_flight.put((works, memory))
        for peer, reason in broken:
            self._lose(peer, reason)

    def reuse(self, parcel: Parcel) -> None:
        """Give the memory of a parcel back, whose tensor nobody needs any more."""
        if parcel.memory is not None:
            self._spare.give(parcel.memory)

    def flush(self, timeout_s: float) -> None:
        """Wait until all that was sent is there, or until the time is over."""
        is_flushed = threading.Event()
        self._in_flight.put(is_flushed)
        is_flushed.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Let the threads end, and disconnect from peers that say nothing until the time is over.

        None may be left: a thread that wakes up while Python shuts down ends the process with SIGABRT.
        """
        end_s = time.monotonic() + timeout_s
        self._in_flight.put(None)
        for thread in (*self._receivers, self._releaser):
            thread.join(max(0.0, end_s - time.monotonic()))
        for peer in self.peers:
            if any(thread.is_alive() for thread in (*self._receivers, self._releaser)):
                with suppress(RuntimeError):  # a wait that expires breaks all of this process's connections
                    never = torch.empty(1, dtype=torch.uint8, device="cpu")
                    _wait(dist.irecv(never, peer, tag=_NO_TAG), timedelta(milliseconds=1))
                for thread in (*self._receivers, self._releaser):
                    thread.join(_BREAK_S / len(self.peers))

    def _receive(self, peer: int) -> None:
        try:
            while self._deliver(peer, self._next(peer)):
                pass
        except RuntimeError as error:
            self._lose(peer, _reason(error))

    def _next(self, peer: int) -> Parcel:
        memory = torch.empty(FRAME_BYTES, dtype=torch.uint8)
        _wait(dist.irecv(memory, peer, tag=_FRAME_TAG))
        came_ns = time.perf_counter_ns()
        num_bytes, text_bytes, borrowed = _LENGTHS.unpack(memory.numpy()[: _LENGTHS.size].tobytes())
        is_long = num_bytes > FRAME_BYTES
        if is_long:
            frame = memory
            memory = self._spare.take(num_bytes) if borrowed else torch.empty(num_bytes, dtype=torch.uint8)
            memory[:FRAME_BYTES] = frame
            _wait(dist.irecv(memory[FRAME_BYTES:num_bytes], peer, tag=_REST_TAG))
        words, *about = json.loads(memory.numpy()[_LENGTHS.size : _LENGTHS.size + text_bytes].tobytes())
        x = None
        if about:
            start = -(-(_LENGTHS.size + text_bytes) // _ALIGN_BYTES) * _ALIGN_BYTES
            x = memory[start:num_bytes].view(getattr(torch, about[0])).view(about[1])
        return Parcel(words, x, came_ns, memory if is_long and borrowed else None)

    def _release_sent(self) -> None:
        """Free what has been sent: in a thread of its own, for gloo tells only who waits for it that a send is over."""
        while (item := self._in_flight.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            works, memory = item
            for work in works:
                with suppress(RuntimeError):  # the thread that receives from this peer hears of it too, and tells
                    _wait(work)
            self._spare.give(memory)
            del item, works, memory


class _Spare:
    """Memory to use again: the first touch of a fresh page costs more than copying to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> Tensor:
        """At least so many bytes, and not more than twice as many."""
        with self._lock:
            for i, memory in enumerate(self._free):
                if num_bytes <= memory.numel() <= 2 * num_bytes:
                    return self._free.pop(i)
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def give(self, memory: Tensor) -> None:
        if memory.numel() >= SPARE_BYTES:
            with self._lock:
                self._free = [memory, *self._free][:NUM_SPARE]


def _wait(work: dist.Work | None, timeout: timedelta = _FOREVER) -> None:
    assert work is not None
    work.wait(timeout)


def _reason(error: RuntimeError) -> str:
    """gloo's message without the place in its source, and its first sentence alone."""
    return re.sub(r"^\[[^]]*\] ", "", str(error)).split(". ")[0]
