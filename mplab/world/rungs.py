"""The ladder of machines: which devices the ranks of one process get, and what timings on them can prove."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mplab.errors import MplabError

# A green context takes streaming multiprocessors in these steps on Hopper and later, in twos before.
SM_STEP_HOPPER, SM_STEP = 8, 2


@dataclass(frozen=True)
class Rung:
    """Where the ranks of a world compute.

    Args:
        name: "GPUs", "CUDA streams", "SM slices" or "CPU threads".
        devices: every rank's device.
        num_sms: streaming multiprocessors of each rank's share; 0 where they are not shared out.
        sharing: who shares what, in words; empty where nobody shares.
        proves: what timings on it can prove.
    """

    name: str
    devices: tuple[torch.device, ...]
    num_sms: int
    sharing: str
    proves: str


def num_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_at_once(devices: Sequence[torch.device]) -> int:
    """How many ranks with these devices can compute at the same time: one a GPU, or one a CPU core."""
    return len({device for device in devices if device.type == "cuda"}) or num_cores()


def choose(num_ranks: int, device: str, slices: bool) -> Rung:
    """The best rung that the machine has, or the one that was asked for.

    Args:
        num_ranks: size of the world.
        device: "auto", "cpu", "cuda", or one GPU such as "cuda:1".
        slices: run each rank of a GPU on a share of its SMs.

    Raises:
        MplabError: no such device here, or SMs that cannot be shared out so.
    """
    if not isinstance(num_ranks, int) or isinstance(num_ranks, bool) or num_ranks < 1:
        raise MplabError(f"World({num_ranks!r}): a world has a whole number of ranks, at least 1")
    try:
        wanted = None if device == "auto" else torch.device(device)
    except (RuntimeError, TypeError):
        raise MplabError(
            f"device={device!r} is no device: choose 'auto', 'cpu', 'cuda' or one GPU such as 'cuda:0'"
        ) from None
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted is not None and wanted.type not in ("cpu", "cuda"):
        raise MplabError(f"device={device!r}: ranks run on 'cpu' or 'cuda'")
    if wanted is not None and wanted.type == "cuda" and (wanted.index or 0) >= num_gpus:
        raise MplabError(f"device={device!r}, but torch sees {num_gpus} GPUs here: choose 'auto' or 'cpu'")
    if (wanted is not None and wanted.type == "cpu") or num_gpus == 0:
        if slices:
            raise MplabError("slices=True shares out the SMs of a GPU, and there is none here: leave it out on a CPU")
        return _cpu(num_ranks)
    gpus = (
        [wanted]
        if wanted is not None and wanted.index is not None
        else [torch.device("cuda", i) for i in range(num_gpus)]
    )
    return _gpus(num_ranks, gpus, slices)


def _cpu(num_ranks: int) -> Rung:
    cores = num_cores()
    sharing = f"{num_ranks} ranks share {cores} core{'s' * (cores > 1)}" if num_ranks > cores else ""
    proves = "correctness, bytes and order; "
    proves += "times are not speed-ups" if sharing else f"speed-up up to {cores} core{'s' * (cores > 1)}"
    return Rung("CPU threads", (torch.device("cpu"),) * num_ranks, 0, sharing, proves)


def _gpus(num_ranks: int, gpus: list[torch.device], slices: bool) -> Rung:
    devices = tuple(gpus[r % len(gpus)] for r in range(num_ranks))
    per_gpu = -(-num_ranks // len(gpus))
    if slices:
        num_sms = _sms_of_each(per_gpu, gpus[0])
        return Rung(
            "SM slices",
            devices,
            num_sms,
            "ranks of a GPU share its memory, and torch may give two of them the same SMs",
            "correctness, memory, order, overlap; times are not speed-ups",
        )
    if per_gpu == 1:
        return Rung("GPUs", devices, 0, "", "everything that this machine's links allow")
    sharing = f"{num_ranks} ranks share {len(gpus)} GPU{'s' * (len(gpus) > 1)}"
    return Rung("CUDA streams", devices, 0, sharing, "correctness, memory, order, overlap; times are not speed-ups")


def _sms_of_each(num_ranks: int, gpu: torch.device) -> int:
    from torch.cuda import green_contexts

    if not getattr(green_contexts, "SUPPORTED", False):
        raise MplabError(
            f"slices=True needs torch.cuda.green_contexts, which torch {torch.__version__} (CUDA {torch.version.cuda}) "
            "was built without: use slices=False, or a torch build for CUDA 12.8 or later"
        )
    properties = torch.cuda.get_device_properties(gpu)
    step = SM_STEP_HOPPER if properties.major >= 9 else SM_STEP
    num_sms = properties.multi_processor_count // num_ranks // step * step
    if num_sms == 0:
        raise MplabError(
            f"slices=True: {properties.multi_processor_count} SMs of {properties.name} cannot be shared by {num_ranks} "
            f"ranks in steps of {step}: use at most {properties.multi_processor_count // step} ranks a GPU"
        )
    return num_sms
