"""How tensors get from rank to rank: on CUDA streams, checked on a CPU by clocks instead of by luck."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import streams
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from streams import Memory, OnStream
from torch import Tensor

import mplab.comm.memory
from mplab import World
from mplab.comm import Communicator, algorithms
from mplab.comm.memory import LARGE_BYTES, CudaMemory, HostMemory, new_like
from mplab.world import Rank

CPU = torch.device("cpu")


@pytest.fixture(params=[1 << 18, 16], ids=["one rank computes", "all compute"])
def small_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Communicators that work as on CUDA, with streams that are played out; and both ways to share the work."""
    streams.play_out(request.param, monkeypatch)


def overwrite(*xs: Tensor | None) -> None:
    """What a rank may do with its input and its result as soon as a call is back."""
    for x in xs:
        if x is not None:
            x.fill_(-1)


def x_of(rank: Rank, length: int = 7) -> Tensor:
    return torch.full((length,), 1.0 + rank.index)


def gathering(comm: Communicator, rank: Rank) -> None:
    x = x_of(rank)
    whole = comm.all_gather(x[: 3 + rank.index])
    overwrite(x, whole)
    part = comm.gather(x, 1 % comm.size)
    overwrite(x, part)


def reducing(comm: Communicator, rank: Rank) -> None:
    for op in ("sum", "mean", "max"):
        x = x_of(rank)
        total = comm.all_reduce(x, op)
        overwrite(x, total)
        total = comm.reduce(x, op, 1 % comm.size)
        overwrite(x, total)
        part = comm.reduce_scatter(x, op)
        overwrite(x, part)


def in_place(comm: Communicator, rank: Rank) -> None:
    x = x_of(rank)
    for _ in range(3):
        comm.all_reduce_(x)
        x.mul_(0.5)
    overwrite(x)


def spreading(comm: Communicator, rank: Rank) -> None:
    for root in range(comm.size):
        x = x_of(rank)
        mine = comm.broadcast(x if comm.rank == root else None, root)
        overwrite(x, mine)
        part = comm.scatter(x if comm.rank == root else None, root)
        overwrite(x, part)


def exchanging(comm: Communicator, rank: Rank) -> None:
    xs = [x_of(rank, 2 + r) for r in range(comm.size)]
    got = comm.all_to_all(xs)
    overwrite(*xs, *got)


def meeting(comm: Communicator, rank: Rank) -> None:
    comm.barrier()


def sending(comm: Communicator, rank: Rank) -> None:
    if comm.size == 1:
        return
    x = x_of(rank)
    for tag in (0, 1):
        handle = comm.isend(x, (comm.rank + 1) % comm.size, tag)
        overwrite(x)
        received = comm.recv((comm.rank - 1) % comm.size, tag)
        handle.wait()
        overwrite(received)


def overlapping(comm: Communicator, rank: Rank) -> None:
    xs = [x_of(rank) for _ in range(3)]
    handles = [comm.iall_reduce(xs[0]), comm.ireduce_scatter(xs[1]), comm.iall_gather(xs[2])]
    for x, handle in zip(xs, handles, strict=True):
        got = handle.wait()
        overwrite(x, got)


def taught(comm: Communicator, rank: Rank) -> None:
    for function in algorithms.ALL_REDUCES.values():
        x = x_of(rank)
        got = function(comm, x)
        overwrite(x, got)


PROGRAMS = [gathering, reducing, in_place, spreading, exchanging, meeting, sending, overlapping, taught]


@pytest.mark.usefixtures("small_bytes")
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_access_is_ordered_by_events(program: Callable[[Communicator, Rank], None], n: int) -> None:
    for seed in range(3):
        memory = Memory()

        def run(rank: Rank, memory: Memory = memory, seed: int = seed) -> None:
            late = random.Random(10 * seed + rank.index)
            group = rank.comm.group(list(reversed(range(rank.size))))
            with OnStream(f"rank {rank.index}", memory):
                for comm in (rank.comm, group):
                    time.sleep(late.random() * 0.003)
                    program(comm, rank)

        World(n, device="cpu").run(run)
        assert memory.races == []
        assert memory.unrecorded() == [], "the allocator may hand this memory out while another stream still uses it"
        assert memory.used or program is meeting or n == 1


# --- the checker itself must see what it is for ----------------------------------------------------------------------


def handed_over(is_ordered: bool, is_recorded: bool) -> Memory:
    """A writer and a reader on two streams."""
    memory, box = Memory(), SimpleNamespace()

    def write() -> None:
        with OnStream("writer", memory):
            box.x = torch.ones(3)
            box.event = streams.Event()
            box.event.record()

    def read() -> None:
        with OnStream("reader", memory):
            if is_ordered:
                streams.current().wait_event(box.event)
            if is_recorded:
                streams.record_stream(box.x, streams.current())
            box.x + 1

    for target in (write, read):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    return memory


def test_the_checker_sees_a_missing_event_and_a_missing_record() -> None:
    good = handed_over(True, True)
    assert good.races == []
    assert good.unrecorded() == []
    assert "is not ordered after" in handed_over(False, True).races[0]
    assert len(handed_over(True, False).unrecorded()) == 1


@pytest.mark.parametrize("broken", ["no wait", "no record"])
@pytest.mark.usefixtures("small_bytes")
def test_the_checker_sees_a_communicator_without_them(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "no wait":
        monkeypatch.setattr(streams.Stream, "wait_event", lambda self, event: None)
    else:
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: None)
    memory = Memory()

    def run(rank: Rank) -> None:
        with OnStream(f"rank {rank.index}", memory):
            reducing(rank.comm, rank)

    World(2, device="cpu").run(run)
    assert memory.races if broken == "no wait" else memory.unrecorded()


# --- memory of the host ----------------------------------------------------------------------------------------------


def test_a_copy_is_contiguous_and_its_own() -> None:
    memory = HostMemory()
    x = torch.arange(6.0).view(2, 3).t()
    for copy in (memory.copy(x), memory.handover(x, CPU)):
        assert torch.equal(copy, x)
        assert copy.is_contiguous()
        assert copy.data_ptr() != x.data_ptr()
    assert memory.local(x) is x
    assert memory.publish() is None


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.arange(LARGE_BYTES // 4 + 6.0).view(2, -1).t(),
        torch.arange(LARGE_BYTES + 3).to(torch.int8),
        torch.zeros(LARGE_BYTES, 0),
        torch.tensor(1 + 2j).conj(),
    ],
    ids=["small", "large", "odd size", "empty", "conjugated"],
)
def test_a_new_tensor_has_room_for_what_it_is_like(x: Tensor) -> None:
    """Large ones ask the system for large pages, with addresses worked out by hand."""
    out = new_like(x)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    assert out.is_contiguous()
    assert torch.equal(out.copy_(x), x)
    assert torch.equal(HostMemory().copy(x), x)


def test_what_a_barrier_gives_is_no_memory_of_any_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result without elements lies on the host: a stream of that "device" does not exist."""
    asked: list[torch.device] = []

    class GpuStream(streams.Stream):
        device = torch.device("cuda", 0)

    def current_stream(device: torch.device) -> GpuStream:
        asked.append(device)
        return GpuStream("rank 0")

    monkeypatch.setattr(
        mplab.comm.memory, "torch", SimpleNamespace(cuda=SimpleNamespace(current_stream=current_stream))
    )
    CudaMemory(torch.device("cuda", 0)).observe(torch.empty(0), streams.Event())
    assert asked == [torch.device("cuda", 0)]
