"""What a rank sent and received: counted, so that it can be held against a formula."""

from __future__ import annotations

from typing import NamedTuple

from mplab.trace.units import columns


class Message(NamedTuple):
    """One call of a communicator.

    Args:
        op: "send", "recv", or the name of the collective.
        group: world ranks of the communicator that carried it.
        peers: world ranks that this rank exchanged data with.
        num_messages: messages that this rank sent in it.
        sent_bytes: payload bytes that it sent.
        received_bytes: payload bytes that it received.
        start_ns: host time of the call, `time.perf_counter_ns`.
        end_ns: host time of its end.
    """

    op: str
    group: tuple[int, ...]
    peers: tuple[int, ...]
    num_messages: int
    sent_bytes: int
    received_bytes: int
    start_ns: int
    end_ns: int


class Ledger:
    """Every message of one rank in the last run, over all of its communicators.

    A send or receive is counted as it happens. A collective is counted as if every pair of its ranks talked directly
    (`mplab.plan.cost`): what the fabric below does with it, gloo's ring or shared memory, is its own affair, and the
    same program has the same ledger everywhere. Headers and checks are not payload and are not counted.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.messages: list[Message] = []

    def add(self, message: Message) -> None:
        """Write one call down."""
        self.messages.append(message)

    def of(self, op: str | None = None, group: tuple[int, ...] | None = None) -> list[Message]:
        """The calls of one kind, of one group, or of both."""
        return [m for m in self.messages if (op is None or m.op == op) and (group is None or m.group == group)]

    @property
    def num_messages(self) -> int:
        """Messages sent."""
        return sum(m.num_messages for m in self.messages)

    @property
    def sent_bytes(self) -> int:
        """Payload bytes sent."""
        return sum(m.sent_bytes for m in self.messages)

    @property
    def received_bytes(self) -> int:
        """Payload bytes received."""
        return sum(m.received_bytes for m in self.messages)

    def table(self) -> str:
        """One line for every kind of call: how many, messages, bytes sent and received."""
        rows: list[tuple[str, ...]] = [("call", "calls", "messages sent", "bytes sent", "bytes received")]
        for op in dict.fromkeys(m.op for m in self.messages):
            of = self.of(op)
            counts = (len(of), sum(m.num_messages for m in of), sum(m.sent_bytes for m in of))
            rows.append((op, *(f"{c:,}" for c in counts), f"{sum(m.received_bytes for m in of):,}"))
        rows.append(
            (
                "all",
                f"{len(self.messages):,}",
                f"{self.num_messages:,}",
                f"{self.sent_bytes:,}",
                f"{self.received_bytes:,}",
            )
        )
        return columns(rows, "lr")

    def __str__(self) -> str:
        sent = f"{self.num_messages} messages, {self.sent_bytes:,} bytes sent"
        return f"rank {self.rank}: {sent}, {self.received_bytes:,} received"
