"""Models as chains of layers: what runs in stages is what the model computes, under the model's own names."""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mplab.errors import MplabError
from mplab.models import GPT, MLP, GPTConfig, Layer, Stage, layers, seed_parameters, tied_names

TOKENS = torch.tensor([[1, 5, 2, 9, 0, 3], [4, 4, 7, 10, 8, 6]])
SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 6,
    "use_cache": False,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors this small threads only wait for each other, for milliseconds on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def transformers() -> Any:
    return pytest.importorskip("transformers")


def gpt2(name: str = "GPT2LMHeadModel", **options: Any) -> nn.Module:
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0}
    ids = {"bos_token_id": None, "eos_token_id": None}  # the defaults are beyond a vocabulary of 11
    config = transformers().GPT2Config(**{**SIZES, **no_dropout, **ids, **options})
    return filled(getattr(transformers(), name)(config))


def llama(name: str = "LlamaForCausalLM", **options: Any) -> nn.Module:
    more = {"intermediate_size": 16, "num_key_value_heads": 1, "classifier_dropout": 0.0}
    return filled(getattr(transformers(), name)(transformers().LlamaConfig(**{**SIZES, **more, **options})))


def bert(name: str = "BertForMaskedLM", pooler: bool | None = None, **options: Any) -> nn.Module:
    more = {"intermediate_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers().BertConfig(**{**SIZES, **more, **options})
    arguments = {} if pooler is None else {"add_pooling_layer": pooler}
    return filled(getattr(transformers(), name)(config, **arguments))


def filled(model: nn.Module) -> nn.Module:
    """Weights of order 1, with no bias of 0, so that whatever is left out or used twice changes the output."""
    seed_parameters(model)
    return model


def gpt(**options: Any) -> GPT:
    return GPT(GPTConfig(**{"vocab_size": 11, "context_length": 6, "num_heads": 2, "width": 8, **options}))


def nested() -> nn.Sequential:
    """Names at several depths; buffers; modules in two places, with parameters and without."""
    shared, tanh = nn.Linear(4, 4), nn.Tanh()
    inner = nn.Sequential(OrderedDict(up=nn.Linear(6, 4), tanh=tanh, norm=nn.BatchNorm1d(4), shared=shared))
    again = nn.Sequential(shared, nn.Sequential(tanh))
    model = nn.Sequential(OrderedDict(layers=inner, again=again, head=nn.Linear(4, 3)))
    seed_parameters(model)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Sequential": nested,
    "MLP": lambda: MLP((6, 5, 4, 2)),
    "GPT": gpt,
    "GPT untied": lambda: gpt(tied=False),
    "GPT-2": gpt2,
    "GPT-2 eager": lambda: gpt2(attn_implementation="eager"),
    "GPT-2 untied": lambda: gpt2(tie_word_embeddings=False),
    "GPT-2 of tokens": lambda: gpt2("GPT2ForTokenClassification"),
    "GPT-2 without head": lambda: gpt2("GPT2Model"),
    "Llama": llama,
    "Llama eager": lambda: llama(attn_implementation="eager"),
    "Llama tied": lambda: llama(tie_word_embeddings=True),
    "Llama of tokens": lambda: llama("LlamaForTokenClassification"),
    "Llama without head": lambda: llama("LlamaModel"),
    "BERT": bert,
    "BERT eager": lambda: bert(attn_implementation="eager"),
    "BERT untied": lambda: bert(tie_word_embeddings=False),
    "BERT as decoder": lambda: bert("BertLMHeadModel", is_decoder=True),
    "BERT as eager decoder": lambda: bert("BertLMHeadModel", is_decoder=True, attn_implementation="eager"),
    "BERT of tokens": lambda: bert("BertForTokenClassification"),
    "BERT of sequences": lambda: bert("BertForSequenceClassification", num_labels=3),
    "BERT of next sentences": lambda: bert("BertForNextSentencePrediction"),
    "BERT without head": lambda: bert("BertModel", pooler=False),
}
any_model = pytest.mark.parametrize("name", MODELS)


