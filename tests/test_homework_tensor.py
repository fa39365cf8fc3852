"""The checks of lab 04: right solutions pass, and every wrong one fails for the reason that is its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import graded
import pytest
import torch
from graded import Wrong, check_fails, check_sleep, check_stub, leaves, lines_of, name, never_ends, wrong_ones
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn
from torch.nn import functional

from mplab.__main__ import main as command_line
from mplab.comm import Communicator
from mplab.homework import (
    Report,
    check_column_linear,
    check_plan_for,
    check_row_linear,
    check_vocab_cross_entropy,
    make_unseen_model,
)
from mplab.parallel import ColumnParallelLinear, RowParallelLinear, vocab_parallel_cross_entropy
from mplab.parallel.operators import all_reduce, copy_to, gather_from, reduce_from, reduce_from_

FINISHES = "every rank finishes"
OWN = "mplab's own is not called"
OUTPUTS = "outputs are those of one process"
GRADIENTS = "gradients are those of one process"
ALONE = "what it is given is left alone"
WHOLE = "no rank gets the whole weight"
TRAFFIC = "messages and bytes that each rank sends"


def check_passes(check: Callable[[Any], Report], solution: Any) -> None:
    report = graded.check_passes(check, solution)
    assert ": 7 of 7 checks passed" in str(report)


class Apply(torch.autograd.Function):
    """Any forward and backward: each is given as a function."""

    @staticmethod
    def forward(ctx: Any, comm: Communicator, forward: Any, backward: Any, *inputs: Tensor) -> Tensor:
        ctx.comm, ctx.backward_of, ctx.inputs = comm, backward, inputs
        output: Tensor = forward(comm, *inputs)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, None, *ctx.backward_of(ctx.comm, grad, *ctx.inputs)


def apply(comm: Communicator, forward: Any, backward: Any, *inputs: Tensor) -> Tensor:
    output: Tensor = Apply.apply(comm, forward, backward, *inputs)  # type: ignore[no-untyped-call]
    return output


def nothing(comm: Communicator, x: Tensor) -> Tensor:
    return x.view_as(x)


def back(comm: Communicator, grad: Tensor, x: Tensor) -> list[Tensor]:
    return [grad]


Sum = Callable[[Communicator, Tensor], Tensor]


def by_all_reduce(comm: Communicator, x: Tensor) -> Tensor:
    return comm.all_reduce(x)


def in_two_halves(comm: Communicator, x: Tensor, dim: int = 0) -> Tensor:
    return comm.all_gather(comm.reduce_scatter(x, dim=dim), dim)


def by_messages(comm: Communicator, x: Tensor) -> Tensor:
    """A ring."""
    chunks = list(x.flatten().clone().tensor_split(comm.size))
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for step in range(2 * (comm.size - 1)):
        handle = comm.isend(chunks[(comm.rank - step) % comm.size], right)
        came = comm.recv(left)
        place = (comm.rank - step - 1) % comm.size
        chunks[place] = chunks[place] + came if step < comm.size - 1 else came
        handle.wait()
    return torch.cat(chunks).view(x.shape)


def by_gathering(comm: Communicator, x: Tensor) -> Tensor:
    return comm.all_gather(x[None]).sum(0)


def twice(comm: Communicator, x: Tensor) -> Tensor:
    return comm.all_reduce(comm.all_reduce(x))


def mean(comm: Communicator, x: Tensor) -> Tensor:
    return comm.all_reduce(x, "mean")


def halved(comm: Communicator, x: Tensor) -> Tensor:
    return comm.all_reduce(x.bfloat16()).float()


def after_a_barrier(comm: Communicator, x: Tensor) -> Tensor:
    comm.barrier()
    return comm.all_reduce(x)


# --- a layer cut by its outputs ---------------------------------------------------------------------------------------


def column(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(copy_to(x, comm), weight, bias)


def column_of_its_own(
    comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor, add_up: Sum = by_all_reduce
) -> Tensor:
    x = apply(comm, nothing, lambda comm, grad, x: [add_up(comm, grad)], x)
    return x @ weight.mT + bias


def column_by_hand(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The message is on its way while the other gradients are computed."""

    def forward(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x @ weight.mT + bias

    def backward(comm: Communicator, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        handle = comm.iall_reduce_(grad @ weight)
        of_weight, of_bias = grad.mT @ x, grad.sum(0)
        return [handle.wait(), of_weight, of_bias]

    return apply(comm, forward, backward, x, weight, bias)


RIGHT_COLUMNS = [
    column,
    column_by_hand,
    *(partial(column_of_its_own, add_up=f) for f in (in_two_halves, partial(in_two_halves, dim=1), by_messages)),
]


@pytest.mark.parametrize("solution", RIGHT_COLUMNS, ids=name)
def test_right_columns_pass(solution: Any) -> None:
    check_passes(check_column_linear, solution)


def column_alone(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x, weight, bias)


def column_without_bias(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(copy_to(x, comm), weight)


def column_of_all_outputs(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gather_from(column(comm, x, weight, bias), comm)


def column_of_the_whole_weight(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    output = copy_to(x, comm) @ gather_from(weight, comm, 0).mT
    return output.tensor_split(comm.size, 1)[comm.rank] + bias


def column_of_the_whole_weight_in_rows(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = [gather_from(row[None], comm, 0) for row in weight]
    output = torch.stack([copy_to(x, comm) @ row[comm.rank] for row in rows], 1)
    return output + bias


def column_of_the_padded_weight(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A sum of what is 0 elsewhere."""
    parts = [weight if rank == comm.rank else torch.zeros_like(weight) for rank in range(comm.size)]
    whole = reduce_from(torch.cat(parts), comm)
    return column(comm, x, whole.tensor_split(comm.size)[comm.rank], bias)


def column_with_the_weight_at_rank_0(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    comm.gather(weight)
    return column(comm, x, weight, bias)


def column_with_the_weight_in_backward(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each rank computes the gradient of x for itself."""

    def forward(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x @ weight.mT + bias

    def backward(comm: Communicator, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        return [comm.all_gather(grad, 1) @ comm.all_gather(weight), grad.mT @ x, grad.sum(0)]

    return apply(comm, forward, backward, x, weight, bias)


def column_with_a_sum_forward(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a mean over equal ones changes is nothing."""
    return column(comm, apply(comm, mean, back, x), weight, bias)


def column_that_adds_up_all(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(copy_to(x, comm), copy_to(weight, comm), copy_to(bias, comm))


def column_of_a_collective(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(comm.broadcast(x), weight, bias)


def column_that_writes(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    output = functional.linear(copy_to(x, comm), weight, bias.clone())
    with torch.no_grad():
        bias.zero_()
    return output


def column_that_writes_in_backward(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    def forward(comm: Communicator, y: Tensor, bias: Tensor) -> Tensor:
        return y + bias

    def backward(comm: Communicator, grad: Tensor, y: Tensor, bias: Tensor) -> list[Tensor]:
        copy = grad.clone()
        return [copy, grad.cumsum_(0)[-1]]

    return apply(comm, forward, backward, copy_to(x, comm) @ weight.mT, bias)


def column_in_float64(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return column(comm, x, weight, bias).double()


def column_that_never_waits(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    def add_up(comm: Communicator, grad: Tensor) -> Tensor:
        comm.iall_reduce(grad)
        return grad

    return column_of_its_own(comm, x, weight, bias, add_up)


def column_on_rank_0_alone(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (column_alone if comm.rank else column)(comm, x, weight, bias)


def none(*_: Any) -> Any:
    return None


def never_ends_in_backward(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return column_of_its_own(comm, x, weight, bias, never_ends)


def library_column(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    layer = nn.Linear(x.shape[1], len(weight), device="meta").to_empty(device="cpu")
    ColumnParallelLinear(layer, comm.group([comm.rank]))
    return column(comm, x, weight, bias)


WRONG_COLUMNS: Wrong = [
    (column_alone, {GRADIENTS: "as copy_to(x, comm) does", TRAFFIC: "as copy_to(x, comm) does"}),
    (column_without_bias, {OUTPUTS: "the bias is missing", GRADIENTS: "it was not used"}),
    (column_of_all_outputs, {OUTPUTS: "(12, 84), float32 on rank 0"}),
    (
        column_of_the_whole_weight,
        {WHOLE: "10080 bytes in forward of rank 0: 1 all_gather", TRAFFIC: "forward needs nobody"},
    ),
    (column_of_the_whole_weight_in_rows, {WHOLE: "42 all_gather", TRAFFIC: "forward needs nobody"}),
    (column_of_the_padded_weight, {WHOLE: "1 all_reduce", TRAFFIC: "forward needs nobody"}),
    (column_with_the_weight_at_rank_0, {WHOLE: "1 gather", TRAFFIC: "forward needs nobody"}),
    (
        column_with_the_weight_in_backward,
        {WHOLE: "in backward of rank 0: 2 all_gather", TRAFFIC: "has to be all-reduced once"},
    ),
    (column_with_a_sum_forward, {TRAFFIC: "forward needs nobody"}),
    (column_that_adds_up_all, {GRADIENTS: "add up nothing but", TRAFFIC: "has to be all-reduced once"}),
    (column_of_a_collective, {GRADIENTS: "outside autograd", TRAFFIC: "forward needs nobody"}),
    (partial(column_of_its_own, add_up=twice), {GRADIENTS: "added up twice", TRAFFIC: "all-reduced once"}),
    (partial(column_of_its_own, add_up=mean), {GRADIENTS: "a mean over the ranks"}),
    (partial(column_of_its_own, add_up=halved), {TRAFFIC: "in the dtype that it has"}),
    (partial(column_of_its_own, add_up=by_gathering), {TRAFFIC: "1 all_gather"}),
    (partial(column_of_its_own, add_up=after_a_barrier), {TRAFFIC: "1 barrier, 1 all_reduce"}),
    (column_that_writes, {ALONE: "bias changed on rank 0"}),
    (column_that_writes_in_backward, {ALONE: "the gradient that comes to backward changed"}),
    (column_in_float64, {OUTPUTS: "float64 on rank 0"}),
    (column_that_never_waits, {GRADIENTS: "as copy_to(x, comm) does", TRAFFIC: "as copy_to(x, comm) does"}),
    (column_on_rank_0_alone, {FINISHES: "a collective needs every rank"}),
    (none, {OUTPUTS: "return the result on every rank"}),
    (never_ends, {FINISHES: "a loop that doesn't end"}),
    (never_ends_in_backward, {FINISHES: "a loop that doesn't end"}),
    (leaves, {FINISHES: "enough"}),
    (library_column, {OWN: "ColumnParallelLinear"}),
]


@wrong_ones(WRONG_COLUMNS)
def test_wrong_columns_fail_for_their_own_reason(solution: Any, reasons: dict[str, str]) -> None:
    check_fails(check_column_linear, solution, reasons)


# --- a layer cut by its inputs ----------------------------------------------------------------------------------------


def row(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reduce_from(x @ weight.mT, comm) + bias


def row_in_place(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reduce_from_(functional.linear(x, weight), comm).add_(bias)


def row_of_its_own(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor, add_up: Sum = by_all_reduce) -> Tensor:
    return apply(comm, add_up, back, x @ weight.mT) + bias


def row_by_hand(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    def forward(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return comm.all_reduce_(x @ weight.mT).add_(bias)

    def backward(comm: Communicator, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        return [grad @ weight, grad.mT @ x, grad.sum(0)]

    return apply(comm, forward, backward, x, weight, bias)


RIGHT_ROWS = [
    row,
    row_in_place,
    row_by_hand,
    *(partial(row_of_its_own, add_up=f) for f in (in_two_halves, partial(in_two_halves, dim=1), by_messages)),
]


@pytest.mark.parametrize("solution", RIGHT_ROWS, ids=name)
def test_right_rows_pass(solution: Any) -> None:
    check_passes(check_row_linear, solution)


def row_alone(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x, weight, bias)


def row_without_bias(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reduce_from(functional.linear(x, weight), comm)


def row_with_a_bias_a_rank(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reduce_from(functional.linear(x, weight, bias), comm)


def row_with_the_bias_of_rank_0(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reduce_from(functional.linear(x, weight, None if comm.rank else bias), comm)


def row_with_parts_of_the_bias(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reduce_from(functional.linear(x, weight, bias / comm.size), comm)


def row_outside_autograd(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return comm.all_reduce(x @ weight.mT) + bias


def row_that_adds_up_in_backward(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return all_reduce(x @ weight.mT, comm) + bias


def row_with_f_and_g(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x is cut: its gradients are of other features on every rank."""
    return row(comm, copy_to(x, comm), weight, bias)


def row_of_all_inputs(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(gather_from(x, comm), gather_from(weight, comm), bias)


def row_of_the_whole_weight(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The right outputs in the right way, and the weight for nothing."""
    whole = gather_from(weight, comm)
    return row(comm, x, whole.tensor_split(comm.size, 1)[comm.rank], bias)


def row_that_adds_up_the_bias(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reduce_from(x @ weight.mT, comm) + reduce_from(bias / comm.size, comm) * 1.0


def row_of_a_part(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (row(comm, x, weight, bias)).tensor_split(comm.size, 1)[comm.rank]


def row_that_writes(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    output = row(comm, x, weight.clone(), bias)
    with torch.no_grad():
        weight.mul_(2)
    return output


def row_of_two_orders(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    parts = (x @ weight.mT).split([50, 34], 1)
    sums = {place: reduce_from(parts[place], comm) for place in ((1, 0) if comm.rank else (0, 1))}
    return torch.cat([sums[0], sums[1]], 1) + bias


def library_row(comm: Communicator, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    layer = nn.Linear(x.shape[1], len(weight), device="meta").to_empty(device="cpu")
    RowParallelLinear(layer, comm.group([comm.rank]))
    return row(comm, x, weight, bias)


WRONG_ROWS: Wrong = [
    (row_alone, {OUTPUTS: "this rank's summand alone", TRAFFIC: "all-reduce them"}),
    (row_without_bias, {OUTPUTS: "the bias is missing", GRADIENTS: "it was not used"}),
    (row_with_a_bias_a_rank, {OUTPUTS: "the bias was added 2 times"}),
    (row_with_the_bias_of_rank_0, {GRADIENTS: "it was not used"}),
    (row_with_parts_of_the_bias, {GRADIENTS: "this is 1/n of it"}),
    (row_outside_autograd, {GRADIENTS: "outside autograd"}),
    (row_that_adds_up_in_backward, {GRADIENTS: "this is n times the gradient", TRAFFIC: "send nothing"}),
    (row_with_f_and_g, {GRADIENTS: "work one entry out", TRAFFIC: "send nothing"}),
    (row_of_all_inputs, {WHOLE: "in forward of rank 0: 2 all_gather", TRAFFIC: "adds on the way"}),
    (
        row_of_the_whole_weight,
        {WHOLE: "1 all_gather, 1 all_reduce", TRAFFIC: "one all-reduce of the outputs is enough"},
    ),
    (row_that_adds_up_the_bias, {GRADIENTS: "this is 1/n of it", TRAFFIC: "one all-reduce of the outputs is enough"}),
    (row_of_a_part, {OUTPUTS: "shape (12, 42)"}),
    (partial(row_of_its_own, add_up=mean), {OUTPUTS: "the sum was divided by n"}),
    (partial(row_of_its_own, add_up=twice), {OUTPUTS: "work one entry out", TRAFFIC: "2 all_reduce"}),
    (partial(row_of_its_own, add_up=by_gathering), {TRAFFIC: "an all_gather brings every summand"}),
    (partial(row_of_its_own, add_up=after_a_barrier), {TRAFFIC: "1 barrier, 1 all_reduce"}),
    (row_that_writes, {ALONE: "weight changed on rank 0"}),
    (row_of_two_orders, {FINISHES: "the same order"}),
    (none, {OUTPUTS: "return the result on every rank"}),
    (never_ends, {FINISHES: "a loop that doesn't end"}),
    (leaves, {FINISHES: "enough"}),
    (library_row, {OWN: "RowParallelLinear"}),
]


@wrong_ones(WRONG_ROWS)
def test_wrong_rows_fail_for_their_own_reason(solution: Any, reasons: dict[str, str]) -> None:
    check_fails(check_row_linear, solution, reasons)


# --- the cross-entropy of cut logits ----------------------------------------------------------------------------------

LOGITS = "no rank gets the whole logits"


def largest(comm: Communicator, x: Tensor) -> Tensor:
    return comm.all_reduce(x.detach().amax(1), "max")


def of_target(comm: Communicator, x: Tensor, targets: Tensor) -> Tensor:
    """The target's logit, where this rank has it, else 0."""
    own = targets - comm.rank * x.shape[1]
    is_here = (own >= 0) & (own < x.shape[1])
    return x.gather(1, own.where(is_here, 0)[:, None])[:, 0].where(is_here, 0)


def loss_of_three_sums(
    comm: Communicator,
    logits: Tensor,
    targets: Tensor,
    top: Callable[[Communicator, Tensor], Tensor] = largest,
    add_up: Callable[[Tensor, Communicator], Tensor] = reduce_from,
) -> Tensor:
    x = logits - top(comm, logits)[:, None]
    log_sum = add_up(x.exp().sum(1), comm).log()
    return (log_sum - add_up(of_target(comm, x, targets), comm)).mean()


def loss_of_one_gather(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    said = torch.stack([logits.logsumexp(1), of_target(comm, logits, targets)])
    of_ranks = gather_from(said[None], comm, 0)
    return (of_ranks[:, 0].logsumexp(0) - of_ranks[:, 1].sum(0)).mean()


def loss_by_hand(
    comm: Communicator, logits: Tensor, targets: Tensor, backward: Callable[..., Tensor] | None = None
) -> Tensor:
    """Maximum, sum and target's logit in one all_gather; backward by formula."""

    def forward(comm: Communicator, logits: Tensor) -> Tensor:
        top = logits.amax(1)
        said = torch.stack([top, (logits - top[:, None]).exp().sum(1), of_target(comm, logits, targets)])
        tops, sums, right = comm.all_gather(said[None]).unbind(1)
        kept.append(tops.amax(0) + (sums * (tops - tops.amax(0)).exp()).sum(0).log())
        return (kept[0] - right.sum(0)).mean()

    def of_logits(comm: Communicator, grad: Tensor, logits: Tensor) -> list[Tensor]:
        return [(backward or right_backward)(comm, grad, logits, targets, kept[0])]

    kept: list[Tensor] = []
    return apply(comm, forward, of_logits, logits)


def hot(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    """1 at the targets that are here."""
    classes = torch.arange(logits.shape[1]) + comm.rank * logits.shape[1]
    return (targets[:, None] == classes).float()


def right_backward(comm: Communicator, grad: Tensor, logits: Tensor, targets: Tensor, log_sum: Tensor) -> Tensor:
    return grad * ((logits - log_sum[:, None]).exp() - hot(comm, logits, targets)) / len(targets)


RIGHT_LOSSES = [loss_of_three_sums, loss_of_one_gather, loss_by_hand]


@pytest.mark.parametrize("solution", RIGHT_LOSSES, ids=name)
def test_right_losses_pass(solution: Any) -> None:
    check_passes(check_vocab_cross_entropy, solution)


def loss_of_all_logits(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(gather_from(logits, comm), targets)


def loss_at_rank_0(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    """The others get it back."""

    def forward(comm: Communicator, logits: Tensor) -> Tensor:
        whole = comm.gather(logits, dim=1)
        return comm.broadcast(None if whole is None else functional.cross_entropy(whole, targets))

    def backward(comm: Communicator, grad: Tensor, logits: Tensor) -> list[Tensor]:
        whole = comm.gather(logits, dim=1)
        if whole is not None:
            whole = grad * (whole.softmax(1) - functional.one_hot(targets, whole.shape[1])) / len(targets)
        return [comm.scatter(whole, dim=1)]

    return apply(comm, forward, backward, logits)


def loss_by_positions(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    """Each rank gets all classes of some positions."""

    def forward(comm: Communicator, logits: Tensor) -> Tensor:
        return torch.cat(comm.all_to_all(list(logits.tensor_split(comm.size))), 1)

    def backward(comm: Communicator, grad: Tensor, logits: Tensor) -> list[Tensor]:
        return [torch.cat(comm.all_to_all(list(grad.contiguous().tensor_split(comm.size, 1))))]

    x = apply(comm, forward, backward, logits)
    own = functional.cross_entropy(x, targets.tensor_split(comm.size)[comm.rank], reduction="sum")
    return reduce_from(own, comm) / len(targets)


def loss_a_position_at_a_time(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    rows = zip(logits.split(1), targets.split(1), strict=True)
    return torch.stack([loss_of_one_gather(comm, x, target) for x, target in rows]).mean()


def no_top(comm: Communicator, x: Tensor) -> Tensor:
    return torch.zeros(len(x))


def own_top(comm: Communicator, x: Tensor) -> Tensor:
    return x.detach().amax(1)


def keep(x: Tensor, comm: Communicator) -> Tensor:
    return x


def loss_with_other_tops(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    top = own_top(comm, logits)
    log_sum = reduce_from((logits - top[:, None]).exp().sum(1), comm).log() + top
    return (log_sum - reduce_from(of_target(comm, logits, targets), comm)).mean()


def loss_of_own_classes(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.logsumexp(1) - reduce_from(of_target(comm, logits, targets), comm)).mean()


def loss_of_own_targets(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    log_sums = gather_from(logits.logsumexp(1)[None], comm, 0)
    return (log_sums.logsumexp(0) - of_target(comm, logits, targets)).mean()


def loss_without_targets(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    return gather_from(logits.logsumexp(1)[None], comm, 0).logsumexp(0).mean()


def loss_of_class_0_too(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    """Every rank gives a logit for each target: that of its first class where it has not the target."""
    own = targets - comm.rank * logits.shape[1]
    is_here = (own >= 0) & (own < logits.shape[1])
    right = reduce_from(logits.gather(1, own.where(is_here, 0)[:, None])[:, 0], comm)
    return (gather_from(logits.logsumexp(1)[None], comm, 0).logsumexp(0) - right).mean()


def summed_loss(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    return loss_of_one_gather(comm, logits, targets) * len(targets)


def loss_n_times(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    return reduce_from(loss_of_one_gather(comm, logits, targets), comm)


def loss_outside_autograd(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    return loss_of_three_sums(comm, logits, targets, add_up=lambda x, comm: comm.all_reduce(x))


def loss_in_place(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    logits -= largest(comm, logits)[:, None]
    return loss_of_three_sums(comm, logits, targets, top=no_top)


def loss_that_moves_targets(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    loss = loss_of_one_gather(comm, logits, targets.clone())
    targets -= comm.rank * logits.shape[1]
    return loss


def loss_in_float64(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    return loss_of_three_sums(comm, logits.double(), targets).float()


def loss_a_position(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    return loss_of_one_gather(comm, logits, targets).expand(len(targets))


def for_a_gradient_of_1(comm: Communicator, grad: Tensor, *rest: Any) -> Tensor:
    return right_backward(comm, torch.ones(()), *rest)


def softmax_alone(comm: Communicator, grad: Tensor, logits: Tensor, targets: Tensor, log_sum: Tensor) -> Tensor:
    return grad * (logits - log_sum[:, None]).exp() / len(targets)


def of_every_position(comm: Communicator, grad: Tensor, *rest: Any) -> Tensor:
    return right_backward(comm, grad, *rest) * 12


def of_the_first_class_too(
    comm: Communicator, grad: Tensor, logits: Tensor, targets: Tensor, log_sum: Tensor
) -> Tensor:
    is_elsewhere = 1 - hot(comm, logits, targets).sum(1)
    gradient = right_backward(comm, grad, logits, targets, log_sum)
    gradient[:, 0] -= grad * is_elsewhere / len(targets)
    return gradient


def own_softmax(comm: Communicator, grad: Tensor, logits: Tensor, targets: Tensor, log_sum: Tensor) -> Tensor:
    return grad * (logits.softmax(1) - hot(comm, logits, targets)) / len(targets)


def asks_again(comm: Communicator, grad: Tensor, logits: Tensor, targets: Tensor, log_sum: Tensor) -> Tensor:
    log_sum = comm.all_gather(logits.logsumexp(1)[None]).logsumexp(0)
    return right_backward(comm, grad, logits, targets, log_sum)


def loss_on_rank_0_alone(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    if comm.rank:
        return logits.sum() * 0
    return loss_of_one_gather(comm, logits, targets)


def library_loss(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    return vocab_parallel_cross_entropy(logits, targets, comm)


FLOATS = "are all that ranks need of each other"
WRONG_LOSSES: Wrong = [
    (loss_of_all_logits, {LOGITS: "5760 bytes in forward of rank 0: 1 all_gather", TRAFFIC: FLOATS}),
    (loss_at_rank_0, {LOGITS: "1 gather, 1 broadcast", TRAFFIC: "1 gather, 1 scatter"}),
    (loss_by_positions, {TRAFFIC: FLOATS}),
    (loss_a_position_at_a_time, {TRAFFIC: "12 all_gather"}),
    (loss_in_float64, {TRAFFIC: FLOATS}),
    (partial(loss_of_three_sums, top=no_top), {OUTPUTS: "is no float32", GRADIENTS: "is no float32"}),
    (loss_with_other_tops, {OUTPUTS: "the largest of all", GRADIENTS: "work one entry out"}),
    (loss_of_own_classes, {OUTPUTS: "of this rank's own classes", GRADIENTS: "this rank's own classes"}),
    (loss_of_own_targets, {OUTPUTS: "the others must give 0 for it"}),
    (loss_without_targets, {OUTPUTS: "take the target's logit from it", GRADIENTS: "softmax alone"}),
    (loss_of_class_0_too, {OUTPUTS: "work one entry out", GRADIENTS: "only that one does it"}),
    (partial(loss_of_three_sums, add_up=keep), {OUTPUTS: "of this rank's own classes", GRADIENTS: "own classes"}),
    (summed_loss, {OUTPUTS: "return their mean", GRADIENTS: "each has 1/N of the gradient"}),
    (loss_n_times, {OUTPUTS: "this is n times the loss"}),
    (loss_outside_autograd, {GRADIENTS: "outside autograd"}),
    (partial(loss_of_three_sums, add_up=all_reduce), {GRADIENTS: "this is n times the gradient", TRAFFIC: "keep it"}),
    (partial(loss_by_hand, backward=for_a_gradient_of_1), {GRADIENTS: "need not be 1"}),
    (partial(loss_by_hand, backward=softmax_alone), {GRADIENTS: "softmax alone"}),
    (partial(loss_by_hand, backward=of_every_position), {GRADIENTS: "each has 1/N of the gradient"}),
    (partial(loss_by_hand, backward=of_the_first_class_too), {GRADIENTS: "only that one does it"}),
    (partial(loss_by_hand, backward=own_softmax), {GRADIENTS: "divide by the sum over all"}),
    (partial(loss_by_hand, backward=asks_again), {TRAFFIC: "keep it"}),
    (loss_in_place, {ALONE: "logits changed on rank 0"}),
    (loss_that_moves_targets, {ALONE: "targets changed on rank 1"}),
    (loss_a_position, {OUTPUTS: "shape (12,)"}),
    (loss_on_rank_0_alone, {FINISHES: "a collective needs every rank"}),
    (none, {OUTPUTS: "return the result on every rank"}),
    (never_ends, {FINISHES: "a loop that doesn't end"}),
    (leaves, {FINISHES: "enough"}),
    (library_loss, {OWN: "vocab_parallel_cross_entropy"}),
]


@wrong_ones(WRONG_LOSSES)
def test_wrong_losses_fail_for_their_own_reason(solution: Any, reasons: dict[str, str]) -> None:
    check_fails(check_vocab_cross_entropy, solution, reasons)


# --- a plan -----------------------------------------------------------------------------------------------------------

PLAN = "plan_for gives a plan"
ACCEPTS = "tensor_parallel accepts it"
RUNS = "the model runs, cut"
CUT = "every linear layer and the words are cut"
RIGHT_PLAN = {
    "words": "vocab",
    "tower.*.mixing.joined": "column:3",
    "tower.*.mixing.merge": "row",
    "tower.*.gating.gate": "column",
    "tower.*.gating.content": "column",
    "tower.*.gating.back": "row",
    "guess": "vocab",
}


def plan(model: nn.Module, without: Sequence[str] = (), **changes: str) -> dict[str, str]:
    """The right one, with other styles for some layers, by the last part of their names."""
    kept = {pattern: style for pattern, style in RIGHT_PLAN.items() if pattern.rpartition(".")[2] not in without}
    return {pattern: changes.get(pattern.rpartition(".")[2], style) for pattern, style in kept.items()}


def plan_by_name(model: nn.Module) -> dict[str, str]:
    """One entry for each layer, by what it looks like."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            num_outputs, num_inputs = module.weight.shape
            found[path] = "column" if num_outputs > num_inputs else "row"
            found[path] += ":3" * (num_outputs == 3 * num_inputs)
    return found | {"words": "vocab"}


def plan_with_more(model: nn.Module) -> dict[str, str]:
    """With Hugging Face's words, an entry that is one anyway, and what sequence parallelism needs."""
    of_hugging_face = {"column": "colwise", "row": "rowwise", "vocab": "embedding_rowwise"}
    found = {pattern: of_hugging_face.get(style, style) for pattern, style in RIGHT_PLAN.items()}
    return found | {"guess": "colwise", "tower.*.gating": "entry", "tower.0": "scatter"}


@pytest.mark.parametrize("solution", [plan, plan_by_name, plan_with_more], ids=name)
def test_right_plans_pass(solution: Any) -> None:
    check_passes(check_plan_for, solution)


def plan_of_column_gather(model: nn.Module) -> dict[str, str]:
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {**dict.fromkeys(linear, "column_gather"), "words": "vocab"}


def plan_that_names_nothing(model: nn.Module) -> dict[str, str]:
    return {**RIGHT_PLAN, "blocks.*.mlp.up": "column"}


def plan_with_two_entries(model: nn.Module) -> dict[str, str]:
    return {**RIGHT_PLAN, "tower.0.mixing.merge": "row"}


def plan_of_places(model: nn.Module) -> dict[str, str]:
    return {**RIGHT_PLAN, "places": "vocab"}


def plan_of_partial_norms(model: nn.Module) -> dict[str, str]:
    return {**RIGHT_PLAN, "last_norm": "partial"}


def plan_of_one_layer(model: nn.Module) -> dict[str, str]:
    return {pattern.replace("*", "0"): style for pattern, style in RIGHT_PLAN.items()}


def plan_of_entries_everywhere(model: nn.Module) -> dict[str, str]:
    """The residual stream is no entry: what is added to it is whole."""
    return {**RIGHT_PLAN, "tower.*": "entry"}


def plan_of_nothing(model: nn.Module) -> dict[str, str]:
    return {}


def plan_as_a_list(model: nn.Module) -> list[tuple[str, str]]:
    return list(RIGHT_PLAN.items())


def plan_by_mistake(model: nn.Module) -> dict[str, str]:
    return {path: "column" for path, module in model.named_modules() if module.weight.dim() == 2}


WRONG_PLANS: Wrong = [
    (plan_of_column_gather, {TRAFFIC: "1 all_reduce_, 11 all_gather"}),
    (partial(plan, joined="column"), {OUTPUTS: "column:3 of three"}),
    (partial(plan, joined="row"), {RUNS: "only a row layer takes it"}),
    (partial(plan, merge="column"), {RUNS: "only a row layer takes it"}),
    (partial(plan, guess="column_gather"), {TRAFFIC: "leave them cut"}),
    (partial(plan, gate="column_gather"), {RUNS: "only a row layer takes it"}),
    (partial(plan, back="columns"), {ACCEPTS: "'columns' is not known"}),
    (partial(plan, words="column"), {ACCEPTS: "'column' is for linear layers"}),
    (partial(plan, without=["words"]), {CUT: "no entry for words", TRAFFIC: "cut only what is large"}),
    (partial(plan, without=["guess"]), {CUT: "no entry for guess", TRAFFIC: "cut only what is large"}),
    (partial(plan, without=["joined", "merge"]), {CUT: "no entry for tower.0.mixing.joined", TRAFFIC: "a pair"}),
    (partial(plan, without=["gate", "content", "back"]), {CUT: "tower.0.gating.gate", TRAFFIC: "a pair"}),
    (partial(plan, without=["gate"]), {RUNS: "only a row layer takes it"}),
    (plan_of_one_layer, {CUT: "no entry for tower.1.mixing.joined", TRAFFIC: "a pair"}),
    (plan_of_places, {TRAFFIC: "cut only what is large"}),
    (plan_of_partial_norms, {GRADIENTS: "this is 2 times it"}),
    (plan_that_names_nothing, {ACCEPTS: "names no module"}),
    (plan_with_two_entries, {ACCEPTS: "two entries for tower.0.mixing.merge"}),
    (plan_of_nothing, {ACCEPTS: "give a dict of patterns"}),
    (plan_as_a_list, {PLAN: "an object of type list"}),
    (plan_by_mistake, {PLAN: "read the traceback"}),
    (none, {PLAN: "an object of type NoneType"}),
    (never_ends, {PLAN: "a loop that doesn't end"}),
    (leaves, {PLAN: "enough"}),
]


@wrong_ones(WRONG_PLANS)
def test_wrong_plans_fail_for_their_own_reason(solution: Any, reasons: dict[str, str]) -> None:
    check_fails(check_plan_for, solution, reasons)


def test_the_model_is_the_same_at_every_call() -> None:
    a, b = make_unseen_model(), make_unseen_model()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not {p.data_ptr() for p in a.parameters()} & {p.data_ptr() for p in b.parameters()}


def test_what_a_solution_does_to_the_model_changes_nothing() -> None:
    def freezing(model: nn.Module) -> dict[str, str]:
        for p in model.parameters():
            p.requires_grad_(False).zero_()
        return RIGHT_PLAN

    check_passes(check_plan_for, freezing)


# --- all of them ------------------------------------------------------------------------------------------------------

CHECKS = [check_column_linear, check_row_linear, check_vocab_cross_entropy, check_plan_for]


@pytest.mark.parametrize("check", CHECKS)
def test_a_stub_is_no_failure(check: Callable[[Any], Report]) -> None:
    check_stub(check)


@pytest.mark.parametrize("check", CHECKS)
def test_ranks_that_sleep_for_ever_are_stopped(check: Callable[[Any], Report], monkeypatch: pytest.MonkeyPatch) -> None:
    check_sleep(check, PLAN if check is check_plan_for else FINISHES, monkeypatch)


def test_what_a_report_says() -> None:
    assert """\
  FAILED  no rank gets the whole weight
            case:     2 ranks, x (12, 60) and weight (84, 60) in all
            expected: fewer than 10080 bytes from others, whose weight that would be
            seen:     12096 bytes in forward of rank 0: 1 all_gather, 1 all_reduce
""" in str(check_row_linear(row_of_the_whole_weight))
    assert """\
  FAILED  messages and bytes that each rank sends
            case:     2 ranks, x (12, 60) and weight (84, 60) in all
            expected: 2 messages, 2880 bytes in backward
            seen:     0 messages, 0 bytes in backward of rank 0: none
            hint:     every rank's outputs add to the gradient of x: all-reduce it in backward, as copy_to(x, comm)\
""" in str(check_column_linear(column_alone))
    assert """\
            expected: 5 all-reduces in forward, two a layer and one of the words: 10 messages, 7680 bytes
            seen:     13 messages, 15360 bytes on rank 0: 1 all_reduce_, 11 all_gather
""" in str(check_plan_for(plan_of_column_gather))
    assert "of x, weight, bias" in str(check_row_linear(row))
    assert "1, 2, 3, 4 ranks, forward and backward" in str(check_row_linear(row))
    assert "6192 of 22656 parameters on each of 4 ranks" in str(check_plan_for(plan))


def test_what_comes_after_a_failure_is_not_checked() -> None:
    def outcomes(report: Report) -> dict[str, str]:
        return {name: line.outcome for name, line in lines_of(report).items()}

    assert outcomes(check_column_linear(never_ends))[TRAFFIC] == "not checked"
    assert outcomes(check_column_linear(column_of_all_outputs))[GRADIENTS] == "not checked"
    assert outcomes(check_column_linear(column_on_rank_0_alone))[OUTPUTS] == "not checked"
    assert outcomes(check_row_linear(row_of_a_part))[TRAFFIC] == "not checked"
    assert outcomes(check_plan_for(partial(plan, merge="column")))[OUTPUTS] == "not checked"
    assert outcomes(check_plan_for(plan_of_nothing))[RUNS] == "not checked"
    assert outcomes(check_plan_for(partial(plan, joined="column")))[GRADIENTS] == "not checked"
    assert outcomes(check_plan_for(none))[ACCEPTS] == "not checked"


def test_prints_are_not_shown_and_no_thread_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    def talkative(*arguments: Any) -> Tensor:
        print("here")
        return row(*arguments)

    num_threads = threading.active_count()
    assert check_row_linear(talkative).passed
    assert "here" not in capsys.readouterr().out
    assert threading.active_count() == num_threads


def test_the_command_checks_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.py").write_text(
        "def column_linear(comm, x, weight, bias):\n    return x @ weight.mT + bias\n"
        "row_linear = column_linear\n"
        "def vocab_cross_entropy(comm, logits, targets):\n    return logits.logsumexp(1).mean()\n"
        "def plan_for(model):\n    return {'guess': 'column'}\n"
    )
    for exercise in ("column_linear", "row_linear", "vocab_cross_entropy", "plan_for"):
        assert command_line(["check", exercise, str(tmp_path / "wrong.py")]) == 1
        out = capsys.readouterr().out
        assert out.startswith(f"{exercise}: ")
        assert "FAILED" in out
