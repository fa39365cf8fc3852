"""Interactive figures: sliders, a figure, the same in words, and a button that really runs it."""

from __future__ import annotations

import math
from typing import Any

from mplab.errors import MplabError
from mplab.plan.cost import Link, all_reduce_times_s
from mplab.show.figures import (
    ALGORITHM_LOOKS,
    SIZES_BYTES,
    all_reduce_times,
    format_bytes,
    graph_objects,
    seconds_axis,
    spoken,
)
from mplab.show.parts import (
    as_output,
    box_of,
    grid,
    ipywidgets_module,
    paragraph,
    pressed,
    round_rate,
    round_s,
    run_button,
    wide,
)
from mplab.show.timing import time_all_reduce
from mplab.trace.units import format_s

NUM_RANKS = (2, 8)
LATENCIES_S = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
BANDWIDTHS_BYTES_S = (1e7, 2e7, 5e7, 1e8, 2e8, 5e8, 1e9, 2e9, 5e9, 1e10, 2e10, 5e10, 1e11)
MAX_RUN_S = 2.0  # of one run; the button makes four
TIE = 1.005  # predictions closer than this are called equal


class CollectiveExplorer:
    """All-reduce over 2 to 8 ranks: which algorithm wins at which size, over which link.

    Show it as the last expression of a cell; `box` is the widget. Every slider can be moved with the arrow keys, and
    what the figure shows is said in words above it.

    Args:
        num_ranks: at the start, 2 to 8.
        size_bytes: at the start; the nearest of 256 B to 16 MiB.
        latency_s: at the start; the nearest of 1 µs to 10 ms.
        bandwidth_bytes_s: at the start; the nearest of 10 MB/s to 100 GB/s.
        algorithm: at the start.

    Raises:
        MplabError: ipywidgets, plotly or anywidget is not installed, or ranks or an algorithm that there are not.
    """

    def __init__(
        self,
        num_ranks: int = 4,
        size_bytes: int = 1 << 20,
        latency_s: float = 1e-3,
        bandwidth_bytes_s: float = 1e8,
        algorithm: str = "ring",
    ) -> None:
        if not NUM_RANKS[0] <= num_ranks <= NUM_RANKS[1]:
            raise MplabError(f"num_ranks={num_ranks}: the explorer has {NUM_RANKS[0]} to {NUM_RANKS[1]}")
        if algorithm not in ALGORITHM_LOOKS:
            raise MplabError(f"algorithm={algorithm!r}: choose one of {', '.join(map(repr, ALGORITHM_LOOKS))}")
        widgets, go = ipywidgets_module(), graph_objects()
        self.num_ranks = widgets.IntSlider(num_ranks, *NUM_RANKS, description="ranks", continuous_update=True, **wide())
        self.size_bytes = _choices(widgets, "tensor", SIZES_BYTES, size_bytes, format_bytes)
        self.latency_s = _choices(widgets, "latency α", LATENCIES_S, latency_s, round_s)
        self.bandwidth_bytes_s = _choices(widgets, "bandwidth 1/β", BANDWIDTHS_BYTES_S, bandwidth_bytes_s, round_rate)
        self.algorithm = widgets.ToggleButtons(
            options=[(spoken(name), name) for name in ALGORITHM_LOOKS],
            value=algorithm,
            description="algorithm",
            style={"button_width": "130px", "description_width": "95px"},
        )
        self.button = run_button("Run it", "Run the chosen all-reduce on this machine")
        # Heights are kept free, so that the figure stays where it is while the texts change.
        self.words = widgets.HTML(layout={"min_height": "4.5em"})
        self.result = widgets.HTML(layout={"min_height": "4.8em"})
        self._measured: list[tuple[str, int, float]] = []
        self.figure = all_reduce_times(self.link, num_ranks, title=" ", plot_px=300)
        self.figure.update_layout(autosize=True, uirevision="keep")
        self.figure.add_scatter(
            mode="markers",
            name="your choice",
            marker={"size": 20, "color": "rgba(0, 0, 0, 0)", "line": {"color": "black", "width": 2.5}},
        )
        self.figure.add_scatter(
            mode="markers",
            name="measured",
            marker={"size": 11, "color": "white", "line": {"width": 2.5, "color": "black"}},
        )
        # A widget made of the finished figure: where a page asks for it late, as Voila does, what is drawn on it before
        # would be missing.
        self._redraw()
        self.figure = go.FigureWidget(self.figure)
        for control in (self.num_ranks, self.latency_s, self.bandwidth_bytes_s):
            control.observe(self._forget_measured, names="value")
        for control in (self.num_ranks, self.size_bytes, self.latency_s, self.bandwidth_bytes_s, self.algorithm):
            control.observe(self._redraw, names="value")
        self.button.on_click(self._run)
        sliders = grid([self.num_ranks, self.latency_s, self.size_bytes, self.bandwidth_bytes_s], 400)
        choice = widgets.HBox(
            [self.algorithm, self.button], layout={"align_items": "flex-end", "flex_flow": "row wrap"}
        )
        self.box = box_of([sliders, choice, self.words, self.result, self.figure], self.figure)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return as_output(self, **kwargs)

    @property
    def link(self) -> Link:
        """The emulated link that the sliders say."""
        return Link(self.latency_s.value, self.bandwidth_bytes_s.value)

    def predicted_s(self) -> dict[str, float]:
        """What every algorithm should take at the chosen point, in seconds."""
        return all_reduce_times_s(self.link, self.num_ranks.value, self.size_bytes.value)

    def _redraw(self, change: object = None) -> None:
        link, num_ranks, size = self.link, self.num_ranks.value, self.size_bytes.value
        curves = [all_reduce_times_s(link, num_ranks, x) for x in SIZES_BYTES]
        *lines, choice, measured = self.figure.data
        with self.figure.batch_update():
            for name, line in zip(ALGORITHM_LOOKS, lines, strict=True):
                line.y = [times[name] for times in curves]
            choice.x, choice.y = [size], [self.predicted_s()[self.algorithm.value]]
            measured.x = [x for _, x, _ in self._measured]
            measured.y = [y for _, _, y in self._measured]
            measured.marker.symbol = [ALGORITHM_LOOKS[name].symbol for name, _, _ in self._measured]
            measured.marker.line.color = [ALGORITHM_LOOKS[name].color for name, _, _ in self._measured]
            every = [t for times in curves for t in times.values()] + [y for _, _, y in self._measured]
            self.figure.layout.yaxis.range = seconds_axis(every)["range"]
            self.figure.layout.title.text = f"All-reduce over {num_ranks} ranks: predicted times"
        self.words.value = paragraph("status", self.describe())

    def describe(self) -> str:
        """The figure in words: which algorithm wins at the chosen point, and by how much."""
        times = self.predicted_s()
        best_s, chosen = min(times.values()), self.algorithm.value
        winners = [name for name in times if times[name] <= best_s * TIE]
        others = {name: t for name, t in times.items() if name not in winners}
        said = [
            f"{self.num_ranks.value} ranks, {format_bytes(self.size_bytes.value)}, "
            f"α = {round_s(self.latency_s.value)}, 1/β = {round_rate(self.bandwidth_bytes_s.value)}.",
            f"Predicted: {', '.join(f'{spoken(name)} {format_s(t)}' for name, t in times.items())}.",
        ]
        win = f"{_and(winners)} win{'s' if len(winners) == 1 else ', level'}"
        if others:
            second = min(others, key=others.__getitem__)
            win += f": {spoken(second)}, the next, takes {others[second] / best_s:.3g} times as long"
        said.append(win[0].upper() + win[1:] + ".")
        if chosen not in winners:
            said.append(f"Your choice, {spoken(chosen)}, takes {times[chosen] / best_s:.3g} times as long.")
        return " ".join(said)

    def _forget_measured(self, change: object) -> None:
        """What was measured belongs to its ranks and its link."""
        self._measured.clear()
        self.result.value = ""

    def _run(self, button: object) -> None:
        name, num_ranks, size, link = self.algorithm.value, self.num_ranks.value, self.size_bytes.value, self.link
        with pressed(self.button, self.result):
            predicted_s = self.predicted_s()[name]
            if predicted_s > MAX_RUN_S:
                raise MplabError(
                    f"{format_s(predicted_s)} are predicted, and the button stops at {format_s(MAX_RUN_S)}: "
                    "take a smaller tensor or a faster link"
                )
            timing = time_all_reduce(name, num_ranks, size, link)
            self._measured.append((name, size, timing.median_s))
            self._redraw()
            low, high = min(timing.times_s), max(timing.times_s)
            said = (
                f"{spoken(name)} really ran: {format_s(timing.median_s)} measured (median of {len(timing.times_s)}, "
                f"from {format_s(low)} to {format_s(high)}), {format_s(predicted_s)} predicted: "
                f"{timing.median_s / predicted_s:.3g} times as long. Rank 0 sent {timing.num_messages[0]} messages, "
                f"{timing.sent_bytes[0]:,} bytes. {'; '.join(timing.notes)}."
            )
            self.result.value = paragraph("status", said)


def _choices(widgets: Any, name: str, values: tuple[Any, ...], start: float, say: Any) -> Any:
    """A slider over values that stand in a table, at the one nearest to `start`."""
    nearest = min(values, key=lambda value: abs(math.log(value / start)))
    options = [(say(value), value) for value in values]
    return widgets.SelectionSlider(options=options, value=nearest, description=name, continuous_update=True, **wide())


def _and(names: list[str]) -> str:
    *first, last = map(spoken, names)
    return f"{', '.join(first)} and {last}" if first else last
