"""DataParallel: every step as serial training's, whatever the buckets, and what ranks that disagree are told."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import data_parallel as dp
import pytest
import torch
import torch.utils.checkpoint
from data_parallel import OPTIMIZERS, Trained, assert_trained_alike, batches, follow
from limits import at_most
from limits import leaves_nothing_behind as leaves_nothing_behind
from test_equivalence_hugging_face import hugging_face
from torch import Tensor, nn

from mplab import Deadlock, Link, MplabError, World
from mplab.datasets import Batch, shard
from mplab.errors import NonFiniteGradient, PeerFailure
from mplab.models import GPT, GPTConfig, cross_entropy, seed_parameters
from mplab.parallel import DataParallel
from mplab.world import Rank

Step = Callable[[DataParallel, Batch], float]

FEW = 4  # steps, where ten would show no more: with momentum, and with what "branch" uses in each of three


def serial(*args: Any, num_steps: int = FEW, **options: Any) -> Trained:
    return dp.serial(*args, num_steps=num_steps, **options)


def whole(engine: DataParallel, batch: Batch) -> float:
    return engine.step(batch)


def train(
    world: World,
    start: Callable[[int], nn.Module],
    optimizer: str = "sgd",
    data: Sequence[Batch] = batches(num_batches=FEW),
    step: Step = whole,
    **options: Any,
) -> list[Trained]:
    """Every rank's training, of the model that `start` makes for it."""

    def work(rank: Rank) -> Trained:
        engine = DataParallel(start(rank.index), rank.comm, optimizer=OPTIMIZERS[optimizer], **options)
        return follow(lambda batch: step(engine, batch), engine.model, data)

    return world.run(work)


def of_variant(
    variant: str,
    optimizer: str,
    n: int,
    dtype: torch.dtype = torch.float64,
    num_samples: int = dp.NUM_SAMPLES,
    num_steps: int = FEW,
    **options: Any,
) -> list[Trained]:
    """Ranks that begin with different weights."""
    start = lambda rank: dp.model(variant, dtype, seed=rank)  # noqa: E731
    return train(World(n, "cpu"), start, optimizer, batches(num_samples, num_steps), **options)


def by_hand(
    model: nn.Module,
    optimizer: str = "sgd",
    data: Sequence[Batch] = batches(num_batches=FEW),
    lengths: Callable[[int], Sequence[int]] = lambda num_samples: [num_samples],
    loss_fn: Any = cross_entropy,
    autocast: torch.dtype | None = None,
) -> Trained:
    """Serial training of parts of these lengths, for what `Serial` has no setting for."""
    mine = OPTIMIZERS[optimizer](model.parameters())

    def step(batch: Batch) -> float:
        mine.zero_grad()
        total, num_samples = 0.0, len(batch[0])
        for inputs, targets in zip(*(x.split(list(lengths(num_samples))) for x in batch), strict=True):
            if len(inputs):
                with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                    loss = loss_fn(model(inputs), targets) * (len(inputs) / num_samples)
                loss.backward()
                total += float(loss.detach())
        mine.step()
        return total

    with dp.one_thread():
        return follow(step, model, data)


def shards(n: int) -> Callable[[int], list[int]]:
    return lambda num_samples: [len(part) for part in torch.empty(num_samples).tensor_split(n)]


def assert_all_alike(of_ranks: Sequence[Trained], want: Trained, tolerance: float = 0.0) -> None:
    for got in of_ranks:
        assert got.losses == of_ranks[0].losses, "the same number on every rank"
        assert_trained_alike(got, want, tolerance)


# --- it trains as serial training does -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", dp.MODELS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_it_is_serial_training_to_the_bit(variant: str, num_ranks: int) -> None:
    """Every model on every number of ranks, each of both with both optimizers."""
    optimizer = ("sgd", "adamw")[([*dp.MODELS].index(variant) + num_ranks) % 2]
    want = serial(variant, optimizer, num_ranks, torch.float32, num_steps=dp.NUM_STEPS)
    assert len(want.losses) == 10
    got = of_variant(variant, optimizer, num_ranks, torch.float32, num_steps=dp.NUM_STEPS, bucket_bytes=200)
    assert_all_alike(got, want)


@pytest.mark.parametrize("variant", dp.MODELS)
@pytest.mark.parametrize(("bucket_bytes", "overlap"), [(1, True), (1, False), (200, False), (25 << 20, True)])
def test_neither_buckets_nor_overlap_change_a_bit(variant: str, bucket_bytes: int, overlap: bool) -> None:
    got = of_variant(variant, "sgd", 3, bucket_bytes=bucket_bytes, overlap=overlap)
    assert_all_alike(got, serial(variant, "sgd", 3))


