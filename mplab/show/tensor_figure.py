"""Where tensor parallelism pays: computing that it saves against messages that it costs, and one block in bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mplab.plan.cost import Link
from mplab.plan.tensor import Block, BlockTime
from mplab.show.figures import BAR_TEXT, FITTING_TEXT, LOOKS, BarLook, Look, graph_objects, lay_out, seconds_axis
from mplab.show.parts import round_rate, round_s
from mplab.show.tensor_step import BlockRun, BlockSpeeds, median_time
from mplab.trace.units import format_s, unit_of
from mplab.world.probe import format_rate

WIDTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
PAYING_WIDTHS = tuple(range(WIDTHS[0], WIDTHS[-1] + 1, 32))  # among which the smallest that pays is looked for
_PLOT_PX = 510
_SHORTEST_S = 1e-9  # that a logarithmic axis shows
_LEFT_PX, _RIGHT_PX = 120, 72  # of the axes: on the left they have long names, on the right stand sums
_ROWS = (0.0, 1.0, 2.3, 3.3)  # one rank predicted and measured, all ranks predicted and measured


_BARS = {
    "compute": BarLook("#0072B2", "#D5EAF7", "white", ""),
    "messages, and waiting for them": BarLook("#F5C26B", "#FDF3E0", "black", "/"),
}


def tensor_times_figure(
    block: Block,
    num_ranks: int,
    speeds: BlockSpeeds,
    emulated: Link | None = None,
    run: BlockRun | None = None,
    title: str = "",
) -> Any:
    """Over the width: what cutting a block saves each rank, and what its messages take; below, one block in bars.

    Tensor parallelism pays where the first line is above the second, and where that begins is marked for every link.

    Args:
        block: its own width is the one of the bars.
        num_ranks: over which it is cut.
        speeds: of this machine.
        emulated: a slower link, drawn beside this machine's; the bars are over it.
        run: of this very block over the same link: drawn below what was predicted.
        title: above the figure; by default it says where it pays.

    Raises:
        MplabError: plotly is not installed, or a number of ranks that does not divide the heads.
    """
    go = graph_objects()
    figure = go.Figure()
    links = {"this machine": None} | ({} if emulated is None else {say_link(emulated): emulated})
    _draw_lines(figure, block, num_ranks, speeds, links)
    predicted = [speeds.time_s(block, 1), speeds.time_s(block, num_ranks, emulated)]
    measured = [] if run is None else [median_time(run.serial), median_time(run.parallel)]
    _draw_bars(figure, num_ranks, predicted, measured)
    num_cores = speeds.machine.num_cores
    notes = [
        f"computing saved: 1 rank's, less that of each of {num_ranks} ranks; no line where it is none",
        say_machine(speeds, num_ranks),
        f"{num_ranks} ranks share {_cores(num_cores)}: times are not speed-ups"
        if num_ranks > num_cores
        else f"{num_ranks} ranks, a core each",
        f"emulated link: {say_link(emulated)}" if emulated is not None else "messages go through memory",
    ]
    title = title or _title(block, num_ranks, speeds, emulated)
    return lay_out(figure, _PLOT_PX, title, notes, _LEFT_PX, _RIGHT_PX)


def say_link(link: Link) -> str:
    """A link in few words: "1 ms, 100 MB/s"."""
    rate = "any bandwidth" if math.isinf(link.bandwidth_bytes_s) else round_rate(link.bandwidth_bytes_s)
    return f"{round_s(link.latency_s)}, {rate}"


def say_machine(speeds: BlockSpeeds, num_ranks: int) -> str:
    """What stands behind the predictions for one rank and for several."""
    here, who = speeds.machine, {1: "1 rank", num_ranks: f"each of {num_ranks} at once"}
    said = [f"{here.cpu}, {_cores(here.num_cores)}"]
    for n, name in who.items():
        python = f" and {format_s(speeds.python_s[n])} of Python a block" * (speeds.python_s[n] > 0)
        said.append(f"{name}: {format_rate(speeds.flops_s[n], 'FLOP/s')}{python}")
    bytes_s = speeds.link.bandwidth_bytes_s
    rate = "any bandwidth" if math.isinf(bytes_s) else format_rate(bytes_s, "B/s")
    said.append(f"messages: α {format_s(speeds.link.latency_s)}, 1/β {rate}")
    if (here.load or 0) > here.num_cores:
        said.append(f"the load was {here.load:g}: idle, it is faster")
    return f"this machine: {'; '.join(said)}"


def _cores(count: int) -> str:
    return f"{count} core{'s' * (count > 1)}"


def _title(block: Block, num_ranks: int, speeds: BlockSpeeds, emulated: Link | None) -> str:
    width = speeds.smallest_paying_width(block, num_ranks, emulated, PAYING_WIDTHS)
    where = f"pay from width {width} on" if width else f"pay at no width up to {PAYING_WIDTHS[-1]}"
    over = _over(emulated).replace(" ", "\xa0")  # it stays on one line
    return f"{num_ranks} ranks {where}: {block.batch_size * block.sequence:,} tokens, {over}"


def _over(emulated: Link | None) -> str:
    return "this machine's link" if emulated is None else say_link(emulated)


# --- lines over the width ---------------------------------------------------------------------------------------------


def _draw_lines(figure: Any, block: Block, num_ranks: int, speeds: BlockSpeeds, links: dict[str, Link | None]) -> None:
    """What is saved, the messages over one link or two, and the chosen width: always as many lines."""

    def messages_s(width: int, link: Link | None) -> float:
        seconds = speeds.time_s(replace(block, width=width), num_ranks, link).communication_s
        return max(seconds, _SHORTEST_S)

    def saved_s(width: int) -> float | None:
        seconds = speeds.saved_s(replace(block, width=width), num_ranks)
        return seconds if seconds > 0 else None  # a logarithm has no place for what is lost

    def add(times_s: Sequence[float | None], look: Look, name: str) -> None:
        figure.add_scatter(
            x=WIDTHS[: len(times_s)],
            y=times_s,
            mode="lines+markers",
            line={"color": look.color, "dash": look.dash, "width": 2.5},
            marker={"symbol": look.symbol, "size": 7},
            name=name,
            showlegend=bool(times_s),
            hovertext=[f"width {w}: {format_s(t or 0)}" for w, t in zip(WIDTHS, times_s, strict=False)],
            hoverinfo="text",
        )

    saved = [saved_s(width) for width in WIDTHS]
    costs = [[messages_s(width, link) for width in WIDTHS] for link in links.values()]
    *looks, saved_look = LOOKS[:3]
    add(saved, saved_look, "computing saved")
    for look, name, times_s in zip(looks, [*links, ""], [*costs, []], strict=False):
        add(times_s, look, f"messages, {name}")
    chosen = saved_s(block.width), messages_s(block.width, [*links.values()][-1])
    figure.add_scatter(
        x=[block.width] * 2,
        y=chosen,
        mode="markers",
        name="your width",
        marker={"size": 18, "color": "rgba(0, 0, 0, 0)", "line": {"color": "black", "width": 2.5}},
        hoverinfo="skip",
    )
    low_s = min(map(min, costs)) / 4  # with room for a label below the lowest line; what is saved may begin anywhere
    axis = seconds_axis([low_s, *(t for t in saved if t and t > low_s), *(t for times_s in costs for t in times_s)])
    margin = 0.03 * math.log10(WIDTHS[-1] / WIDTHS[0])
    figure.update_layout(
        xaxis={
            "type": "log",
            "title": {"text": "width of the block", "standoff": 4},
            "tickvals": WIDTHS,
            "ticktext": ["" if i % 2 else str(width) for i, width in enumerate(WIDTHS)],
            "tickangle": 0,
            "tickfont": {"size": 11},
            "range": [math.log10(WIDTHS[0]) - margin, math.log10(WIDTHS[-1]) + margin],
            "anchor": "y",
        },
        yaxis={**axis, "domain": [0.53, 1]},
    )
    for (name, link), is_above in zip(links.items(), (False, True), strict=False):
        pays = speeds.smallest_paying_width(block, num_ranks, link, PAYING_WIDTHS)
        if pays is not None:
            _mark(figure, pays, messages_s(pays, link), name, is_above)


def _mark(figure: Any, width: int, seconds: float, link: str, is_above: bool) -> None:
    """An arrow to where two lines cross. Above it there is room on its left, below it on its right."""
    is_left = width >= 160 if is_above else width > 900
    figure.add_annotation(
        x=math.log10(width),
        y=math.log10(seconds),
        text=f"pays from {width} on",
        hovertext=f"over {link}",
        ax=-14 if is_left else 14,
        ay=-30 if is_above else 30,
        xanchor="right" if is_left else "left",
        arrowhead=2,
        arrowwidth=1.5,
        bgcolor="rgba(255, 255, 255, 0.85)",
        bordercolor="black",
        borderpad=2,
    )


# --- one block in bars ------------------------------------------------------------------------------------------------


def _draw_bars(figure: Any, num_ranks: int, predicted: Sequence[BlockTime], measured: Sequence[BlockTime]) -> None:
    longest_s = max(taken.total_s for taken in (*predicted, *measured))
    unit, unit_s = unit_of(longest_s)
    end = longest_s * 1.02
    kinds = (("predicted", predicted, _ROWS[::2]), ("measured", measured, _ROWS[1::2]))
    for kind, times, rows in kinds:
        for number, (name, look) in enumerate(_BARS.items()):
            lengths_s = [taken[number] for taken in times]
            is_predicted = kind == "predicted"
            figure.add_bar(
                orientation="h",
                name=name,
                legend="legend2",
                showlegend=is_predicted,
                y=rows[: len(times)],
                x=[t / unit_s for t in lengths_s],
                base=[number * taken.compute_s / unit_s for taken in times],
                width=0.86,
                text=[format_s(t) if t else "" for t in lengths_s],
                **BAR_TEXT,
                textfont={"size": 11, "color": "black" if is_predicted else look.text},
                hovertext=[
                    f"{who}, {kind}: {name}, {format_s(t)}"
                    for who, t in zip(("1 rank", f"{num_ranks} ranks"), lengths_s, strict=False)
                ],
                hoverinfo="text",
                marker={
                    "color": look.pale if is_predicted else look.fill,
                    "line": {"color": "black", "width": 1.2 if is_predicted else 0.6},
                    "pattern": {"shape": look.hatching, "fgcolor": "#444444", "size": 7, "solidity": 0.12},
                },
                xaxis="x2",
                yaxis="y2",
            )
    sums = [(row, times[i].total_s if times else 0.0) for _, times, rows in kinds for i, row in enumerate(rows)]
    figure.add_scatter(
        x=[t / unit_s for _, t in sums],
        y=[row for row, _ in sums],
        text=[f"  <b>{format_s(t)}</b>" if t else "  not measured yet" for _, t in sums],
        mode="text",
        cliponaxis=False,
        textposition="middle right",
        textfont={"size": 12},
        hoverinfo="skip",
        showlegend=False,
        xaxis="x2",
        yaxis="y2",
    )
    who = ("1 rank", f"{num_ranks} ranks")
    figure.update_layout(
        barmode="overlay",
        uniformtext=FITTING_TEXT,
        legend2={"orientation": "h", "x": 0, "y": 0.315, "yanchor": "bottom"},
        xaxis2={
            "title": {"text": f"block forward and backward, in {unit}", "standoff": 6},
            "range": [0, end / unit_s],
            "anchor": "y2",
        },
        yaxis2={
            "tickvals": _ROWS,
            "ticktext": [f"{who[i // 2]}, {('predicted', 'measured')[i % 2]}" for i in range(4)],
            "range": [_ROWS[-1] + 0.55, _ROWS[0] - 0.55],
            "domain": [0, 0.305],
            "anchor": "x2",
        },
    )
