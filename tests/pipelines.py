"""What tests of pipelines share: small models, batches, orders of their own, and serial training to hold them to.

Everything is in float64, so that a tolerance of 1e-10 tells a wrong scale or a lost gradient from rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator
from mplab.datasets import Batch
from mplab.models import cross_entropy, seed_parameters
from mplab.parallel import PipelineParallel, Serial
from mplab.plan.schedule import ORDERS, Action, Order

WIDTH, VOCABULARY = 4, 7
TOLERANCE = 1e-10

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.3, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
}


class Mixer(nn.Module):
    """x + down(tanh(up(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def chain(num_layers: int = 8, tied: bool = False, frozen: Sequence[int] = (), seed: int = 0) -> nn.Sequential:
    """Embedding, mixers, norm, head; weights from their names alone, and nothing drawn from the global generator."""
    with torch.device("meta"):
        mixers = [Mixer() for _ in range(num_layers - 3)]
        head = nn.Linear(WIDTH, VOCABULARY, bias=not tied)
        model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *mixers, nn.LayerNorm(WIDTH), head).double()
    model.to_empty(device="cpu")
    if tied:
        head.weight = model[0].weight
    seed_parameters(model, seed)
    for index in frozen:
        model[index].requires_grad_(False)
    return model


@cache
def batches(num_samples: int = 11, num_batches: int = 3) -> tuple[Batch, ...]:
    """Token ids and the ids to predict; 11 samples are divided by no number of micro-batches but 1."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randint, VOCABULARY, (num_samples, 3), generator=generator)
    return tuple((draw(), draw()) for _ in range(num_batches))


# --- orders that are none of the library's ---------------------------------------------------------------------------


def last_first(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """GPipe with the backwards of the last micro-batch first: messages are not read in the order they are sent in."""
    for j in range(num_microbatches):
        yield Action(rank, "F", j if rank % 2 else num_microbatches - 1 - j)
    for j in reversed(range(num_microbatches)):
        yield Action(rank, "B", j)


def folded(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """Stages go down and up again: rank 0 has the first and the last one. Every other backward is in two parts."""
    down, up = rank, 2 * num_ranks - 1 - rank
    for j in range(num_microbatches):
        kinds = "IW" if j % 2 else "B"
        yield Action(down, "F", j)
        yield Action(up, "F", j)
        yield from (Action(up, kind, j) for kind in kinds)  # type: ignore[arg-type]
        yield from (Action(down, kind, j) for kind in kinds)  # type: ignore[arg-type]


ALL_ORDERS: dict[str, Order] = {**ORDERS, "last_first": last_first, "folded": folded}


def stages_a_rank(order: str) -> int:
    return 2 if order in ("interleaved", "folded") else 1


# --- serial training, and what must equal it -------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What serial training came to."""

    start: dict[str, Tensor]
    losses: list[float]
    gradients: dict[str, Tensor | None]  # after the first step
    weights: dict[str, Tensor]  # at the end


def train_serially(
    model: nn.Module,
    data: Sequence[Batch],
    optimizer: Callable[..., torch.optim.Optimizer],
    loss_fn: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Trained:
    """On whole batches: whatever a pipeline's micro-batches are, this is the one answer. Changes the model."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    serial = Serial(model, optimizer(model.parameters()), loss_fn)
    losses, gradients = [], {}
    for batch in data:
        losses.append(serial.step(batch))
        gradients = gradients or gradients_of(model)
    return Trained(start, losses, gradients, model.state_dict())


@cache
def serial_chain(optimizer: str = "sgd", num_batches: int = 3, **options: Any) -> Trained:
    """Serial training of a `chain`, once for all tests that need it."""
    return train_serially(chain(**options), batches(num_batches=num_batches), OPTIMIZERS[optimizer])


def gradients_of(module: nn.Module) -> dict[str, Tensor | None]:
    named = module.named_parameters(remove_duplicate=False)
    return {name: None if p.grad is None else p.grad.clone() for name, p in named}


def assert_gradients(pipe: PipelineParallel, trained: Trained, tolerance: float = TOLERANCE) -> None:
    """This rank's gradients, all of them, are serial training's after its first step."""
    for stage in pipe.stages.values():
        for name, got in gradients_of(stage).items():
            want = trained.gradients[name]
            assert (got is None) == (want is None), name
            if got is not None and want is not None:
                close(got, want, tolerance, f"gradient of {name}")


def assert_weights(pipe: PipelineParallel, trained: Trained, tolerance: float = TOLERANCE) -> None:
    """The state_dict is serial training's, under the same names in the same order."""
    weights = pipe.state_dict()
    assert list(weights) == list(trained.weights)
    for name, want in trained.weights.items():
        close(weights[name], want, tolerance, name)


def assert_losses(losses: Sequence[float], trained: Trained, tolerance: float = TOLERANCE) -> None:
    close(
        torch.tensor(losses, dtype=torch.float64), torch.tensor(trained.losses, dtype=torch.float64), tolerance, "loss"
    )


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance, msg=lambda text: f"{what}: {text}")


def assert_trains_alike(
    comm: Communicator,
    model: nn.Module,
    trained: Trained,
    cuts: Sequence[int],
    data: Sequence[Batch],
    tolerance: float = TOLERANCE,
    **options: Any,
) -> PipelineParallel:
    """What a rank runs: every loss, its gradients after the first step, and the weights at the end."""
    pipe = PipelineParallel(model, cuts, comm, **options)
    losses = []
    for batch in data:
        losses.append(pipe.step(batch))
        if len(losses) == 1:
            assert_gradients(pipe, trained, tolerance)
    assert_losses(losses, trained, tolerance)
    assert_weights(pipe, trained, tolerance)
    return pipe
