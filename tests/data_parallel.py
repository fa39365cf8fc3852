"""What tests of data parallelism share: small models, batches, and serial training to hold every variant to.

All models take the same token ids, so that one set of batches serves them all. `serial(..., num_microbatches=n)` adds
up its gradients in the order in which n ranks do: ranks that sum whole gradients equal it to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from pipelines import VOCABULARY, WIDTH, Mixer
from torch import Tensor, nn

from mplab.datasets import Batch
from mplab.models import seed_parameters
from mplab.parallel import Serial

LENGTH = 3
NUM_SAMPLES, NUM_STEPS = 11, 10  # 11 is divided by no number of ranks but 1

# What is left of rounding after ten steps, where sums are taken in another order.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-6}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}

# --- models ----------------------------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """Over the positions; the channels come last before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.conv(x.transpose(1, 2))).transpose(1, 2)


class Unused(nn.Module):
    """Has a layer that no sample ever comes to."""

    def __init__(self) -> None:
        super().__init__()
        self.forgotten = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Branch(nn.Module):
    """The whole model: samples that begin with token 0 go through one more layer, which is not called without any."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.rare = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        is_rare = ids[:, 0] == 0
        if is_rare.any():
            x = torch.where(is_rare[:, None, None], torch.tanh(self.rare(x)), x)
        return self.head(x)


def _chain(*between: Callable[[], nn.Module], bias: bool = True) -> nn.Sequential:
    """Embedding, mixer, what is between, mixer, norm, head."""
    made = [factory() for factory in between]
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), Mixer(), *made, Mixer(), nn.LayerNorm(WIDTH), head)


def _frozen() -> nn.Module:
    """A layer, a weight whose bias is trained, and a bias whose weight is."""
    made = _chain()
    made[1].requires_grad_(False)
    made[2].up.weight.requires_grad_(False)
    made[-1].bias.requires_grad_(False)
    return made


def _used_twice() -> nn.Module:
    mixer = Mixer()
    return _chain(lambda: mixer, lambda: nn.Tanh(), lambda: mixer)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": _chain,
    "conv": partial(_chain, Convolution),
    "tied": partial(_chain, bias=False),  # its head's weight is its embedding's
    "frozen": _frozen,
    "used twice": _used_twice,
    "unused": partial(_chain, Unused),  # a parameter that is never used
    "branch": Branch,  # parameters used for some samples only: on some ranks only, and in some steps by nobody
}


def model(variant: str = "plain", dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """One of `MODELS`, with weights from their names alone, and nothing drawn from the global generator.

    Args:
        variant: which of them.
        dtype: of its parameters.
        seed: another one gives other weights, as for ranks that have to be told where to begin.
    """
    with torch.device("meta"):
        made = MODELS[variant]()
    made.to_empty(device="cpu")
    if variant == "tied":
        made[-1].weight = made[0].weight
    seed_parameters(made.to(dtype), seed)
    return made


# --- batches ---------------------------------------------------------------------------------------------------------


@cache
def batches(num_samples: int = NUM_SAMPLES, num_batches: int = NUM_STEPS) -> tuple[Batch, ...]:
    """Token ids and the ids to predict, each (num_samples, 3).

    Of three batches the first has token 0 at the start of its first and last sample, the second of its first alone, and
    the third of none: what "branch" uses differs between ranks and between steps.
    """
    generator = torch.Generator().manual_seed(1)
    made = []
    for step in range(num_batches):
        inputs, targets = (torch.randint(VOCABULARY, (num_samples, LENGTH), generator=generator) for _ in range(2))
        inputs[:, 0].clamp_(min=1)
        if step % 3 < 2:
            inputs[0, 0] = 0
        if step % 3 == 0:
            inputs[-1, 0] = 0
        made.append((inputs, targets))
    return tuple(made)


# --- serial training, and what must equal it -------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What training came to, step by step; every list has one element a step, but `weights` begins with the start."""

    losses: list[float]
    gradients: list[dict[str, Tensor | None]]
    weights: list[dict[str, Tensor]]


def follow(step: Callable[[Batch], float], trained: nn.Module, data: Sequence[Batch]) -> Trained:
    """Take one step a batch, and keep what came of each."""
    seen = Trained([], [], [_weights(trained)])
    for batch in data:
        seen.losses.append(step(batch))
        named = trained.named_parameters(remove_duplicate=False)
        seen.gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in named})
        seen.weights.append(_weights(trained))
    return seen


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@cache
def serial(
    variant: str = "plain",
    optimizer: str = "sgd",
    num_microbatches: int = 1,
    dtype: torch.dtype = torch.float64,
    num_samples: int = NUM_SAMPLES,
    num_steps: int = NUM_STEPS,
    max_norm: float | None = None,
    seed: int = 0,
) -> Trained:
    """Serial training of a model on `batches(num_samples, num_steps)`, on one thread like a rank's.

    Args:
        variant: of `MODELS`.
        optimizer: of `OPTIMIZERS`.
        num_microbatches: as many as ranks, to add up in their order; not more than there are samples.
        dtype: of the parameters.
        num_samples: in each batch.
        num_steps: updates.
        max_norm: as in `Serial`.
        seed: of the weights.
    """
    trained = model(variant, dtype, seed)
    with one_thread():
        of_parameters = OPTIMIZERS[optimizer](trained.parameters())
        options = {"num_microbatches": min(num_microbatches, num_samples), "max_norm": max_norm}
        return follow(Serial(trained, of_parameters, **options).step, trained, batches(num_samples, num_steps))


@contextmanager
def one_thread() -> Iterator[None]:
    """A matrix product of two threads may be rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_trained_alike(got: Trained, want: Trained, tolerance: float = 0.0) -> None:
    """Losses, gradients and weights of every step; with tolerance 0 to the bit.

    But for the losses: `Serial` adds up their shares in their own dtype, and ranks may do so in a wider one.
    """
    losses = [torch.tensor(trained.losses, dtype=torch.float64) for trained in (got, want)]
    dtype = next(iter(want.weights[0].values())).dtype
    _close(*losses, max(tolerance, 8 * torch.finfo(dtype).eps), "losses")
    for step, (mine, theirs) in enumerate(zip(got.gradients, want.gradients, strict=True)):
        assert list(mine) == list(theirs)
        for name, gradient in theirs.items():
            assert (mine[name] is None) == (gradient is None), f"gradient of {name} after step {step}"
            if gradient is not None:
                _close(mine[name], gradient, tolerance, f"gradient of {name} after step {step}")
    for step, (mine, theirs) in enumerate(zip(got.weights, want.weights, strict=True)):
        assert list(mine) == list(theirs)
        for name, weight in theirs.items():
            _close(mine[name], weight, tolerance, f"{name} after {step} steps")


def _close(got: Tensor | None, want: Tensor, tolerance: float, what: str) -> None:
    is_alike = got is not None and got.dtype == want.dtype and got.shape == want.shape and got.numel() > 0
    # A tenth of the time that the last line takes; most of what is compared is equal to the bit.
    if not (is_alike and (torch.equal(got, want) or (got - want).abs().max() <= tolerance)):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance, msg=lambda text: f"{what}: {text}")
