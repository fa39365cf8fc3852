"""What belongs to a thread in torch, and what a rank's thread needs before it may compute."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch

from mplab.errors import MplabError
from mplab.trace.recorder import cuda_mark


class ThreadState:
    """What belongs to a thread in torch: taken from the caller, set in every rank.

    Backward runs in the rank's own thread, so that collectives inside it work and ranks of one GPU don't queue for one
    engine.
    """

    def __init__(self) -> None:
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set it in the calling thread."""
        torch.set_num_threads(1)
        with ExitStack() as stack:
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            if self._inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            yield


# Of glibc's mallopt: the parameters' numbers, and the largest mmap threshold that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST_BYTES = -1, -3, 32 << 20


@cache
def keep_freed_memory() -> None:
    """Have this process keep what CPU tensors up to 32 MiB free, up to 1 GiB, where its C library is glibc.

    A step frees and asks for the same memory again and again. The heap of a thread gives it back to the system each
    time, and touching the new pages costs a rank thousands of page faults a step: 3 % of the time of a small GPT's.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)
        ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, 1 << 30)


def zero_marks(devices: tuple[torch.device, ...]) -> dict[torch.device, Any]:
    """The marks from which all ranks count time: what callers put on a GPU before is finished by then."""
    marks: dict[torch.device, Any] = {}
    gpus = [d for d in dict.fromkeys(devices) if d.type == "cuda"]
    for device in gpus:
        torch.cuda.synchronize(device)
    for device in gpus:
        with torch.cuda.device(device):
            marks[device] = cuda_mark()
    return marks if gpus else {devices[0]: time.perf_counter_ns()}


@contextmanager
def on_device(device: torch.device, num_sms: int, rank: int) -> Iterator[None]:
    """Run the calling thread on its device, on a CUDA stream of its own, or on its own share of the SMs; wait for the
    GPU at the end.

    Args:
        device: the rank's device.
        num_sms: streaming multiprocessors of its share; 0: no share.
        rank: its index: the same rank of a later run gets the same stream.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), _stream(device, num_sms, rank):
        yield
        torch.cuda.current_stream().synchronize()


# Streams, and the green contexts of those that have one, kept for the next run. Memory that a stream has used goes back
# to torch through it, and torch gives it to that stream alone; on another rank's it could be given away while this
# rank, which goes on with tensors of an earlier run, still reads it.
_streams: dict[tuple[torch.device, int, int], list[tuple[Any, Any]]] = {}


@contextmanager
def _stream(device: torch.device, num_sms: int, rank: int) -> Iterator[None]:
    idle = _streams.setdefault((device, num_sms, rank), [])
    try:
        context, stream = idle.pop()
    except IndexError:  # the first time, or another world runs at the same time
        context, stream = _sm_slice(num_sms, device) if num_sms else (None, torch.cuda.Stream(device))
    try:
        # Not set_context(): that puts a rank on its context's NULL stream, and torch takes those of all ranks for one.
        with torch.cuda.stream(stream):
            yield
    finally:
        idle.append((context, stream))


def _sm_slice(num_sms: int, device: torch.device) -> tuple[Any, Any]:
    """A green context and a stream of it: its kernels run on `num_sms` of the GPU's SMs and on no others.

    Torch splits the GPU anew for every context, so that the shares of two ranks may overlap (pytorch issue 195378).
    """
    from torch.cuda.green_contexts import GreenContext

    try:
        context: Any = GreenContext.create(num_sms=num_sms, device_id=device.index or 0)
        return context, context.Stream()
    except (RuntimeError, AttributeError) as error:
        raise MplabError(
            f"slices=True: torch or the driver gave no share of {num_sms} SMs on {device} ({error}): use slices=False"
        ) from error
