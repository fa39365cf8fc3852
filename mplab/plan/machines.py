"""Machines by their figures: measured ones, and ones that are only described, in a small JSON file or in `MACHINES`."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mplab.plan.cost import Link
from mplab.plan.json_object import check_names, read_file, read_object
from mplab.plan.layout import refuse

_LINKS = ("inside", "between")
_LAUNCHES = ("launch_s", "call_s", "update_launch_s")


@dataclass(frozen=True)
class Machine:
    """Devices (GPUs, or cores of a CPU) on one host or several, and the links between them.

    Args:
        name: "8 x H100".
        num_devices: of all hosts.
        flops_s: FLOPs a second that one device reaches in matrix products.
        memory_bytes: of one device.
        memory_bytes_s: bytes a second that a device reads or writes of its memory; `math.inf`: updates take no time.
        inside: link between two devices of a host.
        between: link between two devices of different hosts; None where there is one host.
        devices_per_host: how many of them; None: all.
        num_ranks: that run on it; None: one a device. More ranks than devices share them.
        launch_s: seconds that forward and backward of a layer take with one micro-batch however small it is: Python,
            and torch's way to its kernels.
        call_s: seconds that each collective, or message between stages, takes besides its link's: Python, autograd,
            waiting to be woken.
        update_launch_s: seconds that the optimizer takes for each parameter however small it is.
        one_process: the ranks are threads of one process, and take turns at launching.
        source: where the figures come from.

    Raises:
        MplabError: figures out of their range, or that don't fit each other: all of them at once.
    """

    name: str
    num_devices: int
    flops_s: float
    memory_bytes: float
    memory_bytes_s: float
    inside: Link
    between: Link | None = None
    devices_per_host: int | None = None
    num_ranks: int | None = None
    launch_s: float = 0.0
    call_s: float = 0.0
    update_launch_s: float = 0.0
    one_process: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        faults = []
        for name in ("num_devices", "devices_per_host", "num_ranks"):
            value = getattr(self, name)
            if not (value is None and name != "num_devices") and not (type(value) is int and value >= 1):
                faults.append(f"{name}={value!r}: must be a whole number, 1 or more")
        for name in ("flops_s", "memory_bytes", "memory_bytes_s", *_LAUNCHES):
            value, least = getattr(self, name), name in _LAUNCHES
            is_endless = value == math.inf and name != "memory_bytes_s"
            if type(value) not in (int, float) or not (value > 0 or (least and value == 0)) or is_endless:
                faults.append(f"{name}={value!r}: must be a number {'of 0 or more' if least else 'above 0'}")
        one_process: object = self.one_process
        if not isinstance(one_process, bool):
            faults.append(f"{one_process=}: must be True or False")
        for name in _LINKS:
            value = getattr(self, name)
            if not isinstance(value, Link) and (name == "inside" or value is not None):
                faults.append(f"{name}={value!r}: must be a Link(latency_s, bandwidth_bytes_s)")
        if not faults:
            if self.num_devices % self._per_host:
                faults.append(
                    f"{self.num_devices} devices, {self._per_host} a host: all hosts have as many, so choose a number "
                    f"that divides {self.num_devices}"
                )
            elif self._per_host < self.num_devices and self.between is None:
                faults.append(f"{self.num_devices // self._per_host} hosts: say what links them, between=Link(...)")
            if self.ranks > self.num_devices > self._per_host and self.ranks % self.num_devices:
                faults.append(
                    f"{self.num_ranks} ranks on {self.num_devices} devices of several hosts: each device has as many "
                    f"of them, so take a multiple of {self.num_devices}, or fewer ranks than devices"
                )
        refuse(iter(faults), f"machine {self.name!r} can't be")

    @property
    def ranks(self) -> int:
        """How many run on it."""
        return self.num_ranks or self.num_devices

    @property
    def ranks_per_device(self) -> float:
        """Ranks that share a device: 1, or more; 4/3 where 4 threads take turns on 3 cores."""
        return max(1.0, self.ranks / self.num_devices)

    @property
    def ranks_per_host(self) -> int:
        """Ranks of one host; they are numbered host by host."""
        return round(self._per_host * self.ranks_per_device)

    @property
    def turns(self) -> int:
        """How often as long a launch takes as that of a rank alone, where all devices are at work: 1, or more."""
        return min(self.ranks, self.num_devices) if self.one_process else 1

    @property
    def rank_memory_bytes(self) -> float:
        """A rank's share of its device's memory, where most ranks share one."""
        return self.memory_bytes / math.ceil(self.ranks_per_device)

    @property
    def _per_host(self) -> int:
        return self.devices_per_host or self.num_devices

    def link(self, degree: int, stride: int) -> Link:
        """What the messages along an axis of a mesh go through: the slower link, where some of them leave a host.

        Args:
            degree: ranks of the axis.
            stride: from one of them to the next: 1 on the tensor axis, tp on the pipeline axis, tp x pp on the data
                axis.
        """
        is_inside = self.ranks_per_host % (degree * stride) == 0 or self.ranks <= self.ranks_per_host
        return self.inside if is_inside or self.between is None else self.between

    def with_ranks(self, num_ranks: int) -> Machine:
        """The same machine with another number of ranks."""
        return dataclasses.replace(self, num_ranks=num_ranks)

    def __str__(self) -> str:
        said = f"{self.name}: {self.num_devices} device{'s' * (self.num_devices > 1)}"
        if self._per_host < self.num_devices:
            said += f", {self._per_host} a host"
        if self.ranks_per_device > 1:
            said += f", shared by {self.ranks} ranks"
        rate = f"{self.flops_s / 1e12:.3g} TFLOP/s" if self.flops_s >= 1e12 else f"{self.flops_s / 1e9:.3g} GFLOP/s"
        said += f"; each {rate}, {self.memory_bytes / 1e9:.3g} GB; links: {self.inside}"
        return said + (f"; between hosts {self.between}" if self.between else "")

    # -- as a file -----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """All that differs from the defaults; a bandwidth without bound is null."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        for name in _LINKS:
            if name in values:
                values[name] = {key: _bounded(number) for key, number in dataclasses.asdict(values[name]).items()}
        values["memory_bytes_s"] = _bounded(self.memory_bytes_s)
        return json.dumps(values, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Machine:
        """The machine that `to_json` wrote, or that a person did.

        Raises:
            MplabError: no JSON object, names that a machine has not or that are missing, or values that it can't have.
        """
        needed = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        values = read_object("a machine", text, [field.name for field in dataclasses.fields(cls)], needed)
        for name in _LINKS:
            if values.get(name) is not None:
                numbers = [field.name for field in dataclasses.fields(Link)]
                check_names(f"the link {name!r}", values[name], numbers, numbers)
                values[name] = Link(**{key: _unbounded(key, number) for key, number in values[name].items()})
        return cls(**{key: _unbounded(key, value) for key, value in values.items()})

    def save(self, path: str | Path) -> None:
        """Write it to a file, as JSON."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Machine:
        """Read it from a file.

        Raises:
            MplabError: no such file, or no machine in it.
        """
        return cls.from_json(read_file(path, "a machine", "Machine"))


def _bounded(number: Any) -> Any:
    return None if number == math.inf else number


def _unbounded(name: str, number: Any) -> Any:
    return math.inf if number is None and name.endswith("bytes_s") else number


# Published figures, of one direction where a link has two. Matrix products of a training step do not reach the peak of
# 989 TFLOP/s (bf16, dense): 0.6 of it is taken here, and the end-to-end 0.38 to 0.43 that Llama 3 was trained with, on
# up to 16,384 of these, is less by messages, bubbles and all that is not a matrix product. The latencies are typical of
# what NCCL's small messages take; nobody publishes them.
#   NVIDIA, "H100 Tensor Core GPU" data sheet: SXM5, 989 TFLOP/s bf16, 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways;
#   NVIDIA, "H200 Tensor Core GPU" data sheet: 989 TFLOP/s bf16, 141 GB, 4.8 TB/s;
#   NVIDIA, "DGX H100" data sheet: 8 GPUs, and for each a network port of 400 Gbit/s;
#   Llama Team, "The Llama 3 Herd of Models", 2024, table 4.
_REACHED_FLOPS_S = 0.6 * 989e12
_NVLINK, _INFINIBAND = Link(3e-6, 450e9), Link(8e-6, 50e9)
_SOURCE = "NVIDIA's data sheets of H100 SXM5, H200 and DGX H100; 0.6 of the peak in bf16 is taken as reached"

MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine("H200", 1, _REACHED_FLOPS_S, 141e9, 4.8e12, _NVLINK, source=_SOURCE),
        Machine("8 x H100", 8, _REACHED_FLOPS_S, 80e9, 3.35e12, _NVLINK, source=_SOURCE),
        Machine("64 x 8 H100", 512, _REACHED_FLOPS_S, 80e9, 3.35e12, _NVLINK, _INFINIBAND, 8, source=_SOURCE),
    )
}
