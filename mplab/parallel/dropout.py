"""Dropout where ranks must draw the same mask, or must not."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
