"""Sharded and naive data parallelism on CUDA streams: ranks of one GPU train as one process on the CPU does.

Skipped where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import data_parallel as dp
import pytest
import torch
from data_parallel import OPTIMIZERS, batches, serial
from limits import leaves_nothing_behind as leaves_nothing_behind
from limits import memory_comes_back as memory_comes_back
from torch import Tensor

from mplab import World
from mplab.parallel import ShardedDataParallel, naive_data_parallel, parameter_server, scatter_gather
from mplab.world import Rank

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
TOLERANCE = 1e-9  # a GPU adds up in another order
NUM_STEPS = 4


def assert_trained(losses: list[float], weights: dict[str, Tensor], variant: str, optimizer: str, n: int) -> None:
    want = serial(variant, optimizer, n, num_steps=NUM_STEPS)
    assert losses == pytest.approx(want.losses, abs=TOLERANCE)
    on_host = {name: weight.cpu() for name, weight in weights.items()}
    torch.testing.assert_close(on_host, want.weights[-1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(("variant", "optimizer"), [("plain", "sgd"), ("tied", "adamw"), ("frozen", "adamw")])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_on_streams_train_as_one_cpu_does(
    stage: int, variant: str, optimizer: str, num_ranks: int, num_microbatches: int
) -> None:
    def work(rank: Rank) -> tuple[list[float], dict[str, Tensor]]:
        start = dp.model(variant, seed=rank.index)
        make: Any = OPTIMIZERS[optimizer]
        engine = ShardedDataParallel(start, rank.comm, stage, optimizer=make, num_microbatches=num_microbatches)
        losses = [engine.step(batch) for batch in batches(num_batches=NUM_STEPS)]
        weights = engine.full_state_dict()
        assert all(weight.device == rank.device for weight in weights.values())
        return losses, weights

    for losses, weights in World(num_ranks, DEVICE).run(work):
        assert_trained(losses, weights, variant, optimizer, num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("way", [naive_data_parallel, parameter_server, scatter_gather])
def test_the_naive_ways_on_streams_train_as_one_cpu_does(way: Callable[..., float], num_ranks: int) -> None:
    def work(rank: Rank) -> tuple[list[float], dict[str, Tensor]]:
        own = dp.model().to(rank.device)
        optimizer = OPTIMIZERS["sgd"](own.parameters())
        return [way(own, optimizer, batch, rank.comm) for batch in batches(num_batches=NUM_STEPS)], own.state_dict()

    losses, weights = World(num_ranks, DEVICE).run(work)[0]
    assert_trained(losses, weights, "plain", "sgd", num_ranks)
