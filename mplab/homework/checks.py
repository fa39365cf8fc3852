"""The exercises of the labs and their checks: the answer, and how it was reached, by what the ranks really sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mplab.comm.communicator import Communicator
from mplab.homework import looks
from mplab.homework.exam import Solution, Trial, attempt
from mplab.homework.limited import OWN, borrowed, until_hopeless
from mplab.homework.report import Complaint, Report, check_all

NUM_RANKS = (1, 2, 3, 4, 5)
LENGTHS = (12, 7, 3, 60)  # divided by some n, by none but 1, shorter than some n, divided by all
NUM_SAMPLES = (6, 2, 1, 7)  # of each rank's shard, for the weighted mean

WeightedSolution = Callable[[Communicator, Tensor, int], Tensor]
Oracle = Callable[[Trial], Sequence[Tensor]]


def check_pass_right(solution: Solution) -> Report:
    """Check `solution(comm, x)`: every rank gets its left neighbour's tensor, by send and recv.

    Args:
        solution: called on every rank with its communicator and its tensor of shape (L,); returns a new tensor.

    Returns:
        A report; nothing that the solution does is raised.

    **Communication**: each rank must send its tensor once, to its right neighbour; all at the same time.
    """
    return _grade(
        "pass_right",
        solution,
        lambda trial: [trial.inputs[rank - 1] for rank in range(trial.num_ranks)],
        "rank r returns what rank (r - 1) % n was given; a rank that is alone returns a copy of its own",
        lambda n: int(n > 1),
        "1",
        [("bytes that each rank sends", looks.whole_bytes, "48 with 12 elements")],
    )


def check_weighted_mean(solution: WeightedSolution) -> Report:
    """Check `solution(comm, x, num_samples)`: the mean over all samples, of means over shards of unequal size.

    Args:
        solution: called on every rank with its communicator, the mean of its shard, of shape (L,), and the number of
            samples in the shard; returns sum(num_samples * x) / sum(num_samples) over all ranks. Any collective may be
            used.

    Returns:
        A report; nothing that the solution does is raised.
    """
    trials = until_hopeless(
        attempt(lambda comm, x: solution(comm, x, NUM_SAMPLES[comm.rank]), n, LENGTHS[0], may_collect=True)
        for n in range(1, len(NUM_SAMPLES) + 1)
    )
    if any(isinstance(trial.error, NotImplementedError) for trial in trials):
        return Report("weighted_mean", (), is_written=False)
    finished = [trial for trial in trials if trial.error is None]

    def right(trial: Trial) -> Complaint | None:
        weights = torch.tensor(NUM_SAMPLES[: trial.num_ranks], dtype=torch.float32)
        mean = weights @ torch.stack(trial.inputs) / weights.sum()
        hint = f"the shards have {', '.join(map(str, NUM_SAMPLES))} samples: a sample counts the same wherever it lies"
        return looks.result(trial, [mean] * trial.num_ranks, hint, tolerance=1e-5)

    lines = [
        check_all("every rank finishes", trials, looks.error, f"1 to {len(NUM_SAMPLES)} ranks"),
        check_all("the result is right", finished, right, "shards of different sizes"),
        check_all("the input is left alone", finished, looks.changed_input),
        check_all("the result is a new tensor", finished, looks.aliased),
    ]
    return Report("weighted_mean", tuple(lines))


def check_ring_all_reduce(solution: Solution) -> Report:
    """Check `solution(comm, x)`: the sum of all ranks' tensors on every rank, by send and recv around a ring.

    It is run on 1 to 5 ranks, with lengths that n does and does not divide, and again where every send waits for its
    receive. Any ring passes: to the right or to the left, and whichever chunk a rank begins with.

    Args:
        solution: called on every rank with its communicator and its tensor of shape (L,); returns a new tensor.

    Returns:
        A report; nothing that the solution does is raised.

    **Communication**: each rank must send 2(n-1) messages to one neighbour, two chunks short of twice its tensor, in
    2(n-1) hops.
    """
    return _grade(
        "ring_all_reduce",
        solution,
        lambda trial: [torch.stack(trial.inputs).sum(0)] * trial.num_ranks,
        "draw 3 ranks on paper: which chunk does each send in each step, and which comes in? At the end, torch.cat",
        lambda n: 2 * (n - 1),
        "2(n-1)",
        [
            ("bytes that each rank sends", looks.ring_bytes, "2(n-1)/n of the tensor; 72 with 4 ranks, 12 elements"),
            ("each rank sends to one neighbour", looks.neighbours, ""),
        ],
    )


def check_reduce_scatter(solution: Solution) -> Report:
    """Check `solution(comm, x)`: rank r's chunk of the sum, `x.tensor_split(n)[r]`, by send and recv alone.

    It is run like `check_ring_all_reduce`'s. A ring passes, and so does a direct exchange without a bottleneck.

    Args:
        solution: called on every rank with its communicator and its tensor of shape (L,); returns a new tensor.

    Returns:
        A report; nothing that the solution does is raised.

    **Communication**: each rank must send n - 1 messages, all chunks but its own, in n - 1 hops.
    """
    return _grade(
        "reduce_scatter",
        solution,
        lambda trial: list(torch.stack(trial.inputs).sum(0).tensor_split(trial.num_ranks)),
        "rank r returns chunk r of x.tensor_split(n), summed over all ranks: in which step does it get the last part?",
        lambda n: n - 1,
        "n-1",
        [("bytes that each rank sends", looks.scatter_bytes, "(n-1)/n of the tensor; 36 with 4 ranks, 12 elements")],
    )


def _grade(
    exercise: str,
    solution: Solution,
    oracle: Oracle,
    hint: str,
    num_hops: Callable[[int], int],
    formula: str,
    counts: Sequence[tuple[str, looks.Look, str]],
) -> Report:
    """Try a solution of send and recv, and look at everything.

    Args:
        exercise: its name.
        solution: the learner's function.
        oracle: what each rank should return.
        hint: for a wrong result.
        num_hops: n -> hops from start to end, as many as each rank's messages.
        formula: the same in writing.
        counts: further looks: name, look, and what is said when all is well.
    """
    trials = until_hopeless(attempt(solution, n, length) for n in NUM_RANKS for length in LENGTHS)
    if isinstance(trials[-1].error, NotImplementedError):
        return Report(exercise, (), is_written=False)
    honest = [trial for trial in trials if not trial.others]
    finished = [trial for trial in honest if trial.error is None]
    # Where ranks block already without it, rendezvous shows nothing new.
    blocking = (attempt(solution, n, LENGTHS[0], rendezvous=True) for n in NUM_RANKS)
    waiting = until_hopeless(blocking) if finished == trials else []
    result = check_all("the result is right", finished, lambda trial: looks.result(trial, oracle(trial), hint))
    spoilt = [attempt(solution, 3, LENGTHS[0], spoil=True)] if waiting and result.outcome == "passed" else []
    tried = f"{NUM_RANKS[0]} to {NUM_RANKS[-1]} ranks, {len(LENGTHS)} lengths"
    number = f"{formula}; {num_hops(4)} with 4 ranks"
    messages = check_all("messages that each rank sends", finished, looks.messages(num_hops, formula), number)
    countable = finished if messages.outcome == "passed" else []  # too few messages have few hops, which is no merit
    lines = [
        check_all("only send and recv are used", trials, looks.others),
        check_all(OWN, trials, borrowed),
        check_all("every rank finishes", honest, looks.error, tried),
        result,
        check_all("the input is left alone", finished, looks.changed_input),
        check_all("the result is a new tensor", finished, looks.aliased),
        messages,
        *(check_all(name, finished, look, said) for name, look, said in counts),
        check_all("hops from start to end", countable, looks.hops(num_hops, formula), number),
        check_all("every rank finishes when sends wait for receives", waiting, looks.error),
        check_all("the result comes out of messages", spoilt, looks.spoilt),
    ]
    return Report(exercise, tuple(lines))
