"""`python -m mplab train --plan`: training on the ranks of a plan, saved, gone on with, and held to serial training."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mplab.datasets import Digits, Text
from mplab.errors import MplabError
from mplab.parallel.checkpoint_files import Checkpoint, safetensors_library
from mplab.parallel.parallelize import parallelize
from mplab.parallel.serial import Serial
from mplab.plan.layout import Plan
from mplab.trace.units import format_s
from mplab.world import World
from mplab.world.launch import ProcessWorld, is_launched
from mplab.world.progress import progress

SAME_LOSS = 1e-3  # relative: in float32 rounding grows with every step
# What must be as it was for training to go on as if it had never stopped, beside what a checkpoint has in itself.
KEPT = ("data", "batch_size", "sequence", "width", "layers", "heads", "lr", "seed")


def by_plan(
    arguments: argparse.Namespace, data: Text | Digits, model: nn.Module, device_type: str, description: str
) -> int:
    """Train on the ranks of a plan; under a launcher this process is one of them, and rank 0's prints.

    Args:
        arguments: of the command line.
        data: what to train on.
        model: what to train; it is trained serially where the two are compared.
        device_type: "auto", "cpu" or "cuda".
        description: of data and model, to print.

    Returns:
        The exit status: 1 where the losses differ from those of serial training.
    """
    plan = _load(arguments.plan)
    settings = {name: getattr(arguments, name) for name in KEPT} | {"samples": data.num_training}
    settings["data"] = Path(arguments.data).name  # the file may lie elsewhere on another machine
    resume = _resumed(arguments)
    start = _saved_step(resume, settings) if resume else 0
    if start > arguments.steps:
        raise MplabError(
            f"--resume {resume}: it has gone {start} steps, and --steps {arguments.steps} counts them: give {start} or "
            "more"
        )
    if arguments.save:
        _make_room(arguments.save, start)
    if arguments.trace:
        _make_folder("--trace", arguments.trace)
    world = World.from_env() if is_launched() else World(plan.num_ranks, device_type)
    is_first = not isinstance(world, ProcessWorld) or world.rank.index == 0
    say = print if is_first else _say_nothing
    say(f"{description}\n{plan}\n{world}", flush=True)
    optimizer = partial(torch.optim.AdamW, lr=arguments.lr)
    trained = parallelize(model, world, plan, optimizer=optimizer)
    if resume:
        trained.load(resume)
        say(f"goes on after step {trained.num_steps} of {resume}", flush=True)
    num_steps = arguments.steps - start
    if num_steps == 0:
        say(f"these are all {start} steps: nothing is left to train")
        return 0
    losses, times_s = [], []
    for batch in progress(data.batches(num_steps, start), num_steps, "train", "step"):
        start_s = time.perf_counter()
        losses.append(trained.step(batch))
        times_s.append(time.perf_counter() - start_s)
        if not math.isfinite(losses[-1]):
            raise MplabError(
                f"the loss of step {trained.num_steps} is {losses[-1]}: lower --lr, which is {arguments.lr}"
            )
        is_last = len(losses) == num_steps
        if is_last and arguments.trace:
            timeline = world.timeline  # that of the step: to save is a run of its own
        if arguments.save and (is_last or (arguments.every and trained.num_steps % arguments.every == 0)):
            saved = trained.save(arguments.save, {"settings": settings})
    done = f"{trained.num_steps} step{'s' * (trained.num_steps > 1)}"
    say(f"first loss {losses[0]:.4f}, last loss {losses[-1]:.4f} after {done}, ", end="")
    say(f"{format_s(statistics.median(times_s))} a step (median)", flush=True)
    if arguments.save:
        say(f"the last checkpoint: {saved}")
    if arguments.trace:
        path = arguments.trace / "last_step.json"
        if is_first:
            timeline.save(path)
        say(f"the last step's timeline: {path}")
    if not arguments.check_serial:
        return 0
    serial = Serial(model, optimizer(model.parameters()))
    expected = [serial.step(batch) for batch in data.batches(trained.num_steps)][start:]
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    is_same = worst <= SAME_LOSS
    say(
        f"against serial training: the losses differ by {worst:.1e} at most, "
        f"{'as rounding does' if is_same else f'more than {SAME_LOSS:g}, the most that rounding is taken for'}"
    )
    return 0 if is_same else 1


def _load(path: str) -> Plan:
    """The plan in a file; what is wrong with it is said with the file's name."""
    try:
        return Plan.load(path)
    except MplabError as error:
        if str(error).startswith(path):
            raise
        raise MplabError(f"--plan {path}: {error}") from None


def _say_nothing(*words: object, **options: object) -> None:
    pass


def _resumed(arguments: argparse.Namespace) -> Path | None:
    """Where training goes on; None: it begins, as it does where `--save` has the same folder, and nothing there yet.

    So one command both begins and goes on, and a launcher can give it again after a failure.
    """
    folder: Path | None = arguments.resume
    return None if folder is not None and folder == arguments.save and not any(folder.glob("step-*")) else folder


def _saved_step(folder: Path, settings: dict[str, Any]) -> int:
    """The steps that were taken when the newest checkpoint in a folder was saved, by the same settings.

    Raises:
        MplabError: it was saved by others, and the data would not go on where it was.
    """
    saved = Checkpoint(folder, check=None)
    kept = saved.manifest["position"].get("settings")
    if kept is None:
        raise MplabError(f"--resume {folder}: {saved.folder} does not say on what data: it was not saved by --save")
    other = {name: value for name, value in kept.items() if value != settings.get(name)}
    if other:
        theirs = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in other.items())
        mine = ", ".join(f"{name.replace('_', '-')} {settings.get(name)}" for name in other)
        raise MplabError(f"--resume {folder}: it was trained with {theirs}, and this is {mine}: give the same")
    return int(saved.manifest["step"])


def _make_room(folder: Path, start: int) -> None:
    """A folder for what is saved after the step `start`, before any work that could be lost.

    Raises:
        MplabError: it has later checkpoints, which are never written over; it can't be made; or safetensors is missing.
    """
    safetensors_library()
    _make_folder("--save", folder)
    last = max((int(number) for path in folder.glob("step-*") if (number := path.name[5:]).isdigit()), default=0)
    if last > start:
        raise MplabError(
            f"--save {folder}: it has a checkpoint of step {last} already, and this training begins after step "
            f"{start}: go on from there with --resume {folder}, or give another folder"
        )


def _make_folder(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MplabError(f"{option} {folder}: no folder can be made there ({error.strerror}): give another") from None
