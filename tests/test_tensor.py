"""The strategy: what it keeps, merges, splits, goes on with, and refuses. Equality with serial training has its own."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn

from mplab import World
from mplab.datasets import Batch
from mplab.errors import MplabError, NonFiniteGradient
from mplab.models import GPT, GPTConfig, cross_entropy, seed_parameters
from mplab.parallel import Serial, TensorParallel, tensor_parallel, vocab_parallel_cross_entropy
from mplab.parallel.cut import cuts_of
from mplab.parallel.tensor_plan import tensor_plan
from mplab.world import Rank

VOCABULARY, WIDTH, LENGTH = 16, 16, 8
SGD = partial(torch.optim.SGD, lr=0.3)  # without momentum: it has no state that a checkpoint would have to keep
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}


def gpt(tied: bool = True, seed: int = 0, **options: Any) -> GPT:
    sizes = {"vocab_size": VOCABULARY, "context_length": LENGTH, "width": WIDTH, "num_heads": 4, "num_layers": 2}
    made = GPT(GPTConfig(**{**sizes, "tied": tied, **options}), seed)
    return made.double()


def gpt2(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **{**NO_DROPOUT, **options}))
    seed_parameters(model)
    return model.double()


def bert() -> nn.Module:
    """Two more names for one bias, which is cut; and buffers."""
    transformers = pytest.importorskip("transformers")
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=LENGTH, **off)
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = transformers.BertForMaskedLM(config)
    seed_parameters(model)
    return model.double()


MODELS: dict[str, Callable[[], nn.Module]] = {"tied": gpt, "untied": partial(gpt, False), "GPT-2": gpt2, "BERT": bert}
any_model = pytest.mark.parametrize("name", MODELS)


@cache
def batches(num_samples: int = 4, length: int = LENGTH) -> tuple[Batch, ...]:
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randint, VOCABULARY, (num_samples, length), generator=generator)
    return tuple((draw(), draw()) for _ in range(5))


def loss_of_logits(outputs: Any, targets: Tensor) -> Tensor:
    return cross_entropy(getattr(outputs, "logits", outputs), targets)


def serially(model: nn.Module, data: Sequence[Batch]) -> dict[str, Tensor]:
    """The weights that serial training of a copy comes to."""
    model = copy.deepcopy(model)
    serial = Serial(model, SGD(model.parameters()), loss_of_logits)
    for batch in data:
        serial.step(batch)
    return model.state_dict()


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        said = partial("{}: {}".format, name)
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance, msg=said)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def run(num_ranks: int, work: Callable[[Rank], Any]) -> list[Any]:
    return World(num_ranks, "cpu").run(work)


# --- what a rank has -------------------------------------------------------------------------------------------------


@any_model
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_rank_has_an_equal_part_of_what_is_cut_and_nothing_else_of_it(name: str, num_ranks: int) -> None:
    model = MODELS[name]()
    whole = dict(model.named_parameters())

    def work(rank: Rank) -> tuple[int, int]:
        parallel = TensorParallel(model, rank.comm, optimizer=torch.optim.AdamW)
        assert type(parallel.model) is type(model)
        mine = dict(parallel.model.named_parameters())
        assert list(mine) == list(whole)
        cuts = cuts_of(parallel.model)
        for key, p in mine.items():
            assert p.numel() * (num_ranks if p in cuts else 1) == whole[key].numel()
            assert p.is_contiguous()
            assert p.untyped_storage().nbytes() == p.nbytes  # no view of the whole
        parallel.step(batches()[0])
        for p, state in parallel.optimizer.state.items():
            assert state["exp_avg"].shape == p.shape
        return sum(p.numel() for p in cuts), sum(p.numel() for p in mine.values() if p not in cuts)

    (cut, kept), *others = run(num_ranks, work)
    assert others == [(cut, kept)] * (num_ranks - 1)
    assert cut * num_ranks + kept == sum(p.numel() for p in model.parameters())
    assert kept < cut * num_ranks


def test_each_part_is_the_slice_that_the_style_says() -> None:
    """Rank r's share of the outputs, the inputs or the vocabulary; of three joined matrices, of each."""
    model, known = gpt(), gpt2()

    def work(rank: Rank) -> None:
        share = slice(rank.index * WIDTH // 2, (rank.index + 1) * WIDTH // 2)
        mine, whole = tensor_parallel(model, rank.comm).blocks[1], model.blocks[1]
        assert torch.equal(mine.attention.query.weight, whole.attention.query.weight[share])
        assert torch.equal(mine.attention.query.bias, whole.attention.query.bias[share])
        assert torch.equal(mine.attention.output.weight, whole.attention.output.weight[:, share])
        assert torch.equal(mine.attention.output.bias, whole.attention.output.bias)
        mine, whole = tensor_parallel(known, rank.comm).transformer.h[0].attn, known.transformer.h[0].attn
        joined = [part[:, share] for part in whole.c_attn.weight.chunk(3, 1)]
        assert torch.equal(mine.c_attn.weight, torch.cat(joined, 1))
        assert torch.equal(mine.c_attn.bias, torch.cat([part[share] for part in whole.c_attn.bias.chunk(3)]))
        assert torch.equal(mine.c_proj.weight, whole.c_proj.weight[share])

    run(2, work)


def test_parameters_that_are_shared_stay_shared() -> None:
    def work(rank: Rank) -> None:
        made = tensor_parallel(gpt(), rank.comm)
        assert made.head.projection.weight is made.embedding.token.weight
        made = tensor_parallel(known, rank.comm)
        assert made.cls.predictions.bias is made.cls.predictions.decoder.bias
        assert made.cls.predictions.decoder.weight is made.bert.embeddings.word_embeddings.weight
        assert made.cls.predictions.bias.shape == (VOCABULARY // 2,)

    known = bert()
    run(2, work)


def test_the_mode_and_what_is_frozen_are_kept() -> None:
    model = gpt2(resid_pdrop=0.5)
    model.transformer.h[0].eval()
    model.transformer.h[1].mlp.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}

    def work(rank: Rank) -> None:
        made = tensor_parallel(model, rank.comm)
        assert {name: module.training for name, module in made.named_modules()} == modes
        assert {name: p.requires_grad for name, p in made.named_parameters()} == trained
        made.eval()
        assert not any(module.training for module in made.modules())

    run(2, work)


def test_a_copy_of_a_model_that_is_cut_is_on_the_same_ranks() -> None:
    model = gpt2(resid_pdrop=0.5)

    def work(rank: Rank) -> None:
        made = tensor_parallel(model, rank.comm, overlap=True).eval()
        made(batches()[0][0]).logits.sum().backward()
        again = copy.deepcopy(made)
        assert not set(made.parameters()) & set(again.parameters())
        assert torch.equal(again(batches()[0][0]).logits, made(batches()[0][0]).logits)

    run(2, work)


def test_layers_that_read_one_activation_gather_it_once() -> None:
    """Query, key and value: one message, also where no gradient is asked for."""

    def work(rank: Rank) -> None:
        for overlap in (False, True):
            parallel = TensorParallel(model, rank.comm, sequence_parallel=True, overlap=overlap)
            before = len(rank.comm.ledger.messages)
            with torch.no_grad():
                parallel.model(batches()[0][0])
            evaluated = [message.op for message in rank.comm.ledger.messages[before:]]
            before += len(evaluated)
            parallel.model(batches()[0][0])
            trained = [message.op for message in rank.comm.ledger.messages[before:]]
            assert trained == evaluated
            assert trained.count("all_gather") == 2 * 2 + 1
            assert trained.count("reduce_scatter") == 2 * 2
            parallel = TensorParallel(model, rank.comm, overlap=overlap)
            before = len(rank.comm.ledger.messages)
            parallel.step(batches()[0])
            sent = [message.op for message in rank.comm.ledger.messages[before:]]
            # Forward: the embedding, and two layers of each block; backward: two entries of each block, and the head's.
            assert sent.count("all_reduce") + sent.count("all_reduce_") == (1 + 2 * 2) + (2 * 2 + 1)

    model = gpt()
    run(2, work)


# --- state -----------------------------------------------------------------------------------------------------------


@any_model
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_what_was_cut_merges_to_the_whole(name: str, num_ranks: int) -> None:
    """Names, their order, shapes, values to the bit, and what is one tensor under two names."""
    model = MODELS[name]()
    want = model.state_dict()
    aliases = [(a, b) for a in want for b in want if a < b and want[a].data_ptr() == want[b].data_ptr()]
    assert bool(aliases) == (name != "untied")

    def work(rank: Rank) -> None:
        for sequence_parallel in (False, True):
            parallel = TensorParallel(model, rank.comm, sequence_parallel=sequence_parallel)
            state = parallel.full_state_dict()
            assert_same(state, want)
            found = [(a, b) for a in state for b in state if a < b and state[a].data_ptr() == state[b].data_ptr()]
            assert found == aliases
            assert not any(value.requires_grad for value in state.values())
            for value in state.values():
                value.zero_()  # they are copies
            assert_same(parallel.full_state_dict(), want)

    run(num_ranks, work)


@any_model
def test_a_merged_state_loads_into_a_whole_model_which_computes_the_same(name: str) -> None:
    model, whole = MODELS[name](), MODELS[name]()
    held_out = batches()[3:]

    def work(rank: Rank) -> tuple[dict[str, Tensor], list[float]]:
        parallel = TensorParallel(model, rank.comm, optimizer=SGD)
        for batch in batches()[:3]:
            parallel.step(batch)
        state = parallel.full_state_dict()
        return state, [parallel.step(batch) for batch in held_out]

    for state, losses in run(2, work):
        with torch.no_grad():
            for p in whole.parameters():
                p.fill_(math.nan)
        whole.load_state_dict(state)
        serial = Serial(whole, SGD(whole.parameters()), loss_of_logits)
        assert serial.evaluate(held_out[:1]) == pytest.approx(losses[0], abs=1e-12)
        assert [serial.step(batch) for batch in held_out] == pytest.approx(losses, abs=1e-12)


@any_model
def test_any_number_of_ranks_goes_on_from_what_another_saved(name: str) -> None:
    """2, then 4, then 1, then 2 ranks on a cut sequence: as if it had been one training."""
    model = MODELS[name]()
    other = copy.deepcopy(model)
    seed_parameters(other, seed=7)
    state = model.state_dict()
    for step, (num_ranks, sequence_parallel) in enumerate(((2, False), (4, True), (1, False), (2, True), (4, False))):

        def work(rank: Rank, state: Any = state, step: int = step, cut: bool = sequence_parallel) -> dict[str, Tensor]:
            parallel = TensorParallel(other, rank.comm, sequence_parallel=cut, optimizer=SGD)
            before = len(rank.comm.ledger.messages)
            parallel.load_full_state_dict(state)
            assert len(rank.comm.ledger.messages) == before
            assert_same(parallel.full_state_dict(), state)
            parallel.step(batches()[step])
            return parallel.full_state_dict()

        of_ranks = run(num_ranks, work)
        state = of_ranks[0]
        for mine in of_ranks[1:]:
            assert_same(mine, state)
    assert_same(state, serially(model, batches()), 1e-12)


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: without(state, "head.norm.bias"), r"lacks \['head\.norm\.bias'\], and the model has no \[\]:"),
        (lambda state: {**state, "head.scale": torch.ones(1)}, r"lacks \[\], and the model has no \['head\.scale'\]:"),
        (lambda state: {}, "this state lacks"),
        (
            lambda state: {**state, "blocks.1.mlp.down.weight": torch.zeros(WIDTH, 2 * WIDTH)},
            r"blocks\.1\.mlp\.down\.weight has shape \(16, .*load the state of a model of the same sizes",
        ),
        (
            lambda state: {**state, "head.norm.bias": torch.zeros(2 * WIDTH)},
            r"head\.norm\.bias has shape \(32,\) .* \(16,\) in the model",
        ),
        (lambda state: gpt(num_layers=1).state_dict(), r"lacks \['blocks\.1\."),
        (lambda state: gpt(width=2 * WIDTH).state_dict(), r"has shape \(.*, 32\) "),
        *(
            (lambda state, size=size: {**state, "blocks.1.mlp.down.weight": torch.zeros(size)}, "down.weight has shape")
            for size in ((WIDTH, 4 * WIDTH + 1), (4 * WIDTH,), (), (WIDTH, 0), (WIDTH, 4 * WIDTH, 1))
        ),
    ],
)
def test_a_state_of_another_model_is_refused_and_changes_nothing(change: Callable[..., Any], said: str) -> None:
    model = gpt(False)

    def work(rank: Rank) -> None:
        parallel = TensorParallel(model, rank.comm)
        before = snapshot(parallel.model)
        with pytest.raises(MplabError, match=said):
            parallel.load_full_state_dict(change(gpt(False, seed=3).state_dict()))
        assert_same(snapshot(parallel.model), before)
        parallel.load_full_state_dict(gpt(False, seed=3).state_dict())
        assert_same(parallel.full_state_dict(), gpt(False, seed=3).state_dict())

    run(2, work)


