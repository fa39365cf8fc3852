"""The checks of lab 02: right solutions pass, and every wrong one fails for the reason that is its own."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn

from mplab.__main__ import main as command_line
from mplab.comm import Handle
from mplab.datasets import ShardSampler
from mplab.homework import Report, check_bucketed_backward, check_shard_sampler, check_zero1_step
from mplab.parallel import DataParallel, naive_data_parallel
from mplab.parallel.buckets import Reducer, make_buckets
from mplab.parallel.sharded import ShardedDataParallel
from mplab.world.rank import Rank

FINISHES = "every rank finishes"
OWN = "mplab's own is not called"
TRAFFIC = "messages and bytes that each rank sends"


def name(solution: Any) -> str:
    """A function's, and those of what it was given."""
    if isinstance(solution, partial):
        return "-".join([name(solution.func), *(name(value) for value in solution.keywords.values())])
    return str(getattr(solution, "__name__", solution))


def check_passes(check: Callable[[Any], Report], solution: Any, num_lines: int) -> None:
    report = check(solution)
    assert report.passed, str(report)
    assert f": {num_lines} of {num_lines} checks passed" in str(report)


def check_fails(check: Callable[[Any], Report], solution: Any, reasons: Sequence[str]) -> Report:
    report = check(solution)
    assert list(report.failed) == list(reasons), str(report)
    assert not report.passed
    for line in report.lines:
        if line.outcome == "failed":
            assert all([line.case, line.expected, line.seen, line.hint]), line
    return report


def the_failed(report: Report) -> Any:
    (line,) = [line for line in report.lines if line.outcome == "failed"]
    return line


# --- a backward with buckets ------------------------------------------------------------------------------------------

GRADIENTS = "gradients are the sum over all ranks"
BUCKETS = "one all-reduce a bucket"
OVERLAP = "buckets are started while backward goes on"
WAITS = "nobody waits before backward has ended"
HOOKS = "no hook is left"

