"""The checks of exercises: right solutions pass, and every wrong one fails for the reason that is its own."""

from __future__ import annotations

import operator
import runpy
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from graded import check_stub
from torch import Tensor

from mplab import MplabError
from mplab.__main__ import main as command_line
from mplab.comm import Communicator, Message, algorithms
from mplab.homework import (
    Report,
    check_pass_right,
    check_reduce_scatter,
    check_ring_all_reduce,
    check_weighted_mean,
)
from mplab.homework.exam import Solution
from mplab.plan import cost

ONLY = "only send and recv are used"
OWN = "mplab's own is not called"
FINISHES = "every rank finishes"
RIGHT = "the result is right"
INPUT = "the input is left alone"
NEW = "the result is a new tensor"
MESSAGES = "messages that each rank sends"
BYTES = "bytes that each rank sends"
NEIGHBOUR = "each rank sends to one neighbour"
HOPS = "hops from start to end"
RENDEZVOUS = "every rank finishes when sends wait for receives"
BY_MESSAGES = "the result comes out of messages"


def exchange(comm: Communicator, x: Tensor, way: int = 1) -> Tensor:
    """Send to one neighbour, receive from the other, at the same time."""
    handle = comm.isend(x, (comm.rank + way) % comm.size)
    received = comm.recv((comm.rank - way) % comm.size)
    handle.wait()
    return received


def ring(comm: Communicator, x: Tensor, way: int = 1, first: int = 0) -> list[Tensor]:
    """Chunks of x, all of them reduced; `first`: the chunk that rank 0 owns after the first half."""
    n, own = comm.size, comm.rank + first
    chunks = list(x.clone().tensor_split(n))
    for step in range(n - 1):
        mine = chunks[(own - way * (step + 2)) % n]
        mine += exchange(comm, chunks[(own - way * (step + 1)) % n], way)
    for step in range(n - 1):
        chunks[(own - way * (step + 1)) % n] = exchange(comm, chunks[(own - way * step) % n], way)
    return chunks


def right_ring(comm: Communicator, x: Tensor) -> Tensor:
    return torch.cat(ring(comm, x))


def left_ring(comm: Communicator, x: Tensor) -> Tensor:
    return torch.cat(ring(comm, x, way=-1))


def ring_from_the_own_chunk(comm: Communicator, x: Tensor) -> Tensor:
    """As most books draw it: each rank begins with the chunk of its own number."""
    return torch.cat(ring(comm, x, first=1))


def ring_of_irecv(comm: Communicator, x: Tensor) -> Tensor:
    n, rank = comm.size, comm.rank
    chunks = list(x.clone().tensor_split(n))
    for step in range(2 * (n - 1)):
        coming, handle = comm.irecv((rank - 1) % n), comm.isend(chunks[(rank - 1 - step) % n], (rank + 1) % n)
        received, place = coming.wait(), (rank - 2 - step) % n
        chunks[place] = chunks[place] + received if step < n - 1 else received
        handle.wait()
    return torch.cat(chunks)


@pytest.mark.parametrize(
    "solution",
    [right_ring, left_ring, ring_from_the_own_chunk, ring_of_irecv],
    ids=lambda solution: solution.__name__,
)
def test_right_rings_pass(solution: Solution) -> None:
    report = check_ring_all_reduce(solution)
    assert report.passed, str(report)
    assert str(report).startswith("ring_all_reduce: 12 of 12 checks passed")


# --- wrong rings ------------------------------------------------------------------------------------------------------


def direct(comm: Communicator, x: Tensor) -> Tensor:
    return comm.all_reduce(x)


def direct_with_the_refusal_caught(comm: Communicator, x: Tensor) -> Tensor:
    try:
        return comm.all_reduce(x)
    except MplabError:
        return right_ring(comm, x)


def direct_by_the_back_door(comm: Communicator, x: Tensor) -> Tensor:
    (real,) = (value for value in vars(comm).values() if isinstance(value, Communicator))
    return real.all_reduce(x)


def with_a_barrier(comm: Communicator, x: Tensor) -> Tensor:
    comm.barrier()
    return right_ring(comm, x)


