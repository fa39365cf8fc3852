"""Tensor parallelism by formula: by hand, against the ledgers of real steps, what autograd keeps, and a real link."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from mplab import MplabError, World
from mplab.comm import Ledger, threads
from mplab.comm.threads import ThreadCommunicator
from mplab.datasets import Batch
from mplab.models import GPT, GPTConfig
from mplab.parallel import TensorParallel, tensor_parallel
from mplab.plan.cost import Link, ring_all_reduce_time_s
from mplab.plan.tensor import (
    Block,
    BlockTime,
    activation_bytes,
    block_flops,
    block_time_s,
    block_traffic,
    smallest_paying_width,
    tensor_parallel_traffic,
)
from mplab.plan.traffic import Traffic
from mplab.private import seeing_ops
from mplab.world import Rank

CONTEXT = 14
# Heads and sequence are divided by the number of ranks; the batch is not, nor by the number of micro-batches.
OF_RANKS = {
    1: Block(5, 6, 10, 2, 2),
    2: Block(5, 6, 10, 2, 2),
    3: Block(5, 6, 12, 3, 2),
    4: Block(5, 12, 12, 4, 3),
}
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@st.composite
def sizes_for_ranks(draw: st.DrawFn) -> tuple[int, Block]:
    """A number of ranks, and a block whose heads and sequence it divides."""
    n, *sizes = (draw(st.integers(1, 5 if i == 0 else 4)) for i in range(6))
    batch_size, chunk, num_heads, head_size, num_layers = sizes
    block = Block(batch_size, n * chunk, n * num_heads * head_size, n * num_heads, num_layers)
    return n, replace(block, item_bytes=draw(st.sampled_from([2, 4, 8])))


def gpt(block: Block, tied: bool = True) -> GPT:
    config = GPTConfig(12, CONTEXT, block.num_layers, block.num_heads, block.width, tied)
    return GPT(config).to(DTYPES[block.item_bytes])


def tokens(block: Block) -> Batch:
    drawn = torch.randint(12, (2, block.batch_size, block.sequence), generator=torch.Generator().manual_seed(0))
    return drawn[0], drawn[1]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_flops_by_hand() -> None:
    """1 token, width 2: 6 products of 2 x 2 (up and down have 4 each), scores and values of one token."""
    forward = 2 * (4 * 2 * 2 + 2 * 2 * 8) + 2 * 2 * (1 * 2)
    assert block_flops(Block(1, 1, 2, 1)) == 3 * forward
    assert block_flops(Block(3, 5, 8, 4), 4) * 4 == block_flops(Block(3, 5, 8, 4))


def test_flops_are_those_of_the_literature() -> None:
    """Narayanan et al., without the logits: 96 BTlD^2 (1 + T/(6D)), where the forward is computed twice."""
    b, t, d = 4, 2048, 12288
    assert 4 / 3 * block_flops(Block(b, t, d, 96)) == pytest.approx(96 * b * t * d**2 * (1 + t / (6 * d)))


def test_traffic_by_hand() -> None:
    """3 ranks, 1 sample of 3 tokens, width 3: 4 all-reduces of 9 elements, 3 a rank: 4 messages of 3 each."""
    assert block_traffic(Block(1, 3, 3, 3), 3, 1) == Traffic(4 * 4, 4 * 4 * 12, 4 * 4, 4 * 4 * 12)
    assert block_traffic(Block(1, 3, 3, 3), 3, 1, True) == Traffic(16, 16 * 12, 16, 16 * 12)
    # And the loss: all-gather of 2 numbers of 3 positions; the embedding and the head.
    num_messages, size_bytes = 16 + 2 + 8, 16 * 12 + 2 * 24 + 8 * 12
    step = tensor_parallel_traffic(Block(1, 3, 3, 3), 3, 1)
    assert step == Traffic(num_messages, size_bytes, num_messages, size_bytes)
    # And the embedding again; at the end 6 vectors of the block, 2 of the last norm, 3 positions: 11 elements a rank.
    num_messages, size_bytes = num_messages + 8, size_bytes + 4 * 12 + 4 * 44
    step = tensor_parallel_traffic(Block(1, 3, 3, 3), 3, 1, sequence_parallel=True)
    assert step == Traffic(num_messages, size_bytes, num_messages, size_bytes)


def test_time_by_hand() -> None:
    """2 ranks, 2 samples of 3 tokens, width 4: 72 * 6 * 16 + 12 * 18 * 4 FLOPs; 4 all-reduces of 24 float32."""
    block = Block(2, 3, 4, 2)
    time_s = block_time_s(block, 2, 1024, Link(0.5, 16))
    assert time_s == BlockTime((6912 + 864) / 2 / 1024, 4 * (2 * 0.5 + 96 / 16))
    assert time_s.total_s == 3.796875 + 28
    assert block_time_s(block, 1, 1024, Link(0.5, 16)) == BlockTime(7.59375, 0)


def test_kept_by_hand() -> None:
    """Units of 24 elements (2 samples, 3 tokens, width 4), 4 numbers a token, and one for each of 2 heads."""
    assert activation_bytes(Block(2, 3, 4, 2), 1) == 4 * (16 * 24 + 4 * 6 + 2 * 6)
    assert activation_bytes(Block(2, 3, 4, 2), 2) == 4 * (10 * 24 + 4 * 6 + 6)
    assert activation_bytes(Block(2, 4, 4, 2), 2, True) == 4 * (9 * 32 + 4 * 4 + 8)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_kept_is_what_the_literature_counts(n: int) -> None:
    """Korthikanti et al., half precision, s b h: what is not in ours are masks, softmax, and gathering once more."""
    b, s, h, heads = 4, 2048, 1024, 8
    block, unit = Block(b, s, h, heads, item_bytes=2), b * s * h
    statistics = 2 * 4 * b * s  # the table of the paper leaves them out, and has no log-sum-exp
    log_sums = 4 * b * s * heads // n
    theirs = unit * (10 + 24 / n + 5 * heads * s / (h * n))
    masks, scores = 2 * unit, 5 * heads * s * b * s / n
    assert activation_bytes(block, n) == theirs - masks - scores + statistics + log_sums
    theirs = unit * (34 + 5 * heads * s / h) / n
    gathered = 4 * unit * (1 - 1 / n)
    want = theirs - masks / n - scores + gathered + statistics / n + log_sums
    assert activation_bytes(block, n, True) == want


# --- laws ------------------------------------------------------------------------------------------------------------


@given(sizes_for_ranks())
def test_sequence_parallelism_sends_the_same_and_keeps_less(sizes: tuple[int, Block]) -> None:
    n, block = sizes
    for rank in range(n):
        assert block_traffic(block, n, rank, True) == block_traffic(block, n, rank)
    kept = activation_bytes(block, n, True)
    assert kept < activation_bytes(block, n) if n > 1 else kept == activation_bytes(block, 1)


@given(sizes_for_ranks(), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans())
def test_what_is_sent_is_received(
    sizes: tuple[int, Block], num_microbatches: int, sequence_parallel: bool, has_max_norm: bool, is_first: bool
) -> None:
    n, block = sizes
    num_microbatches = min(num_microbatches, block.batch_size)
    settings = (sequence_parallel, num_microbatches, has_max_norm, is_first)
    of_ranks = [tensor_parallel_traffic(block, n, rank, *settings) for rank in range(n)]
    assert sum(t.num_sent for t in of_ranks) == sum(t.num_received for t in of_ranks)
    assert sum(t.sent_bytes for t in of_ranks) == sum(t.received_bytes for t in of_ranks)
    assert n > 1 or of_ranks == [Traffic(0, 0, 0, 0)]


@given(
    sizes_for_ranks(),
    st.floats(1e3, 1e12),
    st.floats(0, 1e-3),
    st.floats(1e3, 1e12),
    st.sets(st.integers(1, 60), max_size=6),
)
def test_smallest_paying_width(
    sizes: tuple[int, Block], flops_s: float, latency_s: float, bandwidth: float, steps: set[int]
) -> None:
    (n, block), link = sizes, Link(latency_s, bandwidth)
    widths = [step * block.num_heads for step in steps]
    found = smallest_paying_width(block, n, flops_s, link, widths)
    for width in widths:
        wide = replace(block, width=width)
        pays = block_time_s(wide, n, flops_s, link).total_s < block_time_s(wide, 1, flops_s, link).total_s
        assert pays == (found is not None and width >= found)
    assert found is None or found in widths
    assert n > 1 or found is None


def test_a_slow_link_never_pays_and_a_fast_one_always_does() -> None:
    block, widths = Block(8, 64, 4, 4), [512, 64, 256, 128]
    assert smallest_paying_width(block, 4, 1e11, Link(10, 1e9), widths) is None
    assert smallest_paying_width(block, 4, 1e11, Link(0, 1e15), widths) == 64
    assert smallest_paying_width(block, 4, 1e11, Link(1e-4, 1e9), widths) == 128
    assert smallest_paying_width(block, 4, 1e11, Link(1e-3, 1e9), widths) == 512
    assert smallest_paying_width(block, 4, 1e11, Link(0, 1e15), []) is None


def test_the_time_is_that_of_a_ring() -> None:
    """Where n divides the elements, direct messages take 2(n - 1)(alpha + beta B/n) too."""
    block, link = Block(3, 8, 12, 4), Link(1e-3, 1e6)
    of_ring = 4 * ring_all_reduce_time_s(link, 4, 3 * 8 * 12 * 4)
    assert block_time_s(block, 4, 1e9, link).communication_s == pytest.approx(of_ring)


HEADS = Block(1, 6, 12, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Block(0, 1, 1, 1), "batch_size is 0"),
        (lambda: Block(1, 1, 1, 1, 1, -4), "item_bytes is -4"),
        (lambda: Block(1, 1, 10, 4), "width 10 is not divisible by num_heads 4"),
        (lambda: block_flops(HEADS, 4), "6 heads and 4 ranks"),
        (lambda: block_flops(HEADS, 0), "of 0"),
        (lambda: block_traffic(HEADS, 2, 2), "rank 2 of 2: ranks go from 0 to 1"),
        (lambda: block_traffic(replace(HEADS, sequence=5), 2, 0, True), "a sequence of 5 tokens"),
        (lambda: block_time_s(HEADS, 4, 1e9, Link(0, 1)), "6 heads and 4 ranks"),
        (lambda: block_time_s(HEADS, 2, 0, Link(0, 1)), "flops_s 0"),
        (lambda: smallest_paying_width(HEADS, 2, 1e9, Link(0, 1), [13]), "width 13 is not divisible"),
        (lambda: tensor_parallel_traffic(HEADS, 2, -1), "rank -1"),
        (lambda: tensor_parallel_traffic(HEADS, 2, 0, num_microbatches=2), "2 micro-batches of 1 samples"),
        (lambda: tensor_parallel_traffic(HEADS, 2, 0, num_microbatches=0), "0 micro-batches"),
        (lambda: tensor_parallel_traffic(replace(HEADS, sequence=5), 3, 0, True), "5 tokens can't be cut in 3"),
        (lambda: activation_bytes(HEADS, 4), "6 heads and 4 ranks"),
        (lambda: activation_bytes(replace(HEADS, sequence=5), 3, True), "5 tokens can't be cut in 3"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(MplabError, match=message):
        call()


# --- against real runs -----------------------------------------------------------------------------------------------


def traffic_of(ledger: Ledger, begin: int, end: int) -> Traffic:
    """What the ledger says of some of its messages; it writes no number of messages received down."""
    messages = ledger.messages[begin:end]
    sent = sum(m.num_messages for m in messages), sum(m.sent_bytes for m in messages)
    return Traffic(*sent, -1, sum(m.received_bytes for m in messages))


# A model tied or not, micro-batches (two of 5 samples are unequal), max_norm. Each has one dtype with a number of ranks
# and a cut of the sequence, and all three with others.
STEPS = ((True, 1, None), (False, 1, 1.0), (True, 2, 1.0), (False, 3, None))


@pytest.mark.parametrize("steps", range(len(STEPS)), ids=lambda i: str(STEPS[i]))
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("n", OF_RANKS)
def test_ledgers_of_steps(n: int, sequence_parallel: bool, steps: int) -> None:
    """The first step and the second."""
    tied, num_microbatches, max_norm = STEPS[steps]
    block = replace(OF_RANKS[n], item_bytes=[*DTYPES][(n + steps + 2 * sequence_parallel) % 3])

    def run(rank: Rank) -> list[Traffic]:
        strategy = TensorParallel(
            gpt(block, tied),
            rank.comm,
            sequence_parallel=sequence_parallel,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            num_microbatches=num_microbatches,
            max_norm=max_norm,
        )
        ends = [len(rank.comm.ledger.messages)]
        for _ in range(2):
            strategy.step(tokens(block))
            ends.append(len(rank.comm.ledger.messages))
        return [traffic_of(rank.comm.ledger, *ends[i : i + 2]) for i in range(2)]

    for rank, traffics in enumerate(World(n, device="cpu").run(run)):
        for i, traffic in enumerate(traffics):
            settings = (sequence_parallel, num_microbatches, max_norm is not None, i == 0, CONTEXT)
            want = tensor_parallel_traffic(block, n, rank, *settings)
            assert traffic == want._replace(num_received=-1)


def run_block(rank: Rank, block: Block, sequence_parallel: bool, overlap: bool = False) -> tuple[Traffic, int]:
    """Forward and backward of the last block of a GPT: what the rank sent, and the bytes kept in between."""
    model = tensor_parallel(gpt(block), rank.comm, sequence_parallel=sequence_parallel, overlap=overlap)
    length = block.sequence // rank.size if sequence_parallel else block.sequence
    x = torch.ones(block.batch_size, length, block.width, dtype=DTYPES[block.item_bytes], requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return saved

    begin = len(rank.comm.ledger.messages)
    layers = model.get_submodule("blocks")
    assert isinstance(layers, nn.ModuleList)
    with saved_tensors_hooks(keep, lambda saved: saved):
        y: Tensor = layers[-1](x)
    y.sum().backward()
    return traffic_of(rank.comm.ledger, begin, len(rank.comm.ledger.messages)), sum(storages.values())


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("n", OF_RANKS)
def test_ledger_and_memory_of_a_block(n: int, sequence_parallel: bool, overlap: bool) -> None:
    """Each number of ranks has all dtypes, as has each way to cut and to send."""
    block = replace(OF_RANKS[n], item_bytes=[*DTYPES][(n + sequence_parallel + overlap) % 3])
    of_ranks = World(n, device="cpu").run(run_block, block, sequence_parallel, overlap)
    for rank, (traffic, kept_bytes) in enumerate(of_ranks):
        assert traffic == block_traffic(block, n, rank, sequence_parallel)._replace(num_received=-1)
        assert kept_bytes == activation_bytes(block, n, sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("n", OF_RANKS)
def test_time_is_what_an_emulated_link_charges(
    n: int, sequence_parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every collective, without waiting for it."""
    charged_s: list[list[float]] = [[] for _ in range(n)]
    wait = ThreadCommunicator._wait_for_link

    def charge(comm: ThreadCommunicator, *arguments: Any) -> tuple[int, int]:
        start_ns, end_ns = wait(comm, *arguments)
        charged_s[comm.rank].append((end_ns - start_ns) * 1e-9)
        return start_ns, end_ns

    monkeypatch.setattr(threads, "sleep_until", lambda time_ns: None)
    monkeypatch.setattr(ThreadCommunicator, "_wait_for_link", charge)
    link = Link(3e-3, 1e5)
    World(n, device="cpu", link=link).run(run_block, OF_RANKS[n], sequence_parallel)
    want_s = block_time_s(OF_RANKS[n], n, 1e9, link).communication_s
    num_calls = 8 if sequence_parallel else 4  # the last ones, after those that cut the model
    assert [sum(of_rank[-num_calls:]) for of_rank in charged_s] == pytest.approx([want_s] * n, abs=1e-8)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("n", OF_RANKS)
def test_flops_are_those_of_all_products(n: int, sequence_parallel: bool) -> None:
    """With the attention that computes its scores by ordinary products."""

    def run(rank: Rank) -> int:
        flops = 0

        def see(op: Any, arguments: Any, result: Any) -> None:
            nonlocal flops
            name = op.overloadpacket.__name__
            if name in ("mm", "bmm", "addmm"):
                left, right = arguments[0][-2:]
                flops += 2 * left.numel() * right.shape[-1]

        seeing = seeing_ops(see)
        assert seeing is not None
        with seeing:
            run_block(rank, OF_RANKS[n], sequence_parallel)
        return flops

    with sdpa_kernel(SDPBackend.MATH):
        assert World(n, device="cpu").run(run) == [block_flops(OF_RANKS[n], n)] * n
