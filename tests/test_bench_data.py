"""The benchmarks of data parallelism: every row, every side's losses before its times, and bytes counted by hand."""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
from torch import nn

from mplab import MplabError, Rank, World
from mplab.bench import data, torch_data, zero
from mplab.bench.torch_data import NUM_RANKS, SIZES, Size
from mplab.comm.communicator import Communicator
from mplab.datasets import Batch
from mplab.models import seeded

TINY = Size(width=8, sequence=8, batch_size=4)


def num_parameters(size: Size) -> int:
    return sum(p.numel() for p in torch_data.gpt(size).parameters())


def test_sizes_have_as_many_parameters_as_their_names_say() -> None:
    for name, size in SIZES.items():
        num_millions = num_parameters(size) / 1e6
        assert name == (f"{num_millions:.1f} M" if num_millions < 1 else f"{num_millions:.0f} M")
        assert size.batch_size % NUM_RANKS == 0  # the mean of the ranks' losses is that of the batch


@pytest.mark.parametrize(
    ("bench", "wrong", "who"),
    [
        (data, data.Torch, "DDP tiny"),
        (data, data.Threads, "tiny"),
        (data, data.Processes, "tiny, gloo processes"),
        (zero, data.Threads, "stage 3, tiny"),
        (zero, data.Torch, "FSDP2 tiny"),
    ],
)
def test_nothing_is_timed_that_trains_otherwise(
    bench: ModuleType, wrong: type, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = data.OneProcess(TINY).losses()
    for side in (data.Torch, data.Processes):  # without processes, which take seconds
        monkeypatch.setattr(side, "losses", lambda self: expected)
    monkeypatch.setattr(bench, "GlooProcesses", nullcontext)
    monkeypatch.setattr(wrong, "losses", lambda self: [*expected[:2], expected[2] + 0.01])
    monkeypatch.setattr(bench, "paired", lambda *args, **kwargs: pytest.fail("timed"))
    with pytest.raises(MplabError, match=f"^{who}: its losses .* are not one process's"):
        bench.run({"tiny": TINY}, 1, 1)


def test_a_gradient_that_is_too_large_shows_in_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = data.OneProcess(TINY).losses()
    monkeypatch.setattr(data, "LEARNING_RATE", 2 * data.LEARNING_RATE)
    with pytest.raises(MplabError, match="its losses"):
        data.check("twice", data.Threads(data.data_parallel, TINY).losses(), expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_keeps_its_share(stage: int) -> None:
    weights = 4 * num_parameters(TINY)
    shared = {1: 3, 2: 3, 3: 4}[stage]  # after the step stage 1, too, has only its own gradients, and AdamW's two
    expected = (4 - shared) * weights + shared * weights / NUM_RANKS
    assert max(zero.memory_bytes(stage, TINY)) == pytest.approx(expected, rel=0.05)


def test_bytes_by_hand() -> None:
    weight = nn.Parameter(seeded("weight", (4, 4)))  # 64 bytes
    half = nn.Parameter(weight.detach().view(-1)[:8])  # of the same storage
    other = nn.Parameter(seeded("other", (8,)))  # 32 bytes
    frozen = nn.Parameter(seeded("frozen", (2, 2)), requires_grad=False)  # 16 bytes
    optimizer = torch.optim.SGD([half, other], momentum=0.9)
    assert torch_data.bytes_of([weight, frozen], optimizer) == 16 + 64 + 32
    half.grad = torch.ones(8)  # 32 bytes
    assert torch_data.bytes_of([weight, frozen], optimizer) == 16 + 64 + 32 + 32
    optimizer.step()  # a momentum buffer like the gradient
    assert torch_data.bytes_of([weight, frozen], optimizer) == 16 + 64 + 32 + 32 + 32
    weight.untyped_storage().resize_(0)
    assert torch_data.bytes_of([weight, frozen], optimizer) == 16 + 32 + 32 + 32


class Late:
    """An engine whose first step takes long on rank 1."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.ends = rank, list[int]()

    def connect(self, comm: Communicator) -> None:
        pass

    def step(self, batch: Batch) -> float:
        time.sleep(0.05 if self.rank.index == 1 and not self.ends else 0)
        self.ends.append(time.perf_counter_ns())
        return 0.0


def test_times_begin_after_every_ranks_first_step() -> None:
    def times(rank: Rank) -> tuple[list[int], list[int]]:
        engine = Late(rank)
        return data.stamps(rank, engine, TINY, 2), engine.ends

    of_ranks = World(NUM_RANKS, "cpu").run(times)
    for stamps, ends in of_ranks:
        assert len(stamps) == len(ends) == 3
        assert max(first for _, (first, *_) in of_ranks) < stamps[0] < ends[1] < stamps[1] < ends[2] < stamps[2]
