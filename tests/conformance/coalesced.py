"""Many tensors reduced as one, and gathering into the tensor itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from conformance.ledgers import assert_counted, direct_hops
from conformance.values import (
    DTYPES,
    LARGE,
    OPS,
    all_given,
    assert_same,
    given,
    has_meaning,
    plain,
    raises,
    strided_views,
)
from mplab.world import Rank

SHAPES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((3, 4),),
    ((5,), (2, 3), (), (1,), (4, 1, 2)),
    ((0,), (3,), (2, 0)),
    ((0,), (0, 5)),
    ((), ()),
    ((1,), (LARGE,), (0,), (2, 7), (LARGE // 7, 3)),  # blocks begin and end within tensors
)


def lists_of_all(rank: Rank, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[list[Tensor]]:
    """For each place of the list what every rank gives there."""
    return [all_given(rank, shape, dtype, salt=place) for place, shape in enumerate(shapes)]


def check_all_reduce_coalesced(rank: Rank) -> None:
    for shapes in SHAPES:
        is_large = sum(math.prod(shape) for shape in shapes) > 1000
        for dtype in (torch.float32, torch.bfloat16) if is_large else DTYPES:
            for op in OPS:
                if not has_meaning(op, dtype):
                    continue
                given_there = lists_of_all(rank, shapes, dtype)
                mine = [of_ranks[rank.index].clone() for of_ranks in given_there]
                addresses = [x.data_ptr() for x in mine]
                rank.comm.all_reduce_coalesced_(mine, op)
                for x, of_ranks, address in zip(mine, given_there, addresses, strict=True):
                    assert_same(x, plain(op, of_ranks), f"all_reduce_coalesced_ {op} {dtype} {shapes}")
                    assert x.data_ptr() == address


def check_coalesced_floats_are_added_in_rank_order(rank: Rank) -> None:
    for length in (7, LARGE):
        generator = torch.Generator().manual_seed(length)
        rows = [torch.randn(2, length, generator=generator).to(rank.device) for _ in range(rank.size)]
        for op in ("sum", "mean", "product"):
            mine = list(rows[rank.index].clone())
            rank.comm.all_reduce_coalesced_(mine, op)
            for place, x in enumerate(mine):
                assert_same(x, plain(op, [row[place] for row in rows]), f"{op} of {length} in rank order")


def check_coalesced_layouts(rank: Rank) -> None:
    """Only what a view shows is written to; layouts may differ between ranks."""
    n, me, comm = rank.size, rank.index, rank.comm
    xs = all_given(rank, (3, 4), torch.float32)
    want = plain("sum", xs)
    for name, x in strided_views(xs[me]):
        first, second = xs[me].clone(), x.clone(memory_format=torch.preserve_format)
        comm.all_reduce_coalesced_([first, second, x])
        for got in (first, second, x):
            assert_same(got, want, f"all_reduce_coalesced_, {name}")
    wide = torch.stack([xs[me], xs[me]], dim=-1)
    comm.all_reduce_coalesced_([wide[..., 0], xs[me].clone()], "max")
    assert_same(wide[..., 0], plain("max", xs), "every other element")
    assert_same(wide[..., 1], xs[me], "next to every other element")
    many = all_given(rank, (100, 1001), torch.float32)
    mixed = many[me].clone() if me % 2 else many[me].t().contiguous().t()
    comm.all_reduce_coalesced_([xs[me].clone(), mixed])
    assert_same(mixed, plain("sum", many), "mixed layouts")
    conjugated = torch.tensor([1 + 2j, me - 3j], device=rank.device).conj()
    comm.all_reduce_coalesced_([conjugated, conjugated.clone()])
    assert_same(conjugated, torch.tensor([n - 2j * n, n * (n - 1) / 2 + 3j * n], device=rank.device), "conjugated")


def check_coalesced_tensors_that_require_grad(rank: Rank) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, device=rank.device))
    y = parameter * 2
    rank.comm.all_reduce_coalesced_([parameter, y])
    assert parameter.requires_grad
    assert_same(parameter.detach(), torch.full((3,), float(rank.size), device=rank.device))
    assert_same(y.detach(), torch.full((3,), 2.0 * rank.size, device=rank.device))


def check_coalesced_handles(rank: Rank) -> None:
    """Several under way at once, between other collectives; waited for twice, and helped on or not."""
    n, me, comm = rank.size, rank.index, rank.comm
    for length in (3, LARGE):
        xs = [torch.full((length,), float(me + i), device=rank.device) for i in range(6)]
        first = comm.iall_reduce_coalesced_(xs[:2])
        other = comm.iall_reduce(xs[2])
        second = comm.iall_reduce_coalesced_(xs[3:5], "max")
        third = comm.iall_reduce_(xs[5])
        if me % 2:
            for handle in (first, other, second, third):
                handle.advance()
        assert first.wait() is None
        assert_same(other.wait(), torch.full((length,), n * (n - 1) / 2 + 2 * n, device=rank.device))
        assert second.wait() is None
        third.wait()
        assert first.wait() is None
        for i, x in enumerate(xs):
            total = {2: me + 2.0, 3: n + 2.0, 4: n + 3.0}.get(i, n * (n - 1) / 2 + i * n)
            assert_same(x, torch.full((length,), total, device=rank.device), f"place {i}")


def check_coalesced_repeatedly(rank: Rank) -> None:
    """Everything is overwritten as soon as a call is back."""
    for length, repeats in ((5, 100), (LARGE, 10)):
        xs = [torch.empty(length, device=rank.device), torch.empty(7, 2, device=rank.device)]
        for i in range(repeats):
            for x in xs:
                x.fill_(i + rank.index)
            rank.comm.all_reduce_coalesced_(xs)
            total = rank.size * i + rank.size * (rank.size - 1) / 2
            for x in xs:
                assert_same(x, torch.full_like(x, total), f"repeat {i}")


def check_all_gather_in_place(rank: Rank) -> None:
    n, me, comm = rank.size, rank.index, rank.comm
    for dtype in DTYPES:
        for shape in ((0,), (1,), (n,), (7,), (n + 1, 3), (5, 0), (LARGE,)):
            whole = given(1, shape, dtype, rank.device)
            x = torch.zeros_like(whole)
            x.tensor_split(n)[me].copy_(whole.tensor_split(n)[me])
            address = x.data_ptr()
            assert comm.all_gather_(x) is x
            assert x.data_ptr() == address
            assert_same(x, whole, f"all_gather_ {dtype} {shape}")


def check_all_gather_in_place_goes_on_at_once(rank: Rank) -> None:
    """What one rank has written into its chunk for the next call is not seen by the others in this one."""
    n, me, comm = rank.size, rank.index, rank.comm
    for length in (n + 1, LARGE):
        x = torch.empty(length, device=rank.device)
        twin = torch.empty(length, device=rank.device)
        for i in range(20):
            x.tensor_split(n)[me].fill_(10 * i + me)
            twin.tensor_split(n)[me].fill_(-10 * i - me)
            first, second = comm.iall_gather_(x), comm.iall_gather_(twin)
            got, other = first.wait(), second.wait()
            want = torch.cat([torch.full_like(c, 10 * i + r) for r, c in enumerate(x.tensor_split(n))])
            assert_same(got, want, f"all_gather_ {i}")
            assert_same(x, want, f"all_gather_ {i}")
            assert_same(other, -want, f"its twin {i}")
            x.fill_(math.nan)


def check_ledger_of_coalesced_calls(rank: Rank) -> None:
    """One message of the joined elements; a gather of the chunks."""
    n, me, comm = rank.size, rank.index, rank.comm
    for lengths in ((0,), (5, 0, 6), (1,), (LARGE, 3)):
        for dtype in (torch.float64, torch.int16):
            before = len(comm.ledger.messages)
            comm.all_reduce_coalesced_([given(me, length, dtype, rank.device) for length in lengths], "max")
            (message,) = comm.ledger.messages[before:]
            hops = direct_hops("all_reduce", n, sum(lengths), 0)
            assert_counted(message, me, "all_reduce_coalesced_", hops, dtype.itemsize)
            assert message.group == tuple(range(n))
    for shape in ((0,), (7,), (n,), (n + 1, 3), (LARGE,)):
        before = len(comm.ledger.messages)
        comm.all_gather_(torch.zeros(shape, dtype=torch.int16, device=rank.device))
        (message,) = comm.ledger.messages[before:]
        chunks = [part.numel() for part in torch.empty(shape).tensor_split(n)]
        gathered = [(a, b, chunks[a]) for a in range(n) for b in range(n) if a != b]
        assert_counted(message, me, "all_gather_", gathered, 2)


def check_coalesced_in_groups(rank: Rank) -> None:
    n, me = rank.size, rank.index
    members = [r for r in reversed(range(n)) if r % 2 == me % 2]
    group = rank.comm.group(members)
    for length in (5, LARGE):
        xs = [given(r, length, torch.float64, rank.device) for r in members]
        mine, again = xs[group.rank].clone(), xs[group.rank].clone()
        group.all_reduce_coalesced_([mine, again])
        assert_same(mine, plain("sum", xs), "all_reduce_coalesced_ of a half")
        assert_same(again, mine, "its second tensor")
        whole = torch.arange(length, device=rank.device)
        x = torch.zeros_like(whole)
        x.tensor_split(group.size)[group.rank].copy_(whole.tensor_split(group.size)[group.rank])
        assert_same(group.all_gather_(x), whole, "all_gather_ of a half")


def check_bad_coalesced_arguments(rank: Rank) -> None:
    """Refused before any message, so that the next call works as if nothing had been."""
    comm = rank.comm
    x = torch.ones(4, device=rank.device)
    before = len(comm.ledger.messages)
    raises(lambda: comm.all_reduce_coalesced_([]), "of no tensors", "one or more")
    raises(lambda: comm.all_reduce_coalesced_([x, x.int()]), "one dtype", "float32", "int32")
    raises(lambda: comm.iall_reduce_coalesced_([x, x.double()]), "one dtype", "float32", "float64")
    raises(lambda: comm.all_reduce_coalesced_([x], "add"), "'add'", "'sum'")
    raises(lambda: comm.all_reduce_coalesced_([x.int()], "mean"), "int32", "sum")
    raises(lambda: comm.all_reduce_coalesced_([x, None]), "NoneType", "torch.Tensor")  # type: ignore[list-item]
    raises(lambda: comm.all_reduce_coalesced_([x, torch.ones(2, device="meta")]), "meta", str(rank.device))
    raises(lambda: comm.all_reduce_coalesced_([x, x[:1].expand(3)]), "expanded", "clone()")
    raises(lambda: comm.all_reduce_coalesced_([x.to_sparse()]), "dense")
    raises(lambda: comm.all_gather_(x[0]), "0-dim")
    raises(lambda: comm.all_gather_(x.view(2, 2).t()), "contiguous")
    raises(lambda: comm.iall_gather_(x[::2]), "contiguous")
    raises(lambda: comm.all_gather_(x.to(torch.complex64).conj()), "contiguous")
    raises(lambda: comm.all_gather_([1.0]), "list", "torch.Tensor")  # type: ignore[arg-type]
    assert len(comm.ledger.messages) == before
    comm.all_reduce_coalesced_([x])
    assert_same(x, torch.full((4,), float(rank.size), device=rank.device), "the call after the refused ones")
