"""Runs a learner's function on ranks that can send and receive, and nothing else, and keeps what happened."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import isfunction
from typing import Any, NoReturn

import torch
from torch import Tensor

from mplab.comm import algorithms
from mplab.comm.calls import Call
from mplab.comm.communicator import Communicator, Handle
from mplab.comm.ledger import Ledger
from mplab.errors import MplabError
from mplab.homework.limited import Attempt, borrowed_by, counted, outcome_of
from mplab.trace.recorder import Recorder
from mplab.world.rank import Rank
from mplab.world.world import World

Solution = Callable[[Communicator, Tensor], Tensor]
TIMEOUT_S = 5.0
ITEM_BYTES = 4  # float32
ANSWERS = {
    function.__code__: name.removeprefix("_")
    for name, function in vars(algorithms).items()
    if isfunction(function) and name.removeprefix("_").startswith(("naive", "tree", "ring", "halving"))
}
"""Code of the library that does the exercises."""


@dataclass
class Trial:
    """One run of a solution, on one size of world and one length of tensor.

    Args:
        num_ranks: size of the world (n).
        length: elements of every rank's tensor (L), float32.
        rendezvous: whether every send waited for its receive.
        borrowed: see `Attempt`.
    """

    num_ranks: int
    length: int
    rendezvous: bool = False
    inputs: list[Tensor] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    error: BaseException | None = None
    ledgers: list[Ledger] = field(default_factory=list)
    is_input_changed: list[bool] = field(default_factory=list)
    is_aliased: list[bool] = field(default_factory=list)
    borrowed: tuple[str, ...] = ()

    def __str__(self) -> str:
        ranks = f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}, {self.length} elements"
        return ranks + (", every send waits for its receive" if self.rendezvous else "")

    @property
    def others(self) -> list[str]:
        """Calls other than send and recv, tried or made, each once."""
        made = [m.op for ledger in self.ledgers for m in ledger.messages if m.op not in ("send", "recv")]
        return list(dict.fromkeys([*self.refused, *made]))


def attempt(
    solution: Solution,
    num_ranks: int,
    length: int,
    rendezvous: bool = False,
    spoil: bool = False,
    may_collect: bool = False,
) -> Trial:
    """Run a solution once, with whole numbers as data, so that any order of summing gives the same float32.

    Args:
        solution: called on every rank with a communicator and a tensor of its own.
        num_ranks: size of the world.
        length: elements of the tensor.
        rendezvous: every send waits for its receive.
        spoil: deliver NaN in place of what was sent: a result without NaN then came by another way.
        may_collect: allow collectives too.
    """
    trial = Trial(num_ranks, length, rendezvous)
    numbers = torch.Generator().manual_seed(100 * num_ranks + length)
    trial.inputs = [torch.randint(-99, 100, (length,), generator=numbers).float() for _ in range(num_ranks)]
    given = [x.clone() for x in trial.inputs]
    world = World(num_ranks, device="cpu", rendezvous=rendezvous, timeout_s=TIMEOUT_S)

    counts = [Attempt("") for _ in range(num_ranks)]

    def main(rank: Rank) -> Any:
        comm = rank.comm if may_collect else ExamCommunicator(rank.comm, trial.refused, spoil)
        call = partial(solution, comm, given[rank.index])
        return counted(counts[rank.index], call, sys.maxsize, ANSWERS)  # an endless one is late for the others

    results, trial.error = outcome_of(lambda: world.run(main))
    trial.borrowed = borrowed_by(counts)
    trial.results = results or []
    trial.ledgers = world.ledgers
    trial.is_input_changed = [not torch.equal(a, b) for a, b in zip(given, trial.inputs, strict=True)]
    trial.is_aliased = [_shares_memory(out, x) for out, x in zip(trial.results, given, strict=False)]
    return trial


class ExamCommunicator(Communicator):
    """A communicator with send, recv, isend and irecv; all else is refused, and remembered though the error be caught.

    Its ledger and its trace are its own: what counts is what the communicator behind it writes down.
    """

    def __init__(self, real: Communicator, refused: list[str], spoil: bool) -> None:
        super().__init__(real.rank, real.ranks, real.device, Ledger(real.rank), Recorder(real.rank, real.device))
        self.__real, self.__refused, self.__spoil = real, refused, spoil

    def group(self, ranks: Sequence[int]) -> NoReturn:
        self._refuse("group")

    def _start_send(self, x: Tensor, dst: int, tag: int) -> Handle[None]:
        return self.__real._start_send(x, dst, tag)

    def _start_recv(self, src: int, tag: int) -> Handle[Tensor]:
        handle = self.__real._start_recv(src, tag)
        return Handle(lambda: torch.full_like(handle.wait(), torch.nan)) if self.__spoil else handle

    def _start(self, call: Call, x: Tensor | None) -> NoReturn:
        self._refuse(call.name)

    def _start_all_to_all(self, call: Call, xs: list[Tensor]) -> NoReturn:
        self._refuse(call.name)

    def _refuse(self, name: str) -> NoReturn:
        self.__refused.append(name)
        raise MplabError(f"comm.{name} is not for this exercise: use send, recv, isend and irecv")


def _shares_memory(out: Any, x: Tensor) -> bool:
    if type(out) is not Tensor or not x.numel() or not out.numel():
        return False
    return out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
