"""What ranks print: kept apart line by line, and shown in rank order."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

# A run that takes longer than this shows what has been printed so far, so that long work is not silent.
SHOW_EVERY_S = 1.0

_stack_lock = threading.Lock()  # ranks may run worlds of their own, several at once


class RankOutput:
    """Stands in for `sys.stdout` while ranks run: threads that registered are collected, all others go straight
    through.

    With MPLAB_ORDERED_OUTPUT in the environment nothing is shown before the end, so that two runs print the same.
    """

    def __init__(self, num_ranks: int) -> None:
        self._stdout: Any = sys.stdout
        self._process = os.getpid()  # in a fork of it nobody would show what was collected
        self._rank_of: dict[int, int] = {}
        self._pending = [""] * num_ranks
        self._lock = threading.Lock()
        self._next_show_s = float("inf") if os.environ.get("MPLAB_ORDERED_OUTPUT") else time.monotonic() + SHOW_EVERY_S

    def register(self, rank: int) -> None:
        """Collect what the calling thread prints as `rank`'s."""
        self._rank_of[threading.get_ident()] = rank

    def unregister(self) -> None:
        """The calling thread is a rank no more."""
        self._rank_of.pop(threading.get_ident(), None)

    def write(self, text: str) -> int:
        rank = self._rank()
        if rank is None:
            self._stdout.write(text)
        else:
            with self._lock:
                self._pending[rank] += text
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._rank() is None:
            self._stdout.flush()

    def _rank(self) -> int | None:
        """Whose output the calling thread's is."""
        return self._rank_of.get(threading.get_ident()) if os.getpid() == self._process else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stdout, name)

    def show_if_due(self) -> None:
        """Show whole lines once a second."""
        if time.monotonic() >= self._next_show_s:
            self._next_show_s = time.monotonic() + SHOW_EVERY_S
            self._show(whole_lines=True)

    def _show(self, whole_lines: bool) -> None:
        for rank in range(len(self._pending)):
            with self._lock:
                text = self._pending[rank]
                cut = text.rfind("\n") + 1 if whole_lines else len(text)
                self._pending[rank] = text[cut:]
            for line in text[:cut].splitlines():
                self._stdout.write(f"[rank {rank}] {line}\n")
        self._stdout.flush()

    def __enter__(self) -> RankOutput:
        with _stack_lock:
            self._stdout = sys.stdout
            sys.stdout = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with _stack_lock:
            if sys.stdout is self:
                sys.stdout = self._stdout
            above: Any = sys.stdout
            while isinstance(above, RankOutput):  # others that were put on top of this one go on without it
                if above._stdout is self:
                    above._stdout = self._stdout
                above = above._stdout
        self._show(whole_lines=False)
