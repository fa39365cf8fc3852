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
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
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
    test_a_gpt_trains_in_every_axis_as_over_thread_ranks_to_the_bit,
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
    test_one_call_trains_in_every_process,
    test_pipelines_train_like_those_of_thread_ranks_to_the_bit,
    test_results_and_ledgers_equal_those_of_thread_ranks,
    test_tensors_are_cut_as_by_thread_ranks_to_the_bit,
    test_the_conformance_suite_passes,
    variables,
)

from mplab import MplabError, Plan, World
from mplab.world import join, join_mpi
from mplab.world.launch import is_launched

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
            "CUDA_VISIBLE_DEVICES": "",
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
    of_two = [name for name in TWO if name not in (*FOUR, "fabric", "tensor_llama")]
    of_four = [name for name in FOUR if name != "fabric"]
    with (
        Mpirun.scenarios(4, tmp_path_factory.mktemp("four"), *of_four) as four,
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
        while not (folder / "0.works").exists():  # the other one has its sum
            time.sleep(0.01)
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
    Plan(2, 1, 1, zero=1).save(tmp_path / "plan.json")
    train = ["-m", "mpi4py", "-m", "mplab", "train", "--plan", tmp_path / "plan.json", "--check-serial"]
    small = ["--width", "16", "--layers", "1", "--sequence", "8", "--steps", "3", "--device", "cpu"]
    with Mpirun(2, tmp_path, *train, *small) as run:
        assert run.wait() == [0], run.errors()
        assert "World of 2 ranks: processes (mpi) on 1 host; this one is rank 0" in run.errors()
        assert run.errors().count("as rounding does") == 1


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
