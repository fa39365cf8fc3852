"""How processes under mpirun find each other, over an MPI of this process: who said what, who is missing, who ends."""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mplab import MplabError
from mplab.comm.mpi import MpiWire
from mplab.world import join, join_mpi
from mplab.world.join import Member

BYTE = object()


class Request:
    """Done when it was asked so often, and then `finish` is called."""

    def __init__(self, num_asked: float = 0, finish: Callable[[], object] = list) -> None:
        self.num_left, self._finish = num_asked, finish

    def Test(self) -> bool:
        self.num_left -= 1
        if self.num_left < 0:
            self._finish()
        return self.num_left < 0


class World:
    """MPI's world, of one of its ranks; what is sent lies in the box of its receiver.

    Args:
        rank: whose.
        boxes: of all ranks.
    """

    def __init__(self, rank: int = 0, boxes: list[list[tuple[int, int, bytes]]] | None = None) -> None:
        self.boxes = [[]] if boxes is None else boxes
        self.rank, self.size = rank, len(self.boxes)
        self.barrier, self.aborted = Request(), list[int]()
        self.copied, self.sent = Request(2), list[Request]()

    def Isend(self, data: bytes, peer: int, tag: int) -> Request:
        self.boxes[peer].append((self.rank, tag, bytes(data)))
        self.sent.append(Request(2))
        return self.sent[-1]

    def Improbe(self, source: int, tag: int, status: Any) -> Any:
        mine = self.boxes[self.rank]
        found = next((message for message in mine if message[:2] == (source, tag)), None)
        if found is None:
            return None
        mine.remove(found)
        status.Get_count = lambda of: len(found[2]) if of is BYTE else 0

        def receive(memory: bytearray) -> Request:
            assert len(memory) == len(found[2])
            return Request(2, lambda: memory.__setitem__(slice(None), found[2]))

        return SimpleNamespace(Irecv=receive)

    def Idup(self) -> tuple[str, Request]:
        return "a copy", self.copied

    def Ibarrier(self) -> Request:
        return self.barrier

    def Abort(self, code: int) -> None:
        self.aborted.append(code)
        raise SystemExit(code)


