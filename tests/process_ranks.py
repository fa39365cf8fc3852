"""What the processes of tests/test_processes*.py run: `process_ranks.py FOLDER SCENARIO...`, each in its own world.

Each process writes what it saw of each scenario to FOLDER/SCENARIO.RANK.json.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import data_parallel as data
import pytest
import torch
from conformance import CHECKS, checks_of, groups, ledgers, messages
from pipelines import ALL_ORDERS, OPTIMIZERS, assert_losses, assert_weights, batches, chain, serial_chain, stages_a_rank
from torch import nn

from mplab import Mesh, MplabError, Plan, Rank, World
from mplab.comm.reduction import OPS
from mplab.datasets import Batch
from mplab.models import GPT, GPTConfig, cross_entropy, seed_parameters
from mplab.parallel import (
    DataParallel,
    HybridParallel,
    PipelineParallel,
    Serial,
    ShardedDataParallel,
    TensorParallel,
    naive_data_parallel,
    parallelize,
    parameter_server,
    scatter_gather,
)
from mplab.plan.partition import by_depth
from mplab.world.launch import ProcessWorld

TIMEOUT_S = 1.5  # of the worlds in which something hangs


# --- the same results and the same ledger as thread ranks ------------------------------------------------------------


def program(rank: Rank) -> list[Any]:
    """Every collective, several dtypes, uneven lengths, groups and messages; what came of it, and the ledger."""
    n, me, comm = rank.size, rank.index, rank.comm
    results: list[Any] = []
    for dtype in (torch.float32, torch.bfloat16, torch.int16, torch.bool, torch.complex128):
        is_large_too = dtype in (torch.float32, torch.bool)  # the first in chunks, the second whole
        for length in (0, 7, 150_001) if is_large_too else (0, 7):
            x = torch.randn(length, generator=torch.Generator().manual_seed(me), dtype=torch.float64).to(dtype)
            for op in OPS:
                if (op == "mean" and not (dtype.is_floating_point or dtype.is_complex)) or (
                    op in ("max", "min") and dtype.is_complex
                ):
                    continue
                results += [comm.all_reduce(x, op), comm.reduce(x, op, n - 1), comm.reduce_scatter(x, op)]
                results += [comm.all_reduce_(x.clone(), op), comm.iall_reduce(x, op).wait()]
            results += [comm.broadcast(x if me == 0 else None), comm.scatter(x if me == 1 else None, 1)]
            results += [comm.all_gather(x[: length // (me + 1)]), comm.gather(x[me:], n - 1)]
            results += comm.all_to_all([x[: length // (me + r + 1)] for r in range(n)])
    y = torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2) * (me + 1)
    results += [
        comm.all_reduce(y),
        comm.all_gather(y, -1),
        comm.reduce_scatter(y, "max", 1),
        comm.all_reduce(y[0, 0, 0]),
    ]
    comm.barrier()
    comm.isend(y, (me + 1) % n, tag=3)
    comm.send(y[1], (me + 1) % n)
    results += [comm.recv((me - 1) % n), comm.recv((me - 1) % n, tag=3)]
    half = comm.group([r for r in range(n) if r % 2 == me % 2])
    results += [half.all_reduce(y), half.group(range(half.size)).all_gather(y)]
    mesh = Mesh(dp=2, tp=n // 2).connect(comm)
    results += [mesh.dp.all_reduce(y), mesh.tp.all_gather(y), torch.rand(3, generator=rank.generator)]
    return [[digest(x) for x in results], [message[:6] for message in comm.ledger.messages]]


def digest(x: torch.Tensor | None) -> str:
    if x is None:
        return "None"
    data = x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{x.dtype} {tuple(x.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


def same(world: ProcessWorld) -> Any:
    (result,) = world.run(program)
    assert world.ledgers[0] is world.rank.comm.ledger
    return result


def conformance(world: ProcessWorld) -> Any:
    for check in CHECKS:
        world.run(check)
    return len(CHECKS)


def conformance_of_groups(world: ProcessWorld) -> Any:
    """What takes more than two ranks to go wrong."""
    for check in OF_GROUPS:
        world.run(check)
    return len(OF_GROUPS)


OF_GROUPS = checks_of(groups, ledgers, messages)


def fabric(world: ProcessWorld) -> Any:
    """The way of CUDA tensors, with CPU tensors over gloo in place of NCCL."""

    def over_fabric(rank: Rank) -> list[Any]:
        rank.comm._has_fabric = True  # type: ignore[attr-defined]
        return program(rank)

    return world.run(over_fabric)[0]


def timeline(world: ProcessWorld) -> Any:
    """What every process sees of all of them, and what else a world has to tell."""

    def work(rank: Rank) -> None:
        with rank.span("forward", microbatch=1):
            time.sleep(0.05 * (rank.index + 1))
        rank.comm.all_reduce(torch.ones(1000))

    world.run(lambda rank: rank.comm.barrier())  # the next one's alone are told
    world.run(work)
    kept = [(e.rank, e.lane, e.name, e.size_bytes, e.microbatch) for e in world.timeline.events]
    forward = [[e.start_s, e.end_s] for e in world.timeline.events if e.name == "forward"]
    return {"events": sorted(map(repr, kept)), "forward": forward, "text": str(world), "notes": world.notes}


def backward(world: ProcessWorld) -> Any:
    """Collectives inside of backward."""

    def work(rank: Rank) -> list[Any]:
        class Reduced(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x * 1

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
                return rank.comm.all_reduce(grad)

        x = torch.ones(3, requires_grad=True)
        Reduced.apply(x).sum().backward()
        return [x.grad.tolist(), torch.get_num_threads()]

    return world.run(work)[0]


def train(rank: Rank) -> list[Any]:
    """Pipelines that move their layers, held to serial training; losses, weights and messages to the bit."""
    results: list[Any] = []
    both = ("sgd", False), ("adamw", True)
    for index, order in enumerate(("1f1b", "interleaved", "zero_bubble", "last_first", "folded")):
        cuts = by_depth(8, rank.size * stages_a_rank(order)).cuts
        elsewhere = (*range(1, len(cuts)), 7)
        # Four ranks share two cores: there each order once is enough, and both optimizers are met.
        for optimizer, tied in both if rank.size == 2 else (both[(index + 1) % 2],):
            trained = serial_chain(optimizer, 4, tied=tied)
            options = {"num_microbatches": 3, "optimizer": OPTIMIZERS[optimizer], "recompute": order == "1f1b" and tied}
            pipe = PipelineParallel(chain(tied=tied), cuts, rank.comm, ALL_ORDERS[order], **options)
            losses = []
            for batch, there in zip(batches(num_batches=4), (cuts, elsewhere, elsewhere, cuts), strict=True):
                pipe.move(there)
                losses.append(pipe.step(batch))
            assert_losses(losses, trained)
            assert_weights(pipe, trained)
            results += [digest(torch.tensor(losses)), *map(digest, pipe.state_dict().values())]
    return [results, [message[:6] for message in rank.comm.ledger.messages]]


def data_parallel(rank: Rank) -> list[Any]:
    """Every way of data parallelism: losses, weights and messages to the bit."""
    results: list[Any] = []
    for (index, step), one_sample in itertools.product(enumerate(WAYS), (False, True)):
        variant, optimizer = ("branch", "adamw") if one_sample else ("tied", ("sgd", "adamw")[index % 2])
        num_samples, num_steps = (1, 3) if one_sample else (11, 4)
        model = data.model(variant)
        own = data.OPTIMIZERS[optimizer](model.parameters())
        losses = [step(model, own, batch, rank.comm) for batch in data.batches(num_samples, num_steps)]
        want = data.serial(variant, optimizer, rank.size, num_samples=num_samples, num_steps=num_steps)
        assert losses == pytest.approx(want.losses, abs=1e-10)
        results += [digest(torch.tensor(losses)), *map(digest, model.state_dict().values())]
    return [results, [message[:6] for message in rank.comm.ledger.messages]]


WAYS = naive_data_parallel, parameter_server, scatter_gather


def in_buckets(rank: Rank) -> list[Any]:
    """`DataParallel` held to serial training; losses, weights and messages to the bit."""
    results: list[Any] = []
    runs: list[tuple[str, str, dict[str, Any]]] = [
        ("plain", "sgd", {"bucket_bytes": 200}),
        ("conv", "adamw", {"bucket_bytes": 1, "overlap": False}),
        ("used twice", "sgd", {"max_norm": 0.5}),
        ("unused", "adamw", {"bucket_bytes": 200}),
        ("branch", "adamw", {"bucket_bytes": 200}),
        ("frozen", "adamw", {"bucket_bytes": 200, "num_microbatches": 2}),
        ("tied", "adamw", {"autocast": torch.bfloat16}),
    ]
    for variant, optimizer, options in runs:
        dtype = torch.float64 if variant == "frozen" else torch.float32
        start = data.model(variant, dtype, seed=rank.index)
        engine = DataParallel(start, rank.comm, optimizer=data.OPTIMIZERS[optimizer], **options)
        for num_samples, num_steps in ((11, 4), (1, 1)):
            got = data.follow(engine.step, engine.model, data.batches(num_samples, num_steps))
            if num_samples == 11 and "autocast" not in options:
                want = data.serial(variant, optimizer, rank.size, dtype, num_steps=4, max_norm=options.get("max_norm"))
                data.assert_trained_alike(got, want, 1e-6 if "num_microbatches" in options else 0.0)
            results += [digest(torch.tensor(got.losses)), *map(digest, engine.state_dict().values())]
    mine = tuple(x[rank.index :: rank.size] for x in data.batches(3, 1)[0])
    assert engine.step_shard((mine[0], mine[1])) > 0
    results += map(digest, engine.state_dict().values())
    return [results, [message[:6] for message in rank.comm.ledger.messages]]


def in_shards(rank: Rank) -> list[Any]:
    """`ShardedDataParallel` held to serial training; losses, weights and messages to the bit."""
    results: list[Any] = []
    runs = ("plain", "sgd"), ("tied", "adamw"), ("frozen", "adamw"), ("unused", "sgd")
    some = [*zip((1, 2, 1, 2), runs, strict=True), *((3, run) for run in runs)]  # stage 3 has most to send
    for stage, (variant, optimizer) in some:
        start = data.model(variant, torch.float32, seed=rank.index)
        engine = ShardedDataParallel(start, rank.comm, stage, optimizer=data.OPTIMIZERS[optimizer])
        losses = [engine.step(batch) for batch in data.batches(11, 4)]
        want = data.serial(variant, optimizer, rank.size, torch.float32, num_steps=4)
        assert losses == pytest.approx(want.losses, abs=1e-6)
        weights = engine.full_state_dict()
        torch.testing.assert_close(weights, want.weights[-1], rtol=0, atol=1e-6)
        results += [digest(torch.tensor(losses)), *map(digest, weights.values())]
    return [results, [message[:6] for message in rank.comm.ledger.messages]]


def on_gpus(world: ProcessWorld) -> Any:
    """Strategies over NCCL held to serial training on a CPU, and what the world says of it all."""

    def work(rank: Rank) -> None:
        want = data.serial("tied", "adamw", rank.size, num_steps=4)
        for engine in (DataParallel, partial(ShardedDataParallel, stage=1), partial(ShardedDataParallel, stage=3)):
            options: Any = {"optimizer": data.OPTIMIZERS["adamw"]}
            if engine is DataParallel:
                options["bucket_bytes"] = 200
            trainer = engine(data.model("tied", seed=rank.index), rank.comm, **options)
            losses = [trainer.step(batch) for batch in data.batches(num_batches=4)]
            assert losses == pytest.approx(want.losses, abs=1e-9)
        trained, cuts = serial_chain("sgd", 4), by_depth(8, rank.size).cuts
        pipe = PipelineParallel(chain(), cuts, rank.comm, num_microbatches=3, optimizer=OPTIMIZERS["sgd"])
        assert_losses([pipe.step(batch) for batch in batches(num_batches=4)], trained, 1e-9)
        assert all(weight.is_cuda for weight in pipe.state_dict().values())

    world.run(work)
    assert all(e.start_s <= e.end_s for e in world.timeline.events)
    return [world.backend, str(world.rank.device), sorted({e.rank for e in world.timeline.events})]


def in_tensors(rank: Rank, sequence_parallel: bool) -> list[Any]:
    """`TensorParallel` of a GPT held to serial training; losses, gradients, weights and messages to the bit."""
    results: list[Any] = []
    small, large = GPTConfig(8, 8, 1, 4, 8), GPTConfig(8, 64, 1, 4, 64, tied=False)
    runs: list[tuple[GPTConfig, torch.dtype, int, dict[str, Any]]] = [
        (small, torch.float64, 5, {}),
        (small, torch.float32, 5, {"overlap": True, "num_microbatches": 2, "max_norm": 0.5}),
        (large, torch.float64, 40, {"overlap": True}),  # above what is sent whole, and what one rank adds up for all
    ]
    for config, dtype, num_samples, options in runs:
        models = [GPT(config, seed).to(dtype) for seed in (0, rank.index)]  # only rank 0's weights count
        data = tokens(num_samples, config.context_length, 2 if config is small else 1)
        results += cut(rank, *models, data, sequence_parallel=sequence_parallel, **options)
    return [results, [message[:6] for message in rank.comm.ledger.messages]]


HYBRID: list[tuple[Plan, torch.dtype, dict[str, Any]]] = [
    (Plan(2, 1, 2, num_microbatches=2), torch.float64, {"max_norm": 0.5}),
    (Plan(2, 1, 2, zero=3, sequence_parallel=True), torch.float32, {"max_norm": 0.5}),
    (Plan(2, 2, 1, zero=1, num_microbatches=3), torch.float64, {"max_norm": 0.5}),
    (Plan(1, 2, 2, None, "zero_bubble", 3, 0, True), torch.float32, {}),
]


def in_every_axis(rank: Rank) -> list[Any]:
    """`HybridParallel` of a GPT held to serial training; losses, weights and messages to the bit."""
    results: list[Any] = []
    for plan, dtype, options in HYBRID:
        place = Mesh(plan.dp, plan.pp, plan.tp).coordinates(rank.index)
        models = [GPT(GPTConfig(8, 8, 2, 4, 8), seed).to(dtype) for seed in (0, place["dp"] + place["tp"])]
        engine = HybridParallel(models[1], rank.comm, plan, optimizer=OPTIMIZERS["sgd"], **options)
        losses = [engine.step(batch) for batch in tokens(7, 8, 3)]
        serial = Serial(models[0], OPTIMIZERS["sgd"](models[0].parameters()), **options)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
        assert losses == pytest.approx([serial.step(batch) for batch in tokens(7, 8, 3)], abs=tolerance)
        weights = engine.full_state_dict()
        torch.testing.assert_close(weights, dict(models[0].state_dict()), rtol=0, atol=tolerance)
        results += [digest(torch.tensor(losses)), *map(digest, weights.values())]
    return [results, [message[:6] for message in rank.comm.ledger.messages]]


def by_one_call(world: World | ProcessWorld) -> list[Any]:
    """`parallelize`, called from outside of the ranks, in several runs."""
    trained = parallelize(GPT(GPTConfig(8, 8, 2, 4, 8)), world, Plan(2, 1, 2, zero=1), optimizer=OPTIMIZERS["sgd"])
    first, *others = tokens(7, 8, 3)
    losses = [trained.step(first), *trained.steps(others)]
    return [losses, list(map(digest, trained.full_state_dict().values())), trained.num_steps]


def tokens(num_samples: int, length: int, num_batches: int) -> list[Batch]:
    draw = torch.randint(8, (num_batches, 2, num_samples, length), generator=torch.Generator().manual_seed(2))
    return [(inputs, targets) for inputs, targets in draw]


def cut(
    rank: Rank, whole: nn.Module, mine: nn.Module, data: list[Batch], tolerance: float | None = None, **options: Any
) -> list[str]:
    """What `mine` came to when it was trained over the ranks, held to serial training of `whole`."""
    engine = TensorParallel(mine, rank.comm, optimizer=OPTIMIZERS["sgd"], **options)
    losses = [engine.step(batch) for batch in data]
    gradients, weights = engine.full_gradients(), engine.full_state_dict()

    serial_model = copy.deepcopy(whole)
    of_outputs: Any = lambda y, targets: cross_entropy(getattr(y, "logits", y), targets)  # noqa: E731
    serial = Serial(serial_model, OPTIMIZERS["sgd"](serial_model.parameters()), of_outputs, max_norm=engine.max_norm)
    want = [serial.step(batch) for batch in data]
    tolerance = tolerance or {torch.float64: 1e-10, torch.float32: 1e-5}[next(whole.parameters()).dtype]
    assert losses == pytest.approx(want, abs=tolerance)
    torch.testing.assert_close(weights, dict(serial_model.state_dict()), rtol=0, atol=tolerance)
    for name, parameter in serial_model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=tolerance)
    return [digest(torch.tensor(losses)), *map(digest, gradients.values()), *map(digest, weights.values())]


def llama() -> nn.Module:
    """Of Hugging Face; grouped key/value heads. Not to be made by ranks: it draws from the global generator."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=8, intermediate_size=32, max_position_embeddings=8, **sizes)
        )
    seed_parameters(model)
    return model


