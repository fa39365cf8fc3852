"""The loss of a classifier, be its classes ten digits or the tokens of a vocabulary."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy over all positions, in nats.

    Args:
        logits: (..., C): (batch, classes) of a classifier, (batch, sequence, vocabulary) of a language model.
        targets: (...), int64: the right class of each position; for a language model the next token.

    Returns:
        A tensor without dims. Every sample counts the same, so parts of a batch are weighed by their number of samples.
    """
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
