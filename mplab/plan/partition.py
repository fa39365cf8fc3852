"""Where to cut a chain of layers into stages: by depth, by parameters, or by time, as evenly as can be.

n layers, p stages. Cuts are the first layers of all stages but the first: cuts (2, 5) of 7 layers are the stages
[0, 2), [2, 5) and [5, 7). Every stage has one layer or more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import accumulate, pairwise
from operator import index
from typing import Any, SupportsIndex

from mplab.errors import MplabError
from mplab.plan.balance import best_cuts
from mplab.plan.layer_cost import LayerCost as LayerCost
from mplab.plan.layer_cost import is_number
from mplab.plan.layer_cost import recomputed_costs as recomputed_costs
from mplab.plan.traffic import chunk_lengths
from mplab.trace.units import format_s


@dataclass(frozen=True)
class Partition:
    """Where a chain is cut, and what that gives.

    Args:
        cuts: the first layer of each stage but the first.
        loads: what each stage has to do, in the unit of what was balanced.
        num_layers: of the whole chain.
        unit: "layers", "parameters" or "s".
    """

    cuts: tuple[int, ...]
    loads: tuple[float, ...]
    num_layers: int
    unit: str

    @property
    def num_stages(self) -> int:
        """One more than there are cuts."""
        return len(self.loads)

    @property
    def stages(self) -> list[tuple[int, int]]:
        """(first layer, one after the last) of each stage."""
        return stage_bounds(self.cuts, self.num_layers)

    @property
    def balance(self) -> float:
        """L = max(load) / mean(load): 1 is perfect, p is one stage with everything; nan where all loads are 0."""
        total = sum(self.loads)
        return max(self.loads) * self.num_stages / total if total else math.nan

    def __str__(self) -> str:
        parts = []
        for (start, end), load in zip(self.stages, self.loads, strict=True):
            layers = f"{start} to {end - 1}" if end - start > 1 else f"{start}"
            parts.append(f"{layers}: {format_s(load) if self.unit == 's' else f'{load:,.0f} {self.unit}'}")
        return f"layers {' | '.join(parts)}; L = {self.balance:.2f}"


def by_depth(num_layers: int, num_stages: int) -> Partition:
    """As many layers in each stage; where they don't divide, the first stages have one more.

    Args:
        num_layers: n.
        num_stages: p, from 1 to n.

    Raises:
        MplabError: more stages than layers, or none.
    """
    _check_num_stages(num_layers, num_stages)
    sizes = chunk_lengths(num_layers, num_stages)
    return Partition(tuple(accumulate(sizes[:-1])), tuple(sizes), num_layers, "layers")


def by_parameters(sizes: Sequence[int], num_stages: int) -> Partition:
    """The largest stage has as few parameters as can be; ties are broken as in `by_time`.

    Args:
        sizes: parameters of each layer, 0 or more.
        num_stages: p, from 1 to the number of layers.

    Raises:
        MplabError: more stages than layers, or none; a number out of its range.
    """
    _check_num_stages(len(sizes), num_stages)
    found = best_cuts([_numbers("sizes", sizes)] * num_stages)
    assert found, "there are no limits"
    return Partition(*found, len(sizes), "parameters")


def by_time(
    times_s: Sequence[float],
    num_stages: int,
    speeds: Sequence[float] | None = None,
    boundary_s: Sequence[float] | None = None,
    memory_bytes: Sequence[float] | Sequence[Sequence[float]] | None = None,
    memory_limits_bytes: Sequence[float] | None = None,
) -> Partition:
    """The slowest stage is as fast as can be; exact, by dynamic programming over the first layers and stages.

    Of several such cuts it takes the one whose second slowest stage is as fast as can be, then the third, and so on;
    of cuts with the same loads, that whose first cut is the lowest, then the second. All sums are exact fractions, so
    rounding decides nothing.

    Args:
        times_s: of each layer, on a device of speed 1; 0 or more. Forward and backward of a micro-batch, say.
        num_stages: p, from 1 to the number of layers (n).
        speeds: of the device of each stage, above 0: a stage takes 1/speed of its time. None: all 1.
        boundary_s: n - 1 times, of a cut between layer i and layer i + 1. Both its stages spend it, whatever their
            speed: each of them sends one message through it and receives one. None: all 0.
        memory_bytes: of each layer; or p such lists, one for each stage, where a layer needs more on one stage than
            on another: 1F1B holds the activations of p - s micro-batches on stage s.
        memory_limits_bytes: of each stage: the most that its layers may need together.

    Raises:
        MplabError: more stages than layers, or none; numbers out of their range, or another number of them; limits in
            which no cut fits.

    Reference:
        Narayanan et al., "PipeDream: Generalized pipeline parallelism for DNN training", SOSP 2019, section 3.1 (the
        partitioning algorithm, here without replicated stages).
    """
    num_layers = len(times_s)
    _check_num_stages(num_layers, num_stages)
    times = _numbers("times_s", times_s)
    rates = _numbers("speeds", [1] * num_stages if speeds is None else speeds, num_stages, above_0=True)
    edges = None if boundary_s is None else _numbers("boundary_s", boundary_s, num_layers - 1)
    memory, limits = _memory(memory_bytes, memory_limits_bytes, num_layers, num_stages)
    shares = [[size / limit for size in row] for row, limit in zip(memory, limits, strict=True)]
    found = best_cuts([[time / rate for time in times] for rate in rates], edges, shares or None)
    if found is not None:
        return Partition(*found, num_layers, "s")
    least = best_cuts(shares)
    assert least, "there are no limits"
    totals = [sum(row) for row in memory]
    raise MplabError(
        f"no cut of {num_layers} layers, {_megabytes(min(totals), max(totals))} in all, fits in {num_stages} stages of "
        f"{', '.join(_megabytes(limit) for limit in limits)}: limits {math.ceil(100 * max(least[1])) / 100} times as "
        "large would do; else take more stages, a smaller micro-batch, or recompute the activations"
    )


def _memory(
    sizes: Sequence[float] | Sequence[Sequence[float]] | None,
    limits: Sequence[float] | None,
    num_layers: int,
    num_stages: int,
) -> tuple[list[list[Fraction]], list[Fraction]]:
    """What each layer needs on each stage, and what each stage has; two empty lists where there are no limits."""
    if sizes is None and limits is None:
        return [], []
    if sizes is None or limits is None:
        raise MplabError("memory_bytes and memory_limits_bytes: give both, bytes of each layer and of each stage")
    rows: Sequence[Any] = sizes if len(sizes) and isinstance(sizes[0], Sequence) else [sizes] * num_stages
    if len(rows) != num_stages:
        raise MplabError(f"memory_bytes has {len(rows)} lists: give one list, or {num_stages}, one a stage")
    numbers = [_numbers("memory_bytes", row, num_layers) for row in rows]
    return numbers, _numbers("memory_limits_bytes", limits, num_stages, above_0=True)


def _megabytes(*sizes: float | Fraction) -> str:
    return f"{' to '.join(dict.fromkeys(f'{float(size) / 1e6:,.3g}' for size in sizes))} MB"


def _numbers(name: str, values: Sequence[float], count: int | None = None, above_0: bool = False) -> list[Fraction]:
    if count is not None and len(values) != count:
        raise MplabError(f"{name} has {len(values)} numbers: give {count}, see its description")
    for i, value in enumerate(values):
        if not (is_number(value) and 0 <= value < math.inf) or (above_0 and not value):
            raise MplabError(f"{name}[{i}] is {value!r}: give a number{' above 0' if above_0 else ', 0 or more'}")
    return [Fraction(value if isinstance(value, int) else float(value)) for value in values]


def stage_bounds(cuts: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """(first layer, one after the last) of each stage."""
    return list(zip((0, *cuts), (*cuts, num_layers), strict=True))


def check_cuts(cuts: Iterable[SupportsIndex], names: Sequence[str], num_stages: int) -> tuple[int, ...]:
    """The cuts as whole numbers, if they are good ones.

    Args:
        cuts: the first layer of each stage but the first.
        names: of the layers, in order.
        num_stages: how many stages there must be (p).

    Raises:
        MplabError: more stages than layers, or cuts that are not p - 1 whole numbers from 1 to n - 1, each above the
            one before; lists the layers.
    """
    _check_num_stages(len(names), num_stages)
    try:
        given = tuple(cuts)
    except TypeError:
        given = ()
        problem = "they are a sequence of whole numbers"
    else:
        problem = _problem(given, len(names), num_stages)
    if problem:
        shown = list(given) if given else cuts
        layers = "\n".join(f"  {i}  {name}" for i, name in enumerate(names))
        raise MplabError(
            f"cuts {shown}: {problem}. A cut is the first layer of a stage; give {num_stages - 1}, from 1 to "
            f"{len(names) - 1}, each above the one before, for {num_stages} stages of these layers:\n{layers}"
        )
    return tuple(index(cut) for cut in given)


def _problem(cuts: Sequence[SupportsIndex], num_layers: int, num_stages: int) -> str:
    for cut in cuts:
        if not _is_whole(cut):
            return f"{cut!r} is no whole number"
    if len(cuts) != num_stages - 1:
        return f"{num_stages} stages have {num_stages - 1}, not {len(cuts)}"
    numbers = [index(cut) for cut in cuts]
    for cut in numbers:
        if not 1 <= cut < num_layers:
            return f"{cut} is out of range"
    for before, after in pairwise(numbers):
        if after == before:
            return f"{after} is there twice, and leaves a stage without a layer"
        if after < before:
            return f"{after} comes after {before}, out of order"
    return ""


def _is_whole(value: object) -> bool:
    try:
        index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, bool)


def _check_num_stages(num_layers: int, num_stages: int) -> None:
    if not _is_whole(num_stages) or not 1 <= num_stages <= num_layers:
        raise MplabError(
            f"{num_stages!r} stages of {num_layers} layers: every stage has one layer or more, so give 1 to "
            f"{num_layers} stages"
        )


def stage_costs(layers: Sequence[LayerCost], cuts: Iterable[SupportsIndex]) -> list[LayerCost]:
    """What each stage costs: the sum over its layers; it hands on what its last layer does.

    Args:
        layers: of the whole chain.
        cuts: the first layer of each stage but the first.

    Raises:
        MplabError: see `check_cuts`.
    """
    cuts = tuple(cuts)
    cuts = check_cuts(cuts, [layer.name for layer in layers], len(cuts) + 1)
    costs = []
    for start, end in stage_bounds(cuts, len(layers)):
        stage = layers[start:end]
        name = stage[0].name if len(stage) == 1 else f"{stage[0].name} to {stage[-1].name}"
        sums = {
            name: (math.fsum if name.endswith("_s") else sum)(getattr(layer, name) for layer in stage)
            for name in (field.name for field in fields(LayerCost)[1:])
        }
        costs.append(LayerCost(name, **{**sums, "output_bytes": stage[-1].output_bytes}))
    return costs
