"""The pipeline as one calls it: what it refuses, what it gives back, what it sends, records and keeps in memory."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from pipelines import (
    ALL_ORDERS,
    OPTIMIZERS,
    VOCABULARY,
    assert_trains_alike,
    batches,
    chain,
    folded,
    serial_chain,
    stages_a_rank,
    train_serially,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mplab import Deadlock, MplabError, World
from mplab.datasets import Batch
from mplab.models import layers
from mplab.parallel import PipelineParallel, pipeline
from mplab.parallel.interpreter import Interpreter, Step
from mplab.plan.partition import by_depth
from mplab.plan.schedule import Action, Schedule, build
from mplab.plan.traffic import Traffic, direct_traffic, pipeline_traffic
from mplab.world import Rank

SGD = OPTIMIZERS["sgd"]


def cuts_for(order: str, num_ranks: int, num_layers: int = 8) -> tuple[int, ...]:
    return by_depth(num_layers, num_ranks * stages_a_rank(order)).cuts


def run_steps(num_ranks: int, *args: Any, data: tuple[Batch, ...] | None = None, **options: Any) -> list[Any]:
    """Build a pipeline on every rank, and train."""

    def work(rank: Rank) -> list[float]:
        model, cuts, *rest = args
        pipe = PipelineParallel(model, cuts, rank.comm, *rest, **({"optimizer": SGD} | options))
        return [pipe.step(batch) for batch in (batches() if data is None else data)]

    return World(num_ranks, "cpu").run(work)


# --- what is refused, before anything starts -------------------------------------------------------------------------

LIST_OF_LAYERS = "\n".join(f"  {i}  {i}" for i in range(8))


class Attention(nn.Linear):
    """Hugging Face's Llama has no module for this."""

    attention_dropout = 0.25


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "cuts out of order": ({"cuts": (5, 2), "schedule": "interleaved"}, "cuts [5, 2]: 4 stages have 3, not 2"),
    "cuts repeated": ({"num_ranks": 3, "cuts": (4, 4)}, "cuts [4, 4]: 4 is there twice"),
    "cuts descending": ({"num_ranks": 3, "cuts": (5, 2)}, "cuts [5, 2]: 2 comes after 5, out of order"),
    "a cut at 0": ({"cuts": (0,)}, "cuts [0]: 0 is out of range"),
    "a cut at the end": ({"cuts": (8,)}, "cuts [8]: 8 is out of range"),
    "a cut of half a layer": ({"cuts": (2.5,)}, "cuts [2.5]: 2.5 is no whole number"),
    "one number": ({"cuts": 4}, "cuts 4: they are a sequence"),
    "too few cuts": ({"cuts": ()}, "2 stages have 1, not 0"),
    "cuts for one stage a rank": ({"cuts": (4,), "schedule": "interleaved"}, "4 stages have 3, not 1"),
    "more stages than layers": (
        {"model": chain(4), "num_ranks": 3, "schedule": "interleaved", "cuts": ()},
        "6 stages of",
    ),
    "no such schedule": (
        {"schedule": "2f2b"},
        "schedule '2f2b': there are naive, gpipe, 1f1b, interleaved, zero_bubble",
    ),
    "no micro-batch": ({"num_microbatches": 0}, "0 micro-batches on 2 ranks: give whole numbers, 1 or more"),
    "half a micro-batch": ({"num_microbatches": 1.5}, "1.5 micro-batches on 2 ranks"),
    "a schedule for others": (
        {"schedule": build("1f1b", 3, 4)},
        "is for 3 ranks, and this group has 2: build it for 2",
    ),
    "an order that stops": (
        {"schedule": lambda rank, p, m: [Action(rank, "F", 0)]},
        "stage 0 does 0F0 with micro-batch 0",
    ),
    "no model": ({"model": "gpt"}, "layers() of a str"),
    "a model that is no chain": ({"model": nn.Bilinear(1, 1, 1)}, "Bilinear is not known as a chain"),
    "no loss function": ({"loss_fn": None}, "loss_fn is a NoneType: give a function of outputs and targets"),
    "an optimizer of all weights": (
        {"optimizer": torch.optim.SGD(chain().parameters())},
        "optimizer is a SGD: each rank makes one for its own layers, so give what makes it: torch.optim.AdamW",
    ),
    "dropout twice": (
        {"model": nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1)), "cuts": (1,), "recompute": True},
        "recompute=True, but 1 drops activations at random (p = 0.1)",
    ),
    "dropout in attention": (
        {"model": nn.Sequential(*chain(), Attention(1, 1)), "recompute": True},
        "recompute=True, but 8 drops activations at random (p = 0.25)",
    ),
    "dropout in a recurrent layer": (
        {"model": nn.Sequential(*chain(), nn.LSTM(1, 1, 2, dropout=0.5)), "recompute": True},
        "recompute=True, but 8 drops activations at random (p = 0.5)",
    ),
    "dropout in torch's attention": (
        {"model": nn.Sequential(*chain(), nn.MultiheadAttention(2, 1, dropout=0.3)), "recompute": True},
        "recompute=True, but 8 drops activations at random (p = 0.3)",
    ),
    "random slopes twice": (
        {"model": nn.Sequential(*chain(), nn.RReLU(0.1, 0.3)), "recompute": True},
        "recompute=True, but 8 draws its slopes at random (from 0.1 to 0.3), and would draw others the second time: "
        "set its upper to its lower, or recompute=False",
    ),
    "running means twice": (
        {"model": nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)), "cuts": (1,), "recompute": True},
        "recompute=True, but 1 keeps running means of its inputs, and would count each micro-batch twice",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name: str) -> None:
    options, message = REFUSED[name]
    options = {"model": chain(), "cuts": (4,), "num_ranks": 2, "num_microbatches": 3} | options
    num_ranks, model, cuts = (options.pop(key) for key in ("num_ranks", "model", "cuts"))
    with pytest.raises(MplabError) as caught:
        run_steps(num_ranks, model, cuts, **options)
    assert message in str(caught.value)
    if "cuts" in name and "stages" not in str(caught.value).split(":")[0]:
        assert LIST_OF_LAYERS in str(caught.value)


