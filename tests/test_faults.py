"""Faults of ranks as threads: what each leads to, that nobody waits for ever, and that the next run works.

Bounds on time are far above what is needed: they tell "at once" from "at the time-out" (30 s), and nothing else.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from limits import at_most, ranks_alive
from limits import leaves_nothing_behind as leaves_nothing_behind

from mplab import CollectiveMismatch, CommTimeout, Deadlock, Link, MplabError, PeerFailure, World
from mplab.comm import Communicator
from mplab.comm.collectives import SMALL_BYTES
from mplab.comm.hub import Channel
from mplab.world import Rank
from mplab.world import stop as stop_module

AT_ONCE_S = 5.0
LARGE = SMALL_BYTES // 4 + 1  # float32: above what one rank computes for all
SLOW = Link(latency_s=100.0, bandwidth_bytes_s=1e9)


def world(n: int, **options: object) -> World:
    return World(n, device="cpu", **options)  # type: ignore[arg-type]


def works(w: World) -> None:
    """The next run is a run like any other."""
    until = time.monotonic() + AT_ONCE_S
    while ranks_alive() and time.monotonic() < until:  # Ctrl-C may come just as a thread starts
        time.sleep(0.001)
    assert not ranks_alive()
    fresh = World(w.size, device="cpu")
    assert [int(x) for x in fresh.run(lambda rank: rank.comm.all_reduce(torch.tensor(1)))] == [w.size] * w.size


def line_of(fn: Callable[..., object]) -> str:
    """Where a one-line function is, as messages write it."""
    return f"{Path(__file__).name}, line {fn.__code__.co_firstlineno}, in {fn.__name__}"


def spin() -> None:
    n = 0
    while True:
        n += 1


def nap() -> None:
    while True:
        time.sleep(0.01)


class Lingering:
    """Computes for a while when it is freed, where Python loses every exception."""

    def __del__(self) -> None:
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            pass


def linger() -> None:
    Lingering()


def multiply() -> None:
    x = torch.ones(64, 64)
    while True:
        x = (x @ x).clamp(0, 1)


# What rank 1 or a later one of 3 does while rank 0 fails; and the options of their world.
OCCUPATIONS: dict[str, tuple[Callable[[Rank], object], dict[str, object]]] = {
    "recv": (lambda rank: rank.comm.recv(0), {}),
    "recv with a tag": (lambda rank: rank.comm.recv(0, tag=9), {}),
    "irecv": (lambda rank: rank.comm.irecv(0).wait(), {}),
    "barrier": (lambda rank: rank.comm.barrier(), {}),
    "all_reduce": (lambda rank: rank.comm.all_reduce(torch.ones(3)), {}),
    "large all_reduce": (lambda rank: rank.comm.all_reduce(torch.ones(LARGE)), {}),
    "all_reduce_": (lambda rank: rank.comm.all_reduce_(torch.ones(3)), {}),
    "iall_reduce": (lambda rank: rank.comm.iall_reduce(torch.ones(3)).wait(), {}),
    "broadcast": (lambda rank: rank.comm.broadcast(None), {}),
    "all_to_all": (lambda rank: rank.comm.all_to_all([torch.ones(2)] * 3), {}),
    "group": (lambda rank: rank.comm.group([2, 1, 0]).barrier(), {}),
    "group of two": (lambda rank: rank.comm.group([rank.index, 0]).barrier(), {}),
    "rendezvous send": (lambda rank: rank.comm.send(torch.ones(3), 0), {"rendezvous": True}),
    "rendezvous isend": (lambda rank: rank.comm.isend(torch.ones(3), 0).wait(), {"rendezvous": True}),
    "message on a slow link": (
        lambda rank: rank.comm.send(torch.ones(3), 2) if rank.index == 1 else rank.comm.recv(1),
        {"link": SLOW},
    ),
    "collective on a slow link": (lambda rank: rank.comm.group([1, 2]).barrier(), {"link": SLOW}),
    "python loop": (lambda rank: spin(), {}),
    "naps of 10 ms": (lambda rank: nap(), {}),
    "where exceptions are lost": (lambda rank: linger(), {}),
    "torch": (lambda rank: multiply(), {}),
}
occupations = pytest.mark.parametrize(("occupation", "options"), OCCUPATIONS.values(), ids=OCCUPATIONS)


# --- row 1: a rank raises --------------------------------------------------------------------------------------------


class OwnError(Exception):
    """An exception of the user's, with more than one argument."""


def fail_deep_inside(rank: Rank) -> None:
    with rank.span("forward", microbatch=2):
        raise OwnError("weights are gone", 42)


