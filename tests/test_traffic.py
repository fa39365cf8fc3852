"""Direct collectives counted by formula, against all their messages listed one by one."""

from __future__ import annotations

import pytest
import torch
from conformance.ledgers import direct_hops
from hypothesis import given
from hypothesis import strategies as st

from mplab.plan.traffic import Traffic, chunk_lengths, direct_traffic

ROOTED = ("broadcast", "reduce", "scatter", "gather")
COLLECTIVES = ("all_reduce", "all_reduce_", "reduce_scatter", "all_gather", "barrier", *ROOTED)


@given(st.integers(0, 300), st.integers(1, 20))
def test_chunks_are_those_of_tensor_split(length: int, num_chunks: int) -> None:
    lengths = chunk_lengths(length, num_chunks)
    assert lengths == [len(chunk) for chunk in torch.empty(length).tensor_split(num_chunks)]


@given(st.integers(0, 10**15), st.integers(1, 10**4))
def test_chunks_of_any_length_add_up_and_differ_by_one_at_most(length: int, num_chunks: int) -> None:
    lengths = chunk_lengths(length, num_chunks)
    assert len(lengths) == num_chunks
    assert sum(lengths) == length
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def blocks(name: str, n: int, length: int) -> list[int]:
    """Elements of every rank's block, as `direct_traffic` defines it."""
    if name == "barrier":
        return [0] * n
    if name in ("broadcast", "reduce"):
        return [length] * n
    if name in ("all_gather", "gather"):
        return [length + r for r in range(n)]
    return [len(chunk) for chunk in torch.empty(length).tensor_split(n)]


@pytest.mark.parametrize("name", COLLECTIVES)
@given(data=st.data())
def test_every_message_is_counted_once(name: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 10), "ranks")
    length = data.draw(st.integers(0, 50), "length")
    root = data.draw(st.integers(0, n - 1), "root")
    item_bytes = data.draw(st.sampled_from([1, 2, 8]), "item_bytes")
    hops = list(direct_hops(name, n, length, root))
    sizes = [elements * item_bytes for elements in blocks(name, n, length)]
    total = Traffic(0, 0, 0, 0)
    for rank in range(n):
        sent = [elements * item_bytes for a, _, elements in hops if a == rank]
        received = [elements * item_bytes for _, b, elements in hops if b == rank]
        got = direct_traffic(name, rank, sizes, root if name in ROOTED else None)
        assert got == Traffic(len(sent), sum(sent), len(received), sum(received))
        total = Traffic(*(a + b for a, b in zip(total, got, strict=True)))
    assert total.num_sent == total.num_received == len(hops)
    assert total.sent_bytes == total.received_bytes


def test_literals() -> None:
    """4 ranks, 10 elements of 4 bytes: chunks of 3, 3, 2 and 2."""
    sizes = [12, 12, 8, 8]
    assert [direct_traffic("all_reduce", r, sizes) for r in range(4)] == [
        Traffic(6, 64, 6, 64),
        Traffic(6, 64, 6, 64),
        Traffic(6, 56, 6, 56),
        Traffic(6, 56, 6, 56),
    ]
    assert direct_traffic("reduce_scatter", 2, sizes) == Traffic(3, 32, 3, 24)
    assert direct_traffic("all_gather", 2, sizes) == Traffic(3, 24, 3, 32)
    assert direct_traffic("scatter", 0, sizes, root=0) == Traffic(3, 28, 0, 0)
    assert direct_traffic("scatter", 3, sizes, root=0) == Traffic(0, 0, 1, 8)
    assert direct_traffic("gather", 0, sizes, root=0) == Traffic(0, 0, 3, 28)
    assert direct_traffic("broadcast", 1, [40] * 4, root=1) == Traffic(3, 120, 0, 0)
    assert direct_traffic("reduce", 0, [40] * 4, root=1) == Traffic(1, 40, 0, 0)
    assert direct_traffic("barrier", 0, [0] * 4) == Traffic(3, 0, 3, 0)
    assert direct_traffic("all_reduce", 0, [40]) == Traffic(0, 0, 0, 0)


def test_an_unknown_collective_is_an_error_of_ours() -> None:
    with pytest.raises(AssertionError, match="no traffic known for all_scatter"):
        direct_traffic("all_scatter", 0, [1, 1])