def llama_in_tensors(rank: Rank, whole: nn.Module) -> list[Any]:
    """`TensorParallel` of a Llama, by the plan that it carries."""
    results: list[Any] = []
    for dtype, is_both in ((torch.float64, False), (torch.float32, True)):
        model, options = copy.deepcopy(whole).to(dtype), {"sequence_parallel": is_both, "overlap": is_both}
        results += cut(rank, model, model, tokens(5, 8, 2), 1e-5, **options)  # its norms compute in float32
    return [results, [message[:6] for message in rank.comm.ledger.messages]]


def in_two_runs(world: ProcessWorld) -> Any:
    """A pipeline of one run of the world goes on in the next."""
    data, trained = batches(num_batches=4), serial_chain("sgd", 4, tied=True)
    options = {"num_microbatches": 3, "optimizer": OPTIMIZERS["sgd"]}
    (pipe,) = world.run(lambda rank: PipelineParallel(chain(tied=True), (2,), rank.comm, **options))
    losses = []
    for batch, cuts in zip(data, ((2,), (5,), (1,), (4,)), strict=True):

        def go_on(rank: Rank, batch: Any = batch, cuts: Any = cuts) -> float:
            pipe.connect(rank.comm)
            pipe.move(cuts)
            return pipe.step(batch)

        losses += world.run(go_on)
    assert_losses(losses, trained)
    return losses


