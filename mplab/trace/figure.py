"""Timelines drawn with plotly: one row a rank; a prediction stands outlined above what was measured."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Sequence
from itertools import accumulate, cycle
from typing import Any, NamedTuple

from mplab.errors import MplabError
from mplab.trace.event import Event, Lane
from mplab.trace.frame import frame
from mplab.trace.intervals import merge, overlap_s
from mplab.trace.units import format_s, signed_s, unit_of

_ROW_PX = 44
_PART_PX = 28
_NARROW_PLOT_PX = 480  # what the axes get in a figure 600 px wide; a label that fits there fits everywhere
_SAME_S = 1e-10  # below the clock's nanosecond: simulated times that should be equal differ by rounding
_COVERED = 0.1  # of a bar's length: what lies over less of it leaves the label in its middle alone
_CHARACTER_PX = 6.6  # of the labels' font, 11 px high


class _Look(NamedTuple):
    fill: str
    text: str
    line: str
    line_px: float = 0.6


# After Okabe and Ito, whose colours the colour-blind tell apart. Hatching and height tell the lanes apart without any
# colour, and lightness what was computed.
_LOOKS: dict[Lane, tuple[_Look, ...]] = {
    "compute": (
        _Look("#0072B2", "white", "#00304B"),
        _Look("#8CCBF0", "black", "#00304B"),
        _Look("#00476F", "white", "#00304B"),
        _Look("#D5EAF7", "black", "#00304B"),
    ),
    "message": (_Look("#F5C26B", "black", "#8A5A00"),),
    "wait": (_Look("#EDEDED", "black", "#707070"),),
}
# What has a name of its own in every lab looks the same in every figure; chunks of layers after the first are dotted.
_LOOK_OF = {"forward": 0, "backward": 1, "input gradient": 1, "weight gradient": 2, "update": 3}
_CHUNK = " of chunk "
_PREDICTED = _Look("rgba(0,0,0,0)", "black", "#222222")
_HATCHING: dict[Lane, str] = {"compute": "", "wait": "x", "message": "/"}  # a message lies over the wait for it


class Band(NamedTuple):
    """The part of every rank's row that one timeline gets.

    Args:
        centre: distance from the row's middle, in rows; below 0 is above.
        height: of a compute event, in rows.
        is_outlined: drawn as outlines, without its waits: for what did not happen.
    """

    centre: float = 0.0
    height: float = 0.8
    is_outlined: bool = False


class _Bar(NamedTuple):
    event: Event
    centre: float  # in rows
    height: float
    is_inner: bool  # no other compute span within it


def draw(events: Sequence[Event], num_ranks: int, notes: Sequence[str], title: str | None) -> Any:
    """Draw events that come in the order of their starts: six sets of bars and one of labels at most, however many."""
    return draw_bands([(events, Band())], num_ranks, notes, title, _ROW_PX)


def draw_bands(
    bands: Sequence[tuple[Sequence[Event], Band]], num_ranks: int, notes: Sequence[str], title: str | None, row_px: int
) -> Any:
    """Draw several lists of events on the same axes, as `bands_json` has them."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise MplabError('a figure needs plotly: pip install "mplab[lab]", or print(timeline.summary()).') from None
    return go.Figure(bands_json(bands, num_ranks, notes, title, row_px))


