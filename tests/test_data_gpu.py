"""Data parallelism on CUDA streams: ranks of one GPU train as one process on the CPU does, and reduce on the side.

Skipped where there is no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import data_parallel as dp
import pytest
import torch
from data_parallel import OPTIMIZERS, Trained, assert_trained_alike, batches, follow, serial
from limits import at_most
from limits import leaves_nothing_behind as leaves_nothing_behind
from limits import memory_comes_back as memory_comes_back
from torch import Tensor, nn

from mplab import World
from mplab.datasets import Batch
from mplab.errors import NonFiniteGradient
from mplab.models import GPT, GPTConfig, cross_entropy, seed_parameters
from mplab.parallel import DataParallel, Serial
from mplab.world import Rank

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-9  # a GPU adds up in another order
NUM_STEPS = 4


def streams(n: int) -> World:
    return World(n, device="cuda:0")


def on_host(trained: Trained) -> Trained:
    gradients = [{name: None if g is None else g.cpu() for name, g in of_step.items()} for of_step in trained.gradients]
    return Trained(trained.losses, gradients, [{k: w.cpu() for k, w in of_step.items()} for of_step in trained.weights])


def train(n: int, variant: str, optimizer: str, data: Sequence[Batch], **options: Any) -> list[Trained]:
    """With the batch and the model on the CPU: the copy that is trained is on the GPU."""

    def work(rank: Rank) -> Trained:
        start = dp.model(variant, seed=rank.index)
        engine = DataParallel(start, rank.comm, optimizer=OPTIMIZERS[optimizer], **options)
        assert all(p.is_cuda for p in engine.model.parameters())
        got = follow(engine.step, engine.model, data)
        assert all(p.grad is None or p.grad.is_cuda for p in engine.model.parameters())
        return on_host(got)

    return streams(n).run(work)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("variant", dp.MODELS)
def test_streams_train_as_one_cpu_does(variant: str, num_ranks: int) -> None:
    data = batches(num_batches=NUM_STEPS)
    want = serial(variant, "adamw", num_ranks, num_steps=NUM_STEPS)
    for options in ({"bucket_bytes": 1}, {"bucket_bytes": 200, "overlap": False}, {"num_microbatches": 2}):
        of_ranks = train(num_ranks, variant, "adamw", data, **options)
        for got in of_ranks:
            assert got.losses == of_ranks[0].losses
            assert_trained_alike(got, want, TOLERANCE)
            for name, weight in got.weights[-1].items():
                assert torch.equal(weight, of_ranks[0].weights[-1][name]), "equal bits on every rank"


@pytest.mark.parametrize("num_samples", [1, 3])
def test_fewer_samples_than_streams_and_clipping(num_samples: int) -> None:
    options = {"max_norm": 0.5, "bucket_bytes": 200}
    want = serial("branch", "sgd", 4, num_samples=num_samples, num_steps=NUM_STEPS, max_norm=0.5)
    for got in train(4, "branch", "sgd", batches(num_samples, NUM_STEPS), **options):
        assert_trained_alike(got, want, TOLERANCE)


@pytest.mark.parametrize("overlap", [True, False])
def test_larger_gradients_that_a_stream_still_writes(overlap: bool) -> None:
    """Of some megabytes, so that a stream is behind its host when they are handed on; above and below SMALL_BYTES."""
    config = GPTConfig(vocab_size=500, context_length=64, num_layers=4, num_heads=4, width=256, tied=True)
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(500, (16, 64), generator=generator) for _ in range(6)]
    data = list(zip(draw[::2], draw[1::2], strict=True))
    with torch.random.fork_rng(devices=[]):
        start = GPT(config).double()
    seed_parameters(start)
    mine = GPT(config).double().cuda()
    mine.load_state_dict(start.state_dict())
    trained = Serial(mine, OPTIMIZERS["sgd"](mine.parameters()))
    losses = [trained.step(batch) for batch in data]
    want = {name: weight.cpu() for name, weight in mine.state_dict().items()}

    def work(rank: Rank, bucket_bytes: int) -> dict[str, Tensor]:
        options = {"bucket_bytes": bucket_bytes, "overlap": overlap, "optimizer": OPTIMIZERS["sgd"]}
        engine = DataParallel(start, rank.comm, **options)
        got = []
        for batch in data:
            if rank.index % 2:
                torch.cuda._sleep(2_000_000)  # this stream is late
            got.append(engine.step(batch))
        assert got == pytest.approx(losses, abs=TOLERANCE)
        return {name: weight.cpu() for name, weight in engine.state_dict().items()}

    for bucket_bytes in (1, 1 << 20, 25 << 20):
        for weights in streams(4).run(work, bucket_bytes):
            torch.testing.assert_close(weights, want, rtol=0, atol=TOLERANCE)


class Slow(nn.Module):
    """Layers whose backward holds the stream that it runs on."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = Held.apply(torch.tanh(layer(x)))
        return x


class Held(torch.autograd.Function):
    """x; its backward takes some milliseconds of its stream."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        torch.cuda._sleep(10_000_000)
        return gradient


def reductions(overlap: bool) -> list[list[tuple[str, float, float]]]:
    """Of every rank and its last step: backward, and the messages of the buckets, on the device's clock."""
    with torch.random.fork_rng(devices=[]):
        start = Slow(6)
    x = torch.ones(4, 1024)
    loss: Any = lambda outputs, targets: (outputs - targets).square().mean()  # noqa: E731
    world = streams(2)
    options = {"overlap": overlap, "bucket_bytes": 1, "loss_fn": loss, "optimizer": OPTIMIZERS["sgd"]}
    engines = world.run(lambda rank: DataParallel(start, rank.comm, **options))

    def work(rank: Rank) -> None:
        engines[rank.index].connect(rank.comm)
        engines[rank.index].step((x, x))

    world.run(work)
    world.run(work)
    kept = ("backward", "all_reduce_coalesced_")
    return [
        [(e.name, e.start_s, e.end_s) for e in world.timeline.events if e.rank == rank and e.name in kept]
        for rank in range(2)
    ]


