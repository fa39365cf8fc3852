"""Every old defect by its name, with its story, so that none comes back."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from limits import ranks_alive

from mplab import Link, MplabError, PeerFailure, World
from mplab.comm import algorithms, hub
from mplab.world import Rank

# --- deadlocks seen where there were none ----------------------------------------------------------------------------


class SlowList(list[Any]):
    """A list in which a rank takes its time to write down that it waits no more."""

    def __setitem__(self, index: Any, value: Any) -> None:
        if value is None:
            time.sleep(0.05)
        super().__setitem__(index, value)


@pytest.fixture
def slow_bookkeeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are preempted where it hurts: before they look into a channel, after they got an item, and before they
    write down that their wait is over. The watcher looks every 20 ms, so it sees all of these moments."""
    init, take = hub.Hub.__init__, hub.Channel.take

    def with_slow_list(self: hub.Hub, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.waits = SlowList(self.waits)

    def slow_take(self: hub.Channel, *args: Any) -> Any:
        time.sleep(0.05)
        item = take(self, *args)
        time.sleep(0.05)
        return item

    monkeypatch.setattr(hub.Hub, "__init__", with_slow_list)
    monkeypatch.setattr(hub.Channel, "take", slow_take)


def last_message_of_one_that_left(rank: Rank) -> int:
    if rank.index == 0:
        rank.comm.send(torch.tensor(1), 1)
        return 1
    return int(rank.comm.recv(0))


def kept_message_of_one_that_left(rank: Rank) -> int:
    if rank.index == 0:
        rank.comm.send(torch.tensor(1), 1, tag=1)
        rank.comm.send(torch.tensor(2), 1, tag=2)
        return 1
    rank.comm.recv(0, tag=2)
    return int(rank.comm.recv(0, tag=1))


def both_exchange(rank: Rank) -> int:
    handle = rank.comm.isend(torch.tensor(1), 1 - rank.index)
    got = rank.comm.recv(1 - rank.index)
    handle.wait()
    return int(got)


def both_meet(rank: Rank) -> int:
    for _ in range(2):
        rank.comm.barrier()
    return int(rank.comm.all_reduce(torch.tensor(1), "max"))


@pytest.mark.usefixtures("slow_bookkeeping")
@pytest.mark.parametrize("rendezvous", [False, True])
@pytest.mark.parametrize("fn", [last_message_of_one_that_left, kept_message_of_one_that_left, both_exchange, both_meet])
def test_false_deadlock_between_wake_up_and_bookkeeping(fn: Callable[[Rank], int], rendezvous: bool) -> None:
    """A rank that has its message and has not yet written so down looked like one that waits for nothing. One that
    wanted a message which had come early, and was kept for it, looked stuck until it had taken it."""
    if rendezvous and fn is kept_message_of_one_that_left:
        pytest.skip("a real deadlock then: the first send waits for the second receive")
    assert World(2, device="cpu", rendezvous=rendezvous).run(fn) == [1, 1]


def test_false_deadlock_of_receives_posted_before_sends() -> None:
    """With rendezvous a send waited until its message was *taken*, so that the standard exchange (post the receive,
    send, wait) was called a deadlock, which it is on no network."""

    def run(rank: Rank) -> int:
        posted = rank.comm.irecv(1 - rank.index)
        rank.comm.send(torch.tensor(rank.index), 1 - rank.index)
        return int(posted.wait())

    assert World(2, device="cpu", rendezvous=True).run(run) == [1, 0]


# --- messages of one communicator that went to another ---------------------------------------------------------------


def test_communicators_of_the_same_ranks_mixed_up_their_calls() -> None:
    """The world's communicator and a group of all its ranks each counted their own calls, but met in the same place:
    call 1 of the one was taken for call 1 of the other."""

    def run(rank: Rank) -> tuple[list[float], list[float]]:
        whole, twin = rank.comm, rank.comm.group([0, 1])
        first = whole.iall_reduce(torch.ones(2))
        second = twin.iall_reduce(torch.ones(3) * 10)
        return first.wait().tolist(), second.wait().tolist()

    for _ in range(20):
        assert World(2, device="cpu").run(run) == [([2.0] * 2, [20.0] * 3)] * 2


def test_groups_reached_on_two_ways_mixed_up_their_messages() -> None:
    """A group and the same group of a group: two counters, one channel, and a message that was overwritten."""

    def run(rank: Rank) -> list[int]:
        if rank.index == 2:
            return []
        direct = rank.comm.group([0, 1])
        nested = direct.group([1, 0]).group([1, 0])
        assert nested.ranks == direct.ranks
        if rank.index == 0:
            for i, comm in enumerate((direct, nested, direct, nested)):
                comm.send(torch.tensor(i), 1)
            return []
        return [int(direct.recv(0)) for _ in range(4)]

    assert World(3, device="cpu").run(run) == [[], [0, 1, 2, 3], []]


# --- ranks that did not stop, or not in time -------------------------------------------------------------------------


def test_computing_ranks_got_a_type_error_in_place_of_peer_failure() -> None:
    """The interpreter makes the exception that it raises in another thread, without arguments, and PeerFailure wanted
    one: the rank died of `TypeError: __init__() missing 1 required positional argument`."""
    seen: list[BaseException] = []
    both_here = threading.Barrier(2, timeout=30)

    def run(rank: Rank) -> None:
        if rank.index == 0:
            both_here.wait()
            raise ValueError("the reason")
        try:
            both_here.wait()
            while True:
                time.sleep(0.005)
        except BaseException as error:
            seen.append(error)
            raise

    with pytest.raises(ValueError, match="the reason"):
        World(2, device="cpu").run(run)
    assert [isinstance(error, PeerFailure) for error in seen] == [True]


def test_a_rank_that_caught_the_first_stop_was_never_asked_again() -> None:
    """One exception was sent to each computing rank; `except Exception` around a step swallowed it."""
    num_caught, both_here = 0, threading.Barrier(2, timeout=30)

    def run(rank: Rank) -> None:
        nonlocal num_caught
        both_here.wait()
        if rank.index == 0:
            time.sleep(0.03)
            raise ValueError("the reason")
        while num_caught < 2:
            try:
                while True:
                    time.sleep(0.005)
            except Exception:
                num_caught += 1

    with pytest.raises(ValueError, match="the reason") as caught:
        World(2, device="cpu").run(run)
    assert num_caught == 2
    assert len(caught.value.__notes__) == 1, caught.value.__notes__


def test_many_computing_ranks_used_up_the_grace_one_after_the_other() -> None:
    """Each of 63 ranks was given 20 ms to leave by itself before any was told to, 1.3 s in all: the run took longer
    than a second to fail, and called 63 ranks left behind that were about to stop."""

    def run(rank: Rank) -> None:
        if rank.index == 0:
            raise ValueError("the reason")
        while True:
            time.sleep(0.005)

    with pytest.raises(ValueError, match="the reason") as caught:
        World(64, device="cpu").run(run)
    assert len(caught.value.__notes__) == 1, caught.value.__notes__[:3]
    assert not ranks_alive()


def test_a_rank_on_a_slow_emulated_link_could_not_be_stopped() -> None:
    """It slept until its message arrived, in one call of 100 s."""

    def run(rank: Rank) -> None:
        if rank.index == 0:
            rank.comm.send(torch.ones(1), 1)
            time.sleep(0.03)
            raise ValueError("the reason")
        rank.comm.recv(0)

    with pytest.raises(ValueError, match="the reason"):
        World(2, device="cpu", link=Link(100.0, 1e9)).run(run)
    assert not ranks_alive()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("can't start new thread")])
