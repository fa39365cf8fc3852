"""A model cut over the ranks from outside: its own code runs on every rank, on smaller layers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from mplab.comm.communicator import Communicator
from mplab.errors import MplabError
from mplab.parallel import operators
from mplab.parallel.agree import check_agreement
from mplab.parallel.cut import ParallelLayer, TensorAxis
from mplab.parallel.dropout import SeededDropout, dropped_share
from mplab.parallel.shares import described
from mplab.parallel.tensor_layers import (
    SEQUENCE_DIM,
    ColumnParallelLinear,
    Entry,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from mplab.parallel.tensor_plan import resolve, tensor_plan, whole_zones
from mplab.parallel.tensor_state import broadcast_whole

ATTENTION_DROPOUTS = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
WIDTHS = {"GPT2Attention": "split_size"}  # what a module of this name keeps of a width that is cut


def tensor_parallel(
    model: nn.Module,
    comm: Communicator,
    plan: Mapping[str, str] | None = None,
    sequence_parallel: bool = False,
    overlap: bool = False,
) -> nn.Module:
    """The model with its layers cut over the ranks: called as before, with the same input on every rank.

    Args:
        model: it is not changed. What the plan names is cut (rank 0's values count), all else is copied.
        comm: this rank's communicator on the tensor axis.
        plan: from patterns of module names to styles (`mplab.parallel.tensor_plan`); None: the model's own.
        sequence_parallel: what is not cut (norms, dropout, residuals) works on 1/n of the sequence, and every
            all-reduce is a reduce-scatter and an all-gather. Gradients of `partial_parameters` need `sum_gradients`.
        overlap: send the gradient of a column-parallel layer's input while those of weights are computed.

    Returns:
        A model of the same class and the same parameter names. Its logits are cut where the plan says "vocab" of the
        layer that gives them; to sample from them (`generate`) say "column_gather" there.

    Raises:
        MplabError: a plan that doesn't fit the model or the number of ranks; dropout inside attention, or of another
            kind than nn.Dropout (a call of `functional.dropout` can't be seen); ranks that were given different
            settings.

    **Communication**: at the start the settings (all_gather), what is cut (scatter), all else (broadcast).
    `mplab.plan.tensor` counts that of a forward and backward.

    Reference:
        Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019,
        section 3;
        Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, section 4.2.2.
    """
    if not isinstance(model, nn.Module):
        raise MplabError(f"model is a {type(model).__name__}: give an nn.Module")
    if meta := [name for name, p in model.named_parameters() if p.is_meta]:
        raise MplabError(f"{meta[0]} is on the meta device and has no values: build the model on a real device")
    plan = tensor_plan(model) if plan is None else plan
    styles = resolve(model, plan, comm.size, sequence_parallel)
    _check_dropout(model)
    settings = {"plan": dict(plan), "sequence_parallel": sequence_parallel, "overlap": overlap}
    check_agreement(comm, {**settings, "parameters": described(model)})

    maker = _Maker(model, styles, TensorAxis(comm), overlap)
    copies: dict[int, Any] = {}  # what a copy of the model has in place of a module or parameter
    for path, module in model.named_modules():
        made = maker.make(path, module)
        if made is not None:
            copies[id(module)] = made.train(module.training)
            for name, parameter in module.named_parameters(recurse=False):
                setattr(made, name, copies.setdefault(id(parameter), getattr(made, name)))  # tied ones stay tied
    parallel = copy.deepcopy(model, copies).to(comm.device)
    broadcast_whole(parallel, comm)
    for path, module in parallel.named_modules():
        maker.fit(path, module)
    if sequence_parallel:
        parallel.num_sequence_parts = comm.size  # type: ignore[assignment]  # for `mplab.models.layers`
    return parallel


def connect(model: nn.Module, comm: Communicator) -> None:
    """Let a model that is cut go on in another run of the world, with this rank's communicator there."""
    for module in model.modules():
        if isinstance(module, ParallelLayer):
            module.axis.comm = comm


class _Maker:
    """Makes what stands in the place of each module that the plan names."""

    def __init__(
        self, model: nn.Module, styles: Mapping[str, tuple[str, int]], axis: TensorAxis, overlap: bool
    ) -> None:
        self.styles, self.axis, self.overlap = styles, axis, overlap
        self.before, self.after = whole_zones(model, styles)
        self.sequence_parallel = any(style == "scatter" for style, _ in styles.values())
        parents = [path.rpartition(".")[0] for path, (style, _) in styles.items() if style == "column"]
        shared = {parent for parent in parents if parents.count(parent) > 1}
        shared |= {path for path, (style, _) in styles.items() if style == "entry"}
        self.entries = {path: self._entry(path) for path in shared}

    def make(self, path: str, module: nn.Module) -> nn.Module | None:
        """What this rank has in place of a module; None: a copy."""
        style, num_parts = self.styles.get(path, ("", 1))
        if isinstance(module, nn.Embedding) and style == "vocab":
            return VocabParallelEmbedding(module, self.axis, reduce_gradient=self.sequence_parallel)
        if style in ("column", "column_gather", "vocab"):
            around = [place for place in self.entries if path.startswith(f"{place}.")]
            entry = self.entries[max(around, key=len)] if around else self._entry(path)
            return ColumnParallelLinear(module, self.axis, num_parts, style == "column_gather", entry=entry)
        if style == "row":
            return RowParallelLinear(module, self.axis, self._is_cut(path))
        if isinstance(module, nn.Dropout) and module.p:
            # Where the sequence is whole all ranks must drop alike, where it is cut each from its own part.
            said = f"{path}:{self.axis.comm.rank if self._is_partial(path) else 'all'}"
            digest = hashlib.blake2b(said.encode(), digest_size=8).digest()
            return SeededDropout(module.p, int.from_bytes(digest, "little"), self.axis.comm.device)
        return None

    def fit(self, path: str, module: nn.Module) -> None:
        """Let a module of the copy work with what it gets there."""
        style, _ = self.styles.get(path, ("", 1))
        if style == "entry":
            module.register_forward_pre_hook(_Before(self.entries[path]), with_kwargs=True)
        if style == "scatter":
            module.register_forward_pre_hook(_Before(_Scatter(self.axis)), with_kwargs=True)
        if style == "gather":
            module.register_forward_hook(_Gather(self.axis))
        if (attribute := WIDTHS.get(type(module).__name__)) is not None:
            setattr(module, attribute, getattr(module, attribute) // self.axis.comm.size)
        module.has_partial_gradients = self._is_partial(path) or style == "partial"  # type: ignore[assignment]

    def _entry(self, path: str) -> Entry:
        return Entry(self.axis, self._is_cut(path), self.overlap)

    def _is_cut(self, path: str) -> bool:
        """Whether the sequence is cut here."""
        return self.sequence_parallel and path not in self.before and path not in self.after

    def _is_partial(self, path: str) -> bool:
        """Whether what is whole here sees a part of the sequence, or its gradient comes from a part alone."""
        return self.sequence_parallel and path not in self.after


class _Before:
    """Changes the activation that a module is called with."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self.change(args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: self.change(kwargs[name])}


class _Scatter:
    """A rank's part of the sequence. Backward gives zeros elsewhere: all gradients before are parts, as those after."""

    def __init__(self, axis: TensorAxis) -> None:
        self.axis = axis

    def __call__(self, x: Tensor) -> Tensor:
        length, size = x.shape[SEQUENCE_DIM], self.axis.comm.size
        if length % size:
            raise MplabError(
                f"a sequence of {length} tokens can't be cut in {size} equal parts, as sequence parallelism does: take "
                f"{f'{length // size * size} or ' * (length >= size)}{(length // size + 1) * size} tokens"
            )
        return x.tensor_split(size, SEQUENCE_DIM)[self.axis.comm.rank].contiguous()


class _Gather:
    """The whole sequence."""

    def __init__(self, axis: TensorAxis) -> None:
        self.axis = axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return operators.gather_from(output, self.axis.comm, SEQUENCE_DIM)


def _check_dropout(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    for name in ATTENTION_DROPOUTS if model.training else ():
        if getattr(config, name, 0):
            raise MplabError(
                f"config.{name} is {getattr(config, name)}: attention would draw its mask from the generator that all "
                "ranks of a process share, in any order. Set it to 0; other dropout is kept"
            )
    for path, module in model.named_modules() if model.training else ():
        if not isinstance(module, nn.Dropout) and (p := dropped_share(module)) > 0:
            raise MplabError(
                f"{path} ({type(module).__name__}) drops activations at random (p = {p}), each rank others: set it to "
                "0, or take nn.Dropout, whose masks ranks agree on"
            )
