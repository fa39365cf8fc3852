"""A model that trains on and on, however it is cut: pipelines that live longer than one run of their world."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import nn

from mplab.datasets import Batch
from mplab.models import layers
from mplab.parallel import PipelineParallel
from mplab.parallel.layer_state import LayerState, put_states, take_state
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.serial import LossFunction
from mplab.show.forecast import Choice
from mplab.trace.compare import steps
from mplab.trace.timeline import Timeline
from mplab.world import Rank, World


class Run(NamedTuple):
    """Some steps that really ran.

    Args:
        losses: of every step, before its update.
        steps: as they went; time 0 is the start of the step.
        began: how the pipelines came about.
    """

    losses: list[float]
    steps: list[Timeline]
    began: str

    @property
    def times_s(self) -> list[float]:
        """Seconds of every step."""
        return [max(event.end_s for event in step.events) for step in self.steps]


class Training:
    """Trains one model through all choices of an explorer, always on the same batch.

    Args:
        model: it is never changed.
        world: where the pipelines run.
        batch: inputs and targets.
        loss_fn: outputs and targets -> mean loss.
        optimizer: makes an optimizer of parameters.
    """

    def __init__(
        self, model: nn.Module, world: World, batch: Batch, loss_fn: LossFunction, optimizer: OptimizerFactory
    ) -> None:
        self._model, self._world, self._batch = model, world, batch
        self._loss_fn, self._optimizer = loss_fn, optimizer
        self._keys = [layer.state_keys() for layer in layers(model)]
        self._pipelines: list[PipelineParallel] = []
        self._choice: Choice | None = None
        self._states: list[LayerState] = []

    def run(self, choice: Choice, num_steps: int) -> Run:
        """Train some steps: where only the cuts are new, layers move between the pipelines that there are.

        Otherwise new pipelines take over weights and optimizer. After an error they do too, and have what the last run
        that went well left behind.
        """
        pipelines, before, self._pipelines = self._pipelines, self._choice, []  # kept only if all goes well
        if before is None:
            began = "The pipeline was built"
        elif not pipelines or before._replace(cuts=choice.cuts) != choice:
            pipelines, began = [], "The pipeline was built anew, with the trained weights and the optimizer's state"
        elif before == choice:
            began = "The pipeline went on"
        else:
            began = "Layers moved to other ranks, with their optimizer's state"
        results = self._world.run(self._train, pipelines, choice, num_steps)
        self._states = copy.deepcopy([state for _, _, states in results for state in states])
        self._pipelines, self._choice = [pipeline for pipeline, _, _ in results], choice
        return Run(results[0][1], steps(self._world.timeline), began)

    def _train(
        self, rank: Rank, pipelines: list[PipelineParallel], choice: Choice, num_steps: int
    ) -> tuple[PipelineParallel, list[float], list[LayerState]]:
        """One rank's side: its pipeline, the losses, and what its layers are after the last step."""
        if pipelines:
            pipeline = pipelines[rank.index]
            pipeline.connect(rank.comm)
            if pipeline.cuts != choice.cuts:
                pipeline.move(choice.cuts)
        else:
            cuts, schedule, num_microbatches, recompute = choice
            settings = (schedule, num_microbatches, self._loss_fn, self._optimizer, recompute)
            pipeline = PipelineParallel(self._model, cuts, rank.comm, *settings)
            if self._states:
                put_states(self._states, pipeline.stages.values(), pipeline.optimizer)
        losses = []
        for _ in range(num_steps):
            rank.comm.barrier()
            with rank.trace.span("step"):
                losses.append(pipeline.step(self._batch))
        stages = pipeline.stages.values()
        mine = {key for stage in stages for key in stage.state_dict()}
        return pipeline, losses, [take_state(k, stages, pipeline.optimizer) for k in self._keys if mine.issuperset(k)]
