"""The taught algorithms as they are used: by name, in groups, under rendezvous, with mistakes.

Results and inputs: the conformance suite. Messages and bytes: test_ledger. Times: test_link.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor

from mplab import MplabError, World
from mplab.comm import algorithms
from mplab.plan import cost
from mplab.world import Rank

NAMES = ["naive", "tree", "ring", "halving_doubling"]


def test_each_all_reduce_has_a_formula_of_its_name() -> None:
    assert list(algorithms.ALL_REDUCES) == NAMES
    assert list(cost.ALL_REDUCES) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [2, 3, 5, 6, 7, 8])
def test_the_ledger_equals_the_formula(name: str, n: int) -> None:
    world = World(n, device="cpu")
    for length in (0, 1, 13, 1001):
        world.run(lambda rank, length=length: algorithms.ALL_REDUCES[name](rank.comm, torch.ones(length)))
        for r, ledger in enumerate(world.ledgers):
            assert (ledger.num_messages, ledger.sent_bytes) == cost.ALL_REDUCES[name](n, r, length, 4)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_group_that_is_not_in_world_order(name: str) -> None:
    members = [4, 1, 3]

    def run(rank: Rank) -> list[float] | None:
        if rank.index not in members:
            return None
        group = rank.comm.group(members)
        got: Tensor = algorithms.ALL_REDUCES[name](group, torch.full((5,), float(rank.index)))
        return got.tolist()

    assert World(5, device="cpu").run(run) == [None, [8.0] * 5, None, [8.0] * 5, [8.0] * 5]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [2, 3, 7, 8])
def test_no_algorithm_needs_a_send_that_returns_before_its_receive(name: str, n: int) -> None:
    """A thread's send is a handover of memory, which hides deadlocks that real networks show."""

    def run(rank: Rank) -> Tensor:
        for _ in range(5):
            got: Tensor = algorithms.ALL_REDUCES[name](rank.comm, torch.ones(11))
        return got

    for got in World(n, device="cpu", rendezvous=True).run(run):
        assert torch.equal(got, torch.full((11,), float(n)))


@pytest.mark.parametrize("function", algorithms.ALL_REDUCES.values(), ids=NAMES)
def test_a_reduction_that_does_not_exist_is_refused_before_any_message(function: Callable[..., Tensor]) -> None:
    world = World(3, device="cpu")
    with pytest.raises(MplabError, match=r"op='median' is no reduction"):
        world.run(lambda rank: function(rank.comm, torch.ones(3), "median"))
    with pytest.raises(MplabError, match=r"mean of torch\.int64"):
        world.run(lambda rank: function(rank.comm, torch.ones(3, dtype=torch.int64), "mean"))
    assert [ledger.messages for ledger in world.ledgers] == [[], [], []]


@pytest.mark.parametrize("broadcast", [algorithms.naive_broadcast, algorithms.tree_broadcast])
def test_a_root_without_a_tensor_is_refused(broadcast: Callable[..., Tensor]) -> None:
    with pytest.raises(MplabError, match=r"root needs a torch\.Tensor, got NoneType"):
        World(3, device="cpu").run(lambda rank: broadcast(rank.comm, None, 1))


@pytest.mark.parametrize("name", ["ring", "halving_doubling"])
def test_more_ranks_than_elements(name: str) -> None:
    """Some chunks are empty, and their messages are sent all the same: the count is the textbook's."""
    world = World(8, device="cpu")
    for got in world.run(lambda rank: algorithms.ALL_REDUCES[name](rank.comm, torch.ones(3))):
        assert torch.equal(got, torch.full((3,), 8.0))
    assert all(ledger.num_messages == (14 if name == "ring" else 6) for ledger in world.ledgers)
