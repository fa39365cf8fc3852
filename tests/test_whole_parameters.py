"""What every rank of a tensor axis has whole must get the same gradient on all of them: else the first step refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn
from torch.nn import functional

from mplab import MplabError, World
from mplab.models import seed_parameters
from mplab.parallel import TensorParallel
from mplab.parallel.hybrid import HybridParallel
from mplab.parallel.tensor_state import check_whole_gradients
from mplab.plan.layout import Plan
from mplab.world import Rank

WIDTH, NUM_HEADS = 8, 4
SGD = partial(torch.optim.SGD, lr=0.1)
PLAN = {"up": "column", "down": "row"}


class OfHeads(nn.Module):
    """A norm of each head between a column and a row layer, as Qwen3's of queries and keys; and a number for all."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head_norm, self.last_norm = nn.LayerNorm(WIDTH // NUM_HEADS), nn.LayerNorm(WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)
        seed_parameters(self, 0)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(x).unflatten(-1, (-1, WIDTH // NUM_HEADS))
        out: Tensor = self.last_norm(self.down(self.head_norm(heads).flatten(-2)))
        return out


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, WIDTH, generator=generator), torch.randn(6, WIDTH, generator=generator)


def of_heads(frozen: str = "") -> OfHeads:
    with torch.random.fork_rng(devices=[]):
        model = OfHeads()
    if frozen:
        getattr(model, frozen).requires_grad_(False)
    return model


def train(num_ranks: int, plan: dict[str, str], num_steps: int = 1, hybrid: bool = False, frozen: str = "") -> Any:
    """What rank 0 has afterwards, and its all_gathers."""
    return World(num_ranks, "cpu").run(partial(on_rank, of_heads(frozen), plan, num_steps, hybrid))[0]


def on_rank(model: nn.Module, plan: dict[str, str], num_steps: int, hybrid: bool, rank: Rank) -> Any:
    options: Any = {"loss_fn": functional.mse_loss, "optimizer": SGD}
    if hybrid:
        engine: Any = HybridParallel(model, rank.comm, Plan(dp=2, tp=2), tensor_plan=plan, **options)
    else:
        engine = TensorParallel(model, rank.comm, plan, **options)
    before = engine.full_state_dict()
    try:
        for _ in range(num_steps):
            engine.step(batch())
    except MplabError:
        after = engine.full_state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before), "a weight was changed"
        raise
    return engine.full_state_dict(), rank.comm.ledger.of("all_gather")


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_whole_parameter_on_cut_features_is_refused(num_ranks: int) -> None:
    with pytest.raises(MplabError) as error:
        train(num_ranks, PLAN)
    said = str(error.value)
    assert f"head_norm.weight is whole on each of {num_ranks} ranks" in said
    assert 'Give head_norm the style "partial"' in said


def test_it_is_refused_in_a_hybrid_too() -> None:
    with pytest.raises(MplabError, match=r"head_norm\.weight is whole on each of 2 ranks"):
        train(4, PLAN, hybrid=True)


@pytest.mark.parametrize("hybrid", [False, True])
def test_what_is_declared_passes_and_equals_one_rank(hybrid: bool) -> None:
    declared = {**PLAN, "head_norm": "partial"}
    want, _ = train(1, declared, num_steps=3)
    got, _ = train(4 if hybrid else 2, declared, num_steps=3, hybrid=hybrid)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-6)


def test_it_is_not_looked_at_on_one_rank_nor_where_nothing_is_trained() -> None:
    train(1, PLAN)
    train(2, PLAN, frozen="head_norm")


def test_it_costs_16_bytes_a_whole_parameter_in_the_first_step_alone() -> None:
    declared = {**PLAN, "head_norm": "partial"}
    one, three = (train(2, declared, num_steps=n)[1] for n in (1, 3))
    num_whole = 1 + 2 + 2 + 2  # down's bias, both norms, and what is not used
    assert [message.sent_bytes for message in one].count(16 * num_whole) == 1
    assert len(one) == len(three)


def gradients(rank: Rank, make: Any) -> None:
    model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(50)), "b": nn.Parameter(torch.zeros(50))})
    for name, p in model.items():
        p.grad = make(name, rank.index)
    check_whole_gradients(model, rank.comm)


def drawn(seed: int) -> Tensor:
    return torch.randn(50, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("make", "is_refused"),
    [
        (lambda name, r: drawn(0), False),
        (lambda name, r: drawn(0) * (1 + 1e-4 * r), False),  # as the order of a GPU's sums may have it
        (lambda name, r: drawn(0) if name == "a" else 1e-9 * drawn(r), False),  # the rounding errors of a 0
        (lambda name, r: None, False),
        (lambda name, r: drawn(r), True),
        (lambda name, r: functional.normalize(drawn(r), dim=0), True),  # equally long
        (lambda name, r: drawn(0) * (1 + r), True),
        (lambda name, r: drawn(0) if name == "a" else 1e-3 * drawn(r), True),
        (lambda name, r: None if r else drawn(0), True),
        (lambda name, r: drawn(0).bfloat16().float() * (-1) ** r, True),
    ],
)
def test_what_counts_as_the_same(make: Any, is_refused: bool) -> None:
    world = World(3, "cpu")
    if is_refused:
        with pytest.raises(MplabError, match="its gradient is another on every one"):
            world.run(gradients, make)
    else:
        world.run(gradients, make)
