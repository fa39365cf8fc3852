"""Sharded training is serial training: in all three stages, on any number of ranks, whatever the layers are like."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from data_parallel import (
    LENGTH,
    OPTIMIZERS,
    TOLERANCES,
    VOCABULARY,
    WIDTH,
    Trained,
    assert_trained_alike,
    batches,
    follow,
    model,
    one_thread,
    serial,
)
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn
from torch.nn import functional

from mplab import World
from mplab.comm.communicator import Handle
from mplab.datasets import Batch
from mplab.errors import MplabError, NonFiniteGradient
from mplab.models import GPT, GPTConfig, cross_entropy, seed_parameters
from mplab.parallel import Serial, ShardedDataParallel
from mplab.parallel.flat import Flat
from mplab.world import Rank

STAGES = (1, 2, 3)
EXACT, CLOSE = 0.0, TOLERANCES[torch.float64]
FEW = 4  # steps, where ten would show no more: with momentum, and once more than `samples_of_ones_own` are dealt out
few = partial(batches, num_batches=FEW)


def train(sharded: ShardedDataParallel, data: Sequence[Batch]) -> Trained:
    """The loss of every step, and the weights before the first and after the last."""
    start = sharded.full_state_dict()
    losses = [sharded.step(batch) for batch in data]
    return Trained(losses, [], [start, sharded.full_state_dict()])


def check(
    want: Trained,
    made: Callable[[int], nn.Module],
    data: Sequence[Batch],
    num_ranks: int,
    tolerance: float = CLOSE,
    stages: Sequence[int] = STAGES,
    rendezvous: bool = False,
    **options: Any,
) -> None:
    """All stages, one after the other in a world; every rank has the same losses, and serial training's weights."""
    models = [made(rank) for rank in range(num_ranks)]
    options["optimizer"] = OPTIMIZERS[options.get("optimizer", "sgd")]
    want = Trained(want.losses, [], [want.weights[0], want.weights[-1]])

    def work(rank: Rank) -> list[Trained]:
        return [train(ShardedDataParallel(models[rank.index], rank.comm, s, **options), data) for s in stages]

    for of_stage in zip(*World(num_ranks, "cpu", rendezvous=rendezvous).run(work), strict=True):
        for trained in of_stage:
            assert trained.losses == of_stage[0].losses
            assert_trained_alike(trained, want, tolerance)


def serially(made: nn.Module, data: Sequence[Batch], optimizer: str = "sgd", **options: Any) -> Trained:
    """Serial training of a model that is none of `data_parallel`'s; changes it."""
    with one_thread():
        return follow(Serial(made, OPTIMIZERS[optimizer](made.parameters()), **options).step, made, data)


