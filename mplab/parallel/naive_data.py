"""Data parallelism as one writes it first: three ways to make one update of many ranks' samples.

    naive_data_parallel    every rank: its gradients -> all-reduce, one a parameter -> its own update
    parameter_server       every rank: its gradients -> the master adds up and updates -> weights to every rank
    scatter_gather         the master: weights and samples out, outputs in, loss, gradients of the outputs out,
                           gradients of the weights in, update

All three train as `Serial` does. `DataParallel` is the good one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator
from mplab.datasets import Batch, shard
from mplab.errors import MplabError
from mplab.models import cross_entropy
from mplab.parallel.serial import LossFunction
from mplab.parallel.shares import close_step


def naive_data_parallel(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    comm: Communicator,
    loss_fn: LossFunction = cross_entropy,
) -> float:
    """One update: every rank computes its samples, and after backward the gradients are added up one by one.

    Args:
        model: this rank's own, with the same weights on every rank.
        optimizer: this rank's own, over its model's parameters.
        batch: all of it on every rank, with N samples in dim 0; a rank may get none of them.
        comm: this rank's communicator.
        loss_fn: outputs and targets -> mean loss over the samples.

    Returns:
        The mean loss over the batch's samples, before the update; the same on every rank. The gradients can still be
        read: they are the batch's, and None where no rank had one.

    Raises:
        MplabError: inputs and targets of different lengths, or no samples, before any message; batches of different
            lengths, by one rank at least and before it updates. Batches of one length that differ are not found.

    **Communication**: an all_reduce of every trained parameter's gradient, and one of 2 + (number of trained
    parameters) float64: loss, samples, and who had a gradient.
    """
    parameters, loss = _own_gradients(model, batch, comm, loss_fn)
    unused = _unused(parameters)
    for p in parameters:
        p.grad = comm.all_reduce(_gradient(p))
    mean = _close(comm, parameters, unused, loss, len(batch[0]))
    with comm.trace.span("update"):
        optimizer.step()
    return mean


def parameter_server(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    comm: Communicator,
    loss_fn: LossFunction = cross_entropy,
    master: int = 0,
) -> float:
    """One update: the master adds up all ranks' gradients, updates alone, and sends the new weights back.

    Args:
        model: this rank's own, with the same weights on every rank.
        optimizer: over the parameters of the master's model; no other rank's is used.
        batch: all of it on every rank, with N samples in dim 0; a rank may get none of them.
        comm: this rank's communicator.
        loss_fn: outputs and targets -> mean loss over the samples.
        master: the rank that updates.

    Returns:
        The mean loss over the batch's samples, before the update; the same on every rank. The master's gradients are
        the batch's; those of the others are their own shares of them.

    Raises:
        MplabError: as `naive_data_parallel`, or a master that is no rank.

    **Communication**: a reduce of every trained parameter's gradient to the master, an all_reduce of 2 + (number of
    trained parameters) float64, and a broadcast of every trained parameter from the master.

    Reference:
        Li et al., "Scaling Distributed Machine Learning with the Parameter Server", OSDI 2014, section 2; with one
        server, and every worker waiting for all others.
    """
    _check_master(comm, master)
    parameters, loss = _own_gradients(model, batch, comm, loss_fn)
    mean = _update_on_master(optimizer, parameters, comm, master, loss, len(batch[0]))
    _send_weights(parameters, comm, master)
    return mean


def scatter_gather(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch | None,
    comm: Communicator,
    loss_fn: LossFunction = cross_entropy,
    master: int = 0,
) -> float:
    """One update in the way of `nn.DataParallel`: the master has the batch, the weights that count and the loss.

    Args:
        model: this rank's own; on all but the master its weights and buffers are overwritten.
        optimizer: over the parameters of the master's model; no other rank's is used.
        batch: the master's, with N samples in dim 0; what other ranks give is not looked at. A rank that gets none of
            the samples calls its model with none, to know the shape of its outputs.
        comm: this rank's communicator.
        loss_fn: outputs and targets of the whole batch -> mean loss over the samples.
        master: the rank that has all this.

    Returns:
        The mean loss over the batch's samples, before the update; the same on every rank. The master's gradients are
        the batch's; those of the others are their own shares of them. Their weights are those of before the update.

    Raises:
        MplabError: on the master, as `naive_data_parallel`; a master that is no rank; or a model whose outputs are not
            one a sample.

    **Communication**: a broadcast of every parameter and buffer, a scatter of the inputs, a gather of the outputs, a
    scatter of their gradient, a reduce of every trained parameter's gradient to the master, and an all_reduce of 2 +
    (number of trained parameters) float64.
    """
    _check_master(comm, master)
    inputs = targets = None
    if comm.rank == master:
        if batch is None:
            raise MplabError(f"rank {master} is the master and has no batch: the master gives it, the others None")
        shard(batch, comm)  # the master's batch is refused as those of all ranks are elsewhere
        inputs, targets = (x.to(comm.device) for x in batch)
    _send_weights([*model.parameters(), *model.buffers()], comm, master)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    mine = comm.scatter(inputs, master)
    with comm.trace.span("forward"):
        outputs = model(mine)
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != mine.shape[:1]:
        got = f"of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"in a {type(outputs).__name__}"
        raise MplabError(
            f"{len(mine)} samples gave outputs {got}: to be gathered they must be one tensor, with the samples in dim 0"
        )
    gathered = comm.gather(outputs, master)
    loss, gradient = torch.zeros(()), None
    if gathered is not None and targets is not None:  # on the master
        with comm.trace.span("loss"):
            loss = loss_fn(gathered.requires_grad_(), targets)
            (gradient,) = torch.autograd.grad(loss, gathered)
    gradient = comm.scatter(gradient, master)
    if len(mine):
        with comm.trace.span("backward"):
            outputs.backward(gradient)
    return _update_on_master(optimizer, parameters, comm, master, loss, 0)


# --- what they share -------------------------------------------------------------------------------------------------


def _check_master(comm: Communicator, master: int) -> None:
    if not 0 <= master < comm.size:
        raise MplabError(f"master={master} is no rank of this group of {comm.size}: ranks go from 0 to {comm.size - 1}")


def _own_gradients(
    model: nn.Module, batch: Batch, comm: Communicator, loss_fn: LossFunction
) -> tuple[list[nn.Parameter], Tensor]:
    """Forward and backward of this rank's samples: the trained parameters, and its share of the loss."""
    inputs, targets = (x.to(comm.device) for x in shard(batch, comm))
    model.zero_grad()
    loss = torch.zeros(())
    if len(inputs):  # the mean over no samples would be NaN
        with comm.trace.span("forward"):
            loss = loss_fn(model(inputs), targets) * (len(inputs) / len(batch[0]))
        with comm.trace.span("backward"):
            loss.backward()
    return [p for p in model.parameters() if p.requires_grad], loss