def whole_tensors(comm: Communicator, x: Tensor) -> Tensor:
    """The right answer after n - 1 hops, every one of them with the whole tensor."""
    total, travelling = x.clone(), x
    for _ in range(comm.size - 1):
        travelling = exchange(comm, travelling)
        total += travelling
    return total


def whole_tensors_twice(comm: Communicator, x: Tensor) -> Tensor:
    """Also the right number of messages."""
    total = whole_tensors(comm, x)
    for _ in range(comm.size - 1):
        exchange(comm, total)
    return total


def to_a_master(comm: Communicator, x: Tensor) -> Tensor:
    if comm.rank:
        comm.send(x, 0)
        return comm.recv(0)
    total = x + sum(comm.recv(rank) for rank in range(1, comm.size))
    for rank in range(1, comm.size):
        comm.send(total, rank)
    return total


def everything_to_everybody(comm: Communicator, x: Tensor) -> Tensor:
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    handles = [comm.isend(x, rank) for rank in others]
    total = x + sum(comm.recv(rank) for rank in others)
    for handle in handles:
        handle.wait()
    return total


def everything_round_the_ring(comm: Communicator, x: Tensor) -> Tensor:
    """Gathers all tensors at every rank, and sums them there."""
    parts = [x]
    for _ in range(comm.size - 1):
        parts.append(exchange(comm, parts[-1]))
    return torch.stack(parts).sum(0)


def chunks_to_their_owners(comm: Communicator, x: Tensor) -> Tensor:
    """The bytes of a ring and no ring: every rank sends to all others."""
    n, rank = comm.size, comm.rank
    chunks = list(x.clone().tensor_split(n))
    right, left = [(rank + i) % n for i in range(1, n)], [(rank - i) % n for i in range(1, n)]
    handles = [comm.isend(chunks[r], r) for r in right]
    for r in left:
        chunks[rank] += comm.recv(r)
    handles += [comm.isend(chunks[rank], r) for r in right]
    for r in left:
        chunks[r] = comm.recv(r)
    for handle in handles:
        handle.wait()
    return torch.cat(chunks)


def in_place(comm: Communicator, x: Tensor) -> Tensor:
    n = comm.size
    chunks = x.tensor_split(n)
    for step in range(2 * (n - 1)):
        received = exchange(comm, chunks[(comm.rank - 1 - step) % n])
        mine = chunks[(comm.rank - 2 - step) % n]
        mine.copy_(mine + received if step < n - 1 else received)
    return x.clone()


def the_input_back(comm: Communicator, x: Tensor) -> Tensor:
    return x if comm.size == 1 else right_ring(comm, x)


def blocking_send(comm: Communicator, x: Tensor) -> Tensor:
    """Works as long as someone buffers what nobody receives yet."""
    n, rank = comm.size, comm.rank
    chunks = list(x.clone().tensor_split(n))
    for step in range(2 * (n - 1)):
        comm.send(chunks[(rank - 1 - step) % n], (rank + 1) % n)
        received, place = comm.recv((rank - 1) % n), (rank - 2 - step) % n
        chunks[place] = chunks[place] + received if step < n - 1 else received
    return torch.cat(chunks)


def all_receive_first(comm: Communicator, x: Tensor) -> Tensor:
    if comm.size == 1:
        return x.clone()
    received = comm.recv((comm.rank - 1) % comm.size)
    comm.send(x, (comm.rank + 1) % comm.size)
    return x + received


def one_after_another(comm: Communicator, x: Tensor) -> Tensor:
    """No deadlock, since rank 0 sends first; but every hop waits for the one before it around the whole ring."""
    n, rank = comm.size, comm.rank
    chunks = list(x.clone().tensor_split(n))
    for step in range(2 * (n - 1)):
        place = (rank - 2 - step) % n
        if rank == 0:
            comm.send(chunks[(rank - 1 - step) % n], (rank + 1) % n)
        received = comm.recv((rank - 1) % n)
        if rank != 0:
            comm.send(chunks[(rank - 1 - step) % n], (rank + 1) % n)
        chunks[place] = chunks[place] + received if step < n - 1 else received
    return torch.cat(chunks)


def only_equal_chunks(comm: Communicator, x: Tensor) -> Tensor:
    n, size = comm.size, len(x) // comm.size
    if size * n == len(x):
        return right_ring(comm, x)
    return torch.cat(ring(comm, x[: size * n]))