@occupations
def test_a_rank_raises_while_the_others_are_busy(
    occupation: Callable[[Rank], object], options: dict[str, object]
) -> None:
    seen: list[BaseException] = []
    all_here = threading.Barrier(3, timeout=30)

    def run(rank: Rank) -> None:
        if rank.index == 0:
            all_here.wait()
            time.sleep(0.03)
            fail_deep_inside(rank)
        try:
            all_here.wait()
            occupation(rank)
            nap()
        except BaseException as error:
            seen.append(error)
            raise

    w = world(3, **options)
    start = time.monotonic()
    with pytest.raises(OwnError) as caught:
        w.run(run)
    assert time.monotonic() - start < AT_ONCE_S
    assert caught.value.args == ("weights are gone", 42)
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "fail_deep_inside" in frames, "the original traceback"
    (note,) = caught.value.__notes__
    assert "rank 0 of 3" in note
    assert "forward of micro-batch 2" in note
    assert [type(error) for error in seen if not isinstance(error, PeerFailure)] == []
    assert len(seen) == 2
    works(w)


@pytest.mark.parametrize("is_early", [True, False])
def test_a_thread_is_stopped_where_its_rank_has_not_begun_or_is_over(
    is_early: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of that is printed, as Python does when a thread ends with an exception."""
    of_thread = threading.Thread.run
    began = time.monotonic()

    def run(thread: threading.Thread) -> None:
        if not is_early:
            of_thread(thread)
        while thread.name == "mplab-rank1" and time.monotonic() < began + 0.3:
            pass
        if is_early:
            of_thread(thread)

    monkeypatch.setattr(threading.Thread, "run", run)
    w = world(2)
    with pytest.raises(OwnError):
        w.run(lambda rank: rank.index or fail_deep_inside(rank))
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    works(w)


AFTER_THE_END: dict[str, Callable[[Communicator], object]] = {
    "all_reduce": lambda comm: comm.all_reduce(torch.ones(3)),
    "iall_reduce": lambda comm: comm.iall_reduce(torch.ones(3)),
    "all_to_all": lambda comm: comm.all_to_all([torch.ones(1)] * 2),
    "group": lambda comm: comm.group([0, 1]).barrier(),
    "send": lambda comm: comm.send(torch.ones(3), 1),
    "recv": lambda comm: comm.recv(1),
    "coalesced": lambda comm: comm.all_reduce_coalesced_([torch.ones(3)]),
}


@pytest.mark.parametrize("call", AFTER_THE_END.values(), ids=AFTER_THE_END)
def test_a_run_that_is_over_hears_nothing_any_more(call: Callable[[Communicator], object]) -> None:
    comm = world(2, timeout_s=0.2).run(lambda rank: rank.comm)[0]
    with (
        at_most(5),
        pytest.raises(MplabError, match=r"^rank 0 can't do .*: its run is over; call it inside World\.run"),
    ):
        call(comm)


@pytest.mark.parametrize("n", [1, 2, 8, 50])
def test_a_rank_raises_in_a_world_of_any_size(n: int) -> None:
    def run(rank: Rank) -> None:
        if rank.index == n - 1:
            raise OwnError(n)
        rank.comm.barrier() if rank.index % 2 else nap()

    w = world(n)
    start = time.monotonic()
    with pytest.raises(OwnError) as caught:
        w.run(run)
    assert time.monotonic() - start < AT_ONCE_S
    assert len(caught.value.__notes__) == 1, caught.value.__notes__
    works(w)


def test_peers_learn_who_failed_and_with_what() -> None:
    seen: dict[int, PeerFailure] = {}
    all_here = threading.Barrier(3, timeout=30)

    def run(rank: Rank) -> None:
        all_here.wait()
        if rank.index == 1:
            time.sleep(0.03)
            raise OwnError("out of memory")
        try:
            rank.comm.barrier()
        except PeerFailure as error:
            seen[rank.index] = error
            raise

    with pytest.raises(OwnError):
        world(3).run(run)
    assert seen.keys() == {0, 2}
    for index, error in seen.items():
        assert error.rank == 1
        assert f"rank {index} stopped in barrier()" in str(error)
        assert "rank 1 failed" in str(error)
        assert "OwnError: out of memory" in str(error)


def test_a_computing_peer_gets_a_peer_failure_too() -> None:
    seen: list[BaseException] = []
    both_here = threading.Barrier(2, timeout=30)

    def run(rank: Rank) -> None:
        if rank.index == 1:
            both_here.wait()
            raise OwnError
        try:
            both_here.wait()
            nap()
        except BaseException as error:
            seen.append(error)
            raise

    with pytest.raises(OwnError):
        world(2).run(run)
    (error,) = seen
    assert isinstance(error, PeerFailure)
    assert "stopped" in str(error)


def test_the_first_error_counts_whatever_peers_make_of_it() -> None:
    def run(rank: Rank) -> int:
        if rank.index == 0:
            raise OwnError("first")
        try:
            rank.comm.barrier()
        except PeerFailure:
            if rank.index == 1:
                return 7
            if rank.index == 2:
                raise ValueError("second") from None
            rank.comm.barrier()  # once more: still an error, and no wait
        return 0

    w = world(4)
    with pytest.raises(OwnError, match="first"):
        w.run(run)
    works(w)


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), StopIteration(5), GeneratorExit(), MemoryError()]
)
def test_any_exception_comes_through(error: BaseException) -> None:
    def run(rank: Rank) -> None:
        if rank.index == 0:
            raise error
        rank.comm.barrier()

    w = world(2)
    with pytest.raises(type(error)) as caught:
        w.run(run)
    assert caught.value is error
    works(w)


def test_an_error_after_a_collective_that_was_started_and_not_finished() -> None:
    def run(rank: Rank) -> None:
        handles = [rank.comm.iall_reduce(torch.ones(length)) for length in (3, LARGE)]
        if rank.index == 0:
            raise OwnError
        for handle in handles:
            handle.wait()

    w = world(3)
    with pytest.raises(OwnError):
        w.run(run)
    works(w)


def test_an_error_inside_of_a_collective() -> None:
    """A dtype that torch can store and cannot add: the rank that computes for all fails, and the others hear of it."""
    if not hasattr(torch, "float8_e4m3fn"):
        pytest.skip("this torch has no such dtype")
    for length in (4, 1_000_000):
        x = torch.zeros(length).to(torch.float8_e4m3fn)
        w = world(3)
        assert all(torch.equal(y.float(), x.float()) for y in w.run(lambda rank, x=x: rank.comm.broadcast(x)))
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            w.run(lambda rank, x=x: rank.comm.all_reduce(x))
        assert time.monotonic() - start < AT_ONCE_S
        works(w)


def test_a_rank_that_does_not_stop_is_named_and_left_behind() -> None:
    both_here = threading.Barrier(2, timeout=30)

    def run(rank: Rank) -> None:
        both_here.wait()
        if rank.index == 0:
            time.sleep(0.03)
            raise OwnError
        time.sleep(1.8)  # one long C call: no exception can get in

    w = world(2)
    with pytest.raises(OwnError) as caught:
        w.run(run)
    tracing = sys.gettrace()
    sys.settrace(lambda *_: None)  # as an exercise's check does, and a debugger: calls end all the same
    try:
        assert ranks_alive(), "the caller has waited for it"
    finally:
        sys.settrace(tracing)
    notes = " ".join(caught.value.__notes__)
    assert "rank 1 did not stop" in notes
    assert "test_faults.py, line " in notes
    assert int(world(2).run(lambda rank: rank.comm.all_reduce(torch.tensor(1)))[0]) == 2, "the next run works"
    while ranks_alive():
        time.sleep(0.01)


# --- row 2: ranks disagree -------------------------------------------------------------------------------------------

Do = Callable[[Communicator, torch.Tensor], object]

MISMATCHES: dict[str, tuple[Do, Do]] = {
    "op": (
        lambda comm, x: comm.all_reduce(x),
        lambda comm, x: comm.all_gather(x),
    ),
    "in place or not": (
        lambda comm, x: comm.all_reduce(x),
        lambda comm, x: comm.all_reduce_(x),
    ),
    "shape": (
        lambda comm, x: comm.all_reduce(x),
        lambda comm, x: comm.all_reduce(x[:1]),
    ),
    "other shape of as many elements": (
        lambda comm, x: comm.all_reduce_(x),
        lambda comm, x: comm.all_reduce_(x.t()),
    ),
    "other number of dims": (
        lambda comm, x: comm.all_reduce_(x),
        lambda comm, x: comm.all_reduce_(x.view(-1)),
    ),
    "dtype": (
        lambda comm, x: comm.all_reduce_(x),
        lambda comm, x: comm.all_reduce_(x.to(torch.float64)),
    ),
    "dtype of the same size": (
        lambda comm, x: comm.all_reduce_(x),
        lambda comm, x: comm.all_reduce_(x.to(torch.int32)),
    ),
    "reduction": (
        lambda comm, x: comm.all_reduce_(x, "sum"),
        lambda comm, x: comm.all_reduce_(x, "mean"),
    ),
    "reduction of a reduce_scatter": (
        lambda comm, x: comm.reduce_scatter(x, "max"),
        lambda comm, x: comm.reduce_scatter(x, "min"),
    ),
    "root": (
        lambda comm, x: comm.broadcast(x, 0),
        lambda comm, x: comm.broadcast(x, 1),
    ),
    "root of a reduce": (
        lambda comm, x: comm.reduce(x, "sum", 0),
        lambda comm, x: comm.reduce(x, "sum", 2),
    ),
    "root of a gather": (
        lambda comm, x: comm.gather(x, 0),
        lambda comm, x: comm.gather(x, 1),
    ),
    "root of a scatter": (
        lambda comm, x: comm.scatter(x, 0),
        lambda comm, x: comm.scatter(x, 2),
    ),
    "dim": (
        lambda comm, x: comm.all_gather(x, 0),
        lambda comm, x: comm.all_gather(x, 1),
    ),
    "dim of a reduce_scatter": (
        lambda comm, x: comm.reduce_scatter(x, "sum", 0),
        lambda comm, x: comm.reduce_scatter(x, "sum", 1),
    ),
    "shape beside the gathered dim": (
        lambda comm, x: comm.all_gather(x, 0),
        lambda comm, x: comm.all_gather(x.t(), 0),
    ),
    "dtype of a gather": (
        lambda comm, x: comm.gather(x),
        lambda comm, x: comm.gather(x.double()),
    ),
    "dtype of an all_to_all": (
        lambda comm, x: comm.all_to_all([x] * 3),
        lambda comm, x: comm.all_to_all([x.double()] * 3),
    ),
    "shape of what is broadcast": (
        lambda comm, x: comm.broadcast(x, 0),
        lambda comm, x: comm.broadcast(x[:1], 0),
    ),
    "dtype of what is broadcast": (
        lambda comm, x: comm.broadcast(x, 0),
        lambda comm, x: comm.broadcast(x.half(), 0),
    ),
    "order": (
        lambda comm, x: (comm.barrier(), comm.all_reduce_(x)),
        lambda comm, x: (comm.all_reduce_(x), comm.barrier()),
    ),
    "large": (
        lambda comm, x: comm.all_reduce_(x.repeat(LARGE // 4, 1)),
        lambda comm, x: comm.all_reduce_(x.repeat(1, LARGE // 4)),
    ),
    "large and small": (
        lambda comm, x: comm.all_reduce_(x.repeat(LARGE // 4, 1)),
        lambda comm, x: comm.all_reduce_(x),
    ),
    "asynchronous": (
        lambda comm, x: comm.iall_reduce_(x).wait(),
        lambda comm, x: comm.iall_reduce_(x, "max").wait(),
    ),
}


@pytest.mark.parametrize("odd_one", [0, 1, 2])
@pytest.mark.parametrize(("most", "other"), MISMATCHES.values(), ids=MISMATCHES)
def test_ranks_that_disagree(most: Do, other: Do, odd_one: int) -> None:
    tensors = [torch.full((2, 3), float(r)) for r in range(3)]

    def run(rank: Rank) -> None:
        (other if rank.index == odd_one else most)(rank.comm, tensors[rank.index])

    w = world(3)
    start = time.monotonic()
    with pytest.raises(CollectiveMismatch) as caught:
        w.run(run)
    assert time.monotonic() - start < AT_ONCE_S
    said = str(caught.value)
    assert f"rank {odd_one} called" in said, said
    # Both calls and their lines; of the two that agree the second need not have come yet.
    assert line_of(other) in said, said
    assert line_of(most) in said, said
    for r, x in enumerate(tensors):
        assert torch.equal(x, torch.full((2, 3), float(r))), "a tensor was changed"
    works(w)


def test_a_mismatch_shows_what_each_rank_called() -> None:
    def run(rank: Rank) -> None:
        if rank.index == 0:
            rank.comm.all_reduce(torch.ones(2, 3), "max")
        else:
            time.sleep(0.05)
            rank.comm.all_gather(torch.ones(4, dtype=torch.int64))

    with pytest.raises(CollectiveMismatch) as caught:
        world(2).run(run)
    said = str(caught.value)
    assert "rank 0 called all_reduce(op='max', shape=(2, 3), float32)" in said
    assert "rank 1 called all_gather(dim=0, shape=(?), int64)" in said
    assert "group [0, 1]" in said
    assert "rank 1 of 2" in caught.value.__notes__[0]


def test_a_mismatch_in_a_group_names_world_ranks() -> None:
    def run(rank: Rank) -> None:
        if rank.index == 0:
            nap()
        group = rank.comm.group([3, 1, 2])
        group.broadcast(torch.ones(3), 1 if rank.index == 3 else 2)

    with pytest.raises(CollectiveMismatch) as caught:
        world(4).run(run)
    assert "group [3, 1, 2]" in str(caught.value)
    assert "rank 3 called broadcast(root=1" in str(caught.value)


def test_the_same_ranks_in_another_order_are_a_mismatch() -> None:
    def run(rank: Rank) -> None:
        rank.comm.group([0, 1] if rank.index == 0 else [1, 0]).all_reduce(torch.ones(2))

    start = time.monotonic()
    with pytest.raises(CollectiveMismatch) as caught:
        world(2).run(run)
    assert time.monotonic() - start < AT_ONCE_S
    assert "[0, 1]" in str(caught.value)
    assert "[1, 0]" in str(caught.value)


def test_ranks_that_know_no_shape_agree_with_any() -> None:
    """Off the root None is given: no mismatch, whoever comes first."""
    for late in range(3):

        def run(rank: Rank, late: int = late) -> tuple[int, int]:
            if rank.index == late:
                time.sleep(0.01)
            x = torch.ones(6) if rank.index == 1 else None
            return len(rank.comm.broadcast(x, 1)), len(rank.comm.scatter(x, 1))

        assert world(3).run(run) == [(6, 2)] * 3


# --- row 3: deadlocks ------------------------------------------------------------------------------------------------


def ring_of_receives(rank: Rank) -> None:
    rank.comm.recv((rank.index - 1) % rank.size)


def all_but_one_rank(rank: Rank) -> None:
    if rank.index != 1:
        rank.comm.barrier()


def receive_from_one_that_left(rank: Rank) -> None:
    if rank.index == 0:
        rank.comm.recv(1)


def cycle_of_groups(rank: Rank) -> None:
    n, me = rank.size, rank.index
    left, right = sorted([(me - 1) % n, me]), sorted([me, (me + 1) % n])
    rank.comm.group(right).barrier()
    rank.comm.group(left).barrier()


def a_tag_that_nobody_sends(rank: Rank) -> None:
    if rank.index == 0:
        for tag in (1, 2, 3):
            rank.comm.send(torch.ones(2), 1, tag)
        rank.comm.recv(1)
    elif rank.index == 1:
        rank.comm.recv(0, tag=3)
        rank.comm.recv(0, tag=4)
    else:
        rank.comm.recv(1)


def a_message_too_few(rank: Rank) -> None:
    if rank.index == 0:
        rank.comm.send(torch.ones(1), 1)
    elif rank.index == 1:
        rank.comm.recv(0)
        rank.comm.recv(0)


def collective_against_receive(rank: Rank) -> None:
    rank.comm.recv(1) if rank.index == 0 else rank.comm.barrier()


def groups_in_another_order(rank: Rank) -> None:
    world_of_3 = rank.comm
    if rank.index == 2:
        world_of_3.barrier()
        return
    pair = rank.comm.group([0, 1])
    if rank.index == 0:
        pair.barrier()
        world_of_3.barrier()
    elif rank.index == 1:
        world_of_3.barrier()
        pair.barrier()


def started_and_never_joined(rank: Rank) -> None:
    handle = rank.comm.iall_reduce(torch.ones(3)) if rank.index else rank.comm.irecv(1)
    handle.wait()


DEADLOCKS = [
    ring_of_receives,
    all_but_one_rank,
    receive_from_one_that_left,
    cycle_of_groups,
    a_tag_that_nobody_sends,
    a_message_too_few,
    collective_against_receive,
    groups_in_another_order,
    started_and_never_joined,
]


@pytest.mark.parametrize("link", [None, Link(1e-6, 1e12)], ids=["memory", "link"])
@pytest.mark.parametrize("fn", DEADLOCKS)
def test_a_deadlock_is_found_at_once(fn: Callable[[Rank], None], link: Link | None) -> None:
    w = world(3, link=link)
    start = time.monotonic()
    with pytest.raises(Deadlock) as caught:
        w.run(fn)
    assert time.monotonic() - start < AT_ONCE_S
    said = str(caught.value)
    for r in range(3):
        assert f"\n  rank {r} " in said, f"no line for rank {r} in the table:\n{said}"
    assert "test_faults.py, line " in said
    assert f"in {fn.__name__}" in said
    works(w)


def send_to_each_other(rank: Rank) -> None:
    rank.comm.send(torch.ones(3), 1 - rank.index)
    rank.comm.recv(1 - rank.index)


def ring_of_sends(rank: Rank) -> None:
    rank.comm.isend(torch.ones(3), (rank.index + 1) % rank.size).wait()
    rank.comm.recv((rank.index - 1) % rank.size)


def a_message_that_nobody_receives(rank: Rank) -> None:
    if rank.index == 0:
        rank.comm.send(torch.ones(3), 1)


@pytest.mark.parametrize("fn", [send_to_each_other, ring_of_sends, a_message_that_nobody_receives])
def test_rendezvous_shows_the_deadlocks_that_buffers_hide(fn: Callable[[Rank], None]) -> None:
    world(2).run(fn)
    w = world(2, rendezvous=True)
    start = time.monotonic()
    with pytest.raises(Deadlock, match=r"waits for rank 1 in send\(dst=1, tag=0\)"):
        w.run(fn)
    assert time.monotonic() - start < AT_ONCE_S
    works(w)


def test_waiting_for_one_that_left_is_found_while_others_are_at_work() -> None:
    def run(rank: Rank) -> None:
        if rank.index == 0:
            rank.comm.recv(1)
        elif rank.index == 2:
            nap()

    start = time.monotonic()
    with pytest.raises(Deadlock, match="rank 0 waits for rank 1, which has finished") as caught:
        world(3).run(run)
    assert time.monotonic() - start < AT_ONCE_S
    assert "rank 2 runs at test_faults.py" in str(caught.value)


def test_the_table_says_who_waits_where_for_whom() -> None:
    def run(rank: Rank) -> None:
        if rank.index == 0:
            rank.comm.recv(3, tag=5)
        elif rank.index == 1:
            rank.comm.group([1, 3]).all_reduce(torch.ones(2), "max")
        elif rank.index == 3:
            rank.comm.barrier()

    with pytest.raises(Deadlock) as caught:
        world(4).run(run)
    frames = [(frame.filename, frame.name) for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert (__file__, "run") in frames, "the traceback of a rank"
    first, *table = str(caught.value).splitlines()
    assert "waits for rank 2, which has finished" in first or "no rank can go on" in first
    line = run.__code__.co_firstlineno
    assert [entry.strip() for entry in table] == [
        "rank 0 waits for rank 3 in recv(src=3, tag=5) of group [0, 1, 2, 3] "
        f"at test_faults.py, line {line + 2}, in run",
        "rank 1 waits for rank 3 in all_reduce(op='max', shape=(2), float32) of group [1, 3] "
        f"at test_faults.py, line {line + 4}, in run",
        "rank 2 has finished",
        f"rank 3 waits for rank 0, 1, 2 in barrier() of group [0, 1, 2, 3] at test_faults.py, line {line + 6}, in run",
    ]


def test_waiting_for_a_rank_at_work_is_no_deadlock() -> None:
    def run(rank: Rank) -> int:
        if rank.index == 0:
            time.sleep(0.3)
            rank.comm.send(torch.tensor(1), 1)
        if rank.index == 1:
            rank.comm.recv(0)
            time.sleep(0.1)
        return int(rank.comm.all_reduce(torch.tensor(1)))

    assert world(3).run(run) == [3, 3, 3]


def test_a_message_on_a_slow_wire_is_no_deadlock() -> None:
    def run(rank: Rank) -> int:
        if rank.index == 0:
            rank.comm.send(torch.tensor(5), 1)
            return 0
        return int(rank.comm.recv(0))

    assert world(2, link=Link(0.2, 1e9)).run(run) == [0, 5]


# --- row 4: a rank hangs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wait", "what"),
    [
        (lambda rank: rank.comm.recv(1), r"recv\(src=1, tag=0\)"),
        (lambda rank: rank.comm.barrier(), r"barrier\(\)"),
        (
            lambda rank: rank.comm.iall_reduce(torch.ones(LARGE)).wait(),
            r"all_reduce\(op='sum', shape=\(\d+\), float32\)",
        ),
        (lambda rank: rank.comm.group([1, 0]).broadcast(None, 0), r"broadcast\(root=0\)"),
    ],
)
def test_a_time_out_names_the_late_rank_and_its_line(wait: Callable[[Rank], object], what: str) -> None:
    def run(rank: Rank) -> None:
        nap() if rank.index == 1 else wait(rank)

    w = world(2, timeout_s=0.2)
    start = time.monotonic()
    with pytest.raises(CommTimeout, match=rf"rank 0 waited 0.2 s in {what}; late: rank 1\n") as caught:
        w.run(run)
    assert 0.2 <= time.monotonic() - start < AT_ONCE_S
    said = str(caught.value)
    assert "rank 1 runs at test_faults.py, line " in said
    assert "in nap" in said
    works(w)


def test_a_time_out_names_the_line_of_a_rank_in_a_long_call() -> None:
    def run(rank: Rank) -> None:
        if rank.index == 1:
            time.sleep(2)
        rank.comm.barrier()

    with pytest.raises(CommTimeout, match="late: rank 1") as caught:
        world(2, timeout_s=0.2).run(run)
    assert ranks_alive(), "the caller has waited for it"
    line = run.__code__.co_firstlineno + 2
    assert f"rank 1 runs at test_faults.py, line {line}, in run" in str(caught.value)
    assert any("rank 1 did not stop" in note for note in caught.value.__notes__)
    while ranks_alive():
        time.sleep(0.01)


def test_a_time_out_is_for_one_wait_and_not_for_all_together() -> None:
    def run(rank: Rank) -> None:
        for _ in range(8):
            if rank.index == 0:
                time.sleep(0.1)
            rank.comm.barrier()

    world(2, timeout_s=0.5).run(run)


def test_time_on_an_emulated_wire_is_no_time_out() -> None:
    def run(rank: Rank) -> None:
        rank.comm.send(torch.ones(1), 1) if rank.index == 0 else rank.comm.recv(0)

    world(2, link=Link(0.15, 1e9), timeout_s=0.1).run(run)


# --- row 5: Ctrl-C ---------------------------------------------------------------------------------------------------


def interrupt() -> None:
    """What Ctrl-C and a kernel's "Interrupt" do: SIGINT to the main thread."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@contextmanager
def interrupt_after(seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, interrupt)
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.fixture(autouse=True)
def interrupts_are_errors() -> Iterator[None]:
    """As in a notebook's kernel and a terminal, whatever this process inherited (a background job ignores SIGINT)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@occupations
def test_ctrl_c_stops_all_ranks(occupation: Callable[[Rank], object], options: dict[str, object]) -> None:
    """Rank 0 is at work, so that those who wait are no deadlock."""
    seen: list[BaseException] = []
    sent: list[float] = []
    all_here = threading.Barrier(3, timeout=30)

    def run(rank: Rank) -> None:
        try:
            all_here.wait()
            if rank.index != 0:
                occupation(rank)
            else:
                time.sleep(0.03)
                sent.append(time.monotonic())
                interrupt()
            nap()
        except BaseException as error:
            seen.append(error)
            raise

    w = world(3, **options)
    with pytest.raises(KeyboardInterrupt):
        w.run(run)
    assert time.monotonic() - sent[0] < AT_ONCE_S
    assert [type(error) for error in seen if not isinstance(error, PeerFailure)] == []
    assert len(seen) == 3
    works(w)


def test_ctrl_c_in_an_inner_world_stops_the_outer_one() -> None:
    w, all_here = world(2), threading.Barrier(4, timeout=30)

    def run(inner: Rank, outer: Rank) -> None:
        if all_here.wait() == 0:
            interrupt()
        nap()

    with pytest.raises(KeyboardInterrupt):
        w.run(lambda rank: World(2, device="cpu").run(run, rank))
    until = time.monotonic() + AT_ONCE_S
    while ranks_alive() and time.monotonic() < until:
        time.sleep(0.01)
    works(w)


def test_ctrl_c_shows_what_was_printed_and_says_nothing_of_ranks_that_left(capsys: pytest.CaptureFixture[str]) -> None:
    both_here = threading.Barrier(2, timeout=30)

    def run(rank: Rank) -> None:
        print("begun")
        if both_here.wait() == 0:
            interrupt()
        nap()

    with pytest.raises(KeyboardInterrupt) as caught:
        world(2).run(run)
    assert capsys.readouterr().out == "[rank 0] begun\n[rank 1] begun\n"
    assert getattr(caught.value, "__notes__", []) == []


def test_ctrl_c_in_a_long_c_call_does_not_keep_the_caller() -> None:
    both_here = threading.Barrier(2, timeout=30)

    def run(rank: Rank) -> None:
        if both_here.wait() == 0:
            interrupt()
        time.sleep(1.8)

    with pytest.raises(KeyboardInterrupt) as caught:
        world(2).run(run)
    assert ranks_alive(), "the caller has waited for them"
    assert [note[:19] for note in caught.value.__notes__] == ["rank 0 did not stop", "rank 1 did not stop"]
    assert int(world(2).run(lambda rank: rank.comm.all_reduce(torch.tensor(1)))[0]) == 2, "the next run works"
    while ranks_alive():
        time.sleep(0.01)


def test_ctrl_c_twice() -> None:
    """The second one ends the wait for ranks that do not stop, and nothing else."""
    num_threads, stdout = torch.get_num_threads(), sys.stdout

    def run(rank: Rank) -> None:
        interrupt()
        with interrupt_after(0.2):
            time.sleep(1.5)

    with pytest.raises(KeyboardInterrupt):
        world(1).run(run)
    assert torch.get_num_threads() == num_threads
    assert sys.stdout is stdout
    assert ranks_alive()
    while ranks_alive():
        time.sleep(0.01)


def test_ctrl_c_at_any_moment_of_a_run() -> None:
    """Start, work, end and the waits between: wherever it hits, the run is over, and the next one works."""

    def run(rank: Rank) -> int:
        for _ in range(20):
            total = rank.comm.all_reduce(torch.ones(3))
            rank.comm.send(total, (rank.index + 1) % 3)
            rank.comm.recv((rank.index - 1) % 3)
        return rank.index

    w, moments = world(3), random.Random(0)
    num_interrupted = 0
    num_threads, stdout = torch.get_num_threads(), sys.stdout
    for _ in range(40):
        try:
            with interrupt_after(moments.uniform(0, 0.012)):
                assert w.run(run) == [0, 1, 2]
        except KeyboardInterrupt:
            num_interrupted += 1
        assert sys.stdout is stdout
        assert torch.get_num_threads() == num_threads
        works(w)
    assert num_interrupted


SCRIPT = """
import sys, time, torch
from mplab import World

def run(rank):
    x = rank.comm.all_reduce(torch.ones(2))
    print("running", flush=True)
    if rank.index == 0:
        print("ready", file=sys.stderr, flush=True)
    {body}

World(3, device="cpu").run(run)
print("never")
"""


def script(body: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", "")}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        # A background job ignores SIGINT, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_ctrl_c_ends_a_script() -> None:
    with at_most(50), script("while True: time.sleep(0.01)") as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        out, err = process.communicate()
    assert time.monotonic() - start < AT_ONCE_S
    assert process.returncode != 0
    assert "KeyboardInterrupt" in err
    assert "never" not in out
    assert out.splitlines() == [f"[rank {r}] running" for r in range(3)]


def test_an_error_ends_a_script() -> None:
    with at_most(50), script("1 / 0 if rank.index == 2 else rank.comm.barrier()") as process:
        out, err = process.communicate()
    assert process.returncode == 1
    assert "ZeroDivisionError: division by zero" in err
    assert "(rank 2 of 3" in err
    assert "never" not in out
    assert err.count("Traceback") == 1, f"peers have nothing to say about it:\n{err}"


# --- mistakes before anything starts ---------------------------------------------------------------------------------


def test_a_mistake_is_an_mplab_error_and_names_the_rank() -> None:
    with pytest.raises(MplabError, match="root=9") as caught:
        world(3).run(lambda rank: rank.comm.broadcast(torch.ones(1), 9 if rank.index == 1 else 0))
    assert "rank 1 of 3" in caught.value.__notes__[0]


@pytest.mark.parametrize("slow", [True, False])
def test_ranks_wake_though_who_wakes_them_is_stopped(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    """The rank that failed is told to stop before it has woken all; or Ctrl-C comes again at that moment."""
    stop_channel, num_stopped = Channel.stop, 0

    def stop(channel: Channel) -> None:
        nonlocal num_stopped
        num_stopped += 1
        if slow:
            time.sleep(0.1)
            time.sleep(0)
        elif num_stopped == 1:
            raise KeyboardInterrupt
        stop_channel(channel)

    def work(rank: Rank) -> None:
        if rank.index == 0:
            time.sleep(0.2)
            if slow:
                raise ValueError
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
        rank.comm.recv(0) if rank.index < 3 else rank.comm.barrier()

    monkeypatch.setattr(Channel, "stop", stop)
    before = set(threading.enumerate())
    with pytest.raises((ValueError, KeyboardInterrupt)) as raised:
        World(4, "cpu").run(work)
    assert not any("left behind" in note for note in getattr(raised.value, "__notes__", ()))
    end_s = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_two_worlds_that_fail_at_once_leave_the_hook_for_lost_exceptions_as_it_was() -> None:
    before = sys.unraisablehook

    def lose(after_s: float, for_s: float) -> None:
        time.sleep(after_s)
        with stop_module._losing_quietly():
            time.sleep(for_s)

    threads = [threading.Thread(target=lose, args=times) for times in ((0.0, 0.1), (0.05, 0.1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.unraisablehook is before


def test_a_wait_after_its_run_ends() -> None:
    """Nobody watches it any more."""
    handle = World(2, "cpu").run(lambda rank: rank.comm.irecv(1 - rank.index))[0]
    with at_most(5), pytest.raises(MplabError, match="its run is over"):
        handle.wait()


def test_what_stops_a_rank_that_has_just_ended_stops_no_thread_that_has_its_number_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as a rank of another world."""
    stopped: list[BaseException] = []
    namesakes: list[threading.Thread] = []
    has_ended = threading.Event()

    def wait() -> None:
        try:
            while not has_ended.is_set():
                time.sleep(0.001)
        except BaseException as error:
            stopped.append(error)

    def imports(thread: threading.Thread) -> bool:
        thread.join()
        while len(namesakes) < 50 and thread.ident not in {t.ident for t in namesakes}:
            namesakes.append(threading.Thread(target=wait, daemon=True))
            namesakes[-1].start()
        return False

    def work(rank: Rank) -> None:
        rank.comm.barrier()
        if rank.index == 0:
            raise KeyError
        time.sleep(0.1)

    monkeypatch.setattr(stop_module, "_imports", imports)
    with pytest.raises(KeyError):
        World(2, "cpu").run(work)
    time.sleep(0.05)
    has_ended.set()
    for thread in namesakes:
        thread.join()
    assert namesakes
    assert stopped == []
