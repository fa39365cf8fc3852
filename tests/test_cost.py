"""The formulas against the algorithms, played out message by message in plain Python, on ports and a clock."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplab.errors import MplabError
from mplab.plan import cost
from mplab.plan.cost import Link, Sent

Vector = list[int]
Program = Generator[tuple[Any, ...], Any, Vector | None]

LINK = Link(latency_s=3.0, bandwidth_bytes_s=0.5)
ITEM_BYTES = 4


class Play:
    """Runs one generator a rank: it yields ("send", dst, vector) or ("recv", src), and is sent what it receives."""

    def __init__(self, programs: list[Program]) -> None:
        num_ranks = len(programs)
        self.sent = [Sent(0, 0)] * num_ranks
        self.results: list[Vector | None] = [None] * num_ranks
        clock, out_port, in_port = [0.0] * num_ranks, [0.0] * num_ranks, [0.0] * num_ranks
        on_the_way: dict[tuple[int, int], deque[tuple[float, Vector]]] = defaultdict(deque)
        wanted: dict[int, Any] = {}
        for rank in range(num_ranks):
            self._resume(programs, wanted, rank, None)
        while any(wanted.values()):
            able = [r for r, w in wanted.items() if w and (w[0] == "send" or on_the_way[w[1], r])]
            assert able, f"deadlock: {wanted}"
            rank = min(able, key=lambda r: clock[r])
            kind, peer, *vector = wanted[rank]
            got = None
            if kind == "send":
                size_bytes = len(vector[0]) * ITEM_BYTES
                start = max(clock[rank], out_port[rank], in_port[peer])
                out_port[rank] = in_port[peer] = start + LINK.latency_s + size_bytes / LINK.bandwidth_bytes_s
                on_the_way[rank, peer].append((in_port[peer], vector[0]))
                self.sent[rank] = Sent(self.sent[rank][0] + 1, self.sent[rank][1] + size_bytes)
            else:
                arrival, got = on_the_way[peer, rank].popleft()
                clock[rank] = max(clock[rank], arrival)
            self._resume(programs, wanted, rank, got)
        self.time_s = max(clock)

    def _resume(self, programs: list[Program], wanted: dict[int, Any], rank: int, got: Vector | None) -> None:
        try:
            wanted[rank] = programs[rank].send(got)
        except StopIteration as stop:
            wanted[rank], self.results[rank] = None, stop.value


def add(a: Vector, b: Vector) -> Vector:
    return [x + y for x, y in zip(a, b, strict=True)]


def cut(x: Vector, n: int) -> list[Vector]:
    chunks, start = [], 0
    for i in range(n):
        end = start + len(x) // n + (1 if i < len(x) % n else 0)
        chunks.append(x[start:end])
        start = end
    return chunks


def to_root(n: int, r: int, x: Vector, root: int = 0) -> Program:
    if r != root:
        yield "send", root, x
        return None
    for other in range(n):
        if other != root:
            x = add(x, (yield "recv", other))
    return x


def from_root(n: int, r: int, x: Vector | None, root: int = 0) -> Program:
    if r != root:
        return (yield "recv", root)
    for other in range(n):
        if other != root:
            yield "send", other, x
    return x


def up_tree(n: int, r: int, x: Vector, root: int = 0) -> Program:
    me, step = (r - root) % n, 1
    while step < n:
        if me % (2 * step):
            yield "send", (me - step + root) % n, x
            return None
        if me + step < n:
            x = add(x, (yield "recv", (me + step + root) % n))
        step *= 2
    return x


def down_tree(n: int, r: int, x: Vector | None, root: int = 0) -> Program:
    me, step = (r - root) % n, 2 ** math.ceil(math.log2(n))
    while step >= 1:
        if me % (2 * step) == 0 and me + step < n:
            yield "send", (me + step + root) % n, x
        elif me % (2 * step) == step:
            x = yield "recv", (me - step + root) % n
        step //= 2
    return x


def round_ring(
    n: int, r: int, chunks: list[Vector], first: int, combine: Callable[[Vector, Vector], Vector]
) -> Program:
    for s in range(n - 1):
        yield "send", (r + 1) % n, chunks[(first - s) % n]
        i = (first - s - 1) % n
        chunks[i] = combine(chunks[i], (yield "recv", (r - 1) % n))
    return None


def ring_reduce_scatter(n: int, r: int, x: Vector) -> Program:
    chunks = cut(x, n)
    yield from round_ring(n, r, chunks, r - 1, add)
    return chunks[r]


def ring_all_gather(n: int, r: int, x: Vector) -> Program:
    chunks = [c if i == r else [] for i, c in enumerate(cut(x, n))]
    yield from round_ring(n, r, chunks, r, lambda old, new: new)
    return [value for chunk in chunks for value in chunk]


def ring(n: int, r: int, x: Vector) -> Program:
    chunks = cut(x, n)
    yield from round_ring(n, r, chunks, r - 1, add)
    yield from round_ring(n, r, chunks, r, lambda old, new: new)
    return [value for chunk in chunks for value in chunk]


def halving_doubling(n: int, r: int, x: Vector) -> Program:
    p = max(2**k for k in range(10) if 2**k <= n)
    spare = n - p
    workers = [*range(0, 2 * spare, 2), *range(2 * spare, n)]
    if r not in workers:
        yield "send", r - 1, x
        return (yield "recv", r - 1)
    if r < 2 * spare:
        x = add(x, (yield "recv", r + 1))
    me = workers.index(r)
    x, steps, part = list(x), [], (0, len(x))
    for k in reversed(range(int(math.log2(p)))):
        partner, (low, high) = workers[me ^ 2**k], part
        middle = (low + high) // 2
        keep, give = ((middle, high), (low, middle)) if me >> k & 1 else ((low, middle), (middle, high))
        yield "send", partner, x[slice(*give)]
        x[slice(*keep)] = add(x[slice(*keep)], (yield "recv", partner))
        steps.append((partner, keep, give))
        part = keep
    for partner, keep, give in reversed(steps):
        yield "send", partner, x[slice(*keep)]
        x[slice(*give)] = yield "recv", partner
    if r < 2 * spare:
        yield "send", r + 1, x
    return x


def then(first: Callable[..., Program], second: Callable[..., Program]) -> Callable[..., Program]:
    def program(n: int, r: int, x: Vector) -> Program:
        return (yield from second(n, r, (yield from first(n, r, x))))

    return program


ALL_REDUCES = {
    "naive": then(to_root, from_root),
    "tree": then(up_tree, down_tree),
    "ring": ring,
    "halving_doubling": halving_doubling,
}


def tensors(n: int, length: int) -> list[Vector]:
    return [[100 * r + i for i in range(length)] for r in range(n)]


def total(n: int, length: int) -> Vector:
    return [sum(column) for column in zip(*tensors(n, length), strict=True)]


num_ranks = st.integers(1, 9)
lengths = st.integers(0, 50)


@given(n=num_ranks, length=lengths, name=st.sampled_from(sorted(ALL_REDUCES)))
def test_all_reduce_counts_equal_the_messages_sent(n: int, length: int, name: str) -> None:
    play = Play([ALL_REDUCES[name](n, r, x) for r, x in enumerate(tensors(n, length))])
    assert play.results == [total(n, length)] * n  # the play itself is an all-reduce
    assert play.sent == [cost.ALL_REDUCES[name](n, r, length, ITEM_BYTES) for r in range(n)]


@given(n=num_ranks, length=lengths, data=st.data())
def test_rooted_counts_equal_the_messages_sent(n: int, length: int, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, n - 1))
    for reduce, formula in ((to_root, cost.naive_reduce), (up_tree, cost.tree_reduce)):
        play = Play([reduce(n, r, x, root) for r, x in enumerate(tensors(n, length))])
        assert play.results[root] == total(n, length)
        assert play.sent == [formula(n, r, length, ITEM_BYTES, root) for r in range(n)]
    for broadcast, formula in ((from_root, cost.naive_broadcast), (down_tree, cost.tree_broadcast)):
        play = Play([broadcast(n, r, x if r == root else None, root) for r, x in enumerate(tensors(n, length))])
        assert play.results == [tensors(n, length)[root]] * n
        assert play.sent == [formula(n, r, length, ITEM_BYTES, root) for r in range(n)]


@given(n=num_ranks, length=lengths)
def test_ring_halves_count_what_they_send(n: int, length: int) -> None:
    play = Play([ring_reduce_scatter(n, r, x) for r, x in enumerate(tensors(n, length))])
    assert play.results == cut(total(n, length), n)
    assert play.sent == [cost.ring_reduce_scatter(n, r, length, ITEM_BYTES) for r in range(n)]
    play = Play([ring_all_gather(n, r, tensors(n, length)[0]) for r in range(n)])
    assert play.results == [tensors(n, length)[0]] * n
    assert play.sent == [cost.ring_all_gather(n, r, length, ITEM_BYTES) for r in range(n)]


@given(n=num_ranks, num_items=st.integers(0, 4), name=st.sampled_from(sorted(ALL_REDUCES)))
def test_all_reduce_times_equal_the_play_on_ports(n: int, num_items: int, name: str) -> None:
    length = 8 * n * num_items  # every chunk and every half of the same size
    play = Play([ALL_REDUCES[name](n, r, x) for r, x in enumerate(tensors(n, length))])
    assert play.time_s == pytest.approx(cost.all_reduce_times_s(LINK, n, length * ITEM_BYTES)[name])


@pytest.mark.parametrize("n", range(1, 10))
def test_times_of_the_other_collectives_equal_the_play_on_ports(n: int) -> None:
    length = 3 * n
    xs, size_bytes = tensors(n, length), length * ITEM_BYTES
    for programs, formula in (
        ([from_root(n, r, xs[0]) for r in range(n)], cost.naive_broadcast_time_s),
        ([to_root(n, r, xs[r]) for r in range(n)], cost.naive_broadcast_time_s),
        ([down_tree(n, r, xs[0]) for r in range(n)], cost.tree_broadcast_time_s),
        ([up_tree(n, r, xs[r]) for r in range(n)], cost.tree_broadcast_time_s),
        ([ring_reduce_scatter(n, r, xs[r]) for r in range(n)], cost.ring_reduce_scatter_time_s),
        ([ring_all_gather(n, r, xs[0]) for r in range(n)], cost.ring_reduce_scatter_time_s),
    ):
        assert Play(programs).time_s == pytest.approx(formula(LINK, n, size_bytes))


@pytest.mark.parametrize(
    ("formula", "expected"),
    [  # four ranks, 1000 float32: worked by hand
        (cost.naive_all_reduce, [(3, 12000), (1, 4000), (1, 4000), (1, 4000)]),
        (cost.tree_all_reduce, [(2, 8000), (1, 4000), (2, 8000), (1, 4000)]),
        (cost.ring_all_reduce, [(6, 6000)] * 4),
        (cost.halving_doubling_all_reduce, [(4, 6000)] * 4),
    ],
)
def test_four_ranks_by_hand(formula: cost.Count, expected: list[tuple[int, int]]) -> None:
    assert [formula(4, r, 1000, 4) for r in range(4)] == expected


def test_small_messages_favour_few_hops_and_large_ones_few_bytes() -> None:
    def best(size_bytes: float) -> str:
        times = cost.all_reduce_times_s(Link(50e-6, 1e9), 6, size_bytes)
        return min(times, key=times.__getitem__)

    assert [best(100), best(100e6)] == ["halving_doubling", "ring"]


def test_link_takes_latency_for_messages_and_time_for_bytes() -> None:
    assert Link(2e-6, 1e9).time_s(3, 5000) == pytest.approx(11e-6)
    assert Link(2.0, math.inf).time_s(3, 5000) == 6.0


@pytest.mark.parametrize("latency_s", [-1e-9, math.inf, math.nan, "1", True, None])
def test_bad_latency_is_refused(latency_s: Any) -> None:
    with pytest.raises(MplabError, match=r"latency_s=.*0 seconds or more"):
        Link(latency_s, 1e9)


@pytest.mark.parametrize("bandwidth", [0, -1.0, math.nan, "1e9", False, None])
def test_bad_bandwidth_is_refused(bandwidth: Any) -> None:
    with pytest.raises(MplabError, match=r"bandwidth_bytes_s=.*more than 0"):
        Link(0.0, bandwidth)


@pytest.mark.parametrize("arguments", [(0, 0, 4, 4), (2, 2, 4, 4), (2, -1, 4, 4), (2, 0, -4, 4), (2, 0, 4, -4)])
def test_impossible_counts_are_refused(arguments: tuple[int, int, int, int]) -> None:
    for formula in cost.ALL_REDUCES.values():
        with pytest.raises(MplabError):
            formula(*arguments)


@pytest.mark.parametrize("root", [-1, 2])
def test_impossible_roots_are_refused(root: int) -> None:
    for formula in (cost.naive_broadcast, cost.naive_reduce, cost.tree_broadcast, cost.tree_reduce):
        with pytest.raises(MplabError, match=f"root {root}"):
            formula(2, 0, 4, 4, root)


def test_impossible_times_are_refused() -> None:
    with pytest.raises(MplabError, match="0 ranks"):
        cost.all_reduce_times_s(LINK, 0, 4)
    with pytest.raises(MplabError, match="-4 bytes"):
        cost.all_reduce_times_s(LINK, 2, -4)