def test_dropout_that_drops_nothing_may_be_recomputed() -> None:
    norm = nn.BatchNorm1d(3, affine=False).double().eval()
    norm.running_var -= norm.eps  # it changes nothing
    idle = nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.RReLU(0.5, 1.5).eval(), nn.RReLU(1.0, 1.0)
    model = nn.Sequential(*chain(), *idle, norm)
    with torch.random.fork_rng(devices=[]):  # slopes between 1 and 1 are drawn, too
        losses = run_steps(2, model, (4,), num_microbatches=3, recompute=True)
    assert losses[1] == pytest.approx(serial_chain().losses)


DIFFER: dict[str, tuple[dict[str, Any], str]] = {
    "cuts": ({"cuts": (5,)}, "cuts on rank 0: [4]\n  cuts on rank 1: [5]"),
    "schedule": ({"schedule": "gpipe"}, 'schedule on rank 0: ["0F0 0F1 0B0 0F2'),
    "num_microbatches": ({"num_microbatches": 4}, "schedule on rank 1: "),
    "recompute": ({"recompute": True}, "recompute on rank 0: false\n  recompute on rank 1: true"),
    "model": ({"model": chain(8, tied=True)}, "parameters on rank 0: "),
    "frozen layers": ({"model": chain(8, frozen=[0])}, 'rank 1: {"0.weight": [[7, 4], "torch.float64", false]}'),
    "dtype": ({"model": chain().float()}, '"torch.float32"'),
}


