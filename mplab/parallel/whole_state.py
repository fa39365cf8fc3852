"""Weights and the optimizer's state of a model that lies on many ranks, as the whole model has them: by name, in one
piece. What is saved so can be taken up by any other plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator
from mplab.errors import CheckpointError
from mplab.parallel.agree import exchange
from mplab.parallel.cut import Cut
from mplab.parallel.flat import Flat
from mplab.parallel.tensor_state import split


class Slice(NamedTuple):
    """What a rank updates of one parameter.

    Args:
        name: the parameter's, in the model.
        shape: of the parameter as it is cut over the tensor axis.
        cut: how it is cut there; None: it is not.
        piece: what the optimizer has of it; None: nothing here.
        bounds: which of its elements the piece is; None: all of them, in its shape.
    """

    name: str
    shape: torch.Size
    cut: Cut | None
    piece: nn.Parameter | None
    bounds: tuple[int, int] | None


def slices_of(flats: Sequence[Flat], cuts: Mapping[Tensor, Cut]) -> list[Slice]:
    """What this rank updates of the parameters in flats."""
    return [
        Slice(name, shape, cuts.get(p), piece, bounds)
        for flat in flats
        for name, p, shape, piece, bounds in flat.slices()
    ]


def whole_weights(
    local: Mapping[str, Tensor], cuts: Mapping[str, Cut], tp: Communicator
) -> Iterator[tuple[str, Tensor]]:
    """Each weight and buffer in one piece, by name, on every rank of the tensor axis, one after the other.

    **Communication**: an all_gather of each that is cut.
    """
    for name, tensor in local.items():
        yield name, _merged(tensor.detach(), cuts.get(name), tp)


def whole_optimizer_state(
    slices: list[Slice], optimizer: torch.optim.Optimizer | None, dp: Communicator, tp: Communicator
) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer remembers of each parameter, in one piece, as "NAME/KEY"; on every rank of both axes.

    **Communication**: the names of what there is (all_gather), and an all_gather of each piece, each cut part, and 8
    bytes of each number.
    """
    state = {} if optimizer is None else optimizer.state
    known: dict[str, dict[str, list[Any]]] = {}
    for of_rank in exchange([_described(s, state) for s in slices], dp):
        for s, keys in zip(slices, of_rank, strict=True):
            known.setdefault(s.name, {}).update(keys)
    for s in slices:
        mine = state.get(s.piece, {}) if s.piece is not None else {}
        for key, (dtype, is_elementwise) in sorted(known[s.name].items()):
            kind = getattr(torch, dtype)
            value = mine.get(key)
            if not is_elementwise:
                yield f"{s.name}/{key}", _number(value, kind, dp)
            elif s.bounds is None:
                assert value is not None
                yield f"{s.name}/{key}", _merged(value, s.cut, tp)
            else:
                part = torch.empty(0, dtype=kind, device=dp.device) if value is None else value
                yield f"{s.name}/{key}", _merged(dp.all_gather(part).view(s.shape), s.cut, tp)


def _merged(x: Tensor, cut: Cut | None, tp: Communicator) -> Tensor:
    return x.clone() if cut is None else cut.merge(x, tp)


def local_optimizer_state(
    slices: list[Slice],
    optimizer: torch.optim.Optimizer,
    keys_of: Mapping[str, list[str]],
    read: Callable[[str], Tensor],
    groups: list[dict[str, Any]],
    tp: Communicator,
) -> dict[str, Any]:
    """What the optimizer has to remember of this rank's pieces, as its `load_state_dict` takes it.

    Args:
        slices: of this rank.
        optimizer: theirs.
        keys_of: for each parameter's name what is remembered of it.
        read: gives one "NAME/KEY", whole.
        groups: the optimizer's settings, without parameters.
        tp: this rank's communicator on the tensor axis.

    Raises:
        CheckpointError: a size that is not the model's; MplabError: one that the tensor axis does not divide.
    """
    saved = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {p: i for i, p in enumerate(order)}
    state: dict[int, dict[str, Any]] = {}
    for s in slices:
        if s.piece is None or s.name not in keys_of:
            continue
        of_piece = state[index_of[s.piece]] = {}
        for key in keys_of[s.name]:
            whole = read(f"{s.name}/{key}")
            if not whole.dim() and s.shape != whole.shape:
                of_piece[key] = whole
                continue
            part = split({s.name: whole}, {s.name: s.cut} if s.cut else {}, tp)[s.name]
            if part.shape != s.shape:
                raise CheckpointError(f"{s.name}/{key} has shape {tuple(whole.shape)}: it is of another model")
            of_piece[key] = part if s.bounds is None else part.reshape(-1)[slice(*s.bounds)]
    new_groups = [
        {key: _like(group.get(key), value) for key, value in {**group, **kept}.items()}
        for group, kept in zip(saved["param_groups"], groups, strict=True)
    ]
    return {"state": state, "param_groups": new_groups}


def settings_of(optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """The optimizer's name, and its groups without their parameters, as JSON can write them; None: it has no groups."""
    if optimizer is None:
        return {"name": "", "groups": []}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    plain = [{key: _plain(value) for key, value in group.items()} for group in groups]
    return {"name": type(optimizer).__name__, "groups": plain}


def _like(mine: Any, value: Any) -> Any:
    """A setting of a checkpoint, as a tensor where it is one: a learning rate may be."""
    return mine.new_tensor(value) if isinstance(mine, Tensor) and not isinstance(value, Tensor) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _described(s: Slice, state: Mapping[Any, Any]) -> dict[str, list[Any]]:
    """What is remembered of one slice: key -> (dtype, whether it has a value for each element)."""
    if s.piece is None:
        return {}
    kinds = {}
    for key, value in state.get(s.piece, {}).items():
        if value is None:  # a momentum of 0
            continue
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        is_elementwise = tensor.shape == s.piece.shape and bool(s.shape)
        if not is_elementwise and tensor.numel() != 1:
            raise CheckpointError(
                f"the optimizer remembers {key} of shape {tuple(tensor.shape)} of {s.name}, of shape "
                f"{tuple(s.piece.shape)}: it can't be saved unless it has a value for each element, as SGD and Adam do"
            )
        kinds[key] = [str(tensor.dtype).removeprefix("torch."), is_elementwise]
    return kinds


def _number(value: Any, dtype: torch.dtype, comm: Communicator) -> Tensor:
    """A number that those ranks have which have a piece, such as how many steps were taken."""
    mine = math.nan if value is None else float(value)
    said = comm.all_gather(torch.tensor([mine], dtype=torch.float64, device=comm.device))
    return said[~said.isnan()][0].to(dtype)