@pytest.mark.parametrize("variant", dp.MODELS)
def test_micro_batches_add_up_to_their_shard(variant: str) -> None:
    """On four ranks of 11 samples some shards have fewer than three."""
    more = [*dp.MODELS].index(variant) % 2
    for n, overlap, num_microbatches in ((1, True, 2 + more), (3, False, 3 - more), (4, True, 3 - more)):
        got = of_variant(variant, "adamw", n, num_microbatches=num_microbatches, overlap=overlap, bucket_bytes=200)
        assert_all_alike(got, serial(variant, "adamw", n), 1e-10)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 8])
def test_any_number_of_samples_even_fewer_than_ranks(num_samples: int) -> None:
    for variant, num_microbatches in (("plain", 1), ("branch", 1), ("branch", 2)):
        options = {"num_microbatches": num_microbatches, "bucket_bytes": 200}
        got = of_variant(variant, "adamw", 4, num_samples=num_samples, **options)
        assert_all_alike(
            got, serial(variant, "adamw", 4, num_samples=num_samples), 0 if num_microbatches == 1 else 1e-10
        )


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_gradients_longer_than_max_norm_are_scaled_down(num_ranks: int) -> None:
    """Over all parameters and all ranks: clipping each rank's own, or each bucket's, would show."""
    free, want = serial("used twice", "sgd", num_ranks), serial("used twice", "sgd", num_ranks, max_norm=0.5)
    assert not torch.equal(free.weights[1]["0.weight"], want.weights[1]["0.weight"])
    for bucket_bytes in (1, 25 << 20):
        assert_all_alike(of_variant("used twice", "sgd", num_ranks, max_norm=0.5, bucket_bytes=bucket_bytes), want)
    assert_all_alike(of_variant("plain", "sgd", num_ranks, max_norm=1e9), serial("plain", "sgd", num_ranks))


