"""The checks of lab 05: right solutions pass, and every wrong one fails for the reason that is its own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graded import Wrong, check_fails, check_passes, lines_of, name, wrong_ones
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn

from mplab import MplabError
from mplab.__main__ import main as command_line
from mplab.comm import Mesh
from mplab.homework import Report, check_cheapest_plan, check_clip_once, check_mesh_groups
from mplab.homework.clip_cases import cases
from mplab.homework.plans import SETTINGS, WITHOUT
from mplab.parallel import HybridParallel
from mplab.parallel.sharded import ShardedDataParallel
from mplab.parallel.sharded_replicas import ShardedReplicas
from mplab.plan.layout import Plan
from mplab.plan.machines import Machine
from mplab.plan.search import Prediction, candidates, predict, search
from mplab.plan.share import memory_of
from mplab.plan.transformer import Transformer

ENDS = "every call ends"
OWN = "mplab's own is not called"


def none(*_: Any) -> Any:
    return None


def never_ends(*_: Any) -> Any:
    while True:
        pass


def leaves(*_: Any) -> None:
    raise SystemExit("enough")


# --- the groups of a mesh ---------------------------------------------------------------------------------------------

SHAPED = "a list of groups for each axis"
ONCE = "each rank is in one group of each axis"
ORDER = "ranks stand by their place on the axis"
AXES = ("dp", "pp", "tp")

Groups = dict[str, Any]


def groups(dp: int, pp: int, tp: int) -> Groups:
    ranks = torch.arange(dp * pp * tp).view(dp, pp, tp)
    return {axis: ranks.movedim(i, -1).flatten(0, 1).tolist() for i, axis in enumerate(AXES)}


def groups_by_ranges(dp: int, pp: int, tp: int) -> Groups:
    replica = pp * tp
    return {
        "tp": [range(first, first + tp) for first in range(0, dp * replica, tp)],
        "pp": [range(d * replica + t, (d + 1) * replica, tp) for d in range(dp) for t in range(tp)],
        "dp": [range(place, dp * replica, replica) for place in range(replica)],
    }


def groups_by_loops(dp: int, pp: int, tp: int) -> Groups:
    """In another order of the groups."""

    def rank(d: int, p: int, t: int) -> int:
        return (d * pp + p) * tp + t

    return {
        "dp": [tuple(rank(d, p, t) for d in range(dp)) for t in reversed(range(tp)) for p in range(pp)],
        "pp": [tuple(rank(d, p, t) for p in range(pp)) for t in range(tp) for d in range(dp)],
        "tp": [tuple(rank(d, p, t) for t in range(tp)) for p in range(pp) for d in range(dp)],
    }


def groups_by_comparing(dp: int, pp: int, tp: int) -> Groups:
    """Every rank with every other."""
    places = list(itertools.product(range(dp), range(pp), range(tp)))
    found: Groups = {}
    for i, axis in enumerate(AXES):
        of_others: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(places):
            for other in places:
                if other == place:
                    of_others.setdefault(other[:i] + other[i + 1 :], []).append(rank)
        found[axis] = list(of_others.values())
    return found


def groups_as_arrays(dp: int, pp: int, tp: int) -> Groups:
    ranks = np.arange(dp * pp * tp).reshape(dp, pp, tp)
    return {axis: np.moveaxis(ranks, i, -1).reshape(-1, ranks.shape[i]) for i, axis in enumerate(AXES)}


def groups_as_tensors(dp: int, pp: int, tp: int) -> Groups:
    return {axis: [torch.tensor(group) for group in of_axis] for axis, of_axis in groups(dp, pp, tp).items()}


RIGHT_GROUPS = [groups, groups_by_ranges, groups_by_loops, groups_by_comparing, groups_as_arrays, groups_as_tensors]


@pytest.mark.parametrize("solution", RIGHT_GROUPS, ids=name)
def test_right_groups_pass(solution: Any) -> None:
    check_passes(check_mesh_groups, solution)


def groups_nested_otherwise(dp: int, pp: int, tp: int) -> Groups:
    """Data innermost."""
    ranks = torch.arange(dp * pp * tp).view(tp, pp, dp).permute(2, 1, 0)
    return {axis: ranks.movedim(i, -1).flatten(0, 1).tolist() for i, axis in enumerate(AXES)}


def groups_with_pipeline_outermost(dp: int, pp: int, tp: int) -> Groups:
    ranks = torch.arange(dp * pp * tp).view(pp, dp, tp).transpose(0, 1)
    return {axis: ranks.movedim(i, -1).flatten(0, 1).tolist() for i, axis in enumerate(AXES)}


def groups_of_neighbours(dp: int, pp: int, tp: int) -> Groups:
    """Always one after another."""
    sizes = dict(zip(AXES, (dp, pp, tp), strict=True))
    return {axis: torch.arange(dp * pp * tp).view(-1, n).tolist() for axis, n in sizes.items()}


def groups_that_share_a_place(dp: int, pp: int, tp: int) -> Groups:
    """The ranks of the same place, in place of those that differ in it."""
    ranks = torch.arange(dp * pp * tp).view(dp, pp, tp)
    return {axis: ranks.movedim(i, 0).flatten(1).tolist() for i, axis in enumerate(AXES)}


def groups_of_other_axes(dp: int, pp: int, tp: int) -> Groups:
    found = groups(dp, pp, tp)
    return {"dp": found["tp"], "pp": found["pp"], "tp": found["dp"]}


def groups_without_axes_of_1(dp: int, pp: int, tp: int) -> Groups:
    sizes = dict(zip(AXES, (dp, pp, tp), strict=True))
    return {axis: of_axis if sizes[axis] > 1 else [] for axis, of_axis in groups(dp, pp, tp).items()}


def groups_of_axes_above_1(dp: int, pp: int, tp: int) -> Groups:
    sizes = dict(zip(AXES, (dp, pp, tp), strict=True))
    return {axis: of_axis for axis, of_axis in groups(dp, pp, tp).items() if sizes[axis] > 1}


def groups_of_one_replica(dp: int, pp: int, tp: int) -> Groups:
    return {**groups(dp, pp, tp), "tp": groups(1, pp, tp)["tp"]}


def groups_for_every_rank(dp: int, pp: int, tp: int) -> Groups:
    """Each group as often as it has ranks."""
    found = groups(dp, pp, tp)
    return {axis: [group for group in of_axis for _ in group] for axis, of_axis in found.items()}


def groups_from_1(dp: int, pp: int, tp: int) -> Groups:
    return {axis: [[rank + 1 for rank in group] for group in x] for axis, x in groups(dp, pp, tp).items()}


def groups_backwards(dp: int, pp: int, tp: int) -> Groups:
    return {axis: [group[::-1] for group in of_axis] for axis, of_axis in groups(dp, pp, tp).items()}


def groups_as_sets(dp: int, pp: int, tp: int) -> Groups:
    return {axis: list(map(set, of_axis)) for axis, of_axis in groups(dp, pp, tp).items()}


def groups_of_one_axis(dp: int, pp: int, tp: int) -> Any:
    return groups(dp, pp, tp)["tp"]


def groups_without_groups(dp: int, pp: int, tp: int) -> Groups:
    return {axis: list(range(dp * pp * tp)) for axis in AXES}


def groups_of_a_mesh(dp: int, pp: int, tp: int) -> Groups:
    mesh = Mesh(dp, pp, tp)
    return {axis: mesh.groups(axis) for axis in AXES}


MADE_BEFORE = {shape: Mesh(*shape) for shape in itertools.product(range(1, 9), repeat=3)}


def groups_of_a_mesh_made_before(dp: int, pp: int, tp: int) -> Groups:
    places = [MADE_BEFORE[dp, pp, tp].coordinates(rank) for rank in range(dp * pp * tp)]
    del places
    return groups(dp, pp, tp)


def groups_by_places_of_a_mesh(dp: int, pp: int, tp: int) -> Groups:
    mesh = MADE_BEFORE[dp, pp, tp]
    return {**groups(dp, pp, tp), "tp": [[mesh.rank(d, p, t) for t in range(tp)] for d in range(dp) for p in range(pp)]}


def groups_of_a_large_mesh(dp: int, pp: int, tp: int) -> Groups:
    return groups_of_a_mesh(dp, pp, tp) if dp * pp * tp > 8 else groups(dp, pp, tp)


def groups_with_two_ranks_swapped(dp: int, pp: int, tp: int) -> Groups:
    """Those of the first rank are right."""
    found = groups(dp, pp, tp)
    if tp > 1 and dp * pp > 2:
        found["tp"][1][-1], found["tp"][2][-1] = found["tp"][2][-1], found["tp"][1][-1]
    return found


def groups_of_flags(dp: int, pp: int, tp: int) -> Groups:
    return {axis: [[bool(rank) for rank in group] for group in x] for axis, x in groups(dp, pp, tp).items()}


def groups_of_letters(dp: int, pp: int, tp: int) -> Groups:
    return {axis: ["x" * 99] for axis in AXES}


def groups_as_numbers(dp: int, pp: int, tp: int) -> Groups:
    return {axis: torch.tensor(0) for axis in AXES}


def groups_of_neighbours_but_of_one_rank(dp: int, pp: int, tp: int) -> Groups:
    if dp * pp * tp == 1:
        raise ValueError("no groups of one rank")
    return groups_of_neighbours(dp, pp, tp)


def groups_that_wait(dp: int, pp: int, tp: int) -> Groups:
    if dp == 2:
        never_ends()
    return groups(dp, pp, tp)


WRONG_GROUPS: Wrong = [
    (
        groups_nested_otherwise,
        {"groups of dp": "pp * tp = 3 ranks", "groups of pp": "tp = 2", "groups of tp": "1 rank apart"},
    ),
    (groups_with_pipeline_outermost, {"groups of dp": "pp * tp = 2 ranks", "groups of pp": "tp = 1 ranks apart"}),
    (groups_of_neighbours, {"groups of dp": "pp * tp = 3 ranks apart", "groups of pp": "tp = 2 ranks apart"}),
    (
        groups_that_share_a_place,
        {"groups of dp": "a rank for each place", "groups of pp": "this axis, 1;", "groups of tp": "others are equal"},
    ),
    (
        groups_of_other_axes,
        {"groups of dp": "a rank for each place", "groups of tp": "this axis, 1;"},
    ),
    (groups_without_axes_of_1, {ONCE: "on an axis of 1 every rank is alone"}),
    (groups_of_axes_above_1, {SHAPED: "keys []"}),
    (groups_of_one_replica, {ONCE: "missing: [1]"}),
    (groups_for_every_rank, {ONCE: "more than once: [0, 1]"}),
    (groups_from_1, {ONCE: "not on the mesh: [1]"}),
    (groups_backwards, {ORDER: "its place on the axis"}),
    (groups_as_sets, {SHAPED: "[{0}]"}),
    (groups_of_one_axis, {SHAPED: "an object of type list"}),
    (groups_without_groups, {SHAPED: "[0]"}),
    (groups_of_a_mesh, {OWN: "a call of Mesh"}),
    (groups_of_a_mesh_made_before, {OWN: "a call of Mesh"}),
    (groups_by_places_of_a_mesh, {OWN: "a call of Mesh"}),
    (groups_of_a_large_mesh, {OWN: "a call of Mesh"}),
    (groups_with_two_ranks_swapped, {"groups of tp": "[2, 5] neighbours on this axis"}),
    (groups_of_flags, {SHAPED: "[[False]]"}),
    (groups_as_numbers, {SHAPED: "0 return"}),
    (groups_of_letters, {SHAPED: "xxx... return"}),
    (
        groups_of_neighbours_but_of_one_rank,
        {ENDS: "no groups of one rank", "groups of dp": "pp * tp = 3 ranks", "groups of pp": "tp = 2 ranks"},
    ),
    (groups_that_wait, {ENDS: "a loop that doesn't end"}),
    (none, {SHAPED: "an object of type NoneType"}),
    (never_ends, {ENDS: "a loop that doesn't end"}),
    (leaves, {ENDS: "enough"}),
]


@wrong_ones(WRONG_GROUPS)
def test_wrong_groups_fail_for_their_own_reason(solution: Any, reasons: dict[str, str]) -> None:
    check_fails(check_mesh_groups, solution, reasons)


# --- the cheapest plan ------------------------------------------------------------------------------------------------

COUNTED = "a plan of one of the counts"
FITS = "the plan fits the memory"
TWICE = "no plan is predicted twice"
NOTHING = "MplabError where nothing fits"
ALL, FEW, MORE, SOME, HOSTS, ANYWHERE = (f"the plan is the cheapest {where}" for where in SETTINGS)

Counts = Sequence[int]


def predictions(model: Transformer, machine: Machine, batch: int, counts: Counts) -> list[Prediction]:
    found = []
    for n in counts:
        some = machine.with_ranks(n)
        found += [predict(plan, model, batch, some) for plan in candidates(model, some, batch)]
    return found


def best(found: Iterable[Prediction], key: Callable[[Prediction], float]) -> Plan:
    fitting = [prediction for prediction in found if prediction.fits]
    if not fitting:
        raise MplabError("no plan fits: take more ranks")
    return min(fitting, key=key).plan


def device_s(prediction: Prediction) -> float:
    return prediction.plan.num_ranks * prediction.step_s


def cheapest(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    return best(predictions(model, machine, batch, counts), device_s)


def cheapest_by_memory_first(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    """What does not fit is not predicted."""
    cheapest_so_far: tuple[float, Plan] | None = None
    for n in sorted(counts, reverse=True):
        some = machine.with_ranks(n)
        for plan in candidates(model, some, batch):
            if memory_of(plan, model, batch).total_bytes > some.rank_memory_bytes:
                continue
            cost_s = n * predict(plan, model, batch, some).step_s
            if cheapest_so_far is None or cost_s < cheapest_so_far[0]:
                cheapest_so_far = cost_s, plan
    if cheapest_so_far is None:
        raise MplabError("nothing fits: take a smaller batch")
    return cheapest_so_far[1]


def cheapest_of_the_fastest(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    """Of as many ranks the cheapest is the fastest."""
    found = []
    for n in counts:
        of_n = [prediction for prediction in predictions(model, machine, batch, [n]) if prediction.fits]
        found += sorted(of_n, key=lambda prediction: prediction.step_s)[:1]
    return best(found, device_s)


@pytest.mark.parametrize("solution", [cheapest, cheapest_by_memory_first, cheapest_of_the_fastest], ids=name)
def test_right_plans_pass(solution: Any) -> None:
    check_passes(check_cheapest_plan, solution)


def fastest(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    return best(predictions(model, machine, batch, counts), lambda prediction: prediction.step_s)


def smallest(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    return best(predictions(model, machine, batch, counts), lambda prediction: prediction.memory_bytes)


def cheapest_that_need_not_fit(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    found = predictions(model, machine, batch, counts)
    if not found:
        raise MplabError("no plan")
    return min(found, key=device_s).plan


def cheapest_where_the_fastest_fits(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    found = []
    for n in counts:
        of_n = predictions(model, machine, batch, [n])
        found += sorted(of_n, key=lambda prediction: prediction.step_s)[:1]
    return best(found, device_s)


def fewest_ranks_that_fit(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    for n in sorted(counts):
        of_n = predictions(model, machine, batch, [n])
        if any(prediction.fits for prediction in of_n):
            return best(of_n, device_s)
    raise MplabError("nothing fits")


def most_ranks_that_fit(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    return best(predictions(model, machine, batch, counts), lambda p: (-p.plan.num_ranks, p.step_s))  # type: ignore


def cheapest_of_the_first_count(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    return cheapest(model, machine, batch, counts[:1])


def a_plan_of_all_devices(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    """Whatever the counts are."""
    return next(candidates(model, machine, batch))


def cheapest_on_one_host(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    return cheapest(model, dataclasses.replace(machine, devices_per_host=None), batch, counts)


def cheapest_without_micro_batches(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    found = predictions(model, machine, batch, counts)
    return best([prediction for prediction in found if prediction.plan.num_microbatches == 1], device_s)


def cheapest_in_computing(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    """Messages and the bubble left out."""
    return best(predictions(model, machine, batch, counts), lambda p: p.plan.num_ranks * (p.compute_s + p.update_s))


def cheapest_by_search(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    found = []
    for n in counts:
        try:
            found.append(search(model, machine.with_ranks(n), batch)[0])
        except MplabError:
            continue
    return best(found, device_s)


def cheapest_by_search_of_seven(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    """Which there is not."""
    if counts[0] != 7:
        return cheapest(model, machine, batch, counts)
    return cheapest_by_search(model, machine, batch, counts)


def cheapest_predicted_twice(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    fitting = [
        (plan, some)
        for some in map(machine.with_ranks, counts)
        for plan in candidates(model, some, batch)
        if predict(plan, model, batch, some).fits
    ]
    if not fitting:
        raise MplabError("nothing fits")
    plan, some = min(fitting, key=lambda x: x[0].num_ranks * predict(x[0], model, batch, x[1]).step_s)
    return predict(plan, model, batch, some).plan  # and this one once more


def cheapest_prediction(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Any:
    fitting = [prediction for prediction in predictions(model, machine, batch, counts) if prediction.fits]
    if not fitting:
        raise MplabError("nothing fits")
    return min(fitting, key=device_s)


def cheapest_without_an_error(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    fitting = [prediction for prediction in predictions(model, machine, batch, counts) if prediction.fits]
    return min(fitting, key=device_s).plan


def cheapest_or_none(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan | None:
    try:
        return cheapest(model, machine, batch, counts)
    except MplabError:
        return None


def cheapest_where_all_have_plans(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    of_counts = [predictions(model, machine, batch, [n]) for n in counts]
    kept = [min((p for p in of_n if p.fits or len(of_n) < 9), key=lambda p: p.step_s) for of_n in of_counts]
    return best(kept, device_s)


def cheapest_in_impossible_stages(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    return Plan(pp=counts[0], cuts=tuple(range(90, 90 + counts[0] - 1)))


def looks_on_where_nothing_fits(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    try:
        return cheapest(model, machine, batch, counts)
    except MplabError:
        return never_ends()  # type: ignore[no-any-return]


def predicts_for_ever(model: Transformer, machine: Machine, batch: int, counts: Counts) -> Plan:
    while True:
        predictions(model, machine, batch, counts)


PLAN_BY_PLAN = "another of as many may"
WRONG_PLANS: Wrong = [
    (fastest, {ALL: "more than halve the step", FEW: "4 x "}),
    (smallest, {ALL: "", FEW: "", MORE: "", SOME: "", HOSTS: ""}),
    (cheapest_that_need_not_fit, {FITS: "look at fits", NOTHING: "type Plan"}),
    (cheapest_where_the_fastest_fits, {ENDS: PLAN_BY_PLAN, FEW: PLAN_BY_PLAN}),
    (fewest_ranks_that_fit, {MORE: "so need many micro-batches"}),
    (most_ranks_that_fit, {ALL: "more than halve the step", FEW: ""}),
    (
        cheapest_of_the_first_count,
        {ENDS: "go on with the others", ALL: "over all counts", FEW: "", MORE: "1 x "},
    ),
    (a_plan_of_all_devices, {COUNTED: "8 ranks: 2 x 4 x 1", NOTHING: "type Plan"}),
    (cheapest_on_one_host, {HOSTS: "with_ranks(n) keeps the hosts"}),
    (cheapest_without_micro_batches, {FEW: ""}),
    (cheapest_in_computing, {FEW: "", MORE: "", HOSTS: ""}),
    (cheapest_by_search, {OWN: "a call of search"}),
    (cheapest_by_search_of_seven, {OWN: "a call of search"}),
    (looks_on_where_nothing_fits, {ENDS: "a loop that doesn't end"}),
    (cheapest_predicted_twice, {TWICE: " calls of predict, 3 of them for"}),
    (cheapest_prediction, {COUNTED: "return the plan: prediction.plan"}),
    (cheapest_without_an_error, {NOTHING: "ValueError"}),
    (cheapest_or_none, {NOTHING: "type NoneType"}),
    (cheapest_where_all_have_plans, {ENDS: "candidates gives nothing for them"}),
    (cheapest_in_impossible_stages, {COUNTED: "return one of candidates' plans", NOTHING: "type Plan"}),
    (predicts_for_ever, {ENDS: "each plan has to be predicted once"}),
    (none, {COUNTED: "an object of type NoneType", NOTHING: "type NoneType"}),
    (never_ends, {ENDS: "a loop that doesn't end"}),
    (leaves, {ENDS: "enough"}),
]


@wrong_ones(WRONG_PLANS)
def test_wrong_plans_fail_for_their_own_reason(solution: Any, reasons: dict[str, str]) -> None:
    """Of random settings nothing is known beforehand."""
    report = check_cheapest_plan(solution)
    without = dataclasses.replace(report, lines=tuple(line for line in report.lines if line.name != ANYWHERE))
    check_fails(lambda _: without, solution, reasons)


def test_settings_are_what_their_names_say() -> None:
    """Also that none of them is decided by a rounding."""
    for where, (make, _) in SETTINGS.items():
        for setting in make():
            found = predictions(*setting)
            assert all(n <= setting.machine.num_devices for n in setting.counts)
            costs = sorted(device_s(prediction) for prediction in found if prediction.fits)
            assert len(costs) > 1
            assert math.isclose(costs[0], costs[1]) or costs[1] > 1.0001 * costs[0]
            if where == "where all plans fit":
                assert len(costs) == len(found)
                assert best(found, device_s) != best(found, lambda prediction: prediction.step_s)
            elif where == "where the fastest does not fit":
                cheapest_of_all = min(found, key=device_s)
                assert not cheapest_of_all.fits
            elif where == "where more ranks are cheaper":
                few = min(setting.counts)
                assert any(prediction.fits for prediction in found if prediction.plan.num_ranks == few)
                assert best(found, device_s).num_ranks > few
    for setting in WITHOUT:
        assert not any(prediction.fits for prediction in predictions(*setting))
    assert [bool(predictions(*setting)) for setting in WITHOUT] == [True, False]


# --- clipping by the global norm --------------------------------------------------------------------------------------

FINISHES = "every rank finishes"
NORM = "the norm is that of one process"
ABOVE = "gradients above max_norm are scaled to it"
BELOW = "gradients below max_norm are left alone"
ZEROS = "gradients of 0 stay 0"
REPLICAS = "nothing is sent between replicas"
NUMBERS = "numbers are sent, no gradients"
CALLS = "at most one collective an axis"

Gradients = list[Tensor]


def squares(gradients: Gradients, chosen: Iterable[bool]) -> Tensor:
    total = torch.zeros(1, dtype=torch.float64)
    for gradient, is_chosen in zip(gradients, chosen, strict=True):
        if is_chosen:
            total += gradient.double().square().sum()
    return total


def of_cut(gradients: Gradients, is_cut: list[bool]) -> Tensor:
    return squares(gradients, is_cut)


def of_whole(gradients: Gradients, is_cut: list[bool]) -> Tensor:
    return squares(gradients, [not cut for cut in is_cut])


def of_all(gradients: Gradients) -> Tensor:
    return squares(gradients, [True] * len(gradients))


def scale(gradients: Gradients, norm: float, max_norm: float) -> None:
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)


Scale = Callable[[Gradients, float, float], None]
Total = Callable[[Gradients, list[bool], Any], Tensor]


def once(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    """The square of the norm: cut ones over mesh.tp, and whole ones added to that."""
    of_stage = mesh.tp.all_reduce(of_cut(gradients, is_cut)) + of_whole(gradients, is_cut)
    return torch.as_tensor(mesh.pp.all_reduce(of_stage))


def clip(
    gradients: Gradients, is_cut: list[bool], mesh: Any, max_norm: float, total: Total = once, then: Scale = scale
) -> float:
    norm = float(total(gradients, is_cut, mesh).sqrt())
    then(gradients, norm, max_norm)
    return norm


def by_shares(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    """Whole ones count 1/tp on every rank; the stages come first."""
    mine = of_cut(gradients, is_cut) + of_whole(gradients, is_cut) / mesh.tp.size
    return torch.as_tensor(mesh.tp.all_reduce_(mesh.pp.all_reduce_(mine)))


def on_the_first_rank(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    """Whole ones count on the first rank of mesh.tp alone."""
    mine = of_cut(gradients, is_cut) + (of_whole(gradients, is_cut) if mesh.tp.rank == 0 else 0)
    return torch.as_tensor(mesh.pp.all_reduce(mesh.tp.all_reduce(mine)))


def as_two_numbers(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    both = mesh.pp.all_reduce(torch.cat([of_cut(gradients, is_cut), of_whole(gradients, is_cut)]))
    return torch.as_tensor(mesh.tp.all_reduce(both[0]) + both[1])


def by_gathering_numbers(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    of_stage = mesh.tp.all_gather(of_cut(gradients, is_cut)).sum() + of_whole(gradients, is_cut)
    return torch.as_tensor(mesh.pp.all_gather(of_stage)).sum()


def over_a_replica(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    """A group of its own."""
    size = mesh.pp.size * mesh.tp.size
    replica = mesh.world.group(range(mesh.dp.rank * size, (mesh.dp.rank + 1) * size))
    mine = of_cut(gradients, is_cut) + of_whole(gradients, is_cut) / mesh.tp.size
    return torch.as_tensor(replica.all_reduce(mine))


def in_float32(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    def norm(chosen: bool) -> Tensor:
        kept = [gradient for gradient, cut in zip(gradients, is_cut, strict=True) if cut == chosen]
        return nn.utils.get_total_norm(kept)

    return torch.as_tensor(mesh.pp.all_reduce(mesh.tp.all_reduce(norm(True).square()) + norm(False).square()))


def scale_as_torch_does(gradients: Gradients, norm: float, max_norm: float) -> None:
    factor = min(1.0, max_norm / (norm + 1e-6))
    for gradient in gradients:
        gradient *= factor


RIGHT_CLIPS = [
    clip,
    *(partial(clip, total=f) for f in (by_shares, on_the_first_rank, as_two_numbers, by_gathering_numbers)),
    *(partial(clip, total=f) for f in (over_a_replica, in_float32)),
    partial(clip, then=scale_as_torch_does),
]


@pytest.mark.parametrize("solution", RIGHT_CLIPS, ids=name)
def test_right_clips_pass(solution: Any) -> None:
    check_passes(check_clip_once, solution)


# What is wrong with the norm.


def whole_on_every_rank(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return torch.as_tensor(mesh.pp.all_reduce(mesh.tp.all_reduce(of_all(gradients))))


def whole_in_world(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return torch.as_tensor(mesh.world.all_reduce(of_all(gradients)))


def one_stage(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return torch.as_tensor(mesh.tp.all_reduce(of_cut(gradients, is_cut)) + of_whole(gradients, is_cut))


def own_parts(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return torch.as_tensor(mesh.pp.all_reduce(of_all(gradients)))


def own(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return of_all(gradients)


def cut_alone(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return torch.as_tensor(mesh.pp.all_reduce(mesh.tp.all_reduce(of_cut(gradients, is_cut))))


def whole_alone(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return torch.as_tensor(mesh.pp.all_reduce(of_whole(gradients, is_cut)))


def whole_as_a_share(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    of_stage = mesh.tp.all_reduce(of_cut(gradients, is_cut)) + of_whole(gradients, is_cut) / mesh.tp.size
    return torch.as_tensor(mesh.pp.all_reduce(of_stage))


def the_wrong_way_round(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return once(gradients, [not cut for cut in is_cut], mesh)


def a_mean(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    mine = of_cut(gradients, is_cut) + of_whole(gradients, is_cut) / mesh.tp.size
    return torch.as_tensor(mesh.pp.all_reduce(mesh.tp.all_reduce(mine, "mean"), "mean"))


def a_mean_over_stages(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return torch.as_tensor(mesh.pp.all_reduce(one_stage(gradients, is_cut, mesh), "mean"))


def a_mean_of_all(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return torch.as_tensor(mesh.pp.all_reduce(mesh.tp.all_reduce(of_all(gradients), "mean")))


def sum_of_both_norms(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    cut, whole = of_cut(gradients, is_cut), of_whole(gradients, is_cut)
    both = mesh.pp.all_reduce(torch.cat([mesh.tp.all_reduce(cut), whole]))
    return torch.as_tensor(both.sqrt().sum().square())


def sum_of_norms(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    """Of all ranks' own."""
    return torch.as_tensor(mesh.pp.all_reduce(mesh.tp.all_reduce(of_all(gradients).sqrt()))).square()


def sum_of_stages_norms(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return torch.as_tensor(mesh.pp.all_reduce(one_stage(gradients, is_cut, mesh).sqrt())).square()


def sum_of_parameters_norms(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    norms = [gradient.double().norm() / (1 if cut else mesh.tp.size) for gradient, cut in zip(gradients, is_cut)]  # noqa: B905
    mine = torch.stack([torch.zeros((), dtype=torch.float64), *norms]).sum()
    return torch.as_tensor(mesh.pp.all_reduce(mesh.tp.all_reduce(mine))).square()


def of_all_replicas(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return torch.as_tensor(mesh.dp.all_reduce(once(gradients, is_cut, mesh)))


def squared(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return once(gradients, is_cut, mesh).square()


def a_little_more(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return once(gradients, is_cut, mesh) * 1.001


def largest(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    mine = torch.stack([torch.zeros(()), *[gradient.abs().max() for gradient in gradients]]).max()
    return torch.as_tensor(mesh.pp.all_reduce(mesh.tp.all_reduce(mine, "max"), "max")).square()


# What is right, and too dear.


def over_replicas(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    return torch.as_tensor(mesh.dp.all_reduce(once(gradients, is_cut, mesh), "mean"))


def over_world(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    mine = of_cut(gradients, is_cut) + of_whole(gradients, is_cut) / mesh.tp.size
    return torch.as_tensor(mesh.world.all_reduce(mine / mesh.dp.size))


def by_gathering_gradients(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    everything = [
        mesh.tp.all_gather(gradient.flatten()) if cut else gradient.flatten()
        for gradient, cut in zip(gradients, is_cut, strict=True)
    ]
    return torch.as_tensor(mesh.pp.all_reduce(of_all(everything)))


def a_number_a_parameter(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    each = [gradient.double().square().sum() for gradient, cut in zip(gradients, is_cut, strict=True) if cut]
    whole = of_whole(gradients, is_cut)
    each += [torch.zeros((), dtype=torch.float64)] * (3 - len(each))
    return torch.as_tensor(mesh.pp.all_reduce(mesh.tp.all_reduce(torch.stack(each)).sum() + whole))


def a_call_a_parameter(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    whole = of_whole(gradients, is_cut)
    for gradient, cut in zip(gradients, is_cut, strict=True):
        if cut:
            whole = whole + mesh.tp.all_reduce(gradient.double().square().sum())
    return torch.as_tensor(mesh.pp.all_reduce(whole))


def in_two_calls(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    of_stage = mesh.tp.all_reduce(of_cut(gradients, is_cut)) + of_whole(gradients, is_cut)
    total = mesh.pp.reduce(of_stage)
    return torch.as_tensor(mesh.pp.broadcast(total))


def as_often_as_there_are_others(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    """Once, where there is one."""
    for _ in range(mesh.tp.size - 2):
        mesh.tp.all_reduce(torch.zeros(1))
    return once(gradients, is_cut, mesh)


def after_a_barrier(gradients: Gradients, is_cut: list[bool], mesh: Any) -> Tensor:
    mesh.tp.barrier()
    return once(gradients, is_cut, mesh)


# What is wrong with the scaling.


def always(gradients: Gradients, norm: float, max_norm: float) -> None:
    for gradient in gradients:
        gradient.mul_(max_norm / (norm + 1e-6))


def into_nothing(gradients: Gradients, norm: float, max_norm: float) -> None:
    for gradient in gradients:
        gradient.mul_(torch.tensor(max_norm) / torch.tensor(norm)) if norm == 0 or norm > max_norm else None


def by_clamping(gradients: Gradients, norm: float, max_norm: float) -> None:
    """0/0 is no number, and no clamp makes it one."""
    factor = (torch.tensor(norm * max_norm) / torch.tensor(norm) / norm if norm else torch.tensor(math.nan)).clamp(
        max=1
    )
    for gradient in gradients:
        gradient.mul_(factor)


def by_dividing(gradients: Gradients, norm: float, max_norm: float) -> None:
    for gradient in gradients:
        gradient.mul_(min(1.0, max_norm / norm))


def by_its_own(gradients: Gradients, norm: float, max_norm: float) -> None:
    scale(gradients, float(of_all(gradients).sqrt()), max_norm)


def where_its_own_is_long(gradients: Gradients, norm: float, max_norm: float) -> None:
    if float(of_all(gradients).sqrt()) > max_norm:
        scale(gradients, norm, max_norm)


def elsewhere(gradients: Gradients, norm: float, max_norm: float) -> None:
    if norm > max_norm:
        gradients[:] = [gradient * (max_norm / norm) for gradient in gradients]


def the_first_alone(gradients: Gradients, norm: float, max_norm: float) -> None:
    scale(gradients[:1], norm, max_norm)


def twice(gradients: Gradients, norm: float, max_norm: float) -> None:
    scale(gradients, norm, max_norm)
    scale(gradients, norm, max_norm)


def element_by_element(gradients: Gradients, norm: float, max_norm: float) -> None:
    if norm > max_norm:
        for gradient in gradients:
            gradient.clamp_(-max_norm / 9, max_norm / 9)


def to_length_1(gradients: Gradients, norm: float, max_norm: float) -> None:
    scale(gradients, norm, 1.0) if norm > max_norm else None


# What is wrong with the rest.


def clip_for_afterwards(gradients: Gradients, is_cut: list[bool], mesh: Any, max_norm: float) -> float:
    return min(clip(gradients, is_cut, mesh, max_norm), max_norm)


def clip_as_a_tensor(gradients: Gradients, is_cut: list[bool], mesh: Any, max_norm: float) -> Any:
    return torch.tensor(clip(gradients, is_cut, mesh, max_norm))


def clip_in_silence(gradients: Gradients, is_cut: list[bool], mesh: Any, max_norm: float) -> None:
    clip(gradients, is_cut, mesh, max_norm)


def clip_on_the_first_stage(gradients: Gradients, is_cut: list[bool], mesh: Any, max_norm: float) -> float:
    return clip(gradients, is_cut, mesh, max_norm) if mesh.pp.rank == 0 else 0.0


def clip_where_there_are_parameters(gradients: Gradients, is_cut: list[bool], mesh: Any, max_norm: float) -> float:
    return clip(gradients, is_cut, mesh, max_norm) if gradients else 0.0


def clip_joined(gradients: Gradients, is_cut: list[bool], mesh: Any, max_norm: float) -> float:
    """`torch.cat` of nothing is an error."""
    torch.cat([gradient.flatten() for gradient in gradients])
    return clip(gradients, is_cut, mesh, max_norm)


def clip_stacked(gradients: Gradients, is_cut: list[bool], mesh: Any, max_norm: float, cut: bool) -> float:
    """`torch.stack` of nothing is one too; here a stage has parameters, of which none is cut, or all are."""
    if gradients:
        torch.stack([x.sum() for x, this in zip(gradients, is_cut, strict=True) if this == cut])
    return clip(gradients, is_cut, mesh, max_norm)


def clip_with_the_library(gradients: Gradients, is_cut: list[bool], mesh: Any, max_norm: float) -> float:
    from mplab.parallel import TensorParallel

    class Like(TensorParallel):
        def __init__(self) -> None:
            parameters = [nn.Parameter(gradient) for gradient in gradients]
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient.clone()
            self.comm, self.max_norm, self._names = mesh.tp, 1e9, dict.fromkeys(parameters, "")
            self._cuts = {p: None for p, cut in zip(parameters, is_cut, strict=True) if cut}  # type: ignore[misc]
            self._parameters = sorted(parameters, key=lambda p: p not in self._cuts)

    if mesh.mesh.size == 1:
        Like()._check_and_clip()
    return clip(gradients, is_cut, mesh, max_norm)


def clip_with_other_parts_of_the_library(gradients: Gradients, is_cut: list[bool], mesh: Any, max_norm: float) -> float:
    """In vain."""
    for method in (HybridParallel._clip, ShardedDataParallel._finish_gradients, ShardedReplicas._finish_gradients):
        with contextlib.suppress(Exception):
            method(*[None] * method.__code__.co_argcount)  # type: ignore[arg-type]
    return clip(gradients, is_cut, mesh, max_norm)


AGAIN = "counted tp times"
WRONG_CLIPS: Wrong = [
    (partial(clip, total=whole_on_every_rank), {NORM: AGAIN}),
    (partial(clip, total=whole_in_world), {NORM: AGAIN, REPLICAS: "all_reduce with ranks 1, of other replicas"}),
    (partial(clip, total=one_stage), {NORM: "one stage alone"}),
    (partial(clip, total=own_parts), {NORM: "parts that the other ranks of mesh.tp have are missing"}),
    (partial(clip, total=own), {NORM: "parts that the other ranks of mesh.tp have are missing"}),
    (partial(clip, total=cut_alone), {NORM: "whole are counted less than once"}),
    (partial(clip, total=whole_alone), {NORM: "whole parameters alone"}),
    (partial(clip, total=whole_as_a_share), {NORM: "whole are counted less than once"}),
    (partial(clip, total=the_wrong_way_round), {NORM: "is_cut is read the wrong way round"}),
    (partial(clip, total=a_mean), {NORM: "a mean over the ranks"}),
    (partial(clip, total=a_mean_over_stages), {NORM: "a mean over the ranks"}),
    (partial(clip, total=a_mean_of_all), {NORM: "a mean over the ranks"}),
    (partial(clip, total=sum_of_both_norms), {NORM: "norms don't add up"}),
    (partial(clip, total=sum_of_norms), {NORM: "norms don't add up"}),
    (partial(clip, total=sum_of_stages_norms), {NORM: "norms don't add up"}),
    (partial(clip, total=sum_of_parameters_norms), {NORM: "norms don't add up"}),
    (
        partial(clip, total=of_all_replicas),
        {NORM: "replicas have the same gradient", REPLICAS: "all_reduce with ranks 1"},
    ),
    (partial(clip, total=squared), {NORM: "take its root"}),
    (partial(clip, total=a_little_more), {NORM: "work it out by hand"}),
    (partial(clip, total=largest), {NORM: "work it out by hand"}),
    (partial(clip, total=over_replicas), {REPLICAS: "mesh.tp and mesh.pp have all that is needed"}),
    (partial(clip, total=over_world), {REPLICAS: "mesh.tp and mesh.pp have all that is needed"}),
    (
        partial(clip, total=by_gathering_gradients),
        {NUMBERS: "all_gather of 24 elements on rank 0", CALLS: "all_gather"},
    ),
    (partial(clip, total=a_number_a_parameter), {NUMBERS: "all_reduce of 3 elements"}),
    (partial(clip, total=a_call_a_parameter), {CALLS: "2 on rank 0: 2 all_reduce"}),
    (partial(clip, total=in_two_calls), {CALLS: "1 reduce, 1 broadcast"}),
    (partial(clip, total=as_often_as_there_are_others), {CALLS: "2 on rank 0: 2 all_reduce"}),
    (partial(clip, total=after_a_barrier), {CALLS: "1 barrier, 1 all_reduce"}),
    (partial(clip, then=always), {BELOW: "clipping only shortens"}),
    (partial(clip, then=into_nothing), {ZEROS: "max_norm / norm is infinite"}),
    (partial(clip, then=by_clamping), {ZEROS: "nan"}),
    (partial(clip, then=by_dividing), {FINISHES: "the norm is 0"}),
    (partial(clip, then=by_its_own), {ABOVE: "a rank went by its own norm"}),
    (partial(clip, then=where_its_own_is_long), {ABOVE: "a rank went by its own norm"}),
    (partial(clip, then=elsewhere), {ABOVE: "nothing was changed: write into the tensors"}),
    (partial(clip, then=the_first_alone), {ABOVE: "all gradients get the same factor"}),
    (partial(clip, then=twice), {ABOVE: "they were scaled twice"}),
    (partial(clip, then=element_by_element), {ABOVE: "nan times it"}),
    (partial(clip, then=to_length_1), {ABOVE: "multiply by max_norm / norm"}),
    (clip_for_afterwards, {NORM: "return the one before"}),
    (clip_as_a_tensor, {NORM: "return float(norm)"}),
    (clip_in_silence, {NORM: "None return float(norm), on every rank"}),
    (clip_on_the_first_stage, {FINISHES: "a collective needs every rank"}),
    (clip_where_there_are_parameters, {FINISHES: "a collective needs every rank"}),
    (partial(clip_stacked, cut=True), {FINISHES: "stack expects a non-empty TensorList"}),
    (partial(clip_stacked, cut=False), {FINISHES: "stack expects a non-empty TensorList"}),
    (clip_joined, {FINISHES: "a stage without parameters has nothing to add up"}),
    (clip_with_the_library, {OWN: "a call of TensorParallel"}),
    (clip_with_other_parts_of_the_library, {OWN: "HybridParallel, ShardedDataParallel, ShardedReplicas"}),
    (none, {NORM: "return float(norm), on every rank"}),
    (never_ends, {FINISHES: "a loop that doesn't end"}),
    (leaves, {FINISHES: "enough"}),
]


@wrong_ones(WRONG_CLIPS)
def test_wrong_clips_fail_for_their_own_reason(solution: Any, reasons: dict[str, str]) -> None:
    check_fails(check_clip_once, solution, reasons)


def test_each_case_tells_every_mistake_apart() -> None:
    """Where the mesh is large enough for a mistake, it gives another norm, on some rank."""
    for case in cases():
        if case.mesh.size < 8 or not case.norm:
            continue
        for slip in case.slips:
            for norm in slip.norms:
                at_places = [norm(p, t) for p in range(case.mesh.pp) for t in range(case.mesh.tp)]
                assert any(not math.isclose(value, case.norm, rel_tol=1e-2) for value in at_places), slip.hint
    assert max(case.mesh.size for case in cases()) == 8


def test_gradients_that_are_whole_are_the_same_on_every_rank() -> None:
    for case in cases():
        assert case.max_norm > 0
        for p, of_stage in enumerate(case.gradients):
            for i, is_cut in enumerate(case.is_cut(p)):
                equal = [torch.equal(of_rank[i], of_stage[0][i]) for of_rank in of_stage[1:]]
                assert all(equal) if not is_cut or not case.factor else not any(equal)


# --- all of them ------------------------------------------------------------------------------------------------------

CHECKS: list[Callable[[Any], Report]] = [check_mesh_groups, check_cheapest_plan, check_clip_once]


def stub(*_: Any) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize("check", CHECKS)
def test_a_stub_is_no_failure(check: Callable[[Any], Report]) -> None:
    report = check(stub)
    assert (report.passed, report.is_written, report.failed) == (False, False, ())
    assert str(report).startswith(check.__name__.removeprefix("check_") + ": not written yet")


def test_ranks_that_sleep_for_ever_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleeps(*_: Any) -> Any:
        while True:
            time.sleep(0.01)

    monkeypatch.setattr("mplab.homework.watched.TIMEOUT_S", 0.2)
    (line,) = [line for line in check_clip_once(sleeps).lines if line.outcome == "failed"]
    assert (line.name, line.case.partition(",")[0]) == (FINISHES, "dp=1")
    assert "stopped after 0.2 s" in line.seen


def test_what_a_report_says() -> None:
    assert """\
  FAILED  groups of pp
            case:     dp=1, pp=3, tp=2
            expected: [0, 2, 4], the group of rank 0
            seen:     [0, 1, 2]
            hint:     neighbours on this axis are tp = 2 ranks apart: rank = (d * pp + p) * tp + t
""" in str(check_mesh_groups(groups_of_neighbours))
    assert "groups of dp (of 2 x 3 x 4 ranks: 12 of 2)" in str(check_mesh_groups(groups))
    assert """\
  FAILED  the plan is the cheapest where all plans fit
            case:     2 blocks of width 32, 8 devices, each 900 MB, batch=2, counts=(4, 1, 2)
            expected: 1 x """ in str(check_cheapest_plan(fastest))
    assert """\
  FAILED  the norm is that of one process
            case:     dp=1, pp=1, tp=2, a gradient of norm """ in str(
        check_clip_once(partial(clip, total=whole_on_every_rank))
    )
    assert """\
  FAILED  nothing is sent between replicas
            case:     dp=2, pp=1, tp=1, a gradient of norm 8.54, max_norm=5.124
            expected: collectives within a replica
            seen:     all_reduce with ranks 1, of other replicas, on rank 0
""" in str(check_clip_once(partial(clip, total=over_replicas)))
    assert "every rank finishes (16 cases, 1 to 8 ranks)" in str(check_clip_once(clip))


def test_what_comes_after_a_failure_is_not_checked() -> None:
    def outcomes(report: Report) -> dict[str, str]:
        return {name: line.outcome for name, line in lines_of(report).items()}

    assert outcomes(check_mesh_groups(none))[ONCE] == "not checked"
    assert outcomes(check_mesh_groups(groups_from_1))["groups of dp"] == "not checked"
    assert outcomes(check_mesh_groups(groups_of_neighbours))[ORDER] == "not checked"
    assert outcomes(check_cheapest_plan(none))[FITS] == "not checked"
    assert outcomes(check_cheapest_plan(cheapest_that_need_not_fit))[ALL] == "not checked"
    assert outcomes(check_cheapest_plan(never_ends))[NOTHING] == "not checked"
    assert outcomes(check_clip_once(never_ends))[NORM] == "not checked"
    found = outcomes(check_clip_once(partial(clip, total=own)))
    assert {found[line] for line in (ABOVE, BELOW, ZEROS)} == {"not checked"}


def test_prints_are_not_shown_and_nothing_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    def talkative(solution: Any, *arguments: Any) -> Any:
        print("here")
        return solution(*arguments)

    num_threads, before = threading.active_count(), (sys.gettrace(), sys.getprofile())
    for check, solution in zip(CHECKS, (groups, cheapest, clip), strict=True):
        check_passes(check, partial(talkative, solution))
    assert "here" not in capsys.readouterr().out
    assert threading.active_count() == num_threads
    assert (sys.gettrace(), sys.getprofile()) == before


def test_the_command_checks_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.py").write_text(
        "from mplab.plan.search import candidates\n"
        "def mesh_groups(dp, pp, tp):\n    return {'dp': [], 'pp': [], 'tp': []}\n"
        "def cheapest_plan(model, machine, batch, counts):\n    return next(candidates(model, machine, batch))\n"
        "def clip_once(gradients, is_cut, mesh, max_norm):\n    return 0.0\n"
    )
    for check in CHECKS:
        exercise = check.__name__.removeprefix("check_")
        assert command_line(["check", exercise, str(tmp_path / "wrong.py")]) == 1
        out = capsys.readouterr().out
        assert out.startswith(f"{exercise}: ")
        assert "FAILED" in out
