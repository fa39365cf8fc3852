"""A plan in words: what a step of it should take and hold, and what it took when it really ran."""

from __future__ import annotations

from statistics import median

from mplab.plan.machines import Machine
from mplab.plan.predict import Prediction
from mplab.plan.stages import Stages, bounds, layer_names, share_of
from mplab.plan.transformer import Transformer
from mplab.show.plan_controls import MOST_HANDLES
from mplab.show.plan_figure import MEMORY_PARTS, PARTS
from mplab.show.plan_run import PlanRun
from mplab.trace.units import format_s
from mplab.world.probe import format_rate

_NOTHING_S = 1e-10  # what rounding leaves of a part that is not there


def prediction_words(prediction: Prediction, model: Transformer, batch: int, machine: Machine, name: str) -> str:
    """The step and its parts, what a rank holds and sends, and where the model is cut.

    Args:
        prediction: of a plan.
        model: as it was predicted for.
        batch: samples of a step, likewise.
        machine: likewise.
        name: of the model.
    """
    plan, memory = prediction.plan, prediction.memory
    size = share_of(plan, model, batch).size
    parts = [f"{name} {format_s(s)}" for name in PARTS if (s := getattr(prediction, f"{name}_s")) > _NOTHING_S]
    held = [f"{name} {_bytes(getattr(memory, f'{name}_bytes'))}" for name in MEMORY_PARTS]
    sent = [
        f"{_bytes(size_bytes)} on the {name} axis"
        for name in ("tensor", "pipeline", "data")
        if (size_bytes := getattr(prediction, f"{name}_bytes"))
    ]
    fits = "It fits." if prediction.fits else "It does not fit."
    lines = [
        f"{plan}. {name}, {model.num_parameters:,} parameters, {batch:,} samples a step, {size} a micro-batch, on "
        f"{machine.name}.",
        f"Predicted: {format_s(prediction.step_s)} a step: {', '.join(parts)}.",
        f"The rank that holds the most needs {_bytes(memory.total_bytes)} ({', '.join(held)}); it has "
        f"{_bytes(machine.rank_memory_bytes)}. {fits}",
        f"In a step a rank sends up to {' and '.join(sent)}." if sent else "Nothing is sent.",
    ]
    if 1 < plan.num_stages <= MOST_HANDLES + 1:
        names = layer_names(model)
        ends = bounds(Stages(model, plan.tp, plan.pp, plan.num_stages, plan.cuts))
        lines.append(f"Stages: {', '.join(_from_to(names[start:end]) for start, end in ends)}.")
    return "\n".join(lines)


def run_words(prediction: Prediction, run: PlanRun) -> str:
    """What really ran beside what was predicted, and whether it trained.

    Args:
        prediction: of the plan.
        run: of the same plan.
    """
    middle_s, parts = median(run.times_s), run.parts
    away_s = prediction.step_s - prediction.compute_s - prediction.update_s
    return "\n".join(
        [
            f"{len(run.losses)} steps really ran, the first to warm up. Median step: {format_s(middle_s)} measured "
            f"(from {format_s(min(run.times_s))} to {format_s(max(run.times_s))}), "
            f"{format_s(prediction.step_s)} predicted: {middle_s / prediction.step_s:.3g} times as long.",
            f"Computing {format_s(parts.compute_s)} measured, {format_s(prediction.compute_s)} predicted; messages "
            f"and waiting {format_s(parts.away_s)}, {format_s(away_s)} predicted; update "
            f"{format_s(parts.update_s)}, {format_s(prediction.update_s)} predicted; means of the ranks.",
            f"The loss went from {run.losses[0]:.4f} to {run.losses[-1]:.4f}, as on one rank alone: the losses "
            f"differ by {run.difference:.2g} at most.",
        ]
    )


def _from_to(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _bytes(size: float) -> str:
    return format_rate(size, "B")
