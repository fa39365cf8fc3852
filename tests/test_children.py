"""Processes that talk over gloo: their answers, their failures, and that none outlives its parent."""

from __future__ import annotations

import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from forked import CONTEXT, SUBPROCESS

from mplab import MplabError
from mplab.world import children
from mplab.world.children import GlooProcesses
from mplab.world.links import fit_link, gloo_ping_pong


def echo(rank: int, *args: object) -> list[object]:
    print("what a child prints is no reply", flush=True)
    return [rank, *args]


def fail_on_rank_1(rank: int) -> None:
    import torch.distributed as dist

    if rank == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()  # ends when the other is gone


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text("utf-8").rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let children import the functions of this file."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.usefixtures("importable")
def test_processes_answer_in_rank_order_and_a_failure_ends_them() -> None:
    with GlooProcesses(2) as gloo:
        assert gloo.call(echo, 1.5, "x") == [[0, 1.5, "x"], [1, 1.5, "x"]]
        fit = fit_link("gloo processes", (8, 4096), gloo.call(gloo_ping_pong, [8, 4096])[0])
        assert min(fit.times_s) > 0
        with pytest.raises(MplabError, match=r"gloo process 1 of 2: (?s:.*)rank 1 has had enough"):
            gloo.call(fail_on_rank_1)
        with pytest.raises(MplabError, match="ended with status"):
            gloo.call(echo)
    assert not any(is_running(process.pid) for process in gloo.processes)


def test_processes_are_gone_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "subprocess", SUBPROCESS)
    gloo = GlooProcesses(1)
    with pytest.raises(KeyboardInterrupt), gloo:
        raise KeyboardInterrupt
    (process,) = gloo.processes
    assert not is_running(process.pid)
    assert not Path(gloo._folder.name).exists()


def test_processes_that_cannot_start_are_gone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    gloo = GlooProcesses(2)
    with pytest.raises(MplabError, match="gloo process 0 of 2: it ended with status 1"), gloo:
        pass
    assert not any(is_running(process.pid) for process in gloo.processes)


def start_and_wait(pids: Connection) -> None:
    with GlooProcesses(2) as gloo:
        pids.send([process.pid for process in gloo.processes])
        time.sleep(60)


def test_processes_die_with_their_parent() -> None:
    """The parent is forked, the two processes are started as ever."""
    here, there = CONTEXT.Pipe()
    parent = CONTEXT.Process(target=start_and_wait, args=(there,))
    parent.start()
    pids = here.recv()
    assert len(pids) == 2
    assert all(map(is_running, pids))
    parent.kill()
    parent.join()
    end = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, pids))
