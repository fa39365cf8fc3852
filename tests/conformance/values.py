"""What ranks give in these checks, and what they should get."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from mplab import MplabError
from mplab.world import Rank

OPS = ("sum", "mean", "max", "min", "product")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DTYPES = (*FLOATS, *INTEGERS, torch.bool, torch.complex64)

LARGE = 70_001  # float32: 273 KiB; divided by none of 2 to 8


def lengths(n: int) -> list[int]:
    return sorted({0, 1, n - 1, n, 7, 1001})


def given(rank: int, shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device, salt: int = 0) -> Tensor:
    """What `rank` gives: small whole numbers, different on every rank; sums and products are exact in every dtype."""
    shape = (shape,) if isinstance(shape, int) else shape
    if device.type == "cpu":
        return _kept(rank, shape, dtype, device, salt).clone()
    return _made(rank, shape, dtype, device, salt)  # on the caller's stream, so that who reads it must wait for that


def _made(rank: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, salt: int) -> Tensor:
    numel = torch.Size(shape).numel()
    x = (torch.arange(numel, device=device) * (rank + 2) + 3 * rank + salt) % 5 - 2
    if dtype in (torch.uint8, torch.bool):
        x = x.abs() % (2 if dtype == torch.bool else 5)
    x = x.to(dtype)
    return (x * (1 + 1j) if dtype.is_complex else x).reshape(shape)


_kept = lru_cache(maxsize=512)(_made)  # ranks that are threads of one process ask for the same ones


def has_meaning(op: str, dtype: torch.dtype) -> bool:
    if op == "mean":
        return dtype.is_floating_point or dtype.is_complex
    return not (op in ("max", "min") and dtype.is_complex)


def plain(op: str, xs: list[Tensor]) -> Tensor:
    """The reduction as one would write it for a list, from the first to the last."""
    total = xs[0].clone()
    for x in xs[1:]:
        if op in ("sum", "mean"):
            total = total + x
        elif op == "product":
            total = total * x
        else:
            total = torch.maximum(total, x) if op == "max" else torch.minimum(total, x)
    return total / len(xs) if op == "mean" else total


def assert_same(got: Tensor | None, want: Tensor, what: str = "") -> None:
    """Bit for bit the same, in dtype, shape, device and every element (NaN where NaN is wanted)."""
    assert isinstance(got, Tensor), f"{what}: got {got!r}, wanted a tensor of shape {tuple(want.shape)}"
    said = [(x.dtype, tuple(x.shape), x.device) for x in (got, want)]
    assert said[0] == said[1], f"{what}: got {said[0]}, wanted {said[1]}"
    if not torch.equal(got, want):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")
    assert not got.requires_grad, f"{what}: the result of a collective is outside autograd"


def all_given(rank: Rank, shape: int | tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> list[Tensor]:
    return [given(r, shape, dtype, rank.device, salt) for r in range(rank.size)]


def raises(fn: Callable[[], object], *words: str) -> None:
    """`fn()` raises an MplabError whose message has these words."""
    said = None
    try:
        fn()
    except MplabError as error:
        said = str(error)
    assert said is not None, f"nothing raised, wanted an MplabError with {words}"
    assert all(word in said for word in words), f"not all of {words} in the message: {said}"


def strided_views(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The values of a (3, 4) tensor in other layouts."""
    yield "transposed", x.t().contiguous().t()
    yield "strided", torch.stack([x, -x], dim=-1)[..., 0]
    yield "flipped storage", torch.cat([x, x], dim=1)[:, 4:]
    yield "offset", torch.cat([x[:1], x])[1:]
