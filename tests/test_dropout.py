"""Dropout that draws from a generator of its own: the same on ranks with the same seed."""

from __future__ import annotations

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor
from whole_layers import CPU, close

from mplab import World
from mplab.parallel.dropout import SeededDropout
from mplab.world import Rank


def dropout(p: float, seed: int = 0) -> SeededDropout:
    return SeededDropout(p, seed, CPU)


def test_the_same_seed_drops_the_same_and_another_one_does_not() -> None:
    x = torch.ones(100)
    first, second, other = dropout(0.5), dropout(0.5), dropout(0.5, 1)
    drawn_each_time = [first(x) for _ in range(3)]
    for y in drawn_each_time:
        assert torch.equal(y, second(x))
        assert not torch.equal(y, other(x))
    assert not torch.equal(drawn_each_time[0], drawn_each_time[1]), "a new mask each time"


def test_ranks_of_one_process_drop_the_same() -> None:
    """Which they would not with the generator that their threads share."""

    def work(rank: Rank) -> Tensor:
        layer = dropout(0.5, 7)
        for _ in range(rank.index):
            rank.comm.barrier()
        made = torch.stack([layer(torch.ones(50)) for _ in range(4)])
        for _ in range(3 - rank.index):
            rank.comm.barrier()
        return made

    masks = World(4, "cpu").run(work)
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_without_training_or_at_rate_0_it_does_nothing() -> None:
    x = torch.randn(9, generator=torch.Generator().manual_seed(0))
    assert dropout(0.5).eval()(x) is x
    assert dropout(0.0)(x) is x
    first, second = dropout(0.5), dropout(0.5)
    first.eval()(x)
    assert torch.equal(first.train()(x), second(x)), "and draws nothing"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_share_that_is_dropped_and_the_mean_that_is_kept(p: float, dtype: torch.dtype) -> None:
    x = torch.full((20000,), 3.0, dtype=dtype, requires_grad=True)
    y = dropout(p)(x)
    assert y.dtype == dtype
    dropped = y == 0
    assert dropped.double().mean().item() == pytest.approx(p, abs=0.02)
    close(y[~dropped], torch.full_like(y[~dropped], 3 / (1 - p)), 1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert y.double().mean().item() == pytest.approx(3, abs=0.2)
    y.sum().backward()
    assert torch.equal(x.grad == 0, dropped), "the gradient has the same mask"
    close(x.grad * 3, y.detach(), 1e-2)
    assert bool((x == 3).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_where_all_is_dropped_there_are_zeros(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -2.0, 1e4], dtype=dtype, requires_grad=True)
    y = dropout(1.0)(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(x))
    assert torch.equal(x.grad, torch.zeros_like(x))
