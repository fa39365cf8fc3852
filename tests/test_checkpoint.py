"""Training that was saved goes on as if it had never stopped: by the same plan, by any other, from the command line."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_parallel import one_thread
from limits import leaves_nothing_behind as leaves_nothing_behind
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import TCPStore

import mplab.__main__ as command_line
from mplab import Plan, World
from mplab.datasets import Batch
from mplab.errors import CheckpointError, MplabError, NonFiniteGradient
from mplab.models import GPT, GPTConfig, cross_entropy, seed_parameters
from mplab.parallel import HybridParallel, Parallelized, Serial, checkpoint, parallelize, train_plan
from mplab.parallel import checkpoint_files as files
from mplab.parallel.checkpoint import merge
from mplab.world import Rank

ROOT = Path(__file__).parent.parent
VOCABULARY, LENGTH, BEFORE, STEPS = 16, 8, 2, 5
TOLERANCE = 1e-10

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.3, momentum=0.9),
    "sgd": partial(torch.optim.SGD, lr=0.3),
}

PLANS = {
    "1": Plan(),
    "dp2": Plan(dp=2, zero=1),
    "tp2": Plan(tp=2, sequence_parallel=True),
    "pp2": Plan(pp=2, num_microbatches=2),
    "2x2x1": Plan(2, 2, 1, zero=1, num_microbatches=2),
    "2x1x2": Plan(2, 1, 2, zero=3),
    "1x2x2": Plan(1, 2, 2, num_microbatches=2, schedule="interleaved"),
    "dp3": Plan(dp=3, zero=2),
    "tp4": Plan(tp=4),
    "dp2 whole": Plan(dp=2),
}

# --- models ----------------------------------------------------------------------------------------------------------


def gpt(seed: int = 0, **sizes: Any) -> nn.Module:
    config = {"vocab_size": VOCABULARY, "context_length": LENGTH, "num_layers": 2, "num_heads": 4, "width": 16}
    return GPT(GPTConfig(**{**config, **sizes}), seed).double()


def hugging_face(name: str, seed: int = 0, **options: Any) -> nn.Module:
    kind = getattr(pytest.importorskip("transformers"), name)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = kind(kind.config_class(**{**sizes, "max_position_embeddings": LENGTH, **options})).double()
    seed_parameters(model, seed)
    return model


class WithBuffers(nn.Module):
    """Counts its calls, and has a table that is not in its `state_dict`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(VOCABULARY, VOCABULARY)
        self.register_buffer("num_calls", torch.zeros(()))
        self.register_buffer("table", torch.eye(VOCABULARY), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return x + self.linear(x @ self.table)


def sequential(*layers: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        made = [layer() for layer in layers]
        model = nn.Sequential(nn.Embedding(VOCABULARY, VOCABULARY), *made, nn.Linear(VOCABULARY, VOCABULARY)).double()
    seed_parameters(model, seed)
    return model


def with_buffers(seed: int = 0) -> nn.Module:
    return sequential(WithBuffers, WithBuffers, seed=seed)


def frozen(seed: int = 0) -> nn.Module:
    """A block, one weight of the next, and the table that is the head's too."""
    model = gpt(seed)
    for part in (model.blocks[0], model.blocks[1].mlp.up.weight, model.embedding.token):
        part.requires_grad_(False)
    return model


class Scale(nn.Module):
    """A number, and a part that no sample comes to."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.one = nn.Parameter(torch.ones(1))
        self.unused = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.one


def with_numbers(seed: int = 0) -> nn.Module:
    return sequential(Scale, Scale, seed=seed)


def used_twice(seed: int = 0) -> nn.Module:
    """The same layer at two places, which may come to lie on one rank as two copies."""
    inner = nn.Linear(VOCABULARY, VOCABULARY, device="meta").to_empty(device="cpu")
    return sequential(lambda: inner, nn.Tanh, lambda: inner, seed=seed)


GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
LLAMA = {"intermediate_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 32}
MODELS: dict[str, Callable[..., nn.Module]] = {
    "gpt": gpt,
    "untied": partial(gpt, tied=False),
    "gpt2": partial(hugging_face, "GPT2LMHeadModel", **GPT2),
    "llama": partial(hugging_face, "LlamaForCausalLM", **LLAMA),
    "buffers": with_buffers,
    "frozen": frozen,
    "numbers": with_numbers,
    "used twice": used_twice,
}


@cache
def batches() -> tuple[Batch, ...]:
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randint, VOCABULARY, (6, LENGTH), generator=generator)
    return tuple((draw(), draw()) for _ in range(STEPS))


def loss_of(outputs: Any, targets: Tensor) -> Tensor:
    return cross_entropy(getattr(outputs, "logits", outputs), targets)


def lay_out(
    plan: str | Plan, model: nn.Module, optimizer: str | Callable[..., torch.optim.Optimizer] = "adamw"
) -> Parallelized:
    plan = PLANS[plan] if isinstance(plan, str) else plan
    factory = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    return parallelize(model, World(plan.num_ranks, "cpu"), plan, optimizer=factory)


@cache
def serial(model: str, optimizer: str) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of all steps, and the weights after them."""
    trained = MODELS[model]()
    with one_thread():
        engine = Serial(trained, OPTIMIZERS[optimizer](trained.parameters()), loss_of)  # type: ignore[arg-type]
        return [engine.step(batch) for batch in batches()], trained.state_dict()


def alike(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = 0.0) -> None:
    assert list(got) == list(want)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with the checkpoint after the first steps of a model by a plan, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def of(plan: str, model: str = "gpt", optimizer: str = "adamw") -> Path:
        key = plan, model, optimizer
        if key not in made:
            made[key] = tmp_path_factory.mktemp("runs")
            trained = lay_out(plan, MODELS[model](), optimizer)
            losses = trained.steps(batches()[:BEFORE])
            assert losses == pytest.approx(serial(model, optimizer)[0][:BEFORE], abs=tolerance_of(model))
            trained.save(made[key], {"batch": BEFORE, "of": model})
        return made[key]

    return of


def tolerance_of(model: str) -> float:
    return 1e-6 if model == "llama" else TOLERANCE  # its norms compute in float32


def goes_on(root: Path, plan: str, model: str = "gpt", optimizer: str = "adamw") -> Parallelized:
    """Load into a model of other weights, take the steps that are left, and compare with all of serial training."""
    trained = lay_out(plan, MODELS[model](seed=7), optimizer)
    assert trained.load(root) == {"batch": BEFORE, "of": model}
    assert trained.num_steps == BEFORE
    losses, weights = serial(model, optimizer)
    assert trained.steps(batches()[BEFORE:]) == pytest.approx(losses[BEFORE:], abs=tolerance_of(model))
    assert trained.num_steps == STEPS
    alike(trained.full_state_dict(), weights, tolerance_of(model))
    return trained


# --- going on --------------------------------------------------------------------------------------------------------

# Every plan is saved from and loaded into, and 2 ranks become 1, 2, 3 and 4.
PAIRS = [
    ("1", "dp2"), ("dp2", "1"), ("dp2", "tp2"), ("tp2", "dp3"), ("dp3", "tp4"), ("tp4", "2x1x2"), ("2x1x2", "2x2x1"),
    ("2x2x1", "1x2x2"), ("1x2x2", "pp2"), ("pp2", "2x1x2"), ("dp2", "dp2"), ("2x2x1", "dp2 whole"),
    ("dp2 whole", "1x2x2"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_any_plan_goes_on_where_another_stopped(before: str, after: str, saved: Callable[..., Path]) -> None:
    goes_on(saved(before), after)


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [
        ("momentum", "2x2x1", "2x1x2"),
        ("momentum", "2x1x2", "1x2x2"),
        ("momentum", "1", "dp2"),
        ("momentum", "dp2", "1"),
        ("sgd", "2x2x1", "2x1x2"),
        ("sgd", "2x1x2", "1"),
    ],
)
def test_with_other_optimizers(optimizer: str, before: str, after: str, saved: Callable[..., Path]) -> None:
    goes_on(saved(before, optimizer=optimizer), after, optimizer=optimizer)


@pytest.mark.parametrize(
    ("model", "before", "after"),
    [
        ("untied", "2x2x1", "2x1x2"),
        ("untied", "2x1x2", "1x2x2"),
        ("gpt2", "2x1x2", "2x2x1"),
        ("gpt2", "1", "tp4"),
        ("llama", "tp4", "dp3"),
        ("llama", "2x2x1", "1x2x2"),
        ("buffers", "dp2", "pp2"),
        ("buffers", "pp2", "dp3"),
        ("frozen", "2x2x1", "2x1x2"),
        ("frozen", "2x1x2", "1x2x2"),
        ("numbers", "dp2", "2x2x1"),
        ("numbers", "2x2x1", "1"),
        ("numbers", "1", "dp3"),
    ],
)
def test_with_other_models(model: str, before: str, after: str, saved: Callable[..., Path]) -> None:
    if model == "buffers":  # how often a rank calls its layers is its own affair
        return _goes_on_but_for_the_calls(saved, before, after)
    goes_on(saved(before, model), after, model)


def _goes_on_but_for_the_calls(saved: Callable[..., Path], before: str, after: str) -> None:
    trained = lay_out(after, with_buffers(seed=7))
    trained.load(saved(before, "buffers"))
    want = files.Checkpoint(saved(before, "buffers"))
    assert want.read("weights/1.num_calls") >= BEFORE
    state = trained.full_state_dict()
    assert "1.table" not in state
    for name in ("1.num_calls", "2.num_calls"):
        assert state[name] == want.read(f"weights/{name}")
    assert trained.steps(batches()[BEFORE:]) == pytest.approx(serial("buffers", "adamw")[0][BEFORE:], abs=TOLERANCE)


def test_two_copies_of_a_weight_on_one_rank_have_each_their_own_state(tmp_path: Path) -> None:
    """They shared the memory of the file, and every step updated it twice."""
    plan = Plan(pp=2, schedule="interleaved", cuts=(2, 3, 4), num_microbatches=2)  # stages 0 and 2 on rank 0
    trained = lay_out(plan, used_twice())
    trained.steps(batches()[:BEFORE])
    trained.save(tmp_path, {"batch": BEFORE, "of": "used twice"})
    losses, weights = serial("used twice", "adamw")
    trained = lay_out(plan, used_twice(seed=7))
    trained.load(tmp_path)
    assert trained.steps(batches()[BEFORE:]) == pytest.approx(losses[BEFORE:], abs=TOLERANCE)
    alike(trained.full_state_dict(), weights, TOLERANCE)


def test_to_the_bit_on_the_same_plan(tmp_path: Path) -> None:
    """In float32 too; and whoever saves goes on as if he had not."""
    model = gpt().float()
    without, with_save = (lay_out("2x2x1", model) for _ in range(2))
    losses = without.steps(batches())
    assert with_save.steps(batches()[:BEFORE]) == losses[:BEFORE]
    with_save.save(tmp_path)
    resumed = lay_out("2x2x1", gpt(seed=7).float())
    assert resumed.load(tmp_path) == {}
    for trained in (with_save, resumed):
        assert trained.steps(batches()[BEFORE:]) == losses[BEFORE:]
        alike(trained.full_state_dict(), without.full_state_dict())


@pytest.mark.parametrize("plan", [Plan(2), Plan(2, zero=1), Plan(2, zero=3), Plan(2, 2)], ids=str)
def test_buffers_of_replicas_are_all_those_of_the_first(plan: Plan, tmp_path: Path) -> None:
    """Each has seen samples of its own: a mean of one beside a variance of another would be of nobody."""
    trained = lay_out(plan, sequential(partial(nn.BatchNorm1d, LENGTH), nn.Tanh))
    trained.step(batches()[0])
    whole = trained.full_state_dict()
    assert float((whole["1.running_var"] - 1).abs().max()) > 0
    trained.save(tmp_path)
    merged = merge(tmp_path, tmp_path / "whole.safetensors")
    alike({name: merged[name] for name in whole}, whole)


def test_saved_again_and_again(saved: Callable[..., Path], tmp_path: Path) -> None:
    """A step, a checkpoint, another plan, and so on; each goes on from the newest, and an old one can be chosen."""
    losses, _ = serial("gpt", "adamw")
    shutil.copytree(saved("1"), tmp_path / "runs")
    for step, plan in enumerate(("dp2", "tp2", "2x2x1"), BEFORE):
        trained = lay_out(plan, gpt(seed=7))
        trained.load(tmp_path / "runs")
        assert trained.step(batches()[step]) == pytest.approx(losses[step], abs=TOLERANCE)
        assert trained.save(tmp_path / "runs").name == step_folder(step + 1)
    trained, old = lay_out("1", gpt(seed=7)), BEFORE + 1
    trained.load(tmp_path / "runs" / step_folder(old))
    assert trained.num_steps == old
    assert trained.step(batches()[old]) == pytest.approx(losses[old], abs=TOLERANCE)


def test_before_the_first_step(tmp_path: Path) -> None:
    """There is nothing yet that the optimizer remembers."""
    lay_out("dp2", gpt()).save(tmp_path)
    assert (tmp_path / "step-00000000").is_dir()
    assert not [name for name in files.Checkpoint(tmp_path).names if name.startswith("optimizer/")]
    trained = lay_out("1x2x2", gpt(seed=7))
    trained.load(tmp_path)
    assert trained.steps(batches()[:2]) == pytest.approx(serial("gpt", "adamw")[0][:2], abs=TOLERANCE)


def test_what_was_trained_meanwhile_is_forgotten(saved: Callable[..., Path]) -> None:
    trained = lay_out("2x2x1", gpt(seed=7))
    trained.steps(batches()[:3])
    trained.load(saved("2x2x1"))
    assert trained.steps(batches()[BEFORE:]) == pytest.approx(serial("gpt", "adamw")[0][BEFORE:], abs=TOLERANCE)


def test_each_file_is_compared_with_the_manifest_once(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, digest = saved("2x2x1"), files._sha256
    seen: list[str] = []
    monkeypatch.setattr(files, "_sha256", lambda path: (seen.append(path.name), digest(path))[1])
    for plan in ("1", "2x2x1"):
        seen.clear()
        lay_out(plan, gpt(seed=7)).load(root)
        assert sorted(seen) == [f"rank-{rank:05d}.safetensors" for rank in range(4)]


def test_settings_that_changed_are_kept(tmp_path: Path) -> None:
    """A learning rate that was lowered on the way stays low, whatever the new optimizer was made with."""
    model = gpt()
    engine = Serial(model, OPTIMIZERS["adamw"](model.parameters()))
    first = lay_out("2x2x1", gpt())
    losses = [engine.step(batch) for batch in batches()[:BEFORE]]
    assert first.steps(batches()[:BEFORE]) == pytest.approx(losses, abs=TOLERANCE)
    optimizers = [engine.optimizer, *(e.optimizer for e in first.engines.values())]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"], group["betas"], group["weight_decay"] = 0.001, (0.5, 0.6), 0.0
    first.save(tmp_path)
    resumed = lay_out("2x1x2", gpt(seed=7), partial(torch.optim.AdamW, lr=1.0, eps=1.0))
    resumed.load(tmp_path)
    for engine_of_rank in resumed.engines.values():
        group = engine_of_rank.optimizer.param_groups[0]
        assert (group["lr"], list(group["betas"]), group["weight_decay"]) == (0.001, [0.5, 0.6], 0.0)
    losses = [engine.step(batch) for batch in batches()[BEFORE:]]
    assert resumed.steps(batches()[BEFORE:]) == pytest.approx(losses, abs=TOLERANCE)


def test_groups_of_parameters_keep_their_settings(tmp_path: Path) -> None:
    def of_two(parameters: Any, lr: float = 0.01) -> torch.optim.Optimizer:
        kept = list(parameters)
        groups = [[p for p in kept if p.dim() > 1], [p for p in kept if p.dim() < 2]]
        return torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "lr": lr / 2}], lr=lr)

    trained = lay_out("1", gpt(), of_two)
    losses = trained.steps(batches()[: BEFORE + 1])
    again = lay_out("1", gpt(), of_two)
    again.steps(batches()[:BEFORE])
    again.save(tmp_path)
    resumed = lay_out("pp2", gpt(seed=7), partial(of_two, lr=1.0))
    resumed.load(tmp_path)
    for engine in resumed.engines.values():
        assert [group["lr"] for group in engine.optimizer.param_groups] == [0.01, 0.005]
    assert resumed.step(batches()[BEFORE]) == pytest.approx(losses[BEFORE], abs=TOLERANCE)


def test_a_step_that_failed_is_not_counted() -> None:
    """The number of steps is a checkpoint's name."""
    for plan in (Plan(), Plan(dp=2, zero=3)):
        broken: Any = lambda outputs, targets: outputs.sum() * float("nan")  # noqa: E731
        trained = parallelize(gpt(), World(plan.num_ranks), plan, broken)
        with pytest.raises(NonFiniteGradient):
            trained.step(batches()[0])
        assert trained.num_steps == 0


# --- what is saved ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["1", "dp2", "tp2", "pp2", "2x2x1", "2x1x2", "1x2x2", "dp3"])
def test_each_tensor_is_written_once_and_whole(plan: str, saved: Callable[..., Path]) -> None:
    folder = files.latest(saved(plan))
    manifest = json.loads((folder / "manifest.json").read_text())
    written = [list(load_file(folder / shard["file"])) for shard in manifest["shards"]]
    assert [sorted(names) for names in written] == [sorted(shard["names"]) for shard in manifest["shards"]]
    names = [name for of_rank in written for name in of_rank]
    own = dict(gpt().named_parameters())
    keys = ("exp_avg", "exp_avg_sq", "step")
    want = [f"weights/{name}" for name in own] + [f"optimizer/{name}/{key}" for name in own for key in keys]
    assert sorted(names) == sorted(want)
    assert len(manifest["shards"]) == PLANS[plan].num_ranks
    assert all(written)  # every rank has its share to write
    assert Plan.from_json(manifest["plan"]) == PLANS[plan]
    assert manifest["tied"] == {"head.projection.weight": "embedding.token.weight"}
    assert manifest["position"] == {"batch": BEFORE, "of": "gpt"}
    checkpoint = files.Checkpoint(folder)
    for name, p in own.items():
        assert checkpoint.read(f"weights/{name}").shape == p.shape
        assert checkpoint.read(f"optimizer/{name}/exp_avg").shape == p.shape
        assert checkpoint.read(f"optimizer/{name}/step") == BEFORE


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "sgd"])
def test_every_plan_saves_the_same(optimizer: str, saved: Callable[..., Path]) -> None:
    one = files.Checkpoint(saved("1", optimizer=optimizer))
    for plan in ("2x2x1", "2x1x2", "1x2x2") if optimizer == "adamw" else ("2x2x1", "2x1x2"):
        other = files.Checkpoint(saved(plan, optimizer=optimizer))
        assert sorted(one.names) == sorted(other.names)
        for name in one.names:
            torch.testing.assert_close(other.read(name), one.read(name), rtol=0, atol=TOLERANCE)
        assert one.manifest["optimizer"] == other.manifest["optimizer"]


