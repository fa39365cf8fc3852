"""A step of `DataParallel`: measured once without messages, predicted with them, and really run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mplab.datasets import Batch, shard
from mplab.parallel import DataParallel
from mplab.parallel.buckets import Bucket, make_buckets
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.serial import LossFunction
from mplab.plan.cost import Link
from mplab.plan.simulate import FREE
from mplab.plan.traffic import Traffic, chunk_lengths, direct_traffic
from mplab.trace.compare import median_step, steps
from mplab.trace.event import LANES, Event
from mplab.trace.intervals import length_s, merge, overlap_s
from mplab.trace.recorder import Mark, seconds_between
from mplab.trace.timeline import PREDICTED_NOTE, Timeline
from mplab.world import Rank, World

_NUM_WARMUPS, _NUM_REPEATS = 2, 5
_CLOSING_BYTES = 8  # float64


class Setting(NamedTuple):
    """What can be chosen.

    Args:
        bucket_bytes: size of a bucket.
        link: an emulated one; None: as fast as this machine is.
        overlap: whether buckets are reduced while backward goes on.
    """

    bucket_bytes: int
    link: Link | None
    overlap: bool


class Work(NamedTuple):
    """What a rank computes in a step, in seconds.

    Args:
        forward_s: of its shard.
        backward_s: of its shard.
        update_s: of the optimizer.
        there_s: of each trained parameter, from the start of the backward to when its gradient is there.
    """

    forward_s: float
    backward_s: float
    update_s: float
    there_s: list[float]


class Run(NamedTuple):
    """Some steps that really ran.

    Args:
        losses: of every step, before its update.
        step: the one of median length, the first left out.
        num_buckets: reduced in each.
        num_messages: that rank 0 sent in each.
        sent_bytes: by rank 0 in each.
    """

    losses: list[float]
    step: Timeline
    num_buckets: int
    num_messages: int
    sent_bytes: int


class BucketStep:
    """Measures what a step computes, when it is made; after that a prediction takes no run.

    Args:
        model: it is copied, never changed.
        world: its ranks.
        batch: inputs and targets of every step.
        loss_fn: outputs and targets -> mean loss.
        optimizer: makes an optimizer of parameters.
    """

    def __init__(
        self, model: nn.Module, world: World, batch: Batch, loss_fn: LossFunction, optimizer: OptimizerFactory
    ) -> None:
        self._model, self._world, self._batch = model, world, batch
        self._loss_fn, self._optimizer = loss_fn, optimizer
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        with _keeping_random_numbers(world):
            times_s = torch.stack(self._over(None).run(self._measure))  # (ranks, repeats, what is measured)
        forward_s, backward_s, update_s, *there_s = times_s.flatten(0, 1).quantile(0.5, dim=0).tolist()
        self.work = Work(forward_s, backward_s, update_s, there_s)

    def buckets(self, setting: Setting) -> list[Bucket]:
        """The buckets, in the order in which they are reduced."""
        return make_buckets(self._parameters, setting.bucket_bytes)

    def traffic(self, setting: Setting, rank: int = 0) -> list[Traffic]:
        """A rank's messages for every bucket, and at last for what closes the step."""
        sizes = [
            (sum(p.numel() for p in bucket.parameters), bucket.parameters[0].element_size())
            for bucket in self.buckets(setting)
        ]
        return [
            direct_traffic("all_reduce", rank, [n * item_bytes for n in chunk_lengths(length, self._world.size)])
            for length, item_bytes in [*sizes, (2 + len(self._parameters), _CLOSING_BYTES)]
        ]

    def predict(self, setting: Setting) -> Timeline:
        """The step as it should go: a bucket leaves when it is full and the one before it has arrived."""
        work, link, ranks = self.work, setting.link or FREE, range(self._world.size)
        there_s = dict(zip(self._parameters, work.there_s, strict=True))
        computed_s = work.forward_s + work.backward_s
        leaves_s = [
            work.forward_s + max(there_s[p] for p in bucket.parameters) if setting.overlap else computed_s
            for bucket in self.buckets(setting)
        ]
        events = [Event(r, "compute", "forward", 0, work.forward_s) for r in ranks]
        events += [Event(r, "compute", "backward", work.forward_s, computed_s) for r in ranks]
        free_s = 0.0  # when the link is
        of_ranks = [self.traffic(setting, r) for r in ranks]
        for leave_s, *traffic in zip([*leaves_s, computed_s], *of_ranks, strict=True):
            start_s = max(leave_s, free_s)
            free_s = start_s + max(link.time_s(t.num_sent, t.sent_bytes) for t in traffic)
            events += [Event(r, "message", "all_reduce", start_s, free_s, traffic[r].sent_bytes) for r in ranks]
        events += [Event(r, "wait", "all_reduce", computed_s, free_s) for r in ranks]
        events += [Event(r, "compute", "update", free_s, free_s + work.update_s) for r in ranks]
        notes = self._over(setting.link).notes
        if setting.link is None:
            notes = ("messages through memory take no time", *notes)
        return Timeline(events, self._world.size, (PREDICTED_NOTE, *notes))

    def run(self, setting: Setting, num_steps: int) -> Run:
        """Train a fresh copy of the model for some steps.

        Raises:
            Exception: what a rank raised.
        """
        world = self._over(setting.link)
        with _keeping_random_numbers(world):
            (losses, num_buckets), *_ = world.run(self._train, setting, num_steps)
        step = median_step(steps(world.timeline)[1:])
        ledger = world.ledgers[0]
        sent = [*ledger.of("all_reduce_coalesced_"), *ledger.of("all_reduce_")]
        return Run(
            losses,
            replace(step, title="Median step"),
            num_buckets,
            sum(message.num_messages for message in sent) // num_steps,
            sum(message.sent_bytes for message in sent) // num_steps,
        )

    def _over(self, link: Link | None) -> World:
        """The same ranks, with another link between them."""
        world = copy.copy(self._world)
        world.link = link
        return world

    def _measure(self, rank: Rank) -> Tensor:
        """Seconds of every repeat, on one rank: forward, backward, update, and when each gradient was there."""
        how: dict[str, Any] = {"overlap": False, "loss_fn": self._loss_fn, "optimizer": self._optimizer}
        parallel = DataParallel(self._model, rank.comm, **how)
        parameters = [p for p in parallel.model.parameters() if p.requires_grad]
        inputs, targets = (x.to(rank.device) for x in shard(self._batch, rank.comm))
        now, there = rank.trace.now, dict[int, Mark]()  # no parameter: its hook would keep it for ever

        def write_down(p: Tensor) -> None:
            there[id(p)] = now()

        for p in parameters:
            p.register_post_accumulate_grad_hook(write_down)
        times = []
        for _ in range(_NUM_WARMUPS + _NUM_REPEATS):
            rank.comm.barrier()
            there.clear()
            parallel.optimizer.zero_grad()
            marks = [now()]
            loss = self._loss_fn(parallel.model(inputs), targets)
            marks.append(now())
            with parallel.no_sync():
                parallel.backward(loss)
            marks.append(now())
            parallel.optimizer.step()
            marks.append(now())
            seconds = [seconds_between(a, b) for a, b in pairwise(marks)]
            seconds += [seconds_between(marks[1], there.get(id(p), marks[2])) for p in parameters]
            times.append(seconds)
        return torch.tensor(times[_NUM_WARMUPS:], dtype=torch.float64)

    def _train(self, rank: Rank, setting: Setting, num_steps: int) -> tuple[list[float], int]:
        """One rank's side: the losses, and the number of buckets."""
        how: dict[str, Any] = {"loss_fn": self._loss_fn, "optimizer": self._optimizer}
        parallel = DataParallel(self._model, rank.comm, setting.bucket_bytes, setting.overlap, **how)
        losses = []
        for _ in range(num_steps):
            rank.comm.barrier()
            with rank.trace.span("step"):
                losses.append(parallel.step(self._batch))
        return losses, len(parallel.buckets)


