"""Every kind of data parallelism: what a rank's ledger shows, by formula, by hand, and in real runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from conformance.ledgers import direct_hops
from hypothesis import given
from hypothesis import strategies as st
from limits import leaves_nothing_behind as leaves_nothing_behind
from pipelines import batches, chain
from torch import nn

from mplab import MplabError, World
from mplab.comm import Ledger
from mplab.datasets import Batch
from mplab.models import MLP
from mplab.parallel import naive_data
from mplab.parallel.data import DataParallel
from mplab.parallel.sharded import ShardedDataParallel
from mplab.plan import data as plan
from mplab.plan.traffic import Traffic
from mplab.world import Rank

Call = tuple[str, int, int, int | None]  # name, elements, bytes of one, root
SIZES = (7, 5, 3, 6, 4)  # lengths that 2, 3 and 4 ranks do not divide
NUM_SAMPLES = 10


def listed(num_ranks: int, rank: int, calls: Sequence[Call]) -> Traffic:
    """Every message of every call, one by one."""
    total = Traffic(0, 0, 0, 0)
    for name, length, item_bytes, root in calls:
        hops = list(direct_hops(name, num_ranks, length, root or 0))
        sent = [elements * item_bytes for a, _, elements in hops if a == rank]
        received = [elements * item_bytes for _, b, elements in hops if b == rank]
        of_call = (len(sent), sum(sent), len(received), sum(received))
        total = Traffic(*(a + b for a, b in zip(total, of_call, strict=True)))
    return total


def closing(num_parameters: int) -> Call:
    return "all_reduce", 2 + num_parameters, 8, None


# --- against a list of messages --------------------------------------------------------------------------------------

LAYERS = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=1, max_size=4)


@given(n=st.integers(1, 6), buckets=LAYERS, item_bytes=st.sampled_from([2, 4, 8]))
def test_one_all_reduce_a_bucket(n: int, buckets: list[list[int]], item_bytes: int) -> None:
    lengths = [length for bucket in buckets for length in bucket]
    joined: list[Call] = [("all_reduce", sum(bucket), item_bytes, None) for bucket in buckets]
    single: list[Call] = [("all_reduce", length, item_bytes, None) for length in lengths]
    for rank in range(n):
        want = listed(n, rank, [*joined, closing(len(lengths))])
        assert plan.data_parallel_traffic(n, rank, buckets, item_bytes) == want
        want = listed(n, rank, [*single, closing(len(lengths))])
        assert plan.naive_data_parallel_traffic(n, rank, lengths, item_bytes) == want


@given(n=st.integers(1, 6), lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), data=st.data())
def test_a_master_that_updates(n: int, lengths: list[int], data: st.DataObject) -> None:
    master = data.draw(st.integers(0, n - 1), "master")
    num_samples, of_inputs, of_outputs = data.draw(st.tuples(st.integers(0, 20), st.integers(0, 9), st.integers(0, 9)))
    reduces: list[Call] = [("reduce", length, 8, master) for length in lengths]
    broadcasts: list[Call] = [("broadcast", length, 8, master) for length in lengths]
    of_weights = [*reduces, *broadcasts, closing(len(lengths))]
    for rank in range(n):
        assert plan.parameter_server_traffic(n, rank, lengths, 8, master) == listed(n, rank, of_weights)
        want = listed(n, rank, [*of_weights, ("scatter", num_samples, of_inputs, master)])
        # a gather's blocks are the outputs of each rank's samples, in bytes
        for name, peer_sends in (("gather", rank != master), ("scatter", rank == master)):
            chunks = [len(part) * of_outputs for part in torch.empty(num_samples).tensor_split(n)]
            others = sum(chunks) - chunks[master]
            at_master = Traffic(n - 1, others, 0, 0) if name == "scatter" else Traffic(0, 0, n - 1, others)
            elsewhere = Traffic(1, chunks[rank], 0, 0) if peer_sends else Traffic(0, 0, 1, chunks[rank])
            want = plan.total_traffic([want, at_master if rank == master else elsewhere])
        got = plan.scatter_gather_traffic(n, rank, lengths, num_samples, of_inputs, of_outputs, 8, master)
        assert got == want


@given(n=st.integers(1, 6), layers=LAYERS, shared=st.lists(st.integers(0, 9), max_size=2), m=st.integers(1, 3))
def test_shards_by_stage(n: int, layers: list[list[int]], shared: list[int], m: int) -> None:
    flats = [sum(layer) for layer in layers]
    root = [sum(shared)] if shared else []
    scatters = [("reduce_scatter", length) for length in (*flats, *root)]
    gathers = [("all_gather", length) for length in flats]
    of_root = [("all_gather", length) for length in root]
    calls = {
        1: [*scatters, *gathers, *of_root],
        2: [*m * scatters, *gathers, *of_root],
        3: [*of_root, *m * [*gathers, *gathers[-2::-1], *scatters]],
    }
    for stage, of_stage in calls.items():
        for rank in range(n):
            want = [listed(n, rank, [closing(sum(map(len, layers)) + len(shared))])]
            want += [chunked(n, rank, *call) for call in of_stage]
            assert plan.sharded_traffic(stage, n, rank, layers, 4, m, shared) == plan.total_traffic(want)


def chunked(n: int, rank: int, name: str, length: int) -> Traffic:
    """A reduce-scatter or an all-gather of float32 chunks, message by message."""
    chunks = [4 * len(part) for part in torch.empty(length).tensor_split(n)]
    others = [size for r, size in enumerate(chunks) if r != rank]
    mine = [chunks[rank]] * (n - 1)
    sent, received = (others, mine) if name == "reduce_scatter" else (mine, others)
    return Traffic(len(sent), sum(sent), len(received), sum(received))


def test_literals() -> None:
    """4 ranks, a weight of 6 and a bias of 4: chunks of 3, 3, 2, 2 joined; 2, 2, 1, 1 and 1, 1, 1, 1 one by one."""
    closing = Traffic(6, 48, 6, 48)  # 4 float64
    joined = plan.data_parallel_traffic(4, 2, [[6, 4]])
    assert joined == plan.total_traffic([closing, Traffic(6, 4 * (8 + 3 * 2), 6, 4 * (8 + 3 * 2))])
    single = plan.naive_data_parallel_traffic(4, 2, [6, 4])
    assert single == plan.total_traffic([closing, Traffic(12, 4 * (5 + 3 + 3 + 3), 12, 4 * (5 + 3 + 3 + 3))])
    assert plan.parameter_server_traffic(4, 0, [10]) == plan.total_traffic(
        [Traffic(6, 40, 6, 40), Traffic(3, 120, 3, 120)]
    )
    assert plan.sharded_traffic(3, 4, 0, [[6, 4], [1]]) == plan.total_traffic(
        [
            Traffic(6, 8 * (3 + 3 * 2), 6, 8 * (3 + 3 * 2)),  # 5 float64: 2, 1, 1, 1
            Traffic(3, 28, 3, 36),  # reduce-scatter of the first layer, and its two all-gathers
            *[Traffic(3, 36, 3, 28)] * 2,
            Traffic(3, 0, 3, 12),  # those of the last
            Traffic(3, 12, 3, 0),
        ]
    )


def test_published_ratios() -> None:
    """Of very large models on many ranks: ZeRO 1 and 2 cost what data parallelism costs, ZeRO 3 half as much again."""
    n, layers = 64, [[10**6]] * 100
    size_bytes = 4 * 100 * 10**6
    sent = {stage: plan.sharded_traffic(stage, n, 0, layers).sent_bytes / size_bytes for stage in (1, 2, 3)}
    assert sent[1] == sent[2] == pytest.approx(2, rel=0.02)
    assert sent[3] == pytest.approx(3, rel=0.03)
    assert plan.data_parallel_traffic(n, 0, layers).sent_bytes / size_bytes == pytest.approx(2, rel=0.02)
    assert plan.parameter_server_traffic(n, 0, [10**6] * 100).sent_bytes / size_bytes == pytest.approx(63, rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan.naive_data_parallel_traffic(2, 2, [1]), "rank 2 .* ranks go from 0 to 1"),
        (lambda: plan.data_parallel_traffic(0, 0, [[1]]), "of 0"),
        (lambda: plan.parameter_server_traffic(2, 0, [1], master=-1), "master -1"),
        (lambda: plan.scatter_gather_traffic(2, 0, [1], -1, 1, 1), "none can be negative"),
        (lambda: plan.data_parallel_traffic(2, 0, [[3], [-1]]), r"\[3, -1\]"),
        (lambda: plan.data_parallel_traffic(2, 0, [[3]], -4), "-4 bytes an element"),
        (lambda: plan.sharded_traffic(4, 2, 0, [[3]]), "a stage is 1, 2 or 3"),
        (lambda: plan.sharded_traffic(0, 2, 0, [[3]]), "stage 0"),
        (lambda: plan.sharded_traffic(1, 2, 0, [[3]], num_microbatches=0), "0 micro-batches"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(MplabError, match=message):
        call()


def test_a_model_without_parameters_has_the_closing_message() -> None:
    assert plan.data_parallel_traffic(2, 0, []) == Traffic(2, 16, 2, 16)
    assert plan.sharded_traffic(3, 2, 0, []) == Traffic(2, 16, 2, 16)


# --- against the ledgers of real runs --------------------------------------------------------------------------------


def batch(num_samples: int = NUM_SAMPLES) -> Batch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_samples, SIZES[0], generator=generator)
    return inputs, torch.randint(SIZES[-1], (num_samples,), generator=generator)


def lengths_of(model: nn.Module) -> list[int]:
    return [p.numel() for p in model.parameters()]


def traffic_of(ledger: Ledger, begin: int = 0) -> Traffic:
    """What the ledger says since its message `begin`; it writes no number of messages received down."""
    messages = ledger.messages[begin:]
    sent = sum(m.num_messages for m in messages), sum(m.sent_bytes for m in messages)
    return Traffic(*sent, -1, sum(m.received_bytes for m in messages))


def assert_ledgers(world: World, begins: Sequence[int], want: Callable[[int], Traffic]) -> None:
    for ledger, begin in zip(world.ledgers, begins, strict=True):
        assert traffic_of(ledger, begin) == want(ledger.rank)._replace(num_received=-1)


def naive_step(rank: Rank, function: Callable[..., float], master: int | None, dtype: torch.dtype) -> int:
    """One step; the number of the first message in it."""
    model = MLP(SIZES).to(dtype)
    inputs, targets = batch()
    options = {} if master is None else {"master": master}
    begin = len(rank.comm.ledger.messages)
    function(model, torch.optim.SGD(model.parameters(), lr=0.1), (inputs.to(dtype), targets), rank.comm, **options)
    return begin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_naive_ways(n: int, dtype: torch.dtype) -> None:
    world, lengths, item = World(n, device="cpu"), lengths_of(MLP(SIZES)), dtype.itemsize
    master = n - 1
    begins = world.run(naive_step, naive_data.naive_data_parallel, None, dtype)
    assert_ledgers(world, begins, lambda rank: plan.naive_data_parallel_traffic(n, rank, lengths, item))
    begins = world.run(naive_step, naive_data.parameter_server, master, dtype)
    assert_ledgers(world, begins, lambda rank: plan.parameter_server_traffic(n, rank, lengths, item, master))
    begins = world.run(naive_step, naive_data.scatter_gather, master, dtype)
    sizes = (NUM_SAMPLES, SIZES[0] * item, SIZES[-1] * item)
    assert_ledgers(world, begins, lambda rank: plan.scatter_gather_traffic(n, rank, lengths, *sizes, item, master))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_buckets(n: int, bucket_bytes: int, overlap: bool) -> None:
    def run(rank: Rank) -> tuple[int, list[list[int]]]:
        strategy = DataParallel(MLP(SIZES), rank.comm, bucket_bytes, overlap, num_microbatches=2)
        begin = len(rank.comm.ledger.messages)
        strategy.step(batch())
        return begin, [[p.numel() for p in bucket.parameters] for bucket in strategy.buckets]

    world = World(n, device="cpu")
    begins, (buckets, *_) = zip(*world.run(run), strict=True)
    assert_ledgers(world, begins, lambda rank: plan.data_parallel_traffic(n, rank, buckets))
    assert sum(map(sum, buckets)) == sum(lengths_of(MLP(SIZES)))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_shards(n: int, num_microbatches: int, stage: int) -> None:
    def run(rank: Rank) -> int:
        strategy = ShardedDataParallel(MLP(SIZES), rank.comm, stage, num_microbatches=num_microbatches)
        begin = len(rank.comm.ledger.messages)
        strategy.step(batch())
        return begin

    world, of_layers = World(n, device="cpu"), [[p.numel() for p in layer.parameters()] for layer in MLP(SIZES)]
    begins = world.run(run)
    assert_ledgers(
        world, begins, lambda rank: plan.sharded_traffic(stage, n, rank, of_layers, num_microbatches=num_microbatches)
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("n", [2, 3])
def test_shards_of_tied_weights(n: int, num_microbatches: int, stage: int) -> None:
    def run(rank: Rank) -> int:
        strategy = ShardedDataParallel(chain(tied=True), rank.comm, stage, num_microbatches=num_microbatches)
        begin = len(rank.comm.ledger.messages)
        strategy.step(batches()[0])
        return begin

    world, model = World(n, device="cpu"), chain(tied=True)
    tied = model[0].weight
    of_layers = [[p.numel() for p in layer.parameters() if p is not tied] for layer in model]
    begins = world.run(run)
    assert_ledgers(
        world,
        begins,
        lambda rank: plan.sharded_traffic(stage, n, rank, of_layers, 8, num_microbatches, [tied.numel()]),
    )
