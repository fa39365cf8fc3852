"""Faults of processes on one host: a rank or the launcher is killed, a port is taken, a rank never comes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from limits import at_most, settings
from test_children import is_running
from torch.distributed import TCPStore

import mplab.__main__ as command_line
from mplab import MplabError, Plan, World
from mplab.world import join, parent

ROOT = Path(__file__).parents[1]
DEADLINE_S = 120.0  # for what takes ten seconds on two idle cores
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
TRAIN = ["train", "--data", "digits", "--width", "16", "--device", "cpu"]

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc, and has none")


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    """Import it into a module: none of its tests waits for ever, or changes torch's settings."""
    before = settings()
    with at_most(2 * DEADLINE_S):
        yield
    assert settings() == before


class Torchrun:
    """torchrun on this host; `with` ends it and its workers.

    Args:
        folder: for what it prints.
        arguments: of torchrun.
    """

    def __init__(self, folder: Path, *arguments: object) -> None:
        self._output = folder / "output"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *map(str, arguments)]
        with self._output.open("w") as output:
            self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output)

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *exc: object) -> None:
        workers = self.workers() if self.process.poll() is None else {}
        self.process.kill()
        self.process.wait()
        for pid in filter(is_running, workers.values()):
            os.kill(pid, signal.SIGKILL)

    @property
    def output(self) -> str:
        return self._output.read_text()

    def workers(self) -> dict[int, int]:
        """Their process ids, by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent_pid = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent_pid == self.process.pid:
                    rank = re.search(r"\0RANK=(\d+)\0", "\0" + (folder / "environ").read_text() + "\0")
                    found |= {int(rank[1]): int(folder.name)} if rank else {}
            except OSError:  # it has just ended
                continue
        return found

    def wait_for(self, is_there: Callable[[], object]) -> float:
        """When it was."""
        end_s = time.monotonic() + DEADLINE_S
        while not is_there():
            assert time.monotonic() < end_s, self.output
            time.sleep(0.005)
        return time.monotonic()


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    Plan(dp=2).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def weights(root: Path, step: int) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint."""
    manifest = json.loads((root / f"step-{step:08d}" / "manifest.json").read_text())
    return {shard["file"]: shard["sha256"] for shard in manifest["shards"]}


# --- a process is killed ---------------------------------------------------------------------------------------------


