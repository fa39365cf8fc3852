from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mplab.errors import MplabError
from mplab.models import GPT, MLP, GPTConfig
from mplab.parallel.profile import measuring_ranks, profile_layers
from mplab.plan.layer_cost import LayerCost
from mplab.world import World
from mplab.world.rungs import num_cores

TIMES = ("forward_s", "backward_s", "input_gradient_s", "weight_gradient_s", "update_s")
Batch = tuple[Tensor, Tensor]


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs, targets)


def batch_of(num_samples: int, num_features: int) -> Batch:
    return torch.randn(num_samples, num_features), torch.randn(num_samples, num_features)


def tokens(num_samples: int, length: int) -> Batch:
    x = torch.arange(num_samples * (length + 1)).reshape(num_samples, -1) % 17
    return x[:, :-1], x[:, 1:]


SMALL = GPTConfig(vocab_size=17, context_length=8, num_layers=2, num_heads=2, width=8)


# --- times, on a clock that only layers move ------------------------------------------------------------------------


class Clock:
    """Replaces the clock of marks."""

    now_ns = 0


class Tick(nn.Module):
    """Moves the clock in its forward and its backward."""

    def __init__(self, forward_ns: int, backward_ns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.forward_ns, self.backward_ns = forward_ns, backward_ns

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Ticking.apply(x, self.weight, self.forward_ns, self.backward_ns)
        return y


class Ticking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward_ns: int, backward_ns: int) -> Tensor:
        ctx.backward_ns = backward_ns
        Clock.now_ns += forward_ns
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        Clock.now_ns += ctx.backward_ns
        return grad, grad.sum(0), None, None


class TickingOptimizer:
    """11 ns a parameter."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.num_parameters = len(list(parameters))

    def step(self) -> None:
        Clock.now_ns += 11 * self.num_parameters


@pytest.fixture
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock.now_ns = 1
    monkeypatch.setattr(time, "perf_counter_ns", lambda: Clock.now_ns)


def slow_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    Clock.now_ns += 1000
    return mse(outputs, targets)


def ns(cost: LayerCost) -> list[int]:
    return [round(getattr(cost, name) * 1e9) for name in TIMES]


@pytest.mark.usefixtures("_clock")
def test_every_layer_gets_its_own_times_and_the_last_the_loss() -> None:
    model = nn.Sequential(Tick(3, 5), Tick(7, 11), Tick(13, 17))
    costs = profile_layers(model, batch_of(4, 3), 2, slow_mse, TickingOptimizer)  # type: ignore[arg-type]
    assert [cost.name for cost in costs] == ["0", "1", "2"]
    assert [ns(cost)[:2] for cost in costs] == [[3, 5], [7, 11], [1013, 17]]
    assert [ns(cost)[2] for cost in costs] == [5, 11, 17]  # nothing is put off
    assert [ns(cost)[4] for cost in costs] == [11, 11, 11]


@pytest.mark.usefixtures("_clock")
def test_before_the_first_layer_that_is_trained_there_is_no_backward() -> None:
    model = nn.Sequential(Tick(3, 5), Tick(7, 11), Tick(13, 17))
    model[0].requires_grad_(False)
    costs = profile_layers(model, batch_of(4, 3), 2, mse, TickingOptimizer)  # type: ignore[arg-type]
    assert [ns(cost)[1] for cost in costs] == [0, 11, 17]
    assert [ns(cost)[4] for cost in costs] == [0, 11, 11]
    frozen = profile_layers(model.requires_grad_(False), batch_of(4, 3), 2, mse, TickingOptimizer)  # type: ignore[arg-type]
    assert [ns(cost) for cost in frozen] == [[3, 0, 0, 0, 0], [7, 0, 0, 0, 0], [13, 0, 0, 0, 0]]


@pytest.mark.usefixtures("_clock")
def test_weight_gradients_that_are_put_off_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from mplab.parallel.backward import PutOff

    compute = PutOff.compute

    def slow(self: PutOff) -> None:
        Clock.now_ns += 100 * len(self._waiting)
        compute(self)

    monkeypatch.setattr(PutOff, "compute", slow)
    model = nn.Sequential(Tick(3, 5), nn.Linear(3, 3), Tick(13, 17))
    costs = profile_layers(model, batch_of(4, 3), 2, mse, TickingOptimizer)  # type: ignore[arg-type]
    assert [ns(cost)[2:4] for cost in costs] == [[5, 0], [0, 100], [17, 0]]


@pytest.mark.usefixtures("_clock")
def test_the_median_of_the_repeats_counts_and_the_first_one_does_not() -> None:
    repeats = [10**6, 50, 900, 70]  # each has 5 forwards of one chain and 5 of the other
    lengths = iter([n for n in repeats for _ in range(10)] + [0] * 10)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        Clock.now_ns += next(lengths)
        return mse(outputs, targets)

    (cost,) = profile_layers(nn.Sequential(Tick(0, 1)), batch_of(4, 3), 2, loss, TickingOptimizer, num_repeats=3)  # type: ignore[arg-type]
    assert ns(cost)[:2] == [70, 1]


@pytest.mark.usefixtures("_clock")
def test_layers_add_up_to_the_median_of_their_sums() -> None:
    """Each repeat another layer is disturbed: no layer's median shows it, and every step has it."""
    calls = {0: 0, 1: 0, 2: 0}

    class Disturbed(Tick):
        def forward(self, x: Tensor) -> Tensor:
            index = int(self.forward_ns)
            repeat = calls[index] // 10 - 1  # after the warm-up
            calls[index] += 1
            Clock.now_ns += 60 if repeat % 3 == index else 30
            y: Tensor = Ticking.apply(x, self.weight, 0, 1)
            return y

    model = nn.Sequential(*(Disturbed(i, 1) for i in range(3)))
    costs = profile_layers(model, batch_of(4, 3), 2, mse, TickingOptimizer, num_repeats=3)  # type: ignore[arg-type]
    assert [ns(cost)[0] for cost in costs] == [40, 40, 40]


