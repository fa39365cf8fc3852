"""Where tensor parallelism stops paying: what cutting a block saves and costs, and what it does when it really runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mplab.errors import MplabError
from mplab.plan.cost import Link
from mplab.plan.tensor import Block, BlockTime, block_flops, block_traffic
from mplab.show.figures import graph_objects
from mplab.show.parts import (
    as_output,
    box_of,
    errors_in,
    grid,
    ipywidgets_module,
    paragraph,
    pressed,
    run_button,
    wide,
)
from mplab.show.tensor_figure import PAYING_WIDTHS, WIDTHS, say_link, tensor_times_figure
from mplab.show.tensor_step import MAX_RANKS, BlockRun, measure_block_speeds, median_time, ranks_up_to, run_block
from mplab.trace.units import format_s

SEQUENCES = (8, 16, 32, 64, 128, 256, 512)
HERE = "this machine"
SLOW = Link(1e-3, 1e8)
LINKS = (Link(5e-5, 5e9), Link(1e-4, 1e9), Link(2e-4, 5e8), Link(5e-4, 2e8), SLOW, Link(2e-3, 5e7), Link(5e-3, 1e7))
MAX_RUN_S = 10.0
LEVEL = 0.02  # times that differ by less are called equal
# What two figures differ in; an axis that is replaced as a whole loses its range in the browser.
_CHANGING = (
    *("title.text", "title.y", "legend.y", "height", "margin.t", "margin.b", "annotations"),
    *("yaxis.range", "xaxis2.range", "xaxis2.title.text", "yaxis2.ticktext"),
)


class TensorExplorer:
    """A block of the GPT cut over ranks: when that pays, over this machine's link and a slower one.

    Show it as the last expression of a cell; `box` is the widget. Every control can be moved with the arrow keys, and
    what is drawn is said in words.

    When it is made it measures what ranks of this machine compute and what their messages take. With every move it
    predicts forward and backward of a block, and from which width on several ranks are faster than one. The button
    really runs the chosen block, whole on one thread and cut over thread ranks, and draws what it measured below what
    it predicted.

    Args:
        world_size_max: the most ranks to choose from, 2 to 8.
        flops_s: what one rank computes, FLOPs a second; None: measured.
        link: of this machine; None: measured.
        width: at the start; the 8 heads divide it.
        sequence: tokens of the one sample, at the start.
        num_ranks: at the start, 2, 4 or 8.
        emulated: link at the start; None: this machine's own.
        num_runs: of the whole block and of the cut one, 1 or more, not counting a first one that warms up.

    Raises:
        MplabError: ipywidgets, plotly or anywidget is not installed; or a start that there is not.
    """

    def __init__(
        self,
        world_size_max: int = 4,
        flops_s: float | None = None,
        link: Link | None = None,
        width: int = 256,
        sequence: int = 64,
        num_ranks: int = 2,
        emulated: Link | None = SLOW,
        num_runs: int = 5,
    ) -> None:
        widgets, go = ipywidgets_module(), graph_objects()
        Block(1, sequence, width, MAX_RANKS)
        counts = ranks_up_to(world_size_max)
        if num_ranks not in counts or num_runs < 1:
            raise MplabError(
                f"num_ranks={num_ranks}, num_runs={num_runs}: of up to {world_size_max} ranks there are {counts} to "
                "choose from, and 1 run or more"
            )
        self.speeds = measure_block_speeds(world_size_max, flops_s, link)
        self._num_runs = num_runs
        links = sorted({*LINKS, *([] if emulated is None else [emulated])}, key=lambda link: link.time_s(1, 1 << 14))
        self._links = {HERE: None, **{say_link(each): each for each in links}}

        def slider(name: str, values: Iterable[Any], start: Any) -> Any:
            return widgets.SelectionSlider(options=list(values), value=start, description=name, **wide())

        self.width = slider("width", sorted({*WIDTHS, width}), width)
        self.sequence = slider("sequence", sorted({*SEQUENCES, sequence}), sequence)
        self.num_ranks = slider("ranks", counts, num_ranks)
        self.link = slider("link", self._links, HERE if emulated is None else say_link(emulated))
        does = f"Run the chosen block on this machine, {num_runs} times whole and as often cut"
        self.run_button = run_button("Run it", does)
        # Heights are kept free, so that the figure stays where it is while the texts change.
        self.words = widgets.HTML(layout={"min_height": "11em"})
        self.result = widgets.HTML(layout={"min_height": "8em"})
        self.words.value = paragraph("status", self.describe())
        self.figure = go.FigureWidget(self._figure(None))
        self.figure.update_layout(autosize=True)
        for control in (self.width, self.sequence, self.num_ranks, self.link):
            control.observe(self._changed, names="value")
        self.run_button.on_click(self._run)
        sliders = grid([self.width, self.num_ranks, self.sequence, self.link], 400)
        self.box = box_of([sliders, self.run_button, self.words, self.figure, self.result], self.figure)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return as_output(self, **kwargs)

    @property
    def block(self) -> Block:
        """The block that the sliders say: of one sample."""
        return Block(1, self.sequence.value, self.width.value, MAX_RANKS)

    @property
    def emulated(self) -> Link | None:
        """The link that the slider says; None: this machine's own."""
        return self._links[self.link.value]

    def predicted(self) -> tuple[BlockTime, BlockTime]:
        """What the block should take one rank, and all of them."""
        times = self.speeds
        return times.time_s(self.block, 1), times.time_s(self.block, self.num_ranks.value, self.emulated)

    def _figure(self, run: BlockRun | None) -> Any:
        return tensor_times_figure(self.block, self.num_ranks.value, self.speeds, self.emulated, run)

    def _draw(self, run: BlockRun | None = None) -> None:
        figure = self._figure(run)
        with self.figure.batch_update():
            for place, trace in zip(self.figure.data, figure.data, strict=True):
                place.update(trace.to_plotly_json(), overwrite=True)
            for part in _CHANGING:
                self.figure.layout[part] = figure.layout[part]

    def _changed(self, change: object) -> None:
        with errors_in(self.result):
            self.result.value = ""  # what was measured belonged to what was chosen before
            self.words.value = paragraph("status", self.describe())
            self._draw()

    # -- in words ------------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """The figure in words: what is computed and sent, what it should take, and from which width on it pays."""
        block, num_ranks = self.block, self.num_ranks.value
        serial, parallel = self.predicted()
        traffic, saved_s = block_traffic(block, num_ranks, 0), self.speeds.saved_s(block, num_ranks)
        saved = f"saves {format_s(saved_s)} of computing" if saved_s > 0 else "saves no computing"
        if self.emulated is None:
            over, where = "over this machine's link", self._pays(None)
        else:
            over = f"over an emulated link of {self.link.value}"
            where = f"{self._pays(self.emulated)} over this link, {self._pays(None)} over this machine's own"
        return "\n".join(
            [
                f"A block of the GPT, {block.sequence} tokens of width {block.width}, forward and backward: "
                f"{_flops(block_flops(block))} on 1 rank; {_flops(block_flops(block, num_ranks))} on each of "
                f"{num_ranks}, and rank 0 sends {traffic.num_sent} messages, {traffic.sent_bytes:,} bytes, {over}.",
                f"Predicted: {format_s(serial.total_s)} on 1 rank, {format_s(parallel.total_s)} on {num_ranks}. "
                f"Cutting it {saved} and costs {format_s(parallel.communication_s)} of messages: "
                f"{_verdict(serial, parallel, num_ranks)}.",
                f"With {block.sequence} tokens, {num_ranks} ranks pay {where}.",
            ]
        )

    def _pays(self, link: Link | None) -> str:
        width = self.speeds.smallest_paying_width(self.block, self.num_ranks.value, link, PAYING_WIDTHS)
        return f"from width {width} on" if width else f"at no width up to {PAYING_WIDTHS[-1]}"

    # -- the real thing ------------------------------------------------------------------------------------------------

    def _run(self, button: object) -> None:
        with pressed(self.run_button, self.result):
            all_s = (self._num_runs + 1) * sum(taken.total_s for taken in self.predicted())
            if all_s > MAX_RUN_S:
                raise MplabError(
                    f"{format_s(all_s)} are predicted for {self._num_runs + 1} blocks whole and as many cut, and the "
                    f"button stops at {format_s(MAX_RUN_S)}: take a faster link, a smaller width or a shorter sequence"
                )
            run = run_block(self.block, self.num_ranks.value, self.emulated, self._num_runs)
            self._draw(run)
            self.result.value = paragraph("status", self._result_words(run))

    def _result_words(self, run: BlockRun) -> str:
        num_ranks, predicted = self.num_ranks.value, self.predicted()
        serial, parallel = median_time(run.serial), median_time(run.parallel)
        verdicts = [_verdict(*times, num_ranks) for times in ((serial, parallel), predicted)]
        same = _outcome(serial, parallel) == _outcome(*predicted)
        counted = (run.num_messages, run.sent_bytes) == block_traffic(self.block, num_ranks, 0)[:2]
        return "\n".join(
            [
                f"It really ran, {self._num_runs} times each, medians. {_said('1 rank', run.serial, predicted[0])}. "
                f"{_said(f'{num_ranks} ranks', run.parallel, predicted[1])}; of that, messages and waiting for them "
                f"{format_s(parallel.communication_s)}, {format_s(predicted[1].communication_s)} predicted.",
                f"Measured: {verdicts[0]}. That is {'what was' if same else 'not what was'} predicted: {verdicts[1]}.",
                f"Rank 0 sent {run.num_messages} messages, {run.sent_bytes:,} bytes, "
                f"{'as' if counted else 'not as'} predicted. The outputs differ from those of the whole block by "
                f"{run.difference:.2g} at most.",
            ]
        )


