"""Static figures of the labs: fitted links, and what all-reduces should take and took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mplab.errors import MplabError
from mplab.plan.cost import Link, all_reduce_times_s
from mplab.trace.frame import heading_of, noted, titled, wrapped
from mplab.world.links import LinkFit

SIZES_BYTES = tuple(1 << k for k in range(8, 25))  # 256 B to 16 MiB
_HEADING_PX, _NOTE_PX = 20, 17  # a line of the title, and of a note
_LEFT_PX = 70  # from the figure's edge to the axes
MOST_MARKS = 6  # on an axis that have their sizes written to them, in a figure 360 px wide

# Of a bar: its length is written in it where there is room; plotly knows how wide the page is.
BAR_TEXT = {"textposition": "inside", "insidetextanchor": "middle", "textangle": 0}
FITTING_TEXT = {"mode": "hide", "minsize": 11}  # the layout's `uniformtext`


class BarLook(NamedTuple):
    """Of a part of a bar: told apart by hatching; predicted and measured by lightness. After Okabe and Ito.

    Args:
        fill: what was measured.
        pale: what was predicted.
        text: on what was measured; on the other it is black.
        hatching: plotly's name for it.
    """

    fill: str
    pale: str
    text: str
    hatching: str


MEMORY_LOOKS = {
    "parameters": BarLook("#0072B2", "#D5EAF7", "white", ""),
    "gradients": BarLook("#F5C26B", "#FDF3E0", "black", "/"),
    "optimizer": BarLook("#8CCBF0", "#E8F5FC", "black", "x"),
    "activations": BarLook("#00775B", "#D3EEE6", "white", "."),
}


class Look(NamedTuple):
    """How one of several things is drawn: told apart by colour, by dashes and by the shape of its marks."""

    color: str
    dash: str
    symbol: str


# After Okabe and Ito, whose colours the colour-blind tell apart.
LOOKS = (
    Look("#D55E00", "dot", "square"),
    Look("#009E73", "dash", "diamond"),
    Look("#0072B2", "solid", "circle"),
    Look("#7A3E8F", "dashdot", "triangle-up"),
)
ALGORITHM_LOOKS = dict(zip(("naive", "tree", "ring", "halving_doubling"), LOOKS, strict=True))


def graph_objects() -> Any:
    """Plotly, imported when a figure is drawn.

    Raises:
        MplabError: it is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise MplabError('a figure needs plotly: pip install "mplab[lab]"') from None
    return go


def spoken(algorithm: str) -> str:
    """An algorithm's name in a text: "halving-doubling"."""
    return algorithm.replace("_", "-")


