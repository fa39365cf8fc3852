"""Ranks with a GPU each: they train as one process on the CPU does. Skipped where there are fewer than two GPUs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pipelines
import pytest
import torch
from data_parallel import OPTIMIZERS, batches, model, serial
from limits import leaves_nothing_behind as leaves_nothing_behind
from limits import memory_comes_back as memory_comes_back
from torch import Tensor

from mplab import World
from mplab.models import GPT, GPTConfig
from mplab.parallel import DataParallel, PipelineParallel, Serial, ShardedDataParallel, TensorParallel
from mplab.plan.partition import by_depth
from mplab.world import Rank

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NUM_RANKS = 4 if NUM_GPUS >= 4 else 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 1, reason="needs two GPUs, and torch sees one"),
]

TOLERANCE = 1e-9  # a GPU adds up in another order
NUM_STEPS = 4


def peers() -> World:
    world = World(NUM_RANKS, "cuda")
    assert world.rung.name == "GPUs"
    return world


@pytest.mark.parametrize(
    "make",
    [
        partial(DataParallel, bucket_bytes=200),
        partial(DataParallel, bucket_bytes=200, overlap=False),
        partial(ShardedDataParallel, stage=1),
        partial(ShardedDataParallel, stage=2),
        partial(ShardedDataParallel, stage=3),
    ],
    ids=["overlap", "no overlap", "ZeRO 1", "ZeRO 2", "ZeRO 3"],
)
def test_data_parallel_over_gpus(make: Any) -> None:
    want = serial("tied", "adamw", NUM_RANKS, num_steps=NUM_STEPS)

    def work(rank: Rank) -> list[float]:
        engine = make(model("tied", seed=rank.index), rank.comm, optimizer=OPTIMIZERS["adamw"])
        losses = [engine.step(batch) for batch in batches(num_batches=NUM_STEPS)]
        assert all(p.device == rank.device for p in engine.model.parameters())
        return losses

    for losses in peers().run(work):
        assert losses == pytest.approx(want.losses, abs=TOLERANCE)


@pytest.mark.parametrize("order", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
def test_a_pipeline_over_gpus(order: str) -> None:
    trained = pipelines.serial_chain("adamw", NUM_STEPS, tied=True)
    cuts = by_depth(8, NUM_RANKS * pipelines.stages_a_rank(order)).cuts

    def work(rank: Rank) -> list[float]:
        options = {"num_microbatches": 4, "optimizer": pipelines.OPTIMIZERS["adamw"]}
        pipe = PipelineParallel(pipelines.chain(tied=True), cuts, rank.comm, order, **options)
        return [pipe.step(batch) for batch in pipelines.batches(num_batches=NUM_STEPS)]

    for losses in peers().run(work):
        pipelines.assert_losses(losses, trained, TOLERANCE)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_over_gpus(sequence_parallel: bool, overlap: bool) -> None:
    config = GPTConfig(vocab_size=8, context_length=8, num_layers=2, num_heads=4, width=16)
    draw = torch.randint(8, (NUM_STEPS, 2, 5, 8), generator=torch.Generator().manual_seed(1))
    data = [(inputs, targets) for inputs, targets in draw]
    start, trained = GPT(config).double(), GPT(config).double()
    step = Serial(trained, OPTIMIZERS["sgd"](trained.parameters())).step
    want = [step(batch) for batch in data]

    def work(rank: Rank) -> list[float]:
        engine = TensorParallel(start, rank.comm, None, sequence_parallel, overlap, optimizer=OPTIMIZERS["sgd"])
        return [engine.step(batch) for batch in data]

    for losses in peers().run(work):
        assert losses == pytest.approx(want, abs=TOLERANCE)


def test_in_place_of_a_tensor_that_is_not_contiguous() -> None:
    """Its values come from kernels on every GPU, and each rank reads them at once."""

    def work(rank: Rank) -> Tensor:
        x = torch.full((1001, 1001), rank.index + 1.0, device=rank.device)
        for i in range(10):
            x.fill_(rank.index + 1.0)
            if rank.index == i % rank.size:
                torch.cuda._sleep(2_000_000)
            rank.comm.all_reduce_(x.t()[1:])
            assert bool((x[:, 1:] == rank.size * (rank.size + 1) / 2).all())
        return x

    assert all(x.device.index == r for r, x in enumerate(peers().run(work)))
