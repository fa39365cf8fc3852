"""Backward in two parts: first the gradients of the inputs, for which another stage waits, later those of the weights.

A linear layer's backward is two matrix products that need nothing from each other. `SplitBackward` lets autograd see
constant weights, so that it computes the first alone; a hook keeps what the second is made of until `PutOff.compute`.
What is no linear layer (norms, embeddings) has little to put off: its parameters' gradients come with the first part.

Reference:
    Qi et al., "Zero bubble pipeline parallelism", ICLR 2024, section 2.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mplab.parallel.tensor_layers import CutLinear


class PutOff:
    """The weight gradients of one micro-batch that its backward has put off."""

    def __init__(self) -> None:
        self._waiting: list[tuple[nn.Parameter, nn.Parameter | None, bool, Tensor, Tensor]] = []

    def add(
        self, weight: nn.Parameter, bias: nn.Parameter | None, is_transposed: bool, x: Tensor, grad: Tensor
    ) -> None:
        """Keep a linear layer's input and the gradient of its output; called by autograd.

        Args:
            weight: (out, in), or (in, out) if transposed.
            bias: what was added in the same product; None: nothing.
            is_transposed: as in a `Conv1D`.
            x: (..., in).
            grad: (..., out).
        """
        self._waiting.append((weight, bias, is_transposed, x, grad))

    @torch.no_grad()
    def compute(self) -> None:
        """Add the weight gradients to the parameters' `grad`, and forget what they were made of."""
        while self._waiting:
            weight, bias, is_transposed, x, grad = self._waiting.pop()
            x, grad = x.flatten(0, -2), grad.flatten(0, -2)
            left, right = (x.conj(), grad) if is_transposed else (grad, x.conj())
            if weight.requires_grad:
                if weight.grad is None:
                    weight.grad = left.T @ right
                else:
                    weight.grad.addmm_(left.T, right)
            if bias is not None and bias.requires_grad:
                total = grad.sum_to_size(bias.shape)  # a bias may be one number for all outputs
                bias.grad = total if bias.grad is None else bias.grad.add_(total)


class SplitBackward:
    """Splits the backward of a module: its linear layers become ones that put their weights' gradients off.

    Set `put_off` to a new `PutOff` before each forward: the backward of that forward adds to it.

    Args:
        module: the layers' classes are changed in place (`nn.Linear`, Hugging Face's `Conv1D`, and both of them cut
            over a tensor axis); names, parameters and results stay what they were.
    """

    def __init__(self, module: nn.Module) -> None:
        self.put_off = PutOff()
        for layer in module.modules():
            if _can_split(layer):
                way = _SplitCut if isinstance(layer, CutLinear) else _Split
                layer.__class__ = type(f"Split{type(layer).__name__}", (way, type(layer)), {})
                layer.split = self  # type: ignore[assignment]


def _can_split(layer: nn.Module) -> bool:
    """A linear layer whose weights are parameters: those of a spectral norm, for example, are computed from others."""
    kind = type(layer)
    is_linear = kind is nn.Linear or (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
    return isinstance(layer, CutLinear) or (is_linear and {"weight", "bias"} <= layer._parameters.keys())


class _Split(nn.Module):
    """Goes before a linear layer's class: y = x @ weight.T + bias, or x @ weight + bias in a `Conv1D`."""

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        if not _has_rows(x):
            y: Tensor = super().forward(x)
            return y
        return _product(layer, x, layer.bias, not isinstance(self, nn.Linear))


class _SplitCut(nn.Module):
    """The same before the class of a linear layer that is cut: its messages stay where they were."""

    def product(self, x: Tensor, bias: nn.Parameter | None) -> Tensor:
        layer: Any = self
        if not _has_rows(x):
            y: Tensor = super().product(x, bias)  # type: ignore[misc]
            return y
        return _product(layer, x, bias, layer.is_transposed)


def _has_rows(x: Tensor) -> bool:
    """Autocast would use other weights than these, and a vector has no batch to sum over."""
    return x.requires_grad and x.dim() >= 2 and not torch.is_autocast_enabled(x.device.type)


def _product(layer: Any, x: Tensor, bias: nn.Parameter | None, is_transposed: bool) -> Tensor:
    constant = layer.weight.detach().T if is_transposed else layer.weight.detach()
    y = functional.linear(x, constant, None if bias is None else bias.detach())
    if y.requires_grad:  # not under no_grad
        y.register_hook(partial(layer.split.put_off.add, layer.weight, bias, is_transposed, x.detach()))
    return y
