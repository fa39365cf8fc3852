"""World: what comes back from a run, what ranks inherit, and that a run leaves nothing behind."""

from __future__ import annotations

import functools
import gc
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from limits import ranks_alive
from sum_over_ranks import SumOverRanks
from torch import Tensor

from mplab import CommTimeout, Link, MplabError, World
from mplab.comm.collectives import SMALL_BYTES
from mplab.comm.hub import Channel, Hub, Meeting
from mplab.comm.threads import ThreadCommunicator
from mplab.world import Rank, rungs

ROOT = Path(__file__).parent.parent
HAS_GPU = torch.cuda.is_available()
LARGE = SMALL_BYTES // 4 + 1  # float32: above what one rank computes for all


@pytest.fixture
def global_seed_is_kept() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


# --- what comes back -------------------------------------------------------------------------------------------------


def test_results_come_in_rank_order_whoever_ends_first() -> None:
    def run(rank: Rank) -> int:
        time.sleep(0.002 * (4 - rank.index))
        return rank.index**2

    assert World(4, device="cpu").run(run) == [0, 1, 4, 9]


def test_a_result_may_be_anything() -> None:
    things = [None, lambda: 3, ValueError("not raised"), (i for i in range(2)), threading.Lock(), torch.ones(1)]
    assert World(6, device="cpu").run(lambda rank: things[rank.index]) == things


def test_anything_that_can_be_called_can_be_run() -> None:
    world = World(2, device="cpu")
    assert world.run(functools.partial(lambda base, rank: base + rank.index, 10)) == [10, 11]

    class Adder:
        def __init__(self, base: int) -> None:
            self.base = base

        def __call__(self, rank: Rank) -> int:
            return self.base + rank.index

        def add(self, rank: Rank, more: int) -> int:
            return self.base + rank.index + more

    assert world.run(Adder(5)) == [5, 6]
    assert world.run(Adder(5).add, 100) == [105, 106]


def test_arguments_and_closures_are_the_same_objects_on_every_rank() -> None:
    shared: list[int] = []
    weights = torch.zeros(3)

    def run(rank: Rank, given: list[int], x: Tensor) -> tuple[bool, bool]:
        given.append(rank.index)
        return given is shared, x is weights

    assert World(3, device="cpu").run(run, shared, weights) == [(True, True)] * 3
    assert sorted(shared) == [0, 1, 2]


def test_what_a_rank_is() -> None:
    def run(rank: Rank) -> Rank:
        assert rank.comm.rank == rank.index
        assert threading.current_thread().name == f"mplab-rank{rank.index}"
        assert threading.current_thread() is not threading.main_thread()
        return rank

    ranks = World(3, device="cpu").run(run)
    assert [rank.index for rank in ranks] == [0, 1, 2]
    assert {rank.size for rank in ranks} == {3}
    assert {rank.device for rank in ranks} == {torch.device("cpu")}
    assert len({id(rank.generator) for rank in ranks}) == 3
    with pytest.raises(AttributeError):
        ranks[0].index = 5  # type: ignore[misc]


def test_one_rank_and_many() -> None:
    assert World(1, device="cpu").run(lambda rank: rank.size) == [1]
    assert World(40, device="cpu").run(lambda rank: rank.index) == list(range(40))


def test_a_world_runs_again_and_again() -> None:
    world = World(2, device="cpu")
    for i in range(5):
        assert world.run(lambda rank, i=i: rank.comm.all_reduce(torch.tensor(i)).item()) == [2 * i] * 2


# --- worlds in worlds ------------------------------------------------------------------------------------------------


def test_a_rank_may_make_a_world_of_its_own() -> None:
    def inner(rank: Rank, base: int) -> int:
        return base + int(rank.comm.all_reduce(torch.tensor(rank.index + 1)))

    def outer(rank: Rank) -> list[int]:
        got = World(2, device="cpu").run(inner, 10 * rank.index)
        rank.comm.barrier()
        return got

    assert World(3, device="cpu").run(outer) == [[3, 3], [13, 13], [23, 23]]


def test_an_error_in_an_inner_world_comes_out_of_the_outer_one() -> None:
    def broken(rank: Rank) -> None:
        if rank.index == 1:
            raise ZeroDivisionError("deep inside")
        rank.comm.barrier()

    def outer(rank: Rank) -> None:
        if rank.index == 0:
            World(2, device="cpu").run(broken)
        rank.comm.barrier()

    with pytest.raises(ZeroDivisionError, match="deep inside") as caught:
        World(2, device="cpu").run(outer)
    assert [note[:14] for note in caught.value.__notes__] == ["(rank 1 of 2; ", "(rank 0 of 2; "]


