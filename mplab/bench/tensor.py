"""One step of tensor parallelism on two thread ranks beside torch's DTensor between two gloo processes.

Every side trains the same model (fp32) on the same batch, with one torch thread a rank. A GPT has four blocks and a
head that is not tied, and is cut in attention, MLPs and vocabulary; width, tokens of a sample and samples are 256, 128,
8 "medium", 128, 64, 8 "small", 64, 32, 4 "tiny". "MLP 256" and "MLP 1024" are a norm and the MLP of a block of that
width (with a hidden layer of four times as many), on 8 samples of 128 positions. A step is zero_grad, forward, backward
and an update by plain SGD, and gives the loss.
"DTensor" is parallelize_module with ColwiseParallel, RowwiseParallel and PrepareModuleInput (query, key and value read
one DTensor). A GPT is trained by two plans, gathering the logits or with loss_parallel, and held against the one with
the smaller median: peer_plan. Other peers are plain training in one process without any message: "one thread", and
"one process" with as many torch threads as there are ranks. "gloo processes" is this library's tensor parallelism
between two processes over gloo; all else are thread ranks. "sequence parallel" is held against DTensor's own
(SequenceParallel of the norms), too. Before anything is timed, the losses of three steps of every side must be those of
one process, and DTensor's ranks must have as many bytes of parameters as ours.
All sides run in every round, some steps in a row. A step lasts from when the last rank finished the step before to when
the last rank finished this one, and the round's time is the median of its steps. While one side runs, the others sleep.
It shows what cutting costs on cores that share their memory: at these sizes most of DTensor's step is its own work in
Python and gloo's messages, which weigh less in larger models and beside a GPU. It can't show how either side scales to
more ranks or over a network, nor that tensor parallelism pays: "one process" has the same cores and sends nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from mplab.bench import data, torch_tensor
from mplab.bench.all_reduce import call_s
from mplab.bench.common import Row, compare, paired
from mplab.bench.data import NUM_CHECKED, NUM_ROUNDS, NUM_STEPS, Threads, world_here
from mplab.bench.pipeline import OneProcess, check
from mplab.bench.torch_data import LEARNING_RATE, NUM_RANKS, Size
from mplab.bench.torch_tensor import GPT_PLANS, MLP_PLANS, SEQUENCE_PLANS, batch, bytes_of, model
from mplab.datasets import Batch
from mplab.errors import MplabError
from mplab.parallel import TensorParallel
from mplab.world.children import GlooProcesses
from mplab.world.rank import Rank
from mplab.world.world import World


class Case(NamedTuple):
    """What is trained.

    Args:
        kind: "GPT" or "MLP".
        size: of the model and the batch.
        sequence_parallel: time that, too.
    """

    kind: str
    size: Size
    sequence_parallel: bool = False


CASES = {
    "GPT medium": Case("GPT", Size(256, 128, 8)),
    "GPT small": Case("GPT", Size(128, 64, 8), sequence_parallel=True),
    "GPT tiny": Case("GPT", Size(64, 32, 4)),
    "MLP 256": Case("MLP", Size(256, 128, 8)),
    "MLP 1024": Case("MLP", Size(1024, 128, 8)),
}
OUR_PLANS = {"GPT": None, "MLP": {"mlp.up": "column", "mlp.down": "row"}}  # None: the model's own


def run(cases: Mapping[str, Case] = CASES, num_rounds: int = NUM_ROUNDS, num_steps: int = NUM_STEPS) -> list[Row]:
    """Every case, on thread ranks and between processes.

    Args:
        cases: what is trained, by name.
        num_rounds: rounds of each case.
        num_steps: timed steps of a side in a round.
    """
    rows = []
    with GlooProcesses(NUM_RANKS) as gloo, GlooProcesses(NUM_RANKS) as ours:
        for name, case in cases.items():
            rows += _rows(name, case, gloo, ours, num_rounds, num_steps)
    return rows


def _rows(
    name: str, case: Case, gloo: GlooProcesses, ours: GlooProcesses, num_rounds: int, num_steps: int
) -> list[Row]:
    kind, size, has_sequence = case
    plans, sequence_plans = GPT_PLANS if kind == "GPT" else MLP_PLANS, SEQUENCE_PLANS if has_sequence else ()
    sequence_name = f"{name}, sequence parallel"
    with_sequence = {sequence_name: Threads(partial(tensor_parallel, kind, True), size)} if has_sequence else {}
    # Neighbours in a round are those that are held against each other.
    sides: dict[str, OneProcess | Threads | Processes] = {
        f"{name}, one process": one_process(kind, size, NUM_RANKS),
        f"{name}, gloo processes": Processes(ours, kind, size),
        **with_sequence,
        f"{name}, one thread": one_process(kind, size, 1),
        name: Threads(partial(tensor_parallel, kind, False), size),
    }
    peers = {plan: DTensor(gloo, plan, kind, size) for plan in (*plans, *sequence_plans)}
    expected, num_bytes = one_process(kind, size, 1).losses(), parameter_bytes(kind, size)
    for who, side in sides.items():
        check(who, side.losses(), expected)
    for plan, peer in peers.items():
        check(f"DTensor ({plan}) {name}", peer.losses(), expected)
        check_bytes(f"DTensor ({plan}) {name}", peer.parameter_bytes(), num_bytes)

    steps = [partial(side.step_s, num_steps) for side in (*sides.values(), *peers.values())]
    times = dict(zip((*sides, *peers), paired(*steps, num_rounds=num_rounds, name=name), strict=True))

    def beside(who: str, of_plans: Sequence[str], peer: str = "DTensor") -> Row:
        fastest = min(of_plans, key=lambda plan: statistics.median(times[plan]))
        return compare(who, peer, times[who], times[fastest], peer_plan=fastest)

    rows = [beside(who, plans) for who in (name, *(who for who in sides if who != name))]
    rows.insert(1, compare(name, "one thread", times[name], times[f"{name}, one thread"]))
    return rows + ([beside(sequence_name, sequence_plans, "DTensor, sequence parallel")] if has_sequence else [])


def one_process(kind: str, size: Size, num_threads: int) -> OneProcess:
    """The whole model and batch in this process."""
    return OneProcess(model(kind, size), batch(kind, size), NUM_CHECKED, num_threads)


def check_bytes(who: str, of_ranks: Sequence[int], expected: Sequence[int]) -> None:
    """Refuse to time what is not cut as ours is: where a plan cuts nothing the losses are right as well.

    Raises:
        MplabError: its ranks have other bytes of parameters.
    """
    if of_ranks != expected:
        raise MplabError(f"{who}: its ranks have {of_ranks} bytes of parameters, and ours {expected}")


class OwnBatch:
    """An engine that trains on a batch of its own, whichever it is given: an MLP takes no tokens."""

    def __init__(self, engine: TensorParallel, batch: Batch) -> None:
        self.engine, self._batch = engine, batch
        self.connect = engine.connect

    def step(self, _: Batch) -> float:
        """One update."""
        return self.engine.step(self._batch)


def tensor_parallel(kind: str, sequence_parallel: bool, rank: Rank, size: Size) -> OwnBatch:
    """A rank's engine."""
    optimizer = partial(torch.optim.SGD, lr=LEARNING_RATE)
    engine = TensorParallel(model(kind, size), rank.comm, OUR_PLANS[kind], sequence_parallel, optimizer=optimizer)
    return OwnBatch(engine, batch(kind, size))


