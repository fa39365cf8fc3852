"""A dataset: batches that depend on the seed and the step alone, so that every rank sees the same ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mplab.errors import MplabError

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs and targets, with the same number of samples in dim 0."""


class Dataset(ABC):
    """Samples to train on, in a new order each epoch, and those after them, held out to judge by.

    Args:
        num_training: samples to train on.
        num_validation: samples held out.
        batch_size: samples of a training batch.
        seed: of the order, 0 or more. The global random state is neither read nor changed.

    Raises:
        MplabError: a batch below one sample or above what there is to train on, or a negative seed.
    """

    def __init__(self, num_training: int, num_validation: int, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= num_training:
            raise MplabError(f"batch_size {batch_size}: must be from 1 to the {num_training} training samples")
        if seed < 0:
            raise MplabError(f"seed {seed}: must be 0 or more")
        self.num_training, self.num_validation = num_training, num_validation
        self.batch_size, self.seed = batch_size, seed

    @abstractmethod
    def samples(self, indices: Tensor) -> Batch:
        """The samples with these indices (int64, one dim), as one batch on the CPU."""

    @property
    def num_batches(self) -> int:
        """Batches of one epoch; its rest, less than a batch, is left out, so that all batches have one shape."""
        return self.num_training // self.batch_size

    def batch(self, step: int) -> Batch:
        """The training batch of a step, 0 or more; after `num_batches` steps a new epoch begins, in a new order."""
        if step < 0:
            raise MplabError(f"step {step}: must be 0 or more")
        epoch, place = divmod(step, self.num_batches)
        start = place * self.batch_size
        return self.samples(epoch_order(self.num_training, self.seed, epoch)[start : start + self.batch_size])

    def batches(self, num_steps: int, start: int = 0) -> Iterator[Batch]:
        """The training batches of `num_steps` steps, from step `start` on."""
        return (self.batch(step) for step in range(start, start + num_steps))

    def validation(self) -> Iterator[Batch]:
        """Every held-out sample once, in order; the last batch may be smaller."""
        indices = torch.arange(self.num_training, self.num_training + self.num_validation)
        return (self.samples(part) for part in indices.split(self.batch_size))


@lru_cache(maxsize=4)
def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation of 0 to num_samples - 1. Not to be changed by the caller: it is kept."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(num_samples))
