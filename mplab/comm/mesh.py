"""A mesh: ranks laid out along the axes data, pipeline and tensor, and a communicator for each axis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mplab.comm.communicator import Communicator
from mplab.errors import MplabError

AXES = ("dp", "pp", "tp")


@dataclass(frozen=True)
class Mesh:
    """dp x pp x tp ranks, the last axis innermost: rank = (d * pp + p) * tp + t, so tensor-parallel ranks are
    neighbours.

    Args:
        dp: replicas of the model (data axis).
        pp: stages that it is cut in between layers (pipeline axis).
        tp: parts that each layer is cut in (tensor axis).

    Raises:
        MplabError: a degree that is no whole number of at least 1.

    **Reference**: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", 2021, section 3.
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            degree = getattr(self, axis)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise MplabError(
                    f"Mesh({axis}={degree!r}): a degree is a whole number of at least 1; 1 leaves the axis out"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(dp, pp, tp)."""
        return self.dp, self.pp, self.tp

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape)

    def coordinates(self, rank: int) -> dict[str, int]:
        """A rank's place on every axis."""
        if not 0 <= rank < self.size:
            raise MplabError(f"rank {rank} is not on {self}: its ranks go from 0 to {self.size - 1}")
        return {"dp": rank // (self.pp * self.tp), "pp": rank // self.tp % self.pp, "tp": rank % self.tp}

    def rank(self, dp: int = 0, pp: int = 0, tp: int = 0) -> int:
        """The rank at a place."""
        for axis, place, degree in zip(AXES, (dp, pp, tp), self.shape, strict=True):
            if not 0 <= place < degree:
                raise MplabError(f"{axis}={place} is not on {self}: places on this axis go from 0 to {degree - 1}")
        return (dp * self.pp + pp) * self.tp + tp

    def groups(self, axis: str) -> list[list[int]]:
        """The groups of ranks that differ in their place on one axis only, in rank order."""
        return [list(group) for group in dict.fromkeys(tuple(self._group(axis, rank)) for rank in range(self.size))]

    def connect(self, comm: Communicator) -> MeshCommunicator:
        """This rank's communicator on each axis; every rank of `comm` calls it.

        Raises:
            MplabError: `comm` has not as many ranks as the mesh.
        """
        if comm.size != self.size:
            raise MplabError(
                f"{self} has {self.dp} x {self.pp} x {self.tp} = {self.size} ranks, but the world has {comm.size}: "
                f"choose degrees whose product is {comm.size}"
            )
        axes = {axis: comm.group(self._group(axis, comm.rank)) for axis in AXES}
        return MeshCommunicator(self, comm, **axes)

    def _group(self, axis: str, rank: int) -> list[int]:
        if axis not in AXES:
            raise MplabError(f"axis={axis!r} is no axis of a mesh: choose one of {', '.join(AXES)}")
        place = self.coordinates(rank)
        return [self.rank(**{**place, axis: i}) for i in range(getattr(self, axis))]

    def __str__(self) -> str:
        return f"Mesh(dp={self.dp}, pp={self.pp}, tp={self.tp})"

    def draw(self) -> str:
        """The layout as text: one block a replica, one line a stage, one column a tensor-parallel rank."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        width = len(str(self.size - 1))
        for d in range(self.dp):
            for p in range(self.pp):
                ranks = " ".join(str(self.rank(d, p, t)).rjust(width) for t in range(self.tp))
                yield f"{f'dp {d}' if p == 0 else '':<6} pp {p}:  {ranks}"


@dataclass(frozen=True)
class MeshCommunicator:
    """One rank's communicators: over the whole mesh, and along each axis."""

    mesh: Mesh
    world: Communicator
    dp: Communicator
    pp: Communicator
    tp: Communicator
