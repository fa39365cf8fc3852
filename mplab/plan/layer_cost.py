"""What a layer, or a stage of several, costs: what is measured of a model, and what a schedule is timed with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real

from mplab.errors import MplabError


@dataclass(frozen=True)
class LayerCost:
    """What one layer, or one stage, costs with one micro-batch.

    Args:
        name: "blocks.0".
        forward_s: seconds of the forward.
        backward_s: seconds of the backward.
        input_gradient_s: of its first part where it is split: the gradients of the inputs.
        weight_gradient_s: of its second part: those of the weights. Where neither part is given, each becomes half of
            `backward_s`.
        update_s: seconds of the optimizer, once a step.
        output_bytes: of the tensor that it hands on.
        activation_bytes: held from its forward to its backward, its input included.
        parameter_bytes: of its weights.

    Raises:
        MplabError: a number that is negative or not finite.
    """

    name: str
    forward_s: float = 0.0
    backward_s: float = 0.0
    input_gradient_s: float = 0.0
    weight_gradient_s: float = 0.0
    update_s: float = 0.0
    output_bytes: float = 0
    activation_bytes: float = 0
    parameter_bytes: float = 0

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if not (is_number(value) and 0 <= value < math.inf):
                raise MplabError(f"LayerCost {self.name}: {field.name} is {value!r}; give a number, 0 or more")
        if not self.input_gradient_s and not self.weight_gradient_s:
            object.__setattr__(self, "input_gradient_s", self.backward_s / 2)
            object.__setattr__(self, "weight_gradient_s", self.backward_s / 2)

    def recomputed(self, input_bytes: float) -> LayerCost:
        """The same where only the input is held until the backward, which begins with another forward.

        Args:
            input_bytes: of its input.
        """
        return replace(
            self,
            backward_s=self.backward_s + self.forward_s,
            input_gradient_s=self.input_gradient_s + self.forward_s,
            activation_bytes=input_bytes,
        )


def recomputed_costs(costs: Sequence[LayerCost]) -> list[LayerCost]:
    """What each stage costs where only its input is held until its backward.

    Args:
        costs: of all stages. The first one's input is a part of the batch, which is there anyway, and counts nothing.
    """
    inputs = [0.0, *(cost.output_bytes for cost in costs)]
    return [cost.recomputed(input_bytes) for cost, input_bytes in zip(costs, inputs, strict=False)]


def is_number(value: object) -> bool:
    """Whether it is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)
