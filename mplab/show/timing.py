"""How long a taught all-reduce takes, on ranks that run it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from mplab.comm.algorithms import ALL_REDUCES
from mplab.errors import MplabError
from mplab.plan.cost import Link
from mplab.world.rank import Rank
from mplab.world.world import World

ITEM_BYTES = 4  # float32
SPAN = "timed all-reduce"


@dataclass(frozen=True)
class Timing:
    """Some runs of one all-reduce.

    Args:
        times_s: seconds of each run, from the first rank's start to the last one's end.
        sent_bytes: what each rank sent in one run, in rank order.
        num_messages: how many messages each rank sent in one run.
        notes: what the times cannot prove.
    """

    times_s: tuple[float, ...]
    sent_bytes: tuple[int, ...]
    num_messages: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def median_s(self) -> float:
        """The one in the middle."""
        return statistics.median(self.times_s)


def time_all_reduce(
    algorithm: str, num_ranks: int, size_bytes: int, link: Link | None = None, num_runs: int = 5
) -> Timing:
    """Run a taught all-reduce and time it; its sum is checked.

    Args:
        algorithm: "naive", "tree", "ring" or "halving_doubling".
        num_ranks: size of the world.
        size_bytes: of the tensor, in float32: rounded down to a multiple of 4.
        link: an emulated one; None: as fast as this machine is.
        num_runs: timed runs; one more before them warms up.

    Raises:
        MplabError: no such algorithm.

    **Communication**: that of the algorithm, and a barrier before each run.
    """
    if algorithm not in ALL_REDUCES:
        raise MplabError(f"algorithm={algorithm!r}: choose one of {', '.join(map(repr, ALL_REDUCES))}")
    world = World(num_ranks, link=link)

    def run(rank: Rank) -> Tensor:
        x = torch.full((size_bytes // ITEM_BYTES,), float(rank.index + 1), device=rank.device)
        out = x
        for _ in range(num_runs + 1):
            rank.comm.barrier()
            with rank.span(SPAN):
                out = ALL_REDUCES[algorithm](rank.comm, x)
        return out

    for out in world.run(run):
        assert bool((out == num_ranks * (num_ranks + 1) / 2).all())
    spans = [[e for e in world.timeline.rank(r) if e.name == SPAN][1:] for r in range(num_ranks)]
    times = [max(e.end_s for e in run) - min(e.start_s for e in run) for run in zip(*spans, strict=True)]
    sends = [ledger.of("send") for ledger in world.ledgers]
    return Timing(
        tuple(times),
        tuple(sum(m.sent_bytes for m in of) // (num_runs + 1) for of in sends),
        tuple(len(of) // (num_runs + 1) for of in sends),
        world.notes,
    )
