"""Tensor-parallel training is serial training: whatever the model, the plan and the number of ranks.

Outputs before the first step, every loss, every merged gradient after the first and the last step, and the weights
then. SGD, so that a gradient of a wrong scale shows, but where a test says otherwise. Three steps, the second of which
is the first that the optimizer's memory counts in; of two models ten.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from data_parallel import OPTIMIZERS, one_thread
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn

from mplab import World
from mplab.datasets import Batch
from mplab.errors import MplabError
from mplab.models import GPT, GPTConfig, cross_entropy, seed_parameters
from mplab.parallel import Serial, TensorParallel, vocab_parallel_cross_entropy
from mplab.parallel.tensor_plan import resolve, tensor_plan
from mplab.world import Rank

VOCABULARY, WIDTH, LENGTH, NUM_SAMPLES = 16, 16, 8, 5
TOLERANCE, TOLERANCE_FLOAT32 = 1e-10, 1e-5
# Their norms compute in float32, whatever the model is: a last bit there is 6e-8 of a value.
TOLERANCES = {"Llama": 1e-6, "Llama tied": 1e-6, "Qwen3": 1e-6, "Gemma3": 1e-5}

# --- models ----------------------------------------------------------------------------------------------------------


def gpt(tied: bool = True) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "context_length": LENGTH + 1, "width": WIDTH}
    return GPT(GPTConfig(num_layers=2, num_heads=4, tied=tied, **sizes))


def hugging_face(name: str, **options: Any) -> nn.Module:
    """A tiny one with random weights, the same every time."""
    kind = getattr(pytest.importorskip("transformers"), name)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = kind(kind.config_class(**{**sizes, "max_position_embeddings": LENGTH, **options}))
    seed_parameters(model)
    return model


GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
BERT = {"intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {"intermediate_size": 32, "num_key_value_heads": 4}
GROUPED = {**LLAMA, "num_attention_heads": 8, "hidden_size": 2 * WIDTH}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT": gpt,
    "GPT untied": partial(gpt, tied=False),
    "GPT-2": partial(hugging_face, "GPT2LMHeadModel", **GPT2),
    "Llama": partial(hugging_face, "LlamaForCausalLM", **GROUPED),
    "Llama tied": partial(hugging_face, "LlamaForCausalLM", **GROUPED, tie_word_embeddings=True),
    "BERT": partial(hugging_face, "BertForMaskedLM", **BERT),
    "BERT of tokens": partial(hugging_face, "BertForTokenClassification", **BERT, num_labels=VOCABULARY),
    "Qwen3": partial(hugging_face, "Qwen3ForCausalLM", **LLAMA, head_dim=4),
}


@cache
def whole(name: str) -> nn.Module:
    """One of `MODELS`, made once for all tests that change nothing of it."""
    return MODELS[name]().double()


@cache
def batches(num_classes: int = VOCABULARY, length: int = LENGTH, num_batches: int = 3) -> tuple[Batch, ...]:
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randint, size=(NUM_SAMPLES, length), generator=generator)
    return tuple((draw(VOCABULARY), draw(num_classes)) for _ in range(num_batches))


# --- what training comes to ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """By serial training, or merged from the ranks."""

    outputs: Tensor  # before the first step
    losses: list[float]
    gradients: list[dict[str, Tensor]]  # after the first step and the last
    weights: dict[str, Tensor]


def logits_of(outputs: Any) -> Tensor:
    logits: Tensor = getattr(outputs, "logits", outputs)
    return logits


def loss_of_logits(outputs: Any, targets: Tensor) -> Tensor:
    return cross_entropy(logits_of(outputs), targets)


def serially(
    model: nn.Module, data: Sequence[Batch], optimizer: str = "sgd", loss_fn: Any = loss_of_logits, **options: Any
) -> Trained:
    """On a copy."""
    model = copy.deepcopy(model)
    with one_thread():
        with torch.no_grad():
            outputs = logits_of(model(data[0][0]))
        serial = Serial(model, OPTIMIZERS[optimizer](model.parameters()), loss_fn, **options)
        losses, gradients = [], []
        for step, batch in enumerate(data):
            losses.append(serial.step(batch))
            if step in (0, len(data) - 1):
                named = model.named_parameters(remove_duplicate=False)
                gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
    return Trained(outputs, losses, gradients, model.state_dict())


@cache
def serial(
    name: str, dtype: torch.dtype = torch.float64, optimizer: str = "sgd", num_batches: int = 3, **options: Any
) -> Trained:
    """Of one of `MODELS`, once for all tests that need it."""
    return serially(MODELS[name]().to(dtype), batches(num_batches=num_batches), optimizer, **options)


def follow(rank: Rank, parallel: TensorParallel, data: Sequence[Batch]) -> Trained:
    """What a rank sees."""
    with torch.no_grad():
        outputs = logits_of(parallel.model(data[0][0]))
    if parallel._has_cut_logits:
        outputs = rank.comm.all_gather(outputs, -1)
    losses, gradients = [], []
    for step, batch in enumerate(data):
        losses.append(parallel.step(batch))
        if step in (0, len(data) - 1):
            gradients.append(parallel.full_gradients())
    return Trained(outputs, losses, gradients, parallel.full_state_dict())


def assert_alike(got: Trained, want: Trained, tolerance: float) -> None:
    close(got.outputs, want.outputs, tolerance, "outputs")
    losses = (torch.tensor(trained.losses, dtype=torch.float64) for trained in (got, want))
    close(*losses, tolerance, "losses")
    for when, mine, theirs in zip(("first", "last"), got.gradients, want.gradients, strict=True):
        assert list(mine) == list(theirs)
        for name, gradient in theirs.items():
            close(mine[name], gradient, tolerance, f"gradient of {name} after the {when} step")
    assert list(got.weights) == list(want.weights)
    for name, weight in want.weights.items():
        close(got.weights[name], weight, tolerance, name)


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    is_alike = got.dtype == want.dtype and got.shape == want.shape
    if not (is_alike and (got - want).abs().max() <= tolerance):  # a tenth of the time that the next line takes
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance, msg=lambda text: f"{what}: {text}")


def check(
    want: Trained,
    model: nn.Module,
    num_ranks: int,
    *ways: Mapping[str, Any],
    data: Sequence[Batch] | None = None,
    tolerance: float = TOLERANCE,
    optimizer: str = "sgd",
    rendezvous: bool = False,
    **options: Any,
) -> None:
    """All ways, one after the other in a world: every rank sees serial training, and the same losses to the bit."""
    data = batches() if data is None else data
    start = copy.deepcopy(model.state_dict())

    def work(rank: Rank) -> list[Trained]:
        made = partial(TensorParallel, model, rank.comm, optimizer=OPTIMIZERS[optimizer], **options)
        return [follow(rank, made(**way), data) for way in ways or ({},)]

    for of_way in zip(*World(num_ranks, "cpu", rendezvous=rendezvous).run(work), strict=True):
        for trained in of_way:
            assert trained.losses == of_way[0].losses
            assert_alike(trained, want, tolerance)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


SEQUENCE, OVERLAP = {"sequence_parallel": True}, {"overlap": True}
EVERY_WAY = ({}, SEQUENCE, OVERLAP, SEQUENCE | OVERLAP)

# --- models that are known, and those that carry a plan --------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_models_train_as_they_do_whole(name: str, num_ranks: int) -> None:
    """In every way on more than one rank: two of them on 2 and the others on 4, and with the next model vice versa."""
    ways = (({}, SEQUENCE | OVERLAP), (SEQUENCE, OVERLAP))
    is_odd = [*MODELS].index(name) % 2
    mine = ways[is_odd][:1] if num_ranks == 1 else ways[(num_ranks == 4) ^ is_odd]
    check(serial(name), whole(name), num_ranks, *mine, tolerance=TOLERANCES.get(name, TOLERANCE))


@pytest.mark.parametrize("name", ["GPT", "GPT-2"])
def test_ten_steps(name: str) -> None:
    want = serial(name, num_batches=10)
    assert len(want.losses) == 10
    check(want, whole(name), 2, *EVERY_WAY, data=batches(num_batches=10))


@pytest.mark.parametrize("name", ["GPT", "GPT-2", "Llama", "BERT"])
def test_adamw(name: str) -> None:
    model, tolerance = whole(name), TOLERANCES.get(name, TOLERANCE)
    check(serial(name, optimizer="adamw"), model, 2, {}, SEQUENCE, tolerance=tolerance, optimizer="adamw")


@pytest.mark.parametrize("name", ["GPT", "GPT-2", "Llama", "BERT"])
def test_in_float32(name: str) -> None:
    want = serial(name, torch.float32)
    check(want, MODELS[name](), 2, SEQUENCE, OVERLAP, tolerance=TOLERANCE_FLOAT32)


@pytest.mark.parametrize("num_microbatches", [2, 3, 5])
def test_micro_batches_of_different_sizes_add_up(num_microbatches: int) -> None:
    """5 samples; and they come to what the whole batch does."""
    want = serial("GPT", num_microbatches=num_microbatches)
    assert want.losses == pytest.approx(serial("GPT").losses, abs=TOLERANCE)
    check(want, whole("GPT"), 2, {}, SEQUENCE, SEQUENCE | OVERLAP, num_microbatches=num_microbatches)


@pytest.mark.parametrize("name", ["GPT untied", "Qwen3"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_gradient_that_is_clipped_is_that_of_all_parameters_once(name: str, num_ranks: int) -> None:
    want, tolerance = serial(name, max_norm=0.3), TOLERANCES.get(name, TOLERANCE)
    for gradients in want.gradients:  # clipped in every step, to the same length
        assert torch.stack([g.norm() for g in gradients.values()]).norm().item() == pytest.approx(0.3, abs=1e-5)
    ways = ({}, SEQUENCE) if num_ranks > 1 else ({},)
    check(want, whole(name), num_ranks, *ways, tolerance=tolerance, max_norm=0.3)


def test_a_gradient_that_is_short_enough_stays() -> None:
    check(serial("GPT"), whole("GPT"), 2, max_norm=1e3)


@pytest.mark.parametrize("name", ["GPT", "BERT"])
def test_with_sends_that_wait_for_their_receives(name: str) -> None:
    check(serial(name), whole(name), 2, *EVERY_WAY, rendezvous=True)


def test_a_cut_along_the_sequence_that_ends_before_the_head() -> None:
    """The norm of the head sees 1/n of the sequence, and its projection all of it."""
    model = gpt().double()
    plan = {**tensor_plan(model), "head.norm": "gather"}
    check(serial("GPT"), model, 2, SEQUENCE, SEQUENCE | OVERLAP, plan=plan)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_layers_that_are_trained_whole_after_the_sequence_is_whole_again(num_ranks: int) -> None:
    """Their gradient is whole on every rank, and counted once: the norm of the head, and its projection."""
    model = gpt(tied=False).double()
    plan = {**tensor_plan(model), "blocks.1": "gather"}
    check(serial("GPT untied"), model, num_ranks, SEQUENCE, SEQUENCE | OVERLAP, plan=plan)
    del plan["head.projection"]
    check(serial("GPT untied"), model, num_ranks, SEQUENCE, plan=plan)


def test_a_head_for_tokens_after_the_sequence_is_whole_again() -> None:
    model = hugging_face("GPT2ForTokenClassification", **GPT2, classifier_dropout=0.0, num_labels=VOCABULARY).double()
    check(serially(model, batches()), model, 2, SEQUENCE)


def test_an_embedding_and_a_head_that_stay_whole() -> None:
    """Tied: all ranks have the embedding, and count its gradient once."""
    model = gpt().double()
    ends = ("embedding.token", "head.projection")
    plan = {pattern: style for pattern, style in tensor_plan(model).items() if pattern not in ends}
    check(serial("GPT"), model, 2, {}, OVERLAP, plan=plan)
    check(serial("GPT"), model, 4, SEQUENCE, plan={**plan, "head": "gather"})


def test_logits_that_are_gathered() -> None:
    model = gpt().double()
    plan = {**tensor_plan(model), "head.projection": "column_gather"}
    check(serial("GPT"), model, 2, *EVERY_WAY, plan=plan)


def test_an_embedding_with_a_forward_of_its_own_stays_whole() -> None:
    """Gemma3 multiplies what its embedding gives; a layer that is cut would not."""
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    model = hugging_face("Gemma3ForCausalLM", **LLAMA, head_dim=4, **ids).double()
    check(serially(model, batches()), model, 2, {}, SEQUENCE, tolerance=TOLERANCES["Gemma3"])


def test_labels_of_whole_sequences() -> None:
    """What reads the first token only, and has no logits to cut."""
    model = hugging_face("BertForSequenceClassification", **BERT, num_labels=3).double()
    data = [(inputs, targets[:, 0] % 3) for inputs, targets in batches()]
    check(serially(model, data), model, 2, {}, OVERLAP, data=data)


def test_labels_of_whole_sequences_and_a_sequence_that_is_cut() -> None:
    """A rank's own first token would give it a label of its own, without a word: refused, but with a plan for it."""
    model = hugging_face("BertForSequenceClassification", **BERT, num_labels=3).double()
    data = [(inputs, targets[:, 0] % 3) for inputs, targets in batches()]
    with pytest.raises(MplabError, match="sequence"):
        check(serially(model, data), model, 2, SEQUENCE, data=data)


