"""What can be wrong with one trial of a solution: each look gives a complaint, or None."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mplab.comm.hops import steps
from mplab.errors import CommTimeout, Deadlock
from mplab.homework.exam import ITEM_BYTES, Trial
from mplab.homework.limited import TooManySteps
from mplab.homework.report import Complaint, say_error
from mplab.plan import cost
from mplab.plan.traffic import chunk_lengths

Look = Callable[[Trial], Complaint | None]


def others(trial: Trial) -> Complaint | None:
    """Calls other than send and recv."""
    if not trial.others:
        return None
    hint = "a collective that does the work has nothing to teach: build it from send, recv, isend and irecv"
    return Complaint("send, recv, isend, irecv", ", ".join(trial.others), hint)


def error(trial: Trial) -> Complaint | None:
    """Whatever kept the ranks from finishing."""
    if trial.error is None:
        return None
    seen = say_error(trial.error)
    if isinstance(trial.error, Deadlock) and trial.rendezvous:
        hint = "it works only while someone buffers: begin with handle = comm.isend(...), receive, then handle.wait()"
    elif isinstance(trial.error, Deadlock):
        hint = "nobody sends what is waited for: each message needs a send and a recv, a collective needs every rank"
    elif isinstance(trial.error, CommTimeout | TooManySteps):
        hint = "a rank is still computing: look for a loop that doesn't end"
    elif isinstance(trial.error, IndexError | RuntimeError) and trial.length % trial.num_ranks:
        hint = "n need not divide the length, chunks may even be empty: cut with x.tensor_split(n)"
    else:
        hint = "run it on a World of this size and read the traceback"
    return Complaint("no error", seen, hint)


def result(trial: Trial, right: Sequence[Tensor], hint: str, tolerance: float = 0.0) -> Complaint | None:
    """Another result than the right one, on any rank."""
    for rank, (got, want) in enumerate(zip(trial.results, right, strict=True)):
        if type(got) is not Tensor:
            return Complaint(
                f"a tensor on rank {rank}",
                "None" if got is None else f"an object of type {type(got).__name__}",
                "return the result on every rank",
            )
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            return Complaint(_kind(want), _kind(got) + f" on rank {rank}", hint)
        is_wrong = ~torch.isclose(got, want, rtol=tolerance, atol=tolerance)
        if bool(is_wrong.any()):
            wrong = int(is_wrong.nonzero()[0])
            return Complaint(f"{want[wrong]:g}", f"{got[wrong]:g} in element {wrong} of rank {rank}", hint)
    return None


def _kind(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}"


def changed_input(trial: Trial) -> Complaint | None:
    """A rank wrote on the tensor that it was given."""
    changed = [rank for rank, is_changed in enumerate(trial.is_input_changed) if is_changed]
    hint = "work on a copy: the chunks of x.tensor_split(n) are views of x, so begin with x.clone()"
    return Complaint("x as it was", f"x changed on rank {_list(changed)}", hint) if changed else None


def aliased(trial: Trial) -> Complaint | None:
    """A result that is the input, or a view of it."""
    aliased = [rank for rank, is_aliased in enumerate(trial.is_aliased) if is_aliased]
    hint = "return a copy, also from a rank that is alone; chunks of x.tensor_split(n) are views: begin with x.clone()"
    seen = f"it shares memory with x on rank {_list(aliased)}"
    return Complaint("memory of its own", seen, hint) if aliased else None


def messages(rule: Callable[[int], int], formula: str) -> Look:
    """Another number of messages than `rule(n)`, on any rank."""

    def look(trial: Trial) -> Complaint | None:
        want, got = rule(trial.num_ranks), [ledger.num_messages for ledger in trial.ledgers]
        hint = f"{formula} messages from each rank, one in each step; empty ones are sent too"
        return None if got == [want] * trial.num_ranks else Complaint(f"{want} from each rank", _per_rank(got), hint)

    return look


def ring_bytes(trial: Trial) -> Complaint | None:
    """Other bytes than those of a ring all-reduce, on any rank."""
    n, length, chunks = trial.num_ranks, trial.length, chunk_lengths(trial.length, trial.num_ranks)
    # A rank does not send the chunk that it owns after the first half, nor the one that it gets last in the second.
    # Rings differ in their direction and in the chunk that rank 0 owns.
    rings = [
        [(2 * length - chunks[(r + k) % n] - chunks[(r + k + way) % n]) * ITEM_BYTES for r in range(n)]
        for k in range(n)
        for way in (1, -1)
    ]
    if n == 1:
        rings = [[0]]
    want = [cost.ring_all_reduce(n, rank, length, ITEM_BYTES).size_bytes for rank in range(n)]
    return sent_bytes(trial, rings, want, f"2(n-1)/n of {length * ITEM_BYTES} bytes")


def scatter_bytes(trial: Trial) -> Complaint | None:
    """Other bytes than all chunks but the rank's own."""
    n, length = trial.num_ranks, trial.length
    want = [cost.ring_reduce_scatter(n, rank, length, ITEM_BYTES).size_bytes for rank in range(n)]
    return sent_bytes(trial, [want], want, f"all of {length * ITEM_BYTES} bytes but the rank's own chunk")