@pytest.mark.parametrize("what", DIFFER)
def test_settings_that_differ_are_told_with_what_each_rank_has(what: str) -> None:
    other, message = DIFFER[what]
    same = {"model": chain(), "cuts": (4,), "schedule": "1f1b", "num_microbatches": 3, "recompute": False}

    def work(rank: Rank) -> None:
        options = same | other if rank.index == 1 else same
        options = {"comm": rank.comm, "optimizer": SGD} | options
        with pytest.raises(MplabError) as caught:
            PipelineParallel(**options)
        text = str(caught.value)
        assert text.startswith("the ranks were given different settings, and must be given the same:")
        assert message in text
        assert max(map(len, text.splitlines())) < 250
        assert all(line.split(" on rank ")[0].strip() in {*same, "parameters"} for line in text.splitlines()[1:])
        for key in {"cuts", "schedule", "recompute"} - {what, "schedule" if what == "num_microbatches" else what}:
            assert f"{key} on" not in text

    World(2, "cpu").run(work)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(3, 3).long(), torch.zeros(2, 3).long()), "3 inputs and 2 targets: a batch needs as many of each"),
        (batches(2)[0], "a batch of 2 samples can't be cut in 3 micro-batches, each needs one sample or more"),
        (batches(0)[0], "a batch of 0 samples"),
    ],
)
def test_a_batch_that_cannot_be_cut_changes_nothing(batch: Batch, message: str) -> None:
    def work(rank: Rank) -> None:
        pipe = PipelineParallel(chain(), (4,), rank.comm, num_microbatches=3, optimizer=SGD)
        with pytest.raises(MplabError, match=message):
            pipe.step(batch)
        assert [pipe.step(batch) for batch in batches()] == pytest.approx(serial_chain().losses)

    World(2, "cpu").run(work)


# --- what a step gives, and what the model becomes -------------------------------------------------------------------


@pytest.mark.parametrize("order", ALL_ORDERS)
def test_the_loss_is_the_same_number_on_every_rank(order: str) -> None:
    losses = run_steps(3, chain(), cuts_for(order, 3), ALL_ORDERS[order], 4)
    assert losses[0] == losses[1] == losses[2]
    assert [type(loss) for loss in losses[0]] == [float] * 3


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_that_was_given_stays_and_the_trained_one_loads_into_it(tied: bool) -> None:
    model = chain(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def work(rank: Rank) -> dict[str, Tensor]:
        pipe = PipelineParallel(model, (2, 5), rank.comm, num_microbatches=3, optimizer=SGD)
        assert list(pipe.state_dict()) == list(before)
        torch.testing.assert_close(pipe.state_dict(), before, rtol=0, atol=0)
        for batch in batches():
            pipe.step(batch)
        weights = pipe.state_dict()
        kept = {name: value.clone() for name, value in weights.items()}
        pipe.step(batches()[0])
        torch.testing.assert_close(weights, kept, rtol=0, atol=0)  # it is a copy
        return weights

    of_ranks = World(3, "cpu").run(work)
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    for weights in of_ranks:
        assert list(weights) == list(before)
        torch.testing.assert_close(weights, of_ranks[0], rtol=0, atol=0)
    fresh = chain(tied=tied, seed=1)
    fresh.load_state_dict(of_ranks[0])
    torch.testing.assert_close(dict(fresh.state_dict()), serial_chain(tied=tied).weights, rtol=0, atol=1e-10)
    assert (fresh[7].weight is fresh[0].weight) == tied


def test_every_rank_has_its_own_layers_and_no_others() -> None:
    model = chain()
    names = [
        [f"{layer.name}.{key}" for key in dict(model[i].named_parameters())] for i, layer in enumerate(layers(model))
    ]

    def work(rank: Rank) -> dict[int, list[str]]:
        pipe = PipelineParallel(model, (1, 4, 6), rank.comm, "interleaved", 2, optimizer=SGD)
        assert {id(p) for group in pipe.optimizer.param_groups for p in group["params"]} == {
            id(p) for stage in pipe.stages.values() for p in stage.parameters()
        }
        return {s: list(dict(stage.named_parameters())) for s, stage in pipe.stages.items()}

    of = [list(itertools.chain(*names[a:b])) for a, b in ((0, 1), (1, 4), (4, 6), (6, 8))]
    assert World(2, "cpu").run(work) == [{0: of[0], 2: of[2]}, {1: of[1], 3: of[3]}]


def test_buffers_are_those_of_serial_training_in_as_many_parts() -> None:
    """BatchNorm looks at the micro-batch, with or without a pipeline."""
    from mplab.models import cross_entropy
    from mplab.parallel import Serial

    model, data = normalised(), (numbers_to_classes(),) * 2
    serial = Serial(reference := normalised(), SGD(reference.parameters()), cross_entropy, 3)
    losses = [serial.step(batch) for batch in data]

    def work(rank: Rank) -> None:
        pipe = PipelineParallel(model, (1, 3), rank.comm, num_microbatches=3, optimizer=SGD)
        assert [pipe.step(batch) for batch in data] == pytest.approx(losses, abs=1e-12)
        torch.testing.assert_close(pipe.state_dict(), dict(reference.state_dict()), rtol=0, atol=1e-12)

    World(3, "cpu").run(work)


def normalised() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5)).double()


