"""What every layer of a model costs with one micro-batch, measured: from it a pipeline's step can be predicted.

A layer that is timed alone, again and again, finds its weights in the cache. So all layers run one after the other,
forward and then backward, as in a pipeline's stage, and marks between them tell them apart: in the backward the marks
are made by hooks on what the layers hand on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mplab.datasets import Batch
from mplab.errors import MplabError
from mplab.models import Layer, Stage, cross_entropy, layers
from mplab.parallel.backward import SplitBackward
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.serial import LossFunction
from mplab.plan.partition import LayerCost
from mplab.trace.recorder import Mark, cuda_mark
from mplab.world import Rank, World
from mplab.world.rungs import num_cores

_NUM_WARMUPS = 3
_TIMES = ("forward_s", "backward_s", "input_gradient_s", "weight_gradient_s", "update_s")


def profile_layers(
    model: nn.Module,
    batch: Batch,
    num_microbatches: int = 8,
    loss_fn: LossFunction = cross_entropy,
    optimizer: OptimizerFactory = torch.optim.AdamW,
    world: World | None = None,
    num_repeats: int = 20,
) -> list[LayerCost]:
    """Measure every layer's forward, backward (whole and in two parts), update, and what it hands on and holds.

    The model is copied: it is not changed, nor are the global random numbers.

    Args:
        model: what `mplab.models.layers` can turn into a chain.
        batch: inputs and targets; its first micro-batch is what is measured with.
        num_microbatches: parts of the batch.
        loss_fn: outputs and targets -> mean loss; a part of the last layer.
        optimizer: makes an optimizer of parameters.
        world: its ranks measure the whole model all at once, as many of them as there are cores or GPUs, because cores
            share caches and memory; the median over the ranks counts. None: one rank alone.
        num_repeats: measurements of each time, of which the median counts.

    Returns:
        One cost a layer. A weight that is tied between layers counts in each of them.

    Raises:
        MplabError: a model that is no chain, or a batch that is too small.
    """
    chain = layers(model)
    inputs, targets = batch
    if not 1 <= num_microbatches <= len(inputs):
        raise MplabError(
            f"a batch of {len(inputs)} samples can't be cut in {num_microbatches} micro-batches: take a larger batch, "
            "or fewer micro-batches"
        )
    part = inputs.tensor_split(num_microbatches)[0], targets.tensor_split(num_microbatches)[0]
    world = world or World(1, str(inputs.device))
    gpus = sorted({device.index for device in world.devices if device.type == "cuda"})
    with torch.random.fork_rng(gpus):  # dropout draws from it; here, because the ranks share it
        return world.run(_profile_rank, chain, part, loss_fn, optimizer, num_repeats)[0]
