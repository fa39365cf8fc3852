"""What each collective computes from what the ranks brought: pure functions over tensors that all can be read from
here.

An item is (tensor, target): what a rank gives (None where it gives nothing), and where its result goes (None: a new
tensor). Both are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mplab.comm.calls import Call
from mplab.comm.memory import HostMemory
from mplab.comm.reduction import BLOCK_BYTES, reduce_in_order
from mplab.plan.traffic import chunk_lengths

Item = tuple[Tensor | None, Tensor | None]

# Up to this size one rank alone is faster than two that meet once more: on two cores at 1 MiB in 0.7 of their time, at
# 4 MiB no longer.
SMALL_BYTES = 1 << 20

_EMPTY = torch.empty(0)


def results_of_all(
    call: Call, items: Sequence[Item], devices: Sequence[torch.device], memory: HostMemory
) -> list[Tensor]:
    """Every rank's result, computed by one of them: for small tensors."""
    if not call.name.startswith("all_reduce"):
        results = [_result(call, items, r, memory) for r in range(len(items))]
        return [
            x if x is _EMPTY or d == x.device else memory.handover(x, d) for x, d in zip(results, devices, strict=True)
        ]
    tensors = [memory.local(_given(item)) for item in items]
    if call.name == "all_reduce":
        total = torch.empty_like(tensors[0])
        reduce_in_order(call.op or "", tensors, total)
        rest = [memory.handover(total, device) for device in devices[1:]]
        return [total if total.device == devices[0] else memory.handover(total, devices[0]), *rest]
    targets = [_target(item) for item in items]
    total = targets[0] if targets[0].device == tensors[0].device else torch.empty_like(tensors[0])
    reduce_in_order(call.op or "", tensors, total)
    for target in targets:
        if target is not total:
            target.copy_(total)
    return targets


def result_of_one(call: Call, items: Sequence[Item], rank: int, memory: HostMemory) -> Tensor:
    """One rank's result, while the others compute theirs: for large tensors, which change only after all are done."""
    if not call.name.startswith("all_reduce"):
        return _result(call, items, rank, memory)
    # Each rank reduces one chunk and writes it to all targets: 2(n-1)/n of the bytes instead of n-1 times all of them.
    # In place this is safe, since nobody else reads that chunk; block by block, what is written to the others still
    # lies in the cache.
    flats = [_given(item).view(-1) for item in items]
    targets = [_target(item) for item in items]
    lengths = chunk_lengths(flats[rank].numel(), len(items))
    end = sum(lengths[: rank + 1])
    step = (
        max(1, BLOCK_BYTES // flats[rank].element_size()) if flats[rank].device.type == "cpu" else max(1, lengths[rank])
    )
    for low in range(end - lengths[rank], end, step):
        block = slice(low, min(low + step, end))
        out = targets[rank].view(-1)[block]
        reduce_in_order(call.op or "", [memory.local(flat[block]) for flat in flats], out)
        for r, target in enumerate(targets):
            if r != rank:
                target.view(-1)[block].copy_(out)
    return targets[rank]


def _result(call: Call, items: Sequence[Item], rank: int, memory: HostMemory) -> Tensor:
    """One rank's result in any collective but all-reduce."""
    num_ranks = len(items)
    match call.name:
        case "barrier":
            return _EMPTY
        case "broadcast":
            assert call.root is not None
            return memory.copy(_given(items[call.root]))
        case "scatter":
            assert call.root is not None
            assert call.dim is not None
            return memory.copy(_given(items[call.root]).tensor_split(num_ranks, call.dim)[rank])
        case "all_gather_":
            out = _target(items[rank])
            for r, chunk in enumerate(out.tensor_split(num_ranks)):
                if r != rank:
                    x = _given(items[r]).tensor_split(num_ranks)[r]
                    # From one peer's GPU to another's only by way of this rank's, whose stream the event is of.
                    chunk.copy_(x if out.device == memory.device else memory.local(x))
            return out
        case "all_gather" | "gather":
            assert call.dim is not None
            if call.name == "gather" and rank != call.root:
                return _EMPTY
            return torch.cat([memory.local(_given(item)) for item in items], call.dim)
        case "reduce":
            if rank != call.root:
                return _EMPTY
            parts = [_given(item) for item in items]
        case "reduce_scatter":
            assert call.dim is not None
            parts = [_given(item).tensor_split(num_ranks, call.dim)[rank] for item in items]
        case _:
            raise AssertionError(f"no rule for {call.name}")
    out = torch.empty(parts[0].shape, dtype=parts[0].dtype, device=memory.device)
    reduce_in_order(call.op or "", [memory.local(part).reshape(-1) for part in parts], out.view(-1))
    return out


def block_bytes(call: Call, items: Sequence[Item]) -> list[int]:
    """Bytes of every rank's block, as `mplab.plan.traffic.direct_traffic` wants them."""
    num_ranks = len(items)
    if call.name == "barrier":
        return [0] * num_ranks
    if call.name in ("all_gather", "gather"):
        return [_given(x).nbytes for x in items]
    if call.shapes is not None:
        assert call.dtype is not None
        total = sum(math.prod(shape) for shape in call.shapes)
        return [length * call.dtype.itemsize for length in chunk_lengths(total, num_ranks)]
    x = _given(items[call.root or 0])
    if call.name in ("broadcast", "reduce"):
        return [x.nbytes] * num_ranks
    if call.name.startswith("all_reduce"):
        return [length * x.element_size() for length in chunk_lengths(x.numel(), num_ranks)]
    assert call.dim is not None
    length = x.shape[call.dim]
    slice_bytes = x.numel() // max(length, 1) * x.element_size()
    return [n * slice_bytes for n in chunk_lengths(length, num_ranks)]


def _given(item: Item) -> Tensor:
    assert item[0] is not None
    return item[0]


def _target(item: Item) -> Tensor:
    assert item[1] is not None
    return item[1]