def batch(model: nn.Module) -> Tensor:
    return TOKENS / 10 if isinstance(model, nn.Sequential) else TOKENS


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """What the model itself computes: its `logits`, or its hidden state where it has no head."""
    output = model(x)
    result = output if isinstance(output, Tensor) else output[0]
    assert isinstance(result, Tensor)
    return result


def backward(output: Tensor) -> None:
    """From a gradient that is another one for each element."""
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """As `torch.testing.assert_close`, which takes long for a dict."""
    assert found.keys() == expected.keys()
    for name, mine in found.items():
        full = expected[name]
        assert mine is full if mine is None or full is None else torch.allclose(mine, full, rtol=0, atol=1e-6), name


def names(tensors: Any) -> list[str]:
    return [name for name, _ in tensors]


# What runs in layers and stages is the model


@any_model
def test_the_layers_one_after_the_other_are_the_model(name: str) -> None:
    model = MODELS[name]().eval()
    expected = logits(model, batch(model))
    x = batch(model)
    for layer in layers(model):
        x = layer(x)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.01, "the comparison would say nothing"


@any_model
def test_one_stage_has_the_outputs_gradients_and_names_of_the_model(name: str) -> None:
    model = MODELS[name]()
    stage = Stage(layers(model))
    output, expected = stage(batch(model)), logits(model, batch(model))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    backward(output)
    backward(expected)
    assert_same(gradients(stage), gradients(model))
    unused = {name for name, gradient in gradients(model).items() if gradient is None or not gradient.any()}
    assert unused <= {"cls.predictions.bias"}, "BERT's own: without tying its head adds another bias in its stead"

    assert list(stage.state_dict()) == list(model.state_dict())
    assert all(stage.get_parameter(name).shape == weight.shape for name, weight in model.named_parameters())
    for keep in (False, True):
        assert names(stage.named_parameters(remove_duplicate=keep)) == names(
            model.named_parameters(remove_duplicate=keep)
        )
        assert names(stage.named_buffers(remove_duplicate=keep)) == names(model.named_buffers(remove_duplicate=keep))
    assert_same(stage.state_dict(), model.state_dict())  # running statistics too


@any_model
def test_stages_cut_anywhere_are_the_model(name: str) -> None:
    """Each with its part of the names; the gradients of a weight that is in two stages add up to the model's."""
    model = MODELS[name]()
    chain = layers(model)
    x = batch(model)
    expected = logits(model, x)
    backward(expected)
    for cut in range(1, len(chain)):
        first, second = Stage(chain[:cut]), Stage(chain[cut:])
        between = first(x).detach().requires_grad_()
        output = second(between)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
        backward(output)
        assert between.grad is not None
        first(x).backward(between.grad)

        parts = first.state_dict(), second.state_dict()
        assert set(parts[0]) | set(parts[1]) == set(model.state_dict())
        assert not set(parts[0]) & set(parts[1])
        found = {**gradients(first), **gradients(second)}
        for group in tied_names(chain):
            copies = {id(gradient): gradient for gradient in (found[each] for each in group)}
            found.update(dict.fromkeys(group, sum(copies.values())))
        assert_same(found, gradients(model))


