"""A GPT by its sizes: its parameters, and what its layers send, compute and keep, as those of the real one do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from planner import SMALL, gpt, numbers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mplab import MplabError, World
from mplab.models import cross_entropy, layers
from mplab.parallel import tensor_parallel
from mplab.plan.tensor import Block, block_flops, tensor_parallel_traffic
from mplab.plan.traffic import direct_traffic
from mplab.plan.transformer import GPT3, layer_loads, parameter_lengths
from mplab.world import Rank


def _own_lengths(rank: Rank, model: nn.Module) -> list[tuple[int, ...]]:
    cut = model if rank.comm.size == 1 else tensor_parallel(model, rank.comm)
    return [tuple(p.numel() for _, p in layer.named_parameters()) for layer in layers(cut)]


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_gpt(tied: bool) -> None:
    model, sizes = gpt(tied)
    assert sizes.num_parameters == sum(p.numel() for p in model.parameters())
    for num_ranks in (1, 2, 4):
        of_ranks = World(num_ranks, "cpu").run(_own_lengths, model)
        assert all(tuple(lengths) == parameter_lengths(sizes, num_ranks) for lengths in of_ranks)


def test_gpt3_has_175_billion() -> None:
    assert GPT3.num_parameters == pytest.approx(175e9, rel=0.01)
    assert GPT3.item_bytes + GPT3.item_bytes + GPT3.state_bytes == 16  # Rajbhandari et al. 2020, section 3.1


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_layers_send_what_the_step_does(num_ranks: int, sequence_parallel: bool) -> None:
    embedding, block, head = layer_loads(SMALL, 3, num_ranks, sequence_parallel)
    loads = [embedding, *[block] * 4, head]
    sent = [sum(part) for part in zip(*(traffic for load in loads for traffic in load[1:3]), strict=True)]
    want = tensor_parallel_traffic(Block(3, 8, 16, 4, 4), num_ranks, 0, sequence_parallel)
    if sequence_parallel:  # once a step, not of a layer
        uncut = direct_traffic("all_reduce", 0, [(4 * 6 + 2 + 8) * 16 // num_ranks * 4] * num_ranks)
        want = type(want)(*(a - b for a, b in zip(want, uncut, strict=True)))
    assert sent == [*want]


def test_the_layers_compute_what_is_multiplied() -> None:
    """2 samples, 8 tokens: the head's product of (16 x 16) by (16 x 16), and two more in backward."""
    embedding, block, head = layer_loads(SMALL, 2, 2, False)
    assert embedding.flops == 0
    assert block.flops == block_flops(Block(2, 8, 16, 4), 2)
    assert head.flops == 3 * 2 * 16 * 16 * 16 / 2


def test_the_head_keeps_what_autograd_keeps() -> None:
    """Its input, its statistics, its output, and the logarithms of the shares."""
    model, sizes = gpt(tied=False)
    inputs, targets = torch.zeros(3, 8, 16, requires_grad=True), numbers(3)[1]
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.numel() > 1:  # the targets are a part of the batch
            kept[x.untyped_storage().data_ptr()] = x
        return x

    for p in model.parameters():
        assert p.numel() > 1
    with saved_tensors_hooks(keep, lambda x: x):
        cross_entropy(model.head(inputs), targets).backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    measured = sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in weights)
    assert layer_loads(sizes, 3, 1, False)[2].kept_bytes == measured


@pytest.mark.parametrize(
    ("values", "said"),
    [({"width": 0}, "width is 0"), ({"num_layers": 1.5}, "num_layers is 1.5"), ({"num_heads": 3}, "not divisible")],
)
def test_a_model_that_cannot_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(MplabError, match=said):
        replace(SMALL, **values)
