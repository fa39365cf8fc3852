"""What a cut, a schedule and a number of micro-batches should give, from measured layers: fast enough for a slider."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import mean
from typing import NamedTuple

import torch
from torch import nn

from mplab.datasets import Batch
from mplab.models import layers
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.profile import profile_layers
from mplab.parallel.serial import LossFunction
from mplab.plan.cost import Link
from mplab.plan.layer_cost import LayerCost, recomputed_costs
from mplab.plan.partition import by_time, stage_costs
from mplab.plan.schedule import ORDERS, Schedule, build
from mplab.plan.simulate import memory_bytes, simulate
from mplab.trace.timeline import Timeline
from mplab.world import World
from mplab.world.rungs import num_at_once

_NUM_REPEATS = (3, 10)  # of the measurements of the layers: fewest with the largest micro-batches, which take longest


class Choice(NamedTuple):
    """What can be chosen.

    Args:
        cuts: the first layer of each stage but the first.
        schedule: one of `ORDERS`.
        num_microbatches: parts of the batch.
        recompute: keep only the inputs of the stages.
    """

    cuts: tuple[int, ...]
    schedule: str
    num_microbatches: int
    recompute: bool


@dataclass(frozen=True)
class Forecast:
    """What a choice should give.

    Args:
        timeline: the predicted step.
        stages: what each stage costs with one micro-batch.
        work_s: seconds of computation of each rank in a step.
        equal_bubble: the mean idle share of the ranks if all stages were equal and messages free.
        memory_bytes: of each rank, at its peak.
    """

    timeline: Timeline
    stages: list[LayerCost]
    work_s: tuple[float, ...]
    equal_bubble: float
    memory_bytes: tuple[float, ...]

    @property
    def balance(self) -> float:
        """L = max(work) / mean(work) of the ranks."""
        return max(self.work_s) / mean(self.work_s)

    @property
    def bubble(self) -> float:
        """The mean idle share of the ranks."""
        busy_s = sum(event.duration_s for event in self.timeline.events if event.lane == "compute")
        return 1 - busy_s / (self.timeline.num_ranks * self.timeline.makespan_s)


class Forecaster:
    """Measures the layers of a model once for each size of micro-batch, and predicts.

    Args:
        model: what `layers` can turn into a chain; it is not changed.
        world: where it would run.
        batch: inputs and targets of a step.
        loss_fn: outputs and targets -> mean loss.
        optimizer: makes an optimizer of parameters.
        link: between any two ranks; None: the world's emulated one, and free where it has none.
        launch_s: seconds of Python and dispatch before every action.

    Raises:
        MplabError: a model that is no chain.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        batch: Batch,
        loss_fn: LossFunction,
        optimizer: OptimizerFactory,
        link: Link | None = None,
        launch_s: float = 0.0,
    ) -> None:
        self._model, self._world, self._batch = model, world, batch
        self._loss_fn, self._optimizer = loss_fn, optimizer
        self._link, self._launch_s = link or world.link, launch_s
        self.names = [layer.name for layer in layers(model)]
        self.schedules = [name for name in ORDERS if build(name, world.size, 1).num_stages <= len(self.names)]
        self._costs: dict[int, list[LayerCost]] = {}
        self._state_copies = _state_copies(optimizer)

    def has_measured(self, choice: Choice) -> bool:
        """Whether the layers were measured with micro-batches of this size."""
        return choice.num_microbatches in self._costs

    def costs(self, num_microbatches: int) -> list[LayerCost]:
        """What each layer costs with one micro-batch; measured when first asked."""
        if num_microbatches not in self._costs:
            few, many = _NUM_REPEATS
            repeats = min(many, max(few, num_microbatches))
            how = (num_microbatches, self._loss_fn, self._optimizer, self._world, repeats)
            self._costs[num_microbatches] = profile_layers(self._model, self._batch, *how)
        return self._costs[num_microbatches]

    def schedule(self, choice: Choice) -> Schedule:
        """The chosen schedule."""
        return _schedule(choice.schedule, self._world.size, choice.num_microbatches)

    def times_s(self, choice: Choice) -> list[float]:
        """Forward and backward of every layer on one micro-batch, with the second forward of recomputation."""
        return [
            cost.forward_s * (2 if choice.recompute else 1) + cost.backward_s
            for cost in self.costs(choice.num_microbatches)
        ]

    def best(self, choice: Choice) -> tuple[int, ...]:
        """The cuts whose slowest stage is as fast as can be."""
        return by_time(self.times_s(choice), self.schedule(choice).num_stages).cuts

    def forecast(self, choice: Choice) -> Forecast:
        """What the choice should give."""
        schedule, whole = self.schedule(choice), stage_costs(self.costs(choice.num_microbatches), choice.cuts)
        stages = recomputed_costs(whole) if choice.recompute else whole
        step_s = [choice.num_microbatches * (s.forward_s + s.backward_s) + s.update_s for s in stages]
        timeline = simulate(schedule, stages, self._link, num_at_once(self._world.devices), self._launch_s)
        return Forecast(
            Timeline(timeline.events, timeline.num_ranks, tuple(dict.fromkeys([*timeline.notes, *self._world.notes]))),
            stages,
            tuple(sum(step_s[stage] for stage in schedule.stages(rank)) for rank in range(schedule.num_ranks)),
            _equal_bubble(schedule),
            memory_bytes(schedule, whole, choice.recompute, self._state_copies),
        )


@lru_cache(64)
def _schedule(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    return build(name, num_ranks, num_microbatches)


@lru_cache(64)
def _equal_bubble(schedule: Schedule) -> float:
    return mean(schedule.bubble())


def _state_copies(optimizer: OptimizerFactory) -> float:
    """What the optimizer holds for a parameter, in parameters."""
    parameter = nn.Parameter(torch.zeros(8))
    parameter.grad = torch.zeros(8)
    made = optimizer([parameter])
    made.step()
    held = made.state.get(parameter, {}).values()
    return sum(isinstance(value, torch.Tensor) and value.shape == parameter.shape for value in held)
