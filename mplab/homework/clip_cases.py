"""What the exercise on clipping is run with: each rank's gradients, their norm, and what known mistakes give for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mplab.comm.mesh import Mesh

# For each stage its gradients: the shape on a rank, and whether it is cut over the tensor axis.
Layout = tuple[tuple[tuple[tuple[int, ...], bool], ...], ...]
STAGES: Layout = (
    (((4, 6), True), ((4,), True), ((5,), False)),
    (((7,), False), ((3, 4), True), ((), False)),
    (((2, 3, 2), True), ((6,), False)),
)
WITHOUT: Layout = (STAGES[0], (), STAGES[2])


class Slip(NamedTuple):
    """A well-known mistake.

    Args:
        hint: what to say.
        norms: what it gives at a place (p, t) of the pipeline and the tensor axis.
    """

    hint: str
    norms: Sequence[Callable[[int, int], float]]


@dataclass(frozen=True)
class Case:
    """What the ranks of one run are given.

    Args:
        mesh: of the ranks.
        ratio: `max_norm` for each unit of the gradient's norm: a gradient with less than 1 is clipped.
        what: in words, where it is special.
        stages: layout of the stages.
        factor: of all gradients.
    """

    mesh: Mesh
    ratio: float = 0.6
    what: str = ""
    stages: Layout = STAGES
    factor: float = 1.0

    def __str__(self) -> str:
        said = "dp={}, pp={}, tp={}".format(*self.mesh.shape)
        return f"{said}, a gradient of norm {self.norm:.4g}, max_norm={self.max_norm:.4g}" + (
            f", {self.what}" if self.what else ""
        )

    def is_cut(self, p: int) -> list[bool]:
        """Of each gradient of a stage."""
        return [is_cut for _, is_cut in self.stages[p]]

    @cached_property
    def gradients(self) -> list[list[list[Tensor]]]:
        """At (p, t): those of stage p; what is whole is the same for all t."""
        generator = torch.Generator().manual_seed(self.mesh.size)
        places = [[list[Tensor]() for _ in range(self.mesh.tp)] for _ in range(self.mesh.pp)]
        for stage, of_stage in zip(self.stages, places, strict=False):
            for shape, is_cut in stage:
                parts = [self.factor * (1 + torch.rand(shape, generator=generator)) for _ in of_stage]
                for t, of_rank in enumerate(of_stage):
                    of_rank.append(parts[t if is_cut else 0])
        return places

    @cached_property
    def norm(self) -> float:
        """Of the model's gradient, each element counted once."""
        return math.sqrt(sum(self._whole) + sum(map(sum, self._cut)))

    @property
    def max_norm(self) -> float:
        """What the solution is given."""
        return self.ratio * self.norm if self.norm else 1.0

    @property
    def scale(self) -> float:
        """What the gradients are to be multiplied by."""
        return min(1.0, self.max_norm / self.norm) if self.norm else 1.0

    def own_norm(self, p: int, t: int) -> float:
        """Of the gradients that a rank has."""
        return math.sqrt(self._whole[p] + self._cut[p][t])

    @cached_property
    def _whole(self) -> list[float]:
        """For each stage the square of what is not cut."""
        return [self._square(p, 0, False) for p in range(self.mesh.pp)]

    @cached_property
    def _cut(self) -> list[list[float]]:
        """At (p, t) the square of the parts."""
        return [[self._square(p, t, True) for t in range(self.mesh.tp)] for p in range(self.mesh.pp)]

    def _square(self, p: int, t: int, of_cut: bool) -> float:
        chosen = [x for x, is_cut in zip(self.gradients[p][t], self.is_cut(p), strict=True) if is_cut == of_cut]
        return sum(float(x.double().square().sum()) for x in chosen)

    @property
    def slips(self) -> list[Slip]:
        """The first that fits tells what is wrong."""
        whole, cut, (dp, pp, tp) = self._whole, self._cut, self.mesh.shape
        parts = [sum(of_stage) for of_stage in cut]
        all_whole, all_cut = sum(whole), sum(parts)
        places = [(p, t) for p in range(pp) for t in range(tp)]
        root = math.sqrt

        def always(*values: float) -> list[Callable[[int, int], float]]:
            return [lambda p, t, value=value: value for value in values]  # type: ignore[misc]

        of_tensors = [
            float(x.double().norm())
            for p, t in places
            for x, is_cut in zip(self.gradients[p][t], self.is_cut(p), strict=True)
            if is_cut or t == 0
        ]
        added = always(sum(of_tensors), root(all_whole) + root(all_cut))
        added += [lambda p, t: sum(self.own_norm(p, u) for u in range(tp))]
        added += [lambda p, t: sum(self.own_norm(q, t) for q in range(pp))]
        return [
            Slip("this is the square of the norm: take its root, at the end", always(self.norm**2)),
            Slip("this is the norm afterwards: return the one before", always(self.norm * self.scale)),
            Slip("this is one stage alone: add up the squares over mesh.pp", [lambda p, t: root(whole[p] + parts[p])]),
            Slip(
                "parameters that are whole on every rank of mesh.tp are counted tp times: add up only what is cut, or "
                "count 1/tp of what is whole",
                always(root(tp * all_whole + all_cut)),
            ),
            Slip(
                "parameters that are whole are counted less than once: add them after the sum over mesh.tp, or give "
                "1/tp of them to it",
                always(root(all_whole / tp + all_cut), root(all_cut)),
            ),
            Slip("these are the whole parameters alone: is_cut has the others", always(root(all_whole))),
            Slip(
                "replicas have the same gradient: count one of them",
                always(root(dp) * self.norm),
            ),
            Slip(
                "is_cut is read the wrong way round: parts add up over mesh.tp, and what is whole is there already",
                [lambda p, t: root(tp * all_whole + sum(of_stage[t] for of_stage in cut))],
            ),
            Slip(
                "the parts that the other ranks of mesh.tp have are missing: add up the squares of what is cut",
                [lambda p, t: root(all_whole + sum(of_stage[t] for of_stage in cut))],
            ),
            Slip("norms don't add up, their squares do: add up squares, and take the root at the end", added),
            Slip(
                "this is a mean over the ranks, of what adds up",
                always(*(root((k * all_whole + all_cut) / n) for k in (1, tp) for n in (tp, pp))),
            ),
        ]


def cases() -> list[Case]:
    """In the order of their size; of each kind the plain ones first."""
    only_whole: Layout = tuple(tuple((shape, False) for shape, _ in stage) for stage in STAGES)
    only_cut: Layout = tuple(tuple((shape, True) for shape, _ in stage) for stage in STAGES)
    meshes = (Mesh(), Mesh(tp=2), Mesh(pp=2), Mesh(dp=2), Mesh(pp=2, tp=2), Mesh(2, 1, 2), Mesh(2, 2, 1), Mesh(1, 3, 2))
    return [
        *(Case(mesh) for mesh in meshes),
        Case(Mesh(pp=2, tp=2), 0.95),  # above the norm of each rank's own
        Case(Mesh(2, 2, 2)),
        Case(Mesh(tp=3), what="nothing cut", stages=only_whole),
        Case(Mesh(tp=3), what="everything cut", stages=only_cut),
        Case(Mesh(pp=3), what="stage 1 without parameters", stages=WITHOUT),
        Case(Mesh(), 2.0),
        Case(Mesh(pp=2, tp=2), 1.01),
        Case(Mesh(pp=2, tp=2), factor=0.0, what="all gradients 0"),
    ]
