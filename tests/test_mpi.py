"""Ranks as processes that mpirun started: the tests of tests/test_processes*.py over MPI, and how its processes end."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_children import is_running
from test_processes import (  # noqa: F401
    DEADLINE_S,
    FAULTS,
    FOUR,
    HERE,
    PYTHONPATH,
    TWO,
    Launch,
    test_a_deadlock_is_found_with_who_waits_where,
    test_a_late_rank_is_named_with_its_line,
    test_a_mismatch_names_every_call_and_changes_nothing,
    test_a_mismatch_of_four_names_all_four,
    test_a_pipeline_goes_on_in_another_run,
    test_a_raising_rank_stops_the_others_within_a_second,
    test_a_rank_may_end_long_after_the_others,
    test_a_rank_out_of_memory_says_how_much_and_what_to_lower,
    test_a_rank_that_raises_in_a_step_says_in_which_action,
    test_an_interrupt_is_heard_within_a_second,
    test_collectives_inside_of_backward_on_one_thread_a_rank,
    test_data_parallelism_trains_like_that_of_thread_ranks_to_the_bit,
    test_every_process_has_the_timeline_of_all,
    test_messages_of_one_run_do_not_reach_the_next,
    test_pipelines_train_like_those_of_thread_ranks_to_the_bit,
    test_results_and_ledgers_equal_those_of_thread_ranks,
    test_the_conformance_suite_passes,
    variables,
)
from test_processes_hybrid import (  # noqa: F401
    test_a_gpt_trains_as_over_thread_ranks_to_the_bit as test_a_gpt_trains_in_every_axis_as_over_thread_ranks,
)
from test_processes_hybrid import test_one_call_trains_in_every_process  # noqa: F401
from test_processes_tensor import (  # noqa: F401
    test_a_gpt_trains_as_over_thread_ranks_to_the_bit as test_a_gpt_trains_in_tensors_as_over_thread_ranks,
)

from mplab import MplabError, Plan, World
from mplab.comm import mpi as mpi_module
from mplab.comm.mpi import MpiWire
from mplab.comm.wire import Parcel
from mplab.world import join, join_mpi
from mplab.world.launch import is_launched

TENSOR = "tensor", "tensor_sequence"
# All ranks are gone that long after one of them failed.
END_S = 5.0
TIMEOUT_S = 1.0  # to join


def why_no_mpi() -> str | None:
    if importlib.util.find_spec("mpi4py") is None:
        return 'needs mpi4py: pip install -e ".[test]"'
    return None if shutil.which("mpirun") else "needs an mpirun on the PATH: Debian's openmpi-bin has one"


class Mpirun(Launch):
    """Processes that mpirun started; it ends when all of them have.

    Args:
        num_ranks: how many.
        folder: for what they write.
        arguments: of Python.
    """

    backend = "mpi"

    def __init__(self, num_ranks: int, folder: Path, *arguments: object) -> None:
        if reason := why_no_mpi():
            pytest.skip(reason)
        self.folder, self.num_ranks = folder, num_ranks
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": PYTHONPATH,
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        python = [sys.executable, "-W", "error::ResourceWarning", *map(str, arguments)]
        command = ["mpirun", "-n", str(num_ranks), "--oversubscribe", *python]
        with (folder / "errors.0").open("w") as errors:
            self.processes = [subprocess.Popen(command, env=environment, stdout=errors, stderr=errors)]
        self._ended_s = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        self.processes[0].wait()
        self._ended_s = time.time()

    @classmethod
    def scenarios(cls, num_ranks: int, folder: Path, *names: str) -> Mpirun:
        """Of process_ranks.py, one after the other."""
        return cls(num_ranks, folder, "-m", "mpi4py", HERE / "process_ranks.py", folder, *names)

    def __exit__(self, *exc: object) -> None:
        (process,) = self.processes
        process.terminate()  # mpirun ends its processes, which it could not do once it is killed
        process.wait(END_S)

    def wait(self, ranks: list[int] | None = None) -> list[int]:
        """The exit code of mpirun alone."""
        return [self.processes[0].wait(DEADLINE_S)]

    def ends(self, since: str, within_s: float = END_S) -> int:
        """The exit code; all processes are gone a few seconds after somebody wrote a file."""
        self.wait_for(since)
        (code,) = self.wait()
        while self._ended_s == 0.0:
            time.sleep(0.001)
        assert self._ended_s - (self.folder / since).stat().st_mtime < within_s, self.errors()
        assert not [pid for pid in self.pids() if is_running(pid)]
        return code

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.folder.glob("*.pid")]

    def errors(self, rank: int | None = None) -> str:
        return (self.folder / "errors.0").read_text()[-5000:]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Mpirun]]:
    """Both at a time: they wait a lot, for faults to be noticed."""
    of_two = [name for name in TWO if name not in (*FOUR, "fabric")]
    of_four = [name for name in FOUR if name != "fabric"]
    with (
        Mpirun.scenarios(4, tmp_path_factory.mktemp("four"), *of_four, *TENSOR, "hybrid", "parallelized") as four,
        Mpirun.scenarios(2, tmp_path_factory.mktemp("two"), *of_two, *FAULTS, "killed") as two,
    ):
        yield {2: two, 4: four}


@pytest.fixture(scope="module")
def four(launches: dict[int, Mpirun]) -> Mpirun:
    assert launches[4].wait() == [0], launches[4].errors()
    return launches[4]


@pytest.fixture(scope="module")
def two(launches: dict[int, Mpirun]) -> Mpirun:
    assert launches[2].ends("killed.1.pid") == 128 + signal.SIGKILL, launches[2].errors()
    return launches[2]


@pytest.fixture
def launch(four: Mpirun) -> Mpirun:
    """Where the tests of other launchers take two, and four."""
    return four


# --- how processes end -----------------------------------------------------------------------------------------------


def test_a_killed_process_ends_all_and_mpirun_names_it(two: Mpirun) -> None:
    assert "process rank 1 " in two.errors()
    assert "exited on signal 9 (Killed)" in two.errors()


SCRIPT = """
import os
import pathlib
import sys
import time

