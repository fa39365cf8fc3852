"""What stands around the axes of a figure of ranks: title and legend above them, notes below."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from typing import Any

_LINE_PX = 17  # of a note
_HEADING_PX = 21  # a line of the title
_LEGEND_PX = 19  # a line of the legend
_LEFT_PX, _EDGE_PX = 62, 12  # from the figure's edge to the axes, and to the notes
_TITLE_PX = 13.5  # the size of its letters: times in it, predicted and measured, fit in a line of that width
_TITLE_CHARACTERS, _NOTE_CHARACTERS = 48, 52  # of a line that a figure 360 px wide has room for


def frame(
    legend: Sequence[str],
    num_ranks: int,
    notes: Sequence[str],
    title: str | None,
    row_px: int,
    left_px: int = _LEFT_PX,
) -> dict[str, Any]:
    """A layout as plotly's JSON: title, legend, rows, axis and notes below each other in pixels.

    None is over another, and none cut off, from 360 px of width on.

    Args:
        legend: its entries.
        num_ranks: number of rows.
        notes: under the axis.
        title: above all.
        row_px: height of a row.
        left_px: what the names of the rows need.
    """
    heading, remarks = heading_of(title), wrapped(notes)
    legend_top = 6 + _HEADING_PX * len(heading)
    top = legend_top + (23 + _LEGEND_PX * _legend_lines(legend) if legend else 8)
    bottom = 54 + (_LINE_PX * len(remarks) + 8 if remarks else 0)
    height = num_ranks * row_px + top + bottom
    return {
        "height": height,
        "margin": {"l": left_px, "r": 18, "t": top, "b": bottom},
        "template": "plotly_white",
        "barmode": "overlay",
        "bargap": 0,
        "font": {"size": 12},
        "title": titled(heading, 19, height),
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1 - legend_top / height,
            "yref": "container",
            "yanchor": "top",
        },
        "hoverlabel": {"align": "left"},
        "xaxis": {"title": {"standoff": 6}, "zeroline": False},
        "yaxis": {
            "tickvals": list(range(num_ranks)),
            "ticktext": [f"rank {rank}" for rank in range(num_ranks)],
            "ticks": "outside",
            "ticklen": 5,
            "tickcolor": "rgba(0,0,0,0)",
            "range": [num_ranks - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
        "annotations": noted(remarks, 54, left_px),
    }


def heading_of(title: str | None) -> list[str]:
    """A title in lines that a figure 360 px wide has room for."""
    return textwrap.wrap(title or "", _TITLE_CHARACTERS)


def titled(heading: Sequence[str], foot_px: float, height_px: float) -> dict[str, Any]:
    """Lines at the top of a figure, as its title in plotly's JSON.

    Args:
        heading: as `heading_of` gives them.
        foot_px: from the figure's top to the foot of the first one.
        height_px: of the figure.
    """
    return {
        "text": "<br>".join(map(html.escape, heading)),
        "font": {"size": _TITLE_PX},
        "x": 0,
        "pad": {"l": 12},
        # Plotly puts the foot of the first of several lines here for any anchor; "bottom" does so for one too.
        "y": 1 - foot_px / height_px,
        "yref": "container",
        "yanchor": "bottom",
    }


def wrapped(notes: Sequence[str]) -> list[str]:
    """Notes in lines that a figure 360 px wide has room for."""
    return [line for note in notes for line in textwrap.wrap(note, _NOTE_CHARACTERS)]


def noted(lines: Sequence[str], below_px: int, left_px: float) -> list[dict[str, Any]]:
    """Lines under a figure's axes, as annotations in plotly's JSON.

    Args:
        lines: as `wrapped` gives them.
        below_px: from the axes down.
        left_px: from the figure's edge to the axes; the lines begin at the edge.
    """
    note = {
        "text": "<br>".join(map(html.escape, lines)),
        "showarrow": False,
        "align": "left",
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "xshift": _EDGE_PX - left_px,
        "y": 0,
        "yref": "paper",
        "yanchor": "top",
        "yshift": -below_px,
        "font": {"size": 12},
    }
    return [note] if lines else []


def _legend_lines(names: Sequence[str]) -> int:
    """Lines of a legend in a figure 600 px wide: plotly puts entries in columns once they don't fit in one line."""
    widths = [46 + 6.4 * len(name) for name in names]
    if sum(widths) <= 520:
        return 1
    return -(-len(names) // max(1, int(520 // max(widths))))
