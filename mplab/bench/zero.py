"""One step of sharded data parallelism on two thread ranks beside torch's FSDP2 between two gloo processes.

Every side trains a GPT of the data benchmark (fp32, four blocks, named by its number of parameters) on the same batch,
with one torch thread a rank; a step is as there, with plain SGD. Peers are FSDP2 (torch.distributed.fsdp.fully_shard of
each block and then of the rest; it shards what stage 3 does), FSDP2 that keeps gathered weights until the backward
(reshard_after_forward=False; stage 2 gathers no more often), and DistributedDataParallel with ZeroRedundancyOptimizer,
which shards what stage 1 does. Before anything is timed, the losses of three steps of every side must be those of one
process. All sides run in every round; rounds and steps are timed as in the data benchmark.
"memory at rest" is no time but the ratio of the bytes of parameters, gradients and AdamW's state after a step, on the
rank that keeps the most of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from mplab.bench.common import Row, compare, paired
from mplab.bench.data import NUM_ROUNDS, NUM_STEPS, OneProcess, Threads, Torch
from mplab.bench.pipeline import check
from mplab.bench.torch_data import LEARNING_RATE, NUM_RANKS, SIZES, Size, batch, bytes_of, gpt
from mplab.parallel.sharded import ShardedDataParallel
from mplab.world.children import GlooProcesses
from mplab.world.rank import Rank
from mplab.world.world import World

# Stage -> what it is held against.
PEERS = {3: ["FSDP2"], 2: ["FSDP2", "FSDP2 without resharding"], 1: ["FSDP2", "ZeroRedundancyOptimizer"]}


def run(sizes: Mapping[str, Size] | None = None, num_rounds: int = NUM_ROUNDS, num_steps: int = NUM_STEPS) -> list[Row]:
    """Every stage with every size.

    Args:
        sizes: of the models and batches, by name; None: 0.9 and 5 million parameters.
        num_rounds: rounds of each size.
        num_steps: timed steps of a side in a round.
    """
    rows = []
    for name, size in (sizes or {name: SIZES[name] for name in ("0.9 M", "5 M")}).items():
        with GlooProcesses(NUM_RANKS) as gloo:
            rows += _rows(name, size, gloo, num_rounds, num_steps)
    return rows


def _rows(name: str, size: Size, gloo: GlooProcesses, num_rounds: int, num_steps: int) -> list[Row]:
    expected = OneProcess(size).losses()
    ours = {stage: Threads(partial(sharded, stage), size) for stage in PEERS}
    peers = {kind: Torch(kind, size, gloo) for kinds in PEERS.values() for kind in kinds}
    for stage, side in ours.items():
        check(f"stage {stage}, {name}", side.losses(), expected)
    for kind, peer in peers.items():
        check(f"{kind} {name}", peer.losses(), expected)

    sides: list[Threads | Torch] = [*ours.values(), *peers.values()]
    times = paired(*(partial(side.step_s, num_steps) for side in sides), num_rounds=num_rounds, name=name)
    of_side = dict(zip(sides, times, strict=True))
    rows = [
        compare(f"stage {stage}, {name}", kind, of_side[ours[stage]], of_side[peers[kind]])
        for stage, kinds in PEERS.items()
        for kind in kinds
    ]
    kept, peer_kept = max(memory_bytes(3, size)), max(peers["FSDP2"].memory_bytes())
    note, ratio = f"{kept / 1e6:.1f} MB beside {peer_kept / 1e6:.1f} MB", kept / peer_kept
    return [*rows, Row(f"memory at rest, stage 3, {name}", "FSDP2", ratio, ratio, ratio, 1, {"note": note})]


def sharded(stage: int, rank: Rank, size: Size) -> ShardedDataParallel:
    """A rank's engine."""
    return ShardedDataParallel(gpt(size), rank.comm, stage, optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE))


def memory_bytes(stage: int, size: Size) -> list[int]:
    """Parameters, gradients and AdamW's state on each rank after a step."""

    def kept(rank: Rank) -> int:
        engine = ShardedDataParallel(gpt(size), rank.comm, stage)
        engine.step(batch(size))
        return bytes_of(engine.model.parameters(), engine.optimizer)

    return World(NUM_RANKS, "cpu").run(kept)
