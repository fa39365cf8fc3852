"""Buckets of gradients: what their size, the link and overlap should give, and what they give when it really runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mplab.datasets import Batch
from mplab.errors import MplabError
from mplab.models import cross_entropy
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.serial import LossFunction
from mplab.plan.cost import Link
from mplab.show.bucket_step import BucketStep, Run, Setting, hidden_share, messages_s, stalled_s
from mplab.show.figures import format_bytes
from mplab.show.parts import (
    as_output,
    box_of,
    errors_in,
    grid,
    ipywidgets_module,
    paragraph,
    pressed,
    round_rate,
    round_s,
    run_button,
    wide,
)
from mplab.show.redraw import Timelines
from mplab.trace.timeline import Timeline
from mplab.trace.units import format_s
from mplab.world import World

ONE_A_PARAMETER = 1  # byte: every parameter is larger, and has a bucket of its own
BUCKETS_BYTES = (ONE_A_PARAMETER, *(1 << k for k in range(12, 27)))  # 4 KiB to 64 MiB
LATENCIES_S = (0.0, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
MEMORY = math.inf  # bytes a second: no emulated link
BANDWIDTHS_BYTES_S = (1e7, 2e7, 5e7, 1e8, 2e8, 5e8, 1e9, 2e9, 5e9, 1e10, MEMORY)
MAX_RUN_S = 10.0


class BucketExplorer:
    """Data parallelism in buckets: their size, a link and the overlap, what they should cost, and a button that trains.

    Show it as the last expression of a cell; `box` is the widget. Every control can be moved with the arrow keys, and
    what is drawn is said in words.

    When it is made it measures what a step computes, on all ranks at once and without messages. With every move it
    predicts the step: messages take α + β·B and leave as soon as their gradients are there. The button trains a fresh
    copy of the model for some steps on these ranks, and draws the one of median length below its prediction.

    Args:
        model: any module; it is copied, never changed.
        world: of 2 ranks or more; its emulated link is where the sliders begin.
        batch: inputs and targets; every step trains on it.
        bucket_bytes: at the start.
        overlap: at the start.
        loss_fn: outputs and targets -> mean loss over the samples.
        optimizer: makes an optimizer of parameters.
        num_steps: of one run, 2 or more: the first does not count.

    Raises:
        MplabError: ipywidgets, plotly or anywidget is not installed; or ranks, samples or a start that there are not.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        batch: Batch,
        bucket_bytes: int = 1 << 16,
        overlap: bool = True,
        loss_fn: LossFunction = cross_entropy,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        num_steps: int = 5,
    ) -> None:
        widgets = ipywidgets_module()
        _check_start(world, batch, bucket_bytes, num_steps)
        self._step, self._num_steps, self._num_ranks = (
            BucketStep(model, world, batch, loss_fn, optimizer),
            num_steps,
            world.size,
        )
        link = world.link or Link(0.0, MEMORY)

        def slider(name: str, values: Iterable[float], start: float, say: Any) -> Any:
            options = [(say(value), value) for value in sorted({*values, start})]
            return widgets.SelectionSlider(options=options, value=start, description=name, **wide())

        self.bucket_bytes = slider("bucket", BUCKETS_BYTES, bucket_bytes, _size)
        self.latency_s = slider("latency α", LATENCIES_S, link.latency_s, round_s)
        self.bandwidth_bytes_s = slider("bandwidth 1/β", BANDWIDTHS_BYTES_S, link.bandwidth_bytes_s, _rate)
        self.overlap = widgets.Checkbox(
            overlap, description="overlap with backward", indent=False, layout={"width": "200px"}
        )
        self.run_button = run_button("Run", f"Train {num_steps} steps on this machine with these settings")
        # Heights are kept free, so that the figure stays where it is while the texts change.
        self.words = widgets.HTML(layout={"min_height": "9.6em"})
        self.result = widgets.HTML(layout={"min_height": "9.6em"})
        self._predicted = self._say()
        self._timelines = Timelines(self._predicted)
        self.figure = self._timelines.widget
        for control in (self.bucket_bytes, self.latency_s, self.bandwidth_bytes_s, self.overlap):
            control.observe(self._changed, names="value")
        self.run_button.on_click(self._run)
        row = widgets.HBox([self.overlap, self.run_button], layout={"align_items": "center"})
        sliders = grid([self.bucket_bytes, self.latency_s, self.bandwidth_bytes_s, row], 400)
        self.box = box_of([sliders, self.words, self.figure, self.result], self.figure)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return as_output(self, **kwargs)

    @property
    def setting(self) -> Setting:
        """What the controls say."""
        latency_s, bandwidth_bytes_s = self.latency_s.value, self.bandwidth_bytes_s.value
        is_memory = not latency_s and bandwidth_bytes_s == MEMORY
        link = None if is_memory else Link(latency_s, bandwidth_bytes_s)
        return Setting(self.bucket_bytes.value, link, self.overlap.value)

    def predicted(self) -> Timeline:
        """The step that the setting should give."""
        return self._step.predict(self.setting)

    def _changed(self, change: object) -> None:
        with errors_in(self.result):
            self.result.value = ""  # what was measured belonged to what was chosen before
            self._predicted = self._say()
            self._timelines.draw(self._predicted)

    # -- in words ------------------------------------------------------------------------------------------------------

    def _say(self) -> Timeline:
        predicted = self.predicted()
        self.words.value = paragraph("status", self._words(predicted))
        return predicted

    def describe(self) -> str:
        """The prediction in words: the buckets, the parts of the step, and what overlap has to do with it."""
        return self._words(self.predicted())

    def _words(self, predicted: Timeline) -> str:
        setting, work = self.setting, self._step.work
        sizes = [bucket.num_bytes for bucket in self._step.buckets(setting)]
        traffic = self._step.traffic(setting)
        link = "through memory"
        if setting.link is not None:
            rate = _rate(setting.link.bandwidth_bytes_s).replace("memory", "any bandwidth")
            link = f"over an emulated link of {round_s(setting.link.latency_s)} and {rate}"
        each = f"{format_bytes(min(sizes))} to {format_bytes(max(sizes))}" if len(sizes) > 1 else "all of it"
        said = [
            f"{self._num_ranks} ranks, {format_bytes(sum(sizes))} of gradients in {_buckets(len(sizes))} ({each}), "
            f"{link}; {'with' if setting.overlap else 'without'} overlap. A step: rank 0 sends "
            f"{sum(t.num_sent for t in traffic):,} messages, {sum(t.sent_bytes for t in traffic):,} bytes.",
            f"Predicted: {format_s(predicted.makespan_s)} a step. Forward {format_s(work.forward_s)}, backward "
            f"{format_s(work.backward_s)}, update {format_s(work.update_s)}, as measured without messages; "
            f"{self._messages(predicted)}.",
        ]
        if setting.link is not None:
            other = self._step.predict(setting._replace(overlap=not setting.overlap))
            said.append(
                f"The ranks wait {format_s(stalled_s(predicted, 0))} for them. "
                f"{'Without' if setting.overlap else 'With'} overlap: {format_s(other.makespan_s)} a step, of which "
                f"they wait {format_s(stalled_s(other, 0))}."
            )
        return "\n".join(said)

    def _messages(self, step: Timeline) -> str:
        longest_s = max(messages_s(step, rank) for rank in range(step.num_ranks))
        if not longest_s:
            return "messages take no time"
        return f"messages {format_s(longest_s)}, {100 * hidden_share(step):.0f} % of that hidden behind backward"

    # -- the real thing ------------------------------------------------------------------------------------------------

    def _run(self, button: object) -> None:
        with pressed(self.run_button, self.result):
            all_s = self._num_steps * self._predicted.makespan_s
            if all_s > MAX_RUN_S:
                raise MplabError(
                    f"{format_s(all_s)} are predicted for {self._num_steps} steps, and the button stops at "
                    f"{format_s(MAX_RUN_S)}: take a faster link, or larger buckets where latency weighs"
                )
            run = self._step.run(self.setting, self._num_steps)
            self._timelines.draw(self._predicted, run.step)
            self.result.value = paragraph("status", self._result_words(run))

    def _result_words(self, run: Run) -> str:
        measured_s, predicted_s = (max(e.end_s for e in t.events) for t in (run.step, self._predicted))
        ranks = range(self._num_ranks)
        backward_s = [sum(e.duration_s for e in run.step.rank(r) if e.name == "backward") for r in ranks]
        memory = " Ranks that share a memory add up the gradients themselves: that is a part of their backward."
        return "\n".join(
            [
                f"{len(run.losses)} steps really ran; the loss went from {run.losses[0]:.4f} to {run.losses[-1]:.4f}. "
                f"The median step, the first left out: {format_s(measured_s)} measured, {format_s(predicted_s)} "
                f"predicted: {measured_s / predicted_s:.3g} times as long.",
                f"Measured in it: backward {_of_ranks(backward_s)}; {self._messages(run.step)} (predicted: "
                f"{100 * hidden_share(self._predicted):.0f} %); waiting for them, or for the others, "
                f"{_of_ranks([stalled_s(run.step, r) for r in ranks])}.{memory * (self.setting.link is None)}",
                f"{_buckets(run.num_buckets).capitalize()}; rank 0 sent {run.num_messages:,} messages, "
                f"{run.sent_bytes:,} bytes, in each step.",
            ]
        )


def _size(bucket_bytes: int) -> str:
    return "one a parameter" if bucket_bytes == ONE_A_PARAMETER else format_bytes(bucket_bytes)


def _rate(bytes_s: float) -> str:
    return "memory" if bytes_s == MEMORY else round_rate(bytes_s)


def _buckets(count: int) -> str:
    return f"{count} bucket{'s' * (count > 1)}"


def _of_ranks(times_s: list[float]) -> str:
    return ", ".join(f"{format_s(time_s)} on rank {rank}" for rank, time_s in enumerate(times_s))


def _check_start(world: World, batch: Batch, bucket_bytes: int, num_steps: int) -> None:
    if world.size < 2:
        raise MplabError("a world of 1 rank sends no messages: give 2 ranks or more")
    if len(batch[0]) < world.size:
        raise MplabError(f"{len(batch[0])} samples for {world.size} ranks: give each rank one or more")
    if bucket_bytes < 1 or num_steps < 2:
        raise MplabError(
            f"bucket_bytes={bucket_bytes}, num_steps={num_steps}: give 1 byte or more, and 2 steps or more, since the "
            "first does not count"
        )
