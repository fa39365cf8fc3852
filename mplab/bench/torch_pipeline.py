"""The pipeline benchmark's model and batch, and torch's side of it: functions that gloo processes are told to call."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mplab.models import GPT, GPTConfig, cross_entropy
from mplab.trace.saved import SavedBytes

NUM_RANKS = 2
NUM_MICROBATCHES = 8
NUM_LAYERS = 4  # blocks, as many on each rank
BATCH_SIZE = 16
SEQUENCE = 128
LEARNING_RATE = 0.1  # of plain SGD: unlike Adam's, its second loss tells gradients that are too large by a factor
CUTS = {2: (3,), 4: (2, 3, 4)}  # number of stages -> their first layers: the embedding, four blocks, the head


def gpt(width: int) -> GPT:
    """The model, with the same weights wherever it is built; torch's pipelining has no tied weights."""
    return GPT(GPTConfig(context_length=SEQUENCE, num_layers=NUM_LAYERS, width=width, tied=False))


def batch() -> tuple[Tensor, Tensor]:
    """Random tokens and the tokens to predict, the same wherever they are drawn."""
    tokens = torch.randint(256, (2, BATCH_SIZE, SEQUENCE), generator=torch.Generator().manual_seed(0))
    return tokens[0], tokens[1]


class Side:
    """One rank's stages under one of torch's schedules.

    It spares torch whatever it can: outputs are not returned, and gradients need no division by m, because each loss
    is divided.

    Args:
        rank: which of `NUM_RANKS`.
        schedule: name of a schedule of this library: "1f1b".
        width: of the GPT.
    """

    def __init__(self, rank: int, schedule: str, width: int) -> None:
        from torch.distributed import pipelining

        make, num_chunks = {
            "1f1b": (pipelining.Schedule1F1B, 1),
            "gpipe": (pipelining.ScheduleGPipe, 1),
            "interleaved": (pipelining.ScheduleInterleaved1F1B, 2),
            "zero_bubble": (pipelining.ScheduleInterleavedZeroBubble, 1),
        }[schedule]
        num_stages = num_chunks * NUM_RANKS
        model = gpt(width)
        layers = [model.embedding, *model.blocks, model.head]
        ends = (0, *CUTS[num_stages], len(layers))
        self.spans: list[tuple[int, int]] = []
        self.stages = [
            pipelining.PipelineStage(nn.Sequential(*layers[ends[i] : ends[i + 1]]), i, num_stages, torch.device("cpu"))
            for i in range(rank, num_stages, NUM_RANKS)
        ]
        for stage in self.stages:
            for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
                setattr(stage, name, self._timed(getattr(stage, name)))
        self.schedule: Any = make(
            self.stages if schedule in ("interleaved", "zero_bubble") else self.stages[0],
            NUM_MICROBATCHES,
            loss_fn=self._timed(lambda outputs, targets: cross_entropy(outputs, targets) / NUM_MICROBATCHES),
            scale_grads=False,
        )
        self.parameters = [p for stage in self.stages for p in stage.submod.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=LEARNING_RATE)
        inputs, targets = batch()
        self.inputs = (inputs,) if rank == 0 else ()
        self.targets = targets if rank == NUM_RANKS - 1 else None

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter_ns()
            result = call(*args, **kwargs)
            self.spans.append((start, time.perf_counter_ns()))
            return result

        return timed

    def step(self) -> float:
        """One update; returns the loss on the last rank, 0 on the others."""
        losses: list[Tensor] = []
        self.optimizer.zero_grad()
        self.schedule.step(*self.inputs, target=self.targets, losses=losses, return_outputs=False)
        self.optimizer.step()
        return float(torch.stack(losses).detach().sum()) if losses else 0.0


side = cache(Side)


def losses(rank: int, schedule: str, width: int, num_steps: int) -> list[float]:
    """The losses of the first steps."""
    return [side(rank, schedule, width).step() for _ in range(num_steps)]


def times(rank: int, schedule: str, width: int, num_steps: int) -> dict[str, Any]:
    """One rank's side of a round.

    Returns:
        "stamps": when the start barrier ended for this rank, then each step; "steps": of every step the start and the
        end of each computation (`perf_counter_ns`).
    """
    mine = side(rank, schedule, width)
    mine.step()
    dist.barrier()
    stamps, steps = [time.perf_counter_ns()], []
    for _ in range(num_steps):
        mine.spans.clear()
        mine.step()
        stamps.append(time.perf_counter_ns())
        steps.append(list(mine.spans))
    return {"stamps": stamps, "steps": steps}


def saved_bytes(rank: int, schedule: str, width: int) -> int:
    """The most bytes that autograd keeps for backward during a step."""
    mine = side(rank, schedule, width)
    with SavedBytes(mine.parameters) as saved:
        mine.step()
    return saved.peak_bytes
