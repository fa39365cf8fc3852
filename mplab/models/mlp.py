"""A multi-layer perceptron, for the handwritten digits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from mplab.errors import MplabError
from mplab.models.seed import seed_parameters


class MLP(nn.Sequential):
    """Linear layers with a GELU between them, as a plain chain: parameters "0.weight", "0.bias", "2.weight", ...

    Args:
        sizes: features of the input, of each hidden layer, and classes: (64, 128, 10) has one hidden layer.
        seed: of the weights, which come from the parameters' names (`seed_parameters`).

    Shapes:
        (B, sizes[0]) float -> logits (B, sizes[-1]).

    Raises:
        MplabError: fewer than two sizes, or one below 1.
    """

    def __init__(self, sizes: Sequence[int] = (64, 128, 128, 10), seed: int = 0) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise MplabError(f"MLP sizes {tuple(sizes)}: needs at least two (input and output), each 1 or more")
        with torch.device("meta"):  # shapes only: torch's own initialisation would draw from the global generator
            layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
            for num_in, num_out in itertools.pairwise(sizes[1:]):
                layers += [nn.GELU(), nn.Linear(num_in, num_out)]
        super().__init__(*layers)
        self.to_empty(device=torch.get_default_device())
        seed_parameters(self, seed)
