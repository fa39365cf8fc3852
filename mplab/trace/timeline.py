"""What happened: the events of all ranks on one axis, as a table, a figure, words and a file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from mplab.errors import MplabError
from mplab.trace import chrome
from mplab.trace.event import LANES, Event, Lane
from mplab.trace.figure import draw
from mplab.trace.intervals import length_s, merge, overlap_s
from mplab.trace.units import columns, format_s

PREDICTED_NOTE = "predicted, not measured"


@dataclass(frozen=True)
class RankSummary:
    """One rank's share of a run.

    Args:
        rank: whose.
        busy_s: seconds inside compute spans, nested or overlapping ones counted once, less the waits inside them.
        sending_s: seconds with a message under way; it may overlap the computation, that is what overlap means.
        waiting_s: seconds of waits.
        num_events: how many events it has.
        sent_bytes: bytes that it sent.
    """

    rank: int
    busy_s: float
    sending_s: float
    waiting_s: float
    num_events: int
    sent_bytes: int


@dataclass(frozen=True, repr=False)
class Summary:
    """A timeline in numbers; prints as a table.

    Args:
        ranks: one line a rank.
        makespan_s: seconds from the first start to the last end; the shares are parts of it.
        notes: what these numbers cannot prove.
    """

    ranks: tuple[RankSummary, ...]
    makespan_s: float
    notes: tuple[str, ...] = ()

    @property
    def load_balance(self) -> float:
        """L = max(busy) / mean(busy): 1 is perfect, n is one of n ranks doing everything; nan if none computed."""
        busy = [rank.busy_s for rank in self.ranks]
        return max(busy) * len(busy) / sum(busy) if sum(busy) else math.nan

    def __str__(self) -> str:
        rows = [["rank", "busy", "", "sending", "", "waiting", "", "bytes sent"]]
        for rank in self.ranks:
            cells = [str(rank.rank)]
            for seconds in (rank.busy_s, rank.sending_s, rank.waiting_s):
                cells += [format_s(seconds), self._share(seconds)]
            rows.append([*cells, f"{rank.sent_bytes:,}"])
        balance = (
            "none: no rank computed" if math.isnan(self.load_balance) else f"{self.load_balance:.2f} (1 is perfect)"
        )
        end = f"makespan {format_s(self.makespan_s)}, load balance L = max(busy) / mean(busy) = {balance}"
        return "\n".join([columns(rows), end, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__

    def _share(self, seconds: float) -> str:
        return f"{100 * seconds / self.makespan_s:.0f} %" if self.makespan_s else "-"


@dataclass(frozen=True, repr=False)
class Timeline:
    """The events of one run, measured or simulated, in the order of their starts.

    Args:
        events: in any order.
        num_ranks: ranks of the world, also those that have no event.
        notes: what its times cannot prove ("4 ranks share 2 cores: times are not speed-ups"); shown under every figure.
        title: what ran.

    Raises:
        MplabError: an event of another rank or lane, or one that ends before it starts.
    """

    events: Sequence[Event]
    num_ranks: int
    notes: tuple[str, ...] = ()
    title: str | None = None

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise MplabError(f"Timeline(num_ranks={self.num_ranks}): a world has at least 1 rank.")
        for event in self.events:
            if not 0 <= event.rank < self.num_ranks:
                raise MplabError(f"{event}: a timeline of {self.num_ranks} ranks has ranks 0 to {self.num_ranks - 1}.")
            if event.lane not in LANES:
                raise MplabError(f"{event}: its lane is one of {', '.join(LANES)}.")
            if not -math.inf < event.start_s <= event.end_s < math.inf:
                raise MplabError(f"{event}: its end must not come before its start, and both must be finite.")
        in_order = sorted(self.events, key=lambda e: (e.start_s, e.rank, -e.end_s, LANES.index(e.lane), e.name))
        object.__setattr__(self, "events", tuple(in_order))
        object.__setattr__(self, "notes", tuple(self.notes))

    @property
    def makespan_s(self) -> float:
        """Seconds from the first start to the last end."""
        return max(e.end_s for e in self.events) - self.events[0].start_s if self.events else 0.0

    def rank(self, rank: int) -> tuple[Event, ...]:
        """The events of one rank."""
        if not 0 <= rank < self.num_ranks:
            raise MplabError(f"rank {rank}: this timeline has ranks 0 to {self.num_ranks - 1}.")
        return tuple(e for e in self.events if e.rank == rank)

    def summary(self) -> Summary:
        """Busy, sending and waiting seconds and bytes of every rank, and the load balance L."""
        ranks = []
        for rank in range(self.num_ranks):
            events = self.rank(rank)
            busy, sending, waiting = (merge((e.start_s, e.end_s) for e in events if e.lane == lane) for lane in LANES)
            ranks.append(
                RankSummary(
                    rank,
                    length_s(busy) - overlap_s(busy, waiting),
                    length_s(sending),
                    length_s(waiting),
                    len(events),
                    sum(e.size_bytes for e in events),
                )
            )
        return Summary(tuple(ranks), self.makespan_s, self.notes)

    def figure(self) -> Any:
        """A plotly figure: one row a rank, messages and waits in its lower half, so that what they overlap is seen.

        Raises:
            MplabError: plotly is not installed.
        """
        return draw(self.events, self.num_ranks, self.notes, self.title)

    def describe(self) -> str:
        """The figure in words."""
        lines = [f"{self.title or 'Timeline'}: {self._size()}."]
        summary = self.summary()
        for rank in summary.ranks:
            events = self.rank(rank.rank)
            parts = [
                f"busy for {format_s(rank.busy_s)}{_names(events, 'compute')}",
                f"sending for {format_s(rank.sending_s)}{_names(events, 'message')}",
                f"waiting for {format_s(rank.waiting_s)}{_names(events, 'wait')}",
            ]
            longest = max((e for e in events if e.lane == "wait"), key=lambda e: e.duration_s, default=None)
            if longest is not None and longest.duration_s > 0:
                when = f"{format_s(longest.duration_s)} in {longest.name}, from {format_s(longest.start_s)} on"
                parts.append(f"the longest wait {when}")
            lines.append(f"Rank {rank.rank}: {'; '.join(parts)}.")
        if not math.isnan(summary.load_balance):
            lines.append(f"Load balance L = {summary.load_balance:.2f}.")
        return "\n".join([*lines, *(f"Note: {note.rstrip('.')}." for note in self.notes)])

    def save(self, path: str | PathLike[str]) -> None:
        """Write a Chrome trace, which ui.perfetto.dev and chrome://tracing open and `Timeline.load` reads back.

        A process is the run, a thread a rank, a category a lane; times are kept to the nanosecond.

        Raises:
            MplabError: the file cannot be written.
        """
        chrome.save(path, self.events, self.num_ranks, self.notes, self.title)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Timeline:
        """Read what `save` wrote.

        Raises:
            MplabError: no such file, a damaged one, or one that something else wrote.
        """
        content = chrome.load(path)
        try:
            return cls(*content)
        except MplabError as error:
            raise MplabError(f"{fspath(path)} is damaged: {error}") from None

    def __repr__(self) -> str:
        return f"Timeline({self._size()})"

    def _size(self) -> str:
        ranks = "1 rank" if self.num_ranks == 1 else f"{self.num_ranks} ranks"
        return f"{ranks}, {len(self.events)} events, {format_s(self.makespan_s)}"


def _names(events: Iterable[Event], lane: Lane) -> str:
    counts = Counter(e.name for e in events if e.lane == lane)
    return f" ({', '.join(f'{name} ×{count}' for name, count in counts.items())})" if counts else ""
