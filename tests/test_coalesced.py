"""Reductions of many tensors as one: whose share is what, who disagrees, and in which order streams get there.

Results, inputs and ledgers: the conformance suite.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import streams
import torch
from hypothesis import given, settings
from limits import at_most
from limits import leaves_nothing_behind as leaves_nothing_behind
from streams import Memory, OnStream
from torch import Tensor

from mplab import CollectiveMismatch, Link, World, private
from mplab.comm import coalesced, collectives
from mplab.comm.coalesced import blocks
from mplab.world import Rank

CPU = torch.device("cpu")

# --- shares and their blocks -----------------------------------------------------------------------------------------


def elements(parts: Sequence[coalesced.Part], lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    for part in parts:
        assert part.high != part.low
        for element in range(part.low, lengths[part.place] if part.high is None else part.high):
            yield part.place, element


@settings(max_examples=200)
@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 5), st.integers(1, 12))
def test_shares_have_every_element_once_in_order_and_blocks_are_no_longer_than_told(
    lengths: list[int], num_shares: int, max_length: int
) -> None:
    everything = [(place, element) for place, length in enumerate(lengths) for element in range(length)]
    chunks = torch.arange(len(everything)).tensor_split(num_shares)
    for share, chunk in enumerate(chunks):
        found = blocks(tuple(lengths), share, num_shares, max_length)
        flat = [element for parts in found for element in elements(parts, lengths)]
        assert flat == [everything[i] for i in chunk.tolist()]
        sizes = [len(list(elements(parts, lengths))) for parts in found]
        assert all(size == max_length for size in sizes[:-1])
        assert all(0 < size <= max_length for size in sizes[-1:])


def test_a_whole_tensor_is_taken_as_it_is() -> None:
    assert blocks((4, 3), 0, 1, 10) == (((0, 0, None), (1, 0, None)),)
    assert blocks((4, 3), 0, 1, 5) == (((0, 0, None), (1, 0, 1)), ((1, 1, 3),))


# --- what torch does not promise to keep -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("name", ["add_each_", "copy_each_"])
def test_each_pair_with_and_without_torchs_private_name(
    name: str, is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_there:
        monkeypatch.delattr(torch, f"_foreach_{name.removesuffix('each_')}")
    for dtype in (torch.float32, torch.bool, torch.int16, torch.complex64):
        xs = [torch.tensor([1, 0]).to(dtype), torch.ones(2, 2).to(dtype)]
        ys = [torch.tensor([1, 1]).to(dtype), torch.ones(2, 2).to(dtype)]
        want = [x + y if name == "add_each_" else y for x, y in zip(xs, ys, strict=True)]
        addresses = [x.data_ptr() for x in xs]
        assert getattr(private, name)(tuple(xs), tuple(ys)) is None
        assert all(torch.equal(x, w) for x, w in zip(xs, want, strict=True))
        assert [x.data_ptr() for x in xs] == addresses


# --- ranks that disagree ---------------------------------------------------------------------------------------------

DIFFERENT: dict[str, tuple[Callable[[list[Tensor]], Any], str]] = {
    "shapes": (lambda xs: [xs[0].view(3, 2), *xs[1:]], "shapes=[(3, 2), (4,), (1,)]"),
    "order": (lambda xs: [xs[1], xs[0], xs[2]], "shapes=[(4,), (2, 3), (1,)]"),
    "number": (lambda xs: xs[:2], "shapes=[(2, 3), (4,)]"),
    "cut elsewhere": (lambda xs: [xs[0], torch.cat(xs[1:])], "shapes=[(2, 3), (5,)]"),
    "dtype": (lambda xs: [x.int() for x in xs], "int32"),
}


@pytest.mark.parametrize("what", DIFFERENT)
@pytest.mark.parametrize("odd_one", [0, 2])
@pytest.mark.parametrize("small_bytes", [1 << 20, 0], ids=["one rank computes", "all compute"])
def test_lists_that_differ_are_a_mismatch_that_changes_nothing(
    what: str, odd_one: int, small_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "SMALL_BYTES", small_bytes)
    change, said_of_odd_one = DIFFERENT[what]
    given_to: dict[int, list[Tensor]] = {}

    def work(rank: Rank) -> None:
        xs = [torch.full(shape, 1.0 + rank.index) for shape in ((2, 3), (4,), (1,))]
        given_to[rank.index] = change(xs) if rank.index == odd_one else xs
        rank.comm.all_reduce_coalesced_(given_to[rank.index])

    with at_most(5), pytest.raises(CollectiveMismatch) as caught:
        World(3, "cpu").run(work)
    said = str(caught.value)
    (line,) = [line for line in said.splitlines() if line.startswith(f"  rank {odd_one} called")]
    assert "all_reduce_coalesced_(op='sum'" in line
    assert said_of_odd_one in line
    assert "test_coalesced.py, line" in line
    for rank, xs in given_to.items():
        assert all(bool((x == 1 + rank).all()) for x in xs)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda comm, x: comm.all_reduce_coalesced_([x]), lambda comm, x: comm.all_reduce_(x)),
        (lambda comm, x: comm.all_reduce_coalesced_([x]), lambda comm, x: comm.all_reduce_coalesced_([x], "max")),
        (lambda comm, x: comm.all_gather_(x), lambda comm, x: comm.all_gather(x)),
        (lambda comm, x: comm.all_gather_(x), lambda comm, x: comm.all_gather_(x.view(2, 3))),
        (lambda comm, x: comm.all_gather_(x), lambda comm, x: comm.all_gather_(x[:5])),
        (lambda comm, x: comm.all_gather_(x), lambda comm, x: comm.all_gather_(x.int())),
    ],
    ids=["name", "op", "gathered name", "gathered shape", "gathered length", "gathered dtype"],
)
def test_other_calls_are_a_mismatch_that_changes_nothing(first: Any, second: Any) -> None:
    xs = [torch.full((6,), float(rank)) for rank in range(2)]
    for calls in ((first, second), (second, first)):
        with at_most(5), pytest.raises(CollectiveMismatch, match="differs between ranks"):
            World(2, "cpu").run(lambda rank, calls=calls: calls[rank.index](rank.comm, xs[rank.index]))
        assert [x.tolist() for x in xs] == [[0.0] * 6, [1.0] * 6]


# --- who does what, and when -----------------------------------------------------------------------------------------


def test_a_share_is_reduced_as_soon_as_all_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """`advance` does this rank's part before anyone waits, and nothing while a rank is missing."""
    monkeypatch.setattr(collectives, "SMALL_BYTES", 0)
    xs = [torch.full((6,), float(rank)) for rank in range(3)]
    others_are_there, is_advanced = threading.Barrier(3), threading.Event()

    def work(rank: Rank) -> None:
        if rank.index == 2:
            others_are_there.wait(10)
            assert [x.tolist() for x in xs] == [[0.0] * 6, [1.0] * 6, [2.0] * 6]
        handle = rank.comm.iall_reduce_coalesced_([xs[rank.index]])
        if rank.index < 2:
            handle.advance()
            others_are_there.wait(10)
            assert is_advanced.wait(10)
        else:
            handle.advance()
            handle.advance()
            assert [x.tolist() for x in xs] == [[float(r)] * 4 + [3.0] * 2 for r in range(3)]
            is_advanced.set()
        handle.wait()

    World(3, "cpu").run(work)
    assert [x.tolist() for x in xs] == [[3.0] * 6] * 3


