"""Plain training on one device: the oracle that every strategy is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from mplab.datasets import Batch
from mplab.errors import MplabError
from mplab.models import cross_entropy

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> their mean loss over the samples, a tensor without dims."""


def check_batch(batch: Batch, num_microbatches: int = 0) -> int:
    """The number of samples of a batch that can be trained on.

    Args:
        batch: inputs and targets.
        num_microbatches: of which each needs a sample; 0: none.

    Raises:
        MplabError: inputs and targets of different lengths, or fewer samples than micro-batches.
    """
    inputs, targets = batch
    if len(inputs) != len(targets):
        raise MplabError(f"{len(inputs)} inputs and {len(targets)} targets: a batch needs as many of each")
    if len(inputs) < num_microbatches:
        raise MplabError(
            f"a batch of {len(inputs)} samples can't be cut in {num_microbatches} micro-batches, each needs one sample "
            "or more: take a larger batch, or fewer micro-batches"
        )
    return len(inputs)


class Serial:
    """Trains a model where it is, with nothing parallel about it.

    Args:
        model: any module that takes the batch's inputs.
        optimizer: over the model's parameters.
        loss_fn: outputs and targets -> mean loss over the samples.
        num_microbatches: parts in which a batch is computed before its one update (gradient accumulation).
        max_norm: longest gradient (2-norm over all parameters); a longer one is scaled down to it. None: any.

    Raises:
        MplabError: fewer than one micro-batch, or a `max_norm` that is not above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction = cross_entropy,
        num_microbatches: int = 1,
        max_norm: float | None = None,
    ) -> None:
        if num_microbatches < 1:
            raise MplabError(f"num_microbatches {num_microbatches}: must be 1 or more")
        if max_norm is not None and not max_norm > 0:
            raise MplabError(f"max_norm {max_norm}: must be above 0, or None for no clipping")
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.num_microbatches, self.max_norm = num_microbatches, max_norm

    def step(self, batch: Batch) -> float:
        """One update; afterwards the gradients can still be read.

        Args:
            batch: inputs and targets, on any device, with their samples in dim 0.

        Returns:
            The mean loss over the batch's samples, before the update.

        Raises:
            MplabError: inputs and targets of different lengths, or fewer samples than micro-batches.
        """
        inputs, targets = self._on_device(batch)
        num_samples = check_batch(batch, self.num_microbatches)
        self.optimizer.zero_grad()
        losses = []
        parts = (tensor.tensor_split(self.num_microbatches) for tensor in (inputs, targets))
        for part_inputs, part_targets in zip(*parts, strict=True):
            # parts may differ by one sample: weighed by their samples they add up to the mean over the batch
            loss = self.loss_fn(self.model(part_inputs), part_targets) * (len(part_inputs) / num_samples)
            loss.backward()
            losses.append(loss.detach())
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        return float(torch.stack(losses).sum())  # the only wait for the device, after the update is on its way

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """The mean loss over all samples of all batches, with nothing updated; batches may differ in size.

        Raises:
            MplabError: inputs and targets of different lengths, or no samples at all.
        """
        total, num_samples = 0.0, 0
        for batch in batches:
            inputs, targets = self._on_device(batch)
            total += float(self.loss_fn(self.model(inputs), targets)) * len(inputs)
            num_samples += len(inputs)
        if not num_samples:
            raise MplabError("evaluate got no samples: it needs one batch or more")
        return total / num_samples

    def _on_device(self, batch: Batch) -> Batch:
        check_batch(batch)
        inputs, targets = batch
        device = next(self.model.parameters()).device
        return inputs.to(device), targets.to(device)
