"""The check of a plan for a model that no lab has shown: it is cut by it, run, and held against one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from mplab.comm.ledger import Message
from mplab.homework import watched
from mplab.homework.limited import Attempt, attempt, error, is_written
from mplab.homework.report import Complaint, Report, check_all
from mplab.homework.tensor import GRADIENTS, OUTPUTS, TRAFFIC, calls
from mplab.homework.unseen_model import NUM_LAYERS, NUM_WORDS, WIDTH, make_unseen_model
from mplab.homework.watched import ITEM_BYTES, MAX_STEPS, Run, in_words, listed, sent
from mplab.parallel import tensor_parallel
from mplab.parallel.tensor_state import full_gradients, partial_parameters, sum_gradients
from mplab.plan.traffic import chunk_lengths, direct_traffic
from mplab.world.rank import Rank
from mplab.world.world import World

NUM_RANKS = (1, 2, 4)
BATCH, LENGTH = 2, 6
Solution = Callable[[nn.Module], Mapping[str, str]]


def check_plan_for(solution: Solution) -> Report:
    """Check `solution(model)`: the plan by which `tensor_parallel` cuts a model that the labs have not shown.

    It is called with `make_unseen_model()`: an encoder with names of its own, whose attention has query, key and value
    joined in one layer, whose MLP is gated and whose head is not tied. The model is cut by the plan on 1, 2 and 4 ranks
    and run forward and backward.

    Args:
        solution: called with the model; returns a dict from patterns of module names to styles, as in
            `mplab.parallel.tensor_plan`. Every linear layer and the embedding of the words have to be cut.

    Returns:
        A report; nothing that the solution does is raised.

    **Communication**: two all-reduces a layer forward and two backward, one more forward for the embedding and one more
    backward for the head, each of an activation.
    """
    serial = _Serial()
    planned = attempt("make_unseen_model()", lambda: solution(make_unseen_model()), MAX_STEPS)
    if not is_written([planned]):
        return Report("plan_for", (), is_written=False)
    gives = check_all("plan_for gives a plan", [planned], _no_plan)
    tries = [_run(n, serial, planned.result) for n in NUM_RANKS] if gives.outcome == "passed" else []
    accepts = check_all("tensor_parallel accepts it", tries, _refused, f"for {listed(NUM_RANKS)} ranks")
    cut = tries if accepts.outcome == "passed" else []
    runs = check_all("the model runs, cut", cut, _error, "forward and backward")
    finished = cut if runs.outcome == "passed" else []
    outputs = check_all(OUTPUTS, finished, _outputs)
    right = finished if outputs.outcome == "passed" else []
    lines = [
        gives,
        accepts,
        runs,
        outputs,
        check_all(GRADIENTS, right, _gradients, "of all parameters"),
        check_all("every linear layer and the words are cut", finished, _whole, _share(finished)),
        check_all(TRAFFIC, finished, _traffic, "two all-reduces a layer forward, two backward"),
    ]
    return Report("plan_for", tuple(lines))


class _Serial:
    """What one process gets."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(NUM_WORDS, (BATCH, LENGTH), generator=generator)
        self.upstream = torch.randn((BATCH, LENGTH, NUM_WORDS), generator=generator)
        self.model, model = make_unseen_model(), make_unseen_model()  # the one without gradients is cut
        output = model(self.tokens)
        output.backward(self.upstream)
        self.output = output.detach()
        self.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.sizes = {name: p.numel() for name, p in model.named_parameters()}
        self.to_cut = [  # the layers whose weight and bias are most of the model
            path for path, module in model.named_modules() if isinstance(module, nn.Linear) or path == "words"
        ]


@dataclass
class _Log:
    """What a rank did.

    Args:
        is_cut: its model is there.
        forward: calls of the communicator in it.
        backward: and in its backward.
        output: all logits.
        gradients: of whole parameters.
        sizes: elements of each parameter on this rank.
    """

    is_cut: bool = False
    forward: list[Message] = field(default_factory=list)
    backward: list[Message] = field(default_factory=list)
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    gradients: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Try:
    num_ranks: int
    serial: _Serial
    logs: list[_Log]
    run: Run

    def __str__(self) -> str:
        return f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}"


def _run(num_ranks: int, serial: _Serial, plan: Mapping[str, str]) -> _Try:
    one = _Try(num_ranks, serial, [_Log() for _ in range(num_ranks)], Run(f"{num_ranks} ranks"))
    try:
        World(num_ranks, device="cpu").run(partial(_main, plan, serial, one.logs))
    except Exception as problem:  # what a plan leads to is a line of the report
        one.run.error = problem
    return one


