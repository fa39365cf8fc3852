"""The form of every benchmark: paired rounds in one run, ratios, and the machine they were measured on.

Times drift by a fifth on a shared machine, and ratios of times taken within the same second do not. So every round
times both sides, one after the other, turn about who begins; a row is the median of the rounds' ratios with their
spread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mplab.trace.units import columns, format_s
from mplab.world.probe import format_rate
from mplab.world.progress import progress

LOW_PERCENT, HIGH_PERCENT = 10, 90


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        case: what was done: "2 ranks, 64 KB".
        peer: what it is held against: "gloo".
        ratio: our time over the peer's, median of all rounds: below 1 we are faster. None: not measured, `extra` says
            why in "note".
        low: 10th percentile of the rounds' ratios.
        high: 90th percentile.
        runs: number of rounds.
        extra: more of it, such as both sides' median times, "ours_s" and "peer_s".
    """

    case: str
    peer: str
    ratio: float | None
    low: float | None
    high: float | None
    runs: int
    extra: dict[str, float | str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The row's JSON object: `extra` among the others."""
        values = dataclasses.asdict(self)
        extra: dict[str, Any] = values.pop("extra")
        return values | extra


def compare(case: str, peer: str, ours_s: Sequence[float], peer_s: Sequence[float], **extra: float | str) -> Row:
    """The row of two sides' times, round by round.

    Args:
        case: what was done.
        peer: the other side's name.
        ours_s: our time of each round.
        peer_s: the peer's time of the same rounds.
        extra: more for the row.
    """
    ratios = [ours / peer for ours, peer in zip(ours_s, peer_s, strict=True)]
    low, ratio, high = (float(np.percentile(ratios, percent)) for percent in (LOW_PERCENT, 50, HIGH_PERCENT))
    more: dict[str, float | str] = {"ours_s": float(np.median(ours_s)), "peer_s": float(np.median(peer_s)), **extra}
    return Row(case, peer, ratio, low, high, len(ratios), more)


def skipped(case: str, peer: str, why: str) -> Row:
    """A row for what cannot be measured here."""
    return Row(case, peer, None, None, None, 0, {"note": why})


def paired(*sides: Callable[[], float], num_rounds: int, name: str = "rounds") -> list[list[float]]:
    """Time all sides once a round, in turn from the first to the last and from the last to the first.

    Args:
        sides: each does its work once and returns its seconds.
        num_rounds: how often.
        name: in front of the progress bar.

    Returns:
        For each side, its seconds in every round.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    for number in progress(range(num_rounds), num_rounds, name, "round"):
        pairs = list(zip(sides, seconds, strict=True))
        for side, of_side in pairs if number % 2 == 0 else reversed(pairs):
            of_side.append(side())
    return seconds


def table(rows: Sequence[Row]) -> str:
    """Rows as people read them, with a column for everything that any of them has."""
    extras = list(dict.fromkeys(key for row in rows for key in row.extra))
    lines = [["case", "peer", "ratio", f"{LOW_PERCENT} %", f"{HIGH_PERCENT} %", "runs", *extras]]
    for row in rows:
        ratios = ["" if r is None else f"{r:.3g}" for r in (row.ratio, row.low, row.high)]
        cells = (_cell(key, row.extra.get(key, "")) for key in extras)
        lines.append([row.case, row.peer, *ratios, str(row.runs), *cells])
    return columns(lines, "l")


def _cell(key: str, value: float | str) -> str:
    """A value in the unit that its name says."""
    if isinstance(value, str):
        return value
    if key.endswith("bytes_s"):
        return format_rate(value, "B/s")
    return format_s(value) if key.endswith("_s") else f"{value:.3g}"


def format_bytes(size_bytes: int) -> str:
    """Whole powers of 1024 as they are called: "64 KB"."""
    for unit, size in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if size_bytes >= size and size_bytes % size == 0:
            return f"{size_bytes // size} {unit}"
    return f"{size_bytes} B"
