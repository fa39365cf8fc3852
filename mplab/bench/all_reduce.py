"""All-reduce of thread ranks beside gloo's between as many processes, and beside one thread's copy of the same bytes.

Both sides sum fp32 tensors with one thread a rank and the library's checks on. A round starts all ranks at a barrier
and lets them call the collective several times in a row. A call lasts from when the last rank finished the call before
to when the last rank finished this one, and the round's time is the median of its calls. While one side runs, the other
sleeps. In place is all_reduce_ beside torch.distributed.all_reduce; "new tensor" is all_reduce beside the same after a
clone; "memory copy" is one thread's copy_ into a tensor that exists. bytes_s is the tensor's size over our time, and
over_copy that over the bandwidth of one thread's copy of the largest size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mplab.bench.common import Row, compare, format_bytes, paired
from mplab.errors import MplabError
from mplab.world.children import GlooProcesses
from mplab.world.rank import Rank
from mplab.world.world import World

SIZES_BYTES = (1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 26)
NUM_RANKS = (2, 4)
NUM_ROUNDS = 9
COPY_FROM_BYTES = 1 << 20  # what is smaller lies in a core's own cache: its copy says nothing about memory


def run(
    sizes_bytes: Sequence[int] = SIZES_BYTES, num_ranks: Sequence[int] = NUM_RANKS, num_rounds: int = NUM_ROUNDS
) -> list[Row]:
    """Every size with every number of ranks, in place and into a new tensor.

    Args:
        sizes_bytes: sizes of the tensor, of 4 bytes an element.
        num_ranks: sizes of the world.
        num_rounds: rounds of each case.
    """
    largest = max(sizes_bytes)
    copy_s, at_once_s = paired(
        lambda: _copy_s(1, largest), lambda: _copy_s(2, largest), num_rounds=num_rounds, name="memory copy"
    )
    copy_bytes_s = largest / statistics.median(copy_s)
    rows = [compare(f"2 threads copy {format_bytes(largest)} each, at once", "memory copy", at_once_s, copy_s)]
    for n in num_ranks:
        with GlooProcesses(n) as gloo:
            for size in sizes_bytes:
                for in_place in (True, False):
                    rows += _rows(n, size, in_place, gloo, num_rounds, copy_bytes_s)
    return rows


def _rows(
    n: int, size_bytes: int, in_place: bool, gloo: GlooProcesses, num_rounds: int, copy_bytes_s: float
) -> list[Row]:
    case = f"{n} ranks, {format_bytes(size_bytes)}" + ("" if in_place else ", new tensor")
    world = World(n, "cpu")
    sides: dict[str, Callable[[], float]] = {
        "ours": lambda: call_s(world.run(time_threads, size_bytes, in_place)),
        "gloo": lambda: call_s(gloo.call(time_gloo, size_bytes, in_place)),
    }
    if size_bytes >= COPY_FROM_BYTES:
        sides["memory copy"] = lambda: _copy_s(1, size_bytes)
    ours_s, *peers_s = paired(*sides.values(), num_rounds=num_rounds, name=case)
    rate = size_bytes / statistics.median(ours_s)
    return [
        compare(case, peer, ours_s, peer_s, bytes_s=rate, over_copy=rate / copy_bytes_s)
        for peer, peer_s in zip(list(sides)[1:], peers_s, strict=True)
    ]


def time_threads(rank: Rank, size_bytes: int, in_place: bool) -> list[int]:
    """One thread rank's side of a round."""
    reduce = rank.comm.all_reduce_ if in_place else rank.comm.all_reduce
    return _time_calls(reduce, rank.comm.barrier, rank.index, rank.size, size_bytes)


def time_gloo(rank: int, size_bytes: int, in_place: bool) -> list[int]:
    """One gloo process's side of a round."""
    import torch.distributed as dist

    def reduce(x: Tensor) -> Tensor:
        y = x if in_place else x.clone()
        dist.all_reduce(y)
        return y

    return _time_calls(reduce, dist.barrier, rank, dist.get_world_size(), size_bytes)


def _copy_s(num_threads: int, size_bytes: int) -> float:
    """Seconds in which each of some threads copies a tensor of its own."""
    return call_s(World(num_threads, "cpu").run(_time_copy, size_bytes))


def _time_copy(rank: Rank, size_bytes: int) -> list[int]:
    target = torch.zeros(size_bytes // 4)
    return _time_calls(target.copy_, rank.comm.barrier, 0, 1, size_bytes)


def _time_calls(
    call: Callable[[Tensor], Tensor], barrier: Callable[[], object], rank: int, num_ranks: int, size_bytes: int
) -> list[int]:
    """When the barrier ended for this rank, then each call: `perf_counter_ns`, one clock for all processes."""
    x = torch.full((size_bytes // 4,), float(rank + 1))
    expected = num_ranks * (num_ranks + 1) / 2
    if not bool((call(x) == expected).all()):  # warms up, too
        raise MplabError(f"a sum over {num_ranks} ranks of {format_bytes(size_bytes)} is wrong on rank {rank}")
    x.zero_()  # sums of zeros stay what they are, however often
    barrier()
    stamps = [time.perf_counter_ns()]
    for _ in range(max(3, min(50, (64 << 20) // max(size_bytes, 1)))):
        call(x)
        stamps.append(time.perf_counter_ns())
    return stamps


def call_s(stamps_ns: Sequence[Sequence[int]]) -> float:
    """The median time of one call, in seconds.

    Args:
        stamps_ns: for every rank the end of its start barrier, then of each call, on one clock.
    """
    ends = [max(of_all) for of_all in zip(*stamps_ns, strict=True)]
    return float(statistics.median(end - before for before, end in pairwise(ends))) * 1e-9
