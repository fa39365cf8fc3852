"""The models: the same weights however they are built, and the arithmetic of a GPT against a second way to write it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import global_random_states
from torch import Tensor, nn
from torch.nn import functional

from mplab.errors import MplabError
from mplab.models import GPT, MLP, GPTConfig, cross_entropy, seed_parameters, seeded

SMALL = GPTConfig(vocab_size=11, context_length=6, num_layers=2, num_heads=2, width=8)
TOKENS = torch.tensor([[1, 5, 2, 9, 0, 3], [4, 4, 7, 10, 8, 6]])


def untied(**sizes: int) -> GPT:
    """The small GPT with a head of its own."""
    return GPT(GPTConfig(**{**vars(SMALL), "tied": False, **sizes}))


# Weights from names


def test_weights_depend_on_name_shape_and_seed_alone() -> None:
    first = seeded("head.norm.weight", (4, 3))
    assert torch.equal(first, seeded("head.norm.weight", (4, 3)))
    assert not torch.equal(first, seeded("head.norm.bias", (4, 3)))
    assert not torch.equal(first, seeded("head.norm.weight", (4, 3), seed=1))


def test_weights_are_the_same_in_another_process() -> None:
    """Python's own `hash` of a string is another one in every process."""
    code = "from mplab.models import seeded; print(seeded('a.weight', (2, 3)).tolist())"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(seeded("a.weight", (2, 3)).tolist())


@given(order=st.permutations(range(4)), num_parts=st.integers(1, 4))
@settings(max_examples=30)
def test_weights_are_the_same_in_any_order_and_for_any_part(order: list[int], num_parts: int) -> None:
    whole = untied(num_layers=4)
    parts = nn.ModuleDict({f"{index}": untied(num_layers=4).blocks[index] for index in order[:num_parts]})
    for parameter in parts.parameters():
        nn.init.zeros_(parameter)
    seed_parameters(parts, prefix="blocks.")
    for index, part in parts.items():
        for mine, full in zip(part.parameters(), whole.blocks[int(index)].parameters(), strict=True):
            assert torch.equal(mine, full)


def test_a_longer_model_begins_with_the_weights_of_a_shorter_one() -> None:
    long = dict(untied(num_layers=3).named_parameters())
    for name, parameter in untied(num_layers=1).named_parameters():
        assert torch.equal(parameter, long[name])


def test_every_weight_is_filled_and_none_is_exactly_zero_or_one() -> None:
    """So that a bias added twice, or a scale left out, changes the very first loss."""
    for model in (untied(), MLP()):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, seeded(name, parameter.shape)), name
            assert not ((parameter == 0) | (parameter == 1)).any(), name


def test_the_dtype_and_device_of_the_parameters_are_kept() -> None:
    model = untied().double()
    seed_parameters(model)
    assert torch.equal(model.head.norm.weight, seeded("head.norm.weight", (8,)).double())
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in GPT(SMALL).parameters())


def test_the_global_random_state_is_left_alone() -> None:
    before = global_random_states()
    GPT(SMALL)
    MLP()
    seed_parameters(untied(), seed=3)
    assert global_random_states() == before


def test_threads_that_build_at_once_get_the_same_weights() -> None:
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: GPT(SMALL), range(16)))
    for model in models:
        for mine, first in zip(model.parameters(), models[0].parameters(), strict=True):
            assert torch.equal(mine, first)


@pytest.mark.gpu
def test_a_gpu_gets_the_weights_of_the_cpu() -> None:
    with torch.device("cuda"):
        on_gpu = GPT(SMALL)
    for mine, reference in zip(on_gpu.parameters(), GPT(SMALL).parameters(), strict=True):
        assert mine.is_cuda
        assert torch.equal(mine.cpu(), reference)


# Tied and untied


def test_a_tied_head_is_the_embedding_and_is_filled_once() -> None:
    tied = GPT(SMALL)
    assert tied.head.projection.weight is tied.embedding.token.weight
    assert torch.equal(tied.head.projection.weight, seeded("embedding.token.weight", (11, 8)))
    assert len(list(untied().parameters())) == len(list(tied.parameters())) + 1
    assert not torch.equal(untied().head.projection.weight, untied().embedding.token.weight)


def test_a_tied_weight_is_filled_under_its_first_name_whichever_part_is_built_first() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 11, bias=False)
            self.embedding = nn.Embedding(11, 8)
            self.embedding.weight = self.head.weight

    model = HeadFirst()
    seed_parameters(model)
    assert torch.equal(model.head.weight, seeded("embedding.weight", (11, 8)))


def test_a_tied_gradient_is_the_sum_of_both_uses() -> None:
    tied, apart = GPT(SMALL).double(), untied().double()
    apart.load_state_dict(tied.state_dict())
    for model in (tied, apart):
        cross_entropy(model(TOKENS), TOKENS).backward()
    both = apart.head.projection.weight.grad + apart.embedding.token.weight.grad
    torch.testing.assert_close(tied.embedding.token.weight.grad, both)
    assert not torch.allclose(both, apart.head.projection.weight.grad)


# What a GPT computes