@pytest.mark.parametrize("variant", ["plain", "conv", "tied", "branch"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_autocast_is_autocast_of_each_shard(variant: str, num_ranks: int) -> None:
    start = dp.model(variant, torch.float32)
    want = by_hand(copy.deepcopy(start), lengths=shards(num_ranks), autocast=torch.bfloat16)
    plain = by_hand(copy.deepcopy(start), lengths=shards(num_ranks))
    assert want.losses != plain.losses
    got = train(World(num_ranks, "cpu"), lambda rank: start, autocast=torch.bfloat16)
    assert_all_alike(got, want)
    assert all(g is None or g.dtype == torch.float32 for g in got[0].gradients[0].values())


@pytest.mark.parametrize(
    "lengths", [(11,), (4, 7), (7, 4), (0, 11), (11, 0), (5, 0, 6), (0, 0, 11), (1, 2, 3, 5), (10, 0, 0, 1)]
)
def test_ranks_that_bring_their_own_samples(lengths: tuple[int, ...]) -> None:
    """In `branch` a rank without samples is not alone in having no gradient for a layer."""

    def step(engine: DataParallel, batch: Batch) -> float:
        mine = [x.split(list(lengths))[engine.comm.rank] for x in batch]
        return engine.step_shard((mine[0], mine[1]))

    for variant in ("plain", "branch"):
        want = by_hand(dp.model(variant), "adamw", lengths=lambda _: lengths)
        start = lambda rank, variant=variant: dp.model(variant, seed=rank)  # noqa: E731
        assert_all_alike(train(World(len(lengths), "cpu"), start, "adamw", step=step, bucket_bytes=200), want)


def test_shards_of_another_total_each_step() -> None:
    def step(engine: DataParallel, batch: Batch) -> float:
        return engine.step_shard(shard(batch, engine.comm))

    data = [batches(num_samples)[0] for num_samples in (3, 11, 1, 6)]
    want = by_hand(dp.model(), data=data, lengths=shards(3))
    assert_all_alike(train(World(3, "cpu"), lambda rank: dp.model(), data=data, step=step), want)


# --- a loop of one's own ---------------------------------------------------------------------------------------------


def share_of(engine: DataParallel, mine: Batch, num_samples: int) -> Tensor:
    return cross_entropy(engine.model(mine[0]), mine[1]) * (len(mine[0]) / num_samples)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_backward_in_a_loop_of_ones_own(num_ranks: int, overlap: bool) -> None:
    def step(engine: DataParallel, batch: Batch) -> float:
        engine.optimizer.zero_grad()
        share = share_of(engine, shard(batch, engine.comm), len(batch[0]))
        engine.backward(share)
        engine.optimizer.step()
        return float(engine.comm.all_reduce(share.detach()))

    for variant in ("tied", "branch", "unused", "frozen"):
        start = lambda rank, variant=variant: dp.model(variant, seed=rank)  # noqa: E731
        got = train(World(num_ranks, "cpu"), start, "adamw", step=step, overlap=overlap, bucket_bytes=200)
        assert_all_alike(got, serial(variant, "adamw", num_ranks))


def test_gradients_of_no_sync_are_reduced_with_the_next_ones() -> None:
    """Two parts, the first without a message; before the second one the ranks' gradients are their own."""
    counts: list[list[int]] = [[], []]
    own: list[list[Tensor | None]] = [[], []]

    def step(engine: DataParallel, batch: Batch) -> float:
        comm, num_samples = engine.comm, len(batch[0])
        inputs, targets = shard(batch, comm)
        engine.optimizer.zero_grad()
        before = len(comm.ledger.messages)
        with engine.no_sync():
            with engine.no_sync():  # once more inside ends with the outer one
                pass
            engine.backward(first := share_of(engine, (inputs[:2], targets[:2]), num_samples))
        counts[comm.rank].append(len(comm.ledger.messages) - before)
        own[comm.rank].append(engine.model.head.weight.grad.clone())  # type: ignore[union-attr]
        engine.backward(second := share_of(engine, (inputs[2:], targets[2:]), num_samples))
        counts[comm.rank].append(len(comm.ledger.messages) - before)
        engine.optimizer.step()
        return float(comm.all_reduce((first + second).detach()))

    got = train(World(2, "cpu"), lambda rank: dp.model("branch"), step=step, bucket_bytes=1)
    assert_all_alike(got, serial("branch", "sgd", 2), 1e-10)
    num_buckets = len(list(dp.model("branch").parameters()))
    assert counts == [[0, num_buckets + 1] * FEW] * 2
    assert all(not torch.equal(a, b) for a, b in zip(*own, strict=True))  # type: ignore[arg-type]


def test_a_step_inside_of_no_sync_is_refused() -> None:
    """Each rank would update by its own gradients, and no message would say so."""

    def work(rank: Rank) -> None:
        engine = DataParallel(dp.model(), rank.comm, optimizer=OPTIMIZERS["sgd"])
        with engine.no_sync():
            engine.step(batches()[0])

    with pytest.raises(MplabError, match=r"^step inside no_sync\(\): .* call backward there"):
        World(2, "cpu").run(work)


def test_no_sync_ends_with_an_error_too() -> None:
    def work(rank: Rank) -> int:
        engine = DataParallel(dp.model(), rank.comm, optimizer=OPTIMIZERS["sgd"])
        with pytest.raises(ZeroDivisionError), engine.no_sync():
            raise ZeroDivisionError
        before = len(rank.comm.ledger.messages)
        engine.backward(share_of(engine, shard(batches()[0], rank.comm), 11))
        return len(rank.comm.ledger.messages) - before

    assert World(2, "cpu").run(work) == [2, 2]


# --- worlds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"rendezvous": True}, {"link": Link(1e-5, 1e10)}], ids=["rendezvous", "link"])
def test_it_trains_alike_in_every_world(options: dict[str, Any]) -> None:
    world = World(3, "cpu", **options)
    got = train(world, lambda rank: dp.model("branch", seed=rank), "adamw", bucket_bytes=200)
    assert_all_alike(got, serial("branch", "adamw", 3))


def test_it_goes_on_in_another_run() -> None:
    """With another communicator, whose ledger alone counts from then on."""
    world, want = World(3, "cpu"), serial("tied", "adamw", 3, num_steps=10)
    make = lambda rank: DataParallel(dp.model("tied", seed=rank.index), rank.comm, optimizer=OPTIMIZERS["adamw"])  # noqa: E731
    engines = world.run(make)
    losses = []
    for first, end in ((0, 4), (4, 10)):

        def go_on(rank: Rank, first: int = first, end: int = end) -> list[float]:
            engines[rank.index].connect(rank.comm)
            return [engines[rank.index].step(batch) for batch in batches()[first:end]]

        losses += world.run(go_on)[2]
        assert [len(ledger.messages) for ledger in world.ledgers] == [2 * (end - first)] * 3
    assert losses == pytest.approx(want.losses, abs=1e-12)
    for engine in engines:
        assert engine.num_steps == 10
        for name, weight in engine.state_dict().items():
            assert torch.equal(weight, want.weights[-1][name])


def test_it_cannot_go_on_as_another_rank() -> None:
    world = World(2, "cpu")
    engines = world.run(lambda rank: DataParallel(dp.model(), rank.comm))
    with pytest.raises(MplabError, match=r"connect to rank \d of 2: this is rank \d of 2"):
        world.run(lambda rank: engines[1 - rank.index].connect(rank.comm))
    with pytest.raises(MplabError, match=r"connect to rank 0 of 1: this is rank 0 of 2"):
        World(1, "cpu").run(lambda rank: engines[0].connect(rank.comm))


def test_the_state_is_the_models_own() -> None:
    def work(rank: Rank) -> dict[str, Tensor]:
        engine = DataParallel(dp.model("tied", seed=rank.index), rank.comm, optimizer=OPTIMIZERS["sgd"])
        engine.step(batches()[0])
        before = len(rank.comm.ledger.messages)
        state = engine.state_dict()
        assert len(rank.comm.ledger.messages) == before
        dp.model("tied").load_state_dict(state, strict=True)
        return state

    first, second = World(2, "cpu").run(work)
    want = serial("tied", "sgd", 2).weights[1]
    assert list(first) == list(second) == list(want)
    assert all(torch.equal(first[name], want[name]) and torch.equal(second[name], want[name]) for name in want)


def test_the_model_that_was_given_is_never_changed() -> None:
    """All ranks may be given the same one."""
    start = dp.model("tied")
    start.register_buffer("count", torch.zeros(()))
    start(batches()[0][0]).sum().backward()
    before = {name: value.clone() for name, value in start.state_dict().items()}
    gradients = [p.grad.clone() for p in start.parameters()]  # type: ignore[union-attr]
    got = train(World(3, "cpu"), lambda rank: start, bucket_bytes=200)
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(start.parameters(), gradients, strict=True))  # type: ignore[arg-type]
    assert got[0].weights[-1]["0.weight"].data_ptr() != start[0].weight.data_ptr()


def test_weights_and_buffers_begin_as_those_of_rank_0() -> None:
    with torch.random.fork_rng(devices=[]):
        models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(3)]

    def work(rank: Rank) -> list[Tensor]:
        start = models[rank.index]
        for tensor in (*start.parameters(), *start.buffers()):
            tensor.detach().fill_(rank.index + 1)
        engine = DataParallel(start, rank.comm)
        assert engine.model is not start
        assert engine.num_steps == 0
        return [tensor.detach().clone() for tensor in (*engine.model.parameters(), *engine.model.buffers())]

    for tensors in World(3, "cpu").run(work):
        assert [str(x.dtype) for x in tensors[-3:]] == ["torch.float32", "torch.float32", "torch.int64"]
        assert len(tensors) == 7
        assert all(bool((x == 1).all()) for x in tensors)


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_gpt() -> None:
    config = GPTConfig(vocab_size=7, context_length=4, num_layers=2, num_heads=2, width=8, tied=True)
    with torch.random.fork_rng(devices=[]):
        start = GPT(config).double()
    seed_parameters(start)
    want = by_hand(copy.deepcopy(start), "adamw", lengths=shards(3))
    assert_all_alike(train(World(3, "cpu"), lambda rank: start, "adamw", bucket_bytes=2000), want)


