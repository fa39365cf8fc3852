"""Sends and receives, their tags, and operations under way."""

from __future__ import annotations

import torch

from conformance.values import DTYPES, LARGE, all_given, assert_same, given, plain
from mplab.world import Rank


def check_messages_keep_dtype_and_shape(rank: Rank) -> None:
    n, me, comm = rank.size, rank.index, rank.comm
    if n == 1:
        return
    right, left = (me + 1) % n, (me - 1) % n
    for dtype in DTYPES:
        for shape in ((), (0,), (5,), (2, 0, 3), (2, 3, 4)):
            handle = comm.isend(given(me, shape, dtype, rank.device), right)
            assert_same(comm.recv(left), given(left, shape, dtype, rank.device), f"recv {dtype} {shape}")
            assert handle.wait() is None
    handle = comm.isend(given(me, LARGE, torch.float64, rank.device), right)
    assert_same(comm.recv(left), given(left, LARGE, torch.float64, rank.device), "a large message")
    handle.wait()


def check_every_pair(rank: Rank) -> None:
    n, me, comm = rank.size, rank.index, rank.comm
    others = [r for r in range(n) if r != me]
    handles = [comm.isend(torch.tensor([me, dst], device=rank.device), dst) for dst in others]
    for src in reversed(others):
        assert_same(comm.recv(src), torch.tensor([src, me], device=rank.device), f"from {src}")
    for handle in handles:
        handle.wait()


def check_tags_out_of_order(rank: Rank) -> None:
    n, me, comm = rank.size, rank.index, rank.comm
    if n == 1:
        return
    right, left = (me + 1) % n, (me - 1) % n
    # Twice each tag: messages of one tag keep their order, tags among each other need not.
    sends = [comm.isend(torch.tensor(100 * me + i, device=rank.device), right, tag=i % 3) for i in range(6)]
    for tag in (2, 0, 1):
        for i in (tag, tag + 3):
            assert int(comm.recv(left, tag=tag)) == 100 * left + i, f"message {i} with tag {tag}"
    for handle in reversed(sends):
        handle.wait()


def check_receives_posted_before_sends(rank: Rank) -> None:
    """The standard way to exchange without a deadlock: everyone posts its receive, then sends, then waits."""
    n, me, comm = rank.size, rank.index, rank.comm
    if n == 1:
        return
    right, left = (me + 1) % n, (me - 1) % n
    for length in (3, LARGE):
        posted = [comm.irecv(left, tag=tag) for tag in (0, 1, 0)]
        for i, tag in enumerate((0, 1, 0)):
            comm.send(torch.full((length,), 10 * me + i, device=rank.device), right, tag=tag)
        for i in (2, 1, 0):  # waited in any order, each gets the message that it was posted for
            assert_same(posted[i].wait(), torch.full((length,), 10 * left + i, device=rank.device), f"receive {i}")


def check_handles(rank: Rank) -> None:
    """Several operations under way at once, waited for in the order of their starts."""
    n, me, comm = rank.size, rank.index, rank.comm
    for length in (n + 1, LARGE):
        xs = all_given(rank, length, torch.float32)
        ys = all_given(rank, length, torch.int32, salt=1)
        zs = all_given(rank, length, torch.float32, salt=2)
        in_place = zs[me].clone()
        handles = [
            comm.iall_reduce(xs[me]),
            comm.ireduce_scatter(ys[me], "max"),
            comm.iall_gather(xs[me]),
            comm.iall_reduce_(in_place, "min"),
            comm.iall_reduce(ys[me], "product"),
        ]
        comm.barrier() if length <= n + 1 else None  # a blocking call between start and wait
        wants = [
            plain("sum", xs),
            plain("max", ys).tensor_split(n)[me],
            torch.cat(xs),
            plain("min", zs),
            plain("product", ys),
        ]
        for handle, want in zip(handles, wants, strict=True):
            assert_same(handle.wait(), want, "an asynchronous result")
        for handle, want in zip(reversed(handles), reversed(wants), strict=True):
            got = handle.wait()
            assert got is handle.wait()
            assert_same(got, want, "a second wait")
        assert_same(in_place, wants[3], "an asynchronous in-place result")
        assert_same(xs[me], given(me, length, torch.float32, rank.device), "the input of an asynchronous call")


def check_handles_between_messages(rank: Rank) -> None:
    n, me, comm = rank.size, rank.index, rank.comm
    x = torch.full((4,), float(me), device=rank.device)
    started = comm.iall_reduce(x)
    if n > 1:
        send = comm.isend(x, (me + 1) % n)
        assert_same(comm.recv((me - 1) % n), torch.full((4,), float((me - 1) % n), device=rank.device))
        send.wait()
    assert_same(started.wait(), torch.full((4,), n * (n - 1) / 2, device=rank.device))
