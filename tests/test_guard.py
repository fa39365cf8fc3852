"""What a process rank concludes from what the others say, with their words put in by hand."""

from __future__ import annotations

import dis
import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from mplab.comm import guard as guard_module
from mplab.comm.guard import Guard
from mplab.comm.wire import Parcel
from mplab.errors import CommTimeout, Deadlock, PeerFailure


class FakeWire:
    """Keeps what is sent, and delivers nothing by itself."""

    def __init__(self, rank: int, size: int, deliver: Callable[..., bool], lose: Callable[..., None]) -> None:
        self.peers = tuple(r for r in range(size) if r != rank)
        self.sent: list[tuple[tuple[int, ...], Any]] = []
        self.answers: list[Callable[[], Any]] = []  # to what is sent, one after the other
        self.num_waits = 0

    def send(self, peers: Any, words: Any, x: torch.Tensor | None = None, borrowed: bool = False) -> None:
        self.sent.append((tuple(peers), words))
        if self.answers:
            self.answers.pop(0)()

    def expect(self) -> None:
        self.num_waits += 1

    def flush(self, timeout_s: float) -> None: ...

    def close(self, timeout_s: float) -> None: ...


@pytest.fixture
def make_guard(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Guard]:
    """Makes rank 0 of 3, in its first run."""
    monkeypatch.setattr(guard_module, "TELL_AFTER_S", 0.05)
    monkeypatch.setattr(guard_module, "LISTEN_S", 0.1)

    def make() -> Guard:
        made = Guard(0, 3, 0.3, FakeWire)  # type: ignore[arg-type]
        made.start()
        return made

    return make


@pytest.fixture
def guard(make_guard: Callable[[], Guard]) -> Guard:
    return make_guard()


def test_a_question_that_comes_before_the_wire_is_made_is_answered() -> None:
    """The others may wait, and ask where this rank is, while it is still being made."""
    deliveries: list[threading.Thread] = []

    class EarlyWire(FakeWire):
        def __init__(self, rank: int, size: int, deliver: Callable[..., bool], lose: Callable[..., None]) -> None:
            super().__init__(rank, size, deliver, lose)
            question = Parcel(["state", "waits", 1, "waits somewhere", [0], [], []], None, 0, None)
            deliveries.append(threading.Thread(target=deliver, args=(1, question), daemon=True))
            deliveries[0].start()
            deliveries[0].join(0.05)

    guard = Guard(0, 3, 0.3, EarlyWire)  # type: ignore[arg-type]
    deliveries[0].join(5)
    assert [(peers, words[:2]) for peers, words in guard._wire.sent] == [((1,), ["state", "runs"])]  # type: ignore[attr-defined]


def say(guard: Guard, peer: int, kind: str, *words: Any) -> bool:
    return guard._deliver(peer, Parcel([kind, *words], None, 0, None))


def waits(guard: Guard, peer: int, missing: list[int], sent: list[int], received: list[int], run: int = 1) -> None:
    say(guard, peer, "state", "waits", run, "waits somewhere", missing, sent, received)


def recv(guard: Guard) -> Any:
    return guard.collect([1], "x", "recv(src=1)", [0, 1, 2])[1].words


def test_a_parcel_that_is_here_is_taken_at_once(guard: Guard) -> None:
    say(guard, 1, "data", 1, "x", "hello")
    assert recv(guard) == "hello"
    assert guard._wire.sent == []  # type: ignore[attr-defined]
    assert guard._boxes == {}


def test_parcels_of_one_key_keep_their_order(guard: Guard) -> None:
    for word in ("first", "second"):
        say(guard, 1, "data", 1, "x", word)
    assert [recv(guard), recv(guard)] == ["first", "second"]


def test_all_wait_and_nothing_is_on_its_way(guard: Guard) -> None:
    waits(guard, 1, [2], [0, 0, 4], [0, 0, 0])
    waits(guard, 2, [0], [0, 0, 0], [0, 4, 0])
    with pytest.raises(Deadlock, match="no rank can go on\n  rank 0 waits for rank 1 in recv"):
        recv(guard)


def test_a_parcel_on_its_way_is_no_deadlock(guard: Guard) -> None:
    waits(guard, 1, [2], [0, 0, 4], [0, 0, 0])
    waits(guard, 2, [0], [0, 0, 0], [0, 3, 0])  # the fourth one from rank 1 may wake it
    with pytest.raises(CommTimeout):
        recv(guard)


