"""What each rank of a direct collective gives to each other one, and what a rank makes of the parts it gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mplab.comm.calls import Call
from mplab.comm.reduction import reduce_in_order

# Up to this size another round takes longer than whole tensors in place of chunks.
SMALL_BYTES = 1 << 18


def in_chunks(call: Call, x: Tensor, num_ranks: int) -> bool:
    """True for an all-reduce that takes two rounds: each rank reduces one chunk, and gives it to all others.

    Between two ranks whole tensors are no more bytes than two rounds of halves.
    """
    return call.name.startswith("all_reduce") and num_ranks > 2 and x.nbytes > SMALL_BYTES


def given(call: Call, x: Tensor | None, rank: int, num_ranks: int) -> list[Tensor | None]:
    """What `rank` gives to each rank, itself included; None: nothing. What is the same for all is the same object."""
    if x is None or (call.name in ("broadcast", "scatter") and rank != call.root):
        return [None] * num_ranks
    match call.name:
        case "reduce" | "gather":
            return [x if r == call.root else None for r in range(num_ranks)]
        case "scatter" | "reduce_scatter":
            assert call.dim is not None
            return list(x.tensor_split(num_ranks, call.dim))
        case "all_gather_":
            return [x.tensor_split(num_ranks)[rank]] * num_ranks
        case _:
            return list(x.reshape(-1).tensor_split(num_ranks)) if in_chunks(call, x, num_ranks) else [x] * num_ranks


def made(call: Call, parts: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
    """The result of the parts that all ranks gave to this one, in rank order: a new tensor, or `out`.

    Args:
        call: which collective; in an all-reduce in chunks, this rank's chunk of the result.
        parts: from every rank.
        out: shape (L,), for a reduction; may be this rank's own part.
    """
    tensors = [part for part in parts if part is not None]
    if not tensors:
        return torch.empty(0)
    if call.op is not None:
        target = torch.empty_like(tensors[0], memory_format=torch.contiguous_format) if out is None else out
        reduce_in_order(call.op, [x.reshape(-1) for x in tensors], target.view(-1))
        return target
    if call.name in ("broadcast", "scatter"):
        return tensors[0].resolve_conj().clone(memory_format=torch.contiguous_format)
    assert call.dim is not None
    return torch.cat(tensors, call.dim)
