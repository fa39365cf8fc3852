"""Sets of points in time, as lists of disjoint intervals in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in time, as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length_s(merged: Sequence[Interval]) -> float:
    """Seconds in disjoint intervals."""
    return sum(end - start for start, end in merged)


def overlap_s(a: Sequence[Interval], b: Sequence[Interval]) -> float:
    """Seconds that two lists of disjoint intervals have in common."""
    seconds, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        seconds += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return seconds
