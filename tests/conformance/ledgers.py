"""Messages and bytes of every call, against all its messages listed one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from conformance.values import given, lengths
from mplab.comm import Message, algorithms
from mplab.world import Rank

Hops = Iterable[tuple[int, int, int]]  # (from, to, elements), one message each


def chunks(length: int, n: int) -> list[int]:
    return [len(part) for part in torch.empty(length).tensor_split(n)]


def others(n: int, rank: int) -> list[int]:
    return [r for r in range(n) if r != rank]


def direct_hops(name: str, n: int, length: int, root: int) -> Hops:
    """Every message of a collective where all pairs talk directly; rank r gives `length + r` elements to a gather."""
    part = chunks(length, n)
    for a in range(n):
        for b in others(n, a):
            if name in ("reduce_scatter", "all_reduce", "all_reduce_"):
                yield a, b, part[b]  # what b reduces
            if name in ("all_reduce", "all_reduce_"):
                yield a, b, part[a]  # what a has reduced
            if name == "all_gather" or (name == "gather" and b == root):
                yield a, b, length + a
            if name == "broadcast" and a == root:
                yield a, b, length
            if name == "reduce" and b == root:
                yield a, b, length
            if name == "scatter" and a == root:
                yield a, b, part[b]
            if name == "all_to_all":
                yield a, b, a + 2 * b
            if name == "barrier":
                yield a, b, 0


def check_ledger_of_collectives(rank: Rank) -> None:
    """Messages and bytes of every collective, against all its messages listed one by one."""
    n, me, comm = rank.size, rank.index, rank.comm
    for length in lengths(n):
        for dtype in (torch.float64, torch.int16):
            for root in {0, n - 1}:
                x = given(me, length, dtype, rank.device)
                more = given(me, length + me, dtype, rank.device)
                calls: dict[str, Callable[[], object]] = {
                    "all_reduce": lambda x=x: comm.all_reduce(x, "max"),
                    "all_reduce_": lambda x=x: comm.all_reduce_(x.clone(), "max"),
                    "reduce_scatter": lambda x=x: comm.reduce_scatter(x, "min"),
                    "all_gather": lambda more=more: comm.all_gather(more),
                    "gather": lambda more=more, root=root: comm.gather(more, root),
                    "broadcast": lambda x=x, root=root: comm.broadcast(x if me == root else None, root),
                    "reduce": lambda x=x, root=root: comm.reduce(x, "sum", root),
                    "scatter": lambda x=x, root=root: comm.scatter(x if me == root else None, root),
                    "all_to_all": lambda dtype=dtype: comm.all_to_all(
                        [given(me, me + 2 * b, dtype, rank.device) for b in range(n)]
                    ),
                    "barrier": comm.barrier,
                }
                for name, call in calls.items():
                    before = len(comm.ledger.messages)
                    call()
                    (message,) = comm.ledger.messages[before:]
                    assert_counted(message, me, name, direct_hops(name, n, length, root), x.element_size())
                    assert message.group == tuple(range(n))


def assert_counted(message: Message, me: int, name: str, hops: Hops, item_bytes: int) -> None:
    sent = [elements for a, _, elements in hops if a == me] if (hops := list(hops)) else []
    received = [elements for _, b, elements in hops if b == me]
    got = (message.op, message.num_messages, message.sent_bytes, message.received_bytes)
    want = (name, len(sent), sum(sent) * item_bytes, sum(received) * item_bytes)
    assert got == want, f"rank {me} counted {got}, the messages one by one are {want}"
    assert message.start_ns <= message.end_ns


def check_ledger_of_dims(rank: Rank) -> None:
    """Along another dim a chunk is what tensor_split cuts there: 5 columns over n ranks, each of 3 elements."""
    n, me, comm = rank.size, rank.index, rank.comm
    columns = chunks(5, n)
    x = torch.zeros(3, 5, dtype=torch.float64, device=rank.device)
    comm.reduce_scatter(x, "sum", 1)
    message = comm.ledger.messages[-1]
    assert message.sent_bytes == (5 - columns[me]) * 3 * 8
    assert message.received_bytes == (n - 1) * columns[me] * 3 * 8
    comm.scatter(x, n - 1, -1)
    message = comm.ledger.messages[-1]
    assert message.sent_bytes == ((5 - columns[me]) * 3 * 8 if me == n - 1 else 0)
    assert message.received_bytes == (0 if me == n - 1 else columns[me] * 3 * 8)
    comm.all_gather(torch.zeros(3, me, device=rank.device), 1)
    message = comm.ledger.messages[-1]
    assert message.sent_bytes == (n - 1) * me * 3 * 4
    assert message.received_bytes == (sum(range(n)) - me) * 3 * 4


def check_ledger_of_messages(rank: Rank) -> None:
    n, me, comm = rank.size, rank.index, rank.comm
    if n == 1:
        return
    right, left = (me + 1) % n, (me - 1) % n
    before = len(comm.ledger.messages)
    handle = comm.isend(torch.zeros(me + 1, 3, dtype=torch.int16, device=rank.device), right, tag=4)
    comm.recv(left, tag=4)
    handle.wait()
    sent, received = sorted(comm.ledger.messages[before:], key=lambda m: m.op, reverse=True)
    world = tuple(range(n))
    assert sent[:6] == ("send", world, (right,), 1, (me + 1) * 3 * 2, 0)
    assert received[:6] == ("recv", world, (left,), 0, 0, (left + 1) * 3 * 2)


def check_ledger_of_groups(rank: Rank) -> None:
    """Groups write into their rank's one ledger, with world ranks."""
    n, me = rank.size, rank.index
    members = [r for r in reversed(range(n)) if r % 2 == me % 2]
    group = rank.comm.group(members)
    assert group.ledger is rank.comm.ledger
    before = len(rank.comm.ledger.messages)
    group.all_gather(torch.zeros(3, device=rank.device))
    group.barrier()
    gathered, met = rank.comm.ledger.messages[before:]
    peers = {r for r in members if r != me}
    assert gathered[:2] == ("all_gather", tuple(members))
    assert set(gathered.peers) == peers
    assert gathered[3:6] == (len(peers), len(peers) * 12, len(peers) * 12)
    assert met[:2] == ("barrier", tuple(members))
    assert met[3:6] == (len(peers), 0, 0)
    if len(members) > 1:
        before = len(rank.comm.ledger.messages)
        place = members.index(me)
        handle = group.isend(torch.zeros(1, device=rank.device), (place + 1) % len(members))
        group.recv((place - 1) % len(members))
        handle.wait()
        sent, received = sorted(rank.comm.ledger.messages[before:], key=lambda m: m.op, reverse=True)
        assert sent.peers == (members[(place + 1) % len(members)],)
        assert received.peers == (members[(place - 1) % len(members)],)