def test_an_outer_world_is_not_stuck_while_an_inner_one_works() -> None:
    """The rank that runs the inner world is at work: waiting for it is no deadlock."""

    def outer(rank: Rank) -> int:
        if rank.index == 0:
            World(2, device="cpu").run(lambda inner: time.sleep(0.2))
            rank.comm.send(torch.tensor(7), 1)
            return 0
        return int(rank.comm.recv(0))

    assert World(2, device="cpu").run(outer) == [0, 7]


def test_worlds_run_side_by_side_in_threads_of_the_caller() -> None:
    results: dict[int, list[int]] = {}

    def work(i: int) -> None:
        for _ in range(10):
            results[i] = World(2, device="cpu").run(lambda rank: int(rank.comm.all_reduce(torch.tensor(i))))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: [0, 0], 1: [2, 2], 2: [4, 4]}


# --- nothing left behind ---------------------------------------------------------------------------------------------


def alive() -> list[object]:
    """A run's objects. Who keeps the list keeps them: else those of an earlier test might go between two counts."""
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (Hub, Channel, Meeting, ThreadCommunicator, Rank)]


def test_200_runs_leave_no_thread_and_no_memory() -> None:
    before_threads, before_objects = threading.active_count(), alive()

    def run(rank: Rank) -> int:
        right, left = (rank.index + 1) % rank.size, (rank.index - 1) % rank.size
        send = rank.comm.isend(torch.ones(1000), right)
        rank.comm.isend(torch.ones(1000), right, tag=1)  # never received
        rank.comm.recv(left)
        send.wait()
        rank.comm.group([rank.index]).all_reduce(torch.ones(10))
        return int(rank.comm.all_reduce(torch.tensor(1)))

    world = World(3, device="cpu")
    for _ in range(200):
        assert world.run(run) == [3, 3, 3]
    assert threading.active_count() == before_threads
    assert len(alive()) == len(before_objects), "a finished run keeps its events and messages, and nothing else"


def test_failing_runs_leave_nothing_either() -> None:
    before_threads, before_objects = threading.active_count(), alive()

    def run(rank: Rank) -> None:
        if rank.index == 2:
            raise ValueError("as planned")
        rank.comm.all_reduce(torch.ones(LARGE))

    world = World(3, device="cpu")
    for _ in range(50):
        with pytest.raises(ValueError, match="as planned"):
            world.run(run)
    assert threading.active_count() == before_threads
    assert not ranks_alive()
    assert len(alive()) == len(before_objects)


# --- what ranks inherit and what the caller keeps --------------------------------------------------------------------


def test_grad_mode_is_the_callers() -> None:
    world = World(2, device="cpu")
    assert world.run(lambda rank: torch.is_grad_enabled()) == [True, True]
    with torch.no_grad():
        assert world.run(lambda rank: torch.is_grad_enabled()) == [False, False]
        with torch.enable_grad():
            assert world.run(lambda rank: torch.is_grad_enabled()) == [True, True]
    with torch.inference_mode():
        assert world.run(lambda rank: torch.is_inference_mode_enabled()) == [True, True]
        assert world.run(lambda rank: torch.is_grad_enabled()) == [False, False]
    assert world.run(lambda rank: torch.is_inference_mode_enabled()) == [False, False]


