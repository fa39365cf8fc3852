"""Torch's side of the hybrid benchmark: functions that gloo processes call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mplab.bench import torch_data
from mplab.bench.torch_data import LEARNING_RATE, NUM_LAYERS, Size, step_stamps
from mplab.bench.torch_tensor import bytes_of, plan_of
from mplab.models import cross_entropy
from mplab.models.gpt import Block
from mplab.plan.layout import Plan

NUM_RANKS = 4
DATA_PARALLEL = ("DDP", "FSDP2")


class Side:
    """One rank of a GPT under torch's own composition: DTensor inside a pipeline's stage inside DDP or FSDP2.

    Args:
        rank: which of `NUM_RANKS`.
        peer: of what: one of `DATA_PARALLEL` if there are replicas, and one of `torch_tensor.GPT_PLANS` if layers are
            cut, as in "DDP, loss_parallel".
        plan: how the model is laid out; stages are under 1F1B, one a rank.
        size: of the model and the batch.
    """

    def __init__(self, rank: int, peer: str, plan: Plan, size: Size) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B
        from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

        mesh = init_device_mesh("cpu", (plan.dp, plan.pp, plan.tp), mesh_dim_names=("dp", "pp", "tp"))
        replica, stage = mesh.get_local_rank("dp"), mesh.get_local_rank("pp")
        gpt = torch_data.gpt(size)
        if plan.tp > 1:
            parallelize_module(gpt, mesh["tp"], plan_of("GPT", peer, NUM_LAYERS))
        layers = [gpt.embedding, *gpt.blocks, gpt.head]
        ends = (0, *(plan.cuts or ()), len(layers))
        model: nn.Module = nn.Sequential(*layers[ends[stage] : ends[stage + 1]])
        if "FSDP2" in peer:
            _shard(model, mesh["dp"])
        elif "DDP" in peer:
            # With a mesh it takes DTensor's parameters, but at the price of hooks in front of every forward.
            over: Any = {"device_mesh": mesh["dp"]} if plan.tp > 1 else {"process_group": mesh.get_group("dp")}
            model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, **over)
        self.model = model
        self.parameters = list(model.parameters())  # now: under DDP, DTensor's are no parameters after a step
        self.optimizer = torch.optim.SGD(self.parameters, lr=LEARNING_RATE)
        self.inputs, self.targets = (x.tensor_split(plan.dp)[replica] for x in torch_data.batch(size))
        self.context: Any = loss_parallel if peer.endswith("loss_parallel") else nullcontext
        self.is_first, self.is_last = stage == 0, stage == plan.pp - 1
        self.schedule: Any = None
        if plan.pp > 1:
            self.schedule = Schedule1F1B(
                PipelineStage(model, stage, plan.pp, torch.device("cpu"), group=mesh.get_group("pp")),
                plan.num_microbatches,
                loss_fn=lambda outputs, targets: cross_entropy(outputs, targets) / plan.num_microbatches,
                scale_grads=False,
            )

    def step(self) -> float:
        """One update; returns the loss of this replica's samples on the last stage, 0 on the others."""
        self.optimizer.zero_grad()
        losses: list[Tensor] = []
        with self.context():
            if self.schedule is None:
                losses.append(cross_entropy(self.model(self.inputs), self.targets))
                losses[0].backward()
            else:
                inputs, target = (self.inputs,) if self.is_first else (), self.targets if self.is_last else None
                self.schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        self.optimizer.step()
        return sum(loss.item() for loss in losses)


def _shard(model: nn.Module, mesh: Any) -> None:
    """Each block, and the rest as one; with gathered weights kept until the backward, or after all micro-batches."""
    from torch.distributed.fsdp import fully_shard

    for block in [module for module in model.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


@cache
def side(rank: int, peer: str, plan: str, *size: int) -> Side:
    """This process's; the plan as JSON."""
    return Side(rank, peer, Plan.from_json(plan), Size(*size))


def losses(rank: int, peer: str, plan: str, size: Sequence[int], num_steps: int) -> list[float]:
    """The losses of the first steps, of this rank's samples alone."""
    return [side(rank, peer, plan, *size).step() for _ in range(num_steps)]


def stamps(rank: int, peer: str, plan: str, size: Sequence[int], num_steps: int) -> list[int]:
    """When the start barrier ended for this rank, then each step (`perf_counter_ns`)."""
    return step_stamps(side(rank, peer, plan, *size).step, num_steps)


def parameter_bytes(rank: int, peer: str, plan: str, size: Sequence[int]) -> int:
    """Bytes of the parameters on this rank."""
    return bytes_of(side(rank, peer, plan, *size).parameters)
