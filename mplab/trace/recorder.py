"""A recorder: what one rank writes down while it runs, cheap enough to be always on.

The hot path appends one tuple; events are made when somebody looks. On a CPU a mark is `perf_counter_ns`; on CUDA it is
an event on the rank's stream, so that it tells when the device got there, not when Python did.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple, TypeAlias

import torch

from mplab.trace.event import Event, Lane

Mark: TypeAlias = Any  # int (nanoseconds) on a CPU, torch.cuda.Event on a GPU


class HostSpan(NamedTuple):
    """An event on the host's clock, `time.perf_counter_ns`."""

    lane: Lane
    name: str
    start_ns: int
    end_ns: int
    size_bytes: int


class Recorder:
    """The events of one rank, in the order in which they ended.

    Args:
        rank: the rank's index in its world.
        device: where the rank computes; decides the clock.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.profiling = False  # set while torch's profiler runs: spans are then `record_function` ranges as well
        self.failed_in = ""  # the innermost span that an error went through
        self.now = cuda_mark if device.type == "cuda" else time.perf_counter_ns
        self._on_cuda = device.type == "cuda"
        self._zero: Mark = None
        self._raw: list[tuple[Lane, str, Mark, Mark, int, int | None]] = []

    def start(self, zero: Mark) -> None:
        """Forget the last run; `zero` is the mark that all ranks of the new one share."""
        self._zero = zero
        self._raw.clear()

    def add(
        self, lane: Lane, name: str, start: Mark, end: Mark, size_bytes: int = 0, microbatch: int | None = None
    ) -> None:
        """Write down one event between two marks of `now()`."""
        self._raw.append((lane, name, start, end, size_bytes, microbatch))

    def span(self, name: str, microbatch: int | None = None, lane: Lane = "compute") -> Span:
        """`with recorder.span("forward", microbatch=0):` writes down what happens inside as one event."""
        return Span(self, name, microbatch, lane)

    def events(self) -> list[Event]:
        """What was written down, in seconds from the start of the run (on CUDA this waits for the device)."""
        return [
            Event(self.rank, lane, name, self._seconds(start), self._seconds(end), size_bytes, microbatch)
            for lane, name, start, end, size_bytes, microbatch in self._raw
        ]

    def host_spans(self) -> list[HostSpan]:
        """The same on the host's clock; none on CUDA, whose marks are not on it."""
        return [] if self._on_cuda else [HostSpan(*raw[:5]) for raw in self._raw]

    def _seconds(self, mark: Mark) -> float:
        return seconds_between(self._zero, mark)


class Span:
    """One `with` block of a recorder."""

    __slots__ = ("_lane", "_microbatch", "_name", "_range", "_recorder", "_start")

    def __init__(self, recorder: Recorder, name: str, microbatch: int | None, lane: Lane) -> None:
        self._recorder, self._name, self._microbatch, self._lane = recorder, name, microbatch, lane
        self._range: Any = None

    def __enter__(self) -> Span:
        if self._recorder.profiling:
            label = self._name if self._microbatch is None else f"{self._name} {self._microbatch}"
            self._range = torch.profiler.record_function(label)
            self._range.__enter__()
        self._start = self._recorder.now()
        return self

    def __exit__(self, *exc: object) -> None:
        recorder = self._recorder
        if exc[0] is not None and not recorder.failed_in:
            recorder.failed_in = (
                self._name if self._microbatch is None else f"{self._name} of micro-batch {self._microbatch}"
            )
        recorder._raw.append((self._lane, self._name, self._start, recorder.now(), 0, self._microbatch))
        if self._range is not None:
            self._range.__exit__(None, None, None)


def cuda_mark() -> torch.cuda.Event:
    """A timed event on the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Seconds from one mark of a rank to a later one (on CUDA this waits for the device)."""
    if isinstance(end, int):
        return float(end - start) * 1e-9
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3