# --- faults: each rank's function, by scenario -----------------------------------------------------------------------


def differ(*calls: Callable[[Rank], Any]) -> Callable[[Rank], Any]:
    """Rank i makes the i-th call, the others the last one; the tensor of each must stay as it was."""

    def work(rank: Rank) -> None:
        rank.comm.barrier()
        calls[min(rank.index, len(calls) - 1)](rank)

    return work


X = torch.arange(6.0)


def raising(rank: Rank) -> None:
    rank.comm.barrier()
    if rank.index == 1:
        with rank.span("forward"):
            raise KeyError("no such layer")
    rank.comm.all_reduce(X)


def raising_in_a_step(rank: Rank) -> None:
    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such loss")

    options = {"num_microbatches": 3, "optimizer": OPTIMIZERS["sgd"], "loss_fn": loss}
    PipelineParallel(chain(), (4,), rank.comm, **options).step(batches()[0])


def out_of_memory(rank: Rank) -> None:
    rank.comm.barrier()
    if rank.index == 1:
        with rank.span("forward"):
            torch.empty(1 << 50, dtype=torch.uint8)
    rank.comm.all_reduce(X)


def interrupted(rank: Rank) -> None:
    if rank.index == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    if rank.index == 0:
        time.sleep(1.5)  # nobody else can go on
    rank.comm.barrier()


