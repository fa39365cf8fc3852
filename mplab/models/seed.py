"""Weights from names: every way to build or to cut a model starts from the same numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def seeded(name: str, shape: Sequence[int], seed: int = 0) -> Tensor:
    """The first value of one parameter, from nothing but its name, its shape and the seed.

    Matrices are normal with standard deviation 1/sqrt(3 x last dim), that of torch's own `nn.Linear`; biases are spread
    around 0 and all other vectors (the scales of norms) around 1. None is exactly 0 or 1: a bias added twice or a scale
    left out then changes the first loss already.

    Args:
        name: the parameter's full name, for example "blocks.0.mlp.up.weight".
        shape: its full shape, not that of a shard.
        seed: another seed gives other weights.

    Returns:
        A float32 tensor on the CPU. The global random state is neither read nor changed.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    values = torch.randn(tuple(shape), generator=generator, device="cpu", dtype=torch.float32)
    if len(shape) >= 2:
        return values.mul_((3 * shape[-1]) ** -0.5)
    return values.mul_(0.02).add_(0.0 if name.endswith("bias") else 1.0)


def seed_parameters(model: nn.Module, seed: int = 0, prefix: str = "") -> None:
    """Fill every parameter in place with `seeded` values: the same on every device, in any order, for any part.

    A parameter with several names (a tied weight) is filled once, under the first of them in alphabetical order.
    Parameters on the "meta" device have no storage and are left alone.

    Args:
        model: any module; its buffers are not touched.
        seed: another seed gives other weights.
        prefix: put before the names where `model` is a part of a larger one: "blocks.1." for its second block.
    """
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter] = min(prefix + name, names.get(parameter, prefix + name))
    with torch.no_grad():
        for parameter, name in names.items():
            if not parameter.is_meta:
                parameter.copy_(seeded(name, parameter.shape, seed))
