"""`python -m mplab train`: a GPT on text, or an MLP on digits, on one device, or on many as a plan says."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mplab.datasets import Digits, Text, digits, text
from mplab.errors import MplabError
from mplab.models import GPT, MLP, GPTConfig
from mplab.parallel.serial import Serial
from mplab.parallel.train_plan import by_plan
from mplab.world.launch import is_launched
from mplab.world.machine import machine
from mplab.world.progress import progress


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print the first and the last loss, and the held-out one or by a plan a step's time; the progress bar
    goes to stderr.

    Raises:
        MplabError: arguments out of their range, or that need others; a loss that is not finite.
    """
    arguments = parse(argv)
    for name in ("steps", "layers"):
        if getattr(arguments, name) < 1:
            raise MplabError(f"--{name} {getattr(arguments, name)}: must be 1 or more")
    if not 0 < arguments.lr < math.inf:
        raise MplabError(f"--lr {arguments.lr}: must be above 0, and finite")
    for name in ("check_serial", "trace", "save", "resume"):
        if getattr(arguments, name) and not arguments.plan:
            raise MplabError(f"--{name.replace('_', '-')} is for training by a plan: give --plan FILE too")
    if arguments.every is not None and (arguments.every < 1 or not arguments.save):
        what = "give --save DIR too" if arguments.every > 0 else "must be 1 or more"
        raise MplabError(f"--every {arguments.every}: {what}")
    data, model = make(arguments)
    if arguments.plan:
        kind = arguments.device if arguments.device == "auto" else find_device(arguments.device).type
        return by_plan(arguments, data, model, kind, f"{describe(data)}; {describe(model)}")
    device = find_device(arguments.device)
    print(f"{describe(data)}; {describe(model)} on {device}", flush=True)
    serial = Serial(model.to(device), torch.optim.AdamW(model.parameters(), lr=arguments.lr))
    losses: list[float] = []
    for batch in progress(data.batches(arguments.steps), arguments.steps, "train", "step"):
        losses.append(serial.step(batch))
        if not math.isfinite(losses[-1]):
            raise MplabError(f"the loss of step {len(losses)} is {losses[-1]}: lower --lr, which is {arguments.lr}")
    done = f"{len(losses)} step{'s' * (len(losses) > 1)}"
    print(f"first loss {losses[0]:.4f}, last loss {losses[-1]:.4f} after {done}, ", end="", flush=True)
    print(f"held-out loss {serial.evaluate(data.validation()):.4f}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of `train`."""
    parser = argparse.ArgumentParser(
        prog="python -m mplab train",
        description="Train a GPT on text, or an MLP on digits, on one device or by a plan.",
    )
    parser.add_argument("--data", default="text", help="text (the Python language reference), digits, or a file's path")
    parser.add_argument(
        "--steps", type=int, default=50, help="updates in all, those before a checkpoint included (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="samples of a step (%(default)s)")
    parser.add_argument("--sequence", type=int, default=64, help="bytes of a sample (%(default)s); not of digits")
    parser.add_argument("--width", type=int, default=128, help="features between layers (%(default)s)")
    parser.add_argument(
        "--layers", type=int, default=2, help="blocks of the GPT, hidden layers of the MLP (%(default)s)"
    )
    parser.add_argument("--heads", type=int, default=4, help="attention heads of a block (%(default)s); GPT only")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of AdamW (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the batches' order (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    parser.add_argument(
        "--plan", metavar="FILE", help="a JSON file that Plan.save wrote: train on as many ranks as it has"
    )
    parser.add_argument("--check-serial", action="store_true", help="with --plan: compare with serial training")
    trace = "with --plan: a folder for the last step's timeline (Chrome trace)"
    parser.add_argument("--trace", type=Path, metavar="DIR", help=trace)
    parser.add_argument("--save", type=Path, metavar="DIR", help="with --plan: a folder for checkpoints")
    every = "with --save: steps between two checkpoints; without it one is written, at the end"
    parser.add_argument("--every", type=int, metavar="STEPS", help=every)
    resume = "go on after the newest checkpoint in this folder; if --save names the same one and it has none yet, begin"
    parser.add_argument("--resume", type=Path, metavar="DIR", help=f"with --plan: {resume}")
    return parser.parse_args(argv)


def find_device(name: str) -> torch.device:
    """The device that `--device` names, if this machine has it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # torch knows more, which mplab was not tried on
        raise MplabError(f"--device {name} is no device of mplab: give auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise MplabError(f"--device {name}: this machine has {count} of this kind; give auto or cpu")
    return device


def make(arguments: argparse.Namespace) -> tuple[Text | Digits, nn.Module]:
    """The dataset and a model that fits it, and into memory.

    Raises:
        MplabError: sizes that can't be, or whose weights, gradients and AdamW's two moments are larger than memory.
    """
    data, build = _prepare(arguments)
    with torch.device("meta"):
        size = sum(parameter.nbytes for parameter in build().parameters())
    # The weights are made here in any case; the rest may be on a GPU, or on other hosts.
    stays_here = find_device(arguments.device).type == "cpu" and not is_launched()
    needed, there = size * (4 if stays_here else 1), machine().memory_bytes
    if 0 < there < needed:
        what = "weights, gradients and AdamW's moments" if stays_here else "weights"
        raise MplabError(
            f"--width {arguments.width} --layers {arguments.layers}: {what} take {needed / 1e9:,.1f} GB, and this "
            f"machine has {there / 1e9:.1f} GB: give a smaller model"
        )
    return data, build()


def _prepare(arguments: argparse.Namespace) -> tuple[Text | Digits, Callable[[], nn.Module]]:
    if arguments.data == "digits":
        pictures = digits(batch_size=arguments.batch_size, seed=arguments.seed)
        sizes = (pictures.num_features, *[arguments.width] * arguments.layers, pictures.num_classes)
        return pictures, partial(MLP, sizes, arguments.seed)
    path = None if arguments.data == "text" else arguments.data
    words = text(path, batch_size=arguments.batch_size, sequence=arguments.sequence, seed=arguments.seed)
    config = GPTConfig(
        vocab_size=words.vocab_size,
        context_length=arguments.sequence,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        width=arguments.width,
    )
    return words, partial(GPT, config, arguments.seed)


def describe(thing: Text | Digits | nn.Module) -> str:
    """What is trained, or on what, in a few words."""
    if isinstance(thing, Text):
        return f"{thing.name}, {thing.num_tokens} bytes"
    if isinstance(thing, Digits):
        return f"handwritten digits, {len(thing.labels)} pictures"
    return f"{type(thing).__name__} of {sum(parameter.numel() for parameter in thing.parameters())} parameters"