def chunk_instead_of_tensor_split(comm: Communicator, x: Tensor) -> Tensor:
    """`x.chunk(n)` cuts 3 elements for 4 ranks into 3 chunks, and 7 into 2 + 2 + 2 + 1."""
    n, rank = comm.size, comm.rank
    chunks = list(x.clone().chunk(n))
    for step in range(2 * (n - 1)):
        received = exchange(comm, chunks[(rank - 1 - step) % n])
        place = (rank - 2 - step) % n
        chunks[place] = chunks[place] + received if step < n - 1 else received
    return torch.cat(chunks)


def a_hop_short(comm: Communicator, x: Tensor) -> Tensor:
    n, rank = comm.size, comm.rank
    chunks = list(x.clone().tensor_split(n))
    for step in range(2 * (n - 1) - (n > 1)):
        received = exchange(comm, chunks[(rank - 1 - step) % n])
        place = (rank - 2 - step) % n
        chunks[place] = chunks[place] + received if step < n - 1 else received
    return torch.cat(chunks)


def the_mean(comm: Communicator, x: Tensor) -> Tensor:
    return right_ring(comm, x) / comm.size


def nothing_returned(comm: Communicator, x: Tensor) -> None:
    right_ring(comm, x)


def another_dtype(comm: Communicator, x: Tensor) -> Tensor:
    return right_ring(comm, x).double()


def a_tensor_that_lies(comm: Communicator, x: Tensor) -> Tensor:
    class AlwaysEqual(Tensor):
        @classmethod
        def __torch_function__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> bool:
            return True

    return right_ring(comm, x).zero_().as_subclass(AlwaysEqual)


def raises(comm: Communicator, x: Tensor) -> Tensor:
    if comm.rank == 1:
        raise ValueError("my index is off")
    return right_ring(comm, x)


def leaves(comm: Communicator, x: Tensor) -> Tensor:
    sys.exit("enough")


def writes_the_ledger(comm: Communicator, x: Tensor) -> Tensor:
    """Sends whole tensors, and puts the record of a ring in place of what it sees of the ledger."""
    total = whole_tensors_twice(comm, x)
    comm.ledger.messages.clear()
    to = ((comm.rank + 1) % comm.size,)
    num_messages, num_bytes = cost.ring_all_reduce(comm.size, comm.rank, x.numel(), 4)
    for hop in range(num_messages):
        comm.ledger.add(Message("send", comm.ranks, to, 1, num_bytes if hop == 0 else 0, 0, 0, 0))
    return total


SHARED: dict[int, list[Tensor]] = {}
LOCK = threading.Lock()


def through_shared_memory(comm: Communicator, x: Tensor) -> Tensor:
    """Has the messages of a ring, and reads the other ranks' tensors where they lie."""
    with LOCK:
        SHARED.setdefault(comm.size, [])
        SHARED[comm.size].append(x)
        mine = len(SHARED[comm.size]) - 1
    ring(comm, x)
    first = mine // comm.size * comm.size
    return torch.stack(SHARED[comm.size][first : first + comm.size]).sum(0)


@pytest.fixture(autouse=True)
def nothing_shared() -> None:
    SHARED.clear()


WRONG_RINGS: list[tuple[Callable[..., object], list[str]]] = [
    (direct, [ONLY]),
    (direct_with_the_refusal_caught, [ONLY]),
    (direct_by_the_back_door, [ONLY]),
    (with_a_barrier, [ONLY]),
    (whole_tensors, [MESSAGES, BYTES]),
    (whole_tensors_twice, [BYTES]),
    (to_a_master, [MESSAGES, BYTES, NEIGHBOUR]),
    (everything_to_everybody, [MESSAGES, BYTES, NEIGHBOUR]),
    (everything_round_the_ring, [MESSAGES, BYTES]),
    (chunks_to_their_owners, [BYTES, NEIGHBOUR]),
    (algorithms.halving_doubling_all_reduce, [OWN, MESSAGES, BYTES, NEIGHBOUR]),
    (algorithms.ring_all_reduce, [OWN]),
    (in_place, [INPUT]),
    (the_input_back, [NEW]),
    (blocking_send, [RENDEZVOUS]),
    (all_receive_first, [FINISHES]),
    (one_after_another, [HOPS]),
    (only_equal_chunks, [RIGHT, BYTES]),
    (chunk_instead_of_tensor_split, [FINISHES, BYTES]),
    (a_hop_short, [RIGHT, MESSAGES, BYTES]),
    (the_mean, [RIGHT]),
    (nothing_returned, [RIGHT]),
    (another_dtype, [RIGHT]),
    (a_tensor_that_lies, [RIGHT]),
    (raises, [FINISHES]),
    (leaves, [FINISHES]),
    (writes_the_ledger, [BYTES]),
    (through_shared_memory, [BY_MESSAGES]),
]


