"""A GPT small enough to read: a chain of an embedding, blocks and a head.

    tokens (B, T) -> embedding -> (B, T, D) -> blocks[0] -> ... -> blocks[num_layers - 1] -> head -> logits (B, T, V)

B batch, T sequence, D width, V vocabulary, H heads. Each layer of the chain takes one tensor and gives one, so the
model can be cut between any two of them. There is no dropout: it would draw from the global generator, and ranks that
share one would then get results that depend on which of them came first.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from mplab.errors import MplabError
from mplab.models.seed import seed_parameters


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT.

    Args:
        vocab_size: number of different tokens (V); 256 for bytes.
        context_length: the longest sequence, in tokens.
        num_layers: number of blocks.
        num_heads: attention heads in each block; must divide `width`.
        width: features of one token between the layers (D); the hidden layer of each MLP has 4 D.
        tied: whether the head shares the token embedding's matrix (Press and Wolf 2017).

    Raises:
        MplabError: a size below 1, or heads that don't divide the width.
    """

    vocab_size: int = 256
    context_length: int = 64
    num_layers: int = 2
    num_heads: int = 4
    width: int = 128
    tied: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "tied" and getattr(self, field.name) < 1:
                raise MplabError(f"GPTConfig: {field.name} is {getattr(self, field.name)}; must be 1 or more")
        if self.width % self.num_heads:
            raise MplabError(
                f"GPTConfig: width {self.width} is not divisible by num_heads {self.num_heads}, "
                "and all heads have the same size: change one of the two"
            )


class Embedding(nn.Module):
    """The embedding of each token plus that of its position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.context_length, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D)."""
        if tokens.dim() != 2:
            raise MplabError(f"tokens of shape {tuple(tokens.shape)}: must be (batch, sequence)")
        length = tokens.shape[1]
        if length > self.position.num_embeddings:
            raise MplabError(
                f"a sequence of {length} tokens is longer than the context of {self.position.num_embeddings}: "
                "shorten it, or build the GPT with a larger context_length"
            )
        try:
            token: Tensor = self.token(tokens)
        except IndexError:
            low, high = int(tokens.min()), int(tokens.max())
            raise MplabError(
                f"tokens from {low} to {high}, but the vocabulary goes from 0 to {self.token.num_embeddings - 1}: "
                "build the GPT with the vocab_size of the data"
            ) from None
        position: Tensor = self.position(torch.arange(length, device=tokens.device))
        return token + position


class Attention(nn.Module):
    """Causal multi-head attention.

    Query, key and value are matrices of their own, the rows of each head together, and the number of heads is read from
    their outputs: a rank that holds the rows of some heads runs the same code.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_size = config.width // config.num_heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        query, key, value = self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.value(x))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, H * head_size) -> (B, H, T, head_size)."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        return heads


class FeedForward(nn.Module):
    """The MLP of a block: two linear layers with a GELU between them, for each token alone."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), by way of (B, T, 4 D)."""
        output: Tensor = self.down(functional.gelu(self.up(x)))
        return output


class Block(nn.Module):
    """Attention, then the MLP, each reading a normalised copy and adding to what came in (pre-norm)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class Head(nn.Module):
    """The final norm and the projection on the vocabulary."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> logits (B, T, V)."""
        logits: Tensor = self.projection(self.norm(x))
        return logits


class GPT(nn.Module):
    """A decoder that predicts the next token.

    The chain of its layers is `embedding`, `blocks.0`, `blocks.1`, ..., `head`. With `config.tied`,
    `embedding.token.weight` and `head.projection.weight` are one parameter under two names.

    Args:
        config: the sizes; `GPTConfig()` is a GPT of 0.44 million parameters.
        seed: of the weights, which come from the parameters' names (`seed_parameters`).

    Raises:
        MplabError: on a call: tokens that are not (B, T) or, on a CPU, not in the vocabulary; a sequence longer than
            the context.

    Reference:
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
    """

    def __init__(self, config: GPTConfig | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        with torch.device("meta"):  # shapes only: torch's own initialisation would draw from the global generator
            self.embedding = Embedding(config)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
            self.head = Head(config)
        self.to_empty(device=torch.get_default_device())
        if config.tied:
            self.head.projection.weight = self.embedding.token.weight
        seed_parameters(self, seed)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) int64, T up to `config.context_length` -> logits (B, T, V)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits
