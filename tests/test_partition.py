"""Cuts against brute force over all of them, and what bad cuts get."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mplab.errors import MplabError
from mplab.plan.partition import (
    LayerCost,
    Partition,
    by_depth,
    by_parameters,
    by_time,
    check_cuts,
    stage_costs,
)

NAMES = ["embedding", "blocks.0", "blocks.1", "blocks.2", "head"]
# Whole numbers meet often, so that ties are tried; floats that are no sum of powers of two try the rounding.
TIMES = st.integers(0, 4) | st.floats(0, 10, allow_subnormal=False)
SPEEDS = st.sampled_from([0.1, 0.5, 1, 1.5, 2, 3])


def all_cuts(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    return combinations(range(1, num_layers), num_stages - 1)


def stages(cuts: Sequence[int], num_layers: int) -> list[range]:
    return [range(a, b) for a, b in zip((0, *cuts), (*cuts, num_layers), strict=True)]


def exact_loads(
    cuts: Sequence[int], times: Sequence[float], speeds: Sequence[float], edges: Sequence[float]
) -> list[Fraction]:
    loads = []
    for stage, speed in zip(stages(cuts, len(times)), speeds, strict=True):
        load = sum((Fraction(times[i]) for i in stage), Fraction(0)) / Fraction(speed)
        load += Fraction(edges[stage[0] - 1]) if stage[0] > 0 else 0
        load += Fraction(edges[stage[-1]]) if stage[-1] < len(times) - 1 else 0
        loads.append(load)
    return loads


@settings(max_examples=300)
@given(st.data())
def test_by_time_is_the_best_of_all_cuts(data: st.DataObject) -> None:
    times = data.draw(st.lists(TIMES, min_size=1, max_size=8))
    p = data.draw(st.integers(1, min(5, len(times))))
    speeds = data.draw(st.none() | st.lists(SPEEDS, min_size=p, max_size=p))
    edges = data.draw(st.none() | st.lists(TIMES, min_size=len(times) - 1, max_size=len(times) - 1))
    one = st.lists(st.integers(0, 4), min_size=len(times), max_size=len(times))
    memory = data.draw(st.none() | one | st.lists(one, min_size=p, max_size=p))
    rows = [[0] * len(times)] * p if memory is None else memory if isinstance(memory[0], list) else [memory] * p
    limits = None if memory is None else data.draw(st.lists(st.integers(1, 12), min_size=p, max_size=p))

    able = []
    for cuts in all_cuts(len(times), p):
        loads = exact_loads(cuts, times, speeds or [1] * p, edges or [0] * len(times))
        held = [sum(row[i] for i in stage) for row, stage in zip(rows, stages(cuts, len(times)), strict=True)]
        if limits is None or all(size <= limit for size, limit in zip(held, limits, strict=True)):
            able.append((sorted(loads, reverse=True), cuts, loads))
    if not able:
        with pytest.raises(MplabError, match=r"no cut of .* times as large would do"):
            by_time(times, p, speeds, edges, memory, limits)
        return
    _, cuts, loads = min(able)
    found = by_time(times, p, speeds, edges, memory, limits)
    assert found.cuts == cuts
    assert found.loads == tuple(float(load) for load in loads)
    assert found.num_layers == len(times)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=9), st.data())
def test_by_parameters_is_the_best_of_all_cuts(sizes: list[int], data: st.DataObject) -> None:
    p = data.draw(st.integers(1, min(5, len(sizes))))
    partition = by_parameters(sizes, p)
    largest = min(
        max(sum(sizes[i] for i in stage) for stage in stages(cuts, len(sizes))) for cuts in all_cuts(len(sizes), p)
    )
    assert max(partition.loads) == largest
    assert partition.loads == tuple(sum(sizes[a:b]) for a, b in partition.stages)


@given(st.integers(1, 30), st.data())
def test_by_depth_gives_every_stage_as_many(num_layers: int, data: st.DataObject) -> None:
    p = data.draw(st.integers(1, num_layers))
    partition = by_depth(num_layers, p)
    assert partition.loads == tuple(len(chunk) for chunk in np.array_split(range(num_layers), p))
    assert [b - a for a, b in partition.stages] == list(partition.loads)


@given(st.lists(st.floats(1e-9, 1e3), min_size=2, max_size=12), st.data())
def test_cuts_are_good_ones_and_balance_is_between_1_and_p(times: list[float], data: st.DataObject) -> None:
    p = data.draw(st.integers(1, len(times)))
    for partition in (by_time(times, p), by_depth(len(times), p)):
        assert check_cuts(partition.cuts, [str(t) for t in times], p) == partition.cuts
        assert 1 - 1e-9 <= partition.balance <= p + 1e-9
        assert partition.num_stages == len(partition.stages) == p
        assert partition.stages[0][0] == 0
        assert partition.stages[-1][1] == len(times)


def test_the_other_stages_are_balanced_too() -> None:
    assert by_time([9, 1, 1, 1, 1, 1], 3).cuts == (1, 3), "not (1, 2): the largest is 9 either way"
    assert by_time([9, 1, 1, 1, 1, 1], 3).loads == (9, 2, 3), "of (2, 3) and (3, 2) the lower cut"


def test_equal_floats_are_a_tie_though_their_sums_round() -> None:
    assert 0.1 + 0.1 + 0.1 != 0.3
    assert by_time([0.1] * 9, 3).cuts == (3, 6)
    assert by_time([0.1, 0.2, 0.3, 0.3], 3).cuts == (2, 3)
    assert by_parameters([2**53, 1, 2**53 + 1], 2).cuts == (2,), "as floats, the last is 2**53"


def test_a_faster_device_gets_more_and_a_dear_boundary_is_not_cut() -> None:
    assert by_time([1] * 8, 2, speeds=[3, 1]).cuts == (6,)
    assert by_time([1] * 8, 2, speeds=[3, 1]).loads == (2, 2)
    assert by_time([1] * 4, 2).cuts == (2,)
    assert by_time([1] * 4, 2, boundary_s=[0, 5, 0]).cuts == (1,)
    assert by_time([5, 3, 3], 2, boundary_s=[2.5, 0]).loads == (8, 3), "not (7.5, 8.5)"
    assert by_time([1, 1], 2, speeds=[10, 1], boundary_s=[3]).loads == (3.1, 4), "both stages spend it, at any speed"


def test_memory_moves_the_cut() -> None:
    times, memory = [1, 1, 1, 1], [3, 1, 1, 1]
    assert by_time(times, 2, memory_bytes=memory, memory_limits_bytes=[9, 9]).cuts == (2,)
    assert by_time(times, 2, memory_bytes=memory, memory_limits_bytes=[3, 9]).cuts == (1,)
    with pytest.raises(MplabError) as caught:
        by_time(times, 2, memory_bytes=[m * 1e6 for m in memory], memory_limits_bytes=[2e6, 9e6])
    for said in ("4 layers, 6 MB in all", "2 MB, 9 MB", "limits 1.5 times as large would do"):
        assert said in str(caught.value)
    assert by_time(times, 2, memory_bytes=memory, memory_limits_bytes=[2 * 1.5, 9 * 1.5]).cuts == (1,)


def test_a_layer_may_need_more_memory_on_one_stage_than_on_another() -> None:
    parameters, activations, p = 4, 10, 3
    memory = [[parameters + activations * (p - stage)] * 6 for stage in range(p)]  # 34, 24 and 14 a layer
    assert by_time([1] * 6, p).cuts == (2, 4)
    assert by_time([1] * 6, p, memory_bytes=memory, memory_limits_bytes=[50] * p).cuts == (1, 3)
    with pytest.raises(MplabError, match=r"84 to 204 MB in all.*limits 1\.2 times as large would do"):
        by_time([1] * 6, p, memory_bytes=[[1e6 * x for x in row] for row in memory], memory_limits_bytes=[40e6] * p)


def test_a_long_chain_is_cut_exactly_and_at_once() -> None:
    times = [1 + (7 * i) % 5 for i in range(400)]
    assert by_time(times, 8).loads == (150,) * 8


def test_numbers_of_numpy_do() -> None:
    times = np.array([2**62, 2**62, 2**62, 2**62])
    assert by_parameters(times, 2).loads == (2.0**63, 2.0**63)  # type: ignore[arg-type]
    assert by_time(np.ones(4, dtype=np.float32), np.int64(2)).cuts == (2,)  # type: ignore[arg-type]


def test_a_partition_prints_its_layers_loads_and_balance() -> None:
    assert str(by_time([0.001, 0.002, 0.004], 2)) == "layers 0 to 1: 3.00 ms | 2: 4.00 ms; L = 1.14"
    assert str(by_parameters([1200, 800], 2)) == "layers 0: 1,200 parameters | 1: 800 parameters; L = 1.20"
    assert str(by_depth(3, 2)) == "layers 0 to 1: 2 layers | 2: 1 layers; L = 1.33"
    assert math.isnan(Partition((1,), (0, 0), 2, "s").balance)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(2, 4), [2, 4], (c for c in (2, 4)), np.array([2, 4]), torch.tensor([2, 4])])
def test_good_cuts_come_back_as_whole_numbers(cuts: Any) -> None:
    checked = check_cuts(cuts, NAMES, 3)
    assert checked == (2, 4)
    assert all(type(cut) is int for cut in checked)
    assert check_cuts((), NAMES, 1) == ()


@pytest.mark.parametrize(
    ("cuts", "said"),
    [
        ((4, 2), "cuts [4, 2]: 2 comes after 4, out of order"),
        ((2, 2), "cuts [2, 2]: 2 is there twice"),
        ((0, 2), "cuts [0, 2]: 0 is out of range"),
        ((2, 5), "cuts [2, 5]: 5 is out of range"),
        ((-1, 2), "cuts [-1, 2]: -1 is out of range"),
        ((2,), "cuts [2]: 3 stages have 2, not 1"),
        ((1, 2, 3), "cuts [1, 2, 3]: 3 stages have 2, not 3"),
        ((), "cuts (): 3 stages have 2, not 0"),
        ((2.0, 4), "cuts [2.0, 4]: 2.0 is no whole number"),
        ((True, 4), "cuts [True, 4]: True is no whole number"),
        (("2", "4"), "cuts ['2', '4']: '2' is no whole number"),
        ((2, None), "cuts [2, None]: None is no whole number"),
        ((2, math.nan), "nan is no whole number"),
        (2, "cuts 2: they are a sequence of whole numbers"),
        (None, "cuts None: they are a sequence of whole numbers"),
    ],
)
def test_bad_cuts_are_refused_with_the_list_of_layers(cuts: Any, said: str) -> None:
    with pytest.raises(MplabError) as caught:
        check_cuts(cuts, NAMES, 3)
    text = str(caught.value)
    assert said in text
    assert "give 2, from 1 to 4, each above the one before" in text
    assert all(f"\n  {i}  {name}" in text for i, name in enumerate(NAMES))


@pytest.mark.parametrize("num_stages", [0, -1, 6, 2.0, "2", None, True])
def test_impossible_numbers_of_stages_are_refused(num_stages: Any) -> None:
    said = f"{num_stages!r} stages of 5 layers: every stage has one layer or more, so give 1 to 5 stages"
    for attempt in (
        lambda: check_cuts((), NAMES, num_stages),
        lambda: by_depth(5, num_stages),
        lambda: by_parameters([1] * 5, num_stages),
        lambda: by_time([1.0] * 5, num_stages),
    ):
        with pytest.raises(MplabError) as caught:
            attempt()
        assert str(caught.value) == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"times_s": [1, -1, 1]}, "times_s[1] is -1: give a number, 0 or more"),
        ({"times_s": [1, 1, math.nan]}, "times_s[2] is nan"),
        ({"times_s": [math.inf, 1, 1]}, "times_s[0] is inf"),
        ({"times_s": ["1", 1, 1]}, "times_s[0] is '1'"),
        ({"times_s": [True, 1, 1]}, "times_s[0] is True"),
        ({"speeds": [1]}, "speeds has 1 numbers: give 2"),
        ({"speeds": [1, 0]}, "speeds[1] is 0: give a number above 0"),
        ({"boundary_s": [1, 1, 1]}, "boundary_s has 3 numbers: give 2"),
        ({"boundary_s": [1, -1]}, "boundary_s[1] is -1"),
        ({"memory_bytes": [1, 1, 1]}, "give both"),
        ({"memory_limits_bytes": [1, 1]}, "give both"),
        ({"memory_bytes": [1, 1], "memory_limits_bytes": [1, 1]}, "memory_bytes has 2 numbers: give 3"),
        ({"memory_bytes": [[1] * 3], "memory_limits_bytes": [1, 1]}, "memory_bytes has 1 lists: give one list, or 2"),
        ({"memory_bytes": [[1] * 3, [1]], "memory_limits_bytes": [1, 1]}, "memory_bytes has 1 numbers: give 3"),
        ({"memory_bytes": [], "memory_limits_bytes": [1, 1]}, "memory_bytes has 0 numbers: give 3"),
        ({"memory_bytes": [1, 1, 1], "memory_limits_bytes": [1, 0]}, "memory_limits_bytes[1] is 0"),
    ],
)
def test_bad_numbers_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(MplabError) as caught:
        by_time(**{"times_s": [1, 1, 1], "num_stages": 2, **arguments})
    assert said in str(caught.value)


def test_no_layers_is_refused() -> None:
    for attempt in (lambda: by_time([], 1), lambda: by_parameters([], 1), lambda: by_depth(0, 1)):
        with pytest.raises(MplabError, match="1 stages of 0 layers"):
            attempt()


# --- costs ------------------------------------------------------------------------------------------------------------


def test_a_stage_costs_what_its_layers_do() -> None:
    layers = [
        LayerCost("a", 1, 2, 1.5, 0.5, 0.1, 10, 100, 1000),
        LayerCost("b", 3, 4, 0, 0, 0.2, 20, 200, 2000),
        LayerCost("c", 5, 6, 2, 4, 0.3, 30, 300, 3000),
    ]
    first, second = stage_costs(layers, (2,))
    assert astuple(first)[1:] == pytest.approx((4, 6, 3.5, 2.5, 0.3, 20, 300, 3000))
    assert first.name == "a to b"
    assert second == layers[2]
    assert stage_costs(layers, [])[0].output_bytes == 30
    assert stage_costs(layers, [1, 2]) == layers


def test_a_backward_whose_parts_are_unknown_is_halved() -> None:
    assert LayerCost("a", 1, 4).input_gradient_s == LayerCost("a", 1, 4).weight_gradient_s == 2
    assert LayerCost("frozen", 1, 4, input_gradient_s=4).weight_gradient_s == 0


def test_recomputation_adds_a_forward_and_holds_the_input() -> None:
    cost = LayerCost("a", 1, 4, 3, 1, output_bytes=8, activation_bytes=100).recomputed(16)
    assert (cost.forward_s, cost.backward_s, cost.input_gradient_s, cost.weight_gradient_s) == (1, 5, 4, 1)
    assert (cost.activation_bytes, cost.output_bytes) == (16, 8)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "1", None, True])
def test_bad_costs_are_refused(value: Any) -> None:
    with pytest.raises(MplabError, match=r"LayerCost head: backward_s is .*; give a number, 0 or more"):
        LayerCost("head", backward_s=value)


def test_stage_costs_checks_its_cuts() -> None:
    with pytest.raises(MplabError, match="cuts \\[2\\]: 2 is out of range"):
        stage_costs([LayerCost("a"), LayerCost("b")], (2,))
