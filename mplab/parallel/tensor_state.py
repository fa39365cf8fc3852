"""What the ranks of a model that is cut have to bring together: its weights as one, and gradients that are parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator
from mplab.errors import MplabError
from mplab.parallel.cut import Cut, cuts_by_name, cuts_of
from mplab.private import is_shared


@torch.no_grad()
def broadcast_whole(model: nn.Module, comm: Communicator) -> None:
    """Give every rank what rank 0 has of all that is not cut.

    **Communication**: a broadcast of each such parameter and buffer.
    """
    cuts = cuts_of(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor not in cuts:
            tensor.copy_(comm.broadcast(tensor))


def partial_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that each rank has whole and uses for its own part of the work, so that its gradient is a part.

    With sequence parallelism these are all that are not cut; else those of the style "partial" alone.

    Args:
        model: what `tensor_parallel` gave.
    """
    cuts = cuts_of(model)
    found = {
        p: None
        for module in model.modules()
        if getattr(module, "has_partial_gradients", False)
        for p in module.parameters(recurse=False)
        if p not in cuts
    }
    return list(found)


def sum_gradients(parameters: Iterable[nn.Parameter], comm: Communicator) -> None:
    """Add up, over all ranks, the gradients of `partial_parameters`: after each backward, or after several.

    **Communication**: one all_reduce_coalesced_ for each dtype.
    """
    grads = []
    for p in parameters:
        if p.grad is None:
            continue
        if is_shared(p.grad):  # in place, another gradient in the same memory would be counted twice
            p.grad = p.grad.clone()
        grads.append(p.grad)
    sum_in_place(grads, comm)


def sum_in_place(xs: Iterable[Tensor], comm: Communicator) -> None:
    """Make each tensor the sum over all ranks; no two may share memory.

    **Communication**: one all_reduce_coalesced_ for each dtype.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for x in xs:
        by_dtype.setdefault(x.dtype, []).append(x)
    for of_dtype in by_dtype.values():
        comm.all_reduce_coalesced_(of_dtype)


def full_state_dict(model: nn.Module, comm: Communicator) -> dict[str, Tensor]:
    """The ordinary `state_dict` of the model that `tensor_parallel` was given, on every rank, as copies.

    **Communication**: an all_gather of each parameter that is cut.
    """
    return merge(model.state_dict(keep_vars=True), cuts_by_name(model), comm)


def full_gradients(model: nn.Module, comm: Communicator) -> dict[str, Tensor]:
    """The gradients that the whole model would have, by name, on every rank, as copies; of frozen parameters none.

    **Communication**: an all_gather of each parameter that is cut.
    """
    trained = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    grads = {p: torch.zeros_like(p) if p.grad is None else p.grad for p in trained.values()}
    return merge({name: grads[p] for name, p in trained.items()}, cuts_by_name(model), comm)


def merge(parts: Mapping[str, Tensor], cuts: Mapping[str, Cut], comm: Communicator) -> dict[str, Tensor]:
    """What this rank has by name, whole: as copies, one for what has several names."""
    whole: dict[Tensor, Tensor] = {}
    for name, part in parts.items():
        if part not in whole:
            x, cut = part.detach(), cuts.get(name)
            whole[part] = x.clone() if cut is None else cut.merge(x, comm)
    return {name: whole[part] for name, part in parts.items()}


def split(state: Mapping[str, Tensor], cuts: Mapping[str, Cut], comm: Communicator) -> dict[str, Tensor]:
    """This rank's part of what is whole, by name.

    Raises:
        MplabError: a size that the number of ranks does not divide.
    """
    parts = {}
    for name, whole in state.items():
        cut = cuts.get(name)
        if cut is not None and (whole.dim() <= cut.dim or whole.shape[cut.dim] % (comm.size * cut.num_parts)):
            raise MplabError(
                f"{name} of shape {tuple(whole.shape)} can't be cut along dim {cut.dim} for {comm.size} ranks: load "
                "the state of a model of the same sizes"
            )
        parts[name] = whole if cut is None else cut.part(whole, comm.rank, comm.size)
    return parts


def load_full_state_dict(model: nn.Module, comm: Communicator, state: Mapping[str, Tensor]) -> None:
    """Load an ordinary `state_dict` of the whole model, saved with any number of ranks: each takes its parts.

    Args:
        model: what `tensor_parallel` gave.
        comm: this rank's communicator.
        state: the same on every rank.

    Raises:
        MplabError: names or shapes that are not the model's; nothing is changed then.

    **Communication**: none.
    """
    own = model.state_dict(keep_vars=True)
    if other := sorted(own.keys() ^ state.keys()):
        raise MplabError(f"the state has not the model's names, which differ in {other[:5]}: load its own")
    cuts = cuts_by_name(model)
    for name, tensor in own.items():
        shape = list(tensor.shape)
        if name in cuts:
            shape[cuts[name].dim] *= comm.size
        if list(state[name].shape) != shape:
            raise MplabError(
                f"{name} has shape {tuple(state[name].shape)} in the state and {tuple(shape)} in the model: load the "
                "state of a model of the same sizes"
            )
    parts = split(state, cuts, comm)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(parts[name])
