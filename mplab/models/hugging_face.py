"""Models of Hugging Face's transformers as chains: GPT-2, Llama and BERT, as their own `forward` runs them.

    token ids (B, T) -> embedding -> (B, T, D) -> blocks -> head (the last norm, then the layers of the task) -> logits

A block of these models takes more than one tensor: a mask, positions, rotary embeddings. All of them follow from the
shape of its input when the model is called with token ids alone, so each block makes them for itself. transformers is
not imported: a model brings its own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mplab.errors import MplabError
from mplab.models.layer import Layer

# Class -> where its model without the head is, and the modules of the head, which run one after the other.
HEADS: dict[str, tuple[str, tuple[str, ...]]] = {
    "GPT2Model": ("", ()),
    "GPT2LMHeadModel": ("transformer", ("lm_head",)),
    "GPT2ForTokenClassification": ("transformer", ("dropout", "classifier")),
    "LlamaModel": ("", ()),
    "LlamaForCausalLM": ("model", ("lm_head",)),
    "LlamaForTokenClassification": ("model", ("dropout", "score")),
    "BertModel": ("", ()),
    "BertForMaskedLM": ("bert", ("cls",)),
    "BertLMHeadModel": ("bert", ("cls",)),
    "BertForTokenClassification": ("bert", ("dropout", "classifier")),
    "BertForSequenceClassification": ("bert", ("bert.pooler", "dropout", "classifier")),
    "BertForNextSentencePrediction": ("bert", ("bert.pooler", "cls")),
}
# End of a class's name -> why its head can't be the last layer of a chain.
OTHER_HEADS = {
    "ForQuestionAnswering": "it returns two tensors, the logits of the start and those of the end",
    "ForPreTraining": "it returns two tensors, the logits of its two heads",
    "DoubleHeadsModel": "it returns two tensors, the logits of its two heads",
    "ForSequenceClassification": "its head reads the token ids again, to find the last one that is not padding",
    "ForMultipleChoice": "it takes ids of three dims and mixes choices with samples",
}


@dataclass(frozen=True)
class Family:
    """Where the classes of one family keep their modules, and how their layers are called."""

    embedding: tuple[str, ...]
    run_embedding: Callable[..., Tensor]  # of the parts, the input and the model's config
    blocks: str
    run_block: Callable[..., Tensor]  # the same
    norm: str | None = None
    rotary: str | None = None


def is_model(model: nn.Module) -> bool:
    """Whether the class, or one that it inherits its forward from, is one of transformers' own."""
    return _class_name(model) is not None


def chain(model: nn.Module) -> list[Layer]:
    """The layers of one of these, with sdpa or eager attention; the last gives what the model calls logits.

    - GPT2LMHeadModel, GPT2ForTokenClassification
    - LlamaForCausalLM, LlamaForTokenClassification
    - BertForMaskedLM, BertLMHeadModel, BertForTokenClassification, BertForSequenceClassification,
      BertForNextSentencePrediction
    - without a head GPT2Model, LlamaModel and BertModel(add_pooling_layer=False): the last gives the hidden state

    Raises:
        MplabError: another model, or one of these set to take or to return more than one tensor.
    """
    name = _class_name(model)
    assert name is not None
    config: Any = getattr(model, "config", None)
    _check(name, model, config)
    base, head = HEADS[name]
    prefix = f"{base}." if base else ""
    start, family = next((start, family) for start, family in FAMILIES.items() if name.startswith(start))
    inner = model.get_submodule(base)
    if _class_name(inner) != f"{start}Model":
        raise MplabError(
            f"{base} of this {name} is a {type(inner).__name__}, which is not run as a {start}Model is: put the layers "
            "of this model, in order, in an nn.Sequential"
        )

    def parts(*paths: str) -> dict[str, nn.Module]:
        return {path: model.get_submodule(path) for path in paths}

    embedding = parts(*(prefix + path for path in family.embedding))
    chain = [Layer("embedding", embedding, partial(family.run_embedding, config=config))]
    shared = [prefix + family.rotary] if family.rotary else []
    num_parts = getattr(model, "num_sequence_parts", 1)  # of which each later block gets one
    for index in range(config.num_hidden_layers):
        path = f"{prefix}{family.blocks}.{index}"
        run = partial(family.run_block, config=config, num_parts=num_parts if index else 1)
        chain.append(Layer(path, parts(path, *shared), run))
    last = [*([prefix + family.norm] if family.norm else []), *head]
    if last:
        chain.append(Layer("head", parts(*last)))
    return chain


def _class_name(model: nn.Module) -> str | None:
    """The name of the transformers class whose forward the model has."""
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.models.") and getattr(kind, "forward", None) is type(model).forward:
            return kind.__name__
    return None


