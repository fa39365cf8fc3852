"""Serial training: the oracle, held to a loop written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from mplab.datasets import Batch, text
from mplab.errors import MplabError
from mplab.models import GPT, MLP, GPTConfig, cross_entropy
from mplab.parallel import Serial

SMALL = GPTConfig(context_length=8, num_layers=1, num_heads=2, width=8)
DATA = text(batch_size=7, sequence=8)


def gpt() -> nn.Module:
    return GPT(SMALL).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD, so that a gradient of the wrong scale shows in the weights."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def by_hand(model: nn.Module, batches: list[Batch]) -> list[float]:
    """Whole batches, no class, no options."""
    optimizer, losses = sgd(model), []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs).transpose(1, 2), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_steps_are_those_of_the_loop_by_hand() -> None:
    model, reference = gpt(), gpt()
    serial = Serial(model, sgd(model))
    losses = [serial.step(batch) for batch in DATA.batches(4)]
    assert losses == pytest.approx(by_hand(reference, list(DATA.batches(4))), rel=1e-12)
    assert all(type(loss) is float for loss in losses)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(mine.grad, theirs.grad)  # still there after the step


@given(num_microbatches=st.integers(1, 7), num_samples=st.integers(1, 7))
@settings(max_examples=25)
def test_accumulation_equals_the_whole_batch(num_microbatches: int, num_samples: int) -> None:
    """For every division, equal or not: a micro-batch weighs as many samples as it has."""
    num_microbatches = min(num_microbatches, num_samples)
    results = []
    for parts in (1, num_microbatches):
        model = gpt()
        serial = Serial(model, sgd(model), num_microbatches=parts)
        losses = [serial.step((x[:num_samples], y[:num_samples])) for x, y in DATA.batches(2)]
        results.append((losses, [parameter.detach() for parameter in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1])


def test_micro_batches_are_as_many_as_asked_for() -> None:
    sizes = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(outputs))
        return functional.cross_entropy(outputs.transpose(1, 2), targets)

    model = gpt()
    Serial(model, sgd(model), loss, num_microbatches=3).step(DATA.batch(0))
    assert sizes == [3, 2, 2]


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_a_long_gradient_is_clipped_and_a_short_one_is_not(num_microbatches: int) -> None:
    def gradient(max_norm: float | None) -> Tensor:
        model = gpt()
        Serial(model, sgd(model), num_microbatches=num_microbatches, max_norm=max_norm).step(DATA.batch(0))
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    free = gradient(None)
    length = free.norm().item()
    torch.testing.assert_close(gradient(2 * length), free)
    clipped = gradient(length / 2)
    torch.testing.assert_close(clipped, free / 2, rtol=1e-4, atol=1e-9)


def test_frozen_parameters_stay_and_do_not_disturb() -> None:
    model = gpt()
    frozen = model.get_parameter("embedding.position.weight").requires_grad_(False)
    before = frozen.clone()
    Serial(model, sgd(model), num_microbatches=2, max_norm=1.0).step(DATA.batch(0))
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_twice_gives_the_same_losses_and_weights(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    runs = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        model = GPT(SMALL)
        serial = Serial(model, optimizer(model.parameters(), lr=1e-2), num_microbatches=2)
        runs.append(([serial.step(batch) for batch in DATA.batches(3)], model.state_dict()))
    assert runs[0][0] == runs[1][0]
    for name, weight in runs[0][1].items():
        assert torch.equal(weight, runs[1][1][name])


def test_the_loss_goes_down() -> None:
    model = GPT(SMALL)
    serial = Serial(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = [serial.step(batch) for batch in DATA.batches(30)]
    assert losses[-1] < losses[0] - 1


def test_evaluation_weighs_samples_and_changes_nothing() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        graphs.append(outputs.requires_grad)
        return cross_entropy(outputs, targets)

    graphs: list[bool] = []
    model = gpt()
    serial = Serial(model, sgd(model), loss)
    before = [parameter.clone() for parameter in model.parameters()]
    inputs, targets = DATA.batch(0)
    whole = serial.evaluate([(inputs, targets)])
    assert serial.evaluate([(inputs[:6], targets[:6]), (inputs[6:], targets[6:])]) == pytest.approx(whole)
    assert graphs == [False] * 3
    assert all(parameter.grad is None for parameter in model.parameters())
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    assert serial.step((inputs, targets)) == pytest.approx(whole)


def test_a_classifier_trains_the_same_way() -> None:
    model = MLP((3, 4, 2))
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    serial = Serial(model, sgd(model))
    losses = [serial.step((inputs, (inputs.sum(1) > 0).long())) for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.gpu
def test_a_gpu_gives_the_losses_of_the_cpu() -> None:
    losses = []
    for device in ("cpu", "cuda"):
        model = gpt().to(device)
        serial = Serial(model, sgd(model), num_microbatches=2, max_norm=1.0)
        losses.append([serial.step(batch) for batch in DATA.batches(3)])  # the batches are on the CPU
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# Mistakes


def test_a_batch_smaller_than_its_parts_is_refused_before_anything_changes() -> None:
    model = gpt()
    inputs, targets = DATA.batch(0)
    with pytest.raises(MplabError, match="a batch of 2 samples can't be cut in 3 micro-batches"):
        Serial(model, sgd(model), num_microbatches=3).step((inputs[:2], targets[:2]))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_empty_batch_is_refused() -> None:
    model = gpt()
    inputs, targets = DATA.batch(0)
    with pytest.raises(MplabError, match="a batch of 0 samples"):
        Serial(model, sgd(model)).step((inputs[:0], targets[:0]))
    with pytest.raises(MplabError, match="evaluate got no samples"):
        Serial(model, sgd(model)).evaluate([])


def test_inputs_and_targets_of_different_lengths_are_refused() -> None:
    model = gpt()
    inputs, targets = DATA.batch(0)
    with pytest.raises(MplabError, match="7 inputs and 6 targets"):
        Serial(model, sgd(model)).step((inputs, targets[:6]))


def test_no_micro_batch_and_no_norm_are_refused() -> None:
    model = gpt()
    with pytest.raises(MplabError, match="num_microbatches 0: must be 1 or more"):
        Serial(model, sgd(model), num_microbatches=0)
    for max_norm in (0.0, -1.0, float("nan")):
        with pytest.raises(MplabError, match=r"max_norm .*: must be above 0"):
            Serial(model, sgd(model), max_norm=max_norm)