def whole_bytes(trial: Trial) -> Complaint | None:
    """Other bytes than those of one tensor, or any where a rank is alone."""
    size = trial.length * ITEM_BYTES * (trial.num_ranks > 1)
    return sent_bytes(trial, [[size] * trial.num_ranks], [size] * trial.num_ranks, "one tensor")


def sent_bytes(trial: Trial, allowed: Sequence[list[int]], want: list[int], formula: str) -> Complaint | None:
    """Other bytes than in any of the allowed lists, which have a number for each rank."""
    got = [ledger.sent_bytes for ledger in trial.ledgers]
    if got in allowed:
        return None
    if sum(got) > sum(want):
        hint = "send no more than the step needs: one chunk of x.tensor_split(n), not the whole tensor"
    elif sum(got) < sum(want):
        hint = "not everything that is needed is sent"
    else:
        hint = "right in all, but not rank by rank: cut with x.tensor_split(n), and go by the order of the exercise"
    return Complaint(f"{_per_rank(want)}: {formula}", _per_rank(got), hint)


def neighbours(trial: Trial) -> Complaint | None:
    """A rank that sends elsewhere than to its neighbour on the side to which all of them send."""
    n = trial.num_ranks
    peers = [sorted({m.peers[0] for m in ledger.of("send")}) for ledger in trial.ledgers]
    if n == 1 or any(peers == [[(rank + way) % n] for rank in range(n)] for way in (1, -1)):
        return None
    seen = "; ".join(f"rank {rank} sends to {_list(to) or 'nobody'}" for rank, to in enumerate(peers))
    hint = "to the right is (comm.rank + 1) % comm.size, from the left (comm.rank - 1) % comm.size"
    return Complaint("one neighbour each, all the same way round", seen, hint)


def hops(rule: Callable[[int], int], formula: str) -> Look:
    """A chain of messages that wait for each other of another length than `rule(n)`."""

    def look(trial: Trial) -> Complaint | None:
        want, got = rule(trial.num_ranks), len(steps(trial.ledgers))
        hint = "all links must work at once: each step is h = comm.isend(...), comm.recv(...), h.wait() on every rank"
        return None if got == want else Complaint(f"{want}, {formula}", f"{got}", hint)

    return look


def spoilt(trial: Trial) -> Complaint | None:
    """A number in the result though nothing but NaN was delivered."""
    if trial.error is not None:
        return error(trial)
    clean = [rank for rank, x in enumerate(trial.results) if not (type(x) is Tensor and bool(x.isnan().all()))]
    if not clean:
        return None
    expected = "NaN on every rank, where every message is delivered as NaN"
    hint = "ranks may share memory on this machine, and on no network: what a rank knows of others, it must receive"
    return Complaint(expected, f"numbers on rank {_list(clean)}", hint)


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _per_rank(counts: Sequence[int]) -> str:
    if len(set(counts)) == 1:
        return f"{counts[0]} from each rank"
    return f"{_list(counts)} from ranks 0 to {len(counts) - 1}"
