"""Whose memory it is: layouts, in-place forms, inputs that stay, results that nobody shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from conformance.values import LARGE, OPS, all_given, assert_same, given, has_meaning, plain, strided_views
from mplab.comm import Communicator, algorithms
from mplab.world import Rank


def check_non_contiguous_inputs(rank: Rank) -> None:
    n, me, comm = rank.size, rank.index, rank.comm
    xs = all_given(rank, (3, 4), torch.float32)
    want = plain("sum", xs)
    for name, x in strided_views(xs[me]):
        assert_same(comm.all_reduce(x), want, f"all_reduce, {name}")
        assert_same(comm.broadcast(x, n - 1), xs[n - 1], f"broadcast, {name}")
        for dim in (0, 1):
            mine = want.tensor_split(n, dim)[me].contiguous()
            assert_same(comm.reduce_scatter(x, "sum", dim), mine, f"reduce_scatter, {name}")
            assert_same(comm.all_gather(x, dim), torch.cat(xs, dim), f"all_gather, {name}")
            assert_same(comm.scatter(x, 0, dim), xs[0].tensor_split(n, dim)[me].contiguous(), f"scatter, {name}")
        assert_same(comm.all_to_all([x] * n)[n - 1], xs[n - 1], f"all_to_all, {name}")
        if n > 1:
            handle = comm.isend(x, (me + 1) % n)
            assert_same(comm.recv((me - 1) % n), xs[(me - 1) % n], f"recv, {name}")
            handle.wait()
    row = given(me, (1, 4), torch.float32, rank.device).expand(3, 4)
    rows = [given(r, (1, 4), torch.float32, rank.device).expand(3, 4) for r in range(n)]
    assert_same(comm.all_reduce(row), plain("sum", rows), "all_reduce, expanded")
    assert_same(comm.all_gather(row), torch.cat(rows), "all_gather, expanded")
    large = given(me, (100, 1001), torch.float32, rank.device).t()
    want = plain("sum", [given(r, (100, 1001), torch.float32, rank.device).t() for r in range(n)])
    assert_same(comm.all_reduce(large), want, "all_reduce, large and transposed")


def check_in_place(rank: Rank) -> None:
    n, me = rank.size, rank.index
    for shape in ((3, 4), (0, 4), (100, 1001)):
        for dtype in (torch.float32, torch.int64, torch.bool):
            xs = all_given(rank, shape, dtype)
            for op in OPS:
                if not has_meaning(op, dtype):
                    continue
                want = plain(op, xs)
                x = xs[me].clone()
                address = x.data_ptr()
                got = rank.comm.all_reduce_(x, op)
                assert got is x
                assert x.data_ptr() == address
                assert_same(x, want, f"all_reduce_ {op} {dtype} {shape}")
                transposed = xs[me].t().contiguous().t()
                assert rank.comm.all_reduce_(transposed, op) is transposed
                assert_same(transposed, want, f"all_reduce_ {op} {dtype} {shape}, transposed")
                # Only what the view shows is written to.
                wide = torch.stack([xs[me], xs[me]], dim=-1)
                rank.comm.all_reduce_(wide[..., 0], op)
                assert_same(wide[..., 0], want, f"all_reduce_ {op} {dtype} {shape}, strided")
                assert_same(wide[..., 1], xs[me], f"next to all_reduce_ {op} {dtype} {shape}")
    # Layouts may differ between ranks.
    xs = all_given(rank, (100, 1001), torch.float32)
    mixed = xs[me].clone() if me % 2 else xs[me].t().contiguous().t()
    assert_same(rank.comm.all_reduce_(mixed), plain("sum", xs), "all_reduce_ of mixed layouts")
    x = xs[me].clone()
    handle = rank.comm.iall_reduce_(x)
    assert handle.wait() is x or torch.equal(handle.wait(), x)
    assert_same(x, plain("sum", xs), "iall_reduce_")
    assert n == rank.comm.size


def calls_on(comm: Communicator, x: Tensor) -> dict[str, Callable[[], object]]:
    n = comm.size
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: comm.all_reduce(x),
        "all_reduce mean": lambda: comm.all_reduce(x, "mean"),
        "reduce": lambda: comm.reduce(x, "sum", n - 1),
        "reduce mean": lambda: comm.reduce(x, "mean"),
        "reduce_scatter": lambda: comm.reduce_scatter(x),
        "reduce_scatter mean": lambda: comm.reduce_scatter(x, "mean"),
        "all_gather": lambda: comm.all_gather(x),
        "gather": lambda: comm.gather(x, n - 1),
        "broadcast": lambda: comm.broadcast(x, n - 1),
        "scatter": lambda: comm.scatter(x),
        "all_to_all": lambda: comm.all_to_all([x] * n),
        "iall_reduce": lambda: comm.iall_reduce(x).wait(),
        "ring_reduce_scatter": lambda: algorithms.ring_reduce_scatter(comm, x, "mean"),
        "ring_all_gather": lambda: algorithms.ring_all_gather(comm, x),
        "naive_broadcast": lambda: algorithms.naive_broadcast(comm, x),
        "tree_broadcast": lambda: algorithms.tree_broadcast(comm, x, n - 1),
        "naive_reduce": lambda: algorithms.naive_reduce(comm, x, "mean", n - 1),
        "tree_reduce": lambda: algorithms.tree_reduce(comm, x, "mean"),
    }
    for name, function in algorithms.ALL_REDUCES.items():
        calls[name] = partial(function, comm, x, "mean")
    return calls


def check_inputs_stay_as_they_are(rank: Rank) -> None:
    for length in (1001, LARGE):
        x = given(rank.index, length, torch.float32, rank.device)
        before = x.clone()
        for name, call in calls_on(rank.comm, x).items():
            call()
            rank.comm.barrier()
            assert_same(x, before, f"the input of {name}")


def check_results_are_new_tensors(rank: Rank) -> None:
    """Writing into a result, or into an input after the call, changes nobody else's result."""
    n, me, comm = rank.size, rank.index, rank.comm
    numbers = [float(r + 1) for r in range(n)]
    for length in (3, LARGE):
        for salt in range(max(n, 6)):  # every rank is the root once

            def x(of: int = me, length: int = length, salt: int = salt) -> Tensor:
                return torch.full((length,), numbers[of] + salt, device=rank.device)

            total = sum(numbers) + n * salt
            results: list[tuple[str, Tensor, float]] = []
            mine = x()
            results.append(("all_reduce", comm.all_reduce(mine), total))
            mine.fill_(-1)
            mine = x()
            results.append(("broadcast", comm.broadcast(mine, salt % n), numbers[salt % n] + salt))
            mine.fill_(-2)
            mine = x()
            parts = comm.all_to_all([mine] * n)
            mine.fill_(-3)
            results += [(f"all_to_all from {r}", part, numbers[r] + salt) for r, part in enumerate(parts)]
            mine = x()
            results.append(("reduce_scatter", comm.reduce_scatter(mine), total))
            mine.fill_(-4)
            mine = x()
            results.append(("scatter", comm.scatter(mine, salt % n), numbers[salt % n] + salt))
            mine.fill_(-5)
            mine = x()
            gathered = comm.all_gather(mine)
            mine.fill_(-6)
            results += [(f"all_gather of {r}", gathered.view(n, -1)[r], numbers[r] + salt) for r in range(n)]
            for i, (name, got, want) in enumerate(results):
                expected = torch.full_like(got, want)
                assert_same(got, expected, name)
                got.fill_(-10 - i)
            # If any of these shared memory with a peer's, one of the two sees the other's number now.
            comm.barrier()
            for i, (name, got, _) in enumerate(results):
                assert_same(got, torch.full_like(got, -10 - i), f"{name}, written to")
            comm.barrier()