def seeded(*layers: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A chain of these; some of them may keep a dtype of their own."""
    made = nn.Sequential(*layers).to(dtype)
    seed_parameters(made)
    return made


def embedding_and_head(*between: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        return seeded(nn.Embedding(VOCABULARY, WIDTH), *between, nn.Linear(WIDTH, VOCABULARY))


def linear() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        return nn.Linear(WIDTH, WIDTH)


# --- models, optimizers, ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_all_stages_equal_serial_training_to_the_bit_where_sums_have_the_same_order(
    optimizer: str, num_ranks: int
) -> None:
    """Ten steps, in float32: micro-batches of serial training are summed in the order of the ranks."""
    assert len(batches()) == 10
    want = serial("tied", optimizer, num_ranks, torch.float32)
    check(want, lambda r: model("tied", torch.float32), batches(), num_ranks, EXACT, optimizer=optimizer)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("variant", ["plain", "conv", "frozen", "used twice", "unused"])
def test_every_kind_of_model(variant: str, num_ranks: int) -> None:
    optimizer = "adamw" if num_ranks == 3 else "sgd"
    check(serial(variant, optimizer, num_steps=FEW), lambda r: model(variant), few(), num_ranks, optimizer=optimizer)


def test_a_gpt() -> None:
    config = GPTConfig(vocab_size=VOCABULARY, context_length=LENGTH, num_layers=3, num_heads=2, width=8, tied=True)
    want = serially(GPT(config).double(), few(), "adamw")
    check(want, lambda r: GPT(config).double(), few(), 2, optimizer="adamw")


def test_a_model_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=8, **off)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.GPT2LMHeadModel(config).double()
    own_forward: Any = lambda output, targets: cross_entropy(output.logits, targets)  # noqa: E731
    want = serially(copy.deepcopy(made), batches()[:4], loss_fn=own_forward)
    check(want, lambda r: made, batches()[:4], 2, stages=(2, 3))


def test_ranks_that_begin_with_different_weights_begin_with_those_of_rank_0() -> None:
    def different(rank: int) -> nn.Module:
        assert not torch.equal(model(seed=rank)[0].weight, model(seed=rank + 1)[0].weight)
        return model(seed=rank)

    check(serial(num_steps=FEW), different, few(), 3)


def test_with_sends_that_wait_for_their_receives() -> None:
    check(serial("tied", num_steps=FEW), lambda r: model("tied"), few(), 3, rendezvous=True)


def test_the_given_model_stays_as_it_is() -> None:
    made = model("tied")
    start = copy.deepcopy(made.state_dict())
    check(serial("tied", num_steps=FEW), lambda r: made, few(), 2)
    assert all(torch.equal(value, start[name]) for name, value in made.state_dict().items())
    assert all(p.grad is None for p in made.parameters())


# --- layers ----------------------------------------------------------------------------------------------------------


class Rare(nn.Module):
    """Samples that begin with a large number go through a layer, which is not called without any."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor) -> Tensor:
        is_rare = x[:, 0, 0] > 0.5
        if not is_rare.any():
            return x
        return torch.where(is_rare[:, None, None], torch.tanh(self.layer(x)), x)


class Gate(nn.Module):
    """Its weights go through a long branch of their own, which no gradient of the input comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH))
        self.layer = linear()

    def forward(self, x: Tensor) -> Tensor:
        gate = self.weight
        for _ in range(20):
            gate = torch.tanh(gate)
        return gate * self.layer(x)


class InPlace(nn.Module):
    """Begins with an op on its input's own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.layer = nn.ReLU(inplace=True), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.relu(x))


class SecretlyInPlace(InPlace):
    """The same, and no module says so."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(functional.relu_(x))


class Stop(nn.Module):
    """Lets no gradient through; its own weights are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.detach())