def numbers_to_classes() -> Batch:
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, (x.sum(1) > 0).long()


class Detached(nn.Module):
    """Ends the graph of autograd, as a frozen encoder does: what is below it is not trained.

    Args:
        layer: what it runs.
        way: "input" or "output" outside of the graph.
    """

    def __init__(self, layer: nn.Module, way: str) -> None:
        super().__init__()
        self.layer, self.way = layer, way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "input":
            return self.layer(x.detach())
        with torch.no_grad():
            return self.layer(x)


def detached(where: int, way: str) -> nn.Sequential:
    model = chain()
    model[where] = Detached(model[where], way)
    return model


@pytest.mark.parametrize("way", ["input", "output"])
@pytest.mark.parametrize("where", [1, 4, 6])
@pytest.mark.parametrize("order", ALL_ORDERS)
def test_below_a_layer_that_ends_the_graph_nothing_is_trained(order: str, where: int, way: str) -> None:
    """Not even by weight decay and momentum, which a gradient of zeros would let in."""
    model, num_ranks = detached(where, way), 4 // stages_a_rank(order)
    trained = train_serially(detached(where, way), batches(), OPTIMIZERS["adamw"])
    assert trained.gradients["0.weight"] is None
    assert trained.gradients["7.weight"] is not None

    def work(rank: Rank) -> None:
        options = {"num_microbatches": 4, "optimizer": OPTIMIZERS["adamw"], "schedule": ALL_ORDERS[order]}
        assert_trains_alike(rank.comm, model, trained, cuts_for(order, num_ranks), batches(), **options)
        options["recompute"] = True
        assert_trains_alike(rank.comm, model, trained, cuts_for(order, num_ranks), batches(), **options)

    World(num_ranks, "cpu", rendezvous=True).run(work)


def test_a_gradient_that_is_not_there_has_no_bytes() -> None:
    """It is a message of its own nevertheless, or the rank before would wait for ever."""
    m, activation_bytes = 4, 11 * 3 * 4 * 8

    def work(rank: Rank) -> None:
        pipe = PipelineParallel(detached(4, "input"), (2, 4, 6), rank.comm, "1f1b", m, optimizer=SGD)
        rank.comm.ledger.messages.clear()
        pipe.step(batches()[0])

    world = World(4, "cpu")
    world.run(work)
    sends = [ledger.of("send") for ledger in world.ledgers]
    assert [len(of_rank) for of_rank in sends] == [m, 2 * m, 2 * m, m]
    sent = [sum(message.sent_bytes for message in of_rank) for of_rank in sends]
    assert sent == [activation_bytes] * 4  # three send activations, and rank 3 the only gradient


class Rule(nn.Module):
    """A layer without weights."""

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x)