def test_a_gpt2_of_hugging_face() -> None:
    own: Any = lambda output, targets: cross_entropy(output.logits, targets)  # noqa: E731
    start = hugging_face("GPT2LMHeadModel")
    want = by_hand(copy.deepcopy(start), "adamw", lengths=shards(2), loss_fn=own)
    assert_all_alike(train(World(2, "cpu"), lambda rank: start, "adamw", bucket_bytes=2000, loss_fn=own), want)


class Wide(nn.Module):
    """A layer that computes in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(dp.WIDTH, dp.WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x.double())).to(x.dtype)


class Image(nn.Module):
    """Token ids as an image of 3 x 1 with 7 channels, convolved; the gradients lie channels last, as the weights do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(7, 7, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.eye(7)[ids].transpose(1, 2)[..., None]
        return self.conv(x)[..., 0].transpose(1, 2)


class WithNothing(nn.Module):
    """A parameter without elements, which is used, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = dp.model(dtype=torch.float32)
        self.empty, self.unused = nn.Parameter(torch.zeros(0, 7)), nn.Parameter(torch.zeros(0))

    def forward(self, ids: Tensor) -> Tensor:
        y = self.body(ids)
        return torch.cat([y.flatten(0, 1), self.empty]).view(y.shape)


MADE: dict[str, Callable[[], nn.Module]] = {
    "of two dtypes": lambda: nn.Sequential(
        nn.Embedding(7, dp.WIDTH), Wide(), nn.Linear(dp.WIDTH, dp.WIDTH), Wide(), nn.Linear(dp.WIDTH, 7)
    ),
    "channels last": Image,
    "with parameters without elements": WithNothing,
}


@pytest.mark.parametrize("name", MADE)
def test_other_models(name: str) -> None:
    def start() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            made = MADE[name]()
        seed_parameters(made)
        return made

    if name == "channels last":
        assert not start().conv.weight.is_contiguous()  # type: ignore[union-attr, operator]
    for n, bucket_bytes in ((1, 1), (2, 1), (3, 25 << 20)):
        want = by_hand(start(), lengths=shards(n))
        made = start()  # not by the ranks, which would share the global generator
        got = train(World(n, "cpu"), lambda rank, made=made: made, bucket_bytes=bucket_bytes)
        assert_all_alike(got, want)
        gradient = got[0].gradients[0].get("conv.weight")
        assert gradient is None or not gradient.is_contiguous()


def test_a_loss_of_ones_own() -> None:
    """A wrong scale would show: twice the loss is twice the gradient."""
    twice = lambda outputs, targets: 2 * cross_entropy(outputs, targets)  # noqa: E731
    got = of_variant("plain", "sgd", 3, loss_fn=twice)[0]
    want = serial("plain", "sgd", 3)
    assert got.losses[0] == pytest.approx(2 * want.losses[0], abs=1e-12)
    torch.testing.assert_close(got.gradients[0]["0.weight"], 2 * want.gradients[0]["0.weight"], rtol=0, atol=1e-12)


def test_a_step_in_which_nothing_trained_has_a_part() -> None:
    """Its loss depends on what is frozen alone: no gradient, no update."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.trained = dp.model(), nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.body.requires_grad_(False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.body(ids)

    got = train(World(2, "cpu"), lambda rank: Frozen())
    for of_rank in got:
        assert all(gradient is None for of_step in of_rank.gradients for gradient in of_step.values())
        assert torch.equal(of_rank.weights[-1]["trained"], torch.ones(2, dtype=torch.float64))
    assert got[0].losses == got[1].losses


# --- what is written down --------------------------------------------------------------------------------------------


def test_the_timeline_shows_the_parts_of_a_step() -> None:
    for num_microbatches, indices in ((1, [None]), (2, [0, 1])):
        world = World(2, "cpu")
        train(world, lambda rank: dp.model(), data=batches(num_batches=2), num_microbatches=num_microbatches)
        for rank in range(2):
            events = [e for e in world.timeline.events if (e.rank, e.lane) == (rank, "compute")]
            parts = [(name, index) for index in indices for name in ("forward", "backward")]
            assert [(e.name, e.microbatch) for e in events] == [*parts, ("update", None)] * 2


# --- ranks that disagree, and what is refused ------------------------------------------------------------------------


def step_of(rank: Rank, batch: Batch, **options: Any) -> float:
    return DataParallel(dp.model(), rank.comm, optimizer=OPTIMIZERS["sgd"], **options).step(batch)


@pytest.mark.parametrize("lengths", [(11, 8), (8, 11), (11, 11, 10), (1, 2, 3), (4, 4, 4, 5)])
def test_batches_of_different_lengths_are_found_before_an_update(lengths: tuple[int, ...]) -> None:
    engines: dict[int, DataParallel] = {}

    def work(rank: Rank) -> None:
        engines[rank.index] = DataParallel(dp.model(), rank.comm, optimizer=OPTIMIZERS["sgd"])
        engines[rank.index].step(batches(lengths[rank.index])[0])

    total = r"rank \d was given a batch of \d+ samples, and the \d ranks have \d+ together: give every rank the same"
    with pytest.raises(MplabError, match=total):
        World(len(lengths), "cpu").run(work)
    # by chance its own number may be the mean of all, and then it hears of it with the next message
    for rank, length in enumerate(lengths):
        if length * len(lengths) != sum(lengths):
            assert not engines[rank].optimizer.state
            assert engines[rank].num_steps == 0


BAD_BATCHES = {
    "^11 inputs and 10 targets: a batch needs as many of each": (torch.zeros(11, 3).long(), torch.zeros(10, 3).long()),
    "^a batch without samples can't be shared out": (torch.zeros(0, 3).long(), torch.zeros(0, 3).long()),
}


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_batches_that_are_refused_before_any_message(message: str) -> None:
    world = World(2, "cpu")
    engines = world.run(lambda rank: DataParallel(dp.model(), rank.comm))

    def work(rank: Rank) -> None:
        engines[rank.index].connect(rank.comm)
        engines[rank.index].step(BAD_BATCHES[message])

    with pytest.raises(MplabError, match=message):
        world.run(work)
    assert [ledger.messages for ledger in world.ledgers] == [[], []]


def test_samples_of_ones_own_that_are_refused() -> None:
    world = World(2, "cpu")
    engines = world.run(lambda rank: DataParallel(dp.model(), rank.comm))
    nothing, uneven = BAD_BATCHES.values().__reversed__()

    def work(rank: Rank, batch: Batch) -> None:
        engines[rank.index].connect(rank.comm)
        engines[rank.index].step_shard(batch)

    with pytest.raises(MplabError, match=r"^none of the 2 ranks has a sample: a step needs one or more"):
        world.run(work, nothing)
    assert [[m.op for m in ledger.messages] for ledger in world.ledgers] == [["all_gather"]] * 2
    with pytest.raises(MplabError, match=r"^11 inputs and 10 targets"):
        world.run(work, uneven)
    assert [ledger.messages for ledger in world.ledgers] == [[], []]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_bytes": 0}, r"^bucket_bytes 0: must be a whole number, 1 or more"),
        ({"bucket_bytes": "1"}, r"^bucket_bytes '1': must be a whole number"),
        ({"num_microbatches": 0}, r"^num_microbatches 0: must be a whole number, 1 or more"),
        ({"num_microbatches": 1.5}, r"^num_microbatches 1.5: must be a whole number"),
        ({"num_microbatches": True}, r"^num_microbatches True: must be a whole number"),
        ({"max_norm": 0.0}, r"^max_norm 0.0: must be a number above 0, or None"),
        ({"max_norm": -1.0}, r"^max_norm -1.0: must be a number above 0, or None"),
        ({"max_norm": math.nan}, r"^max_norm nan: must be a number above 0, or None"),
        ({"max_norm": "1"}, r"^max_norm '1': must be a number above 0, or None"),
        ({"autocast": torch.float16}, r"^autocast torch.float16: take torch.bfloat16, or None"),
        ({"loss_fn": None}, r"^loss_fn is a NoneType: give a function"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, r"^optimizer is a SGD: each rank makes its own"),
    ],
)
def test_settings_that_are_refused_before_any_message(options: dict[str, Any], message: str) -> None:
    world = World(2, "cpu")
    with pytest.raises(MplabError, match=message):
        world.run(lambda rank: DataParallel(dp.model(), rank.comm, **options))
    assert [ledger.messages for ledger in world.ledgers] == [[], []]


