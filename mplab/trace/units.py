"""Seconds, and rows of a table, as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))


def unit_of(seconds: float) -> tuple[str, float]:
    """The unit that gives `seconds` at least one digit before the point, and its size in seconds."""
    for name, size in _UNITS:
        if seconds >= size:
            return name, size
    return _UNITS[-1] if seconds > 0 else _UNITS[0]


def format_s(seconds: float) -> str:
    """Three digits and a unit: "12.3 ms"."""
    name, size = unit_of(seconds / 0.9995)  # 999.7 µs are 1.00 ms, not 1000 µs
    number = seconds / size
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f} {name}"


def signed_s(seconds: float) -> str:
    """The same with a sign: "+1.20 ms", "−35.0 µs"."""
    return f"{'−' if seconds < 0 else '+'}{format_s(abs(seconds))}"


def format_bandwidth(bytes_s: float, num_digits: int = 3) -> str:
    """At most so many digits and a unit: "20.6 GB/s", "50 MB/s"."""
    unit, size = ("GB/s", 1e9) if bytes_s >= 0.9995e9 else ("MB/s", 1e6)  # 999.7 MB/s are 1 GB/s, not 1e+03 MB/s
    return f"{bytes_s / size:.{num_digits}g} {unit}"


def columns(rows: Sequence[Sequence[str]], align: str = "r") -> str:
    """Rows in columns: `align` has "l" or "r" for each column, and its last letter is for all that follow."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    sides = align.ljust(len(widths), align[-1])
    lines = [
        "  ".join(c.ljust(w) if side == "l" else c.rjust(w) for c, w, side in zip(row, widths, sides, strict=False))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
