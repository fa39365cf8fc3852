"""The cross-entropy of logits of which every rank has some classes, without their ever being in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mplab.comm.communicator import Communicator
from mplab.errors import MplabError
from mplab.parallel.operators import once_differentiable


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
    all_count = False  # as far as is known without asking a GPU
    if rows.device.type == "cpu" and rows.numel():
        low, high = map(int, rows.aminmax())
        all_count = low >= 0 and high < num_classes and not low <= ignore_index <= high
        if (low < 0 or high >= num_classes) and not _are_classes(rows, num_classes, ignore_index).all():
            raise MplabError(
                f"targets from {low} to {high}, but the {comm.size} ranks have logits for {num_classes} classes, 0 to "
                f"{num_classes - 1}: build the model with the vocab_size of the data"
            )
    counted = None if all_count else rows != ignore_index
    mean: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, logits.shape[-1]), rows, counted, comm, ignore_index, label_smoothing
    )
    return mean


def _are_classes(targets: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return ((targets >= 0) & (targets < num_classes)) | (targets == ignore_index)


class _CrossEntropy(torch.autograd.Function):
    """Logits (N, V/n) and targets (N) -> their mean loss, computed in float32 at least.

    Per position there is a column, (N, 1). `counted` is None where all positions count.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        counted: Tensor | None,
        comm: Communicator,
        ignore_index: int,
        smoothing: float,
    ) -> Tensor:
        x = logits.float() if logits.dtype.itemsize < 4 else logits
        num_own = x.shape[-1]
        place = (targets - comm.rank * num_own)[:, None]
        own = place.clamp(0, num_own - 1)
        is_here = own == place
        said = [x.logsumexp(-1, keepdim=True), torch.where(is_here, x.gather(-1, own), 0.0)]
        if smoothing:
            said.append(x.sum(-1, keepdim=True))
        of_ranks = comm.all_gather(torch.stack(said))
        log_total = of_ranks[:: len(said)].logsumexp(0)
        right = of_ranks[1 :: len(said)].sum(0)
        num_classes = num_own * comm.size
        if smoothing:
            right = (1 - smoothing) * right + (smoothing / num_classes) * of_ranks[2::3].sum(0)
        losses = log_total - right
        if targets.device.type != "cpu":
            losses = losses.masked_fill(~_are_classes(targets, num_classes, ignore_index)[:, None], torch.nan)
        ctx.smoothing, ctx.num_classes, ctx.dtype = smoothing, num_classes, logits.dtype
        if counted is None:
            ctx.save_for_backward(x, log_total, own, is_here, None)
            return losses.mean()
        num_counted = counted.sum()
        weights = counted.to(x.dtype) / num_counted.clamp(min=1)  # with none the gradient is 0, as torch's
        ctx.save_for_backward(x, log_total, own, is_here, weights[:, None])
        return losses.masked_fill(~counted[:, None], 0.0).sum() / num_counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, log_total, own, is_here, weights = ctx.saved_tensors
        shares = (x - log_total).exp_()  # the softmax over all classes
        shares.scatter_add_(1, own, is_here.to(shares.dtype) * (ctx.smoothing - 1.0))
        if ctx.smoothing:
            shares -= ctx.smoothing / ctx.num_classes
        scale = grad / max(len(x), 1) if weights is None else weights * grad
        return shares.mul_(scale).to(ctx.dtype), None, None, None, None, None
