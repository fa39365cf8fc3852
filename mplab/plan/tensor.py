"""Tensor parallelism of the GPT by formula: what a rank computes, sends, keeps, and how long a block takes.

B batch, T sequence, D width, n ranks; the MLP's hidden layer has 4 D. Forward and backward of one block, on each rank:

    computes    (72 BTD^2 + 12 BT^2 D) / n FLOPs
    sends       4 all-reduces of BTD elements; with sequence parallelism 4 all-gathers and 4 reduce-scatters of as many,
                which is the same bytes

Computing grows with D^2 and sending with D: from some width on it pays.

Reference:
    Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019,
    section 3 (the messages);
    Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021,
    appendix (the FLOPs);
    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, section 4 (what is kept).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from mplab.errors import MplabError
from mplab.plan.cost import Link
from mplab.plan.data import total_traffic
from mplab.plan.traffic import Traffic, chunk_lengths, direct_traffic

_COUNT_BYTES = 8  # of an int64, and of a float64
Call = tuple[str, list[int]]  # a collective, and the bytes of each rank's block


@dataclass(frozen=True)
class Block:
    """The sizes of a block of the GPT (`mplab.models.gpt`), and of what enters it.

    Args:
        batch_size: B, samples.
        sequence: T, tokens of one sample.
        width: D, features of a token.
        num_heads: of the attention; must divide `width`.
        num_layers: blocks of the model. Only `tensor_parallel_traffic` is of all of them, all else is of one.
        item_bytes: of one element.

    Raises:
        MplabError: a size below 1, or heads that don't divide the width.
    """

    batch_size: int
    sequence: int
    width: int
    num_heads: int
    num_layers: int = 1
    item_bytes: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise MplabError(f"Block: {field.name} is {getattr(self, field.name)}; must be 1 or more")
        if self.width % self.num_heads:
            raise MplabError(
                f"Block: width {self.width} is not divisible by num_heads {self.num_heads}, and all heads have the "
                "same size: change one of the two"
            )


class BlockTime(NamedTuple):
    """Seconds of one block's forward and backward, where nothing is computed while a message is under way."""

    compute_s: float
    communication_s: float

    @property
    def total_s(self) -> float:
        """Both."""
        return self.compute_s + self.communication_s


def block_flops(block: Block, num_ranks: int = 1) -> float:
    """FLOPs of the matrix products of one block's forward and backward on one rank.

    A product of m x k by k x n has 2mnk, and two more of the same size in backward. As is usual, attention counts all
    T x T scores, also those that the causal mask leaves out, and not that its kernel computes them again in backward.

    Args:
        block: its sizes.
        num_ranks: n.

    Raises:
        MplabError: n that doesn't divide the heads; so do all functions here.
    """
    _check(block, num_ranks)
    tokens = block.batch_size * block.sequence
    linear = 2 * tokens * 12 * block.width**2  # query, key, value and output; up and down
    attention = 2 * 2 * tokens * block.sequence * block.width  # scores, and the mean of the values
    return 3 * (linear + attention) / num_ranks


def block_traffic(block: Block, num_ranks: int, rank: int, sequence_parallel: bool = False) -> Traffic:
    """What a rank sends in one block's forward and backward.

    Args:
        block: its sizes.
        num_ranks: n.
        rank: whose traffic.
        sequence_parallel: as for `mplab.parallel.tensor_parallel`; n must divide the sequence.
    """
    _check(block, num_ranks, rank, sequence_parallel)
    return _traffic(rank, _block_calls(block, num_ranks, sequence_parallel))