def plain_gpt(weights: dict[str, Tensor], tokens: Tensor, config: GPTConfig) -> Tensor:
    """The same GPT from its formulas: a softmax with a mask for each head, norms and GELU written out."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(1, dtype=x.dtype))

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    length, size = tokens.shape[1], config.width // config.num_heads
    x = weights["embedding.token.weight"][tokens] + weights["embedding.position.weight"][:length]
    later = torch.ones(length, length).triu(1).bool()
    for block in (f"blocks.{index}" for index in range(config.num_layers)):
        y = norm(x, f"{block}.attention_norm")
        query, key, value = (linear(y, f"{block}.attention.{name}") for name in ("query", "key", "value"))
        heads = []
        for head in range(config.num_heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(size)
            heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ value[..., part])
        x = x + linear(torch.cat(heads, -1), f"{block}.attention.output")
        y = linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.up")
        x = x + linear(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), f"{block}.mlp.down")
    return linear(norm(x, "head.norm"), "head.projection")


@given(
    num_layers=st.integers(1, 3),
    num_heads=st.integers(1, 4),
    head_size=st.integers(1, 4),
    length=st.integers(1, 6),
    tied=st.booleans(),
)
def test_the_logits_are_those_of_the_formulas(
    num_layers: int, num_heads: int, head_size: int, length: int, tied: bool
) -> None:
    config = GPTConfig(11, 6, num_layers, num_heads, num_heads * head_size, tied)
    model = GPT(config).double()
    logits = model(TOKENS[:, :length])
    assert logits.shape == (2, length, 11)
    torch.testing.assert_close(logits, plain_gpt(model.state_dict(), TOKENS[:, :length], config))


@given(place=st.integers(0, 5), token=st.integers(0, 10))
def test_a_later_token_does_not_alter_earlier_logits(place: int, token: int) -> None:
    model, changed = GPT(SMALL), TOKENS.clone()
    changed[:, place] = token
    before, after = model(TOKENS), model(changed)
    assert torch.equal(before[:, :place], after[:, :place])
    for row in (0, 1):
        same = bool(TOKENS[row, place] == token)
        assert torch.equal(before[row, place:], after[row, place:]) == same


def test_attention_with_some_of_the_heads_is_a_part_of_the_sum() -> None:
    """What a tensor-parallel rank does: its rows of query, key and value, its columns of the output, the bias once."""
    whole = GPT(SMALL).double().blocks[0].attention
    x = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = whole.output.bias.expand(2, 6, 8)
    for rank in (0, 1):
        part = GPT(SMALL).double().blocks[0].attention
        mine = slice(rank * 4, rank * 4 + 4)
        for linear in (part.query, part.key, part.value):
            linear.weight, linear.bias = nn.Parameter(linear.weight[mine]), nn.Parameter(linear.bias[mine])
        part.output.weight, part.output.bias = nn.Parameter(part.output.weight[:, mine]), None
        total = total + part(x)
    torch.testing.assert_close(total, whole(x))


def test_the_chain_of_layers_is_the_model() -> None:
    model = GPT(SMALL)
    x = TOKENS
    for layer in (model.embedding, *model.blocks, model.head):
        x = layer(x)
    assert torch.equal(x, model(TOKENS))
    assert [name for name, _ in model.named_children()] == ["embedding", "blocks", "head"]
    assert not list(model.buffers())


def test_the_first_loss_is_that_of_a_guess() -> None:
    model, tokens = GPT(), torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    assert cross_entropy(model(tokens), tokens.roll(1)).item() == pytest.approx(math.log(256), abs=0.5)


def test_the_loss_is_the_mean_over_all_positions() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    by_hand = [-logits[i, j].log_softmax(0)[targets[i, j]] for i in range(2) for j in range(3)]
    torch.testing.assert_close(cross_entropy(logits, targets), torch.stack(by_hand).mean())
    torch.testing.assert_close(cross_entropy(logits[0], targets[0]), torch.stack(by_hand[:3]).mean())


# MLP


def test_an_mlp_is_linear_layers_with_gelu_between() -> None:
    model, x = MLP((3, 5, 4, 2)), torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    weights = model.state_dict()
    assert list(weights) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    by_hand = x
    for index in (0, 2, 4):
        by_hand = functional.gelu(by_hand) if index else by_hand
        by_hand = by_hand @ weights[f"{index}.weight"].T + weights[f"{index}.bias"]
    torch.testing.assert_close(model(x), by_hand)


# Mistakes


@pytest.mark.parametrize("size", ["vocab_size", "context_length", "num_layers", "num_heads", "width"])
def test_a_size_below_one_is_refused(size: str) -> None:
    with pytest.raises(MplabError, match=f"{size} is 0; must be 1 or more"):
        GPTConfig(**{size: 0})


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(MplabError, match="width 128 is not divisible by num_heads 3"):
        GPTConfig(width=128, num_heads=3)


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(MplabError, match="7 tokens is longer than the context of 6"):
        GPT(SMALL)(torch.zeros(1, 7, dtype=torch.int64))


def test_tokens_without_a_batch_dim_are_refused() -> None:
    with pytest.raises(MplabError, match=r"shape \(6,\): must be \(batch, sequence\)"):
        GPT(SMALL)(TOKENS[0])


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(MplabError, match="tokens from 1 to 12, but the vocabulary goes from 0 to 10"):
        GPT(SMALL)(torch.tensor([[1, 12]]))


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0, 2)])
def test_mlp_sizes_that_make_no_mlp_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(MplabError, match="needs at least two"):
        MLP(sizes)
