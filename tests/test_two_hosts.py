"""Training on two hosts under torchrun: as on one host, in the time that the link allows, and told when it is cut."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from test_process_faults import DEADLINE_S, ENVIRONMENT, TRAIN, weights
from test_process_faults import limited as limited
from two_hosts import ADDRESSES, DEVICE, NAMES, NoHosts, TwoHosts

import mplab.__main__ as command_line
from mplab import Plan

# How the launchers find each other: each host has its number, or one of them is said to be the place to meet.
STATIC = ["--node-rank={host}", "--master-addr=10.77.0.1", "--master-port=29500"]
C10D = [
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=10.77.0.1:29400",
    "--rdzv-conf=is_host={is_first}",
    "--local-addr={address}",
]


class Launch:
    """torchrun on both hosts, with one process on each.

    Args:
        hosts: both.
        folder: for what they print.
        rendezvous: `STATIC` or `C10D`.
        command: what torchrun starts, and its arguments.
    """

    def __init__(self, hosts: TwoHosts, folder: Path, rendezvous: list[str], *command: object) -> None:
        self._folder = folder
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": DEVICE}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        self.launchers: list[subprocess.Popen[bytes]] = []
        for host, address in enumerate(ADDRESSES):
            mine = [text.format(host=host, is_first=int(host == 0), address=address) for text in rendezvous]
            arguments = [*torchrun, *mine, *map(str, command)]
            self.launchers.append(hosts.start(host, arguments, folder / f"output.{host}", environment))

    def wait(self) -> list[int]:
        """Exit codes."""
        return [launcher.wait(DEADLINE_S) for launcher in self.launchers]

    def wait_for(self, *names: str) -> None:
        """Until there are files of these names."""
        end_s = time.monotonic() + DEADLINE_S
        while not all((self._folder / name).exists() for name in names):
            is_over = time.monotonic() > end_s or all(launcher.poll() is not None for launcher in self.launchers)
            assert not is_over, self.output(0) + self.output(1)
            time.sleep(0.005)

    def output(self, host: int) -> str:
        return (self._folder / f"output.{host}").read_text()


def two_hosts(settings: Mapping[str, int]) -> TwoHosts:
    """Both, with settings of the kernel; without them the test is skipped."""
    try:
        return TwoHosts(settings)
    except NoHosts as error:
        pytest.skip(f"needs namespaces of its own and TUN devices: {error}")


def test_two_hosts_train_like_one_through_an_outage_of_3_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, root = tmp_path / "plan.json", tmp_path / "runs"
    Plan(dp=2).save(plan)
    arguments = [*TRAIN, "--plan", str(plan), "--steps", "60", "--every", "10"]
    with two_hosts({"net/ipv4/tcp_retries2": 5}) as both:
        launch = Launch(both, tmp_path, STATIC, "-m", "mplab", *arguments, "--save", root)
        launch.wait_for("runs/step-00000010")
        both.link.is_cut = True
        time.sleep(3)
        num_saved = len(list(root.glob("step-*")))
        both.link.is_cut = False
        assert launch.wait() == [0, 0], launch.output(0) + launch.output(1)
    assert num_saved < 6  # else nobody was cut off
    said = launch.output(0)
    assert "World of 2 ranks: processes (gloo) on 2 hosts; this one is rank 0, on cpu" in said
    monkeypatch.setenv("MPLAB_ORDERED_OUTPUT", "1")
    assert command_line.main([*arguments, "--save", str(tmp_path / "one host")]) == 0
    losses = r"first loss \d\.\d+, last loss \d\.\d+ after 60 steps"
    assert re.findall(losses, said) == re.findall(losses, capsys.readouterr().out) != []
    for step in (10, 60):
        assert weights(root, step) == weights(tmp_path / "one host", step)


WORKER = """
import json, sys, time
from pathlib import Path
import torch
from mplab import World

world = World.from_env(timeout_s=2)
me, folder = world.rank.index, Path(sys.argv[1])

def tell(name, what):
    # whoever finds the file finds all of it
    (folder / f"{name}.{me}.new").write_text(json.dumps(what))
    (folder / f"{name}.{me}.new").rename(folder / f"{name}.{me}")

def is_there(name):
    while not (folder / name).exists():
        time.sleep(0.01)

