"""This machine by what was measured of it: its probe, and steps of plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from limits import leaves_nothing_behind as leaves_nothing_behind
from planner import LAUNCHES, ONE, SLOW, SMALL

from mplab import MplabError
from mplab.plan.cost import Link
from mplab.plan.layout import Plan
from mplab.plan.machines import Machine
from mplab.plan.search import predict
from mplab.plan.transformer import GPT3
from mplab.world.described import CALIBRATION, calibrated, described
from mplab.world.links import LinkFit
from mplab.world.machine import Gpu
from mplab.world.probe import Probe, Speed


def probed(gpus: int = 0) -> Probe:
    speed = Speed("2 cores at once", 3e11, 6e11, 2e10)
    fits = (LinkFit("CPU threads", 1e-5, 1e10, (), ()), LinkFit("CUDA streams", 2e-5, 1e11, (), ()))
    gpu = Gpu("a GPU", 100, 10**11)
    return Probe(
        cpu="a CPU",
        num_cores=2,
        memory_bytes=8 * 10**9,
        gpus=(gpu,) * gpus,
        torch="2",
        python="3",
        system="Linux",
        load=0.0,
        core=Speed("1 core", 2e11, 4e11, 1.5e10),
        all_cores=speed,
        gpu_speeds=(Speed("cuda:0", 1e13, 7e14, 2e12),) * gpus,
        links=(*fits, LinkFit("GPUs", 3e-5, 2e11, (), ())),
        notes=(),
    )


def test_the_machine_that_was_probed() -> None:
    machine = described(probed(), 4)
    assert (machine.num_devices, machine.ranks, machine.ranks_per_device) == (2, 4, 2)
    assert (machine.flops_s, machine.memory_bytes, machine.memory_bytes_s) == (1.5e11, 4e9, 2e10)
    assert machine.one_process
    assert machine.inside == Link(1e-5, 1e10)
    assert described(probed(), link=SLOW).inside == SLOW
    one_gpu, two_gpus = described(probed(1)), described(probed(2))
    assert (one_gpu.num_devices, one_gpu.flops_s, one_gpu.memory_bytes, one_gpu.memory_bytes_s) == (1, 7e14, 1e11, 4e12)
    assert (one_gpu.inside, two_gpus.inside) == (Link(2e-5, 1e11), Link(3e-5, 2e11))
    assert (machine.name, two_gpus.name) == ("2 cores of a CPU", "2 x a GPU")
    assert machine.source == two_gpus.source == "measured: python -m mplab probe"


def test_of_unequal_gpus_the_lesser_counts() -> None:
    """Whichever is the first."""
    gpus, speeds = (
        (Gpu("a GPU", 100, 10**11), Gpu("a GPU", 90, 8 * 10**10)),
        (Speed("0", 0, 7e14, 2e12), Speed("1", 0, 6e14, 1e12)),
    )
    for order in (slice(None), slice(None, None, -1)):
        machine = described(replace(probed(2), gpus=gpus[order], gpu_speeds=speeds[order]))
        assert (machine.memory_bytes, machine.flops_s, machine.memory_bytes_s) == (8e10, 6e14, 2e12)


def test_speeds_come_back_from_steps() -> None:
    machine = replace(described(probed(), 4), launch_s=3e-4)
    alone = replace(machine, num_devices=1, num_ranks=None)
    steps = {m: predict(Plan(num_microbatches=m), SMALL, 16, alone).step_s for m in (1, 4, 16)}
    found = calibrated(replace(machine, flops_s=1.0, launch_s=0.0), SMALL, 16, steps)
    assert found.flops_s == pytest.approx(machine.flops_s, rel=1e-6)
    assert replace(found, flops_s=1.0) == replace(machine, flops_s=1.0, launch_s=found.launch_s)
    assert found.launch_s == pytest.approx(3e-4, rel=1e-6)


def steps_of(machine: Machine, plans: Sequence[Plan]) -> dict[Plan, float]:
    return {plan: predict(plan, SMALL, 16, machine.with_ranks(plan.num_ranks)).step_s for plan in plans}


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_all_speeds_come_back_from_steps(num_devices: int) -> None:
    machine = replace(described(probed()), num_devices=num_devices, num_ranks=2 * num_devices, **LAUNCHES)
    nothing = replace(machine, flops_s=1.0, launch_s=0.1, call_s=0.2, update_launch_s=0.0)
    found = calibrated(nothing, SMALL, 16, steps_of(machine, CALIBRATION))
    speeds = {name: getattr(machine, name) for name in ("flops_s", *LAUNCHES)}
    assert {name: getattr(found, name) for name in speeds} == pytest.approx(speeds, rel=1e-6)
    assert replace(found, **speeds) == machine
    plan = Plan(2, 1, 2, zero=3, num_microbatches=2)
    assert steps_of(found.with_ranks(4), [plan]) == pytest.approx(steps_of(machine.with_ranks(4), [plan]))


def test_launches_are_told_from_arithmetic_that_takes_far_longer() -> None:
    """A step of GPT-3 has 1e18 FLOPs or more and some hundred launches: columns of one size are compared."""
    machine = replace(described(probed()), flops_s=1e20, num_ranks=2, **LAUNCHES)
    steps = {plan: predict(plan, GPT3, 1536, machine.with_ranks(plan.num_ranks)).step_s for plan in CALIBRATION}
    found = calibrated(replace(machine, flops_s=1.0, launch_s=0.0), GPT3, 1536, steps)
    assert {name: getattr(found, name) for name in LAUNCHES} == pytest.approx(LAUNCHES, rel=1e-4)


def test_plain_steps_say_nothing_of_the_other_speeds() -> None:
    machine = replace(described(probed()), **LAUNCHES)
    plain = [plan for plan in CALIBRATION if plan.num_ranks == 1]
    steps = steps_of(machine, plain)
    for given in (steps, {plan.num_microbatches: seconds for plan, seconds in steps.items()}):
        found = calibrated(replace(machine, flops_s=1.0, launch_s=0.0), SMALL, 16, given)
        assert found.flops_s == pytest.approx(machine.flops_s, rel=1e-6)
        assert replace(found, flops_s=machine.flops_s) == replace(machine, launch_s=found.launch_s)


def test_no_speed_is_below_zero() -> None:
    """Steps that get shorter with more launches: none take time, and the rest are fitted without them."""
    machine = replace(described(probed()), memory_bytes_s=math.inf)
    found = calibrated(machine, SMALL, 16, {1: 0.02, 2: 0.018})
    assert found.launch_s == 0
    mean = predict(Plan(), SMALL, 16, found.with_ranks(1)).step_s
    assert 0.018 < mean < 0.02
    assert mean == pytest.approx((1 / 0.02 + 1 / 0.018) / (1 / 0.02**2 + 1 / 0.018**2))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([Plan(pp=2)], r"steps of \['1 x 2 x 1 .* are no sum"),
        ([Plan(2, zero=2)], "pp=1 and zero up to 1"),
        ([Plan(tp=2)], "do not tell flops_s, launch_s, call_s, update_launch_s apart"),
        ([Plan(2)], "with dp of 2 and zero=1"),
    ],
    ids=str,
)
def test_steps_that_show_too_little(more: list[Plan], said: str) -> None:
    plans = [Plan(), Plan(num_microbatches=4), *more]
    with pytest.raises(MplabError, match=said):
        calibrated(described(probed()), SMALL, 16, dict.fromkeys(plans, 0.1))


@pytest.mark.parametrize("steps", [{1: 0.1}, {1: 0.1, 2: 0.0}, {Plan(): 0.1, Plan(2): 0.1}], ids=str)
def test_too_little_was_measured(steps: dict[int, float] | dict[Plan, float]) -> None:
    with pytest.raises(MplabError, match="two different numbers of micro-batches"):
        calibrated(ONE, SMALL, 16, steps)


def test_no_arithmetic_was_measured() -> None:
    with pytest.raises(MplabError, match="get no longer with arithmetic"):
        calibrated(replace(ONE, memory_bytes_s=math.inf), SMALL, 16, {1: 0.01, 4: 0.08})
    with pytest.raises(MplabError, match="get no longer with arithmetic"):  # less than the update alone takes
        calibrated(replace(ONE, memory_bytes_s=1.0), SMALL, 16, {1: 0.01, 4: 0.02})
