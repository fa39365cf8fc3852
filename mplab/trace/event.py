"""An event: one thing that one rank did, from when to when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Lane = Literal["compute", "message", "wait"]
LANES: tuple[Lane, ...] = ("compute", "message", "wait")


@dataclass(frozen=True, slots=True)
class Event:
    """One span of one rank's time.

    Args:
        rank: the rank it belongs to.
        lane: "compute" (arithmetic), "message" (bytes on their way) or "wait" (for a peer or for the link).
        name: what it was, for example "forward", "all_reduce", "recv".
        start_s: seconds from the start of the run.
        end_s: seconds from the start of the run, never before `start_s`.
        size_bytes: bytes that this rank sent in it; 0 for compute and waits.
        microbatch: the micro-batch that it worked on, where there is one.
    """

    rank: int
    lane: Lane
    name: str
    start_s: float
    end_s: float
    size_bytes: int = 0
    microbatch: int | None = None

    @property
    def duration_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s
