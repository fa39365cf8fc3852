"""Memory of a rank under data parallelism and under ZeRO's stages: between two steps, and at every moment of one.

    stage  weights  gradients  optimizer's state
    0      whole    whole      whole              data parallelism: every rank has everything
    1      whole    whole      1/n                gradients whole until the reduction after backward
    2      whole    1/n        1/n                and a layer's gradient whole until it is reduced
    3      1/n      1/n        1/n                and a layer's weights whole while it is in use, or about to be

A layer's parameters are joined and cut as `torch.tensor_split` cuts them, so that the counts are exact. What a kernel
takes for itself, gradients of activations, messages, the batch, and an optimizer's counters (4 bytes a tensor) are not
in them.

Reference:
    Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", SC 2020, sections 3 and
    5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from mplab.errors import MplabError
from mplab.plan.traffic import chunk_lengths


@dataclass(frozen=True)
class Memory:
    """What one rank holds, in bytes.

    Args:
        parameters_bytes: weights, the gathered ones included.
        gradients_bytes: of the weights, those on their way included.
        optimizer_bytes: its state, and what it takes while it updates.
        activations_bytes: kept from the forward for the backward.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes


class Moment(NamedTuple):
    """A point of a step: "forward 0", "backward 3", "join 3", "reduce 3", "update", "rest"; layers are counted from 0.

    While gradients are joined, or reduced, they are there twice: what goes in, and what comes out.
    """

    name: str
    memory: Memory


def zero_memory(
    layers: Sequence[Sequence[int]],
    stage: int,
    num_ranks: int,
    rank: int = 0,
    item_bytes: int = 4,
    state_bytes: int = 8,
    shared: Sequence[int] = (),
) -> Memory:
    """What a rank holds between two steps, with the last one's gradients: in stages 1 to 3 its chunk of them.

    Args:
        layers: for each layer, the elements of every parameter that is its own, all trained.
        stage: 0 to 3.
        num_ranks: n.
        rank: whose memory.
        item_bytes: of one element of weights and gradients.
        state_bytes: the optimizer's, for each element: AdamW keeps 2 float32, SGD with momentum 1, SGD 0.
        shared: elements of every parameter that several layers have.

    Raises:
        MplabError: no such stage or rank, or a number below 0.
    """
    _check(layers, stage, num_ranks, rank, (item_bytes, state_bytes, *shared))
    lengths = [sum(layer) for layer in (*layers, shared)]
    whole, mine = sum(lengths), sum(chunk_lengths(length, num_ranks)[rank] for length in lengths)
    weights, gradients, state = (mine if stage >= first else whole for first in (3, 1, 1))
    return Memory(weights * item_bytes, gradients * item_bytes, state * state_bytes)


def zero_moments(
    layers: Sequence[Sequence[int]],
    stage: int,
    num_ranks: int,
    rank: int = 0,
    activation_bytes: Sequence[int] | None = None,
    item_bytes: int = 4,
    state_bytes: int = 8,
    update_bytes: int = 8,
    shared: Sequence[int] = (),
) -> list[Moment]:
    """What a rank holds at every moment of a step, in order; the last one is that of `zero_memory`.

    Stage 3 gathers the layer after the one that computes: two are there at once, in the backward too.

    Args:
        layers: for each layer, the elements of every parameter that is its own, all trained.
        stage: 0 to 3.
        num_ranks: n.
        rank: whose memory.
        activation_bytes: what each layer keeps from its forward for its backward; None: nothing.
        item_bytes: of one element of weights and gradients.
        state_bytes: the optimizer's, for each element.
        update_bytes: what the optimizer takes besides while it updates a tensor, for each of its elements: AdamW 2
            float32, SGD 0. A `foreach` one, as on CUDA, takes it for all tensors at once, which is not in it.
        shared: elements of every parameter that several layers have: stage 3 gathers them for all of the step.

    Raises:
        MplabError: no such stage or rank, a number below 0, or not one of `activation_bytes` a layer.
    """
    rest = zero_memory(layers, stage, num_ranks, rank, item_bytes, state_bytes, shared)
    kept = [0] * len(layers) if activation_bytes is None else list(activation_bytes)
    _check(layers, stage, num_ranks, rank, (update_bytes, *kept))
    if len(kept) != len(layers):
        raise MplabError(f"{len(kept)} activation_bytes for {len(layers)} layers: give one a layer")
    units: list[_Unit] = []
    for index, (layer, of_layer) in enumerate(zip(layers, kept, strict=True)):
        unit = _unit(str(index), layer, num_ranks, rank, item_bytes, of_layer)
        if units and not (layer and units[-1].whole_bytes):  # nothing is gathered or reduced for one of the two
            before = units.pop()
            unit = (unit if layer else before)._replace(activation_bytes=before.activation_bytes + of_layer)
        units.append(unit)
    step = _Step(stage, rest, units, _unit("shared", shared, num_ranks, rank, item_bytes))
    step.forward()
    step.backward()
    in_order = [*layers[::-1], shared] if stage else [shared, *layers]
    of_update = _update_lengths(in_order, *((num_ranks, rank) if stage else (1, 0)))
    # torch's loop over the tensors lets go of what it made last of one only when it has come to the next
    scratch = max((2 * now + before for before, now in pairwise([0, *of_update])), default=0) * update_bytes // 2
    update = replace(rest, optimizer_bytes=rest.optimizer_bytes + scratch)
    return [*step.moments, Moment("update", update), Moment("rest", rest)]