# --- starts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", ["GPT", "GPT-2", "Qwen3"])
def test_ranks_that_begin_with_different_weights_begin_with_those_of_rank_0(name: str, sequence_parallel: bool) -> None:
    def work(rank: Rank) -> Trained:
        model = models[rank.index]
        options = {"optimizer": OPTIMIZERS["sgd"], "sequence_parallel": sequence_parallel}
        return follow(rank, TensorParallel(model, rank.comm, **options), batches())

    models = [MODELS[name]().double() for _ in range(2)]
    seed_parameters(models[1], seed=1)
    pairs = zip(*(model.parameters() for model in models), strict=True)
    assert not any(torch.equal(mine, other) for mine, other in pairs)
    for trained in World(2, "cpu").run(work):
        assert_alike(trained, serial(name), TOLERANCES.get(name, TOLERANCE))


def test_buffers_are_those_of_rank_0_too() -> None:
    def work(rank: Rank) -> Trained:
        parallel = TensorParallel(models[rank.index], rank.comm, GATED, optimizer=OPTIMIZERS["sgd"])
        return follow(rank, parallel, batches())

    with torch.random.fork_rng(devices=[]):
        models = [own(Scale(scale), Mixer()) for scale in (2.0, 3.0)]
    for trained in World(2, "cpu").run(work):
        assert_alike(trained, serially(models[0], batches()), TOLERANCE)


