"""Saved training: on disk as the whole model has it, so that any plan can go on with what any other has saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mplab.errors import CheckpointError, MplabError
from mplab.parallel import checkpoint_files as files
from mplab.parallel.agree import exchange
from mplab.parallel.hybrid import HybridParallel
from mplab.parallel.tensor_state import split
from mplab.parallel.whole_state import local_optimizer_state, settings_of, whole_optimizer_state, whole_weights

WEIGHTS, OPTIMIZER = "weights/", "optimizer/"


def save(engine: HybridParallel, root: str | Path, position: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint; every rank calls it, between two steps.

    Each tensor is written whole, by one rank; a rank has one of them in memory at a time beside those that it writes.
    What dropout will draw next is not saved.

    Args:
        engine: what is trained.
        root: the folder of all checkpoints, on a disk that all ranks see.
        position: where the data is, and whatever else must be known to go on; what JSON can write.

    Returns:
        The checkpoint's folder, `root/step-...`.

    Raises:
        CheckpointError: it can't be written, or there is one of this step; those before are as they were.
        MplabError: a position that JSON can't write.

    **Communication**: an all_gather of each parameter and each of its optimizer's tensors that lies on several ranks;
    two barriers, and what each rank has to say of its file and its optimizer (all_gather).
    """
    comm, folder, step = engine.comm, Path(root), engine.num_steps
    try:
        json.dumps(dict(position or {}))
    except (TypeError, ValueError) as error:
        raise MplabError(f"position {position!r} can't be saved ({error}): give numbers and text") from None
    if comm.rank == 0:
        files.begin(folder, step)
    comm.barrier()
    num_replicas, num_parts, me = engine.axes.dp.size, engine.axes.tp.size, engine.axes.dp.rank * engine.axes.tp.size
    mine = {}
    for i, (name, tensor) in enumerate(_whole(engine)):
        # Replicas have buffers of their own, of what each has seen: those of the first are kept, all from one.
        is_buffer = name.removeprefix(WEIGHTS) in engine.buffers
        if i % (num_parts if is_buffer else num_replicas * num_parts) == me + engine.axes.tp.rank:
            mine[name] = tensor
    shards = exchange(files.write_shard(files.writing(folder, step), comm.rank, mine), comm)
    optimizers = exchange(settings_of(engine.optimizer), comm)
    if comm.rank == 0:
        more: dict[str, Any] = {
            "plan": engine.plan.to_json(),
            "tied": _aliases(engine),
            "optimizer": next((settings for settings in optimizers if settings["groups"]), settings_of(None)),
            "position": dict(position or {}),
        }
        files.commit(folder, step, shards, more)
    comm.barrier()
    return folder / f"step-{step:08d}"


def load(engine: HybridParallel, root: str | Path) -> dict[str, Any]:
    """Go on where a checkpoint was saved, under any plan and on any number of ranks; every rank calls it.

    Args:
        engine: of the same model, with the same kind of optimizer; its weights, its optimizer's state and settings, and
            its number of steps become those of the checkpoint.
        root: the folder of all checkpoints, of which the newest is taken, or that of one.

    Returns:
        The position that was saved.

    Raises:
        CheckpointError: a file that is missing, cut or changed, another model or optimizer; nothing is loaded then.
        MplabError: another model, of sizes that the tensor axis does not divide; nothing is loaded then.

    **Communication**: barriers; with ZeRO 2 and 3 that of `HybridParallel.local_state`.
    """
    comm, tp = engine.comm, engine.axes.tp
    saved = files.Checkpoint(root, (comm.rank, comm.size))
    comm.barrier()  # all of it is there and unchanged, or somebody has said so
    own, cuts, names = engine.local_state(), engine.local_cuts(), set(saved.names)
    lacking = sorted(name for name in own if WEIGHTS + engine.tied.get(name, name) not in names)
    unknown = sorted({name.removeprefix(WEIGHTS) for name in names if name.startswith(WEIGHTS)} - engine.names)
    if lacking or unknown:
        raise CheckpointError(
            f"{saved.folder} is of another model: it lacks {lacking[:5]}, and has {unknown[:5]} that this one has not"
        )
    if saved.manifest["tied"] != _aliases(engine):
        raise CheckpointError(
            f"{saved.folder} is of another model, with the tied weights {saved.manifest['tied']}, and this one has "
            f"{_aliases(engine)}"
        )
    theirs, mine = saved.manifest["optimizer"], settings_of(engine.optimizer)
    if theirs["groups"] and mine["groups"] and _said(theirs) != _said(mine):
        raise CheckpointError(
            f"{saved.folder} is of another optimizer, {_said(theirs)}, and this one is {_said(mine)}: take the same"
        )
    local = {}
    for name, x in own.items():
        whole = saved.read(WEIGHTS + engine.tied.get(name, name))
        local[name] = split({name: whole}, cuts, tp)[name]
        if local[name].shape != x.shape:
            raise CheckpointError(f"{saved.folder} has {name} of shape {tuple(whole.shape)}: it is of another model")
    slices = [s._replace(name=engine.tied.get(s.name, s.name)) for s in engine.slices()]
    keys_of: dict[str, list[str]] = {}
    for full in sorted(names):
        if full.startswith(OPTIMIZER):
            name, _, key = full.removeprefix(OPTIMIZER).rpartition("/")
            keys_of.setdefault(name, []).append(key)
    optimizer, read = engine.optimizer, lambda name: saved.read(OPTIMIZER + name)
    state = local_optimizer_state(slices, optimizer, keys_of, read, theirs["groups"], tp) if optimizer else {}
    comm.barrier()  # nobody has changed anything if one of them could not
    engine.load_local_state(local)
    if optimizer is not None:
        optimizer.load_state_dict(state)
    engine.num_steps = int(saved.manifest["step"])
    position: dict[str, Any] = saved.manifest["position"]
    return position


def merge(root: str | Path, file: str | Path) -> dict[str, Tensor]:
    """The whole model's ordinary `state_dict`, out of a checkpoint, in one safetensors file that any program loads.

    Args:
        root: the folder of all checkpoints, of which the newest is taken, or that of one.
        file: where to write it.

    Returns:
        The same.

    Raises:
        CheckpointError: a file that is missing, cut or changed, or one that can't be written.
    """
    saved = files.Checkpoint(root)
    state = {n.removeprefix(WEIGHTS): saved.read(n) for n in saved.names if n.startswith(WEIGHTS)}
    state |= {name: state[first].clone() for name, first in saved.manifest["tied"].items()}
    files.write(Path(file), state)
    return state


def _aliases(engine: HybridParallel) -> dict[str, str]:
    """Of each tied weight its other names, and the first one, under which it is saved."""
    return {name: first for name, first in engine.tied.items() if name != first}


def _said(settings: Mapping[str, Any]) -> str:
    """What two optimizers must have in common for one to go on with the other's state."""
    num_groups = len(settings["groups"])
    return f"{settings['name']} with {num_groups} group{'s' * (num_groups > 1)}"


def _whole(engine: HybridParallel) -> Iterator[tuple[str, Tensor]]:
    """All tensors of this rank's stages, whole, on every rank that has a part of them."""
    axes = engine.axes
    own = {name: x for name, x in engine.local_state().items() if engine.tied.get(name, name) == name}
    for name, tensor in whole_weights(own, engine.local_cuts(), axes.tp):
        yield WEIGHTS + name, tensor
    slices = [s for s in engine.slices() if engine.tied[s.name] == s.name]
    for name, tensor in whole_optimizer_state(slices, engine.optimizer, axes.dp, axes.tp):
        yield OPTIMIZER + name, tensor
