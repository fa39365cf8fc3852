"""What a function that runs on every rank gets as its first argument."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mplab.comm.communicator import Communicator
from mplab.trace.recorder import Recorder, Span


@dataclass(frozen=True)
class Rank:
    """One rank of a world.

    Args:
        index: its number, from 0.
        size: how many there are.
        device: where it computes; make tensors there.
        generator: its own source of random numbers on `device`, seeded with its index: `torch.manual_seed` belongs to
            all threads of a process at once and would give other numbers in each run.
        comm: talks to the other ranks.
        trace: writes down what happens when.
    """

    index: int
    size: int
    device: torch.device
    generator: torch.Generator
    comm: Communicator
    trace: Recorder

    def span(self, name: str, microbatch: int | None = None) -> Span:
        """`with rank.span("forward"):` puts what happens inside on the timeline as one compute event."""
        return self.trace.span(name, microbatch)
