"""Timelines drawn with plotly: one row a rank; a prediction stands outlined above what was measured."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from mplab.errors import MplabError
from mplab.trace.event import Event, Lane
from mplab.trace.intervals import merge, overlap_s
from mplab.trace.units import format_s, signed_s, unit_of

_ROW_PX = 44
_PART_PX = 28
_LINE_PX = 17  # of a note
_HEADING_PX = 21  # a line of the title
_LEGEND_PX = 19  # a line of the legend
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
    """Draw several lists of events on the same axes, each in its part of the rows.

    Args:
        bands: events in the order of their starts, and where they are drawn.
        num_ranks: number of rows.
        notes: what stands under the figure.
        title: what stands above it.
        row_px: height of a row.
    """
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise MplabError('a figure needs plotly: pip install "mplab[lab]", or print(timeline.summary()).') from None
    all_events = [event for events, _ in bands for event in events]
    end_s = max((e.end_s for e in all_events), default=0.0)
    start_s = min([0.0, *(e.start_s for e in all_events)])
    unit, unit_s = unit_of(end_s - start_s)
    figure = go.Figure()
    labels: list[tuple[float, float, str, str]] = []
    for events, band in bands:
        messages, thin = (
            [
                merge((e.start_s, e.end_s) for e in events if e.rank == rank and e.lane in lanes)
                for rank in range(num_ranks)
            ]
            for lanes in (("message",), ("message", "wait"))
        )
        for name, lane, look, bars in _outlined(events, band) if band.is_outlined else _filled(events, band):
            figure.add_bar(
                orientation="h",
                name=name,
                y=[bar.centre for bar in bars],
                width=[bar.height for bar in bars],
                base=[bar.event.start_s / unit_s for bar in bars],
                x=[bar.event.duration_s / unit_s for bar in bars],
                hovertext=[_hover(bar.event, "predicted " * band.is_outlined) for bar in bars],
                hoverinfo="text",
                marker={
                    "color": look.fill,
                    "line": {"color": look.line, "width": look.line_px},
                    "pattern": {"shape": _HATCHING[lane], "fgcolor": look.line, "size": 6, "solidity": 0.15},
                },
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
        x, y, text, color = zip(*labels, strict=True)
        font = {"size": 11, "color": color}
        figure.add_scatter(x=x, y=y, text=text, mode="text", textfont=font, hoverinfo="skip", showlegend=False)
    _lay_out(figure, num_ranks, notes, title, row_px)
    margin_s = 0.004 * (end_s - start_s) * any(band.is_outlined for _, band in bands)  # half an outline is a line too
    figure.update_xaxes(range=[(start_s - margin_s) / unit_s, end_s / unit_s * 1.005 or 1.0], title=f"time in {unit}")
    return figure


def _filled(events: Sequence[Event], band: Band) -> Iterator[tuple[str, Lane, _Look, list[_Bar]]]:
    """What is drawn alike: every lane, and within the compute lane every name (names beyond the fourth share looks)."""
    for lane in _HATCHING:
        bars = _bars([e for e in events if e.lane == lane], band)
        looks = _LOOKS[lane]
        names = list(dict.fromkeys(bar.event.name for bar in bars))
        for i, look in enumerate(looks[: len(names)]):
            alike = names[i :: len(looks)]
            said = textwrap.shorten(", ".join(alike), 24, placeholder=" …") if lane == "compute" else ""
            yield (
                f"{lane}: {html.escape(said)}" if said else lane,
                lane,
                look,
                [bar for bar in bars if bar.event.name in alike],
            )


def _outlined(events: Sequence[Event], band: Band) -> Iterator[tuple[str, Lane, _Look, list[_Bar]]]:
    """Work and messages; where nothing is drawn, a rank is predicted to wait."""
    kinds: tuple[tuple[Lane, str, float], ...] = (("compute", "predicted", 1.2), ("message", "predicted message", 0.8))
    for lane, name, line_px in kinds:
        bars = _bars([e for e in events if e.lane == lane], band)
        if bars:
            yield name, lane, _PREDICTED._replace(line_px=line_px), bars


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
    _lay_out(figure, len(names), notes, title, _PART_PX)
    left_px = 20 + int(_CHARACTER_PX * max(map(len, names)))
    for annotation in figure.layout.annotations:
        annotation.update(xshift=figure.layout.margin.l - left_px)
    figure.update_layout(margin_l=left_px)
    figure.update_yaxes(ticktext=names)
    low, high = min(ends) / unit_s, max(ends) / unit_s
    figure.update_xaxes(range=[low, high + 0.005 * (high - low) or 1.0], title=f"time in {unit}")
    return figure


def _lay_out(figure: Any, num_ranks: int, notes: Sequence[str], title: str | None, row_px: int) -> None:
    """Stack title, legend, rows, axis and notes in pixels, so that none meets another at any width from 600 px on."""
    heading = textwrap.wrap(title or "", 66)
    remarks = wrapped(notes)
    legend_top = 6 + _HEADING_PX * len(heading)
    legend = [bars.name for bars in figure.data if bars.type == "bar" and bars.showlegend is not False]
    top = legend_top + (23 + _LEGEND_PX * _legend_lines(legend) if legend else 8)
    bottom = 54 + (_LINE_PX * len(remarks) + 8 if remarks else 0)
    height = num_ranks * row_px + top + bottom
    figure.update_layout(
        height=height,
        margin={"l": 62, "r": 18, "t": top, "b": bottom},
        template="plotly_white",
        barmode="overlay",
        bargap=0,
        font={"size": 12},
        title={
            "text": "<br>".join(map(html.escape, heading)),
            "font": {"size": 15},
            "x": 0,
            "pad": {"l": 12},
            # Plotly puts the foot of the first of several lines here for any anchor; "bottom" does so for one too.
            "y": 1 - 19 / height,
            "yref": "container",
            "yanchor": "bottom",
        },
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1 - legend_top / height,
            "yref": "container",
            "yanchor": "top",
        },
        hoverlabel={"align": "left"},
    )
    figure.update_yaxes(
        tickvals=list(range(num_ranks)),
        ticktext=[f"rank {rank}" for rank in range(num_ranks)],
        ticks="outside",
        ticklen=5,
        tickcolor="rgba(0,0,0,0)",
        range=[num_ranks - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
        fixedrange=True,
    )
    figure.update_xaxes(title_standoff=6, zeroline=False)
    add_notes(figure, remarks, 54)


def wrapped(notes: Sequence[str]) -> list[str]:
    """Notes in lines that a figure 600 px wide has room for."""
    return [line for note in notes for line in textwrap.wrap(note, 84)]


def add_notes(figure: Any, lines: Sequence[str], below_px: int) -> None:
    """Write lines under a figure's axes, so many pixels below them."""
    if lines:
        figure.add_annotation(
            text="<br>".join(map(html.escape, lines)),
            showarrow=False,
            align="left",
            x=0,
            xref="paper",
            xanchor="left",
            y=0,
            yref="paper",
            yanchor="top",
            yshift=-below_px,
            font={"size": 12},
        )


def _legend_lines(names: Sequence[str]) -> int:
    """Lines of a legend in a figure 600 px wide: plotly puts entries in columns once they don't fit in one line."""
    widths = [46 + 6.4 * len(name) for name in names]
    if sum(widths) <= 520:
        return 1
    return -(-len(names) // max(1, int(520 // max(widths))))
