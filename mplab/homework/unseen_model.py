"""A model that no lab has shown, for which an exercise asks a plan.

words + places -> tower.0 -> tower.1 -> last_norm -> guess
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mplab.models import seed_parameters

WIDTH, NUM_HEADS, HIDDEN, NUM_LAYERS = 32, 4, 48, 2
NUM_WORDS, NUM_PLACES = 64, 8


class Mixing(nn.Module):
    """Attention to all tokens; query, key and value are joined in one layer, in this order."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = nn.Linear(WIDTH, 3 * WIDTH)
        self.merge = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        of_heads = (
            part.unflatten(-1, (-1, WIDTH // NUM_HEADS)).transpose(1, 2) for part in self.joined(x).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(*of_heads)
        output: Tensor = self.merge(mixed.transpose(1, 2).flatten(2))
        return output


class Gating(nn.Module):
    """An MLP of which one half decides how much of the other goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN)
        self.content = nn.Linear(WIDTH, HIDDEN)
        self.back = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        output: Tensor = self.back(functional.silu(self.gate(x)) * self.content(x))
        return output


class Floor(nn.Module):
    """A layer of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.before_mixing = nn.LayerNorm(WIDTH)
        self.mixing = Mixing()
        self.before_gating = nn.LayerNorm(WIDTH)
        self.gating = Gating()

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.mixing(self.before_mixing(x))
        x = x + self.gating(self.before_gating(x))
        return x


class UnseenEncoder(nn.Module):
    """An encoder that guesses words left out: the head is not tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(NUM_WORDS, WIDTH)
        self.places = nn.Embedding(NUM_PLACES, WIDTH)
        self.tower = nn.ModuleList(Floor() for _ in range(NUM_LAYERS))
        self.last_norm = nn.LayerNorm(WIDTH)
        self.guess = nn.Linear(WIDTH, NUM_WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> logits (B, T, V)."""
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for floor in self.tower:
            x = floor(x)
        logits: Tensor = self.guess(self.last_norm(x))
        return logits


def make_unseen_model() -> nn.Module:
    """The model that `plan_for` is checked with: an encoder of two layers with names of its own; print it.

    Returns:
        On the CPU, float32, with the same weights at every call; the global random state is not used. Its attention has
        query, key and value joined in one layer, its MLP is gated, and its head is not tied.
    """
    with torch.device("meta"):  # torch's own initialisation would draw from the global generator
        model = UnseenEncoder()
    model.to_empty(device="cpu")
    seed_parameters(model)
    return model
