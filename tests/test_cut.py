"""A parameter's parts over the tensor axis, and the whole again."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import leaves_nothing_behind as leaves_nothing_behind
from whole_layers import drawn, joined_part

from mplab import World
from mplab.parallel.cut import Cut
from mplab.plan.traffic import direct_traffic
from mplab.world import Rank


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1))
def test_the_parts_of_a_cut_are_the_whole(n: int, num_parts: int, width: int, other: int, dim: int) -> None:
    shape = [other, other]
    shape[dim] = n * num_parts * width
    whole = drawn(shape)
    parts = [Cut(dim, num_parts).part(whole, rank, n) for rank in range(n)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, joined_part(whole, rank, n, num_parts, dim))
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.nbytes
        assert part.data_ptr() != whole.data_ptr()

    def work(rank: Rank) -> None:
        cut = Cut(dim, num_parts)
        assert torch.equal(cut.merge(parts[rank.index], rank.comm), whole)
        mine = cut.distribute(whole if rank.index == 0 else torch.zeros_like(whole), rank.comm)
        assert torch.equal(mine, parts[rank.index])
        assert mine.is_contiguous()

    world = World(n, "cpu")
    world.run(work)
    for rank, ledger in enumerate(world.ledgers):
        part_bytes = whole.nbytes // n
        want = [direct_traffic(op, rank, [part_bytes] * n, 0) for op in ("all_gather", "scatter")]
        assert [(m.op, m.sent_bytes, m.received_bytes) for m in ledger.messages] == [
            (op, t.sent_bytes, t.received_bytes) for op, t in zip(("all_gather", "scatter"), want, strict=True)
        ]


def test_a_vector_is_cut_too() -> None:
    assert Cut(0, 3).part(torch.arange(12), 1, 2).tolist() == [2, 3, 6, 7, 10, 11]
    assert Cut().part(torch.arange(12), 2, 3).tolist() == [8, 9, 10, 11]