def test_frozen_weights_are_saved_and_nothing_is_remembered_of_them(saved: Callable[..., Path]) -> None:
    names = files.Checkpoint(saved("2x2x1", "frozen")).names
    model = frozen()
    kinds: tuple[dict[str, Tensor], ...] = ({}, {})
    for name, p in model.named_parameters():
        kinds[p.requires_grad][name] = p
        assert f"weights/{name}" in names
    remembered = {name.removeprefix("optimizer/").rpartition("/")[0] for name in names if name.startswith("optimizer/")}
    assert remembered == set(kinds[True])
    assert "blocks.1.mlp.up.weight" in kinds[False]


def test_a_position_that_can_not_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    trained = lay_out("dp2", gpt())
    with pytest.raises(MplabError, match=r"position .* can't be saved \(.*not JSON serializable\): give numbers"):
        trained.save(tmp_path / "runs", {"batch": torch.ones(1)})
    assert not (tmp_path / "runs").exists()
    trained.save(tmp_path / "runs", {"batch": 1, "epochs": [1, 2], "name": "text"})
    assert trained.load(tmp_path / "runs") == {"batch": 1, "epochs": [1, 2], "name": "text"}


def test_an_optimizer_that_does_not_treat_every_element_alike_is_refused(tmp_path: Path) -> None:
    trained = lay_out("dp2 whole", gpt(), torch.optim.Adafactor)
    trained.step(batches()[0])
    with pytest.raises(CheckpointError, match=r"remembers row_var of shape \(16, 1\) of embedding\.token\.weight"):
        trained.save(tmp_path)


