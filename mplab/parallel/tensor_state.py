"""What the ranks of a model that is cut have to bring together: its weights as one, and gradients that are parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator
from mplab.errors import MplabError
from mplab.parallel.check_state import check_state
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


def check_whole_gradients(model: nn.Module, comm: Communicator) -> None:
    """Refuse, after `sum_gradients`, what every rank has whole and yet another gradient of: training would go apart.

    Two numbers of a gradient are compared, its length and its product with a random tensor, and not all of its bits:
    on a GPU the same sums need not come out the same twice.

    Args:
        model: what `tensor_parallel` gave.
        comm: this rank's communicator on the tensor axis.

    Raises:
        MplabError: on every rank, with the first such parameter and what to do about it.

    **Communication**: an all_gather of 16 bytes for each parameter that is trained and not cut.
    """
    cuts = cuts_of(model)
    whole = {name: p for name, p in model.named_parameters() if p.requires_grad and p not in cuts}
    if comm.size == 1 or not whole:
        return
    numbers = torch.zeros(1, len(whole), 2, dtype=torch.float64, device=comm.device)
    for of_one, p in zip(numbers[0], whole.values(), strict=True):
        if p.grad is not None:
            generator = torch.Generator(comm.device).manual_seed(0)
            direction = torch.randn(p.shape, generator=generator, device=comm.device, dtype=torch.float32)
            of_one[0] = torch.linalg.vector_norm(p.grad, dtype=torch.float64)
            of_one[1] = (p.grad * direction).sum(dtype=torch.float64)
    of_ranks = comm.all_gather(numbers)
    length = of_ranks[..., 0].amax(0)
    is_noise = length < 1e-6 * length.max()  # what has to be 0 is a different rounding error everywhere
    differs = ((of_ranks.amax(0) - of_ranks.amin(0)) > 1e-2 * length[:, None]).any(1) & ~is_noise
    if bool(differs.any()):
        name = list(whole)[int(differs.nonzero()[0])]
        raise MplabError(
            f"{name} is whole on each of {comm.size} ranks, and its gradient is another on every one: it works on what "
            f'is cut, without the plan saying so. Give {name.rpartition(".")[0] or name} the style "partial", so that '
            "its gradients are added up, or cut it too. Or each rank drops other activations, where the model does so "
            "without an nn.Dropout: make it one, whose masks are the same on all"
        )


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
    cuts, shapes = cuts_by_name(model), {name: list(tensor.shape) for name, tensor in own.items()}
    for name, cut in cuts.items():
        shapes[name][cut.dim] *= comm.size
    check_state(state, shapes)
    parts = split(state, cuts, comm)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(parts[name])
