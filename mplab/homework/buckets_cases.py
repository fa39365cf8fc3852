"""What the exercise on buckets is run with: models of uneven layers, sizes of buckets, and the right gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from mplab.homework.watched import ITEM_BYTES, listed
from mplab.models import seed_parameters

WIDTHS = ((3, 5), (5, 2), (2, 7), (7, 4))  # of the layers, in the order in which they are used
ORDERS = ((0, 1, 2, 3), (0, 2, 1, 3))  # where the model has these layers
BUCKET_BYTES = (64, 128, 1 << 20)  # many buckets, some of one parameter; two or three; one for all


class _Layer(nn.Module):
    """An `nn.Linear` that draws no numbers from the global random state."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(s)) for s in ((num_outputs, num_inputs), (num_outputs,)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(x, self.weight, self.bias))


class Net(nn.Module):
    """Layers of uneven sizes, of which the second one's weight is frozen.

    Args:
        order: for each layer of WIDTHS, its place in the model.
    """

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.order = order
        layers = [_Layer(*WIDTHS[order.index(place)]) for place in range(len(order))]
        self.layers = nn.ModuleList(layers)
        seed_parameters(self)
        layers[order[1]].weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for place in self.order:
            x = self.layers[place](x)
        return x


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        num_ranks: size of the world.
        order: of the model's layers, see `Net`.
        bucket_bytes: size of a bucket.
    """

    num_ranks: int
    order: tuple[int, ...]
    bucket_bytes: int

    def __str__(self) -> str:
        other = ", layers used in another order" * (self.order != ORDERS[0])
        lengths = listed(self.lengths)
        return f"{self.num_ranks} ranks, parameters of {lengths} elements{other}, bucket_bytes={self.bucket_bytes}"

    @cached_property
    def model(self) -> Net:
        """What each rank gets a copy of."""
        return Net(self.order)

    @cached_property
    def lengths(self) -> list[int]:
        """Elements of the trained parameters."""
        return [p.numel() for p in trained(self.model)]

    @cached_property
    def buckets(self) -> list[list[int]]:
        """The trained parameters in each bucket, by their place among these."""
        buckets: list[list[int]] = [[]]
        for index in reversed(range(len(self.lengths))):
            if buckets[-1] and sum(self.lengths[i] for i in [*buckets[-1], index]) * ITEM_BYTES > self.bucket_bytes:
                buckets.append([])
            buckets[-1].append(index)
        return buckets

    @cached_property
    def bucket_lengths(self) -> list[int]:
        """Elements of each bucket."""
        return [sum(self.lengths[i] for i in bucket) for bucket in self.buckets]

    @cached_property
    def shares(self) -> list[list[Tensor]]:
        """For each rank the gradients of its share of the loss."""
        found = []
        for rank in range(self.num_ranks):
            model = copy.deepcopy(self.model)
            self.loss(model, rank).backward()
            found.append([p.grad for p in trained(model) if p.grad is not None])
        return found

    def loss(self, model: nn.Module, rank: int) -> Tensor:
        """A rank's share: the mean over the samples of all ranks is their sum. The shares have 1, 2, ... samples."""
        inputs = torch.randn(rank + 1, WIDTHS[0][0], generator=torch.Generator().manual_seed(rank))
        num_samples = self.num_ranks * (self.num_ranks + 1) // 2
        loss: Tensor = model(inputs).square().sum() / num_samples
        return loss


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Its parameters that are."""
    return [p for p in model.parameters() if p.requires_grad]


SETTINGS = [
    *(Setting(2, order, size) for order in ORDERS for size in BUCKET_BYTES),
    *(Setting(n, ORDERS[place], BUCKET_BYTES[place]) for n in (3, 4) for place in range(2)),
]
