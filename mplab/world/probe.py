"""`probe()`: what this machine can do, measured once. `python -m mplab probe [--json]` prints it."""

from __future__ import annotations

import argparse
import dataclasses
import html
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mplab.errors import MplabError
from mplab.trace.units import columns, format_s
from mplab.world.links import LinkFit, measure_gloo, measure_threads
from mplab.world.machine import Machine, machine
from mplab.world.progress import progress
from mplab.world.rank import Rank
from mplab.world.world import World

# What is measured: matmuls of N x N and copies of so many bytes, large enough to be limited by the machine alone.
CPU_MATMUL_SIZE, CPU_COPY_BYTES = 1024, 64 << 20
GPU_MATMUL_SIZE, GPU_COPY_BYTES = 8192, 256 << 20
ALL_COPIES_BYTES = 2 << 30  # of all cores together, so that a machine of many cores has the memory for it
MEASURE_S = 0.2


@dataclass(frozen=True)
class Speed:
    """What one device reaches.

    Args:
        device: "1 core", "2 cores at once", "cuda:0", ...
        matmul_fp32_flops: floating-point operations a second in a large matmul in fp32.
        matmul_bf16_flops: the same in bf16.
        copy_bytes_s: bytes copied a second from one place of its memory to another (each is read and written once).
    """

    device: str
    matmul_fp32_flops: float
    matmul_bf16_flops: float
    copy_bytes_s: float


@dataclass(frozen=True)
class Probe(Machine):
    """A machine, and what was measured on it.

    Args:
        core: one core alone, as a thread rank has it.
        all_cores: all of them at once, each with its own work, added up.
        gpu_speeds: every GPU alone, in the order of `gpus`.
        links: alpha and beta of every rung that this machine has.
        notes: what these numbers cannot prove.
    """

    core: Speed
    all_cores: Speed
    gpu_speeds: tuple[Speed, ...]
    links: tuple[LinkFit, ...]
    notes: tuple[str, ...]

    def link(self, rung: str) -> LinkFit:
        """The fit of one rung, by its name.

        Raises:
            MplabError: it was not measured here.
        """
        for fit in self.links:
            if fit.rung == rung:
                return fit
        have = ", ".join(repr(fit.rung) for fit in self.links)
        more = "; probe(processes=True) adds 'gloo processes'" if rung == "gloo processes" else ""
        raise MplabError(f"no link {rung!r} was measured: there are {have}{more}")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold; a bandwidth without bound is None."""
        values = dataclasses.asdict(self)
        for link, fit in zip(values["links"], self.links, strict=True):
            link["residuals"] = list(fit.residuals)
            if math.isinf(fit.bandwidth_bytes_s):
                link["bandwidth_bytes_s"] = None
        return values

    def rows(self) -> list[tuple[str, str]]:
        """The table's rows: what, and how much of it."""
        memory = f"{self.memory_bytes / (1 << 30):.1f} GiB" if self.memory_bytes else "unknown"
        rows = [
            ("CPU", f"{self.cpu}, {self.num_cores} core{'s' * (self.num_cores > 1)} usable"),
            ("memory", memory),
            ("software", f"torch {self.torch}, Python {self.python}, {self.system}"),
        ]
        rows += [
            (f"cuda:{i}", f"{gpu.name}, {gpu.num_sms} SMs, {gpu.memory_bytes / (1 << 30):.1f} GiB")
            for i, gpu in enumerate(self.gpus)
        ]
        speeds = [self.core, *([self.all_cores] if self.num_cores > 1 else []), *self.gpu_speeds]
        for what, attribute, unit in (
            ("matmul fp32", "matmul_fp32_flops", "FLOP/s"),
            ("matmul bf16", "matmul_bf16_flops", "FLOP/s"),
            ("memory copy", "copy_bytes_s", "B/s"),
        ):
            rows += [(f"{what}, {s.device}", format_rate(getattr(s, attribute), unit)) for s in speeds]
        for fit in self.links:
            beta = "any bandwidth" if math.isinf(fit.bandwidth_bytes_s) else format_rate(fit.bandwidth_bytes_s, "B/s")
            error = f"the fit is off by up to {fit.worst_residual:.0%}"
            rows.append((f"link, {fit.rung}", f"α {format_s(fit.latency_s)}, 1/β {beta} ({error})"))
        return rows

    def __str__(self) -> str:
        return "\n".join([columns(self.rows(), "l"), *self.notes])

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(what)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for what, value in self.rows()
        )
        return f"<table>{cells}</table>" + "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)


_measured: Probe | None = None


