"""Machines by their figures: from their files, refused where they can't be, and which link an axis goes through."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from limits import leaves_nothing_behind as leaves_nothing_behind
from planner import CLUSTER, FAST, FOUR, HOSTS, LAUNCHES, ONE, SLOW, SMALL

from mplab import MplabError
from mplab.plan.cost import Link
from mplab.plan.layout import Plan
from mplab.plan.machines import MACHINES, Machine
from mplab.plan.search import predict

SHARED = Machine(
    "cores", 2, 1e11, 4e9, math.inf, Link(0, math.inf), num_ranks=4, one_process=True, source="by hand", **LAUNCHES
)


@pytest.mark.parametrize("machine", [*MACHINES.values(), ONE, HOSTS, SHARED], ids=lambda machine: machine.name)
def test_a_machine_comes_back_from_its_file(machine: Machine, tmp_path: Path) -> None:
    machine.save(tmp_path / "machine.json")
    assert Machine.load(tmp_path / "machine.json") == machine
    json.loads((tmp_path / "machine.json").read_text(), parse_constant=pytest.fail)  # no Infinity, which is no JSON


def test_a_machine_that_a_person_wrote() -> None:
    text = """{"name": "mine", "num_devices": 2, "flops_s": 1e12, "memory_bytes": 8e9, "memory_bytes_s": null,
               "inside": {"latency_s": 1e-5, "bandwidth_bytes_s": null}}"""
    assert Machine.from_json(text) == Machine("mine", 2, 1e12, 8e9, math.inf, Link(1e-5, math.inf))


def test_the_machines_that_come_along() -> None:
    assert {name: (m.num_devices, m.ranks, m.ranks_per_host) for name, m in MACHINES.items()} == {
        "H200": (1, 1, 1),
        "8 x H100": (8, 8, 8),
        "64 x 8 H100": (512, 512, 8),
    }
    assert all(m.source and m.flops_s < 989e12 for m in MACHINES.values())
    assert str(CLUSTER).startswith("64 x 8 H100: 512 devices, 8 a host; each 593 TFLOP/s, 80 GB; links: 3.00 µs")
    assert "; each 593 GFLOP/s, " in str(replace(CLUSTER, flops_s=593e9))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_devices": 0}, "num_devices=0: must be a whole number"),
        ({"num_devices": True}, "num_devices=True"),
        ({"num_devices": None}, "num_devices=None"),
        ({"num_ranks": 2.0}, "num_ranks=2.0"),
        ({"devices_per_host": 0}, "devices_per_host=0"),
        ({"flops_s": 0}, "flops_s=0: must be a number above 0"),
        ({"flops_s": math.inf}, "flops_s=inf"),
        ({"memory_bytes": "80 GB"}, "memory_bytes='80 GB'"),
        ({"memory_bytes_s": -1.0}, "memory_bytes_s=-1.0"),
        ({"launch_s": -1.0}, "launch_s=-1.0: must be a number of 0 or more"),
        ({"launch_s": math.nan}, "launch_s=nan"),
        ({"call_s": -1.0}, "call_s=-1.0: must be a number of 0 or more"),
        ({"update_launch_s": math.inf}, "update_launch_s=inf"),
        ({"one_process": 1}, "one_process=1: must be True or False"),
        ({"inside": None}, "inside=None: must be a Link"),
        ({"between": 3}, "between=3: must be a Link"),
        ({"devices_per_host": 3}, "4 devices, 3 a host: all hosts have as many"),
        ({"devices_per_host": 2}, "2 hosts: say what links them"),
    ],
    ids=str,
)
def test_a_machine_that_cannot_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(MplabError, match="machine 'four' can't be") as refused:
        replace(FOUR, **values)
    assert said in str(refused.value)


def test_all_faults_of_a_machine_at_once() -> None:
    with pytest.raises(MplabError) as refused:
        Machine("none", 0, 0, 0, 0, FAST)
    assert len(str(refused.value).splitlines()) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "a machine is no list"),
        ('{"name": "x", "cores": 2}', r"a machine has not \['cores'\]"),
        ('{"name": "x", "num_devices": 2}', "a machine lacks flops_s, memory_bytes, memory_bytes_s, inside"),
        (FOUR.to_json().replace("latency_s", "latency"), r"the link 'inside' has not \['latency'\]"),
        (FOUR.to_json().replace("1e-06", "null"), "latency_s=None"),
        (FOUR.to_json().replace('"memory_bytes": 1000000000.0', '"memory_bytes": null'), "memory_bytes=None"),
    ],
)
def test_a_file_that_is_no_machine(text: str, said: str) -> None:
    with pytest.raises(MplabError, match=said):
        Machine.from_json(text)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(MplabError, match="is no file"):
        Machine.load(tmp_path / "machine.json")


@pytest.mark.parametrize("raw", [b"", b"\x89PNG\r\n\xff\xfe\x00", b'{"name": "\xff"}'])
def test_a_file_of_something_else(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_bytes(raw)
    with pytest.raises(MplabError, match="a machine is a JSON object, and this is not JSON"):
        Machine.load(tmp_path / "machine.json")


def test_which_link_an_axis_goes_through() -> None:
    """4 ranks a host, numbered host by host: an axis of n ranks with stride k stays inside where n k divides 4."""
    inside = {(n, k) for n, k in product((1, 2, 4, 8, 16), repeat=2) if n * k <= 16 and HOSTS.link(n, k) == FAST}
    assert inside == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}
    assert replace(HOSTS, num_ranks=32).link(8, 1) == FAST  # 2 ranks a device: 8 a host
    assert replace(HOSTS, num_ranks=3).link(3, 1) == FAST  # one host has them all
    assert replace(HOSTS, num_ranks=6).link(3, 1) == SLOW


def test_ranks_that_share_devices() -> None:
    shared = FOUR.with_ranks(8)
    assert (shared.ranks, shared.ranks_per_device, shared.ranks_per_host) == (8, 2, 8)
    assert shared.rank_memory_bytes == 5e8
    fewer = FOUR.with_ranks(2)
    assert (fewer.ranks, fewer.ranks_per_device, fewer.rank_memory_bytes) == (2, 1, 1e9)


def test_ranks_that_take_turns_on_fewer_devices_of_a_host() -> None:
    uneven = FOUR.with_ranks(6)
    assert (uneven.ranks, uneven.ranks_per_device, uneven.ranks_per_host) == (6, 1.5, 6)
    assert uneven.rank_memory_bytes == 5e8  # two of them share a device
    crowded, roomy = (predict(Plan(dp=6), SMALL, 6, machine) for machine in (uneven, replace(uneven, num_devices=6)))
    assert crowded.compute_s == pytest.approx(1.5 * roomy.compute_s)
    with pytest.raises(MplabError, match="18 ranks on 16 devices of several hosts"):
        HOSTS.with_ranks(18)
