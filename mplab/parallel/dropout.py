"""Dropout where ranks must draw the same mask, or must not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
_RATES = "dropout", "attention_dropout"  # of what drops by itself: nn.LSTM, nn.MultiheadAttention; Hugging Face's Llama


def dropped_share(module: nn.Module) -> float:
    """The share of activations that a module says it drops at random, not by modules inside of it; 0: none."""
    rates = [module.p] if isinstance(module, _DROPOUTS) else [getattr(module, rate, None) for rate in _RATES]
    return max((rate for rate in rates if isinstance(rate, float)), default=0.0)


class SeededDropout(nn.Module):
    """Dropout that draws from a generator of its own: ranks with the same seed drop the same.

    The generator that threads share would give each rank what the others have left of it.

    Args:
        p: the share of elements that become 0; the others grow by 1 / (1 - p).
        seed: of the generator.
        device: where its tensors live.
    """

    def __init__(self, p: float, seed: int, device: torch.device) -> None:
        super().__init__()
        self.p, self._generator = p, torch.Generator(device).manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.p, generator=self._generator)
        return x * kept / max(1 - self.p, torch.finfo(x.dtype).tiny)