how, folder = sys.argv[1], pathlib.Path(sys.argv[2])
me = int(os.environ["OMPI_COMM_WORLD_RANK"])
(folder / f"{me}.pid").write_text(str(os.getpid()))
if me == 1 and how == "does not join":
    from mpi4py import MPI
if me == 1 and how.startswith("does not"):
    time.sleep(100)

import torch

from mplab import MplabError, World
from mplab.world import join


def work(rank):
    total = rank.comm.all_reduce(torch.tensor([rank.index + 1.0]))
    (folder / f"{me}.works").touch()
    if how == "raises" and me == 1:
        raise ValueError("on purpose")
    if how == "hangs" or (how == "raises" and len(sys.argv) > 3):
        time.sleep(100)
    rank.comm.barrier()
    return total.item()


if how.startswith("does not"):
    join.JOIN_TIMEOUT_S = float(sys.argv[3])
(folder / f"{me}.starts").touch()
world = World.from_env(join.JOIN_TIMEOUT_S)
assert world.run(work) == [3.0]
try:
    World.from_env()
except MplabError as error:
    print(error)
if me == 0:  # nobody receives it any more
    time.sleep(0.5)
    world._guard._wire.send([1], ["too late"], torch.ones(5_000_000))
world.close()
if me == 1:
    time.sleep(1)
print(world)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_of_two_processes(tmp_path: Path, script: Path) -> None:
    with Mpirun(2, tmp_path, script, "ends", tmp_path) as run:
        assert run.wait() == [0], run.errors()
        assert run.errors().count("this process has joined the others already: use the world that") == 2
        is_bound = "share" not in run.errors()  # mpirun gives each its own core, if there are two
        assert is_bound == (len(os.sched_getaffinity(0)) > 1)


def test_a_failure_ends_all_processes_with_a_traceback(tmp_path: Path, script: Path) -> None:
    with Mpirun(2, tmp_path, "-m", "mpi4py", script, "raises", tmp_path) as run:
        assert run.ends("1.works") == 1
        assert "ValueError: on purpose" in run.errors()
        assert "PeerFailure: rank 0 stopped in barrier(): rank 1 failed" in run.errors()


