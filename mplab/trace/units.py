"""Seconds and bytes as people read them."""

from __future__ import annotations

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
