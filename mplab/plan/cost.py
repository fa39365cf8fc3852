"""What a message and an algorithm cost: the alpha-beta model, and the messages and bytes that every rank sends.

A message of B bytes takes alpha + beta * B seconds: a latency, and a time a byte. All else here is counting. Lengths
that the number of ranks does not divide are cut as `torch.tensor_split` cuts them, so the counts are exact, and not for
round numbers alone. What a communicator's own collectives send is counted in `mplab.plan.traffic`.

Reference:
    Hockney, "The communication challenge for MPP: Intel Paragon and Meiko CS-2", Parallel Computing 20(3), 1994
    (alpha and beta);
    Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19(1), 2005,
    sections 3 and 4 (tree, ring, recursive halving and doubling);
    Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69(2), 2009 (ring).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mplab.errors import MplabError
from mplab.plan.traffic import chunk_lengths
from mplab.trace.units import format_bandwidth, format_s


@dataclass(frozen=True)
class Link:
    """What connects two ranks: a message of B bytes takes alpha + beta * B seconds.

    Args:
        latency_s: alpha, the seconds that a message without bytes takes; 0 or more.
        bandwidth_bytes_s: 1 / beta, bytes a second; above 0, `math.inf` where latency alone counts.

    Raises:
        MplabError: a number out of its range.
    """

    latency_s: float
    bandwidth_bytes_s: float

    def __post_init__(self) -> None:
        if not (_is_number(self.latency_s) and 0 <= self.latency_s < math.inf):
            raise MplabError(f"Link(latency_s={self.latency_s!r}): a latency is 0 seconds or more (50e-6 is 50 µs).")
        if not (_is_number(self.bandwidth_bytes_s) and self.bandwidth_bytes_s > 0):
            raise MplabError(
                f"Link(bandwidth_bytes_s={self.bandwidth_bytes_s!r}): a bandwidth is more than 0 bytes a second "
                "(1e9 is 1 GB/s)."
            )

    def __str__(self) -> str:
        return f"{format_s(self.latency_s)} latency, {format_bandwidth(self.bandwidth_bytes_s)}"

    def time_s(self, num_messages: float, size_bytes: float) -> float:
        """Seconds for `num_messages` messages one after the other, of `size_bytes` bytes in all."""
        return num_messages * self.latency_s + size_bytes / self.bandwidth_bytes_s


class Sent(NamedTuple):
    """What one rank sends: the number of messages, and their bytes in all."""

    num_messages: int
    size_bytes: int


# --- what each rank sends -------------------------------------------------------------------------------------------
# `length` counts the elements of the whole tensor, `item_bytes` the bytes of one.


def naive_broadcast(num_ranks: int, rank: int, length: int, item_bytes: int, root: int = 0) -> Sent:
    """The root sends everything to each of the others, one after the other."""
    _check(num_ranks, rank, length, item_bytes, root)
    num_messages = num_ranks - 1 if rank == root else 0
    return Sent(num_messages, num_messages * length * item_bytes)


def naive_reduce(num_ranks: int, rank: int, length: int, item_bytes: int, root: int = 0) -> Sent:
    """Each of the others sends everything to the root."""
    _check(num_ranks, rank, length, item_bytes, root)
    return Sent(0, 0) if rank == root else Sent(1, length * item_bytes)


def naive_all_reduce(num_ranks: int, rank: int, length: int, item_bytes: int) -> Sent:
    """Everyone sends everything to rank 0, which sends the sum back to each: a parameter server."""
    return _both(naive_reduce, naive_broadcast, num_ranks, rank, length, item_bytes)


def tree_broadcast(num_ranks: int, rank: int, length: int, item_bytes: int, root: int = 0) -> Sent:
    """Down a binomial tree: counted from the root, r's children are r + 2**k for every 2**k below its lowest bit."""
    _check(num_ranks, rank, length, item_bytes, root)
    place = (rank - root) % num_ranks
    below = place & -place or num_ranks  # the lowest bit; the root has none, and every power of two below n
    num_children = sum(1 << k < below and place + (1 << k) < num_ranks for k in range(num_ranks.bit_length()))
    return Sent(num_children, num_children * length * item_bytes)


def tree_reduce(num_ranks: int, rank: int, length: int, item_bytes: int, root: int = 0) -> Sent:
    """Up the same tree: everyone but the root sends one partial sum, to its parent."""
    return naive_reduce(num_ranks, rank, length, item_bytes, root)


def tree_all_reduce(num_ranks: int, rank: int, length: int, item_bytes: int) -> Sent:
    """Up the tree to rank 0, and down again."""
    return _both(tree_reduce, tree_broadcast, num_ranks, rank, length, item_bytes)


def ring_reduce_scatter(num_ranks: int, rank: int, length: int, item_bytes: int) -> Sent:
    """In n - 1 hops a rank passes on every chunk but the one that it ends up with: its own."""
    _check(num_ranks, rank, length, item_bytes)
    return Sent(num_ranks - 1, (length - chunk_lengths(length, num_ranks)[rank]) * item_bytes)


def ring_all_gather(num_ranks: int, rank: int, length: int, item_bytes: int) -> Sent:
    """In n - 1 hops a rank passes on every chunk but the one that it gets last: its right neighbour's."""
    _check(num_ranks, rank, length, item_bytes)
    return Sent(num_ranks - 1, (length - chunk_lengths(length, num_ranks)[(rank + 1) % num_ranks]) * item_bytes)


def ring_all_reduce(num_ranks: int, rank: int, length: int, item_bytes: int) -> Sent:
    """Reduce-scatter, then all-gather: 2(n - 1) messages of about B/n, the fewest bytes an all-reduce can do with."""
    return _both(ring_reduce_scatter, ring_all_gather, num_ranks, rank, length, item_bytes)


