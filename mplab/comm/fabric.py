"""GPU tensors between processes: what the ranks of a group give each other, all at once, over NCCL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Fabric:
    """One group's connections, made by all of its ranks at the same time.

    Args:
        ranks: world ranks of the group, in order.
        rank: this rank's place among them.
        device: where its tensors live.
        backend: torch.distributed's name for it.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int, device: torch.device, backend: str = "nccl") -> None:
        self._ranks, self._rank, self._device = ranks, rank, device
        self._group = dist.new_group(sorted(ranks), backend=backend, use_local_synchronization=True)
        # NCCL connects in the first call, and wants all of the group in it.
        dist.all_reduce(torch.zeros(1, device=device), group=self._group)

    def exchange(self, given: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Give each rank its part, and get one from each. On a GPU this orders streams; the host does not wait.

        Args:
            given: for each rank of the group.
            expected: from each rank: any tensor of the shape and dtype that will come, "meta" will do.

        Returns:
            What came, in rank order, this rank's own part in its place.
        """
        parts: list[Tensor | None] = [
            None if x is None else torch.empty(x.shape, dtype=x.dtype, device=self._device) for x in expected
        ]
        parts[self._rank] = given[self._rank]
        messages = []
        for r, peer in enumerate(self._ranks):
            for kind, x in ((dist.isend, given[r]), (dist.irecv, parts[r])):
                if r != self._rank and x is not None and x.numel():
                    messages.append(dist.P2POp(kind, _bytes(x), peer, self._group))
        for work in dist.batch_isend_irecv(messages) if messages else ():
            work.wait()
        return parts


def _bytes(x: Tensor) -> Tensor:
    """Its bytes in one row, in place if it is contiguous: NCCL does not know every dtype that torch adds."""
    return x.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
