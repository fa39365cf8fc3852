"""DataParallel: every step as serial training's, whatever the buckets, and what is said on the way."""

from __future__ import annotations

import pytest
import torch

import data_parallel as dp
from mplab import World
from mplab.parallel import DataParallel


def trained(variant, optimizer, num_ranks, dtype=torch.float64, num_samples=dp.NUM_SAMPLES, **options):
    """Every rank's training; the ranks begin with different weights."""

    def work(rank):
        start = dp.model(variant, dtype, seed=rank.index)
        engine = DataParallel(start, rank.comm, optimizer=dp.OPTIMIZERS[optimizer], **options)
        return dp.follow(engine.step, engine.model, dp.batches(num_samples))

    return World(num_ranks, "cpu").run(work)


@pytest.mark.parametrize("variant", dp.MODELS)
@pytest.mark.parametrize("optimizer", dp.OPTIMIZERS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_it_is_serial_training_to_the_bit(variant, optimizer, num_ranks):
    want = dp.serial(variant, optimizer, num_ranks, torch.float32)
    for got in trained(variant, optimizer, num_ranks, torch.float32, bucket_bytes=200):
        dp.assert_trained_alike(got, want)
