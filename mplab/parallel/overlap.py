"""The all-reduce of a column-parallel layer's backward, under way while the gradients of its weights are computed.

    forward    wait ──> weights ──> start ──> linear layers
    backward   gradient of the input -> start sends it -> gradients of the weights -> wait has the sum

Autograd runs those of its nodes that are ready from the last one made to the first. So the nodes that compute the
gradients of weights are made before the node that sends: in backward their turn comes after it, and before the wait's.
Results do not hang on that order; only what is computed meanwhile does.

Reference:
    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, section 4.2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mplab.comm.communicator import Communicator, Handle


class OverlappedEntry:
    """Where an activation enters column-parallel layers, in place of `copy_to` or `all_gather`.

    Args:
        sequence_dim: the activation comes cut along this dim; None: whole.
    """

    def __init__(self, sequence_dim: int | None) -> None:
        self.sequence_dim = sequence_dim
        self._layers: list[nn.Module] = []
        self._views: dict[nn.Module, tuple[Tensor, list[tuple[Tensor, Tensor]]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}}  # a copy begins with none: those here are of a graph

    def add(self, layer: nn.Module) -> None:
        """Count in a layer that reads what enters here."""
        self._layers.append(layer)

    def enter(self, x: Tensor, comm: Communicator) -> Tensor:
        """The activation, whole; once for each forward, before the layers are called."""
        sent: list[Handle[Tensor]] = []
        x = _apply(_Wait, x, sent)
        for layer in self._layers:
            self._views[layer] = _with_work(layer)
        return _apply(_Start, x, comm, self.sequence_dim, sent)

    def linear(self, layer: nn.Module, x: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
        """The layer's product of what entered and its weight."""
        if layer not in self._views:  # read once already, or entered without grad
            self._views[layer] = _with_work(layer)
        y = _apply(_Product, x, *self._views.pop(layer), is_transposed)
        return y if bias is None else y + bias.to(y.dtype)


def _with_work(layer: Any) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    work: list[tuple[Tensor, Tensor]] = []
    return _apply(_WeightGradient, layer.weight, work), work


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    y: Tensor = function.apply(*arguments)
    return y


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[Handle[Tensor]]) -> Tensor:
        ctx.sent = sent
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.sent.pop().wait(), None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, work: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.work = work
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        left, right = (x.reshape(-1, x.shape[-1]) for x in ctx.work.pop())
        return left.t() @ right, None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, comm: Communicator, sequence_dim: int | None, sent: list[Handle[Tensor]]
    ) -> Tensor:
        ctx.comm, ctx.sequence_dim, ctx.sent, ctx.shape = comm, sequence_dim, sent, x.shape
        return x.view_as(x) if sequence_dim is None else comm.all_gather(x, sequence_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        comm, dim = ctx.comm, ctx.sequence_dim
        ctx.sent.append(comm.iall_reduce(grad) if dim is None else comm.ireduce_scatter(grad, dim=dim))
        return _stand_in(grad, ctx.shape), None, None, None


class _Product(torch.autograd.Function):
    """x W or x W^T; backward computes the gradient of x, and leaves that of W to `_WeightGradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, work: list[tuple[Tensor, Tensor]], is_transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.work, ctx.is_transposed = work, is_transposed
        return functional.linear(x, weight.t() if is_transposed else weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            mine = x.to(grad.dtype)
            ctx.work.append((mine, grad) if ctx.is_transposed else (grad, mine))
        used = weight.to(grad.dtype)  # under autocast the product was one of a narrower dtype
        grad_x = grad @ (used.t() if ctx.is_transposed else used)
        return grad_x, _stand_in(weight, weight.shape), None, None


def _stand_in(x: Tensor, shape: torch.Size) -> Tensor:
    """What autograd hands on where the gradient comes another way: no memory, and never read."""
    return x.new_zeros(()).expand(shape)