def peak(moments: Sequence[Moment]) -> Moment:
    """The first of the moments at which the most is held."""
    return max(moments, key=lambda moment: moment.memory.total_bytes)


class _Unit(NamedTuple):
    """A layer, and those after it that have no parameters."""

    name: str
    whole_bytes: int
    chunk_bytes: int
    is_joined: bool  # of several parameters, whose gradients are copied into one tensor
    activation_bytes: int


class _Step:
    """Walks over the layers, forward and back, and writes down what is there."""

    def __init__(self, stage: int, rest: Memory, units: Sequence[_Unit], shared: _Unit) -> None:
        self.moments: list[Moment] = []
        self._stage, self._units, self._shared = stage, units, shared
        self._weights, self._gradients, self._activations = rest.parameters_bytes, 0, 0
        self._state = rest.optimizer_bytes

    def forward(self) -> None:
        units = self._units
        if self._stage == 3:
            self._weights += self._shared.whole_bytes + sum(unit.whole_bytes for unit in units[:1])
        for unit, following in zip(units, [*units[1:], None], strict=True):
            self._gather(following)
            self._activations += unit.activation_bytes
            self._write_down("forward", unit)
            if following is not None:
                self._free(unit)

    def backward(self) -> None:
        units, is_reduced_at_once = self._units[::-1], self._stage >= 2
        self._gradients += self._shared.whole_bytes
        on_their_way: list[_Unit] = []
        self._gather(units[1] if len(units) > 1 else None)
        for place, unit in enumerate(units):
            self._gradients += unit.whole_bytes
            self._write_down("backward", unit)
            self._activations -= unit.activation_bytes
            if is_reduced_at_once:
                self._reduce(on_their_way)
                self._free(unit)
                self._join(unit)
                self._gather(units[place + 2] if place + 2 < len(units) else None)
                on_their_way = [unit]
        if self._stage:
            of_the_end = [self._shared] if is_reduced_at_once else [*units, self._shared]
            for unit in of_the_end:
                self._join(unit)
            self._reduce([*on_their_way, *of_the_end])

    def _gather(self, unit: _Unit | None) -> None:
        if self._stage == 3 and unit is not None:
            self._weights += unit.whole_bytes

    def _free(self, unit: _Unit) -> None:
        if self._stage == 3:
            self._weights -= unit.whole_bytes

    def _join(self, unit: _Unit) -> None:
        if unit.is_joined:
            self._write_down("join", unit, unit.whole_bytes)

    def _reduce(self, units: Sequence[_Unit]) -> None:
        for unit in units:
            if unit.whole_bytes:
                self._write_down("reduce", unit, unit.chunk_bytes)
            self._gradients += unit.chunk_bytes - unit.whole_bytes

    def _write_down(self, name: str, unit: _Unit, more_bytes: int = 0) -> None:
        """A moment, at which so much more than what stays is there of gradients."""
        memory = Memory(self._weights, self._gradients + more_bytes, self._state, self._activations)
        self.moments.append(Moment(f"{name} {unit.name}", memory))


def _unit(
    name: str, lengths: Sequence[int], num_ranks: int, rank: int, item_bytes: int, activation_bytes: int = 0
) -> _Unit:
    whole, chunk = sum(lengths), chunk_lengths(sum(lengths), num_ranks)[rank]
    return _Unit(name, whole * item_bytes, chunk * item_bytes, len(lengths) > 1, activation_bytes)


def _update_lengths(layers: Sequence[Sequence[int]], num_ranks: int, rank: int) -> list[int]:
    """Elements of every part of a parameter that lies in a rank's chunks: an optimizer's tensors."""
    lengths = []
    for layer in layers:
        chunks = chunk_lengths(sum(layer), num_ranks)
        low = sum(chunks[:rank])
        high, place = low + chunks[rank], 0
        for length in layer:
            lengths.append(max(0, min(high, place + length) - max(low, place)))
            place += length
    return [length for length in lengths if length]


def _check(layers: Sequence[Sequence[int]], stage: int, num_ranks: int, rank: int, numbers: Sequence[int]) -> None:
    if stage not in (0, 1, 2, 3):
        raise MplabError(
            f"stage {stage}: must be 0 (nothing sharded), 1 (optimizer's state), 2 (gradients), 3 (weights)"
        )
    if num_ranks < 1 or not 0 <= rank < num_ranks:
        raise MplabError(f"rank {rank} of {num_ranks}: ranks are numbered from 0 to {num_ranks - 1}")
    smallest = min([length for layer in layers for length in layer] + list(numbers), default=0)
    if smallest < 0:
        raise MplabError(f"{smallest} elements or bytes: lengths and sizes are 0 or more")
