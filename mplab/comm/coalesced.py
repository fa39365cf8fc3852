"""Thread ranks reduce many tensors as if they were one, where they lie: nothing is joined, nothing is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from mplab.comm.memory import HostMemory
from mplab.comm.reduction import BLOCK_BYTES, reduce_in_order
from mplab.plan.traffic import chunk_lengths
from mplab.private import add_each_, copy_each_


class Part(NamedTuple):
    """Elements `low` to `high` of one tensor of a list; `high` is None for all of them."""

    place: int
    low: int
    high: int | None


def reduce_share(op: str, tensors: Sequence[Sequence[Tensor]], share: int, num_shares: int, memory: HostMemory) -> None:
    """Reduce one share of the joined elements over all ranks, in rank order, in place in every rank's tensors.

    Args:
        op: one of `reduction.OPS`.
        tensors: of every rank, contiguous, of the same shapes.
        share: which chunk of the joined elements, of `num_shares` as `torch.tensor_split` cuts them.
        num_shares: 1 for everything.
        memory: the calling rank's.
    """
    lengths = tuple(x.numel() for x in tensors[0])
    # On a CPU block by block: what was added up still lies in the cache when it is copied to the others.
    block = BLOCK_BYTES // tensors[0][0].element_size() if memory.device.type == "cpu" else sum(lengths)
    for parts in blocks(lengths, share, num_shares, max(1, block)):
        given = [[_take(xs, part) for part in parts] for xs in tensors]
        # One GPU can't compute on another's memory; on a CPU all of it is at hand.
        local = given if memory.device.type == "cpu" else [[memory.local(x) for x in xs] for xs in given]
        total = local[0]
        if op in ("sum", "mean"):
            for xs in local[1:]:
                add_each_(total, xs)
            if op == "mean":
                for x in total:
                    x.div_(len(tensors))
        else:
            for of_ranks in zip(*local, strict=True):
                reduce_in_order(op, of_ranks, of_ranks[0])
        for xs in given:
            if xs[0] is not total[0]:
                copy_each_(xs, total)


@lru_cache(maxsize=256)
def blocks(lengths: tuple[int, ...], share: int, num_shares: int, max_length: int) -> tuple[tuple[Part, ...], ...]:
    """One share of the elements of tensors of these lengths, in blocks of at most `max_length` elements."""
    of_shares = chunk_lengths(sum(lengths), num_shares)
    start = sum(of_shares[:share])
    end = start + of_shares[share]
    found: list[list[Part]] = []
    room = place = 0
    for index, length in enumerate(lengths):
        low, stop = max(start - place, 0), min(end - place, length)
        while low < stop:
            if not room:
                found.append([])
                room = max_length
            high = min(low + room, stop)
            found[-1].append(Part(index, low, None if (low, high) == (0, length) else high))
            room -= high - low
            low = high
        place += length
    return tuple(map(tuple, found))


def _take(xs: Sequence[Tensor], part: Part) -> Tensor:
    x = xs[part.place]
    return x if part.high is None else x.view(-1)[part.low : part.high]