def block_time_s(block: Block, num_ranks: int, flops_s: float, link: Link) -> BlockTime:
    """How long one block's forward and backward should take, with sequence parallelism or without.

    A rank's messages go one after another, as over the emulated link of a `World(link=...)`.

    Args:
        block: its sizes.
        num_ranks: n.
        flops_s: what one rank computes, FLOPs a second; above 0.
        link: between any two ranks.
    """
    if flops_s <= 0:
        raise MplabError(f"flops_s {flops_s}: must be more than 0 (1e9 is a billion a second)")
    traffic = block_traffic(block, num_ranks, 0)  # n divides the width: every rank sends and receives as much
    communication_s = link.time_s(traffic.num_sent, traffic.sent_bytes)
    return BlockTime(block_flops(block, num_ranks) / flops_s, communication_s)


def smallest_paying_width(
    block: Block, num_ranks: int, flops_s: float, link: Link, widths: Iterable[int]
) -> int | None:
    """The smallest of some widths at which n ranks are faster than one; they are at every larger one too.

    Args:
        block: its sizes, but the width.
        num_ranks: n.
        flops_s: as for `block_time_s`.
        link: as for `block_time_s`.
        widths: in any order; the heads must divide each.

    Returns:
        None where none pays.
    """
    for width in sorted(widths):
        wide = replace(block, width=width)
        times_s = [block_time_s(wide, n, flops_s, link).total_s for n in (1, num_ranks)]
        if times_s[1] < times_s[0]:
            return width
    return None


def tensor_parallel_traffic(
    block: Block,
    num_ranks: int,
    rank: int,
    sequence_parallel: bool = False,
    num_microbatches: int = 1,
    has_max_norm: bool = False,
    is_first: bool = False,
    context_length: int | None = None,
) -> Traffic:
    """What a rank sends in one step of `TensorParallel` with a GPT, tied or not, whatever its vocabulary.

    Besides the blocks: X = BTD elements all-reduced by the embedding and by the head each, and two numbers a position
    all-gathered for the loss. With sequence parallelism X once more for the embedding, and at the end an all-reduce of
    the gradients of all that is not cut.

    Args:
        block: the sizes, those of the whole batch.
        num_ranks: n.
        rank: whose traffic.
        sequence_parallel: as for `TensorParallel`.
        num_microbatches: as for `TensorParallel`.
        has_max_norm: whether gradients that are too long are scaled down.
        is_first: whether it is the first step, in which the ranks compare their batches, an all_gather of 8 bytes more,
            and their gradients of what is not cut, one of 16 bytes for each parameter.
        context_length: the GPT's, on which sequence parallelism's traffic depends; None: as long as the sequence.
    """
    _check(block, num_ranks, rank, sequence_parallel)
    if not 1 <= num_microbatches <= block.batch_size:
        raise MplabError(
            f"{num_microbatches} micro-batches of {block.batch_size} samples: take 1 or more, and no more than samples"
        )
    calls: list[Call] = []
    for batch_size in chunk_lengths(block.batch_size, num_microbatches):
        part = replace(block, batch_size=batch_size)
        calls += _whole(part, num_ranks, 1 + sequence_parallel)  # the embedding's
        calls += block.num_layers * _block_calls(part, num_ranks, sequence_parallel)
        if sequence_parallel:  # the head's
            calls += [_sequence_call(name, part, num_ranks) for name in ("all_gather", "reduce_scatter")]
        else:
            calls += _whole(part, num_ranks, 1)
        numbers_bytes = 2 * batch_size * block.sequence * max(block.item_bytes, 4)
        calls.append(("all_gather", [numbers_bytes] * num_ranks))
    if sequence_parallel:
        num_positions = block.sequence if context_length is None else context_length
        num_vectors = 6 * block.num_layers + 2 + num_positions  # norms and row biases; the last norm; positions
        calls.append(_all_reduce(num_vectors * block.width, num_ranks, block.item_bytes))
    if has_max_norm:
        calls.append(_all_reduce(1, num_ranks, _COUNT_BYTES))
    if is_first:
        num_whole = 6 * block.num_layers + 3  # norms, row biases, positions
        calls.append(("all_gather", [_COUNT_BYTES] * num_ranks))
        calls.append(("all_gather", [2 * _COUNT_BYTES * num_whole] * num_ranks))
    return _traffic(rank, calls)


