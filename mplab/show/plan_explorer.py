"""Plans to choose: what each should take and hold, drawn while a control moves, and what it takes when it runs."""

from __future__ import annotations

from typing import Any

from mplab.errors import MplabError
from mplab.models import GPTConfig
from mplab.plan.layout import Plan
from mplab.plan.machines import Machine
from mplab.plan.predict import Prediction, predict
from mplab.plan.search import search
from mplab.plan.transformer import Transformer
from mplab.show.figures import graph_objects
from mplab.show.parts import as_output, box_of, errors_in, grid, ipywidgets_module, paragraph, pressed, run_button
from mplab.show.plan_controls import HERE, MOST_HANDLES, PlanControls
from mplab.show.plan_figure import MeasuredParts, plan_figure, redraw_plan
from mplab.show.plan_run import PlanRun, measured_machine, run_plan, sizes_of
from mplab.show.plan_timeline import PredictedStep, layer_times, predicted_step
from mplab.show.plan_words import prediction_words, run_words
from mplab.show.redraw import redraw, replace, widget_of
from mplab.trace.compare import MEASURED, PREDICTED, ROW_PX, Comparison
from mplab.trace.figure import Band, bands_json
from mplab.trace.units import format_s

MAX_RUN_S = 10.0
LARGEST_RANKS = 8  # of this machine
_ROW_PX = 44  # of a machine that is not here: nothing will be measured below


