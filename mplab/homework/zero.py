"""The check of a ZeRO-1 step: what the ranks say to each other, and how much of the optimizer's state each keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mplab.comm.ledger import Message
from mplab.homework import watched
from mplab.homework.limited import OWN, borrowed, is_written
from mplab.homework.report import Complaint, Report, check_all
from mplab.homework.watched import FINISHES, ITEM_BYTES, Try, Watched, in_words, listed, sent
from mplab.plan.data import total_traffic
from mplab.plan.traffic import chunk_lengths, direct_traffic
from mplab.world.rank import Rank

NUM_RANKS = (2, 3, 4)
SHAPES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((4, 3), (4,)),  # 16 elements: divided by 2 and 4
    ((5,), (7, 2), (1,), (3, 3)),  # 29: divided by none
    ((3,),),  # fewer than some worlds have ranks
)
NUM_STEPS = 3
LR, MOMENTUM = 0.1, 0.9
WEIGHTS = "the weights are those of serial training"
Solution = Callable[[Rank, list[nn.Parameter], dict[Any, Any], float, float], None]


def check_zero1_step(solution: Solution) -> Report:
    """Check `solution(rank, parameters, states, lr, momentum)`: one update of SGD with momentum, by ZeRO stage 1.

    It is run on 2 to 4 ranks, three steps with the same `states` and one more with a new, empty one, as if training
    began anew there. The sizes are such as n does and does not divide, float32; in one run a parameter is frozen.

    Args:
        solution: called on every rank with its `Rank`, its parameters, whose `grad` is this rank's share of the
            gradient (None for a frozen one), a dict to keep its momentum in, the learning rate and the factor of the
            momentum; afterwards the parameters are those after v = momentum * v + (the sum of all shares),
            p = p - lr * v, which begins with v = 0.

    Returns:
        A report; nothing that the solution does is raised.

    **Communication**: each rank must call one reduce-scatter and one all-gather a step, of all parameters joined.

    **Reference**: Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", SC 2020,
    section 5.1.
    """
    settings = [_Setting(n, shapes) for n in NUM_RANKS for shapes in SHAPES] + [_Setting(2, SHAPES[1], frozen=1)]
    tries: list[_Try] = []
    for setting in settings:
        training = _Training(setting, solution)
        tries.append(_Try(setting, training.logs, watched.run(setting.num_ranks, training.main)))
        if not is_written([tries[-1].run]):
            return Report("zero1_step", (), is_written=False)
        if watched.is_hopeless(tries[-1].run):
            break
    finished = [one for one in tries if one.run.error is None]
    lines = [
        check_all(FINISHES, tries, _error, f"{listed(NUM_RANKS)} ranks, {NUM_STEPS + 1} steps"),
        check_all(OWN, tries, lambda one: borrowed(one.run)),
        check_all(WEIGHTS, finished, _weights, f"{NUM_STEPS} steps, and one with new states"),
        check_all("one reduce-scatter and one all-gather a step", finished, _calls),
        check_all("messages and bytes that each rank sends", finished, _traffic, "2(n-1)/n of the parameters' bytes"),
        check_all("momentum that each rank keeps", finished, _kept, "1/n of the parameters' bytes"),
    ]
    return Report("zero1_step", tuple(lines))


@dataclass(frozen=True)
class _Setting:
    """Sizes of one run.

    Args:
        num_ranks: of the world.
        shapes: of the parameters.
        frozen: the place of the one that is not trained; -1: all are.
    """

    num_ranks: int
    shapes: tuple[tuple[int, ...], ...]
    frozen: int = -1

    def __str__(self) -> str:
        frozen = f", of which parameter {self.frozen} is frozen" if self.frozen >= 0 else ""
        lengths = listed(torch.Size(shape).numel() for shape in self.shapes)
        return f"{self.num_ranks} ranks, parameters of {lengths} elements{frozen}"

    @cached_property
    def start(self) -> list[Tensor]:
        """The first weights."""
        return self._numbers(0)

    @cached_property
    def shares(self) -> list[list[list[Tensor]]]:
        """For each step and each rank the gradients of all parameters; those of the frozen one are not given."""
        steps, ranks = range(NUM_STEPS + 1), range(self.num_ranks)
        return [[self._numbers(1 + step * self.num_ranks + rank) for rank in ranks] for step in steps]

    @cached_property
    def length(self) -> int:
        """Elements of all trained parameters."""
        return sum(x.numel() for index, x in enumerate(self.start) if index != self.frozen)

    @property
    def chunk_bytes(self) -> list[int]:
        """Of each rank's chunk of them."""
        return [k * ITEM_BYTES for k in chunk_lengths(self.length, self.num_ranks)]

    def serial(self, reduce: Callable[[Tensor], Tensor], keeps_momentum: bool = True) -> list[list[Tensor]]:
        """The weights after each step.

        Args:
            reduce: all ranks' shares of a gradient, joined along a new first dim -> what is taken for the gradient.
            keeps_momentum: False: as if the states were new in every step.
        """
        parameters, found = self.parameters(), []
        for step, ranks in enumerate(self.shares):
            if step in (0, NUM_STEPS) or not keeps_momentum:
                optimizer = torch.optim.SGD(parameters, LR, MOMENTUM)
            for index, p in enumerate(parameters):
                p.grad = reduce(torch.stack([share[index] for share in ranks])) if p.requires_grad else None
            optimizer.step()
            found.append([p.detach().clone() for p in parameters])
        return found

    @cached_property
    def right(self) -> list[list[Tensor]]:
        """The weights after each step, serially."""
        return self.serial(_sum)

    def parameters(self) -> list[nn.Parameter]:
        """New ones, with the first weights."""
        return [nn.Parameter(x.clone(), index != self.frozen) for index, x in enumerate(self.start)]

    def _numbers(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator) for shape in self.shapes]