def frozen(name: str, *patterns: str) -> nn.Module:
    model = MODELS[name]().double()
    found = [p for n, p in model.named_parameters() if any(pattern in n for pattern in patterns)]
    assert found
    for parameter in found:
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "patterns",
    [
        ("embedding",),
        ("attention.query", "mlp.down.weight"),
        ("mlp.up.weight", "attention.output.bias"),
        ("norm",),
        ("embedding", "blocks.0"),
        ("blocks", "norm", "position"),
    ],
)
def test_frozen_parameters(patterns: Sequence[str]) -> None:
    model = frozen("GPT untied", *patterns)
    check(serially(model, batches()[:3]), model, 2, *EVERY_WAY, data=batches()[:3])


# --- losses ----------------------------------------------------------------------------------------------------------


@cache
def unfinished() -> tuple[Batch, ...]:
    """A third of the targets are not counted."""
    return tuple((inputs, targets.masked_fill(targets % 3 == 0, 3)) for inputs, targets in batches())


@pytest.mark.parametrize("name", ["GPT", "GPT-2", "BERT"])
def test_a_loss_of_logits_that_are_cut(name: str) -> None:
    """Of a model that gives them as they are, and of models that give them among others."""

    def ignoring(outputs: Any, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits_of(outputs).flatten(0, 1), targets.flatten(), ignore_index=3)

    def work(rank: Rank) -> Trained:
        loss_fn = partial(vocab_parallel_cross_entropy, comm=rank.comm, ignore_index=3)
        return follow(
            rank, TensorParallel(model, rank.comm, optimizer=OPTIMIZERS["sgd"], loss_fn=loss_fn), unfinished()
        )

    model = MODELS[name]().double()
    want = serially(model, unfinished(), loss_fn=ignoring)
    for trained in World(2, "cpu").run(work):
        assert_alike(trained, want, TOLERANCE)