@given(data=st.data(), depths=st.lists(st.integers(0, 3), min_size=1, max_size=6))
@settings(max_examples=20)
def test_any_nested_sequential_is_flattened_in_order(data: st.DataObject, depths: list[int]) -> None:
    parts: list[nn.Module] = []
    for depth in depths:
        module: nn.Module = filled(nn.Linear(3, 3))
        for _ in range(depth):
            module = nn.Sequential(*data.draw(st.permutations([module, nn.Sequential(), nn.Tanh()])))
        parts.append(module)
    model = nn.Sequential(*parts)
    chain = layers(model)
    cuts = data.draw(st.sets(st.integers(1, len(chain) - 1))) if len(chain) > 1 else set()
    x = torch.linspace(-1, 1, 6).view(2, 3)
    expected = model(x)
    merged: dict[str, Tensor] = {}
    for start, end in itertools.pairwise([0, *sorted(cuts), len(chain)]):
        stage = Stage(chain[start:end])
        x = stage(x)
        merged |= stage.state_dict()
    assert torch.equal(x, expected)
    assert_same(merged, model.state_dict())
    assert [layer.name for layer in chain] == [
        path for path, module in model.named_modules() if not isinstance(module, nn.Sequential)
    ]


@pytest.mark.parametrize("cls", [gpt2, llama, bert])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("place", [1, 5])
def test_only_a_decoder_is_causal(cls: Callable[..., nn.Module], attention: str, place: int) -> None:
    decoders = [cls(attn_implementation=attention)] if cls is not bert else []
    decoders += [bert("BertLMHeadModel", is_decoder=True, attn_implementation=attention)] if cls is bert else []
    changed = TOKENS.clone()
    changed[:, place] = 2 if place == 1 else 1
    for model in decoders:
        stage = Stage(layers(model.eval()))
        before, after = stage(TOKENS), stage(changed)
        torch.testing.assert_close(before[:, :place], after[:, :place], rtol=0, atol=1e-6)
        assert (before[:, place:] - after[:, place:]).abs().amax(-1).min() > 1e-4
    if cls is bert:
        stage = Stage(layers(bert(attn_implementation=attention).eval()))
        assert (stage(TOKENS) - stage(changed)).abs().amax(-1).min() > 1e-4


def test_the_attention_can_be_changed_between_layers_and_call() -> None:
    """A mask chosen too early would leave eager attention without one, and the model would see the future."""
    model = gpt2(attn_implementation="sdpa").eval()
    chain = layers(model)
    expected = logits(model, TOKENS)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(Stage(chain)(TOKENS), expected, rtol=0, atol=1e-6)