Finish = Callable[[], object]
Reduce = Callable[[Rank, list[nn.Parameter]], Finish]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def from_the_last(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    for p in parameters[::-1]:
        if not buckets or sum(q.nbytes for q in buckets[-1]) + p.nbytes > bucket_bytes:
            buckets.append([])
        buckets[-1].append(p)
    return buckets


def from_the_first(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    return from_the_last(parameters[::-1], bucket_bytes)


def one_each(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    return [[p] for p in parameters]


def one_for_all(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    return [list(parameters)]


def gradients(bucket: Sequence[nn.Parameter]) -> list[Tensor]:
    assert all(p.grad is not None for p in bucket)
    return [p.grad for p in bucket if p.grad is not None]


def row(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def coalesced(rank: Rank, bucket: list[nn.Parameter], op: str = "sum") -> Finish:
    return rank.comm.iall_reduce_coalesced_(gradients(bucket), op).wait


def joined(rank: Rank, bucket: list[nn.Parameter]) -> Finish:
    total = row(gradients(bucket))
    handle = rank.comm.iall_reduce_(total)

    def finish() -> None:
        handle.wait()
        for p, part in zip(bucket, total.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view(p.shape)

    return finish


def joined_in_a_new_tensor(rank: Rank, bucket: list[nn.Parameter], dtype: torch.dtype | None = None) -> Finish:
    handle = rank.comm.iall_reduce(row(gradients(bucket)).to(dtype))

    def finish() -> None:
        for p, part in zip(bucket, handle.wait().split([p.numel() for p in bucket]), strict=True):
            gradients([p])[0].copy_(part.view(p.shape))

    return finish


class Filling:
    """The hook of one bucket's parameters."""

    def __init__(self, bucket: list[nn.Parameter], start: Callable[[list[nn.Parameter]], object]) -> None:
        self.bucket, self.missing, self.start = bucket, set(bucket), start

    def __call__(self, p: Any) -> None:
        self.missing.remove(p)
        if not self.missing:
            self.start(self.bucket)


def as_they_fill(
    rank: Rank,
    model: nn.Module,
    loss: Tensor,
    bucket_bytes: int,
    reduce: Reduce = coalesced,
    make: Callable[..., list[list[nn.Parameter]]] = from_the_last,
    removes: bool = True,
) -> None:
    finishes: list[Finish] = []
    hooks = []
    for bucket in make(trained(model), bucket_bytes):
        hook = Filling(bucket, lambda bucket: finishes.append(reduce(rank, bucket)))
        hooks += [p.register_post_accumulate_grad_hook(hook) for p in bucket]
    loss.backward()
    for finish in finishes:
        finish()
    for handle in hooks if removes else []:
        handle.remove()


def in_order(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    """A full bucket waits for those before it."""
    buckets = from_the_last(trained(model), bucket_bytes)
    handles: list[Handle[None]] = []
    there: set[nn.Parameter] = set()

    def hook(p: Any) -> None:
        there.add(p)
        while len(handles) < len(buckets) and there.issuperset(buckets[len(handles)]):
            handles.append(rank.comm.iall_reduce_coalesced_(gradients(buckets[len(handles)])))

    hooks = [p.register_post_accumulate_grad_hook(hook) for p in trained(model)]
    loss.backward()
    for handle in handles:
        handle.wait()
    for h in hooks:
        h.remove()


def hooks_that_get_the_gradient(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    """`register_hook` comes before p.grad is there, with the gradient."""
    finishes: list[Finish] = []
    hooks = []
    for bucket in from_the_last(trained(model), bucket_bytes):
        found: dict[nn.Parameter, Tensor] = {}

        def hook(g: Tensor, p: nn.Parameter, bucket: list[nn.Parameter], found: dict[nn.Parameter, Tensor]) -> None:
            found[p] = g
            if len(found) == len(bucket):
                handle = rank.comm.iall_reduce_(row([found[q] for q in bucket]))
                finishes.append(lambda: put(handle.wait(), bucket))

        hooks += [p.register_hook(partial(hook, p=p, bucket=bucket, found=found)) for p in bucket]
    loss.backward()
    for finish in finishes:
        finish()
    for h in hooks:
        h.remove()


def put(total: Tensor, bucket: list[nn.Parameter]) -> None:
    for p, part in zip(bucket, total.split([p.numel() for p in bucket]), strict=True):
        p.grad = part.view(p.shape)


RIGHT_BACKWARDS = [
    as_they_fill,
    partial(as_they_fill, reduce=joined),
    partial(as_they_fill, reduce=joined_in_a_new_tensor),
    in_order,
    hooks_that_get_the_gradient,
]


@pytest.mark.parametrize("solution", RIGHT_BACKWARDS, ids=name)
def test_right_backwards_pass(solution: Any) -> None:
    check_passes(check_bucketed_backward, solution, 8)


def after_backward(
    rank: Rank,
    model: nn.Module,
    loss: Tensor,
    bucket_bytes: int,
    reduce: Reduce = coalesced,
    make: Callable[..., list[list[nn.Parameter]]] = from_the_last,
) -> None:
    loss.backward()
    for finish in [reduce(rank, bucket) for bucket in make(trained(model), bucket_bytes)]:
        finish()


def never_written_back(rank: Rank, bucket: list[nn.Parameter]) -> Finish:
    return rank.comm.iall_reduce_(row(gradients(bucket))).wait


def waits_in_the_hook(rank: Rank, bucket: list[nn.Parameter]) -> Finish:
    rank.comm.all_reduce_coalesced_(gradients(bucket))
    return lambda: None


def two_halves(rank: Rank, bucket: list[nn.Parameter]) -> Finish:
    """An all-reduce by itself, as many bytes."""
    comm = rank.comm
    handle = comm.ireduce_scatter(row(gradients(bucket)))
    return lambda: put(comm.all_gather(handle.wait()), bucket)


def without_waiting(rank: Rank, bucket: list[nn.Parameter]) -> Finish:
    rank.comm.iall_reduce_coalesced_(gradients(bucket))
    return lambda: None


def with_a_barrier(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    rank.comm.barrier()
    as_they_fill(rank, model, loss, bucket_bytes)


def divided(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    as_they_fill(rank, model, loss, bucket_bytes)
    for g in gradients(trained(model)):
        g /= rank.size


def all_by_the_last_hook(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    handles: list[Handle[None]] = []
    buckets = from_the_last(trained(model), bucket_bytes)

    def start(_: object) -> None:
        handles.extend(rank.comm.iall_reduce_coalesced_(gradients(bucket)) for bucket in buckets)

    hook = Filling(trained(model), start)
    hooks = [p.register_post_accumulate_grad_hook(hook) for p in trained(model)]
    loss.backward()
    for handle in handles:
        handle.wait()
    for h in hooks:
        h.remove()


def a_bucket_late(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    """A full bucket is started by the next one."""
    full: list[list[nn.Parameter]] = []
    finishes: list[Finish] = []

    def start(bucket: list[nn.Parameter]) -> None:
        full.append(bucket)
        if len(full) > 1:
            finishes.append(coalesced(rank, full.pop(0)))

    hooks = []
    for bucket in from_the_last(trained(model), bucket_bytes):
        hook = Filling(bucket, start)
        hooks += [p.register_post_accumulate_grad_hook(hook) for p in bucket]
    loss.backward()
    finishes.append(coalesced(rank, full.pop()))
    for finish in finishes:
        finish()
    for h in hooks:
        h.remove()


def waits_for_the_one_before(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    handles: list[Finish] = []

    def reduce(rank: Rank, bucket: list[nn.Parameter]) -> Finish:
        if handles:
            handles[-1]()
        handles.append(coalesced(rank, bucket))
        return handles[-1]

    as_they_fill(rank, model, loss, bucket_bytes, reduce)


def in_the_order_of_coming(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    """Makes the buckets on the way, as gradients come."""
    bucket: list[nn.Parameter] = []
    finishes: list[Finish] = []

    def hook(p: Any) -> None:
        if bucket and sum(q.nbytes for q in bucket) + p.nbytes > bucket_bytes:
            finishes.append(coalesced(rank, bucket))
            bucket.clear()
        bucket.append(p)

    hooks = [p.register_post_accumulate_grad_hook(hook) for p in trained(model)]
    loss.backward()
    finishes.append(coalesced(rank, bucket))
    for finish in finishes:
        finish()
    for h in hooks:
        h.remove()


def by_the_first_parameter(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    """Takes it that a bucket's first parameter in the model gets its gradient last."""
    finishes: list[Finish] = []
    hooks = [
        bucket[-1].register_post_accumulate_grad_hook(lambda _, bucket=bucket: finishes.append(coalesced(rank, bucket)))
        for bucket in from_the_last(trained(model), bucket_bytes)
    ]
    loss.backward()
    for finish in finishes:
        finish()
    for h in hooks:
        h.remove()


def another_order_on_each_rank(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    loss.backward()
    for bucket in from_the_last(trained(model), bucket_bytes)[:: -1 if rank.index else 1]:
        coalesced(rank, bucket)()


def without_backward(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    for p, g in zip(trained(model), torch.autograd.grad(loss, trained(model)), strict=True):
        p.grad = g
    for bucket in from_the_last(trained(model), bucket_bytes):
        coalesced(rank, bucket)()


def frozen_too(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    loss.backward()
    for bucket in from_the_last(list(model.parameters()), bucket_bytes):
        coalesced(rank, bucket)()


def hooks_on_all(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: rank.comm.all_reduce_(p.grad))
    loss.backward()


def on_rank_0_alone(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    if rank.index == 0:
        as_they_fill(rank, model, loss, bucket_bytes)
    else:
        loss.backward()


def no_message(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    loss.backward()


def never_ends(rank: Rank, *_: Any) -> None:
    while True:
        pass


def leaves(*_: Any) -> None:
    raise SystemExit("enough")


def library_wrapper(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    DataParallel(model, rank.comm, bucket_bytes)
    as_they_fill(rank, model, loss, bucket_bytes)


def library_reducer(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    Reducer({p: str(index) for index, p in enumerate(trained(model))}, bucket_bytes, overlap=False)
    as_they_fill(rank, model, loss, bucket_bytes)


def library_naive(rank: Rank, model: nn.Module, loss: Tensor, bucket_bytes: int) -> None:
    batch = torch.zeros(rank.size, 3), torch.zeros(rank.size, dtype=torch.long)
    naive_data_parallel(model, torch.optim.SGD(trained(model), lr=0.0), batch, rank.comm)


WRONG_BACKWARDS: list[tuple[Any, list[str]]] = [
    (after_backward, [OVERLAP]),
    (partial(after_backward, make=one_each), [BUCKETS, TRAFFIC, OVERLAP]),
    (partial(after_backward, make=one_for_all), [BUCKETS, TRAFFIC, OVERLAP]),
    (all_by_the_last_hook, [OVERLAP]),
    (a_bucket_late, [OVERLAP]),
    (without_backward, [OVERLAP]),
    (partial(as_they_fill, make=one_each), [BUCKETS, TRAFFIC]),
    (partial(as_they_fill, make=one_for_all), [BUCKETS, TRAFFIC, OVERLAP]),
    (partial(as_they_fill, make=from_the_first), [BUCKETS, TRAFFIC]),
    (in_the_order_of_coming, [BUCKETS, OVERLAP]),
    (partial(as_they_fill, reduce=never_written_back), [GRADIENTS]),
    (partial(as_they_fill, reduce=partial(coalesced, op="mean")), [GRADIENTS]),
    (divided, [GRADIENTS]),
    (partial(as_they_fill, reduce=waits_in_the_hook), [WAITS]),
    (waits_for_the_one_before, [WAITS]),
    (partial(as_they_fill, reduce=two_halves), [BUCKETS]),
    (partial(as_they_fill, reduce=partial(joined_in_a_new_tensor, dtype=torch.float64)), [TRAFFIC]),
    (with_a_barrier, [BUCKETS, TRAFFIC, WAITS]),
    (partial(as_they_fill, removes=False), [HOOKS]),
    (frozen_too, [GRADIENTS, BUCKETS, TRAFFIC, OVERLAP]),
    (no_message, [GRADIENTS, BUCKETS, TRAFFIC]),
    (by_the_first_parameter, [FINISHES]),
    (hooks_on_all, [FINISHES]),
    (another_order_on_each_rank, [FINISHES]),
    (on_rank_0_alone, [FINISHES]),
    (never_ends, [FINISHES]),
    (leaves, [FINISHES]),
    (library_wrapper, [OWN, BUCKETS, TRAFFIC, WAITS]),
    (library_reducer, [OWN]),
    (library_naive, [OWN, GRADIENTS, BUCKETS, TRAFFIC, OVERLAP]),
    (partial(as_they_fill, make=lambda ps, size: [b.parameters for b in make_buckets(ps, size)]), [OWN]),
]


@pytest.mark.parametrize(("solution", "reasons"), WRONG_BACKWARDS, ids=[name(s) for s, _ in WRONG_BACKWARDS])
def test_wrong_backwards_fail_for_their_own_reason(solution: Any, reasons: list[str]) -> None:
    check_fails(check_bucketed_backward, solution, reasons)


# --- a ZeRO-1 step ----------------------------------------------------------------------------------------------------

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
    check_passes(check_zero1_step, solution, 6)


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


def sleeps(*_: Any) -> None:
    while True:
        time.sleep(0.01)


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
    check_fails(check_zero1_step, solution, reasons)


# --- a sampler --------------------------------------------------------------------------------------------------------

ENDS = "every call ends"
LISTS = "lists of indices"
NUMBER = "as many batches on every rank"
WITHOUT = "no rank without a sample"
ONCE = "every sample exactly once"
SIZES = "samples of each batch"
OTHERS = "other batches in each epoch"
RANDOM = "the global random state is left alone"

Parts = Callable[[list[int], int], list[list[int]]]


def numpy_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(num_samples).tolist()
    return order


def torch_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    """As `torch.utils.data.DistributedSampler` seeds it."""
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def python_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(num_samples), num_samples)


def every_nth(batch: list[int], num_ranks: int) -> list[list[int]]:
    return [batch[rank::num_ranks] for rank in range(num_ranks)]


def in_a_row(batch: list[int], num_ranks: int) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(batch, num_ranks)]


def batches_of(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < num_ranks:
        rest = batches.pop()
        batches[-1] = batches[-1] + rest
    return batches


def sampled(
    num_samples: int,
    batch_size: int,
    rank: int,
    num_ranks: int,
    epoch: int,
    seed: int,
    order: Callable[[int, int, int], list[int]] = numpy_order,
    cut: Callable[[list[int], int, int], list[list[int]]] = batches_of,
    parts: Parts = every_nth,
) -> Iterator[list[int]]:
    for batch in cut(order(num_samples, epoch, seed), batch_size, num_ranks):
        yield parts(batch, num_ranks)[rank]


def as_a_list(*arguments: int) -> list[list[int]]:
    return list(sampled(*arguments, parts=in_a_row))


def of_tensors(*arguments: int) -> list[Tensor]:
    return [torch.tensor(part) for part in sampled(*arguments)]


RIGHT_SAMPLERS = [
    sampled,
    partial(sampled, order=torch_order),
    partial(sampled, order=python_order),
    as_a_list,
    of_tensors,
]


@pytest.mark.parametrize("solution", RIGHT_SAMPLERS, ids=name)
def test_right_samplers_pass(solution: Any) -> None:
    check_passes(check_shard_sampler, solution, 9)


def unshuffled(num_samples: int, epoch: int, seed: int) -> list[int]:
    return list(range(num_samples))


def same_every_epoch(num_samples: int, epoch: int, seed: int) -> list[int]:
    return numpy_order(num_samples, 0, seed)


def same_for_every_seed(num_samples: int, epoch: int, seed: int) -> list[int]:
    return numpy_order(num_samples, epoch, 0)


def rolled(num_samples: int, epoch: int, seed: int) -> list[int]:
    order = list(range(num_samples))
    return order[epoch + seed :] + order[: epoch + seed]


def global_torch_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    torch.manual_seed(seed + epoch)
    return torch.randperm(num_samples).tolist()


def global_numpy_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    np.random.seed(seed + epoch)  # noqa: NPY002
    order: list[int] = np.random.permutation(num_samples).tolist()  # noqa: NPY002
    return order


def global_python_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    random.seed(seed + epoch)
    return random.sample(range(num_samples), num_samples)


def whatever_comes(num_samples: int, epoch: int, seed: int) -> list[int]:
    return torch.randperm(num_samples).tolist()


def with_replacement(num_samples: int, epoch: int, seed: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, epoch)).integers(num_samples, size=num_samples).tolist()
    return order


def another_order_per_rank(
    num_samples: int, batch_size: int, rank: int, num_ranks: int, epoch: int, seed: int
) -> Iterator[list[int]]:
    yield from sampled(num_samples, batch_size, rank, num_ranks, epoch, seed + rank)


def shuffled_batches(
    num_samples: int, batch_size: int, rank: int, num_ranks: int, epoch: int, seed: int
) -> list[list[int]]:
    """Only the order of the batches is new."""
    batches = list(sampled(num_samples, batch_size, rank, num_ranks, 0, 7))
    return [batches[i] for i in numpy_order(len(batches), epoch, seed)]


def rest_left_out(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    return [order[start : start + batch_size] for start in range(0, len(order) - batch_size + 1, batch_size)]


def rest_alone(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def rest_first(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    return batches_of(order, batch_size, num_ranks)[::-1]


def rest_spread(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    num_batches = len(batches_of(order, batch_size, num_ranks))
    return [part.tolist() for part in np.array_split(order, num_batches)]


def filled_up_with_the_first(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    """As `torch.utils.data.DistributedSampler` does."""
    return rest_alone(order + order[: -len(order) % batch_size], batch_size, num_ranks)


def a_batch_a_rank(order: list[int], batch_size: int, num_ranks: int) -> list[list[int]]:
    return rest_alone(order, batch_size * num_ranks, num_ranks)


def equal_parts(batch: list[int], num_ranks: int) -> list[list[int]]:
    size = len(batch) // num_ranks
    return [batch[rank * size : (rank + 1) * size] for rank in range(num_ranks)]


def rounded_up(batch: list[int], num_ranks: int) -> list[list[int]]:
    size = -(-len(batch) // num_ranks)
    return [batch[rank * size : (rank + 1) * size] for rank in range(num_ranks)]


def all_to_rank_0(batch: list[int], num_ranks: int) -> list[list[int]]:
    return [batch[: len(batch) - num_ranks + 1], *([i] for i in batch[len(batch) - num_ranks + 1 :])]


def the_whole(batch: list[int], num_ranks: int) -> list[list[int]]:
    return [batch] * num_ranks


def empty_ones_left_out(*arguments: int) -> list[list[int]]:
    return [part for part in sampled(*arguments, cut=rest_alone) if part]


def one_list(*arguments: int) -> list[int]:
    return [i for part in sampled(*arguments) for i in part]


def floats(*arguments: int) -> Iterator[list[float]]:
    return ([float(i) for i in part] for part in sampled(*arguments))


def from_1(*arguments: int) -> Iterator[list[int]]:
    return ([i + 1 for i in part] for part in sampled(*arguments))


def epoch_after_epoch(*arguments: int) -> Iterator[list[int]]:
    while True:
        yield from sampled(*arguments)


def spins(*arguments: int) -> Iterator[list[int]]:
    yield from sampled(*arguments)
    while True:
        pass


def nothing(*arguments: int) -> None:
    return None


class Place(NamedTuple):
    """What a sampler looks at in a communicator."""

    rank: int
    size: int


def library_sampler(
    num_samples: int, batch_size: int, rank: int, num_ranks: int, epoch: int, seed: int
) -> Iterator[list[int]]:
    sampler = ShardSampler(num_samples, batch_size, Place(rank, num_ranks), seed)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    yield from sampler


WRONG_SAMPLERS: list[tuple[Any, list[str]]] = [
    (partial(sampled, order=unshuffled), [OTHERS]),
    (partial(sampled, order=same_every_epoch), [OTHERS]),
    (partial(sampled, order=same_for_every_seed), [OTHERS]),
    (partial(sampled, order=rolled), [OTHERS]),
    (shuffled_batches, [SIZES, OTHERS]),
    (partial(sampled, order=global_torch_order), [RANDOM]),
    (partial(sampled, order=global_numpy_order), [RANDOM]),
    (partial(sampled, order=global_python_order), [RANDOM]),
    (partial(sampled, order=whatever_comes), [ONCE, RANDOM]),
    (partial(sampled, order=with_replacement), [ONCE]),
    (another_order_per_rank, [ONCE]),
    (partial(sampled, parts=the_whole), [ONCE]),
    (partial(sampled, parts=equal_parts), [ONCE]),
    (partial(sampled, cut=rest_left_out), [NUMBER, ONCE]),
    (partial(sampled, cut=filled_up_with_the_first), [NUMBER, ONCE]),
    (partial(sampled, cut=rest_alone), [NUMBER, WITHOUT]),
    (empty_ones_left_out, [NUMBER]),
    (partial(sampled, cut=a_batch_a_rank), [NUMBER, WITHOUT]),
    (epoch_after_epoch, [NUMBER, ONCE]),
    (partial(sampled, cut=rest_first), [SIZES]),
    (partial(sampled, cut=rest_spread), [SIZES]),
    (partial(sampled, parts=rounded_up), [WITHOUT, SIZES]),
    (partial(sampled, parts=all_to_rank_0), [SIZES]),
    (one_list, [LISTS]),
    (floats, [LISTS]),
    (from_1, [LISTS]),
    (nothing, [ENDS]),
    (spins, [ENDS]),
    (leaves, [ENDS]),
    (library_sampler, [OWN]),
]


@pytest.mark.parametrize(("solution", "reasons"), WRONG_SAMPLERS, ids=[name(s) for s, _ in WRONG_SAMPLERS])
def test_wrong_samplers_fail_for_their_own_reason(solution: Any, reasons: list[str]) -> None:
    check_fails(check_shard_sampler, solution, reasons)


# --- what the reports say ---------------------------------------------------------------------------------------------

CHECKS = [check_bucketed_backward, check_zero1_step, check_shard_sampler]


def stub(*_: Any) -> Any:
    raise NotImplementedError


def generating_stub(*_: Any) -> Iterator[Any]:
    raise NotImplementedError
    yield


@pytest.mark.parametrize("check", CHECKS)
def test_a_stub_is_no_failure(check: Callable[[Any], Report]) -> None:
    report = check(stub)
    assert not report.passed
    assert report.failed == ()
    assert "not written yet" in str(report)
    assert "\n" not in str(report)


def test_a_generating_stub_is_no_failure() -> None:
    assert not check_shard_sampler(generating_stub).is_written


def test_a_reduction_after_backward_is_told_how_late_it_is() -> None:
    assert """\
  FAILED  buckets are started while backward goes on
            case:     2 ranks, parameters of 15, 5, 2, 14, 7, 28, 4 elements, bucket_bytes=64
            expected: all-reduce 0 is started when 1 of 7 gradients are there
            seen:     when 7 are, on rank 0
            hint:     start it in a hook: p.register_post_accumulate_grad_hook(hook) calls it as soon as p.grad is there
""" in str(check_bucketed_backward(after_backward))


def hint_of(check: Callable[[Any], Report], solution: Any, line: str) -> str:
    (hint,) = [one.hint for one in check(solution).lines if one.name == line]
    return str(hint)


@pytest.mark.parametrize(
    ("solution", "line", "hint"),
    [
        (partial(after_backward, make=one_each), BUCKETS, "torch.cat"),
        (partial(after_backward, make=one_for_all), BUCKETS, "begin a new bucket"),
        (partial(as_they_fill, make=from_the_first), BUCKETS, "from the last trained parameter to the first"),
        (partial(as_they_fill, reduce=never_written_back), GRADIENTS, "copy the sum back"),
        (divided, GRADIENTS, "don't divide"),
        (frozen_too, GRADIENTS, "frozen"),
        (hooks_on_all, FINISHES, "frozen"),
        (a_bucket_late, OVERLAP, "not in a later one"),
        (partial(as_they_fill, reduce=waits_in_the_hook), WAITS, "after loss.backward()"),
        (partial(as_they_fill, removes=False), HOOKS, "handle.remove()"),
        (another_order_on_each_rank, FINISHES, "the same order"),
        (on_rank_0_alone, FINISHES, "every rank"),
        (never_ends, FINISHES, "loop"),
    ],
    ids=name,
)
def test_hints_for_a_backward(solution: Any, line: str, hint: str) -> None:
    assert hint in hint_of(check_bucketed_backward, solution, line)


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
    assert hint in hint_of(check_zero1_step, solution, line)


@pytest.mark.parametrize(
    ("solution", "line", "hint"),
    [
        (another_order_per_rank, ONCE, "never with the rank"),
        (partial(sampled, cut=filled_up_with_the_first), ONCE, "samples that came before"),
        (partial(sampled, parts=equal_parts), ONCE, "trained on too"),
        (partial(sampled, cut=rest_alone), NUMBER, "give these to the one before"),
        (empty_ones_left_out, NUMBER, "waiting in their all-reduce"),
        (partial(sampled, cut=a_batch_a_rank), NUMBER, "all ranks together"),
        (partial(sampled, order=global_torch_order), RANDOM, "generator of your own"),
        (partial(sampled, order=same_every_epoch), OTHERS, "seeded with both"),
    ],
    ids=name,
)
def test_hints_for_a_sampler(solution: Any, line: str, hint: str) -> None:
    assert hint in hint_of(check_shard_sampler, solution, line)


def test_a_handle_that_nobody_waits_for_is_seen() -> None:
    """Whether the sums are there all the same is chance."""
    report = check_bucketed_backward(partial(as_they_fill, reduce=without_waiting))
    (line,) = [line for line in report.lines if line.name == TRAFFIC]
    assert line.outcome == "failed"
    assert line.hint.startswith("of 6 collectives only 0 were waited for")


@pytest.mark.parametrize("check", [check_bucketed_backward, check_zero1_step])
def test_ranks_that_sleep_for_ever_are_stopped(check: Callable[[Any], Report], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mplab.homework.watched.TIMEOUT_S", 0.2)
    line = the_failed(check(sleeps))
    assert line.name == FINISHES
    assert "stopped after 0.2 s" in line.seen
    assert "loop" in line.hint


def test_a_rank_that_the_others_wait_for_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mplab.homework.watched.TIMEOUT_S", 0.3)

    def late(rank: Rank, *arguments: Any) -> None:
        if rank.index == 1:
            time.sleep(1.0)
        step_in_place(rank, *arguments)

    line = the_failed(check_zero1_step(late))
    assert (line.name, "late: rank 1" in line.seen) == (FINISHES, True), line


def test_what_comes_after_a_failure_is_not_checked() -> None:
    def outcomes(report: Report) -> dict[str, str]:
        return {line.name: line.outcome for line in report.lines}

    assert outcomes(check_bucketed_backward(never_ends))[OVERLAP] == "not checked"
    assert outcomes(check_bucketed_backward(no_message))[OVERLAP] == "not checked"
    assert outcomes(check_zero1_step(never_ends))[KEPT] == "not checked"
    assert outcomes(check_shard_sampler(floats))[ONCE] == "not checked"
    assert outcomes(check_shard_sampler(another_order_per_rank))[SIZES] == "not checked"


def test_prints_are_not_shown_and_no_thread_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    def talkative(*arguments: Any) -> None:
        print("here")
        as_they_fill(*arguments)

    num_threads = threading.active_count()
    assert check_bucketed_backward(talkative).passed
    assert "here" not in capsys.readouterr().out
    assert threading.active_count() == num_threads


def test_a_change_of_the_global_random_states_is_undone() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    for order in (global_torch_order, global_numpy_order, global_python_order):
        check_shard_sampler(partial(sampled, order=order))  # torch's is compared after each test
    after = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    assert after == before


def test_the_command_checks_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.py").write_text(
        "def bucketed_backward(rank, model, loss, bucket_bytes):\n    loss.backward()\n"
        "def zero1_step(rank, parameters, states, lr, momentum):\n    pass\n"
        "def shard_sampler(num_samples, batch_size, rank, num_ranks, epoch, seed):\n    return [[rank]]\n"
    )
    for exercise in ("bucketed_backward", "zero1_step", "shard_sampler"):
        assert command_line(["check", exercise, str(tmp_path / "wrong.py")]) == 1
        out = capsys.readouterr().out
        assert out.startswith(f"{exercise}: ")
        assert "FAILED" in out