def test_a_parcel_that_came_too_late_for_the_others_state_is_no_deadlock(guard: Guard) -> None:
    say(guard, 2, "data", 1, "for later", None)
    waits(guard, 1, [2], [0, 0, 0], [0, 0, 0])
    waits(guard, 2, [0], [0, 0, 0], [0, 0, 0])  # said before it sent that
    with pytest.raises(CommTimeout):
        recv(guard)


def test_what_was_said_in_another_run_does_not_count(guard: Guard) -> None:
    waits(guard, 1, [2], [0, 0, 0], [0, 0, 0], run=0)
    waits(guard, 2, [0], [0, 0, 0], [0, 0, 0], run=2)
    with pytest.raises(CommTimeout):
        recv(guard)


@pytest.mark.parametrize(("status", "how"), [("finished", "finished"), ("left", "left the world")])
def test_a_rank_that_has_ended_is_not_waited_for(guard: Guard, status: str, how: str) -> None:
    more = say(guard, 1, "state", status, 1, f"has {how}", [], [0, 0, 0], [0, 0, 0])
    assert more == (status == "finished")
    with pytest.raises(Deadlock, match=f"rank 0 waits for rank 1, which has {how}"):
        recv(guard)


def test_a_rank_that_does_not_answer_is_named(guard: Guard) -> None:
    with pytest.raises(
        CommTimeout, match=r"waited 0.3 s in recv\(src=1\); late: rank 1\n(.*\n)*  rank 1 does not answer"
    ):
        recv(guard)
    kinds = [words[0] for _, words in guard._wire.sent]  # type: ignore[attr-defined]
    assert kinds == ["state", "state", "failure"]  # told, asked, and given up; nothing after that
    assert 1 < guard._wire.num_waits < 20  # type: ignore[attr-defined]  # it looks now and then, and sleeps meanwhile


def test_a_rank_that_answers_is_named_with_its_line(guard: Guard) -> None:
    answer = ("state", "runs", 1, "runs at train.py, line 3", [], [], [])
    guard._wire.answers = [lambda: None, lambda: say(guard, 1, *answer)]  # type: ignore[attr-defined]
    with pytest.raises(CommTimeout, match=r"rank 1 runs at train\.py, line 3"):
        recv(guard)


def test_a_waiting_rank_is_told_where_this_one_is(guard: Guard) -> None:
    waits(guard, 1, [0], [0, 0, 0], [0, 0, 0])
    waits(guard, 2, [1], [0, 0, 0], [0, 0, 0])  # waits for another one
    ((peers, words),) = guard._wire.sent  # type: ignore[attr-defined]
    assert peers == (1,)
    assert words[1] == "runs"
    assert "test_guard.py, line" in words[3]


def test_a_broken_connection_ends_the_wait(guard: Guard) -> None:
    guard._lose(2, "Connection closed")
    with pytest.raises(PeerFailure, match=r"rank 2's process is gone .* \(Connection closed\)") as raised:
        recv(guard)
    assert raised.value.rank == 2


def test_the_connection_of_a_rank_that_left_may_break(guard: Guard) -> None:
    say(guard, 2, "state", "left", 1, "has left the world", [], [], [])
    guard._lose(2, "Connection closed")
    with pytest.raises(CommTimeout):
        recv(guard)


def test_the_first_failure_counts_and_is_told_once(guard: Guard) -> None:
    assert not say(guard, 1, "failure", 1, "ValueError", "boom")
    guard.fail(KeyError("later"))
    guard.fail(KeyError("and again"))
    assert guard._wire.sent == [((1, 2), ["failure", 1, "ValueError", "boom"])]  # type: ignore[attr-defined]
    with pytest.raises(PeerFailure, match=r"rank 0 stopped in recv\(src=1\): rank 1 failed with ValueError: boom"):
        recv(guard)


# --- who wakes the rank ----------------------------------------------------------------------------------------------


def rings(guard: Guard, fn: Callable[..., object], *arguments: Any) -> bool:
    """Whether something that the others do wakes the rank."""
    fn(guard, *arguments)
    return guard._news.wait(0)