def test_the_usual_ignore_index_needs_nothing() -> None:
    data = [(inputs, targets.masked_fill(targets % 3 == 0, -100)) for inputs, targets in batches()]
    model = MODELS["BERT"]().double()
    check(serially(model, data), model, 2, {}, SEQUENCE, data=data)


def test_a_loss_of_ones_own() -> None:
    """Of whole logits: any function."""

    def squares(outputs: Any, targets: Tensor) -> Tensor:
        right = nn.functional.one_hot(targets, VOCABULARY).to(torch.float64)
        return (logits_of(outputs) - right).square().mean()

    for name, head in (("GPT", "head.projection"), ("GPT-2", "lm_head")):
        model = MODELS[name]().double()
        plan = {**tensor_plan(model), head: "column_gather"}
        ways = ({"plan": plan}, {"plan": plan} | SEQUENCE)
        check(serially(model, batches(), loss_fn=squares), model, 2, *ways, loss_fn=squares)


# --- models that nobody knows ----------------------------------------------------------------------------------------


class Scale(nn.Module):
    """Of nothing but a buffer."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([scale]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Mixer(nn.Module):
    """A gated MLP; its layers read what comes in, or a norm of it, and it may add what came in."""

    def __init__(self, norm: bool = False, residual: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, WIDTH)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.down(torch.tanh(self.gate(y)) * self.up(y))
        return x + y if self.residual else y


class Twice(nn.Module):
    """Calls a layer twice with one activation, and once with another."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.up(x) + torch.tanh(self.gate(x)) + self.up(2 * x))


