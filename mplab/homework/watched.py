"""Runs a learner's function on ranks that may use every collective, and keeps in which order things happened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from mplab.comm.calls import Call
from mplab.comm.communicator import Communicator, Handle, T
from mplab.comm.ledger import Ledger, Message
from mplab.errors import CollectiveMismatch, CommTimeout, Deadlock
from mplab.homework.limited import Attempt, TooManySteps, borrowed_by, counted, outcome_of
from mplab.homework.report import Complaint, say_error
from mplab.parallel import DataParallel, naive_data_parallel, parameter_server, scatter_gather
from mplab.parallel.buckets import Reducer, make_buckets
from mplab.parallel.sharded import ShardedDataParallel
from mplab.trace.recorder import Recorder
from mplab.world.rank import Rank
from mplab.world.world import World

TIMEOUT_S = 5.0
MAX_STEPS = 20_000
FINISHES = "every rank finishes"
ITEM_BYTES = 4  # float32


CaseT = TypeVar("CaseT")
LogT = TypeVar("LogT")
Kind = Literal["start", "wait", "gradient"]
ANSWERS = {
    **{kind.__init__.__code__: kind.__name__ for kind in (DataParallel, Reducer, ShardedDataParallel)},
    **{
        function.__code__: function.__name__
        for function in (make_buckets, naive_data_parallel, parameter_server, scatter_gather)
    },
}
"""Code of the library that does the exercises."""


class Step(NamedTuple):
    """Something that a rank did.

    Args:
        kind: it started a collective, waited for one, or its backward came to the gradient of a parameter.
        name: the collective's, without the `_` of an in-place form.
        number: elements that the collective was given; for a wait, which of the rank's collectives; or the parameter's
            place.
    """

    kind: Kind
    name: str
    number: int


@dataclass
class Watched:
    """What one rank did.

    Args:
        index: its number.
        steps: in order.
        messages: as the communicator behind the solution's wrote them down.
    """

    index: int
    steps: list[Step]
    messages: list[Message]

    def of(self, kind: Kind) -> list[Step]:
        """The steps of one kind."""
        return [step for step in self.steps if step.kind == kind]

    def hook(self, index: int) -> Callable[[Tensor], None]:
        """A parameter's hook, which writes down that its gradient is there."""
        return lambda _: self.steps.append(Step("gradient", "", index))


@dataclass
class Run(Attempt):
    """One run of a solution; `result` has what each rank returned."""

    ranks: list[Watched] = field(default_factory=list)


@dataclass(frozen=True)
class Try(Generic[CaseT, LogT]):
    """A run of one case, and written as that.

    Args:
        case: what the solution was given.
        logs: what each rank did, as the check itself wrote it down.
        run: what came of it.
    """

    case: CaseT
    logs: list[LogT]
    run: Run

    def __str__(self) -> str:
        return str(self.case)


def run(num_ranks: int, main: Callable[[Rank, Watched], object]) -> Run:
    """Call `main` on every rank, with a `Rank` whose communicator is watched.

    Args:
        num_ranks: size of the world.
        main: what calls the learner's function.
    """
    _load_optimizers()
    world, tried = World(num_ranks, device="cpu", timeout_s=TIMEOUT_S), Run(f"{num_ranks} ranks")
    counts = [Attempt("") for _ in range(num_ranks)]
    ranks: dict[int, Watched] = {}

    def on_rank(rank: Rank) -> object:
        seen = ranks[rank.index] = Watched(rank.index, [], rank.comm.ledger.messages)
        given = dataclasses.replace(rank, comm=WatchedCommunicator(rank.comm, seen.steps))
        return counted(counts[rank.index], partial(main, given, seen), MAX_STEPS, ANSWERS, TIMEOUT_S)

    tried.result, tried.error = outcome_of(lambda: world.run(on_rank))
    tried.ranks = [ranks[rank] for rank in sorted(ranks)]
    tried.borrowed = borrowed_by(counts)
    return tried


@cache
def _load_optimizers() -> None:
    """The first optimizer of a process imports half of torch: not in a rank, whose steps and seconds are counted."""
    torch.optim.SGD([torch.zeros(1)])


class WatchedCommunicator(Communicator):
    """Hands everything on to another communicator, and writes down when a collective is started and waited for.

    Its ledger and its trace are its own: what counts is what the communicator behind it writes down.
    """

    def __init__(self, real: Communicator, steps: list[Step]) -> None:
        super().__init__(real.rank, real.ranks, real.device, Ledger(real.rank), Recorder(real.rank, real.device))
        self.__real, self.__steps = real, steps

    def group(self, ranks: Sequence[int]) -> Communicator:
        return WatchedCommunicator(self.__real.group(ranks), self.__steps)

    def _start_send(self, x: Tensor, dst: int, tag: int) -> Handle[None]:
        return self.__watch("send", x.numel(), lambda: self.__real._start_send(x, dst, tag))

    def _start_recv(self, src: int, tag: int) -> Handle[Tensor]:
        return self.__watch("recv", 0, lambda: self.__real._start_recv(src, tag))

    def _start(self, call: Call, x: Tensor | None) -> Handle[Tensor]:
        return self.__watch(call.name, 0 if x is None else x.numel(), lambda: self.__real._start(call, x))

    def _start_coalesced(self, call: Call, xs: list[Tensor]) -> Handle[None]:
        num_elements = sum(x.numel() for x in xs)
        return self.__watch("all_reduce", num_elements, lambda: self.__real._start_coalesced(call, xs))

    def _start_all_to_all(self, call: Call, xs: list[Tensor]) -> Handle[list[Tensor]]:
        num_elements = sum(x.numel() for x in xs)
        return self.__watch(call.name, num_elements, lambda: self.__real._start_all_to_all(call, xs))

    def __watch(self, name: str, num_elements: int, start: Callable[[], Handle[T]]) -> Handle[T]:
        number = sum(step.kind == "start" for step in self.__steps)
        self.__steps.append(Step("start", name.rstrip("_"), num_elements))
        handle = start()

        def finish() -> T:
            self.__steps.append(Step("wait", name.rstrip("_"), number))
            return handle.wait()

        return Handle(finish)


# --- what can be wrong with any run ----------------------------------------------------------------------------------


def is_hopeless(tried: Run) -> bool:
    """Whether further runs would only take long to end as this one did."""
    return isinstance(tried.error, CommTimeout | TooManySteps)


def error(tried: Run, hint: str) -> Complaint | None:
    """Whatever kept the ranks from finishing; `hint` is for what the solution itself raised."""
    if tried.error is None:
        return None
    seen = say_error(tried.error)
    if isinstance(tried.error, CommTimeout | TooManySteps):
        hint = "a rank is still computing: look for a loop that doesn't end"
    elif isinstance(tried.error, CollectiveMismatch):
        hint = "all ranks must start the same collectives, of the same sizes, in the same order"
    elif isinstance(tried.error, Deadlock):
        hint = "a collective needs every rank: each of them must call it, and wait for its handle, in the same order"
    return Complaint("no error", seen, hint)


def sent(messages: Iterable[Message]) -> tuple[int, int]:
    """Messages and bytes of some calls."""
    calls = list(messages)
    return sum(m.num_messages for m in calls), sum(m.sent_bytes for m in calls)


def in_words(num_messages: int, size_bytes: int) -> str:
    """Messages and bytes."""
    return f"{num_messages} message{'s' * (num_messages != 1)}, {size_bytes} bytes"


def listed(counts: Iterable[int]) -> str:
    """Numbers with commas between."""
    return ", ".join(map(str, counts))