def _unused(parameters: list[nn.Parameter]) -> set[int]:
    return {index for index, p in enumerate(parameters) if p.grad is None}


def _gradient(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient; of zeros where this rank has none, since another one may."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _close(
    comm: Communicator, parameters: list[nn.Parameter], unused: set[int], loss: Tensor, num_samples: int
) -> float:
    """The mean loss; gradients that no rank had are taken away again, since an optimizer passes over these."""
    mean, by_nobody = close_step(comm, loss.detach(), num_samples, len(parameters), unused)
    for index in by_nobody:
        parameters[index].grad = None
    return mean


def _update_on_master(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    comm: Communicator,
    master: int,
    loss: Tensor,
    num_samples: int,
) -> float:
    """Add up the gradients on the master, which updates; the mean loss."""
    unused = _unused(parameters)
    for p in parameters:
        total = comm.reduce(_gradient(p), root=master)
        if total is not None:
            p.grad = total
    mean = _close(comm, parameters, unused, loss, num_samples)
    if comm.rank == master:
        with comm.trace.span("update"):
            optimizer.step()
    return mean


@torch.no_grad()
def _send_weights(tensors: Sequence[Tensor], comm: Communicator, master: int) -> None:
    """The master's tensors, into those of all others."""
    for x in tensors:
        sent = comm.broadcast(x, master)
        if comm.rank != master:
            x.copy_(sent)