def test_a_rank_is_woken_when_all_that_it_waits_for_has_come(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by one of two parcels, nor by one of another key."""
    seen: list[bool] = []

    def come() -> None:
        if not seen:
            seen.append(rings(guard, say, 1, "data", 1, "y", "for later"))
            seen.append(rings(guard, say, 2, "data", 1, "x", "two"))
            seen.append(rings(guard, say, 1, "data", 1, "x", "one"))

    monkeypatch.setattr(guard._wire, "expect", come)
    came = guard.collect([1, 2], "x", "all_reduce()", [0, 1, 2])
    assert seen == [False, False, True]
    assert [came[r].words for r in (1, 2)] == ["one", "two"]


def test_a_rank_is_woken_by_the_rest_where_some_has_come_before(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rings(guard, say, 2, "data", 1, "x", "two")  # nothing is awaited yet
    seen: list[bool] = []
    monkeypatch.setattr(guard._wire, "expect", lambda: seen.append(rings(guard, say, 1, "data", 1, "x", "one")))
    guard.collect([1, 2], "x", "all_reduce()", [0, 1, 2])
    assert seen == [True]


def test_a_rank_is_woken_at_once_by_what_is_said_besides(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waits for parcels, and none has come: where another one is, that it is gone, or has failed."""
    seen: list[bool] = []

    def come() -> None:
        seen.append(rings(guard, say, 2, "state", "runs", 1, "runs", [], [], []))
        seen.append(rings(guard, Guard._lose, 2, "Connection closed"))
        seen.append(rings(guard, say, 1, "failure", 1, "ValueError", "boom"))

    monkeypatch.setattr(guard._wire, "expect", come)
    with pytest.raises(PeerFailure, match="ValueError: boom"):
        recv(guard)
    assert seen == [True] * 3


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupting(num_places: int, files: Sequence[str]) -> Callable[[FrameType, str, object], Any]:
    """A tracer that raises what Ctrl-C does, at the n-th place in some files where Python would.

    Signals are handled after calls, at the start of functions, and where loops begin again.
    """
    last: dict[FrameType, str] = {}

    def step(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal num_places
        code = frame.f_code  # what is raised in a generator while it is closed is lost, wherever it comes from
        if Path(code.co_filename).name not in files or code.co_flags & inspect.CO_GENERATOR:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            before = last.get(frame, "")
            last[frame] = dis.opname[code.co_code[frame.f_lasti]]
            num_places -= before.startswith("CALL") or before in ("RESUME", "JUMP_BACKWARD")
            if num_places == 0:
                raise KeyboardInterrupt
        return step

    return step


def test_an_interrupt_wherever_it_comes_is_one_and_leaves_no_lock_behind(
    make_guard: Callable[[], Guard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "LOOK_EVERY_S", 1e-4)
    monkeypatch.setattr(guard_module, "TELL_AFTER_S", 0.0)
    num_places = 0
    is_interrupted = True
    while is_interrupted:
        num_places += 1
        guard = make_guard()
        answers = [lambda guard=guard: say(guard, 1, "data", 1, "x", "hello"), lambda: None, lambda: None]
        monkeypatch.setattr(guard._wire, "expect", lambda answers=answers: answers.pop()())
        former = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks here whether any tracer wants them
        sys.settrace(interrupting(num_places, ["guard.py", "bell.py", "threading.py"]))
        try:
            assert recv(guard) == "hello"
            is_interrupted = False
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(former)
        teller = threading.Thread(target=say, args=(guard, 2, "state", "finished"), daemon=True)
        teller.start()
        teller.join(5)
        assert not teller.is_alive(), f"the lock is held after place {num_places}"
    assert num_places > 100


# --- how ranks leave -------------------------------------------------------------------------------------------------


def test_a_rank_that_left_is_not_waited_for_at_the_end_of_a_run(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else for ever: how long the others take until then is theirs to say."""
    answers = iter([None] * 20)
    monkeypatch.setattr(guard._wire, "expect", lambda: next(answers))
    say(guard, 1, "state", "left", 0, "has left the world", [], [], [])
    with pytest.raises(Deadlock, match="rank 1, which has left the world\n  rank 0 waits for rank 1, 2 in the end of"):
        guard.finish(torch.ones(1))


def test_a_send_that_broke_before_the_last_word_was_read_is_no_failure(guard: Guard) -> None:
    guard._lose(2, "Connection closed")
    say(guard, 2, "state", "left", 1, "has left the world", [], [], [])
    with pytest.raises(CommTimeout):
        recv(guard)


def test_an_interrupted_end_is_one_that_waits_no_longer(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts: list[float] = []

    def close(timeout_s: float) -> None:
        timeouts.append(timeout_s)
        if timeout_s:
            raise KeyboardInterrupt

    monkeypatch.setattr(guard._wire, "close", close)
    with pytest.raises(KeyboardInterrupt):
        guard.leave(2.0)
    assert timeouts == [2.0, 0.0]


def test_a_fork_of_the_process_says_nothing_over_its_connections(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as forked:
        forked.setattr(guard_module.os, "getpid", lambda: -1)
        guard.fail(SystemExit(0))
        assert not guard.is_mine
    assert (guard._wire.sent, guard.failure) == ([], None)  # type: ignore[attr-defined]
