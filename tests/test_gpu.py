"""Ranks on real GPUs: streams, slices, memory, backward, and the clock of the device. Skipped where there is none.

The conformance suite on GPUs is in test_threads, the order of streams without a GPU in test_memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from conformance import CHECKS, Check
from limits import leaves_nothing_behind as leaves_nothing_behind
from limits import memory_comes_back as memory_comes_back
from sum_over_ranks import SumOverRanks
from torch import Tensor

from mplab import CollectiveMismatch, Deadlock, Link, MplabError, World
from mplab.world import Rank

pytestmark = pytest.mark.gpu

LARGE = 4_000_001


def sliced_world(n: int) -> World:
    """A world of slices, or a skipped test where torch or the driver has none."""
    world = World(n, device="cuda:0", slices=True)
    try:
        world.run(lambda rank: None)
    except MplabError as error:
        pytest.skip(str(error))
    return world


@pytest.fixture(params=["streams", "slices"])
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "streams":
        return World(4, device="cuda:0")
    try:
        return sliced_world(4)
    except MplabError as error:  # this torch has no green contexts
        pytest.skip(str(error))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_conformance_suite_on_slices(check: Check) -> None:
    sliced_world(4).run(check)


# --- where ranks are -------------------------------------------------------------------------------------------------


def test_every_rank_has_a_stream_of_its_own(world: World) -> None:
    def run(rank: Rank) -> tuple[int, int]:
        stream = torch.cuda.current_stream()
        rank.comm.barrier()
        return stream.cuda_stream, torch.cuda.current_device()

    streams, devices = zip(*world.run(run), strict=True)
    assert len(set(streams)) == 4
    assert torch.cuda.default_stream().cuda_stream not in streams
    assert set(devices) == {0}
    assert torch.cuda.current_stream() == torch.cuda.default_stream(), "the caller's stream was changed"


def test_what_the_caller_computed_before_is_there(world: World) -> None:
    """Ranks' streams do not wait for the caller's by themselves."""
    x = torch.ones(2000, 2000, device="cuda:0")
    for _ in range(20):
        x = (x @ x) / 2000
    expected = x.double().sum().item()
    y = torch.ones(2000, 2000, device="cuda:0")
    for _ in range(20):
        y = (y @ y) / 2000  # still under way when the ranks begin
    assert world.run(lambda rank: y.double().sum().item()) == [expected] * 4


def test_what_ranks_return_can_be_used_at_once(world: World) -> None:
    def run(rank: Rank) -> Tensor:
        x = torch.full((2000, 2000), 1 / 2000, device=rank.device)
        y = torch.eye(2000, device=rank.device) * rank.index
        for _ in range(30):
            y = y @ x * 1.0 + torch.eye(2000, device=rank.device) * 0
        return y.sum()

    for i, got in enumerate(world.run(run)):
        assert got.item() == pytest.approx(2000 * i, rel=1e-3)


def test_generators_are_on_the_gpu_and_reproducible(world: World) -> None:
    def run(rank: Rank) -> list[float]:
        return torch.rand(5, generator=rank.generator, device=rank.device).tolist()

    first = world.run(run)
    assert first == world.run(run)
    assert len({tuple(numbers) for numbers in first}) == 4


# --- memory that other streams still read ----------------------------------------------------------------------------


def busy(device: torch.device) -> None:
    """Keeps a stream behind its host for some milliseconds."""
    torch.cuda._sleep(2_000_000)


def test_an_input_may_be_overwritten_and_freed_as_soon_as_a_call_is_back(world: World) -> None:
    """What one rank frees the allocator gives to its next tensor at once, while other streams may still read it."""

    def run(rank: Rank) -> None:
        wrong = torch.zeros((), device=rank.device)
        for i in range(60):
            if (rank.index + i) % 4 == 0:
                busy(rank.device)
            x = torch.full((LARGE if i % 3 == 0 else 1001,), float(rank.index + i), device=rank.device)
            y = rank.comm.all_reduce(x)
            x.fill_(-1e9)
            del x
            trash = torch.full_like(y, 1e9)  # where x was
            z = rank.comm.broadcast(y if rank.index == i % 4 else None, i % 4)
            part = rank.comm.reduce_scatter(z, "mean")
            whole = rank.comm.all_gather(part)
            del z, part
            more_trash = torch.full_like(y, -1e9)
            wrong += (y != 6 + 4 * i).sum() + (whole != 6 + 4 * i).sum()
            y.fill_(1e9)
            whole.fill_(1e9)
            del y, whole, trash, more_trash
        assert wrong.item() == 0

    world.run(run)


def test_messages_may_be_overwritten_and_freed(world: World) -> None:
    def run(rank: Rank) -> None:
        wrong = torch.zeros((), device=rank.device)
        right, left = (rank.index + 1) % 4, (rank.index - 1) % 4
        for i in range(60):
            if (rank.index + i) % 3 == 0:
                busy(rank.device)
            x = torch.full((LARGE if i % 5 == 0 else 100,), float(10 * rank.index + i), device=rank.device)
            handle = rank.comm.isend(x, right)
            x.fill_(-1e9)
            del x
            got = rank.comm.recv(left)
            handle.wait()
            wrong += (got != 10 * left + i).sum()
            del got
            torch.full((LARGE,), 1e9, device=rank.device)
        assert wrong.item() == 0

    world.run(run)


def test_in_place_and_asynchronous_calls_in_a_row(world: World) -> None:
    def run(rank: Rank) -> None:
        x = torch.ones(LARGE, device=rank.device)
        for i in range(20):
            if (rank.index + i) % 4 == 0:
                busy(rank.device)
            rank.comm.all_reduce_(x, "mean")
            handles = [rank.comm.iall_reduce(x), rank.comm.ireduce_scatter(x, "max"), rank.comm.iall_gather(x[:7])]
            total, part, rows = (handle.wait() for handle in handles)
            assert_all(total, 4.0)
            assert_all(part, 1.0)
            assert_all(rows, 1.0)
            x.mul_(1.0)

    world.run(run)


def assert_all(x: Tensor, value: float) -> None:
    assert bool((x == value).all())


def test_the_host_does_not_wait_for_the_gpu() -> None:
    """A collective is back before the stream has got there: a rank can start its next work meanwhile."""

    def run(rank: Rank) -> bool:
        x = torch.ones(1000, device=rank.device)
        rank.comm.all_reduce(x)
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)  # about a second
        rank.comm.all_reduce(x)
        rank.comm.barrier()
        return torch.cuda.current_stream().query()

    assert World(2, device="cuda:0").run(run) == [False, False]


# --- backward --------------------------------------------------------------------------------------------------------


def test_collectives_inside_of_backward_on_four_streams(world: World) -> None:
    """Ranks of one GPU share autograd's device thread, where the first to block would block all."""

    def run(rank: Rank) -> Tensor:
        x = torch.full((1000,), rank.index + 1.0, device=rank.device, requires_grad=True)
        for _ in range(5):
            x.grad = None
            if rank.index == 2:
                busy(rank.device)
            y = SumOverRanks.apply(x * 1.0, rank)  # type: ignore[no-untyped-call]
            (y * (rank.index + 1)).sum().backward()
        assert x.grad is not None
        return x.grad

    for grad in world.run(run):
        assert_all(grad, 10.0)