def _main(plan: Mapping[str, str], serial: _Serial, logs: list[_Log], rank: Rank) -> None:
    """What a rank of one run does."""
    log, comm, messages = logs[rank.index], rank.comm, rank.comm.ledger.messages
    model = tensor_parallel(serial.model, comm, plan)
    log.is_cut = True
    num_before = len(messages)
    output = model(serial.tokens)
    num_forward = len(messages)
    has_parts = output.shape[-1] < NUM_WORDS
    output.backward(serial.upstream.tensor_split(comm.size, -1)[comm.rank] if has_parts else serial.upstream)
    log.forward, log.backward = messages[num_before:num_forward], messages[num_forward:]
    sum_gradients(partial_parameters(model), comm)
    log.output = comm.all_gather(output, -1) if has_parts else output.detach()
    log.gradients = full_gradients(model, comm)
    log.sizes = {name: p.numel() for name, p in model.named_parameters()}


# --- what can be wrong ------------------------------------------------------------------------------------------------


def _no_plan(planned: Attempt) -> Complaint | None:
    if planned.error is not None:
        return error("look for a loop that doesn't end")(planned)
    if isinstance(planned.result, Mapping):
        return None
    hint = "return patterns of module names and their styles: print(make_unseen_model()) shows the names"
    return Complaint("a dict", f"an object of type {type(planned.result).__name__}", hint)


def _refused(one: _Try) -> Complaint | None:
    if any(log.is_cut for log in one.logs):  # ranks that have not come so far were stopped by another's error
        return None
    hint = "print(make_unseen_model()) shows the names; mplab.parallel.tensor_plan, the styles"
    return watched.error(one.run, hint)


def _error(one: _Try) -> Complaint | None:
    hint = "what leaves a column layer is cut, and only a row layer takes it: which layer reads which one's outputs?"
    return watched.error(one.run, hint)


def _outputs(one: _Try) -> Complaint | None:
    for rank, log in enumerate(one.logs):
        if log.output.shape != one.serial.output.shape:
            hint = "the logits are whole, or the vocabulary is cut: its layer is column or vocab"
            return Complaint(
                f"shape {tuple(one.serial.output.shape)}", f"{tuple(log.output.shape)} on rank {rank}", hint
            )
        difference = float((log.output - one.serial.output).abs().max())
        if not difference < 1e-4:
            hint = "is a layer several matrices joined in one? Then each of them must be cut alike: column:3 of three"
            return Complaint("the logits of one process", f"up to {difference:.2g} from them on rank {rank}", hint)
    return None


def _gradients(one: _Try) -> Complaint | None:
    for rank, log in enumerate(one.logs):
        for name, want in one.serial.gradients.items():
            difference = float((log.gradients[name] - want).abs().max())
            if difference < 1e-3:
                continue
            factor = float((log.gradients[name] * want).sum() / want.square().sum())
            hint = "the gradient that enters column layers must be added up once: see entry and partial in "
            hint += "mplab.parallel.tensor_plan"
            if abs(factor - one.num_ranks) < 1e-3:
                hint = f"this is {one.num_ranks} times it: partial is for what sees a part of the features alone"
            return Complaint(f"the gradient of {name}", f"up to {difference:.2g} from it on rank {rank}", hint)
    return None


def _whole(one: _Try) -> Complaint | None:
    for rank, log in enumerate(one.logs):
        for path in one.serial.to_cut:
            size, name = one.serial.sizes[f"{path}.weight"], f"{path}.weight"
            if log.sizes[name] * one.num_ranks != size:
                total, held = sum(one.serial.sizes.values()), sum(log.sizes.values())
                seen = f"all {size} on rank {rank}, which so has {held} of the model's {total} parameters"
                hint = f"the plan has no entry for {path}: linear layers are column or row, the words and head vocab"
                return Complaint(f"{size // one.num_ranks} elements of {name}", seen, hint)
    return None


def _share(finished: list[_Try]) -> str:
    if not finished:
        return ""
    last = finished[-1]
    return f"{sum(last.logs[0].sizes.values())} of {sum(last.serial.sizes.values())} parameters on each of {last}"


def _traffic(one: _Try) -> Complaint | None:
    """Other messages or bytes than those of the all-reduces, each of one activation."""
    blocks = [k * ITEM_BYTES for k in chunk_lengths(BATCH * LENGTH * WIDTH, one.num_ranks)]
    num_calls = 2 * NUM_LAYERS + 1
    ends = {"forward": "the words", "backward": "the head"}
    for rank, log in enumerate(one.logs):
        for direction, messages in (("forward", log.forward), ("backward", log.backward)):
            one_call, got = direct_traffic("all_reduce", rank, blocks), sent(messages)
            if got == (num_calls * one_call.num_sent, num_calls * one_call.sent_bytes):
                continue
            expected = in_words(num_calls * one_call.num_sent, num_calls * one_call.sent_bytes)
            ops = [message.op for message in messages]
            if "all_gather" in ops:
                hint = (
                    "column_gather sends its outputs to all ranks: leave them cut with column, and let the layer that "
                )
                hint += "reads them be row"
            else:
                hint = "a column layer and the row layer after it are a pair, with one all-reduce in each direction; "
                hint += "cut only what is large"
            return Complaint(
                f"{num_calls} all-reduces in {direction}, two a layer and one of {ends[direction]}: {expected}",
                f"{in_words(*got)} on rank {rank}: {calls(messages)}",
                hint,
            )
    return None