@pytest.mark.parametrize(("solution", "reasons"), WRONG_RINGS, ids=[solution.__name__ for solution, _ in WRONG_RINGS])
def test_wrong_rings_fail_for_their_own_reason(solution: Solution, reasons: list[str]) -> None:
    report = check_ring_all_reduce(solution)
    assert list(report.failed) == reasons, str(report)
    assert not report.passed
    for line in report.lines:
        if line.outcome == "failed":
            assert all([line.case, line.expected, line.seen, line.hint]), line


# --- reduce-scatter ---------------------------------------------------------------------------------------------------


def right_scatter(comm: Communicator, x: Tensor) -> Tensor:
    n, rank = comm.size, comm.rank
    chunks = list(x.clone().tensor_split(n))
    for step in range(n - 1):
        mine = chunks[(rank - 2 - step) % n]
        mine += exchange(comm, chunks[(rank - 1 - step) % n])
    return chunks[rank]


def direct_exchange(comm: Communicator, x: Tensor) -> Tensor:
    """Every chunk goes straight to its owner, in an order in which nobody gets two at once."""
    n, rank = comm.size, comm.rank
    chunks = x.tensor_split(n)
    handles = [comm.isend(chunks[(rank + i) % n], (rank + i) % n) for i in range(1, n)]
    total = chunks[rank].clone()
    for i in range(1, n):
        total += comm.recv((rank - i) % n)
    for handle in handles:
        handle.wait()
    return total


@pytest.mark.parametrize("solution", [right_scatter, direct_exchange])
def test_right_reduce_scatters_pass(solution: Solution) -> None:
    report = check_reduce_scatter(solution)
    assert report.passed, str(report)


def gather_everything(comm: Communicator, x: Tensor) -> Tensor:
    return everything_round_the_ring(comm, x).tensor_split(comm.size)[comm.rank].clone()


def all_reduce_and_cut(comm: Communicator, x: Tensor) -> Tensor:
    return right_ring(comm, x).tensor_split(comm.size)[comm.rank].clone()


def the_wrong_chunk(comm: Communicator, x: Tensor) -> Tensor:
    """As most books have it: rank r ends up with chunk r + 1."""
    n, rank = comm.size, comm.rank
    chunks = list(x.clone().tensor_split(n))
    for step in range(n - 1):
        mine = chunks[(rank - 1 - step) % n]
        mine += exchange(comm, chunks[(rank - step) % n])
    return chunks[(rank + 1) % n]


def a_view_of_the_input(comm: Communicator, x: Tensor) -> Tensor:
    return direct_exchange(comm, x) if comm.size > 1 else x.tensor_split(1)[0]


def everybody_to_rank_0_first(comm: Communicator, x: Tensor) -> Tensor:
    """The bytes are right, but all send to rank 0 at once, then all to rank 1."""
    n, rank = comm.size, comm.rank
    chunks, others = x.tensor_split(n), [r for r in range(n) if r != rank]
    handles = [comm.isend(chunks[r], r) for r in others]
    total = chunks[rank] + sum(comm.recv(r) for r in others)
    for handle in handles:
        handle.wait()
    return total


WRONG_SCATTERS: list[tuple[Callable[..., object], list[str]]] = [
    (algorithms.ring_reduce_scatter, [OWN]),
    (lambda comm, x: comm.reduce_scatter(x), [ONLY]),
    (gather_everything, [BYTES]),
    (all_reduce_and_cut, [MESSAGES, BYTES]),
    (the_wrong_chunk, [RIGHT, BYTES]),
    (a_view_of_the_input, [NEW]),
    (everybody_to_rank_0_first, [HOPS]),
    (lambda comm, x: x, [RIGHT, NEW, MESSAGES, BYTES]),
]


