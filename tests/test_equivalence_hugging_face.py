"""Models of Hugging Face in a pipeline train as they do by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from limits import leaves_nothing_behind as leaves_nothing_behind
from pipelines import OPTIMIZERS, TOLERANCE, assert_trains_alike, batches, train_serially
from torch import nn

from mplab import World
from mplab.models import cross_entropy

CONFIGS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 8, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    | {"attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0},
    "BertForMaskedLM": {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    | {"max_position_embeddings": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "LlamaForCausalLM": {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    | {"num_key_value_heads": 1, "max_position_embeddings": 8, "tie_word_embeddings": True},
}


def hugging_face(name: str) -> nn.Module:
    """A tiny one with random weights, the same every time."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = kind(kind.config_class(vocab_size=7, **CONFIGS[name])).double()
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pipeline_trains_as_the_model_itself_does(name: str) -> None:
    """Serial training calls the model's own forward."""
    own_forward: Any = lambda output, targets: cross_entropy(output.logits, targets)  # noqa: E731
    trained = train_serially(hugging_face(name), batches(), OPTIMIZERS["sgd"], own_forward)
    model = hugging_face(name)
    tolerance = 1e-6 if name == "LlamaForCausalLM" else TOLERANCE  # its norms compute in float32
    for num_ranks, cuts in ((2, (2,)), (3, (1, 3))):
        for order in ("1f1b", "zero_bubble"):
            options = {"schedule": order, "num_microbatches": 4, "optimizer": OPTIMIZERS["sgd"]}
            World(num_ranks, "cpu").run(
                lambda rank, cuts=cuts, options=options: assert_trains_alike(
                    rank.comm, model, trained, cuts, batches(), tolerance, **options
                )
            )
