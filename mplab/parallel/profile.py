"""What every layer of a model costs with one micro-batch, measured: what a pipeline's step can be predicted from.

A layer that is timed alone, again and again, finds its weights in the cache. So all layers run one after the other,
with two micro-batches in flight, as in a pipeline's stage, and marks between them tell their times apart: in the
backward by hooks on what each layer hands on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from mplab.datasets import Batch
from mplab.errors import MplabError
from mplab.models import Layer, cross_entropy, layers
from mplab.parallel.backward import PutOff, SplitBackward
from mplab.parallel.pipeline import OptimizerFactory
from mplab.parallel.serial import LossFunction
from mplab.plan.layer_cost import LayerCost
from mplab.trace.recorder import Mark, seconds_between
from mplab.world import Rank, World
from mplab.world.rungs import num_cores

_NUM_WARMUPS, _NUM_MICROBATCHES = 1, 4


def profile_layers(
    model: nn.Module,
    batch: Batch,
    num_microbatches: int = 8,
    loss_fn: LossFunction = cross_entropy,
    optimizer: OptimizerFactory = torch.optim.AdamW,
    world: World | None = None,
    num_repeats: int = 7,
) -> list[LayerCost]:
    """Measure the forward, the backward (whole, and in two parts) and the update of every layer, and its bytes.

    The model is copied: neither it nor the global random numbers change.

    Args:
        model: what `mplab.models.layers` can turn into a chain.
        batch: inputs and targets; its first micro-batch is measured.
        num_microbatches: parts of the batch.
        loss_fn: outputs and targets -> mean loss; it counts as a part of the last layer.
        optimizer: parameters -> their optimizer.
        world: as many of its ranks as there are cores or GPUs measure at once, each all layers, since cores that share
            caches and memory slow each other down, as they will in the pipeline. None: one rank alone.
        num_repeats: of four micro-batches each and an update; the medians count, over the ranks too.

    Returns:
        A cost a layer. The first layer's input is a part of the batch; a weight that is tied counts in each of its
        layers.

    Raises:
        MplabError: a model that is no chain, or a batch with fewer samples than micro-batches.
    """
    chain = layers(model)
    if not 1 <= num_microbatches <= len(batch[0]) or num_repeats < 1:
        raise MplabError(
            f"{num_repeats} repeats with one of {num_microbatches} micro-batches of {len(batch[0])} samples: take 1 or "
            "more of each, and no more micro-batches than samples"
        )
    inputs, targets = (x.tensor_split(num_microbatches)[0] for x in batch)
    world = world or World(1, str(next((p.device for p in model.parameters()), inputs.device)))
    gpus = sorted({device.index or 0 for device in world.devices if device.type == "cuda"})
    with torch.random.fork_rng(gpus):  # here, since all ranks share what dropout draws from
        return world.run(_profile, measuring_ranks(world), chain, (inputs, targets), loss_fn, optimizer, num_repeats)[0]


def measuring_ranks(world: World) -> set[int]:
    """The ranks that measure: one a GPU, or as many as there are cores."""
    on_gpu = {device: rank for rank, device in reversed([*enumerate(world.devices)]) if device.type == "cuda"}
    return set(on_gpu.values()) or set(range(min(world.size, num_cores())))


def _profile(
    rank: Rank,
    measuring: set[int],
    chain: Sequence[Layer],
    microbatch: Batch,
    loss_fn: LossFunction,
    optimizer: OptimizerFactory,
    num_repeats: int,
) -> list[LayerCost]:
    """One rank's side."""
    inputs, targets = (x.to(rank.device, copy=True) for x in microbatch)
    whole, split = (_Chain(chain, inputs, targets, loss_fn, rank, is_split) for is_split in (False, True))
    optimizers = [optimizer(parameters) if (parameters := _trained(layer)) else None for layer in whole.layers]
    measured = []
    for _ in range(_NUM_WARMUPS + num_repeats):
        rank.comm.barrier()
        if rank.index in measuring:
            forward, backward, _ = whole.times()
            update = whole.updates(optimizers)
            split_forward, input_gradient, weight_gradient = split.times()
            measured.append(torch.stack([forward, backward, split_forward, input_gradient, weight_gradient, update]))
    # (repeats of all ranks, what is measured, layers)
    mine = torch.stack(measured[_NUM_WARMUPS:]) if measured else torch.zeros(0, 6, len(chain), dtype=torch.float64)
    of_all = rank.comm.all_gather(mine.to(rank.device)).cpu()
    times = of_all.quantile(0.5, dim=0)
    # What disturbs some layer or other in nearly every repeat is lost in the layers' medians: they are made to add up.
    times *= (of_all.sum(2).quantile(0.5, dim=0) / times.sum(1).clamp(min=1e-12))[:, None]
    forward, backward, split_forward, input_gradient, weight_gradient, update = times
    input_gradient += (split_forward - forward).clamp(min=0)  # it is a part of what splitting costs
    columns = torch.stack([forward, backward, input_gradient, weight_gradient, update]).T.tolist()
    return [
        LayerCost(layer.name, *of_layer, **sizes)
        for layer, of_layer, sizes in zip(chain, columns, whole.sizes(), strict=True)
    ]


