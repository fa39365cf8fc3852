"""What a rank sends of its layers of a GPT on each axis under a plan, and what it must hold.

Where the ranks of an axis differ, as stages do, figures are those of the rank with the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from mplab.plan.data import data_parallel_traffic, sharded_traffic, total_traffic
from mplab.plan.layout import Plan
from mplab.plan.pipeline_time import most_held, most_recomputed
from mplab.plan.stages import (
    Array,
    Share,
    Stages,
    of_stages,
    output_bytes,
    rank_elements,
    rank_lengths,
    sharded_layers,
    share_of,
)
from mplab.plan.traffic import Traffic, chunk_lengths, direct_traffic
from mplab.plan.transformer import Transformer, layer_loads
from mplab.plan.zero import Memory, peak, zero_moments

BUCKET_BYTES = 25 << 20  # `DataParallel`'s
_NONE = Traffic(0, 0, 0, 0)
_COUNT_BYTES = 8  # of a float64


# --- bytes ------------------------------------------------------------------------------------------------------------


def cut_traffic(name: str, num_ranks: int, length: int, item_bytes: int) -> Traffic:
    """What the first rank has in a collective whose blocks are the chunks of `length` elements."""
    return direct_traffic(name, 0, [n * item_bytes for n in chunk_lengths(length, num_ranks)])


@lru_cache(maxsize=1 << 14)
def tensor_bytes(share: Share, recompute: bool) -> int:
    """On the tensor axis, for one micro-batch: of the rank that sends the most."""
    loads = layer_loads(share.model, share.size, share.tp, share.sequence_parallel)
    sent = [(1 + recompute) * load.forward.sent_bytes + load.backward.sent_bytes for load in loads]
    return int(of_stages(share.stages, sent).sum(0).max())


def partial_gradients(share: Share, plan: Plan) -> Traffic:
    """With sequence parallelism: the gradients of what is not cut, once a step; with ZeRO 2 and 3 a replica's part."""
    if not plan.sequence_parallel:
        return _NONE
    length = _most_uncut(share.stages, plan.dp if plan.zero > 1 else 1)
    return cut_traffic("all_reduce", plan.tp, length, share.model.item_bytes)


@lru_cache(maxsize=4096)
def _most_uncut(stages: Stages, num_chunks: int) -> int:
    """Elements of norms, biases of rows and positions, which are whole on each rank of a tensor axis of 2 or more: the
    most that a rank's chunks of its layers have.
    """
    layers, wholes = (sharded_layers(stages.model, tp)[0] for tp in (stages.tp, 1))
    of_kinds = []
    for lengths, whole_lengths in ((layers[i], wholes[i]) for i in (0, 1, -1)):
        ends = np.cumsum([0, *lengths])
        borders = np.cumsum([0, *chunk_lengths(sum(lengths), num_chunks)])[:, None]
        shared = np.minimum(borders[1:], ends[1:]) - np.maximum(borders[:-1], ends[:-1])
        of_kinds.append(shared.clip(0) @ np.equal(lengths, whole_lengths))
    return max(int(of_stages(stages, of_chunk).sum(0).max()) for of_chunk in zip(*of_kinds, strict=True))


def pipeline_sent(share: Share, num_microbatches: int) -> tuple[int, Traffic]:
    """On the pipeline axis, of the rank that sends the most; and what of it comes at the end: the gradients of tied
    weights between first and last stage, and the loss.
    """
    p, last = share.pp, share.stages.num_stages - 1
    if p == 1:
        return 0, _NONE
    loss = direct_traffic("broadcast", p - 1, [_COUNT_BYTES] * p, p - 1)
    tied = _NONE
    if share.model.tied:
        tied = cut_traffic(
            "all_reduce", 2, share.model.vocab_size // share.tp * share.model.width, share.model.item_bytes
        )
    ends = [tied, *[_NONE] * (p - 2), total_traffic([tied, loss])]
    outputs = (0, *output_bytes(share), 0)  # outputs[s]: before stage s
    most = max(
        num_microbatches * sum(outputs[s] + outputs[s + 1] for s in range(r, last + 1, p)) + end.sent_bytes
        for r, end in enumerate(ends)
    )
    return most, ends[-1]


def pipeline_calls(share: Share) -> int:
    """Collectives on the pipeline axis in a step: of tied weights' gradients, and of the loss."""
    return 0 if share.pp == 1 else 1 + share.model.tied


def data_traffic(share: Share, zero: int, dp: int, num_microbatches: int) -> Traffic:
    """On the data axis, in a step: of the rank whose stages have the most parameters."""
    once, more = _replicas_traffic(share.stages, zero, dp)
    return Traffic(*(a + (num_microbatches - 1) * b for a, b in zip(once, more, strict=True)))


