"""Backward in two parts: first the gradients of the inputs, for which another stage waits, later those of the weights.

A linear layer's backward is two matrix products that need nothing from each other. Inside `SplitBackward` it computes
the first and keeps what the second needs; `SplitBackward.finish` does the second. What is no linear layer (norms,
embeddings) has little to put off, and computes the gradients of its parameters in the first part.

Reference:
    Qi et al., "Zero bubble pipeline parallelism", ICLR 2024, section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class SplitBackward(TorchFunctionMode):
    """`with SplitBackward() as split: y = model(x)`; `y.backward()` is then the first part, `split.finish()` the other."""

    def __init__(self) -> None:
        super().__init__()
        self._later: list[tuple[Tensor, Tensor | None, Tensor, Tensor, bool]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and not kwargs and _can_split(*args):
            return _Linear.apply(self, *args)  # type: ignore[no-untyped-call]
        if func is torch.addmm and not kwargs and _can_split(args[1], args[2], args[0]):  # Hugging Face's GPT-2
            return _Linear.apply(self, args[1], args[2], args[0], True)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))

    def put_off(self, weight: Tensor, bias: Tensor | None, x: Tensor, grad: Tensor, is_transposed: bool) -> None:
        """Keep what the gradients of a linear layer's parameters are made of: its input, and its output's gradient."""
        self._later.append((weight, bias, x, grad, is_transposed))

    @torch.no_grad()
    def finish(self) -> None:
        """Add the gradients that were put off to the parameters' `grad`, and forget what they were made of."""
        while self._later:
            weight, bias, x, grad, is_transposed = self._later.pop()
            x, grad = x.flatten(0, -2), grad.flatten(0, -2)
            if weight.requires_grad:
                left, right = (x, grad) if is_transposed else (grad, x)
                if weight.grad is None:
                    weight.grad = left.T @ right
                else:
                    weight.grad.addmm_(left.T, right)
            if bias is not None and bias.requires_grad:
                total = grad.sum(0)
                bias.grad = total if bias.grad is None else bias.grad.add_(total)


def _can_split(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Parameters to train, in the dtype they are used in; a vector as input has no batch to sum over."""
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and weight.is_leaf
        and (bias is None or (bias.is_leaf and bias.dim() == 1))
        and x.dim() > 1
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, or x @ weight + bias if `is_transposed`."""

    @staticmethod
    def forward(
        ctx: Any,
        split: SplitBackward,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        is_transposed: bool = False,
    ) -> Tensor:
        ctx.split, ctx.is_transposed = split, is_transposed
        ctx.save_for_backward(x, weight, bias)
        return functional.linear(x, weight.T if is_transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        ctx.split.put_off(weight, bias, x, grad, ctx.is_transposed)
        needs_grad = ctx.needs_input_grad[1]
        return None, grad @ (weight.T if ctx.is_transposed else weight) if needs_grad else None, None, None, None