def test_gradients_of_what_is_frozen_or_unused() -> None:
    model = gpt(False)
    model.blocks[0].mlp.requires_grad_(False)
    model.extra = nn.Linear(2, 2, device="meta").to_empty(device="cpu")
    seed_parameters(model)

    def work(rank: Rank) -> None:
        parallel = TensorParallel(model, rank.comm)
        parallel.step(batches()[0])
        gradients = parallel.full_gradients()
        assert list(gradients) == [name for name, p in model.named_parameters() if p.requires_grad]
        for name, p in model.named_parameters():
            if name in gradients:
                assert gradients[name].shape == p.shape
                assert bool(gradients[name].any()) == ("extra" not in name), name
        gradients["head.norm.bias"].zero_()
        assert parallel.full_gradients()["head.norm.bias"].any()  # they are copies

    run(2, work)


# --- runs of the world -----------------------------------------------------------------------------------------------


@any_model
def test_training_goes_on_in_another_run(name: str) -> None:
    model = MODELS[name]()
    world = World(2, "cpu")
    made = world.run(lambda rank: TensorParallel(model, rank.comm, sequence_parallel=True, optimizer=SGD))

    def work(rank: Rank, batch: Batch) -> dict[str, Tensor]:
        parallel = made[rank.index]
        parallel.connect(rank.comm)
        parallel.step(batch)
        assert rank.comm.ledger.of("reduce_scatter")  # the layers talk in this run, not in that which is over
        return parallel.full_state_dict()

    for batch in batches():
        states = world.run(lambda rank, batch=batch: work(rank, batch))
    assert_same(states[0], serially(model, batches()), 1e-12)
    assert_same(states[1], states[0])


