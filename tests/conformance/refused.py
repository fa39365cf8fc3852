"""Mistakes in a call: the same clear error on every rank, before any message."""

from __future__ import annotations

import torch

from conformance.values import assert_same, raises
from mplab.comm import algorithms
from mplab.world import Rank


def check_bad_arguments(rank: Rank) -> None:
    """Every rank gets the same clear error before any message, so that the next call works as if nothing had been."""
    n, me, comm = rank.size, rank.index, rank.comm
    x = torch.ones(3, device=rank.device)
    before = len(comm.ledger.messages)
    raises(lambda: comm.all_reduce(x, "average"), "'average'", "'mean'")
    raises(lambda: comm.reduce(x, "add"), "'add'", "'sum'")
    raises(lambda: comm.reduce_scatter(x, ""), "''", "'sum'")
    raises(lambda: algorithms.ring_all_reduce(comm, x, "add"), "'add'", "'sum'")
    raises(lambda: comm.all_reduce(x.int(), "mean"), "int32", "sum")
    raises(lambda: comm.all_reduce(x.bool(), "mean"), "bool")
    raises(lambda: comm.all_reduce(x.to(torch.complex64), "max"), "complex64", "order")
    for root in (n, -1):
        raises(lambda root=root: comm.broadcast(x, root), f"root={root}", f"0 to {n - 1}")
        raises(lambda root=root: comm.reduce(x, "sum", root), f"root={root}", f"0 to {n - 1}")
        raises(lambda root=root: comm.gather(x, root), f"root={root}", f"0 to {n - 1}")
        raises(lambda root=root: comm.scatter(x, root), f"root={root}", f"0 to {n - 1}")
        raises(lambda root=root: comm.send(x, root), f"dst={root}", f"0 to {n - 1}")
        raises(lambda root=root: comm.recv(root), f"src={root}", f"0 to {n - 1}")
    raises(lambda: comm.send(x, me), f"dst={me}", "itself")
    raises(lambda: comm.recv(me), f"src={me}", "itself")
    for dim in (1, -2):
        raises(lambda dim=dim: comm.all_gather(x, dim), f"dim={dim}", "(3,)")
        raises(lambda dim=dim: comm.reduce_scatter(x, "sum", dim), f"dim={dim}", "(3,)")
        raises(lambda dim=dim: comm.gather(x, 0, dim), f"dim={dim}", "(3,)")
    for call in (comm.all_gather, comm.reduce_scatter, comm.gather, comm.iall_gather, comm.ireduce_scatter):
        raises(lambda call=call: call(x[0]), "0-dim")
    raises(lambda: comm.all_to_all([x] * (n + 1)), str(n), str(n + 1))
    if n > 1:
        raises(lambda: comm.all_to_all([x] * (n - 1) + [x.int()]), "int32", "float32")
    raises(lambda: comm.all_reduce([1.0, 2.0]), "list", "torch.Tensor")  # type: ignore[arg-type]
    raises(lambda: comm.all_reduce(2.5), "float", "torch.Tensor")  # type: ignore[arg-type]
    raises(lambda: comm.all_reduce(None), "NoneType", "torch.Tensor")  # type: ignore[arg-type]
    raises(lambda: comm.all_to_all([1.0] * n), "float", "torch.Tensor")  # type: ignore[list-item]
    raises(lambda: comm.broadcast(None, me), "NoneType", "torch.Tensor")
    raises(lambda: comm.scatter(None, me), "NoneType", "torch.Tensor")
    raises(lambda: comm.all_reduce(torch.ones(2, device="meta")), "meta", str(rank.device))
    raises(lambda: comm.all_reduce(torch.ones(2, device=rank.device).to_sparse()), "dense")
    raises(lambda: comm.all_reduce_(x[:1].expand(3)), "expanded", "clone()")
    raises(lambda: comm.iall_reduce_(x.view(3, 1).expand(3, 100_000)), "expanded", "clone()")
    raises(lambda: comm.group([]), "not in it")
    raises(lambda: comm.group([me, me]), "once")
    raises(lambda: comm.group([me, n]), f"0 to {n - 1}")
    raises(lambda: comm.group([me, -1]), f"0 to {n - 1}")
    if n > 1:
        raises(lambda: comm.group([(me + 1) % n]), f"rank {me}", "not in it")
    assert len(comm.ledger.messages) == before
    assert_same(comm.all_reduce(x), torch.full((3,), float(n), device=rank.device), "the call after the refused ones")


def check_what_was_called_before_excuses_nothing(rank: Rank) -> None:
    """A call that is known already: its tensor is looked at as the first one's was."""
    comm = rank.comm
    x = torch.ones(3, device=rank.device)
    comm.all_reduce_(x)
    comm.all_reduce(x)
    before = len(comm.ledger.messages)
    raises(lambda: comm.all_reduce_(x[:1].expand(3)), "expanded", "clone()")
    raises(lambda: comm.all_reduce(torch.ones(3, device="meta")), "meta", str(rank.device))
    raises(lambda: comm.all_reduce(torch.ones(3, device=rank.device).to_sparse()), "dense")
    assert len(comm.ledger.messages) == before