def bands_json(
    bands: Sequence[tuple[Sequence[Event], Band]], num_ranks: int, notes: Sequence[str], title: str | None, row_px: int
) -> dict[str, Any]:
    """Several lists of events on the same axes, each in its part of the rows, as plotly's JSON.

    To check a whole figure, and to copy its template, takes plotly many times as long as it takes to make this: what
    is drawn again and again goes without.

    Args:
        bands: events in the order of their starts, and where they are drawn.
        num_ranks: number of rows.
        notes: what stands under the figure.
        title: what stands above it.
        row_px: height of a row.
    """
    all_events = [event for events, _ in bands for event in events]
    end_s = max((e.end_s for e in all_events), default=0.0)
    start_s = min([0.0, *(e.start_s for e in all_events)])
    unit, unit_s = unit_of(end_s - start_s)
    data: list[dict[str, Any]] = []
    labels: list[tuple[float, float, str, str]] = []
    for events, band in bands:
        messages, thin = (
            [
                merge((e.start_s, e.end_s) for e in events if e.rank == rank and e.lane in lanes)
                for rank in range(num_ranks)
            ]
            for lanes in (("message",), ("message", "wait"))
        )
        for name, lane, look, pattern, bars in _outlined(events, band) if band.is_outlined else _filled(events, band):
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": name,
                    "y": [bar.centre for bar in bars],
                    "width": [bar.height for bar in bars],
                    "base": [bar.event.start_s / unit_s for bar in bars],
                    "x": [bar.event.duration_s / unit_s for bar in bars],
                    "hovertext": [_hover(bar.event, "predicted " * band.is_outlined) for bar in bars],
                    "hoverinfo": "text",
                    "marker": {
                        "color": look.fill,
                        "line": {"color": look.line, "width": look.line_px},
                        "pattern": {"shape": pattern, "fgcolor": look.line, "size": 6, "solidity": 0.15},
                    },
                }
            )
            for event, centre, _, is_inner in bars:
                label = _label(event, _NARROW_PLOT_PX * event.duration_s / (end_s - start_s or 1.0)) if is_inner else ""
                over = {"compute": thin, "wait": messages}.get(lane)
                covered_s = overlap_s([(event.start_s, event.end_s)], over[event.rank]) if label and over else 0.0
                is_covered = covered_s > _COVERED * event.duration_s
                if label and not (is_covered and lane == "wait"):
                    middle = (event.start_s + event.end_s) / 2 / unit_s
                    labels.append((middle, centre - band.height / 4 * is_covered, label, look.text))
    if labels:
        x, y, text, color = map(list, zip(*labels, strict=True))
        said = {"x": x, "y": y, "text": text, "textfont": {"size": 11, "color": color}, "mode": "text"}
        data.append({"type": "scatter", **said, "hoverinfo": "skip", "showlegend": False})
    layout = frame([bars["name"] for bars in data if bars["type"] == "bar"], num_ranks, notes, title, row_px)
    margin_s = 0.004 * (end_s - start_s) * any(band.is_outlined for _, band in bands)  # half an outline is a line too
    layout["xaxis"]["range"] = [(start_s - margin_s) / unit_s, end_s / unit_s * 1.005 or 1.0]
    layout["xaxis"]["title"]["text"] = f"time in {unit}"
    return {"data": data, "layout": layout}


def _filled(events: Sequence[Event], band: Band) -> Iterator[tuple[str, Lane, _Look, str, list[_Bar]]]:
    """What is drawn alike: every lane, and within the compute lane every name (of many names, some share looks)."""
    for lane, hatching in _HATCHING.items():
        bars = _bars([e for e in events if e.lane == lane], band)
        names = list(dict.fromkeys(bar.event.name for bar in bars))
        looks = _compute_looks(names) if lane == "compute" else dict.fromkeys(names, (_LOOKS[lane][0], hatching))
        for look, pattern in dict.fromkeys(looks.values()):
            alike = [name for name in names if looks[name] == (look, pattern)]
            said = textwrap.shorten(", ".join(alike), 24, placeholder=" …") if lane == "compute" else ""
            yield (
                f"{lane}: {html.escape(said)}" if said else lane,
                lane,
                look,
                pattern,
                [bar for bar in bars if bar.event.name in alike],
            )


def _compute_looks(names: Sequence[str]) -> dict[str, tuple[_Look, str]]:
    """Fill and pattern of what was computed."""
    looks, kinds = _LOOKS["compute"], {name: name.partition(_CHUNK) for name in names}
    taken = {_LOOK_OF.get(kind) for kind, *_ in kinds.values()}
    places = cycle([place for place in range(len(looks)) if place not in taken] or range(len(looks)))
    return {
        name: (looks[_LOOK_OF[kind] if kind in _LOOK_OF else next(places)], "" if chunk in ("", "0") else ".")
        for name, (kind, _, chunk) in kinds.items()
    }


