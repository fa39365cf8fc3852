"""A GPT by its sizes alone, and what each layer of it has, computes, sends and keeps on a rank of a tensor axis.

B samples of a micro-batch, T tokens of each, D width, V vocabulary, n ranks; the chain is embedding, blocks, head.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

from mplab.errors import MplabError
from mplab.plan.data import total_traffic
from mplab.plan.tensor import Block, activation_bytes, block_flops, block_traffic
from mplab.plan.traffic import Traffic, chunk_lengths, direct_traffic


@dataclass(frozen=True)
class Transformer:
    """The sizes of a GPT (`mplab.models.GPT`, and `GPTConfig`'s names), and of its numbers.

    Args:
        vocab_size: number of different tokens (V).
        context_length: tokens of a sample (T); all have as many.
        num_layers: number of blocks.
        num_heads: attention heads in each block; must divide `width`.
        width: features of one token between the layers (D); the hidden layer of each MLP has 4 D.
        tied: whether the head shares the token embedding's matrix.
        item_bytes: of one element of weights, gradients and activations.
        state_bytes: the optimizer's, for each weight: AdamW 8; with weights of 2 bytes and a copy of them in 4, 12.

    Raises:
        MplabError: a size below 1, or heads that don't divide the width.
    """

    vocab_size: int
    context_length: int
    num_layers: int
    num_heads: int
    width: int
    tied: bool = True
    item_bytes: int = 4
    state_bytes: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "state_bytes" else 1
            if field.name != "tied" and not (type(value) is int and value >= least):
                raise MplabError(f"Transformer: {field.name} is {value!r}; must be a whole number, {least} or more")
        self.block(1)  # refuses heads that don't divide the width

    def block(self, batch_size: int) -> Block:
        """A block of it, with so many samples."""
        return Block(batch_size, self.context_length, self.width, self.num_heads, self.num_layers, self.item_bytes)

    @property
    def num_parameters(self) -> int:
        """All of them; a tied matrix counts once."""
        return sum(map(sum, parameter_lengths(self))) - self.tied * self.vocab_size * self.width


class LayerLoad(NamedTuple):
    """What a layer does with one micro-batch on a rank of the tensor axis.

    Args:
        flops: of forward and backward; a third is the forward's.
        forward: its messages on the tensor axis.
        backward: its messages on the tensor axis.
        kept_bytes: from its forward to its backward, parameters left out.
        forward_calls: collectives that its messages are of.
        backward_calls: likewise.
    """

    flops: float
    forward: Traffic
    backward: Traffic
    kept_bytes: int
    forward_calls: int
    backward_calls: int


@lru_cache(maxsize=1024)
def parameter_lengths(model: Transformer, num_ranks: int = 1) -> tuple[tuple[int, ...], ...]:
    """For each layer, the elements of every parameter that a rank of the tensor axis has; a tied matrix is in two.

    Args:
        model: its sizes.
        num_ranks: n; must divide the vocabulary.
    """
    d, n = model.width, num_ranks
    matrix = model.vocab_size // n * d
    norm = (d, d)
    attention = (d * d // n, d // n) * 3 + (d * d // n, d)
    mlp = (4 * d * d // n, 4 * d // n, 4 * d * d // n, d)
    block = norm + attention + norm + mlp
    return ((matrix, model.context_length * d), *[block] * model.num_layers, (*norm, matrix))


@lru_cache(maxsize=4096)
def layer_loads(
    model: Transformer, batch_size: int, num_ranks: int, sequence_parallel: bool
) -> tuple[LayerLoad, LayerLoad, LayerLoad]:
    """Of the embedding, of each block, and of the head with the loss.

    Args:
        model: its sizes.
        batch_size: of a micro-batch (B).
        num_ranks: n.
        sequence_parallel: as for `mplab.parallel.tensor_parallel`.
    """
    block, n = model.block(batch_size), num_ranks
    tokens = batch_size * model.context_length
    whole = _sent("all_reduce", [length * model.item_bytes for length in chunk_lengths(tokens * model.width, n)])
    parts = [tokens // n * model.width * model.item_bytes] * n
    number_bytes = max(model.item_bytes, 4)
    loss = _sent("all_gather", [2 * tokens * number_bytes] * n)
    none = Traffic(0, 0, 0, 0)
    is_cut = int(n > 1)
    further = int(sequence_parallel and n > 1)  # a reduce-scatter and an all-gather for an all-reduce
    embedding = LayerLoad(0.0, whole, whole if sequence_parallel else none, 0, is_cut, further)
    both = block_traffic(block, n, 0, sequence_parallel)
    half = Traffic(*(number // 2 for number in both))  # all of a block's collectives are in pairs
    num_calls = 2 * (is_cut + further)
    kept = activation_bytes(block, n, sequence_parallel)
    of_block = LayerLoad(block_flops(block, n), half, half, kept, num_calls, num_calls)
    own_tokens = tokens // n if sequence_parallel else tokens
    # the norm's input, its mean and deviation for each token, and its output; of each logit its logarithm
    kept = (own_tokens * (model.width + 2) + tokens * model.width) * model.item_bytes
    kept += tokens * model.vocab_size // n * number_bytes
    entry = _sent("all_gather", parts) if sequence_parallel else none
    exit_ = _sent("reduce_scatter", parts) if sequence_parallel else whole
    flops = 6.0 * tokens * model.width * model.vocab_size / n
    head = LayerLoad(flops, total_traffic([entry, loss]), exit_, kept, is_cut + further, is_cut)
    return embedding, of_block, head


def _sent(name: str, block_bytes: list[int]) -> Traffic:
    return direct_traffic(name, 0, block_bytes)


# Brown et al., "Language models are few-shot learners", 2020, table 2.1; its vocabulary of 50,257 filled up to 51,200,
# as Narayanan et al. 2021 do, so that tensor parallelism can cut it. Mixed precision: weights, gradients and
# activations of 2 bytes; a copy of the weights in 4 bytes, and AdamW's two moments.
GPT3 = Transformer(51200, 2048, 96, 96, 12288, item_bytes=2, state_bytes=12)
