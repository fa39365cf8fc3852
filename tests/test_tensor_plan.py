"""Plans: what they name, what is known of models, and everything that they are refused for, on every rank."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from limits import leaves_nothing_behind as leaves_nothing_behind
from torch import Tensor, nn

from mplab import World
from mplab.errors import MplabError
from mplab.models import GPT, MLP, GPTConfig, seed_parameters
from mplab.parallel import TensorParallel, tensor_parallel
from mplab.parallel.tensor_plan import STYLES, matches, resolve, tensor_plan, whole_zones
from mplab.world import Rank

SIZES: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
}


def gpt(**options: Any) -> GPT:
    return GPT(GPTConfig(**{"vocab_size": 12, "context_length": 8, "num_heads": 4, "width": 8, **options}))


def hugging_face(name: str, **options: Any) -> nn.Module:
    kind = getattr(pytest.importorskip("transformers"), name)
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = kind(kind.config_class(**{**SIZES, **options}))
    return model


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
LLAMA = {"intermediate_size": 16, "num_key_value_heads": 2}


def chain(*layers: nn.Module) -> nn.Sequential:
    with torch.device("meta"):
        model = nn.Sequential(*layers)
    model.to_empty(device="cpu")
    seed_parameters(model)
    return model


def linear(num_inputs: int = 8, num_outputs: int = 8, bias: bool = True) -> nn.Linear:
    return nn.Linear(num_inputs, num_outputs, bias, device="meta")


def embedding() -> nn.Embedding:
    return nn.Embedding(12, 8, device="meta")


def styles(model: nn.Module, plan: Mapping[str, str], num_ranks: int = 2, sequence: bool = False) -> dict[str, str]:
    return {path: style for path, (style, _) in resolve(model, plan, num_ranks, sequence).items()}


# --- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "path", "does"),
    [
        ("blocks.*.mlp.up", "blocks.0.mlp.up", True),
        ("blocks.*.mlp.up", "blocks.11.mlp.up", True),
        ("blocks.*.mlp.up", "blocks.0.mlp.up.lora", False),
        ("blocks.*.mlp.up", "model.blocks.0.mlp.up", False),
        ("blocks.*.up", "blocks.0.mlp.up", False),  # a star is one part of the name
        ("*.*.mlp.*", "blocks.0.mlp.up", True),
        ("*", "head", True),
        ("*", "", False),
        ("", "", True),
        ("", "head", False),
        ("blocks.*", "blocks.", False),
        ("h.*", "hx0", False),  # a dot is a dot
        ("up*", "up_proj", True),  # and a star any rest of one part, if there is any
        ("up*", "up", False),
        ("a+b", "a+b", True),
        ("a+b", "aab", False),
        ("*.up", "mlp\n.up", True),
    ],
)
def test_what_a_pattern_stands_for(pattern: str, path: str, does: bool) -> None:
    assert matches(pattern, path) is does


names = st.lists(st.text("ab_0", min_size=1, max_size=3), min_size=1, max_size=4)


@given(parts=names, stars=st.sets(st.integers(0, 3)))
def test_a_star_stands_for_exactly_one_part(parts: list[str], stars: set[int]) -> None:
    pattern = ".".join("*" if i in stars else part for i, part in enumerate(parts))
    path = ".".join(parts)
    assert matches(pattern, path)
    assert not matches(pattern, f"{path}.more")
    assert not matches(pattern, f"more.{path}")


# --- plans that are known --------------------------------------------------------------------------------------------


def test_the_plan_of_a_gpt_is_a_copy() -> None:
    plan = tensor_plan(gpt())
    plan["head.norm"] = "gather"
    assert tensor_plan(gpt()) != plan
    assert tensor_plan(gpt()) == {name: style for name, style in plan.items() if name != "head.norm"}


def test_every_layer_of_a_gpt_is_cut() -> None:
    model = gpt()
    found = styles(model, tensor_plan(model))
    layers = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert layers | {"embedding.token"} == found.keys()
    assert found["blocks.1.attention.key"] == found["blocks.0.mlp.up"] == "column"
    assert found["blocks.1.attention.output"] == found["blocks.0.mlp.down"] == "row"
    assert found["head.projection"] == found["embedding.token"] == "vocab"
    assert styles(model, tensor_plan(model), sequence=True) == {**found, "blocks.0": "scatter"}


def expected(name: str) -> tuple[str, dict[str, str]]:
    """Of each family: where its blocks are, and what is said of the first one and of all around it."""
    llama = {f"self_attn.{part}_proj": "column" for part in "qkv"} | {"self_attn.o_proj": "row"}
    llama |= {"mlp.gate_proj": "column", "mlp.up_proj": "column", "mlp.down_proj": "row"}
    bert = {f"attention.self.{part}": "column" for part in ("query", "key", "value")}
    bert |= {"attention.output.dense": "row", "intermediate.dense": "column", "output.dense": "row"}
    gpt2 = {"attn.c_attn": "column", "attn.c_proj": "row", "mlp.c_fc": "column", "mlp.c_proj": "row"}
    ends = {"model.embed_tokens": "vocab", "lm_head": "vocab"}
    return {
        "LlamaForCausalLM": ("model.layers", llama | ends),
        "LlamaForTokenClassification": ("model.layers", llama | {"model.embed_tokens": "vocab", "score": "gather"}),
        "LlamaModel": ("layers", llama | {"embed_tokens": "vocab"}),
        "Qwen3ForCausalLM": (
            "model.layers",
            llama | ends | {"self_attn.q_norm": "partial", "self_attn.k_norm": "partial"},
        ),
        "BertForMaskedLM": (
            "bert.encoder.layer",
            bert | {"bert.embeddings.word_embeddings": "vocab", "cls.predictions.decoder": "vocab"},
        ),
        "BertForTokenClassification": (
            "bert.encoder.layer",
            bert | {"bert.embeddings.word_embeddings": "vocab", "classifier": "gather"},
        ),
        "GPT2LMHeadModel": (
            "transformer.h",
            gpt2 | {"transformer.wte": "vocab", "lm_head": "vocab", "transformer.ln_f": "gather"},
        ),
        "GPT2Model": ("h", gpt2 | {"wte": "vocab", "ln_f": "gather"}),
    }[name]


FAMILIES = {
    "LlamaForCausalLM": LLAMA,
    "LlamaForTokenClassification": LLAMA,
    "Qwen3ForCausalLM": {**LLAMA, "head_dim": 2},
    "BertForMaskedLM": {"attention_probs_dropout_prob": 0.0},
    "BertForTokenClassification": {"attention_probs_dropout_prob": 0.0},
    "GPT2LMHeadModel": NO_DROPOUT,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_of_a_model_of_hugging_face(name: str) -> None:
    model = hugging_face(name, **FAMILIES[name])
    blocks, said = expected(name)
    found = resolve(model, tensor_plan(model), 2, True)
    paths = dict(model.named_modules())
    of_blocks = {path for path in said if f"{blocks}.0.{path}" in paths}
    want = {f"{blocks}.{i}.{path}": said[path] for i in range(2) for path in of_blocks}
    want |= {path: said[path] for path in said.keys() - of_blocks} | {f"{blocks}.0": "scatter"}
    # What enters a module of several column-parallel layers is gathered there: its code asks for the whole's shape.
    entries = {path.rpartition(".")[0] for path, style in want.items() if style == "column" and "c_" not in path}
    want |= {path: "entry" for path in entries if not path.endswith(".intermediate")}
    assert {path: style for path, (style, _) in found.items()} == want
    assert {count for path, (_, count) in found.items() if "c_attn" not in path} == {1}
    assert {count for path, (_, count) in found.items() if "c_attn" in path} <= {3}


@pytest.mark.parametrize("name", ["LlamaModel", "GPT2Model"])
def test_the_plan_of_a_model_without_a_head(name: str) -> None:
    model = hugging_face(name, **(LLAMA if name == "LlamaModel" else NO_DROPOUT))
    blocks, said = expected(name)
    found = styles(model, tensor_plan(model))
    assert found.keys() >= {
        f"{blocks}.1.{path}" for path in said if f"{blocks}.0.{path}" in dict(model.named_modules())
    }
    assert [path for path, style in found.items() if style == "vocab"] == [next(p for p in said if said[p] == "vocab")]


def test_the_styles_of_hugging_face() -> None:
    model = chain(linear(), nn.LayerNorm(8), linear(), linear(), embedding())
    plan = {"0": "colwise", "1": "replicated_with_grad_allreduce", "2": "rowwise", "3": "colwise_gather_output"}
    want = {"0": "column", "1": "partial", "2": "row", "3": "column_gather", "4": "vocab"}
    assert styles(model, plan | {"4": "embedding_rowwise"}) == want


def test_without_sequence_parallelism_nothing_is_said_of_the_sequence() -> None:
    plan = {"0": "column", "1": "row", "2": "scatter", "3": "gather"}
    assert styles(chain(linear(), linear(), linear(), linear()), plan) == {"0": "column", "1": "row"}


def test_joined_matrices() -> None:
    model = chain(linear(8, 24), linear(8, 8))
    assert resolve(model, {"0": "column:3", "1": "row"}, 4, False) == {"0": ("column", 3), "1": ("row", 1)}
    with pytest.raises(MplabError, match=r"0 has 24 outputs in 3 joined matrices.*choose tp from 1, 2, 4, 8"):
        resolve(model, {"0": "column:3"}, 3, False)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_every_number_of_ranks_that_is_named_is_right(num_ranks: int) -> None:
    """What the message offers is accepted, and nothing else is."""
    model = chain(linear(8, 12))
    if 12 % num_ranks == 0:
        assert styles(model, {"0": "column"}, num_ranks)
        return
    with pytest.raises(MplabError, match="choose tp from") as caught:
        resolve(model, {"0": "column"}, num_ranks, False)
    offered = [int(n) for n in str(caught.value).rpartition("from ")[2].split(", ")]
    assert offered == [1, 2, 3, 4, 6, 12]


def test_where_the_sequence_is_whole() -> None:
    model = gpt()
    paths = [path for path, _ in model.named_modules()]
    assert whole_zones(model, {}) == (set(paths), set())
    before, after = whole_zones(model, {"blocks.0": ("scatter", 1), "head.norm": ("gather", 1)})
    assert before == {"", "embedding", "embedding.token", "embedding.position", "blocks"}
    assert after == {"head.projection"}
    _, after = whole_zones(model, {"blocks.0": ("scatter", 1), "blocks.1": ("gather", 1)})
    assert after == {"head", "head.norm", "head.projection"}


# --- refusals --------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Attention's layers, and the features of a head under one of the names that they go by."""

    def __init__(self, attribute: str, num_heads: int) -> None:
        super().__init__()
        setattr(self, attribute, 4)
        self.query, self.joined = linear(8, 4 * num_heads), linear(8, 12 * num_heads)


