"""Linear layers and embeddings of which every rank has a part, made from whole ones.

    column: Y = X A, A = [A0 | A1]        row: Y = X A, X = [X0 | X1], A = [A0]
        rank r: Yr = X Ar                      rank r: Xr Ar, and Y = X0 A0 + X1 A1    [A1]

A column-parallel layer leaves its output cut as a row-parallel one wants its input: the pair costs one all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mplab.comm.communicator import Communicator
from mplab.errors import MplabError
from mplab.parallel import operators
from mplab.parallel.cut import Cut, ParallelLayer, TensorAxis
from mplab.parallel.overlap import OverlappedEntry

SEQUENCE_DIM = 1  # of activations (B, T, D)
ENTERED = "_entered"  # an attribute of a tensor: where it has


def is_transposed(linear: nn.Module) -> bool:
    """Whether the weight is (in, out): a `Conv1D` of Hugging Face, which is a linear layer."""
    return type(linear).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Whether it is a layer that is cut by columns or rows."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_plain(layer: nn.Module) -> bool:
    """Whether it computes what its class in torch does, and not something of its own."""
    return is_transposed(layer) or type(layer).forward in (nn.Linear.forward, nn.Embedding.forward)


def sizes_of(linear: Any) -> tuple[int, int]:
    """(in features, out features)."""
    size = tuple(linear.weight.shape)
    return size if is_transposed(linear) else (size[1], size[0])


class Entry:
    """Where an activation enters layers that each have a part of the weights.

    Several column-parallel layers that read one tensor (query, key and value) share one: the gradients that they give
    it are added up before they are sent, and the tensor is gathered once.

    Args:
        axis: where its communicator is.
        sequence_parallel: the activation comes cut along the sequence, (B, T/n, D).
        overlap: send its gradient while those of the weights are computed.
    """

    def __init__(self, axis: TensorAxis, sequence_parallel: bool = False, overlap: bool = False) -> None:
        self.axis, self.sequence_parallel = axis, sequence_parallel
        self.overlapped = OverlappedEntry(SEQUENCE_DIM if sequence_parallel else None) if overlap else None
        self._mark = object()  # that a tensor has entered here; a reference to the entry would keep both
        self.num_layers = 0
        self._open: tuple[Tensor, Tensor, int] | None = None  # what siblings still to come will read too, and how many

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}  # a copy begins with none: that here is of a graph

    def read(self, x: Tensor) -> Tensor:
        """What entered, for one of its layers: those that read the same tensor share it, and the last one drops it."""
        if getattr(x, ENTERED, None) is self._mark:
            return x
        raw, entered, num_left = self._open or (None, x, 0)
        if raw is not x or entered.requires_grad != (x.requires_grad and torch.is_grad_enabled()):
            entered, num_left = self(x), self.num_layers
        self._open = (x, entered, num_left - 1) if num_left > 1 else None
        return entered

    def __call__(self, x: Tensor) -> Tensor:
        """(B, T, D), or (B, T/n, D) -> (B, T, D); what has entered already comes back as it is."""
        if getattr(x, ENTERED, None) is self._mark:
            return x
        if self.overlapped is not None and torch.is_grad_enabled():
            x = self.overlapped.enter(x, self.axis.comm)
        elif self.sequence_parallel:
            x = operators.all_gather(x, self.axis.comm, SEQUENCE_DIM)
        else:
            x = operators.copy_to(x, self.axis.comm)
        setattr(x, ENTERED, self._mark)
        return x


class CutLinear(ParallelLayer):
    """What column- and row-parallel layers have in common: a rank's part of a product.

    Args:
        linear: the whole layer.
        comm: this rank's communicator on the tensor axis.
        cuts: for each parameter that is cut, how.
    """

    def __init__(self, linear: nn.Module, comm: Communicator | TensorAxis, cuts: dict[str, Cut]) -> None:
        super().__init__(comm, cuts)
        self.bias: nn.Parameter | None = None
        self.is_transposed = is_transposed(linear)
        self.take(linear)

    def product(self, x: Tensor, bias: nn.Parameter | None) -> Tensor:
        """x times this rank's weight, plus `bias`."""
        return functional.linear(x, self.weight.mT if self.is_transposed else self.weight, bias)