@dataclass
class _Log:
    """What a rank has after each step.

    Args:
        weights: of every parameter.
        calls: what it has said in the step.
        kept_bytes: in `states` after the last step that has them.
    """

    weights: list[list[Tensor]] = field(default_factory=list)
    calls: list[list[Message]] = field(default_factory=list)
    kept_bytes: int = 0


class _Training:
    """What the ranks of one run do."""

    def __init__(self, setting: _Setting, solution: Solution) -> None:
        self.setting, self.solution = setting, solution
        self.logs = [_Log() for _ in range(setting.num_ranks)]
        _ = setting.right  # before the ranks ask for its numbers all at once

    def main(self, rank: Rank, seen: Watched) -> None:
        setting, log = self.setting, self.logs[rank.index]
        parameters = setting.parameters()
        states: dict[Any, Any] = {}
        for step, ranks in enumerate(setting.shares):
            if step == NUM_STEPS:
                log.kept_bytes, states = _kept_bytes(states, parameters), {}
            for p, share in zip(parameters, ranks[rank.index], strict=True):
                p.grad = share.clone() if p.requires_grad else None
            num_before = len(seen.messages)
            self.solution(rank, list(parameters), states, LR, MOMENTUM)
            log.calls.append(seen.messages[num_before:])
            log.weights.append([p.detach().clone() for p in parameters])


def _kept_bytes(states: dict[Any, Any], parameters: Sequence[nn.Parameter]) -> int:
    """Bytes of the tensors that states keep alive, parameters and their gradients left out."""
    storages = [x.untyped_storage() for x in _tensors(states, set())]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    own = {x.untyped_storage().data_ptr() for p in parameters for x in (p, p.grad) if x is not None}
    return sum(size for place, size in sizes.items() if place not in own)


