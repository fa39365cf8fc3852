"""scikit-learn's handwritten digits: 1797 pictures of 8 x 8 pixels, ten classes, nothing to download."""

from __future__ import annotations

import torch
from torch import Tensor

from mplab.datasets.dataset import Batch, Dataset
from mplab.errors import MplabError


class Digits(Dataset):
    """Pictures and what digit they show. Made by `digits()`.

    Attributes:
        pictures: (1797, 64) float32, from -1 (paper) to 1 (ink), rows of the picture one after the other.
        labels: (1797,) int64, 0 to 9.
    """

    num_features = 64
    num_classes = 10

    def __init__(self, pictures: Tensor, labels: Tensor, batch_size: int, seed: int) -> None:
        num_validation = len(pictures) // 5
        super().__init__(len(pictures) - num_validation, num_validation, batch_size, seed)
        self.pictures, self.labels = pictures, labels

    def samples(self, indices: Tensor) -> Batch:
        """Inputs (len(indices), 64) float32 and targets (len(indices),) int64."""
        return self.pictures[indices], self.labels[indices]


def digits(*, batch_size: int = 64, seed: int = 0) -> Digits:
    """Batches of handwritten digits for a classifier; the last fifth of the pictures is held out.

    Args:
        batch_size: pictures in a batch.
        seed: of the order of the pictures.

    Returns:
        The dataset; `.batch(step)` gives inputs (batch_size, 64) float32 and targets (batch_size,) int64.

    Raises:
        MplabError: scikit-learn, which the pictures come with, is not installed.

    Reference:
        Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MplabError(
            "the digits come with scikit-learn, which is not installed: pip install 'mplab[lab]' or scikit-learn alone"
        ) from None
    source = load_digits()
    pictures = torch.tensor(source.data, dtype=torch.float32).div_(8).sub_(1)
    return Digits(pictures, torch.tensor(source.target, dtype=torch.int64), batch_size, seed)
