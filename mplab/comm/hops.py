"""Who sent how much to whom, step by step: the shape of an algorithm, read from the ledgers of a run."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

from mplab.comm.ledger import Ledger, Message


class Hop(NamedTuple):
    """One message of a run.

    Args:
        src: world rank that sent it.
        dst: world rank that it went to.
        size_bytes: its payload.
    """

    src: int
    dst: int
    size_bytes: int


def steps(ledgers: Sequence[Ledger]) -> list[list[Hop]]:
    """The sends of a run, put in as few steps as their order allows.

    The clock plays no part, so that the same program has the same steps on every machine: in one step a rank sends at
    most one message and receives at most one, and it can use what it receives in the next step.

    Args:
        ledgers: one a rank, in rank order; calls other than send and recv are passed over.

    Returns:
        The hops of each step, ordered by sender. The number of steps is N of T = N (alpha + beta B) where all messages
        are alike.

    **Reference**: Thakur, Rabenseifner & Gropp, "Optimization of Collective Communication Operations in MPICH", 2005,
    section 2 (one port each way).
    """
    programs = [deque(m for m in ledger.messages if m.op in ("send", "recv")) for ledger in ledgers]
    outboxes: list[deque[Hop]] = [deque() for _ in ledgers]
    arrived: defaultdict[tuple[int, int], int] = defaultdict(int)
    found: list[list[Hop]] = []
    while True:
        for rank, program in enumerate(programs):
            _go_on(rank, program, outboxes[rank], arrived)
        # Where several want one receiver, the one that it waits for goes first.
        heads = sorted((outbox[0] for outbox in outboxes if outbox), key=lambda hop: not _is_awaited(hop, programs))
        step = list({hop.dst: hop for hop in reversed(heads)}.values())
        if not step:
            return found
        found.append(sorted(step))
        for src, dst, _ in step:
            outboxes[src].popleft()
            arrived[src, dst] += 1


def _is_awaited(hop: Hop, programs: Sequence[deque[Message]]) -> bool:
    """Whether the receiver stands at the receive of just this message."""
    program = programs[hop.dst]
    return bool(program) and program[0].peers[0] == hop.src


def _go_on(rank: int, program: deque[Message], outbox: deque[Hop], arrived: defaultdict[tuple[int, int], int]) -> None:
    """Run a rank's calls up to the first receive whose message has not arrived."""
    while program:
        op, peer = program[0].op, program[0].peers[0]
        if op == "send":
            outbox.append(Hop(rank, peer, program[0].sent_bytes))
        elif not arrived[peer, rank]:
            return
        else:
            arrived[peer, rank] -= 1
        program.popleft()