def test_buckets_are_reduced_on_a_side_stream_while_backward_goes_on() -> None:
    """By the device's clock all but the first layers' messages are over before backward is."""
    for events in reductions(overlap=True):
        ((_, _, end),) = [e for e in events if e[0] == "backward"]
        early = [e for e in events if e[0] == "all_reduce_coalesced_" and e[2] < end]
        assert early, "no bucket was reduced before backward ended"


def test_without_overlap_no_bucket_is_reduced_before_backward_ends() -> None:
    for events in reductions(overlap=False):
        ((_, _, end),) = [e for e in events if e[0] == "backward"]
        assert all(e[1] >= end for e in events if e[0] == "all_reduce_coalesced_")


def test_backward_runs_on_the_ranks_stream_and_the_reductions_on_another() -> None:
    seen: dict[int, set[int]] = {0: set(), 1: set()}

    def work(rank: Rank) -> int:
        start, reduce = rank.comm.iall_reduce_coalesced_, seen[rank.index]

        def watched(xs: Sequence[Tensor], op: str = "sum") -> Any:
            reduce.add(torch.cuda.current_stream().cuda_stream)
            return start(xs, op)

        rank.comm.iall_reduce_coalesced_ = watched  # type: ignore[method-assign]
        engine = DataParallel(dp.model(), rank.comm, bucket_bytes=200, optimizer=OPTIMIZERS["sgd"])
        engine.step(batches()[0])
        return torch.cuda.current_stream().cuda_stream

    own = streams(2).run(work)
    assert [len(streams_of) for streams_of in seen.values()] == [1, 1]
    assert len({*own, *seen[0], *seen[1]}) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["0.weight", "4.bias"])
def test_a_nan_or_inf_of_one_stream_changes_no_weight_of_any(name: str, bad: float) -> None:
    engines: dict[int, DataParallel] = {}

    def work(rank: Rank) -> None:
        engine = engines[rank.index] = DataParallel(dp.model(), rank.comm, 200, optimizer=OPTIMIZERS["sgd"])
        if rank.index == 1:
            engine.model.get_parameter(name).register_hook(lambda gradient: gradient * bad)
        engine.step(batches()[0])

    message = rf"^rank 1, step 0: the gradient of {name} has a NaN or an Inf"
    with at_most(20), pytest.raises(NonFiniteGradient, match=message):
        streams(3).run(work)
    want = dp.model().state_dict()
    for engine in engines.values():
        for weight_name, weight in engine.state_dict().items():
            assert torch.equal(weight.cpu(), want[weight_name])
    engines.clear()


def test_autocast_on_streams() -> None:
    """bfloat16 products, float32 gradients; near to what float32 gives, and the same bits on every rank."""

    def work(rank: Rank) -> list[Any]:
        start = dp.model(dtype=torch.float32)
        engine = DataParallel(start, rank.comm, autocast=torch.bfloat16, optimizer=OPTIMIZERS["sgd"])
        losses = [engine.step(batch) for batch in batches(num_batches=NUM_STEPS)]
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in engine.model.parameters() if p.grad is not None)
        return [losses, {name: weight.cpu() for name, weight in engine.state_dict().items()}]

    want = serial("plain", "sgd", 2, torch.float32, num_steps=NUM_STEPS)
    first, second = streams(2).run(work)
    assert first[0] == second[0] == pytest.approx(want.losses, abs=0.05)
    assert first[0] != want.losses
    assert all(torch.equal(weight, second[1][name]) for name, weight in first[1].items())


def test_it_goes_on_in_another_run_of_streams() -> None:
    """Its tensors come from streams that are gone."""
    want = serial("tied", "adamw", 4, num_steps=NUM_STEPS)
    world = streams(4)
    options = {"optimizer": OPTIMIZERS["adamw"], "bucket_bytes": 200}
    engines = world.run(lambda rank: DataParallel(dp.model("tied"), rank.comm, **options))

    def go_on(rank: Rank, step: int) -> float:
        engines[rank.index].connect(rank.comm)
        return engines[rank.index].step(batches(num_batches=NUM_STEPS)[step])

    losses = [world.run(go_on, step)[3] for step in range(NUM_STEPS)]
    assert losses == pytest.approx(want.losses, abs=TOLERANCE)
    for engine in engines:
        got = {name: weight.cpu() for name, weight in engine.state_dict().items()}
        torch.testing.assert_close(got, want.weights[-1], rtol=0, atol=TOLERANCE)
    engines.clear()


def test_ones_own_loop_on_streams() -> None:
    def work(rank: Rank) -> dict[str, Tensor]:
        engine = DataParallel(dp.model(), rank.comm, bucket_bytes=200, optimizer=OPTIMIZERS["sgd"])
        for batch in batches(num_batches=NUM_STEPS):
            inputs, targets = (x.tensor_split(rank.size)[rank.index].to(rank.device) for x in batch)
            engine.optimizer.zero_grad()
            engine.backward(cross_entropy(engine.model(inputs), targets) * (len(inputs) / len(batch[0])))
            engine.optimizer.step()
        return {name: weight.cpu() for name, weight in engine.state_dict().items()}

    want = serial("plain", "sgd", 2, num_steps=NUM_STEPS)
    for weights in streams(2).run(work):
        torch.testing.assert_close(weights, want.weights[-1], rtol=0, atol=TOLERANCE)
