"""All plans at once: what a step of each was predicted to take, and what it took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from mplab.errors import MplabError
from mplab.parallel.measure_plans import rank_correlation
from mplab.plan.layout import Plan
from mplab.plan.predict import Prediction
from mplab.show.figures import LOOKS, graph_objects, lay_out, seconds_axis
from mplab.trace.units import columns, format_s, unit_of

_PLOT_PX = 420
_KINDS = ("data axis alone", "pipeline axis alone", "tensor axis alone", "several axes, or none")


def plans_figure(
    predictions: Sequence[Prediction],
    measured_s: Mapping[Plan, Sequence[float]],
    title: str = "",
    notes: Sequence[str] = (),
) -> Any:
    """Every plan a mark: predicted step time across, measured up, its median with the range of all rounds.

    On the dashed line a plan takes what was predicted. The plan that was predicted to be the fastest and the one that
    was measured to be it have rings around them.

    Args:
        predictions: of the plans, in any order; those that were not measured are left out.
        measured_s: seconds of a step of each plan, as `mplab.parallel.measure_plans` gives them.
        title: above the figure; by default it compares these two plans.
        notes: what the times cannot prove, such as `world.notes`.

    Raises:
        MplabError: plotly is not installed, or none of the plans was measured.
    """
    shown = _measured(predictions, measured_s)
    go = graph_objects()
    figure = go.Figure()
    medians = {p.plan: median(measured_s[p.plan]) for p in shown}
    predicted = {p.plan: p.step_s for p in shown}
    for kind, look in zip(_KINDS, (LOOKS[1], LOOKS[2], LOOKS[0], LOOKS[3]), strict=True):
        plans = [plan for plan in medians if _kind(plan) == kind]
        if not plans:
            continue
        figure.add_scatter(
            x=[predicted[plan] for plan in plans],
            y=[medians[plan] for plan in plans],
            mode="markers",
            name=kind,
            marker={"symbol": look.symbol, "color": look.color, "size": 10, "line": {"color": "black", "width": 0.8}},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [max(measured_s[plan]) - medians[plan] for plan in plans],
                "arrayminus": [medians[plan] - min(measured_s[plan]) for plan in plans],
                "color": "#777777",
                "thickness": 1,
                "width": 3,
            },
            hovertext=[_hover(plan, predicted[plan], measured_s[plan]) for plan in plans],
            hoverinfo="text",
        )
    every = [*predicted.values(), *(s for plan in medians for s in measured_s[plan])]
    axis = seconds_axis([min(every), max(every) * 1.0001])
    axis["range"] = [math.log10(min(every)) - 0.08, math.log10(max(every)) + 0.08]
    ends = [10**exponent for exponent in axis["range"]]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", name="as predicted", line={"color": "black", "dash": "dash", "width": 1}
    )
    first, best = shown[0].plan, min(medians, key=medians.__getitem__)
    rings = {"first predicted": first} | {"best measured": best}
    if first == best:
        rings = {"first predicted, best measured": first}
    for (name, plan), symbol in zip(rings.items(), ("circle", "square"), strict=False):
        line = {"color": "black", "width": 2.5}
        ring = {"symbol": symbol, "size": 21, "color": "rgba(0, 0, 0, 0)", "line": line}
        at = {"x": [predicted[plan]], "y": [medians[plan]]}
        figure.add_scatter(**at, mode="markers", name=name, marker=ring, hoverinfo="skip")
    figure.update_layout(
        xaxis={**axis, **_marks(ends), "title": {"text": "predicted time of a step", "standoff": 6}},
        yaxis={**axis, **_marks(ends), "title": {"text": "measured time of a step", "standoff": 4}},
    )
    many, ratio = f"{len(shown)} plan{'s' * (len(shown) > 1)}", medians[first] / medians[best]
    remarks = [f"first predicted: {first}: {format_s(predicted[first])} predicted, {format_s(medians[first])} measured"]
    if first != best:
        remarks.append(
            f"best measured: {best}: {format_s(predicted[best])} predicted, {format_s(medians[best])} measured"
        )
    if len(shown) > 2:
        order = rank_correlation(list(predicted.values()), list(medians.values()))
        remarks.append(f"rank correlation of predicted and measured times (Spearman): {order:.2f}")
    remarks.append("marks: medians; lines through them: from the fastest round to the slowest")
    return lay_out(
        figure,
        _PLOT_PX,
        title or f"{many}: the one predicted first takes {ratio:.2f} times the best",
        [*remarks, *notes],
    )


def plans_table(predictions: Sequence[Prediction], measured_s: Mapping[Plan, Sequence[float]]) -> str:
    """The figure in words: a line for every plan, the one that was predicted to be the fastest first.

    Args:
        predictions: of the plans, in any order; those that were not measured are left out.
        measured_s: seconds of a step of each plan, as `mplab.parallel.measure_plans` gives them.

    Raises:
        MplabError: none of the plans was measured.
    """
    rows = [["predicted", "measured", "measured / predicted", "fastest round", "slowest", "plan"]]
    for p in _measured(predictions, measured_s):
        times = measured_s[p.plan]
        middle, low, high = median(times), min(times), max(times)
        ratio = f"{middle / p.step_s:.2f}"
        rows.append([format_s(p.step_s), format_s(middle), ratio, format_s(low), format_s(high), str(p.plan)])
    return columns(rows, "rrrrrl")


def _measured(predictions: Sequence[Prediction], measured_s: Mapping[Plan, Sequence[float]]) -> list[Prediction]:
    """Those of plans that were measured, the fastest first."""
    shown = sorted((p for p in predictions if measured_s.get(p.plan)), key=lambda p: p.step_s)
    if not shown:
        raise MplabError(
            f"{len(predictions)} predictions and {len(measured_s)} measured plans have no plan in common: predict "
            "those that were measured"
        )
    return shown


def _kind(plan: Plan) -> str:
    used = [degree > 1 for degree in (plan.dp, plan.pp, plan.tp)]
    return _KINDS[used.index(True)] if sum(used) == 1 else _KINDS[3]


def _hover(plan: Plan, predicted_s: float, times_s: Sequence[float]) -> str:
    spread = f"from {format_s(min(times_s))} to {format_s(max(times_s))}"
    return f"<b>{plan}</b><br>predicted {format_s(predicted_s)}<br>measured {format_s(median(times_s))}, {spread}"


def _marks(ends: Sequence[float]) -> dict[str, Any]:
    """1, 2 and 5 of every power of ten that the axis has."""
    marks = [digit * 10.0**k for k in range(-9, 4) for digit in (1, 2, 5)]
    marks = [mark for mark in marks if ends[0] <= mark <= ends[1]]
    return {"tickvals": marks, "ticktext": [_short(mark) for mark in marks]}


def _short(seconds: float) -> str:
    name, size = unit_of(seconds / 0.999)
    return f"{seconds / size:.3g} {name}"