def tied(*styles: str) -> tuple[nn.Module, dict[str, str]]:
    model = chain(embedding(), linear(8, 12, bias=False))
    model[1].weight = model[0].weight
    return model, {str(i): style for i, style in enumerate(styles) if style}


def tied_linear(*styles: str) -> tuple[nn.Module, dict[str, str]]:
    model = chain(linear(), linear())
    model[1].weight = model[0].weight
    return model, {str(i): style for i, style in enumerate(styles) if style}


class Scaled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def llama(**options: Any) -> nn.Module:
    return hugging_face("LlamaForCausalLM", **{**LLAMA, **options})


def of(model: Callable[[], nn.Module], **changes: str | None) -> tuple[nn.Module, dict[str, str]]:
    """Its own plan, with entries changed, added or (None) taken out."""
    made = model()
    plan = {**tensor_plan(made), **{pattern.replace("/", "."): style for pattern, style in changes.items()}}
    return made, {pattern: style for pattern, style in plan.items() if style is not None}


# What is asked for (model and plan, ranks, sequence parallelism), and what the message must say.
def after_a_linear_layer(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(nn.Linear(8, 8), make())


REFUSED: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], int, bool, str]] = {
    "names nothing": (
        lambda: (gpt(), {"blocks.*.mlp.upp": "column"}),
        2,
        False,
        r"'blocks\.\*\.mlp\.upp' names no module of this GPT: has it \['blocks\.\*\.mlp\.up', .*\]\?",
    ),
    "names nothing, and nothing is near": (lambda: (gpt(), {"###": "row"}), 2, False, r"'###' names no .*\['blocks'"),
    "a name that is one part short": (lambda: (gpt(), {"mlp.up": "column"}), 2, False, r"'blocks\.\*\.mlp\.up'"),
    "empty": (lambda: (gpt(), {}), 2, False, r"plan \{\}: give a dict of patterns and styles, or None"),
    "no dict": (lambda: (gpt(), ["blocks.*.mlp.up"]), 2, False, r"plan \['blocks.*give a dict"),
    "text": (lambda: (gpt(), "auto"), 2, False, "plan 'auto': give a dict"),
    "a style that is no text": (lambda: (gpt(), {"head.projection": 3}), 2, False, "'head.projection'"),
    "a style that is missing": (lambda: (gpt(), {"head.projection": None}), 2, False, "'head.projection'"),
    "a pattern that is no text": (lambda: (gpt(), {3: "column"}), 2, False, "3"),
    "no layer is cut": (
        lambda: (gpt(), {"blocks.0": "scatter", "head": "gather", "head.norm": "partial", "blocks.*.mlp": "entry"}),
        2,
        True,
        "cuts no layer: give one or more the style column, row or vocab",
    ),
    "two entries": (
        lambda: (gpt(), {"blocks.*.mlp.up": "column", "blocks.1.mlp.up": "row"}),
        2,
        False,
        r"two entries for blocks\.1\.mlp\.up: 'blocks\.\*\.mlp\.up' \('column'\) and 'blocks\.1\.mlp\.up' \('row'\)",
    ),
    "two entries that agree": (
        lambda: (gpt(), {"blocks.*.mlp.up": "column", "*.0.mlp.up": "column"}),
        2,
        False,
        r"two entries for blocks\.0\.mlp\.up",
    ),
    "unknown style": (
        lambda: (gpt(), {"blocks.*.mlp.up": "columns"}),
        2,
        False,
        r"blocks\.0\.mlp\.up: style 'columns' is not known. Known are column, column:3, .*rowwise",
    ),
    "a style of another library": (lambda: (gpt(), {"blocks.*.mlp": "local"}), 2, False, "style 'local' is not known"),
    "parts of rows": (lambda: (gpt(), {"blocks.*.mlp.down": "row:2"}), 2, False, "style 'row:2' is not known"),
    "no parts": (lambda: (gpt(), {"blocks.*.mlp.up": "column:0"}), 2, False, "style 'column:0' is not known"),
    "parts of a word": (lambda: (gpt(), {"blocks.*.mlp.up": "column:x"}), 2, False, "style 'column:x' is not known"),
    "less than no parts": (lambda: (gpt(), {"*.*.mlp.up": "column:-2"}), 2, False, "style 'column:-2' is not known"),
    "column on a norm": (
        lambda: (gpt(), {"head.norm": "column"}),
        2,
        False,
        r"head\.norm is a LayerNorm, and 'column' is for linear layers: take it out of the plan",
    ),
    "column on a module": (lambda: (gpt(), {"*.*.mlp": "row"}), 2, False, "is a FeedForward, and 'row' is for linear"),
    "column on an embedding": (
        lambda: (gpt(), {"embedding.token": "column"}),
        2,
        False,
        "is a Embedding, and 'column'",
    ),
    "vocab on a norm": (
        lambda: (gpt(), {"head.norm": "vocab"}),
        2,
        False,
        "'vocab' is for linear layers and embeddings",
    ),
    "a forward of its own": (lambda: (chain(Scaled(8, 8, device="meta")), {"0": "column"}), 2, False, "0 is a Scaled"),
    "outputs": (
        lambda: (chain(linear(8, 9)), {"0": "column"}),
        2,
        False,
        r"0 has 9 outputs, and 2 ranks can't each have the same number of them: choose tp from 1, 3, 9$",
    ),
    "inputs": (lambda: (chain(linear(9, 8)), {"0": "row"}), 2, False, r"0 has 9 inputs, and 2 ranks .* 1, 3, 9$"),
    "tokens": (lambda: (gpt(vocab_size=9), {"embedding.token": "vocab"}), 2, False, r"has 9 tokens, and 2 ranks"),
    "classes": (lambda: of(lambda: gpt(vocab_size=9, tied=False), embedding=None), 2, False, r"has 9 (tokens|outputs)"),
    "gathered outputs": (lambda: (chain(linear(8, 9)), {"0": "column_gather"}), 2, False, r"9 outputs, and 2 ranks"),
    "heads": (
        lambda: of(lambda: gpt(vocab_size=16)),
        8,
        False,
        r"attention\.query has 4 heads of 2, and 8 ranks can't each have the same number of them: .* from 1, 2, 4$",
    ),
    "heads that the sizes would allow": (
        lambda: (chain(Heads("head_dim", 3)), {"0.query": "column"}),
        2,
        False,
        r"0\.query has 3 heads of 4, and 2 ranks .* choose tp from 1, 3$",
    ),
    "joined heads": (
        lambda: (chain(Heads("attention_head_size", 3)), {"0.joined": "column:3"}),
        2,
        False,
        r"0\.joined has 3 heads of 4 in 3 joined matrices, and 2 ranks",
    ),
    "heads of a GPT": (lambda: (chain(Heads("head_size", 3)), {"0.query": "column"}), 4, False, "3 heads of 4"),
    "key heads": (lambda: of(llama), 4, False, r"self_attn\.k_proj has 2 heads of 2, and 4 ranks .* from 1, 2$"),
    "no plan": (
        lambda: (MLP((4, 8, 2)), None),
        2,
        False,
        "no plan is known for a MLP, and it carries none .* give one",
    ),
    "no model": (lambda: ("gpt", None), 2, False, "model is a str: give an nn.Module"),
    "tied, the embedding alone": (
        lambda: tied("vocab"),
        2,
        False,
        r"one parameter is used by layers that the plan cuts differently \(0: vocab, 1: not in it\): cut them alike",
    ),
    "tied, the head alone": (lambda: tied("", "column_gather"), 2, False, r"\(0: not in it, 1: column_gather\)"),
    "tied, cut differently": (lambda: tied("vocab", "row"), 2, False, r"\(0: vocab, 1: row\)"),
    "tied, rows and columns": (lambda: tied_linear("row", "column"), 2, False, r"\(0: row, 1: column\)"),
    "tied, joined or not": (lambda: tied_linear("column", "column:2"), 2, False, r"0: column, 1: column"),
    "tied, in a GPT": (
        lambda: of(gpt, **{"embedding/token": None}),
        2,
        False,
        "used by layers that the plan cuts different",
    ),
    "no scatter": (
        lambda: of(gpt, **{"blocks/0": None}),
        2,
        True,
        r"needs one module from which on the sequence is cut, .* has \[\] as scatter and \[\] as gather",
    ),
    "two scatters": (lambda: of(gpt, **{"blocks/1": "scatter"}), 2, True, r"\['blocks\.0', 'blocks\.1'\] as scatter"),
    "two gathers": (lambda: of(gpt, **{"head/norm": "gather", "head": "gather"}), 2, True, "as gather"),
    "layers that are cut before the sequence is": (
        lambda: of(gpt, **{"blocks/0": None, "blocks/1": "scatter"}),
        2,
        True,
        r"blocks\.0\.attention\.query",
    ),
    "a parameter used where it is cut and where it is whole again": (
        lambda: of(gpt, **{"embedding/token": None, "head/projection": None, "head/norm": "gather"}),
        2,
        True,
        r"embedding\.token and head\.projection share a parameter, .* after head\.norm, where the sequence is whole",
    ),
    "dropout in the attention of a GPT-2": (
        lambda: of(lambda: hugging_face("GPT2LMHeadModel", **{**NO_DROPOUT, "attn_pdrop": 0.1})),
        2,
        False,
        r"config\.attn_pdrop is 0\.1: .* Set it to 0; other dropout is kept",
    ),
    "dropout in the attention of a BERT": (
        lambda: of(lambda: hugging_face("BertForMaskedLM")),
        2,
        False,
        r"config\.attention_probs_dropout_prob is 0\.1",
    ),
    "dropout in the attention of a Llama": (
        lambda: of(lambda: llama(attention_dropout=0.2)),
        2,
        False,
        r"config\.attention_dropout is 0\.2",
    ),
    "dropout of another kind": (
        lambda: (after_a_linear_layer(lambda: nn.AlphaDropout(0.1)), {"0": "column_gather"}),
        2,
        False,
        r"1 \(AlphaDropout\) drops activations at random \(p = 0\.1\), each rank others",
    ),
    "dropout inside a layer": (
        lambda: (after_a_linear_layer(lambda: nn.LSTM(8, 8, 2, dropout=0.3)), {"0": "column_gather"}),
        2,
        False,
        r"1 \(LSTM\) drops activations at random \(p = 0\.3\)",
    ),
    "the meta device": (lambda: (chain_on_meta(), {"0": "column", "1": "row"}), 2, False, "meta device"),
}
# What only the second rank is asked for (None: the same), and what the message must say.
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "plan": (
        {"plan": {"0": "column_gather"}},
        r'plan on rank 0: \{"0": "column".*\n.*plan on rank 1: \{"0": "column_gath',
    ),
    "one entry more": ({"plan": {"0": "column", "1": "row", "2": "partial"}}, 'rank 1: {"2": "partial"}'),
    "sequence parallelism": ({"sequence_parallel": True}, "sequence_parallel on rank 0: false\n.*on rank 1: true"),
    "overlap": ({"overlap": True}, "overlap on rank 0: false\n.*on rank 1: true"),
    "frozen": ({"model": "frozen"}, r"parameters on rank 0: .*float32.*true"),
    "dtype": ({"model": "float64"}, r"parameters on rank 1: .*float64"),
    "micro-batches": ({"num_microbatches": 2}, "num_microbatches on rank 0: 1\n.*on rank 1: 2"),
    "max_norm": ({"max_norm": 1.5}, "max_norm on rank 0: null\n.*on rank 1: 1.5"),
}


