"""Parameters joined in one tensor, of which every rank owns a chunk: what sharded training gathers and reduces."""

from __future__ import annotations

import cmath
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mplab.comm.communicator import Communicator, Handle
from mplab.models import layers, tied_names
from mplab.models.layer import Layer
from mplab.parallel.check_state import check_state
from mplab.plan.traffic import chunk_lengths


class Flat:
    """Some parameters of one dtype, one after the other in a tensor with one dim; nothing is filled up.

        parameters   | weight         | bias | weight                      |
        chunks       | of rank 0                 | of rank 1              |
        pieces       | weight         | bias | .. | weight                 |

    Rank r owns chunk r of `tensor_split(n)`. The parameters become views of the whole, so that a gather needs no copy;
    it is written to through another tensor than they are, and autograd sees no change of them. The whole can be freed
    and comes back in the same storage, which all views of it and all that autograd has saved go on to point at.

    Args:
        named: the parameters by their names in the model, all trained or all frozen; their `data` is replaced.
        rank: whose chunk is kept here.
        num_ranks: chunks in all.
        is_sharded: keep the chunk apart, and free the whole; the parameters are empty between `hide` and `show`.

    Reference:
        Zhao et al., "PyTorch FSDP: Experiences on scaling fully sharded data parallel", VLDB 2023, section 4.2.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], rank: int, num_ranks: int, is_sharded: bool) -> None:
        self.names, self.parameters, self.is_sharded = list(named), list(named.values()), is_sharded
        self.is_used = [False] * len(named)
        self._lengths = [p.numel() for p in self.parameters]
        self.whole = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        parts = self.whole.split(self._lengths)
        self.views = [part.view(p.shape) for p, part in zip(self.parameters, parts, strict=True)]
        self.num_bytes = self.whole.nbytes
        self._storage = self.whole.untyped_storage()
        self._own = self.whole.tensor_split(num_ranks)[rank]
        self.chunk = self._own.clone() if is_sharded else self._own
        self.gradient: Tensor | None = None
        self._place_pieces(rank, num_ranks)
        self.show()
        if is_sharded:
            self.hide()
            self.free()

    def _place_pieces(self, rank: int, num_ranks: int) -> None:
        """Make what the optimizer gets: of every trained parameter the part that lies in this rank's chunk."""
        self.pieces: list[nn.Parameter] = []
        self._index_of: list[int] = []  # in `parameters`
        self.ranges: list[tuple[int, int]] = []  # of each piece, among its parameter's elements
        lengths = chunk_lengths(self.whole.numel(), num_ranks)
        start = sum(lengths[:rank])
        end, place = start + lengths[rank], 0
        for index, (p, length) in enumerate(zip(self.parameters, self._lengths, strict=True)):
            low, high = max(start, place), min(end, place + length)
            if low < high and p.requires_grad:
                self.pieces.append(nn.Parameter(self.chunk[low - start : high - start]))
                self._index_of.append(index)
                self.ranges.append((low - place, high - place))
            place += length
        self._piece_lengths = [piece.numel() for piece in self.pieces]

    def owned(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Each parameter that lies in this rank's chunk, and the piece of it that does."""
        return [(self.parameters[index], piece) for index, piece in zip(self._index_of, self.pieces, strict=True)]

    def slices(self) -> list[tuple[str, nn.Parameter, torch.Size, nn.Parameter | None, tuple[int, int]]]:
        """Of each parameter: name, itself, shape, this rank's piece, and which of its elements that is."""
        of = {i: (piece, bounds) for i, piece, bounds in zip(self._index_of, self.pieces, self.ranges, strict=True)}
        return [
            (name, p, view.shape, *of.get(i, (None, (0, 0))))
            for i, (name, p, view) in enumerate(zip(self.names, self.parameters, self.views, strict=True))
        ]

    # -- weights -------------------------------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Give the whole memory, but no values."""
        self._storage.resize_(self.num_bytes)

    def gather(self, comm: Communicator) -> Handle[Tensor]:
        """Start to fill the whole with the chunks of all ranks."""
        self.allocate()
        self._own.copy_(self.chunk)
        return comm.iall_gather_(self.whole)

    def keep_chunk(self) -> None:
        """Take this rank's chunk out of the whole."""
        self.chunk.copy_(self._own)

    def free(self) -> None:
        """Give the memory of the whole back."""
        self._storage.resize_(0)

    def show(self) -> None:
        """Make the parameters views of the whole."""
        for p, view in zip(self.parameters, self.views, strict=True):
            p.data = view

    def hide(self) -> None:
        """Make the parameters empty: to read one whose memory is freed would end the process."""
        nothing = self.whole.new_empty(0)
        for p in self.parameters:
            p.data = nothing

    def holds(self, x: Tensor) -> bool:
        """Whether `x` lies in the memory of the whole."""
        return x.untyped_storage().data_ptr() == self._storage.data_ptr()

    # -- gradients -----------------------------------------------------------------------------------------------------

    def take_gradient(self) -> Tensor:
        """The gradients of all parameters, joined, with zeros for one that has none; the parameters forget them."""
        parts = []
        for index, p in enumerate(self.parameters):
            grad, p.grad = p.grad, None
            if grad is None:
                parts.append(p.new_zeros(self._lengths[index]))
            else:
                self.is_used[index] = True
                parts.append(grad.reshape(-1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def not_finite(self, gradient: Tensor) -> str | None:
        """The name of the first parameter whose part of a joined gradient has a NaN or an Inf."""
        if cmath.isfinite(gradient.sum().item()):  # one NaN or Inf is enough for the sum to be none
            return None
        for name, part in zip(self.names, gradient.split(self._lengths), strict=True):
            if not torch.isfinite(part).all():
                return name
        return None  # finite numbers whose sum is not

    def add_gradient(self, chunk: Tensor) -> None:
        """Add this rank's chunk of a reduced gradient to those of the micro-batches before."""
        if self.gradient is None:
            self.gradient = chunk
        else:
            self.gradient.add_(chunk)

    def put_gradients(self, is_used: Sequence[bool]) -> None:
        """Give each piece its part of the gradient, and None where no rank used the parameter."""
        assert self.gradient is not None
        parts = self.gradient.split(self._piece_lengths)
        for piece, index, part in zip(self.pieces, self._index_of, parts, strict=True):
            piece.grad = part if is_used[index] else None

    def forget_gradients(self) -> None:
        """Free them, and count nothing as used."""
        self.gradient = None
        self.is_used = [False] * len(self.parameters)
        for piece in self.pieces:
            piece.grad = None


class Unit:
    """Some layers of a chain and the parameters that they alone use: what is gathered, reduced and freed at once.

    Args:
        layers: run one after the other.
        named: their own parameters, by name; those of one dtype, trained or frozen alike, make a flat.
        comm: this rank's communicator.
        is_sharded: keep this rank's chunks alone.
    """

    def __init__(
        self, layers: Sequence[Layer], named: Mapping[str, nn.Parameter], comm: Communicator, is_sharded: bool
    ) -> None:
        self.layers = layers
        self.is_trained = any(p.requires_grad for layer in layers for _, p in layer.named_parameters())
        first = [module for layer in layers[:1] for part in layer.parts.values() for module in part.modules()]
        self.writes_on_input = any(getattr(module, "inplace", False) for module in first)
        kinds: dict[tuple[torch.dtype, bool], dict[str, nn.Parameter]] = {}
        for name, p in named.items():
            kinds.setdefault((p.dtype, p.requires_grad), {})[name] = p
        flats = {kind: Flat(of_kind, comm.rank, comm.size, is_sharded) for kind, of_kind in kinds.items()}
        self.flats = list(flats.values())
        self.trained = [flat for (_, is_trained), flat in flats.items() if is_trained]

    def __call__(self, x: Tensor) -> Tensor:
        """The input of the first layer -> the output of the last."""
        for layer in self.layers:
            x = layer(x)
        return x

    def gather(self, comm: Communicator) -> list[Handle[Tensor]]:
        """Start to gather its weights."""
        return [flat.gather(comm) for flat in self.flats]

    def free(self) -> None:
        """Keep no weights but this rank's chunks."""
        for flat in self.flats:
            flat.free()

    def holds(self, x: Tensor) -> bool:
        """Whether `x` lies in the memory of the gathered weights."""
        return any(flat.holds(x) for flat in self.flats)


@torch.no_grad()
def make_units(model: nn.Module, comm: Communicator, is_sharded: bool) -> tuple[list[Unit], Unit]:
    """The model's units, and the root: the parameters that several layers use, such as a tied embedding.

    Args:
        model: a chain; its parameters become views of flats.
        comm: this rank's communicator.
        is_sharded: keep this rank's chunks alone.
    """
    chain = layers(model)
    names = {p: name for name, p in model.named_parameters()}
    shared = {model.get_parameter(of_one[0]) for of_one in tied_names(chain)}
    parts: list[tuple[list[Layer], dict[str, nn.Parameter]]] = []
    for layer in chain:
        own = {names[p]: p for _, p in layer.named_parameters() if p not in shared}
        if parts and not (own and parts[-1][1]):  # two units only where each has something to gather
            parts[-1][0].append(layer)
            parts[-1][1].update(own)
        else:
            parts.append(([layer], own))
    root = {name: p for p, name in names.items() if p in shared}
    return [Unit(*part, comm, is_sharded) for part in parts], Unit([], root, comm, is_sharded)


# --- the model in one piece ------------------------------------------------------------------------------------------


@torch.no_grad()
def merged_state(model: nn.Module, flats: Sequence[Flat], comm: Communicator) -> dict[str, Tensor]:
    """The `state_dict` of a model whose parameters lie in these flats, as copies; one flat is whole at a time."""
    copies: dict[Tensor, Tensor] = {}
    for flat in flats:
        if flat.is_sharded:
            flat.gather(comm).wait()
        copies |= {p: view.clone() for p, view in zip(flat.parameters, flat.views, strict=True)}
        if flat.is_sharded:
            flat.free()
    copies |= {buffer: comm.broadcast(buffer) for buffer in model.buffers()}
    state = model.state_dict(keep_vars=True)
    return {key: copies.get(value, value) if isinstance(value, Tensor) else value for key, value in state.items()}


@torch.no_grad()
def split_state(model: nn.Module, flats: Sequence[Flat], state: Mapping[str, Tensor]) -> None:
    """Put a whole model's `state_dict` in these flats, one after the other, and in the model's buffers.

    Raises:
        MplabError: other names or shapes than the model's; nothing has changed then.
    """
    mine = model.state_dict(keep_vars=True)
    whole: dict[Tensor, Tensor] = {}
    for flat in flats:
        whole |= zip(flat.parameters, flat.views, strict=True)
    check_state(state, {k: whole.get(x, x).shape if isinstance(x, Tensor) else None for k, x in mine.items()})
    for flat in flats:
        if flat.is_sharded:
            flat.allocate()
        for name, view in zip(flat.names, flat.views, strict=True):
            view.copy_(state[name])
        if flat.is_sharded:
            flat.keep_chunk()
            flat.free()
    for name, buffer in model.named_buffers():
        if name in state:  # else it is not kept in a state_dict
            buffer.copy_(state[name])