@pytest.mark.parametrize(
    "factory",
    [
        partial(torch.optim.Adagrad, lr=0.1),
        partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
        partial(torch.optim.NAdam, lr=0.01),
        partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
        partial(torch.optim.ASGD, lr=0.1),
        partial(torch.optim.AdamW, lr=torch.tensor(0.01), foreach=False),
    ],
    ids=["Adagrad", "RMSprop", "NAdam", "amsgrad", "ASGD", "lr as a tensor"],
)
def test_whatever_an_optimizer_remembers(factory: Any, tmp_path: Path) -> None:
    model = with_numbers()
    engine = Serial(model, factory(model.parameters()))
    data = batches()[: BEFORE + 2]  # after more steps it shows that torch loads NAdam's product in another dtype
    losses = [engine.step(batch) for batch in data]
    first = lay_out("dp2", with_numbers(), factory)
    first.steps(batches()[:BEFORE])
    first.save(tmp_path)
    resumed = lay_out("dp3", with_numbers(seed=7), factory)
    resumed.load(tmp_path)
    assert resumed.steps(data[BEFORE:]) == pytest.approx(losses[BEFORE:], abs=TOLERANCE)


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(trained: Parallelized, root: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    """And nothing of it was loaded, on any rank: it goes on as one that has never tried."""
    twin = copy.deepcopy({rank: _all_of(engine) for rank, engine in trained.engines.items()})
    with pytest.raises(error, match=message):
        trained.load(root)
    now = {rank: _all_of(engine) for rank, engine in trained.engines.items()}
    for rank, before in twin.items():
        assert now[rank].keys() == before.keys()
        for name, value in before.items():
            same = torch.equal(now[rank][name], value) if isinstance(value, Tensor) else now[rank][name] == value
            assert same, f"{name} of rank {rank}"


def _all_of(engine: Any) -> dict[str, Any]:
    """What a rank has of weights and of the optimizer's state, where it is; no communication."""
    found: dict[str, Any] = {"steps": engine.num_steps}
    optimizer = engine.optimizer
    for i, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
        found |= {f"group {i} {key}": value for key, value in group.items() if key != "params"}
        for j, p in enumerate(group["params"]):
            found[f"parameter {i} {j}"] = p.detach()
            found |= {f"state {i} {j} {key}": value for key, value in optimizer.state.get(p, {}).items()}
    return found


OTHER_MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "deeper": (partial(gpt, num_layers=3), r"of another model: it lacks \['blocks\.2\."),
    "shallower": (partial(gpt, num_layers=1), r"of another model: .* has \['blocks\.1\."),
    "wider": (partial(gpt, width=32), r"has .* of shape \(16,.*: it is of another model|can't be cut"),
    "more words": (partial(gpt, vocab_size=32), r"has (head\.projection|embedding\.token)\.weight of shape \(16, 16\)"),
    "longer": (partial(gpt, context_length=2 * LENGTH), r"position.* of shape \(8, 16\)"),
    "untied": (partial(gpt, tied=False), r"it lacks \['head\.projection\.weight'\]|with the tied weights {'head"),
    "of another kind": (with_buffers, r"of another model"),
}


