"""The check of a backward with buckets: what the ranks say to each other, and how far backward is when they do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mplab.homework import watched
from mplab.homework.buckets_cases import SETTINGS, Setting, trained
from mplab.homework.limited import OWN, borrowed, is_written
from mplab.homework.report import Complaint, Report, check_all
from mplab.homework.watched import FINISHES, ITEM_BYTES, Run, Watched, in_words, listed, sent
from mplab.plan.data import total_traffic
from mplab.plan.traffic import chunk_lengths, direct_traffic
from mplab.world.rank import Rank

HOOK = "p.register_post_accumulate_grad_hook(hook)"
Solution = Callable[[Rank, nn.Module, Tensor, int], None]


def check_bucketed_backward(solution: Solution) -> Report:
    """Check `solution(rank, model, loss, bucket_bytes)`: backward, and all ranks' gradients added up on the way.

    It is run on 2 to 4 ranks with two models of float32, one of which uses its layers in another order than it has
    them, and with buckets of three sizes. Buckets go from the last trained parameter to the first; one ends where the
    next parameter would make it larger than `bucket_bytes`, and a larger parameter is alone. One weight is frozen: it
    is in no bucket and gets no gradient. A bucket may be started as soon as it is full, or held back until those before
    it are.

    Args:
        solution: called on every rank with its `Rank`, its copy of the model, its share of the loss, whose backward it
            runs, and the size of a bucket; afterwards `p.grad` of every trained parameter is the sum over all ranks.

    Returns:
        A report; nothing that the solution does is raised.

    **Communication**: each rank must call one all-reduce a bucket, start it before backward comes to the next gradient,
    and wait for none before backward has come to the last.
    """
    tries: list[_Try] = []
    for setting in SETTINGS:
        tries.append(_Try(setting, watched.run(setting.num_ranks, _main(solution, setting))))
        if not is_written([tries[-1].run]):
            return Report("bucketed_backward", (), is_written=False)
        if watched.is_hopeless(tries[-1].run):
            break
    finished = [one for one in tries if one.run.error is None]
    started = [one for one in finished if all(rank.of("start") for rank in one.run.ranks)]
    lines = [
        check_all(FINISHES, tries, _error, "2, 3, 4 ranks, two models, buckets of three sizes"),
        check_all(OWN, tries, lambda one: borrowed(one.run)),
        check_all("gradients are the sum over all ranks", finished, _gradients),
        check_all("one all-reduce a bucket", finished, _buckets),
        check_all(
            "messages and bytes that each rank sends",
            finished,
            _traffic,
            "2(n-1) messages a bucket, 2(n-1)/n of the gradients' bytes",
        ),
        check_all("buckets are started while backward goes on", started, _overlap),
        check_all("nobody waits before backward has ended", started, _waits),
        check_all("no hook is left", finished, _hooks),
    ]
    return Report("bucketed_backward", tuple(lines))


class _Result(NamedTuple):
    """What a rank has after a solution.

    Args:
        gradients: of all parameters.
        num_left: parameters that have a hook of the solution's left.
    """

    gradients: list[Tensor | None]
    num_left: int


@dataclass(frozen=True)
class _Try:
    setting: Setting
    run: Run

    def __str__(self) -> str:
        return str(self.setting)

    @property
    def results(self) -> list[_Result]:
        results: list[_Result] = self.run.result
        return results


def _main(solution: Solution, setting: Setting) -> Callable[[Rank, Watched], _Result]:
    """What a rank of one run does."""
    models = [copy.deepcopy(setting.model) for _ in range(setting.num_ranks)]

    def main(rank: Rank, seen: Watched) -> _Result:
        model = models[rank.index]
        hooks = []
        for index, p in enumerate(trained(model)):  # before the solution's own, and so called before them
            hooks.append(p.register_post_accumulate_grad_hook(seen.hook(index)))
            hooks.append(p.register_hook(lambda _: None))
        solution(rank, model, setting.loss(model, rank.index), setting.bucket_bytes)
        num_left = sum(len(hook.hooks_dict_ref() or ()) > 1 for hook in hooks)
        return _Result([p.grad for p in model.parameters()], num_left)

    return main


# --- what can be wrong ------------------------------------------------------------------------------------------------


def _error(one: _Try) -> Complaint | None:
    if isinstance(one.run.error, RuntimeError) and "doesn't require gradient" in str(one.run.error):
        return watched.error(one.run, "the model has a frozen parameter: leave out those without p.requires_grad")
    return watched.error(one.run, "run it on a World of this size, with a weight frozen, and read the traceback")


def _gradients(one: _Try) -> Complaint | None:
    shares = one.setting.shares
    for rank, result in enumerate(one.results):
        of_trained = iter(range(len(one.setting.lengths)))
        for place, (p, got) in enumerate(zip(one.setting.model.parameters(), result.gradients, strict=True)):
            where = f"in p.grad of parameter {place} on rank {rank}"
            if not p.requires_grad:
                if got is None:
                    continue
                return Complaint(f"None {where}", "a tensor", "this parameter is frozen: leave its gradient alone")
            index = next(of_trained)
            of_ranks = torch.stack([share[index] for share in shares])
            complaint = _wrong_gradient(got, of_ranks, rank, where)
            if complaint is not None:
                return complaint
    return None


def _wrong_gradient(got: Tensor | None, of_ranks: Tensor, rank: int, where: str) -> Complaint | None:
    want = of_ranks.sum(0)
    if got is None or got.shape != want.shape:
        seen = "None" if got is None else f"shape {tuple(got.shape)}"
        hint = "run loss.backward(), and leave p.grad in place: the sum is copied into it"
        return Complaint(f"shape {tuple(want.shape)} {where}", seen, hint)
    wrong = (~_is_close(got, want)).view(-1).nonzero()
    if not len(wrong):
        return None
    if _is_close(got, of_ranks[rank]).all():
        hint = (
            "this is the rank's own: wait for each handle, and where you joined copies, copy the sum back into p.grad"
        )
    elif _is_close(got, of_ranks.mean(0)).all():
        hint = "this is the mean: the loss is the rank's share already, so add up and don't divide"
    else:
        hint = "is each gradient in one bucket, complete when that is started, and its own part of the sum copied back?"
    first = int(wrong[0])
    return Complaint(f"{want.view(-1)[first]:g} {where}, element {first}", f"{got.reshape(-1)[first]:g}", hint)


def _is_close(got: Tensor, want: Tensor) -> Tensor:
    return torch.isclose(got.to(want.dtype), want, rtol=1e-4, atol=1e-6)


def _buckets(one: _Try) -> Complaint | None:
    want = one.setting.bucket_lengths
    for rank in one.run.ranks:
        started = rank.of("start")
        others = sorted({step.name for step in started if step.name != "all_reduce"})
        got = [step.number for step in started]
        if not others and sorted(got) == sorted(want):
            continue
        if others:
            hint = "one iall_reduce_coalesced_ a bucket is all that has to be said"
        elif len(got) > len(want):
            hint = "give all gradients of a bucket to one iall_reduce_coalesced_, or join them with torch.cat"
        elif len(got) < len(want):
            hint = "begin a new bucket where the next parameter would make this one larger than bucket_bytes"
        else:
            hint = "make the buckets before backward: go from the last trained parameter to the first, and begin a new "
            hint += "one where it would become larger than bucket_bytes"
        seen = (
            f"{_all_reduces(got)} on rank {rank.index}" if not others else f"{', '.join(others)} on rank {rank.index}"
        )
        return Complaint(_all_reduces(want), seen, hint)
    return None


def _all_reduces(lengths: Sequence[int]) -> str:
    if not lengths:
        return "no all-reduce"
    return f"{len(lengths)} all-reduce{'s' * (len(lengths) > 1)} of {listed(lengths)} elements"


def _traffic(one: _Try) -> Complaint | None:
    n = one.setting.num_ranks
    for rank in one.run.ranks:
        blocks = [[k * ITEM_BYTES for k in chunk_lengths(length, n)] for length in one.setting.bucket_lengths]
        want = total_traffic(direct_traffic("all_reduce", rank.index, block) for block in blocks)
        got = sent(rank.messages)
        if got == (want.num_sent, want.sent_bytes):
            continue
        num_started, num_waited = len(rank.of("start")), len({step.number for step in rank.of("wait")})
        if num_waited < num_started:
            hint = f"of {num_started} collectives only {num_waited} were waited for, and the others may not be over"
        elif got[1] > want.sent_bytes:
            hint = "each gradient goes on its way once, as float32, in the all-reduce of its bucket"
        else:
            hint = "2(n-1) messages a bucket, and 2(n-1)/n of its bytes: count the buckets and their elements"
        return Complaint(in_words(want.num_sent, want.sent_bytes), f"{in_words(*got)} on rank {rank.index}", hint)
    return None


def _overlap(one: _Try) -> Complaint | None:
    total = len(one.setting.lengths)
    for rank in one.run.ranks:
        came = [step.number for step in rank.of("gradient")]
        if set(came) != set(range(total)):
            seen = f"{len(set(came))} of {total} on rank {rank.index}"
            return Complaint("a gradient of each trained parameter, by backward", seen, "run loss.backward()")
        num_due = 0
        starts = [place for place, step in enumerate(rank.steps) if step.kind == "start"]
        for number, (place, bucket) in enumerate(zip(starts, one.setting.buckets, strict=False)):
            # A bucket is held back at most until all of those before it are full.
            num_due = max(num_due, *(came.index(index) + 1 for index in bucket))
            num_there = sum(step.kind == "gradient" for step in rank.steps[:place])
            if num_there <= num_due:
                continue
            hint = f"start it in a hook: {HOOK} calls it as soon as p.grad is there"
            if num_there < total:
                hint = "start it in the hook of the gradient that makes it full, and not in a later one"
            return Complaint(
                f"all-reduce {number} is started when {num_due} of {total} gradients are there",
                f"when {num_there} are, on rank {rank.index}",
                hint,
            )
    return None


def _waits(one: _Try) -> Complaint | None:
    for rank in one.run.ranks:
        num_there, total = 0, len(rank.of("gradient"))
        for step in rank.steps:
            num_there += step.kind == "gradient"
            if step.kind == "wait" and num_there < total:
                seen = f"a wait for all-reduce {step.number} on rank {rank.index}, with {num_there} of them there"
                hint = "what waits in a hook stops backward: keep the handles in a list, and wait after loss.backward()"
                return Complaint(f"no wait before all {total} gradients are there", seen, hint)
    return None


def _hooks(one: _Try) -> Complaint | None:
    for rank, result in enumerate(one.results):
        if result.num_left:
            seen = f"hooks on {result.num_left} parameters of rank {rank}"
            hint = f"a hook would be there in the next backward, beside the new one: handle = {HOOK}, and at the end "
            return Complaint("no hook on any parameter", seen, hint + "handle.remove()")
    return None
