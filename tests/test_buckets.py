"""Which gradients travel together, in which order, when they set out, and what each step says in bytes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import data_parallel as dp
import pytest
import torch
from data_parallel import OPTIMIZERS, batches
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn

from mplab import World, private
from mplab.comm import Message
from mplab.models import cross_entropy
from mplab.parallel import DataParallel, buckets
from mplab.parallel.buckets import make_buckets
from mplab.world import Rank

MIB = 1 << 20


def parameters(sizes: Sequence[int], dtypes: Sequence[torch.dtype] = ()) -> list[nn.Parameter]:
    kinds = list(dtypes) or [torch.float32] * len(sizes)
    return [nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in zip(sizes, kinds, strict=True)]


def sizes_of(buckets: Sequence[Any]) -> list[list[int]]:
    return [[p.numel() for p in bucket.parameters] for bucket in buckets]


@pytest.mark.parametrize(
    ("bucket_bytes", "expected"),
    [
        (1, [[5], [1], [4], [3], [2]]),
        (19, [[5], [1], [4], [3], [2]]),
        (20, [[5], [1, 4], [3, 2]]),
        (24, [[5, 1], [4], [3, 2]]),
        (40, [[5, 1, 4], [3, 2]]),
        (59, [[5, 1, 4, 3], [2]]),
        (60, [[5, 1, 4, 3, 2]]),
    ],
)
def test_buckets_are_filled_from_the_last_parameter(bucket_bytes: int, expected: list[list[int]]) -> None:
    """Of 4 bytes an element: 2, 3, 4, 1 and 5 elements."""
    made = make_buckets(parameters([2, 3, 4, 1, 5]), bucket_bytes)
    assert sizes_of(made) == expected
    assert [bucket.num_bytes for bucket in made] == [4 * sum(sizes) for sizes in expected]


def test_a_bucket_has_one_dtype() -> None:
    wide, narrow = torch.float64, torch.float32
    made = parameters([1, 2, 3, 4], [narrow, narrow, wide, narrow])
    assert sizes_of(make_buckets(made, MIB)) == [[4], [3], [2, 1]]
    assert [bucket.num_bytes for bucket in make_buckets(made, MIB)] == [16, 24, 12]


@settings(max_examples=200)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 80))
def test_every_parameter_is_in_one_bucket_and_only_one_alone_may_be_larger(sizes: list[int], limit: int) -> None:
    made = parameters(sizes)
    buckets = make_buckets(made, limit)
    flat = [p for bucket in buckets for p in bucket.parameters]
    assert [id(p) for p in flat] == [id(p) for p in reversed(made)]
    for bucket, after in zip(buckets, [*buckets[1:], None], strict=True):
        assert bucket.num_bytes <= limit or len(bucket.parameters) == 1
        if after is not None:  # it would not have fitted any more
            assert bucket.num_bytes + after.parameters[0].nbytes > limit


def test_the_buckets_of_an_engine() -> None:
    """Trained parameters alone, one that is used twice once, and in the order in which they are reduced."""

    def work(rank: Rank) -> None:
        for variant in ("frozen", "used twice", "tied"):
            engine = DataParallel(dp.model(variant), rank.comm, bucket_bytes=300)
            trained = [p for p in engine.model.parameters() if p.requires_grad]
            assert [id(p) for b in engine.buckets for p in b.parameters] == [id(p) for p in reversed(trained)]
            assert len(engine.buckets) > 1
            assert all(isinstance(p, nn.Parameter) for b in engine.buckets for p in b.parameters)

    World(1, "cpu").run(work)


# --- what a step says ------------------------------------------------------------------------------------------------


def all_reduced(length: int, item_bytes: int, n: int, rank: int) -> int:
    """Bytes that a rank sends: all chunks but its own to who reduces them, and its own to all others."""
    chunks = [len(part) for part in torch.empty(length).tensor_split(n)]
    return (length - chunks[rank] + (n - 1) * chunks[rank]) * item_bytes


def steps(
    n: int, variant: str = "plain", dtype: torch.dtype = torch.float64, num_steps: int = 2, **options: Any
) -> tuple[list[list[Message]], list[list[int]], int]:
    """Messages of every rank after the start, the sizes of the buckets, and the number of trained parameters."""
    world = World(n, "cpu")
    mine: dict[int, tuple[int, list[list[int]], int]] = {}

    def work(rank: Rank) -> None:
        engine = DataParallel(dp.model(variant, dtype), rank.comm, optimizer=OPTIMIZERS["sgd"], **options)
        trained = [p for p in engine.model.parameters() if p.requires_grad]
        mine[rank.index] = len(rank.comm.ledger.messages), sizes_of(engine.buckets), len(trained)
        for batch in batches(num_batches=num_steps):
            engine.step(batch)

    world.run(work)
    assert len({str(made) for made in mine.values()}) == 1
    return [ledger.messages[mine[0][0] :] for ledger in world.ledgers], *mine[0][1:]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("bucket_bytes", [1, 200, 25 * MIB])
@pytest.mark.parametrize("overlap", [True, False])
def test_every_message_of_a_step_and_its_bytes(n: int, bucket_bytes: int, overlap: bool) -> None:
    """One a bucket, in the order of the buckets, and one that closes it; micro-batches add none."""
    for variant, dtype, num_microbatches in (("plain", torch.float64, 1), ("branch", torch.float32, 3)):
        options = {"bucket_bytes": bucket_bytes, "overlap": overlap, "num_microbatches": num_microbatches}
        of_ranks, in_buckets, num_trained = steps(n, variant, dtype, **options)
        for rank, messages in enumerate(of_ranks):
            want = [("all_reduce_coalesced_", all_reduced(sum(sizes), dtype.itemsize, n, rank)) for sizes in in_buckets]
            want.append(("all_reduce_", all_reduced(2 + num_trained, 8, n, rank)))
            assert [(m.op, m.sent_bytes) for m in messages] == want * 2
            assert all(m.num_messages == 2 * (n - 1) and m.sent_bytes == m.received_bytes for m in messages)


def test_a_shard_of_ones_own_adds_its_size() -> None:
    world = World(3, "cpu")

    def work(rank: Rank) -> None:
        engine = DataParallel(dp.model(), rank.comm, optimizer=OPTIMIZERS["sgd"])
        rank.comm.ledger.messages.clear()
        inputs, targets = batches()[0]
        engine.step_shard((inputs[: rank.index], targets[: rank.index]))

    world.run(work)
    for ledger in world.ledgers:
        assert [m.op for m in ledger.messages] == ["all_gather", "all_reduce_coalesced_", "all_reduce_"]
        assert (ledger.messages[0].sent_bytes, ledger.messages[0].received_bytes) == (16, 16)


def test_the_start_says_settings_weights_and_buffers() -> None:
    made = nn.Sequential(dp.model("frozen"), nn.BatchNorm1d(3, affine=False))
    world = World(2, "cpu")
    world.run(lambda rank: DataParallel(made, rank.comm))
    for ledger in world.ledgers:
        num_tensors = len(list(made.parameters())) + 3
        assert [m.op for m in ledger.messages] == ["all_gather"] + ["broadcast"] * num_tensors
        assert ledger.messages[0].sent_bytes == 8
    sizes = [t.nbytes for t in (*made.parameters(), *made.buffers())]
    assert [m.sent_bytes for m in world.ledgers[0].messages[1:]] == sizes
    assert [m.received_bytes for m in world.ledgers[1].messages[1:]] == sizes


# --- when a bucket sets out ------------------------------------------------------------------------------------------


def started(overlap: bool, num_microbatches: int = 1) -> list[tuple[Any, ...]]:
    """Of every rank: when its buckets were started, and when each backward began and ended; one step, in ns."""
    world = World(2, "cpu")

    def work(rank: Rank) -> tuple[list[int], list[tuple[int, int]]]:
        options = {"bucket_bytes": 1, "overlap": overlap, "num_microbatches": num_microbatches}
        engine = DataParallel(dp.model(), rank.comm, optimizer=OPTIMIZERS["sgd"], **options)
        rank.comm.ledger.messages.clear()
        engine.step(batches()[0])
        backward = [(s.start_ns, s.end_ns) for s in rank.comm.trace.host_spans() if s.name == "backward"]
        return [m.start_ns for m in rank.comm.ledger.of("all_reduce_coalesced_")], backward

    return world.run(work)


def test_buckets_set_out_while_backward_goes_on() -> None:
    """All but the one with the first parameter are on their way before it has ended."""
    for starts, [(begin, end)] in started(overlap=True):
        assert starts == sorted(starts)
        assert begin < starts[0]
        assert starts[-2] < end


def test_without_overlap_they_set_out_after_backward() -> None:
    for starts, [(_, end)] in started(overlap=False):
        assert starts == sorted(starts)
        assert starts[0] > end


def test_with_micro_batches_they_set_out_in_the_last_backward() -> None:
    for starts, backwards in started(overlap=True, num_microbatches=3):
        assert len(backwards) == 3
        assert backwards[1][1] < backwards[2][0] < starts[0]
        assert starts[-2] < backwards[2][1]


def test_one_large_bucket_waits_for_the_last_gradient() -> None:
    gradients: dict[int, list[int]] = {0: [], 1: []}

    def work(rank: Rank) -> list[int]:
        engine = DataParallel(dp.model(), rank.comm, optimizer=OPTIMIZERS["sgd"])
        seen = gradients[rank.index]
        before = len(rank.comm.ledger.messages)
        for p in engine.model.parameters():
            p.register_post_accumulate_grad_hook(lambda _: seen.append(len(rank.comm.ledger.messages) - before))
        engine.step(batches()[0])
        return [m.start_ns for m in rank.comm.ledger.of("all_reduce_coalesced_")]

    assert [len(starts) for starts in World(2, "cpu").run(work)] == [1, 1]
    assert all(len(seen) == len(list(dp.model().parameters())) for seen in gradients.values())


class Swapped(nn.Module):
    """Two layers, whose gradients come in an order that differs between ranks."""

    def __init__(self, is_swapped: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(3, 3, bias=False, dtype=torch.float64) for _ in range(2))
        self.is_swapped = is_swapped

    def forward(self, x: Tensor) -> Tensor:
        last, next_to_last = (self.first, self.second) if self.is_swapped else (self.second, self.first)
        return last(torch.tanh(next_to_last(x)))


def test_buckets_keep_their_order_whatever_order_gradients_come_in() -> None:
    """Else the shapes are alike here, and the sums would be of different layers."""
    with torch.random.fork_rng(devices=[]):
        made = [Swapped(False), Swapped(True)]
    for p, q in zip(made[0].parameters(), made[1].parameters(), strict=True):
        q.data.copy_(p)
    x, y = torch.eye(3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)
    loss: Callable[[Tensor, Tensor], Tensor] = lambda outputs, targets: ((outputs - targets) ** 2).mean()  # noqa: E731
    want = [torch.zeros(3, 3, dtype=torch.float64) for _ in range(2)]
    for model in made:
        for total, g in zip(want, torch.autograd.grad(loss(model(x), y) / 2, list(model.parameters())), strict=True):
            total.add_(g)

    def work(rank: Rank) -> list[Tensor | None]:
        options = {"bucket_bytes": 1, "loss_fn": loss, "optimizer": OPTIMIZERS["sgd"]}
        engine = DataParallel(made[rank.index], rank.comm, **options)
        engine.step_shard((x, y))
        return [p.grad for p in engine.model.parameters()]

    for gradients in World(2, "cpu").run(work):
        torch.testing.assert_close(gradients, want, rtol=0, atol=1e-14)


def test_a_bucket_whose_gradients_are_there_is_reduced_before_backward_ends() -> None:
    """The last rank to come reduces it for all: another rank, still in its backward, finds the sum."""
    is_held, is_reduced = threading.Event(), threading.Event()
    found: list[bool] = []

    def work(rank: Rank) -> None:
        engine = DataParallel(dp.model(), rank.comm, 1, optimizer=OPTIMIZERS["sgd"])
        last, first = engine.buckets[0].parameters[0], engine.buckets[-1].parameters[0]

        def hold(gradient: Tensor) -> Tensor:
            """Before the gradient of the first parameter is there."""
            if rank.index == 1:
                is_reduced.set()
                return gradient
            assert last.grad is not None
            own = last.grad.clone()
            is_held.set()
            assert is_reduced.wait(10)
            found.append(not torch.equal(own, last.grad))
            return gradient

        first.register_hook(hold)
        assert rank.index == 0 or is_held.wait(10)
        engine.step(batches()[0])

    World(2, "cpu").run(work)
    assert found == [True]


def test_nothing_keeps_the_gradients_of_a_step() -> None:
    """Neither this rank's messages nor another one's: else memory would grow from step to step."""

    def work(rank: Rank) -> None:
        engine = DataParallel(dp.model(), rank.comm, bucket_bytes=200, optimizer=OPTIMIZERS["sgd"])
        engine.step(batches()[0])
        rank.comm.barrier()
        gc.collect()
        assert not any(p.grad is not None and private.is_shared(p.grad) for p in engine.model.parameters())

    World(2, "cpu").run(work)


@pytest.mark.parametrize("overlap", [True, False])
def test_nothing_keeps_an_engine_that_nobody_uses(overlap: bool) -> None:
    """Its hooks lie in its parameters, where the garbage collector does not see what they hold."""

    def work(rank: Rank) -> list[weakref.ref[Any]]:
        options = {"bucket_bytes": 200, "overlap": overlap, "optimizer": OPTIMIZERS["sgd"]}
        engine = DataParallel(dp.model(), rank.comm, **options)
        engine.step(batches()[0])
        return [weakref.ref(x.untyped_storage()) for p in engine.model.parameters() for x in (p, p.grad)]

    kept = World(2, "cpu").run(work)
    gc.collect()
    assert not any(storage() is not None for of_rank in kept for storage in of_rank)


# --- gradients that share memory -------------------------------------------------------------------------------------


class Added(nn.Module):
    """Parameters that are reshaped and added: torch makes their gradients views of one tensor."""

    def __init__(self, num_added: int) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, dtype=torch.float64)
        self.added = nn.ParameterList(torch.ones(2, 3, dtype=torch.float64) * i for i in range(num_added))
        self.head = nn.Linear(3, 7, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (p[None] for p in self.added)
        return self.head(torch.tanh(self.inner(x) + sum(others, start=first)))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("num_added", [1, 2])
def test_gradients_that_lie_in_the_same_memory_are_added_up_once(num_added: int, overlap: bool) -> None:
    """With one sample a rank, as the gradient of a sum needs no sum over samples."""
    with torch.random.fork_rng(devices=[]):
        made = Added(num_added)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    y = torch.tensor([[0, 1], [2, 3]])
    names, trained = zip(*made.named_parameters(), strict=True)
    want = dict(zip(names, torch.autograd.grad(cross_entropy(made(x), y), trained), strict=True))

    def work(rank: Rank) -> dict[str, Tensor | None]:
        options = {"bucket_bytes": 1, "overlap": overlap, "optimizer": OPTIMIZERS["sgd"]}
        engine = DataParallel(made, rank.comm, **options)
        engine.step((x, y))
        return {name: p.grad for name, p in engine.model.named_parameters()}

    for gradients in World(2, "cpu").run(work):
        torch.testing.assert_close(gradients, want, rtol=0, atol=1e-14)


def test_memory_that_is_shared_is_told_and_where_torch_is_silent_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    assert not private.is_shared(x)
    view = x[1:]
    assert private.is_shared(x)
    assert private.is_shared(view)
    del view
    assert not private.is_shared(x)
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    assert private.is_shared(x)


def test_a_gradient_of_its_own_is_reduced_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied: not with weights, biases, norms, nor an embedding."""
    seen: list[bool] = []

    def is_shared(x: Tensor) -> bool:
        seen.append(private.is_shared(x))
        return seen[-1]

    monkeypatch.setattr(buckets, "is_shared", is_shared)
    steps(2, "conv", bucket_bytes=200)
    assert not any(seen)
    assert len(seen) == 2 * 2 * len(list(dp.model("conv").parameters()))
