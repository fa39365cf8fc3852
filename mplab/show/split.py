"""Split points to move: what a cut should give, drawn while its handle moves, and what it gives when it really runs."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import nn

from mplab.datasets import Batch
from mplab.errors import MplabError
from mplab.models import cross_entropy
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.serial import LossFunction
from mplab.plan.cost import Link
from mplab.plan.partition import check_cuts
from mplab.show.cut_bar import cut_bar_class, shares
from mplab.show.figures import format_bytes
from mplab.show.forecast import Choice, Forecast, Forecaster
from mplab.show.parts import as_output, box_of, errors_in, ipywidgets_module, paragraph, pressed, run_button
from mplab.show.redraw import Loss, Timelines, loss_curve, replace, widget_of
from mplab.show.training import Run, Training
from mplab.trace.units import format_s
from mplab.world import World

SPOKEN = {
    "naive": "Naive",
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved",
    "zero_bubble": "Zero bubble",
}
NUM_MICROBATCHES = (1, 2, 4, 8, 16, 32)


class SplitExplorer:
    """A model cut into the stages of a pipeline: a handle on every cut, what it should cost, and a button that trains.

    Show it as the last expression of a cell; `box` is the widget. Every control can be moved with the arrow keys, and
    what is drawn is said in words.

    The layers are drawn as wide as the time that they were measured to take. With every move the step is predicted
    again. The button trains the model for some steps, cut as chosen; between two runs its weights and its optimizer go
    on, however it is cut then. A schedule with two stages a rank has twice as many stages, and thus more handles: they
    begin at the best cuts, and the handles of the others are where they were when those come back.

    Args:
        model: what `mplab.models.layers` can turn into a chain; it is copied, never changed.
        world: of 2 ranks or more, and at most as many as the model has layers.
        batch: inputs and targets; every step trains on it.
        cuts: at the start; None: the best.
        schedule: at the start: "naive", "gpipe", "1f1b", "interleaved" or "zero_bubble".
        num_microbatches: at the start.
        loss_fn: outputs and targets -> mean loss over the samples.
        optimizer: makes an optimizer of parameters.
        num_steps: of one run.
        link: between any two ranks, for the prediction; None: the world's emulated one, and free where it has none.
        launch_s: seconds of Python and dispatch before every action, for the prediction.

    Raises:
        MplabError: ipywidgets, plotly or anywidget is not installed; a model that is no chain, a world that does not
            fit it, or a start that there is not.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        batch: Batch,
        cuts: tuple[int, ...] | None = None,
        schedule: str = "1f1b",
        num_microbatches: int = 8,
        loss_fn: LossFunction = cross_entropy,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        num_steps: int = 4,
        link: Link | None = None,
        launch_s: float = 0.0,
    ) -> None:
        widgets = ipywidgets_module()
        settings = (model, world, batch, loss_fn, optimizer)
        self._forecaster, self._training = Forecaster(*settings, link, launch_s), Training(*settings)
        self._num_steps = num_steps
        names, schedules = self._forecaster.names, self._forecaster.schedules
        _check_start(world, batch, names, schedules, schedule, num_microbatches, num_steps)
        self._cuts_of: dict[int, tuple[int, ...]] = {}  # by the number of stages
        self._losses: list[Loss] = []
        self._num_runs = 0

        wide = {"layout": {"width": "330px"}, "style": {"description_width": "95px"}}
        options = sorted({*(m for m in NUM_MICROBATCHES if m <= len(batch[0])), num_microbatches})
        self.num_microbatches = widgets.SelectionSlider(
            options=options, value=num_microbatches, description="micro-batches", **wide
        )
        self.schedule = widgets.Dropdown(
            options=[(SPOKEN[name], name) for name in schedules], value=schedule, description="schedule", **wide
        )
        self.recompute = widgets.Checkbox(
            False, description="recompute activations", indent=False, layout={"width": "200px"}
        )
        self.best_button = widgets.Button(
            description="Best", icon="bullseye", tooltip="Cut where the slowest stage is as fast as can be"
        )
        self.run_button = run_button("Run", f"Train {num_steps} steps on this machine, cut like this")
        choice = Choice((), schedule, num_microbatches, False)
        if cuts is not None:
            cuts = check_cuts(cuts, names, self._forecaster.schedule(choice).num_stages)
        self.bar = cut_bar_class()(names=names, cuts=list(cuts or self._forecaster.best(choice)))
        # Heights are kept free, here and in `_say`, so that the figures stay where they are while the texts change.
        self.words = widgets.HTML()
        self.result = widgets.HTML(layout={"min_height": "4.8em"})

        self._forecast = self._say()
        self._timelines = Timelines(self._forecast.timeline)
        self.figure = self._timelines.widget
        self.loss_figure = widget_of(loss_curve((), num_steps))
        for control in (self.num_microbatches, self.schedule, self.recompute):
            control.observe(self._changed, names="value")
        self.bar.observe(self._changed, names="cuts")
        self.best_button.on_click(self._best)
        self.run_button.on_click(self._run)
        row = {"align_items": "center", "flex_flow": "row wrap"}
        self.box = box_of(
            [
                self.bar,
                widgets.HBox([self.num_microbatches, self.schedule], layout=row),
                widgets.HBox([self.recompute, self.best_button, self.run_button], layout=row),
                self.words,
                self.figure,
                self.result,
                self.loss_figure,
            ],
            self.figure,
            self.loss_figure,
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return as_output(self, **kwargs)

    # -- what is chosen ------------------------------------------------------------------------------------------------

    @property
    def choice(self) -> Choice:
        """What the controls say."""
        return Choice(tuple(self.bar.cuts), self.schedule.value, self.num_microbatches.value, self.recompute.value)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Where the handles are; can be set.

        Raises:
            MplabError: cuts that do not fit the model or the schedule; nothing has moved then.
        """
        return self.choice.cuts

    @cuts.setter
    def cuts(self, cuts: tuple[int, ...]) -> None:
        num_stages = self._forecaster.schedule(self.choice).num_stages
        self.bar.cuts = list(check_cuts(cuts, self._forecaster.names, num_stages))

    @property
    def losses(self) -> list[float]:
        """Of every step of all runs."""
        return [loss.value for loss in self._losses]

    def predicted(self) -> Forecast:
        """What the choice should give."""
        return self._forecaster.forecast(self.choice)

    def _changed(self, change: object) -> None:
        with errors_in(self.result):
            num_stages = self._forecaster.schedule(self.choice).num_stages
            if len(self.cuts) + 1 != num_stages:
                # Other stages, other handles; moving them calls this again.
                self.bar.cuts = list(self._cuts_of.get(num_stages) or self._forecaster.best(self.choice))
                return
            self.result.value = ""  # what was measured belonged to what was chosen before
            if not self._forecaster.has_measured(self.choice):
                self.words.value = paragraph("status", "Every layer is measured with micro-batches of this size …")
            self._forecast = self._say()
            self._timelines.draw(self._forecast.timeline)

    def _best(self, button: object) -> None:
        self.bar.cuts = list(self._forecaster.best(self.choice))

    # -- what is drawn -------------------------------------------------------------------------------------------------

    def _say(self) -> Forecast:
        """Everything but the figures."""
        forecast, choice = self.predicted(), self.choice
        self._cuts_of[len(forecast.stages)] = choice.cuts
        times_s = self._forecaster.times_s(choice)
        ranks = self._forecaster.schedule(choice).rank_of
        hints = [
            f"{cost.name}: {format_s(time_s)} forward and backward, {format_bytes(cost.parameter_bytes)} of weights"
            for cost, time_s in zip(self._forecaster.costs(choice.num_microbatches), times_s, strict=True)
        ]
        labels = []
        for i, (stage, rank) in enumerate(zip(forecast.stages, ranks, strict=True)):
            short = f"stage {i}, rank {rank}"
            labels.append([f"{short}: {format_s(stage.forward_s + stage.backward_s)}", short, f"{i}, r{rank}", f"{i}"])
        with self.bar.hold_sync():
            self.bar.shares, self.bar.hints = shares(times_s), hints
            self.bar.ranks, self.bar.labels = list(ranks), labels
        self.words.layout.min_height = f"{1.5 * (4 + len(ranks) // 2)}em"
        self.words.value = paragraph("status", self._words(forecast))
        return forecast

    def describe(self) -> str:
        """The prediction in words: the stages, how long a step takes, how even the ranks are, what they hold."""
        return self._words(self.predicted())

    def _words(self, forecast: Forecast) -> str:
        choice, ranks = self.choice, self._forecaster.schedule(self.choice).rank_of
        again = ", activations recomputed" * choice.recompute
        count = f"{choice.num_microbatches} micro-batch{'es' * (choice.num_microbatches > 1)}"
        stages = [
            f"stage {i} on rank {rank} is {stage.name}, {format_s(stage.forward_s + stage.backward_s)}"
            for i, (stage, rank) in enumerate(zip(forecast.stages, ranks, strict=True))
        ]
        memory = [f"rank {rank} {format_bytes(size)}" for rank, size in enumerate(forecast.memory_bytes)]
        best = self._forecaster.best(choice)
        if best == choice.cuts:
            better = "No other cut has a faster slowest stage."
        else:
            best_s = self._forecaster.forecast(choice._replace(cuts=best)).timeline.makespan_s
            better = f"The slowest stage is fastest if cut {self._where(best)}: {format_s(best_s)} a step."
        return "\n".join(
            [
                f"{SPOKEN[choice.schedule]}, {len(forecast.memory_bytes)} ranks, {count}{again}. "
                f"A micro-batch forward and backward: {'; '.join(stages)}.",
                f"Predicted: {format_s(forecast.timeline.makespan_s)} a step, L = {forecast.balance:.2f}, "
                f"bubble {_percent(forecast.bubble)} (equal stages: {_percent(forecast.equal_bubble)}). {better}",
                f"Peak memory, predicted: {', '.join(memory)}.",
            ]
        )

    def _where(self, cuts: tuple[int, ...]) -> str:
        return f"before {' and '.join(self._forecaster.names[cut] for cut in cuts)}"

    # -- the real thing ------------------------------------------------------------------------------------------------

    def _run(self, button: object) -> None:
        choice = self.choice
        with pressed(self.run_button, self.result):
            run = self._training.run(choice, self._num_steps)
            self._num_runs += 1
            how = f"{SPOKEN[choice.schedule]}, {choice.num_microbatches} micro-batches, cut {self._where(choice.cuts)}"
            self._losses += [Loss(self._num_runs, loss, how) for loss in run.losses]
            self._timelines.draw(self._forecast.timeline, run.steps[-1])
            replace(self.loss_figure, loss_curve(self._losses, self._num_steps).to_plotly_json())
            self.result.value = paragraph("status", self._result_words(run))

    def _result_words(self, run: Run) -> str:
        predicted_s, last_s = self._forecast.timeline.makespan_s, run.times_s[-1]
        return (
            f"{len(run.losses)} steps really ran. {run.began}; the loss went from {run.losses[0]:.4f} to "
            f"{run.losses[-1]:.4f}. Last step: {format_s(last_s)} measured, {format_s(predicted_s)} predicted: "
            f"{last_s / predicted_s:.3g} times as long. All steps: from {format_s(min(run.times_s))} to "
            f"{format_s(max(run.times_s))}, median {format_s(median(run.times_s))}."
        )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _check_start(
    world: World,
    batch: Batch,
    names: list[str],
    schedules: list[str],
    schedule: str,
    num_microbatches: int,
    num_steps: int,
) -> None:
    if not 2 <= world.size <= len(names):
        raise MplabError(
            f"a world of {world.size} and a model of {len(names)} layers: give 2 ranks or more, and no more than layers"
        )
    if schedule not in schedules:
        raise MplabError(
            f"schedule={schedule!r}: with {len(names)} layers on {world.size} ranks there are {', '.join(schedules)}"
        )
    if not 1 <= num_microbatches <= len(batch[0]) or num_steps < 1:
        raise MplabError(
            f"num_microbatches={num_microbatches}, num_steps={num_steps}: give 1 or more of both, and at most a "
            f"micro-batch for each of the {len(batch[0])} samples"
        )
