"""One step of data parallelism on two ranks beside torch's DistributedDataParallel between two gloo processes.

Every side trains the same GPT (fp32, four blocks) on the same batch, with one torch thread a rank, and is named by its
number of parameters: three whose step is mostly computation, and "14 M" with 4 samples of 16 tokens, whose 56 MB of
gradients weigh as much. A step is zero_grad, forward and backward, the gradients of all ranks added up, and an update
by plain SGD. Ours returns the mean loss over the whole batch, which costs a message; torch's returns that of the rank's
own samples. DDP has its default buckets of 25 MB, and gradient_as_bucket_view, with which "5 M" and "14 M" are faster
and the others as fast. Peers are DDP and "one process" without any message, the whole batch at once, with as many torch
threads as there are ranks. "gloo processes" is this library's data parallelism between two processes over gloo; all
else are thread ranks. Before anything is timed, the losses of three steps of every side must be those of one process.
All sides run in every round, some steps in a row. A step lasts from when the last rank finished the step before to when
the last rank finished this one, and the round's time is the median of its steps. While one side runs, the others sleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Protocol

import torch

from mplab.bench import pipeline, torch_data
from mplab.bench.all_reduce import call_s
from mplab.bench.common import Row, compare, paired
from mplab.bench.pipeline import check
from mplab.bench.torch_data import LEARNING_RATE, NUM_RANKS, SIZES, Size, batch, gpt
from mplab.comm.communicator import Communicator
from mplab.datasets import Batch
from mplab.parallel import DataParallel
from mplab.world.children import TIMEOUT_S, GlooProcesses
from mplab.world.join import Member
from mplab.world.launch import ProcessWorld
from mplab.world.rank import Rank
from mplab.world.world import World

NUM_ROUNDS = 9
NUM_STEPS = 5  # that are timed of a side in a round, after one that is not
NUM_CHECKED = 3  # steps whose losses are compared first


def run(sizes: Mapping[str, Size] = SIZES, num_rounds: int = NUM_ROUNDS, num_steps: int = NUM_STEPS) -> list[Row]:
    """Every size, on thread ranks and between processes.

    Args:
        sizes: of the models and batches, by name.
        num_rounds: rounds of each size.
        num_steps: timed steps of a side in a round.
    """
    rows = []
    for name, size in sizes.items():
        with GlooProcesses(NUM_RANKS) as gloo, GlooProcesses(NUM_RANKS) as ours:
            rows += _rows(name, size, gloo, ours, num_rounds, num_steps)
    return rows


def _rows(
    name: str, size: Size, gloo: GlooProcesses, ours: GlooProcesses, num_rounds: int, num_steps: int
) -> list[Row]:
    one, ddp = OneProcess(size), Torch("DDP", size, gloo)
    cases: dict[str, Threads | Processes] = {
        name: Threads(data_parallel, size),
        f"{name}, gloo processes": Processes(size, ours),
    }
    expected = one.losses()
    check(f"DDP {name}", ddp.losses(), expected)
    for case, side in cases.items():
        check(case, side.losses(), expected)
    times = paired(
        *(partial(side.step_s, num_steps) for side in (one, ddp, *cases.values())), num_rounds=num_rounds, name=name
    )
    one_s, ddp_s, *ours_s = times
    rows = []
    for case, case_s in zip(cases, ours_s, strict=True):
        rows += [compare(case, "DDP", case_s, ddp_s), compare(case, "one process", case_s, one_s)]
    return rows


class Engine(Protocol):
    """What trains a model on a rank."""

    def connect(self, comm: Communicator) -> None:
        """Go on in another run."""

    def step(self, batch: Batch) -> float:
        """One update on the whole batch."""


def data_parallel(rank: Rank, size: Size) -> Engine:
    """A rank's engine."""
    return DataParallel(gpt(size), rank.comm, optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE))


def losses(rank: Rank, engine: Engine, size: Size) -> list[float]:
    """Of the first steps, of the whole batch."""
    engine.connect(rank.comm)
    return [engine.step(batch(size)) for _ in range(NUM_CHECKED)]


def stamps(rank: Rank, engine: Engine, size: Size, num_steps: int) -> list[int]:
    """When the start barrier ended for this rank, then each step (`perf_counter_ns`)."""
    engine.connect(rank.comm)
    whole = batch(size)
    engine.step(whole)
    rank.comm.barrier()
    times = [time.perf_counter_ns()]
    for _ in range(num_steps):
        engine.step(whole)
        times.append(time.perf_counter_ns())
    return times


class Threads:
    """Thread ranks.

    Args:
        make: a rank and the size -> its engine.
        size: of the model and the batch.
    """

    def __init__(self, make: Callable[[Rank, Size], Engine], size: Size) -> None:
        self._world, self._size = World(NUM_RANKS, "cpu"), size
        self._engines = self._world.run(make, size)

    def losses(self) -> list[float]:
        """Of the first steps."""
        return self._world.run(lambda rank: losses(rank, self._engines[rank.index], self._size))[-1]

    def step_s(self, num_steps: int) -> float:
        """Seconds of a step."""
        return call_s(self._world.run(lambda rank: stamps(rank, self._engines[rank.index], self._size, num_steps)))


class Processes:
    """The same between gloo processes, which are told to call the two functions below."""

    def __init__(self, size: Size, gloo: GlooProcesses) -> None:
        self._size, self._gloo = size, gloo

    def losses(self) -> list[float]:
        """Of the first steps."""
        return list(self._gloo.call(losses_here, self._size)[-1])

    def step_s(self, num_steps: int) -> float:
        """Seconds of a step."""
        return call_s(self._gloo.call(stamps_here, self._size, num_steps))


@cache
def world_here(rank: int) -> ProcessWorld:
    """This process's rank of a world over the connections that it has already."""
    return ProcessWorld(rank, [Member("", "", "cpu", "")] * NUM_RANKS, TIMEOUT_S)


@cache
def engine_here(rank: int, size: Size) -> Engine:
    """This process's engine."""
    return world_here(rank).run(data_parallel, size)[0]


def losses_here(rank: int, size: list[int]) -> list[float]:
    """This process's side of `Processes.losses`."""
    engine = engine_here(rank, Size(*size))
    return world_here(rank).run(losses, engine, Size(*size))[0]


def stamps_here(rank: int, size: list[int], num_steps: int) -> list[int]:
    """This process's side of `Processes.step_s`."""
    engine = engine_here(rank, Size(*size))
    return world_here(rank).run(stamps, engine, Size(*size), num_steps)[0]


class Torch:
    """Gloo processes under torch's own data parallelism.

    Args:
        kind: see `torch_data.Side`.
        size: of the model and the batch.
        gloo: the processes.
    """

    def __init__(self, kind: str, size: Size, gloo: GlooProcesses) -> None:
        self._call: Any = lambda fn, *args: gloo.call(fn, kind, size, *args)

    def losses(self) -> list[float]:
        """Of the first steps, over all ranks, whose shards are equal."""
        return [sum(of_ranks) / NUM_RANKS for of_ranks in zip(*self._call(torch_data.losses, NUM_CHECKED), strict=True)]

    def step_s(self, num_steps: int) -> float:
        """Seconds of a step."""
        return call_s(self._call(torch_data.stamps, num_steps))

    def memory_bytes(self) -> list[int]:
        """Parameters, gradients and AdamW's state on each rank."""
        return list(self._call(torch_data.memory_bytes))


class OneProcess(pipeline.OneProcess):
    """The whole model and batch in this process."""

    def __init__(self, size: Size) -> None:
        super().__init__(gpt(size), batch(size), NUM_CHECKED)
