"""Reductions, against a plain sum over a list."""

from __future__ import annotations

import torch

from conformance.values import DTYPES, FLOATS, LARGE, OPS, all_given, assert_same, has_meaning, lengths, plain
from mplab.world import Rank


def check_rank(rank: Rank) -> None:
    assert rank.comm.rank == rank.index
    assert rank.comm.size == rank.size
    assert list(rank.comm.ranks) == list(range(rank.size))
    assert rank.comm.device == rank.device == rank.generator.device
    assert rank.comm.ledger.rank == rank.index
    assert rank.comm.all_gather(torch.full((1,), rank.index, device=rank.device)).tolist() == list(range(rank.size))


def check_all_reduce(rank: Rank) -> None:
    for dtype in DTYPES:
        for op in OPS:
            if not has_meaning(op, dtype):
                continue
            for length in lengths(rank.size) if dtype in (torch.float32, torch.int64) else (0, 7):
                xs = all_given(rank, length, dtype)
                got = rank.comm.all_reduce(xs[rank.index], op)
                assert_same(got, plain(op, xs), f"all_reduce {op} {dtype} {length}")


def check_reduce(rank: Rank) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.int16, torch.bool, torch.complex64):
        for op in OPS:
            if not has_meaning(op, dtype):
                continue
            for root in range(rank.size):
                xs = all_given(rank, 7, dtype, salt=root)
                got = rank.comm.reduce(xs[rank.index], op, root)
                if rank.index == root:
                    assert_same(got, plain(op, xs), f"reduce {op} {dtype} root={root}")
                else:
                    assert got is None


def check_reduce_scatter(rank: Rank) -> None:
    n = rank.size
    for dtype in (torch.float64, torch.float16, torch.int64, torch.uint8, torch.complex64):
        for op in OPS:
            if not has_meaning(op, dtype):
                continue
            for length in lengths(n) if dtype == torch.float64 else (7,):
                xs = all_given(rank, length, dtype)
                got = rank.comm.reduce_scatter(xs[rank.index], op)
                assert_same(got, plain(op, xs).tensor_split(n)[rank.index], f"reduce_scatter {op} {dtype} {length}")
    for dim in (0, 1, 2, -1, -2):
        xs = all_given(rank, (n + 1, 5, 2 * n), torch.float32)
        got = rank.comm.reduce_scatter(xs[rank.index], "sum", dim)
        assert_same(got, plain("sum", xs).tensor_split(n, dim)[rank.index].contiguous(), f"reduce_scatter dim={dim}")


def check_mean_is_one_division_at_the_end(rank: Rank) -> None:
    xs = [torch.full((3,), r + 0.1, dtype=torch.float64, device=rank.device) for r in range(rank.size)]
    want = plain("mean", xs)
    assert_same(rank.comm.all_reduce(xs[rank.index], "mean"), want)
    assert_same(rank.comm.reduce_scatter(xs[rank.index], "mean"), want.tensor_split(rank.size)[rank.index])


def check_rank_order_and_equal_bits(rank: Rank) -> None:
    """Floats that round: the same bits on every rank, and those of a sum in rank order."""
    for dtype in FLOATS:
        for length in (1, 7, 1001, LARGE) if dtype == torch.float32 else (1, 7, 1001):
            generator = torch.Generator().manual_seed(length)
            xs = [
                torch.randn(length, generator=generator, dtype=torch.float64).to(dtype).to(rank.device)
                for _ in range(rank.size)
            ]
            for op in ("sum", "mean", "product"):
                got = rank.comm.all_reduce(xs[rank.index], op)
                rows = rank.comm.all_gather(got.unsqueeze(0))
                for r in range(rank.size):
                    assert_same(rows[r], got, f"{op} {dtype} {length} on rank {r} and here")
                assert_same(got, plain(op, xs), f"{op} {dtype} {length} in rank order")


def check_nan_and_inf_survive(rank: Rank) -> None:
    for length in (4, LARGE):
        xs = [torch.ones(length, device=rank.device) for _ in range(rank.size)]
        xs[-1][0], xs[-1][1], xs[0][2] = float("nan"), float("inf"), float("-inf")
        for op in OPS:
            got = rank.comm.all_reduce(xs[rank.index].clone(), op)
            assert_same(got, plain(op, xs), f"{op} of nan and inf")
            assert bool(got[0].isnan()), f"{op} lost a NaN"


def check_zero_dim_tensors(rank: Rank) -> None:
    n, device = rank.size, rank.device
    x = torch.tensor(rank.index + 1.0, device=device)
    assert_same(rank.comm.all_reduce(x), torch.tensor(n * (n + 1) / 2, device=device))
    assert_same(rank.comm.broadcast(x, n - 1), torch.tensor(float(n), device=device))
    total = rank.comm.reduce(x, "max", 0)
    assert (total is None) == (rank.index != 0)
    assert_same(rank.comm.all_reduce_(x), torch.tensor(n * (n + 1) / 2, device=device))


def check_many_dims_and_no_elements(rank: Rank) -> None:
    n = rank.size
    for shape in ((0,), (3, 0), (0, 4), (2, 3, 4), (1, 1, 1, 1, 5)):
        xs = all_given(rank, shape, torch.float32)
        x, want = xs[rank.index], plain("sum", xs)
        assert_same(rank.comm.all_reduce(x), want, f"all_reduce {shape}")
        assert_same(rank.comm.broadcast(x, n - 1), xs[n - 1], f"broadcast {shape}")
        for dim in range(len(shape)):
            assert_same(rank.comm.all_gather(x, dim), torch.cat(xs, dim), f"all_gather {shape} dim={dim}")
            got = rank.comm.reduce_scatter(x, "sum", dim)
            assert_same(got, want.tensor_split(n, dim)[rank.index].contiguous(), f"reduce_scatter {shape} dim={dim}")
            got = rank.comm.scatter(x, n - 1, dim)
            assert_same(got, xs[n - 1].tensor_split(n, dim)[rank.index].contiguous(), f"scatter {shape} dim={dim}")
