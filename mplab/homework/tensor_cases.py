"""What the exercises on cut layers are run with: each rank's inputs, the right results, and those of known mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Divided by every number of ranks; a rank's part of the weight, or of the logits, is more than all that has to be said.
NUM_ROWS, NUM_INPUTS, NUM_OUTPUTS, NUM_CLASSES = 12, 60, 84, 240
UPSTREAM = 2.5  # the gradient that comes to the loss


class Talk(NamedTuple):
    """An all-reduce.

    Args:
        num_elements: of its tensor; 0: there is none.
        if_more: what to say where more is sent.
        if_less: where less is.
    """

    num_elements: int
    if_more: str
    if_less: str = ""


class Slip(NamedTuple):
    """A well-known mistake.

    Args:
        values: what each rank gets by it.
        hint: what to say.
    """

    values: Sequence[Tensor]
    hint: str


@dataclass(frozen=True)
class Case:
    """What each rank of one run is given, and what one process makes of it: lists have an entry for every rank.

    Args:
        size: in words.
        inputs: by the solution's names.
        outputs: the right ones.
        upstream: the gradient of each output, with which backward begins.
        gradients: the right ones, of inputs.
        slips: by "output" and by input, of which it is the gradient.
        talks: what has to be said in forward and in backward, where that is exact.
    """

    size: str
    inputs: list[dict[str, Tensor]]
    outputs: Sequence[Tensor]
    upstream: Sequence[Tensor]
    gradients: list[dict[str, Tensor]]
    slips: Mapping[str, Sequence[Slip]]
    talks: Mapping[str, Talk] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}, {self.size}"

    @property
    def num_ranks(self) -> int:
        """Size of the world (n)."""
        return len(self.inputs)


class _Linear:
    """A whole layer: x, weight, bias, the gradient of its outputs; and what comes of them.

    All are whole numbers, so that any order of summing gives the same float32.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = (NUM_ROWS, NUM_INPUTS), (NUM_OUTPUTS, NUM_INPUTS), (NUM_OUTPUTS,), (NUM_ROWS, NUM_OUTPUTS)
        numbers = [torch.randint(-4, 5, shape, generator=generator).float() for shape in shapes]
        self.x, self.weight, self.bias, self.upstream = numbers
        self.output = functional.linear(self.x, self.weight, self.bias)
        self.of_x, self.of_weight = self.upstream @ self.weight, self.upstream.mT @ self.x
        self.of_bias = self.upstream.sum(0)
        self.size = f"x {tuple(self.x.shape)} and weight {tuple(self.weight.shape)} in all"


def column_case(n: int) -> Case:
    """A layer cut by its outputs."""
    whole = _Linear(n)
    weights, biases, upstream = (
        whole.weight.tensor_split(n),
        whole.bias.tensor_split(n),
        whole.upstream.tensor_split(n, 1),
    )
    sums = "every rank's outputs add to the gradient of x: all-reduce it in backward, as copy_to(x, comm) does"
    again = "each rank has this part alone, and all of its gradient: add up nothing but the gradient of x"
    own = [g @ w for g, w in zip(upstream, weights, strict=True)]
    return Case(
        whole.size,
        [{"x": whole.x, "weight": w, "bias": b} for w, b in zip(weights, biases, strict=True)],
        whole.output.tensor_split(n, 1),
        upstream,
        [
            {"x": whole.of_x, "weight": w, "bias": b}
            for w, b in zip(whole.of_weight.tensor_split(n), whole.of_bias.tensor_split(n), strict=True)
        ],
        {
            "output": [
                Slip((whole.output - whole.bias).tensor_split(n, 1), "the bias is missing: add this rank's part")
            ],
            "x": [
                Slip(own, f"this is the share of this rank's outputs alone: {sums}"),
                Slip([n * whole.of_x] * n, "this is n times the gradient: it was added up twice"),
                Slip([whole.of_x / n] * n, "this is 1/n of the gradient: a mean over the ranks, of what adds up"),
            ],
            "weight": [Slip([whole.of_weight.unflatten(0, (n, -1)).sum(0)] * n, again)],
            "bias": [Slip([whole.of_bias.unflatten(0, (n, -1)).sum(0)] * n, again)],
        },
        {
            "forward": Talk(0, "every rank has all of x, and its outputs stay with it: forward needs nobody"),
            "backward": Talk(
                whole.x.numel(), "the gradient of x has to be all-reduced once; all else is this rank's own", sums
            ),
        },
    )


