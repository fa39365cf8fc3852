"""The operators between what every rank has whole and what each has a part of, as autograd knows them.

    operator         forward          backward         known as
    copy_to          nothing          all-reduce       f
    reduce_from      all-reduce       nothing          g
    scatter_to       own chunk        all-gather
    gather_from      all-gather       own chunk
    all_gather       all-gather       reduce-scatter   g of sequence parallelism
    reduce_scatter   reduce-scatter   all-gather       its conjugate
    all_reduce       all-reduce       all-reduce

They come in pairs of which each is the other's backward. The first four take what follows them (in backward: what came
before) as the same on every rank, so that its gradient is whole; the last three take it as a rank's own part, so that
the gradients of all ranks have to be added up.

A chunk is what `tensor_split` cuts. No input is changed in place, and any may be non-contiguous.

Reference:
    Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019,
    section 3 (f and g);
    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, section 4.2.2 (all_gather
    and reduce_scatter).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function

from mplab.comm.communicator import Communicator
from mplab.errors import MplabError


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's, which costs nothing where nobody asks for the gradient of a gradient: grad is off then already."""
    checked = function.once_differentiable(backward)

    @wraps(backward)
    def either(ctx: Any, *grads: Tensor) -> Any:
        return checked(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return either


def copy_to(x: Tensor, comm: Communicator) -> Tensor:
    """Before each rank works on all of `x` with its own part of the weights: every part adds to the gradient of `x`.

    **Communication**: none; in backward an all_reduce of `x`'s bytes.
    """
    return _apply(_CopyTo, x, comm)


def reduce_from(x: Tensor, comm: Communicator) -> Tensor:
    """The sum of what each rank has of `x`; all go on alike.

    **Communication**: an all_reduce of `x`'s bytes; in backward none.
    """
    return _apply(_ReduceFrom, x, comm)


def reduce_from_(x: Tensor, comm: Communicator) -> Tensor:
    """`reduce_from` into `x` itself, which is returned: for a result of the caller's own that nobody else has.

    Autograd sees none of it: the gradient of the sum is that of the summand.

    Raises:
        MplabError: a leaf of autograd.

    **Communication**: an all_reduce_ of `x`'s bytes; in backward none.
    """
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise MplabError("reduce_from_ into a leaf that needs its gradient: take reduce_from, which leaves it as it is")
    comm.all_reduce_(x.detach())  # autograd still counts that x has changed, for whoever has saved it
    return x


def scatter_to(x: Tensor, comm: Communicator, dim: int = -1) -> Tensor:
    """This rank's chunk of what all ranks have whole.

    **Communication**: none; in backward an all_gather of a chunk's bytes.
    """
    return _apply(_ScatterTo, x, comm, dim)


def gather_from(x: Tensor, comm: Communicator, dim: int = -1) -> Tensor:
    """All ranks' chunks, joined along `dim`; all go on alike.

    **Communication**: an all_gather of `x`'s bytes; in backward none.
    """
    return _apply(_GatherFrom, x, comm, dim)


def all_gather(x: Tensor, comm: Communicator, dim: int = 1) -> Tensor:
    """All ranks' chunks, joined along `dim`; each goes on with its own part of the weights, as after `copy_to`.

    **Communication**: an all_gather of `x`'s bytes; in backward a reduce_scatter of n times as many.
    """
    return _apply(_AllGather, x, comm, dim)


def reduce_scatter(x: Tensor, comm: Communicator, dim: int = 1) -> Tensor:
    """This rank's chunk of the sum of what each rank has of `x`.

    **Communication**: a reduce_scatter of `x`'s bytes; in backward an all_gather of a chunk's.
    """
    return _apply(_ReduceScatter, x, comm, dim)


def all_reduce(x: Tensor, comm: Communicator) -> Tensor:
    """The sum of what each rank has of `x`; each goes on with its own part of it.

    **Communication**: an all_reduce of `x`'s bytes, in backward too.
    """
    return _apply(_AllReduce, x, comm)


def _apply(operator: type[torch.autograd.Function], x: Tensor, *settings: Any) -> Tensor:
    y: Tensor = operator.apply(x, *settings)
    return y


def _own_chunk(x: Tensor, comm: Communicator, dim: int) -> Tensor:
    return x.tensor_split(comm.size, dim)[comm.rank].contiguous()


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.comm.all_reduce(grad), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        return comm.all_reduce(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, dim: int) -> Tensor:
        ctx.comm, ctx.dim = comm, dim
        return _own_chunk(x, comm, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.comm.all_gather(grad, ctx.dim), None, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, dim: int) -> Tensor:
        ctx.comm, ctx.dim = comm, dim
        return comm.all_gather(x, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _own_chunk(grad, ctx.comm, ctx.dim), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, dim: int) -> Tensor:
        ctx.comm, ctx.dim = comm, dim
        return comm.all_gather(x, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.comm.reduce_scatter(grad, dim=ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, dim: int) -> Tensor:
        ctx.comm, ctx.dim = comm, dim
        return comm.reduce_scatter(x, dim=dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.comm.all_gather(grad, ctx.dim), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return comm.all_reduce(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.comm.all_reduce(grad), None
