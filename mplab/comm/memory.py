"""How a tensor gets from one thread rank to another: shared memory, CUDA events on one GPU, copies between GPUs."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

# From this size on a new tensor asks for large pages: the first touch of a 4 KiB page costs more than copying to it.
LARGE_BYTES = 4 << 20


def new_like(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of `x`'s shape, dtype and device, quick to write to for the first time."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = out.nbytes
    if size >= LARGE_BYTES and out.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # Advice: where the system does not take it, nothing is lost.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(out.data_ptr() + size - start), mmap.MADV_HUGEPAGE
        )
    return out


class HostMemory:
    """CPU tensors: what another thread wrote can be read at once."""

    device = torch.device("cpu")
    is_host = True  # what is written is there at once, and times are the host's

    def publish(self) -> Any:
        """A mark after everything that this rank has computed so far; None: it is there already."""
        return None

    def observe(self, x: Tensor | None, event: Any) -> None:
        """Let this rank read what a peer published with this mark."""

    def local(self, x: Tensor) -> Tensor:
        """A peer's tensor, readable by this rank's kernels."""
        return x

    def copy(self, x: Tensor) -> Tensor:
        """A copy of a tensor that can be read from here, for this rank."""
        return self.handover(x, self.device)

    def handover(self, x: Tensor, device: torch.device) -> Tensor:
        """A copy that belongs to a rank on `device`."""
        return new_like(x).copy_(x)


class CudaMemory(HostMemory):
    """CUDA tensors: the reader's stream waits for the writer's event, the host never does.

    Args:
        device: this rank's GPU.
    """

    is_host = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def publish(self) -> Any:
        """An event after everything on this rank's stream."""
        event = torch.cuda.Event()
        event.record()
        return event

    def observe(self, x: Tensor | None, event: Any) -> None:
        """Make this rank's stream wait for the event, and the stream on which a peer GPU's memory would be copied."""
        streams = {torch.cuda.current_stream(self.device)}
        if x is not None and x.is_cuda and x.device != self.device:
            # A copy between GPUs runs on the source's current stream, and in this thread that is not the writer's.
            streams.add(torch.cuda.current_stream(x.device))
        for stream in streams:
            stream.wait_event(event)
            if x is not None and stream.device == x.device:
                # The caching allocator must not hand this memory out again while our stream still reads it.
                x.record_stream(stream)

    def local(self, x: Tensor) -> Tensor:
        """The tensor itself, or a copy of it on this GPU."""
        return x if x.device == self.device else x.to(self.device, non_blocking=True)

    def handover(self, x: Tensor, device: torch.device) -> Tensor:
        """A copy on this rank's stream, or one on the receiver's GPU."""
        return super().handover(x, device) if device == x.device else x.contiguous().to(device, non_blocking=True)
