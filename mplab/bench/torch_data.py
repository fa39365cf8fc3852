"""The data-parallel benchmarks' models and batches, and torch's side: functions that gloo processes call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mplab.models import GPT, GPTConfig, cross_entropy

NUM_RANKS = 2
NUM_LAYERS = 4
LEARNING_RATE = 0.1  # of plain SGD: unlike Adam's, its second loss tells gradients that are too large by a factor


class Size(NamedTuple):
    """A GPT and its batch.

    Args:
        width: of the GPT.
        sequence: tokens of a sample, and the GPT's context.
        batch_size: samples of all ranks together.
    """

    width: int
    sequence: int
    batch_size: int


# By their parameters. The last one has so few samples that 56 MB of gradients weigh as much as computing them.
SIZES = {
    "0.2 M": Size(64, 64, 8),
    "0.9 M": Size(128, 64, 12),
    "5 M": Size(320, 128, 8),
    "14 M": Size(536, 16, 4),
}


def gpt(size: Size) -> GPT:
    """The model, with the same weights wherever it is built."""
    return GPT(GPTConfig(context_length=size.sequence, num_layers=NUM_LAYERS, width=size.width, tied=False))


def batch(size: Size) -> tuple[Tensor, Tensor]:
    """Random tokens and the tokens to predict, the same wherever they are drawn."""
    shape = (2, size.batch_size, size.sequence)
    tokens = torch.randint(256, shape, generator=torch.Generator().manual_seed(0))
    return tokens[0], tokens[1]


class Side:
    """One rank of torch's data parallelism, on its own half of the batch.

    Args:
        rank: which of `NUM_RANKS`.
        kind: "DDP"; "ZeroRedundancyOptimizer" (and DDP); "FSDP2"; "FSDP2 without resharding" after a forward.
        optimizer: name of a class of `torch.optim`.
        size: fields of a `Size`.
    """

    def __init__(self, rank: int, kind: str, optimizer: str, size: Sequence[int]) -> None:
        self.inputs, self.targets = (x.tensor_split(NUM_RANKS)[rank] for x in batch(Size(*size)))
        self.model: nn.Module = gpt(Size(*size))
        make: Any = getattr(torch.optim, optimizer)
        if kind.startswith("FSDP2"):
            _shard(self.model, reshard_after_forward=kind == "FSDP2")
        else:
            self.model = nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        if kind == "ZeroRedundancyOptimizer":
            from torch.distributed.optim import ZeroRedundancyOptimizer

            self.optimizer: Any = ZeroRedundancyOptimizer(self.model.parameters(), make, lr=LEARNING_RATE)
        else:
            self.optimizer = make(self.model.parameters(), lr=LEARNING_RATE)

    def step(self) -> float:
        """One update; returns the loss of this rank's samples, which is what scripts write down."""
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(self.inputs), self.targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def _shard(model: nn.Module, reshard_after_forward: bool) -> None:
    """Each block, and the rest as one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    blocks: Any = model.blocks
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)


side = cache(Side)


def losses(rank: int, kind: str, size: Sequence[int], num_steps: int) -> list[float]:
    """The losses of the first steps, of this rank's samples alone."""
    return [side(rank, kind, "SGD", tuple(size)).step() for _ in range(num_steps)]


def stamps(rank: int, kind: str, size: Sequence[int], num_steps: int) -> list[int]:
    """When the start barrier ended for this rank, then each step (`perf_counter_ns`)."""
    return step_stamps(side(rank, kind, "SGD", tuple(size)).step, num_steps)


def step_stamps(step: Callable[[], float], num_steps: int) -> list[int]:
    """After a step to warm up and a barrier of all processes: when that ended, then each step (`perf_counter_ns`)."""
    step()
    dist.barrier()
    times = [time.perf_counter_ns()]
    for _ in range(num_steps):
        step()
        times.append(time.perf_counter_ns())
    return times


def memory_bytes(rank: int, kind: str, size: Sequence[int]) -> int:
    """Bytes of parameters, gradients and AdamW's state on this rank after a step."""
    mine = Side(rank, kind, "AdamW", size)
    mine.step()
    return bytes_of(mine.model.parameters(), mine.optimizer)


def bytes_of(parameters: Iterable[Tensor], optimizer: Any) -> int:
    """Bytes of the storages of some parameters and of those that an optimizer updates, of their gradients and of its
    state; a storage counts once.
    """
    while hasattr(optimizer, "optim"):  # what ZeroRedundancyOptimizer keeps of it on this rank
        optimizer = optimizer.optim
    kept = [*parameters, *(p for group in optimizer.param_groups for p in group["params"])]
    kept += [p.grad for p in kept if p.grad is not None]
    kept += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    storages = [(x.to_local() if hasattr(x, "to_local") else x).untyped_storage() for x in kept]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