class PlanExplorer:
    """A GPT laid out over ranks: what a plan should take on a machine, and what it takes when it runs on this one.

    Show it as the last expression of a cell; `box` is the widget. Every control can be moved with the arrow keys, and
    what is drawn is said in words.

    With every move the step is predicted again: its parts, its timeline, and the memory of a rank. What can't be
    together is refused in words, and what was drawn before stays. "Best" takes the plan that should be the fastest of
    all that fit. "Run it" really trains by the plan, on thread ranks of this machine's cores, and draws what it
    measured below what it predicted; other machines, and the large model, can only be predicted.

    Args:
        config: of the GPT that runs here; None: 4 blocks of width 128.
        batch_size: its samples of a step, of all replicas together.
        world_size_max: the most ranks of this machine, 1 to 8.
        num_steps: of a run, 1 or more, not counting a first one that warms up.
        plan: at the start; None: all ranks in two replicas, each cut over the tensor axis.
        machine: this machine's figures; None: measured, which takes some seconds.

    Raises:
        MplabError: ipywidgets, plotly or anywidget is not installed; or a start that there is not.
    """

    def __init__(
        self,
        config: GPTConfig | None = None,
        batch_size: int = 16,
        world_size_max: int = 4,
        num_steps: int = 5,
        plan: Plan | None = None,
        machine: Machine | None = None,
    ) -> None:
        widgets, go = ipywidgets_module(), graph_objects()
        self._config, self._num_steps = config or GPTConfig(num_layers=4), num_steps
        _check_start(batch_size, world_size_max, num_steps)
        here = machine or self._measured_machine(batch_size)
        self.controls = PlanControls(sizes_of(self._config), batch_size, here, world_size_max, self._changed)
        self.best_button = widgets.Button(
            description="Best", icon="bullseye", tooltip="The plan that should be fastest of all that fit the memory"
        )
        self.run_button = run_button("Run it", f"Train {1 + num_steps} steps on this machine, laid out like this")
        # Heights are kept free, so that the figures stay where they are while the texts change.
        self.words = widgets.HTML()
        self.result = widgets.HTML(layout={"min_height": "6.5em"})
        dp = 2 if world_size_max % 2 == 0 else 1
        self.controls.plan = plan or Plan(dp=dp, tp=world_size_max // dp if world_size_max % 2 == 0 else 1)
        self._prediction = self.prediction
        self._step = self._draw_all_but_figures()
        self.figure = go.FigureWidget(plan_figure(*self._shown(None)))
        self.figure.update_layout(autosize=True)
        self.timeline_figure = widget_of(graph_objects().Figure(self._timeline(None)))
        self.best_button.on_click(self._best)
        self.run_button.on_click(self._run)
        shown = [*self._controls(widgets), self.words, self.figure, self.result, self.timeline_figure]
        self.box = box_of(shown, self.figure, self.timeline_figure)

    def _measured_machine(self, batch_size: int) -> Machine:
        try:
            return measured_machine(self._config, batch_size)
        except KeyboardInterrupt as error:
            error.add_note("This machine was being measured. PlanExplorer(machine=...) takes figures that there are.")
            raise

    def _controls(self, widgets: Any) -> list[Any]:
        of = self.controls
        columns = [[of.model, of.dp, of.pp, of.tp], [of.machine, of.schedule, of.num_microbatches, of.zero]]
        row = {"align_items": "center", "flex_flow": "row wrap"}
        switches = [of.sequence_parallel, of.recompute, self.best_button, self.run_button]
        return [grid([widgets.VBox(column) for column in columns], 310), of.bar, widgets.HBox(switches, layout=row)]

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return as_output(self, **kwargs)

    # -- what is chosen ------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """What the controls say; can be set.

        Raises:
            MplabError: settings that exclude each other.
        """
        return self.controls.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self.controls.plan = plan

    @property
    def model(self) -> Transformer:
        """The chosen one's sizes."""
        return self.controls.sizes

    @property
    def machine(self) -> Machine:
        """The chosen one, with the plan's ranks.

        Raises:
            MplabError: a plan that can't be, or of more ranks than there are.
        """
        return self.controls.machine_of(self.plan)

    @property
    def prediction(self) -> Prediction:
        """What a step of the plan should take.

        Raises:
            MplabError: a plan that can't be, or that the model, the batch or the machine can't have.
        """
        return predict(self.plan, self.model, self.controls.batch_size, self.machine)

    def _changed(self) -> None:
        if not hasattr(self, "timeline_figure"):
            return  # it is being made
        with errors_in(self.result):
            try:
                self._prediction = self.prediction
            except MplabError as error:
                self.run_button.disabled = True
                self.words.value = paragraph("status", f"{error}\nDrawn is still: {self._prediction.plan}.")
                self.result.value = self._why_not()
            else:
                self._step = self._draw_all_but_figures()
                self._draw(None)

    def _best(self, button: object) -> None:
        with pressed(self.best_button, self.result, "Searching …"):
            found = [search(self.model, each, self.controls.batch_size)[0] for each in self.controls.machines()]
            self.plan = min(found, key=lambda prediction: prediction.step_s).plan

    # -- what is drawn -------------------------------------------------------------------------------------------------

    def _draw_all_but_figures(self) -> PredictedStep:
        of, prediction = self.controls, self._prediction
        where = (of.sizes, of.batch_size, of.machine_of(prediction.plan))
        of.keep(prediction.plan)
        of.draw_bar(prediction.plan, layer_times(prediction.plan, *where))
        self.words.layout.min_height = f"{1.5 * (7 + min(prediction.plan.num_stages, MOST_HANDLES) // 3)}em"
        self.words.value = paragraph("status", self._words(prediction))
        self.run_button.disabled = not of.is_here
        self.result.value = self._why_not()
        return predicted_step(prediction, *where)

    def _draw(self, run: PlanRun | None) -> None:
        redraw_plan(self.figure, *self._shown(run))
        figure = self._timeline(run)
        with self.timeline_figure.batch_update():
            rows = figure["layout"]["yaxis"]
            redraw(self.timeline_figure.layout.yaxis, {name: rows[name] for name in ("tickvals", "ticktext")})
            replace(self.timeline_figure, figure)

    def _shown(self, run: PlanRun | None) -> tuple[Prediction, Machine, MeasuredParts | None, str]:
        """What the bars show."""
        unmeasured = "not measured yet" if self.controls.is_here else "not measured: it can't run here"
        machine = self.controls.machine_of(self._prediction.plan)
        return self._prediction, machine, None if run is None else run.parts, unmeasured

    def _timeline(self, run: PlanRun | None) -> dict[str, Any]:
        predicted, step_s = self._step.timeline, format_s(self._prediction.step_s)
        bands, notes, row_px = [(predicted.events, PREDICTED)], predicted.notes, ROW_PX
        title = f"Predicted {step_s}, not measured yet"
        if run is not None:
            bands.append((run.step.events, MEASURED))
            notes = Comparison(predicted, run.step).notes
            measured_s = format_s(max(event.end_s for event in run.step.events))
            title = f"Median step: predicted {step_s}, measured {measured_s}"
        elif not self.controls.is_here:
            bands, row_px = [(predicted.events, Band(height=0.8, is_outlined=True))], _ROW_PX
            title = f"Predicted {step_s} a step"
        figure = bands_json(bands, predicted.num_ranks, notes, title, row_px)
        figure["layout"]["yaxis"]["ticktext"] = self._step.rows
        figure["layout"]["autosize"] = True
        return figure

    def describe(self) -> str:
        """What is drawn in words: the step and its parts, what a rank holds and sends; or why the plan can't be."""
        try:
            return self._words(self.prediction)
        except MplabError as error:
            return str(error)

    def _words(self, prediction: Prediction) -> str:
        of = self.controls
        return prediction_words(prediction, of.sizes, of.batch_size, of.machine_of(prediction.plan), of.model.label)

    def _why_not(self) -> str:
        """Why it can't run; nothing where it can, or could with another plan."""
        if self.controls.is_here:
            return ""
        why = "the model is too large for this machine, and is only predicted"
        if self.controls.machine.value != HERE:
            why = f"{self.controls.machine.value} is described by its figures, and not this machine"
        return paragraph("status", f"It can't run here: {why}.")

    # -- the real thing ------------------------------------------------------------------------------------------------

    def _run(self, button: object) -> None:
        with pressed(self.run_button, self.result):
            all_s = (1 + self._num_steps) * self._prediction.step_s
            if all_s > MAX_RUN_S:
                raise MplabError(
                    f"{format_s(all_s)} are predicted for {1 + self._num_steps} steps, and the button stops at "
                    f"{format_s(MAX_RUN_S)}: take fewer micro-batches or another plan"
                )
            run = run_plan(self._prediction.plan, self._config, self.controls.batch_size, self._num_steps)
            self._draw(run)
            self.result.value = paragraph("status", run_words(self._prediction, run))


def _check_start(batch_size: int, world_size_max: int, num_steps: int) -> None:
    if not 1 <= world_size_max <= LARGEST_RANKS or batch_size < 1 or num_steps < 1:
        raise MplabError(
            f"batch_size={batch_size}, world_size_max={world_size_max}, num_steps={num_steps}: give 1 or more of each, "
            f"and at most {LARGEST_RANKS} ranks"
        )