def test_a_model_with_nothing_to_train_is_refused_before_any_message() -> None:
    world = World(2, "cpu")
    for start in (dp.model().requires_grad_(False), nn.Tanh()):
        with pytest.raises(MplabError, match=r"^no parameter of this model is trained: set requires_grad"):
            world.run(lambda rank, start=start: DataParallel(start, rank.comm))
        assert [ledger.messages for ledger in world.ledgers] == [[], []]


def test_what_is_no_model_of_values_is_refused_before_any_message() -> None:
    world = World(2, "cpu")
    for start, message in ((None, r"^model is a NoneType"), (dp.model().to("meta"), r"0.weight is on the meta device")):
        with pytest.raises(MplabError, match=message):
            world.run(lambda rank, start=start: DataParallel(start, rank.comm))
        assert [ledger.messages for ledger in world.ledgers] == [[], []]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("bucket_bytes", (100, 200)),
        ("num_microbatches", (1, 2)),
        ("max_norm", (None, 1.0)),
        ("autocast", (torch.bfloat16, None)),
    ],
)
def test_settings_that_differ_are_named(name: str, values: tuple[Any, Any]) -> None:
    said: list[str] = []

    def work(rank: Rank) -> None:
        try:
            DataParallel(dp.model(), rank.comm, **{name: values[rank.index // 2]})
        except PeerFailure:  # stopped by another rank that was first to say so
            raise
        except MplabError as error:
            said.append(str(error))
            raise

    with pytest.raises(MplabError, match="the ranks were given different settings"):
        World(3, "cpu").run(work)
    assert len(set(said)) == 1
    lines = said[0].splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == [f"  {name} on rank {rank}" for rank in range(3)]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: dp.model("conv"), ["2.conv.weight", "2.down.weight"]),
        (lambda: dp.model("frozen"), ["1.up.weight", "false", "true"]),
        (lambda: dp.model("tied"), ["4.bias", "4.weight"]),
        (lambda: dp.model(dtype=torch.float32), ["torch.float32", "torch.float64"]),
        (lambda: nn.Sequential(*dp.model()[:-1], nn.Linear(dp.WIDTH, 9).double()), ["4.weight", "[9, 4]", "[7, 4]"]),
    ],
    ids=["other layers", "frozen", "tied", "dtype", "shape"],
)
def test_models_that_differ_are_named(other: Callable[[], nn.Module], words: list[str]) -> None:
    with torch.random.fork_rng(devices=[]):
        models = [dp.model(), other()]
    with pytest.raises(MplabError, match="the ranks were given different settings") as caught:
        World(2, "cpu").run(lambda rank: DataParallel(models[rank.index], rank.comm))
    said = str(caught.value)
    assert "parameters on rank 0" in said
    assert "parameters on rank 1" in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_that_is_one_step_short(num_ranks: int) -> None:
    def work(rank: Rank) -> None:
        engine = DataParallel(dp.model(), rank.comm, optimizer=OPTIMIZERS["sgd"])
        for batch in batches()[: 2 if rank.index == 1 else 3]:
            engine.step(batch)

    with at_most(5), pytest.raises(Deadlock, match="waits for rank 1, which has finished"):
        World(num_ranks, "cpu").run(work)


