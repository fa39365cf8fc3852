"""Whether a `state_dict` is of the model that is to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mplab.errors import MplabError


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int] | None]) -> None:
    """Refuse a state of another model, before anything is changed.

    Args:
        state: a whole model's.
        shapes: the model's own, whole, by name; None of what is no tensor.

    Raises:
        MplabError: other names, or a tensor of another shape.
    """
    missing, unknown = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    if missing or unknown:
        raise MplabError(
            f"this state lacks {missing[:5]}, and the model has no {unknown[:5]}: load the state of the same model"
        )
    for name, shape in shapes.items():
        if shape is not None and tuple(state[name].shape) != tuple(shape):
            raise MplabError(
                f"{name} has shape {tuple(state[name].shape)} in this state, and {tuple(shape)} in the model: load the "
                "state of a model of the same sizes"
            )
