"""Communicators of some of the ranks, and meshes of them."""

from __future__ import annotations

import itertools

import torch

from conformance.values import LARGE, all_given, assert_same, given, plain, raises
from mplab import Mesh
from mplab.world import Rank


def check_groups(rank: Rank) -> None:
    n, me = rank.size, rank.index
    mine = [r for r in range(n) if r % 2 == me % 2]
    group = rank.comm.group(mine)
    assert list(group.ranks) == mine
    assert (group.rank, group.size) == (mine.index(me), len(mine))
    xs = [given(r, 5, torch.float64, rank.device) for r in mine]
    for _ in range(3):
        assert_same(group.all_reduce(xs[group.rank]), plain("sum", xs), "all_reduce of a half")
        whole = all_given(rank, 5, torch.float64)
        assert_same(rank.comm.all_reduce(whole[me]), plain("sum", whole), "all_reduce of all")
    assert_same(group.broadcast(xs[-1] if group.rank == group.size - 1 else None, group.size - 1), xs[-1], "the root")
    if group.size > 1:
        right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        handle = group.isend(xs[group.rank], right)
        assert_same(group.recv(left), xs[left], "a message in a group")
        handle.wait()


def check_groups_in_another_order(rank: Rank) -> None:
    n, me = rank.size, rank.index
    backwards = list(reversed(range(n)))
    group = rank.comm.group(backwards)
    assert group.rank == n - 1 - me
    assert list(group.ranks) == backwards
    xs = all_given(rank, (n + 2, 2), torch.float32)
    turned = xs[::-1]
    assert_same(group.all_gather(xs[me]), torch.cat(turned), "all_gather backwards")
    want = plain("sum", turned).tensor_split(n)[group.rank].contiguous()
    assert_same(group.reduce_scatter(xs[me]), want, "reduce_scatter backwards")
    assert_same(group.broadcast(xs[me], 0), xs[n - 1], "rank 0 of the group is the last one of the world")
    assert_same(rank.comm.all_gather(xs[me]), torch.cat(xs), "all_gather forwards")


def check_nested_groups(rank: Rank) -> None:
    n, me = rank.size, rank.index
    if me == n - 1 and n > 1:
        rank.comm.barrier()
        return
    most = rank.comm.group(range(max(1, n - 1)))
    inner = most.group(list(reversed(range(most.size))))
    again = inner.group(list(reversed(range(inner.size))))
    assert list(inner.ranks) == list(reversed(range(most.size)))
    assert list(again.ranks) == list(most.ranks)
    one = most.group([most.rank])
    assert one.size == 1
    x = torch.tensor([float(me)], device=rank.device)
    assert_same(one.all_reduce(x), x, "a group of one")
    assert one.all_to_all([x])[0].item() == me
    total = torch.tensor([sum(range(most.size)) * 1.0], device=rank.device)
    for group in (most, inner, again):
        assert_same(group.all_reduce(x), total, "nested groups")
    if n > 1:
        rank.comm.barrier()


def check_groups_of_the_same_ranks_do_not_mix(rank: Rank) -> None:
    """Communicators of equal members: calls that overlap in time each get their own partner."""
    n, me = rank.size, rank.index
    twin, turned = rank.comm.group(range(n)), rank.comm.group(list(reversed(range(n))))
    for other, length in itertools.product((turned, twin), (3, LARGE)):
        x = torch.full((length,), float(me), device=rank.device)
        first, second = rank.comm.iall_reduce(x), other.iall_reduce(x + 1, "max")
        assert_same(first.wait(), torch.full_like(x, n * (n - 1) / 2), "the world's")
        assert_same(second.wait(), torch.full_like(x, n), "the other's")
    if n > 1:
        right, left = (me + 1) % n, (me - 1) % n
        sends = [rank.comm.isend(x, right), twin.isend(-x, right), rank.comm.isend(x + 1, right)]
        assert_same(rank.comm.recv(left), torch.full_like(x, left), "the world's first")
        assert_same(twin.recv(left), torch.full_like(x, -left), "its twin's")
        assert_same(rank.comm.recv(left), torch.full_like(x, left + 1), "the world's second")
        for send in sends:
            send.wait()


def check_mesh(rank: Rank) -> None:
    n, me = rank.size, rank.index
    for dp in (d for d in range(1, n + 1) if n % d == 0):
        for pp in (p for p in range(1, n // dp + 1) if n // dp % p == 0):
            mesh = Mesh(dp=dp, pp=pp, tp=n // dp // pp)
            axes = mesh.connect(rank.comm)
            place = mesh.coordinates(me)
            assert axes.world is rank.comm
            for axis, comm in (("dp", axes.dp), ("pp", axes.pp), ("tp", axes.tp)):
                assert comm.rank == place[axis]
                assert comm.size == getattr(mesh, axis)
                got = comm.all_gather(torch.tensor([me], device=rank.device)).tolist()
                assert got == list(comm.ranks), f"{mesh} along {axis}"
                assert got in mesh.groups(axis)
    raises(lambda: Mesh(dp=n + 1).connect(rank.comm), f"{n + 1} x 1 x 1 = {n + 1}", str(n))
