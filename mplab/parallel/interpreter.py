"""One loop for all schedules: it walks a rank's actions, and sends and receives what they need and give.

An output leaves as soon as it is computed. An input is waited for just before it is used, and asked for one action
earlier, so that it may come while that one is computed.

Where an input has no gradient (whole numbers, or a layer that ended the graph of autograd, as by `detach()`) an empty
message says so. Zeros would not do: by decay and momentum an optimizer moves weights whose gradient is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator, Handle
from mplab.parallel.backward import PutOff, SplitBackward
from mplab.parallel.serial import LossFunction
from mplab.plan.schedule import Action, Schedule

NO_GRADIENT = torch.bool
"""The dtype of the empty message in place of a gradient that isn't there; no gradient has it."""


class Step(NamedTuple):
    """An action of this rank, with all that the schedule says about it.

    Args:
        action: what to compute.
        name: of its span.
        src: the rank that gives what it needs; None: this rank, or nobody.
        reader: the action that takes what it computes.
        dst: the rank of that action.
    """

    action: Action
    name: str
    src: int | None
    reader: Action | None
    dst: int | None


def program(schedule: Schedule, rank: int) -> list[Step]:
    """The steps of one rank."""
    steps = []
    for action in schedule.ranks[rank]:
        given_by = [schedule.rank_of[a.stage] for a in schedule.needs(action) if a.stage != action.stage]
        src = given_by[0] if given_by and given_by[0] != rank else None
        reader = schedule.reader(action)
        dst = None if reader is None else schedule.rank_of[reader.stage]
        steps.append(Step(action, schedule.span_name(action), src, reader, dst))
    return steps


class Held(NamedTuple):
    """What a stage keeps of a micro-batch from its forward to its backward.

    Args:
        x: the input.
        y: the output, None where it is computed again.
        put_off: collects its weight gradients, where the backward is in two parts.
    """

    x: Tensor
    y: Tensor | None
    put_off: PutOff | None = None


class Interpreter:
    """Runs the actions of one rank for one batch.

    Args:
        schedule: whose.
        comm: this rank's communicator.
        stages: this rank's stages, by number.
        splits: those of them whose backward is in two parts.
        loss_fn: outputs and targets -> mean loss over the samples.
        recompute: keep only the input of a stage.
        inputs: of every micro-batch, on the rank of the first stage.
        targets: of every micro-batch, on the rank of the last stage.
        weights: every micro-batch's share of the samples.
    """

    def __init__(
        self,
        schedule: Schedule,
        comm: Communicator,
        stages: Mapping[int, nn.Module],
        splits: Mapping[int, SplitBackward],
        loss_fn: LossFunction,
        recompute: bool,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        weights: Sequence[float],
    ) -> None:
        self.schedule, self.comm, self.stages, self.splits = schedule, comm, stages, splits
        self.loss_fn, self.recompute = loss_fn, recompute
        self.inputs, self.targets, self.weights = inputs, targets, weights
        self.losses: list[Tensor] = []
        self._held: dict[tuple[int, int], Held] = {}
        self._put_off: dict[tuple[int, int], PutOff] = {}
        self._expected: dict[Action, Handle[Tensor]] = {}
        self._near: dict[Action, Tensor] = {}  # handed on between two stages of this rank
        self._sent: list[Handle[None]] = []

    def run(self, steps: Sequence[Step]) -> None:
        """Walk the steps; `losses` has then every micro-batch's share of the mean loss, on the last stage's rank."""
        compute = {"F": self._forward, "B": self._backward, "I": self._backward, "W": self._weight_gradient}
        span = self.comm.trace.span
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            self._expect(step)
            if following is not None:
                self._expect(following)
            given = self._take(step)
            with span(step.name, step.action.microbatch):
                result = compute[step.action.kind](step.action, given)
            if step.reader is not None and result is not None:
                self._hand_on(step, result)
            del given, result  # a finished micro-batch leaves nothing behind
        for handle in self._sent:
            handle.wait()

    # -- messages ------------------------------------------------------------------------------------------------------

    def _expect(self, step: Step) -> None:
        if step.src is not None and step.action not in self._expected:
            self._expected[step.action] = self.comm.irecv(step.src, self._tag(step.action))

    def _take(self, step: Step) -> Tensor | None:
        """An activation, the gradient of an output, or nothing."""
        if step.src is not None:
            return self._expected.pop(step.action).wait()
        return self._near.pop(step.action, None)

    def _hand_on(self, step: Step, result: Tensor) -> None:
        assert step.reader is not None
        assert step.dst is not None
        if step.dst == self.comm.rank:
            self._near[step.reader] = result
        else:
            self._sent.append(self.comm.isend(result, step.dst, self._tag(step.reader)))

    def _tag(self, reader: Action) -> int:
        """Each message of a step has a tag of its own: schedules may read them in any order."""
        return (2 * reader.stage + (reader.kind != "F")) * self.schedule.num_microbatches + reader.microbatch

    # -- what the actions do -------------------------------------------------------------------------------------------

    def _forward(self, action: Action, given: Tensor | None) -> Tensor | None:
        stage, _, j = action
        x = self.inputs[j] if given is None else given
        if given is not None and (given.is_floating_point() or given.is_complex()):
            given.requires_grad_()
        with torch.set_grad_enabled(not self.recompute):
            held = self._output(action, x)
        assert held.y is not None
        self._held[stage, j] = Held(x, None) if self.recompute else held
        if stage + 1 < self.schedule.num_stages:
            return held.y.detach()
        self.losses.append(held.y.detach())
        return None

    def _output(self, action: Action, x: Tensor) -> Held:
        """The output of a stage; that of the last is its micro-batch's share of the mean loss."""
        stage, _, j = action
        put_off = None
        if stage in self.splits:
            put_off = self.splits[stage].put_off = PutOff()
        y: Tensor = self.stages[stage](x)
        if stage + 1 == self.schedule.num_stages:
            y = self.loss_fn(y, self.targets[j]) * self.weights[j]
        return Held(x, y, put_off)

    def _backward(self, action: Action, grad: Tensor | None) -> Tensor | None:
        """The whole backward of a micro-batch, or all but the weight gradients that are put off."""
        stage, _, j = action
        held = self._held.pop((stage, j))
        if held.y is None:
            held = self._output(action, held.x)
        x, y, put_off = held
        assert y is not None
        is_cut_off = grad is not None and grad.dtype == NO_GRADIENT
        if y.requires_grad and not is_cut_off:  # otherwise nothing from here to the input is trained
            torch.autograd.backward(y, grad)
        if action.kind == "I":
            assert put_off is not None
            self._put_off[stage, j] = put_off
        elif put_off is not None:  # a stage that splits some of its backwards
            put_off.compute()
        if not stage:
            return None
        return torch.empty(0, dtype=NO_GRADIENT, device=x.device) if x.grad is None else x.grad

    def _weight_gradient(self, action: Action, given: Tensor | None) -> None:
        self._put_off.pop((action.stage, action.microbatch)).compute()
