"""An emulated slower network: when a message arrives, and how a rank waits for it."""

from __future__ import annotations

import threading
import time

# time.sleep overshoots by about this much; what is left is spent giving way to other threads.
SLEEP_MARGIN_S = 200e-6
# A rank that is to stop does so between two naps.
LONGEST_NAP_S = 0.05


class Ports:
    """One sending and one receiving port a rank: a rank sends one message at a time and receives one at a time.

    With it n messages from or to one rank take n (alpha + beta B), as the textbook's cost model says.

    **Reference**: Thakur, Rabenseifner & Gropp, "Optimization of Collective Communication Operations in MPICH", 2005,
    section 2.
    """

    def __init__(self, num_ranks: int) -> None:
        self._lock = threading.Lock()
        self._sending_until_ns = [0] * num_ranks
        self._receiving_until_ns = [0] * num_ranks

    def reserve(self, src: int, dst: int, duration_s: float) -> int:
        """Book the ports of both ranks from now on; returns when the message arrives (`perf_counter_ns`)."""
        with self._lock:
            start = max(time.perf_counter_ns(), self._sending_until_ns[src], self._receiving_until_ns[dst])
            arrival = start + round(duration_s * 1e9)
            self._sending_until_ns[src] = self._receiving_until_ns[dst] = arrival
            return arrival


def sleep_until(time_ns: int) -> None:
    """Return at `time_ns` of `perf_counter_ns`, giving way to other threads meanwhile."""
    while (left_s := (time_ns - time.perf_counter_ns()) * 1e-9) > 0:
        time.sleep(min(left_s - SLEEP_MARGIN_S, LONGEST_NAP_S) if left_s > SLEEP_MARGIN_S else 0)