def early(rank: Rank) -> None:
    """Rank 1 waits for rank 0, which has ended, while others compute."""
    if rank.index == 1:
        rank.comm.recv(0)
    elif rank.index > 1:
        time.sleep(1.5)


def ring(rank: Rank) -> None:
    rank.comm.recv((rank.index + 1) % rank.size)


def cycle(rank: Rank) -> None:
    """0 waits for 1 in one group, 1 for 0 in another."""
    pair, all_ranks = rank.comm.group([0, 1]) if rank.index < 2 else None, rank.comm
    if rank.index == 0 and pair is not None:
        pair.barrier()
    all_ranks.recv(0) if rank.index == 1 else all_ranks.barrier()


def cycle_of_groups(rank: Rank) -> None:
    """Three groups of two, each rank in two of them and each waiting in another one first."""
    n, me = rank.size, rank.index
    right, left = sorted([me, (me + 1) % n]), sorted([me, (me - 1) % n])
    rank.comm.group(right).barrier()
    rank.comm.group(left).barrier()


def unsent_on_the_way(rank: Rank) -> None:
    """A message that nobody receives is no way out of a deadlock."""
    if rank.index == 0:
        rank.comm.send(X, 1, tag=5)
    ring(rank)


def late(rank: Rank) -> None:
    if rank.index == 1:
        time.sleep(TIMEOUT_S + 1.0)  # the late line; under MPI those that gave up end all 1.5 s later
    rank.comm.barrier()


