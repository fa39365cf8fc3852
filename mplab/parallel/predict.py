"""What a step of a pipeline should take, from what was measured of its parts; and what it took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mplab.datasets import Batch
from mplab.models import cross_entropy
from mplab.parallel.pipeline import OptimizerFactory, PipelineParallel
from mplab.parallel.profile import profile_layers
from mplab.parallel.serial import LossFunction
from mplab.plan.explain import explain
from mplab.plan.layer_cost import LayerCost, recomputed_costs
from mplab.plan.partition import check_cuts, stage_costs
from mplab.plan.schedule import Order, Schedule, build
from mplab.plan.simulate import simulate
from mplab.trace.compare import Comparison, median_step, steps
from mplab.trace.timeline import Timeline
from mplab.world import Rank, World, probe
from mplab.world.rungs import num_at_once

_NUM_WARMUPS = 3


class Measured(NamedTuple):
    """What a prediction for one number of micro-batches is made of.

    Args:
        layers: what every layer costs with one micro-batch.
        launch_s: what launching an action costs.
    """

    layers: list[LayerCost]
    launch_s: float


class Predictor:
    """Predicts the steps of a model's pipelines from what it measures of the layers, the messages and the launches.

    It measures where it must, once for each number of micro-batches; a prediction after that takes no run.

    Args:
        model: what `mplab.models.layers` can turn into a chain; it is not changed.
        batch: inputs and targets.
        world: the ranks that it is for.
        loss_fn: outputs and targets -> mean loss over the samples.
        optimizer: parameters -> their optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        world: World,
        loss_fn: LossFunction = cross_entropy,
        optimizer: OptimizerFactory = torch.optim.AdamW,
    ) -> None:
        self.world = world
        self._model, self._batch, self._loss_fn, self._optimizer = model, batch, loss_fn, optimizer
        self.link = world.link or (probe().link(world.rung.name).link if world.size > 1 else None)
        self.cores = num_at_once(world.devices)
        self._measured: dict[int, Measured] = {}

    def measured(self, num_microbatches: int = 8) -> Measured:
        """What was measured for so many micro-batches; the first call measures.

        Raises:
            MplabError: a model that is no chain, or a batch with fewer samples than micro-batches.
        """
        if num_microbatches not in self._measured:
            costs = profile_layers(
                self._model, self._batch, num_microbatches, self._loss_fn, self._optimizer, self.world
            )
            launch_s = measure_launch_s(self.world, int(costs[0].output_bytes), num_microbatches)
            self._measured[num_microbatches] = Measured(costs, launch_s)
        return self._measured[num_microbatches]

    def predict(
        self,
        cuts: Sequence[int],
        schedule: str | Order | Schedule = "1f1b",
        num_microbatches: int = 8,
        recompute: bool = False,
    ) -> Timeline:
        """One step as it should go; the arguments are those of `PipelineParallel`.

        Raises:
            MplabError: cuts or a schedule that do not fit the model or the world.
        """
        schedule = self._schedule(schedule, num_microbatches)
        costs, launch_s = self._costs(cuts, schedule, recompute)
        return simulate(schedule, costs, self.link, self.cores, launch_s, title=schedule.name)

    def run(
        self,
        cuts: Sequence[int],
        schedule: str | Order | Schedule = "1f1b",
        num_microbatches: int = 8,
        recompute: bool = False,
        num_steps: int = 20,
    ) -> Timeline:
        """Train a copy of the model for some steps; returns the one that took the median time."""
        schedule = self._schedule(schedule, num_microbatches)
        what = (self._model, cuts, schedule, self._batch, self._loss_fn, self._optimizer, recompute, num_steps)
        self.world.run(_train, *what)
        return replace(median_step(steps(self.world.timeline)[_NUM_WARMUPS:]), title=schedule.name)

    def compare(
        self,
        cuts: Sequence[int],
        schedule: str | Order | Schedule = "1f1b",
        num_microbatches: int = 8,
        recompute: bool = False,
        measured: Timeline | None = None,
    ) -> Comparison:
        """The prediction over what was measured, and the parts of the measured time.

        Args:
            cuts: the first layer of every stage but the first.
            schedule: as `PipelineParallel` takes it.
            num_microbatches: parts of the batch; a `Schedule` has its own.
            recompute: keep only the input of a stage.
            measured: a step that ran so; None: the median one of 20 that run now.
        """
        schedule = self._schedule(schedule, num_microbatches)
        costs, launch_s = self._costs(cuts, schedule, recompute)
        measured = measured or self.run(cuts, schedule, recompute=recompute)
        return explain(schedule, costs, measured, self.link, self.cores, launch_s)

    def _schedule(self, schedule: str | Order | Schedule, num_microbatches: int) -> Schedule:
        if isinstance(schedule, Schedule):
            return schedule
        return build(schedule, self.world.size, num_microbatches)

    def _costs(self, cuts: Sequence[int], schedule: Schedule, recompute: bool) -> tuple[list[LayerCost], float]:
        layers, launch_s = self.measured(schedule.num_microbatches)
        cuts = check_cuts(cuts, [layer.name for layer in layers], schedule.num_stages)
        costs = stage_costs(layers, cuts)
        return recomputed_costs(costs) if recompute else costs, launch_s


def measure_launch_s(world: World, size_bytes: int, num_microbatches: int = 8, num_steps: int = 20) -> float:
    """Seconds of Python, dispatch and handing over for each action: a pipeline whose layers do nothing takes as long.

    Args:
        world: its ranks.
        size_bytes: of what a stage hands on.
        num_microbatches: parts of a batch.
        num_steps: of which the median counts.
    """
    x = torch.zeros(num_microbatches, max(1, size_bytes // 4))  # fp32
    schedule = build("1f1b", world.size, num_microbatches)
    chain = nn.Sequential(*(_Nothing() for _ in range(world.size)))
    world.run(_train, chain, range(1, world.size), schedule, (x, x), _no_loss, torch.optim.SGD, False, num_steps)
    seconds = []
    for step in steps(world.timeline)[_NUM_WARMUPS:]:
        for rank in range(world.size):
            busy = max(e.end_s for e in step.rank(rank)) - sum(
                e.duration_s for e in step.rank(rank) if e.lane == "wait"
            )
            seconds.append(busy / len(schedule.ranks[rank]))
    return statistics.median(seconds)


class _Nothing(nn.Module):
    """Hands on what it was given, with an autograd graph of no operation."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _no_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.flatten()[0]


def _train(
    rank: Rank,
    model: nn.Module,
    cuts: Sequence[int],
    schedule: Schedule,
    batch: Batch,
    loss_fn: LossFunction,
    optimizer: OptimizerFactory,
    recompute: bool,
    num_steps: int,
) -> None:
    pipeline = PipelineParallel(
        model, cuts, rank.comm, schedule, loss_fn=loss_fn, optimizer=optimizer, recompute=recompute
    )
    for _ in range(_NUM_WARMUPS + num_steps):
        rank.comm.barrier()  # all ranks start a step together
        with rank.span("step"):
            pipeline.step(batch)
