"""The orders of the literature: for every rank a generator of its actions, with the table that it draws.

p ranks, m micro-batches, v chunks (stages of one rank). In the tables a column is one unit of time, and a backward
takes two (`B0==`), as it does on devices: one for the gradients of the inputs, one for those of the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TypeAlias, get_args

from mplab.errors import MplabError

Kind = Literal["F", "B", "I", "W"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NAMES: dict[Kind, str] = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


class Action(NamedTuple):
    """One piece of work of one stage on one micro-batch; written "2F0".

    Args:
        stage: the stage that computes.
        kind: "F" forward; "B" the whole backward, or its two parts: "I" the gradients of the inputs, which the stage
            before waits for, and "W" those of the weights, which nobody waits for.
        microbatch: what it computes on.
    """

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that is written so.

        Raises:
            MplabError: no action is.
        """
        found = re.fullmatch(r"(\d+)([FBIW])(\d+)", text)
        if found is None:
            raise MplabError(f'"{text}" is no action: write stage, one of {", ".join(KINDS)}, micro-batch, as in "2F0"')
        return cls(int(found[1]), found[2], int(found[3]))  # type: ignore[arg-type]


Order: TypeAlias = Callable[[int, int, int], Iterator[Action]]
"""(rank, num_ranks, num_microbatches) -> the actions of that rank, in order."""


# naive, p = 3, m = 3
#
#   rank 0 | F0                   B0=== F1                   B1=== F2                   B2===
#   rank 1 |    F0          B0===          F1          B1===          F2          B2===
#   rank 2 |       F0 B0===                   F1 B1===                   F2 B2===
def naive(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """Each micro-batch forward through all stages, then backward; a rank is busy for 1/p of the time."""
    for j in range(num_microbatches):
        yield Action(rank, "F", j)
        yield Action(rank, "B", j)


# gpipe, p = 3, m = 4
#
#   rank 0 | F0 F1 F2 F3                   B0=== B1=== B2=== B3===
#   rank 1 |    F0 F1 F2 F3          B0=== B1=== B2=== B3===
#   rank 2 |       F0 F1 F2 F3 B0=== B1=== B2=== B3===
def gpipe(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """All forwards, then all backwards; idle for (p - 1)/(m + p - 1) of the time, with all m micro-batches in flight.

    Reference:
        Huang et al., "GPipe: Efficient training of giant neural networks using pipeline parallelism", NeurIPS 2019,
        section 2.3.
    """
    for j in range(num_microbatches):
        yield Action(rank, "F", j)
    for j in range(num_microbatches):
        yield Action(rank, "B", j)


# 1f1b, p = 3, m = 4
#
#   rank 0 | F0 F1 F2             B0=== F3 B1===    B2===    B3===
#   rank 1 |    F0 F1       B0=== F2 B1=== F3 B2===    B3===
#   rank 2 |       F0 B0=== F1 B1=== F2 B2=== F3 B3===
def one_f_one_b(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """As idle as GPipe, but with at most p - rank micro-batches in flight: each forward makes room by a backward.

    Reference:
        Narayanan et al., "PipeDream: Generalized pipeline parallelism for DNN training", SOSP 2019, section 3.2;
        with one update a batch: Narayanan et al., "Memory-efficient pipeline-parallel DNN training", ICML 2021 (flush).
    """
    num_warmup = min(num_ranks - 1 - rank, num_microbatches)
    for j in range(num_microbatches):
        yield Action(rank, "F", j)
        if j >= num_warmup:
            yield Action(rank, "B", j - num_warmup)
    for j in range(num_microbatches - num_warmup, num_microbatches):
        yield Action(rank, "B", j)


# interleaved, p = 2, v = 2, m = 4
#
#   rank 0 | 0F0 0F1 2F0 2F1 0F2     2B0==== 0F3 2B1==== 2F2 0B0==== 2F3 0B1====     2B2====     2B3==== 0B2==== 0B3====
#   rank 1 |     1F0 1F1 3F0 3B0==== 3F1 3B1==== 1F2 1B0==== 1F3 1B1==== 3F2 3B2==== 3F3 3B3==== 1B2==== 1B3====
def interleaved(rank: int, num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> Iterator[Action]:
    """1F1B where each rank has v chunks, stages rank, rank + p, ...: a bubble of 1/v, for v times the messages or more.

    Reference:
        Narayanan et al., "Efficient large-scale language model training on GPU clusters using Megatron-LM", SC 2021,
        section 2.2.2.
    """
    # Micro-batches go through all chunks of a rank in groups of p: then the first of a group is back from the last
    # rank just when the last of the group has left. Where p does not divide m, the last group is filled up with
    # micro-batches that there are not, and their actions are left out. That can make nobody wait for ever, but shorter
    # orders exist then.
    filled = -(-num_microbatches // num_ranks) * num_ranks
    order = [
        (chunk, j)
        for first in range(0, filled, num_ranks)
        for chunk in range(num_chunks)
        for j in range(first, first + num_ranks)
    ]
    num_warmup = min(2 * (num_ranks - 1 - rank) + (num_chunks - 1) * num_ranks, len(order))
    forwards = [Action(chunk * num_ranks + rank, "F", j) for chunk, j in order]
    backwards = [Action((num_chunks - 1 - chunk) * num_ranks + rank, "B", j) for chunk, j in order]
    actions = forwards[:num_warmup]
    for forward, backward in zip(forwards[num_warmup:], backwards, strict=False):
        actions += forward, backward
    actions += backwards[len(order) - num_warmup :]
    yield from (action for action in actions if action.microbatch < num_microbatches)


# zero_bubble, p = 3, m = 4
#
#   rank 0 | F0 F1 F2       B0=== F3 B1=== B2=== B3===
#   rank 1 |    F0 F1    I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
#   rank 2 |       F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
def zero_bubble(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """ZB-H1: as 1F1B, but weight gradients, for which nobody waits, fill what was idle; p micro-batches in flight.

    Reference:
        Qi et al., "Zero bubble pipeline parallelism", ICLR 2024, section 2.1 (ZB-H1).
    """
    is_first = rank == 0  # nobody waits for what its backward hands on, so it stays in one part
    num_warmup = min(num_ranks - rank, num_microbatches)
    for j in range(num_warmup):
        yield Action(rank, "F", j)
    for j in range(num_microbatches):
        yield Action(rank, "B" if is_first else "I", j)
        if not is_first and j >= rank:
            yield Action(rank, "W", j - rank)
        if j + num_warmup < num_microbatches:
            yield Action(rank, "F", j + num_warmup)
    for j in range(max(0, num_microbatches - rank), num_microbatches):
        yield Action(rank, "W", j)


ORDERS: dict[str, Order] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zero_bubble": zero_bubble,
}
