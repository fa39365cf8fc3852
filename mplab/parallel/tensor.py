"""Tensor parallelism: every layer is cut, every rank has a part of it, and all work on the same samples.

rank 0:  x ─ f ─ A0 ─ GELU ─ B0 ─┐     A by columns, B by rows. f: nothing, in backward an all-reduce;
                                 g ─ y                          g: an all-reduce, in backward nothing
rank 1:  x ─ f ─ A1 ─ GELU ─ B1 ─┘
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator
from mplab.datasets import Batch
from mplab.errors import MplabError, NonFiniteGradient
from mplab.models import cross_entropy
from mplab.parallel.agree import check_agreement, check_same_batch
from mplab.parallel.cut import cuts_of
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.serial import LossFunction, check_batch
from mplab.parallel.shares import check_same_rank, check_training
from mplab.parallel.tensor_layers import is_linear
from mplab.parallel.tensor_model import connect, tensor_parallel
from mplab.parallel.tensor_plan import matches, tensor_plan
from mplab.parallel.tensor_state import (
    check_whole_gradients,
    full_gradients,
    full_state_dict,
    load_full_state_dict,
    partial_parameters,
    sum_gradients,
)
from mplab.parallel.vocab import vocab_parallel_cross_entropy
from mplab.private import norms


class TensorParallel:
    """Trains a model whose layers are cut over the ranks, as `Serial` would train it whole.

    Args:
        model: any module; it is never changed.
        comm: this rank's communicator.
        plan: as for `tensor_parallel`.
        sequence_parallel: as for `tensor_parallel`.
        overlap: as for `tensor_parallel`.
        loss_fn: outputs and targets -> mean loss over the samples. Logits that the plan leaves cut need `cross_entropy`
            (done without gathering them), or a `functools.partial` of `vocab_parallel_cross_entropy`.
        optimizer: makes the optimizer of this rank's parameters: it must treat every element alike, as SGD and Adam do.
        num_microbatches: parts in which a batch is computed before the one update (gradient accumulation).
        max_norm: longest gradient (2-norm over all parameters, each counted once); a longer one is scaled down to it.
            None: any.

    Raises:
        MplabError: a setting out of its range, a loss that can't have cut logits, or what `tensor_parallel` refuses;
            before any training.

    **Communication**: at the start the settings (all_gather), and that of `tensor_parallel`.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        plan: Mapping[str, str] | None = None,
        sequence_parallel: bool = False,
        overlap: bool = False,
        loss_fn: LossFunction = cross_entropy,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        num_microbatches: int = 1,
        max_norm: float | None = None,
    ) -> None:
        check_training(model, loss_fn, optimizer, num_microbatches, max_norm, None)
        check_agreement(comm, {"num_microbatches": num_microbatches, "max_norm": max_norm})
        self.comm, self.num_microbatches, self.max_norm = comm, num_microbatches, max_norm
        self.model = tensor_parallel(model, comm, plan, sequence_parallel, overlap)
        self._loss_fn, self._cuts, self._partial = loss_fn, cuts_of(self.model), partial_parameters(self.model)
        self._names = {p: name for name, p in self.model.named_parameters()}
        self._parameters = sorted(self._names, key=lambda p: p not in self._cuts)  # those that are cut first
        self._has_cut_logits = has_cut_logits(model, tensor_plan(model) if plan is None else plan, loss_fn)
        self.optimizer = optimizer(list(self.model.parameters()))
        self.num_steps = 0

    def connect(self, comm: Communicator) -> None:
        """Go on in another run of the world, with this rank's communicator there.

        Raises:
            MplabError: it is another rank's.
        """
        check_same_rank(comm, self.comm)
        self.comm = comm
        connect(self.model, comm)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole model's ordinary `state_dict`, on every rank, as copies; the optimizer's state is not in it.

        **Communication**: an all_gather of each parameter that is cut.
        """
        return full_state_dict(self.model, self.comm)

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a whole model's `state_dict`, saved with any number of ranks; the optimizer's state stays.

        Raises:
            MplabError: names or shapes that are not the model's; nothing is changed then.

        **Communication**: none.
        """
        load_full_state_dict(self.model, self.comm, state)

    def full_gradients(self) -> dict[str, Tensor]:
        """The gradients of the last step as the whole model has them, by name, on every rank; after clipping.

        **Communication**: an all_gather of each parameter that is cut.
        """
        return full_gradients(self.model, self.comm)

    def step(self, batch: Batch) -> float:
        """One update; afterwards this rank's gradients can still be read.

        Args:
            batch: the same on every rank, on any device.

        Returns:
            The mean loss over the batch's samples, before the update; the same on every rank.

        Raises:
            MplabError: inputs and targets of different lengths, fewer samples than micro-batches, a sequence that
                sequence parallelism can't cut; in the first step, batches that differ between the ranks, or gradients
                of what every rank has whole.
            NonFiniteGradient: a gradient of this rank has a NaN or an Inf.

        **Communication**: that of a forward and backward for each micro-batch (`mplab.plan.tensor`); then
        `sum_gradients`, and with `max_norm` an all_reduce_ of 8 bytes. In the first step all_gather of 8 bytes,
        and of 16 for each parameter that is not cut.
        """
        num_samples = check_batch(batch, self.num_microbatches)
        if not self.num_steps:
            check_same_batch(batch, self.comm)
        self.optimizer.zero_grad()
        inputs, targets = (tensor.to(self.comm.device) for tensor in batch)
        span, losses = self.comm.trace.span, []
        parts = zip(*(tensor.tensor_split(self.num_microbatches) for tensor in (inputs, targets)), strict=True)
        for j, (part_inputs, part_targets) in enumerate(parts):
            microbatch = j if self.num_microbatches > 1 else None
            with span("forward", microbatch):
                outputs = self.model(part_inputs)
                loss = parallel_loss(outputs, part_targets, self._loss_fn, self.comm, self._has_cut_logits)
                loss = loss * (len(part_inputs) / num_samples)
            with span("backward", microbatch):
                loss.backward()
            losses.append(loss.detach())
        sum_gradients(self._partial, self.comm)
        if not self.num_steps:
            check_whole_gradients(self.model, self.comm)
        self._check_and_clip()
        with span("update"):
            self.optimizer.step()
        self.num_steps += 1
        return float(torch.stack(losses).sum())

    def _check_and_clip(self) -> None:
        """Refuse a NaN before any weight of this rank is changed; scale down a gradient that is too long."""
        trained = [(p, p.grad) for p in self._parameters if p.grad is not None]
        grads = [grad for _, grad in trained]
        lengths = torch.stack(norms(grads) or [torch.zeros((), device=self.comm.device)]).double()
        is_finite = lengths.isfinite()
        if not bool(is_finite.all()):
            name = self._names[trained[int(is_finite.logical_not().nonzero()[0])][0]]
            raise NonFiniteGradient(
                f"rank {self.comm.rank}, step {self.num_steps}: the gradient of {name} has a NaN or an Inf, and no "
                "weight of this rank was changed: look at the samples and the loss, or lower the learning rate"
            )
        if self.max_norm is None:
            return
        num_cut = sum(p in self._cuts for p, _ in trained)
        cut, whole = (part.square().sum(0, keepdim=True) for part in (lengths[:num_cut], lengths[num_cut:]))
        scale = self.max_norm / (float((whole + self.comm.all_reduce_(cut)).sqrt()) + 1e-6)
        if scale < 1:
            for grad in grads:
                grad.mul_(scale)