def test_a_block_that_returns_a_tuple_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of transformers 4 do."""
    for model in (gpt2(), llama(), bert()):
        chain = layers(model.eval())
        expected = Stage(chain)(TOKENS)
        block = next(iter(chain[1].parts.values()))
        plain = type(block).forward
        monkeypatch.setattr(type(block), "forward", lambda *args, _plain=plain, **more: (_plain(*args, **more),))
        assert torch.equal(Stage(chain)(TOKENS), expected)


def test_blocks_that_recompute_by_themselves_run() -> None:
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its new name, which older releases lack
        model.gradient_checkpointing_enable()
    stage, expected = Stage(layers(model)), logits(model, TOKENS)
    output = stage(TOKENS)
    backward(output)
    backward(expected)
    assert_same(gradients(stage), gradients(model))


@pytest.mark.parametrize("scaling", ["dynamic", "linear", "llama3"])
def test_scaled_rotary_embeddings(scaling: str) -> None:
    options = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 4}
    keys = {"dynamic": ["factor"], "linear": ["factor"], "llama3": list(options)}[scaling]
    rope = {"rope_type": scaling, "rope_theta": 10000.0, **{key: options[key] for key in keys}}
    model = llama(rope_parameters=rope).eval()
    stage = Stage(layers(model))
    for length in (9, 3):  # longer than the 6 positions it was made for, then shorter again
        tokens = torch.arange(2 * length).view(2, length) % 11
        torch.testing.assert_close(stage(tokens), logits(model, tokens), rtol=0, atol=1e-6)


# A stage


def test_names_of_the_layers_and_of_a_stage_of_a_gpt() -> None:
    chain = layers(gpt(num_layers=3))
    assert [layer.name for layer in chain] == ["embedding", "blocks.0", "blocks.1", "blocks.2", "head"]
    stage = Stage(chain[2:3])
    weights = dict(stage.named_parameters())
    assert "blocks.1.attention.query.weight" in weights
    assert all(name.startswith("blocks.1.") for name in weights)
    seed_parameters(stage, seed=7)  # by name: a part is filled as the whole is
    assert_same(stage.state_dict(), Stage(layers(GPT(gpt(num_layers=3).config, seed=7))[2:3]).state_dict())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (gpt2, ["embedding", "transformer.h.0", "transformer.h.1", "head"]),
        (llama, ["embedding", "model.layers.0", "model.layers.1", "head"]),
        (bert, ["embedding", "bert.encoder.layer.0", "bert.encoder.layer.1", "head"]),
        (lambda: bert("BertModel", pooler=False), ["embedding", "encoder.layer.0", "encoder.layer.1"]),
    ],
)
def test_names_of_the_layers_of_hugging_face_models(model: Callable[[], nn.Module], expected: list[str]) -> None:
    assert [layer.name for layer in layers(model())] == expected


def test_a_stage_is_a_copy() -> None:
    model = gpt()
    stage = Stage(layers(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.zero_()
    assert_same(model.state_dict(), before)
    assert not stage(TOKENS).any()  # its layers run on the parameters that it shows


def test_a_weight_tied_within_a_stage_stays_tied() -> None:
    for model in (gpt(), gpt2(), bert()):
        ((one, other),) = tied_names(layers(model))
        stage = Stage(layers(model))
        assert stage.get_parameter(one) is stage.get_parameter(other)
        assert other in stage.state_dict()
        assert other not in names(stage.named_parameters())
        seed_parameters(model, seed=1)
        stage.load_state_dict(model.state_dict())
        torch.testing.assert_close(stage(TOKENS), logits(model, TOKENS), rtol=0, atol=1e-6)


def test_modes_frozen_weights_and_dtypes_are_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3).double()), nn.Dropout())
    model[0].requires_grad_(False)
    model[1].eval()
    stage = Stage(layers(model))
    for path, module in stage.named_modules():
        if path not in ("", "2"):
            assert module.training == model.get_submodule(path).training, path
    for name, parameter in stage.named_parameters():
        assert parameter.requires_grad == (not name.startswith("0.")), name
        assert parameter.dtype == model.get_parameter(name).dtype, name
    assert stage.training
    assert not Stage(layers(model.eval())).training
    assert stage.get_submodule("3").training, "the copy is not the model"
    stage.eval()
    assert not stage.get_submodule("3").training


def test_buffers_that_are_not_saved_come_along() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("saved", torch.ones(1))
            self.register_buffer("unsaved", torch.full((1,), 2.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.saved + self.unsaved

    stage = Stage(layers(nn.Sequential(nn.Identity(), Shift()))[1:])
    assert names(stage.named_buffers()) == ["1.saved", "1.unsaved"]
    assert list(stage.state_dict()) == ["1.saved"]
    assert stage(torch.zeros(1)).item() == 3
    assert "model.rotary_emb.inv_freq" in names(Stage(layers(llama())[2:3]).named_buffers())


def test_ranks_that_copy_at_once_get_the_same() -> None:
    model = gpt2().eval()
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: Stage(layers(model))(TOKENS), range(8)))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_model_without_values_has_layers_with_sizes() -> None:
    with torch.device("meta"):
        model = gpt()
    chain = layers(model)
    sizes = [sum(parameter.numel() for _, parameter in layer.named_parameters()) for layer in chain]
    real = [sum(parameter.numel() for _, parameter in layer.named_parameters()) for layer in layers(gpt())]
    assert sizes == real
    assert all(parameter.is_meta for parameter in Stage(chain, "meta").parameters())
    with pytest.raises(MplabError, match=r"embedding.token.weight is on the meta device.* can't move to cpu: build"):
        Stage(chain, "cpu")


@pytest.mark.gpu
def test_a_stage_on_a_gpu() -> None:
    for model in (gpt(), gpt2(), llama(tie_word_embeddings=True), bert()):
        stage = Stage(layers(model), "cuda")
        ((one, other),) = tied_names(layers(model))
        assert stage.get_parameter(one) is stage.get_parameter(other)
        assert all(tensor.is_cuda for tensor in (*stage.parameters(), *stage.buffers()))
        assert not any(parameter.is_cuda for parameter in model.parameters())
        torch.testing.assert_close(stage(TOKENS.cuda()).cpu(), logits(model, TOKENS), rtol=1e-3, atol=1e-3)


# Tied names


def test_tied_names_are_those_of_different_layers() -> None:
    assert tied_names(layers(gpt())) == [("embedding.token.weight", "head.projection.weight")]
    assert tied_names(layers(gpt2())) == [("transformer.wte.weight", "lm_head.weight")]
    assert tied_names(layers(llama(tie_word_embeddings=True))) == [("model.embed_tokens.weight", "lm_head.weight")]
    # Its head has a bias with two names as well, in one layer.
    assert tied_names(layers(bert())) == [
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ]
    assert tied_names(layers(nested())) == [
        ("layers.shared.weight", "again.0.weight"),
        ("layers.shared.bias", "again.0.bias"),
    ]
    for model in (gpt(tied=False), gpt2(tie_word_embeddings=False), llama(), bert(tie_word_embeddings=False)):
        assert tied_names(layers(model)) == []


# Mistakes


class TwoInputs(nn.Sequential):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x if y is None else x + y)


class Renamed(GPT):
    pass


class Doubled(GPT):
    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * super().forward(tokens)


def test_a_subclass_is_a_chain_unless_it_has_a_forward_of_its_own() -> None:
    assert len(layers(Renamed(gpt().config))) == 4
    kind = type(gpt2())
    assert len(layers(type("Renamed", (kind,), {})(gpt2().config))) == 4
    inner = nn.Sequential(TwoInputs(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))
    assert [layer.name for layer in layers(inner)] == ["0", "1"]  # one layer, called as it is
    own_forward = type("Doubled", (kind,), {"forward": lambda self, *args: 2 * kind.forward(self, *args)})
    for model in (TwoInputs(nn.Linear(3, 3)), Doubled(), own_forward(gpt2().config)):
        with pytest.raises(MplabError, match=r"(TwoInputs|Doubled) is not known as a chain.*none with a forward of it"):
            layers(model)


def with_parameter() -> nn.Module:
    model = gpt()
    model.scale = nn.Parameter(torch.ones(1))
    return model


def with_another_base() -> nn.Module:
    model = gpt2()
    kind = type(model.transformer)
    own = type("Doubled", (kind,), {"forward": lambda self, *args, **more: kind.forward(self, *args, **more)})
    model.transformer = own(model.config)
    return model


def with_hook(path: str) -> nn.Module:
    model = gpt2()
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    return model


def with_one_norm_twice() -> nn.Module:
    norm = nn.BatchNorm1d(3)
    return nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 3), norm)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (lambda: None, "layers() of a NoneType: it takes a model"),
        (nn.Sequential, "this Sequential has no layers: give it one or more"),
        (lambda: nn.Linear(3, 3), "Linear is not known as a chain of layers"),
        (lambda: nn.DataParallel(gpt()), "Of a wrapper (torch.compile, DDP) give the model inside"),
        (with_parameter, "scale of this GPT is outside all of its layers (embedding ... head)"),
        (with_one_norm_twice, "layers 1 and 3 of this Sequential have one buffer, 1.running_mean = 3.running_mean"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "0.weight of this Sequential has no shape yet: call the model once"),
        (lambda: with_hook(""), "a hook is on the model itself, a GPT2LMHeadModel that a chain takes apart"),
        (lambda: with_hook("transformer"), "a hook is on transformer, a GPT2Model"),
        (
            lambda: transformers().T5ForConditionalGeneration(
                transformers().T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11)
            ),
            "T5ForConditionalGeneration can't be cut into a chain of layers: each block of its decoder takes the enc",
        ),
        (with_another_base, "transformer of this GPT2LMHeadModel is a Doubled, which is not run as a GPT2Model is"),
        (lambda: gpt2(add_cross_attention=True), "cross-attention, which takes a second tensor. Build it with add_c"),
        (lambda: llama(attn_implementation="flex_attention"), "its attention is 'flex_attention'"),
        (lambda: gpt2(output_hidden_states=True), "config.output_hidden_states asks for the tensors inside it"),
        (lambda: bert(output_attentions=True, attn_implementation="eager"), "config.output_attentions asks for"),
        (lambda: llama(is_causal=False), "config.is_causal is False"),
        (lambda: gpt2("GPT2ForSequenceClassification"), "its head reads the token ids again"),
        (lambda: gpt2("GPT2DoubleHeadsModel"), "it returns two tensors, the logits of its two heads. Known are GPT2"),
        (lambda: bert("BertForPreTraining"), "it returns two tensors, the logits of its two heads"),
        (lambda: bert("BertForQuestionAnswering"), "it returns two tensors, the logits of the start and those of th"),
        (lambda: bert("BertForMultipleChoice"), "it takes ids of three dims"),
        (lambda: llama().model.layers[0], "LlamaDecoderLayer can't be cut into a chain of layers: it is not known he"),
        (lambda: bert("BertModel"), "the hidden state and the pooled one. Build it with add_pooling_layer=False"),
        (
            lambda: transformers().MistralForCausalLM(
                transformers().MistralConfig(**SIZES, intermediate_size=8, num_key_value_heads=1)
            ),
            "MistralForCausalLM can't be cut into a chain of layers: it is not known here. Known are GPT2Model, ",
        ),
    ],
)
def test_what_is_no_chain_is_refused(model: Callable[[], nn.Module], complaint: str) -> None:
    built = model()
    with pytest.raises(MplabError) as caught:
        layers(built)
    assert complaint in str(caught.value)


def test_a_head_that_was_swapped_for_one_with_other_parts_still_runs() -> None:
    model = bert("BertForTokenClassification").eval()
    model.classifier = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2))
    torch.testing.assert_close(Stage(layers(model))(TOKENS), logits(model, TOKENS), rtol=0, atol=1e-6)


def test_a_block_that_the_model_leaves_out_is_refused() -> None:
    model = llama()
    model.config.num_hidden_layers = 1
    with pytest.raises(MplabError, match=r"model.layers.1.self_attn.q_proj.weight .* is outside all of its layers"):
        layers(model)


def test_a_layer_that_gives_no_tensor_is_refused_when_it_runs() -> None:
    stage = Stage(layers(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3))))
    with pytest.raises(MplabError, match="layer 1 gave a tuple, and the layers of a chain hand on one tensor: wrap it"):
        stage(torch.zeros(2, 3))


def test_a_stage_of_no_layers_is_refused() -> None:
    with pytest.raises(MplabError, match="a stage of 0 layers"):
        Stage([])


def test_tokens_of_a_wrong_shape_or_length_are_refused() -> None:
    for model in (gpt2(), llama(), bert()):
        with pytest.raises(MplabError, match=r"shape \(6,\): must be \(batch, sequence\)"):
            Stage(layers(model))(TOKENS[0])
    for model in (gpt2(), bert()):
        with pytest.raises(MplabError, match="12 tokens is longer than the 6 positions of the model"):
            Stage(layers(model))(TOKENS.repeat(1, 2))


def test_a_layer_says_its_name_alone() -> None:
    assert repr(Layer("blocks.0", {"blocks.0": nn.Linear(3, 3)})) == "Layer(name='blocks.0')"