# --- bytes ----------------------------------------------------------------------------------------------------------


def test_bytes_of_an_mlp_worked_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2, bias=False))
    batch = torch.randn(8, 3), torch.randint(2, (8,))
    first, gelu, last = profile_layers(model, batch, 2)
    assert (first.output_bytes, gelu.output_bytes, last.output_bytes) == (4 * 5 * 4, 4 * 5 * 4, 4)
    assert (first.parameter_bytes, gelu.parameter_bytes, last.parameter_bytes) == ((15 + 5) * 4, 0, 10 * 4)
    assert first.activation_bytes == 4 * 3 * 4  # its input; the weight is saved too, and is no activation
    assert gelu.activation_bytes == 4 * 5 * 4
    # its input, log-probabilities, the targets, and the weight of their mean
    assert last.activation_bytes == 4 * 5 * 4 + 4 * 2 * 4 + 4 * 8 + 4


def test_what_a_layer_saves_of_its_output_counts_as_the_next_ones_input() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    first, tanh, _ = profile_layers(model, batch_of(4, 3), 2, mse)
    assert first.activation_bytes == 2 * 3 * 4
    assert tanh.activation_bytes == 2 * 3 * 4  # its input; tanh keeps its output, which the last layer counts


def test_a_view_of_what_is_held_is_held_once() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp() * x.t().t()

    (cost,) = profile_layers(nn.Sequential(Twice()), batch_of(8, 3), 2, mse)
    # x, exp(x), and for the loss the product and the targets; no product of nothing trained is held
    assert cost.activation_bytes == 4 * 3 * 4
    model = nn.Sequential(nn.Linear(3, 3), Twice())
    assert profile_layers(model, batch_of(8, 3), 2, mse)[1].activation_bytes == 4 * (4 * 3 * 4)


def test_a_gpt_is_profiled_layer_by_layer_tied_weights_in_both() -> None:
    costs = profile_layers(GPT(SMALL), tokens(4, 8), 2)
    assert [cost.name for cost in costs] == ["embedding", "blocks.0", "blocks.1", "head"]
    assert costs[0].parameter_bytes == (17 + 8) * 8 * 4
    assert costs[3].parameter_bytes == (17 * 8 + 16) * 4
    assert [cost.output_bytes for cost in costs] == [2 * 8 * 8 * 4] * 3 + [4]
    assert costs[1].activation_bytes == costs[2].activation_bytes > 2 * 8 * 8 * 4
    assert all(getattr(cost, name) > 0 for cost in costs for name in TIMES)


# --- nothing else changes -------------------------------------------------------------------------------------------


def profiled(model: nn.Module, batch: Batch) -> list[LayerCost]:
    return profile_layers(model, batch, 2, mse)


def noisy() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3))


def test_the_model_and_the_random_numbers_stay_as_they_were() -> None:
    model, batch = noisy(), batch_of(8, 3)
    model[3].eval()
    model[0].weight.grad = torch.full((3, 3), 7.0)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    classes, inputs, state = [type(m) for m in model.modules()], batch[0].clone(), torch.get_rng_state()
    profiled(model, batch)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert classes == [type(m) for m in model.modules()]
    assert torch.equal(model[0].weight.grad, torch.full((3, 3), 7.0))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")
    assert torch.equal(batch[0], inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_that_works_in_place_does_not_change_the_batch() -> None:
    batch = batch_of(8, 3)
    inputs = batch[0].clone()
    profiled(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3), nn.ReLU(inplace=True)), batch)
    assert torch.equal(batch[0], inputs)


# --- on the ranks of a world ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_measure_at_once_and_agree(num_ranks: int) -> None:
    world = World(num_ranks, "cpu")
    costs = profile_layers(MLP((3, 4, 2)), (torch.randn(4, 3), torch.tensor([0, 1, 1, 0])), 2, world=world)
    assert all(cost.forward_s > 0 for cost in costs)
    assert measuring_ranks(world) == set(range(min(num_ranks, num_cores())))


def test_of_the_ranks_of_one_gpu_one_measures() -> None:
    class Streams:
        size = 4
        devices = tuple(torch.device("cuda", i % 2) for i in range(4))

    assert measuring_ranks(Streams()) == {0, 1}  # type: ignore[arg-type]


def test_random_numbers_stay_as_they_were_with_many_ranks() -> None:
    model, batch = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3)), batch_of(8, 3)
    state = torch.get_rng_state()
    profile_layers(model, batch, 2, mse, world=World(2, "cpu"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: profile_layers(MLP((3, 2)), batch_of(4, 3), 5), "5 micro-batches of 4 samples"),
        (lambda: profile_layers(MLP((3, 2)), batch_of(4, 3), 0), "0 micro-batches"),
        (lambda: profile_layers(MLP((3, 2)), batch_of(4, 3), 2, num_repeats=0), "0 repeats"),
        (lambda: profile_layers(nn.Linear(3, 2), batch_of(4, 3), 2), "chain"),
    ],
)
def test_what_cannot_be_profiled_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(MplabError, match=message):
        call()
