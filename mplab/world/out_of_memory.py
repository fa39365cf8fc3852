"""What an error says when a rank ran out of memory: how much it asked for, and what to lower."""

from __future__ import annotations

import re

import torch

from mplab.errors import MplabError

# torch on CUDA, torch on the CPU (a plain RuntimeError), and what libraries below torch say.
_SAID = re.compile(r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED", re.IGNORECASE)
_ASKED_FOR = re.compile(r"(?:tried|unable) to allocate (\d+)([.\d]* \w+)", re.IGNORECASE)


def out_of_memory_note(error: BaseException, rank: int, device: torch.device) -> str:
    """What to add to an error of this rank, computing on this device; "" if it did not run out of memory.

    An error of the library's own may quote another rank's, and is none.
    """
    is_said = isinstance(error, RuntimeError) and not isinstance(error, MplabError) and _SAID.search(str(error))
    if not (is_said or isinstance(error, MemoryError | torch.OutOfMemoryError)):
        return ""
    size = _ASKED_FOR.search(str(error))
    asked = f" when it asked for {int(size[1]):,}{size[2]}" if size else ""
    return (
        f"rank {rank} ran out of memory on {device}{asked}. To lower what a rank needs: a smaller batch or more "
        "micro-batches (activations), recompute=True in a pipeline (activations again), smaller bucket_bytes in "
        "DataParallel (gradients on their way), or ShardedDataParallel with a higher ZeRO stage (1: optimizer state, "
        "2: gradients too, 3: weights too)"
    )