def has_cut_logits(model: nn.Module, plan: Mapping[str, str], loss_fn: LossFunction) -> bool:
    """Whether the plan leaves the logits cut over the ranks: a linear layer has the style "vocab".

    Raises:
        MplabError: it does, and the loss is none that can work with that.
    """
    linear = [path for path, module in model.named_modules() if is_linear(module)]
    if not any(style == "vocab" and matches(pattern, path) for pattern, style in plan.items() for path in linear):
        return False
    is_vocab_parallel = isinstance(loss_fn, partial) and loss_fn.func is vocab_parallel_cross_entropy
    if loss_fn is not cross_entropy and not is_vocab_parallel:
        raise MplabError(
            "the plan leaves the logits cut over the ranks, and this loss_fn would take a rank's part for all of them: "
            'say "column_gather" in place of "vocab" for the layer that gives them, or take '
            "partial(vocab_parallel_cross_entropy, comm=comm) as loss_fn"
        )
    return True


def parallel_loss(outputs: Any, targets: Tensor, loss_fn: LossFunction, comm: Communicator, is_cut: bool) -> Tensor:
    """The loss of outputs, or with `cross_entropy` of their `logits`, which may be cut over the ranks."""
    logits: Tensor = getattr(outputs, "logits", outputs)
    if loss_fn is not cross_entropy:
        return loss_fn(logits if is_cut else outputs, targets)
    return vocab_parallel_cross_entropy(logits, targets, comm) if is_cut else cross_entropy(logits, targets)