def test_a_failure_ends_those_who_never_look(tmp_path: Path, script: Path) -> None:
    """Also without mpi4py's own way to end all: else MPI would wait for them at exit."""
    with Mpirun(2, tmp_path, script, "raises", tmp_path, "while the other one sleeps") as run:
        assert run.ends("1.works") == 1
        assert "ValueError: on purpose" in run.errors()


def test_a_rank_that_does_not_join_is_named(tmp_path: Path, script: Path) -> None:
    with Mpirun(2, tmp_path, script, "does not join", tmp_path, TIMEOUT_S) as run:
        assert run.ends("0.starts", TIMEOUT_S + END_S) == 1
        assert "1 of 2 ranks did not join within 1 s: rank 1" in run.errors()


def test_a_rank_that_does_not_even_begin_ends_all(tmp_path: Path, script: Path) -> None:
    """MPI itself would wait for it for ever, deaf to Ctrl-C."""
    with Mpirun(2, tmp_path, script, "does not start", tmp_path, TIMEOUT_S) as run:
        assert run.ends("0.starts", TIMEOUT_S + END_S) == 1
        assert "Timeout (0:00:01)!" in run.errors()
        assert " in _world" in run.errors()


def test_an_interrupted_launch_ends(tmp_path: Path, script: Path) -> None:
    with Mpirun(2, tmp_path, script, "hangs", tmp_path) as run:
        run.wait_for("0.works")
        run.processes[0].send_signal(signal.SIGINT)
        sent_s = time.monotonic()
        assert run.wait() != [0]
        assert time.monotonic() - sent_s < 2
        while time.monotonic() - sent_s < END_S and any(is_running(pid) for pid in run.pids()):
            time.sleep(0.05)  # what mpirun has killed may take a moment to be gone
        assert not [pid for pid in run.pids() if is_running(pid)]


def test_train_of_the_command_line(tmp_path: Path) -> None:
    Plan(2, 1, 2, zero=1).save(tmp_path / "plan.json")
    train = ["-m", "mpi4py", "-m", "mplab", "train", "--plan", tmp_path / "plan.json", "--check-serial"]
    small = ["--width", "16", "--layers", "1", "--sequence", "8", "--steps", "3", "--device", "cpu"]
    with Mpirun(4, tmp_path, *train, *small) as run:
        assert run.wait() == [0], run.errors()
        assert "World of 4 ranks: processes (mpi) on 1 host; this one is rank 0" in run.errors()
        assert run.errors().count("as rounding does") == 1


# --- the wire, over an MPI of this process --------------------------------------------------------------------------


