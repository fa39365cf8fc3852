"""Collectives built from send and recv alone: naive, tree, ring, and recursive halving and doubling.

The direct collectives of a `Communicator` are faster; these are to be read. Each works for any number of ranks n >= 1
and any length, and its messages are those of the textbook, which `mplab.plan.cost` counts.

**Reference**: Thakur, Rabenseifner & Gropp, "Optimization of Collective Communication Operations in MPICH", 2005;
Patarasuk & Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations", 2009 (ring).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mplab.comm.communicator import Communicator
from mplab.comm.reduction import OPS, check_op


def naive_broadcast(comm: Communicator, x: Tensor | None, root: int = 0) -> Tensor:
    """The root sends its tensor to one rank after the other.

    Args:
        comm: the group.
        x: any shape on the root; not looked at elsewhere.
        root: whose tensor.

    **Communication**: n - 1 messages of B bytes, all from the root: T = (n-1)(alpha + beta B).
    """
    if comm.rank != root:
        return comm.recv(root)
    x = comm._check_tensor(x, "naive_broadcast on its root")
    for rank in range(comm.size):
        if rank != root:
            comm.send(x, rank)
    return x.detach().clone()


def naive_reduce(comm: Communicator, x: Tensor, op: str = "sum", root: int = 0) -> Tensor | None:
    """Every rank sends its tensor to the root, which reduces them in rank order.

    **Communication**: n - 1 messages of B bytes, all to the root: T = (n-1)(alpha + beta B).
    """
    check_op(op, x.dtype)
    if comm.rank != root:
        comm.send(x, root)
        return None
    parts = [x.detach() if rank == root else comm.recv(rank) for rank in range(comm.size)]
    total = parts[0].clone()
    for part in parts[1:]:
        OPS[op](total, part, out=total)
    return _averaged(total, op, comm.size)


def naive_all_reduce(comm: Communicator, x: Tensor, op: str = "sum") -> Tensor:
    """Reduce to rank 0, which sends the result back to one rank after the other: a parameter server.

    **Communication**: rank 0 receives and sends n - 1 messages of B bytes: T = 2(n-1)(alpha + beta B).
    """
    return naive_broadcast(comm, naive_reduce(comm, x, op))


def tree_broadcast(comm: Communicator, x: Tensor | None, root: int = 0) -> Tensor:
    """A binomial tree: in each round every rank that has the tensor sends it to one that has not.

    **Communication**: n - 1 messages of B bytes in ceil(log2 n) rounds: T = ceil(log2 n)(alpha + beta B).
    """
    n, me = comm.size, (comm.rank - root) % comm.size  # counted from the root
    bit = _first_bit(n) if me == 0 else me & -me
    if me == 0:
        x = comm._check_tensor(x, "tree_broadcast on its root").detach().clone()
    else:
        x = comm.recv((me - bit + root) % n)
    while bit := bit >> 1:
        if me + bit < n:
            comm.send(x, (me + bit + root) % n)
    return x


def tree_reduce(comm: Communicator, x: Tensor, op: str = "sum", root: int = 0) -> Tensor | None:
    """The same tree the other way: in each round half of the ranks send what they have to the other half.

    **Communication**: n - 1 messages of B bytes in ceil(log2 n) rounds: T = ceil(log2 n)(alpha + beta B).
    """
    check_op(op, x.dtype)
    n, me, total = comm.size, (comm.rank - root) % comm.size, x.detach().clone()
    bit = 1
    while bit < n:
        if me & bit:
            comm.send(total, (me - bit + root) % n)
            return None
        if me + bit < n:
            OPS[op](total, comm.recv((me + bit + root) % n), out=total)
        bit <<= 1
    return _averaged(total, op, n)


def tree_all_reduce(comm: Communicator, x: Tensor, op: str = "sum") -> Tensor:
    """Reduce up a binomial tree, broadcast down it.

    **Communication**: 2(n-1) messages of B bytes in 2 ceil(log2 n) rounds: T = 2 ceil(log2 n)(alpha + beta B).
    """
    return tree_broadcast(comm, tree_reduce(comm, x, op))


def ring_reduce_scatter(comm: Communicator, x: Tensor, op: str = "sum") -> Tensor:
    """Chunk `rank` of the reduction; each partial sum travels once around the ring.

    Args:
        comm: the group.
        x: any shape; it is cut as `x.reshape(-1).tensor_split(n)`.
        op: "sum", "mean", "max", "min" or "product".

    **Communication**: n - 1 messages a rank, all chunks but its own: T = (n-1)(alpha + beta B/n).
    """
    check_op(op, x.dtype)
    return _averaged(_ring_reduce_scatter(comm, x, op)[comm.rank], op, comm.size)


def ring_all_gather(comm: Communicator, x: Tensor) -> Tensor:
    """All ranks' tensors, flat and concatenated in rank order; each travels once around the ring.

    Args:
        comm: the group.
        x: any shape; lengths may differ between ranks.

    **Communication**: n - 1 messages a rank: T = (n-1)(alpha + beta B/n), with B the bytes of the result.
    """
    chunks: list[Tensor] = [x.detach().reshape(-1)] * comm.size
    _ring_all_gather(comm, chunks)
    return torch.cat(chunks)


def ring_all_reduce(comm: Communicator, x: Tensor, op: str = "sum") -> Tensor:
    """A ring reduce-scatter, then a ring all-gather: each rank sends 2(n-1) chunks of 1/n, whatever n is.

    **Communication**: 2(n-1) messages a rank, 2(n-1)/n B bytes: T = 2(n-1)(alpha + beta B/n).
    """
    check_op(op, x.dtype)
    chunks = _ring_reduce_scatter(comm, x, op)
    chunks[comm.rank] = _averaged(chunks[comm.rank], op, comm.size)
    _ring_all_gather(comm, chunks)
    return torch.cat(chunks).view(x.shape)


def halving_doubling_all_reduce(comm: Communicator, x: Tensor, op: str = "sum") -> Tensor:
    """Recursive halving (a reduce-scatter), then recursive doubling (an all-gather) over 2^k ranks.

    Where n is no power of two, ranks 1, 3, ... below 2(n - 2^k) first give their tensor to their left neighbour, and
    get the result back at the end.

    **Communication**: with n = 2^k: 2 log2 n messages a rank, 2(n-1)/n B bytes: T = 2 log2(n) alpha + 2(n-1)/n beta B.

    **Reference**: Rabenseifner, "Optimization of Collective Reduction Operations", 2004.
    """
    check_op(op, x.dtype)
    n, rank, total = comm.size, comm.rank, x.detach().reshape(-1).clone()
    power = _first_bit(n + 1) >> 1  # the largest power of two that is at most n
    num_pairs = n - power
    if rank < 2 * num_pairs and rank % 2:
        comm.send(total, rank - 1)
        return comm.recv(rank - 1).view(x.shape)
    if rank < 2 * num_pairs:
        OPS[op](total, comm.recv(rank + 1), out=total)
    # Those who are left count anew: the pairs first, then the others.
    me = rank // 2 if rank < 2 * num_pairs else rank - num_pairs
    real: Callable[[int], int] = lambda i: 2 * i if i < num_pairs else i + num_pairs  # noqa: E731
    low, high = 0, total.numel()
    sent: list[tuple[int, int, int]] = []
    distance = power
    while distance := distance >> 1:
        middle, peer = (low + high) // 2, real(me ^ distance)
        keep, give = ((low, middle), (middle, high)) if not me & distance else ((middle, high), (low, middle))
        handle = comm.isend(total[give[0] : give[1]], peer)
        half = total[keep[0] : keep[1]]
        OPS[op](half, comm.recv(peer), out=half)
        handle.wait()
        sent.append((peer, *give))
        low, high = keep
    if op == "mean":
        total[low:high].div_(n)
    for peer, start, end in reversed(sent):
        handle = comm.isend(total[low:high], peer)
        total[start:end] = comm.recv(peer)
        handle.wait()
        low, high = min(low, start), max(high, end)
    if rank < 2 * num_pairs:
        comm.send(total, rank + 1)
    return total.view(x.shape)


ALL_REDUCES: dict[str, Callable[..., Tensor]] = {
    "naive": naive_all_reduce,
    "tree": tree_all_reduce,
    "ring": ring_all_reduce,
    "halving_doubling": halving_doubling_all_reduce,
}


def _ring_reduce_scatter(comm: Communicator, x: Tensor, op: str) -> list[Tensor]:
    """All chunks; the one at `comm.rank` is reduced over all ranks (and not yet divided for a mean)."""
    n, rank = comm.size, comm.rank
    right, left = (rank + 1) % n, (rank - 1) % n
    chunks = list(x.detach().reshape(-1).clone().tensor_split(n))
    for step in range(n - 1):
        # Send first and wait later: if all waited for their receiver first, nobody would ever receive.
        handle = comm.isend(chunks[(rank - 1 - step) % n], right)
        mine = chunks[(rank - 2 - step) % n]
        OPS[op](mine, comm.recv(left), out=mine)
        handle.wait()
    return chunks


def _ring_all_gather(comm: Communicator, chunks: list[Tensor]) -> None:
    """Fill `chunks`, of which each rank has only the one at `comm.rank`."""
    n, rank = comm.size, comm.rank
    right, left = (rank + 1) % n, (rank - 1) % n
    for step in range(n - 1):
        handle = comm.isend(chunks[(rank - step) % n], right)
        chunks[(rank - 1 - step) % n] = comm.recv(left)
        handle.wait()


def _averaged(total: Tensor, op: str, n: int) -> Tensor:
    return total.div_(n) if op == "mean" else total


def _first_bit(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