def late_but_in_time(rank: Rank) -> None:
    if rank.index == 1:
        time.sleep(TIMEOUT_S - 0.5)
    rank.comm.barrier()
    if rank.index == 0:
        time.sleep(TIMEOUT_S + 0.5)  # the end of a run waits for as long as it takes


def hanging(rank: Rank) -> None:
    if rank.index == 1:
        time.sleep(100)
    rank.comm.barrier()


def killed(rank: Rank) -> None:
    rank.comm.barrier()
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    rank.comm.barrier()


def between_runs(rank: Rank) -> None:
    """Called twice: what was sent and not received in the first run does not reach the second."""
    if rank.index == 0:
        rank.comm.send(X if SEEN["runs"] == 0 else -X, 1)
    elif rank.index == 1 and SEEN["runs"] == 1:
        SEEN["received"] = rank.comm.recv(0).tolist()
    SEEN["runs"] += 1


SEEN: dict[str, Any] = {"runs": 0}

FAULTS: dict[str, Callable[[Rank], Any]] = {
    "differ_name": differ(lambda r: r.comm.all_reduce_(X), lambda r: r.comm.all_gather(X)),
    "differ_shape": differ(lambda r: r.comm.all_reduce_(X.view(2, 3)), lambda r: r.comm.all_reduce_(X.view(3, 2))),
    "differ_length": differ(lambda r: r.comm.all_reduce_(X), lambda r: r.comm.all_reduce_(X[:5])),
    "differ_dtype": differ(lambda r: r.comm.all_reduce_(X), lambda r: r.comm.all_reduce_(X.int())),
    "differ_op": differ(lambda r: r.comm.all_reduce_(X, "max"), lambda r: r.comm.all_reduce_(X)),
    "differ_root": differ(lambda r: r.comm.broadcast(X, 1), lambda r: r.comm.broadcast(X, 0)),
    "differ_dim": differ(
        lambda r: r.comm.reduce_scatter(X.view(2, 3), dim=1), lambda r: r.comm.reduce_scatter(X.view(2, 3))
    ),
    "differ_order": differ(
        lambda r: (r.comm.iall_reduce_(X), r.comm.iall_gather(X).wait()), lambda r: r.comm.iall_gather(X).wait()
    ),
    "differ_group_order": differ(
        lambda r: r.comm.group(range(r.size)).all_reduce_(X),
        lambda r: r.comm.group(list(reversed(range(r.size)))).all_reduce_(X),
    ),
    "differ_in_lists": differ(
        lambda r: r.comm.all_reduce_coalesced_([X[:4], X[4:]]), lambda r: r.comm.all_reduce_coalesced_([X[4:], X[:4]])
    ),
    "differ_in_number": differ(
        lambda r: r.comm.all_reduce_coalesced_([X]), lambda r: r.comm.all_reduce_coalesced_([X[:4], X[4:]])
    ),
    "differ_in_dtype_of_lists": differ(
        lambda r: r.comm.all_reduce_coalesced_([X]), lambda r: r.comm.all_reduce_coalesced_([X.int()])
    ),
    "differ_in_place": differ(lambda r: r.comm.all_gather_(X), lambda r: r.comm.all_gather_(X.view(2, 3))),
    "differ_large": differ(
        lambda r: r.comm.all_reduce_(LARGE), lambda r: r.comm.all_reduce_(LARGE.view(2, -1)), lambda r: r.comm.barrier()
    ),
    "raising": raising,
    "raising_in_a_step": raising_in_a_step,
    "out_of_memory": out_of_memory,
    "interrupted": interrupted,
    "early": early,
    "ring": ring,
    "cycle": cycle,
    "cycle_of_groups": cycle_of_groups,
    "unsent_on_the_way": unsent_on_the_way,
    "late": late,
    "hanging": hanging,
    "killed": killed,
}
LARGE = torch.ones(100_000)

