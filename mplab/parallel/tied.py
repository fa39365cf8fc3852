"""A weight under several names, whose layers were cut apart: each holder has a copy, and all copies stay the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from mplab.comm.communicator import Communicator


class TiedWeights:
    """The tied weights that this rank holds a copy of.

    Args:
        names: for each tied weight its names in the model.
        rank_of: the rank that holds the layer of each name.
        stages: this rank's.
        comm: this rank's communicator.

    Reference:
        Narayanan et al., "Efficient large-scale language model training on GPU clusters using Megatron-LM", SC 2021:
        the first and the last stage add up the gradients of their embedding.
    """

    def __init__(
        self,
        names: Sequence[tuple[str, ...]],
        rank_of: Mapping[str, int],
        stages: Iterable[nn.Module],
        comm: Communicator,
    ) -> None:
        mine = [dict(stage.named_parameters(remove_duplicate=False)) for stage in stages]
        self._weights: list[tuple[list[nn.Parameter], Communicator | None]] = []
        for group in names:
            holders = sorted({rank_of[name] for name in group})
            copies = {id(p): p for of_stage in mine for name in group if (p := of_stage.get(name)) is not None}
            if comm.rank in holders and (len(holders) > 1 or len(copies) > 1):
                self._weights.append((list(copies.values()), comm.group(holders) if len(holders) > 1 else None))

    @torch.no_grad()
    def broadcast(self) -> None:
        """Give all copies the values of the first holder's.

        **Communication**: broadcast of each weight, among its holders.
        """
        for copies, group in self._weights:
            if group is not None:
                value = group.broadcast(copies[0].detach())
                for copy in copies:
                    copy.copy_(value)

    def reduce_gradients(self) -> None:
        """Give each copy the sum of all copies' gradients: equal weights then stay equal after equal updates.

        **Communication**: all_reduce_ of each trained weight, among its holders.
        """
        for copies, group in self._weights:
            if not copies[0].requires_grad:
                continue
            total = torch.zeros_like(copies[0])
            for copy in copies:
                if copy.grad is not None:
                    total += copy.grad
            if group is not None:
                group.all_reduce_(total)
            for copy in copies:
                copy.grad = total.clone()