def chain_on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def refusals(num_ranks: int, work: Callable[[Rank], Any]) -> list[str]:
    """What each rank was told; those that were not refused have no text."""

    def caught(rank: Rank) -> str:
        try:
            work(rank)
        except MplabError as error:
            return str(error)
        return ""

    return World(num_ranks, "cpu").run(caught)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_every_rank_with_what_to_do(case: str) -> None:
    asked, num_ranks, sequence_parallel, said = REFUSED[case]
    model, plan = asked()

    def work(rank: Rank) -> nn.Module:
        return tensor_parallel(model, rank.comm, plan, sequence_parallel)

    told = refusals(num_ranks, work)
    assert len(set(told)) == 1
    assert re.search(said, told[0], re.DOTALL), told[0]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_for_training_too(case: str) -> None:
    """And nothing is left running, whoever catches it."""
    asked, num_ranks, sequence_parallel, said = REFUSED[case]
    model, plan = asked()
    with pytest.raises(MplabError) as caught:
        World(num_ranks, "cpu").run(
            lambda rank: TensorParallel(model, rank.comm, plan, sequence_parallel=sequence_parallel)
        )
    assert re.search(said, str(caught.value), re.DOTALL), caught.value


@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_that_are_asked_for_different_things(case: str) -> None:
    different, said = DIFFERENT[case]
    models = {name: chain(linear(), linear(), nn.LayerNorm(8)) for name in ("same", "frozen", "float64")}
    models["frozen"][2].requires_grad_(False)
    models["float64"].double()
    base = {"model": "same", "plan": {"0": "column", "1": "row", "2": "scatter"}}

    def work(rank: Rank) -> TensorParallel:
        options = {**base, **(different if rank.index else {})}
        return TensorParallel(models[options.pop("model")], rank.comm, **options)

    if case == "sequence parallelism":
        base["plan"] = {"0": "scatter", "1": "vocab"}
    told = refusals(2, work)
    assert told[0] == told[1]
    assert told[0].startswith("the ranks were given different settings")
    assert re.search(said, told[0]), told[0]