def _flops(count: float) -> str:
    return f"{count / 1e9:.3g} GFLOP" if count >= 1e9 else f"{count / 1e6:.3g} MFLOP"


def _outcome(serial: BlockTime, parallel: BlockTime) -> int:
    """1: several ranks are faster than one; -1: slower; 0: level."""
    ratio = serial.total_s / parallel.total_s
    return (ratio > 1 + LEVEL) - (ratio < 1 / (1 + LEVEL))


def _verdict(serial: BlockTime, parallel: BlockTime, num_ranks: int) -> str:
    outcome, ratio = _outcome(serial, parallel), serial.total_s / parallel.total_s
    if outcome > 0:
        return f"it pays, {num_ranks} ranks are {ratio:.3g} times as fast as one"
    if outcome < 0:
        return f"it does not pay, {num_ranks} ranks take {1 / ratio:.3g} times as long as one"
    return f"{num_ranks} ranks are as fast as one"


def _said(who: str, times: list[BlockTime], predicted: BlockTime) -> str:
    middle_s, every_s = median_time(times).total_s, [taken.total_s for taken in times]
    return (
        f"{who}: {format_s(middle_s)} measured (from {format_s(min(every_s))} to {format_s(max(every_s))}), "
        f"{format_s(predicted.total_s)} predicted: {middle_s / predicted.total_s:.3g} times as long"
    )
