"""Whole layers in float64, what goes through them, and what a rank has of it: what tests of cut layers compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mplab.models import seed_parameters
from mplab.parallel import ColumnParallelLinear
from mplab.parallel.tensor_layers import Entry

CPU = torch.device("cpu")
NUM_IN, NUM_OUT = 12, 36  # 1, 2, 3 and 4 ranks divide them; the second also as three joined matrices
SHAPE = (2, 12, NUM_IN)  # of activations


class Conv1D(nn.Module):
    """As Hugging Face has it: a linear layer whose weight is (in, out)."""

    def __init__(self, num_in: int, num_out: int, bias: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_in, num_out, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_out, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


KINDS: dict[str, Callable[..., nn.Module]] = {"Linear": nn.Linear, "Conv1D": Conv1D}


def seeded(
    kind: Callable[..., nn.Module], *sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> Any:
    """A layer with weights from `seed`, and nothing drawn from the global generator."""
    with torch.device("meta"):
        made = kind(*sizes, dtype=dtype, **options)
    made.to_empty(device="cpu")
    seed_parameters(made, seed)
    return made


def drawn(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(y: Tensor) -> Tensor:
    """Each element with a weight of its own, which depends on where in the whole tensor it is."""
    return (y.sin() * drawn(y.shape, 9).to(y.dtype)).sum()


def cut_loss(y: Tensor, whole: Sequence[int], part: Callable[[Tensor], Tensor]) -> Tensor:
    """What `part` of a whole tensor adds to its `loss_of`."""
    return (y.sin() * part(drawn(whole, 9)).to(y.dtype)).sum()


def joined_part(x: Tensor, rank: int, n: int, num_parts: int = 1, dim: int = -1) -> Tensor:
    """A rank's part of each of the matrices that are joined along `dim`."""
    return torch.cat([matrix.chunk(n, dim)[rank] for matrix in x.chunk(num_parts, dim)], dim)


class Seen(NamedTuple):
    output: Tensor
    input_gradient: Tensor | None
    gradients: dict[str, Tensor]


def follow(layer: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = loss_of) -> Seen:
    """Forward and backward of a layer, whose gradients are forgotten before."""
    layer.zero_grad()
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    loss(y).backward()
    return Seen(y.detach(), leaf.grad, {name: p.grad for name, p in layer.named_parameters() if p.grad is not None})


def close(got: Any, want: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def three(entry: Entry, whole: Sequence[nn.Module]) -> list[ColumnParallelLinear]:
    return [ColumnParallelLinear(layer, entry.axis, entry=entry) for layer in whole]


def of_one_entry(seed: int = 0) -> list[nn.Module]:
    """Query, key and value, of grouped heads."""
    return [seeded(nn.Linear, NUM_IN, size, seed=seed + i) for i, size in enumerate((12, 24, 12))]