@pytest.mark.parametrize(("solution", "reasons"), WRONG_SCATTERS)
def test_wrong_reduce_scatters_fail_for_their_own_reason(solution: Solution, reasons: list[str]) -> None:
    report = check_reduce_scatter(solution)
    assert list(report.failed) == reasons, str(report)


# --- the first exercises ----------------------------------------------------------------------------------------------


def right_pass(comm: Communicator, x: Tensor) -> Tensor:
    return exchange(comm, x) if comm.size > 1 else x.clone()


def to_the_left(comm: Communicator, x: Tensor) -> Tensor:
    return exchange(comm, x, way=-1) if comm.size > 1 else x.clone()


def send_then_recv(comm: Communicator, x: Tensor) -> Tensor:
    if comm.size == 1:
        return x.clone()
    comm.send(x, (comm.rank + 1) % comm.size)
    return comm.recv((comm.rank - 1) % comm.size)


def gather_and_pick(comm: Communicator, x: Tensor) -> Tensor:
    return comm.all_gather(x).tensor_split(comm.size)[comm.rank - 1].clone()


def all_the_way_round(comm: Communicator, x: Tensor) -> Tensor:
    """To the left in n - 1 hops is to the right."""
    for _ in range(comm.size - 1):
        x = exchange(comm, x, way=-1)
    return x.clone()


@pytest.mark.parametrize(
    ("solution", "reasons"),
    [
        (right_pass, []),
        (to_the_left, [RIGHT]),
        (send_then_recv, [RENDEZVOUS]),
        (gather_and_pick, [ONLY]),
        (all_the_way_round, [MESSAGES, BYTES]),
        (lambda comm, x: x, [RIGHT, NEW, MESSAGES, BYTES]),
    ],
)
def test_pass_right(solution: Solution, reasons: list[str]) -> None:
    report = check_pass_right(solution)
    assert list(report.failed) == reasons, str(report)
    assert report.passed == (not reasons)


def right_mean(comm: Communicator, x: Tensor, num_samples: int) -> Tensor:
    total = comm.all_reduce(torch.cat([x * num_samples, torch.tensor([float(num_samples)])]))
    return total[:-1] / total[-1]


def mean_in_place(comm: Communicator, x: Tensor, num_samples: int) -> Tensor:
    num_total = comm.all_reduce(torch.tensor(float(num_samples)))
    return comm.all_reduce_(x.mul_(num_samples)) / num_total


def mean_for_rank_0(comm: Communicator, x: Tensor, num_samples: int) -> Tensor | None:
    total = comm.reduce(torch.cat([x * num_samples, torch.tensor([float(num_samples)])]))
    return None if total is None else total[:-1] / total[-1]


def one_rank_reduces(comm: Communicator, x: Tensor, num_samples: int) -> Tensor:
    return comm.all_reduce(x) if comm.rank == 0 else x


@pytest.mark.parametrize(
    ("solution", "reasons"),
    [
        (right_mean, []),
        (lambda comm, x, num_samples: comm.all_reduce(x, op="mean"), [RIGHT]),
        (lambda comm, x, num_samples: comm.all_reduce(x * num_samples, op="mean"), [RIGHT]),
        (mean_in_place, [INPUT]),
        (mean_for_rank_0, [RIGHT]),
        (one_rank_reduces, [FINISHES]),
    ],
)
def test_weighted_mean(solution: Callable[[Communicator, Tensor, int], Tensor], reasons: list[str]) -> None:
    report = check_weighted_mean(solution)
    assert [name for name in report.failed if name != NEW] == reasons, str(report)
    assert report.passed == (not report.failed)


# --- what the report says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [check_pass_right, check_weighted_mean, check_ring_all_reduce, check_reduce_scatter])
def test_a_stub_is_no_failure(check: Callable[[Solution], Report]) -> None:
    check_stub(check)


