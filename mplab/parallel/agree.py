"""Settings that all ranks must be given alike, compared before anything starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from mplab.comm.communicator import Communicator
from mplab.datasets import Batch
from mplab.errors import MplabError


def check_agreement(comm: Communicator, settings: Mapping[str, Any]) -> None:
    """Compare settings over all ranks.

    Args:
        comm: their communicator.
        settings: by name; what JSON can write.

    Raises:
        MplabError: on every rank, with the settings that differ and what each rank has.

    **Communication**: all_gather of 8 bytes; of the settings where they differ.
    """
    text = json.dumps(settings, sort_keys=True).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
    if len(set(comm.all_gather(torch.tensor([digest], device=comm.device)).tolist())) == 1:
        return
    of_ranks = exchange(settings, comm)
    lines = ["the ranks were given different settings, and must be given the same:"]
    for name in settings:
        values = [of_rank.get(name) for of_rank in of_ranks]
        if any(value != values[0] for value in values):
            if all(isinstance(value, dict) for value in values):  # of many parameters, those that differ
                same = [key for key in values[0] if all(value.get(key) == values[0][key] for value in values)]
                values = [{key: v for key, v in value.items() if key not in same} for value in values]
            lines += [f"  {name} on rank {rank}: {_short(value)}" for rank, value in enumerate(values)]
    raise MplabError("\n".join(lines))


def check_same_batch(batch: Batch, comm: Communicator) -> None:
    """Compare a batch that every rank must have been given, before the first step.

    Raises:
        MplabError: on every rank, where shapes or values differ.

    **Communication**: that of `check_agreement`.
    """
    raw = [x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for x in batch]
    digest = hashlib.blake2b(b"".join(raw), digest_size=8).hexdigest()
    check_agreement(comm, {"the first batch": [*(list(x.shape) for x in batch), digest]})


def exchange(said: Any, comm: Communicator) -> list[Any]:
    """What each rank says, on every rank.

    Args:
        said: what JSON can write.
        comm: their communicator.

    **Communication**: two all_gathers: 8 bytes, and the text.
    """
    text = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8).to(comm.device)
    lengths = comm.all_gather(torch.tensor([len(text)], device=comm.device)).tolist()
    return [json.loads(bytes(part.tolist())) for part in comm.all_gather(text).split(lengths)]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
