"""How one parameter is cut over the ranks of the tensor axis: its parts, and the whole again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator


class Cut(NamedTuple):
    """A parameter's cut along `dim`, each rank 1/n of it.

    Where it is `num_parts` matrices joined along `dim` (query, key and value in one), each of them is cut alike.
    """

    dim: int = 0
    num_parts: int = 1

    def part(self, whole: Tensor, rank: int, num_ranks: int) -> Tensor:
        """What `rank` has of it: a copy.

        Args:
            whole: `num_parts * num_ranks` divides its size along `dim`.
            rank: whose part.
            num_ranks: n.
        """
        parts: Tensor = whole.unflatten(self.dim, (self.num_parts, num_ranks, -1)).select(self.dim + 1, rank)
        return parts.flatten(self.dim, self.dim + 1).clone(memory_format=torch.contiguous_format)

    def merge(self, part: Tensor, comm: Communicator) -> Tensor:
        """All ranks' parts as one, on every rank.

        **Communication**: an all_gather of `part`'s bytes.
        """
        return self.in_order(comm.all_gather(part, self.dim), comm.size)

    def in_order(self, joined: Tensor, num_ranks: int) -> Tensor:
        """Parts that were joined in the order of ranks, as the whole has them."""
        of_ranks: Tensor = joined.unflatten(self.dim, (num_ranks, self.num_parts, -1))
        return of_ranks.transpose(self.dim, self.dim + 1).flatten(self.dim, self.dim + 2)

    def distribute(self, whole: Tensor, comm: Communicator) -> Tensor:
        """This rank's part of rank 0's tensor.

        Args:
            whole: the same shape on every rank; only rank 0's values count.
            comm: this rank's communicator.

        **Communication**: a scatter of `whole`'s bytes.
        """
        parts = [self.part(whole, rank, comm.size) for rank in range(comm.size)] if comm.rank == 0 else []
        return comm.scatter(torch.stack(parts) if parts else None)[0]


def cuts_of(model: nn.Module) -> dict[Tensor, Cut]:
    """The parameters of which this rank has a part, and how each was cut."""
    return {
        parameter: module.cuts[name]
        for module in model.modules()
        if isinstance(module, ParallelLayer)
        for name, parameter in module.named_parameters(recurse=False)
        if name in module.cuts
    }


def cuts_by_name(model: nn.Module) -> dict[str, Cut]:
    """The same by the parameters' names, every name of a tied one."""
    cuts = cuts_of(model)
    return {name: cuts[p] for name, p in model.named_parameters(remove_duplicate=False) if p in cuts}


class TensorAxis:
    """Where all cut layers of one model find this rank's communicator: another run of the world gives them its own."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def __deepcopy__(self, memo: object) -> TensorAxis:
        return self  # a copy of a model is on the same ranks


class ParallelLayer(nn.Module):
    """A layer of which every rank has a part.

    Args:
        comm: this rank's communicator on the tensor axis, or the axis that the layer shares with others.
        cuts: for each parameter that is cut, how.
    """

    weight: nn.Parameter

    def __init__(self, comm: Communicator | TensorAxis, cuts: dict[str, Cut]) -> None:
        super().__init__()
        self.axis = comm if isinstance(comm, TensorAxis) else TensorAxis(comm)
        self.cuts = cuts

    @property
    def comm(self) -> Communicator:
        """This rank's communicator."""
        return self.axis.comm

    def take(self, whole: nn.Module) -> None:
        """Take over this rank's part of each parameter of rank 0's whole layer, and a copy of those that are not cut.

        **Communication**: for each parameter that is cut a scatter of its bytes, for each other one a broadcast.
        """
        for name, parameter in whole.named_parameters(recurse=False):
            cut = self.cuts.get(name)
            value = parameter.detach().to(self.comm.device)
            mine = self.comm.broadcast(value) if cut is None else cut.distribute(value, self.comm)
            setattr(self, name, nn.Parameter(mine, requires_grad=parameter.requires_grad))
