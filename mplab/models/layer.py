"""The layers of a chain, and the stage of a pipeline that some of them make."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mplab.errors import MplabError


def run_in_order(parts: dict[str, nn.Module], x: Tensor) -> Tensor:
    """The parts one after the other, each on the output of the one before it."""
    for part in parts.values():
        x = part(x)
    return x


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a chain: takes one tensor and gives one.

    Args:
        name: where it is in the model, for example "blocks.0".
        parts: the modules it runs, by their dotted path in the model, in the order in which `call` expects them.
        call: a module-level function of the parts and the input (or a `functools.partial` of one), so that it can be
            copied.
    """

    name: str
    parts: dict[str, nn.Module] = field(repr=False)
    call: Callable[[dict[str, nn.Module], Tensor], Tensor] = field(repr=False, default=run_in_order)

    def __call__(self, x: Tensor) -> Tensor:
        """The output for `x`.

        Raises:
            MplabError: the layer gives something other than one tensor.
        """
        output = self.call(self.parts, x)
        if not isinstance(output, Tensor):
            raise MplabError(
                f"layer {self.name} gave a {type(output).__name__}, and the layers of a chain hand on one tensor: "
                "wrap it in a module that returns only the tensor the next layer takes"
            )
        return output

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every name in the model, and its parameter: a weight that is tied within the layer comes under each name."""
        for path, part in self.parts.items():
            yield from part.named_parameters(path, remove_duplicate=False)

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Every name in the model, and its buffer, persistent or not."""
        for path, part in self.parts.items():
            yield from part.named_buffers(path, remove_duplicate=False)

    def state_keys(self) -> list[str]:
        """Its keys in the model's `state_dict`."""
        return [key for path, part in self.parts.items() for key in part.state_dict(prefix=f"{path}.")]


class Stage(nn.Module):
    """A copy of consecutive layers, as one module that keeps the model's names.

    Its `state_dict()`, parameters and buffers have the names they have in the model. The layers are copied together, so
    that a weight tied within the stage stays tied; modes (`train`, `eval`), dtypes and `requires_grad` are kept.

    Args:
        layers: those of the stage, in order; they are not changed.
        device: where the copy is to be; None: where each parameter is.

    Raises:
        MplabError: no layer, or layers on the "meta" device that are wanted on another.
    """

    def __init__(self, layers: Sequence[Layer], device: torch.device | str | None = None) -> None:
        super().__init__()
        if not layers:
            raise MplabError("a stage of 0 layers: it needs one or more, so have at most as many stages as layers")
        self._chain = copy.deepcopy(list(layers))  # not "layers", which is the name of a module in many a model
        for layer in self._chain:
            for path, part in layer.parts.items():
                self._place(path, part)
        first = [module for part in self._chain[0].parts.values() for module in part.modules()]
        self._writes_on_input = any(getattr(module, "inplace", False) for module in first)
        self.training = any(part.training for layer in self._chain for part in layer.parts.values())
        if device is not None:
            tensors: Iterator[tuple[str, Tensor]] = itertools.chain(self.named_parameters(), self.named_buffers())
            for name, tensor in tensors:
                if tensor.is_meta and torch.device(device).type != "meta":
                    raise MplabError(
                        f"{name} is on the meta device, where a tensor has a shape and no values, and can't move to "
                        f"{device}: build the model on a real device"
                    )
            self.to(device)

    def _place(self, path: str, part: nn.Module) -> None:
        """Make `part` found under `path`, by way of empty modules."""
        *outer, last = path.split(".")
        modules = self._modules
        for name in outer:
            inner = modules.setdefault(name, nn.Module())
            assert inner is not None
            modules = inner._modules
        modules[last] = part

    def forward(self, x: Tensor) -> Tensor:
        """The input of the first layer -> the output of the last."""
        if self._writes_on_input:  # it belongs to the stage before, or is needed again
            x = x.clone()
        for layer in self._chain:
            x = layer(x)
        return x


def tied_names(layers: Sequence[Layer]) -> list[tuple[str, ...]]:
    """The weights that several layers share, such as a token embedding and the head.

    Args:
        layers: those of the whole model, not of copies.

    Returns:
        For each such parameter all its names, in the order of the layers.
    """
    names: dict[nn.Parameter, list[str]] = {}
    users: dict[nn.Parameter, set[int]] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            names.setdefault(parameter, []).append(name)
            users.setdefault(parameter, set()).add(index)
    return [tuple(names[parameter]) for parameter, indices in users.items() if len(indices) > 1]