# --- gradients that are no numbers -----------------------------------------------------------------------------------


def spoiled(engine: DataParallel, name: str, change: Callable[[Tensor], Tensor]) -> None:
    engine.model.get_parameter(name).register_hook(change)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", ["0.weight", "2.up.bias", "4.bias"])
def test_a_nan_or_inf_is_raised_before_it_reaches_another_rank(name: str, overlap: bool, bad: float) -> None:
    """In the third step of one rank of three, one element of one gradient."""
    engines: dict[int, DataParallel] = {}
    before: dict[int, list[Tensor]] = {}
    raised: list[int] = []

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[-1] = bad
        return gradient

    def work(rank: Rank) -> None:
        engine = engines[rank.index] = DataParallel(dp.model(), rank.comm, 1, overlap, optimizer=OPTIMIZERS["sgd"])
        for batch in batches()[:2]:
            engine.step(batch)
        before[rank.index] = [p.detach().clone() for p in engine.model.parameters()]
        rank.comm.barrier()
        if rank.index == 1:
            spoiled(engine, name, spoil)
        try:
            engine.step(batches()[2])
        except NonFiniteGradient:
            raised.append(rank.index)
            raise

    message = rf"^rank 1, step 2: the gradient of {name} has a NaN or an Inf; no weight was changed"
    with at_most(5), pytest.raises(NonFiniteGradient, match=message):
        World(3, "cpu").run(work)
    assert raised == [1]
    for rank, engine in engines.items():
        assert engine.num_steps == 2
        for p, weight in zip(engine.model.parameters(), before[rank], strict=True):
            assert torch.equal(p, weight)
            assert rank == 1 or p.grad is None or bool(p.grad.isfinite().all())