def halving_doubling_all_reduce(num_ranks: int, rank: int, length: int, item_bytes: int) -> Sent:
    """Swap halves with ever nearer partners, then sums with ever farther ones: 2 log2(n) messages, 2B(n - 1)/n bytes.

    That needs a power of two. For any other n, with p the largest one below it, the first 2(n - p) ranks form pairs:
    the odd one gives its tensor to the even one before and gets the result after, and p ranks do the work.
    """
    _check(num_ranks, rank, length, item_bytes)
    num_workers = 1 << (num_ranks.bit_length() - 1)
    num_pairs = num_ranks - num_workers
    is_paired = rank < 2 * num_pairs
    if is_paired and rank % 2:
        return Sent(1, length * item_bytes)
    worker = rank // 2 if is_paired else rank - num_pairs
    num_messages, num_items = (1, length) if is_paired else (0, 0)  # the result, for the odd one of the pair
    low, high, distance = 0, length, num_workers // 2
    while distance:
        num_messages += 2
        num_items += high - low  # one half leaves while halving, the other half while doubling
        middle = (low + high) // 2
        low, high = (middle, high) if worker & distance else (low, middle)
        distance //= 2
    return Sent(num_messages, num_items * item_bytes)


Count = Callable[[int, int, int, int], Sent]
ALL_REDUCES: dict[str, Count] = {
    "naive": naive_all_reduce,
    "tree": tree_all_reduce,
    "ring": ring_all_reduce,
    "halving_doubling": halving_doubling_all_reduce,
}


# --- how long they take ---------------------------------------------------------------------------------------------
# The longest chain of messages that wait for one another, where links are equal, a rank sends one message and receives
# one at a time, and arithmetic is free. `size_bytes` is the whole tensor.


def naive_broadcast_time_s(link: Link, num_ranks: int, size_bytes: float) -> float:
    """(n - 1)(alpha + beta B): the root's messages leave one by one. A naive reduce takes the same."""
    return link.time_s(num_ranks - 1, (num_ranks - 1) * size_bytes)


def tree_broadcast_time_s(link: Link, num_ranks: int, size_bytes: float) -> float:
    """ceil(log2 n)(alpha + beta B): each step doubles the ranks that know. A tree reduce takes the same."""
    num_steps = (num_ranks - 1).bit_length()
    return link.time_s(num_steps, num_steps * size_bytes)


def ring_reduce_scatter_time_s(link: Link, num_ranks: int, size_bytes: float) -> float:
    """(n - 1)(alpha + beta B/n). A ring all-gather takes the same."""
    return link.time_s(num_ranks - 1, (num_ranks - 1) * size_bytes / num_ranks)


def naive_all_reduce_time_s(link: Link, num_ranks: int, size_bytes: float) -> float:
    """2(n - 1)(alpha + beta B): rank 0 receives n - 1 tensors, then sends n - 1."""
    return 2 * naive_broadcast_time_s(link, num_ranks, size_bytes)


def tree_all_reduce_time_s(link: Link, num_ranks: int, size_bytes: float) -> float:
    """2 ceil(log2 n)(alpha + beta B): up, and down again."""
    return 2 * tree_broadcast_time_s(link, num_ranks, size_bytes)


def ring_all_reduce_time_s(link: Link, num_ranks: int, size_bytes: float) -> float:
    """2(n - 1)(alpha + beta B/n): many messages, few bytes."""
    return 2 * ring_reduce_scatter_time_s(link, num_ranks, size_bytes)


def halving_doubling_all_reduce_time_s(link: Link, num_ranks: int, size_bytes: float) -> float:
    """2 log2(p) alpha + 2 beta B(p - 1)/p for p = 2**floor(log2 n) that work; 2(alpha + beta B) more where p < n."""
    num_steps = num_ranks.bit_length() - 1
    num_workers = 1 << num_steps
    seconds = link.time_s(2 * num_steps, 2 * size_bytes * (num_workers - 1) / num_workers)
    return seconds if num_workers == num_ranks else seconds + link.time_s(2, 2 * size_bytes)


def all_reduce_times_s(link: Link, num_ranks: int, size_bytes: float) -> dict[str, float]:
    """What every taught all-reduce should take, in seconds, by name: `min(times, key=times.__getitem__)` is the best.

    Raises:
        MplabError: no ranks, or a negative size.
    """
    if num_ranks < 1 or size_bytes < 0:
        raise MplabError(f"all-reduce of {size_bytes} bytes over {num_ranks} ranks: give 1 rank and 0 bytes, or more.")
    return {
        "naive": naive_all_reduce_time_s(link, num_ranks, size_bytes),
        "tree": tree_all_reduce_time_s(link, num_ranks, size_bytes),
        "ring": ring_all_reduce_time_s(link, num_ranks, size_bytes),
        "halving_doubling": halving_doubling_all_reduce_time_s(link, num_ranks, size_bytes),
    }


def _both(first: Count, second: Count, num_ranks: int, rank: int, length: int, item_bytes: int) -> Sent:
    counts = [count(num_ranks, rank, length, item_bytes) for count in (first, second)]
    return Sent(sum(c.num_messages for c in counts), sum(c.size_bytes for c in counts))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(num_ranks: int, rank: int, length: int, item_bytes: int, root: int = 0) -> None:
    if num_ranks < 1 or not 0 <= rank < num_ranks or not 0 <= root < num_ranks:
        raise MplabError(f"rank {rank} (root {root}) of {num_ranks}: ranks are numbered from 0 to {num_ranks - 1}.")
    if length < 0 or item_bytes < 0:
        raise MplabError(f"{length} elements of {item_bytes} bytes: neither can be negative.")