@needs_proc
def test_a_killed_rank_is_started_again_with_the_weights_of_an_unbroken_run_and_named_when_it_is_killed_again(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command begins, goes on after the newest checkpoint when torchrun gives it again, and ends with its rank."""
    train = [*TRAIN, "--plan", str(plan), "--every", "10"]
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    command = ["--nproc-per-node=2", "--max-restarts=1", "-m", "mplab", *train, "--steps", 100_000]
    goes_on = re.compile(r"goes on after step (\d+) of ")
    with Torchrun(tmp_path, *command, "--save", broken, "--resume", broken) as run:
        run.wait_for((broken / "step-00000010").exists)
        os.kill(run.workers()[1], signal.SIGKILL)
        run.wait_for(lambda: goes_on.search(run.output))
        (last,) = map(int, goes_on.findall(run.output))
        run.wait_for((broken / f"step-{last + 20:08d}").exists)

        workers = run.workers()
        os.kill(workers[1], signal.SIGKILL)
        killed_s = time.monotonic()
        assert run.wait_for(lambda: not any(map(is_running, workers.values()))) < killed_s + 5
        assert run.process.wait(DEADLINE_S) == 1
    assert len(goes_on.findall(run.output)) == 1, run.output
    assert re.search(r"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9", run.output), run.output
    assert "Signal 9 (SIGKILL)" in run.output

    monkeypatch.setenv("MPLAB_ORDERED_OUTPUT", "1")
    assert command_line.main([*train, "--steps", str(last + 20), "--save", str(unbroken)]) == 0
    for step in (last, last + 20):
        assert weights(broken, step) == weights(unbroken, step)
    assert weights(broken, last) != weights(broken, last + 20)


WORKER = """
import sys, time
from pathlib import Path
from mplab import World

def work(rank):
    Path(sys.argv[1]).touch()
    time.sleep(100)

World.from_env().run(work)
"""


@needs_proc
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker looks at times only")
def test_no_worker_outlives_a_killed_launcher(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    with Torchrun(tmp_path, "--nproc-per-node=1", tmp_path / "worker.py", tmp_path / "works") as run:
        run.wait_for((tmp_path / "works").exists)
        workers = run.workers()
        assert list(workers) == [0]
        run.process.kill()
        killed_s = time.monotonic()
        try:
            assert run.wait_for(lambda: not is_running(workers[0])) < killed_s + 2
        finally:
            if is_running(workers[0]):
                os.kill(workers[0], signal.SIGKILL)


# --- a process that ends with its parent -----------------------------------------------------------------------------

# Without the library, which parent.py does not need.
CHILD = """
import os, runpy, sys, time
from pathlib import Path

watch = runpy.run_path(sys.argv[1])["end_with_parent"]
Path(sys.argv[2]).write_text(str(os.getpid()))
kind = sys.argv[3]
if kind == "looks":
    sys.platform = "unknown"
if kind == "late":
    first = os.getppid()
    while os.getppid() == first:
        time.sleep(0.01)
if kind != "free":
    watch()
    watch()
Path(sys.argv[2] + ".watches").touch()
time.sleep(100)
"""
PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]).wait()"


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[bytes], int]]]:
    """Starts a parent with a child, which is killed after the test in any case."""
    file, parents, pids = tmp_path / "child", [], []

    def start(kind: str) -> tuple[subprocess.Popen[bytes], int]:
        parents.append(subprocess.Popen([sys.executable, "-c", PARENT, CHILD, parent.__file__, str(file), kind]))
        wait_until(lambda: file.exists() and file.read_text())
        pids.append(int(file.read_text()))
        if kind != "late":
            wait_until(Path(f"{file}.watches").exists)
        return parents[0], pids[0]

    yield start
    for process in parents:
        process.kill()
        process.wait()
    for pid in filter(is_running, pids):
        os.kill(pid, signal.SIGKILL)


def wait_until(is_there: Callable[[], object], timeout_s: float = 10.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not is_there():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["told", "looks", "late"])
def test_a_child_ends_with_its_parent(kind: str, child: Callable[[str], tuple[subprocess.Popen[bytes], int]]) -> None:
    """Told by the system, by looking where the system does not tell, and when the parent ended before it asked."""
    process, pid = child(kind)
    assert is_running(pid)
    process.kill()
    process.wait()
    wait_until(lambda: not is_running(pid), 2)


def test_another_child_does_not(child: Callable[[str], tuple[subprocess.Popen[bytes], int]]) -> None:
    process, pid = child("free")
    process.kill()
    process.wait()
    time.sleep(0.3)
    assert is_running(pid)


# --- joining, in this process ----------------------------------------------------------------------------------------


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A launch of two processes, of which this one is rank 1, and whose store is not there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    values = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(join, "JOIN_TIMEOUT_S", 0.5)
    monkeypatch.setattr(join, "end_with_parent", lambda: pytest.fail("the parent is no launcher"))
    yield monkeypatch
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_store_that_nobody_opens_is_named(variables: pytest.MonkeyPatch) -> None:
    where = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    with pytest.raises(MplabError, match=rf"rank 1 could not reach {where} \(MASTER_.*\) within 0.5 s: .*refused"):
        World.from_env(timeout_s=0.2)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_stranger_at_the_port_is_named(variables: pytest.MonkeyPatch, says: bytes) -> None:
    """One that says nothing would be waited for without end by torch alone."""
    assert join.ANSWER_TIMEOUT_S < 10
    variables.setattr(join, "ANSWER_TIMEOUT_S", 0.5)
    talks, is_over = [], threading.Event()

    def talk() -> None:
        while not is_over.is_set():
            talks.append(stranger.accept()[0])
            with suppress(OSError):
                talks[-1].sendall(says)

    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))) as stranger:
        thread = threading.Thread(target=talk)
        thread.start()
        try:
            port = stranger.getsockname()[1]
            with pytest.raises(MplabError, match=f"rank 1 (reached|could not reach) 127.0.0.1:{port} "):
                World.from_env(timeout_s=0.2)
        finally:
            is_over.set()
            socket.create_connection(stranger.getsockname()).close()
            thread.join()
            for connection in talks:
                connection.close()


@pytest.fixture
def store(variables: pytest.MonkeyPatch) -> TCPStore:
    """A launcher's."""
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    variables.setenv("MASTER_PORT", str(store.port))
    variables.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def test_a_rank_0_that_never_comes_is_named(store: TCPStore) -> None:
    with pytest.raises(MplabError, match=rf"rank 0 did not join at 127.0.0.1:{store.port} within 0.5 s; look at what"):
        World.from_env(timeout_s=0.2)


def meet(store: TCPStore, ranks: Sequence[int], size: int, timeout_s: float = 5.0) -> dict[int, Any]:
    """What ranks hear that start with a launcher's store; all others never come."""
    said: dict[int, Any] = {}

    def start(rank: int) -> None:
        client = TCPStore("127.0.0.1", store.port, None, False, wait_for_workers=False)
        try:
            said[rank], common = join._meet(rank, size, rank, client, timeout_s)
            common.set(f"of {rank}", "")
            common.wait([f"of {r}" for r in range(size)], timedelta(seconds=5))
        except MplabError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=start, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_a_rank_that_never_comes_is_named_and_the_hosts_of_those_that_came(
    store: TCPStore, variables: pytest.MonkeyPatch
) -> None:
    variables.setattr(join, "_member", lambda rank: join.Member(f"host-{'ab'[rank // 2]}", "", "cpu", ""))
    where = f"ranks did not join at 127.0.0.1:{store.port} within 1 s: rank"
    said = meet(store, [0, 1, 2], 4, timeout_s=1.0)
    came = "rank 0 on host-a, rank 1 on host-a, rank 2 on host-b did"
    assert said == dict.fromkeys([0, 1, 2], f"1 of 4 {where} 3; {came}. {join.LOOK_THERE}")
    variables.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's
    variables.setenv("GROUP_WORLD_SIZE", "2")
    assert f"2 of 4 {where} 2 (of node 1), 3 (of node 1); rank 0 on" in meet(store, [0, 1], 4, timeout_s=1.0)[1]
    variables.setenv("LOCAL_WORLD_SIZE", "3")  # of this host alone
    assert f"2 of 4 {where} 2, 3; rank 0 on" in meet(store, [0, 1], 4, timeout_s=1.0)[1]


@pytest.mark.usefixtures("variables")
def test_ranks_never_meet_those_of_an_earlier_start(store: TCPStore) -> None:
    """A launcher keeps its store, and may count its restarts otherwise on each host."""
    assert len(meet(store, [0, 1, 2], 3)[2]) == 3
    assert "rank 2; " in meet(store, [0, 1], 3, timeout_s=1.0)[1]  # the others are killed before they join
    assert "rank 0 did not join" in meet(store, [1, 2], 3, timeout_s=1.0)[1]
    said = meet(store, [0, 1, 2], 3)
    assert [len(said[rank]) for rank in range(3)] == [3, 3, 3]
    assert all(isinstance(member, join.Member) for member in said[2])


def test_a_store_that_goes_away_is_said(variables: pytest.MonkeyPatch) -> None:
    def set_(key: str, value: str) -> None:
        raise dist.DistNetworkError("connection reset by peer")

    variables.setattr(join, "_server", lambda *args: SimpleNamespace(set=set_))
    with pytest.raises(MplabError, match=r"rank 1 lost 127.0.0.1:\d+ while it waited .*: connection reset by peer"):
        World.from_env()


@pytest.mark.parametrize("how", ["refused", "no answer within 0.5 s"])
def test_ranks_that_cannot_connect_are_told_what_to_set(variables: pytest.MonkeyPatch, how: str) -> None:
    """Where a host's name leads to its loopback device, one host is refused, and the other would wait without end."""
    is_over = threading.Event()

    def connect(*args: object, **options: object) -> None:
        if how == "refused":
            raise RuntimeError(how)
        is_over.wait()

    members = [join.Member("host-a", "a", "cpu", ""), join.Member("host-b", "b", "cpu", "")]
    variables.setattr(join, "_server", lambda *args: None)
    variables.setattr(join, "_meet", lambda *args: (members, dist.HashStore()))
    variables.setattr(dist, "init_process_group", connect)
    with pytest.raises(MplabError, match=rf"rank 1 on host-b met all 2 ranks .* \({how}\): set GLOO_SOCKET_IFNAME"):
        World.from_env(timeout_s=0.2)
    is_over.set()