def _check(name: str, model: nn.Module, config: Any) -> None:
    """What would make the model more than a chain: each with its reason and remedy."""

    def refuse(reason: str) -> MplabError:
        return MplabError(f"{name} can't be cut into a chain of layers: {reason}")

    if getattr(config, "is_encoder_decoder", False):
        raise refuse(
            "each block of its decoder takes the encoder's output besides its own input, and a chain hands on one "
            "tensor. Take a model with an encoder or a decoder alone (BERT, GPT-2, Llama)"
        )
    if getattr(config, "add_cross_attention", False):
        raise refuse(
            "its blocks have cross-attention, which takes a second tensor. Build it with add_cross_attention=False"
        )
    if name not in HEADS:
        known = f"Known are {', '.join(HEADS)}"
        for end, reason in OTHER_HEADS.items():
            if name.endswith(end) and name.startswith(tuple(FAMILIES)):
                raise refuse(f"{reason}. {known}")
        raise refuse(f"it is not known here. {known}; of another model put the layers, in order, in an nn.Sequential")
    if name == "BertModel" and model.pooler is not None:
        raise refuse(
            "it returns two tensors, the hidden state and the pooled one. Build it with add_pooling_layer=False, or "
            "take BertForSequenceClassification, whose head uses the pooled one"
        )
    for option in ("output_hidden_states", "output_attentions"):
        if getattr(config, option, False):
            raise refuse(f"config.{option} asks for the tensors inside it, which stay in the stages. Set it to False")
    if not getattr(config, "is_causal", True):
        raise refuse("config.is_causal is False, and its blocks would be run as causal ones. Take a BERT instead")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise refuse(
            f"its attention is {config._attn_implementation!r}, whose masks are not known here. Call "
            "model.set_attn_implementation('sdpa'), or 'eager'"
        )


def _length(tokens: Tensor, longest: int | None) -> int:
    """The sequence length of a batch of token ids."""
    if tokens.dim() != 2:
        raise MplabError(f"tokens of shape {tuple(tokens.shape)}: must be (batch, sequence)")
    length = tokens.shape[1]
    if longest is not None and length > longest:
        raise MplabError(
            f"a sequence of {length} tokens is longer than the {longest} positions of the model: shorten it, or build "
            "the model with larger max_position_embeddings"
        )
    return length


def _mask(x: Tensor, config: Any, num_parts: int) -> Tensor | None:
    """What keeps a block causal: a mask (1, 1, T, T) to add to the scores; sdpa is causal where there is none."""
    if config._attn_implementation != "eager":
        return None
    length = x.shape[1] * num_parts
    return x.new_full((length, length), torch.finfo(x.dtype).min).triu(1)[None, None]


def _hidden(output: Any) -> Tensor:
    """What a block gives: the hidden state, in older releases the first of a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _gpt2_embedding(parts: dict[str, nn.Module], tokens: Tensor, config: Any) -> Tensor:
    token, position, dropout = parts.values()
    places = torch.arange(_length(tokens, config.max_position_embeddings), device=tokens.device)
    x: Tensor = dropout(token(tokens) + position(places[None]))
    return x


def _gpt2_block(parts: dict[str, nn.Module], x: Tensor, config: Any, num_parts: int) -> Tensor:
    (block,) = parts.values()
    return _hidden(block(x, attention_mask=_mask(x, config, num_parts), use_cache=False))


def _llama_embedding(parts: dict[str, nn.Module], tokens: Tensor, config: Any) -> Tensor:
    (token,) = parts.values()
    _length(tokens, None)  # rotary embeddings go on for ever
    x: Tensor = token(tokens)
    return x


def _llama_block(parts: dict[str, nn.Module], x: Tensor, config: Any, num_parts: int) -> Tensor:
    block, rotary = parts.values()
    places = torch.arange(x.shape[1] * num_parts, device=x.device)[None]
    rotations = rotary(x, position_ids=places)
    return _hidden(
        block(
            x,
            attention_mask=_mask(x, config, num_parts),
            position_ids=places,
            position_embeddings=rotations,
            use_cache=False,
        )
    )


def _bert_embedding(parts: dict[str, nn.Module], tokens: Tensor, config: Any) -> Tensor:
    (embeddings,) = parts.values()
    _length(tokens, config.max_position_embeddings)
    x: Tensor = embeddings(tokens)  # it makes positions and token types itself
    return x


def _bert_block(parts: dict[str, nn.Module], x: Tensor, config: Any, num_parts: int) -> Tensor:
    (block,) = parts.values()
    return _hidden(block(x, _mask(x, config, num_parts) if config.is_decoder else None))


FAMILIES = {
    "GPT2": Family(("wte", "wpe", "drop"), _gpt2_embedding, "h", _gpt2_block, norm="ln_f"),
    "Llama": Family(("embed_tokens",), _llama_embedding, "layers", _llama_block, norm="norm", rotary="rotary_emb"),
    "Bert": Family(("embeddings",), _bert_embedding, "encoder.layer", _bert_block),
}