def test_a_rank_that_is_refused_alone_stops_the_others() -> None:
    model = chain(linear(), linear())

    def work(rank: Rank) -> None:
        tensor_parallel(model, rank.comm, {"0": "column", "1": "row" if rank.index else "rows"})

    with pytest.raises(MplabError, match="style 'rows' is not known"):
        World(2, "cpu").run(work)


def test_an_own_plan_that_leaves_out_what_can_not_be_cut_is_accepted() -> None:
    """Each remedy of a message helps."""
    model = gpt(vocab_size=9)
    with pytest.raises(MplabError, match="9 tokens"):
        resolve(model, tensor_plan(model), 2, False)
    ends = ("embedding.token", "head.projection")
    plan = {pattern: style for pattern, style in tensor_plan(model).items() if pattern not in ends}
    assert styles(model, plan).keys().isdisjoint(ends)
    assert styles(model, {**plan, "head.norm": "partial"})["head.norm"] == "partial"


def test_frozen_layers_may_come_after_the_sequence_is_whole_again() -> None:
    model = gpt()
    model.head.norm.requires_grad_(False)
    plan = {**tensor_plan(model), "blocks.1": "gather"}
    assert styles(model, plan, sequence=True)["blocks.1"] == "gather"


def test_the_number_of_ranks_is_one() -> None:
    """Then any size can be cut."""
    model = chain(linear(7, 3), linear(3, 5))
    assert styles(model, {"0": "column", "1": "row"}, 1) == {"0": "column", "1": "row"}


def test_all_styles_are_in_the_description() -> None:
    text = sys.modules[resolve.__module__].__doc__ or ""
    assert all(re.search(rf"^    {style} ", text, re.MULTILINE) for style in STYLES)
