"""The search behind `mplab.plan.partition`: the cuts that make the largest stage as small as can be."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from math import lcm


def best_cuts(
    weights: Sequence[Fraction],
    rates: Sequence[Fraction],
    edges: Sequence[Fraction] | None = None,
    memory: Sequence[Fraction] | None = None,
    limits: Sequence[Fraction] | None = None,
) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """The first layer of each stage but the first, and the load of each stage.

    What is minimised is the list of loads, the largest first, compared from the left; then the list of cuts. The best
    cuts of the first j layers into s stages end with a stage [i, j), after the best cuts of the first i: one more load
    does not change which of two lists comes first. That is O(p n²) steps, of which most are never taken.

    Args:
        weights: of each layer (n), 0 or more.
        rates: of each stage (p), above 0: it needs weight / rate.
        edges: n - 1 numbers, 0 or more: what a cut after layer i costs each of its two stages; None: all 0.
        memory: of each layer, 0 or more; None: all 0.
        limits: of each stage: the most memory of its layers; None: there are none.

    Returns:
        None where nothing fits in the limits.
    """
    num_layers, num_stages = len(weights), len(rates)
    zeros = [Fraction(0)] * (num_layers + 1)
    edges = zeros if edges is None else [Fraction(0), *edges, Fraction(0)]  # now edges[i] is of a cut before layer i
    held = list(accumulate(memory or zeros[1:], initial=Fraction(0)))
    # All loads as whole numbers of one small unit: as exact as fractions, and fast.
    unit_of_weights, unit_of_rates = (
        lcm(*(x.denominator for x in [*weights, *edges])),
        lcm(*(x.numerator for x in rates)),
    )
    unit = unit_of_weights * unit_of_rates
    sums = [int(x * unit_of_weights) for x in accumulate(weights, initial=Fraction(0))]
    slowness = [int(unit_of_rates / rate) for rate in rates]
    extra = [int(x * unit) for x in edges]

    bests: dict[int, tuple[list[int], tuple[int, ...]]] = {0: ([], ())}  # by j: loads, the largest first; cuts
    for stage in range(num_stages):
        nexts: dict[int, tuple[list[int], tuple[int, ...]]] = {}
        for end in range(stage + 1, num_layers - (num_stages - 1 - stage) + 1):
            for start in range(end - 1, stage - 1, -1):
                load = (sums[end] - sums[start]) * slowness[stage] + extra[end]
                is_too_slow = end in nexts and load > nexts[end][0][0]
                if is_too_slow or (limits is not None and held[end] - held[start] > limits[stage]):
                    break  # and so is any longer stage
                if start in bests:
                    loads, cuts = bests[start]
                    best = sorted([*loads, load + extra[start]], reverse=True), (*cuts, start) if stage else ()
                    nexts[end] = min(best, nexts.get(end, best))
        bests = nexts
    if num_layers not in bests:
        return None
    cuts = bests[num_layers][1]
    stages = zip((0, *cuts), (*cuts, num_layers), slowness, strict=True)
    return cuts, tuple(((sums[b] - sums[a]) * slow + extra[a] + extra[b]) / unit for a, b, slow in stages)