class Constant(nn.Module):
    """Gives its own weights, whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(LENGTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(len(x), -1, -1)


class Double(nn.Module):
    """Computes in float64 with weights of its own, whatever dtype the model is converted to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.fine = linear()
        self.bound = nn.Parameter(torch.empty(WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        fine = functional.linear(x.double(), self.fine.weight.double(), self.fine.bias.double())
        return self.layer(fine.to(x.dtype)) + self.bound


def test_a_branch_that_some_ranks_take_and_in_some_steps_nobody() -> None:
    """Momentum and weight decay must not move what nobody used, and must move what one rank used."""

    def made() -> nn.Module:
        chain = embedding_and_head(Rare(), linear())
        with torch.no_grad():
            chain[0].weight[:, 0] = -1.0
            chain[0].weight[0, 0] = 1.0  # token 0 is the rare one
        chain[0].requires_grad_(False)
        return chain

    for optimizer in ("sgd", "adamw"):
        want = serially(made(), few(), optimizer)
        assert [g["1.layer.weight"] is None for g in want.gradients[:3]] == [False, False, True]
        check(want, lambda r: made(), few(), 2, optimizer=optimizer)


@pytest.mark.parametrize("layer", [Gate, InPlace, Stop, Constant])
def test_layers_with_a_graph_of_their_own(layer: Callable[[], nn.Module]) -> None:
    def made() -> nn.Module:
        return embedding_and_head(linear(), layer(), layer(), linear())

    want = serially(made(), few())
    cut_off = layer in (Stop, Constant)
    assert (want.gradients[0]["1.weight"] is None) == cut_off
    for num_ranks in (1, 3):
        check(want, lambda r: made(), few(), num_ranks, num_microbatches=2)


def test_a_layer_that_secretly_works_in_place() -> None:
    """Its hook would never be called, and its weights be missing in the backward."""

    def made() -> nn.Module:
        return embedding_and_head(linear(), SecretlyInPlace(), linear())

    check(serially(made(), few()), lambda r: made(), few(), 2, stages=(1,))
    secret = made()

    def work(rank: Rank) -> None:
        for stage in (2, 3):
            sharded = ShardedDataParallel(secret, rank.comm, stage)
            with pytest.raises(MplabError, match=f"layer 2 changes its input in place, and in stage {stage}"):
                sharded.step(batches()[0])

    World(1, "cpu").run(work)


def test_several_dtypes_in_one_layer() -> None:
    def made() -> nn.Module:
        chain = embedding_and_head(Double(), Double()).float()
        for index in (1, 2):
            chain[index].fine.double()
        return chain

    want = serially(made(), few(), num_microbatches=2)
    check(want, lambda r: made(), few(), 2, EXACT)


@pytest.mark.parametrize("frozen", [(0,), (0, 1, 2), (1, 2), (1, 3, 4), (0, 1, 2, 3), (4,)])
def test_frozen_layers(frozen: tuple[int, ...]) -> None:
    def made() -> nn.Module:
        chain = embedding_and_head(linear(), nn.Tanh(), linear())
        for index in frozen:
            chain[index].requires_grad_(False)
        return chain

    check(serially(made(), few()), lambda r: made(), few(), 2)


def test_inputs_that_ask_for_gradients_get_none() -> None:
    """Theirs would come by frozen weights that are freed by then."""
    with torch.random.fork_rng(devices=[]):
        made = seeded(*(nn.Linear(3, 3) for _ in range(4)))
    made[0].requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 3, generator=generator).double()
    want = serially(copy.deepcopy(made), [(x, x)], loss_fn=functional.mse_loss)
    check(want, lambda r: made, [(x.clone().requires_grad_(), x)], 2, loss_fn=functional.mse_loss)


@pytest.mark.parametrize("depth", [0, 1])
def test_all_weights_in_the_root_and_a_rank_without_any(depth: int) -> None:
    """Two layers that share all they have; and a model of fewer elements than ranks."""

    def tied() -> nn.Module:
        shared = linear()
        return seeded(shared, nn.Tanh(), shared)

    def tiny() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return seeded(nn.Linear(1, 1), nn.Tanh())

    made, width = ((tied, WIDTH), (tiny, 1))[depth]
    generator = torch.Generator().manual_seed(2)
    data = [(torch.randn(5, width, generator=generator).double(), torch.zeros(5, width).double()) for _ in range(3)]
    want = serially(made(), data, loss_fn=functional.mse_loss)
    check(want, lambda r: made(), data, 4, loss_fn=functional.mse_loss)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 9])
def test_uneven_batches_and_ranks_without_samples(num_samples: int) -> None:
    want = serial("tied", num_samples=num_samples, num_steps=4)
    check(want, lambda r: model("tied"), batches(num_samples, 4), 4)


@pytest.mark.parametrize("num_microbatches", [2, 3, 5])
def test_micro_batches_add_up(num_microbatches: int) -> None:
    """11 samples on 3 ranks in 5 parts: some parts are empty."""
    check(serial("tied", num_steps=FEW), lambda r: model("tied"), few(), 3, num_microbatches=num_microbatches)


@pytest.mark.parametrize("stage", STAGES)
def test_samples_of_ones_own(stage: int) -> None:
    """Any number of them on each rank, and none on some: the mean weighs samples."""
    cuts = [(0, 3, 3, 11), (5, 11, 11, 11), (0, 0, 0, 11)]

    def work(rank: Rank) -> Any:
        sharded = ShardedDataParallel(model("tied"), rank.comm, stage, optimizer=OPTIMIZERS["sgd"])
        losses = []
        for step, (inputs, targets) in enumerate(few()):
            bounds = (0, *cuts[step % 3])
            mine = slice(bounds[rank.index], bounds[rank.index + 1])
            losses.append(sharded.step_shard((inputs[mine], targets[mine])))
        return losses, sharded.full_state_dict()

    want = serial("tied", num_steps=FEW)
    for losses, weights in World(4, "cpu").run(work):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(want.losses), rtol=0, atol=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, want.weights[-1][name], rtol=0, atol=CLOSE)


