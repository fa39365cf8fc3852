"""A rank that runs out of memory: which one, how much it asked for, what to lower. Processes: test_processes.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from data_parallel import OPTIMIZERS, batches, model
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor

from mplab import PeerFailure, World
from mplab.models import cross_entropy
from mplab.parallel import naive_data_parallel
from mplab.world import Rank
from mplab.world.out_of_memory import out_of_memory_note

AT_ONCE_S = 5.0  # far above what is needed, and far below the time-out
CPU = torch.device("cpu")


def of_torch() -> Tensor:
    return torch.empty(1 << 50, dtype=torch.uint8)


ASKS: dict[str, tuple[Callable[[], object], str]] = {
    "torch": (of_torch, "rank 1 ran out of memory on cpu when it asked for 1,125,899,906,842,624 bytes. To lower "),
    "NumPy": (lambda: np.empty(1 << 50, np.uint8), "rank 1 ran out of memory on cpu when it asked for 1.00 PiB. To "),
    "Python": (lambda: bytearray(1 << 50), "rank 1 ran out of memory on cpu. To lower "),
}


@pytest.mark.parametrize("library", ASKS)
def test_the_error_is_the_original_and_says_what_to_lower(library: str) -> None:
    """While one of the others waits for it, and one computes."""
    ask, said = ASKS[library]
    with pytest.raises((RuntimeError, MemoryError)) as original:
        ask()
    seen: dict[int, BaseException] = {}
    all_here = threading.Barrier(3, timeout=30)

    def work(rank: Rank) -> None:
        all_here.wait()
        try:
            if rank.index == 1:
                with rank.span("forward", microbatch=2):
                    ask()
            elif rank.index == 0:
                rank.comm.barrier()
            while True:
                pass
        except BaseException as error:
            seen[rank.index] = error
            raise

    start_s = time.monotonic()
    with pytest.raises(original.type) as caught:
        World(3, "cpu").run(work)
    assert time.monotonic() - start_s < AT_ONCE_S
    assert caught.value is seen[1]
    assert str(caught.value) == str(original.value)
    where, lower = caught.value.__notes__
    assert where == "(rank 1 of 3 in forward of micro-batch 2; all other ranks were stopped)"
    assert lower.startswith(said)
    for what in ("smaller batch", "micro-batches", "recompute=True", "bucket_bytes", "ZeRO stage"):
        assert what in lower
    assert all(isinstance(seen[rank], PeerFailure) for rank in (0, 2))
    assert World(3, "cpu").run(lambda rank: rank.comm.all_reduce(torch.ones(1)).item()) == [3.0] * 3


def test_nobody_updates_when_a_rank_cannot_compute_its_samples() -> None:
    states: list[object] = []

    def greedy(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(targets) == 3:  # the last of 11 samples on 3 ranks
            of_torch()
        return cross_entropy(outputs, targets)

    def work(rank: Rank) -> None:
        mine = model()
        optimizer = OPTIMIZERS["adamw"](mine.parameters())
        states.append(optimizer.state)
        naive_data_parallel(mine, optimizer, batches()[0], rank.comm, greedy)

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory") as caught:
        World(3, "cpu").run(work)
    assert caught.value.__notes__[0] == "(rank 2 of 3 in forward; all other ranks were stopped)"
    assert [len(state) for state in states] == [0, 0, 0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"), " 20.00 MiB. To"),
        (torch.OutOfMemoryError("of an allocator with words of its own"), ". To lower"),
        (RuntimeError("CUDA error: out of memory"), ". To lower"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ". To lower"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), " for 8 bytes. To"),
        (MemoryError(), "rank 3 ran out of memory on cpu. To lower"),
    ],
)
def test_what_allocators_say(error: BaseException, asked: str) -> None:
    assert asked in out_of_memory_note(error, 3, CPU)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyError("out of memory"),
        PeerFailure("rank 0 stopped in barrier(): rank 1 failed with OutOfMemoryError: CUDA out of memory. Tried to"),
    ],
)
def test_other_errors_get_no_such_note(error: BaseException) -> None:
    assert out_of_memory_note(error, 3, CPU) == ""


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    def work(rank: Rank) -> None:
        if rank.index == 1:
            torch.empty(1 << 50, dtype=torch.uint8, device=rank.device)
        rank.comm.barrier()

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as caught:
        World(2, "cuda:0").run(work)
    lower = caught.value.__notes__[1]
    assert lower.startswith("rank 1 ran out of memory on cuda:0 when it asked for 1,048,576.00 GiB. To lower")
