"""What a layer takes along when it moves to another rank: its weights, its buffers, and its optimizer's state."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator


@dataclass
class LayerState:
    """The state of one layer.

    Args:
        tensors: its part of the model's `state_dict`, and its other buffers.
        optimizer: for each of its parameters what the optimizer remembers: momenta, the number of steps.
    """

    tensors: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]


def take_state(keys: Sequence[str], stages: Iterable[nn.Module], optimizer: torch.optim.Optimizer | None) -> LayerState:
    """The state of one layer; its tensors are not copied.

    Args:
        keys: its keys in the model's `state_dict`, and the names of its buffers, which are not all in there.
        stages: those of the rank that has the layer.
        optimizer: of the stages' parameters.
    """
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, nn.Parameter] = {}
    for stage in stages:
        tensors |= dict(stage.named_buffers(remove_duplicate=False)) | stage.state_dict()
        parameters |= dict(stage.named_parameters(remove_duplicate=False))
    remembered = {} if optimizer is None else optimizer.state
    named = {key: parameters[key] for key in keys if key in parameters}
    return LayerState(
        {key: tensors[key] for key in keys if key in tensors},  # a buffer may have become None
        {key: dict(remembered[p]) for key, p in named.items() if p in remembered},
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
        loaded = stage.state_dict()
        stage.load_state_dict({key: tensors[key] for key in loaded})
        for name, buffer in stage.named_buffers(remove_duplicate=False):
            if name in tensors and name not in loaded:
                buffer.data = tensors[name].clone()  # its shape may have changed
        for name, parameter in stage.named_parameters(remove_duplicate=False):
            if name in remembered and parameter in index_of:
                by_index[index_of[parameter]] = remembered[name]
    if optimizer is not None:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": by_index})


def send_state(comm: Communicator, state: LayerState, dst: int) -> None:
    """Send a layer's state to rank `dst`.

    **Communication**: a message of names, then one for each tensor.
    """
    others = {
        name: {key: value for key, value in of_parameter.items() if not isinstance(value, Tensor)}
        for name, of_parameter in state.optimizer.items()
    }
    tensor_keys = {
        name: [key for key, value in of_parameter.items() if isinstance(value, Tensor)]
        for name, of_parameter in state.optimizer.items()
    }
    text = json.dumps([list(state.tensors), tensor_keys, others]).encode()
    comm.send(torch.tensor(list(text), dtype=torch.uint8, device=comm.device), dst)
    for tensor in state.tensors.values():
        comm.send(tensor, dst)
    for name, keys in tensor_keys.items():
        for key in keys:
            comm.send(state.optimizer[name][key].to(comm.device), dst)  # AdamW counts its steps on the CPU


def receive_state(comm: Communicator, src: int) -> LayerState:
    """What `send_state` of rank `src` sent."""
    names, tensor_keys, others = json.loads(bytes(comm.recv(src).tolist()))
    tensors = {name: comm.recv(src) for name in names}
    optimizer = {name: {key: comm.recv(src) for key in keys} | others[name] for name, keys in tensor_keys.items()}
    return LayerState(tensors, optimizer)