def test_a_nan_of_an_earlier_micro_batch_is_found() -> None:
    def work(rank: Rank) -> None:
        engine = DataParallel(dp.model(), rank.comm, optimizer=OPTIMIZERS["sgd"], num_microbatches=2)
        gradients: list[Tensor] = []

        def spoil(gradient: Tensor) -> Tensor:
            gradients.append(gradient)
            return gradient * math.nan if rank.index == 0 and len(gradients) == 1 else gradient

        spoiled(engine, "1.down.weight", spoil)
        engine.step(batches()[0])

    with pytest.raises(NonFiniteGradient, match=r"^rank 0, step 0: the gradient of 1.down.weight has a NaN"):
        World(2, "cpu").run(work)


@pytest.mark.parametrize("overlap", [True, False])
def test_large_numbers_whose_sum_overflows_are_no_error(overlap: bool) -> None:
    """Within a gradient, and over the gradients of a bucket."""
    largest = torch.finfo(torch.float32).max

    def work(rank: Rank) -> list[Tensor | None]:
        sign = 1 if rank.index == 0 else -1
        start = dp.model(dtype=torch.float32)
        engine = DataParallel(start, rank.comm, overlap=overlap, optimizer=OPTIMIZERS["sgd"])
        for name in ("2.up.weight", "2.up.bias", "4.bias"):
            spoiled(engine, name, lambda g: torch.full_like(g, sign * largest))
        engine.step(batches()[0])
        return [engine.model.get_parameter(name).grad for name in ("2.up.weight", "4.bias")]

    for gradients in World(2, "cpu").run(work):
        assert all(g is not None and not g.any() for g in gradients)


