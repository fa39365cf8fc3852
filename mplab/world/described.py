"""The machine that was probed, as the planner describes machines; and its speeds from steps that really ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mplab.errors import MplabError
from mplab.plan.cost import Link
from mplab.plan.layout import Plan
from mplab.plan.machines import Machine
from mplab.plan.predict import predict
from mplab.plan.stages import Array
from mplab.plan.transformer import Transformer
from mplab.world.probe import Probe

CALIBRATION = (
    *(Plan(num_microbatches=m) for m in (1, 2, 4)),
    *(Plan(dp=2, zero=zero) for zero in (0, 1)),
    *(Plan(tp=2, num_microbatches=m) for m in (1, 4)),
)
"""Plans whose steps show all that `calibrated` looks for, on a machine that thread ranks share."""

_FIGURES = ("flops_s", "launch_s", "call_s", "update_launch_s")


def described(probed: Probe, num_ranks: int | None = None, link: Link | None = None) -> Machine:
    """This machine for `mplab.plan.search`: its GPUs if it has any, else its cores.

    A core's share of the memory and of what all cores reach at once in fp32; a GPU's own, alone, in bf16.

    Args:
        probed: what `probe()` measured.
        num_ranks: that shall run; None: one a device.
        link: an emulated one, as `World(link=...)` has it; None: the one that was measured between thread ranks.

    Raises:
        MplabError: a number of ranks that the devices can't share evenly.
    """
    if probed.gpus:
        num_devices, memory_bytes = len(probed.gpus), min(gpu.memory_bytes for gpu in probed.gpus)
        flops_s = min(speed.matmul_bf16_flops for speed in probed.gpu_speeds)
        copied_bytes_s = min(speed.copy_bytes_s for speed in probed.gpu_speeds)
        rung, name = "GPUs" if num_devices > 1 else "CUDA streams", f"{num_devices} x {probed.gpus[0].name}"
    else:
        num_devices, memory_bytes = probed.num_cores, probed.memory_bytes // probed.num_cores
        flops_s = probed.all_cores.matmul_fp32_flops / num_devices
        copied_bytes_s = probed.all_cores.copy_bytes_s / num_devices
        rung, name = "CPU threads", f"{num_devices} cores of {probed.cpu}"
    return Machine(
        name,
        num_devices,
        flops_s,
        memory_bytes,
        2 * copied_bytes_s,  # each byte is read and written
        link or probed.link(rung).link,
        num_ranks=num_ranks,
        one_process=True,
        source="measured: python -m mplab probe",
    )


def calibrated(
    machine: Machine, model: Transformer, batch: int, step_s: Mapping[int, float] | Mapping[Plan, float]
) -> Machine:
    """The same machine with the speeds that real steps show, in place of that of large matrix products.

    What a step takes is a sum: of its FLOPs, layers launched, collectives and parameters updated, each times what one
    of them takes. These figures are found by least squares of the relative errors; none is below 0.

    Args:
        machine: whose other figures stay.
        model: what was trained.
        batch: samples of a step.
        step_s: measured seconds of a step. Those of plain training, by number of micro-batches or by plan, show
            `flops_s` and `launch_s`. Those of plans of more ranks, such as `CALIBRATION`, show `call_s` and
            `update_launch_s`, too.

    Raises:
        MplabError: too few different steps, times that are not above 0, plans whose steps are no such sum, or steps
            that no arithmetic can be found in.
    """
    said = {f"{key}": seconds for key, seconds in step_s.items()}
    plans = {Plan(num_microbatches=key) if isinstance(key, int) else key: s for key, s in step_s.items()}
    if sum(plan.num_ranks == 1 for plan in plans) < 2 or min(plans.values()) <= 0:
        raise MplabError(
            f"steps {said}: give seconds above 0 for two different numbers of micro-batches or more, as {{1: "
            "0.02, 8: 0.03}"
        )
    if no_sums := [f"{plan}" for plan in plans if plan.pp > 1 or plan.zero > 1]:
        raise MplabError(
            f"steps of {no_sums} are no sum of what they do, for some of it goes on at the same time: give those of "
            "plans with pp=1 and zero up to 1"
        )
    names = _FIGURES if any(plan.num_ranks > 1 for plan in plans) else _FIGURES[:2]

    def seconds(**figures: float) -> Array:
        """Of each plan, where of these four these alone take any time."""
        values: dict[str, Any] = dict.fromkeys(names[1:], 0.0) | {"flops_s": 1e300} | figures
        other = dataclasses.replace(machine, **values)
        return np.array([predict(plan, model, batch, other.with_ranks(plan.num_ranks)).step_s for plan in plans])

    times, rest = np.array([*plans.values()]), seconds()
    columns = np.stack([(seconds(**{name: 1.0}) - rest) / times for name in names], axis=1)
    if np.linalg.matrix_rank(columns / columns.max(0)) < len(names):
        raise MplabError(
            f"steps of {[f'{plan}' for plan in plans]} do not tell {', '.join(names)} apart: add steps of a plan with "
            "tp of 2, with dp of 2, and with dp of 2 and zero=1"
        )
    found: dict[str, Any] = dict(zip(names, _least_squares(columns, 1 - rest / times), strict=True))
    if found["flops_s"] <= 0:
        raise MplabError(
            f"steps {said} get no longer with arithmetic: measure a larger model, on an idle machine, with "
            "numbers of micro-batches further apart"
        )
    return dataclasses.replace(machine, **found | {"flops_s": 1 / found["flops_s"]})


def _least_squares(columns: Array, values: Array) -> list[float]:
    """The best weights of the columns; what would be below 0 is left out, the lowest first."""
    scale, kept = columns.max(0), [*range(columns.shape[1])]
    while True:
        found = np.linalg.lstsq(columns[:, kept] / scale[kept], values)[0]
        if len(kept) == 1 or found.min() >= 0:
            break
        kept.pop(int(found.argmin()))
    weights = np.zeros(columns.shape[1])
    weights[kept] = found / scale[kept]
    return [float(weight) for weight in weights]