def test_autocast_is_the_callers() -> None:
    def run(rank: Rank) -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled("cpu"), (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    world = World(2, device="cpu")
    assert world.run(run) == [(False, torch.float32)] * 2
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert world.run(run) == [(True, dtype)] * 2
    assert world.run(run) == [(False, torch.float32)] * 2


def test_backward_runs_in_its_ranks_thread() -> None:
    """On a CPU it does anyway; the ranks of one GPU would queue for one thread of autograd's."""
    assert World(2, device="cpu").run(lambda rank: torch._C._is_multithreading_enabled()) == [False, False]
    assert torch._C._is_multithreading_enabled()


def test_what_a_rank_sets_is_its_own() -> None:
    def run(rank: Rank) -> bool:
        if rank.index == 0:
            torch.set_grad_enabled(False)
        rank.comm.barrier()
        return torch.is_grad_enabled()

    assert World(2, device="cpu").run(run) == [False, True]
    assert torch.is_grad_enabled()


def test_a_rank_computes_on_one_core_and_the_caller_keeps_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert World(2, device="cpu").run(lambda rank: torch.get_num_threads()) == [1, 1]
        assert torch.get_num_threads() == 3
        with pytest.raises(ValueError, match="now"):
            World(2, device="cpu").run(fail_now)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def fail_now(rank: Rank) -> None:
    raise ValueError("now")


@pytest.mark.usefixtures("global_seed_is_kept")
def test_the_default_dtype_and_global_seed_are_not_touched() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(5)
        want = torch.rand(3)
        torch.manual_seed(5)

        def run(rank: Rank) -> torch.dtype:
            torch.rand(2, generator=rank.generator)
            return rank.comm.all_reduce(torch.ones(1)).dtype

        assert World(3, device="cpu").run(run) == [torch.float64] * 3
        assert torch.equal(torch.rand(3), want), "a run took numbers from the caller's generator"
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# --- random numbers --------------------------------------------------------------------------------------------------


def draw(rank: Rank) -> list[float]:
    drawn = []
    for _ in range(50):
        drawn += torch.rand(2, generator=rank.generator).tolist()
        rank.comm.barrier()
    return drawn


def test_the_same_numbers_in_every_run_and_others_on_every_rank() -> None:
    first, second = World(3, device="cpu").run(draw), World(3, device="cpu").run(draw)
    assert first == second
    assert len({tuple(numbers) for numbers in first}) == 3
    assert World(2, device="cpu").run(draw) == first[:2], "a rank's numbers do not depend on how many others there are"


@pytest.mark.usefixtures("global_seed_is_kept")
def test_neither_the_global_seed_nor_who_draws_from_it_changes_a_ranks_numbers() -> None:
    """`torch.manual_seed` belongs to all threads at once: what a rank draws from it depends on who comes first."""
    want = World(3, device="cpu").run(draw)

    def disturbed(rank: Rank) -> list[float]:
        torch.manual_seed(rank.index)
        torch.rand(10 * rank.index + 1)
        return draw(rank)

    torch.manual_seed(123)
    assert World(3, device="cpu").run(draw) == want
    assert World(3, device="cpu").run(disturbed) == want


# --- backward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [5, LARGE])
def test_collectives_inside_of_backward_on_all_ranks_at_once(n: int, length: int) -> None:
    """With autograd's own threads the ranks would queue for one of them, each waiting there for the others."""

    def run(rank: Rank) -> Tensor:
        x = torch.full((length,), float(rank.index + 1), requires_grad=True)
        for _ in range(3):
            x.grad = None
            y = SumOverRanks.apply(x, rank)  # type: ignore[no-untyped-call]
            (y * (rank.index + 1)).sum().backward()
        assert x.grad is not None
        return x.grad

    for grad in World(n, device="cpu").run(run):
        assert torch.equal(grad, torch.full((length,), n * (n + 1) / 2))


def test_a_hook_may_call_a_collective_too() -> None:
    def run(rank: Rank) -> Tensor:
        weight = torch.nn.Parameter(torch.ones(4))

        def average(p: Tensor) -> None:
            assert p.grad is not None
            rank.comm.all_reduce_(p.grad, "mean")

        weight.register_post_accumulate_grad_hook(average)
        (weight * (rank.index + 1)).sum().backward()
        assert weight.grad is not None
        return weight.grad

    for grad in World(4, device="cpu").run(run):
        assert torch.equal(grad, torch.full((4,), 2.5))


def test_messages_between_stages_inside_of_backward() -> None:
    """Rank 1's backward sends a gradient to rank 0's, which waits for it inside of its own."""

    class Stage(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, rank: Rank) -> Tensor:
            ctx.rank = rank  # type: ignore[attr-defined]
            if rank.index == 0:
                rank.comm.send(x, 1)
                return x.clone()
            return rank.comm.recv(0)

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
            rank: Rank = ctx.rank  # type: ignore[attr-defined]
            if rank.index == 1:
                rank.comm.send(grads[0], 0)
                return grads[0], None
            return rank.comm.recv(1), None

    def run(rank: Rank) -> Tensor:
        x = torch.full((3,), 2.0, requires_grad=True)
        (Stage.apply(x, rank) ** 2).sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        return x.grad

    first, second = World(2, device="cpu").run(run)
    assert first.tolist() == second.tolist() == [4.0, 4.0, 4.0]


# --- what it says of itself ------------------------------------------------------------------------------------------


def test_more_ranks_than_cores_are_noted_wherever_times_are_shown() -> None:
    cores = rungs.num_cores()
    world = World(cores + 2, device="cpu")
    assert world.notes == (f"{cores + 2} ranks share {cores} core{'s' * (cores > 1)}: times are not speed-ups",)
    assert f"{cores + 2} ranks share {cores} core" in str(world)
    assert "times are not speed-ups" in str(world)
    world.run(lambda rank: rank.comm.barrier())
    assert world.timeline.notes == world.notes
    assert World(1, device="cpu").notes == ()


def test_print() -> None:
    lines = str(World(1, device="cpu")).splitlines()
    assert lines[0] == "World of 1 rank: CPU threads (1 on cpu)"
    assert lines[-1].startswith("  timings here can prove: correctness, bytes and order; speed-up up to ")
    link = Link(1e-3, 1e9)
    said = str(World(3, device="cpu", link=link, rendezvous=True))
    assert said.startswith("World of 3 ranks: CPU threads (3 on cpu)\n")
    assert f"emulated link: {link}" in said
    assert "every send waits for its receive" in said
    assert repr(World(1, device="cpu")) == str(World(1, device="cpu"))


def test_auto_is_the_best_rung_there_is() -> None:
    world = World(2)
    assert world.devices[0].type == ("cuda" if HAS_GPU else "cpu")
    assert world.rung.name == (
        "CPU threads" if not HAS_GPU else "GPUs" if torch.cuda.device_count() > 1 else "CUDA streams"
    )


@pytest.mark.parametrize("n", [0, -1, 2.5, 2.0, "4", None, True])
def test_a_world_has_a_whole_number_of_ranks(n: int) -> None:
    with pytest.raises(MplabError, match=rf"World\({n!r}\).*whole number of ranks"):
        World(n, device="cpu")


@pytest.mark.parametrize("device", ["tpu", "gpu", "", "cuda:x", None, 3.5, ["cpu"]])
def test_a_device_that_does_not_exist(device: str) -> None:
    with pytest.raises(MplabError, match=r"device=.*'auto', 'cpu', 'cuda'"):
        World(2, device=device)


@pytest.mark.parametrize("device", ["mps", "meta", "xpu"])
def test_a_device_that_ranks_do_not_run_on(device: str) -> None:
    with pytest.raises(MplabError, match=f"device='{device}': ranks run on 'cpu' or 'cuda'"):
        World(2, device=device)


def test_a_gpu_that_is_not_there() -> None:
    count = torch.cuda.device_count() if HAS_GPU else 0
    with pytest.raises(MplabError, match=rf"device='cuda:{count}', but torch sees {count} GPUs here"):
        World(2, device=f"cuda:{count}")


@pytest.mark.skipif(HAS_GPU, reason="what a machine without a GPU says")
def test_without_a_gpu() -> None:
    with pytest.raises(MplabError, match="torch sees 0 GPUs here: choose 'auto' or 'cpu'"):
        World(2, device="cuda")
    with pytest.raises(MplabError, match="slices=True shares out the SMs of a GPU, and there is none here"):
        World(2, slices=True)


def test_slices_of_a_cpu() -> None:
    with pytest.raises(MplabError, match="slices=True shares out the SMs of a GPU"):
        World(2, device="cpu", slices=True)


@pytest.mark.parametrize("timeout_s", [0, -1.0, math.nan, "30", None])
def test_a_time_out_is_a_positive_number(timeout_s: float) -> None:
    with pytest.raises(MplabError, match=r"timeout_s=.*positive number of seconds"):
        World(2, device="cpu", timeout_s=timeout_s)


def test_no_time_out_at_all() -> None:
    assert World(2, device="cpu", timeout_s=math.inf).run(lambda rank: rank.comm.barrier()) == [None, None]


def test_nothing_to_see_before_the_first_run() -> None:
    world = World(2, device="cpu")
    with pytest.raises(MplabError, match="has not run yet"):
        _ = world.ledgers
    with pytest.raises(MplabError, match="has not run yet"):
        _ = world.timeline


def test_from_env_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]:
        monkeypatch.delenv(name)
    with pytest.raises(MplabError, match="torchrun"):
        World.from_env()