class Named(nn.Module):
    """Calls one by name, with something else before the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Keyword()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(scale=2.0, x=x)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, *, scale: float, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.gate(x)) * self.up(x)) * scale


def own(*between: nn.Module) -> nn.Sequential:
    """An embedding, what is between, and a head; weights of order 1."""
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *between, nn.Linear(WIDTH, VOCABULARY))
    seed_parameters(model)
    return model.double()


def pair(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


GATED = {"*.gate": "column", "*.up": "column", "*.down": "row"}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(("norm", "residual"), [(False, False), (True, False), (False, True), (True, True)])
def test_layers_that_read_what_comes_in_or_something_else(norm: bool, residual: bool, num_ranks: int) -> None:
    """Their gradients are added up once: what leaves the module another way has its whole gradient already."""
    with torch.random.fork_rng(devices=[]):
        model = own(Mixer(norm, residual), Mixer(norm, residual))
    check(serially(model, batches()), model, num_ranks, {}, OVERLAP, plan=GATED)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_module_that_is_the_first_on_the_cut_sequence_and_shares_its_input(num_ranks: int) -> None:
    with torch.random.fork_rng(devices=[]):
        model = own(Mixer(), Mixer())
    plan = {**GATED, "0": "vocab", "1": "scatter", "3": "vocab"}
    check(serially(model, batches()), model, num_ranks, *EVERY_WAY, plan=plan)


def test_a_layer_that_is_called_several_times() -> None:
    with torch.random.fork_rng(devices=[]):
        model = own(Twice(), nn.LayerNorm(WIDTH), Twice())
    check(serially(model, batches()), model, 2, {}, OVERLAP, plan=GATED)


def test_a_module_that_is_used_twice() -> None:
    with torch.random.fork_rng(devices=[]):
        mixer = Mixer(residual=True)
        model = own(mixer, nn.LayerNorm(WIDTH), mixer)
    plan = {f"1.{name}": style for name, style in (("gate", "column"), ("up", "column"), ("down", "row"))}
    check(serially(model, batches()), model, 2, {}, OVERLAP, plan=plan)


def test_activations_that_come_by_name() -> None:
    with torch.random.fork_rng(devices=[]):
        model = own(Named(), Named())
    inner = {pattern.replace("*", "*.inner"): style for pattern, style in GATED.items()}
    for entry in ({}, {"*.inner": "entry"}):
        check(serially(model, batches()), model, 2, {}, OVERLAP, plan=inner | entry)
    plan = inner | {"1.inner": "scatter", "0": "vocab", "3": "vocab"}
    check(serially(model, batches()), model, 2, SEQUENCE, plan=plan)


def crcr(*before: nn.Module) -> nn.Sequential:
    return pair(
        *before, *(nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 8)), nn.Linear(8, WIDTH)
    )


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_siblings_that_do_not_share_their_input(depth: int) -> None:
    """column, row, column, row: in the model itself, in a module of it, and after a norm there."""
    with torch.random.fork_rng(devices=[]):
        model = own(*crcr()) if depth == 0 else own(crcr(*[nn.LayerNorm(WIDTH)] * (depth - 1)))
    first, start = ("" if depth == 0 else "1."), (1, 0, 1)[depth]
    styles = ("column", "row", "", "column", "row")
    plan = {f"{first}{start + i}": style for i, style in enumerate(styles) if style}
    check(serially(model, batches()), model, 2, {}, OVERLAP, plan=plan)


def test_siblings_that_do_not_share_their_input_on_a_cut_sequence() -> None:
    with torch.random.fork_rng(devices=[]):
        model = own(crcr())
    plan = {"0": "vocab", "1": "scatter", "1.0": "column", "1.1": "row", "1.3": "column", "1.4": "row", "2": "vocab"}
    for num_ranks in (2, 4):
        check(serially(model, batches()), model, num_ranks, SEQUENCE, SEQUENCE | OVERLAP, plan=plan)


@pytest.mark.parametrize("norm", [False, True])
def test_layers_that_read_something_else_on_a_cut_sequence(norm: bool) -> None:
    """A norm of what comes in, which would be gathered once more if what comes in were: serial training, too."""
    with torch.random.fork_rng(devices=[]):
        model = own(Mixer(norm), Mixer(norm, residual=True))
    plan = GATED | {"0": "vocab", "1": "scatter", "3": "vocab"}
    check(serially(model, batches()), model, 2, SEQUENCE, SEQUENCE | OVERLAP, plan=plan)


def test_layers_that_are_cut_after_the_sequence_is_whole_again() -> None:
    """A row-parallel layer's bias among them, which every rank has, and its whole gradient."""
    with torch.random.fork_rng(devices=[]):
        model = own(Mixer(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))
    plan = GATED | {"0": "vocab", "1": "scatter", "2": "gather", "3": "column", "5": "row", "6": "vocab"}
    check(serially(model, batches()), model, 2, SEQUENCE, SEQUENCE | OVERLAP, plan=plan)


