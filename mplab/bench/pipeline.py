"""One step of a pipeline of two thread ranks beside torch's own pipelines between two gloo processes.

Every side trains the same GPT (fp32; an embedding, four blocks, a head; width 256 "medium", 128 "small") on the same 16
sequences of 128 tokens, in 8 micro-batches, cut at the same places, with one torch thread a rank. A step is zero_grad,
all micro-batches forward and backward, and an update by plain SGD. Peers are the schedules of
torch.distributed.pipelining, which need not return outputs nor divide gradients here, and "one process" without any
pipeline, the whole batch at once, with as many torch threads as there are ranks. Before anything is timed, the losses
of two steps of every side must be those of one process.
All sides run in every round, some steps in a row. A step lasts from when the last rank finished the step before to when
the last rank finished this one, and the round's time is the median of its steps. While one side runs, the others sleep.
bubble is the share of a step, from its first computation to its last, in which a rank does not compute: the mean over
ranks, the median over steps. schedule_bubble is that of equal stages, free messages and a backward of two forwards.
"activation memory" is no time but the ratio of the most bytes that autograd keeps on a rank from forwards to backwards,
parameters left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from mplab.bench import torch_pipeline
from mplab.bench.all_reduce import call_s
from mplab.bench.common import Row, compare, paired
from mplab.bench.torch_pipeline import CUTS, LEARNING_RATE, NUM_MICROBATCHES, NUM_RANKS, batch, gpt
from mplab.datasets import Batch
from mplab.errors import MplabError
from mplab.parallel import PipelineParallel, Serial
from mplab.plan.schedule import build
from mplab.trace.saved import SavedBytes
from mplab.trace.timeline import Timeline
from mplab.world.children import GlooProcesses
from mplab.world.rank import Rank
from mplab.world.world import World

WIDTHS = {"medium": 256, "small": 128}
NUM_ROUNDS = 7
NUM_STEPS = 3  # that are timed of a side in a round, after one that is not
TOLERANCE = 1e-4
# Schedules and what they are called, in the order of a round.
NAMES = {"zero_bubble": "zero-bubble", "1f1b": "1F1B", "gpipe": "GPipe", "interleaved": "interleaved"}

Spans: TypeAlias = Sequence[tuple[int, int]]
"""Start and end of each computation of a rank in one step, in nanoseconds."""


def run(
    widths: Mapping[str, int] = WIDTHS,
    num_rounds: int = NUM_ROUNDS,
    num_steps: int = NUM_STEPS,
    schedules: Sequence[str] = tuple(NAMES),
) -> list[Row]:
    """Every schedule with every size of the model.

    Args:
        widths: of the models, by name.
        num_rounds: rounds of each size.
        num_steps: timed steps of a side in a round.
        schedules: some of `NAMES`; "zero_bubble" needs "1f1b".
    """
    rows = []
    for size, width in widths.items():
        with GlooProcesses(NUM_RANKS) as gloo:
            rows += _rows(size, width, gloo, num_rounds, num_steps, schedules)
    return rows


def _rows(
    size: str, width: int, gloo: GlooProcesses, num_rounds: int, num_steps: int, schedules: Sequence[str]
) -> list[Row]:
    one = OneProcess(gpt(width), batch())
    ours = {s: Ours(s, width) for s in schedules}
    peers = {s: Torch(s, width, gloo) for s in schedules}
    expected = one.losses()
    for s in schedules:
        check(f"{NAMES[s]} {size}", ours[s].losses(), expected)
        check(f"torch {NAMES[s]} {size}", peers[s].losses(), expected)

    # Neighbours in a round are those that are held against each other: zero-bubble is, with both of torch's.
    sides = [side for s in schedules for side in (peers[s], ours[s])]
    times = paired(*(partial(side.step_s, num_steps) for side in (one, *sides)), num_rounds=num_rounds, name=size)
    one_s, *sides_s = times
    of_side = dict(zip(sides, sides_s, strict=True))
    rows = []
    for s in schedules:
        case, bubbles = f"{NAMES[s]} {size}", statistics.median(ours[s].bubbles)
        own = statistics.mean(build(s, NUM_RANKS, NUM_MICROBATCHES).bubble())
        mine = partial(compare, case, ours_s=of_side[ours[s]], bubble=bubbles, schedule_bubble=own)
        for other in ("1f1b", s) if s == "zero_bubble" else (s,):
            peer_bubble = statistics.median(peers[other].bubbles)
            rows.append(mine(peer=f"torch {NAMES[other]}", peer_s=of_side[peers[other]], peer_bubble=peer_bubble))
        rows.append(mine(peer="one process", peer_s=one_s))
    if "gpipe" in schedules:
        rows += [
            _memory_row(size, "GPipe", ours["1f1b"].saved_bytes(), ours["gpipe"].saved_bytes()),
            _memory_row(size, "torch 1F1B", ours["1f1b"].saved_bytes(), peers["1f1b"].saved_bytes()),
        ]
    return rows


def _memory_row(size: str, peer: str, ours_bytes: Sequence[int], peer_bytes: Sequence[int]) -> Row:
    """Both sides' ranks that keep the most."""
    ratio = max(ours_bytes) / max(peer_bytes)
    note = f"{max(ours_bytes) / 1e6:.1f} MB beside {max(peer_bytes) / 1e6:.1f} MB"
    return Row(f"activation memory, 1F1B {size}", peer, ratio, ratio, ratio, 1, {"note": note})


