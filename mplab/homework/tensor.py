"""The checks of layers of which every rank has a part: what they compute, and that only what is needed is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mplab.comm.communicator import Communicator
from mplab.comm.ledger import Message
from mplab.homework import watched
from mplab.homework.limited import OWN, Attempt, borrowed, counted, is_written
from mplab.homework.report import Complaint, Report, check_all
from mplab.homework.tensor_cases import NUM_ROWS, Case, column_case, row_case, vocab_case
from mplab.homework.watched import FINISHES, ITEM_BYTES, Try, Watched, in_words, listed, sent
from mplab.parallel import ColumnParallelLinear, RowParallelLinear, vocab_parallel_cross_entropy
from mplab.plan.traffic import chunk_lengths, direct_traffic
from mplab.world.rank import Rank

NUM_RANKS = (1, 2, 3, 4)
MAX_FLOATS = 3  # a position: the largest logit, the sum of the exponentials, the target's logit
OUTPUTS = "outputs are those of one process"
GRADIENTS = "gradients are those of one process"
TRAFFIC = "messages and bytes that each rank sends"
ANSWERS = {
    ColumnParallelLinear.__init__.__code__: "ColumnParallelLinear",
    RowParallelLinear.__init__.__code__: "RowParallelLinear",
    vocab_parallel_cross_entropy.__code__: "vocab_parallel_cross_entropy",
}
LinearSolution = Callable[[Communicator, Tensor, Tensor, Tensor], Tensor]
LossSolution = Callable[[Communicator, Tensor, Tensor], Tensor]


def check_column_linear(solution: LinearSolution) -> Report:
    """Check `solution(comm, x, weight, bias)`: a linear layer of which every rank computes 1/n of the outputs.

    It is run on 1 to 4 ranks, forward and backward.

    Args:
        solution: called on every rank with its communicator, all of x (N, D), and this rank's part of the weight
            (E/n, D) and of the bias (E/n,), float32. It returns this rank's outputs (N, E/n); backward gives x the
            gradient of the whole layer, on every rank.

    Returns:
        A report; nothing that the solution does is raised.

    **Communication**: none forward; in backward one all-reduce of the gradient of x, or what moves the same bytes in
    as many messages.

    **Reference**: Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
    Parallelism", 2019, section 3.
    """
    said = "none forward; one all-reduce of x's bytes in backward"
    return _check("column_linear", solution, [column_case(n) for n in NUM_RANKS], "weight", _exact, said)


def check_row_linear(solution: LinearSolution) -> Report:
    """Check `solution(comm, x, weight, bias)`: a linear layer of which every rank has 1/n of the inputs.

    It is run on 1 to 4 ranks, forward and backward.

    Args:
        solution: called on every rank with its communicator, this rank's part of x (N, D/n) and of the weight
            (E, D/n), and all of the bias (E,), float32. It returns all outputs (N, E) on every rank, with the bias
            added once.

    Returns:
        A report; nothing that the solution does is raised.

    **Communication**: one all-reduce of the outputs, or what moves the same bytes in as many messages; in backward
    none.

    **Reference**: as for `check_column_linear`.
    """
    said = "one all-reduce of the outputs' bytes forward; none in backward"
    return _check("row_linear", solution, [row_case(n) for n in NUM_RANKS], "weight", _exact, said)


def check_vocab_cross_entropy(solution: LossSolution) -> Report:
    """Check `solution(comm, logits, targets)`: the mean cross-entropy of logits of which every rank has some classes.

    It is run on 1 to 4 ranks, forward and backward, with logits around 0 and with some up to 300, whose exponential
    is no float32.

    Args:
        solution: called on every rank with its communicator, this rank's logits (N, V/n), float32, which are those of
            the classes from `comm.rank * V/n` on, and all targets (N,), int64. It returns the mean loss in nats, a
            tensor without dims, on every rank.

    Returns:
        A report; nothing that the solution does is raised.

    **Communication**: at most three floats a position to each other rank, in an all_gather or in three all-reduces;
    in backward none.

    **Reference**: as for `check_column_linear`.
    """
    cases = [vocab_case(n, is_large) for n in NUM_RANKS for is_large in (False, True)]
    said = f"at most {MAX_FLOATS} floats a position to each other rank; none in backward"
    return _check("vocab_cross_entropy", solution, cases, "logits", _few, said)


def _check(
    exercise: str, solution: Callable[..., Tensor], cases: Sequence[Case], cut: str, traffic: Look, said: str
) -> Report:
    """Run all cases.

    Args:
        exercise: the function's name.
        solution: the function.
        cases: in the order of their size.
        cut: the input that no rank may get whole.
        traffic: what can be wrong with the messages.
        said: what is right with them.
    """
    tries: list[_Try] = []
    for case in cases:
        logs = [_Log() for _ in range(case.num_ranks)]
        tries.append(_Try(case, logs, watched.run(case.num_ranks, partial(_main, solution, case, logs))))
        if not is_written([tries[-1].run]):
            return Report(exercise, (), is_written=False)
        if watched.is_hopeless(tries[-1].run):
            break
    finishes = check_all(FINISHES, tries, _error, f"{listed(NUM_RANKS)} ranks, forward and backward")
    finished = tries if finishes.outcome == "passed" else []
    shaped = finished if all(log.has_backward for one in finished for log in one.logs) else []
    lines = [
        finishes,
        check_all(OWN, tries, _borrowed),
        check_all(OUTPUTS, finished, _outputs),
        check_all(GRADIENTS, shaped, _gradients, f"of {', '.join(cases[0].gradients[0])}"),
        check_all("what it is given is left alone", finished, _changed),
        check_all(f"no rank gets the whole {cut}", finished, partial(_gathered, cut)),
        check_all(TRAFFIC, shaped, traffic, said),
    ]
    return Report(exercise, tuple(lines))


@dataclass
class _Log:
    """What a rank did.

    Args:
        forward: its call of the solution.
        output: as it was returned.
        has_backward: the output has the shape of the gradient that begins backward.
        num_forward: calls of the communicator before backward.
        messages: all of them.
        gradients: by input.
        changed: inputs that it wrote on.
    """

    forward: Attempt = field(default_factory=lambda: Attempt("forward"))
    output: Any = None
    has_backward: bool = False
    num_forward: int = 0
    messages: list[Message] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)

    @property
    def directions(self) -> dict[str, list[Message]]:
        """The calls of forward and of backward."""
        return {"forward": self.messages[: self.num_forward], "backward": self.messages[self.num_forward :]}


_Try = Try[Case, _Log]
Look = Callable[[_Try], Complaint | None]


def _main(solution: Callable[..., Tensor], case: Case, logs: list[_Log], rank: Rank, seen: Watched) -> None:
    """What a rank of one run does."""
    log, inputs, upstream = logs[rank.index], case.inputs[rank.index], case.upstream[rank.index].clone()
    leaves = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    given = {name: x.clone() for name, x in leaves.items()}  # autograd would not let anyone write on a leaf
    call = partial(solution, rank.comm, *given.values())
    output: Any = counted(log.forward, call, watched.MAX_STEPS, ANSWERS, watched.TIMEOUT_S)
    log.num_forward = len(seen.messages)
    log.output = output.detach().clone() if isinstance(output, Tensor) else output
    if isinstance(output, Tensor) and (output.shape, output.dtype) == (upstream.shape, upstream.dtype):
        log.has_backward = True
        if output.requires_grad:
            output.backward(upstream)
    log.messages = list(seen.messages)
    log.gradients = {name: x.grad for name, x in leaves.items()}
    log.changed = [name for name, x in inputs.items() if not torch.equal(given[name], x)]
    if not torch.equal(upstream, case.upstream[rank.index]):
        log.changed.append("the gradient that comes to backward")


# --- what can be wrong ------------------------------------------------------------------------------------------------


def _error(one: _Try) -> Complaint | None:
    return watched.error(one.run, "run it on a World of this size, forward and backward, and read the traceback")


def _borrowed(one: _Try) -> Complaint | None:
    return next((complaint for log in one.logs if (complaint := borrowed(log.forward))), None)


def _outputs(one: _Try) -> Complaint | None:
    for rank, (log, want) in enumerate(zip(one.logs, one.case.outputs, strict=True)):
        if not isinstance(log.output, Tensor):
            seen = "None" if log.output is None else f"an object of type {type(log.output).__name__}"
            return Complaint(f"a tensor on rank {rank}", seen, "return the result on every rank")
        if (log.output.shape, log.output.dtype) != (want.shape, want.dtype):
            hint = "what a rank returns has the shape that the exercise says, and the dtype of what it is given"
            return Complaint(_kind(want), f"{_kind(log.output)} on rank {rank}", hint)
        if (complaint := _wrong(one.case, "output", rank, log.output, want)) is not None:
            return complaint
    return None


def _gradients(one: _Try) -> Complaint | None:
    for rank, (log, right) in enumerate(zip(one.logs, one.case.gradients, strict=True)):
        for name, want in right.items():
            got = log.gradients[name]
            if got is None:
                hint = "it was not used, or by way of a collective, whose result is outside autograd: use an operator "
                hint += "of mplab.parallel.operators, or write a torch.autograd.Function"
                return Complaint(f"a gradient of {name} on rank {rank}", "None", hint)
            if (complaint := _wrong(one.case, name, rank, got, want)) is not None:
                return complaint
    return None


def _wrong(case: Case, what: str, rank: int, got: Tensor, want: Tensor) -> Complaint | None:
    """The first number of the output, or of an input's gradient, that is not the right one."""
    wrong = (~_is_close(got, want)).nonzero()
    if not len(wrong):
        return None
    if not bool(got.isfinite().all()):
        hint = "the exponential of a large logit is no float32, and that of a small one 0: first take from all logits "
        hint += "of a position the largest of them, over all ranks"
    else:
        found = (slip.hint for slip in case.slips[what] if bool(_is_close(got, slip.values[rank]).all()))
        hint = next(found, "work one entry out by hand: which ranks have what it is made of?")
    place = tuple(int(i) for i in wrong[0])
    where = f"{'' if what == 'output' else f'in the gradient of {what} '}on rank {rank}"
    entry = f", entry {list(place)}" if place else ""
    return Complaint(f"{want[place]:g} {where}{entry}", f"{got[place]:g}", hint)