def test_no_samples_at_all() -> None:
    def work(rank: Rank) -> None:
        sharded = ShardedDataParallel(model(), rank.comm)
        nothing = torch.zeros(0, LENGTH, dtype=torch.int64)
        with pytest.raises(MplabError, match="none of the 2 ranks has a sample"):
            sharded.step_shard((nothing, nothing))
        with pytest.raises(MplabError, match="needs one or more"):
            sharded.step((nothing, nothing))
        with pytest.raises(MplabError, match="11 inputs and 0 targets"):
            sharded.step((batches()[0][0], nothing))

    World(2, "cpu").run(work)


@pytest.mark.parametrize("stage", STAGES)
def test_batches_of_different_sizes_on_the_ranks(stage: int) -> None:
    def work(rank: Rank) -> None:
        sharded = ShardedDataParallel(model(), rank.comm, stage)
        start = sharded.full_state_dict()
        inputs, targets = batches()[0]
        with pytest.raises(MplabError, match=rf"rank {rank.index} .* {8 + rank.index} samples, .* have 17 together"):
            sharded.step((inputs[: 8 + rank.index], targets[: 8 + rank.index]))
        assert_same(sharded.full_state_dict(), start)

    World(2, "cpu").run(work)


# --- clipping, mixed precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.1, 0.5, 1e6])
def test_clipping_is_that_of_the_whole_gradient(max_norm: float) -> None:
    want = serial("tied", num_steps=FEW, max_norm=max_norm)
    free = serial("tied", num_steps=FEW)
    assert (want.weights[-1]["0.weight"] - free.weights[-1]["0.weight"]).abs().max() > 1e-4 or max_norm > 1
    check(want, lambda r: model("tied"), few(), 3, max_norm=max_norm, num_microbatches=2)


