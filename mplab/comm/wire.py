"""Parcels between processes: some words and perhaps a tensor, whatever carries them.

A parcel says itself how long it is and what is in it, so that a receiver needs to know nothing. It is received at all
times, in the background: a send never waits for its receiver, and the rank's own thread only ever waits in Python,
where Ctrl-C and bad news reach it. `GlooWire` carries parcels over torch.distributed, `MpiWire` over MPI.
"""

from __future__ import annotations

import json
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# The least memory of a parcel. The words of every collective fit in, and some tensors too.
FRAME_BYTES = 2048
# Bytes of the parcel, bytes of its words, and whether the receiver gives the memory back.
_LENGTHS = struct.Struct("<qqq")
_ALIGN_BYTES = 64
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


Deliver = Callable[[int, Parcel], bool]
Lose = Callable[[int, str], None]


class Wire(ABC):
    """One process's connections to all others.

    Args:
        rank: this process's rank.
        size: ranks in the world.
        deliver: called with a peer and its parcel, from a thread of the wire's, in the order in which that peer sent;
            False: it was the last one.
        lose: called with a peer and the reason when its connection breaks.
    """

    def __init__(self, rank: int, size: int, deliver: Deliver, lose: Lose) -> None:
        self.peers = tuple(r for r in range(size) if r != rank)
        self._deliver, self._lose = deliver, lose
        self._spare = _Spare()

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
        start = _start(len(text))
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
        self._post(peers, memory, num_bytes, borrowed)

    def reuse(self, parcel: Parcel) -> None:
        """Give the memory of a parcel back, whose tensor nobody needs any more."""
        if parcel.memory is not None:
            self._spare.give(parcel.memory)

    @abstractmethod
    def expect(self) -> None:
        """The rank begins to wait for a parcel: called each time that it does, and must not take long."""

    @abstractmethod
    def flush(self, timeout_s: float) -> None:
        """Wait until all that was sent is on its way, or until the time is over."""

    @abstractmethod
    def close(self, timeout_s: float) -> None:
        """Let the threads end, and disconnect from peers that say nothing until the time is over.

        None may be left: a thread that wakes up while Python shuts down ends the process with SIGABRT.
        """

    @abstractmethod
    def _post(self, peers: Sequence[int], memory: Tensor, num_bytes: int, borrowed: bool) -> None:
        """Send the first bytes of some memory to some peers, without waiting; then give it to the spare."""

    def _room(self, num_bytes: int, borrowed: bool) -> Tensor:
        """Memory to receive a parcel in."""
        return self._spare.take(num_bytes) if borrowed else torch.empty(num_bytes, dtype=torch.uint8)


def lengths(memory: Tensor) -> tuple[int, int, bool]:
    """What a parcel begins with: its bytes, those of its words, and whether its memory is wanted back."""
    num_bytes, text_bytes, borrowed = _LENGTHS.unpack(memory.numpy()[: _LENGTHS.size].tobytes())
    return num_bytes, text_bytes, bool(borrowed)


def opened(memory: Tensor, came_ns: int) -> Parcel:
    """The parcel that was received into some memory."""
    num_bytes, text_bytes, borrowed = lengths(memory)
    words, *about = json.loads(memory.numpy()[_LENGTHS.size : _LENGTHS.size + text_bytes].tobytes())
    x = None
    if about:
        x = memory[_start(text_bytes) : num_bytes].view(getattr(torch, about[0])).view(about[1])
    return Parcel(words, x, came_ns, memory if num_bytes > FRAME_BYTES and borrowed else None)


def _start(text_bytes: int) -> int:
    """Where the tensor begins."""
    return -(-(_LENGTHS.size + text_bytes) // _ALIGN_BYTES) * _ALIGN_BYTES


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