def test_a_failure_while_ranks_are_started_was_lost(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining a thread that was never started raises: `RuntimeError: cannot join thread before it is started` came
    out instead of Ctrl-C, and the ranks that had been started were left running."""
    start, num_started = threading.Thread.start, 0

    def start_two(self: threading.Thread) -> None:
        nonlocal num_started
        num_started += 1
        if num_started == 3:
            raise error
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_two)
        with pytest.raises(type(error)) as caught:
            World(4, device="cpu").run(lambda rank: rank.comm.barrier())
    assert caught.value is error
    assert not ranks_alive()


def test_a_rank_that_started_after_ctrl_c_ran_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may come while the caller waits for a thread to start: nobody knows it yet, and nobody stops it."""
    start, ran = threading.Thread.start, []
    late: list[threading.Thread] = []

    def start_one_late(self: threading.Thread) -> None:
        if self.name == "mplab-rank2":
            late.extend([threading.Timer(0.05, start, (self,)), self])
            start(late[0])
            raise KeyboardInterrupt
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_one_late)
        with pytest.raises(KeyboardInterrupt):
            World(4, device="cpu").run(lambda rank: ran.append(rank.index))
    for thread in late:
        thread.join()
    assert 2 not in ran


# --- what a run left changed -----------------------------------------------------------------------------------------


