"""The check of a backward with buckets: right solutions pass, and every wrong one fails for its own reason."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
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
)
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn

from mplab.comm import Handle
from mplab.homework import check_bucketed_backward
from mplab.parallel import DataParallel, naive_data_parallel
from mplab.parallel.buckets import Reducer, make_buckets
from mplab.world.rank import Rank

FINISHES = "every rank finishes"
OWN = "mplab's own is not called"
TRAFFIC = "messages and bytes that each rank sends"
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
    assert str(check_passes(check_bucketed_backward, solution)).startswith("bucketed_backward: 8 of 8 checks passed")


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
    check_fails_at(check_bucketed_backward, solution, reasons)


# --- what the report says ---------------------------------------------------------------------------------------------


def test_a_stub_is_no_failure() -> None:
    check_stub(check_bucketed_backward)


def test_a_reduction_after_backward_is_told_how_late_it_is() -> None:
    assert """\
  FAILED  buckets are started while backward goes on
            case:     2 ranks, parameters of 15, 5, 2, 14, 7, 28, 4 elements, bucket_bytes=64
            expected: all-reduce 0 is started when 1 of 7 gradients are there
            seen:     when 7 are, on rank 0
            hint:     start it in a hook: p.register_post_accumulate_grad_hook(hook) calls it as soon as p.grad is there
""" in str(check_bucketed_backward(after_backward))


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
    assert hint in lines_of(check_bucketed_backward(solution))[line].hint


def test_a_handle_that_nobody_waits_for_is_seen() -> None:
    """Whether the sums are there all the same is chance."""
    report = check_bucketed_backward(partial(as_they_fill, reduce=without_waiting))
    (line,) = [line for line in report.lines if line.name == TRAFFIC]
    assert line.outcome == "failed"
    assert line.hint.startswith("of 6 collectives only 0 were waited for")


def test_ranks_that_sleep_for_ever_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sleep(check_bucketed_backward, FINISHES, monkeypatch)


def test_what_comes_after_a_failure_is_not_checked() -> None:
    assert lines_of(check_bucketed_backward(never_ends))[OVERLAP].outcome == "not checked"
    assert lines_of(check_bucketed_backward(no_message))[OVERLAP].outcome == "not checked"


def test_prints_are_not_shown_and_no_thread_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    def talkative(*arguments: Any) -> None:
        print("here")
        as_they_fill(*arguments)

    num_threads = threading.active_count()
    assert check_bucketed_backward(talkative).passed
    assert "here" not in capsys.readouterr().out
    assert threading.active_count() == num_threads


def test_the_command_checks_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "def bucketed_backward(rank, model, loss, bucket_bytes):\n    loss.backward()\n"
    check_command(code, tmp_path, capsys)