@lru_cache(maxsize=4096)
def _replicas_traffic(stages: Stages, zero: int, dp: int) -> tuple[Traffic, Traffic]:
    """With one micro-batch, and what each further one adds."""
    model, lengths = stages.model, max(rank_lengths(stages), key=sum)
    if zero == 0:
        return data_parallel_traffic(dp, 0, buckets(lengths, model.item_bytes), model.item_bytes), _NONE
    if zero == 1:
        return sharded_traffic(1, dp, 0, [lengths], model.item_bytes), _NONE
    layers, shared = sharded_layers(model, stages.tp)
    once, twice = (sharded_traffic(zero, dp, 0, layers, model.item_bytes, m, shared) for m in (1, 2))
    return once, Traffic(*(b - a for a, b in zip(once, twice, strict=True)))


@lru_cache(maxsize=4096)
def data_calls(stages: Stages, zero: int, dp: int, num_microbatches: int) -> int:
    """Collectives on the data axis in a step; the last of them closes it."""
    m = num_microbatches
    if dp == 1:
        return 0
    if zero < 2:
        return 3 if zero else 1 + len(buckets(max(rank_lengths(stages), key=sum), stages.model.item_bytes))
    num_layers, shared = stages.model.num_layers + 2, int(stages.model.tied)
    num_gathered = num_layers if zero == 2 else m * (2 * num_layers - 1)  # the last layer's stays for the backward
    return num_gathered + shared + m * (num_layers + shared) + 1


def buckets(lengths: Sequence[int], item_bytes: int, bucket_bytes: int = BUCKET_BYTES) -> list[list[int]]:
    """Elements of the parameters of each bucket, as `DataParallel` fills them: the last parameters first.

    Args:
        lengths: elements of every parameter, in the model's order.
        item_bytes: of one element.
        bucket_bytes: a bucket has no more, unless it is of one parameter.
    """
    filled: list[list[int]] = []
    for length in reversed(lengths):
        if not filled or (sum(filled[-1]) + length) * item_bytes > bucket_bytes:
            filled.append([])
        filled[-1].append(length)
    return filled


# --- memory ----------------------------------------------------------------------------------------------------------


def memory_of(plan: Plan, model: Transformer, batch: int) -> Memory:
    """What the rank that needs the most must hold, at the moment when it does.

    Weights, gradients, the optimizer's state, and activations of the micro-batches in flight. With ZeRO 1 gradients are
    there twice while they are joined; with 2 and 3 it is the peak of `zero_moments`.

    Args:
        plan: how.
        model: what is trained.
        batch: samples of a step.

    Raises:
        MplabError: a plan that this model or batch can't have: all of its faults.
    """
    share, dp = share_of(plan, model, batch), plan.dp
    if plan.zero > 1:
        return _sharded_memory(share, plan.zero, dp, plan.num_microbatches > 1)
    elements = rank_elements(share.stages)
    activations = _activations(share, plan.schedule, plan.num_microbatches, plan.recompute)
    weights = elements * model.item_bytes
    is_joined = plan.zero == 1 and dp > 1
    state = (-(-elements // dp) if plan.zero else elements) * model.state_bytes
    computing = 2 * weights + state + activations
    joining = 3 * weights + state if is_joined else computing
    worst = int(np.maximum(computing, joining).argmax())
    w, s, a = int(weights[worst]), int(state[worst]), int(activations[worst])
    return Memory(w, 2 * w, s, 0) if is_joined and w > a else Memory(w, w, s, a)


@lru_cache(maxsize=1 << 14)
def _activations(share: Share, schedule: str, num_microbatches: int, recompute: bool) -> Array:
    """The most that each rank holds of them."""
    loads = layer_loads(share.model, share.size, share.tp, share.sequence_parallel)
    whole = of_stages(share.stages, [load.kept_bytes for load in loads])
    held = _held(schedule, share.pp, num_microbatches)
    if not recompute:
        activations: Array = (held * whole).sum(0)
        return activations
    # the first stage's input is a part of the batch, which is there anyway
    inputs = np.array([0, *output_bytes(share)]).reshape(-1, share.pp)
    num_whole = [most_recomputed(schedule, r, num_microbatches) for r in range(share.pp)]
    activations = (held * inputs).sum(0) + num_whole * (whole - inputs).max(0)
    return activations


@lru_cache(maxsize=4096)
def _held(schedule: str, num_ranks: int, num_microbatches: int) -> Array:
    """Micro-batches that each stage holds: (stages of a rank, ranks)."""
    return np.array([most_held(schedule, num_ranks, r, num_microbatches) for r in range(num_ranks)]).T


@lru_cache(maxsize=4096)
def _sharded_memory(share: Share, zero: int, dp: int, is_accumulating: bool) -> Memory:
    model = share.model
    layers, shared = sharded_layers(model, share.tp)
    embedding, block, head = layer_loads(model, share.size, share.tp, share.sequence_parallel)
    kept = [embedding.kept_bytes, *[block.kept_bytes] * model.num_layers, head.kept_bytes]
    sizes = (model.item_bytes, model.state_bytes, 0, shared)
    memory = peak(zero_moments(layers, zero, dp, 0, kept, *sizes)).memory
    if not is_accumulating:
        return memory
    # the gradients of the micro-batches before
    chunks = sum(chunk_lengths(sum(layer), dp)[0] for layer in (*layers, shared)) * model.item_bytes
    return replace(memory, gradients_bytes=memory.gradients_bytes + chunks)
