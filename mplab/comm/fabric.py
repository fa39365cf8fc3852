"""GPU tensors between processes: what the ranks of a group give each other, all at once, over NCCL.

All groups share the connections of the default group, where some ranks may talk without the others. Groups of their own
would have to be made by all ranks in the same order: torch names a group after how many a process has made before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Of no meaning to NCCL; over gloo, which the tests use, it keeps these messages apart from parcels.
_TAG = 2


def connect(device: torch.device) -> None:
    """NCCL connects in the first call, and wants all ranks of the world in it."""
    dist.all_reduce(torch.zeros(1, device=device))


def exchange(
    ranks: Sequence[int], given: Sequence[Tensor | None], expected: Sequence[Tensor | None], device: torch.device
) -> list[Tensor | None]:
    """Give each rank its part, and get one from each. On a GPU this orders streams; the host does not wait.

    Args:
        ranks: world ranks of the group.
        given: for each of them; None: nothing.
        expected: from each of them: any tensor of the shape and dtype that will come, "meta" will do.
        device: this rank's.

    Returns:
        What came, in the same order, this rank's own part in its place.
    """
    parts = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=device) for x in expected]
    messages = []
    for r, peer in enumerate(ranks):
        if peer == dist.get_rank():
            parts[r] = given[r]
            continue
        for kind, x in ((dist.isend, given[r]), (dist.irecv, parts[r])):
            if x is not None and x.numel():
                messages.append(dist.P2POp(kind, _bytes(x), peer, tag=_TAG))
    for work in dist.batch_isend_irecv(messages) if messages else ():
        work.wait()
    return parts


def _bytes(x: Tensor) -> Tensor:
    """Its bytes in one row, in place if it is contiguous: NCCL does not know every dtype that torch adds."""
    return x.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
