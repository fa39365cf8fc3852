"""What a step of a plan should take, and why.

It is the sum of

    compute    the mean over the ranks of what they compute: matrix products, and what launching a layer takes
    bubble     what the pipeline takes longer than that: ranks that wait for others, and unequal stages
    tensor     collectives inside the layers; nothing is computed meanwhile
    pipeline   what messages between stages add, and those of tied weights
    data       collectives for gradients and weights between replicas; in ZeRO 2 and 3 what another layer's computation,
               which goes on meanwhile, does not hide
    update     the optimizer's reading and writing of memory, and what launching it for each parameter takes; of up to 8
               ranks with stages, what other stages' computation, which goes on meanwhile, does not hide

Messages take what `Link` says for the collectives of `mplab.plan.traffic`, one after another, and each collective, and
each message between stages, takes the machine's `call_s` besides. Kernels besides matrix products are not in it; a
described machine's `flops_s` can allow for them.

Reference:
    Narayanan et al., "Efficient large-scale language model training on GPU clusters using Megatron-LM", SC 2021,
    sections 2 and 3 (what each degree costs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mplab.errors import MplabError
from mplab.plan.cost import Link
from mplab.plan.layer_cost import LayerCost
from mplab.plan.layout import Plan
from mplab.plan.machines import Machine
from mplab.plan.pipeline_time import closed_form_s, played_s
from mplab.plan.share import (
    cut_traffic,
    data_calls,
    data_traffic,
    memory_of,
    partial_gradients,
    pipeline_calls,
    pipeline_sent,
    tensor_bytes,
)
from mplab.plan.simulate import FREE
from mplab.plan.stages import (
    Array,
    Share,
    num_pieces,
    num_updated,
    of_stages,
    output_bytes,
    sharded_layers,
    share_of,
)
from mplab.plan.traffic import Traffic
from mplab.plan.transformer import Transformer, layer_loads
from mplab.plan.zero import Memory
from mplab.trace.units import columns, format_s

MOST_PLAYED = 8  # ranks up to which a schedule is played out


@dataclass(frozen=True)
class Prediction:
    """What a step of a plan should take, and why.

    Args:
        plan: which.
        compute_s: the mean of all ranks.
        bubble_s: that the pipeline takes longer.
        tensor_s: of messages on the tensor axis; and so on.
        pipeline_s: likewise.
        data_s: likewise, but for what is hidden.
        update_s: of the optimizer.
        tensor_bytes: that a rank sends on the tensor axis in a step, the most of any stage; and so on.
        pipeline_bytes: likewise.
        data_bytes: likewise.
        memory: of the rank that holds the most, at the moment when it does.
        fits: whether a rank has so much.
    """

    plan: Plan
    compute_s: float
    bubble_s: float
    tensor_s: float
    pipeline_s: float
    data_s: float
    update_s: float
    tensor_bytes: int
    pipeline_bytes: int
    data_bytes: int
    memory: Memory
    fits: bool

    @property
    def step_s(self) -> float:
        """All of it."""
        return self.compute_s + self.bubble_s + self.tensor_s + self.pipeline_s + self.data_s + self.update_s

    @property
    def memory_bytes(self) -> int:
        """Of the rank that holds the most."""
        return self.memory.total_bytes

    def __str__(self) -> str:
        return table([self])


def predict(plan: Plan, model: Transformer, batch: int, machine: Machine) -> Prediction:
    """What a step of this plan should take and send, and what its ranks must hold.

    Args:
        plan: how.
        model: what is trained.
        batch: samples of a step; where they don't divide, the largest micro-batch counts for all.
        machine: on what.

    Raises:
        MplabError: a plan that this model or batch can't have, with all of its faults; or one of another number of
            ranks than the machine has.
    """
    memory = memory_of(plan, model, batch)
    if plan.num_ranks != machine.ranks:
        raise MplabError(
            f"{plan}: {plan.num_ranks} ranks, and {machine.name} has {machine.ranks}: choose degrees whose product is "
            f"{machine.ranks}, or machine.with_ranks({plan.num_ranks})"
        )
    share = share_of(plan, model, batch)
    num_parts, crowd = plan.num_microbatches, machine.ranks_per_device
    tensor_link, pipeline_link = machine.link(plan.tp, 1), machine.link(plan.pp, plan.tp)
    mean, free_s, linked_s = _pipeline(share, plan.schedule, num_parts, plan.recompute, plan.dp, machine)
    compute_s, tensor_s = (num_parts * crowd * seconds for seconds in mean)
    partial = partial_gradients(share, plan)
    pipeline_bytes, pipeline_end = pipeline_sent(share, num_parts)
    data = data_traffic(share, plan.zero, plan.dp, num_parts)
    data_link = machine.link(plan.dp, plan.tp * plan.pp)
    data_s = _sharded_s(share, plan, machine, data_link) if plan.zero > 1 else _time_s(data, data_link)
    call_s, num_calls = crowd * machine.call_s, data_calls(share.stages, plan.zero, plan.dp, num_parts)
    return Prediction(
        plan,
        compute_s=compute_s,
        bubble_s=max(0.0, free_s - compute_s - tensor_s),
        tensor_s=tensor_s + _time_s(partial, tensor_link) + plan.sequence_parallel * call_s,
        pipeline_s=max(0.0, linked_s - free_s) + _time_s(pipeline_end, pipeline_link) + pipeline_calls(share) * call_s,
        data_s=data_s + num_calls * call_s,
        update_s=_update_s(share, plan, machine, linked_s),
        tensor_bytes=num_parts * tensor_bytes(share, plan.recompute) + partial.sent_bytes,
        pipeline_bytes=pipeline_bytes,
        data_bytes=data.sent_bytes,
        memory=memory,
        fits=memory.total_bytes <= machine.rank_memory_bytes,
    )


# --- times -----------------------------------------------------------------------------------------------------------


def _time_s(traffic: Traffic, link: Link) -> float:
    return link.time_s(traffic.num_sent, traffic.sent_bytes)


@lru_cache(maxsize=1 << 14)
def kind_times(share: Share, machine: Machine, recompute: bool = False) -> Array:
    """Of an embedding, a block and a head: what forward and backward compute, and what their messages take: (4, 3)."""
    link = machine.link(share.tp, 1)
    rows = []
    for load in layer_loads(share.model, share.size, share.tp, share.sequence_parallel):
        computed_s = load.flops / machine.flops_s + machine.turns * machine.launch_s
        sent_s = (_time_s(load.forward, link), _time_s(load.backward, link))
        called_s = (load.forward_calls * machine.call_s, load.backward_calls * machine.call_s)
        rows.append((computed_s / 3, 2 * computed_s / 3, sent_s[0] + called_s[0], sent_s[1] + called_s[1]))
    times = np.array(rows).T
    return times + np.stack([0 * times[0], times[0], 0 * times[2], times[2]]) if recompute else times


def _stage_times(share: Share, recompute: bool, machine: Machine) -> tuple[Array, Array, Array]:
    """Forward, backward, and its part that nobody waits for, of each stage: (stages of a rank, pp)."""
    times, stages = kind_times(share, machine, recompute), share.stages
    later = kind_times(share, machine)[1] / 2
    return of_stages(stages, times[0] + times[2]), of_stages(stages, times[1] + times[3]), of_stages(stages, later)


def stage_costs(share: Share, recompute: bool, machine: Machine, update_s: float = 0.0) -> list[LayerCost]:
    """Of each stage; each rank updates once. Gradients of weights that are put off are launched by themselves."""
    forward, backward, weight = _stage_times(share, recompute, machine)
    put_off = weight + of_stages(share.stages, [machine.turns * machine.launch_s / 3] * 3)
    parts = (forward, backward, backward - weight, put_off)
    times = zip(*(of.ravel().tolist() for of in parts), strict=True)
    updates = [update_s] * share.pp + [0.0] * (share.stages.num_stages - share.pp)
    return [
        LayerCost("", f, b, i, w, update_s=update, output_bytes=sent_bytes)
        for (f, b, i, w), sent_bytes, update in zip(times, (*output_bytes(share), 0), updates, strict=True)
    ]


def _update_s(share: Share, plan: Plan, machine: Machine, computed_s: float) -> float:
    """What the updates add to a step that takes so long without them."""
    num_bytes = num_updated(share, plan) * (3 * share.model.item_bytes + 2 * share.model.state_bytes)
    launches_s = machine.turns * machine.update_launch_s * num_pieces(share.stages, plan.zero, plan.dp)
    of_rank_s = num_bytes / machine.memory_bytes_s + launches_s
    if plan.pp == 1 or machine.ranks > MOST_PLAYED:
        return machine.ranks_per_device * of_rank_s
    order, m = plan.schedule, plan.num_microbatches
    return max(0.0, _updated_s(share, order, m, plan.recompute, plan.dp, machine, of_rank_s) - computed_s)


@lru_cache(maxsize=1 << 16)
def _updated_s(
    share: Share, schedule: str, num_microbatches: int, recompute: bool, dp: int, machine: Machine, update_s: float
) -> float:
    """A pipeline's step with the update of each rank, which begins while others still compute."""
    costs, num_devices = stage_costs(share, recompute, machine, update_s), machine.num_devices / (dp * share.tp)
    return played_s(schedule, num_microbatches, costs, share.pp, stage_link(share, machine), num_devices)