def test_a_small_one_is_over_for_all_when_the_last_rank_starts_it() -> None:
    xs = [torch.full((6,), float(rank)) for rank in range(2)]
    is_first = threading.Event()

    def work(rank: Rank) -> None:
        if rank.index == 1:
            assert is_first.wait(10)
        handle = rank.comm.iall_reduce_coalesced_([xs[rank.index]])
        is_first.set()
        if rank.index == 1:
            assert [x.tolist() for x in xs] == [[1.0] * 6] * 2
        handle.wait()

    World(2, "cpu").run(work)


@pytest.mark.parametrize("small_bytes", [1 << 20, 0], ids=["one rank computes", "all compute"])
def test_over_a_link_it_goes_on_while_ranks_compute(small_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its message is on the way from when all have started it, and what is left of that is waited for."""
    monkeypatch.setattr(collectives, "SMALL_BYTES", small_bytes)
    world = World(2, "cpu", link=Link(latency_s=0.02, bandwidth_bytes_s=1e9))  # two messages of 20 ms

    def work(rank: Rank) -> None:
        rank.comm.barrier()
        handle = rank.comm.iall_reduce_coalesced_([torch.ones(3)])
        with rank.span("backward"):
            time.sleep(0.3)
        handle.wait()

    world.run(work)
    for rank in range(2):
        events = [e for e in world.timeline.events if e.rank == rank]
        (computed,) = [e for e in events if e.name == "backward"]
        (sent,) = [e for e in events if e.name == "all_reduce_coalesced_" and e.size_bytes]
        assert sent.size_bytes == 12
        assert sent.end_s - sent.start_s == pytest.approx(0.04, abs=1e-6)
        assert sent.end_s < computed.end_s


# --- on streams, checked on a CPU by clocks --------------------------------------------------------------------------


@pytest.fixture(params=[1 << 18, 4], ids=["one rank computes", "all compute"])
def as_on_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """And pair by pair, since the clocks see no lists."""
    streams.play_out(request.param, monkeypatch)
    monkeypatch.setattr(coalesced, "add_each_", lambda xs, ys: [x.add_(y) for x, y in zip(xs, ys, strict=True)])
    monkeypatch.setattr(coalesced, "copy_each_", lambda xs, ys: [x.copy_(y) for x, y in zip(xs, ys, strict=True)])


def joined(rank: Rank, op: str) -> None:
    for is_helped in (False, True):
        xs = [torch.full((length,), 1.0 + rank.index) for length in (2, 5, 0, 1)]
        xs.append(torch.full((2, 3), 1.0 + rank.index).t())
        handle = rank.comm.iall_reduce_coalesced_(xs, op)
        if is_helped:
            handle.advance()
        handle.wait()
        for x in xs:
            x.fill_(-1)


def gathered(rank: Rank, op: str) -> None:
    x = torch.full((7,), 1.0)
    x.tensor_split(rank.size)[rank.index].fill_(rank.index)
    rank.comm.all_gather_(x)
    x.fill_(-1)


def named(value: Any) -> Any:
    return getattr(value, "__name__", value)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    ("program", "op"),
    [(joined, "sum"), (joined, "mean"), (joined, "max"), (gathered, "")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_access_is_ordered_by_events(program: Callable[[Rank, str], None], op: str, n: int) -> None:
    for seed in range(3):
        memory = Memory()

        def run(rank: Rank, memory: Memory = memory, seed: int = seed) -> None:
            late = random.Random(10 * seed + rank.index)
            with OnStream(f"rank {rank.index}", memory):
                for _ in range(3):
                    time.sleep(late.random() * 0.003)
                    program(rank, op)

        World(n, "cpu").run(run)
        assert memory.races == []
        assert memory.unrecorded() == [], "the allocator may hand this memory out while another stream still uses it"
        assert memory.used