class ColumnParallelLinear(CutLinear):
    """A linear layer of which every rank computes 1/n of the outputs.

    Args:
        linear: the whole layer (`nn.Linear`, or Hugging Face's `Conv1D`); it is not changed. Rank 0's values count.
        comm: this rank's communicator on the tensor axis.
        num_parts: matrices joined in it (3: query, key and value), of each of which a rank has its part.
        gather_output: give all outputs on every rank.
        sequence_parallel: the input comes cut along the sequence.
        overlap: in backward send the gradient of the input while that of the weight is computed.
        entry: the one that it shares with other layers; None: one of its own.

    Shapes:
        (..., D_in) -> (..., D_out / n), or (..., D_out) with `gather_output`; (B, T/n, D_in) with `sequence_parallel`.

    Raises:
        MplabError: n does not divide the outputs, or those of each joined matrix.

    **Communication**: in backward an all_reduce of the input's bytes; with `sequence_parallel` an all_gather, in
    backward a reduce_scatter. With `gather_output` an all_gather of the output's bytes more.

    Reference:
        Shoeybi et al., "Megatron-LM", 2019, section 3.
    """

    def __init__(
        self,
        linear: nn.Module,
        comm: Communicator | TensorAxis,
        num_parts: int = 1,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        overlap: bool = False,
        entry: Entry | None = None,
    ) -> None:
        _check_divides("ColumnParallelLinear", "outputs", sizes_of(linear)[1], _size(comm) * num_parts)
        cuts = {"weight": Cut(int(is_transposed(linear)), num_parts), "bias": Cut(0, num_parts)}
        super().__init__(linear, comm, cuts)
        self.gather_output = gather_output
        self.entry = entry or Entry(self.axis, sequence_parallel, overlap)
        self.entry.num_layers += 1
        if self.entry.overlapped is not None:
            self.entry.overlapped.add(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry.read(x)
        if self.entry.overlapped is not None and torch.is_grad_enabled():
            y = self.entry.overlapped.linear(self, x, self.bias, self.is_transposed)
        else:
            y = self.product(x, self.bias)
        if self.gather_output:
            y = operators.gather_from(y, self.comm)
            y = Cut(y.ndim - 1, self.cuts["weight"].num_parts).in_order(y, self.comm.size)
        return y


class RowParallelLinear(CutLinear):
    """A linear layer of which every rank has 1/n of the inputs, and computes a summand of every output.

    The bias is whole on every rank, and added once, to the sum.

    Args:
        linear: the whole layer (`nn.Linear`, or Hugging Face's `Conv1D`); it is not changed. Rank 0's values count.
        comm: this rank's communicator on the tensor axis.
        sequence_parallel: give the outputs cut along the sequence.

    Shapes:
        (..., D_in / n) -> (..., D_out); (B, T, D_in / n) -> (B, T/n, D_out) with `sequence_parallel`.

    Raises:
        MplabError: n does not divide the inputs.

    **Communication**: an all_reduce of the output's bytes, in backward none; with `sequence_parallel` a reduce_scatter,
    in backward an all_gather.

    Reference:
        Shoeybi et al., "Megatron-LM", 2019, section 3.
    """

    def __init__(self, linear: nn.Module, comm: Communicator | TensorAxis, sequence_parallel: bool = False) -> None:
        _check_divides("RowParallelLinear", "inputs", sizes_of(linear)[0], _size(comm))
        super().__init__(linear, comm, {"weight": Cut(int(not is_transposed(linear)))})
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, None)
        if self.sequence_parallel:
            y = operators.reduce_scatter(y, self.comm, SEQUENCE_DIM)
        else:
            y = operators.reduce_from_(y, self.comm)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class VocabParallelEmbedding(ParallelLayer):
    """An embedding of which every rank has the rows of 1/n of the vocabulary.

    Args:
        embedding: the whole one; it is not changed. Rank 0's values count.
        comm: this rank's communicator on the tensor axis.
        reduce_gradient: what follows gives each rank a part of the gradient, and not all of it to every one: these are
            added up.

    Shapes:
        (...) int64 -> (..., D).

    Raises:
        MplabError: n does not divide the vocabulary; an option of `nn.Embedding` that looks at the whole; on a call, on
            a CPU, a token that is not in the vocabulary (on CUDA it gives NaN).

    **Communication**: an all_reduce of the output's bytes; in backward none, or the same with `reduce_gradient`.
    """

    def __init__(self, embedding: nn.Embedding, comm: Communicator | TensorAxis, reduce_gradient: bool = False) -> None:
        super().__init__(comm, {"weight": Cut(0)})
        for option in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(embedding, option):
                raise MplabError(f"VocabParallelEmbedding of an embedding with {option}: build it without")
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        _check_divides("VocabParallelEmbedding", "tokens", self.num_embeddings, self.comm.size)
        self.take(embedding)
        self.num_rows = self.num_embeddings // self.comm.size
        self.first = self.comm.rank * self.num_rows
        padding = -1 if embedding.padding_idx is None else embedding.padding_idx - self.first
        self.padding_idx = padding if 0 <= padding < self.num_rows else None
        self.reduce_gradient = reduce_gradient

    def forward(self, tokens: Tensor) -> Tensor:
        is_on_cpu = tokens.device.type == "cpu"
        if is_on_cpu and tokens.numel():
            low, high = map(int, tokens.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise MplabError(
                    f"tokens from {low} to {high}, but the vocabulary goes from 0 to {self.num_embeddings - 1}: build "
                    "the model with the vocab_size of the data"
                )
        place = tokens - self.first
        row = place.clamp(0, self.num_rows - 1)
        x = functional.embedding(row, self.weight, self.padding_idx) * (row == place).unsqueeze(-1)
        if not is_on_cpu:  # asking would keep the host waiting
            x = x.masked_fill(((tokens < 0) | (tokens >= self.num_embeddings)).unsqueeze(-1), torch.nan)
        return operators.all_reduce(x, self.comm) if self.reduce_gradient else operators.reduce_from_(x, self.comm)


def _size(comm: Communicator | TensorAxis) -> int:
    return comm.comm.size if isinstance(comm, TensorAxis) else comm.size


def _check_divides(kind: str, what: str, size: int, divisor: int) -> None:
    if size % divisor:
        raise MplabError(
            f"{kind}: {size} {what} can't be cut in {divisor} equal parts: choose a number of ranks that divides them"
        )
