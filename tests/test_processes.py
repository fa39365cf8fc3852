"""Ranks as processes: what `World.from_env()` gives under a launcher, and what faults lead to.

A launch starts its processes once, and they go through many scenarios (tests/process_ranks.py), each in a new world.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import process_ranks
import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from mplab import MplabError, Rank, World
from mplab.world import join

HERE = Path(__file__).parent
DEADLINE_S = 240.0  # for what takes forty seconds on two idle cores
PYTHONPATH = os.pathsep.join(path for path in (str(HERE.parent), os.environ.get("PYTHONPATH")) if path)

# Every strategy trains over four. Two have all that a strategy may call, and what goes another way between two.
TWO = [
    "same",
    "fabric",
    "conformance",
    "backward",
    "timeline",
    "between_runs",
    "late_but_in_time",
    "train",
    "in_buckets",
    "in_two_runs",
    *(["tensor_llama"] if importlib.util.find_spec("transformers") else []),
]
FAULTS = [name for name in process_ranks.FAULTS if name not in ("cycle_of_groups", "hanging", "killed")]
FOUR = [
    "same",
    "fabric",
    "conformance_of_groups",
    "timeline",
    "train",
    "data_parallel",
    "in_buckets",
    "in_shards",
    "tensor",
    "tensor_sequence",
    "hybrid",
    "parallelized",
    "cycle_of_groups",
    "cycle",
    "early",
    "raising",
    "differ_large",
    "late",
]


class Launch:
    """Processes with a launcher's variables, and a store that outlives their worlds, like torchrun's.

    Args:
        num_ranks: how many.
        folder: for what they write.
        scenarios: of process_ranks.py, one after the other.
    """

    backend = "gloo"
    gpus: Mapping[str, str] = {"CUDA_VISIBLE_DEVICES": ""}  # a machine may have fewer than there are processes

    def __init__(self, num_ranks: int, folder: Path, *scenarios: str) -> None:
        self.folder, self.num_ranks = folder, num_ranks
        self._store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        environment = os.environ | {
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": PYTHONPATH,
            **self.gpus,
        }
        command = [
            sys.executable,
            "-W",
            "error::ResourceWarning",
            str(HERE / "process_ranks.py"),
            str(folder),
            *scenarios,
        ]
        self.processes = self._start(command, environment)

    def _start(self, command: list[str], environment: dict[str, str]) -> list[subprocess.Popen[bytes]]:
        """A process for each rank."""
        started = []
        for rank in range(self.num_ranks):
            mine = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (self.folder / f"errors.{rank}").open("w") as errors:
                started.append(subprocess.Popen(command, env=mine, stderr=errors, stdout=errors))
        return started

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, ranks: list[int] | None = None) -> list[int]:
        """Exit codes, of all or some of them."""
        end_s = time.monotonic() + DEADLINE_S
        chosen = [self.processes[r] for r in (range(self.num_ranks) if ranks is None else ranks)]
        return [process.wait(max(0.1, end_s - time.monotonic())) for process in chosen]

    def wait_for(self, name: str) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not (self.folder / name).exists():
            assert time.monotonic() < end_s, self.errors()
            time.sleep(0.01)

    def said(self, scenario: str) -> list[Any]:
        """What each rank saw of a scenario."""
        files = [self.folder / f"{scenario}.{r}.json" for r in range(self.num_ranks)]
        assert all(file.exists() for file in files), self.errors()
        return [json.loads(file.read_text()) for file in files]

    def errors(self, rank: int | None = None) -> str:
        ranks = range(self.num_ranks) if rank is None else [rank]
        return "".join((self.folder / f"errors.{r}").read_text() for r in ranks)[-3000:]


class Forked(Launch):
    """Its ranks are forks of one process that has loaded torch, for that takes three seconds of each."""

    def _start(self, command: list[str], environment: dict[str, str]) -> list[subprocess.Popen[bytes]]:
        with (self.folder / "errors").open("w") as errors:
            forks = {"FORKS": str(self.num_ranks)}
            return [subprocess.Popen(command, env=environment | forks, stderr=errors, start_new_session=True)]

    def __exit__(self, *exc: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.processes[0].pid, signal.SIGKILL)
        self.processes[0].wait()

    def wait(self, ranks: list[int] | None = None) -> list[int]:
        """Exit codes of all."""
        assert self.processes[0].wait(DEADLINE_S) == 0, self.errors()
        codes: list[int] = json.loads((self.folder / "codes.json").read_text())
        return codes

    def errors(self, rank: int | None = None) -> str:
        return (self.folder / "errors").read_text()[-3000:] + super().errors(rank)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Launch]]:
    """Both at a time: they wait a lot, for faults to be noticed."""
    with (
        Forked(4, tmp_path_factory.mktemp("four"), *FOUR, "killed") as four,
        Forked(2, tmp_path_factory.mktemp("two"), *TWO, *FAULTS, "killed") as two,
    ):
        yield {2: two, 4: four}


@pytest.fixture(scope="module")
def two(launches: dict[int, Launch]) -> Launch:
    assert launches[2].wait() == [0, -signal.SIGKILL], launches[2].errors()
    return launches[2]


@pytest.fixture(scope="module")
def four(launches: dict[int, Launch]) -> Launch:
    assert launches[4].wait() == [0, -signal.SIGKILL, 0, 0], launches[4].errors()
    return launches[4]


@pytest.fixture(params=["two", "four"])
def launch(request: pytest.FixtureRequest) -> Launch:
    found: Launch = request.getfixturevalue(request.param)
    return found


# --- the same as thread ranks ----------------------------------------------------------------------------------------


def test_results_and_ledgers_equal_those_of_thread_ranks(launch: Launch) -> None:
    of_threads = World(launch.num_ranks, "cpu").run(process_ranks.program)
    assert min(len(results) for results, _ in of_threads) > 100
    assert launch.said("same") == json.loads(json.dumps(of_threads))


def test_results_and_ledgers_over_a_fabric_equal_those_by_mail(launch: Launch) -> None:
    assert launch.said("fabric") == launch.said("same")


def test_the_conformance_suite_passes(two: Launch, four: Launch) -> None:
    assert two.said("conformance") == [len(process_ranks.CHECKS)] * 2
    assert four.said("conformance_of_groups") == [len(process_ranks.OF_GROUPS)] * 4


def test_collectives_inside_of_backward_on_one_thread_a_rank(two: Launch) -> None:
    assert two.said("backward") == [[[2.0] * 3, 1]] * 2


def test_every_process_has_the_timeline_of_all(launch: Launch) -> None:
    said, n = launch.said("timeline"), launch.num_ranks
    assert all(s["events"] == said[0]["events"] and s["forward"] == said[0]["forward"] for s in said)
    lanes = [("compute", "forward", 0, 1), ("wait", "all_reduce", 0, None)]
    for rank in range(n):
        assert all(repr((rank, *lane)) in said[0]["events"] for lane in lanes)
    assert len(said[0]["events"]) == 3 * n
    # On one axis: all forwards overlap, since each began when the run before had ended everywhere.
    assert max(start for start, _ in said[0]["forward"]) < min(end for _, end in said[0]["forward"]) + 0.05
    assert said[1]["text"].startswith(
        f"World of {n} ranks: processes ({launch.backend}) on 1 host; this one is rank 1, on cpu"
    )


def test_messages_of_one_run_do_not_reach_the_next(two: Launch) -> None:
    assert two.said("between_runs")[1] == (-process_ranks.X).tolist()


def test_a_rank_may_end_long_after_the_others(two: Launch) -> None:
    assert two.said("late_but_in_time") == [[None]] * 2


# --- pipelines -------------------------------------------------------------------------------------------------------


def test_pipelines_train_like_those_of_thread_ranks_to_the_bit(launch: Launch) -> None:
    """Losses, weights and messages of several schedules, with layers that move between steps."""
    of_threads = World(launch.num_ranks, "cpu").run(process_ranks.train)
    for got, want in zip(launch.said("train"), of_threads, strict=True):
        assert got[0] == want[0]
        assert got[1] == json.loads(json.dumps(want[1]))
        assert len(got[0]) > 100


@pytest.mark.parametrize("scenario", ["data_parallel", "in_buckets", "in_shards"])
def test_data_parallelism_trains_like_that_of_thread_ranks_to_the_bit(four: Launch, scenario: str) -> None:
    """Losses, weights and messages of every way to do it."""
    assert_same_as_of_threads(four, scenario)


def test_buckets_of_two_are_summed_as_by_thread_ranks_to_the_bit(two: Launch) -> None:
    """Between two, what came is added in one call."""
    assert_same_as_of_threads(two, "in_buckets")


def assert_same_as_of_threads(launch: Launch, scenario: str) -> None:
    of_threads = World(launch.num_ranks, "cpu").run(getattr(process_ranks, scenario))
    for got, want in zip(launch.said(scenario), of_threads, strict=True):
        assert got[0] == want[0]
        assert got[1] == json.loads(json.dumps(want[1]))
        assert len(got[0]) > 50


def test_a_pipeline_goes_on_in_another_run(two: Launch) -> None:
    first, second = two.said("in_two_runs")
    assert first == second == pytest.approx(process_ranks.serial_chain("sgd", 4, tied=True).losses)


def test_a_rank_that_raises_in_a_step_says_in_which_action(two: Launch) -> None:
    waiting, raised = two.said("raising_in_a_step")
    assert raised["notes"] == ["(rank 1 of 2 in forward of micro-batch 0; all other ranks were told to stop)"]
    assert (waiting["kind"], "rank 1 failed with KeyError: 'no such loss'" in waiting["text"]) == ("PeerFailure", True)


# --- tensors, and every axis at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensors_are_cut_as_by_thread_ranks_to_the_bit(four: Launch, sequence_parallel: bool) -> None:
    of_threads = World(4, "cpu").run(process_ranks.in_tensors, sequence_parallel)
    assert_alike(four.said("tensor_sequence" if sequence_parallel else "tensor"), of_threads)
    names = {message[0] for message in of_threads[0][1]}
    assert ("reduce_scatter" in names) == sequence_parallel
    assert len(of_threads[0][0]) > 40


def test_a_llama_is_cut_as_by_thread_ranks_to_the_bit(two: Launch) -> None:
    pytest.importorskip("transformers")
    of_threads = World(2, "cpu").run(process_ranks.llama_in_tensors, process_ranks.llama())
    assert_alike(two.said("tensor_llama"), of_threads)
    assert len(of_threads[0][0]) > 40


def test_a_gpt_trains_in_every_axis_as_over_thread_ranks_to_the_bit(four: Launch) -> None:
    of_threads = World(4, "cpu").run(process_ranks.in_every_axis)
    assert_alike(four.said("hybrid"), of_threads)
    for _, messages in four.said("hybrid"):
        assert {len(message[1]) for message in messages} >= {2, 4}
    assert len(of_threads[0][0]) > 40


def assert_alike(said: list[Any], of_threads: list[Any]) -> None:
    for got, want in zip(said, of_threads, strict=True):
        assert got[0] == want[0]
        assert got[1] == json.loads(json.dumps(want[1]))
        assert got[0] == said[0][0], "whole, and the same on every rank"


def test_one_call_trains_in_every_process(four: Launch) -> None:
    assert four.said("parallelized") == [process_ranks.by_one_call(World(4, "cpu"))] * 4


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_raising_rank_stops_the_others_within_a_second(launch: Launch) -> None:
    for rank, said in enumerate(launch.said("raising")):
        if rank == 1:
            assert (said["kind"], said["text"]) == ("KeyError", "'no such layer'")
            assert said["notes"] == [f"(rank 1 of {launch.num_ranks} in forward; all other ranks were told to stop)"]
        else:
            assert said["kind"] == "PeerFailure"
            assert "rank 1 failed with KeyError: 'no such layer'" in said["text"]
            where = ("all_reduce(op='sum', shape=(6), float32)", "barrier()")  # some may be in the one before
            assert said["text"].startswith(tuple(f"rank {rank} stopped in {call}: " for call in where))
        assert said["again"] in ("PeerFailure", "KeyError")  # the world has failed for good
        assert said["took_s"] < 1


def test_a_rank_out_of_memory_says_how_much_and_what_to_lower(two: Launch) -> None:
    waiting, raised = two.said("out_of_memory")
    assert raised["kind"] == "RuntimeError"
    assert "DefaultCPUAllocator: can't allocate memory" in raised["text"]
    where, lower = raised["notes"]
    assert where == "(rank 1 of 2 in forward; all other ranks were told to stop)"
    assert lower.startswith("rank 1 ran out of memory on cpu when it asked for 1,125,899,906,842,624 bytes. To lower")
    assert (waiting["kind"], waiting["notes"]) == ("PeerFailure", [])
    assert "rank 1 failed with RuntimeError: [enforce fail" in waiting["text"]
    assert max(waiting["took_s"], raised["took_s"]) < 1


@pytest.mark.parametrize("scenario", [name for name in FAULTS if name.startswith("differ")])
def test_a_mismatch_names_every_call_and_changes_nothing(two: Launch, scenario: str) -> None:
    lines = (HERE / "process_ranks.py").read_text().splitlines()
    for said in two.said(scenario):
        assert said["kind"] == "CollectiveMismatch", said
        for rank in (0, 1):
            (row,) = [line for line in said["text"].splitlines() if line.startswith(f"  rank {rank} called ")]
            number = int(row.split("process_ranks.py, line ")[1].split(",")[0])
            assert "r.comm" in lines[number - 1]
        assert said["untouched"]
        assert said["took_s"] < 1


def test_a_mismatch_of_four_names_all_four(four: Launch) -> None:
    for said in four.said("differ_large"):
        assert said["kind"] == "CollectiveMismatch"
        for rank, call in enumerate(["shape=(100000)", "shape=(2, 50000)", "barrier()", "barrier()"]):
            assert [call in line for line in said["text"].splitlines() if f"rank {rank} called" in line] == [True]
        assert said["untouched"]


@pytest.mark.parametrize("scenario", ["early", "ring", "cycle", "cycle_of_groups", "unsent_on_the_way"])
def test_a_deadlock_is_found_with_who_waits_where(two: Launch, four: Launch, scenario: str) -> None:
    launch = four if scenario in FOUR else two
    for rank, said in enumerate(launch.said(scenario)):
        assert said["kind"] == "Deadlock", said
        rows = said["text"].splitlines()[1:]
        assert [row.split()[:2] for row in rows] == [["rank", str(r)] for r in range(launch.num_ranks)]
        waiting = [row for row in rows if "waits for rank" in row]
        assert len(waiting) >= (1 if scenario == "early" else launch.num_ranks)
        assert all("of group [" in row and "process_ranks.py, line" in row for row in waiting)
        is_computing = scenario == "early" and rank > 1
        assert said["took_s"] < (4 if is_computing else 2)


def test_a_late_rank_is_named_with_its_line(launch: Launch) -> None:
    timeout_s = process_ranks.TIMEOUT_S
    for rank, said in enumerate(launch.said("late")):
        assert said["kind"] == "CommTimeout", said
        assert f"waited {timeout_s:g} s in barrier(); late: rank 1" in said["text"]
        (row,) = [row for row in said["text"].splitlines() if row.startswith("  rank 1 ")]
        assert "rank 1 runs at process_ranks.py, line" in row
        number = int(row.split("line ")[1].split(",")[0])
        assert "the late line" in (HERE / "process_ranks.py").read_text().splitlines()[number - 1]
        assert said["took_s"] < timeout_s + (1 if rank != 1 else 4)


def test_an_interrupt_is_heard_within_a_second(two: Launch) -> None:
    waiting, interrupted = two.said("interrupted")
    assert interrupted["kind"] == "KeyboardInterrupt", interrupted
    assert interrupted["took_s"] < 0.3 + 1
    assert (waiting["kind"], "rank 1 failed with KeyboardInterrupt" in waiting["text"]) == ("PeerFailure", True)


def test_a_killed_process_is_missed(launch: Launch) -> None:
    for rank in [r for r in range(launch.num_ranks) if r != 1]:
        said = json.loads((launch.folder / f"killed.{rank}.json").read_text())
        assert said["kind"] == "PeerFailure"
        assert "rank 1's process is gone" in said["text"]
        assert said["took_s"] < 1


# --- how processes end -----------------------------------------------------------------------------------------------


def test_a_failure_ends_all_processes_with_a_traceback(tmp_path: Path) -> None:
    with Launch(2, tmp_path, "exit_raising") as launch:
        assert launch.wait() == [1, 1], launch.errors()
        assert "KeyError: 'no such layer'" in launch.errors(1)
        assert "PeerFailure: rank 0 stopped" in launch.errors(0)


def test_one_that_waits_for_a_rank_that_hangs_ends(tmp_path: Path) -> None:
    with Launch(2, tmp_path, "exit_hanging") as launch:
        assert launch.wait([0]) == [1], launch.errors()
        assert launch.processes[1].poll() is None
        assert "late: rank 1" in launch.errors(0)


def test_an_interrupted_process_ends(tmp_path: Path) -> None:
    with Launch(2, tmp_path, "exit_hanging") as launch:
        launch.wait_for("hanging.0.pid")
        time.sleep(0.5)
        launch.processes[0].send_signal(signal.SIGINT)
        sent_s = time.monotonic()
        assert launch.wait([0]) == [-signal.SIGINT], launch.errors()
        assert time.monotonic() - sent_s < 5  # Python's own end, too
        assert "KeyboardInterrupt" in launch.errors(0)


SCRIPT = """
import torch
from mplab import World