@pytest.mark.parametrize(
    ("other", "plan"),
    [(other, ("1", "2x2x1", "2x1x2")[(i + j) % 3]) for i, other in enumerate(OTHER_MODELS) for j in (0, 1)],
)
def test_another_model_is_refused(other: str, plan: str, saved: Callable[..., Path]) -> None:
    make, message = OTHER_MODELS[other]
    if other == "of another kind" and plan == "2x1x2":
        plan = "dp3"
    trained = lay_out(plan, make())
    trained.step(batches()[0])
    refused(trained, saved("1"), message)


@pytest.mark.parametrize("plan", ["1", "2x1x2"])
def test_a_head_of_its_own_is_not_lost(plan: str, saved: Callable[..., Path]) -> None:
    refused(lay_out(plan, gpt()), saved("2x2x1", "untied"), "of another model, with the tied weights {}")


@pytest.mark.parametrize("plan", ["1", "2x2x1", "2x1x2"])
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (torch.optim.SGD, "of another optimizer, AdamW with 1 group, and this one is SGD with 1 group"),
        (torch.optim.Adam, "of another optimizer, AdamW with 1 group, and this one is Adam with 1 group"),
        (
            lambda parameters: torch.optim.AdamW([{"params": [p], "lr": 0.1} for p in parameters]),
            r"AdamW with 1 group, and this one is AdamW with \d+ groups",
        ),
    ],
    ids=["SGD", "Adam", "groups"],
)
def test_another_optimizer_is_refused(factory: Any, message: str, plan: str, saved: Callable[..., Path]) -> None:
    trained = lay_out(plan, gpt(), factory)
    trained.step(batches()[0])
    refused(trained, saved("1"), message)