def stage_link(share: Share, machine: Machine) -> Link:
    """Between two stages, with what a message takes besides."""
    link = machine.link(share.pp, share.tp)
    return Link(link.latency_s + machine.ranks_per_device * machine.call_s, link.bandwidth_bytes_s)


@lru_cache(maxsize=1 << 16)
def _pipeline(
    share: Share, schedule: str, num_microbatches: int, recompute: bool, dp: int, machine: Machine
) -> tuple[tuple[float, float], float, float]:
    """A rank's mean computing and messages on the tensor axis for one micro-batch; the step without and with messages
    between stages.
    """
    times = kind_times(share, machine, recompute)
    computed, sent = of_stages(share.stages, times[0] + times[1]), of_stages(share.stages, times[2] + times[3])
    mean = float(computed.sum()) / share.pp, float(sent.sum()) / share.pp
    forward, backward, weight = _stage_times(share, recompute, machine)
    crowd = machine.ranks_per_device
    if share.pp == 1:
        step_s = num_microbatches * crowd * sum(mean)
        return mean, step_s, step_s
    link, outputs = stage_link(share, machine), output_bytes(share)
    if machine.ranks <= MOST_PLAYED:
        costs, num_devices = stage_costs(share, recompute, machine), machine.num_devices / (dp * share.tp)
        free_s, linked_s = (
            played_s(schedule, num_microbatches, costs, share.pp, used, num_devices) for used in (FREE, link)
        )
    else:
        ranks = forward.sum(0), backward.sum(0), weight.sum(0)
        free_s, linked_s = (
            crowd * closed_form_s(schedule, num_microbatches, *ranks, message_s)
            for message_s in (0.0, link.time_s(1, max(outputs)) / crowd)
        )
    return mean, free_s, linked_s