class _Chain:
    """A copy of the whole model, with one micro-batch to run it on."""

    def __init__(
        self,
        chain: Sequence[Layer],
        inputs: Tensor,
        targets: Tensor,
        loss_fn: LossFunction,
        rank: Rank,
        is_split: bool,
    ) -> None:
        self.layers = copy.deepcopy(list(chain))
        self._inputs, self._targets, self._loss_fn, self._now = inputs, targets, loss_fn, rank.trace.now
        modules = [nn.ModuleList(layer.parts.values()).to(rank.device) for layer in self.layers]
        self._splits = [SplitBackward(module) for module in modules] if is_split else []

    def times(self) -> tuple[Tensor, Tensor, Tensor]:
        """Seconds of every layer's forward, backward, and weight gradients where the backward is split: the means over
        some micro-batches, each of which goes forward before the one before it goes backward, as in 1F1B.
        """
        for parameter in (p for layer in self.layers for p in _trained(layer)):
            if parameter.grad is not None:
                parameter.grad.zero_()
        passes, held = [], self._forward()
        for _ in range(_NUM_MICROBATCHES):
            following = self._forward()
            passes.append(self._backward(*held))
            held = following
        forward, backward, finish = (torch.tensor(column, dtype=torch.float64) for column in zip(*passes, strict=True))
        return forward.mean(0), backward.mean(0), finish.mean(0)

    def _forward(self) -> tuple[Tensor, list[Mark], list[Mark | None], list[PutOff]]:
        """The loss; marks between the layers; a list for those of the backward; what the backward puts off."""
        there: list[Mark | None] = [None] * (len(self.layers) + 1)  # when the gradient of each layer's input was there
        put_off = [PutOff() for _ in self._splits]
        for split, later in zip(self._splits, put_off, strict=True):
            split.put_off = later
        x = self._inputs.clone()  # a layer may work in place
        forward = [self._now()]
        for i, layer in enumerate(self.layers):
            x = self._run(layer, x)
            forward.append(self._now())
            if x.requires_grad:
                x.register_hook(partial(self._write_down, there, i + 1))
        return x, forward, there, put_off

    def _backward(
        self, loss: Tensor, forward: list[Mark], there: list[Mark | None], put_off: list[PutOff]
    ) -> tuple[list[float], list[float], list[float]]:
        """Seconds of every layer."""
        if loss.requires_grad:  # otherwise nothing is trained
            loss.backward()
            there[next(i for i, mark in enumerate(there) if mark is not None) - 1] = self._now()
        finish = [self._now()]
        for later in put_off:
            later.compute()
            finish.append(self._now())
        if not put_off:
            finish *= len(forward)
        return self._between(forward), self._between(there[::-1])[::-1], self._between(finish)

    def updates(self, optimizers: Sequence[torch.optim.Optimizer | None]) -> Tensor:
        """Seconds of every layer's update."""
        marks = [self._now()]
        for optimizer in optimizers:
            if optimizer is not None:
                optimizer.step()
            marks.append(self._now())
        return torch.tensor(self._between(marks), dtype=torch.float64)

    def sizes(self) -> list[dict[str, int]]:
        """Bytes that every layer hands on, that it holds until its backward, and of its parameters."""
        sizes, x = [], self._inputs.clone()
        of_model = {
            _address(t) for layer in self.layers for _, t in (*layer.named_parameters(), *layer.named_buffers())
        }
        for layer in self.layers:
            held = {_address(x): x.untyped_storage().nbytes()}

            def keep(t: Tensor, held: dict[int, int] = held) -> Tensor:
                held[_address(t)] = t.untyped_storage().nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                y = self._run(layer, x)
            held.pop(_address(y), None)  # it is the next one's input
            held_bytes = sum(size for address, size in held.items() if address not in of_model)
            parameter_bytes = sum(p.nbytes for p in {p for _, p in layer.named_parameters()})
            sizes.append({"output_bytes": y.nbytes, "activation_bytes": held_bytes, "parameter_bytes": parameter_bytes})
            x = y
        return sizes

    def _run(self, layer: Layer, x: Tensor) -> Tensor:
        """The layer's output; the last one's is the loss."""
        y = layer(x)
        return self._loss_fn(y, self._targets) if layer is self.layers[-1] else y

    def _write_down(self, marks: list[Mark | None], i: int, _: Tensor) -> None:
        marks[i] = self._now()

    def _between(self, marks: Sequence[Mark | None]) -> list[float]:
        """Seconds from each mark to the next; 0 where one was not made."""
        return [0.0 if a is None or b is None else seconds_between(a, b) for a, b in pairwise(marks)]


def _trained(layer: Layer) -> list[nn.Parameter]:
    return list(dict.fromkeys(p for _, p in layer.named_parameters() if p.requires_grad))


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
