"""Data parallelism as one writes it first: it trains as `Serial` does, and sends what its formula says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from data_parallel import (
    MODELS,
    NUM_STEPS,
    OPTIMIZERS,
    TOLERANCES,
    Trained,
    assert_trained_alike,
    batches,
    follow,
    model,
    serial,
)
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn

from mplab import CollectiveMismatch, MplabError, World
from mplab.datasets import Batch
from mplab.models import cross_entropy
from mplab.parallel import naive_data_parallel, parameter_server, scatter_gather
from mplab.plan.data import naive_data_parallel_traffic, parameter_server_traffic, scatter_gather_traffic
from mplab.plan.traffic import Traffic, chunk_lengths, direct_traffic
from mplab.world import Rank

Step = Callable[..., float]
WAYS: dict[str, Step] = {step.__name__: step for step in (naive_data_parallel, parameter_server, scatter_gather)}
# Of these every sum has the order of serial training; `scatter_gather` takes the loss of the whole batch at once.
TO_THE_BIT = ("naive_data_parallel", "parameter_server")


def train(
    rank: Rank,
    way: str,
    variant: str = "plain",
    optimizer: str = "sgd",
    dtype: torch.dtype = torch.float64,
    data: tuple[Batch, ...] = batches(),
    seed: int = 0,
    **options: Any,
) -> Trained:
    """What a rank runs: all of its steps, of a model of its own."""
    mine = model(variant, dtype, seed)
    own = OPTIMIZERS[optimizer](mine.parameters())
    return follow(lambda batch: WAYS[way](mine, own, batch, rank.comm, **options), mine, data)


def run(num_ranks: int, *args: Any, **options: Any) -> list[Trained]:
    return World(num_ranks, "cpu").run(lambda rank: train(rank, *args, **options))


# --- it trains as serial training does -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_ten_steps_equal_serial_training(way: str, variant: str) -> None:
    """On 1 to 4 ranks, of 11 samples; the master has all of it, and the others what they are sent.

    Every model on every number of ranks, each with one of the optimizers; with "branch" it is the other one. All ways
    have all numbers of ranks of two models, and half of them of the others: another half for another way.
    """
    index = [*WAYS].index(way) + [*MODELS].index(variant)
    numbers = (1, 2, 3, 4) if variant in ("plain", "branch") else ((1, 4), (2, 3))[index % 2]
    runs = [(n, ("adamw", "sgd")[(n + (variant == "branch")) % 2], torch.float64) for n in numbers]
    if variant == "conv":
        runs += [(3, "adamw", torch.float32), (2, "sgd", torch.float32)]
    for n, optimizer, dtype in runs:
        want = serial(variant, optimizer, n, dtype)
        assert len(want.losses) == 10
        of_ranks = run(n, way, variant, optimizer, dtype)
        assert_trained_alike(of_ranks[0], want, 0.0 if way in TO_THE_BIT else TOLERANCES[dtype])
        for got in of_ranks[1:]:
            assert got.losses == of_ranks[0].losses
            if way == "naive_data_parallel":
                assert_trained_alike(got, want)
            elif way == "parameter_server":
                assert_same_weights(got, of_ranks[0])
            else:  # they hear of an update at the next step
                before = Trained([], [], of_ranks[0].weights[:-1])
                assert_same_weights(Trained([], [], got.weights[1:]), before)


def assert_same_weights(got: Trained, want: Trained) -> None:
    for mine, theirs in zip(got.weights, want.weights, strict=True):
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("way", WAYS)
def test_fewer_samples_than_ranks(way: str) -> None:
    """A rank without samples has no loss and no gradient, and counts as none."""
    for num_samples, n in ((1, 3), (2, 4), (3, 4)):
        want = serial("branch", "adamw", n, num_samples=num_samples)
        got = run(n, way, "branch", "adamw", data=batches(num_samples))
        assert_trained_alike(got[0], want, 0.0 if way in TO_THE_BIT else 1e-10)


@pytest.mark.parametrize("way", ["parameter_server", "scatter_gather"])
def test_any_rank_can_be_the_master(way: str) -> None:
    for n, master in ((2, 1), (4, 2)):
        got = run(n, way, "conv", "adamw", master=master)
        assert_trained_alike(got[master], serial("conv", "adamw", n), 0.0 if way in TO_THE_BIT else 1e-10)


def test_what_others_start_from_is_overwritten_by_the_master() -> None:
    """Weights and buffers; and what the others give as a batch is not looked at."""

    def work(rank: Rank) -> Trained:
        norm = nn.BatchNorm1d(3, affine=False).double().eval()
        norm.running_mean.fill_(rank.index)
        mine = nn.Sequential(*model(seed=rank.index), norm)
        own = OPTIMIZERS["sgd"](mine.parameters())

        def step(batch: Batch) -> float:
            return scatter_gather(mine, own, batch if rank.index == 1 else None, rank.comm, master=1)

        return follow(step, mine, batches())

    first, second = World(2, "cpu").run(work)
    for name, value in second.weights[-2].items():
        assert not torch.equal(first.weights[0][name], value) or name.endswith(("var", "tracked"))
        assert torch.equal(first.weights[-1][name], value)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_of_ones_own(way: str) -> None:
    """A wrong scale would show: half the loss is half the gradient."""

    def half(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) / 2

    got = run(3, way, loss_fn=half)[0]
    want = serial()
    assert got.losses[0] == pytest.approx(want.losses[0] / 2, abs=1e-12)
    for name, gradient in want.gradients[0].items():
        torch.testing.assert_close(got.gradients[0][name], gradient / 2, rtol=0, atol=1e-12)


# --- what it sends ---------------------------------------------------------------------------------------------------


def calls(way: str, sizes: list[int], item_bytes: int, n: int, num_samples: int) -> Iterator[tuple[str, list[int]]]:
    """Every call of a step, and the bytes of each rank's block; all parameters are trained."""
    inputs, outputs = 3 * 8, 3 * 7 * item_bytes  # of a sample
    shares = chunk_lengths(num_samples, n)
    closing = "all_reduce_", [8 * length for length in chunk_lengths(2 + len(sizes), n)]
    if way == "naive_data_parallel":
        yield from (("all_reduce", [item_bytes * length for length in chunk_lengths(size, n)]) for size in sizes)
        yield closing
        return
    weights = [("broadcast", [item_bytes * size] * n) for size in sizes]
    if way == "scatter_gather":
        yield from weights
        yield "scatter", [inputs * share for share in shares]
        yield "gather", [outputs * share for share in shares]
        yield "scatter", [outputs * share for share in shares]
    yield from (("reduce", [item_bytes * size] * n) for size in sizes)
    yield closing
    if way == "parameter_server":
        yield from weights


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_call_and_its_bytes(way: str, n: int) -> None:
    for dtype, num_samples in ((torch.float32, 11), (torch.float64, 2)):
        sizes = [p.numel() for p in model(dtype=dtype).parameters()]
        expected = list(calls(way, sizes, dtype.itemsize, n, num_samples))
        world = World(n, "cpu")
        world.run(lambda rank, dtype, data: train(rank, way, dtype=dtype, data=data), dtype, batches(num_samples, 1))
        for rank, ledger in enumerate(world.ledgers):
            got = [(m.op, m.num_messages, m.sent_bytes, m.received_bytes) for m in ledger.messages]
            want = []
            for name, block_bytes in expected:
                sent = direct_traffic(name, rank, block_bytes, None if name.startswith("all_reduce") else 0)
                want.append((name, sent.num_sent, sent.sent_bytes, sent.received_bytes))
            assert got == want
            sample = (num_samples, 3 * 8, 3 * 7 * dtype.itemsize) if way == "scatter_gather" else ()
            total = FORMULAS[way](n, rank, sizes, *sample, item_bytes=dtype.itemsize)
            assert total[:2] == (ledger.num_messages, ledger.sent_bytes)
            assert total.received_bytes == ledger.received_bytes


