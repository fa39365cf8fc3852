"""What ranks that each train on a share of the batch have in common: settings, a start from the same weights, and the
message that closes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mplab.comm.communicator import Communicator
from mplab.datasets import Batch
from mplab.errors import MplabError
from mplab.parallel.serial import check_batch

_OF_EMBEDDINGS = {
    "max_norm": "it changes the weights of the tokens that it sees, and each rank sees others",
    "scale_grad_by_freq": "it divides by how often it sees a token, and each rank sees others",
    "sparse": "its gradients are sparse, and ranks add up dense ones",
}


def check_training(
    model: object,
    loss_fn: object,
    optimizer: object,
    num_microbatches: int,
    max_norm: float | None,
    autocast: torch.dtype | None,
) -> None:
    """Refuse a model and settings that no rank can train with.

    Raises:
        MplabError: says which.
    """
    if not isinstance(model, nn.Module):
        raise MplabError(f"model is a {type(model).__name__}: give an nn.Module")
    if not any(p.requires_grad for p in model.parameters()):
        raise MplabError("no parameter of this model is trained: set requires_grad of some to True")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise MplabError(f"{name} has no shape yet: call the model once before it is laid out over ranks")
        if tensor.is_meta:
            raise MplabError(f"{name} is on the meta device and has no values: build the model on a real device")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            for option, why in _OF_EMBEDDINGS.items():
                if (value := getattr(module, option)) not in (None, False):
                    said = f"{name or 'the model'} is an {type(module).__name__} with {option}={value}"
                    raise MplabError(f"{said}: {why}; leave it out")
    if not callable(loss_fn):
        raise MplabError(f"loss_fn is a {type(loss_fn).__name__}: give a function of outputs and targets")
    if not callable(optimizer):
        raise MplabError(
            f"optimizer is a {type(optimizer).__name__}: each rank makes its own, so give what makes it: "
            "torch.optim.AdamW, or partial(torch.optim.SGD, lr=0.1)"
        )
    check_count("num_microbatches", num_microbatches)
    if max_norm is not None and not (isinstance(max_norm, int | float) and max_norm > 0):
        raise MplabError(f"max_norm {max_norm!r}: must be a number above 0, or None for no clipping")
    if autocast not in (None, torch.bfloat16):
        raise MplabError(
            f"autocast {autocast}: take torch.bfloat16, or None; float16's gradients need a loss that is scaled up"
        )


def check_count(name: str, value: object) -> None:
    """Refuse what is no whole number of 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MplabError(f"{name} {value!r}: must be a whole number, 1 or more")


def described(model: nn.Module) -> dict[str, Any]:
    """The parameters as all ranks must have them, for `check_agreement`."""
    return {n: [list(p.shape), str(p.dtype), p.requires_grad] for n, p in model.named_parameters()}


def check_same_rank(new: Communicator, old: Communicator) -> None:
    """A communicator of another run must be the same rank's.

    Raises:
        MplabError: it is another rank's.
    """
    if (new.rank, new.size) != (old.rank, old.size):
        raise MplabError(f"connect to rank {new.rank} of {new.size}: this is rank {old.rank} of {old.size}")


@torch.no_grad()
def broadcast_state(model: nn.Module, comm: Communicator) -> None:
    """Give every rank the weights and buffers of rank 0.

    **Communication**: one broadcast for each of them.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.copy_(comm.broadcast(tensor))


def total_samples(mine: Batch, comm: Communicator) -> int:
    """Samples of all ranks together.

    Raises:
        MplabError: inputs and targets of different lengths, or no rank has a sample.

    **Communication**: all_gather of 8 bytes.
    """
    total = int(comm.all_gather(torch.tensor([check_batch(mine)], device=comm.device)).sum())
    if not total:
        raise MplabError(f"none of the {comm.size} ranks has a sample: a step needs one or more")
    return total


def squared_norm(x: Tensor) -> Tensor:
    """The sum of the squares of a tensor's numbers, in float64, whose shares of several ranks add up."""
    numbers = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    norm: Tensor = torch.linalg.vector_norm(numbers, dtype=torch.float64)
    return norm.square()


def check_frozen(frozen: Iterable[nn.Parameter]) -> None:
    """Refuse to go on where a parameter that was frozen at the start is trained.

    Raises:
        MplabError: what to do.
    """
    if any(p.requires_grad for p in frozen):
        raise MplabError(
            "a parameter that was frozen is trained now, and nobody would add up its gradients: set requires_grad "
            "before training is set up"
        )


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """For a forward in mixed precision; None: as the caller has it."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def close_step(
    comm: Communicator, loss: Tensor, num_samples: int, num_parameters: int, unused: Collection[int]
) -> tuple[float, set[int]]:
    """One message at the end of a step: what all ranks must know before they update.

    Args:
        comm: this rank's communicator.
        loss: this rank's share of the mean loss, a scalar.
        num_samples: of the whole batch, as this rank knows it; 0: it does not.
        num_parameters: how many are trained.
        unused: which of them this rank has no gradient for.

    Returns:
        The mean loss over the batch, and the parameters that no rank has a gradient for.

    Raises:
        MplabError: ranks were given batches of different sizes.

    **Communication**: all_reduce_ of 2 + `num_parameters` float64.
    """
    return start_close(comm, loss, num_samples, num_parameters, unused)()


def start_close(
    comm: Communicator, loss: Tensor, num_samples: int, num_parameters: int, unused: Collection[int]
) -> Callable[[], tuple[float, set[int]]]:
    """Start a `close_step`; what is returned waits for it."""
    said = torch.ones(2 + num_parameters, dtype=torch.float64, device=comm.device)
    said[0], said[1] = loss, num_samples
    for index in unused:
        said[2 + index] = 0
    handle = comm.iall_reduce_(said)

    def finish() -> tuple[float, set[int]]:
        mean, total, *used = handle.wait().tolist()
        if total != comm.size * num_samples:
            raise MplabError(
                f"rank {comm.rank} was given a batch of {num_samples} samples, and the {comm.size} ranks have "
                f"{total:g} together: give every rank the same whole batch, or its own samples with step_shard"
            )
        return mean, {index for index, count in enumerate(used) if not count}

    return finish
