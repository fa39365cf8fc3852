"""A link between two hosts that a test can slow down, make lossy, and cut.

Each host has a TUN device: what it sends comes out of a file descriptor as one packet a read, and what is written there
arrives at it. A thread passes the packets on, each way by itself, as a cable of some length and speed would:

    due = max(now, when the packet before was through) + bits / bits_s + delay_s
"""

from __future__ import annotations

import os
import random
import select
import threading
import time
from collections import deque
from contextlib import suppress

PACKET_BYTES = 1 << 16
# Packets that wait in one direction: far more than a TCP window has.
NUM_PACKETS = 10_000


class Relay:
    """Passes packets on from the start; its attributes may be set at any time.

    Args:
        ends: file descriptors of the two TUN devices, which it closes.

    Attributes:
        delay_s: from one end to the other.
        bits_s: how fast bits go into the link; 0: at any speed.
        loss: share of the packets that are lost, 0 to 1.
        is_cut: nothing comes through, and nobody is told.
    """

    def __init__(self, ends: tuple[int, int]) -> None:
        self.delay_s, self.bits_s, self.loss, self.is_cut = 0.0, 0.0, 0.0, False
        self._ends = ends
        self._queues: tuple[deque[tuple[float, bytes]], ...] = (deque(), deque())
        self._free_s = [0.0, 0.0]  # when all packets before are through
        self._random = random.Random(0)
        self._closing, self._close = os.pipe()
        for end in ends:
            os.set_blocking(end, False)
        self._thread = threading.Thread(target=self._run, daemon=True, name="relay")
        self._thread.start()

    def close(self) -> None:
        os.close(self._close)
        self._thread.join()
        for descriptor in (*self._ends, self._closing):
            os.close(descriptor)

    def _run(self) -> None:
        while True:
            next_s = min((queue[0][0] for queue in self._queues if queue), default=None)
            wait_s = None if next_s is None else max(0.0, next_s - time.monotonic())
            ready = select.select((*self._ends, self._closing), (), (), wait_s)[0]
            if self._closing in ready:
                return
            for way, end in enumerate(self._ends):
                if end in ready:
                    self._take(way)
                self._pass_on(way)

    def _take(self, way: int) -> None:
        """What has come at one end."""
        with suppress(BlockingIOError):
            while packet := os.read(self._ends[way], PACKET_BYTES):
                if self.is_cut or self._random.random() < self.loss or len(self._queues[way]) == NUM_PACKETS:
                    continue
                serial_s = 8 * len(packet) / self.bits_s if self.bits_s else 0.0
                self._free_s[way] = max(time.monotonic(), self._free_s[way]) + serial_s
                self._queues[way].append((self._free_s[way] + self.delay_s, packet))

    def _pass_on(self, way: int) -> None:
        """What is due at the other end."""
        queue = self._queues[way]
        while queue and queue[0][0] <= time.monotonic():
            packet = queue.popleft()[1]
            with suppress(OSError):  # the host is gone, or has no room
                os.write(self._ends[1 - way], packet)