def test_a_norm_of_each_head() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(WIDTH, 8), nn.LayerNorm(2), nn.Linear(8, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.norm(self.up(x).unflatten(-1, (-1, 2))).flatten(-2))

    with torch.random.fork_rng(devices=[]):
        model = own(Heads(), nn.LayerNorm(WIDTH), Heads())
    plan = {"*.up": "column", "*.norm": "partial", "*.down": "row"}
    for num_ranks in (2, 4):
        check(serially(model, batches()), model, num_ranks, {}, OVERLAP, plan=plan)
    plan |= {"0": "vocab", "1": "scatter", "4": "vocab"}
    check(serially(model, batches()), model, 2, SEQUENCE, plan=plan)


def test_inputs_without_a_sequence() -> None:
    """Rows of features, and classes."""
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 4))
    seed_parameters(model.double())
    generator = torch.Generator().manual_seed(3)
    data = [
        (torch.randn(5, 6, generator=generator).double(), torch.randint(4, (5,), generator=generator)) for _ in range(5)
    ]
    for head in ("column_gather", "vocab"):
        plan = {"0": "column", "2": "row", "3": head}
        check(serially(model, data), model, 2, {}, OVERLAP, data=data, plan=plan)


def test_a_model_in_its_evaluation_mode_drops_nothing() -> None:
    """As `from_pretrained` gives it."""
    with torch.random.fork_rng(devices=[]):
        model = own(Mixer(), nn.Dropout(0.5), Mixer()).eval()
        known = hugging_face("GPT2LMHeadModel", **{**GPT2, "resid_pdrop": 0.5, "embd_pdrop": 0.5}).double().eval()
    check(serially(model, batches()), model, 2, plan=GATED)
    check(serially(known, batches()), known, 2, {}, SEQUENCE)


