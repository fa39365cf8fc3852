"""The search behind `mplab.plan.partition`: the cuts that make the largest stage as small as can be."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from math import lcm


def best_cuts(
    weights: Sequence[Sequence[Fraction]],
    edges: Sequence[Fraction] | None = None,
    shares: Sequence[Sequence[Fraction]] | None = None,
) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """The first layer of each stage but the first, and the load of each stage.

    What is minimised is the list of loads, the largest first, compared from the left; then the list of cuts. The best
    cuts of the first j layers into s stages end with a stage [i, j), after the best cuts of the first i: one more load
    does not change which of two lists comes first. That is O(p n²) steps, of which most are never taken.

    Args:
        weights: p lists of n, 0 or more: what a layer adds to the load of that stage.
        edges: n - 1 numbers, 0 or more: what a cut after layer i adds to each of its two stages; None: nothing.
        shares: p lists of n, 0 or more: what a layer takes of the memory of that stage, which is 1; None: nothing.

    Returns:
        None where nothing fits in the memory.
    """
    num_stages, num_layers = len(weights), len(weights[0])
    edges = [Fraction(0), *(edges or [Fraction(0)] * (num_layers - 1)), Fraction(0)]  # edges[i]: a cut before layer i
    # All loads as whole numbers of one small unit: as exact as fractions, and fast.
    unit = lcm(*(x.denominator for row in [*weights, edges] for x in row))
    sums = [[0, *accumulate(int(x * unit) for x in row)] for row in weights]
    extra = [int(x * unit) for x in edges]
    held = None if shares is None else [list(accumulate(row, initial=Fraction(0))) for row in shares]

    bests: dict[int, tuple[list[int], tuple[int, ...]]] = {0: ([], ())}  # by j: loads, the largest first; cuts
    for stage in range(num_stages):
        nexts: dict[int, tuple[list[int], tuple[int, ...]]] = {}
        for end in range(stage + 1, num_layers - (num_stages - 1 - stage) + 1):
            for start in range(end - 1, stage - 1, -1):
                load = sums[stage][end] - sums[stage][start] + extra[end]
                is_too_slow = end in nexts and load > nexts[end][0][0]
                if is_too_slow or (held is not None and held[stage][end] - held[stage][start] > 1):
                    break  # and so is any longer stage
                if start in bests:
                    loads, cuts = bests[start]
                    best = sorted([*loads, load + extra[start]], reverse=True), (*cuts, start) if stage else ()
                    nexts[end] = min(best, nexts.get(end, best))
        bests = nexts
    if num_layers not in bests:
        return None
    cuts = bests[num_layers][1]
    stages = zip((0, *cuts), (*cuts, num_layers), sums, strict=True)
    return cuts, tuple((row[end] - row[start] + extra[start] + extra[end]) / unit for start, end, row in stages)
