"""What a step of each of many plans takes on this machine's cores; all in turn, so that all see the same machine."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from mplab.datasets import Batch
from mplab.errors import MplabError
from mplab.models import cross_entropy
from mplab.parallel.check_plan import check_plan
from mplab.parallel.hybrid import HybridParallel
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.serial import check_batch
from mplab.parallel.shares import check_count, check_training
from mplab.plan.layout import Plan, refuse
from mplab.world import Rank, World
from mplab.world.progress import progress


def measure_plans(
    model: nn.Module,
    plans: Iterable[Plan],
    batch: Batch,
    num_rounds: int = 5,
    num_steps: int = 3,
    optimizer: OptimizerFactory = torch.optim.AdamW,
) -> dict[Plan, list[float]]:
    """Train by every plan in turn, again and again, each on thread ranks of this machine's cores, one core a rank.

    In each round every plan is laid out anew, so that only one of them holds memory, and takes a step that does not
    count; every other round goes from the last plan to the first. A step lasts from when the last rank finished the
    step before to when the last rank finished this one.

        seconds = measure_plans(GPT(config), [Plan(dp=2), Plan(tp=2)], batch)
        best = min(seconds, key=lambda plan: statistics.median(seconds[plan]))

    Args:
        model: it is not changed.
        plans: how; their numbers of ranks may differ, and be more than there are cores.
        batch: inputs and targets, of all replicas together.
        num_rounds: how often each plan is measured.
        num_steps: steps of a plan in a round, of which the median counts.
        optimizer: makes the optimizer of each rank's parameters.

    Returns:
        For each plan, in the order given, the seconds of a step in every round.

    Raises:
        MplabError: no plans, or one twice; plans that this model or batch can't have: all of their faults, before
            anything runs.
    """
    for name, number in (("num_rounds", num_rounds), ("num_steps", num_steps)):
        check_count(name, number)
    check_training(model, cross_entropy, optimizer, 1, None, None)
    plans, num_samples = list(plans), check_batch(batch)
    refuse(_faults(model, plans, num_samples), "these plans can't be measured")
    seconds: dict[Plan, list[float]] = {plan: [] for plan in plans}
    turns = [plan for r in range(num_rounds) for plan in (plans if r % 2 == 0 else reversed(plans))]
    # Most of what there is, by the caller, who keeps it so. (Python 3.12 begins with a few hundred frozen objects.)
    is_frozen = gc.get_freeze_count() > len(gc.get_objects())
    if not is_frozen:
        gc.freeze()  # what was there before is not looked through again and again
    try:
        for plan in progress(turns, len(turns), "plans", "plan"):
            stamps_ns = World(plan.num_ranks, "cpu").run(_stamps, model, plan, batch, num_steps, optimizer)
            ends = [max(of_all) for of_all in zip(*stamps_ns, strict=True)]
            seconds[plan].append(1e-9 * statistics.median(end - before for before, end in pairwise(ends)))
            gc.collect()  # what a plan's ranks held is there no more when the next one's are made
    finally:
        if not is_frozen:
            gc.unfreeze()
    return seconds


def _faults(model: nn.Module, plans: Sequence[Plan], num_samples: int) -> Iterator[str]:
    if not plans:
        yield "no plans: give one or more, as candidates(...) finds them"
    for plan in plans:
        if plans.count(plan) > 1:
            yield f"{plan} is there {plans.count(plan)} times: give each plan once"
        try:
            check_plan(model, plan.num_ranks, plan, cross_entropy, None)
        except MplabError as error:
            yield str(error)
        if num_samples < (needed := plan.dp * plan.num_microbatches):
            yield (
                f"{plan}: a batch of {num_samples} samples is too small: take {needed} or more, one for each "
                "micro-batch of each replica"
            )


def _stamps(
    rank: Rank, model: nn.Module, plan: Plan, batch: Batch, num_steps: int, optimizer: OptimizerFactory
) -> list[int]:
    """When this rank had the first step, then each further one (`perf_counter_ns`)."""
    engine = HybridParallel(model, rank.comm, plan, optimizer=optimizer)
    times = []
    for _ in range(1 + num_steps):
        engine.step(batch)
        times.append(time.perf_counter_ns())
    return times


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: 1 where both have the same order, -1 where one is the other's reverse; nan where one has none.

    Args:
        a: some numbers.
        b: as many.
    """
    places = np.array([_places(a), _places(b)])
    if min(np.ptp(places, axis=1)) == 0:
        return math.nan
    return float(np.corrcoef(places)[0, 1])


def _places(numbers: Sequence[float]) -> list[float]:
    """Of each its place in the order; equal ones share the mean of theirs."""
    ordered = np.sort(numbers)
    ends = np.searchsorted(ordered, numbers, "left") + np.searchsorted(ordered, numbers, "right")
    return [float(end) / 2 for end in ends]
