"""Static figures of the labs: fitted links, and what all-reduces should take and took."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mplab.errors import MplabError
from mplab.plan.cost import Link, all_reduce_times_s
from mplab.trace.figure import add_notes, wrapped
from mplab.world.links import LinkFit

SIZES_BYTES = tuple(1 << k for k in range(8, 25))  # 256 B to 16 MiB
_NOTE_PX = 17  # a line of a note


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


def lay_out(figure: Any, plot_px: int, title: str, notes: Sequence[str]) -> Any:
    """Title, legend and notes around a plot, none of them over another from 600 px of width on."""
    remarks = wrapped(notes)
    has_legend = figure.layout.showlegend is not False
    top, bottom = 36 + 44 * has_legend, 56 + (_NOTE_PX * len(remarks) + 6 if remarks else 0)
    height = plot_px + top + bottom
    figure.update_layout(
        height=height,
        margin={"l": 70, "r": 18, "t": top, "b": bottom},
        template="plotly_white",
        font={"size": 12},
        title={"text": html.escape(title), "font": {"size": 15}, "x": 0, "pad": {"l": 12}, "y": 1 - 20 / height},
        legend={"orientation": "h", "x": 0, "y": 1 - 30 / height, "yref": "container", "yanchor": "top"},
    )
    add_notes(figure, remarks, 52)
    return figure


def sizes_axis(sizes_bytes: Sequence[int]) -> dict[str, Any]:
    """A logarithmic axis of sizes, marked in powers of four."""
    low, high = math.log2(min(sizes_bytes)), math.log2(max(sizes_bytes))
    marks = [1 << k for k in range(math.ceil(low), math.floor(high) + 1, 2)]
    margin = 0.02 * (high - low)
    return {
        "type": "log",
        "title": {"text": "size of the tensor (B)", "standoff": 6},
        "tickvals": marks,
        "ticktext": [format_bytes(mark) for mark in marks],
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
