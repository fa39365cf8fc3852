"""What a layer takes along when it moves to another rank: its weights, its buffers, and its optimizer's state."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator


@dataclass
class LayerState:
    """The state of one layer.

    Args:
        tensors: its part of the model's `state_dict`.
        optimizer: for each of its parameters what the optimizer remembers: momenta, the number of steps.
    """

    tensors: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]


def take_state(keys: Sequence[str], stages: Iterable[nn.Module], optimizer: torch.optim.Optimizer | None) -> LayerState:
    """The state of the layer with these keys in the model's `state_dict`; its tensors are not copied."""
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, nn.Parameter] = {}
    for stage in stages:
        tensors |= stage.state_dict()
        parameters |= dict(stage.named_parameters(remove_duplicate=False))
    remembered = {} if optimizer is None else optimizer.state
    named = {key: parameters[key] for key in keys if key in parameters}
    return LayerState(
        {key: tensors[key] for key in keys}, {key: dict(remembered[p]) for key, p in named.items() if p in remembered}
    )


def put_states(
    states: Iterable[LayerState], stages: Iterable[nn.Module], optimizer: torch.optim.Optimizer | None
) -> None:
    """Load the states of all layers of these stages."""
    tensors: dict[str, Tensor] = {}
    remembered: dict[str, dict[str, Any]] = {}
    for state in states:
        tensors |= state.tensors
        remembered |= state.optimizer
    index_of: dict[nn.Parameter, int] = {}
    if optimizer is not None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                index_of[parameter] = len(index_of)
    by_index = {}
    for stage in stages:
        stage.load_state_dict({key: tensors[key] for key in stage.state_dict()})
        for name, parameter in stage.named_parameters(remove_duplicate=False):
            if name in remembered and parameter in index_of:
                by_index[index_of[parameter]] = remembered[name]
    if optimizer is not None:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": by_index})


def send_state(comm: Communicator, state: LayerState, dst: int) -> None:
    """Send a layer's state to rank `dst`.

    **Communication**: a message of names, then one for each tensor.
    """
    numbers = {
        name: {key: None if isinstance(value, Tensor) else value for key, value in of_parameter.items()}
        for name, of_parameter in state.optimizer.items()
    }
    text = json.dumps([list(state.tensors), numbers]).encode()
    comm.send(torch.tensor(list(text), dtype=torch.uint8, device=comm.device), dst)
    for tensor in state.tensors.values():
        comm.send(tensor, dst)
    for value in _tensors(state.optimizer):
        comm.send(value.to(comm.device), dst)  # AdamW counts its steps on the CPU


def receive_state(comm: Communicator, src: int) -> LayerState:
    """What `send_state` of rank `src` sent."""
    keys, numbers = json.loads(bytes(comm.recv(src).tolist()))
    tensors = {key: comm.recv(src) for key in keys}
    optimizer = {
        name: {key: comm.recv(src) if value is None else value for key, value in of_parameter.items()}
        for name, of_parameter in numbers.items()
    }
    return LayerState(tensors, optimizer)


def _tensors(optimizer: Mapping[str, Mapping[str, Any]]) -> list[Tensor]:
    return [
        value for of_parameter in optimizer.values() for value in of_parameter.values() if isinstance(value, Tensor)
    ]