@pytest.fixture
def mpi(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What of mpi4py is looked at; and this process has joined nobody."""
    for name in join_mpi.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in (("_num_joined", 0), ("_is_joined", False), ("_has_failed", False), ("END_TIMEOUT_S", 0.05)):
        monkeypatch.setattr(join_mpi, name, value)
    made = SimpleNamespace(
        COMM_WORLD=World(),
        BYTE=BYTE,
        Status=SimpleNamespace,
        Get_library_version=lambda: "Some MPI v3",
        Is_finalized=lambda: False,
        Query_thread=lambda: 2,
        THREAD_SERIALIZED=2,
    )
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=made))
    monkeypatch.setattr(atexit, "register", lambda at_exit: None)
    return made


# --- what each says --------------------------------------------------------------------------------------------------


def test_every_rank_hears_what_each_says(mpi: Any) -> None:
    boxes: list[list[tuple[int, int, bytes]]] = [[(1, 7, b"a user's own")], [], []]
    worlds, heard = [World(rank, boxes) for rank in range(3)], dict[int, Any]()

    def work(rank: int) -> None:
        heard[rank] = join_mpi._gather(worlds[rank], {"rank": rank, "words": "x" * 10 * rank}, 20.0)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = [{"rank": rank, "words": "x" * 10 * rank} for rank in range(3)]
    assert heard == dict.fromkeys(range(3), want)
    assert boxes == [[(1, 7, b"a user's own")], [], []]
    for world in worlds:
        assert len(world.sent) == 2
        assert all(request.num_left < 0 for request in world.sent)


def test_what_was_said_for_an_earlier_world_is_not_taken(mpi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[list[tuple[int, int, bytes]]] = [[], [(0, join_mpi.FIRST_TAG + 2, b"3"), (0, join_mpi.FIRST_TAG, b"4")]]
    for num_joined, want in ((2, 3), (join_mpi.NUM_TAGS, 4)):  # after so many the first tag comes again
        monkeypatch.setattr(join_mpi, "_num_joined", num_joined)
        assert join_mpi._gather(World(1, boxes), 9, 20.0) == [want, 9]
    assert [tag for _, tag, _ in boxes[0]] == [join_mpi.FIRST_TAG + 2, join_mpi.FIRST_TAG]


def test_those_who_say_nothing_are_named(mpi: Any) -> None:
    tag = join_mpi.FIRST_TAG
    boxes: list[list[tuple[int, int, bytes]]] = [[(2, tag, b"0")], [], [], []]
    with pytest.raises(
        MplabError, match=r"^2 of 4 ranks did not join within 0.02 s: rank 1, 3; does each of them call"
    ):
        join_mpi._gather(World(0, boxes), 0, 0.02)


def test_what_is_never_done_is_an_error(mpi: Any) -> None:
    with pytest.raises(MplabError, match=r"could not be connected within 0.02 s"):
        join_mpi._wait(Request(1e9), 0.02)


# --- a world is joined -----------------------------------------------------------------------------------------------


def test_a_process_joins_once_at_a_time(mpi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    monkeypatch.setattr(atexit, "register", registered.append)
    joined = join_mpi.join(0.1)
    assert (joined.rank, len(joined.members)) == (0, 1)
    assert joined.num_cores == len(os.sched_getaffinity(0))
    assert (joined.make_wire.func, joined.make_wire.args) == (MpiWire, ("a copy",))  # type: ignore[attr-defined]
    assert mpi.COMM_WORLD.copied.num_left < 0
    assert not join_mpi._has_failed
    with pytest.raises(MplabError, match="this process has joined the others already"):
        join_mpi.join(0.1)
    join_mpi.leave(has_failed=False)
    join_mpi.join(0.1)
    assert registered == [join_mpi._end]
    assert join_mpi._num_joined == 2


def test_ranks_of_one_host_share_its_cores(mpi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 1 and 2 of 3 are here; and whoever waits for others does so for 30 s."""
    mpi.COMM_WORLD = World(2, [[], [], []])
    here = join._place()
    said: list[Any] = []

    def gather(world: Any, mine: Any, timeout_s: float) -> list[Any]:
        assert timeout_s == join.JOIN_TIMEOUT_S
        said.append(mine)
        if len(said) == 1:
            return [["elsewhere", [7, 8]], [here, [0, 1]], [here, [1, 2]]]
        return [["b", "elsewhere", "cpu", ""], ["a", here, "cpu", ""], ["a", here, "cpu", ""]]

    monkeypatch.setattr(join_mpi, "_gather", gather)
    monkeypatch.setattr(join, "_member", lambda local_rank: f"local rank {local_rank}")
    joined = join_mpi.join(1.0)
    assert joined.members == [Member("b", "elsewhere", "cpu", ""), *[Member("a", here, "cpu", "")] * 2]
    assert (joined.rank, joined.num_cores) == (2, 3)
    assert said == [[here, join_mpi._cores()], "local rank 1"]


def test_one_who_cannot_compute_is_named_and_all_end(mpi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "_member", lambda local_rank: Member("a", "b", "cpu", "no GPU is left"))
    with pytest.raises(MplabError, match="rank 0 on a: no GPU is left"):
        join_mpi.join(1.0)
    assert join_mpi._has_failed
    mpi.COMM_WORLD.barrier = Request(1e9)
    with pytest.raises(SystemExit):
        join_mpi._end()


def test_a_process_that_never_begins_is_waited_for_that_long(mpi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what says where it was and ends it, though no line of Python runs."""
    calls: list[Any] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda s, exit, file: calls.append((s, exit, file)))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: calls.append("over"))
    assert join_mpi._world(3.0) is mpi.COMM_WORLD
    assert calls == [(3.0, True, sys.__stderr__ or sys.stderr), "over"]


@pytest.mark.parametrize("name", join_mpi.SIZES)
def test_the_number_of_processes_is_that_of_the_launcher(mpi: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    join_mpi._world(3.0)
    monkeypatch.setenv(name, "")
    join_mpi._world(3.0)
    monkeypatch.setenv(name, "2")
    with pytest.raises(MplabError, match=r"^2 processes were started, .* sees 1"):
        join_mpi._world(3.0)


# --- how processes end -----------------------------------------------------------------------------------------------


def test_after_a_failure_all_end_by_themselves_or_are_ended(mpi: Any) -> None:
    world = mpi.COMM_WORLD
    join_mpi.leave(has_failed=True)
    world.barrier = Request(3)
    join_mpi._end()
    assert world.aborted == []
    world.barrier = Request(1e9)
    start_s = time.monotonic()
    with pytest.raises(SystemExit):
        join_mpi._end()
    assert world.aborted == [1]
    assert time.monotonic() - start_s > 0.04
    mpi.Is_finalized = lambda: True
    join_mpi._end()
    assert world.aborted == [1]


def test_without_a_failure_mpi_is_left_to_itself(mpi: Any) -> None:
    mpi.COMM_WORLD.barrier = Request(1e9)
    join_mpi._end()
    join_mpi.join(1.0)
    join_mpi._end()
    join_mpi.leave(has_failed=False)
    join_mpi._end()
    assert mpi.COMM_WORLD.aborted == []