def test_autocast() -> None:
    """The same parts, one after the other, with forward and loss in bfloat16; which float32 is far from."""
    made = model("tied", torch.float32)
    optimizer = OPTIMIZERS["sgd"](made.parameters())

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        total = 0.0
        for inputs, targets in zip(*(tensor.tensor_split(2) for tensor in batch), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(made(inputs), targets) * (len(inputs) / len(batch[0]))
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        return total

    with one_thread():
        want = follow(step, made, few())
    assert (want.weights[-1]["0.weight"] - serial("tied", num_steps=FEW).weights[-1]["0.weight"]).abs().max() > 1e-4
    check(want, lambda r: model("tied", torch.float32), few(), 2, EXACT, autocast=torch.bfloat16)


# --- the model in one piece ------------------------------------------------------------------------------------------


def with_buffers(rank: int = 0) -> nn.Module:
    """A batch norm, whose running means are those of a rank's own samples; tied weights."""
    with torch.random.fork_rng(devices=[]):
        made = seeded(nn.Embedding(VOCABULARY, WIDTH), nn.Flatten(0, 1), nn.BatchNorm1d(WIDTH), linear())
        made.append(nn.Linear(WIDTH, VOCABULARY, bias=False).double())
    made[-1].weight = made[0].weight
    made[2].running_mean.fill_(rank)
    return made


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_is_split_on_any_number_of_ranks_and_merged_again(stage: int) -> None:
    """From every stage and n to every other: exact, buffers and tied names included."""

    models = [with_buffers(rank) for rank in range(3)]

    def trained(rank: Rank) -> dict[str, Tensor]:
        sharded = ShardedDataParallel(models[rank.index], rank.comm, stage, optimizer=OPTIMIZERS["sgd"])
        for inputs, targets in batches()[:2]:
            sharded.step((inputs, targets))
        return sharded.full_state_dict()

    def loaded(state: dict[str, Tensor], of_stage: int, rank: Rank) -> dict[str, Tensor]:
        sharded = ShardedDataParallel(models[0], rank.comm, of_stage)
        sharded.load_full_state_dict(state)
        return sharded.full_state_dict()

    states = World(3, "cpu").run(trained)
    assert list(states[0]) == list(models[0].state_dict())
    assert states[0]["0.weight"].data_ptr() == states[0]["4.weight"].data_ptr()
    assert states[0]["2.num_batches_tracked"] == 2
    assert states[0]["2.running_mean"].abs().max() < 1  # those of rank 0, and not of another
    for state in states:
        assert_same(state, states[0])
        assert not torch.equal(state["0.weight"], models[0].state_dict()["0.weight"])
    for num_ranks, of_stage in ((1, 3), (2, 1), (4, 2), (4, 3)):
        for state in World(num_ranks, "cpu").run(partial(loaded, states[0], of_stage)):
            assert_same(state, states[0])
    models[0].load_state_dict(states[0])  # and by the model itself


def test_training_goes_on_from_a_loaded_state() -> None:
    """SGD without momentum has no state but the weights."""
    plain = partial(torch.optim.SGD, lr=0.1)

    def work(rank: Rank) -> dict[str, Tensor]:
        first = ShardedDataParallel(model(), rank.comm, 2, optimizer=plain)
        first.step(batches()[0])
        second = ShardedDataParallel(model(seed=1), rank.comm, 3, optimizer=plain)
        second.load_full_state_dict(first.full_state_dict())
        for sharded in (first, second):
            sharded.step(batches()[1])
        assert_same(first.full_state_dict(), second.full_state_dict())
        return first.full_state_dict()

    first, second = World(2, "cpu").run(work)
    assert_same(first, second)


def test_a_state_of_another_model_changes_nothing() -> None:
    def work(rank: Rank) -> None:
        for stage in STAGES:
            sharded = ShardedDataParallel(model(), rank.comm, stage)
            start = sharded.full_state_dict()
            with pytest.raises(MplabError, match=r"lacks \['1.down.weight'\], and the model has no \['other'\]"):
                sharded.load_full_state_dict(
                    {name.replace("1.down.weight", "other"): value + 1 for name, value in start.items()}
                )
            with pytest.raises(MplabError, match=r"0.weight .* \(2, 4\) in this state, and \(7, 4\) in the model"):
                sharded.load_full_state_dict({name: value[:2] + 1 for name, value in start.items()})
            assert_same(sharded.full_state_dict(), start)

    World(2, "cpu").run(work)


# --- memory ----------------------------------------------------------------------------------------------------------


def num_bytes(tensors: Sequence[Tensor]) -> int:
    """Of the storages behind them."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_stage_3_frees_what_it_does_not_use(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between steps there are chunks alone; in a step the root and two units, and never more."""
    seen = threading.local()
    allocate = Flat.allocate

    def counted(flat: Flat) -> None:
        allocate(flat)
        if hasattr(seen, "sharded"):
            seen.peak = max(seen.peak, num_bytes([flat.whole for flat in seen.sharded._flats]))

    monkeypatch.setattr(Flat, "allocate", counted)

    def work(rank: Rank) -> None:
        sharded = ShardedDataParallel(model("tied"), rank.comm, 3, optimizer=OPTIMIZERS["sgd"], num_microbatches=2)
        item, root, mixer, norm = 8, VOCABULARY * WIDTH, 5 * WIDTH * WIDTH - WIDTH * WIDTH + 2 * WIDTH, 2 * WIDTH
        assert mixer == sum(p.numel() for p in model()[1].parameters())
        everything = root + 2 * mixer + norm
        for batch in batches()[:3]:
            assert num_bytes(list(sharded.model.parameters())) == 0
            shards = num_bytes([flat.chunk for flat in sharded._flats])
            assert shards <= item * (everything // num_ranks + len(sharded._flats))
            seen.sharded, seen.peak = sharded, 0
            sharded.step(batch)
            del seen.sharded
            assert seen.peak == item * (root + 2 * mixer)
            pieces = [p for group in sharded.optimizer.param_groups for p in group["params"]]
            state = [x for p in pieces for x in sharded.optimizer.state[p].values()]
            assert num_bytes(state) == num_bytes([p.grad for p in pieces]) == shards
        assert num_bytes(list(sharded.model.parameters())) == 0
        sharded.full_state_dict()
        assert num_bytes(list(sharded.model.parameters())) == 0

    World(num_ranks, "cpu").run(work)


def test_weights_that_are_freed_are_not_read() -> None:
    """A kernel that reads freed memory would end the process."""

    def work(rank: Rank) -> None:
        sharded = ShardedDataParallel(model(), rank.comm, 3)
        for _ in range(2):
            assert all(p.numel() == 0 for p in sharded.model.parameters())
            with pytest.raises(MplabError, match="this Sequential has its weights only while"):
                sharded.model(batches()[0][0])
            with pytest.raises((RuntimeError, IndexError)):
                sharded.model[1](torch.ones(2, WIDTH).double())
            sharded.step(batches()[0])

    World(2, "cpu").run(work)


@pytest.mark.parametrize("stage", STAGES)
def test_whose_gradients_are_kept(stage: int) -> None:
    """At the loss of the second micro-batch: stage 1 has those of the first whole, the others a chunk."""

    def work(rank: Rank) -> None:
        seen = []

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            seen.append(sum(p.grad is not None for p in sharded.model.parameters()))
            pieces = [p for group in sharded.optimizer.param_groups for p in group["params"]]
            assert all(p.grad is None for p in pieces)  # those of the last step are forgotten
            return cross_entropy(outputs, targets)

        sharded = ShardedDataParallel(model(), rank.comm, stage, loss_fn, num_microbatches=2)
        for batch in batches()[:2]:
            sharded.step(batch)
        assert seen == 2 * [0, len(list(model().parameters())) if stage == 1 else 0]
        assert all(p.grad is None for p in sharded.model.parameters())
        own = sum(flat.chunk.numel() for flat in sharded._flats)
        state = sharded.optimizer.state.values()
        assert sum(x.numel() for of_piece in state for x in of_piece.values() if x.dim()) == 2 * own

    World(2, "cpu").run(work)


# --- messages --------------------------------------------------------------------------------------------------------


def test_the_next_unit_is_gathered_while_one_computes() -> None:
    """And reduced while the one below computes."""
    with torch.random.fork_rng(devices=[]):
        made = seeded(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 4))
    unit_of = {p.numel() + p.shape[0]: index for index, p in enumerate(layer.weight for layer in made)}
    order: list[str] = []

    def spy(name: str, start: Callable[[Tensor], Handle[Tensor]]) -> Callable[[Tensor], Handle[Tensor]]:
        def spying(x: Tensor) -> Handle[Tensor]:
            what = f"{name} {unit_of[x.numel()]}"
            order.append(what)
            handle = start(x)
            return Handle(lambda: (order.append(f"{what} over"), handle.wait())[1])

        return spying

    def work(rank: Rank) -> None:
        comm: Any = rank.comm
        for index, layer in enumerate(made):
            layer.register_forward_hook(lambda *_, index=index: order.append(f"F{index}"))
        sharded = ShardedDataParallel(made, comm, 3, functional.mse_loss)
        for index, layer in enumerate(sharded.model):
            layer.weight.register_post_accumulate_grad_hook(lambda _, index=index: order.append(f"B{index}"))
        comm.iall_gather_ = spy("gather", comm.iall_gather_)
        comm.ireduce_scatter = spy("reduce", comm.ireduce_scatter)
        x = torch.ones(2, 4).double()
        sharded.step((x, x))

    World(1, "cpu").run(work)
    forward = "gather 0, gather 0 over, gather 1, F0, gather 1 over, gather 2, F1, gather 2 over, F2"
    backward = (
        "gather 1, B2, gather 1 over, reduce 2, gather 0, B1, reduce 2 over, gather 0 over, reduce 1, B0, "
        "reduce 1 over, reduce 0, reduce 0 over"
    )
    assert ", ".join(order) == f"{forward}, {backward}"


def one_step_bytes(stage: int, num_ranks: int, made: Callable[[], nn.Module], **options: Any) -> list[dict[str, Any]]:
    """(messages, bytes sent, bytes received) of every kind of call in one step, for each rank."""

    models = [made() for _ in range(num_ranks)]

    def work(rank: Rank) -> dict[str, Any]:
        sharded = ShardedDataParallel(models[rank.index], rank.comm, stage, **options)
        before = len(rank.comm.ledger.messages)
        sharded.step(batches()[0])
        counts: dict[str, Any] = {}
        for m in rank.comm.ledger.messages[before:]:
            old = counts.get(m.op, (0, 0, 0))
            counts[m.op] = (old[0] + m.num_messages, old[1] + m.sent_bytes, old[2] + m.received_bytes)
        return counts

    return World(num_ranks, "cpu").run(work)


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_bytes_counted_by_hand(num_microbatches: int) -> None:
    """Two ranks, a unit of 7 x 4 float64, one of 4 x 4 + 4, one of 7 x 4 + 7, whose 35 are cut in 18 and 17."""
    m = num_microbatches
    made = lambda: embedding_and_head(linear(), nn.Tanh())  # noqa: E731
    mine, theirs = 8 * (14 + 10 + 18), 8 * (14 + 10 + 17)  # of rank 0, of rank 1
    head, rest = 8 * (14 + 10), 8 * (18 + 17)
    assert mine + theirs == 2 * head + rest == 8 * sum(p.numel() for p in made().parameters())
    closing = (2, 8 * (2 + 5), 8 * (2 + 5))  # 7 float64, in chunks of 4 and 3, there and back
    clipping = (2, 8, 8)
    for stage, gathers, reductions in ((1, 1, 1), (2, 1, m), (3, 2 * m, m)):
        once = m if stage == 3 else 0  # the last unit is not gathered for the backward
        ranks = one_step_bytes(stage, 2, made, num_microbatches=m)
        for counts, own, other, last, last_of_other in (
            (ranks[0], mine, theirs, 8 * 18, 8 * 17),
            (ranks[1], theirs, mine, 8 * 17, 8 * 18),
        ):
            assert counts == {
                "reduce_scatter": (3 * reductions, other * reductions, own * reductions),
                "all_gather_": (
                    3 * gathers - once,
                    own * gathers - last * once,
                    other * gathers - last_of_other * once,
                ),
                "all_reduce_": closing,
            }
        clipped = one_step_bytes(stage, 2, made, num_microbatches=m, max_norm=1.0)[0]["all_reduce_"]
        assert clipped == tuple(a + b for a, b in zip(closing, clipping, strict=True))


def test_bytes_of_tied_and_frozen_weights() -> None:
    """The root is gathered once a step; what is below the first trained weight, for the forward alone."""

    def made() -> nn.Module:
        chain = embedding_and_head(linear(), linear(), linear())
        chain[1].requires_grad_(False)
        chain[3].weight = chain[2].weight  # the root: 16; below it 28 and 20 frozen, above it 4, 4 and 35
        chain[0].requires_grad_(False)
        return chain

    for stage, want in (
        # gathers: forward 14 + 10 + 2 + 2 + 18, backward 2 + 2, the root 8 once
        (3, {"all_gather_": (8, 8 * (14 + 10 + 2 + 2 + 18 + 2 + 2 + 8)), "reduce_scatter": (4, 8 * (2 + 2 + 17 + 8))}),
        (1, {"all_gather_": (4, 8 * (2 + 2 + 18 + 8)), "reduce_scatter": (4, 8 * (2 + 2 + 17 + 8))}),
    ):
        counts = one_step_bytes(stage, 2, made)[0]
        assert {op: counts[op][:2] for op in want} == want


def test_spans() -> None:
    def work(rank: Rank) -> None:
        ShardedDataParallel(model(), rank.comm, num_microbatches=2).step(batches()[0])

    world = World(2, "cpu")
    world.run(work)
    spans = [(e.name, e.microbatch) for e in world.timeline.events if e.lane == "compute" and e.rank == 0]
    assert spans == [("forward", 0), ("backward", 0), ("forward", 1), ("backward", 1), ("update", None)]


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_reaches_nobody(stage: int, bad: float) -> None:
    """Of the last samples, those of rank 1, in the second step; after it both ranks go on in another run."""
    with torch.random.fork_rng(devices=[]):
        made = seeded(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    generator = torch.Generator().manual_seed(3)
    data = [(torch.randn(6, 3, generator=generator).double(),) * 2 for _ in range(2)]
    poisoned = data[1][0].clone(), data[1][1].clone()
    poisoned[1][-1, 1] = bad
    world, kept = World(2, "cpu"), {}

    def start(rank: Rank) -> None:
        kept[rank.index] = ShardedDataParallel(made, rank.comm, stage, functional.mse_loss, OPTIMIZERS["sgd"])
        kept[rank.index].step(data[0])
        kept[rank.index].before = kept[rank.index].full_state_dict()
        kept[rank.index].step(poisoned)

    with pytest.raises(NonFiniteGradient, match=r"rank 1, step 1: the gradient of 2\.weight") as caught:
        world.run(start)
    assert isinstance(caught.value, MplabError)

    def go_on(rank: Rank) -> Any:
        sharded = kept[rank.index]
        sharded.connect(rank.comm)
        assert_same(sharded.full_state_dict(), sharded.before)
        sharded.step(data[1])
        return sharded.full_state_dict()

    want = serially(made, data, loss_fn=functional.mse_loss)
    for state in world.run(go_on):
        for name, weight in state.items():
            torch.testing.assert_close(weight, want.weights[-1][name], rtol=0, atol=CLOSE)


def test_finite_gradients_whose_sum_is_not() -> None:
    """Their sum alone is no proof."""
    made = seeded(nn.Linear(2, 1, bias=False, device="meta").to_empty(device="cpu"))

    def work(rank: Rank) -> None:
        sharded = ShardedDataParallel(made, rank.comm, 2, lambda y, t: y.sum(), partial(torch.optim.SGD, lr=1e-300))
        x = torch.full((1, 2), 1.5e308, dtype=torch.float64)
        with torch.no_grad():
            sharded.load_full_state_dict({"0.weight": torch.zeros(1, 2)})
        sharded.step((x, x))
        assert sharded.full_state_dict()["0.weight"][0, 0] == -1.5e8

    World(1, "cpu").run(work)


def test_connect_with_another_ranks_communicator() -> None:
    world, kept = World(2, "cpu"), {}

    def start(rank: Rank) -> None:
        kept[rank.index] = ShardedDataParallel(model(), rank.comm)

    def swapped(rank: Rank) -> None:
        with pytest.raises(MplabError, match=f"this is rank {1 - rank.index} of 2"):
            kept[1 - rank.index].connect(rank.comm)

    world.run(start)
    world.run(swapped)


# --- mistakes, before any message ------------------------------------------------------------------------------------


def frozen_model() -> nn.Module:
    return model().requires_grad_(False)


class Forward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (model, {"stage": 0}, "stage 0: must be 1"),
        (model, {"stage": 4}, "stage 4: must be 1"),
        (model, {"optimizer": 0.1}, "optimizer is a float"),
        (model, {"loss_fn": None}, "loss_fn is a NoneType"),
        (model, {"num_microbatches": 0}, "num_microbatches 0"),
        (model, {"max_norm": 0.0}, "max_norm 0.0"),
        (model, {"autocast": torch.float16}, "autocast torch.float16"),
        (Forward, {}, "not known as a chain"),
        (frozen_model, {}, "no parameter of this model is trained"),
        (lambda: nn.Sequential(nn.Linear(2, 2, device="meta")), {}, "0.weight is on the meta device"),
    ],
)
def test_settings_that_are_refused(made: Callable[[], nn.Module], options: dict[str, Any], message: str) -> None:
    def work(rank: Rank) -> None:
        with pytest.raises(MplabError, match=message):
            ShardedDataParallel(made(), rank.comm, **options)
        assert not rank.comm.ledger.messages

    World(2, "cpu").run(work)


def test_ranks_that_were_given_different_settings() -> None:
    def work(rank: Rank) -> None:
        with pytest.raises(MplabError, match="stage on rank 1: 2"):
            ShardedDataParallel(model(), rank.comm, 1 + rank.index)

    World(2, "cpu").run(work)
