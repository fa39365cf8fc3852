"""Why a step takes as long as it does: what was measured, as the sum of what a prediction can name and of a rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from math import fsum

from mplab.plan.cost import Link
from mplab.plan.layer_cost import LayerCost
from mplab.plan.schedule import Schedule
from mplab.plan.simulate import simulate
from mplab.trace.compare import Comparison
from mplab.trace.timeline import Timeline


def explain(
    schedule: Schedule,
    costs: Sequence[LayerCost],
    measured: Timeline,
    link: Link | None = None,
    cores: int | None = None,
    launch_s: float = 0.0,
) -> Comparison:
    """Predict a step, and split the measured one in parts that add up.

    The step is simulated again and again, each time with one more of the things that cost time, and each part is what
    that adds: "ideal" has equal stages, free messages, a core a rank and nothing to launch; then "imbalance" (the
    stages as they are), "transfer" (the link), "launch", "shared cores". What a part adds depends on what is there
    already, so the order is a choice; the sum is not. "unexplained" is the rest of the measured time.

    Args:
        schedule: what ran.
        costs: of each stage, on one micro-batch.
        measured: the step; time 0 is its start.
        link: between any two ranks; None: messages are free.
        cores: that the ranks share; None: one for each.
        launch_s: seconds of Python and dispatch before every action.

    Raises:
        MplabError: not one cost a stage, or a step of another number of ranks.
    """
    levels = (
        ("ideal", simulate(schedule, _equal(costs))),
        ("imbalance", simulate(schedule, costs)),
        ("transfer", simulate(schedule, costs, link)),
        ("launch", simulate(schedule, costs, link, launch_s=launch_s)),
        ("shared cores", simulate(schedule, costs, link, cores, launch_s, title=schedule.name)),
    )
    parts: list[tuple[str, float]] = []
    for name, timeline in levels:  # each minus the sum so far: then the sum of all is the last one
        parts.append((name, timeline.makespan_s - fsum(seconds for _, seconds in parts)))
    return Comparison(levels[-1][1], measured, parts)


def _equal(costs: Sequence[LayerCost]) -> list[LayerCost]:
    """As many stages, each with the mean of all times."""
    seconds = [field.name for field in fields(LayerCost) if field.name.endswith("_s")]
    mean = LayerCost("equal", **{name: fsum(getattr(c, name) for c in costs) / len(costs) for name in seconds})
    return [mean] * len(costs)
