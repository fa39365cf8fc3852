"""Reductions in rank order: the same sum, bit for bit, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mplab.errors import MplabError

OPS: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "product": torch.mul,
    "max": torch.maximum,
    "min": torch.minimum,
}

# Long tensors are reduced block by block, so that a partial sum is still in a core's cache when it is read again.
BLOCK_BYTES = 1 << 20


def check_op(op: str, dtype: torch.dtype) -> None:
    """Refuse a reduction that does not exist or has no meaning for `dtype`."""
    if not isinstance(op, str) or op not in OPS:
        raise MplabError(f"op={op!r} is no reduction: choose one of {', '.join(map(repr, OPS))}")
    if op == "mean" and not (dtype.is_floating_point or dtype.is_complex):
        raise MplabError(f"the mean of {dtype} tensors is not {dtype}: use op='sum', or convert with x.float() first")
    if op in ("max", "min") and dtype.is_complex:
        raise MplabError(
            f"complex numbers have no order, so op={op!r} has no meaning for {dtype}: reduce x.abs() instead"
        )


def reduce_in_order(op: str, xs: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Reduce tensors of one shape into `out`, from the first to the last.

    Args:
        op: one of `OPS`.
        xs: n contiguous tensors of any one shape; only `out` is written to.
        out: contiguous, of the same shape; may be one of `xs`.
    """
    combine, num_tensors = OPS[op], len(xs)
    if num_tensors == 2:  # the common case, and often small: nothing to arrange
        combine(xs[0], xs[1], out=out)
        if op == "mean":
            out.div_(2)
        return
    if num_tensors == 1:
        if out.data_ptr() != xs[0].data_ptr():
            out.copy_(xs[0])
        return
    pieces = [(*xs, out)]
    if out.device.type == "cpu" and out.nbytes > BLOCK_BYTES:
        size = BLOCK_BYTES // out.element_size()
        pieces = list(zip(*(x.view(-1).split(size) for x in (*xs, out)), strict=True))
    # When `out` is the third tensor or a later one it is read after the first partial sum, which needs its own place.
    is_read_late = out.numel() > 0 and any(out.data_ptr() == x.data_ptr() for x in xs[2:])
    for *parts, target in pieces:
        partial = torch.empty_like(target) if is_read_late else target
        combine(parts[0], parts[1], out=partial)
        for part in parts[2:]:
            combine(partial, part, out=partial)
        if op == "mean":
            partial.div_(num_tensors)
        if is_read_late:
            target.copy_(partial)