def test_a_model_trained_by_ranks_equals_one_trained_by_one(world: World) -> None:
    """Gradients averaged in hooks, while backward still computes the others."""

    def train(rank: Rank, shard: Callable[[Tensor], Tensor], is_averaged: bool) -> list[Tensor]:
        g = torch.Generator().manual_seed(3)
        weights = [torch.randn(16, 16, generator=g, dtype=torch.float64).to(rank.device) for _ in range(3)]
        parameters = [torch.nn.Parameter(w / 4) for w in weights]
        data = torch.randn(8, 16, generator=g, dtype=torch.float64).to(rank.device)

        def average(p: Tensor) -> None:
            assert p.grad is not None
            rank.comm.all_reduce_(p.grad, "mean")

        for p in parameters if is_averaged else []:
            p.register_post_accumulate_grad_hook(average)
        for _ in range(10):
            h = shard(data)
            for p in parameters:
                h = torch.tanh(h @ p)
            (h**2).mean().backward()
            with torch.no_grad():
                for p in parameters:
                    assert p.grad is not None
                    p -= 0.1 * p.grad
                    p.grad = None
        return [p.detach() for p in parameters]

    (serial,) = World(1, device="cuda:0").run(lambda rank: train(rank, lambda data: data, False))
    for trained in world.run(lambda rank: train(rank, lambda data: data.tensor_split(4)[rank.index], True)):
        for a, b in zip(trained, serial, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- the device's clock ----------------------------------------------------------------------------------------------


def test_the_timeline_is_on_the_clock_of_the_device(world: World) -> None:
    def run(rank: Rank) -> None:
        with rank.span("forward", microbatch=1):
            torch.cuda._sleep(100_000_000)  # tens of ms on the GPU, nothing on the host
        rank.comm.all_reduce(torch.ones(1000, device=rank.device))
        rank.comm.barrier()

    start = time.perf_counter()
    world.run(run)
    wall_s = time.perf_counter() - start
    timeline = world.timeline
    for rank in range(4):
        events = timeline.rank(rank)
        forward = next(e for e in events if e.name == "forward")
        assert forward.microbatch == 1
        assert 5e-3 < forward.duration_s < wall_s
        assert {e.name for e in events} == {"forward", "all_reduce", "barrier"}
        assert sum(e.size_bytes for e in events) == world.ledgers[rank].sent_bytes == 6000
        assert all(-1e-3 <= e.start_s <= e.end_s < wall_s for e in events)
    ends = [next(e.end_s for e in timeline.rank(r) if e.name == "all_reduce") for r in range(4)]
    starts = [next(e.end_s for e in timeline.rank(r) if e.name == "forward") for r in range(4)]
    assert min(ends) >= max(starts) - 1e-3, "nobody has the sum before all have come"


def test_a_recorded_wait_is_one_of_the_stream() -> None:
    """Rank 1's kernel is late: the others' streams wait for it, though no host does."""
    world = World(2, device="cuda:0")

    def run(rank: Rank) -> None:
        x = torch.ones(10, device=rank.device)
        if rank.index == 1:
            with rank.span("late"):
                torch.cuda._sleep(100_000_000)
        rank.comm.all_reduce(x)

    world.run(run)
    late = next(e for e in world.timeline.rank(1) if e.name == "late")
    assert max(e.end_s for e in world.timeline.rank(0)) >= late.end_s - 1e-3


# --- faults ----------------------------------------------------------------------------------------------------------


def test_errors_on_streams(world: World) -> None:
    def mismatch(rank: Rank) -> None:
        rank.comm.all_reduce(torch.ones(2 + rank.index % 2, device=rank.device))

    def deadlock(rank: Rank) -> None:
        rank.comm.recv((rank.index + 1) % 4)

    def failing(rank: Rank) -> None:
        if rank.index == 3:
            raise ZeroDivisionError
        rank.comm.barrier()

    for fn, error in ((mismatch, CollectiveMismatch), (deadlock, Deadlock), (failing, ZeroDivisionError)):
        with pytest.raises(error):
            world.run(fn)
        assert world.run(lambda rank: int(rank.comm.all_reduce(torch.ones((), device=rank.device)))) == [4] * 4


def test_a_tensor_on_the_wrong_device_is_refused(world: World) -> None:
    with pytest.raises(MplabError, match=r"tensor on cpu.*x\.to\(rank\.device\)"):
        world.run(lambda rank: rank.comm.all_reduce(torch.ones(3)))


def test_an_emulated_link_on_a_gpu() -> None:
    world = World(2, device="cuda:0", link=Link(5e-3, 1e9))

    def run(rank: Rank) -> tuple[float, float]:
        x = torch.ones(10, device=rank.device)
        begin = time.perf_counter()
        rank.comm.all_reduce(x)
        return begin, time.perf_counter()

    begins, ends = zip(*world.run(run), strict=True)
    assert min(ends) - max(begins) >= 2 * 5e-3


def test_notes_say_that_ranks_share_a_gpu() -> None:
    world = World(4, device="cuda:0")
    assert "4 ranks share 1 GPU" in world.notes[0]
    assert "CUDA streams (4 on cuda:0)" in str(world)


def test_copies_between_gpus_wait_for_their_writer() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs for copies between them")

    def run(rank: Rank) -> None:
        for i in range(20):
            if rank.index == i % rank.size:
                busy(rank.device)
            x = torch.full((LARGE,), float(rank.index + i), device=rank.device)
            total = rank.comm.all_reduce(x)
            handle = rank.comm.isend(x, (rank.index + 1) % rank.size)
            x.fill_(-1)
            got = rank.comm.recv((rank.index - 1) % rank.size)
            handle.wait()
            n = rank.size
            assert_all(total, n * (n - 1) / 2 + n * i)
            assert_all(got, float((rank.index - 1) % n + i))

    World(torch.cuda.device_count(), device="cuda").run(run)


def late_wait(rank: Rank) -> None:
    handle = rank.comm.iall_reduce(torch.ones(3, device=rank.device))
    time.sleep(0.05)  # all have called it long before any of them waits
    handle.wait()


def test_an_asynchronous_collective_that_was_over_before_the_wait_is_on_the_timeline() -> None:
    """Its end must not come before its start: a timeline refuses such an event."""
    world = World(3, device="cuda:0")
    world.run(late_wait)
    for rank in range(3):
        assert {e.lane for e in world.timeline.rank(rank)} == {"wait", "message"}
