"""What a plan takes, in bars: the memory of a rank, and the parts of a step."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mplab.plan.machines import Machine
from mplab.plan.predict import Prediction
from mplab.plan.zero import Memory
from mplab.show.figures import BAR_TEXT, FITTING_TEXT, MEMORY_LOOKS, BarLook, graph_objects, lay_out
from mplab.show.redraw import redraw
from mplab.trace.frame import wrapped
from mplab.trace.units import format_s, unit_of
from mplab.world.probe import format_rate

PARTS = ("compute", "bubble", "tensor", "pipeline", "data", "update")
MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations")
_PLOT_PX, _LEFT_PX, _RIGHT_PX = 340, 72, 66  # beyond the bars stand their sums
_MEMORY_ROW = 0.0
_AWAY = "messages, and waiting for them"
_TIME_ROWS = (0.0, 1.0)  # predicted, measured
_ROOM = 1.02  # of an axis, beyond the bars
_NOTE_LINES = 8
_FAR = 2.5  # times what a rank holds: a memory beyond that is named, not drawn


_LOOKS = {
    **MEMORY_LOOKS,
    "compute": BarLook("#0072B2", "#D5EAF7", "white", ""),
    "bubble": BarLook("#B0B0B0", "#F4F4F4", "black", "x"),
    "tensor": BarLook("#D55E00", "#FBDCC6", "white", "/"),
    "pipeline": BarLook("#8CCBF0", "#E8F5FC", "black", "-"),
    "data": BarLook("#00775B", "#D3EEE6", "white", "."),
    "update": BarLook("#7A3E8F", "#EBDCF0", "white", "|"),
    _AWAY: BarLook("#F5C26B", "#FDF3E0", "black", "\\"),
}
_MEASURED = ("compute", _AWAY, "update")


class MeasuredParts(NamedTuple):
    """What a step really took, the mean of all ranks, in seconds; the three are all of it.

    Args:
        compute_s: forward and backward, and whatever is none of the others.
        away_s: messages, and waiting for them.
        update_s: of the optimizer.
    """

    compute_s: float
    away_s: float
    update_s: float


def plan_figure(
    prediction: Prediction,
    machine: Machine,
    measured: MeasuredParts | None = None,
    unmeasured: str = "not measured yet",
    title: str = "",
) -> Any:
    """What a rank holds against what it has, and what a step takes, part by part: always as many bars.

    Args:
        prediction: of a plan.
        machine: on which.
        measured: the same step, as it really was.
        unmeasured: what stands in the row of the measured step while there is none.
        title: above the figure; by default it says whether the plan fits.

    Raises:
        MplabError: plotly is not installed.
    """
    figure = graph_objects().Figure()
    for name in MEMORY_PARTS:
        _add_bar(figure, name, _MEMORY_ROW, "memory")
    for kind, row, names in zip(("predicted", "measured"), _TIME_ROWS, (PARTS, _MEASURED), strict=True):
        for name in names:
            _add_bar(figure, name, row, kind)
    sums = {"mode": "text", "textposition": "middle right", "hoverinfo": "skip", "showlegend": False}
    sums |= {"cliponaxis": False}
    figure.add_scatter(y=[_MEMORY_ROW], **sums)
    figure.add_scatter(y=_TIME_ROWS, xaxis="x2", yaxis="y2", **sums)
    figure.add_shape(type="line", y0=-0.62, y1=0.5, line={"color": "black", "width": 2.5})
    figure.add_annotation(y=-0.62, showarrow=False, yanchor="bottom", font={"size": 12})
    plain = {"showgrid": False, "zeroline": False}
    figure.update_layout(
        barmode="overlay",
        uniformtext=FITTING_TEXT,
        legend2={"orientation": "h", "x": 0, "y": 0.31, "yanchor": "bottom"},
        xaxis={"anchor": "y", "zeroline": False, "title": {"standoff": 4}},
        yaxis={
            "tickvals": [_MEMORY_ROW],
            "ticktext": ["predicted"],
            "range": [0.5, -1.0],
            "domain": [0.76, 1],
            **plain,
        },
        xaxis2={"anchor": "y2", "zeroline": False, "title": {"standoff": 4}},
        yaxis2={
            "anchor": "x2",
            "tickvals": _TIME_ROWS,
            "ticktext": ["predicted", "measured"],
            "range": [1.5, -0.5],
            "domain": [0, 0.3],
            **plain,
        },
    )
    figure = lay_out(figure, _PLOT_PX, "", ["-"] * _NOTE_LINES, _LEFT_PX, _RIGHT_PX)
    redraw_plan(figure, prediction, machine, measured, unmeasured, title)
    return figure


def redraw_plan(
    figure: Any,
    prediction: Prediction,
    machine: Machine,
    measured: MeasuredParts | None = None,
    unmeasured: str = "not measured yet",
    title: str = "",
) -> None:
    """Draw another plan on a figure, or a widget, of `plan_figure`: only what differs, since a slider waits for it.

    Args:
        figure: where.
        prediction: as for `plan_figure`.
        machine: likewise.
        measured: likewise.
        unmeasured: likewise.
        title: likewise.
    """
    fits = "fits" if prediction.fits else "does not fit"
    said = f"{format_s(prediction.step_s)} a step; {_bytes(prediction.memory_bytes)} a rank: {fits}"
    *bars, memory_sum, time_sums = figure.data
    memory_bars, time_bars = bars[: len(MEMORY_PARTS)], bars[len(MEMORY_PARTS) :]
    with figure.batch_update():
        redraw(figure.layout, {"title.text": html.escape(title or said)})
        _redraw_memory(figure, memory_bars, memory_sum, prediction.memory, machine.rank_memory_bytes)
        _redraw_time(figure, time_bars, time_sums, prediction, measured, unmeasured)
        notes = [*_say_machine(machine), f"measured, hatched \\: {_AWAY}"]
        lines = wrapped(notes)[:_NOTE_LINES]
        redraw(figure.layout.annotations[-1], {"text": "<br>".join(map(html.escape, lines))})


def _redraw_memory(figure: Any, bars: Sequence[Any], sum_: Any, memory: Memory, has_bytes: float) -> None:
    total = memory.total_bytes
    is_far = has_bytes > _FAR * total
    end_bytes = _ROOM * (total if is_far else max(total, has_bytes))
    unit, unit_bytes = _unit_of(end_bytes)
    sizes = [(name, getattr(memory, f"{name}_bytes")) for name in MEMORY_PARTS]
    _redraw_bars(bars, [("predicted", name, size, _bytes(size)) for name, size in sizes], unit_bytes)
    redraw(sum_, {"x": [total / unit_bytes], "text": [f"  <b>{_bytes(total)}</b>"]})
    at, end = min(has_bytes, end_bytes) / unit_bytes, end_bytes / unit_bytes
    times = f", {float(f'{has_bytes / total:.3g}'):,g} times as much →" if is_far else ""
    redraw(figure.layout.shapes[0], {"x0": at, "x1": at, "opacity": 0 if is_far else 1})
    side = "right" if at > 0.5 * end else "left"
    said = f"a rank has {_bytes(has_bytes)}{times}"
    redraw(figure.layout.annotations[0], {"x": at, "text": said, "xanchor": side})
    says = f"memory of the rank that holds the most, in {unit}"
    redraw(figure.layout.xaxis, {"range": [0, end], "title.text": says})


def _redraw_time(
    figure: Any,
    bars: Sequence[Any],
    sums: Any,
    prediction: Prediction,
    measured: MeasuredParts | None,
    unmeasured: str,
) -> None:
    totals_s = prediction.step_s, sum(measured or (0.0,))
    unit, unit_s = unit_of(max(totals_s))
    end_s = _ROOM * max(totals_s)
    taken = [("predicted", name, getattr(prediction, f"{name}_s")) for name in PARTS]
    taken += [("measured", name, s) for name, s in zip(_MEASURED, measured or (0.0,) * 3, strict=True)]
    _redraw_bars(bars, [(*part, format_s(part[2])) for part in taken], unit_s)
    said = [f"  <b>{format_s(total_s)}</b>" if total_s else f"  {unmeasured}" for total_s in totals_s]
    redraw(sums, {"x": [total_s / unit_s for total_s in totals_s], "text": said})
    redraw(figure.layout.xaxis2, {"range": [0, end_s / unit_s], "title.text": f"one step: time in {unit}"})


def _redraw_bars(bars: Sequence[Any], parts: list[tuple[str, str, float, str]], unit: float) -> None:
    """Each part, (kind, name, length, in words), from where the one before of its kind ended."""
    before = dict.fromkeys([kind for kind, *_ in parts], 0.0)
    for bar, (kind, name, length, said) in zip(bars, parts, strict=True):
        at = {"x": [length / unit], "base": [before[kind] / unit]}
        redraw(bar, {**at, "text": [said if length else ""], "hovertext": [f"{name}, {kind}: {said}"]})
        before[kind] += length


def _add_bar(figure: Any, name: str, row: float, kind: str) -> None:
    look, is_time, is_predicted = _LOOKS[name], kind != "memory", kind != "measured"
    figure.add_bar(
        orientation="h",
        name=name,
        legend="legend2" if is_time else "legend",
        showlegend=is_predicted,
        y=[row],
        width=0.8,
        **BAR_TEXT,
        textfont={"size": 11, "color": "black" if is_predicted else look.text},
        hoverinfo="text",
        marker={
            "color": look.pale if is_predicted else look.fill,
            "line": {"color": "black", "width": 1.2 if is_predicted else 0.6},
            "pattern": {"shape": look.hatching, "fgcolor": "#444444", "size": 7, "solidity": 0.12},
        },
        xaxis="x2" if is_time else "x",
        yaxis="y2" if is_time else "y",
    )


def _say_machine(machine: Machine) -> Iterator[str]:
    """What stands behind the prediction."""
    what = f"{machine.name}: {format_rate(machine.flops_s, 'FLOP/s')} a device"
    launches = (("a layer", machine.launch_s), ("a collective", machine.call_s), ("an update", machine.update_launch_s))
    what += "".join(f", {format_s(seconds)} to launch {name}" for name, seconds in launches if seconds)
    yield f"{what}; link {machine.inside}" + (f"; between hosts {machine.between}" if machine.between else "")
    if machine.ranks_per_device > 1:
        yield f"{machine.ranks} ranks share {machine.num_devices} of them: times are not speed-ups"
    if machine.source:
        yield machine.source


def _bytes(size: float) -> str:
    return format_rate(size, "B")


def _unit_of(size: float) -> tuple[str, float]:
    return next(((f"{p}B", n) for p, n in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if size >= n), ("B", 1.0))