def check(who: str, losses: Sequence[float], expected: Sequence[float]) -> None:
    """Refuse to time what does not train as one process does.

    Raises:
        MplabError: its losses differ.
    """
    if len(losses) != len(expected) or any(
        not abs(a - b) < TOLERANCE
        for a, b in zip(losses, expected, strict=True)  # nan is no smaller
    ):
        raise MplabError(f"{who}: its losses {losses} are not one process's, {expected}")


def bubbles(steps: Sequence[Sequence[Spans]]) -> list[float]:
    """The mean idle share of the ranks in every step.

    Args:
        steps: of every rank, of every step.
    """
    shares = []
    for of_ranks in zip(*steps, strict=True):
        first = min(start for spans in of_ranks for start, _ in spans)
        last = max(end for spans in of_ranks for _, end in spans)
        busy = [sum(end - start for start, end in spans) for spans in of_ranks]
        shares.append(1 - statistics.mean(busy) / (last - first))
    return shares


class OneProcess:
    """The whole model in this process.

    Args:
        model: it is trained.
        batch: of every step.
        num_checked: steps whose losses are compared.
        num_threads: of torch, while it is timed.
    """

    def __init__(self, model: nn.Module, batch: Batch, num_checked: int = 2, num_threads: int = NUM_RANKS) -> None:
        self._serial = Serial(model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE))
        self._batch, self._num_checked, self._num_threads = batch, num_checked, num_threads

    def losses(self) -> list[float]:
        """Of the first steps."""
        return [self._serial.step(self._batch) for _ in range(self._num_checked)]

    def step_s(self, num_steps: int) -> float:
        """Seconds of a step."""
        num_threads = torch.get_num_threads()
        torch.set_num_threads(self._num_threads)
        try:
            self._serial.step(self._batch)
            stamps = [time.perf_counter_ns()]
            for _ in range(num_steps):
                self._serial.step(self._batch)
                stamps.append(time.perf_counter_ns())
        finally:
            torch.set_num_threads(num_threads)
        return call_s([stamps])


class Ours:
    """Thread ranks under one schedule."""

    def __init__(self, schedule: str, width: int) -> None:
        self._schedule = build(schedule, NUM_RANKS, NUM_MICROBATCHES)
        self._world, self._batch = World(NUM_RANKS, "cpu"), batch()
        self._engines: list[PipelineParallel] = self._world.run(self._make, width)
        self.bubbles: list[float] = []

    def _make(self, rank: Rank, width: int) -> PipelineParallel:
        cuts, optimizer = CUTS[self._schedule.num_stages], partial(torch.optim.SGD, lr=LEARNING_RATE)
        return PipelineParallel(gpt(width), cuts, rank.comm, self._schedule, optimizer=optimizer)

    def _connected(self, rank: Rank) -> PipelineParallel:
        engine = self._engines[rank.index]
        engine.connect(rank.comm)
        return engine

    def losses(self) -> list[float]:
        """Of the first two steps."""

        def steps(rank: Rank) -> list[float]:
            engine = self._connected(rank)
            return [engine.step(self._batch) for _ in range(2)]

        return self._world.run(steps)[-1]

    def step_s(self, num_steps: int) -> float:
        """Seconds of a step; `bubbles` gets those of all steps."""

        def stamps(rank: Rank) -> list[int]:
            engine = self._connected(rank)
            engine.step(self._batch)
            rank.comm.barrier()
            times = [time.perf_counter_ns()]
            for _ in range(num_steps):
                engine.step(self._batch)
                times.append(time.perf_counter_ns())
            return times

        seconds = call_s(self._world.run(stamps))
        self.bubbles += bubbles([self._spans(self._world.timeline, rank, num_steps) for rank in range(NUM_RANKS)])
        return seconds

    def _spans(self, timeline: Timeline, rank: int, num_steps: int) -> list[Spans]:
        """Of the last steps."""
        size = len(self._schedule.ranks[rank])
        spans = [
            (round(e.start_s * 1e9), round(e.end_s * 1e9))
            for e in timeline.rank(rank)
            if e.lane == "compute" and e.name != "update"
        ]
        return [spans[i : i + size] for i in range(len(spans) - num_steps * size, len(spans), size)]

    def saved_bytes(self) -> list[int]:
        """The most bytes that autograd keeps on each rank."""

        def peak(rank: Rank) -> int:
            engine = self._connected(rank)
            with SavedBytes(p for stage in engine.stages.values() for p in stage.parameters()) as saved:
                engine.step(self._batch)
            return saved.peak_bytes

        return self._world.run(peak)


class Torch:
    """Gloo processes under torch's schedule of the same name."""

    def __init__(self, schedule: str, width: int, gloo: GlooProcesses) -> None:
        self._call: Any = lambda fn, *args: gloo.call(fn, schedule, width, *args)
        self.bubbles: list[float] = []

    def losses(self) -> list[float]:
        """Of the first two steps."""
        return list(self._call(torch_pipeline.losses, 2)[-1])

    def step_s(self, num_steps: int) -> float:
        """Seconds of a step; `bubbles` gets those of all steps."""
        of_ranks = self._call(torch_pipeline.times, num_steps)
        self.bubbles += bubbles([of_rank["steps"] for of_rank in of_ranks])
        return call_s([of_rank["stamps"] for of_rank in of_ranks])

    def saved_bytes(self) -> list[int]:
        """The most bytes that autograd keeps on each rank."""
        return list(self._call(torch_pipeline.saved_bytes))