def _outlined(events: Sequence[Event], band: Band) -> Iterator[tuple[str, Lane, _Look, str, list[_Bar]]]:
    """Work and messages; where nothing is drawn, a rank is predicted to wait."""
    kinds: tuple[tuple[Lane, str, float], ...] = (("compute", "predicted", 1.2), ("message", "predicted message", 0.8))
    for lane, name, line_px in kinds:
        bars = _bars([e for e in events if e.lane == lane], band)
        if bars:
            yield name, lane, _PREDICTED._replace(line_px=line_px), _HATCHING[lane], bars


def _bars(events: Sequence[Event], band: Band) -> list[_Bar]:
    """The bars of one lane: computation fills the band, what is nested in it less; the rest gets the lower half."""
    bars: list[_Bar] = []
    outer: dict[int, list[tuple[float, int]]] = {}
    for number, event in enumerate(events):
        stack = outer.setdefault(event.rank, [])
        while stack and stack[-1][0] <= event.start_s + _SAME_S:
            stack.pop()
        middle = event.rank + band.centre
        if event.lane == "compute":
            if stack:
                bars[stack[-1][1]] = bars[stack[-1][1]]._replace(is_inner=False)
            bars.append(_Bar(event, middle, band.height * max(1 - 0.25 * len(stack), 0.5), True))
        else:
            bars.append(_Bar(event, middle + band.height / 4, band.height / 2, True))
        stack.append((event.end_s, number))
    return bars


def _label(event: Event, width_px: float) -> str:
    """Name and micro-batch ("forward 3"), or their short form ("F3"), or nothing: what fits."""
    if event.microbatch is None:
        names = [event.name]
    else:
        names = [f"{event.name} {event.microbatch}", f"{event.name[:1].upper()}{event.microbatch}"]
    return next((html.escape(n) for n in names if len(n) * _CHARACTER_PX + 4 <= width_px), "")


def _hover(event: Event, kind: str) -> str:
    lines = [f"<b>{html.escape(event.name)}</b> ({kind}{event.lane}, rank {event.rank})"]
    if event.microbatch is not None:
        lines.append(f"micro-batch {event.microbatch}")
    if event.size_bytes:
        lines.append(f"{event.size_bytes:,} bytes")
    return "<br>".join([*lines, f"{format_s(event.duration_s)}, from {format_s(event.start_s)}"])


def draw_parts(parts: Sequence[tuple[str, float]], total: str, notes: Sequence[str], title: str) -> Any:
    """Draw (name, seconds) as bars below each other, each beginning where the one above ends, and last their sum.

    The names beside them say how many seconds; a part that takes time off is hatched.
    """
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise MplabError('a figure needs plotly: pip install "mplab[lab]", or print(comparison).') from None
    ends = list(accumulate((seconds for _, seconds in parts), initial=0.0))
    starts, lengths = [*ends[:-1], 0.0], [*(seconds for _, seconds in parts), ends[-1]]
    names = [*(f"{html.escape(name)} {signed_s(seconds)}" for name, seconds in parts), f"{total} {format_s(ends[-1])}"]
    unit, unit_s = unit_of(max(ends) - min(ends))
    part, whole = _LOOKS["compute"][1], _LOOKS["compute"][0]
    figure = go.Figure()
    figure.add_bar(
        orientation="h",
        y=list(range(len(names))),
        width=0.7,
        base=[start / unit_s for start in starts],
        x=[length / unit_s for length in lengths],
        hovertext=names,
        hoverinfo="text",
        showlegend=False,
        marker={
            "color": [*(part.fill for _ in parts), whole.fill],
            "line": {"color": part.line, "width": 1},
            "pattern": {"shape": ["/" if length < 0 else "" for length in lengths], "fgcolor": part.line, "size": 6},
        },
    )
    left_px = 20 + int(_CHARACTER_PX * max(map(len, names)))
    figure.update_layout(frame([], len(names), notes, title, _PART_PX, left_px))
    figure.update_yaxes(ticktext=names)
    low, high = min(ends) / unit_s, max(ends) / unit_s
    figure.update_xaxes(range=[low, high + 0.005 * (high - low) or 1.0], title=f"time in {unit}")
    return figure