def no_reals(kind: str) -> nn.Sequential:
    """Layer 1 gives no real numbers; where they have no gradient, layer 0 is never trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        after = {
            "int": [Rule(lambda x: (3 * x.abs()).long() % 7), nn.Embedding(7, 2), nn.Flatten(), nn.Linear(10, 6)],
            "bool": [Rule(lambda x: x > 0), Rule(lambda x: x.double()), nn.Linear(5, 6), nn.Tanh()],
            "complex": [Rule(lambda x: torch.complex(x, x * x)), Rule(torch.abs), nn.Linear(5, 6), nn.Tanh()],
        }
        return nn.Sequential(nn.Linear(4, 5), *after[kind], nn.Linear(6, 2)).double()


@pytest.mark.parametrize("kind", ["int", "bool", "complex"])
@pytest.mark.parametrize("order", ALL_ORDERS)
def test_a_cut_may_be_after_a_layer_whose_output_is_no_real_number(order: str, kind: str) -> None:
    """Whole numbers have no gradient, and nobody is told one."""
    data, num_ranks = (numbers_to_classes(),) * 2, 4 // stages_a_rank(order)
    model, trained = no_reals(kind), train_serially(no_reals(kind), data, OPTIMIZERS["adamw"])
    assert (trained.gradients["0.weight"] is None) == (kind != "complex")

    def work(rank: Rank) -> None:
        options = {"num_microbatches": 3, "optimizer": OPTIMIZERS["adamw"], "schedule": ALL_ORDERS[order]}
        for cuts in ((1, 2, 3), (2, 3, 4)):
            for recompute in (False, True):
                assert_trains_alike(rank.comm, model, trained, cuts, data, recompute=recompute, **options)

    World(num_ranks, "cpu", rendezvous=True).run(work)


def test_a_pipeline_among_some_of_the_ranks() -> None:
    """In a group whose order is not the world's."""

    def work(rank: Rank) -> None:
        if rank.index != 1:
            comm = rank.comm.group([2, 0])
            options = {"num_microbatches": 3, "optimizer": SGD, "schedule": "zero_bubble"}
            assert_trains_alike(comm, chain(tied=True), serial_chain(tied=True), (4,), batches(), **options)

    World(3, "cpu").run(work)


# --- what is sent and what is written down ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ALL_ORDERS)
def test_messages_and_bytes_of_a_step_are_those_of_the_formula(order: str, num_ranks: int) -> None:
    """11 samples of 3 tokens, 4 numbers of 8 bytes each; then the loss, and a tied embedding."""
    m, batch = 4, batches()[0]
    schedule = build(ALL_ORDERS[order], num_ranks, m)

    def work(rank: Rank) -> None:
        pipe = PipelineParallel(chain(tied=True), cuts_for(order, num_ranks), rank.comm, schedule, optimizer=SGD)
        start = len(rank.comm.ledger.messages)
        pipe.step(batch)
        del rank.comm.ledger.messages[:start]

    world = World(num_ranks, "cpu")
    world.run(work)
    for rank, ledger in enumerate(world.ledgers):
        between = pipeline_traffic(schedule, rank, [11 * 3 * 4 * 8] * (schedule.num_stages - 1))
        sends, receives = ledger.of("send"), ledger.of("recv")
        got = len(sends), sum(s.sent_bytes for s in sends), len(receives), sum(r.received_bytes for r in receives)
        assert Traffic(*got) == between
        loss = direct_traffic("broadcast", rank, [8] * num_ranks, root=schedule.rank_of[-1])
        holders = sorted({schedule.rank_of[0], schedule.rank_of[-1]})
        tied = Traffic(0, 0, 0, 0)
        if len(holders) > 1 and rank in holders:
            tied = direct_traffic("all_reduce", holders.index(rank), [14 * 8] * 2)  # 7 x 4 numbers in two chunks
        assert ledger.num_messages == between.num_sent + loss.num_sent + tied.num_sent
        assert ledger.sent_bytes == between.sent_bytes + loss.sent_bytes + tied.sent_bytes
        assert ledger.received_bytes == between.received_bytes + loss.received_bytes + tied.received_bytes


def test_the_formula_by_hand() -> None:
    """2 ranks with 4 stages in turn: 3 cuts, all between the two; folded, only 2 of the 3 are."""
    assert pipeline_traffic(build("interleaved", 2, 8), 0, [10, 20, 30]) == Traffic(24, 60, 24, 60)
    assert pipeline_traffic(build(folded, 2, 8), 1, [10, 20, 30]) == Traffic(16, 40, 16, 40)
    one_f_one_b = [pipeline_traffic(build("1f1b", 3, 8), rank, [10, 20]) for rank in range(3)]
    assert one_f_one_b == [Traffic(8, 10, 8, 10), Traffic(16, 30, 16, 30), Traffic(8, 20, 8, 20)]
    assert pipeline_traffic(build("1f1b", 1, 8), 0, []) == Traffic(0, 0, 0, 0)