def activation_bytes(block: Block, num_ranks: int, sequence_parallel: bool = False) -> int:
    """Bytes that autograd keeps on a rank from one block's forward for its backward, parameters left out.

    In units of BTD elements:

        kept                               one rank   n ranks    and sequence parallelism
        input of each norm                 2          2          2/n
        input of attention, and of MLP     2          2          2, gathered
        query, key, value                  3          3/n        3/n
        what attention has mixed           1          1/n        1/n
        MLP's hidden layer, before GELU    4          4/n        4/n
        MLP's hidden layer, after GELU     4          4/n        4/n
        all                                16         4 + 12/n   2 + 14/n

    and for each token mean and standard deviation of each norm (4), and a log-sum-exp of each head. Attention is
    `scaled_dot_product_attention` by a kernel that keeps no T x T scores, as torch's on a CPU does.

    Korthikanti et al. count BTD(10 + 24/n + 5HT/(nD)) bytes, H heads, in half precision: these 8 + 24/n, two masks of
    dropout of one byte an element, and softmax, its mask and its dropout of all T x T scores. With sequence
    parallelism theirs is BTD(34 + 5HT/D)/n, where ours has 4 + 28/n: they gather the inputs of attention and MLP once
    more in backward and keep 1/n of them.

    Args:
        block: its sizes.
        num_ranks: n.
        sequence_parallel: as for `mplab.parallel.tensor_parallel`; n must divide the sequence.
    """
    _check(block, num_ranks, 0, sequence_parallel)
    tokens = block.batch_size * block.sequence
    own_tokens = tokens // num_ranks if sequence_parallel else tokens
    items = own_tokens * (2 * block.width + 4) + tokens * (2 * block.width + 12 * block.width // num_ranks)
    return items * block.item_bytes + tokens * block.num_heads // num_ranks * max(block.item_bytes, 4)


def _block_calls(block: Block, num_ranks: int, sequence_parallel: bool) -> list[Call]:
    """The collectives of one block's forward and backward."""
    if not sequence_parallel:
        return _whole(block, num_ranks, 4)
    return 4 * [_sequence_call(name, block, num_ranks) for name in ("all_gather", "reduce_scatter")]


def _whole(block: Block, num_ranks: int, num_calls: int) -> list[Call]:
    """All-reduces of a whole activation."""
    length = block.batch_size * block.sequence * block.width
    return num_calls * [_all_reduce(length, num_ranks, block.item_bytes)]


def _all_reduce(length: int, num_ranks: int, item_bytes: int) -> Call:
    return "all_reduce", [n * item_bytes for n in chunk_lengths(length, num_ranks)]


def _sequence_call(name: str, block: Block, num_ranks: int) -> Call:
    """A collective whose blocks are each rank's part of the sequence."""
    chunk = block.batch_size * (block.sequence // num_ranks) * block.width
    return name, [chunk * block.item_bytes] * num_ranks


def _traffic(rank: int, calls: Sequence[Call]) -> Traffic:
    return total_traffic(direct_traffic(name, rank, block_bytes) for name, block_bytes in calls)


def _check(block: Block, num_ranks: int, rank: int = 0, sequence_parallel: bool = False) -> None:
    if not 0 <= rank < num_ranks:
        raise MplabError(f"rank {rank} of {num_ranks}: ranks go from 0 to {num_ranks - 1}")
    if block.num_heads % num_ranks:
        raise MplabError(
            f"{block.num_heads} heads and {num_ranks} ranks: each has the same number of them, so choose a number of "
            "ranks that divides the heads"
        )
    if sequence_parallel and block.sequence % num_ranks:
        raise MplabError(
            f"a sequence of {block.sequence} tokens can't be cut in {num_ranks} equal parts, as sequence parallelism "
            "does: choose another of the two"
        )
