"""Plans on this machine: its figures for the planner, measured, and steps of a plan that really run."""

from __future__ import annotations

import dataclasses
from functools import cache
from statistics import mean, median
from typing import NamedTuple

import torch

from mplab.datasets import Batch
from mplab.errors import MplabError
from mplab.models import GPT, GPTConfig
from mplab.parallel import HybridParallel, measure_plans
from mplab.plan.layout import Plan
from mplab.plan.machines import Machine
from mplab.plan.stages import share_of
from mplab.plan.transformer import Transformer
from mplab.show.plan_figure import MeasuredParts
from mplab.trace.compare import median_step, steps
from mplab.trace.intervals import length_s, merge, overlap_s
from mplab.trace.timeline import Timeline
from mplab.world import Rank, World
from mplab.world.described import CALIBRATION, calibrated, described
from mplab.world.probe import probe

_NUM_ROUNDS, _NUM_STEPS = 3, 2  # of the measurement of this machine


class PlanRun(NamedTuple):
    """Some steps that really ran.

    Args:
        losses: of every step, before its update.
        step: the one of median length; the first is left out, which warms up.
        times_s: seconds of all steps but the first.
        parts: of `step`.
        difference: the largest between these losses and those of one rank alone.
    """

    losses: list[float]
    step: Timeline
    times_s: list[float]
    parts: MeasuredParts
    difference: float


def sizes_of(config: GPTConfig) -> Transformer:
    """A GPT as the planner has it: in float32, trained with AdamW."""
    return Transformer(**dataclasses.asdict(config))


def a_batch(config: GPTConfig, batch_size: int) -> Batch:
    """Tokens at random, always the same, and for each the one that follows."""
    shape = batch_size, config.context_length + 1
    tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def measured_machine(config: GPTConfig, batch_size: int) -> Machine:
    """This machine's cores, as fast as steps of plain training show them to be; its GPUs are left out.

    Args:
        config: of the model that is trained.
        batch_size: samples of a step.

    Raises:
        MplabError: a batch of one sample, which shows nothing of what a micro-batch costs.
    """
    model, sizes = GPT(config), sizes_of(config)
    plans = [plan for plan in CALIBRATION if _can_be(plan, sizes, batch_size)]
    taken_s = measure_plans(model, plans, a_batch(config, batch_size), _NUM_ROUNDS, _NUM_STEPS)
    steps_s = {plan: median(seconds) for plan, seconds in taken_s.items()}
    found = calibrated(described(dataclasses.replace(probe(), gpus=())), sizes, batch_size, steps_s)
    return dataclasses.replace(found, source=f"{found.source}, and steps of training")


def _can_be(plan: Plan, model: Transformer, batch_size: int) -> bool:
    try:
        share_of(plan, model, batch_size)
    except MplabError:
        return False
    return True


def run_plan(plan: Plan, config: GPTConfig, batch_size: int, num_steps: int) -> PlanRun:
    """Train a fresh GPT for some steps, and one more before them, on thread ranks of this machine's cores.

    Args:
        plan: how.
        config: of the GPT; it always begins with the same weights.
        batch_size: samples of every step, always the same.
        num_steps: that count, 1 or more.

    Raises:
        Exception: what a rank raised.
    """
    world = World(plan.num_ranks, "cpu")
    losses = world.run(_train, GPT(config), plan, a_batch(config, batch_size), 1 + num_steps)[0]
    taken = steps(world.timeline)[1:]
    step = median_step(taken)
    alone = _losses_of_one(config, batch_size, 1 + num_steps)
    return PlanRun(
        losses,
        step,
        [max(event.end_s for event in each.events) for each in taken],
        measured_parts(step),
        max(abs(a - b) for a, b in zip(losses, alone, strict=True)),
    )


def measured_parts(step: Timeline) -> MeasuredParts:
    """What a step is made of, the mean of all ranks.

    Args:
        step: as `mplab.trace.compare.steps` gives it.
    """
    end_s, of_ranks = max(event.end_s for event in step.events), []
    for rank in range(step.num_ranks):
        events = step.rank(rank)
        away = merge((e.start_s, e.end_s) for e in events if e.lane != "compute")
        update = merge((e.start_s, e.end_s) for e in events if e.name == "update")
        updating_s = length_s(update) - overlap_s(update, away)
        of_ranks.append((end_s - length_s(away) - updating_s, length_s(away), updating_s))
    return MeasuredParts(*map(mean, zip(*of_ranks, strict=True)))


@cache
def _losses_of_one(config: GPTConfig, batch_size: int, num_steps: int) -> list[float]:
    return World(1, "cpu").run(_train, GPT(config), Plan(), a_batch(config, batch_size), num_steps)[0]


def _train(rank: Rank, model: GPT, plan: Plan, batch: Batch, num_steps: int) -> list[float]:
    """One rank's side: the losses."""
    engine, losses = HybridParallel(model, rank.comm, plan), []
    for _ in range(num_steps):
        rank.comm.barrier()
        with rank.trace.span("step"):
            losses.append(engine.step(batch))
    return losses