FORMULAS: dict[str, Callable[..., Traffic]] = {
    "naive_data_parallel": naive_data_parallel_traffic,
    "parameter_server": parameter_server_traffic,
    "scatter_gather": scatter_gather_traffic,
}


def test_frozen_parameters_are_not_sent() -> None:
    """But by `scatter_gather`, which sends the whole model each time."""
    num_parameters = len(list(model("frozen").parameters()))
    num_trained = sum(p.requires_grad for p in model("frozen").parameters())
    for way, counts in {
        "naive_data_parallel": {"all_reduce": num_trained, "all_reduce_": 1},
        "parameter_server": {"reduce": num_trained, "all_reduce_": 1, "broadcast": num_trained},
        "scatter_gather": {"reduce": num_trained, "all_reduce_": 1, "broadcast": num_parameters},
    }.items():
        world = World(2, "cpu")
        world.run(lambda rank, way: train(rank, way, "frozen", data=batches()[:1]), way)
        assert {op: len(world.ledgers[0].of(op)) for op in counts} == counts


def test_the_timeline_shows_the_parts_of_a_step() -> None:
    for way, extra in {"naive_data_parallel": 1, "parameter_server": 0, "scatter_gather": 0}.items():
        world = World(2, "cpu")
        world.run(lambda rank, way: train(rank, way), way)
        names = [e.name for e in world.timeline.events if e.lane == "compute" and e.rank == 1]
        assert names.count("forward") == names.count("backward") == NUM_STEPS
        assert names.count("update") == extra * NUM_STEPS


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(4, 3).long(), torch.zeros(3, 3).long()), "^4 inputs and 3 targets: a batch needs as many of"),
        ((torch.zeros(0, 3).long(), torch.zeros(0, 3).long()), "^a batch without samples can't be shared out"),
    ],
)
def test_batches_that_are_refused_before_any_message(way: str, batch: Batch, message: str) -> None:
    world = World(2, "cpu")
    with pytest.raises(MplabError, match=message):
        world.run(lambda rank: train(rank, way, data=(batch,)))
    assert [ledger.messages for ledger in world.ledgers] == [[], []]