def test_another_ranks_communicator_is_refused() -> None:
    model = gpt()
    made = run(2, lambda rank: TensorParallel(model, rank.comm))
    with pytest.raises(MplabError, match=r"connect to rank 0 of 2: this is rank 1 of 2"):
        run(2, lambda rank: made[1 - rank.index].connect(rank.comm) if rank.index == 0 else None)
    with pytest.raises(MplabError, match=r"connect to rank 0 of 1: this is rank 0 of 2"):
        run(1, lambda rank: made[0].connect(rank.comm))


# --- steps that are refused ------------------------------------------------------------------------------------------


def refused(num_ranks: int, work: Callable[[Rank], Any]) -> str:
    """What every rank is told: the same."""

    def caught(rank: Rank) -> str:
        with pytest.raises(MplabError) as error:
            work(rank)
        return str(error.value)

    told = run(num_ranks, caught)
    assert len(set(told)) == 1
    return told[0]


@pytest.mark.parametrize(
    ("length", "num_ranks", "offer"), [(6, 4, "4 or 8"), (7, 2, "6 or 8"), (5, 4, "4 or 8"), (3, 4, "4"), (1, 2, "2")]
)
def test_a_sequence_that_can_not_be_cut(length: int, num_ranks: int, offer: str) -> None:
    model = gpt()

    def work(rank: Rank) -> None:
        TensorParallel(model, rank.comm, sequence_parallel=True).step(batches(length=length)[0])

    said = f"a sequence of {length} tokens can't be cut in {num_ranks} equal parts, as sequence parallelism does: take "
    assert refused(num_ranks, work) == f"{said}{offer} tokens"
    run(num_ranks, lambda rank: TensorParallel(model, rank.comm).step(batches(length=length)[0]))


