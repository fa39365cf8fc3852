"""The controls of `PlanExplorer`: what can be chosen, and the plan, model and machine that they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mplab.errors import MplabError
from mplab.plan.layout import Plan
from mplab.plan.machines import MACHINES, Machine
from mplab.plan.partition import check_cuts
from mplab.plan.schedule import ORDERS
from mplab.plan.search import divisors
from mplab.plan.stages import Stages, bounds, layer_names
from mplab.plan.transformer import GPT3, Transformer
from mplab.show.cut_bar import cut_bar_class, shares
from mplab.show.parts import ipywidgets_module
from mplab.show.plan_timeline import LayerTime
from mplab.trace.units import format_s

HERE, LAB = "this machine", "lab"
GPT3_NAME, GPT3_BATCH = "GPT-3", 1536  # samples of 2,048 tokens: about the 3.2 million tokens that it was trained with
SPOKEN = {
    "naive": "Naive",
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved",
    "zero_bubble": "Zero bubble",
}
MOST_HANDLES = 15  # on the bar: stages beyond that are cut by parameters


class PlanControls:
    """Sliders, lists and the bar of a `PlanExplorer`.

    Args:
        model: the small one, which can run here.
        batch_size: its samples of a step.
        here: this machine.
        world_size_max: the most ranks of this machine.
        changed: called after every change, once for those that come together.
    """

    def __init__(
        self, model: Transformer, batch_size: int, here: Machine, world_size_max: int, changed: Callable[[], None]
    ) -> None:
        widgets = ipywidgets_module()
        self._models = {LAB: (model, batch_size), GPT3_NAME: (GPT3, GPT3_BATCH)}
        self._here, self._world_size_max, self._tell = here, world_size_max, changed
        self._is_moving = False
        self._cuts_of: dict[tuple[Transformer, int], tuple[int, ...]] = {}  # those that were moved, by number of stages
        self._bar_shows: tuple[Transformer, int] | None = None
        self._plan_of: dict[tuple[str, str], Plan] = {}  # that was left behind, by model and machine

        # Narrower than the page, so that two stand side by side.
        look: dict[str, Any] = {"layout": {"width": "95%"}, "style": {"description_width": "95px"}}

        def slider(name: str, options: Any) -> Any:
            return widgets.SelectionSlider(options=options, description=name, continuous_update=True, **look)

        models = [(f"GPT of {model.num_layers} blocks", LAB), (GPT3_NAME, GPT3_NAME)]
        self.model = widgets.Dropdown(options=models, description="model", **look)
        self.machine = widgets.Dropdown(options=[HERE, *MACHINES], description="machine", **look)
        self.dp, self.pp, self.tp = (slider(name, [1]) for name in ("dp (data)", "pp (pipeline)", "tp (tensor)"))
        self.num_microbatches = slider("micro-batches", [1])
        self.schedule = widgets.Dropdown(
            options=[(SPOKEN[name], name) for name in ORDERS], value="1f1b", description="schedule", **look
        )
        self.zero = slider("ZeRO", (0, 1, 2, 3))
        self.sequence_parallel, self.recompute = (
            widgets.Checkbox(False, description=name, indent=False, layout={"width": f"{px}px"})
            for name, px in (("sequence parallel", 145), ("recompute activations", 175))
        )
        self.bar = cut_bar_class()()
        self._fit_options()
        for control in (self.model, self.machine):
            control.observe(self._moved_elsewhere, names="value")
        for control in self._of_plan:
            control.observe(self._changed, names="value")
        self.bar.observe(self._cut, names="cuts")

    @property
    def _of_plan(self) -> list[Any]:
        degrees = [self.dp, self.pp, self.tp, self.num_microbatches]
        return [*degrees, self.schedule, self.zero, self.sequence_parallel, self.recompute]

    # -- what they say -------------------------------------------------------------------------------------------------

    @property
    def sizes(self) -> Transformer:
        """The model's."""
        return self._models[self.model.value][0]

    @property
    def batch_size(self) -> int:
        """Samples of a step."""
        return self._models[self.model.value][1]

    @property
    def is_here(self) -> bool:
        """Whether it is this machine and a model that it can run."""
        return (self.machine.value, self.model.value) == (HERE, LAB)

    def machine_of(self, plan: Plan) -> Machine:
        """The chosen machine, with the ranks of a plan if it is this one.

        Raises:
            MplabError: more of them than there are, or such as the cores can't share evenly.
        """
        if self.machine.value != HERE:
            return MACHINES[self.machine.value]
        if plan.num_ranks > self._world_size_max:
            raise MplabError(
                f"{plan.dp} x {plan.pp} x {plan.tp} = {plan.num_ranks} ranks, and there are up to "
                f"{self._world_size_max} here: choose degrees whose product is {self._world_size_max} or less"
            )
        return self._here.with_ranks(plan.num_ranks)

    def machines(self) -> list[Machine]:
        """The chosen machine, with all numbers of ranks that it can have."""
        if self.machine.value != HERE:
            return [MACHINES[self.machine.value]]
        cores = self._here.num_devices
        counts = [n for n in divisors(self._world_size_max) if n <= cores or n % cores == 0]
        return [self._here.with_ranks(n) for n in counts]

    @property
    def plan(self) -> Plan:
        """The plan that they say; can be set.

        Raises:
            MplabError: settings that exclude each other.
        """
        num_stages = self._num_stages
        return Plan(
            self.dp.value,
            self.pp.value,
            self.tp.value,
            cuts=self._cuts_of.get((self.sizes, num_stages)) if num_stages > 1 else None,
            schedule=self.schedule.value,
            num_microbatches=self.num_microbatches.value,
            zero=self.zero.value,
            sequence_parallel=self.sequence_parallel.value,
            recompute=self.recompute.value,
        )

    @plan.setter
    def plan(self, plan: Plan) -> None:
        with self.together():
            self._fit_options(plan)
            self.schedule.value, self.zero.value = plan.schedule, plan.zero
            self.sequence_parallel.value, self.recompute.value = plan.sequence_parallel, plan.recompute
            self._cuts_of.pop((self.sizes, plan.num_stages), None)
            if plan.cuts:
                self._cuts_of[self.sizes, plan.num_stages] = plan.cuts

    @property
    def _num_stages(self) -> int:
        pp: int = self.pp.value
        return pp * (2 if self.schedule.value == "interleaved" and pp > 1 else 1)

    # -- changes -------------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Tell of all changes inside at once."""
        before, self._is_moving = self._is_moving, True
        try:
            yield
        finally:
            self._is_moving = before
        self._changed(None)

    def _changed(self, change: object) -> None:
        if not self._is_moving:
            self._tell()

    def _moved_elsewhere(self, change: object) -> None:
        """Another model or machine has other degrees and micro-batches: those that were left there; where nobody was
        before, replicas take the ranks that are left.
        """
        if self._is_moving:
            return
        before = self._plan_of.get((self.model.value, self.machine.value))
        if before is not None:
            self.plan = before
            return
        with self.together():
            self._fit_options()
            if self.machine.value != HERE:
                ranks, others = MACHINES[self.machine.value].ranks, self.pp.value * self.tp.value
                if ranks % others == 0:
                    self.dp.value = ranks // others

    def _fit_options(self, plan: Plan | None = None) -> None:
        """What there is to choose, and the plan's or the nearest to what was chosen before."""
        ranks = self._world_size_max if self.machine.value == HERE else MACHINES[self.machine.value].ranks
        for name, slider, most in (
            ("dp", self.dp, ranks),
            ("pp", self.pp, ranks),
            ("tp", self.tp, ranks),
            ("num_microbatches", self.num_microbatches, self.batch_size),
        ):
            value = slider.value if plan is None else getattr(plan, name)
            options = divisors(most)
            if plan is None:
                value = max(option for option in options if option <= value)
            slider.options = sorted({*options, value})
            slider.value = value

    def keep(self, plan: Plan) -> None:
        """Remember a plan that can be, for when this model and this machine come back."""
        self._plan_of[self.model.value, self.machine.value] = plan

    # -- the bar -------------------------------------------------------------------------------------------------------

    def draw_bar(self, plan: Plan, layers: list[LayerTime]) -> None:
        """The layers, as wide as they should take, and the stages of a plan that can be."""
        model, num_stages = self.sizes, plan.num_stages
        self.bar.layout.display = None if num_stages - 1 <= MOST_HANDLES else "none"
        if num_stages - 1 > MOST_HANDLES:
            return
        names = layer_names(model)
        times_s = [t.forward_s + t.backward_s + t.forward_sent_s + t.backward_sent_s for t in layers]
        ends = bounds(Stages(model, plan.tp, plan.pp, num_stages, plan.cuts))
        of_stages = [format_s(sum(times_s[start:end])) for start, end in ends]
        self._bar_shows = None  # what moves now moves by itself
        with self.bar.hold_sync():
            self.bar.names, self.bar.shares = names, shares(times_s)
            self.bar.hints = [f"{n}: {format_s(s)} forward and backward" for n, s in zip(names, times_s, strict=True)]
            self.bar.ranks = [s % plan.pp for s in range(num_stages)]
            self.bar.labels = [[f"stage {s}: {said}", f"stage {s}", f"{s}"] for s, said in enumerate(of_stages)]
            self.bar.cuts = [start for start, _ in ends[1:]]
        self._bar_shows = model, num_stages

    def _cut(self, change: object) -> None:
        """A handle was moved."""
        if self._bar_shows is None:
            return
        model, num_stages = self._bar_shows
        cuts = check_cuts(tuple(self.bar.cuts), layer_names(model), num_stages)
        best = bounds(Stages(model, self.tp.value, num_stages, num_stages, None))
        if cuts == tuple(start for start, _ in best[1:]):
            self._cuts_of.pop(self._bar_shows, None)
        else:
            self._cuts_of[self._bar_shows] = cuts
        self._changed(change)