def test_a_report_has_the_case_the_numbers_and_a_hint() -> None:
    text = str(check_ring_all_reduce(whole_tensors_twice))
    assert "ring_all_reduce: 11 of 12 checks passed" in text
    assert (
        """\
  FAILED  bytes that each rank sends
            case:     2 ranks, 12 elements
            expected: 48 from each rank: 2(n-1)/n of 48 bytes
            seen:     96 from each rank
            hint:     send no more than the step needs: one chunk of x.tensor_split(n), not the whole tensor
"""
        in text
    )


def test_a_deadlock_says_who_waits_for_whom_and_what_to_do() -> None:
    (line,) = [line for line in check_ring_all_reduce(blocking_send).lines if line.outcome == "failed"]
    assert "every send waits for its receive" in line.case
    assert "rank 0 waits for rank 1 in send" in line.seen
    assert "in blocking_send" in line.seen, "the place is the learner's line, not the checker's"
    assert "isend" in line.hint


def test_what_comes_after_a_failure_is_not_checked() -> None:
    report = check_ring_all_reduce(all_receive_first)
    outcomes = {line.name: line.outcome for line in report.lines}
    assert outcomes[RENDEZVOUS] == outcomes[BY_MESSAGES] == "not checked"
    lines = str(report).splitlines()
    assert f"  ?       {RENDEZVOUS}" in lines
    assert lines[-1] == "  (?: not checked; mend what failed first)"
    assert "not checked" not in str(check_ring_all_reduce(right_ring))


def slip(chunks: list[Tensor]) -> Tensor:
    return sum(chunks) + "0"


def fails_in_a_helper(comm: Communicator, x: Tensor) -> Tensor:
    return slip([x, right_ring(comm, x)])


def fails_in_a_library(comm: Communicator, x: Tensor) -> Tensor:
    return comm.all_reduce(statistics.fmean(()))


def seen_of(solution: Solution) -> str:
    (line,) = (line for line in check_ring_all_reduce(solution).lines if line.name == FINISHES)
    return line.seen


def test_an_error_comes_with_the_learners_line() -> None:
    assert seen_of(fails_in_a_helper).endswith('\nin: return sum(chunks) + "0"')
    assert seen_of(fails_in_a_library).endswith("\nin: return comm.all_reduce(statistics.fmean(()))")
    without_lines = seen_of(operator.methodcaller("nothing"))
    assert without_lines.startswith("TypeError")
    assert "in:" not in without_lines


def test_prints_are_not_shown_and_no_thread_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    def talkative(comm: Communicator, x: Tensor) -> Tensor:
        print("here")
        return right_ring(comm, x)

    num_threads = threading.active_count()
    assert check_ring_all_reduce(talkative).passed
    assert "here" not in capsys.readouterr().out
    assert threading.active_count() == num_threads


def test_a_rank_that_computes_for_ever_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mplab.homework.exam.TIMEOUT_S", 0.2)

    def spins(comm: Communicator, x: Tensor) -> Tensor:
        while comm.rank == 1:
            time.sleep(0.001)
        return right_ring(comm, x)

    report = check_ring_all_reduce(spins)
    (line,) = [line for line in report.lines if line.outcome == "failed"]
    assert line.name == FINISHES
    assert "late: rank 1" in line.seen
    assert "loop" in line.hint


def test_the_command_checks_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = str(Path(__file__).parent)
    right = f"import sys\nsys.path.append({here!r})\nfrom test_homework import right_ring as ring_all_reduce\n"
    (tmp_path / "right.py").write_text(right)
    (tmp_path / "wrong.py").write_text("def ring_all_reduce(comm, x):\n    return x.clone()\n")
    assert "ring_all_reduce" in runpy.run_path(str(tmp_path / "right.py"))
    assert command_line(["check", "ring_all_reduce", str(tmp_path / "right.py")]) == 0
    assert "12 of 12 checks passed" in capsys.readouterr().out
    assert command_line(["check", "ring_all_reduce", str(tmp_path / "wrong.py")]) == 1
    assert "FAILED" in capsys.readouterr().out
    for arguments in (["ring_all_reduce", str(tmp_path)], ["reduce_scatter", str(tmp_path / "wrong.py")]):
        assert command_line(["check", *arguments]) == 2
        assert capsys.readouterr().err.startswith("mplab check: ")