def test_ranks_that_are_given_different_first_batches() -> None:
    model = gpt()
    (inputs, targets), other = batches()[:2]
    pairs = [
        ((inputs, targets), other),
        ((inputs, targets), (inputs, other[1])),
        ((inputs, targets), (other[0], targets)),
    ]
    for pair in pairs:
        said = refused(2, lambda rank, pair=pair: TensorParallel(model, rank.comm).step(pair[rank.index]))
        assert said.startswith("the ranks were given different settings")
        assert re.search("the first batch.* on rank 1", said)


def test_batches_that_no_rank_can_train_on() -> None:
    model = gpt()
    inputs, targets = batches()[0]
    for batch, options, said in (
        ((inputs, targets[:3]), {}, "4 inputs and 3 targets"),
        ((inputs[:2], targets[:2]), {"num_microbatches": 3}, "a batch of 2 samples can't be cut in 3 micro-batches"),
        ((inputs + VOCABULARY, targets), {}, "tokens from 16 to 31, but the vocabulary goes from 0 to 15"),
        ((inputs - 1, targets), {}, "tokens from -1 to 14"),
        ((inputs, targets + 1), {}, "targets from 1 to 16, but the 2 ranks have logits for 16 classes"),
        ((inputs, targets[:, :4]), {}, "must have all dims of the logits but the last"),
    ):
        text = refused(2, lambda rank, b=batch, o=options: TensorParallel(model, rank.comm, **o).step(b))
        assert said in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_microbatches": 0}, "num_microbatches 0: must be a whole number, 1 or more"),
        ({"num_microbatches": True}, "num_microbatches True"),
        ({"num_microbatches": 1.0}, "num_microbatches 1.0"),
        ({"max_norm": 0.0}, "max_norm 0.0: must be a number above 0"),
        ({"max_norm": math.nan}, "max_norm nan"),
        ({"max_norm": "1"}, "max_norm '1'"),
        ({"loss_fn": None}, "loss_fn is a NoneType"),
        ({"optimizer": "adam"}, "optimizer is a str"),
    ],
)
def test_settings_out_of_their_range(options: dict[str, Any], said: str) -> None:
    model = gpt()
    assert said in refused(2, lambda rank: TensorParallel(model, rank.comm, **options))


