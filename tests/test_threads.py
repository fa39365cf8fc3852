"""Ranks as threads, on every rung that this machine has: the conformance suite."""

from __future__ import annotations

import pytest
import torch
from conformance import CHECKS, SENDING, Check, checks_of, groups, memory, messages, reductions, taught
from conformance.values import LARGE
from limits import leaves_nothing_behind as leaves_nothing_behind

from mplab import Link, World
from mplab.comm import collectives
from mplab.world import Rank


@pytest.fixture(autouse=True)
def a_large_tensor_is_everybodys_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a size, which is tuned, ranks share the work: that is the suite's LARGE on every machine."""
    monkeypatch.setattr(collectives, "SMALL_BYTES", LARGE * 4 - 1)


def named(check: Check) -> str:
    return check.__name__.removeprefix("check_")


@pytest.mark.parametrize("check", CHECKS, ids=named)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_threads(n: int, check: Check) -> None:
    World(n, device="cpu").run(check)


@pytest.mark.parametrize("check", [*checks_of(taught), reductions.check_all_reduce], ids=named)
@pytest.mark.parametrize("n", [6, 7])
def test_threads_with_several_ranks_above_a_power_of_two(n: int, check: Check) -> None:
    """What depends on the number of ranks in more than its parity: two and three of them beside four."""
    World(n, device="cpu").run(check)


@pytest.mark.parametrize("check", SENDING, ids=named)
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_threads_with_rendezvous(n: int, check: Check) -> None:
    World(n, device="cpu", rendezvous=True).run(check)


@pytest.mark.parametrize(
    "check",
    [
        reductions.check_all_reduce,
        memory.check_in_place,
        messages.check_every_pair,
        messages.check_tags_out_of_order,
        messages.check_handles,
        groups.check_groups,
        taught.check_algorithms_equal_the_direct_ones,
    ],
    ids=named,
)
def test_an_emulated_link_changes_no_result(check: Check) -> None:
    World(3, device="cpu", link=Link(1e-6, 1e12)).run(check)


@pytest.mark.parametrize("extra_bytes", [-4, 0, 4])
def test_sizes_at_the_border_between_one_rank_and_all(extra_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to SMALL_BYTES one rank computes for all, above it all do: no element may be lost on either side."""
    monkeypatch.setattr(collectives, "SMALL_BYTES", 1 << 16)
    length = (collectives.SMALL_BYTES + extra_bytes) // 4

    def run(rank: Rank) -> None:
        x = torch.arange(length, dtype=torch.float32) + rank.index
        want = 3 * torch.arange(length, dtype=torch.float32) + 3
        assert torch.equal(rank.comm.all_reduce(x), want)
        assert torch.equal(rank.comm.reduce_scatter(x), want.tensor_split(3)[rank.index])
        assert torch.equal(rank.comm.broadcast(x, 1), torch.arange(length, dtype=torch.float32) + 1)
        assert torch.equal(rank.comm.all_reduce_(x), want)

    World(3, device="cpu").run(run)


@pytest.mark.parametrize("n", [2, 5])
def test_nobody_leaves_a_barrier_before_all_have_come(n: int) -> None:
    arrived = [0] * n

    def run(rank: Rank) -> None:
        for i in range(1, 200):
            arrived[rank.index] = i
            rank.comm.barrier()
            assert min(arrived) >= i, f"rank {rank.index} left barrier {i} while others were at {arrived}"

    World(n, device="cpu").run(run)


def test_tensors_that_all_ranks_share_may_be_given_by_all() -> None:
    """A closure is the same object on every rank."""
    shared = torch.ones(5)
    results = World(4, device="cpu").run(lambda rank: rank.comm.all_reduce(shared))
    for i, result in enumerate(results):
        assert torch.equal(result, torch.full((5,), 4.0))
        result.fill_(-i)
    assert torch.equal(shared, torch.ones(5))
    assert [float(r[0]) for r in results] == [0, -1, -2, -3]


def test_a_large_world() -> None:
    def run(rank: Rank) -> float:
        return float(rank.comm.all_reduce(torch.tensor([float(rank.index)])))

    assert World(64, device="cpu").run(run) == [2016.0] * 64


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=named)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_streams_of_one_gpu(n: int, check: Check) -> None:
    World(n, device="cuda:0").run(check)


@pytest.mark.gpu
@pytest.mark.parametrize("check", SENDING, ids=named)
def test_streams_of_one_gpu_with_rendezvous(check: Check) -> None:
    World(3, device="cuda:0", rendezvous=True).run(check)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_all_gpus(check: Check) -> None:
    """On a machine with one this is streams again; with more, ranks have different GPUs and share none or some."""
    World(torch.cuda.device_count() + 1, device="cuda").run(check)
    World(torch.cuda.device_count(), device="cuda").run(check)
