"""Whether a plan fits a model and a number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from mplab.errors import MplabError
from mplab.models import Layer, layers
from mplab.parallel.pipeline import refuse_recomputation
from mplab.parallel.serial import LossFunction
from mplab.parallel.tensor import has_cut_logits
from mplab.parallel.tensor_plan import resolve
from mplab.parallel.tensor_plan import tensor_plan as known_plan
from mplab.plan.layout import Plan, refuse
from mplab.plan.partition import by_parameters, check_cuts
from mplab.plan.schedule import Schedule, build


def check_plan(
    model: nn.Module, num_ranks: int, plan: Plan, loss_fn: LossFunction, tensor_plan: Mapping[str, str] | None
) -> None:
    """Refuse a plan that this model or this number of ranks can't have.

    Raises:
        MplabError: all of its faults.
    """

    def layout() -> None:
        if plan.num_ranks != num_ranks:
            raise MplabError(
                f"{plan.dp} x {plan.pp} x {plan.tp} = {plan.num_ranks} ranks (dp x pp x tp), and there are "
                f"{num_ranks}: choose degrees whose product is {num_ranks}"
            )

    def stages() -> None:
        if plan.zero > 1:
            layers(model)
        if plan.pp > 1:
            stage_cuts(layers(model), plan)

    def schedule() -> None:
        plan_schedule(plan)

    def tensors() -> None:
        if plan.tp > 1:
            styles = known_plan(model) if tensor_plan is None else tensor_plan
            resolve(model, styles, plan.tp, plan.sequence_parallel)
        elif plan.sequence_parallel:
            raise MplabError("sequence_parallel with tp=1: there is nobody to share the sequence with; take tp of 2")

    def loss() -> None:
        if plan.tp > 1:
            has_cut_logits(model, known_plan(model) if tensor_plan is None else tensor_plan, loss_fn)

    def recomputation() -> None:
        if plan.recompute:
            refuse_recomputation(model)

    def faults() -> Iterator[str]:
        for check in (layout, stages, schedule, tensors, loss, recomputation):
            try:
                check()
            except MplabError as error:
                yield str(error)

    refuse(faults(), f"this plan ({plan}) does not fit")


def plan_schedule(plan: Plan) -> Schedule:
    """What the ranks of the pipeline axis do; one rank has one stage, and nothing to interleave."""
    return build("1f1b" if plan.pp == 1 else plan.schedule, plan.pp, plan.num_microbatches)


def stage_cuts(chain: Sequence[Layer], plan: Plan) -> tuple[int, ...]:
    """Where the plan cuts a chain."""
    if plan.cuts is None:
        sizes = [sum({p: p.numel() for _, p in layer.named_parameters()}.values()) for layer in chain]
        return by_parameters(sizes, plan.num_stages).cuts
    return check_cuts(plan.cuts, [layer.name for layer in chain], plan.num_stages)
