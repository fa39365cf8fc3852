"""How long a pipeline's step takes: the schedule itself played out, or in closed form where there are many ranks.

p ranks; for rank r and one micro-batch f its forwards, b its backwards (i and w the two parts), t = f + b; c a message;
m micro-batches. The closed forms are exact for equal ranks and free messages (for "interleaved" where p divides m, for
"zero_bubble" where w is at most f + i); for "interleaved" also with messages shorter than a stage, and for "naive" and
"gpipe" whatever the ranks and messages:

    naive         m (sum t + 2(p - 1) c)
    gpipe         sum t + 2(p - 1) c + (m - 1)(max(f, c) + max(b, c))
    1f1b          sum t + 2(p - 1) c + (m - 1) max(t, 2c, round trips)
    interleaved   (sum t + max t)/2 + 2(2p - 1) c + (m - 1) max t
    zero_bubble   sum (f + i) + w + 2(p - 1) c + (k - 1) max(f + i, b) + (m - k) max t,   k = min(m, p)

A round trip of rank r is from the forward of a micro-batch to its backward; 1F1B has p - r of them under way at once.

Reference:
    Huang et al., "GPipe", NeurIPS 2019, section 2.3; Narayanan et al., "Efficient large-scale language model training
    on GPU clusters using Megatron-LM", SC 2021, section 2.2; Qi et al., "Zero bubble pipeline parallelism", ICLR 2024,
    section 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mplab.plan.cost import Link
from mplab.plan.layer_cost import LayerCost
from mplab.plan.schedule import Schedule, build
from mplab.plan.simulate import simulate


def played_s(
    order: str, num_microbatches: int, costs: Sequence[LayerCost], num_ranks: int, link: Link, num_devices: float
) -> float:
    """The step of the schedule as `simulate` plays it; of many micro-batches some, since the rest are alike.

    Args:
        order: the schedule's name.
        num_microbatches: m.
        costs: of each stage, on one micro-batch.
        num_ranks: p.
        link: between neighbours.
        num_devices: that the p ranks share; below 1 they share one with others, which compute at the same time.
    """
    slow = max(1.0, 1 / num_devices)
    scaled = [
        LayerCost(
            cost.name,
            cost.forward_s * slow,
            cost.backward_s * slow,
            cost.input_gradient_s * slow,
            cost.weight_gradient_s * slow,
            update_s=cost.update_s * slow,
            output_bytes=cost.output_bytes,
        )
        for cost in costs
    ]
    cores = max(1, math.floor(num_devices))

    def play(m: int) -> float:
        return simulate(_schedule(order, num_ranks, m), scaled, link, cores).makespan_s

    few = 3 * num_ranks + num_microbatches % num_ranks
    if num_microbatches <= few + num_ranks:
        return play(num_microbatches)
    first_s = play(few)
    return first_s + (play(few + num_ranks) - first_s) * (num_microbatches - few) / num_ranks


@lru_cache(maxsize=1024)
def _schedule(order: str, num_ranks: int, num_microbatches: int) -> Schedule:
    return build(order, num_ranks, num_microbatches)


def closed_form_s(
    order: str,
    num_microbatches: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    weight_gradient_s: Sequence[float],
    message_s: float,
) -> float:
    """The step by the formulas above.

    Args:
        order: the schedule's name.
        num_microbatches: m.
        forward_s: of each rank, all of its stages together.
        backward_s: of each rank.
        weight_gradient_s: the part of it that nobody waits for.
        message_s: of one message, an output or its gradient.
    """
    f, b, w = (np.asarray(x, float) for x in (forward_s, backward_s, weight_gradient_s))
    p, m, c, t = len(f), num_microbatches, message_s, f + b
    fill_s = float(t.sum()) + 2 * (p - 1) * c
    if p == 1:
        return m * fill_s
    slowest_s = float(t.max())
    match order:
        case "naive":
            return m * fill_s
        case "gpipe":
            return fill_s + (m - 1) * (max(float(f.max()), c) + max(float(b.max()), c))
        case "interleaved":
            return (float(t.sum()) + slowest_s) / 2 + 2 * (2 * p - 1) * c + (m - 1) * slowest_s
        case "zero_bubble":
            k, chain = min(m, p), t - w
            first_s = float(chain.sum()) + float(w[0]) + 2 * (p - 1) * c
            return first_s + (k - 1) * max(float(chain.max()), float(b[0])) + (m - k) * slowest_s
    after = np.arange(p - 1, -1, -1)  # ranks after each
    trips_s = t[::-1].cumsum()[::-1] + 2 * c * after
    return fill_s + (m - 1) * max(slowest_s, 2 * c, float((trips_s / (after + 1)).max()))


def most_held(order: str, num_ranks: int, rank: int, num_microbatches: int) -> list[int]:
    """Of how many micro-batches each stage of a rank holds activations at the peak.

    Args:
        order: the schedule's name.
        num_ranks: p.
        rank: whose stages.
        num_microbatches: m.
    """
    p, m = num_ranks, num_microbatches
    if order == "interleaved" and p > 1:  # in groups of p through both stages: so many forwards before a backward
        num_forwards = min(2 * (p - 1 - rank) + p + 1, 2 * m)
        of_second = sum(k // p % 2 for k in range(num_forwards))
        return [num_forwards - of_second, of_second]
    return [{"naive": 1, "gpipe": m, "zero_bubble": min(p, m)}.get(order, min(p - rank, m))]


def most_recomputed(order: str, rank: int, num_microbatches: int) -> int:
    """Of how many micro-batches a rank that recomputes holds more than the input: weight gradients come late.

    Args:
        order: the schedule's name.
        rank: which.
        num_microbatches: m.
    """
    return min(rank + 1, num_microbatches) if order == "zero_bubble" else 1