def parameter_bytes(kind: str, size: Size) -> list[int]:
    """Of our ranks."""

    def of_rank(rank: Rank) -> int:
        return bytes_of(tensor_parallel(kind, False, rank, size).engine.model.parameters())

    return World(NUM_RANKS, "cpu").run(of_rank)


class Processes:
    """Tensor parallelism between gloo processes, which are told to call the two functions below."""

    def __init__(self, gloo: GlooProcesses, kind: str, size: Size) -> None:
        self._call: Any = lambda fn, *args: gloo.call(fn, kind, size, *args)

    def losses(self) -> list[float]:
        """Of the first steps."""
        return list(self._call(losses_here)[-1])

    def step_s(self, num_steps: int) -> float:
        """Seconds of a step."""
        return call_s(self._call(stamps_here, num_steps))


@cache
def engine_here(rank: int, kind: str, *size: int) -> OwnBatch:
    """This process's engine."""
    return world_here(rank).run(partial(tensor_parallel, kind, False), Size(*size))[0]


def losses_here(rank: int, kind: str, size: list[int]) -> list[float]:
    """This process's side of `Processes.losses`."""
    return world_here(rank).run(data.losses, engine_here(rank, kind, *size), Size(*size))[0]


def stamps_here(rank: int, kind: str, size: list[int], num_steps: int) -> list[int]:
    """This process's side of `Processes.step_s`."""
    return world_here(rank).run(data.stamps, engine_here(rank, kind, *size), Size(*size), num_steps)[0]


class DTensor:
    """Gloo processes under torch's own tensor parallelism.

    Args:
        gloo: the processes.
        plan: its name, see `torch_tensor.plan_of`.
        kind: of the model.
        size: of the model and the batch.
    """

    def __init__(self, gloo: GlooProcesses, plan: str, kind: str, size: Size) -> None:
        self._call: Any = lambda fn, *args: gloo.call(fn, plan, kind, size, *args)

    def losses(self) -> list[float]:
        """Of the first steps."""
        return list(self._call(torch_tensor.losses, NUM_CHECKED)[-1])

    def step_s(self, num_steps: int) -> float:
        """Seconds of a step."""
        return call_s(self._call(torch_tensor.stamps, num_steps))

    def parameter_bytes(self) -> list[int]:
        """Of each rank."""
        return list(self._call(torch_tensor.parameter_bytes))