CHECKED: dict[str, Callable[[ProcessWorld], Any]] = {
    "same": same,
    "fabric": fabric,
    "conformance": conformance,
    "conformance_of_groups": conformance_of_groups,
    "timeline": timeline,
    "backward": backward,
    "train": lambda world: world.run(train)[0],
    "data_parallel": lambda world: world.run(data_parallel)[0],
    "in_buckets": lambda world: world.run(in_buckets)[0],
    "in_shards": lambda world: world.run(in_shards)[0],
    "on_gpus": on_gpus,
    "tensor": lambda world: world.run(in_tensors, False)[0],
    "tensor_sequence": lambda world: world.run(in_tensors, True)[0],
    "tensor_llama": lambda world: world.run(llama_in_tensors, llama())[0],
    "hybrid": lambda world: world.run(in_every_axis)[0],
    "parallelized": by_one_call,
    "in_two_runs": in_two_runs,
    "late_but_in_time": lambda world: world.run(late_but_in_time),
    "between_runs": lambda world: (world.run(between_runs), world.run(between_runs), SEEN.get("received"))[2],
}


def fault(world: ProcessWorld, work: Callable[[Rank], Any]) -> Any:
    """What a rank hears of a fault, when, and that its tensors are untouched."""
    start_s = time.monotonic()
    try:
        world.run(work)
    except BaseException as error:
        took_s = time.monotonic() - start_s
        notes = list(getattr(error, "__notes__", []))
        said: dict[str, Any] = {"kind": type(error).__name__, "text": str(error), "notes": notes}
        try:
            world.run(work)
        except MplabError as again:
            said["again"] = type(again).__name__
    else:
        took_s, said = time.monotonic() - start_s, {"kind": None}
    untouched = X.tolist() == list(range(6)) and bool((LARGE == 1).all())
    return said | {"took_s": took_s, "untouched": untouched}