def check_writing_at_once_after_the_call(rank: Rank) -> None:
    """The chain in which a result is the next input and everything is overwritten as soon as a call is back."""
    n, comm = rank.size, rank.comm
    for length, repeats in ((5, 50), (LARGE, 25)):
        x = torch.ones(length, device=rank.device)
        for i in range(repeats):
            y = comm.all_reduce(x)
            x.fill_(float("nan"))
            assert_same(y, torch.full_like(y, n), f"all_reduce {i}")
            z = comm.broadcast(y if rank.index == i % n else None, i % n)
            y.fill_(float("nan"))
            assert_same(z, torch.full_like(z, n), f"broadcast {i}")
            part = comm.reduce_scatter(z, "mean")
            z.fill_(float("nan"))
            whole = comm.all_gather(part)
            part.fill_(float("nan"))
            assert_same(whole, torch.full_like(whole, n), f"all_gather {i}")
            comm.all_reduce_(whole, "max")
            x = whole.clone().fill_(1)
            whole.fill_(float("nan"))


def check_sent_tensors_may_be_changed_at_once(rank: Rank) -> None:
    n, me, comm = rank.size, rank.index, rank.comm
    if n == 1:
        return
    for length in (3, LARGE):
        x = torch.empty(length, device=rank.device)
        for i in range(10):
            # A blocking send may change its tensor afterwards; with rendezvous neighbours must take turns.
            got: Tensor | None = None
            for turn in (0, 1):
                if me % 2 == turn and me + 1 < n:
                    comm.send(x.fill_(me + i), me + 1)
                    x.fill_(-1)
                elif me % 2 != turn and me > 0:
                    got = comm.recv(me - 1)
            if me > 0:
                assert_same(got, torch.full_like(x, me - 1 + i), f"message {i}")


def check_inputs_that_require_grad(rank: Rank) -> None:
    n, comm = rank.size, rank.comm
    x = torch.ones(3, device=rank.device, requires_grad=True)
    y = x * 2  # no leaf
    for mine in (x, y, torch.nn.Parameter(torch.ones(3, device=rank.device) * 2)):
        want = torch.full((3,), float(mine.detach()[0]) * n, device=rank.device)
        assert_same(comm.all_reduce(mine), want)
        assert_same(comm.broadcast(mine, 0), mine.detach())
        assert_same(comm.all_gather(mine), mine.detach().repeat(n))
        assert_same(comm.reduce_scatter(mine), want.tensor_split(n)[rank.index])
        assert_same(comm.scatter(mine), mine.detach().tensor_split(n)[rank.index])
        assert_same(comm.all_to_all([mine] * n)[0], mine.detach())
        total = comm.reduce(mine)
        assert total is None or not total.requires_grad
        for function in algorithms.ALL_REDUCES.values():
            assert_same(function(comm, mine), want)
        if n > 1:
            handle = comm.isend(mine, (rank.index + 1) % n)
            assert_same(comm.recv((rank.index - 1) % n), mine.detach())
            handle.wait()
    parameter = torch.nn.Parameter(torch.ones(3, device=rank.device))
    assert comm.all_reduce_(parameter) is parameter
    assert parameter.requires_grad
    assert_same(parameter.detach(), torch.full((3,), float(n), device=rank.device))
    y.sum().backward()  # x and what was computed from it before are as they were
    assert x.grad is not None
    assert_same(x.grad, torch.full((3,), 2.0, device=rank.device))