# --- the timeline of a run -------------------------------------------------------------------------------------------


def test_spans_messages_and_waits_of_every_rank() -> None:
    world = World(2, device="cpu")

    def run(rank: Rank) -> None:
        with rank.span("forward", microbatch=3), rank.span("inner"):
            time.sleep(0.001)
        if rank.index == 0:
            time.sleep(0.05)
            rank.comm.send(torch.ones(6), 1)
        else:
            rank.comm.recv(0)
        rank.comm.all_reduce(torch.ones(3))

    world.run(run)
    timeline = world.timeline
    assert timeline.num_ranks == 2
    for rank in (0, 1):
        by_name = {(e.lane, e.name): e for e in timeline.rank(rank)}
        forward, inner = by_name["compute", "forward"], by_name["compute", "inner"]
        assert (forward.microbatch, inner.microbatch) == (3, None)
        assert 0 <= forward.start_s <= inner.start_s <= inner.end_s <= forward.end_s
        assert ("wait", "all_reduce") in by_name
        assert (
            by_name["message", "all_reduce"].size_bytes == 12
        )  # of 3 elements 1 or 2 go to the other rank, and 2 or 1 sums
    sent = next(e for e in timeline.rank(0) if e.name == "send")
    waited = next(e for e in timeline.rank(1) if e.lane == "wait" and e.name == "recv")
    assert (sent.lane, sent.size_bytes) == ("message", 24)
    assert waited.end_s >= sent.start_s, "a message is received after it was sent: one clock for all ranks"
    assert all(0 <= e.start_s <= e.end_s for e in timeline.events)