def _end(failed: threading.ExceptHookArgs) -> None:
    """End the process, as an exception of one of its threads would not do."""
    print(
        f"in thread {failed.thread}:",
        "".join(traceback.format_exception(failed.exc_value)),
        file=sys.stderr,
        flush=True,
    )
    os._exit(77)


def main() -> None:
    gc.freeze()  # what is loaded by now stays
    # As in a terminal: a background job ignores SIGINT, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        propagates = name.startswith("exit_")
        name = name.removeprefix("exit_")
        threading.excepthook = _end  # none of the library's threads may fail in silence
        world = World.from_env(TIMEOUT_S if name in FAULTS or name.startswith("late") else 30.0)
        rank = world.rank.index
        (folder / f"{name}.{rank}.pid").write_text(str(os.getpid()))
        if propagates:
            world.run(FAULTS[name])
        said = CHECKED[name](world) if name in CHECKED else fault(world, FAULTS[name])
        (folder / f"{name}.{rank}.json").write_text(json.dumps(said))
        world.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("mplab")]


def fork(num_ranks: int, folder: Path) -> None:
    """Return in a process for each rank; this one waits for them, and writes how they ended."""
    OPTIMIZERS["sgd"]([nn.Parameter(X.clone())])  # the first one loads as much again as torch itself
    pids = []
    for rank in range(num_ranks):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            errors = os.open(folder / f"errors.{rank}", os.O_WRONLY | os.O_CREAT)
            os.dup2(errors, sys.stdout.fileno())
            os.dup2(errors, sys.stderr.fileno())
            return
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    (folder / "codes.json").write_text(json.dumps(codes))
    sys.exit()


if __name__ == "__main__":
    if "FORKS" in os.environ:
        fork(int(os.environ["FORKS"]), Path(sys.argv[1]))
    main()