class FakeRequest:
    def __init__(self) -> None:
        self.is_done = True

    def Test(self) -> bool:
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
        self.is_late = self.is_broken = False  # what is received or sent from now on; the network
        self._calling = threading.Lock()

    def _request(self) -> FakeRequest:
        self.requests.append(FakeRequest())
        self.requests[-1].is_done = not self.is_late
        return self.requests[-1]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self.is_broken or not self._calling.acquire(blocking=False):
            raise RuntimeError("the network is down" if self.is_broken else "two calls at a time")
        time.sleep(1e-4)
        yield
        self._calling.release()

    def Isend(self, data: Any, peer: int, tag: int) -> FakeRequest:
        with self._alone():
            self._all[peer].arriving.append((self.rank, tag, data.tobytes()))
            return self._request()

    def Improbe(self, status: Any) -> Any:
        with self._alone():
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


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(Status=SimpleNamespace, BYTE=1)))
    made = Pair()
    yield made
    for wire in made.wires:
        wire.close(0.0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mplab")]


def test_words_and_tensors_arrive_as_they_were_sent(pair: Pair) -> None:
    small, large = torch.arange(6.0).view(2, 3), torch.arange(20_000, dtype=torch.int16)
    for words, x, borrowed in (("a", None, False), (["b", 1], small.T, True), ("c", large, True), ("d", large, False)):
        pair.wires[0].send([1], words, x, borrowed)
    pair.wires[0].send([1], "e", [small, small])
    pair.wait_for(lambda: len(pair.came[1]) == 5)
    words, xs, _, memories = zip(*pair.came[1], strict=True)
    assert words == ("a", ["b", 1], "c", "d", "e")
    for x, want in zip(xs[1:], (small.T, large, large, torch.cat([small.view(-1)] * 2)), strict=True):
        torch.testing.assert_close(x, want, rtol=0, atol=0)
    assert [memory is not None for memory in memories] == [False, False, True, False, False]


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


def test_a_network_that_is_down_is_told_for_those_who_have_more_to_say(pair: Pair) -> None:
    pair.wires[0].send([1], "last")
    pair.wait_for(lambda: pair.came[1])
    for comm in pair.comms:
        comm.is_broken = True
    pair.wait_for(lambda: not pair.wires[0]._thread.is_alive() and not pair.wires[1]._thread.is_alive())
    assert pair.lost == [(0, 1, "the network is down")]


def test_a_send_that_fails_is_told_too(pair: Pair) -> None:
    pair.wires[0].close(0.0)  # it receives no more, and hears of nothing by itself
    pair.comms[0].is_broken = True
    pair.wires[0].send([1], "not even sent")
    assert pair.lost == [(0, 1, "the network is down")]


def test_what_nobody_receives_is_kept_where_it_is(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi_module, "_unread", [])
    pair.comms[0].is_late = True
    pair.wires[0].send([1], "never there")
    start_s = time.monotonic()
    pair.wires[0].flush(0.05)
    assert time.monotonic() - start_s > 0.04
    pair.wires[0].close(0.05)
    (kept,) = mpi_module._unread
    assert kept.requests == pair.comms[0].requests


def test_to_close_takes_no_longer_than_the_others_talk(pair: Pair) -> None:
    for wire, peer in zip(pair.wires, (1, 0), strict=True):
        wire.send([peer], "last")
    start_s = time.monotonic()
    for wire in pair.wires:
        wire.close(30.0)
    assert time.monotonic() - start_s < 10
    assert [len(came) for came in pair.came] == [1, 1]


# --- which launcher, in this process ---------------------------------------------------------------------------------


@pytest.fixture
def mpirun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The variables of Open MPI's mpirun, for a process of two."""
    for name in (*join.VARIABLES, *join_mpi.VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    return monkeypatch


def mpi(size: int, thread_level: int) -> Any:
    """As much of mpi4py as is looked at first."""
    return SimpleNamespace(
        COMM_WORLD=SimpleNamespace(size=size, rank=0),
        Get_library_version=lambda: "Some MPI v3.2.1\nof somebody",
        Query_thread=lambda: thread_level,
        THREAD_SERIALIZED=2,
    )


def test_mpi4py_is_missing(mpirun: pytest.MonkeyPatch) -> None:
    mpirun.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(MplabError, match=r"under mpirun needs mpi4py, which could not .*: pip install mpi4py"):
        World.from_env()


def test_an_mpirun_of_another_mpi(mpirun: pytest.MonkeyPatch) -> None:
    mpirun.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi(1, 3)))
    with pytest.raises(MplabError, match=r"2 processes were started, and .* sees 1: .* belongs to Some MPI v3.2.1$"):
        World.from_env()


def test_an_mpi_for_one_thread_alone(mpirun: pytest.MonkeyPatch) -> None:
    mpirun.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi(2, 1)))
    with pytest.raises(MplabError, match="MPI was initialised for one thread alone"):
        World.from_env()


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"])
def test_a_launcher_is_known_by_its_variables(mpirun: pytest.MonkeyPatch, name: str) -> None:
    mpirun.delenv("OMPI_COMM_WORLD_SIZE")
    assert not is_launched()
    mpirun.setenv(name, "0")
    assert is_launched()


def test_without_a_launcher_the_error_names_both(mpirun: pytest.MonkeyPatch) -> None:
    mpirun.delenv("OMPI_COMM_WORLD_SIZE")
    with pytest.raises(MplabError, match=r"`torchrun --nproc-per-node=2 script.py` or `mpirun -n 2 python -m mpi4py"):
        World.from_env()


def test_the_variables_of_torchrun_come_first(variables: pytest.MonkeyPatch) -> None:  # noqa: F811
    variables.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with World.from_env() as world:
        assert (world.size, world.backend) == (1, "gloo")
