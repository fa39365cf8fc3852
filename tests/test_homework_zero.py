"""The check of a ZeRO-1 step: right solutions pass, and every wrong one fails for its own reason."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from graded import (
    check_command,
    check_fails_at,
    check_passes,
    check_sleep,
    check_stub,
    gradients,
    leaves,
    lines_of,
    name,
    never_ends,
    row,
    the_failed,
)
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn

from mplab.homework import check_zero1_step
from mplab.parallel.sharded import ShardedDataParallel
from mplab.world.rank import Rank

FINISHES = "every rank finishes"
OWN = "mplab's own is not called"
TRAFFIC = "messages and bytes that each rank sends"
WEIGHTS = "the weights are those of serial training"
CALLS = "one reduce-scatter and one all-gather a step"
KEPT = "momentum that each rank keeps"

States = dict[Any, Any]


def apart(x: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Parts of a row, into the parameters."""
    with torch.no_grad():
        for p, part in zip(parameters, x.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view(p.shape))


def with_gradient(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def moved(states: States, gradient: Tensor, momentum: float) -> Tensor:
    """The momentum that is kept in states, of whatever part."""
    states["v"] = momentum * states.get("v", torch.zeros_like(gradient)) + gradient
    v: Tensor = states["v"]
    return v


@torch.no_grad()
def step_in_place(
    rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float, op: str = "sum"
) -> None:
    parameters = with_gradient(parameters)
    gradient = rank.comm.reduce_scatter(row(gradients(parameters)), op)
    weights = row(parameters)
    weights.tensor_split(rank.size)[rank.index].sub_(lr * moved(states, gradient, momentum))
    apart(rank.comm.all_gather_(weights), parameters)


@torch.no_grad()
def step_out_of_place(rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float) -> None:
    """With asynchronous calls, and states by parameter."""
    parameters = with_gradient(parameters)
    handle = rank.comm.ireduce_scatter(row(gradients(parameters)))
    mine = row(parameters).tensor_split(rank.size)[rank.index].clone()
    kept = states.setdefault(parameters[0], {"momentum": torch.zeros_like(mine), "step": 0})
    kept["step"] += 1
    kept["momentum"].mul_(momentum).add_(handle.wait())
    apart(rank.comm.iall_gather(mine - lr * kept["momentum"]).wait(), parameters)


def step_of_an_optimizer(
    rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float
) -> None:
    """The parameters become views of one row, and torch's SGD gets this rank's chunk of it."""
    parameters = with_gradient(parameters)
    if not states:
        states["row"] = row(parameters).detach()
        for p, part in zip(parameters, states["row"].split([p.numel() for p in parameters]), strict=True):
            p.data = part.view(p.shape)
        states["mine"] = nn.Parameter(states["row"].tensor_split(rank.size)[rank.index])
        states["optimizer"] = torch.optim.SGD([states["mine"]], lr, momentum)
    states["mine"].grad = rank.comm.reduce_scatter(row(gradients(parameters)))
    states["optimizer"].step()
    states["mine"].grad = None
    rank.comm.all_gather_(states["row"])


@pytest.mark.parametrize("solution", [step_in_place, step_out_of_place, step_of_an_optimizer], ids=name)
def test_right_steps_pass(solution: Any) -> None:
    assert str(check_passes(check_zero1_step, solution)).startswith("zero1_step: 6 of 6 checks passed")


@torch.no_grad()
def all_of_it_on_each_rank(
    rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float
) -> None:
    """Plain data parallelism."""
    parameters = with_gradient(parameters)
    gradient = rank.comm.all_reduce(row(gradients(parameters)))
    apart(row(parameters) - lr * moved(states, gradient, momentum), parameters)


@torch.no_grad()
def all_reduce_and_gather(
    rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float
) -> None:
    parameters = with_gradient(parameters)
    gradient = rank.comm.all_reduce(row(gradients(parameters))).tensor_split(rank.size)[rank.index]
    mine = row(parameters).tensor_split(rank.size)[rank.index]
    apart(rank.comm.all_gather(mine - lr * moved(states, gradient, momentum)), parameters)


@torch.no_grad()
def gathers_gradients(rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float) -> None:
    """The bytes of ZeRO 1, and the memory of none."""
    parameters = with_gradient(parameters)
    gradient = rank.comm.all_gather(rank.comm.reduce_scatter(row(gradients(parameters))))
    apart(row(parameters) - lr * moved(states, gradient, momentum), parameters)


@torch.no_grad()
def momentum_of_everything(
    rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float
) -> None:
    """Only this rank's chunk of it is ever used."""
    parameters = with_gradient(parameters)
    weights = row(parameters)
    v = states.setdefault("v", torch.zeros_like(weights).tensor_split(rank.size)[rank.index])
    v.mul_(momentum).add_(rank.comm.reduce_scatter(row(gradients(parameters))))
    weights.tensor_split(rank.size)[rank.index].sub_(lr * v)
    apart(rank.comm.all_gather_(weights), parameters)


@torch.no_grad()
def copies_of_the_weights(
    rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float
) -> None:
    states["before"] = [p.clone() for p in parameters]
    step_in_place(rank, parameters, states, lr, momentum)


def momentum_lost(rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float) -> None:
    step_in_place(rank, parameters, {}, lr, momentum)


@torch.no_grad()
def momentum_elsewhere(rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float) -> None:
    """On the parameters, whatever states are given."""
    if not hasattr(parameters[0], "states"):
        parameters[0].states = {}  # type: ignore[attr-defined]
    step_in_place(rank, parameters, parameters[0].states, lr, momentum)  # type: ignore[attr-defined]


def no_momentum(rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float) -> None:
    step_in_place(rank, parameters, states, lr, 0.0)


@torch.no_grad()
def no_all_gather(rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float) -> None:
    parameters = with_gradient(parameters)
    weights = row(parameters)
    gradient = rank.comm.reduce_scatter(row(gradients(parameters)))
    weights.tensor_split(rank.size)[rank.index].sub_(lr * moved(states, gradient, momentum))
    apart(weights, parameters)


@torch.no_grad()
def not_written_back(rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float) -> None:
    copies = [nn.Parameter(p.clone(), p.requires_grad) for p in parameters]
    for copy, p in zip(copies, parameters, strict=True):
        copy.grad = p.grad
    step_in_place(rank, copies, states, lr, momentum)


@torch.no_grad()
def another_split(rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float) -> None:
    """`chunk` cuts 29 elements for 2 ranks as `tensor_split` does, and for 4 not."""
    parameters = with_gradient(parameters)
    gradient = rank.comm.reduce_scatter(row(gradients(parameters)))
    weights = row(parameters)
    weights.chunk(rank.size)[rank.index].sub_(lr * moved(states, gradient, momentum))
    apart(rank.comm.all_gather_(weights), parameters)


@torch.no_grad()
def filled_up(rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float) -> None:
    """To a multiple of the number of ranks."""
    parameters = with_gradient(parameters)
    num_elements = sum(p.numel() for p in parameters)
    fill = torch.zeros(-num_elements % rank.size)
    gradient = rank.comm.reduce_scatter(row([*gradients(parameters), fill]))
    mine = row([*parameters, fill]).tensor_split(rank.size)[rank.index]
    weights = rank.comm.all_gather(mine - lr * moved(states, gradient, momentum))
    apart(weights[:num_elements], parameters)


def one_by_one(rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float) -> None:
    for p in with_gradient(parameters):
        step_in_place(rank, [p], states.setdefault(p, {}), lr, momentum)


@torch.no_grad()
def by_parameters(rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float) -> None:
    """Each parameter is updated by one rank."""
    for index, p in enumerate(with_gradient(parameters)):
        gradient = rank.comm.reduce(gradients([p])[0], root=index % rank.size)
        if gradient is not None:
            p -= lr * moved(states.setdefault(p, {}), gradient, momentum)
        p.copy_(rank.comm.broadcast(p, index % rank.size))


def a_frozen_parameter_too(
    rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float
) -> None:
    assert all(p.grad is not None for p in parameters), "no gradient"
    step_in_place(rank, parameters, states, lr, momentum)


def with_autograd(rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float) -> None:
    for p, g in zip(parameters, gradients(parameters), strict=True):
        p -= lr * g


def library_step(rank: Rank, parameters: list[nn.Parameter], states: States, lr: float, momentum: float) -> None:
    ShardedDataParallel(nn.Sequential(), rank.comm, stage=1)


WRONG_STEPS: list[tuple[Any, list[str]]] = [
    (all_of_it_on_each_rank, [CALLS, KEPT]),
    (all_reduce_and_gather, [CALLS, TRAFFIC]),
    (gathers_gradients, [KEPT]),
    (momentum_of_everything, [KEPT]),
    (copies_of_the_weights, [KEPT]),
    (momentum_lost, [WEIGHTS]),
    (momentum_elsewhere, [WEIGHTS]),
    (no_momentum, [WEIGHTS]),
    (partial(step_in_place, op="mean"), [WEIGHTS]),
    (no_all_gather, [WEIGHTS, CALLS, TRAFFIC]),
    (not_written_back, [WEIGHTS]),
    (another_split, [FINISHES]),
    (filled_up, [TRAFFIC, KEPT]),
    (one_by_one, [CALLS, TRAFFIC]),
    (by_parameters, [CALLS, TRAFFIC, KEPT]),
    (a_frozen_parameter_too, [FINISHES]),
    (with_autograd, [FINISHES]),
    (never_ends, [FINISHES]),
    (leaves, [FINISHES]),
    (library_step, [FINISHES, OWN]),
]


@pytest.mark.parametrize(("solution", "reasons"), WRONG_STEPS, ids=[name(s) for s, _ in WRONG_STEPS])
def test_wrong_steps_fail_for_their_own_reason(solution: Any, reasons: list[str]) -> None:
    check_fails_at(check_zero1_step, solution, reasons)


# --- what the report says ---------------------------------------------------------------------------------------------


def test_a_stub_is_no_failure() -> None:
    check_stub(check_zero1_step)


@pytest.mark.parametrize(
    ("solution", "line", "hint"),
    [
        (all_reduce_and_gather, CALLS, "reduce_scatter"),
        (one_by_one, CALLS, "torch.cat"),
        (filled_up, TRAFFIC, "nothing is filled up"),
        (momentum_lost, WEIGHTS, "lost between the steps"),
        (momentum_elsewhere, WEIGHTS, "a new, empty dict"),
        (partial(step_in_place, op="mean"), WEIGHTS, "don't divide"),
        (no_all_gather, WEIGHTS, "all_gather"),
        (another_split, FINISHES, "x.tensor_split(n)"),
        (a_frozen_parameter_too, FINISHES, "frozen"),
        (with_autograd, FINISHES, "torch.no_grad()"),
        (momentum_of_everything, KEPT, "clone it"),
    ],
    ids=name,
)
def test_hints_for_a_step(solution: Any, line: str, hint: str) -> None:
    assert hint in lines_of(check_zero1_step(solution))[line].hint


def test_ranks_that_sleep_for_ever_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sleep(check_zero1_step, FINISHES, monkeypatch)


def test_a_rank_that_the_others_wait_for_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mplab.homework.watched.TIMEOUT_S", 0.3)

    def late(rank: Rank, *arguments: Any) -> None:
        if rank.index == 1:
            time.sleep(1.0)
        step_in_place(rank, *arguments)

    line = the_failed(check_zero1_step(late))
    assert (line.name, "late: rank 1" in line.seen) == (FINISHES, True), line


def test_what_comes_after_a_failure_is_not_checked() -> None:
    assert lines_of(check_zero1_step(never_ends))[KEPT].outcome == "not checked"


def test_the_command_checks_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "def zero1_step(rank, parameters, states, lr, momentum):\n    pass\n"
    check_command(code, tmp_path, capsys)
