"""Wakes a thread, and holds when Ctrl-C comes in between."""

from __future__ import annotations

import threading
from contextlib import suppress


class Bell:
    """For one thread that waits, and any number that wake it.

    `threading.Condition` and `Event` are written in Python: a KeyboardInterrupt between two of their steps leaves their
    lock held for ever, or free where it must be held (RuntimeError: cannot release un-acquired lock). Here a step is
    one call of C.
    """

    def __init__(self) -> None:
        self._is_silent = threading.Lock()
        self._is_silent.acquire()

    def ring(self) -> None:
        """Wake the one that waits, or the next that does."""
        with suppress(RuntimeError):  # rung already
            self._is_silent.release()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it rings, and silence it; False if it did not ring in time."""
        return self._is_silent.acquire(timeout=timeout_s)