def test_momentum_may_be_left_off(saved: Callable[..., Path]) -> None:
    """It is a setting, and settings are the checkpoint's."""
    trained = lay_out("2x2x1", gpt(seed=7), partial(torch.optim.SGD, lr=1.0))
    trained.load(saved("1", optimizer="momentum"))
    assert trained.steps(batches()[BEFORE:]) == pytest.approx(serial("gpt", "momentum")[0][BEFORE:], abs=TOLERANCE)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "file", "plan"),
    [
        (_cut, "rank-00003.safetensors", "2x1x2"),
        (_cut, "manifest.json", "1x2x2"),
        (_flip, "rank-00003.safetensors", "1x2x2"),
        (_flip, "manifest.json", "2x1x2"),
        (Path.unlink, "rank-00003.safetensors", "2x1x2"),
        (Path.unlink, "manifest.json", "1x2x2"),
    ],
)
def test_a_damaged_checkpoint_loads_nowhere_and_the_one_before_does(
    damage: Callable[[Path], None], file: str, plan: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(saved("2x2x1"), tmp_path / "runs")
    older, newer = (tmp_path / "runs" / step_folder(step) for step in (BEFORE, BEFORE + 1))
    shutil.copytree(older, newer)
    damage(newer / file)
    trained = lay_out(plan, gpt(seed=7))
    refused(trained, tmp_path / "runs", f"{newer.name}/{file}")
    assert trained.load(older)["batch"] == BEFORE
    with pytest.raises(CheckpointError, match=f"{newer.name}/{file}"):
        merge(tmp_path / "runs", tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def changed(good: Path, bad: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """A checkpoint with another value of one tensor, as nobody but this library would write it."""
    saved = files.Checkpoint(good)
    tensors = {key: saved.read(key) for key in saved.names}
    tensors[name] = change(tensors[name])
    step = saved.manifest["step"]
    shard = files.write_shard(files.begin(bad, step), 0, tensors)
    more = {key: saved.manifest[key] for key in ("plan", "tied", "optimizer", "position")}
    files.commit(bad, step, [shard], more)


def test_a_state_of_another_size_is_refused_before_the_weights_are_loaded(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    """Nothing that this library writes; but all is looked at before anything changes."""
    changed(saved("1"), tmp_path, "optimizer/blocks.0.mlp.up.weight/exp_avg", lambda x: x[:, :-1])
    for plan in ("1", "dp2"):
        refused(lay_out(plan, gpt(seed=7)), tmp_path, r"exp_avg has shape \(64, 15\): it is of another model")


def test_as_many_numbers_in_another_shape_are_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    changed(saved("1"), tmp_path, "weights/blocks.0.mlp.up.weight", lambda x: x.reshape(16, 64))
    message = r"blocks\.0\.mlp\.up\.weight of shape \(16, 64\): it is of another model"
    for plan in ("1", "tp2"):
        refused(lay_out(plan, gpt(seed=7)), tmp_path, message)


@pytest.mark.parametrize(
    ("model", "name", "change", "message"),
    [
        ("gpt", "embedding.token.weight", lambda x: x[:-1], r"\(15, 16\) can't be cut along dim 0 for 2 ranks"),
        ("gpt", "blocks.0.mlp.up.bias", lambda x: x[0], r"\(\) can't be cut along dim 0 for 2 ranks"),
        # 2 divides 46, but not each of three matrices in it
        ("gpt2", "transformer.h.0.attn.c_attn.bias", lambda x: x[:-2], r"\(46,\) can't be cut along dim 0 for 2"),
    ],
    ids=["rows", "a number", "joined matrices"],
)
def test_a_size_that_the_tensor_axis_does_not_divide_is_refused(
    model: str, name: str, change: Any, message: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    changed(saved("1", model), tmp_path, f"weights/{name}", change)
    refused(lay_out("tp2", MODELS[model](seed=7)), tmp_path, f"^{name} of shape {message}", MplabError)


def test_the_same_step_twice_is_refused_and_training_goes_on(tmp_path: Path) -> None:
    trained = lay_out("2x2x1", gpt())
    trained.steps(batches()[:BEFORE])
    trained.save(tmp_path)
    with pytest.raises(CheckpointError, match=f"has a checkpoint of step {BEFORE} already"):
        trained.save(tmp_path)
    assert trained.steps(batches()[BEFORE:]) == pytest.approx(serial("gpt", "adamw")[0][BEFORE:], abs=TOLERANCE)
    trained.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [step_folder(BEFORE), step_folder(STEPS)]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_can_not_write_leaves_the_one_before(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = lay_out("2x2x1", gpt())
    trained.steps(batches()[:BEFORE])
    trained.save(tmp_path)
    trained.step(batches()[BEFORE])
    write = files.write

    def full(path: Path, tensors: Mapping[str, Tensor]) -> None:
        if path.name == f"rank-{rank:05d}.safetensors":
            raise CheckpointError(f"{path} can't be written (No space left on device)")
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        with pytest.raises(CheckpointError, match=rf"rank-0000{rank}\.safetensors can't be written"):
            trained.save(tmp_path)
    assert files.latest(tmp_path).name == step_folder(BEFORE)
    trained.save(tmp_path)
    assert files.Checkpoint(tmp_path).manifest["step"] == BEFORE + 1


# --- ranks that are not equally fast ---------------------------------------------------------------------------------


@contextmanager
def ahead(rank: Rank, came: threading.Semaphore) -> Iterator[None]:
    """A rank that tells whenever it comes to a barrier, and when it has ended: only then another one goes on."""
    barrier = rank.comm.barrier
    rank.comm.barrier = lambda: (came.release(), barrier())[1]  # type: ignore[method-assign]
    try:
        yield
    finally:
        came.release(9)


def late(came: threading.Semaphore, function: Callable[..., Any], *arguments: Any) -> Any:
    assert came.acquire(timeout=30)
    return function(*arguments)


def test_nobody_writes_before_the_folder_is_there_or_goes_on_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 makes it, and names it: both times rank 1 is ahead."""
    came = threading.Semaphore(0)

    def run(rank: Rank) -> None:
        engine = HybridParallel(gpt(), rank.comm, PLANS["pp2"])
        with ahead(rank, came) if rank.index == 1 else nullcontext():
            assert (checkpoint.save(engine, tmp_path) / "manifest.json").is_file()

    monkeypatch.setattr(files, "begin", partial(late, came, files.begin))
    monkeypatch.setattr(files, "commit", partial(late, came, files.commit))
    World(2, "cpu").run(run)


def test_damage_is_named_by_the_rank_that_looks_for_it(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 looks at the second file. Rank 0 is ahead, and would come across it, and say another thing."""
    shutil.copytree(saved("dp2"), tmp_path / "runs")
    (tmp_path / "runs" / step_folder(BEFORE) / "rank-00001.safetensors").unlink()
    came, look = threading.Semaphore(0), files.Checkpoint

    def run(rank: Rank) -> None:
        engine = HybridParallel(gpt(), rank.comm, PLANS["pp2"])
        with ahead(rank, came) if rank.index == 0 else nullcontext():
            checkpoint.load(engine, tmp_path / "runs")

    def look_late(root: Path, check: tuple[int, int]) -> files.Checkpoint:
        return late(came, look, root, check) if check[0] == 1 else look(root, check)

    monkeypatch.setattr(files, "Checkpoint", look_late)
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors is missing: take another checkpoint"):
        World(2, "cpu").run(run)


# --- one plain state_dict --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "plan"), [("gpt", "2x2x1"), ("untied", "2x1x2"), ("gpt2", "2x1x2"), ("llama", "tp4"), ("frozen", "2x1x2")]
)
def test_merged_it_is_an_ordinary_state_dict(model: str, plan: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    state = merge(saved(plan, model), file)
    fresh, expected = MODELS[model](seed=7), MODELS[model]()
    fresh.load_state_dict(load_file(file), strict=True)
    alike(load_file(file), {name: state[name] for name in load_file(file)})
    with one_thread():
        serial_engine = Serial(expected, OPTIMIZERS["adamw"](expected.parameters()), loss_of)  # type: ignore[arg-type]
        for batch in batches()[:BEFORE]:
            serial_engine.step(batch)
        judge = Serial(fresh, torch.optim.SGD(fresh.parameters()), loss_of)  # type: ignore[arg-type]
        loss = serial_engine.evaluate(batches()[BEFORE:])
        assert judge.evaluate(batches()[BEFORE:]) == pytest.approx(loss, abs=tolerance_of(model))
    assert sorted(state) == sorted(expected.state_dict())
    if model == "gpt":  # tied names have each their own memory, as a file of safetensors must have it
        assert state["head.projection.weight"].data_ptr() != state["embedding.token.weight"].data_ptr()


def test_what_was_merged_stays_when_the_checkpoint_goes(tmp_path: Path, saved: Callable[..., Path]) -> None:
    shutil.copytree(saved("2x2x1"), tmp_path / "runs")
    state = merge(tmp_path / "runs", tmp_path / "model.safetensors")
    before = copies(state)
    for path in (tmp_path / "runs" / step_folder(BEFORE)).iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    alike(state, before)
    with pytest.raises(CheckpointError, match=r"nowhere.*can't be written"):
        merge(saved("2x2x1"), tmp_path / "nowhere" / "model.safetensors")


# --- the command line ------------------------------------------------------------------------------------------------

DIGITS = ["train", "--data", "digits", "--width", "16", "--device", "cpu"]


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("MPLAB_ORDERED_OUTPUT", "1")
    for name in ("1", "dp2", "pp2", "dp3"):
        PLANS[name].save(tmp_path / f"{name}.json")
    return {name: str(tmp_path / f"{name}.json") for name in ("1", "dp2", "pp2", "dp3")}


def train(*arguments: object, status: int = 0) -> None:
    assert command_line.main([*DIGITS, *map(str, arguments)]) == status


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in root.iterdir())


def losses_in(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss (\d+\.\d+)", output)]


def test_resumed_by_another_plan(plans: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--check-serial` compares with serial training that never stopped: the data goes on where it was."""
    root = tmp_path / "runs"
    train("--plan", plans["dp2"], "--steps", 5, "--save", root, "--every", 2)
    assert steps_in(root) == [2, 4, 5]
    assert f"the last checkpoint: {root}/step-00000005" in capsys.readouterr().out
    train("--plan", plans["dp3"], "--steps", 8, "--resume", root, "--save", root, "--check-serial")
    output = capsys.readouterr().out
    assert steps_in(root) == [2, 4, 5, 8]
    assert f"goes on after step 5 of {root}" in output
    assert "after 8 steps" in output
    assert "as rounding does" in output
    train("--plan", plans["pp2"], "--steps", 8, "--resume", root / "step-00000004", "--check-serial")
    again = capsys.readouterr().out
    assert "as rounding does" in again
    assert losses_in(again)[1] == pytest.approx(losses_in(output)[1], abs=2e-4)  # both of the eighth step


def test_data_that_did_not_go_on_would_be_seen(
    plans: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("--plan", plans["1"], "--steps", 3, "--save", tmp_path / "runs")
    from mplab.datasets import Digits

    at = Digits.batches
    monkeypatch.setattr(Digits, "batches", lambda self, num, start=0: at(self, num, 0))
    train("--plan", plans["1"], "--steps", 5, "--resume", tmp_path / "runs", "--check-serial", status=1)
    assert "more than 0.001" in capsys.readouterr().out


def test_at_the_end_only(plans: dict[str, str], tmp_path: Path) -> None:
    train("--plan", plans["1"], "--steps", 3, "--save", tmp_path / "a")
    assert steps_in(tmp_path / "a") == [3]


def test_one_command_begins_and_goes_on_and_has_nothing_left(
    plans: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[int, str]] = []
    monkeypatch.setattr(train_plan, "World", lambda n, device: (made.append((n, device)), World(n, device))[1])
    root = tmp_path / "b"
    command = ["--plan", plans["1"], "--save", root, "--resume", root, "--every", 2, "--steps"]
    train(*command, 1)
    train(*command, 4)
    assert steps_in(root) == [1, 2, 4]
    assert f"goes on after step 1 of {root}" in capsys.readouterr().out
    train(*command, 4)
    assert "these are all 4 steps: nothing is left to train" in capsys.readouterr().out
    assert steps_in(root) == [1, 2, 4]
    assert made == [(1, "cpu")] * 3


def test_a_loss_that_is_no_number_ends_it(
    plans: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = SimpleNamespace(step=lambda batch: math.inf, num_steps=7)
    monkeypatch.setattr(train_plan, "parallelize", lambda *_, **__: trained)
    train("--plan", plans["1"], "--steps", 2, status=2)
    assert "the loss of step 7 is inf: lower --lr, which is 0.003" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints: of the command line, of one's own, and damaged."""
    folder = tmp_path_factory.mktemp("trained")
    PLANS["1"].save(folder / "plan.json")
    train("--plan", folder / "plan.json", "--steps", 3, "--save", folder / "runs", "--every", 2)
    lay_out("1", gpt()).save(folder / "own")
    shutil.copytree(folder / "runs", folder / "cut")
    (folder / "cut" / "step-00000003" / "manifest.json").write_text("{")
    (folder / "own.txt").write_text("to be or not to be, " * 200)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save", "runs"], "--save is for training by a plan: give --plan FILE too"),
        (["--resume", "runs"], "--resume is for training by a plan: give --plan FILE too"),
        (["--plan", "PLAN", "--every", "2"], "--every 2: give --save DIR too"),
        (["--plan", "PLAN", "--every", "0", "--save", "runs"], "--every 0: must be 1 or more"),
        (["--plan", "PLAN", "--every", "-1"], "--every -1: must be 1 or more"),
        (["--plan", "PLAN", "--resume", "new"], "new has no checkpoint (step-..., with a manifest.json): there is no"),
        (["--plan", "PLAN", "--resume", "own"], "--resume own: own/step-00000000 does not say on what data"),
        (["--plan", "PLAN", "--save", "runs"], "it has a checkpoint of step 3 already, and this training begins after"),
        (["--plan", "PLAN", "--save", "runs", "--resume", "runs/step-00000002"], "begins after step 2: go on from"),
        (["--plan", "PLAN", "--resume", "runs", "--steps", "2"], "gone 3 steps, and --steps 2 counts them: give 3 or"),
        (["--plan", "PLAN", "--save", "PLAN"], "no folder can be made there"),
        (["--plan", "PLAN", "--resume", "runs", "--lr", "0.1"], "it was trained with lr 0.003, and this is lr 0.1"),
        (["--plan", "PLAN", "--resume", "runs", "--batch-size", "8"], "trained with batch-size 16, and this is batch"),
        (["--plan", "PLAN", "--resume", "runs", "--width", "32", "--seed", "1"], "width 16, seed 0, and this is width"),
        (
            ["--plan", "PLAN", "--resume", "runs", "--data", "own.txt"],
            "data digits, samples 1438, and this is data own",
        ),
        (["--plan", "PLAN", "--resume", "cut"], "cut/step-00000003/manifest.json can't be read"),
    ],
)
def test_mistakes_are_named_before_any_work(
    arguments: list[str],
    message: str,
    trained_once: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(trained_once)
    before = sorted(trained_once.rglob("*"))
    train(*("plan.json" if argument == "PLAN" else argument for argument in arguments), status=2)
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert sorted(trained_once.rglob("*")) == before


def test_a_file_may_lie_elsewhere(plans: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    for folder in (tmp_path, tmp_path / "there"):
        (folder / "own.txt").write_text("to be or not to be, " * 300)
    sizes = ["--layers", 1, "--heads", 2, "--sequence", 16]
    train("--data", tmp_path / "own.txt", *sizes, "--plan", plans["1"], "--steps", 2, "--save", tmp_path / "runs")
    more = ["--plan", plans["dp2"], "--steps", 4, "--resume", tmp_path / "runs", "--check-serial"]
    train("--data", tmp_path / "there" / "own.txt", *sizes, *more)
    assert "as rounding does" in capsys.readouterr().out


def test_under_a_launcher_too(plans: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Saved by one process, gone on with by two, and by threads again."""
    root = tmp_path / "runs"
    train("--plan", plans["1"], "--steps", 2, "--save", root)
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    said = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    said |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "mplab", *DIGITS, "--plan", plans["dp2"], "--steps", "4"]
    processes = [
        subprocess.Popen(
            [*command, "--resume", root, "--save", root],
            cwd=ROOT,
            env=os.environ | said | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    first, second = (process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert second == ""
    assert "goes on after step 2" in first
    assert steps_in(root) == [2, 4]
    assert len(list((root / "step-00000004").glob("rank-*"))) == 2
    train("--plan", plans["pp2"], "--steps", 6, "--resume", root, "--check-serial")
    assert "as rounding does" in capsys.readouterr().out
