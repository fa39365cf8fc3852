"""The tensor-parallel benchmark's models and batches, and torch's side: functions that gloo processes call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mplab.bench import torch_data
from mplab.bench.torch_data import LEARNING_RATE, NUM_RANKS, Size, step_stamps
from mplab.datasets import Batch
from mplab.models import GPTConfig, cross_entropy, seed_parameters, seeded
from mplab.models.gpt import FeedForward

# What DTensor's plans for a GPT are called here: the logits are gathered before the loss, or stay cut.
GPT_PLANS = ("whole logits", "loss_parallel")
SEQUENCE_PLANS = tuple(f"sequence parallel, {plan}" for plan in GPT_PLANS)
MLP_PLANS = ("column, row",)


def model(kind: str, size: Size) -> nn.Module:
    """With the same weights wherever it is built.

    Args:
        kind: "GPT"; or "MLP": a norm and the MLP of a GPT's block. The norm is trained, so that the gradient of the
            MLP's input is needed, as in a deeper model.
        size: of the model and the batch.
    """
    if kind == "GPT":
        return torch_data.gpt(size)
    with torch.device("meta"):  # torch's own initialisation would draw from the global generator
        parts = OrderedDict(norm=nn.LayerNorm(size.width), mlp=FeedForward(GPTConfig(width=size.width)))
        block = nn.Sequential(parts)
    block.to_empty(device="cpu")
    seed_parameters(block)
    return block


def batch(kind: str, size: Size) -> Batch:
    """Tokens and the tokens to predict for a GPT; for an MLP (B, T, D) and a class for each position, one of D."""
    tokens = torch_data.batch(size)
    if kind == "GPT":
        return tokens
    return seeded("inputs", (size.batch_size, size.sequence, size.width)), tokens[1] % size.width


def plan_of(kind: str, name: str, num_layers: int) -> dict[str, Any]:
    """The plan for `parallelize_module`: from names of modules to DTensor's styles.

    Args:
        kind: of the model.
        name: one of `GPT_PLANS`, `SEQUENCE_PLANS`, `MLP_PLANS`.
        num_layers: blocks of a GPT.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
    )

    if kind == "MLP":
        return {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    is_cut = name in SEQUENCE_PLANS
    between: Any = Shard(1) if is_cut else Replicate()  # how activations (B, T, D) lie between the layers
    if name.endswith("loss_parallel"):
        head = ColwiseParallel(input_layouts=between, use_local_output=False)
    else:
        head = ColwiseParallel(input_layouts=between, output_layouts=Replicate())
    plan: dict[str, Any] = {
        "embedding.token": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head.projection": head,
    }
    for i in range(num_layers):
        block = f"blocks.{i}"
        # What query, key and value read becomes one DTensor: its gradient costs one message, and else three.
        plan[f"{block}.attention"] = PrepareModuleInput(input_layouts=between, desired_input_layouts=Replicate())
        for layer in ("query", "key", "value"):
            plan[f"{block}.attention.{layer}"] = ColwiseParallel()
        plan[f"{block}.attention.output"] = RowwiseParallel(output_layouts=between)
        plan[f"{block}.mlp.up"] = ColwiseParallel(input_layouts=between)
        plan[f"{block}.mlp.down"] = RowwiseParallel(output_layouts=between)
    if is_cut:
        norms = [f"blocks.{i}.{layer}_norm" for i in range(num_layers) for layer in ("attention", "mlp")]
        plan |= {norm: SequenceParallel(use_local_output=True) for norm in (*norms, "head.norm")}
        positions = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(0))
        plan["embedding.position"] = positions  # (T, D)
    return plan


class Side:
    """One rank of a model cut by torch's own tensor parallelism.

    Args:
        rank: which of `NUM_RANKS`.
        plan: its name, see `plan_of`.
        kind: of the model.
        size: of the model and the batch.
    """

    def __init__(self, rank: int, plan: str, kind: str, size: Size) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

        mesh, styles = init_device_mesh("cpu", (NUM_RANKS,)), plan_of(kind, plan, torch_data.NUM_LAYERS)
        self.model = parallelize_module(model(kind, size), mesh, styles)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
        self.inputs, self.targets = batch(kind, size)
        self.context: Any = loss_parallel if plan.endswith("loss_parallel") else nullcontext

    def step(self) -> float:
        """One update; returns the loss."""
        self.optimizer.zero_grad()
        with self.context():
            loss = cross_entropy(self.model(self.inputs), self.targets)
            loss.backward()
        self.optimizer.step()
        return loss.item()


@cache
def side(rank: int, plan: str, kind: str, *size: int) -> Side:
    """This process's."""
    return Side(rank, plan, kind, Size(*size))


def losses(rank: int, plan: str, kind: str, size: Sequence[int], num_steps: int) -> list[float]:
    """The losses of the first steps."""
    return [side(rank, plan, kind, *size).step() for _ in range(num_steps)]


def stamps(rank: int, plan: str, kind: str, size: Sequence[int], num_steps: int) -> list[int]:
    """When the start barrier ended for this rank, then each step (`perf_counter_ns`)."""
    return step_stamps(side(rank, plan, kind, *size).step, num_steps)


def parameter_bytes(rank: int, plan: str, kind: str, size: Sequence[int]) -> int:
    """Bytes of the parameters on this rank."""
    return bytes_of(side(rank, plan, kind, *size).model.parameters())


def bytes_of(parameters: Iterable[Tensor]) -> int:
    """Bytes that this rank has of some parameters, which may be DTensors."""
    return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in parameters)
