"""The check of clipping by the global norm: each parameter counted once, and numbers sent, no gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mplab.comm.ledger import Message
from mplab.comm.mesh import MeshCommunicator
from mplab.homework import watched
from mplab.homework.clip_cases import Case, cases
from mplab.homework.limited import OWN, Attempt, borrowed, counted, is_written
from mplab.homework.report import Complaint, Report, check_all
from mplab.homework.tensor import calls
from mplab.homework.watched import FINISHES, Step, Try, Watched
from mplab.parallel.hybrid import HybridParallel
from mplab.parallel.sharded import ShardedDataParallel
from mplab.parallel.sharded_replicas import ShardedReplicas
from mplab.parallel.tensor import TensorParallel
from mplab.world.rank import Rank

NORM = "the norm is that of one process"
MAX_NUMBERS = 2  # the squares of what is cut, and of what is whole
ANSWERS = {
    HybridParallel._clip.__code__: "HybridParallel",
    TensorParallel._check_and_clip.__code__: "TensorParallel",
    **{kind._finish_gradients.__code__: kind.__name__ for kind in (ShardedDataParallel, ShardedReplicas)},
}
ClipSolution = Callable[[list[Tensor], list[bool], MeshCommunicator, float], float]


def check_clip_once(solution: ClipSolution) -> Report:
    """Check `solution(gradients, is_cut, mesh, max_norm)`: clipping by the norm of a gradient that lies on all ranks.

    It is run on meshes of 1 to 8 ranks: with gradients longer than `max_norm`, shorter ones and zeros, with nothing
    cut and with everything, and with a stage that has no parameters.

    Args:
        solution: called on every rank with the gradients of its stage, float32, and for each whether it is this rank's
            part of one that is cut over `mesh.tp`, a connected mesh, and the longest norm. It returns the norm of the
            whole model's gradient, each element counted once, as a float; afterwards the gradients are multiplied, in
            place, by max_norm / norm if that is below 1.

    Returns:
        A report; nothing that the solution does is raised.

    **Communication**: at most one collective for each of tp and pp that is above 1, of one or two numbers; none between
    replicas.

    **Reference**: Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013, section 3.2.
    """
    tries: list[_Try] = []
    for case in cases():
        logs = [_Log() for _ in range(case.mesh.size)]
        tries.append(_Try(case, logs, watched.run(case.mesh.size, partial(_main, solution, case, logs))))
        if not is_written([tries[-1].run]):
            return Report("clip_once", (), is_written=False)
        if watched.is_hopeless(tries[-1].run):
            break
    finishes = check_all(FINISHES, tries, _error, f"{len(tries)} cases, 1 to 8 ranks")
    finished = tries if finishes.outcome == "passed" else []
    norm = check_all(NORM, finished, _wrong_norm, "each parameter counted once, on every mesh")
    right = finished if norm.outcome == "passed" else []
    long = [one for one in right if one.case.scale < 1]
    short = [one for one in right if one.case.scale == 1 and one.case.norm]
    lines = [
        finishes,
        check_all(OWN, tries, _borrowed),
        norm,
        check_all("gradients above max_norm are scaled to it", long, _wrong_scale),
        check_all("gradients below max_norm are left alone", short, _scaled),
        check_all("gradients of 0 stay 0", [one for one in right if not one.case.norm], _not_zero),
        check_all("nothing is sent between replicas", finished, _to_replicas),
        check_all("numbers are sent, no gradients", finished, _tensors, f"at most {MAX_NUMBERS} a collective"),
        check_all("at most one collective an axis", finished, _calls, "one over tp, one over pp"),
    ]
    return Report("clip_once", tuple(lines))


@dataclass
class _Log:
    """What a rank did.

    Args:
        attempt: its call of the solution.
        norm: as it was returned.
        gradients: after the call.
        messages: of the call.
        starts: the collectives and sends that it began.
    """

    attempt: Attempt = field(default_factory=lambda: Attempt(""))
    norm: Any = None
    gradients: list[Tensor] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    starts: list[Step] = field(default_factory=list)


class _Try(Try[Case, _Log]):
    def place(self, rank: int) -> tuple[int, int]:
        """(p, t): on the pipeline and the tensor axis."""
        place = self.case.mesh.coordinates(rank)
        return place["pp"], place["tp"]

    def given(self, rank: int) -> list[Tensor]:
        """Its gradients before."""
        p, t = self.place(rank)
        return self.case.gradients[p][t]


def _main(solution: ClipSolution, case: Case, logs: list[_Log], rank: Rank, seen: Watched) -> None:
    """What a rank of one run does."""
    log, mesh = logs[rank.index], case.mesh.connect(rank.comm)
    p, t = mesh.pp.rank, mesh.tp.rank
    log.gradients = [x.clone() for x in case.gradients[p][t]]
    call = partial(solution, list(log.gradients), case.is_cut(p), mesh, case.max_norm)
    log.norm = counted(log.attempt, call, watched.MAX_STEPS, ANSWERS, watched.TIMEOUT_S)
    log.messages, log.starts = list(seen.messages), seen.of("start")


# --- what can be wrong ------------------------------------------------------------------------------------------------


def _error(one: _Try) -> Complaint | None:
    hint = "make a World of this size, and in it Mesh(...).connect(rank.comm); read the traceback"
    if not one.case.norm:
        hint = "the norm is 0, and nothing may be divided by it: scale only where the norm is above max_norm"
    elif not all(one.case.stages[: one.case.mesh.pp]):
        hint = "a stage without parameters has nothing to add up, and still takes part in every collective with a 0"
    return watched.error(one.run, hint)


def _borrowed(one: _Try) -> Complaint | None:
    return next((complaint for log in one.logs if (complaint := borrowed(log.attempt))), None)


def _wrong_norm(one: _Try) -> Complaint | None:
    case = one.case
    for rank, log in enumerate(one.logs):
        if not isinstance(log.norm, float | int):
            seen = "None" if log.norm is None else f"an object of type {type(log.norm).__name__}"
            return Complaint(f"a float on rank {rank}", seen, "return float(norm), on every rank")
        if _is_close(log.norm, case.norm):
            continue
        found = (
            slip.hint for slip in case.slips if any(_is_close(log.norm, norm(*one.place(rank))) for norm in slip.norms)
        )
        hint = next(found, "work it out by hand with two ranks: which squares does each have, and which has the other?")
        return Complaint(f"{case.norm:.6g} on rank {rank}", f"{log.norm:.6g}", hint)
    return None


def _is_close(got: float, want: float) -> bool:
    return math.isclose(got, want, rel_tol=1e-4, abs_tol=1e-9)


def _wrong_scale(one: _Try) -> Complaint | None:
    case = one.case
    for rank, log in enumerate(one.logs):
        factors = [_factor(x, before) for x, before in zip(log.gradients, one.given(rank), strict=True)]
        wrong = [i for i, factor in enumerate(factors) if not _is_close(factor, case.scale)]
        if wrong:
            hint = _why(one, rank, factors[wrong[0]], len(wrong) == len(factors))
            expected = f"{case.scale:.4g} times gradient {wrong[0]} on rank {rank}"
            return Complaint(expected, f"{factors[wrong[0]]:.4g} times it", hint)
    return None


def _factor(x: Tensor, before: Tensor) -> float:
    """What a tensor was multiplied by; NaN: it was not multiplied by a number."""
    factor = float((x.double() * before).sum() / before.double().square().sum())
    return factor if torch.allclose(x, factor * before, rtol=1e-4) else math.nan


def _why(one: _Try, rank: int, factor: float, is_wrong_everywhere: bool) -> str:
    case = one.case
    own = case.max_norm / case.own_norm(*one.place(rank))
    if not is_wrong_everywhere:
        return "all gradients get the same factor, cut or whole: else the direction changes"
    if _is_close(factor, min(1.0, own)):
        return "a rank went by its own norm: all take that of the whole gradient, which they compute together"
    if factor == 1:
        return "nothing was changed: write into the tensors, as gradient.mul_(...) does"
    if _is_close(factor, case.scale**2):
        return "they were scaled twice"
    return "multiply by max_norm / norm"


def _scaled(one: _Try) -> Complaint | None:
    for rank, log in enumerate(one.logs):
        for i, (x, before) in enumerate(zip(log.gradients, one.given(rank), strict=True)):
            if not torch.equal(x, before):
                hint = "clipping only shortens: scale where the norm is above max_norm, or by min(1, max_norm / norm)"
                return Complaint(f"gradient {i} as it was on rank {rank}", f"{_factor(x, before):.4g} times it", hint)
    return None


def _not_zero(one: _Try) -> Complaint | None:
    for rank, log in enumerate(one.logs):
        for i, x in enumerate(log.gradients):
            if not bool((x == 0).all()):
                hint = "max_norm / norm is infinite where the norm is 0: scale only where the norm is above max_norm"
                return Complaint(f"zeros in gradient {i} on rank {rank}", f"{x.flatten()[0]:g}", hint)
    return None


def _to_replicas(one: _Try) -> Complaint | None:
    for rank, log in enumerate(one.logs):
        for message in log.messages:
            if others := _others(one, rank, message):
                hint = "replicas have the same gradients already: mesh.tp and mesh.pp have all that is needed"
                seen = f"{message.op} with ranks {watched.listed(others)}, of other replicas, on rank {rank}"
                return Complaint("collectives within a replica", seen, hint)
    return None


def _others(one: _Try, rank: int, message: Message) -> list[int]:
    """With whom of other replicas a rank exchanged data."""
    place = one.case.mesh.coordinates
    return [peer for peer in message.peers if place(peer)["dp"] != place(rank)["dp"]]


def _tensors(one: _Try) -> Complaint | None:
    for rank, log in enumerate(one.logs):
        for step in log.starts:
            if step.number > MAX_NUMBERS:
                hint = "square and add up first: a rank has one number to say of all that is cut, one of what is whole"
                seen = f"{step.name} of {step.number} elements on rank {rank}"
                return Complaint(f"at most {MAX_NUMBERS} elements in a collective", seen, hint)
    return None


def _calls(one: _Try) -> Complaint | None:
    limit = (one.case.mesh.tp > 1) + (one.case.mesh.pp > 1)
    for rank, log in enumerate(one.logs):
        inside = [message for message in log.messages if message.peers and not _others(one, rank, message)]
        if len(inside) > limit:
            hint = "an all_reduce gives every rank the sum; numbers that go the same way go together, as one tensor"
            return Complaint(f"{limit} or fewer", f"{len(inside)} on rank {rank}: {calls(inside)}", hint)
    return None
