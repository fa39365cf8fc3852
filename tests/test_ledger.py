"""What the taught algorithms send, hop by hop as the textbook draws them, and what a ledger makes of it.

The hops are listed here by brute force, and not by calling `mplab.plan`. Direct collectives: the conformance suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor

from mplab import World
from mplab.comm import Communicator, Ledger, Message, algorithms
from mplab.comm.collectives import SMALL_BYTES
from mplab.world import Rank

Hop = tuple[int, int, int]  # (from, to, elements)
Hops = Iterator[Hop]
LENGTHS = (0, 1, 5, 10, 24, 1001)
ITEM_BYTES = 4  # float32


def chunks(length: int, n: int) -> list[int]:
    return [len(part) for part in torch.empty(length).tensor_split(n)]


def naive_broadcast(n: int, length: int, root: int = 0) -> Hops:
    yield from ((root, r, length) for r in range(n) if r != root)


def naive_reduce(n: int, length: int, root: int = 0) -> Hops:
    yield from ((r, root, length) for r in range(n) if r != root)


def naive_all_reduce(n: int, length: int) -> Hops:
    yield from naive_reduce(n, length)
    yield from naive_broadcast(n, length)


def tree_broadcast(n: int, length: int, root: int = 0) -> Hops:
    """Of 8: 0 to 4; then 0 to 2 and 4 to 6; then 0 to 1, 2 to 3, 4 to 5, 6 to 7. Fewer ranks: the same without them."""
    for distance in (8, 4, 2, 1):
        for r in range(0, n, 2 * distance):
            if r + distance < n:
                yield (r + root) % n, (r + distance + root) % n, length


def tree_reduce(n: int, length: int, root: int = 0) -> Hops:
    yield from ((b, a, size) for a, b, size in tree_broadcast(n, length, root))


def tree_all_reduce(n: int, length: int) -> Hops:
    yield from tree_reduce(n, length)
    yield from tree_broadcast(n, length)


def ring_reduce_scatter(n: int, length: int) -> Hops:
    part = chunks(length, n)
    yield from ((r, (r + 1) % n, part[(r - 1 - step) % n]) for step in range(n - 1) for r in range(n))


def ring_all_gather(n: int, length: int) -> Hops:
    """Of `length` elements in all, each rank gives its chunk."""
    part = chunks(length, n)
    yield from ((r, (r + 1) % n, part[(r - step) % n]) for step in range(n - 1) for r in range(n))


def ring_all_reduce(n: int, length: int) -> Hops:
    yield from ring_reduce_scatter(n, length)
    yield from ring_all_gather(n, length)


def halving_doubling_all_reduce(n: int, length: int) -> Hops:
    power = max(p for p in (1, 2, 4, 8) if p <= n)
    doubled = range(0, 2 * (n - power), 2)  # each works for itself and its right neighbour
    workers = [*doubled, *range(2 * (n - power), n)]
    yield from ((r + 1, r, length) for r in doubled)
    yield from halves(workers, 0, length)
    yield from ((b, a, size) for a, b, size in halves(workers, 0, length))  # the sums go back the way they came
    yield from ((r, r + 1, length) for r in doubled)


def halves(workers: list[int], low: int, high: int) -> Hops:
    half, middle = len(workers) // 2, (low + high) // 2
    if half:
        lower, upper = workers[:half], workers[half:]
        for a, b in zip(lower, upper, strict=True):
            yield a, b, high - middle
            yield b, a, middle - low
        yield from halves(lower, low, middle)
        yield from halves(upper, middle, high)


ALGORITHMS: list[tuple[Callable[..., Hops], Callable[[Communicator, Tensor], object]]] = [
    (naive_broadcast, algorithms.naive_broadcast),
    (naive_reduce, algorithms.naive_reduce),
    (naive_all_reduce, algorithms.naive_all_reduce),
    (tree_broadcast, algorithms.tree_broadcast),
    (tree_reduce, algorithms.tree_reduce),
    (tree_all_reduce, algorithms.tree_all_reduce),
    (ring_reduce_scatter, algorithms.ring_reduce_scatter),
    (ring_all_gather, lambda comm, x: algorithms.ring_all_gather(comm, x.tensor_split(comm.size)[comm.rank])),
    (ring_all_reduce, algorithms.ring_all_reduce),
    (halving_doubling_all_reduce, algorithms.halving_doubling_all_reduce),
]


def counted(ledgers: list[Ledger]) -> list[Hop]:
    """Every send of every rank."""
    return [
        (ledger.rank, m.peers[0], m.sent_bytes // ITEM_BYTES)
        for ledger in ledgers
        for m in ledger.messages
        if m.op == "send"
    ]


def received(ledgers: list[Ledger]) -> list[Hop]:
    return [
        (m.peers[0], ledger.rank, m.received_bytes // ITEM_BYTES)
        for ledger in ledgers
        for m in ledger.messages
        if m.op == "recv"
    ]


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize(("hops", "function"), ALGORITHMS, ids=[hops.__name__ for hops, _ in ALGORITHMS])
def test_every_hop_of_an_algorithm(
    hops: Callable[..., Hops], function: Callable[[Communicator, Tensor], object], n: int
) -> None:
    world = World(n, device="cpu")
    for length in LENGTHS:
        world.run(lambda rank, length=length: function(rank.comm, torch.ones(length)))
        want = list(hops(n, length))
        assert sorted(counted(world.ledgers)) == sorted(want)
        assert sorted(received(world.ledgers)) == sorted(want)
        for ledger in world.ledgers:
            assert ledger.num_messages == sum(a == ledger.rank for a, _, _ in want)
            assert ledger.sent_bytes == ITEM_BYTES * sum(size for a, _, size in want if a == ledger.rank)
            assert ledger.received_bytes == ITEM_BYTES * sum(size for _, b, size in want if b == ledger.rank)


@pytest.mark.parametrize("root", [1, 4])
@pytest.mark.parametrize(
    ("hops", "function"),
    [
        (naive_broadcast, algorithms.naive_broadcast),
        (tree_broadcast, algorithms.tree_broadcast),
        (naive_reduce, lambda comm, x, root: algorithms.naive_reduce(comm, x, "sum", root)),
        (tree_reduce, lambda comm, x, root: algorithms.tree_reduce(comm, x, "sum", root)),
    ],
    ids=["naive_broadcast", "tree_broadcast", "naive_reduce", "tree_reduce"],
)
def test_every_hop_with_another_root(hops: Callable[..., Hops], function: Callable[..., object], root: int) -> None:
    world = World(6, device="cpu")
    world.run(lambda rank: function(rank.comm, torch.ones(10), root))
    assert sorted(counted(world.ledgers)) == sorted(hops(6, 10, root))


@pytest.mark.parametrize("n", range(2, 9))
def test_a_ring_sends_to_the_right_one_chunk_a_hop_in_the_textbook_order(n: int) -> None:
    """A "ring" that sends the whole tensor every hop has the right result and the wrong bytes."""
    world = World(n, device="cpu")
    world.run(lambda rank: algorithms.ring_all_reduce(rank.comm, torch.ones(1001)))
    part = chunks(1001, n)
    for r, ledger in enumerate(world.ledgers):
        sends = [m for m in ledger.messages if m.op == "send"]
        assert [m.peers for m in sends] == [((r + 1) % n,)] * (2 * (n - 1))
        order = [(r - 1 - step) % n for step in range(n - 1)] + [(r - step) % n for step in range(n - 1)]
        assert [m.sent_bytes for m in sends] == [part[i] * ITEM_BYTES for i in order]


# 10 elements over n ranks: (messages, elements) that each rank sends, worked out by hand.
LITERALS = {
    ("naive", 4): [(3, 30), (1, 10), (1, 10), (1, 10)],
    ("tree", 4): [(2, 20), (1, 10), (2, 20), (1, 10)],
    ("ring", 4): [(6, 14), (6, 15), (6, 16), (6, 15)],  # chunks of 3, 3, 2, 2
    ("halving_doubling", 4): [(4, 15)] * 4,
    ("naive", 3): [(2, 20), (1, 10), (1, 10)],
    ("tree", 3): [(2, 20), (1, 10), (1, 10)],
    ("ring", 3): [(4, 13), (4, 14), (4, 13)],  # chunks of 4, 3, 3
    ("halving_doubling", 3): [(3, 20), (1, 10), (2, 10)],  # rank 1 gives to rank 0, which works with rank 2
    ("naive", 1): [(0, 0)],
    ("tree", 1): [(0, 0)],
    ("ring", 1): [(0, 0)],
    ("halving_doubling", 1): [(0, 0)],
}


@pytest.mark.parametrize(("name", "n"), LITERALS)
def test_literals(name: str, n: int) -> None:
    world = World(n, device="cpu")
    world.run(lambda rank: algorithms.ALL_REDUCES[name](rank.comm, torch.ones(10)))
    got = [(ledger.num_messages, ledger.sent_bytes // ITEM_BYTES) for ledger in world.ledgers]
    assert got == LITERALS[name, n]


def test_literals_of_the_direct_all_reduce() -> None:
    """Chunks of 3, 3, 2, 2: a rank sends the other chunks away to be reduced, and its own to the three others."""
    world = World(4, device="cpu")
    world.run(lambda rank: rank.comm.all_reduce(torch.ones(10)))
    got = [(ledger.num_messages, ledger.sent_bytes // ITEM_BYTES) for ledger in world.ledgers]
    assert got == [(6, 16), (6, 16), (6, 14), (6, 14)]


def test_a_large_tensor_counts_as_a_small_one_does() -> None:
    """How ranks share the work inside is no matter of the ledger."""
    length = SMALL_BYTES // 4 // 3 * 3 + 4
    world = World(3, device="cpu")
    world.run(lambda rank: rank.comm.all_reduce(torch.ones(length)))
    part = [length // 3 + 1, length // 3, length // 3]
    for r, ledger in enumerate(world.ledgers):
        (message,) = ledger.messages
        assert message.num_messages == 4
        assert message.sent_bytes == message.received_bytes == (length - part[r] + 2 * part[r]) * 4


def test_rendezvous_and_emulation_count_nothing_more() -> None:
    from mplab import Link

    def run(rank: Rank) -> None:
        algorithms.ring_all_reduce(rank.comm, torch.ones(10))
        rank.comm.all_gather(torch.ones(rank.index))

    counts = []
    for world in (
        World(3, device="cpu"),
        World(3, device="cpu", rendezvous=True),
        World(3, device="cpu", link=Link(1e-6, 1e12)),
    ):
        world.run(run)
        counts.append([[m[:6] for m in ledger.messages] for ledger in world.ledgers])
    assert counts[0] == counts[1] == counts[2]


def test_one_list_a_rank_and_a_fresh_one_each_run() -> None:
    world = World(3, device="cpu")

    def run(rank: Rank, calls: int) -> Ledger:
        for _ in range(calls):
            rank.comm.barrier()
        rank.comm.group([rank.index]).barrier()
        return rank.comm.ledger

    given = world.run(run, 4)
    assert [ledger.rank for ledger in world.ledgers] == [0, 1, 2]
    assert all(a is b for a, b in zip(given, world.ledgers, strict=True))
    assert [len(ledger.messages) for ledger in world.ledgers] == [5, 5, 5]
    world.run(run, 1)
    assert [len(ledger.messages) for ledger in world.ledgers] == [2, 2, 2]
    assert [len(ledger.messages) for ledger in given] == [5, 5, 5], "a ledger that somebody kept does not change"


def test_calls_are_written_down_in_their_order_with_times_inside_the_run() -> None:
    import time

    world = World(2, device="cpu")
    before = time.perf_counter_ns()

    def run(rank: Rank) -> None:
        x = torch.ones(4)
        rank.comm.all_reduce(x)
        if rank.index == 0:
            rank.comm.send(x, 1)
        else:
            rank.comm.recv(0)
        rank.comm.barrier()

    world.run(run)
    after = time.perf_counter_ns()
    names = [[m.op for m in ledger.messages] for ledger in world.ledgers]
    assert names == [["all_reduce", "send", "barrier"], ["all_reduce", "recv", "barrier"]]
    for ledger in world.ledgers:
        times = [t for m in ledger.messages for t in (m.start_ns, m.end_ns)]
        assert times == sorted(times)
        assert before <= times[0]
        assert times[-1] <= after


def example() -> Ledger:
    ledger = Ledger(1)
    ledger.add(Message("send", (0, 1, 2), (0,), 1, 1_000_000, 0, 0, 1))
    ledger.add(Message("barrier", (1, 2), (2,), 1, 0, 0, 1, 2))
    ledger.add(Message("send", (1, 2), (2,), 1, 24, 0, 2, 3))
    ledger.add(Message("recv", (0, 1, 2), (2,), 0, 0, 7, 3, 4))
    return ledger


def test_totals_and_selections() -> None:
    ledger = example()
    assert (ledger.num_messages, ledger.sent_bytes, ledger.received_bytes) == (3, 1_000_024, 7)
    assert [m.sent_bytes for m in ledger.of("send")] == [1_000_000, 24]
    assert [m.op for m in ledger.of(group=(1, 2))] == ["barrier", "send"]
    assert [m.sent_bytes for m in ledger.of("send", (1, 2))] == [24]
    assert ledger.of("gather") == []
    assert len(ledger.of()) == 4


def test_the_table() -> None:
    lines = example().table().splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["send", "2", "2", "1,000,024", "0"],
        ["barrier", "1", "1", "0", "0"],
        ["recv", "1", "0", "0", "7"],
        ["all", "4", "3", "1,000,024", "7"],
    ]
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("  ")[0] == "call"
    assert str(example()) == "rank 1: 3 messages, 1,000,024 bytes sent, 7 received"


def test_an_empty_ledger() -> None:
    ledger = Ledger(0)
    assert (ledger.num_messages, ledger.sent_bytes, ledger.received_bytes) == (0, 0, 0)
    assert ledger.table().splitlines()[-1].split() == ["all", "0", "0", "0", "0"]