def check_ledger_adds_up_over_ranks(rank: Rank) -> None:
    """What all ranks sent is what all ranks received."""
    n, me, comm = rank.size, rank.index, rank.comm
    before = len(comm.ledger.messages)
    x = given(me, 2 * n + 1, torch.float32, rank.device)
    comm.all_reduce(x)
    comm.reduce_scatter(x)
    comm.all_gather(x[: me + 1])
    comm.broadcast(x, n - 1)
    comm.scatter(x, n - 1)
    comm.gather(x[:me], n - 1)
    comm.reduce(x, "sum", n - 1)
    comm.all_to_all([x[: me + r] for r in range(n)])
    comm.barrier()
    for function in algorithms.ALL_REDUCES.values():
        function(comm, x)
    new = comm.ledger.messages[before:]
    sums = torch.tensor([sum(m.sent_bytes for m in new), sum(m.received_bytes for m in new)], device=rank.device)
    sent, received = comm.all_reduce(sums).tolist()
    assert sent == received
    assert sent > 0 or n == 1
    assert comm.ledger.num_messages == sum(m.num_messages for m in comm.ledger.messages)
    assert comm.ledger.sent_bytes == sum(m.sent_bytes for m in comm.ledger.messages)
    assert comm.ledger.received_bytes == sum(m.received_bytes for m in comm.ledger.messages)