# --- a second gradient in one backward -------------------------------------------------------------------------------


class Recomputed(nn.Module):
    """One layer in two checkpoints of the old kind, which run a backward of their own inside of the backward."""

    def __init__(self, is_reentrant: bool) -> None:
        super().__init__()
        self.body, self.inner, self.is_reentrant = dp.model(), dp.Mixer().double(), is_reentrant

    def forward(self, ids: Tensor) -> Tensor:
        x = self.body[0](ids)
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.is_reentrant)
        return self.body[1:](x)


def recomputed(is_reentrant: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        made = Recomputed(is_reentrant)
    seed_parameters(made)
    return made


def test_a_second_gradient_in_one_backward_is_refused() -> None:
    message = r"^inner.down.weight got a second gradient in one backward.*use overlap=False.*use_reentrant=False"
    made = recomputed(True)
    with at_most(5), pytest.raises(MplabError, match=message):
        World(2, "cpu").run(
            lambda rank: DataParallel(made, rank.comm, bucket_bytes=1, optimizer=OPTIMIZERS["sgd"]).step(batches()[0])
        )


def test_what_its_error_advises() -> None:
    want = by_hand(recomputed(True), lengths=shards(2))
    for is_reentrant, overlap, bucket_bytes in ((True, False, 200), (False, True, 200), (True, True, 25 << 20)):
        options = {"overlap": overlap, "bucket_bytes": bucket_bytes}  # the last bucket starts after backward
        made = recomputed(is_reentrant)
        got = train(World(2, "cpu"), lambda rank, made=made: made, **options)
        assert_all_alike(got, want, 1e-10)


def test_gradients_of_an_update_are_not_added_up_twice() -> None:
    def twice(rank: Rank) -> None:
        engine = DataParallel(dp.model(), rank.comm, optimizer=OPTIMIZERS["sgd"])
        inputs, targets = batches()[0]
        for _ in range(2):
            engine.backward(cross_entropy(engine.model(inputs), targets) / rank.size)

    with at_most(5), pytest.raises(MplabError, match=r"the sum over all ranks already.*zero_grad"):
        World(2, "cpu").run(twice)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_were_set_to_zero_are_none(set_to_none: bool) -> None:
    def twice(rank: Rank) -> list[Tensor]:
        engine = DataParallel(dp.model(), rank.comm, optimizer=OPTIMIZERS["sgd"])
        inputs, targets = batches()[0]
        for _ in range(2):
            engine.optimizer.zero_grad(set_to_none)
            engine.backward(cross_entropy(engine.model(inputs), targets) / rank.size)
        return [p.grad for p in engine.model.parameters() if p.grad is not None]

    alone = dp.model()
    inputs, targets = batches()[0]
    cross_entropy(alone(inputs), targets).backward()
    for gradients in World(2, "cpu").run(twice):
        torch.testing.assert_close(gradients, [p.grad for p in alone.parameters()], rtol=0, atol=1e-12)


def test_a_parameter_that_is_trained_all_of_a_sudden_is_refused() -> None:
    def unfreeze(rank: Rank) -> None:
        engine = DataParallel(dp.model("frozen"), rank.comm, optimizer=OPTIMIZERS["sgd"])
        engine.model.requires_grad_(True)
        engine.step(batches()[0])

    with at_most(5), pytest.raises(MplabError, match=r"was frozen is trained now"):
        World(2, "cpu").run(unfreeze)


def test_an_error_in_a_loop_of_ones_own_names_the_step() -> None:
    def work(rank: Rank) -> None:
        engine = DataParallel(dp.model(), rank.comm, optimizer=OPTIMIZERS["sgd"])
        inputs, targets = batches()[0]
        for step in range(3):
            engine.optimizer.zero_grad()
            scale = float("nan") if step == 2 and rank.index == 1 else 1.0
            engine.backward(cross_entropy(engine.model(inputs), targets) * scale)

    with at_most(5), pytest.raises(NonFiniteGradient, match=r"^rank 1, step 2: the gradient of "):
        World(2, "cpu").run(work)
