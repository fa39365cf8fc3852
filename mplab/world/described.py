"""The machine that was probed, as the planner describes machines; and its speeds from steps that really ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from mplab.errors import MplabError
from mplab.plan.cost import Link
from mplab.plan.layout import Plan
from mplab.plan.machines import Machine
from mplab.plan.predict import predict
from mplab.plan.transformer import Transformer
from mplab.world.probe import Probe


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
        source="measured: python -m mplab probe",
    )


def calibrated(machine: Machine, model: Transformer, batch: int, step_s: Mapping[int, float]) -> Machine:
    """The same machine with the `flops_s` and `launch_s` that plain training shows, in place of large matrix products.

    With m micro-batches a step takes a time for arithmetic, which is always the same, and m times what launching the
    layers takes: a line through the measured times, by least squares of the relative errors.

    Args:
        machine: whose other figures stay.
        model: what was trained, on one rank.
        batch: samples of a step.
        step_s: measured seconds of a step, for two numbers of micro-batches or more.

    Raises:
        MplabError: fewer than two, times that are not above 0, or that no arithmetic can be found in.
    """
    if len(step_s) < 2 or min(step_s.values()) <= 0:
        raise MplabError(
            f"steps {dict(step_s)}: give seconds above 0 for two different numbers of micro-batches or more, as {{1: "
            "0.02, 8: 0.03}"
        )
    alone = dataclasses.replace(
        machine, num_devices=1, devices_per_host=None, num_ranks=None, between=None, flops_s=1.0, launch_s=0.0
    )
    of_one = {m: predict(Plan(num_microbatches=m), model, batch, alone) for m in step_s}
    num_layers = model.num_layers + 2
    times = np.array([seconds - of_one[m].update_s for m, seconds in step_s.items()])
    columns = np.array([(of_one[m].compute_s, m * num_layers) for m in step_s]) / times[:, None]
    scale = columns.max(0)
    seconds_a_flop, launch_s = np.linalg.lstsq(columns / scale, np.ones(len(times)))[0] / scale
    if seconds_a_flop <= 0:
        raise MplabError(
            f"steps {dict(step_s)} get no longer with arithmetic: measure a larger model, on an idle machine, with "
            "numbers of micro-batches further apart"
        )
    return dataclasses.replace(machine, flops_s=float(1 / seconds_a_flop), launch_s=max(0.0, float(launch_s)))
