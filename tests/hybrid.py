"""What tests of hybrid parallelism share: small models, batches, and serial training to hold every plan to.

A rank that is not the first of its replica and of its tensor axis starts with weights of its own, which do not count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import pytest
import torch
from data_parallel import OPTIMIZERS, one_thread
from torch import Tensor, nn

from mplab import Mesh, Plan, World
from mplab.datasets import Batch
from mplab.models import GPT, GPTConfig, cross_entropy, seed_parameters
from mplab.parallel import HybridParallel, Serial
from mplab.world import Rank

LENGTH, WIDTH, NUM_SAMPLES, NUM_STEPS = 8, 16, 17, 3  # 17 is divided by no number of replicas or micro-batches but 1
TOLERANCE = 1e-10
TOLERANCES = {"Llama": 1e-6}  # its norms compute in float32, whatever the model is: a last bit there is 6e-8 of a value

# --- models, batches, and what training comes to ---------------------------------------------------------------------


@cache
def gpt(tied: bool = True, num_layers: int = 2, num_heads: int = 4, width: int = WIDTH, seed: int = 0) -> nn.Module:
    sizes = {"vocab_size": 2 * num_heads, "context_length": LENGTH + 1, "width": width, "num_layers": num_layers}
    return GPT(GPTConfig(num_heads=num_heads, tied=tied, **sizes), seed).double()


@cache
def frozen_gpt() -> nn.Module:
    """The first stage of two, a bias of what is cut, and a norm that is not."""
    model = copy.deepcopy(gpt(False))
    model.embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    model.blocks[1].mlp.up.bias.requires_grad_(False)
    model.blocks[1].mlp_norm.requires_grad_(False)
    return model


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """In float64, with weights from their names alone, and nothing drawn from the global generator."""
    with torch.random.fork_rng(devices=[]):
        model = make().double()
    seed_parameters(model)
    return model


@cache
def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, intermediate_size=32, num_key_value_heads=4, max_position_embeddings=9)
    return seeded(lambda: transformers.LlamaForCausalLM(config))


MODELS: dict[str, Callable[[], nn.Module]] = {"tied": gpt, "untied": partial(gpt, tied=False), "Llama": llama}


@cache
def batches(
    num_samples: int = NUM_SAMPLES, vocabulary: int = 8, seed: int = 1, num_steps: int = NUM_STEPS
) -> tuple[Batch, ...]:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randint, vocabulary, (num_samples, LENGTH), generator=generator)
    return tuple((draw(), draw()) for _ in range(num_steps))


@dataclass(frozen=True)
class Trained:
    """By serial training, or merged from the ranks."""

    losses: list[float]
    gradients: dict[str, Tensor] | None  # after the last step; None where no rank has them whole
    weights: dict[str, Tensor]


def loss_of_logits(outputs: Any, targets: Tensor) -> Tensor:
    return cross_entropy(getattr(outputs, "logits", outputs), targets)


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), label_smoothing=0.1)


def serially(
    model: nn.Module,
    data: Sequence[Batch],
    optimizer: Callable[..., torch.optim.Optimizer] = OPTIMIZERS["sgd"],
    loss_fn: Any = loss_of_logits,
    max_norm: float | None = None,
) -> Trained:
    """On a copy."""
    model = copy.deepcopy(model)
    with one_thread():
        serial = Serial(model, optimizer(model.parameters()), loss_fn, max_norm=max_norm)
        losses = [serial.step(batch) for batch in data]
    named = model.named_parameters(remove_duplicate=False)
    return Trained(losses, {name: p.grad for name, p in named if p.grad is not None}, model.state_dict())


@cache
def serial(
    name: str,
    optimizer: str = "sgd",
    max_norm: float | None = None,
    num_samples: int = NUM_SAMPLES,
    num_steps: int = NUM_STEPS,
) -> Trained:
    """Of one of `MODELS`, once for all tests that need it."""
    data = batches(num_samples, num_steps=num_steps)
    return serially(MODELS[name](), data, OPTIMIZERS[optimizer], max_norm=max_norm)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def state_of(model: nn.Module) -> list[Any]:
    """All that one can see of a model, but its values."""
    modules = [
        (name, id(m), type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]
    return [modules, [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()]]


def others(model: nn.Module, plan: Plan, rank: Rank) -> nn.Module:
    """The model, or where the values don't count one with others."""
    place = Mesh(plan.dp, plan.pp, plan.tp).coordinates(rank.index)
    if place["dp"] == place["tp"] == 0:
        return model
    return reseeded(model, rank.index)


@lru_cache(maxsize=64)
def reseeded(model: nn.Module, seed: int) -> nn.Module:
    """A copy with other weights, made once for a model: an engine changes none that it is given."""
    other = copy.deepcopy(model)
    seed_parameters(other, seed)
    return other


def train(model: nn.Module, plan: Plan, data: Sequence[Batch], world: World | None = None, **options: Any) -> Trained:
    """What all ranks came to, which is the same to the bit; the model is as it was."""
    options = {"optimizer": OPTIMIZERS["sgd"]} | options

    def work(rank: Rank) -> Trained:
        engine = HybridParallel(others(model, plan, rank), rank.comm, plan, **options)
        losses = [engine.step(batch) for batch in data]
        assert engine.num_steps == len(data)
        return Trained(losses, None if plan.zero else engine.full_gradients(), engine.full_state_dict())

    before, seen = snapshot(model), state_of(model)
    first, *rest = (world or World(plan.num_ranks, "cpu")).run(work)
    assert_same(model.state_dict(), before)
    assert state_of(model) == seen
    for of_rank in rest:
        assert of_rank.losses == first.losses
        assert_same(of_rank.weights, first.weights)
        assert_same(of_rank.gradients or {}, first.gradients or {})
    return first


def assert_alike(got: Trained, want: Trained, tolerance: float = TOLERANCE) -> None:
    assert got.losses == pytest.approx(want.losses, rel=0, abs=tolerance)
    assert_same(got.weights, want.weights, tolerance)
    if got.gradients is not None:
        assert want.gradients is not None
        assert got.gradients.keys() >= want.gradients.keys()
        nothing = {name: torch.zeros_like(x) for name, x in got.gradients.items() if name not in want.gradients}
        assert_same(got.gradients, {name: (want.gradients | nothing)[name] for name in got.gradients}, tolerance)


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = 0.0) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        if not (got[name].shape == value.shape and (got[name] - value).abs().max() <= tolerance):  # faster
            torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance, msg=partial("{}: {}".format, name))


def check(name: str, plan: Plan, optimizer: str = "sgd", max_norm: float | None = None, **options: Any) -> None:
    """One of `MODELS` by a plan, held to serial training."""
    got = train(MODELS[name](), plan, batches(), optimizer=OPTIMIZERS[optimizer], max_norm=max_norm, **options)
    assert_alike(got, serial(name, optimizer, max_norm), TOLERANCES.get(name, TOLERANCE))
