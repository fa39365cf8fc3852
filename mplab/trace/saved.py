"""How much memory autograd keeps between a forward and its backward."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Kept:
    """A saved tensor, as long as autograd keeps it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class SavedBytes(saved_tensors_hooks):
    """`with SavedBytes(parameters) as saved:` counts what this thread's autograd keeps; `saved.peak_bytes` is the most.

    A storage counts once, however many tensors of it are saved, and those of the parameters do not count.

    Args:
        parameters: the model's.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.peak_bytes = 0
        self._num_bytes = 0
        self._num_kept: Counter[int] = Counter()
        self._weights = {p.untyped_storage().data_ptr() for p in parameters}
        super().__init__(self._pack, lambda kept: kept.x)

    def __enter__(self) -> SavedBytes:  # type: ignore[override]
        super().__enter__()
        return self

    def _pack(self, x: Tensor) -> _Kept:
        kept, storage = _Kept(x.detach()), x.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._weights:
            weakref.finalize(kept, self._release, place, size)
            self._num_kept[place] += 1
            if self._num_kept[place] == 1:
                self._num_bytes += size
                self.peak_bytes = max(self.peak_bytes, self._num_bytes)
        return kept

    def _release(self, place: int, size: int) -> None:
        self._num_kept[place] -= 1
        if not self._num_kept[place]:
            self._num_bytes -= size