@pytest.mark.parametrize("way", ["parameter_server", "scatter_gather"])
@pytest.mark.parametrize("master", [-1, 2])
def test_a_master_that_is_no_rank_is_refused_before_any_message(way: str, master: int) -> None:
    world = World(2, "cpu")
    with pytest.raises(MplabError, match=rf"^master={master} is no rank of this group of 2: ranks go from 0 to 1"):
        world.run(lambda rank: train(rank, way, master=master))
    assert [ledger.messages for ledger in world.ledgers] == [[], []]


def test_a_master_without_a_batch_is_refused() -> None:
    with pytest.raises(MplabError, match=r"^rank 1 is the master and has no batch"):
        World(2, "cpu").run(lambda rank: train(rank, "scatter_gather", data=(None,), master=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("way", TO_THE_BIT)
@pytest.mark.parametrize("lengths", [(4, 5), (5, 4), (6, 5, 5), (4, 8, 4), (1, 2, 3)])
def test_batches_of_different_lengths_are_found_by_a_rank_before_it_updates(way: str, lengths: tuple[int, ...]) -> None:
    updated = [False] * len(lengths)
    found = [False] * len(lengths)

    def work(rank: Rank) -> None:
        mine = model()
        own = OPTIMIZERS["sgd"](mine.parameters())
        try:
            WAYS[way](mine, own, batches(lengths[rank.index])[0], rank.comm)
        except MplabError as error:
            found[rank.index] = type(error) is MplabError  # and no PeerFailure
            raise
        finally:
            updated[rank.index] = bool(own.state)

    with pytest.raises(MplabError, match=r"^rank \d was given a batch of \d samples, and the \d ranks have \d+ toge"):
        World(len(lengths), "cpu").run(work)
    assert any(found)
    assert not any(f and u for f, u in zip(found, updated, strict=True))


@pytest.mark.parametrize("way", TO_THE_BIT)
def test_models_of_different_shapes_are_found(way: str) -> None:
    with pytest.raises(CollectiveMismatch, match="differs between ranks"):
        World(2, "cpu").run(lambda rank: train(rank, way, ["plain", "branch"][rank.index]))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda x: x.mean(), r"^\d samples gave outputs of shape \(\): to be gathered they must be one tensor"),
        (lambda x: x[:1], r"^\d samples gave outputs of shape \(1, 3, 7\)"),
        (lambda x: (x, x), r"^\d samples gave outputs in a tuple"),
    ],
)
def test_outputs_that_cannot_be_gathered_are_refused(head: Callable[[Tensor], Any], message: str) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model()

        def forward(self, ids: Tensor) -> Any:
            return head(self.body(ids))

    def work(rank: Rank) -> None:
        mine = Headed()
        scatter_gather(mine, OPTIMIZERS["sgd"](mine.parameters()), batches()[0], rank.comm)

    with pytest.raises(MplabError, match=message):
        World(2, "cpu").run(work)
