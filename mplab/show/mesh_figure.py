"""The mesh of a plan: its ranks, the groups of every axis, and who talks to whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from mplab.comm.mesh import AXES, Mesh
from mplab.plan.layout import Plan
from mplab.show.figures import graph_objects, lay_out

MOST_COLUMNS, MOST_STAGES = 16, 8  # that are drawn
_MOST_GROUPS = 8  # that are listed in words
_ROW_PX = 78  # of a stage
_ARC = 0.30  # height of the first part's arc over the row, in rows


class AxisLook(NamedTuple):
    """How an axis is drawn: told apart by colour, by dashes and width, and by direction. After Okabe and Ito."""

    name: str
    color: str
    dash: str
    width_px: float


AXIS_LOOKS = {
    "dp": AxisLook("data", "#00775B", "dot", 2.5),
    "pp": AxisLook("pipeline", "#0072B2", "dash", 3.0),
    "tp": AxisLook("tensor", "#D55E00", "solid", 7.0),
}


def mesh_figure(plan: Plan, title: str = "") -> Any:
    """The ranks of a plan: replicas side by side, stages below each other, the parts of a layer beside each other.

    Args:
        plan: its degrees decide; of very many ranks some are drawn, and the figure says which.
        title: above the figure; by default it has the degrees.

    Raises:
        MplabError: plotly is not installed.
    """
    go = graph_objects()
    mesh, figure = Mesh(plan.dp, plan.pp, plan.tp), go.Figure()
    num_parts, num_stages = min(plan.tp, MOST_COLUMNS // 2), min(plan.pp, MOST_STAGES)
    num_replicas = min(plan.dp, MOST_COLUMNS // num_parts)
    places = [(d, p, t) for d in range(num_replicas) for p in range(num_stages) for t in range(num_parts)]
    for axis in AXES[::-1]:
        x, y = _lines(axis, places, num_parts)
        if x:
            look = AXIS_LOOKS[axis]
            figure.add_scatter(
                x=x,
                y=y,
                mode="lines",
                name=f"{look.name} axis",
                line={"color": look.color, "dash": look.dash, "width": look.width_px},
                hoverinfo="skip",
            )
    ranks = [mesh.rank(*place) for place in places]
    columns = num_replicas * (num_parts + 1) - 1
    figure.add_scatter(
        x=[_x(place, num_parts) for place in places],
        y=[p for _, p, _ in places],
        text=[str(rank) for rank in ranks],
        mode="markers+text",
        marker={"size": 34 if columns <= 9 else 21, "color": "white", "line": {"color": "black", "width": 1.5}},
        textfont={"size": 13 if columns <= 9 else 9},
        hovertext=["<br>".join(_of_rank(mesh, rank)) for rank in ranks],
        hoverinfo="text",
        showlegend=False,
    )
    for d in range(num_replicas):
        left = d * (num_parts + 1) - 0.5
        box = {"x0": left, "x1": left + num_parts, "y0": -0.5, "y1": num_stages - 0.5}
        figure.add_shape(**box, type="rect", line={"color": "#777777", "width": 1}, layer="below")
        figure.add_annotation(
            x=left + num_parts / 2, y=-0.5, yanchor="bottom", text=f"replica {d}", showarrow=False, font={"size": 12}
        )
    figure.update_layout(
        xaxis={"visible": False, "range": [-0.7, columns - 0.3], "fixedrange": True},
        yaxis={
            "tickvals": list(range(num_stages)),
            "ticktext": [_stage(plan, p) for p in range(num_stages)],
            "range": [num_stages - 0.4, -0.85],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
    )
    shown = (num_replicas, num_stages, num_parts)
    notes = [*mesh_words(plan).split("\n"), *_left_out(plan, shown)]
    degrees = f"{plan.dp} x {plan.pp} x {plan.tp}"
    said = f"{_count(plan.num_ranks, 'rank')}: dp x pp x tp = {degrees}"
    figure = lay_out(figure, 40 + _ROW_PX * num_stages, title or said, notes, 88)
    figure.layout.annotations[-1].yshift = -12  # there is no axis above the notes
    return figure.update_layout(
        height=figure.layout.height - 40, margin_b=figure.layout.margin.b - 40, plot_bgcolor="white"
    )


def mesh_words(plan: Plan) -> str:
    """The figure in words: the groups of every axis, what they send each other, and how often.

    Args:
        plan: its degrees, and what decides on its messages.
    """
    mesh = Mesh(plan.dp, plan.pp, plan.tp)
    said = {
        "tp": "each holds a part of the same layers; "
        + ("reduce-scatters and all-gathers" if plan.sequence_parallel else "all-reduces")
        + " in every layer, forward and backward, for every micro-batch",
        "pp": "each holds other layers; a stage sends its output to the next one and gets the gradient back, for every "
        "micro-batch",
        "dp": "each holds the same part of the same stage; " + _REPLICAS[plan.zero],
    }
    lines = [f"{_count(plan.num_ranks, 'rank')}: rank = (d * {plan.pp} + p) * {plan.tp} + t."]
    for axis in AXES[::-1]:
        groups, name = mesh.groups(axis), AXIS_LOOKS[axis].name.capitalize()
        if len(groups[0]) == 1:
            lines.append(f"{name} axis: 1 rank, nothing to send.")
            continue
        listed = ", ".join(_members(group) for group in groups[:_MOST_GROUPS])
        more = ", …" * (len(groups) > _MOST_GROUPS)
        apart = groups[0][1] - groups[0][0]
        where = "neighbours" if apart == 1 else f"{apart} apart"
        many = f"{_count(len(groups), 'group')} of {len(groups[0])} ranks, {where}"
        lines.append(f"{name} axis, {many}: {listed}{more}: {said[axis]}.")
    return "\n".join(lines)


_REPLICAS = (
    "gradients are added up once a step (all-reduce)",
    "gradients are reduce-scattered and new weights all-gathered, once a step",
    "every layer's gradients are reduce-scattered in the backward, and new weights all-gathered once a step",
    "every layer's weights are all-gathered before they are used, and its gradients reduce-scattered in the backward",
)


def _lines(axis: str, places: list[tuple[int, int, int]], num_parts: int) -> tuple[list[float | None], list[Any]]:
    """From every rank to the next one on an axis; between replicas as an arc over the row."""
    x: list[float | None] = []
    y: list[Any] = []
    for place in places:
        following = tuple(number + (axis == name) for name, number in zip(AXES, place, strict=True))
        if following not in places:
            continue
        ends = _x(place, num_parts), _x(following, num_parts)
        if axis == "dp":
            height = _ARC + 0.12 * place[2] / num_parts
            for i in range(13):
                along = i / 12
                x.append(ends[0] + along * (ends[1] - ends[0]))
                y.append(place[1] - height * 4 * along * (1 - along))
        else:
            x += ends
            y += [place[1], following[1]]
        x.append(None)
        y.append(None)
    return x, y


def _x(place: tuple[int, ...], num_parts: int) -> float:
    d, _, t = place
    return d * (num_parts + 1) + t


def _stage(plan: Plan, p: int) -> str:
    if plan.pp == 1:
        return "all layers"
    return f"stage {p}" if plan.num_stages == plan.pp else f"stages {p}, {p + plan.pp}"


def _of_rank(mesh: Mesh, rank: int) -> Iterator[str]:
    place = mesh.coordinates(rank)
    yield f"<b>rank {rank}</b>: replica {place['dp']}, stage {place['pp']}, part {place['tp']}"
    for axis in AXES[::-1]:
        group = [mesh.rank(**{**place, axis: i}) for i in range(getattr(mesh, axis))]
        if len(group) > 1:
            yield f"{AXIS_LOOKS[axis].name} axis: ranks {_members(group)}"


def _members(group: list[int]) -> str:
    if len(group) <= _MOST_GROUPS:
        return str(group)
    return f"[{group[0]}, {group[1]}, … {group[-1]}]"


def _left_out(plan: Plan, shown: tuple[int, int, int]) -> Iterator[str]:
    degrees = zip(("replicas", "stages", "parts of a layer"), shown, (plan.dp, plan.pp, plan.tp), strict=True)
    fewer = [f"{drawn} of {degree} {what}" for what, drawn, degree in degrees if drawn < degree]
    if fewer:
        yield f"drawn: {', '.join(fewer)}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number > 1)}"