# --- any plan --------------------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> tuple[bool, int, bool, bool, dict[str, str]]:
    """Whether tied, the ranks, whether the sequence is cut, whether there is overlap, and a plan of `chain(tied)`."""
    tied, sequence_parallel, overlap, is_cut = (draw(st.booleans()) for _ in range(4))
    num_ranks = draw(st.sampled_from([1, 2, 4]))
    plan = {"0": "vocab"} if is_cut else {}
    for block in (1, 2):
        kind = draw(st.sampled_from(["gated", "gated", "whole", "entry"]))
        if kind != "whole":
            plan |= {f"{block}.gate": "column", f"{block}.up": "column", f"{block}.down": "row"}
        if kind == "entry" and not (sequence_parallel and block == 1):
            plan[f"{block}"] = "entry"
    head = draw(st.sampled_from(["vocab", "column_gather", "whole"]))
    if head != "whole":
        plan["4"] = head
    if sequence_parallel:
        plan["1"] = "scatter"
        if head == "whole":
            plan["4"] = "gather"
        elif draw(st.booleans()):
            plan["3"] = "gather"
    return tied, num_ranks, sequence_parallel, overlap, plan


@cache
def chain(tied: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = own(Mixer(), Mixer(), nn.LayerNorm(WIDTH))
    if tied:
        model[-1].weight = model[0].weight
    return model


@cache
def serial_chain(tied: bool) -> Trained:
    return serially(chain(tied), batches()[:2])


@given(drawn=plans())
@settings(max_examples=25, derandomize=True)
def test_any_plan_that_is_accepted(drawn: tuple[bool, int, bool, bool, dict[str, str]]) -> None:
    tied, num_ranks, sequence_parallel, overlap, plan = drawn
    model = chain(tied)
    try:
        resolve(model, plan, num_ranks, sequence_parallel)
    except MplabError:
        assume(False)
    way = {"plan": plan, "sequence_parallel": sequence_parallel, "overlap": overlap}
    check(serial_chain(tied), model, num_ranks, way, data=batches()[:2])
