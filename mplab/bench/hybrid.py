"""One step on 2x2 meshes of four thread ranks beside torch's own compositions between four gloo processes.

Every side trains the same GPT (fp32, four blocks, a head that is not tied) on the same batch, with one torch thread a
rank, so that four ranks share whatever cores there are: on two cores a rank that waits leaves its core to another. The
width, tokens of a sample and samples are 256, 128, 8 "medium", 128, 64, 8 "small". "dp×tp" is two replicas, each cut in
attention, MLPs and vocabulary; "dp×pp" two replicas of two stages; "pp×tp" two stages that are cut so. With stages a
replica has four micro-batches under 1F1B. A step is zero_grad, forward, backward, the gradients of the replicas added
up, and an update by plain SGD. Ours gives every rank the mean loss of the whole batch, which costs messages; torch's
gives a last stage that of its replica's samples.
Peers are what torch itself composes: DTensor (parallelize_module by the plans of the tensor benchmark) inside the
stages of Schedule1F1B inside DistributedDataParallel or FSDP2. FSDP2 (fully_shard of each block and then of the rest)
keeps gathered weights until the backward. All of them work on CPUs over gloo, so that nothing had to be replaced. Ours
is held against the one with the smallest median: peer_plan. "one process" is plain training without any message, the
whole batch at once, with a torch thread for each core, at most one for each rank. Before anything is timed, the losses
of three steps of every side must be those of one process, and torch's ranks must have as many bytes of parameters as
ours, or half of them with FSDP2, which shares them out between replicas.
All sides of a case run in every round, some steps in a row. A step lasts from when the last rank finished the step
before to when the last rank finished this one, and the round's time is the median of its steps. While one side runs,
the others sleep. It can't show that a plan pays, for "one process" has the same cores and sends nothing, nor how either
side scales to a core for each rank or over a network.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from mplab.bench import data, torch_hybrid
from mplab.bench.all_reduce import call_s
from mplab.bench.common import Row, compare, paired
from mplab.bench.data import NUM_CHECKED
from mplab.bench.pipeline import NUM_ROUNDS, NUM_STEPS, OneProcess, check
from mplab.bench.tensor import check_bytes
from mplab.bench.torch_data import LEARNING_RATE, Size, batch, gpt
from mplab.bench.torch_hybrid import DATA_PARALLEL, NUM_RANKS
from mplab.bench.torch_pipeline import CUTS
from mplab.bench.torch_tensor import GPT_PLANS, bytes_of
from mplab.parallel.hybrid import HybridParallel
from mplab.plan.layout import Plan
from mplab.world.children import GlooProcesses
from mplab.world.rank import Rank
from mplab.world.rungs import num_cores
from mplab.world.world import World

SIZES = {"medium": Size(256, 128, 8), "small": Size(128, 64, 8)}


class Case(NamedTuple):
    """A mesh.

    Args:
        plan: how both sides lay the model out.
        peers: names of torch's compositions, see `torch_hybrid.Side`.
    """

    plan: Plan
    peers: tuple[str, ...]


staged = partial(Plan, pp=2, cuts=CUTS[2], num_microbatches=4)
CASES = {
    "dp×tp": Case(Plan(dp=2, tp=2), tuple(f"{name}, {plan}" for name in DATA_PARALLEL for plan in GPT_PLANS)),
    "dp×pp": Case(staged(dp=2), DATA_PARALLEL),
    "pp×tp": Case(staged(tp=2), GPT_PLANS),
}


def run(sizes: Mapping[str, Size] = SIZES, num_rounds: int = NUM_ROUNDS, num_steps: int = NUM_STEPS) -> list[Row]:
    """Every mesh with every size.

    Args:
        sizes: of the models and batches, by name.
        num_rounds: rounds of each mesh and size.
        num_steps: timed steps of a side in a round.
    """
    rows = []
    with GlooProcesses(NUM_RANKS) as gloo:
        for size_name, size in sizes.items():
            for name, case in CASES.items():
                rows += _rows(f"{name} {size_name}", case, size, gloo, num_rounds, num_steps)
    return rows


def _rows(name: str, case: Case, size: Size, gloo: GlooProcesses, num_rounds: int, num_steps: int) -> list[Row]:
    one = OneProcess(gpt(size), batch(size), NUM_CHECKED, min(NUM_RANKS, num_cores()))
    ours = Threads(case.plan, size)
    peers = [Torch(gloo, peer, case.plan, size) for peer in case.peers]
    expected, num_bytes = one.losses(), ours.parameter_bytes()
    check(name, ours.losses(), expected)
    for side in peers:
        who, num_shards = f"torch ({side.peer}) {name}", case.plan.dp if "FSDP2" in side.peer else 1
        check(who, side.losses(), expected)
        check_bytes(who, side.parameter_bytes(), [whole // num_shards for whole in num_bytes])

    sides: list[OneProcess | Threads | Torch] = [one, ours, *peers]
    times = paired(*(partial(side.step_s, num_steps) for side in sides), num_rounds=num_rounds, name=name)
    one_s, ours_s, *peers_s = times
    fastest, peer_s = min(zip(case.peers, peers_s, strict=True), key=lambda timed: statistics.median(timed[1]))
    return [compare(name, "torch", ours_s, peer_s, peer_plan=fastest), compare(name, "one process", ours_s, one_s)]


def hybrid(rank: Rank, plan: Plan, size: Size) -> HybridParallel:
    """A rank's engine."""
    return HybridParallel(gpt(size), rank.comm, plan, optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE))


class Threads:
    """Thread ranks.

    Args:
        plan: how the model is laid out over them.
        size: of the model and the batch.
    """

    def __init__(self, plan: Plan, size: Size) -> None:
        self._world, self._size = World(NUM_RANKS, "cpu"), size
        self.engines: list[HybridParallel] = self._world.run(hybrid, plan, size)

    def losses(self) -> list[float]:
        """Of the first steps."""
        return self._world.run(lambda rank: data.losses(rank, self.engines[rank.index], self._size))[-1]

    def step_s(self, num_steps: int) -> float:
        """Seconds of a step."""
        return call_s(self._world.run(lambda rank: data.stamps(rank, self.engines[rank.index], self._size, num_steps)))

    def parameter_bytes(self) -> list[int]:
        """Of each rank."""
        return [bytes_of(engine.local_state().values()) for engine in self.engines]


class Torch:
    """Gloo processes under one of torch's own compositions.

    Args:
        gloo: the processes.
        peer: its name, see `torch_hybrid.Side`.
        plan: how the model is laid out over them.
        size: of the model and the batch.
    """

    def __init__(self, gloo: GlooProcesses, peer: str, plan: Plan, size: Size) -> None:
        self.peer, self.plan = peer, plan
        self._call: Any = lambda fn, *args: gloo.call(fn, peer, plan.to_json(), size, *args)

    def losses(self) -> list[float]:
        """Of the first steps: the mean over the replicas, whose shards are equal, each of which has its last rank's."""
        num_ranks = self.plan.pp * self.plan.tp  # of a replica
        of_replicas = self._call(torch_hybrid.losses, NUM_CHECKED)[num_ranks - 1 :: num_ranks]
        return [statistics.mean(losses) for losses in zip(*of_replicas, strict=True)]

    def step_s(self, num_steps: int) -> float:
        """Seconds of a step."""
        return call_s(self._call(torch_hybrid.stamps, num_steps))

    def parameter_bytes(self) -> list[int]:
        """Of each rank."""
        return list(self._call(torch_hybrid.parameter_bytes))