def probe(processes: bool = False, refresh: bool = False) -> Probe:
    """Measure this machine, once in a process: later calls return the same numbers.

    Args:
        processes: measure gloo's link between two processes too, which takes some seconds to start.
        refresh: measure again.

    Returns:
        What it is and what it reaches; `print` it, or show it in a notebook, for a table.
    """
    global _measured
    has_gloo = _measured is not None and any(fit.rung == "gloo processes" for fit in _measured.links)
    if _measured is None or refresh:
        _measured = _measure(processes)
    elif processes and not has_gloo:
        _measured = dataclasses.replace(_measured, links=(*_measured.links, measure_gloo()))
    return _measured


def _measure(processes: bool) -> Probe:
    here = machine()
    num_gpus = len(here.gpus)
    steps: list[Callable[[], Speed | LinkFit]] = [partial(_cpu_speed, 1), partial(_cpu_speed, here.num_cores)]
    steps += [partial(_gpu_speed, i) for i in range(num_gpus)]
    devices = ["cpu", *(["cuda:0"] if num_gpus else []), *(["cuda"] if num_gpus > 1 else [])]
    steps += [partial(measure_threads, device) for device in devices]
    steps += [measure_gloo] if processes else []
    measured = [step() for step in progress(steps, len(steps), "probe")]
    core, all_cores, *gpu_speeds = [m for m in measured if isinstance(m, Speed)]
    links = tuple(m for m in measured if isinstance(m, LinkFit))
    facts = {field.name: getattr(here, field.name) for field in dataclasses.fields(Machine)}
    return Probe(**facts, core=core, all_cores=all_cores, gpu_speeds=tuple(gpu_speeds), links=links, notes=_notes(here))


def _notes(here: Machine) -> tuple[str, ...]:
    n = CPU_MATMUL_SIZE, GPU_MATMUL_SIZE
    copies = CPU_COPY_BYTES >> 20, GPU_COPY_BYTES >> 20
    gpu = (f" ({n[1]}×{n[1]} on a GPU)", f" ({copies[1]} MB on a GPU)") if here.gpus else ("", "")
    notes = [
        f"Measured here and now, medians: matmuls of {n[0]}×{n[0]}{gpu[0]}, copies of up to {copies[0]} MB{gpu[1]}, "
        "messages of 1 KB to 16 MB between two ranks."
    ]
    if here.num_cores == 1:
        notes.append("2 ranks share 1 core: their link's times include waiting for it.")
    if here.load is not None and here.load > 0.5:
        notes.append(
            f"The load average was {here.load:g} on {here.num_cores} cores: "
            "other programs ran meanwhile, and an idle machine is faster."
        )
    return tuple(notes)


def _cpu_speed(num_cores: int) -> Speed:
    """What cores do when each has one rank: alone, or all at once."""
    copy_bytes = min(CPU_COPY_BYTES, ALL_COPIES_BYTES // (2 * num_cores))
    rates = World(num_cores, "cpu").run(_speed_of_rank, CPU_MATMUL_SIZE, copy_bytes)
    name = "1 core" if num_cores == 1 else f"{num_cores} cores at once"
    return Speed(name, *(sum(of_all) for of_all in zip(*rates, strict=True)))


def _gpu_speed(index: int) -> Speed:
    device = f"cuda:{index}"
    return Speed(device, *World(1, device).run(_speed_of_rank, GPU_MATMUL_SIZE, GPU_COPY_BYTES)[0])


def _speed_of_rank(rank: Rank, matmul_size: int, copy_bytes: int) -> tuple[float, float, float]:
    """FLOP/s in fp32 and bf16, and bytes/s of a copy; all ranks measure the same at the same time."""
    flops = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(matmul_size, matmul_size, dtype=dtype, device=rank.device)
        out = torch.empty_like(a)
        flops.append(2 * matmul_size**3 / _median_s(rank, partial(torch.mm, a, a, out=out)))
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=rank.device)
    target = torch.empty_like(source)
    return flops[0], flops[1], copy_bytes / _median_s(rank, partial(target.copy_, source))


def _median_s(rank: Rank, work: Callable[[], object]) -> float:
    """The median time of one piece of work, over about `MEASURE_S` and no fewer than 3 pieces."""
    num_calls = 10 if rank.device.type == "cuda" else 1  # on a GPU some at a time: launching costs more than waiting
    times: list[float] = []
    work()
    _wait_for_device(rank)
    rank.comm.barrier()
    end = time.perf_counter() + MEASURE_S
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(num_calls):
            work()
        _wait_for_device(rank)
        times.append((time.perf_counter() - start) / num_calls)
    return statistics.median(times)


def _wait_for_device(rank: Rank) -> None:
    if rank.device.type == "cuda":
        torch.cuda.current_stream().synchronize()


def format_rate(value: float, unit: str) -> str:
    """Three digits and a prefix: "170 GFLOP/s"."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            number = value / size
            return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m mplab probe", description="Measure this machine.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args(argv).json
    result = probe(processes=True)
    print(json.dumps(result.to_dict(), indent=2, allow_nan=False) if as_json else result)
    return 0
