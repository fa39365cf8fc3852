"""The check of a mesh's groups: which ranks differ in their place on one axis alone."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from mplab.comm.mesh import AXES, Mesh
from mplab.homework.limited import ENDS, OWN, Attempt, TooManySteps, attempt, borrowed, error, is_written
from mplab.homework.report import Complaint, Report, check_all

GroupsSolution = Callable[[int, int, int], Mapping[str, Sequence[Sequence[int]]]]
MESHES = (
    Mesh(1, 1, 1),
    *(Mesh(2, 1, 1), Mesh(1, 2, 1), Mesh(1, 1, 2)),
    *(Mesh(1, 3, 2), Mesh(2, 1, 3), Mesh(3, 2, 1)),
    *(Mesh(1, 8, 1), Mesh(2, 2, 2), Mesh(3, 2, 2), Mesh(2, 3, 4), Mesh(4, 3, 5)),
)
MAX_STEPS = 200_000  # comparing every two ranks takes a tenth of it
ANSWERS = {method.__code__: "Mesh" for method in (Mesh.coordinates, Mesh.rank)}  # all of Mesh goes through them


def check_mesh_groups(solution: GroupsSolution) -> Report:
    """Check `solution(dp, pp, tp)`: the groups of ranks along each axis of a mesh.

    It is called for 12 meshes of 1 to 60 ranks, with degrees of 1 and with three that differ.

    Args:
        solution: called with the three degrees; returns a dict from "dp", "pp" and "tp" to the groups of that axis,
            each a list of world ranks in the order of their places on it. Rank (d * pp + p) * tp + t is at (d, p, t).
            The groups of an axis may be in any order.

    Returns:
        A report; nothing that the solution does is raised.

    **Reference**: as for `mplab.comm.Mesh`.
    """
    tries: list[_Try] = []
    for mesh in MESHES:
        tries.append(_run(solution, mesh))
        if isinstance(tries[-1].attempt.error, TooManySteps):
            break
    attempts = [one.attempt for one in tries]
    if not is_written(attempts):
        return Report("mesh_groups", (), is_written=False)
    done = [one for one in tries if one.attempt.error is None]
    shaped = check_all("a list of groups for each axis", done, _no_groups)
    able = done if shaped.outcome == "passed" else []
    once = check_all("each rank is in one group of each axis", able, _not_once)
    able = able if once.outcome == "passed" else []
    groups = [
        check_all(f"groups of {axis}", able, partial(_wrong_groups, axis), f"of 2 x 3 x 4 ranks: {number}")
        for axis, number in zip(AXES, ("12 of 2", "8 of 3", "6 of 4"), strict=True)
    ]
    able = able if all(line.outcome == "passed" for line in groups) else []
    lines = [
        check_all(ENDS, attempts, error("look for a loop that doesn't end")),
        check_all(OWN, attempts, borrowed),
        shaped,
        once,
        *groups,
        check_all("ranks stand by their place on the axis", able, _wrong_order),
    ]
    return Report("mesh_groups", tuple(lines))


def _said(mesh: Mesh) -> str:
    return "dp={}, pp={}, tp={}".format(*mesh.shape)


@dataclass(frozen=True)
class _Try:
    mesh: Mesh
    attempt: Attempt

    def __str__(self) -> str:
        return str(self.attempt)

    def groups(self, axis: str) -> list[list[int]]:
        """What the solution says."""
        return [_ranks(group) or [] for group in self.attempt.result[axis]]


def _run(solution: GroupsSolution, mesh: Mesh) -> _Try:
    return _Try(mesh, attempt(_said(mesh), lambda: solution(*mesh.shape), MAX_STEPS, ANSWERS))


def _ranks(group: Any) -> list[int] | None:
    """A group as a list of whole numbers; None: it is none."""
    items = group.tolist() if isinstance(group, Tensor | np.ndarray) else group
    if not isinstance(items, list | tuple | range) or any(isinstance(rank, bool) for rank in items):
        return None
    try:
        return [operator.index(rank) for rank in items]
    except TypeError:
        return None


# --- what can be wrong ------------------------------------------------------------------------------------------------


def _no_groups(one: _Try) -> Complaint | None:
    result, hint = one.attempt.result, 'return {"dp": [[0, ...], ...], "pp": ..., "tp": ...}'
    if not isinstance(result, Mapping) or any(axis not in result for axis in AXES):
        seen = f"keys {list(result)}" if isinstance(result, Mapping) else f"an object of type {type(result).__name__}"
        return Complaint(f"a dict with {', '.join(AXES)}", seen, hint)
    for axis in AXES:
        groups = result[axis]
        if isinstance(groups, Tensor | np.ndarray):
            groups = groups.tolist()
        if not isinstance(groups, list | tuple) or any(_ranks(group) is None for group in groups):
            return Complaint(f"lists of whole numbers for {axis}", _short(groups), hint)
    return None


def _not_once(one: _Try) -> Complaint | None:
    for axis in AXES:
        counts = Counter(rank for group in one.groups(axis) for rank in group)
        wrong = {
            "missing": [rank for rank in range(one.mesh.size) if not counts[rank]],
            "more than once": sorted(rank for rank, count in counts.items() if count > 1),
            "not on the mesh": sorted(rank for rank in counts if not 0 <= rank < one.mesh.size),
        }
        if any(wrong.values()):
            hint = "there are as many groups as there are places on the two other axes together"
            if getattr(one.mesh, axis) == 1:
                hint = "on an axis of 1 every rank is alone, in a group of its own"
            seen = "; ".join(f"{what}: {_short(ranks)}" for what, ranks in wrong.items() if ranks)
            return Complaint(f"each of 0 to {one.mesh.size - 1} in one group of {axis}", seen, hint)
    return None


def _wrong_groups(axis: str, one: _Try) -> Complaint | None:
    got, right = one.groups(axis), one.mesh.groups(axis)
    sets = {frozenset(group) for group in got}
    wrong = next((group for group in right if frozenset(group) not in sets), None)
    if wrong is None:
        return None
    seen = next(group for group in got if wrong[0] in group)
    _, pp, tp = one.mesh.shape
    apart = {"dp": f"pp * tp = {pp * tp} ranks", "pp": f"tp = {tp} ranks", "tp": "1 rank"}[axis]
    if len(seen) != len(wrong):
        hint = (
            f"a group of {axis} has a rank for each place on this axis, {len(wrong)}; their places on others are equal"
        )
    else:
        hint = f"neighbours on this axis are {apart} apart: rank = (d * pp + p) * tp + t"
    return Complaint(f"{_short(wrong)}, the group of rank {wrong[0]}", _short(seen), hint)


def _wrong_order(one: _Try) -> Complaint | None:
    for axis in AXES:
        right = one.mesh.groups(axis)
        for group in one.groups(axis):
            if group not in right:
                hint = "a rank's number in its group is its place on the axis: tensors are cut and joined in this order"
                return Complaint(f"{_short(sorted(group))} in the groups of {axis}", _short(group), hint)
    return None


def _short(items: Any) -> str:
    text = repr(items)
    return text if len(text) <= 60 else text[:57] + "..."
