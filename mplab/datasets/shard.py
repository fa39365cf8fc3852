"""Every rank its own samples: a batch cut by ranks, and the same for a loader's indices."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mplab.comm.communicator import Communicator
from mplab.datasets.dataset import Batch, epoch_order
from mplab.errors import MplabError


def shard(batch: Batch, comm: Communicator) -> Batch:
    """This rank's samples of a batch that every rank has: over all ranks every sample exactly once, in rank order.

    Args:
        batch: inputs and targets with N samples in dim 0, the same on every rank.
        comm: this rank's communicator, of n ranks.

    Returns:
        Part `rank` of `tensor_split(n)` of both, as views: the first N % n ranks have one sample more than the others,
        and those from N on none at all. A mean over the batch weighs each part by its number of samples.

    Raises:
        MplabError: inputs and targets of different lengths, or no samples.

    **Communication**: none.
    """
    inputs, targets = batch
    if len(inputs) != len(targets):
        raise MplabError(f"{len(inputs)} inputs and {len(targets)} targets: a batch needs as many of each")
    if not len(inputs):
        raise MplabError("a batch without samples can't be shared out: it needs one or more")
    return inputs.tensor_split(comm.size)[comm.rank], targets.tensor_split(comm.size)[comm.rank]


class ShardSampler:
    """The indices of this rank's samples, batch by batch: `DataLoader(dataset, batch_sampler=ShardSampler(...))`.

    Every rank has the same number of batches and at least one sample in each; over all ranks and one epoch every sample
    comes exactly once. An epoch's order is that of `Dataset`, so a batch is `shard(dataset.batch(step), comm)`.

    A last batch with fewer samples than ranks is joined to the one before it. It is never filled up with samples that
    came before, as `torch.utils.data.DistributedSampler` fills it: these would count twice, and the mean over the ranks
    would be another than the mean over the samples.

    Args:
        num_samples: in the dataset.
        batch_size: samples of a batch over all ranks together.
        comm: this rank's communicator.
        seed: of the order, 0 or more; the same on every rank. The global random state is neither read nor changed. (A
            `DataLoader` draws from it unless it gets a `generator`, such as `rank.generator`.)
        shuffle: a new order each epoch; False: as they are.
        drop_last: leave out the samples that do not make a whole batch.

    Raises:
        MplabError: a batch below one sample a rank or above what there is, or a negative seed.

    **Communication**: none.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        comm: Communicator,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if not comm.size <= batch_size <= num_samples:
            raise MplabError(
                f"batch_size {batch_size}: it counts the samples of all ranks together, and must be from {comm.size}, "
                f"one for each rank, to the {num_samples} samples that there are"
            )
        if seed < 0:
            raise MplabError(f"seed {seed}: must be 0 or more")
        self.num_samples, self.batch_size, self.seed, self.shuffle = num_samples, batch_size, seed, shuffle
        self.epoch = 0
        self._rank, self._num_ranks = comm.rank, comm.size
        num_whole, rest = divmod(num_samples, batch_size)
        has_last = not drop_last and rest >= comm.size
        self._num_batches = num_whole + has_last
        # what is left goes to the last batch, be it a smaller one or a whole one that grows
        self._end = num_whole * batch_size if drop_last else num_samples

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through, 0 or more; the same on every rank.

        Raises:
            MplabError: a negative epoch.
        """
        if epoch < 0:
            raise MplabError(f"epoch {epoch}: must be 0 or more")
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of one epoch, the same on every rank."""
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's indices in each batch of the epoch."""
        order = epoch_order(self.num_samples, self.seed, self.epoch) if self.shuffle else torch.arange(self.num_samples)
        for place in range(self._num_batches):
            start = place * self.batch_size
            end = self._end if place == self._num_batches - 1 else start + self.batch_size
            yield order[start:end].tensor_split(self._num_ranks)[self._rank].tolist()