def test_a_run_changed_the_thread_count_of_the_caller_and_of_its_new_threads() -> None:
    """`torch.set_num_threads(1)` of a rank is meant for that rank, but threads made later begin with it too."""

    def of_a_new_thread() -> int:
        counts: list[int] = []
        thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return counts[0]

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        World(2, device="cpu").run(lambda rank: torch.ones(10, 10) @ torch.ones(10, 10))
        assert torch.get_num_threads() == 3
        assert of_a_new_thread() == 3
    finally:
        torch.set_num_threads(before)


def test_worlds_inside_of_ranks_left_standard_output_replaced() -> None:
    """Two inner worlds put their output on top of each other and were left in another order: each saw that it was not
    on top, nobody restored anything, and every later run made the pile higher."""
    before = sys.stdout

    def run(rank: Rank) -> None:
        for i in range(3):
            World(2, device="cpu").run(lambda inner, i=i: time.sleep(0.002 * ((rank.index + i) % 3)))

    World(3, device="cpu").run(run)
    assert sys.stdout is before


def test_worlds_side_by_side_left_standard_output_replaced() -> None:
    before = sys.stdout
    threads = [
        threading.Thread(target=lambda i=i: World(2, device="cpu").run(lambda rank: time.sleep(0.01 * (3 - i))))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.003)
    for thread in threads:
        thread.join()
    assert sys.stdout is before


# --- algorithms and arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", algorithms.ALL_REDUCES.values())
def test_a_ring_that_writes_into_its_input(function: Callable[..., torch.Tensor]) -> None:
    """Chunks are views: a partial sum that is added up in place ends up in the caller's gradient."""

    def run(rank: Rank) -> None:
        x = torch.arange(10.0) + rank.index
        for given in (x, x.view(2, 5), x[::2], x.view(2, 5).t()):
            before = x.clone()
            function(rank.comm, given, "mean")
            assert torch.equal(x, before)

    for n in (1, 2, 3, 4):
        World(n, device="cpu").run(run)


def test_an_impossible_range_of_dims_for_a_tensor_without_dims() -> None:
    """It said "dim must be from 0 to -1"."""
    with pytest.raises(MplabError, match="0-dim tensor") as caught:
        World(2, device="cpu").run(lambda rank: rank.comm.all_gather(torch.tensor(1.0)))
    assert "to -1" not in str(caught.value)


def test_a_time_out_of_nan_seconds_never_came() -> None:
    """`nan <= 0` is false, and so is every comparison with the time waited."""
    with pytest.raises(MplabError, match="timeout_s=nan"):
        World(2, device="cpu", timeout_s=float("nan"))


def test_a_rank_that_was_stopped_amid_an_import_left_half_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first optimizer of a process imports for seconds; after that no rank of it could make one."""
    lines = ["import time", "for _ in range(150):", "    time.sleep(0.01)", "is_whole = True"]
    (tmp_path / "takes_long.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    importing = threading.Event()

    def run(rank: Rank) -> None:
        if rank.index == 0:
            importing.wait(5)
            time.sleep(0.1)
            raise KeyError("the other one imports")
        importing.set()
        import_module("takes_long")
        rank.comm.barrier()

    with pytest.raises(KeyError):
        World(2, device="cpu").run(run)
    assert sys.modules.pop("takes_long").is_whole
