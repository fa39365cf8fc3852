"""No check of an exercise waits for ever, whatever a solution does."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from graded import lines_of
from limits import leaves_nothing_behind as leaves_nothing_behind

from mplab.errors import CommTimeout
from mplab.homework import Report, check_mesh_groups, check_optimal_cut, check_shard_sampler
from mplab.homework.command import CHECKS
from mplab.homework.limited import TooManySteps, attempt, until_hopeless


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mplab.homework.limited.TIMEOUT_S", 0.05)
    monkeypatch.setattr("mplab.world.stop.GRACE_S", 0.02)  # to leave ranks behind that hear nothing


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_solution_that_waits_for_ever_is_stopped(check: Callable[[Any], Report]) -> None:
    """Where no line of Python runs, on all ranks; and it is not called again."""
    gate, calls = threading.Event(), []

    def waits(*_: Any) -> None:
        calls.append(threading.current_thread())
        gate.wait()

    try:
        report = check(waits)
    finally:
        gate.set()
    (line,) = [line for line in report.lines if line.outcome == "failed"]
    assert "stopped after 0." in line.seen
    assert line.case
    assert line.hint
    assert len(calls) <= 2  # ranks


def naps(*_: Any) -> None:
    while True:
        time.sleep(0.001)


def stubborn(*_: Any) -> None:
    while True:
        try:  # noqa: SIM105 (as a learner writes it)
            naps()
        except BaseException:
            pass


def test_an_interrupt_is_no_line_of_a_report() -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_mesh_groups(interrupted)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 1  # that of `leaves_nothing_behind`


@pytest.mark.parametrize("solution", [naps, stubborn])
def test_what_stops_it_leaves_all_as_it_was(solution: Any) -> None:
    """Also the alarm that somebody has set before: here that of `leaves_nothing_behind`."""
    before = signal.getsignal(signal.SIGALRM), sys.gettrace(), sys.stdout
    start_s, (rest_s, _) = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)
    assert rest_s > 0
    (line,) = [line for line in check_mesh_groups(solution).lines if line.outcome == "failed"]
    assert line.seen.startswith("stopped after 0.05 s")
    assert ("caught that" in line.seen) == (solution is stubborn)
    assert (signal.getsignal(signal.SIGALRM), sys.gettrace(), sys.stdout) == before
    left_s, again_s = signal.getitimer(signal.ITIMER_REAL)
    assert again_s == 0
    assert rest_s - (time.monotonic() - start_s) - 1 < left_s < rest_s


def test_without_an_alarm_there_is_none_afterwards() -> None:
    rest_s, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        assert attempt("here", lambda: 3, 100).result == 3
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, rest_s)


def test_a_thread_hears_no_alarm_and_its_naps_are_stopped_all_the_same() -> None:
    found: list[Report] = []
    thread = threading.Thread(target=lambda: found.append(check_mesh_groups(naps)))
    thread.start()
    thread.join()
    assert lines_of(found[0])["every call ends"].seen == "stopped after 0.05 s"


@pytest.mark.parametrize(
    ("kind", "count"), [(TooManySteps, 1), (NotImplementedError, 1), (CommTimeout, 1), (ValueError, 3)]
)
def test_what_is_hopeless_is_not_tried_again(kind: type[BaseException], count: int) -> None:
    def raises() -> None:
        raise kind

    made = until_hopeless(attempt(f"{i}", raises, 100) for i in range(3))
    assert [one.case for one in made] == ["0", "1", "2"][:count]


@pytest.mark.parametrize("exercise", ["mesh_groups", "cheapest_plan", "optimal_cut", "fastest_num_microbatches"])
def test_what_cannot_be_called_is_a_line_of_the_report(exercise: str) -> None:
    """The result in place of the function."""
    assert "'dict' object is not callable" in lines_of(CHECKS[exercise]({}))["every call ends"].seen


def test_cuts_and_batches_may_be_yielded_and_are_not_awaited_for_ever() -> None:
    def endless(*_: Any) -> Iterator[int]:
        yield from itertools.count(1)

    assert lines_of(check_optimal_cut(endless))["every stage has a layer"].outcome == "failed"
    assert lines_of(check_shard_sampler(endless))["lists of indices"].outcome == "failed"