@pytest.mark.parametrize("order", ALL_ORDERS)
def test_the_timeline_has_the_actions_of_the_schedule_in_order(order: str) -> None:
    schedule = build(ALL_ORDERS[order], 3, 4)
    world = World(3, "cpu")
    world.run(
        lambda rank: PipelineParallel(chain(), cuts_for(order, 3), rank.comm, schedule, optimizer=SGD).step(
            batches()[0]
        )
    )
    for rank, actions in enumerate(schedule.ranks):
        events = sorted(
            (e for e in world.timeline.events if (e.rank, e.lane) == (rank, "compute")), key=lambda e: e.start_s
        )
        want = [(schedule.span_name(action), action.microbatch) for action in actions]
        assert [(event.name, event.microbatch) for event in events] == [*want, ("update", None)]
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(events))


# --- memory ----------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Writes down how many of its outputs are alive: one for each micro-batch whose activations are held."""

    alive: dict[str, list[StorageWeakRef]]
    peaks: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x * self.weight)
        z = y * self.weight  # keeps y for its backward
        me = threading.current_thread().name
        here = Watched.alive.setdefault(me, [])
        here.append(StorageWeakRef(y.untyped_storage()))
        here[:] = [ref for ref in here if not ref.expired()]
        Watched.peaks[me] = max(Watched.peaks[me], len(here))
        return z


@pytest.fixture
def watched() -> Iterator[type[Watched]]:
    Watched.alive, Watched.peaks = {}, Counter()
    yield Watched
    Watched.alive, Watched.peaks = {}, Counter()


class Memory:
    """Bytes that autograd holds for backward, on one thread: those of each tensor once.

    Args:
        others: what is there anyway, parameters and the batch.
    """

    def __init__(self, others: Iterable[Tensor]) -> None:
        self.peak_bytes = 0
        self._others = {x.untyped_storage()._cdata for x in others}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._others:
            self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.now_bytes())
        return x

    def now_bytes(self) -> int:
        self._held = {key: (ref, size) for key, (ref, size) in self._held.items() if not ref.expired()}
        return sum(size for _, size in self._held.values())


def peaks(order: str, num_ranks: int, num_microbatches: int, **options: Any) -> list[int]:
    """The most bytes of activations that each rank holds in a step."""
    data = batches(3 * num_microbatches)[0]
    cuts = cuts_for(order, num_ranks)

    def work(rank: Rank) -> int:
        pipe = PipelineParallel(chain(), cuts, rank.comm, order, num_microbatches, optimizer=SGD, **options)
        memory = Memory([*data, *(p for stage in pipe.stages.values() for p in stage.parameters())])
        with torch.autograd.graph.saved_tensors_hooks(memory.pack, lambda x: x):
            pipe.step(data)
        assert memory.now_bytes() == 0, "a step left activations behind"
        return memory.peak_bytes

    return World(num_ranks, "cpu").run(work)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("order", ALL_ORDERS)
def test_a_rank_holds_as_many_micro_batches_as_its_schedule_says(
    order: str, num_ranks: int, watched: type[Watched]
) -> None:
    """Never more, and it does come to as many; afterwards none."""
    schedule = build(ALL_ORDERS[order], num_ranks, 6)
    model = nn.Sequential(*(Watched() for _ in range(schedule.num_stages)))
    data = torch.ones(12, 4, dtype=torch.float64), torch.zeros(12, dtype=torch.long)

    def work(rank: Rank) -> None:
        pipe = PipelineParallel(model, range(1, schedule.num_stages), rank.comm, schedule, optimizer=SGD)
        for _ in range(2):
            pipe.step(data)
            here = watched.alive[f"mplab-rank{rank.index}"]
            assert all(ref.expired() for ref in here), "a step left activations behind"

    World(num_ranks, "cpu").run(work)
    in_flight = {f"mplab-rank{rank}": count for rank, count in enumerate(schedule.in_flight())}
    assert all(watched.peaks[name] <= count for name, count in in_flight.items())
    # What is no linear layer is done with after the first part of a backward in two.
    if not any(action.kind == "I" for action in schedule.actions):
        assert watched.peaks == in_flight


