"""Figures that are drawn again and again on one widget: a predicted step over a measured one, and a curve of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mplab.show.figures import graph_objects, lay_out
from mplab.trace.compare import PREDICTED, ROW_PX, Comparison
from mplab.trace.figure import bands_json
from mplab.trace.timeline import Timeline
from mplab.trace.units import format_s

_NUM_BARS = 12  # sets of bars in a timeline, at most: 2 predicted; computed 4 and 4 dotted, messages, waits
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")  # of the losses, run by run
# What two figures of the same kind differ in; an axis that is replaced as a whole loses its range in the browser.
_CHANGING = (
    *("title.text", "title.y", "legend.y", "height", "margin.t", "margin.b", "annotations"),
    *("xaxis.range", "xaxis.title.text", "xaxis.dtick", "yaxis.range", "yaxis.showticklabels"),
)


class Timelines:
    """A widget with a predicted step, and above the same rows what was measured.

    Args:
        predicted: at the start.
    """

    def __init__(self, predicted: Timeline) -> None:
        self._above_px = self._below_px = 0.0  # of the rows
        # Room for what will be measured, too.
        self._keep_room(Comparison(predicted, predicted).figure().to_plotly_json(), predicted.num_ranks)
        self.widget = widget_of(graph_objects().Figure(self._figure(predicted, None)))

    def draw(self, predicted: Timeline, measured: Timeline | None = None) -> None:
        """Draw another step, of as many ranks."""
        replace(self.widget, self._figure(predicted, measured))

    def _figure(self, predicted: Timeline, measured: Timeline | None) -> dict[str, Any]:
        if measured is None:
            title = f"Predicted {format_s(predicted.makespan_s)}, not measured yet"
            bands = [(predicted.events, PREDICTED)]
            figure = bands_json(bands, predicted.num_ranks, predicted.notes, title, ROW_PX)
        else:
            compared = Comparison(predicted, measured, title=measured.title or "Last step").figure()
            figure = compared.to_plotly_json()
        self._keep_room(figure, predicted.num_ranks)
        return figure

    def _keep_room(self, figure: dict[str, Any], num_ranks: int) -> None:
        """As much room above and below the rows as any figure before it had, so that they stay where they are."""
        layout = figure["layout"]
        margin, before_px = layout["margin"], layout["height"]
        self._above_px, self._below_px = max(self._above_px, margin["t"]), max(self._below_px, margin["b"])
        height_px = ROW_PX * num_ranks + self._above_px + self._below_px
        for part in (layout["title"], layout["legend"]):  # their places are shares of the height
            part["y"] = 1 - (1 - part["y"]) * before_px / height_px
        layout |= {"autosize": True, "height": height_px}
        margin |= {"t": self._above_px, "b": self._below_px}


class Loss(NamedTuple):
    """The loss of one step.

    Args:
        run: its number, from 1 on.
        value: of the loss.
        how: the run was made, in words.
    """

    run: int
    value: float
    how: str


def loss_curve(losses: Sequence[Loss], num_steps: int) -> Any:
    """A plotly figure of the losses over the steps of all runs.

    Args:
        losses: of every step.
        num_steps: of a run; there is room for two.
    """
    go = graph_objects()
    values = [loss.value for loss in losses]
    figure = go.Figure()
    figure.add_scatter(
        x=list(range(1, len(losses) + 1)),
        y=values,
        mode="lines+markers",
        line={"color": "#0072B2"},
        marker={"size": 9, "symbol": [_SYMBOLS[(loss.run - 1) % len(_SYMBOLS)] for loss in losses]},
        hovertext=[f"run {loss.run}, {loss.how}: loss {loss.value:.4f}" for loss in losses],
        hoverinfo="text",
        showlegend=False,
    )
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.1 * (high - low) or 0.1
    figure.update_layout(
        xaxis={
            "title": {"text": "step, over all runs", "standoff": 6},
            "range": [0.5, max(len(losses), 2 * num_steps) + 0.5],
            "dtick": 1 + len(losses) // 16,
        },
        yaxis={
            "title": {"text": "loss", "standoff": 4},
            "range": [low - margin, high + margin],
            "showticklabels": bool(losses),
        },
        showlegend=False,
        autosize=True,
    )
    title = "Loss of the batch, before each step" if losses else "Loss of the batch: no step has run yet"
    lay_out(figure, 170, title, ["every run has marks of its own shape"])
    return figure.update_layout(height=figure.layout.height + 10, margin_t=figure.layout.margin.t + 10)


def widget_of(figure: Any) -> Any:
    """A widget made of a finished figure, with empty bars between its own and its labels, for `replace`.

    Where a page asks for a widget late, as Voila does, what is drawn on it after it was made would be missing.
    """
    go = graph_objects()
    bars = [trace for trace in figure.data if trace.type == "bar"]
    others = [trace for trace in figure.data if trace.type == "scatter"] or [go.Scatter(visible=False)]
    # A bar that is turned later makes the browser choose the ranges of the axes anew.
    empty = [go.Bar(visible=False, orientation="h") for _ in range(len(bars), _NUM_BARS)] if bars else []
    return go.FigureWidget([*bars, *empty, *others], figure.layout)


def replace(widget: Any, figure: Mapping[str, Any]) -> None:
    """Draw another figure, as plotly's JSON, on a widget, in the places that it has for bars and for the rest."""
    left = [*figure["data"]]
    with widget.batch_update():
        for place in widget.data:
            new = next((trace for trace in left if trace["type"] == place.type), None)
            if new is not None:
                left.remove(new)
                redraw(place, {"visible": True, **new})
            else:
                redraw(place, {"visible": False})
        redraw(widget.layout, {part: _part(figure["layout"], part) for part in _CHANGING})
    assert not left, "there are places for all"


def _part(layout: Mapping[str, Any], path: str) -> Any:
    part: Any = layout
    for name in path.split("."):
        part = (part or {}).get(name)
    return part


def redraw(place: Any, values: Mapping[str, Any]) -> None:
    """Set those properties of a trace, or of a layout, that differ: a slider waits while each is checked and sent."""
    for name, value in values.items():
        if _plain(place[name]) != _plain(value):
            place[name] = value


def _plain(value: Any) -> Any:
    """Plotly holds lists as tuples, and what has parts as an object."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value)) if value and hasattr(value[0], "to_plotly_json") else tuple(value)
    return value.to_plotly_json() if hasattr(value, "to_plotly_json") else value
