"""What a collective sends and receives when every pair of its ranks talks directly: the figures of a ledger.

A collective moves *blocks*: one for each rank (the chunks of a reduce-scatter, what each rank gives to an all-gather),
or the whole tensor for those that do not cut it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mplab.plan.schedule import Schedule


class Traffic(NamedTuple):
    """Messages and payload bytes of one rank in one call."""

    num_sent: int
    sent_bytes: int
    num_received: int
    received_bytes: int


def chunk_lengths(length: int, num_chunks: int) -> list[int]:
    """Lengths of chunks as `torch.tensor_split` cuts them: the first `length % num_chunks` are one longer."""
    short, num_longer = divmod(length, num_chunks)
    return [short + 1] * num_longer + [short] * (num_chunks - num_longer)


def direct_traffic(name: str, rank: int, block_bytes: Sequence[int], root: int | None = None) -> Traffic:
    """One rank's traffic in a direct collective.

    Args:
        name: the collective's name, with or without the `_` of an in-place form.
        rank: whose traffic.
        block_bytes: bytes of each rank's block; for `broadcast` and `reduce` the whole tensor's, n times.
        root: of a rooted collective.

    Returns:
        Its traffic. An all-reduce is a reduce-scatter and an all-gather: 2(n-1) messages, 2(n-1)/n of the bytes.
    """
    num_peers, total, own = len(block_bytes) - 1, sum(block_bytes), block_bytes[rank]
    match name.rstrip("_"):
        case "all_reduce" | "all_reduce_coalesced":
            size = total - own + num_peers * own
            return Traffic(2 * num_peers, size, 2 * num_peers, size)
        case "reduce_scatter":
            return Traffic(num_peers, total - own, num_peers, num_peers * own)
        case "all_gather":
            return Traffic(num_peers, num_peers * own, num_peers, total - own)
        case "broadcast":
            return Traffic(num_peers, num_peers * own, 0, 0) if rank == root else Traffic(0, 0, 1, own)
        case "reduce":
            return Traffic(0, 0, num_peers, num_peers * own) if rank == root else Traffic(1, own, 0, 0)
        case "scatter":
            return Traffic(num_peers, total - own, 0, 0) if rank == root else Traffic(0, 0, 1, own)
        case "gather":
            return Traffic(0, 0, num_peers, total - own) if rank == root else Traffic(1, own, 0, 0)
        case "barrier":
            return Traffic(num_peers, 0, num_peers, 0)
    raise AssertionError(f"no traffic known for {name}")


def pipeline_traffic(schedule: Schedule, rank: int, output_bytes: Sequence[int]) -> Traffic:
    """What a rank exchanges with its neighbours in one step of a pipeline, whatever the order: the loss, the settings
    and the gradients of tied weights come on top, as collectives.

    For each micro-batch the output of a stage goes to the rank of the next one, and a gradient of the same size comes
    back; between two stages of one rank nothing is sent.

    Args:
        schedule: says which stages are on which ranks, and the number of micro-batches.
        rank: whose traffic.
        output_bytes: of every stage but the last, for the whole batch.
    """
    num_messages = size_bytes = 0
    for stage, size in enumerate(output_bytes):
        ends = schedule.rank_of[stage], schedule.rank_of[stage + 1]
        if ends[0] != ends[1] and rank in ends:
            num_messages += schedule.num_microbatches
            size_bytes += size
    return Traffic(num_messages, size_bytes, num_messages, size_bytes)
