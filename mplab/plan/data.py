"""Messages and bytes of one step of every kind of data parallelism, for one rank: what its ledger must show.

All of them end with the sum of all ranks' gradients; they differ in who adds up, and when. With P the bytes of all
parameters, one micro-batch, n ranks and large n, a rank sends about

    parameter server         nP on the master, which receives as much; P elsewhere
    all-reduce, ZeRO 1 or 2  2P
    ZeRO 3                   3P

and a closing all-reduce of a few numbers: the loss, the number of samples, and which parameters were used.

Reference:
    Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014;
    Li et al., "PyTorch Distributed: Experiences on accelerating data parallel training", VLDB 2020, section 3.2
    (buckets);
    Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", SC 2020, section 7 (the
    stages' communication).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from mplab.errors import MplabError
from mplab.plan.traffic import Traffic, chunk_lengths, direct_traffic

_CLOSING_BYTES = 8  # float64
STAGES = (1, 2, 3)


def naive_data_parallel_traffic(num_ranks: int, rank: int, lengths: Sequence[int], item_bytes: int = 4) -> Traffic:
    """An all-reduce a parameter.

    Args:
        num_ranks: n.
        rank: whose traffic.
        lengths: elements of every parameter, all trained.
        item_bytes: of one element.

    Raises:
        MplabError: no such rank, or a number out of its range; so do all functions here.
    """
    return data_parallel_traffic(num_ranks, rank, [[length] for length in lengths], item_bytes)


def data_parallel_traffic(num_ranks: int, rank: int, buckets: Sequence[Sequence[int]], item_bytes: int = 4) -> Traffic:
    """An all-reduce a bucket, of the joined elements of its parameters.

    Args:
        num_ranks: n.
        rank: whose traffic.
        buckets: for each bucket, the elements of every parameter.
        item_bytes: of one element.
    """
    lengths = _check(num_ranks, rank, [length for bucket in buckets for length in bucket], item_bytes)
    traffics = [_cut("all_reduce", num_ranks, rank, sum(bucket), item_bytes) for bucket in buckets]
    return total_traffic([*traffics, _closing(num_ranks, rank, len(lengths))])


def parameter_server_traffic(
    num_ranks: int, rank: int, lengths: Sequence[int], item_bytes: int = 4, master: int = 0
) -> Traffic:
    """For every parameter, a reduce of its gradient to the master, and a broadcast of its new value.

    Args:
        num_ranks: n.
        rank: whose traffic.
        lengths: elements of every parameter, all trained.
        item_bytes: of one element.
        master: the rank that updates.
    """
    _check(num_ranks, rank, lengths, item_bytes, master)
    traffics = [
        direct_traffic(name, rank, [length * item_bytes] * num_ranks, master)
        for length in lengths
        for name in ("reduce", "broadcast")
    ]
    return total_traffic([*traffics, _closing(num_ranks, rank, len(lengths))])


def scatter_gather_traffic(
    num_ranks: int,
    rank: int,
    lengths: Sequence[int],
    num_samples: int,
    input_bytes: int,
    output_bytes: int,
    item_bytes: int = 4,
    master: int = 0,
) -> Traffic:
    """A parameter server's, and the samples: a scatter of the inputs, a gather of the outputs, a scatter of their
    gradient.

    Args:
        num_ranks: n.
        rank: whose traffic.
        lengths: elements of every parameter, all trained; buffers, which are broadcast too, are not in it.
        num_samples: of the whole batch.
        input_bytes: of one sample's inputs.
        output_bytes: of one sample's outputs.
        item_bytes: of one element of a parameter.
        master: the rank that has the batch, computes the loss and updates.
    """
    weights = parameter_server_traffic(num_ranks, rank, lengths, item_bytes, master)
    _check(num_ranks, rank, (num_samples, input_bytes, output_bytes), item_bytes)
    of_samples = partial(_cut, num_ranks=num_ranks, rank=rank, length=num_samples, root=master)
    return total_traffic(
        [
            weights,
            of_samples("scatter", item_bytes=input_bytes),
            of_samples("gather", item_bytes=output_bytes),
            of_samples("scatter", item_bytes=output_bytes),
        ]
    )


def sharded_traffic(
    stage: int,
    num_ranks: int,
    rank: int,
    layers: Sequence[Sequence[int]],
    item_bytes: int = 4,
    num_microbatches: int = 1,
    shared: Sequence[int] = (),
) -> Traffic:
    """A layer's parameters are joined, and cut among the ranks.

    Stages 1 and 2 reduce-scatter each layer's gradients, stage 2 those of each micro-batch, and all-gather its updated
    parameters. Stage 3 all-gathers them for each micro-batch's forward and again for its backward, those of the last
    layer once for both, and reduce-scatters each micro-batch's gradients.

    Args:
        stage: of ZeRO, 1 to 3.
        num_ranks: n.
        rank: whose traffic.
        layers: for each layer, the elements of every parameter that is its own, all trained.
        item_bytes: of one element.
        num_microbatches: parts in which a rank computes its samples.
        shared: elements of every parameter that several layers have; joined too, they are gathered once a step.
    """
    lengths = [length for layer in (*layers, shared) for length in layer]
    _check(num_ranks, rank, lengths, item_bytes)
    if stage not in STAGES or num_microbatches < 1:
        raise MplabError(
            f"stage {stage}, {num_microbatches} micro-batches: a stage is 1, 2 or 3, and there is 1 micro-batch or more"
        )
    flats = [sum(layer) for layer in layers if layer]
    num_reductions = 1 if stage == 1 else num_microbatches
    num_gathers = [1 if stage < 3 else num_microbatches * (1 if i == len(flats) - 1 else 2) for i in range(len(flats))]
    traffics = [_closing(num_ranks, rank, len(lengths))]
    for length, num in zip([*flats, *([sum(shared)] if shared else [])], [*num_gathers, 1], strict=False):
        for name, num_calls in (("reduce_scatter", num_reductions), ("all_gather", num)):
            traffics += [_cut(name, num_ranks, rank, length, item_bytes)] * num_calls
    return total_traffic(traffics)


def total_traffic(traffics: Iterable[Traffic]) -> Traffic:
    """All messages and bytes of several calls."""
    return Traffic(*map(sum, zip(Traffic(0, 0, 0, 0), *traffics, strict=True)))


def _cut(name: str, num_ranks: int, rank: int, length: int, item_bytes: int, root: int | None = None) -> Traffic:
    """A collective whose blocks are the chunks of `length` elements."""
    return direct_traffic(name, rank, [n * item_bytes for n in chunk_lengths(length, num_ranks)], root)


def _closing(num_ranks: int, rank: int, num_parameters: int) -> Traffic:
    """The loss, the number of samples, and for each parameter on how many ranks it was used."""
    return _cut("all_reduce", num_ranks, rank, 2 + num_parameters, _CLOSING_BYTES)


def _check(num_ranks: int, rank: int, lengths: Sequence[int], item_bytes: int, master: int = 0) -> Sequence[int]:
    if num_ranks < 1 or not 0 <= rank < num_ranks or not 0 <= master < num_ranks:
        raise MplabError(f"rank {rank} (master {master}) of {num_ranks}: ranks go from 0 to {num_ranks - 1}")
    if min([item_bytes, *lengths]) < 0:
        raise MplabError(f"lengths {list(lengths)}, of {item_bytes} bytes an element: none can be negative")
    return lengths
