"""A backward in two parts gives the gradients of an ordinary one, and puts the weights' off to the second part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import leaves_nothing_behind as leaves_nothing_behind
from pipelines import chain
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from mplab import World
from mplab.models import GPT, GPTConfig
from mplab.parallel import tensor_parallel
from mplab.parallel.backward import PutOff, SplitBackward


def numbers(*shape: int, seed: int = 0, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=requires_grad)


def linear(num_in: int = 3, num_out: int = 5, bias: bool = True) -> nn.Linear:
    with torch.device("meta"):
        module = nn.Linear(num_in, num_out, bias).double()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=seed + 5))
    return module


def conv1d() -> nn.Module:
    """Hugging Face's linear layer of GPT-2: the weight lies the other way."""
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        module: nn.Module = transformers.pytorch_utils.Conv1D(5, 3).double()
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=seed + 5))
    return module


def gradients(module: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Of the parameters, each once, and of the input; and forget them."""
    found = [p.grad for p in module.parameters()] + [x.grad]
    module.zero_grad()
    x.grad = None
    return found


def split(module: nn.Module) -> tuple[Any, SplitBackward]:
    """A copy whose backward is in two parts."""
    twin = copy.deepcopy(module)
    return twin, SplitBackward(twin)


def assert_equal_gradients(module: nn.Module, x: Tensor, run: Callable[[Any, Tensor], Tensor] | None = None) -> int:
    """Twice over: the second time gradients are added to those that are there.

    Returns:
        How many layers' gradients were put off in each.
    """
    run = run or (lambda module, x: module(x))
    twin, two_parts = split(module)
    for seed in (7, 8):
        y = run(module, x)
        y.backward(numbers(*y.shape, seed=seed).to(y.dtype))
    want = gradients(module, x)
    for seed in (7, 8):
        two_parts.put_off = put_off = PutOff()
        y = run(twin, x)
        y.backward(numbers(*y.shape, seed=seed).to(y.dtype))
        num_waiting = len(put_off._waiting)
        assert seed == 8 or all(weight.grad is None for weight, *_ in put_off._waiting)
        put_off.compute()
        assert not put_off._waiting
    for got, expected in zip(gradients(twin, x), want, strict=True):
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
            assert got.shape == expected.shape
    return num_waiting


# --- the same gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3), (2, 1, 4, 3), (1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer(bias: bool, shape: tuple[int, ...]) -> None:
    assert assert_equal_gradients(linear(bias=bias), numbers(*shape, requires_grad=True)) == 1


@pytest.mark.parametrize("make", [linear, lambda: conv1d()], ids=["linear", "conv1d"])
def test_complex_numbers(make: Callable[[], nn.Module]) -> None:
    """The gradient of a weight has the conjugate of the input."""
    module = make()
    for name, p in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(p.detach() * (1 + 0.5j)))
    x = torch.complex(numbers(4, 3), numbers(4, 3, seed=1)).requires_grad_()
    assert assert_equal_gradients(module, x) == 1


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_a_linear_layer_of_gpt_2(shape: tuple[int, ...]) -> None:
    assert assert_equal_gradients(conv1d(), numbers(*shape, requires_grad=True)) == 1


@pytest.mark.parametrize("make", [linear, conv1d])
def test_a_first_layer_has_no_input_gradient_to_give(make: Callable[[], nn.Module]) -> None:
    """Nobody waits for it: nothing is put off."""
    assert assert_equal_gradients(make(), numbers(4, 3)) == 0


@pytest.mark.parametrize("frozen", [["bias"], ["weight"], ["weight", "bias"]])
@pytest.mark.parametrize("make", [linear, conv1d])
def test_what_is_frozen_stays_without_a_gradient(make: Callable[[], nn.Module], frozen: list[str]) -> None:
    module = make()
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    assert_equal_gradients(module, numbers(4, 3, requires_grad=True))


def test_a_layer_that_is_used_twice() -> None:
    x = numbers(4, 3, requires_grad=True)
    assert assert_equal_gradients(linear(3, 3), x, lambda module, x: module(torch.tanh(module(x)))) == 2


def test_a_layer_that_stands_in_two_places() -> None:
    one = linear(3, 3)
    assert assert_equal_gradients(nn.Sequential(one, nn.Tanh(), one), numbers(4, 3, requires_grad=True)) == 2


def test_a_weight_of_two_layers() -> None:
    """Of an embedding, too, whose gradient is not put off: they add up."""
    model = chain(4, tied=True)
    twin, two_parts = split(model)
    assert twin[3].weight is twin[0].weight
    tokens = torch.tensor([[1, 2, 3], [3, 0, 6]])
    for run in (model, twin):
        run(tokens).backward(numbers(2, 3, 7))
    two_parts.put_off.compute()
    for got, want in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_an_input_that_is_used_elsewhere() -> None:
    """The output's gradient is kept for later, and must not be added to meanwhile."""
    x = numbers(4, 3, requires_grad=True)
    assert_equal_gradients(linear(3, 3), x, lambda module, x: x + module(x) + 2 * x)
    assert_equal_gradients(linear(3, 3), x, lambda module, x: (x + module(x)) * (x + module(x)))


def test_outputs_that_are_changed_in_place() -> None:
    """What is kept is the gradient of the output as it was."""
    x = numbers(4, 3, requires_grad=True)
    assert_equal_gradients(linear(3, 3), x, lambda module, x: module(x).relu_())
    assert_equal_gradients(linear(3, 3), x, lambda module, x: module(module(x).add_(x)).mul_(2))


def test_strange_layouts() -> None:
    x = numbers(3, 4, requires_grad=True)
    assert_equal_gradients(linear(), x, lambda module, x: module(x.T))
    assert_equal_gradients(linear(), x, lambda module, x: module(x.T[::2]).T)
    x = numbers(1, 3, requires_grad=True)
    assert_equal_gradients(linear(), x, lambda module, x: module(x.expand(4, 3)).sum())


@given(
    shape=st.lists(st.integers(1, 3), max_size=3), num_out=st.integers(1, 4), bias=st.booleans(), first=st.booleans()
)
@settings(max_examples=30)
def test_layers_of_any_size(shape: list[int], num_out: int, bias: bool, first: bool) -> None:
    assert_equal_gradients(linear(3, num_out, bias), numbers(*shape, 3, requires_grad=not first))


def test_a_model() -> None:
    model = GPT(GPTConfig(vocab_size=7, context_length=4, num_layers=2, num_heads=2, width=8, tied=False)).double()
    twin, two_parts = split(model)
    tokens = torch.tensor([[1, 2, 3], [3, 0, 6]])
    model(tokens).backward(numbers(2, 3, 7))
    twin(tokens).backward(numbers(2, 3, 7))
    num_linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert sum(p.grad is None for p in twin.parameters() if p.dim() > 1) == num_linear > 8
    two_parts.put_off.compute()
    for got, want in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert list(twin.state_dict()) == list(model.state_dict())


# --- what has nothing to put off, or can't ---------------------------------------------------------------------------


class Conv1D(nn.Module):
    """Of the same name as GPT-2's, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(numbers(3, 3, 1, seed=1)), nn.Parameter(numbers(3, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv1d(x.T, self.weight, self.bias).T


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_other_classes_are_left_alone() -> None:
    x = numbers(4, 3, requires_grad=True)
    assert assert_equal_gradients(Conv1D(), x) == 0
    own = linear(3, 3)
    own.__class__ = Own
    assert assert_equal_gradients(own, x) == 0


def test_weights_that_are_computed_from_others() -> None:
    with torch.random.fork_rng(devices=[]):
        norms = [nn.utils.spectral_norm(linear(3, 3)), nn.utils.parametrizations.weight_norm(linear(3, 3))]
    for module in norms:
        module.eval()
        assert assert_equal_gradients(module, numbers(4, 3, requires_grad=True)) == 0


def test_attention_takes_its_weights_itself() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True).double()
    assert assert_equal_gradients(model, numbers(2, 5, 4, requires_grad=True)) == 2


@pytest.mark.parametrize("make", [linear, conv1d])
def test_a_bias_that_is_broadcast(make: Callable[[], nn.Module]) -> None:
    """One number for all outputs: its gradient is one number."""
    module: Any = make()
    module.bias = nn.Parameter(numbers(1, seed=3))
    assert_equal_gradients(module, numbers(4, 3, requires_grad=True))


def test_a_vector_has_no_batch_to_sum_over() -> None:
    assert assert_equal_gradients(linear(), numbers(3, requires_grad=True)) == 0


def test_under_autocast_nothing_is_put_off() -> None:
    """Weights are cast before they are used there, and are not what the gradient is of."""

    def run(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = module(x)
        assert y.dtype == torch.bfloat16
        return y

    assert assert_equal_gradients(linear().float(), numbers(4, 3).float().requires_grad_(), run) == 0


def test_without_gradients_nothing_is_kept() -> None:
    module, two_parts = split(linear())
    x = numbers(4, 3, requires_grad=True)
    with torch.no_grad():
        y = module(x)
    assert not y.requires_grad
    assert torch.equal(y, linear()(x))
    assert not two_parts.put_off._waiting


# --- what it is for --------------------------------------------------------------------------------------------------


def test_the_first_part_gives_the_input_its_gradient_and_the_weights_none() -> None:
    module, x = chain()[1], numbers(2, 3, 4, requires_grad=True)
    module(x).sum().backward()
    want, x.grad = x.grad, None
    twin, two_parts = split(module)
    twin.zero_grad()
    twin(x).sum().backward()
    torch.testing.assert_close(x.grad, want)
    assert all(parameter.grad is None for parameter in twin.parameters())
    two_parts.put_off.compute()
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_micro_batches_are_finished_in_any_order() -> None:
    """Each has what its own forward and backward gave, also where forwards come first."""
    module, two_parts = split(linear())
    xs = [numbers(4, 3, seed=seed, requires_grad=True) for seed in range(3)]
    ys, parts = [], []
    for x in xs:
        two_parts.put_off = PutOff()
        parts.append(two_parts.put_off)
        ys.append(module(x))
    for y in ys:
        y.sum().backward()
    assert [len(put_off._waiting) for put_off in parts] == [1] * 3
    for put_off in (parts[1], parts[2], parts[0], parts[1]):
        put_off.compute()  # the second time nothing is left to add
    torch.testing.assert_close(module.weight.grad, torch.cat(xs).sum(0).expand(5, 3))


def test_nothing_is_kept_after_the_end() -> None:
    """The input and the output's gradient can go."""
    module, two_parts = split(linear())
    x, grad = numbers(4, 3, requires_grad=True), numbers(4, 5)
    h = x * 2
    y = module(h)
    kept = [StorageWeakRef(x.untyped_storage()) for x in (h, grad)]
    y.backward(grad)
    del h, grad, y
    assert [ref.expired() for ref in kept] == [False, False]
    two_parts.put_off.compute()
    assert [ref.expired() for ref in kept] == [True, True]


def test_gradients_are_no_part_of_a_graph() -> None:
    module, two_parts = split(linear())
    module(numbers(4, 3, requires_grad=True)).sum().backward()
    two_parts.put_off.compute()
    assert not module.weight.grad.requires_grad
    assert not module.bias.grad.requires_grad


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_layers_that_are_cut_over_a_tensor_axis(sequence_parallel: bool, num_ranks: int) -> None:
    """Their products are put off as those of whole layers are, and their messages are not."""
    model = GPT(GPTConfig(vocab_size=8, context_length=4, num_layers=1, num_heads=2, width=8)).double()
    tokens = torch.arange(8).view(2, 4)

    def gradients_of(rank: Any, is_split: bool) -> tuple[list[Tensor], list[Tensor], int, list[str]]:
        cut = tensor_parallel(model, rank.comm, sequence_parallel=sequence_parallel)
        two_parts = SplitBackward(cut) if is_split else None
        before = len(rank.comm.ledger.messages)
        cut(tokens).square().sum().backward()
        first = [p for p in cut.parameters() if p.grad is None]
        num_off = 0 if two_parts is None else len(two_parts.put_off._waiting)
        if two_parts is not None:
            two_parts.put_off.compute()
        said = [message.op for message in rank.comm.ledger.messages[before:]]
        return [p.grad for p in cut.parameters() if p.grad is not None], first, num_off, said

    world = World(num_ranks, "cpu")
    whole, parts = world.run(gradients_of, False), world.run(gradients_of, True)
    for (want, _, _, said), (got, late, num_off, said_too) in zip(whole, parts, strict=True):
        torch.testing.assert_close(got, want)
        assert num_off == 7  # query, key, value, output, up, down, and the head
        # of each its weight, tied in the head's case to what the embedding has already; of those by columns the bias
        assert len(late) == 6 + 4
        assert said == said_too