def exchange(rank, num_messages, size_bytes):
    x = torch.ones(size_bytes // 4)
    rank.comm.barrier()
    start_s = time.perf_counter()
    for _ in range(num_messages):
        rank.comm.all_reduce_(x)
    return time.perf_counter() - start_s

def until_it_breaks(rank):
    (folder / f"talks.{me}").touch()
    while True:
        rank.comm.barrier()

tell("joined", [str(world), world.notes])
is_there("slow")
said = []
for num_messages, size_bytes in json.loads(sys.argv[2]):
    took_s = world.run(exchange, num_messages, size_bytes)[0]
    messages = [message for message in world.ledgers[0].messages if message.op == "all_reduce_"]
    said.append([took_s, len(messages), sum(message.sent_bytes for message in messages)])
tell("said", said)
is_there("fast")
try:
    world.run(until_it_breaks)
except BaseException as error:
    tell("broke", [time.monotonic(), type(error).__name__, str(error)])
    raise
"""


def test_a_slow_link_takes_the_time_of_its_messages_and_a_cut_one_is_told_on_both_hosts(tmp_path: Path) -> None:
    """T = N (alpha + beta B): an all-reduce of two ranks whose tensors don't fit into a frame.

    gloo sends when the receiver has said that it is ready: to the frame, and when that has come, to the rest. That is
    four ways through the link, and the rest takes its time to get into it.
    """
    (tmp_path / "worker.py").write_text(WORKER)
    sizes = [(4, 4_000), (4, 60_000)] * 4
    with two_hosts({"net/ipv4/tcp_retries2": 4}) as both:
        launch = Launch(both, tmp_path, C10D, tmp_path / "worker.py", tmp_path, json.dumps(sizes))
        launch.wait_for("joined.0", "joined.1")
        for host in (0, 1):
            text, notes = json.loads((tmp_path / f"joined.{host}").read_text())
            assert text.startswith(f"World of 2 ranks: processes (gloo) on 2 hosts; this one is rank {host}, on cpu")
            assert notes == ["several hosts: each rank's times count from its own start"]
        both.link.delay_s, both.link.bits_s = 0.025, 8e6
        (tmp_path / "slow").touch()
        launch.wait_for("said.0", "said.1")
        for host in (0, 1):
            measured = [tuple(row) for row in json.loads((tmp_path / f"said.{host}").read_text())]
            for num_messages, num_bytes in {row[1:] for row in measured}:
                took_s = min(row[0] for row in measured if row[1:] == (num_messages, num_bytes))
                predicted_s = num_messages * 4 * 0.025 + num_bytes * 8 / 8e6
                assert took_s == pytest.approx(predicted_s, rel=0.1), (num_messages, num_bytes, measured)
            assert {row[1:] for row in measured} == {(num, num * size) for num, size in sizes}
        both.link.delay_s = both.link.bits_s = 0.0
        (tmp_path / "fast").touch()
        launch.wait_for("talks.0", "talks.1")
        both.link.is_cut, cut_s = True, time.monotonic()
        launch.wait_for("broke.0", "broke.1")
        for host in (0, 1):
            broke_s, kind, text = json.loads((tmp_path / f"broke.{host}").read_text())
            assert kind == "CommTimeout"
            assert text.startswith(f"rank {host} waited 2 s in barrier(); late: rank {1 - host}\n")
            assert "does not answer: its process is stopped or busy, or the network between is slow or down" in text
            assert broke_s < cut_s + 2 + 1
        assert all(launch.wait()), launch.output(0) + launch.output(1)
        assert time.monotonic() < cut_s + 20
    for host in (0, 1):
        assert "CommTimeout" in launch.output(host)


def test_hosts_leave_nothing_behind(tmp_path: Path) -> None:
    """All that runs on them ends with them, and they have the names and settings that they were given."""
    say = "hostname; cat /proc/sys/net/ipv4/tcp_retries2"
    said, expected = tmp_path / "said", f"{NAMES[1]}\n7\n"
    with two_hosts({"net/ipv4/tcp_retries2": 7}) as both:
        sleeper = both.start(1, ["sh", "-c", f"{say}; sleep 1000 & sleep 1000"], said, os.environ)
        end_s = time.monotonic() + 10
        while said.read_text() != expected and time.monotonic() < end_s:
            time.sleep(0.01)
        assert said.read_text() == expected
        assert Path("/proc/sys/net/ipv4/tcp_retries2").read_text() != "7\n"
    assert sleeper.returncode not in (None, 0)
    assert b"sleep\x001000" not in b"".join(commands())


def commands() -> Iterator[bytes]:
    """Of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_bytes()
