"""Data to train on: text and handwritten digits, in batches that depend on the seed and the step alone."""

from mplab.datasets.dataset import Batch, Dataset
from mplab.datasets.digits import Digits, digits
from mplab.datasets.shard import ShardSampler, shard
from mplab.datasets.text import Text, text

__all__ = ["Batch", "Dataset", "Digits", "ShardSampler", "Text", "digits", "shard", "text"]