def format_bytes(size_bytes: float) -> str:
    """Bytes in the unit that fits: "512 B", "64 KiB", "1.5 MiB"."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= size:
            return f"{size_bytes / size:.4g} {unit}"
    return f"{size_bytes:.4g} B"


def link_fits(fits: Sequence[LinkFit], notes: Sequence[str] = (), title: str = "T = α + β·B, fitted") -> Any:
    """Measured messages and the lines fitted to them; below, what the lines leave unexplained.

    Args:
        fits: up to four links.
        notes: what their times cannot prove.
        title: above the figure.
    """
    go = graph_objects()
    figure = go.Figure()
    for fit, look in zip(fits, LOOKS[::-1], strict=False):
        sizes = [
            2**k for k in range(round(math.log2(min(fit.sizes_bytes))), round(math.log2(max(fit.sizes_bytes))) + 1)
        ]
        mark = {"symbol": look.symbol, "color": look.color, "size": 9}
        figure.add_scatter(x=fit.sizes_bytes, y=fit.times_s, mode="markers", marker=mark, name=f"{fit.rung}, measured")
        line = {"color": look.color, "dash": look.dash}
        fitted = [fit.link.time_s(1, size) for size in sizes]
        figure.add_scatter(x=sizes, y=fitted, mode="lines", line=line, name=f"{fit.rung}, fitted")
        residuals = [100 * r for r in fit.residuals]
        figure.add_scatter(
            x=fit.sizes_bytes, y=residuals, yaxis="y2", mode="markers+lines", marker=mark, line=line, showlegend=False
        )
    figure.update_layout(
        yaxis={"domain": [0.42, 1], **seconds_axis([t for fit in fits for t in fit.times_s])},
        yaxis2={"domain": [0, 0.3], "title": "residual (%)", "zerolinecolor": "#444444", "anchor": "x"},
        xaxis={"anchor": "y2", **sizes_axis([size for fit in fits for size in fit.sizes_bytes])},
    )
    return lay_out(figure, 470, title, [*notes, "residual: (measured − fitted) / measured; 0 where the line is right"])


def all_reduce_times(
    link: Link,
    num_ranks: int,
    measured: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    notes: Sequence[str] = (),
    title: str = "",
    plot_px: int = 380,
) -> Any:
    """What every taught all-reduce should take over a link, as lines over the size; what it took, as marks.

    Args:
        link: between any two ranks.
        num_ranks: in the all-reduce.
        measured: (bytes, seconds) by algorithm.
        notes: what the marks cannot prove.
        title: above the figure; by default it has the number of ranks.
        plot_px: height of the plot itself.
    """
    go = graph_objects()
    figure = go.Figure()
    for algorithm, look in ALGORITHM_LOOKS.items():
        times = [all_reduce_times_s(link, num_ranks, size)[algorithm] for size in SIZES_BYTES]
        line = {"color": look.color, "dash": look.dash, "width": 2}
        figure.add_scatter(x=SIZES_BYTES, y=times, mode="lines", line=line, name=spoken(algorithm))
    for algorithm, points in (measured or {}).items():
        x, y = zip(*points, strict=True)
        look = ALGORITHM_LOOKS[algorithm]
        mark = {"symbol": look.symbol, "color": look.color, "size": 10, "line": {"color": "black", "width": 1}}
        figure.add_scatter(x=x, y=y, mode="markers", marker=mark, name=f"{spoken(algorithm)}, measured")
    all_times = [y for trace in figure.data for y in trace.y]
    figure.update_layout(xaxis=sizes_axis(SIZES_BYTES), yaxis=seconds_axis(all_times))
    title = title or f"All-reduce over {num_ranks} ranks: predicted lines, measured marks"
    return lay_out(figure, plot_px, title, notes)


def lay_out(
    figure: Any, plot_px: int, title: str, notes: Sequence[str], left_px: int = _LEFT_PX, right_px: int = 18
) -> Any:
    """Title, legend and notes around a plot: none of them over another, and none cut off, from 360 px of width on.

    Args:
        figure: with its traces and axes.
        plot_px: height of the plot; a legend of more lines than two takes them from it.
        title: above all.
        notes: below all.
        left_px: what the marks of the axes need on the left.
        right_px: what is written beyond the axes on the right.
    """
    heading, remarks = heading_of(title), wrapped(notes)
    has_legend = figure.layout.showlegend is not False
    legend_px = 10 + _HEADING_PX * max(1, len(heading))
    top, bottom = legend_px + 6 + 44 * has_legend, 56 + (_NOTE_PX * len(remarks) + 6 if remarks else 0)
    height = plot_px + top + bottom
    figure.update_layout(
        height=height,
        margin={"l": left_px, "r": right_px, "t": top, "b": bottom},
        template="plotly_white",
        font={"size": 12},
        title=titled(heading, 21, height),
        legend={"orientation": "h", "x": 0, "y": 1 - legend_px / height, "yref": "container", "yanchor": "top"},
    )
    for note in noted(remarks, 52, left_px):
        figure.add_annotation(note)
    return figure


def sizes_axis(sizes_bytes: Sequence[int]) -> dict[str, Any]:
    """A logarithmic axis of sizes, marked in powers of four; of many marks every other one has its size written."""
    low, high = math.log2(min(sizes_bytes)), math.log2(max(sizes_bytes))
    marks = [1 << k for k in range(math.ceil(low), math.floor(high) + 1, 2)]
    margin, apart = 0.02 * (high - low), 2 if len(marks) > MOST_MARKS else 1
    return {
        "type": "log",
        "title": {"text": "size of the tensor (B)", "standoff": 6},
        "tickvals": marks,
        "ticktext": ["" if i % apart else format_bytes(mark) for i, mark in enumerate(marks)],
        "tickangle": 0,
        "range": [(low - margin) * math.log10(2), (high + margin) * math.log10(2)],
    }


def seconds_axis(times_s: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis of times, marked in powers of ten from 1 ns on."""
    low, high = math.log10(max(min(times_s), 1e-9)), math.log10(max(times_s))
    names = [f"{number} {unit}" for unit in ("ns", "µs", "ms", "s") for number in (1, 10, 100)]
    return {
        "type": "log",
        "title": {"text": "time", "standoff": 4},
        "tickvals": [10.0**k for k in range(-9, 3)],
        "ticktext": names,
        "range": [low - 0.1 * (high - low), high + 0.1 * (high - low)],
    }
