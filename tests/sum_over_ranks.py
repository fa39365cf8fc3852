"""A collective inside of autograd, as tensor parallelism has it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from mplab.world import Rank


class SumOverRanks(torch.autograd.Function):
    """All-reduce forward and backward, as tensor parallelism has it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, rank: Rank) -> Tensor:
        ctx.rank = rank  # type: ignore[attr-defined]
        return rank.comm.all_reduce(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        rank: Rank = ctx.rank  # type: ignore[attr-defined]
        assert threading.current_thread().name == f"mplab-rank{rank.index}", "backward left its rank's thread"
        return rank.comm.all_reduce(grads[0]), None