def work(rank):
    total = rank.comm.all_reduce(torch.tensor([rank.index + 1.0]))
    if rank.index == 0:
        print(f"the sum is {total.item():g}")
    rank.comm.barrier()
    return rank.index

results = World.from_env().run(work)
assert len(results) == 1
"""


def test_a_script_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout) == (0, "the sum is 3\n"), done.stderr


# --- joining, in this process ----------------------------------------------------------------------------------------


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A launch of one process, on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(join, "JOIN_TIMEOUT_S", 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def test_without_a_launcher_the_error_names_what_is_missing(variables: pytest.MonkeyPatch) -> None:
    variables.delenv("RANK")
    variables.delenv("MASTER_PORT")
    with pytest.raises(MplabError, match="would have set RANK, MASTER_PORT: start the script with `torchrun"):
        World.from_env()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE='two' is no whole number"),
        ("RANK", "3", "RANK=3 with WORLD_SIZE=1: ranks go from 0 to 0"),
        ("RANK", "-1", "RANK=-1"),
    ],
)
def test_variables_that_make_no_sense(variables: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    variables.setenv(name, value)
    with pytest.raises(MplabError, match=message):
        World.from_env()


def test_a_time_out_is_a_positive_number(variables: pytest.MonkeyPatch) -> None:
    with pytest.raises(MplabError, match="timeout_s=0"):
        World.from_env(timeout_s=0)


def test_ranks_that_never_join_are_named(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("WORLD_SIZE", "3")
    with pytest.raises(MplabError, match=r"2 of 3 ranks did not join at 127.0.0.1:\d+ within 1 s: rank 1, 2"):
        World.from_env(timeout_s=0.5)


def test_a_port_in_use_is_named(variables: pytest.MonkeyPatch) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        variables.setenv("MASTER_PORT", str(port))
        with pytest.raises(MplabError, match=f"rank 0 could not open 127.0.0.1:{port}"):
            World.from_env(timeout_s=0.5)


def test_gloo_listens_on_loopback_for_ranks_of_one_host_unless_told_otherwise(variables: pytest.MonkeyPatch) -> None:
    name = "GLOO_SOCKET_IFNAME"
    variables.delenv(name, raising=False)
    with join._loopback(True):
        assert os.environ[name] in ("lo", "lo0")
    with join._loopback(False):
        assert name not in os.environ
    variables.setenv(name, "eth7")
    with join._loopback(True):
        assert os.environ[name] == "eth7"


def test_more_processes_than_gpus_are_refused(variables: pytest.MonkeyPatch) -> None:
    variables.setattr(torch.cuda, "is_available", lambda: True)
    variables.setattr(torch.cuda, "device_count", lambda: 1)
    variables.setenv("LOCAL_RANK", "1")
    with pytest.raises(MplabError, match="LOCAL_RANK=1, but this host has 1 GPU: start at most one process for each"):
        World.from_env()


def test_a_world_of_one_process_and_another_one_after_it(variables: pytest.MonkeyPatch) -> None:
    def work(rank: Rank, factor: int) -> float:
        return factor * rank.comm.all_reduce(torch.ones(3)).sum().item()

    for _ in range(2):
        with World.from_env() as world:
            assert world.run(work, 2) == [6.0]
            assert world.run(lambda rank: rank.generator.initial_seed()) == [0]
            assert world.ledgers == [world.rank.comm.ledger]
            assert world.size == 1
            assert world.notes == ()
            with pytest.raises(MplabError, match="initialised in this process already"):
                World.from_env()
        assert not dist.is_initialized()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("mplab")]
        with pytest.raises(MplabError, match="this world is closed"):
            world.run(work, 2)


def test_rank_0s_store_outlives_its_world(variables: pytest.MonkeyPatch) -> None:
    """The others may look for the next one before rank 0 has left."""
    World.from_env().close()
    assert not join._trouble("127.0.0.1", int(os.environ["MASTER_PORT"]))


def test_a_fork_of_a_rank_does_not_leave_for_it(variables: pytest.MonkeyPatch) -> None:
    with World.from_env() as world:
        with variables.context() as forked:
            forked.setattr(os, "getpid", lambda: -1)
            world.close()
        assert world.run(lambda rank: rank.index) == [0]
