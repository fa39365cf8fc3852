"""Which layers of a GPT a rank has under a plan, and what of them it has: outputs, parameters, pieces of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mplab.errors import MplabError
from mplab.plan.layout import Plan, refuse
from mplab.plan.partition import by_parameters, check_cuts, stage_bounds
from mplab.plan.traffic import chunk_lengths
from mplab.plan.transformer import Transformer, parameter_lengths

Array = NDArray[Any]


class Stages(NamedTuple):
    """How the layers are cut and shared out: stage s is on rank s % pp of the pipeline axis."""

    model: Transformer
    tp: int
    pp: int
    num_stages: int
    cuts: tuple[int, ...] | None


class Share(NamedTuple):
    """What of a plan decides on a rank's layers, and on one micro-batch of them."""

    stages: Stages
    size: int  # samples of a micro-batch
    sequence_parallel: bool

    @property
    def model(self) -> Transformer:
        """Whose layers."""
        return self.stages.model

    @property
    def tp(self) -> int:
        """Ranks that each layer is cut over."""
        return self.stages.tp

    @property
    def pp(self) -> int:
        """Ranks that the stages are shared out among."""
        return self.stages.pp


def share_of(plan: Plan, model: Transformer, batch: int) -> Share:
    """What of a plan decides on a rank's layers, if it can be.

    Args:
        plan: how.
        model: what is trained.
        batch: samples of a step; where they don't divide, the largest micro-batch counts for all.

    Raises:
        MplabError: a plan that this model or batch can't have: all of its faults.
    """
    refuse(_faults(plan, model, batch), f"this plan ({plan}) does not fit")
    size = -(-batch // (plan.dp * plan.num_microbatches))
    return Share(Stages(model, plan.tp, plan.pp, plan.num_stages, plan.cuts), size, plan.sequence_parallel)


def _faults(plan: Plan, model: Transformer, batch: int) -> Iterator[str]:
    num_layers = model.num_layers + 2
    if fault := plan.too_few(batch):
        yield fault
    for what, number in (("heads", model.num_heads), ("tokens in the vocabulary", model.vocab_size)):
        if number % plan.tp:
            yield f"tp={plan.tp} does not divide {number} {what}: each rank has as many"
    if plan.sequence_parallel and plan.tp == 1:
        yield "sequence_parallel with tp=1: there is nobody to share the sequence with; take tp of 2"
    elif plan.sequence_parallel and model.context_length % plan.tp:
        yield f"tp={plan.tp} does not divide a sequence of {model.context_length} tokens, as sequence parallelism does"
    if plan.num_stages > num_layers:
        yield f"{plan.num_stages} stages of {num_layers} layers: every stage has one layer or more; take a smaller pp"
    elif plan.cuts is not None:
        try:
            check_cuts(plan.cuts, layer_names(model), plan.num_stages)
        except MplabError as error:
            yield str(error)


def layer_names(model: Transformer) -> list[str]:
    """Of the chain."""
    return ["embedding", *(f"blocks.{i}" for i in range(model.num_layers)), "head"]


@lru_cache(maxsize=1024)
def bounds(stages: Stages) -> list[tuple[int, int]]:
    """(first layer, one after the last) of each stage."""
    cuts = stages.cuts
    if cuts is None:
        sizes = [sum(lengths) for lengths in parameter_lengths(stages.model, stages.tp)]
        cuts = by_parameters(sizes, stages.num_stages).cuts
    return stage_bounds(cuts, stages.model.num_layers + 2)


@lru_cache(maxsize=1024)
def _kinds(stages: Stages) -> Array:
    """How many embeddings, blocks and heads each stage has: (stages, 3)."""
    last = stages.model.num_layers + 1
    return np.array([(a == 0, min(b, last) - max(a, 1), b > last) for a, b in bounds(stages)], dtype=np.int64)


def of_stages(stages: Stages, of_kinds: Sequence[float]) -> Array:
    """What each stage has, from what an embedding, a block and a head have: (stages of a rank, pp)."""
    sums: Array = _kinds(stages) @ np.array(of_kinds)
    return sums.reshape(-1, stages.pp)


@lru_cache(maxsize=1 << 14)
def output_bytes(share: Share) -> tuple[int, ...]:
    """Of what each stage but the last hands on; sequence parallelism begins at the first block."""
    model = share.model
    whole = share.size * model.context_length * model.width * model.item_bytes
    part = whole // share.tp if share.sequence_parallel else whole
    return tuple(whole if end == 1 else part for _, end in bounds(share.stages)[:-1])


# --- parameters ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def rank_lengths(stages: Stages) -> list[tuple[int, ...]]:
    """Elements of every parameter of each rank; a matrix that is tied on one rank counts once."""
    layers = [*parameter_lengths(stages.model, stages.tp)]
    if stages.model.tied and stages.pp == 1:
        layers[-1] = layers[-1][:-1]
    return [
        tuple(n for start, end in bounds(stages)[r :: stages.pp] for layer in layers[start:end] for n in layer)
        for r in range(stages.pp)
    ]


@lru_cache(maxsize=1024)
def rank_elements(stages: Stages) -> Array:
    """Of each rank's parameters."""
    return np.array([sum(lengths) for lengths in rank_lengths(stages)])


def sharded_layers(model: Transformer, tp: int) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Parameters of each layer, and those that two layers have."""
    layers = [*parameter_lengths(model, tp)]
    if not model.tied:
        return layers, ()
    return [layers[0][1:], *layers[1:-1], layers[-1][:-1]], layers[0][:1]


def num_updated(share: Share, plan: Plan) -> int:
    """Weights that a rank updates."""
    num = int(rank_elements(share.stages).max())
    return -(-num // plan.dp) if plan.zero else num


@lru_cache(maxsize=4096)
def num_pieces(stages: Stages, zero: int, dp: int) -> int:
    """Tensors that a rank updates, the most of any: parameters, or the parts of them that lie in its chunks."""
    of_ranks = [[lengths] for lengths in rank_lengths(stages)]
    if not zero:
        return max(len(lengths) for (lengths,) in of_ranks)
    if zero > 1:
        layers, shared = sharded_layers(stages.model, stages.tp)
        of_ranks = [[*layers, shared]]
    return max(int(np.sum([_pieces(lengths, dp) for lengths in flats], axis=0).max()) for flats in of_ranks)


def _pieces(lengths: Sequence[int], dp: int) -> Array:
    """How many parameters have a part in each chunk of all of them, joined."""
    ends, borders = np.cumsum([0, *lengths]), np.cumsum([0, *chunk_lengths(sum(lengths), dp)])[:, None]
    nums: Array = (np.maximum(borders[:-1], ends[:-1]) < np.minimum(borders[1:], ends[1:])).sum(1)
    return nums