def messages_s(timeline: Timeline, rank: int) -> float:
    """Seconds in which a rank has a message under way."""
    return length_s(_lanes(timeline, rank)["message"])


def stalled_s(timeline: Timeline, rank: int) -> float:
    """Seconds in which a rank has a message under way, or waits for one, and computes nothing."""
    lanes = _lanes(timeline, rank)
    away = merge([*lanes["message"], *lanes["wait"]])
    return length_s(away) - overlap_s(away, lanes["compute"])


def hidden_share(timeline: Timeline) -> float:
    """The part of the time of all ranks' messages in which the rank's backward went on; 0 where they take no time."""
    hidden_s = sum(
        overlap_s(
            _lanes(timeline, rank)["message"],
            merge((e.start_s, e.end_s) for e in timeline.rank(rank) if e.name == "backward"),
        )
        for rank in range(timeline.num_ranks)
    )
    total_s = sum(messages_s(timeline, rank) for rank in range(timeline.num_ranks))
    return hidden_s / total_s if total_s else 0.0


def _lanes(timeline: Timeline, rank: int) -> dict[str, list[tuple[float, float]]]:
    events = timeline.rank(rank)
    return {lane: merge((e.start_s, e.end_s) for e in events if e.lane == lane) for lane in LANES}


@contextmanager
def _keeping_random_numbers(world: World) -> Iterator[None]:
    """Outside of the ranks, since all of them share what dropout draws from."""
    gpus = sorted({device.index or 0 for device in world.devices if device.type == "cuda"})
    with torch.random.fork_rng(gpus):
        yield
