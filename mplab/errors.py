"""What a user's mistake gets: one base class and its few children.

Every message says the numbers, the rule and the remedy. `assert` is kept for the library's own invariants.
"""


class MplabError(RuntimeError):
    """A mistake that the reader of the message can mend: it says the numbers, the rule and the remedy."""


class CommError(MplabError):
    """Ranks could not finish what they had to say to each other."""


class PeerFailure(CommError):
    """This rank was stopped because another failed: `rank` is the one to look at (None: the caller stopped the run)."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class CollectiveMismatch(CommError):
    """Ranks disagree on a collective: its kind, shape, dtype, reduction, root or order. No tensor was changed."""


class Deadlock(CommError):
    """No rank can go on: each waits for a message that nobody will send."""


class CommTimeout(CommError):
    """A rank waited longer than `timeout_s`; the message says who waits for whom."""


class NonFiniteGradient(MplabError):
    """A gradient has a NaN or an Inf; raised before it reached any other rank, and before any weight was changed."""


class CheckpointError(MplabError):
    """A checkpoint that is damaged, incomplete, or none; nothing was loaded from it."""
