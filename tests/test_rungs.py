"""Which devices ranks get on machines that are not here: GPUs are played."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from mplab import MplabError
from mplab.world import rungs, state


class Machine:
    """Tells torch that there are GPUs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def has(self, num_gpus: int, num_sms: int = 132, major: int = 9, green_contexts: bool = True) -> None:
        from torch.cuda import green_contexts as module

        properties = SimpleNamespace(multi_processor_count=num_sms, major=major, name="a GPU")
        self._patch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        self._patch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        self._patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        self._patch.setattr(module, "SUPPORTED", green_contexts)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def names(rung: rungs.Rung) -> list[str]:
    return [str(device) for device in rung.devices]


def test_a_gpu_each(machine: Machine) -> None:
    machine.has(4)
    rung = rungs.choose(3, "auto", slices=False)
    assert rung.name == "GPUs"
    assert names(rung) == ["cuda:0", "cuda:1", "cuda:2"]
    assert rung.sharing == ""


def test_streams_of_one_gpu(machine: Machine) -> None:
    machine.has(1)
    for device in ("auto", "cuda", "cuda:0"):
        rung = rungs.choose(4, device, slices=False)
        assert rung.name == "CUDA streams"
        assert names(rung) == ["cuda:0"] * 4
        assert rung.sharing == "4 ranks share 1 GPU"
        assert "times are not speed-ups" in rung.proves


def test_one_gpu_of_several(machine: Machine) -> None:
    machine.has(4)
    assert names(rungs.choose(2, "cuda:2", slices=False)) == ["cuda:2", "cuda:2"]


def test_more_ranks_than_gpus(machine: Machine) -> None:
    machine.has(2)
    rung = rungs.choose(5, "cuda", slices=False)
    assert names(rung) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert rung.name == "CUDA streams"
    assert rung.sharing == "5 ranks share 2 GPUs"


def test_the_cpu_of_a_machine_with_gpus(machine: Machine) -> None:
    machine.has(2)
    rung = rungs.choose(2, "cpu", slices=False)
    assert rung.name == "CPU threads"
    assert names(rung) == ["cpu", "cpu"]


def test_a_gpu_too_far(machine: Machine) -> None:
    machine.has(2)
    with pytest.raises(MplabError, match="device='cuda:2', but torch sees 2 GPUs here"):
        rungs.choose(2, "cuda:2", slices=False)


@pytest.mark.parametrize(
    ("num_ranks", "num_gpus", "num_sms", "major", "share"),
    [
        (4, 1, 132, 9, 32),  # 33 in steps of 8
        (2, 1, 132, 9, 64),
        (16, 1, 132, 9, 8),
        (4, 1, 108, 8, 26),  # 27 in steps of 2
        (1, 1, 132, 9, 128),
        (4, 2, 132, 9, 64),  # two ranks a GPU
    ],
)
def test_the_share_of_each_rank(
    machine: Machine, num_ranks: int, num_gpus: int, num_sms: int, major: int, share: int
) -> None:
    machine.has(num_gpus, num_sms, major)
    rung = rungs.choose(num_ranks, "cuda", slices=True)
    assert rung.name == "SM slices"
    assert rung.num_sms == share


def test_shares_that_are_too_small(machine: Machine) -> None:
    machine.has(1)
    with pytest.raises(MplabError, match="132 SMs of a GPU cannot be shared by 17 ranks in steps of 8: use at most 16"):
        rungs.choose(17, "cuda", slices=True)


def test_a_torch_without_green_contexts(machine: Machine) -> None:
    machine.has(1, green_contexts=False)
    with pytest.raises(MplabError, match=r"slices=True needs torch\.cuda\.green_contexts"):
        rungs.choose(2, "cuda", slices=True)


def test_slices_without_a_gpu(machine: Machine) -> None:
    machine.has(0)
    with pytest.raises(MplabError, match="slices=True shares out the SMs of a GPU, and there is none here"):
        rungs.choose(2, "auto", slices=True)


# --- streams, and those of green contexts ----------------------------------------------------------------------------


class FakeContext:
    """A green context: made once, and never while another thread uses it."""

    made: ClassVar[list[FakeContext]] = []

    @staticmethod
    def create(*, num_sms: int, device_id: int) -> FakeContext:
        if num_sms > 100:
            raise RuntimeError("not that many")
        FakeContext.made.append(FakeContext())
        return FakeContext.made[-1]

    def Stream(self) -> FakeContext:
        return self


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeContext]:
    """The stream that every thread is on."""
    on: dict[str, FakeContext] = {}

    @contextmanager
    def stream(s: FakeContext) -> Iterator[None]:
        assert s not in on.values(), "two ranks on one stream"
        on[threading.current_thread().name] = s
        yield
        del on[threading.current_thread().name]

    monkeypatch.setattr("torch.cuda.green_contexts.GreenContext", FakeContext)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeContext.create(num_sms=0, device_id=device.index))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(state, "_streams", {})
    monkeypatch.setattr(FakeContext, "made", [])
    return on


@pytest.mark.parametrize("num_sms", [0, 32])
def test_every_rank_has_a_stream_of_its_own_and_keeps_it(num_sms: int, current: dict[str, FakeContext]) -> None:
    """Memory that a stream has used goes back to the allocator through that stream, long after the run."""
    gpu, barrier = torch.device("cuda", 0), threading.Barrier(3)
    had: list[dict[int, FakeContext]] = []

    def work(rank: int) -> None:
        with state._stream(gpu, num_sms, rank):
            barrier.wait()
            had[-1][rank] = current[threading.current_thread().name]
            barrier.wait()

    for first in range(3):  # which rank begins, and ends
        had.append({})
        threads = [threading.Thread(target=work, args=((first + i) % 3,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(FakeContext.made) == len(set(had[0].values())) == 3
    assert had[0] == had[1] == had[2]
    assert not current


def test_a_share_that_the_driver_refuses(current: dict[str, FakeContext]) -> None:
    with pytest.raises(MplabError, match=r"no share of 128 SMs on cuda:0 \(not that many\): use slices=False"):
        state._sm_slice(128, torch.device("cuda", 0))
