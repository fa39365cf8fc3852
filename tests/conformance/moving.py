"""Collectives that only move tensors, and large tensors in all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from conformance.values import DTYPES, LARGE, all_given, assert_same, given, lengths, plain
from mplab.world import Rank


def check_broadcast(rank: Rank) -> None:
    for dtype in DTYPES:
        for root in range(rank.size):
            for length in (0, 5):
                x = given(root, length, dtype, rank.device)
                mine = x.clone() if rank.index == root else None
                assert_same(rank.comm.broadcast(mine, root), x, f"broadcast {dtype} {length} root={root}")
    # A tensor off the root is not looked at, but for its shape and dtype.
    mine = torch.full((3,), float(rank.index), device=rank.device)
    assert_same(rank.comm.broadcast(mine, rank.size - 1), torch.full((3,), rank.size - 1.0, device=rank.device))
    assert_same(mine, torch.full((3,), float(rank.index), device=rank.device), "the input of a broadcast")


def check_all_gather_of_different_sizes(rank: Rank) -> None:
    n = rank.size
    for dtype in DTYPES:
        xs = [given(r, (2, (r * 2) % 3, 3), dtype, rank.device) for r in range(n)]
        for dim in (1, -2):
            assert_same(rank.comm.all_gather(xs[rank.index], dim), torch.cat(xs, 1), f"all_gather {dtype} dim={dim}")
    xs = [given(r, n - r - 1, torch.int64, rank.device) for r in range(n)]  # the last one gives nothing
    assert_same(rank.comm.all_gather(xs[rank.index]), torch.cat(xs))


def check_gather_of_different_sizes(rank: Rank) -> None:
    n = rank.size
    for root in range(n):
        for dim in (0, 1):
            shapes = [(r + 1, 2) if dim == 0 else (2, (r + root) % 3) for r in range(n)]
            xs = [given(r, shapes[r], torch.float32, rank.device) for r in range(n)]
            got = rank.comm.gather(xs[rank.index], root, dim)
            if rank.index == root:
                assert_same(got, torch.cat(xs, dim), f"gather root={root} dim={dim}")
            else:
                assert got is None


def check_scatter(rank: Rank) -> None:
    n = rank.size
    for root in range(n):
        for length in lengths(n):
            x = given(root, length, torch.float64, rank.device)
            got = rank.comm.scatter(x if rank.index == root else None, root)
            assert_same(got, x.tensor_split(n)[rank.index], f"scatter {length} root={root}")
        x = given(root, (3, n + 1), torch.int32, rank.device)
        want = x.tensor_split(n, 1)[rank.index].contiguous()
        assert_same(rank.comm.scatter(x if rank.index == root else None, root, 1), want, "scatter along 1")
        # What the others give is ignored, whatever its shape.
        other = x if rank.index == root else torch.zeros(5, device=rank.device)
        assert_same(rank.comm.scatter(other, root, -1), want, "scatter along -1")


def check_all_to_all_of_different_shapes(rank: Rank) -> None:
    n, me = rank.size, rank.index
    shape: Callable[[int, int], tuple[int, ...]] = lambda src, dst: (src, dst + 1) if src % 2 else (dst,)  # noqa: E731
    for dtype in (torch.float32, torch.bool, torch.complex64):
        xs = [given(me, shape(me, dst), dtype, rank.device, salt=dst) for dst in range(n)]
        got = rank.comm.all_to_all(xs)
        assert isinstance(got, list)
        assert len(got) == n
        for src in range(n):
            assert_same(got[src], given(src, shape(src, me), dtype, rank.device, salt=me), f"all_to_all from {src}")
    got = rank.comm.all_to_all([torch.full((LARGE,), me, dtype=torch.int32, device=rank.device) for _ in range(n)])
    for src in range(n):
        assert_same(got[src], torch.full((LARGE,), src, dtype=torch.int32, device=rank.device), "a large all_to_all")


def check_large_tensors(rank: Rank) -> None:
    n, me, comm = rank.size, rank.index, rank.comm
    for shape, dtype in (((LARGE,), torch.float32), ((7, 3, 4001), torch.float64), ((2 * LARGE,), torch.bfloat16)):
        xs = all_given(rank, shape, dtype)
        x = xs[me]
        for op in ("sum", "mean", "max"):
            assert_same(comm.all_reduce(x, op), plain(op, xs), f"all_reduce {op} {shape}")
        want = plain("sum", xs)
        got = comm.reduce(x, "sum", n - 1)
        if me == n - 1:
            assert_same(got, want, f"reduce {shape}")
        else:
            assert got is None
        assert_same(comm.broadcast(x if me == 0 else None), xs[0], f"broadcast {shape}")
        for dim in range(len(shape)):
            mine = want.tensor_split(n, dim)[me].contiguous()
            assert_same(comm.reduce_scatter(x, "sum", dim), mine, f"reduce_scatter {shape} dim={dim}")
            assert_same(comm.all_gather(x, dim), torch.cat(xs, dim), f"all_gather {shape} dim={dim}")
            chunk = xs[0].tensor_split(n, dim)[me].contiguous()
            assert_same(comm.scatter(x, 0, dim), chunk, f"scatter {shape} dim={dim}")
        gathered = comm.gather(x, 0, -1)
        if me == 0:
            assert_same(gathered, torch.cat(xs, -1), f"gather {shape}")


def check_sizes_around_one_gather(rank: Rank) -> None:
    """One rank's tensor is large, the others' small: all must take the same path."""
    sizes = [LARGE if r == rank.size // 2 else 3 for r in range(rank.size)]
    xs = [given(r, sizes[r], torch.float32, rank.device) for r in range(rank.size)]
    assert_same(rank.comm.all_gather(xs[rank.index]), torch.cat(xs))
