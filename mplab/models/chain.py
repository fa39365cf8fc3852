"""A model as a chain of layers, each of which takes one tensor and gives one: what a pipeline cuts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mplab.errors import MplabError
from mplab.models import hugging_face
from mplab.models.gpt import GPT
from mplab.models.layer import Layer


def layers(model: nn.Module) -> list[Layer]:
    """The model's layers in the order in which they run; one after the other they compute what the model computes.

    Dropout draws from the generator of the device, so that its masks depend on what else draws from it: set it to 0
    where results are to be compared. A layer that looks at the whole batch (BatchNorm) sees the micro-batch instead.

    Args:
        model: an `nn.Sequential` (those inside it are taken apart too); a `GPT` or `MLP` of this package; a GPT-2,
            Llama or BERT of Hugging Face, as `hugging_face.chain` lists them, called with token ids alone: no padding
            mask, no cache. Its weights may be on the "meta" device.

    Returns:
        The layers, on the model's own modules: nothing is copied. Every parameter and buffer is in one of them, under
        its name in the model. The last gives the logits.

    Raises:
        MplabError: the model is not a chain, or not one that is known here.
    """
    if not isinstance(model, nn.Module):
        raise MplabError(f"layers() of a {type(model).__name__}: it takes a model, an nn.Module")
    if _is_sequential(model):
        chain = list(_flat(model, ""))
    elif isinstance(model, GPT) and type(model).forward is GPT.forward:
        paths = ["embedding", *(f"blocks.{index}" for index in range(len(model.blocks))), "head"]
        chain = [Layer(path, {path: model.get_submodule(path)}) for path in paths]
    elif hugging_face.is_model(model):
        chain = hugging_face.chain(model)
    else:
        raise MplabError(
            f"{type(model).__name__} is not known as a chain of layers. Known are nn.Sequential, GPT and MLP, and "
            "Hugging Face's GPT-2, Llama and BERT, none with a forward of its own. Of a wrapper (torch.compile, DDP) "
            "give the model inside; of another model put the layers, in order, in an nn.Sequential"
        )
    _check(model, chain)
    return chain


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _flat(model: nn.Module, prefix: str) -> Iterator[Layer]:
    """The layers of an nn.Sequential and of those inside it."""
    for name, module in model._modules.items():  # not named_children(), which leaves out a module's second place
        assert module is not None
        if _is_sequential(module):
            yield from _flat(module, f"{prefix}{name}.")
        else:
            yield Layer(prefix + name, {prefix + name: module})


def _check(model: nn.Module, chain: Sequence[Layer]) -> None:
    """The chain has all of the model, and can be copied in parts."""
    kind = type(model).__name__
    if not chain:
        raise MplabError(f"this {kind} has no layers: give it one or more")

    inside = {name for layer in chain for name, _ in itertools.chain(layer.named_parameters(), layer.named_buffers())}
    tensors: Iterator[tuple[str, Tensor]] = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    for name, tensor in tensors:
        if name not in inside:
            raise MplabError(
                f"{name} of this {kind} is outside all of its layers ({chain[0].name} ... {chain[-1].name}), so no "
                "stage of a pipeline would have it: move it into the layer that uses it"
            )
        if is_lazy(tensor):
            raise MplabError(f"{name} of this {kind} has no shape yet: call the model once on a batch, then layers()")

    first_names: dict[Tensor, tuple[str, str]] = {}
    for layer in chain:
        for name, buffer in layer.named_buffers():
            first, user = first_names.setdefault(buffer, (name, layer.name))
            if first != name and user != layer.name:
                raise MplabError(
                    f"layers {user} and {layer.name} of this {kind} have one buffer, {first} = {name}, and in two "
                    "stages it would become two that differ: give each layer a module of its own"
                )

    kept = {module for layer in chain for part in layer.parts.values() for module in part.modules()}
    for path, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if module not in kept and any(hooks):
            where = path or "the model itself"
            raise MplabError(
                f"a hook is on {where}, a {type(module).__name__} that a chain takes apart, so it would never run: "
                "remove it, or put it on a layer"
            )
