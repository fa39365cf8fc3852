"""What ranks print."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from contextlib import redirect_stdout

import pytest
from limits import leaves_nothing_behind as leaves_nothing_behind

import mplab.world.output
import mplab.world.world
from mplab import World
from mplab.world import Rank


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_lines_come_in_rank_order_with_their_rank_before_them(capsys: pytest.CaptureFixture[str]) -> None:
    def run(rank: Rank) -> None:
        time.sleep(0.01 * (3 - rank.index))
        print("I am", rank.index)
        print("two\nlines")

    print("before")
    World(3, device="cpu").run(run)
    print("after")
    want = [f"[rank {r}] {said}" for r in range(3) for said in (f"I am {r}", "two", "lines")]
    assert lines(capsys) == ["before", *want, "after"]


def test_lines_of_a_rank_keep_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    def run(rank: Rank) -> None:
        for i in range(100):
            print(i)
            rank.comm.barrier()

    World(4, device="cpu").run(run)
    assert lines(capsys) == [f"[rank {r}] {i}" for r in range(4) for i in range(100)]


def test_a_line_that_is_written_in_pieces_and_one_that_never_ends(capsys: pytest.CaptureFixture[str]) -> None:
    def run(rank: Rank) -> None:
        for piece in ("a", "b", "c"):
            print(piece, end=" ")
            rank.comm.barrier()
        sys.stdout.write("\nno newline")

    World(2, device="cpu").run(run)
    assert lines(capsys) == [f"[rank {r}] {said}" for r in range(2) for said in ("a b c ", "no newline")]


def test_long_lines_empty_lines_and_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def run(rank: Rank) -> None:
        if rank.index == 0:
            print("x" * 100_000)
        if rank.index == 1:
            print()
            print("", end="")
            print(flush=True)

    World(3, device="cpu").run(run)
    assert [line.rstrip() for line in lines(capsys)] == ["[rank 0] " + "x" * 100_000, "[rank 1]", "[rank 1]"]


def test_writelines_and_flush_go_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    def run(rank: Rank) -> None:
        sys.stdout.writelines(["one\n", "two\n"])
        sys.stdout.flush()
        print("three", flush=True)

    World(2, device="cpu").run(run)
    assert lines(capsys) == [f"[rank {r}] {said}" for r in range(2) for said in ("one", "two", "three")]


def test_what_was_printed_before_an_error_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def run(rank: Rank) -> None:
        print("still here", rank.index)
        if rank.index == 1:
            print("and", end="")
            raise ValueError("gone")
        rank.comm.barrier()

    with pytest.raises(ValueError, match="gone"):
        World(2, device="cpu").run(run)
    assert lines(capsys) == ["[rank 0] still here 0", "[rank 1] still here 1", "[rank 1] and"]


def test_a_rank_prints_while_another_fails(capsys: pytest.CaptureFixture[str]) -> None:
    printing = threading.Event()

    def run(rank: Rank) -> None:
        if rank.index == 1:
            printing.wait(10)
            raise ValueError("meanwhile")
        while True:
            print("talking")
            printing.set()

    with pytest.raises(ValueError, match="meanwhile"):
        World(2, device="cpu").run(run)
    said = lines(capsys)
    assert said
    assert set(said) == {"[rank 0] talking"}


def test_the_callers_other_threads_and_stderr_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    ready, done = threading.Event(), threading.Event()

    def bystander() -> None:
        ready.wait(10)
        print("not a rank")
        done.set()

    thread = threading.Thread(target=bystander)
    thread.start()

    def run(rank: Rank) -> None:
        print("a rank")
        print("to stderr", file=sys.stderr)
        ready.set()
        done.wait(10)

    World(1, device="cpu").run(run)
    thread.join()
    captured = capsys.readouterr()
    assert sorted(captured.out.splitlines()) == ["[rank 0] a rank", "not a rank"]
    assert captured.err == "to stderr\n"


def test_ranks_of_an_inner_world_say_both_of_their_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    def outer(rank: Rank) -> None:
        print("outer")
        World(2, device="cpu").run(lambda inner: print("inner"))
        rank.comm.barrier()
        print("outer again")

    World(2, device="cpu").run(outer)
    assert lines(capsys) == [
        f"[rank {r}] {said}" for r in range(2) for said in ("outer", "[rank 0] inner", "[rank 1] inner", "outer again")
    ]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been printed is shown every millisecond instead of every second."""
    monkeypatch.setattr(mplab.world.output, "SHOW_EVERY_S", 1e-3)
    monkeypatch.setattr(mplab.world.world, "WATCH_EVERY_S", 1e-3)
    monkeypatch.delenv("MPLAB_ORDERED_OUTPUT", raising=False)


def test_long_work_is_not_silent(impatient: None) -> None:
    def run(rank: Rank) -> None:
        if rank.index == 1:
            print("working")
            print("half a", end="")
        until = time.monotonic() + 20
        while "[rank 1] working\n" not in shown.getvalue():
            assert time.monotonic() < until, "nothing was shown during the run"
            time.sleep(1e-3)
        rank.comm.barrier()
        print(" line" if rank.index == 1 else "late")

    with redirect_stdout(io.StringIO()) as shown:
        World(2, device="cpu").run(run)
    first, *rest = shown.getvalue().splitlines()
    assert first == "[rank 1] working"
    assert sorted(rest) == ["[rank 0] late", "[rank 1] half a line"]  # in which order depends on when it is shown


def test_ordered_output_waits_for_the_end(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nbval, where two runs of a cell must print the same."""
    monkeypatch.setenv("MPLAB_ORDERED_OUTPUT", "1")

    def run(rank: Rank) -> None:
        if rank.index == 1:
            print("early")
            time.sleep(0.1)
            assert shown.getvalue() == ""
        rank.comm.barrier()
        if rank.index == 0:
            print("late")

    with redirect_stdout(io.StringIO()) as shown:
        World(2, device="cpu").run(run)
    assert shown.getvalue() == "[rank 0] late\n[rank 1] early\n"


def test_no_line_is_lost_or_doubled_when_shown_while_it_is_written(impatient: None) -> None:
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def run(rank: Rank) -> None:
            for i in range(3000):
                print(i)

        with redirect_stdout(io.StringIO()) as shown:
            World(3, device="cpu").run(run)
    finally:
        sys.setswitchinterval(switch_s)
    for r in range(3):
        assert [line for line in shown.getvalue().splitlines() if line.startswith(f"[rank {r}]")] == [
            f"[rank {r}] {i}" for i in range(3000)
        ]


def test_a_fork_of_a_rank_shows_what_it_prints_itself(capfd: pytest.CaptureFixture[str]) -> None:
    def work(rank: Rank) -> None:
        if os.fork() == 0:
            print("from a fork", flush=True)
            os._exit(0)
        os.wait()

    World(1, "cpu").run(work)
    assert capfd.readouterr().out == "from a fork\n"
