"""The emulated link: nothing arrives earlier than the formula says. How much later is looked at, and never tested."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind

from mplab import Link, MplabError, World
from mplab.comm import Communicator, algorithms
from mplab.comm.collectives import SMALL_BYTES
from mplab.comm.link import Ports, sleep_until
from mplab.world import Rank

LINK = Link(latency_s=4e-3, bandwidth_bytes_s=1e6)  # 4,000 bytes take 8 ms
BYTES = 4_000
ONE_S = 8e-3


def seconds_of(n: int, call: Callable[[Communicator], object], link: Link = LINK) -> float:
    """From the first rank's call to the last one's return."""
    begins, ends = begins_and_ends(n, call, link)
    return max(ends) - min(begins)


def begins_and_ends(
    n: int, call: Callable[[Communicator], object], link: Link = LINK
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    def run(rank: Rank) -> tuple[float, float]:
        begin = time.perf_counter()
        call(rank.comm)
        return begin, time.perf_counter()

    begins, ends = zip(*World(n, device="cpu", link=link).run(run), strict=True)
    return begins, ends


def x(size_bytes: int = BYTES) -> torch.Tensor:
    return torch.ones(size_bytes // 4)


# --- ports -----------------------------------------------------------------------------------------------------------


def test_a_rank_sends_one_message_at_a_time_and_receives_one_at_a_time() -> None:
    ports = Ports(4)
    now = time.perf_counter_ns()
    first = ports.reserve(0, 1, 10.0)
    assert first >= now + 10 * 10**9
    assert ports.reserve(0, 2, 10.0) == first + 10 * 10**9, "0 still sends"
    assert ports.reserve(3, 1, 5.0) == first + 5 * 10**9, "1 still receives"
    later = time.perf_counter_ns()
    assert later + 10**9 <= ports.reserve(2, 3, 1.0) < first, "2 and 3 are free, whatever the others do"
    assert ports.reserve(1, 0, 1.0) < first, "what 1 receives does not keep it from sending"


def test_a_message_without_bytes_or_latency_arrives_at_once() -> None:
    ports = Ports(2)
    before = time.perf_counter_ns()
    assert before <= ports.reserve(0, 1, 0.0) <= time.perf_counter_ns()


@pytest.mark.parametrize("seconds", [0.0, 50e-6, 1e-3, 0.12])
def test_sleep_until_is_never_early(seconds: float) -> None:
    until = time.perf_counter_ns() + round(seconds * 1e9)
    sleep_until(until)
    assert time.perf_counter_ns() >= until


def test_a_time_that_has_passed_needs_no_sleep() -> None:
    sleep_until(0)


# --- messages --------------------------------------------------------------------------------------------------------


def test_a_message_takes_at_least_its_latency_and_its_bytes() -> None:
    def run(rank: Rank) -> float:
        if rank.index == 0:
            started = time.perf_counter()
            rank.comm.send(x(), 1)
            return started
        rank.comm.recv(0)
        return time.perf_counter()

    for world in (World(2, device="cpu", link=LINK), World(2, device="cpu", link=LINK, rendezvous=True)):
        started, arrived = world.run(run)
        assert arrived - started >= ONE_S


def test_an_empty_message_takes_the_latency() -> None:
    assert seconds_of(2, lambda comm: comm.send(x(0), 1) if comm.rank == 0 else comm.recv(0)) >= LINK.latency_s


def test_latency_alone_and_bytes_alone() -> None:
    only_latency, only_bytes = Link(5e-3, math.inf), Link(0.0, 1e6)
    assert seconds_of(2, lambda comm: comm.send(x(4000), 1) if comm.rank == 0 else comm.recv(0), only_latency) >= 5e-3
    assert seconds_of(2, lambda comm: comm.send(x(5000), 1) if comm.rank == 0 else comm.recv(0), only_bytes) >= 5e-3


def test_messages_of_one_rank_leave_one_after_the_other() -> None:
    def run(rank: Rank) -> float:
        if rank.index == 0:
            started = time.perf_counter()
            for dst in (1, 2, 3):
                rank.comm.send(x(), dst)
            return started
        rank.comm.recv(0)
        return time.perf_counter()

    started, *arrived = World(4, device="cpu", link=LINK).run(run)
    for i, end in enumerate(arrived, start=1):
        assert end - started >= i * ONE_S


def test_messages_to_one_rank_arrive_one_after_the_other() -> None:
    def call(comm: Communicator) -> None:
        if comm.rank == 0:
            for src in (1, 2, 3):
                comm.recv(src)
        else:
            comm.send(x(), 0)

    assert seconds_of(4, call) >= 3 * ONE_S


# --- algorithms and collectives --------------------------------------------------------------------------------------


def naive(n: int) -> float:
    return 2 * (n - 1) * ONE_S


def ring(n: int) -> float:
    return 2 * (n - 1) * (LINK.latency_s + BYTES / n / LINK.bandwidth_bytes_s)


@pytest.mark.parametrize(
    ("name", "n", "formula"),
    [
        ("naive", 3, naive(3)),
        ("naive", 4, naive(4)),
        ("ring", 2, ring(2)),
        ("ring", 4, ring(4)),
        ("tree", 4, 2 * 2 * ONE_S),
        ("tree", 8, 2 * 3 * ONE_S),
        ("halving_doubling", 4, 4 * LINK.latency_s + 2 * BYTES * 3 / 4 / LINK.bandwidth_bytes_s),
    ],
)
def test_an_algorithm_takes_at_least_its_formula(name: str, n: int, formula: float) -> None:
    assert seconds_of(n, lambda comm: algorithms.ALL_REDUCES[name](comm, x())) >= formula


@pytest.mark.parametrize(
    ("name", "call", "messages", "tensors"),
    [
        ("all_reduce", lambda comm: comm.all_reduce(x()), 6, 6 / 4),
        ("all_reduce_", lambda comm: comm.all_reduce_(x()), 6, 6 / 4),
        ("reduce_scatter", lambda comm: comm.reduce_scatter(x()), 3, 3 / 4),
        ("all_gather", lambda comm: comm.all_gather(x()), 3, 3),
        ("broadcast", lambda comm: comm.broadcast(x(), 1), 3, 3),
        ("reduce", lambda comm: comm.reduce(x(), "sum", 2), 3, 3),
        ("scatter", lambda comm: comm.scatter(x(), 3), 3, 3 / 4),
        ("gather", lambda comm: comm.gather(x()), 3, 3),
        ("all_to_all", lambda comm: comm.all_to_all([x()] * 4), 3, 3),
        ("barrier", lambda comm: comm.barrier(), 3, 0),
        ("iall_reduce", lambda comm: comm.iall_reduce(x()).wait(), 6, 6 / 4),
    ],
)
def test_a_collective_takes_at_least_its_busiest_rank(
    name: str, call: Callable[[Communicator], object], messages: int, tensors: float
) -> None:
    """4 ranks: nobody is back before all have called and the busiest has sent and received its messages."""
    begins, ends = begins_and_ends(4, call)
    assert min(ends) - max(begins) >= messages * LINK.latency_s + tensors * BYTES / LINK.bandwidth_bytes_s, name


def test_two_collectives_under_way_share_the_link() -> None:
    def call(comm: Communicator) -> None:
        handles = [comm.iall_reduce(x()), comm.iall_reduce(x())]
        for handle in handles:
            handle.wait()

    assert seconds_of(2, call) >= 2 * (2 * LINK.latency_s + BYTES / LINK.bandwidth_bytes_s)


def test_a_large_collective_takes_its_time_too() -> None:
    """Large ones are computed by all ranks together: another path."""
    size_bytes = 2 * SMALL_BYTES
    link = Link(1e-3, size_bytes / 10e-3)
    assert seconds_of(2, lambda comm: comm.all_reduce(x(size_bytes)), link) >= 2e-3 + 10e-3


def test_a_single_rank_sends_nothing_and_waits_for_nothing() -> None:
    world = World(1, device="cpu", link=Link(1000.0, 1.0))
    (got,) = world.run(lambda rank: rank.comm.all_reduce(torch.ones(3)))
    assert got.tolist() == [1, 1, 1]


# --- what is said about it -------------------------------------------------------------------------------------------


def test_a_world_with_a_link_says_so_wherever_its_times_are_shown() -> None:
    world = World(2, device="cpu", link=LINK)
    assert any("emulated link" in note and "4.00 ms latency" in note for note in world.notes)
    assert "emulated link" in str(world)
    world.run(lambda rank: rank.comm.barrier())
    assert world.timeline.notes == world.notes
    assert not any("emulated" in note for note in World(2, device="cpu").notes)


def test_time_on_the_wire_is_a_message_and_not_a_wait() -> None:
    world = World(2, device="cpu", link=LINK)
    world.run(lambda rank: rank.comm.send(x(), 1) if rank.index == 0 else rank.comm.recv(0))
    wait, wire = world.timeline.rank(1)
    assert (wait.lane, wait.name) == ("wait", "recv")
    assert (wire.lane, wire.name) == ("message", "recv")
    (sent,) = (e for e in world.timeline.rank(0) if e.lane == "message")
    assert wait.end_s == wire.start_s
    assert wire.end_s - sent.start_s >= ONE_S


@pytest.mark.parametrize(
    ("latency_s", "bandwidth_bytes_s"),
    [(-1e-6, 1e9), (math.inf, 1e9), (math.nan, 1e9), ("1", 1e9), (0, 0), (0, -1), (0, math.nan), (0, None)],
)
def test_a_link_that_cannot_be(latency_s: float, bandwidth_bytes_s: float) -> None:
    with pytest.raises(MplabError, match=r"Link\((latency_s|bandwidth_bytes_s)="):
        Link(latency_s, bandwidth_bytes_s)


def test_a_link_that_is_none() -> None:
    with pytest.raises(MplabError, match=r"link=50e-06|link=5e-05"):
        World(2, device="cpu", link=50e-6)  # type: ignore[arg-type]