@pytest.mark.parametrize(("num_ranks", "m"), [(2, 8), (4, 8), (3, 6)])
def test_1f1b_holds_p_of_the_m_micro_batches_that_gpipe_holds(num_ranks: int, m: int) -> None:
    for rank, (gpipe, one_f_one_b) in enumerate(
        zip(peaks("gpipe", num_ranks, m), peaks("1f1b", num_ranks, m), strict=True)
    ):
        assert one_f_one_b <= gpipe * num_ranks / m + gpipe / m
        assert one_f_one_b == gpipe * (num_ranks - rank) // m


def test_zero_bubble_holds_no_more_than_p_micro_batches() -> None:
    """And what is put off counts: its inputs are activations, too."""
    for gpipe, zero_bubble in zip(peaks("gpipe", 2, 8), peaks("zero_bubble", 2, 8), strict=True):
        assert gpipe / 8 < zero_bubble <= gpipe * 2 / 8 * 1.25  # the gradients of outputs are kept as well


def test_recomputation_holds_the_activations_of_one_micro_batch() -> None:
    """Besides the input of every stage."""
    for rank, (kept, recomputed) in enumerate(
        zip(peaks("gpipe", 2, 8), peaks("gpipe", 2, 8, recompute=True), strict=True)
    ):
        assert recomputed == kept // 8, rank


def test_recomputation_computes_each_forward_twice() -> None:
    calls: Counter[str] = Counter()

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls[threading.current_thread().name] += 1
            return super().forward(x)

    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(Counting(4, 4), Counting(4, 4)).double()
    run_steps(2, model, (1,), "1f1b", 3, data=(numbers_to_classes(),))
    assert calls == {"mplab-rank0": 3, "mplab-rank1": 3}
    run_steps(2, model, (1,), "1f1b", 3, recompute=True, data=(numbers_to_classes(),))
    assert calls == {"mplab-rank0": 9, "mplab-rank1": 9}


