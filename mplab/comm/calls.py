"""What a rank says it calls, and what of it is refused before any message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mplab.comm.reduction import check_op
from mplab.errors import MplabError


class Call(NamedTuple):
    """What a rank says it calls. Ranks of a group whose calls differ get a `CollectiveMismatch`.

    `shape` has -1 where ranks may differ (the gathered dimension) and is None where only the root knows it.
    `shapes` are those of tensors that travel as one.
    """

    name: str
    op: str | None = None
    root: int | None = None
    dim: int | None = None
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    shapes: tuple[tuple[int, ...], ...] | None = None

    def agrees(self, other: Call) -> bool:
        """True if the two can be the same collective: a rank that gives no tensor knows no shape and no dtype."""
        return self[:4] == other[:4] and all(
            a == b or a is None or b is None for a, b in zip(self[4:], other[4:], strict=True)
        )

    def with_shape_of(self, other: Call) -> Call:
        """This call with the shape and dtype of another, where it knows none itself."""
        return self if self.shape is not None else self._replace(shape=other.shape, dtype=other.dtype)

    def __str__(self) -> str:
        said = [
            f"{key}={value!r}"
            for key, value in (("op", self.op), ("root", self.root), ("dim", self.dim))
            if value is not None
        ]
        if self.shape is not None:
            said.append(f"shape=({', '.join('?' if s < 0 else str(s) for s in self.shape)})")
        if self.dtype is not None:
            said.append(str(self.dtype).removeprefix("torch."))
        if self.shapes is not None:
            said.append(f"shapes=[{', '.join(str(tuple(shape)) for shape in self.shapes)}]")
        return f"{self.name}({', '.join(said)})"


class Caller:
    """A rank of a group, by what it can call there.

    Args:
        rank: its place in the group.
        ranks: world ranks of the group, in order.
        device: where its tensors live.
    """

    def __init__(self, rank: int, ranks: tuple[int, ...], device: torch.device) -> None:
        self.rank, self.ranks, self.size, self.device = rank, ranks, len(ranks), device
        self._known: dict[tuple[str, str, torch.Size, torch.dtype], Call] = {}

    # -- checks, before any message -----------------------------------------------------------------------------------

    def _check_tensor(self, x: Tensor | None, where: str) -> Tensor:
        if not isinstance(x, Tensor):
            raise MplabError(f"{where} needs a torch.Tensor, got {type(x).__name__}: wrap it with torch.as_tensor(...)")
        if x.device != self.device:
            raise MplabError(
                f"{where} got a tensor on {x.device}, but rank {self.rank} computes on {self.device}: "
                "move it with x.to(rank.device)"
            )
        if x.layout != torch.strided:
            raise MplabError(f"{where} needs a dense tensor, got {x.layout}: convert it with x.to_dense()")
        return x

    def _check_peer(self, peer: int, name: str) -> int:
        if not 0 <= peer < self.size:
            raise MplabError(
                f"{name}={peer} is no rank of this group of {self.size}: ranks go from 0 to {self.size - 1}"
            )
        if peer == self.rank:
            raise MplabError(f"{name}={peer} is this rank itself: a rank needs no message to keep what it has")
        return peer

    def _check_root(self, root: int) -> None:
        if not 0 <= root < self.size:
            raise MplabError(f"root={root} is no rank of this group of {self.size}: ranks go from 0 to {self.size - 1}")

    def _check_dim(self, x: Tensor, dim: int, where: str) -> int:
        if x.dim() == 0:
            raise MplabError(f"{where} of a 0-dim tensor: it has no dim to work along, give it one with x.reshape(1)")
        if not -x.dim() <= dim < x.dim():
            raise MplabError(
                f"{where} along dim={dim} of a tensor of shape {tuple(x.shape)}: "
                f"dim must be from {-x.dim()} to {x.dim() - 1}"
            )
        return dim % x.dim()

    def _check_group(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """World ranks of a new group."""
        if len(set(ranks)) != len(ranks) or not all(0 <= r < self.size for r in ranks):
            raise MplabError(f"group({list(ranks)}): each rank once, from 0 to {self.size - 1}")
        if self.rank not in ranks:
            raise MplabError(
                f"group({list(ranks)}) was called by rank {self.rank}, which is not in it: only its members call it"
            )
        return tuple(self.ranks[r] for r in ranks)

    # -- what is called -----------------------------------------------------------------------------------------------

    def _reduction_call(self, name: str, x: Tensor, op: str) -> Call:
        is_hashable = isinstance(x, Tensor) and isinstance(op, str)
        said = self._known.get((name, op, x.shape, x.dtype)) if is_hashable else None
        if said is not None and x.device == self.device and x.layout is torch.strided and x.is_contiguous():
            return said  # training repeats its calls
        self._check_tensor(x, name)
        check_op(op, x.dtype)
        if name.endswith("_") and _is_expanded(x):
            raise MplabError(f"{name} into an expanded tensor, whose elements share memory: give it x.clone()")
        said = self._known[name, op, x.shape, x.dtype] = Call(name, op, None, None, tuple(x.shape), x.dtype)
        return said

    def _coalesced_call(self, name: str, xs: Sequence[Tensor], op: str) -> Call:
        if not xs:
            raise MplabError(f"{name} of no tensors: give one or more")
        # Training gives many small tensors in every step: what is the same of all is looked at once.
        first, *others = xs
        self._reduction_call(name, first, op)
        for x in others:
            is_alike = isinstance(x, Tensor) and x.dtype is first.dtype and x.device == first.device
            if not (is_alike and x.layout is torch.strided and x.is_contiguous()):
                self._reduction_call(name, x, op)
        dtypes = {x.dtype for x in xs}
        if len(dtypes) > 1:
            raise MplabError(f"{name} needs tensors of one dtype, got {sorted(map(str, dtypes))}: one call for each")
        return Call(name, op, dtype=xs[0].dtype, shapes=tuple(x.shape for x in xs))

    def _gather_in_place_call(self, x: Tensor) -> Call:
        self._check_dim(self._check_tensor(x, "all_gather_"), 0, "all_gather_")
        if not x.is_contiguous() or x.is_conj() or x.is_neg():
            raise MplabError("all_gather_ works on the memory of a contiguous tensor: give it x.contiguous()")
        return Call("all_gather_", None, None, 0, tuple(x.shape), x.dtype)

    def _reduce_scatter_call(self, x: Tensor, op: str, dim: int) -> Call:
        return self._reduction_call("reduce_scatter", x, op)._replace(dim=self._check_dim(x, dim, "reduce_scatter"))

    def _gather_call(self, name: str, x: Tensor, dim: int) -> Call:
        self._check_tensor(x, name)
        dim = self._check_dim(x, dim, name)
        return Call(name, None, None, dim, (*x.shape[:dim], -1, *x.shape[dim + 1 :]), x.dtype)

    def _rooted_call(self, name: str, x: Tensor | None, root: int) -> Call:
        self._check_root(root)
        if x is None and self.rank != root:
            return Call(name, None, root)
        self._check_tensor(x, f"{name} on its root" if x is None else name)
        return Call(name, None, root, None, tuple(x.shape), x.dtype)  # type: ignore[union-attr]


def _is_expanded(x: Tensor) -> bool:
    """Whether elements of it share memory; an empty tensor has none, whatever its strides."""
    if x.is_contiguous():
        return False
    return any(step == 0 and n > 1 for n, step in zip(x.shape, x.stride(), strict=True)) and x.numel() > 0
