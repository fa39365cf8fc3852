"""Steps of a run, from its ledgers: those of the textbook for every taught algorithm, whatever the clock did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mplab import World
from mplab.comm import Communicator, algorithms
from mplab.comm.hops import Hop, steps
from mplab.plan import cost

Algorithm = Callable[[Communicator, Tensor], object]


def steps_of(num_ranks: int, algorithm: Algorithm, length: int = 16) -> list[list[Hop]]:
    world = World(num_ranks, device="cpu")
    world.run(lambda rank: algorithm(rank.comm, torch.ones(length)))
    return steps(world.ledgers)


def num_steps(name: str, n: int) -> int:
    """As the formulas say: alpha's factor."""
    latency_alone = cost.Link(1.0, float("inf"))
    return round(cost.all_reduce_times_s(latency_alone, n, 1)[name])


@pytest.mark.parametrize("name", algorithms.ALL_REDUCES)
@pytest.mark.parametrize("n", range(1, 9))
def test_every_all_reduce_has_the_steps_of_its_formula(name: str, n: int) -> None:
    found = steps_of(n, algorithms.ALL_REDUCES[name])
    assert len(found) == num_steps(name, n)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_every_message_is_in_one_step_and_no_port_is_used_twice(n: int) -> None:
    for algorithm in algorithms.ALL_REDUCES.values():
        world = World(n, device="cpu")
        world.run(lambda rank, of=algorithm: of(rank.comm, torch.ones(17)))
        found = steps(world.ledgers)
        sent = [(ledger.rank, m.peers[0], m.sent_bytes) for ledger in world.ledgers for m in ledger.of("send")]
        assert sorted(hop for step in found for hop in step) == sorted(sent)
        for step in found:
            assert len({hop.src for hop in step}) == len({hop.dst for hop in step}) == len(step)


def test_a_tree_by_hand() -> None:
    assert steps_of(4, algorithms.tree_all_reduce) == [
        [Hop(1, 0, 64), Hop(3, 2, 64)],
        [Hop(2, 0, 64)],
        [Hop(0, 2, 64)],
        [Hop(0, 1, 64), Hop(2, 3, 64)],
    ]


def relay(comm: Communicator, x: Tensor) -> None:
    """From rank to rank: each waits for the one before."""
    if comm.rank:
        x = comm.recv(comm.rank - 1)
    if comm.rank < comm.size - 1:
        comm.send(x, comm.rank + 1)


def test_what_waits_comes_later_and_what_does_not_shares_a_step() -> None:
    assert steps_of(4, relay, 1) == [[Hop(0, 1, 4)], [Hop(1, 2, 4)], [Hop(2, 3, 4)]]
    to_the_right: Algorithm = lambda comm, x: comm.send(x, (comm.rank + 1) % comm.size)  # noqa: E731
    assert steps_of(3, to_the_right, 1) == [[Hop(0, 1, 4), Hop(1, 2, 4), Hop(2, 0, 4)]]


def pass_on_the_second(comm: Communicator, x: Tensor) -> None:
    if comm.rank == 0:
        comm.send(x, 1)
        comm.send(x, 1)
    elif comm.rank == 1:
        comm.recv(0)
        comm.send(comm.recv(0), 2)
    else:
        comm.recv(1)


def test_each_receive_waits_for_a_message_of_its_own() -> None:
    assert steps_of(3, pass_on_the_second, 1) == [[Hop(0, 1, 4)], [Hop(0, 1, 4)], [Hop(1, 2, 4)]]


def test_one_receiver_gets_one_message_a_step() -> None:
    found = steps_of(4, lambda comm, x: comm.send(x, 0) if comm.rank else None, 1)
    assert found == [[Hop(1, 0, 4)], [Hop(2, 0, 4)], [Hop(3, 0, 4)]]


def test_collectives_have_no_hops() -> None:
    assert steps_of(3, lambda comm, x: comm.all_reduce(x)) == []