def _is_close(got: Tensor, want: Tensor) -> Tensor:
    return torch.isclose(got, want, rtol=1e-3, atol=1e-5)


def _kind(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}"


def _changed(one: _Try) -> Complaint | None:
    for rank, log in enumerate(one.logs):
        if log.changed:
            hint = "others use it too: names that end in _ work in place, take those without"
            return Complaint("nothing changed", f"{', '.join(log.changed)} changed on rank {rank}", hint)
    return None


def _gathered(cut: str, one: _Try) -> Complaint | None:
    """A rank that received as many bytes as the parts of all other ranks have.

    Of what an all-reduce receives one half are summands: the other one counts.
    """
    limit = (one.case.num_ranks - 1) * one.case.inputs[0][cut].numel() * ITEM_BYTES
    for rank, log in enumerate(one.logs):
        for direction, messages in log.directions.items():
            got = sum(m.received_bytes // (2 if m.op.startswith("all_reduce") else 1) for m in messages)
            if 0 < limit <= got:
                return Complaint(
                    f"fewer than {limit} bytes from others, whose {cut} that would be",
                    f"{got} bytes in {direction} of rank {rank}: {calls(messages)}",
                    f"the {cut} stays cut: work with this rank's part, and send what comes of it, which is smaller",
                )
    return None


def _exact(one: _Try) -> Complaint | None:
    """Other messages or bytes than those of the one all-reduce, or any where there is none."""
    for rank, log in enumerate(one.logs):
        for direction, messages in log.directions.items():
            talk, got, want = one.case.talks[direction], sent(messages), (0, 0)
            if talk.num_elements:
                blocks = [k * ITEM_BYTES for k in chunk_lengths(talk.num_elements, one.case.num_ranks)]
                want = direct_traffic("all_reduce", rank, blocks)[:2]
            if got != want:
                hint = talk.if_less if got[1] < want[1] else talk.if_more
                if got[0] == want[0] and got[1] < want[1]:
                    hint = "send all of it, in the dtype that it has"
                seen = f"{in_words(*got)} in {direction} of rank {rank}: {calls(messages)}"
                return Complaint(f"{in_words(*want)} in {direction}", seen, hint)
    return None


def _few(one: _Try) -> Complaint | None:
    """More than a few floats a position, or than three all-reduces have messages, or any in backward."""
    num_others = one.case.num_ranks - 1
    limits = {
        "forward": (2 * MAX_FLOATS * num_others, MAX_FLOATS * num_others * NUM_ROWS * ITEM_BYTES),
        "backward": (0, 0),
    }
    hints = {
        "forward": "the largest logit, the sum of the exponentials and the target's logit, of all positions at once, "
        "are all that ranks need of each other",
        "backward": "softmax needs the sum of the exponentials, which was there in forward: keep it",
    }
    for rank, log in enumerate(one.logs):
        for direction, messages in log.directions.items():
            limit, got = limits[direction], sent(messages)
            if got[0] > limit[0] or got[1] > limit[1]:
                seen = f"{in_words(*got)} in {direction} of rank {rank}: {calls(messages)}"
                return Complaint(f"at most {in_words(*limit)} in {direction}", seen, hints[direction])
    return None


def calls(messages: Sequence[Message]) -> str:
    """Which calls of the communicator, and how many of each."""
    names = [message.op for message in messages]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "none"