@pytest.mark.parametrize("length", [10, LARGE])
def test_bytes_on_the_timeline_are_those_of_the_ledger(length: int) -> None:
    world = World(3, device="cpu")

    def run(rank: Rank) -> None:
        x = torch.ones(length)
        rank.comm.all_reduce(x)
        rank.comm.reduce_scatter(x)
        handle = rank.comm.iall_gather(x)
        rank.comm.broadcast(x, 1)
        handle.wait()
        rank.comm.all_to_all([x] * 3)
        rank.comm.barrier()
        send = rank.comm.isend(x, (rank.index + 1) % 3)
        rank.comm.recv((rank.index - 1) % 3)
        send.wait()

    world.run(run)
    for rank, ledger in enumerate(world.ledgers):
        events = world.timeline.rank(rank)
        assert sum(e.size_bytes for e in events) == ledger.sent_bytes
        assert {e.name for e in events if e.lane == "message"} == {m.op for m in ledger.messages if m.sent_bytes} | {
            "barrier",
            "broadcast",
        }
        assert all(e.size_bytes == 0 for e in events if e.lane == "wait")


def test_events_of_a_run_stand_for_that_run_alone() -> None:
    world = World(2, device="cpu")
    world.run(lambda rank: rank.comm.barrier())
    kept = world.timeline
    world.run(lambda rank: None)
    assert len(kept.events) == 4
    assert world.timeline.events == ()


def test_what_happened_before_an_error_can_be_looked_at() -> None:
    world = World(2, device="cpu")

    def run(rank: Rank) -> None:
        rank.comm.barrier()
        with rank.span("doomed"):
            if rank.index == 0:
                raise ValueError("here")
        rank.comm.barrier()

    with pytest.raises(ValueError, match="here"):
        world.run(run)
    assert [ledger.messages[0].op for ledger in world.ledgers] == ["barrier", "barrier"]
    assert "doomed" in {e.name for e in world.timeline.rank(0)}


def test_a_waiting_rank_is_named_by_its_time_out_and_not_by_its_world() -> None:
    """`timeout_s` is for waits, not for work: a rank that computes for longer is left alone."""
    world = World(2, device="cpu", timeout_s=0.1)
    assert world.run(lambda rank: time.sleep(0.3)) == [None, None]
    with pytest.raises(CommTimeout):
        world.run(lambda rank: time.sleep(0.5) if rank.index else rank.comm.recv(1))


def late_wait(rank: Rank) -> None:
    handle = rank.comm.iall_reduce(torch.ones(3, device=rank.device))
    time.sleep(0.05)  # all have called it long before any of them waits
    handle.wait()


def test_an_asynchronous_collective_that_was_over_before_the_wait_is_on_the_timeline() -> None:
    """Its end must not come before its start: a timeline refuses such an event."""
    world = World(3, device="cpu")
    world.run(late_wait)
    for rank in range(3):
        assert {e.lane for e in world.timeline.rank(rank)} == {"wait", "message"}


FAULTS = """
import resource, torch
from mplab import World

def faults(rank):
    counts = [resource.getrusage(resource.RUSAGE_THREAD).ru_minflt]
    for _ in range(12):
        tensors = [torch.ones(1 << 19) for _ in range(8)]
        del tensors
        counts.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt)
    return counts[-1] - counts[-5]  # in the last four rounds

world = World(2, "cpu")
print(max(max(world.run(faults)) for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told to")
def test_ranks_keep_the_memory_of_tensors_that_they_free() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 4096, "16 MiB are 4096 pages, and each of the four rounds would touch most of them anew"
