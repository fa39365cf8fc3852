"""Bytes of live tensors, counted by hand."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn

from mplab import MplabError, World, private
from mplab.comm import collectives
from mplab.comm.threads import ThreadCommunicator
from mplab.trace.live import LiveBytes
from mplab.world import Rank

KB = 256  # float32 elements


def test_what_is_let_go_counts_no_longer() -> None:
    with LiveBytes() as live:
        assert live.now_bytes == live.peak_bytes == 0
        x = torch.ones(KB)
        y = x + 1
        assert live.now_bytes == 2048
        del x
        assert live.now_bytes == 1024
        y = y.double()
        assert (live.now_bytes, live.peak_bytes) == (2048, 3072)
        del y
        assert (live.now_bytes, live.peak_bytes) == (0, 3072)


def test_views_and_work_in_place_are_no_new_memory() -> None:
    with LiveBytes() as live:
        x = torch.zeros(KB)
        parts = [x.view(2, -1), x[1:3], x.detach(), x.add_(1), torch.add(x, x, out=x), *x.chunk(4)]
        parameter = nn.Parameter(x)
        del x
        assert live.now_bytes == live.peak_bytes == 1024
        del parts, parameter
        assert live.now_bytes == 0


def test_every_way_to_make_a_tensor_counts() -> None:
    with LiveBytes() as live:
        made = [torch.tensor([1.0] * KB), torch.empty(KB), torch.zeros(2 * KB).clone()]
        assert (live.now_bytes, live.peak_bytes) == (4 * 1024, 6 * 1024)  # zeros beside its clone
        del made
        parts = torch.unbind_copy(torch.ones(2, KB))  # a tuple of two
        assert live.now_bytes == 2048
        del parts
        meta = torch.empty(KB, device="meta")
        assert (live.now_bytes, meta.nbytes) == (0, 1024)


def test_a_storage_counts_with_its_present_size() -> None:
    with LiveBytes() as live:
        x = torch.ones(KB)
        x.untyped_storage().resize_(0)
        assert live.now_bytes == 0
        x.untyped_storage().resize_(1024)
        y = torch.ones(1)
        assert live.now_bytes == live.peak_bytes == 1024 + y.nbytes


def test_what_was_there_before_counts_where_it_is_known() -> None:
    x, y = torch.ones(KB), torch.ones(KB)
    with LiveBytes(known=[x, x.view(-1)]) as live:
        assert live.now_bytes == live.peak_bytes == 1024
        y.add_(x)
        assert live.peak_bytes == 1024
        del x
        assert (live.now_bytes, live.peak_bytes) == (0, 1024)


def test_a_peak_can_be_measured_anew() -> None:
    with LiveBytes() as live:
        x = torch.ones(KB)
        torch.ones(8 * KB)
        live.restart()
        assert live.peak_bytes == 1024
        y = x + 1
    after = x + y  # noqa: F841
    assert (live.now_bytes, live.peak_bytes) == (2048, 2048), "what is made after the block does not count"


@pytest.mark.parametrize("is_split", [False, True])
def test_a_step_by_hand(is_split: bool) -> None:
    """x @ w, its loss and its gradient; backward's tensors count as forward's do."""
    x, w = torch.ones(4, KB), torch.ones(KB, 8, requires_grad=True)
    with LiveBytes(known=[w]) as live, torch.autograd.set_multithreading_enabled(not is_split):
        loss = (x @ w).sum()
        assert live.now_bytes == w.nbytes + 4
        loss.backward()
        del loss
        gc.collect()
        assert live.now_bytes == 2 * w.nbytes
        assert live.peak_bytes == 2 * w.nbytes + 4 + 4  # the loss, and the 1 with which backward begins
        assert w.grad is not None
        w.grad = None
        assert live.now_bytes == w.nbytes


@pytest.mark.parametrize("n", [1, 2, 3])
def test_each_rank_counts_its_own(n: int) -> None:
    def run(rank: Rank) -> tuple[int, int]:
        with LiveBytes() as live:
            x = torch.ones((rank.index + 1) * KB)
            rank.comm.barrier()
            y = x * 2
            rank.comm.barrier()
            now_bytes = live.now_bytes
            del x, y
            return now_bytes, live.now_bytes

    assert World(n, device="cpu").run(run) == [(2048 * (r + 1), 0) for r in range(n)]


@pytest.mark.parametrize("length", [100, 300_001], ids=["one rank computes", "all compute"])
def test_a_peers_tensors_are_not_this_ranks(length: int) -> None:
    """In an all-reduce of threads a rank reads what the others hold, and may write to it."""

    def run(rank: Rank) -> tuple[int, int]:
        with LiveBytes() as live:
            x = torch.ones(length)
            rank.comm.all_reduce_(x)
            y = rank.comm.all_reduce_(x)
            assert y is x
            return live.now_bytes, live.peak_bytes

    for now_bytes, peak_bytes in World(3, device="cpu").run(run):
        assert now_bytes == 4 * length
        assert peak_bytes <= 8 * length


@pytest.mark.parametrize("length", [300, 600_000], ids=["small", "large"])
def test_results_of_a_collective_count_where_they_are_used(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each rank computes its own."""
    monkeypatch.setattr(collectives, "SMALL_BYTES", 0)

    def run(rank: Rank) -> list[int]:
        with LiveBytes() as live:
            rank.comm.barrier()  # all count
            x = torch.ones(length)
            counts = [live.now_bytes]
            chunk = rank.comm.reduce_scatter(x)
            counts.append(live.now_bytes)
            whole = rank.comm.all_gather(chunk)
            counts.append(live.now_bytes)
            assert whole.shape == x.shape
            return counts

    assert World(3, device="cpu").run(run) == [[4 * length, 16 * length // 3, 28 * length // 3]] * 3


def test_a_rank_that_is_back_has_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though another rank, which read that memory, has not yet come to the end of the collective."""
    is_counted, write_down = threading.Event(), ThreadCommunicator._write_down

    def slowly(self: ThreadCommunicator, *args: Any) -> None:
        assert self.rank == 0 or is_counted.wait(10)
        write_down(self, *args)

    def run(rank: Rank) -> int:
        with LiveBytes() as live:
            chunk = rank.comm.reduce_scatter(torch.ones(600_000))
            now_bytes = live.now_bytes - chunk.nbytes
            if rank.index == 0:
                is_counted.set()
            return now_bytes

    monkeypatch.setattr(ThreadCommunicator, "_write_down", slowly)
    assert World(2, device="cpu").run(run) == [0, 0]


def test_an_error_inside_leaves_no_counting_behind() -> None:
    live = LiveBytes()
    with pytest.raises(ZeroDivisionError), live:
        raise ZeroDivisionError
    x = torch.ones(KB)
    assert live.peak_bytes == live.now_bytes == 0
    assert x.nbytes == 1024


def test_a_device_that_cannot_be_counted_is_refused() -> None:
    with pytest.raises(MplabError, match=r'LiveBytes\(device="meta"\)|LiveBytes\(device=\'meta\'\)'):
        LiveBytes(device="meta")


def test_a_torch_that_shows_no_ops_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "seeing_ops", lambda see: None)
    with pytest.raises(MplabError, match="take a torch from 2"), LiveBytes():
        pass


def test_without_the_private_name_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.utils._python_dispatch.TorchDispatchMode")
    assert private.seeing_ops(lambda *_: None) is None


def test_every_op_of_this_thread_is_seen() -> None:
    seen: list[tuple[str, Any]] = []
    x = torch.ones(3, requires_grad=True)
    seeing = private.seeing_ops(lambda op, arguments, result: seen.append((str(op), result)))
    assert seeing is not None
    with seeing:
        (x * x).sum().backward()
    torch.ones(1)
    assert [name for name, _ in seen[:2]] == ["aten.mul.Tensor", "aten.sum.default"]
    assert sum(name == "aten.mul.Tensor" for name, _ in seen) == 3, "two more in the backward"
    assert all(isinstance(result, Tensor) for _, result in seen)


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_answers() -> None:
    torch.cuda.empty_cache()  # it may have kept a somewhat larger piece of memory, which would count as a whole
    weight = torch.ones(1 << 20, device="cuda")
    with LiveBytes(known=[weight], device="cuda") as live:
        assert live.now_bytes == live.peak_bytes == 4 << 20
        x = weight + 1
        del x
        assert (live.now_bytes, live.peak_bytes) == (4 << 20, 8 << 20)
        live.restart()
        assert live.peak_bytes == 4 << 20
    torch.ones(1 << 22, device="cuda")
    assert live.peak_bytes == 4 << 20


@pytest.mark.gpu
def test_on_a_gpu_all_ranks_count_together() -> None:
    def run(rank: Rank) -> None:
        x = torch.ones(1 << 20, device=rank.device)
        rank.comm.barrier()
        del x

    torch.cuda.empty_cache()
    with LiveBytes(device="cuda") as live:
        World(2, device="cuda:0").run(run)
    assert 8 << 20 <= live.peak_bytes < 9 << 20