def row_case(n: int) -> Case:
    """A layer cut by its inputs."""
    whole = _Linear(n)
    xs, weights = whole.x.tensor_split(n, 1), whole.weight.tensor_split(n, 1)
    own = [x @ w.mT for x, w in zip(xs, weights, strict=True)]
    alone = "this is this rank's summand alone: the outputs are the sum over all ranks, as reduce_from(y, comm) gives"
    again = "this is n times the gradient: what comes to backward is whole on every rank already, so add up nothing"
    many = f"the bias was added {n} times, by every rank to its summand: add it once, to the sum"
    return Case(
        whole.size,
        [{"x": x, "weight": w, "bias": whole.bias} for x, w in zip(xs, weights, strict=True)],
        [whole.output] * n,
        [whole.upstream] * n,
        [
            {"x": x, "weight": w, "bias": whole.of_bias}
            for x, w in zip(whole.of_x.tensor_split(n, 1), whole.of_weight.tensor_split(n, 1), strict=True)
        ],
        {
            "output": [
                Slip([whole.output - whole.bias] * n, "the bias is missing: add it once, to the sum"),
                Slip([whole.output + (n - 1) * whole.bias] * n, many),
                Slip(
                    [(whole.output - whole.bias) / n + whole.bias] * n,
                    "the sum was divided by n: a mean over the ranks, of what adds up",
                ),
                Slip(own, alone),
                Slip([y + whole.bias for y in own], alone),
            ],
            "x": [Slip((n * whole.of_x).tensor_split(n, 1), again)],
            "weight": [Slip((n * whole.of_weight).tensor_split(n, 1), again)],
            "bias": [
                Slip([n * whole.of_bias] * n, again),
                Slip([whole.of_bias / n] * n, "this is 1/n of it: add the whole bias on every rank, after the sum"),
            ],
        },
        {
            "forward": Talk(
                whole.output.numel(),
                "one all-reduce of the outputs is enough: it adds on the way, where an all_gather brings every summand",
                "the outputs are the sum over all ranks: all-reduce them, as reduce_from(y, comm) does",
            ),
            "backward": Talk(0, "the gradient of a sum is that of each summand, whole on every rank: send nothing"),
        },
    )


