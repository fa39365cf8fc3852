"""Parcels over MPI: the wire, over an MPI of this process."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mplab.comm import mpi as mpi_module
from mplab.comm.mpi import MpiWire
from mplab.comm.wire import SPARE_BYTES, Parcel, lengths


class FakeRequest:
    def __init__(self, comm: FakeComm) -> None:
        self.is_done, self._comm = not comm.is_late, comm

    def Test(self) -> bool:
        with self._comm.alone():
            return self.is_done


class FakeComm:
    """What arrives at one rank; its sends arrive at the others. One call at a time, or it raises.

    Args:
        rank: whose.
        all_ranks: those of all.
    """

    def __init__(self, rank: int, all_ranks: list[FakeComm]) -> None:
        self.rank, self._all = rank, all_ranks
        self.arriving: deque[tuple[int, int, bytes]] = deque()
        self.requests: list[FakeRequest] = []
        self.places: list[int] = []  # in memory, of what was sent
        self.num_probes = 0
        self.is_late = self.is_broken = False  # what is received or sent from now on; the network
        self._calling = threading.Lock()

    def _request(self) -> FakeRequest:
        self.requests.append(FakeRequest(self))
        return self.requests[-1]

    @contextmanager
    def alone(self) -> Iterator[None]:
        if self.is_broken or not self._calling.acquire(blocking=False):
            raise RuntimeError("the network is down" if self.is_broken else "two calls at a time")
        time.sleep(1e-4)
        yield
        self._calling.release()

    def Isend(self, data: Any, peer: int, tag: int) -> FakeRequest:
        with self.alone():
            assert len(data) == lengths(torch.from_numpy(data))[0]  # the parcel, and nothing more
            self.places.append(data.ctypes.data)
            self._all[peer].arriving.append((self.rank, tag, data.tobytes()))
            return self._request()

    def Improbe(self, status: Any) -> Any:
        with self.alone():
            self.num_probes += 1
            if not self.arriving:
                return None
            source, tag, data = self.arriving.popleft()
            status.Get_source, status.Get_tag, status.Get_count = lambda: source, lambda: tag, lambda _: len(data)

            def receive(memory: Any) -> FakeRequest:
                memory[:] = list(data)
                return self._request()

            return SimpleNamespace(Irecv=receive)


class Pair:
    """Two ranks' wires, and what came over each: rank 1 stops listening at the word "last"."""

    def __init__(self) -> None:
        self.comms: list[FakeComm] = []
        self.came: list[list[Parcel]] = [[], []]
        self.lost: list[tuple[int, int, str]] = []
        self.comms += [FakeComm(r, self.comms) for r in range(2)]
        self.wires = [MpiWire(comm, r, 2, *self._callbacks(r)) for r, comm in enumerate(self.comms)]  # type: ignore[arg-type]

    def _callbacks(self, rank: int) -> Any:
        def deliver(peer: int, parcel: Parcel) -> bool:
            assert peer == 1 - rank
            self.came[rank].append(parcel)
            return parcel.words != "last"

        return deliver, lambda peer, reason: self.lost.append((rank, peer, reason))

    def wait_for(self, is_so: Callable[[], object]) -> None:
        end_s = time.monotonic() + 20
        while not is_so():
            assert time.monotonic() < end_s
            time.sleep(0.001)

    def send(self, words: str, *about: Any) -> Parcel:
        """From rank 0 to rank 1; it has come, and has been sent."""
        self.wires[0].send([1], words, *about)
        self.wait_for(lambda: self.came[1] and self.came[1][-1].words == words and not self.wires[0]._sent)
        return self.came[1][-1]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(Status=SimpleNamespace, BYTE=1)))
    made = Pair()
    yield made
    for wire in made.wires:
        wire.close(0.0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mplab")]


@pytest.fixture
def dozing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that find nothing look again after a minute, if nobody wakes them."""
    monkeypatch.setattr(mpi_module, "LATEST_S", 60.0)
    monkeypatch.setattr(mpi_module, "LATE_SHARE", 1e9)


def test_words_and_tensors_arrive_as_they_were_sent(pair: Pair) -> None:
    small, large = torch.arange(6.0).view(2, 3), torch.arange(20_000, dtype=torch.int16)
    start_ns = time.perf_counter_ns()
    for words, x, borrowed in (("a", None, False), (["b", 1], small.T, True), ("c", large, True), ("d", large, False)):
        pair.wires[0].send([1], words, x, borrowed)
    pair.wires[0].send([1], "e", [small, small])
    pair.wait_for(lambda: len(pair.came[1]) == 5)
    words, xs, came_ns, memories = zip(*pair.came[1], strict=True)
    assert words == ("a", ["b", 1], "c", "d", "e")
    for x, want in zip(xs[1:], (small.T, large, large, torch.cat([small.view(-1)] * 2)), strict=True):
        torch.testing.assert_close(x, want, rtol=0, atol=0)
    assert [memory is not None for memory in memories] == [False, False, True, False, False]
    assert [start_ns, *came_ns] == sorted([*came_ns, start_ns])
    assert came_ns[-1] < time.perf_counter_ns()


def test_memory_is_used_again_once_it_was_sent_and_where_it_was_given_back(pair: Pair) -> None:
    large = torch.ones(SPARE_BYTES // 4)
    first = pair.send("first", torch.cat([large, large[:99]]), True)
    pair.wires[1].reuse(first)
    second = pair.send("second", large, True)
    assert first.memory is not None
    assert second.memory is first.memory
    pair.wires[1].reuse(second)
    third = pair.send("third", large, False)  # which nobody is going to give back
    assert third.x is not None
    assert third.x.untyped_storage().data_ptr() != first.memory.untyped_storage().data_ptr()
    assert len(set(pair.comms[0].places)) == 1


def test_a_small_parcel_does_not_overtake_a_large_one(pair: Pair) -> None:
    pair.comms[1].is_late = True
    pair.wires[0].send([1], "large", torch.ones(10_000))
    pair.wait_for(lambda: pair.comms[1].requests)
    pair.comms[1].is_late = False
    pair.wires[0].send([1], "small")
    pair.wait_for(lambda: len(pair.comms[1].requests) == 2)
    time.sleep(0.02)
    assert pair.came[1] == []
    pair.comms[1].requests[0].is_done = True
    pair.wait_for(lambda: len(pair.came[1]) == 2)
    assert [parcel.words for parcel in pair.came[1]] == ["large", "small"]


def test_many_threads_send_and_mpi_is_called_by_one_at_a_time(pair: Pair) -> None:
    threads = [threading.Thread(target=pair.wires[0].send, args=([1], i)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pair.wait_for(lambda: len(pair.came[1]) == 20)
    assert sorted(parcel.words for parcel in pair.came[1]) == list(range(20))
    assert pair.lost == []


def test_threads_sleep_until_they_are_woken(dozing: None, pair: Pair) -> None:
    def sleeps() -> bool:
        """Nothing is asked any more."""
        before = [comm.num_probes for comm in pair.comms]
        time.sleep(0.05)
        return [comm.num_probes for comm in pair.comms] == before

    pair.wait_for(sleeps)
    pair.wires[0].send([1], "a")
    pair.wait_for(lambda: not pair.wires[0]._sent)  # a send wakes its own thread, which frees the memory
    pair.wires[1].expect()
    pair.wait_for(lambda: pair.came[1])
    for wire in pair.wires:
        wire.expect()  # in vain
    pair.wait_for(sleeps)
    start_s = time.monotonic()
    for wire in pair.wires:
        wire.close(0.0)
    assert time.monotonic() - start_s < 20


def test_a_thread_that_was_idle_for_long_still_looks(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    monkeypatch.setattr(mpi_module, "LATE_SHARE", 1e9)
    time.sleep(0.01)
    pair.send("a")
    start_s = time.monotonic()
    pair.wires[0].flush(30.0)  # all is sent
    assert time.monotonic() - start_s < 20


def test_a_network_that_is_down_is_told_for_those_who_have_more_to_say(pair: Pair) -> None:
    pair.wires[0].send([1], "last")
    pair.wait_for(lambda: pair.came[1])
    pair.comms[0].is_late = True
    pair.wires[0].send([1], "never there")
    for comm in pair.comms:
        comm.is_broken = True
    pair.wait_for(lambda: not pair.wires[0]._thread.is_alive() and not pair.wires[1]._thread.is_alive())
    assert pair.lost == [(0, 1, "the network is down")]
    start_s = time.monotonic()  # nothing is sent any more, so nothing is waited for
    pair.wires[0].flush(30.0)
    pair.wires[0].close(30.0)
    assert time.monotonic() - start_s < 20


def test_a_send_that_fails_is_told_too(pair: Pair) -> None:
    pair.wires[0].close(0.0)  # it receives no more, and hears of nothing by itself
    pair.comms[0].is_broken = True
    pair.wires[0].send([1], "not even sent")
    assert pair.lost == [(0, 1, "the network is down")]


def test_what_nobody_receives_is_kept_where_it_is(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi_module, "_unread", [])
    pair.comms[0].is_late = True
    pair.wires[0].send([1, 1], "never there")
    pair.comms[0].requests[0].is_done = True  # but not the other one
    start_s = time.monotonic()
    pair.wires[0].flush(0.05)
    assert time.monotonic() - start_s > 0.04
    pair.wires[0].close(0.05)
    (kept,) = mpi_module._unread
    assert kept.requests == pair.comms[0].requests


def test_to_close_takes_no_longer_than_the_others_talk(pair: Pair) -> None:
    pair.wires[0].send([1], "last")
    timer = threading.Timer(0.05, pair.wires[1].send, ([0], "last"))
    timer.start()
    start_s = time.monotonic()
    for wire in pair.wires:
        wire.close(30.0)
    assert time.monotonic() - start_s < 20
    assert [len(came) for came in pair.came] == [1, 1]


def test_to_close_waits_for_what_was_sent_last(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi_module, "_unread", [])
    pair.wires[1].send([0], "last")
    pair.wait_for(lambda: pair.came[0])
    pair.comms[0].is_late = True
    pair.wires[0].send([1], "to the last")
    (request,) = pair.comms[0].requests[-1:]
    timer = threading.Timer(0.05, lambda: setattr(request, "is_done", True))
    timer.start()
    pair.wires[0].close(30.0)
    timer.join()
    assert mpi_module._unread == []


def test_a_parcel_that_takes_long_holds_up_no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(Status=SimpleNamespace, BYTE=1)))
    comms: list[FakeComm] = []
    comms += [FakeComm(r, comms) for r in range(3)]
    came: list[Any] = []
    wires = [
        MpiWire(comm, r, 3, lambda peer, parcel: came.append(parcel.words) or True, lambda peer, reason: None)  # type: ignore[arg-type, func-returns-value]
        for r, comm in enumerate(comms)
    ]
    comms[0].is_late = True
    wires[2].send([0], "large", torch.ones(10_000))
    end_s = time.monotonic() + 5
    while not comms[0].requests and time.monotonic() < end_s:
        time.sleep(0.001)
    comms[0].is_late = False
    wires[2].send([0], "after it")
    wires[1].send([0], "small")
    while not came and time.monotonic() < end_s:
        time.sleep(0.001)
    time.sleep(0.05)
    assert came == ["small"]
    comms[0].requests[0].is_done = True
    while len(came) < 3 and time.monotonic() < end_s:
        time.sleep(0.001)
    assert came == ["small", "large", "after it"]
    for wire in wires:
        wire.close(0.0)
