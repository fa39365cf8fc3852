"""The algorithms built on send and recv, against the direct collectives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from conformance.values import LARGE, OPS, all_given, assert_same, given, has_meaning, lengths, plain, strided_views
from mplab.comm import Communicator, algorithms
from mplab.world import Rank


def check_algorithms_equal_the_direct_ones(rank: Rank) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64):
        for op in OPS:
            if not has_meaning(op, dtype):
                continue
            for length in lengths(rank.size) if dtype == torch.float64 else (7,):
                mine = given(rank.index, length, dtype, rank.device)
                want = rank.comm.all_reduce(mine, op)
                for name, function in algorithms.ALL_REDUCES.items():
                    assert_same(function(rank.comm, mine, op), want, f"{name} {op} {dtype} {length}")


def check_algorithms_of_any_shape(rank: Rank) -> None:
    n, me, comm = rank.size, rank.index, rank.comm
    for shape in ((), (3, 0), (2, 3, 4), (LARGE,)):
        xs = all_given(rank, shape, torch.float32)
        want = plain("sum", xs)
        for name, function in algorithms.ALL_REDUCES.items():
            assert_same(function(comm, xs[me]), want, f"{name} {shape}")
        assert_same(algorithms.ring_all_gather(comm, xs[me]), torch.cat([x.reshape(-1) for x in xs]), "ring_all_gather")
        want = want.reshape(-1).tensor_split(n)[me]
        assert_same(algorithms.ring_reduce_scatter(comm, xs[me]), want, "ring_reduce_scatter")
    for name, x in strided_views(given(me, (3, 4), torch.float32, rank.device)):
        want = plain("mean", all_given(rank, (3, 4), torch.float32))
        for function in algorithms.ALL_REDUCES.values():
            assert_same(function(comm, x, "mean"), want, f"{function.__name__}, {name}")
    uneven = [given(r, (r + 1) % 3, torch.float32, rank.device) for r in range(n)]
    assert_same(algorithms.ring_all_gather(comm, uneven[me]), torch.cat(uneven), "ring_all_gather of different lengths")


def check_algorithms_agree_on_all_ranks(rank: Rank) -> None:
    """Floats that round: an algorithm may round its own way, but the same on every rank."""
    for length in (7, 1001):
        mine = torch.randn(length, generator=torch.Generator().manual_seed(rank.index)).to(rank.device)
        direct = rank.comm.all_reduce(mine)
        for name, function in algorithms.ALL_REDUCES.items():
            got = function(rank.comm, mine)
            rows = rank.comm.all_gather(got.unsqueeze(0))
            for r in range(rank.size):
                assert_same(rows[r], got, f"{name} on rank {r}")
            torch.testing.assert_close(got, direct)


def check_rooted_algorithms(rank: Rank) -> None:
    n, me, comm = rank.size, rank.index, rank.comm
    for root in range(n):
        xs = all_given(rank, 9, torch.float64, salt=root)
        for broadcast in (algorithms.naive_broadcast, algorithms.tree_broadcast):
            got = broadcast(comm, xs[root] if me == root else None, root)
            assert_same(got, xs[root], f"{broadcast.__name__} root={root}")
            assert got.data_ptr() != xs[root].data_ptr()
        for reduce in (algorithms.naive_reduce, algorithms.tree_reduce):
            for op in OPS:
                total = reduce(comm, xs[me], op, root)
                if me == root:
                    assert_same(total, plain(op, xs), f"{reduce.__name__} {op} root={root}")
                else:
                    assert total is None


def check_algorithm_results_are_new_tensors(rank: Rank) -> None:
    n, me, comm = rank.size, rank.index, rank.comm
    functions: list[tuple[str, Callable[[Communicator, Tensor], Tensor]]] = list(algorithms.ALL_REDUCES.items())
    functions += [("ring_all_gather", algorithms.ring_all_gather)]
    functions += [("ring_reduce_scatter", algorithms.ring_reduce_scatter)]
    functions += [("naive_broadcast", algorithms.naive_broadcast), ("tree_broadcast", algorithms.tree_broadcast)]
    for name, function in functions:
        x = torch.full((2 * n,), float(me + 1), device=rank.device)
        got = function(comm, x)
        want = got.clone()
        x.fill_(-1)
        comm.barrier()
        assert_same(got, want, f"{name} after its input was overwritten")
        got.fill_(-2 - me)
        comm.barrier()
        assert_same(got, torch.full_like(got, -2 - me), f"{name} after peers overwrote theirs")
        assert_same(x, torch.full_like(x, -1), f"the input of {name} after its result was overwritten")