def vocab_case(n: int, is_large: bool) -> Case:
    """Logits cut by their classes.

    Args:
        n: number of ranks.
        is_large: some logits are beyond 200, and all of some positions below -100.
    """
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn((NUM_ROWS, NUM_CLASSES), generator=generator).double()
    targets = torch.randint(NUM_CLASSES, (NUM_ROWS,), generator=generator)
    targets[:4] = torch.tensor([0, NUM_CLASSES - 1, NUM_CLASSES // 2 - 1, NUM_CLASSES // 2])
    for position, row in enumerate(logits if is_large else []):
        row.tensor_split(4)[position % 4].add_(300)  # the largest logit is on one rank or another
        row.sub_(500 if position % 3 else 0)
    shares = logits.tensor_split(n, 1)
    log_sum = logits.logsumexp(1)
    is_target = functional.one_hot(targets, NUM_CLASSES)
    loss = (log_sum - (logits * is_target).sum(1)).mean()
    scale = UPSTREAM / NUM_ROWS
    gradient = scale * (logits.softmax(1) - is_target)
    return Case(
        f"{NUM_ROWS} positions, {NUM_CLASSES} classes" + ", logits up to 300" * is_large,
        [{"logits": share.float(), "targets": targets} for share in shares],
        [loss.float()] * n,
        [torch.tensor(UPSTREAM)] * n,
        [{"logits": part.float()} for part in gradient.tensor_split(n, 1)],
        {
            "output": _slips_of_the_loss(shares, is_target.tensor_split(n, 1), loss, log_sum),
            "logits": _slips_of_the_gradient(shares, is_target, gradient, logits.softmax(1), scale),
        },
    )


def _slips_of_the_loss(
    shares: Sequence[Tensor], is_target: Sequence[Tensor], loss: Tensor, log_sum: Tensor
) -> list[Slip]:
    n = len(shares)
    own_targets = [(x * here).sum(1) for x, here in zip(shares, is_target, strict=True)]
    of_target = torch.stack(own_targets).sum(0)
    own_sums = [x.logsumexp(1) for x in shares]
    own_tops = [x.amax(1) for x in shares]
    top = torch.stack(own_tops).amax(0)
    misses = [top * (1 - here.sum(1)) for here in is_target]  # what a 0 is in place of a logit less the largest
    of_own_tops = torch.stack([s - t for s, t in zip(own_sums, own_tops, strict=True)]).logsumexp(0)
    no_sum = "this is the log-sum of this rank's own classes: the sum of the exponentials is over all ranks"
    no_target = "the target's logit is on one rank alone: the others must give 0 for it, and all of them get the sum"
    no_top = "before they are added up, all exponentials must be of logits less the same number: the largest of all"
    found = [
        ([loss * NUM_ROWS] * n, "this is the sum over the positions: return their mean"),
        ([loss * n] * n, "this is n times the loss: every rank has all of it, so don't add it up again"),
        ([loss / n] * n, "this is 1/n of the loss: a mean over the ranks, of what has to be added up"),
        ([log_sum] * n, "this is the log-sum alone: take the target's logit from it"),
        ([log_sum - x for x in own_targets], no_target),
        ([log_sum - x - y for x, y in zip(own_targets, misses, strict=True)], no_target),
        ([x - of_target for x in own_sums], no_sum),
        ([x - y for x, y in zip(own_sums, own_targets, strict=True)], no_sum),
        ([x - y - z for x, y, z in zip(own_sums, own_targets, misses, strict=True)], no_sum),
        ([of_own_tops + x - of_target for x in own_tops], no_top),
    ]
    return [Slip([x.mean().float() for x in values], hint) for values, hint in found]


def _slips_of_the_gradient(
    shares: Sequence[Tensor], is_target: Tensor, gradient: Tensor, softmax: Tensor, scale: float
) -> list[Slip]:
    n = len(shares)
    width = NUM_CLASSES // n
    taken = torch.zeros_like(gradient)  # 1 at a rank's first class where the target is on another rank
    taken[:, ::width] = torch.stack([1 - here.sum(1) for here in is_target.tensor_split(n, 1)], 1).double()
    own_softmax = torch.cat([x.softmax(1) for x in shares], 1)
    found = [
        (gradient * n, "this is n times the gradient: every rank has all of the loss, so add up nothing in backward"),
        (gradient * NUM_ROWS, "the loss is a mean over the positions: each has 1/N of the gradient"),
        (
            gradient / UPSTREAM,
            "what comes to backward is the gradient of the loss, which need not be 1: multiply by it",
        ),
        (scale * softmax, "this is softmax alone: the target's class gets 1 less, on the rank that has it"),
        (gradient - scale * taken, "a class here got 1 less for a target that another rank has: only that one does it"),
        (scale * (own_softmax - is_target), "this is softmax over this rank's own classes: divide by the sum over all"),
    ]
    return [Slip([part.float() for part in values.tensor_split(n, 1)], hint) for values, hint in found]