def _tensors(x: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in containers and objects, such as an optimizer; not what a communicator or a rank holds."""
    if id(x) in seen or type(x).__module__.startswith("mplab"):
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for pair in x.items():
            yield from _tensors(pair, seen)
    elif isinstance(x, list | tuple | set):
        for value in x:
            yield from _tensors(value, seen)
    elif hasattr(x, "__dict__") and not isinstance(x, type | ModuleType):
        yield from _tensors(vars(x), seen)


_Try = Try[_Setting, _Log]


def _sum(shares: Tensor) -> Tensor:
    return shares.sum(0)


# --- what can be wrong ------------------------------------------------------------------------------------------------


def _error(one: _Try) -> Complaint | None:
    if one.case.frozen >= 0:
        return watched.error(one.run, "a frozen parameter has no gradient: leave out those without p.requires_grad")
    if one.case.length % one.case.num_ranks:
        hint = "n need not divide the length, chunks may even be empty: reduce_scatter cuts as x.tensor_split(n)"
        return watched.error(one.run, hint)
    return watched.error(one.run, "run it on a World of this size and read the traceback; write under torch.no_grad()")


def _weights(one: _Try) -> Complaint | None:
    for step, want in enumerate(one.case.right):
        for rank, log in enumerate(one.logs):
            for index, (got, p) in enumerate(zip(log.weights[step], want, strict=True)):
                if got.shape == p.shape and torch.allclose(got, p, rtol=1e-4, atol=1e-5):
                    continue
                where = f"in parameter {index} on rank {rank} after step {step + 1}"
                if got.shape != p.shape:
                    hint = "write into the parameters: p.copy_(...) under torch.no_grad()"
                    return Complaint(f"shape {tuple(p.shape)} {where}", f"shape {tuple(got.shape)}", hint)
                first = int((~torch.isclose(got, p, rtol=1e-4, atol=1e-5)).view(-1).nonzero()[0])
                seen = f"{got.view(-1)[first]:g}"
                return Complaint(f"{p.view(-1)[first]:g} {where}, element {first}", seen, _why(one, step, log))
    return None


def _why(one: _Try, step: int, log: _Log) -> str:
    setting, got = one.case, torch.cat([x.view(-1) for x in log.weights[step]])

    def is_like(weights: list[list[Tensor]]) -> bool:
        return torch.allclose(got, torch.cat([x.view(-1) for x in weights[step]]), rtol=1e-4, atol=1e-5)

    if is_like(setting.serial(lambda shares: shares.mean(0))):
        return "this is the mean: p.grad is the rank's share already, so add up and don't divide"
    if 0 < step < NUM_STEPS and is_like(setting.serial(_sum, keeps_momentum=False)):
        return "the momentum is lost between the steps: keep it in states, and look there before you make a new one"
    if step == NUM_STEPS:
        return "states is a new, empty dict in this step: the momentum begins with zeros, and is kept nowhere else"
    if step == 0 and any(
        (got == start).any()
        for index, (got, start) in enumerate(zip(log.weights[0], setting.start, strict=True))
        if index != setting.frozen
    ):
        return "not every weight was updated: after the update all_gather the chunks, and copy them into the parameters"
    return "rank r updates chunk r of x.tensor_split(n), x being all parameters joined; all_gather joins these chunks"


def _calls(one: _Try) -> Complaint | None:
    want = ["reduce_scatter", "all_gather"]
    for rank, log in enumerate(one.logs):
        for step, calls in enumerate(log.calls):
            got = [message.op.rstrip("_") for message in calls]
            if got == want:
                continue
            if any(op.startswith("all_reduce") for op in got):
                hint = "an all_reduce gives every rank the whole sum: it needs its own chunk alone, from reduce_scatter"
            elif len(got) > 2:
                hint = "join all parameters with torch.cat: then one call of each is enough, however many there are"
            else:
                hint = (
                    "sum and cut with reduce_scatter, update this rank's chunk, hand the chunks round with all_gather"
                )
            seen = f"{', '.join(got) or 'nothing'} on rank {rank} in step {step + 1}"
            return Complaint(", ".join(want), seen, hint)
    return None


def _traffic(one: _Try) -> Complaint | None:
    for rank, log in enumerate(one.logs):
        blocks = one.case.chunk_bytes
        want = total_traffic(direct_traffic(name, rank, blocks) for name in ("reduce_scatter", "all_gather"))
        for step, calls in enumerate(log.calls):
            got = sent(calls)
            if got == (want.num_sent, want.sent_bytes):
                continue
            if got[1] > want.sent_bytes:
                hint = "a gradient and a weight go on their way once each, as float32, and nothing is filled up: "
                hint += "reduce_scatter cuts as x.tensor_split(n)"
            else:
                hint = "reduce_scatter all gradients, all_gather all weights"
            seen = f"{in_words(*got)} on rank {rank} in step {step + 1}"
            return Complaint(in_words(want.num_sent, want.sent_bytes), seen, hint)
    return None


def _kept(one: _Try) -> Complaint | None:
    for rank, (log, want) in enumerate(zip(one.logs, one.case.chunk_bytes, strict=True)):
        if log.kept_bytes > want:
            hint = "keep the momentum of this rank's chunk alone; a slice keeps all that it was cut from: clone it"
            return Complaint(f"at most {want} bytes", f"{log.kept_bytes} bytes on rank {rank}", hint)
    return None