def test_models_that_can_not_be_trained() -> None:
    frozen = gpt().requires_grad_(False)
    assert "no parameter of this model is trained" in refused(2, lambda rank: TensorParallel(frozen, rank.comm))
    assert "model is a dict" in refused(2, lambda rank: TensorParallel({}, rank.comm))  # type: ignore[arg-type]
    meta = gpt().to("meta")
    said = refused(2, lambda rank: TensorParallel(meta, rank.comm))
    assert "is on the meta device and has no values: build the model on a real device" in said


def test_a_loss_that_would_take_a_part_of_the_logits_for_all() -> None:
    model, known = gpt(), gpt2()

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets)

    for made, loss_fn in ((model, own), (known, own), (model, partial(cross_entropy)), (model, nn.CrossEntropyLoss())):
        said = refused(2, lambda rank, made=made, loss_fn=loss_fn: TensorParallel(made, rank.comm, loss_fn=loss_fn))
        assert (
            "the plan leaves the logits cut over the ranks, and this loss_fn would take a rank's part for all" in said
        )
        assert 'say "column_gather" in place of "vocab"' in said
        assert "partial(vocab_parallel_cross_entropy, comm=comm)" in said
    plan = {**tensor_plan(model), "head.projection": "column_gather"}

    def accepted(rank: Rank) -> None:
        TensorParallel(model, rank.comm, plan, loss_fn=own).step(batches()[0])
        smoothed = partial(vocab_parallel_cross_entropy, comm=rank.comm, label_smoothing=0.1)
        TensorParallel(model, rank.comm, loss_fn=smoothed).step(batches()[0])

    run(2, accepted)


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("name", ["blocks.1.mlp.up.weight", "head.norm.bias"])
def test_a_gradient_that_is_no_number_on_one_rank(name: str, max_norm: float | None) -> None:
    model = gpt()
    seen: dict[int, Any] = {}

    def work(rank: Rank) -> None:
        parallel = TensorParallel(model, rank.comm, max_norm=max_norm)
        parallel.step(batches()[0])
        if rank.index == 1:
            parameter = dict(parallel.model.named_parameters())[name]
            parameter.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), math.nan))
        before = snapshot(parallel.model)
        try:
            parallel.step(batches()[1])
        finally:
            seen[rank.index] = before, snapshot(parallel.model)

    with pytest.raises(
        NonFiniteGradient, match=rf"rank 1, step 1: the gradient of {name} has a NaN or an Inf.*"
    ) as error:
        run(2, work)
    assert "lower the learning rate" in str(error.value)
    assert_same(*seen[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_reaches_every_rank(value: float) -> None:
    """Each names a gradient of its own, and changes nothing."""
    model = gpt()

    def work(rank: Rank) -> str:
        parallel = TensorParallel(model, rank.comm)
        if rank.index == 1:
            with torch.no_grad():
                parallel.model.blocks[0].mlp.down.weight[0, 0] = value
        before = snapshot(parallel.model)
        with pytest.raises(NonFiniteGradient) as error:
            parallel.step(batches()[0])
        torch.testing.assert_close(snapshot(parallel.model), before, rtol=0, atol=0, equal_nan=True)
        return str(error.value)

    assert [text[:15] for text in run(2, work)] == ["rank 0, step 0:", "rank 1, step 0:"]


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_that_drop_stay_alike(sequence_parallel: bool) -> None:
    """What every rank has whole is the same on all of them after three steps, and the losses are, to the bit."""
    model = gpt2(resid_pdrop=0.1, embd_pdrop=0.1)
    start = snapshot(model)

    def work(rank: Rank) -> tuple[list[float], dict[str, Tensor]]:
        parallel = TensorParallel(model, rank.comm, sequence_parallel=sequence_parallel, optimizer=SGD)
        losses = [parallel.step(batch) for batch in batches()[:3]]
        cuts = cuts_of(parallel.model)
        return losses, {n: p.detach() for n, p in parallel.model.named_parameters() if p not in cuts}

    first, *others = run(4, work)
    assert len(first[1]) == 2 * 6 + 3
    for losses, whole in others:
        assert losses == first[0]
        assert_same(whole, first[1])
    assert not any(torch.equal(value, start[name]) for name, value in first[1].items())
    undropped = serially(gpt2(), batches()[:3])
    assert not torch.allclose(first[1]["transformer.wpe.weight"], undropped["transformer.wpe.weight"])


def masks(model: nn.Module, rank: Rank, sequence_parallel: bool, num_steps: int = 2) -> dict[str, list[Tensor]]:
    """What each dropout of a model kept, step by step: 0, or the factor by which it grew."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            seen.setdefault(name, []).append((output / args[0]).detach())

        return hook

    parallel = TensorParallel(model, rank.comm, sequence_parallel=sequence_parallel, optimizer=SGD)
    for name, module in parallel.model.named_modules():
        if name.endswith("dropout") or name.endswith("drop"):
            module.register_forward_hook(keep(name))
    for batch in batches(16)[:num_steps]:
        parallel.step(batch)
    return seen


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_what_is_dropped(sequence_parallel: bool) -> None:
    """The right share of it; on all ranks alike where the sequence is whole, each its own where it is cut."""
    model = gpt2(resid_pdrop=0.3, embd_pdrop=0.3)
    of_ranks = run(2, lambda rank: masks(model, rank, sequence_parallel))
    paths = ["transformer.drop", *(f"transformer.h.{i}.{place}" for i in (0, 1) for place in ("attn.resid_dropout",))]
    for path in (*paths, "transformer.h.0.mlp.dropout", "transformer.h.1.mlp.dropout"):
        mine, other = (seen[path] for seen in of_ranks)
        for mask in (*mine, *other):
            dropped = mask == 0
            assert 0.26 < dropped.double().mean().item() < 0.34
            torch.testing.assert_close(mask[~dropped], torch.full_like(mask[~dropped], 1 / 0.7))
        assert not torch.equal(mine[0] == 0, mine[1] == 0)  # of two steps
        assert torch.equal(mine[0] == 0, other[0] == 0) is not sequence_parallel
    kept = [seen[0] == 0 for seen in of_ranks[0].values()]  # of each place another part
    later = [mask for mask in kept if mask.shape == kept[-1].shape]
    assert len(later) >= 4
    assert not any(torch.equal(mask, other) for i, mask in enumerate(later) for other in later[:i])


def test_the_same_is_dropped_in_every_run() -> None:
    """Whichever thread comes first, and whatever the global generator has been used for."""
    model = gpt2(resid_pdrop=0.3, embd_pdrop=0.3)

    def work(rank: Rank) -> list[float]:
        parallel = TensorParallel(model, rank.comm, optimizer=SGD)
        return [parallel.step(batch) for batch in batches()[:2]]

    first = run(2, work)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert run(2, work) == first


def test_nothing_is_dropped_in_an_evaluation() -> None:
    model = gpt2(resid_pdrop=0.5, embd_pdrop=0.5)

    def work(rank: Rank) -> Tensor:
        made = tensor_parallel(model, rank.comm).eval()
        with torch.no_grad():
            return rank.comm.all_gather(made(batches()[0][0]).logits, -1)

    want = model.eval()(batches()[0][0]).logits
    for logits in run(2, work):
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-12)
