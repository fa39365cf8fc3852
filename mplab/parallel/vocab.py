"""The cross-entropy of logits of which every rank has some classes, without their ever being in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mplab.comm.communicator import Communicator
from mplab.errors import MplabError


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, comm: Communicator, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Tensor:
    """The mean cross-entropy over all positions, in nats: `torch.nn.functional.cross_entropy` of the joined logits.

    For each position a rank sends the log-sum-exp of its own logits, and the target's logit if it has it. The
    log-sum-exp of all logits is that of these; backward needs nothing more.

    Args:
        logits: (..., V/n): this rank's classes, from `rank * V/n` on, the same number on every rank.
        targets: (...), int64, the same on every rank: the right class, from 0 to V - 1, or `ignore_index`.
        comm: this rank's communicator on the tensor axis.
        ignore_index: positions with this target are not counted.
        label_smoothing: so much of each target is spread over all classes, from 0 to 1.

    Returns:
        A tensor without dims, the same on every rank; NaN where no position counts.

    Raises:
        MplabError: shapes that don't fit; a smoothing out of its range; on a CPU, a target that is no class. On CUDA,
            where asking would keep the host waiting, the loss is then NaN.

    **Communication**: an all_gather of 8 bytes a position (float32; 12 with smoothing); in backward none.

    Reference:
        Shoeybi et al., "Megatron-LM", 2019, section 3 (which exchanges the maximum, the sum and the target's logit).
    """
    if logits.shape[:-1] != targets.shape:
        raise MplabError(
            f"logits of shape {tuple(logits.shape)} and targets of shape {tuple(targets.shape)}: the targets must have "
            "all dims of the logits but the last"
        )
    if not 0 <= label_smoothing <= 1:
        raise MplabError(f"label_smoothing {label_smoothing}: must be from 0 to 1")
    num_classes, rows = logits.shape[-1] * comm.size, targets.flatten()
    is_class = (rows >= 0) & (rows < num_classes)
    is_wrong = ~is_class & (rows != ignore_index)
    if rows.device.type == "cpu" and bool(is_wrong.any()):
        raise MplabError(
            f"targets from {int(rows.min())} to {int(rows.max())}, but the {comm.size} ranks have logits for "
            f"{num_classes} classes, 0 to {num_classes - 1}: build the model with the vocab_size of the data"
        )
    losses: Tensor = _CrossEntropy.apply(logits.flatten(0, -2), rows, comm, label_smoothing)  # type: ignore[no-untyped-call]
    counted = rows != ignore_index
    mean = losses.where(counted, 0.0).sum() / counted.sum()
    return mean if rows.device.type == "cpu" else mean.where(~is_wrong.any(), torch.nan)


class _CrossEntropy(torch.autograd.Function):
    """Logits (N, V/n) and targets (N) -> losses (N), in float32 at least."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, comm: Communicator, smoothing: float) -> Tensor:
        x = logits.float() if logits.dtype.itemsize < 4 else logits
        num_own = x.shape[-1]
        own = targets - comm.rank * num_own
        is_here = (own >= 0) & (own < num_own)
        own.masked_fill_(~is_here, 0)
        of_target = x.gather(-1, own[:, None]).squeeze(-1).masked_fill_(~is_here, 0)
        said = [x.logsumexp(-1), of_target, *([x.sum(-1)] if smoothing else [])]
        of_ranks = comm.all_gather(torch.stack(said)[None])
        log_sum = of_ranks[:, 0].logsumexp(0)
        right = of_ranks[:, 1].sum(0)
        if smoothing:
            right = (1 - smoothing) * right + (smoothing / (num_own * comm.size)) * of_ranks[:, 2].sum(0)
        ctx.save_for_backward(x, own, is_here, log_sum)
        ctx.smoothing, ctx.size, ctx.dtype = smoothing, comm.size, logits.dtype
        return log_sum - right

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, own, is_here, log_sum = ctx.saved_tensors
        share = (x - log_sum[:, None]).exp_()  # softmax
        share.scatter_add_(1, own[:, None], (is_here * (ctx.smoothing - 1)).to(share.dtype)[:, None])
        if ctx.smoothing:
            share -= ctx.smoothing / (x.shape[-1] * ctx.size)
        return share.mul_(grad[:, None]).to(ctx.dtype), None, None, None