def _sharded_s(share: Share, plan: Plan, machine: Machine, link: Link) -> float:
    """What is not hidden of ZeRO 2's and 3's messages: while a layer computes, its neighbours' are under way.

    In stage 3 the next layer is gathered in the forward, the one before in the backward; in both stages the gradients
    of the one after are reduced in the backward.
    """
    layers, shared = sharded_layers(share.model, share.tp)

    def times_s(name: str) -> list[float]:
        lengths = [sum(layer) for layer in (*layers, shared)]
        return [_time_s(cut_traffic(name, plan.dp, n, share.model.item_bytes), link) for n in lengths]

    *gathers_s, shared_gather_s = times_s("all_gather")
    *reductions_s, shared_reduction_s = times_s("reduce_scatter")
    closing = cut_traffic("all_reduce", plan.dp, 2 + sum(map(len, layers)) + len(shared), 8)
    end_s = shared_gather_s + _time_s(closing, link)
    if plan.zero == 2:
        end_s += sum(gathers_s)
        gathers_s = [0.0] * len(gathers_s)
    kinds_s = machine.ranks_per_device * kind_times(share, machine)
    forward_s, backward_s = (
        [float(row[0]), *[float(row[1])] * share.model.num_layers, float(row[2])] for row in kinds_s[:2]
    )
    each_s = gathers_s[0] + reductions_s[0] + shared_reduction_s
    each_s += sum(max(0.0, g - f) for g, f in zip(gathers_s[1:], forward_s[:-1], strict=True))
    of_neighbours = zip([0.0, *gathers_s[:-1]], [*reductions_s[1:], 0.0], backward_s, strict=True)
    each_s += sum(max(0.0, before + after - b) for before, after, b in of_neighbours)
    return plan.num_microbatches * each_s + end_s


# --- as text ---------------------------------------------------------------------------------------------------------


def table(predictions: Sequence[Prediction]) -> str:
    """A line a plan: the step and its parts, what a rank sends on each axis, what it holds, and the plan."""
    titles = ("step", "compute", "bubble", "tensor", "pipeline", "data", "update", "tp sends", "pp sends", "dp sends")
    rows: list[tuple[str, ...]] = [(*titles, "memory", "plan")]
    for p in predictions:
        parts = (p.step_s, p.compute_s, p.bubble_s, p.tensor_s, p.pipeline_s, p.data_s, p.update_s)
        sizes = (p.tensor_bytes, p.pipeline_bytes, p.data_bytes, p.memory_bytes)
        said = [*(format_s(seconds) for seconds in parts), *(_format_bytes(size) for size in sizes)]
        rows.append((*said, f"{p.plan}{'' if p.fits else ' (does not fit)'}"))
    return columns(rows, "r" * len(titles) + "rl")


def _format_bytes(size: float) -> str:
    for unit, number in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= number:
            return f"{size / number:.{2 if size < 10 * number else 1 if size < 100 * number else 0}f} {unit}"
    return f"{size:.0f} B"
