"""What this machine is, as far as it can be read without measuring."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from mplab.world.rungs import num_cores


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        name: as the driver says it.
        num_sms: its streaming multiprocessors.
        memory_bytes: its own memory.
    """

    name: str
    num_sms: int
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """What a measured number was measured on.

    Args:
        cpu: its name.
        num_cores: cores that this process may use.
        memory_bytes: memory that this process may use.
        gpus: GPUs that torch sees.
        torch: its version.
        python: its version.
        system: the operating system.
        load: the load average of the last minute, programs that wanted a core; None where the system counts none.
    """

    cpu: str
    num_cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    torch: str
    python: str
    system: str
    load: float | None


def machine() -> Machine:
    """This machine, now."""
    return Machine(
        cpu=_cpu_name(),
        num_cores=num_cores(),
        memory_bytes=_memory_bytes(),
        gpus=tuple(_gpu(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)),
        torch=torch.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, properties.multi_processor_count, properties.total_memory)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_bytes() -> int:
    """The machine's memory, or less where a container has a limit; 0 where the system does not say."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text("utf-8").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