@pytest.mark.parametrize("order", ["gpipe", "1f1b", "zero_bubble", "interleaved"])
def test_what_an_interpreter_keeps_is_gone_at_the_end(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, outputs, gradients, what was put off and what was expected."""
    kept: list[Interpreter] = []
    most: Counter[int] = Counter()

    class Kept(Interpreter):
        def run(self, steps: Any) -> None:
            super().run(steps)
            kept.append(self)

        def _take(self, step: Step) -> Any:
            most[self.comm.rank] = max(most[self.comm.rank], len(self._held) + len(self._put_off))
            given = super()._take(step)
            if getattr(self, "before", None) is not None:
                assert self.before.expired(), "the gradient of a backward outlived it"
            self.before = None
            if step.action.kind == "B" and given is not None:
                given = given.clone()  # which the sender does not know of
                self.before = StorageWeakRef(given.untyped_storage())
            return given

    monkeypatch.setattr(pipeline, "Interpreter", Kept)
    run_steps(2, chain(), cuts_for(order, 2), order, 5, data=batches(num_batches=1))
    assert len(kept) == 2
    for interpreter in kept:
        assert not any((interpreter._held, interpreter._put_off, interpreter._expected, interpreter._near))
    schedule = build(order, 2, 5)
    assert all(most[rank] <= count for rank, count in enumerate(schedule.in_flight()))


# --- faults ----------------------------------------------------------------------------------------------------------


class Failing(nn.Module):
    """Raises in its nth forward, or in its nth backward."""

    def __init__(self, forward: int | None = None, backward: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.left = {"forward": forward, "backward": backward}

    def forward(self, x: Tensor) -> Tensor:
        self.count("forward")
        y = x * self.weight
        y.register_hook(lambda grad: self.count("backward"))
        return y

    def count(self, what: str) -> None:
        if self.left[what] is not None:
            if not self.left[what]:
                raise ArithmeticError(f"{what} failed on purpose")
            self.left[what] -= 1


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize(
    ("order", "where", "says"),
    [
        ("1f1b", {"forward": 3}, "forward of micro-batch 3"),
        ("gpipe", {"backward": 2}, "backward of micro-batch 2"),
        ("zero_bubble", {"backward": 1}, "input gradient of micro-batch 1"),
        ("interleaved", {"forward": 1}, "forward of chunk 1 of micro-batch 1"),
    ],
)
def test_a_rank_that_raises_ends_the_world_and_says_in_which_action(
    order: str, where: dict[str, int], says: str, failing: int
) -> None:
    stage = failing + 3 * (order == "interleaved")
    num_stages = 3 * stages_a_rank(order)
    model = nn.Sequential(*(Failing(**where) if s == stage else Failing() for s in range(num_stages)))
    data = torch.ones(8, 4, dtype=torch.float64), torch.zeros(8, dtype=torch.long)
    with pytest.raises(ArithmeticError, match="failed on purpose") as caught:
        run_steps(3, model, range(1, num_stages), order, 4, data=(data,))
    says = says if failing else says.replace("input gradient", "backward")  # nobody waits for rank 0's
    assert caught.value.__notes__ == [f"(rank {failing} of 3 in {says}; all other ranks were stopped)"]


def test_a_label_that_is_no_class_fails_on_the_last_rank() -> None:
    inputs, targets = batches()[0]
    with pytest.raises(IndexError, match=f"Target {VOCABULARY} is out of bounds") as caught:
        run_steps(2, chain(), (4,), num_microbatches=3, data=((inputs, targets + (targets == 6).long()),))
    assert caught.value.__notes__[0].startswith("(rank 1 of 2 in forward of micro-batch 0;")


class Blocking(Interpreter):
    """Sends as one would at first: and waits until the message is received."""

    def _hand_on(self, step: Step, result: Tensor) -> None:
        super()._hand_on(step, result)
        for handle in self._sent:
            handle.wait()


def test_blocking_sends_deadlock_where_two_ranks_send_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """1F1B in its steady state: an activation to the right and a gradient to the left at once. GPipe has no such place.

    Where messages are buffered nothing happens, which is why such a program works until it is given a larger model.
    """
    monkeypatch.setattr(pipeline, "Interpreter", Blocking)
    monkeypatch.setattr(Interpreter, "_expect", lambda self, step: None)
    monkeypatch.setattr(Interpreter, "_take", take_blocking)

    def work(rank: Rank, order: str) -> float:
        return PipelineParallel(chain(), (4,), rank.comm, order, 4, optimizer=SGD).step(batches()[0])

    assert World(2, "cpu").run(work, "1f1b") == pytest.approx(serial_chain().losses[:1] * 2)
    assert World(2, "cpu", rendezvous=True).run(work, "gpipe") == pytest.approx(serial_chain().losses[:1] * 2)
    with pytest.raises(Deadlock) as caught:
        World(2, "cpu", rendezvous=True, timeout_s=10).run(work, "1f1b")
    for rank in (0, 1):
        assert f"rank {rank} waits for rank {1 - rank} in send(dst={1 - rank}" in str(caught.value)


def take_blocking(self: Interpreter, step: Step) -> Tensor | None:
    if step.src is not None:
        return self.comm.recv(step.src, self._tag(step.action))
    return self._near.pop(step.action, None)


def test_a_rank_that_does_not_step_is_named() -> None:
    def work(rank: Rank) -> None:
        pipe = PipelineParallel(chain(), (4,), rank.comm, num_microbatches=3, optimizer=SGD)
        if rank.index == 0:
            pipe.step(batches()[0])

    with pytest.raises(Deadlock, match="rank 0 waits for rank 1 in recv"):
        World(2, "cpu").run(work)


def test_an_order_of_ones_own_is_run_as_it_is() -> None:
    """A plain function, and a schedule that is built from text."""
    rows = ("0F1 0F0 0B0 0B1", "1F0 1B0 1F1 1B1")
    schedule = Schedule("mine", tuple(tuple(map(Action.parse, row.split())) for row in rows))
    for given in (schedule, partial(lambda rank, p, m: map(Action.parse, rows[rank].split()))):
        losses = run_steps(2, chain(), (3,), given, 2)
        assert losses[0] == pytest.approx(serial_chain().losses, abs=1e-12)
