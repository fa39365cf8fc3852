"""Which module is cut, and how: a dict from patterns of module names to styles.

    {"blocks.*.mlp.up": "column", "blocks.*.mlp.down": "row"}

A pattern is a dotted name in which each `*` stands for one part of it. The styles:

    column         a linear layer: each rank computes 1/n of the outputs, and leaves them cut
    column:3       the same of three matrices joined in one (query, key and value), each of them cut alike
    column_gather  the same as "column", and all ranks get all outputs
    row            a linear layer whose inputs come cut: each rank computes a summand of every output
    vocab          an embedding: each rank has 1/n of the vocabulary; or the linear layer that gives the logits, which
                   stay cut for `vocab_parallel_cross_entropy`
    entry          all that this module does with its input is to give it to column-parallel layers inside it: it is
                   made ready for them at the door. "column" layers with one parent that read the same tensor share
                   what makes it ready anyway
    partial        a module inside cut ones that every rank has whole, and that sees 1/n of the features (a norm of each
                   head): its gradients are added up
    scatter        with sequence parallelism: what enters this module is cut along the sequence, and so is all after it
    gather         with sequence parallelism: what leaves this module is whole again

Those that Hugging Face's own plans use are understood too.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from mplab.errors import MplabError
from mplab.models import GPT
from mplab.parallel.tensor_layers import is_linear, is_plain, sizes_of

MODULE_STYLES = ("entry", "partial", "scatter", "gather")
STYLES = ("column", "column:3", "column_gather", "row", "vocab", *MODULE_STYLES)
HUGGING_FACE_STYLES = {
    "colwise": "column",
    "rowwise": "row",
    "colwise_gather_output": "column_gather",
    "embedding_rowwise": "vocab",
    "replicated_with_grad_allreduce": "partial",
}

GPT_PLAN = {
    "embedding.token": "vocab",
    "blocks.0": "scatter",
    "blocks.*.attention.query": "column",
    "blocks.*.attention.key": "column",
    "blocks.*.attention.value": "column",
    "blocks.*.attention.output": "row",
    "blocks.*.mlp.up": "column",
    "blocks.*.mlp.down": "row",
    "head.projection": "vocab",
}
# Of those families of Hugging Face that carry none; the names are those in the model without a head.
FAMILY_PLANS = {
    "GPT2": {
        "wte": "vocab",
        "h.0": "scatter",
        "h.*.attn.c_attn": "column:3",
        "h.*.attn.c_proj": "row",
        "h.*.mlp.c_fc": "column",
        "h.*.mlp.c_proj": "row",
        "ln_f": "gather",
    },
    "Bert": {
        "embeddings.word_embeddings": "vocab",
        "encoder.layer.0": "scatter",
        "encoder.layer.*.attention.self": "entry",
        "encoder.layer.*.attention.self.query": "column",
        "encoder.layer.*.attention.self.key": "column",
        "encoder.layer.*.attention.self.value": "column",
        "encoder.layer.*.attention.output.dense": "row",
        "encoder.layer.*.intermediate.dense": "column",
        "encoder.layer.*.output.dense": "row",
    },
}
# Heads of which every rank has the whole: what leaves them is made whole.
WHOLE_HEADS = {"LlamaForTokenClassification": "score", "BertForTokenClassification": "classifier"}
HEAD_SIZES = ("head_size", "head_dim", "attention_head_size")  # what a module calls the features of one head


def tensor_plan(model: nn.Module) -> dict[str, str]:
    """The plan of a model that is known here, or that it carries: to be used as it is, or as the start of your own.

    Args:
        model: a `GPT`; a GPT-2 or BERT of Hugging Face, or any model of Hugging Face that carries a plan
            (`base_model_tp_plan` of its config).

    Returns:
        From patterns to styles. Token embeddings and language-model heads are cut over the vocabulary.

    Raises:
        MplabError: neither.
    """
    if isinstance(model, GPT):
        return dict(GPT_PLAN)
    config: Any = getattr(model, "config", None)
    kind = type(model).__name__
    base: str = getattr(model, "base_model_prefix", "")
    prefix = f"{base}." if base and hasattr(model, base) else ""
    of_base = next((plan for start, plan in FAMILY_PLANS.items() if kind.startswith(start)), None)
    if of_base is None:
        carried = getattr(config, "base_model_tp_plan", None)
        if not carried:
            raise MplabError(
                f"no plan is known for a {kind}, and it carries none (base_model_tp_plan of its config): give one, for "
                'example {"blocks.*.up": "column", "blocks.*.down": "row"}'
            )
        blocks = next((pattern.split(".*", 1)[0] for pattern in carried if ".*" in pattern), None)
        parents = Counter(pattern.rpartition(".")[0] for pattern, style in carried.items() if style == "colwise")
        # Attention and MLP of these models begin with several layers that read their input.
        entries = {parent: "entry" for parent, num_layers in parents.items() if parent and num_layers > 1}
        of_base = {**carried, **entries, **({f"{blocks}.0": "scatter"} if blocks else {})}
    plan = {prefix + pattern: style for pattern, style in of_base.items()}
    names = {module: name for name, module in model.named_modules()}
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    whole_head = WHOLE_HEADS.get(kind)
    if all(is_plain(module) for module in ends if module is not None):
        plan.update({names[module]: "vocab" for module in ends if module is not None})
    elif ends[1] is not None:
        whole_head = names[ends[1]]
    if whole_head is not None:
        plan[whole_head] = "gather"
    is_whole_again = "gather" in plan.values() or ends[1] is not None
    if not is_whole_again or getattr(getattr(model, base, model), "pooler", None) is not None:
        # something reads the sequence as a whole
        plan = {pattern: style for pattern, style in plan.items() if style not in ("scatter", "gather")}
    return plan


def resolve(
    model: nn.Module, plan: Mapping[str, str], num_ranks: int, sequence_parallel: bool
) -> dict[str, tuple[str, int]]:
    """The plan by modules: path -> (style, number of joined matrices).

    Raises:
        MplabError: what the plan says can't be done with this model, these ranks, or at all.
    """
    if not isinstance(plan, Mapping) or not plan:
        raise MplabError(f"plan {plan!r}: give a dict of patterns and styles, or None for the model's own")
    modules = dict(model.named_modules())
    found: dict[str, tuple[str, int]] = {}
    by: dict[str, str] = {}
    for pattern, style in plan.items():
        if not (isinstance(pattern, str) and isinstance(style, str)):
            raise MplabError(f"the plan has {pattern!r}: {style!r}; both must be strings")
        paths = [path for path in modules if matches(pattern, path)]
        if not paths:
            generic = sorted({re.sub(r"(?<![^.])\d+(?![^.])", "*", path) for path in modules if path})
            near = difflib.get_close_matches(pattern, generic, 3, 0.3) or generic[:3]
            raise MplabError(f"the plan's {pattern!r} names no module of this {type(model).__name__}: has it {near}?")
        for path in paths:
            if path in by:
                raise MplabError(
                    f"the plan has two entries for {path}: {by[path]!r} ({plan[by[path]]!r}) and {pattern!r} "
                    f"({style!r}); each module needs one at most"
                )
            by[path] = pattern
            found[path] = _checked(path, modules, style, num_ranks)
    if not any(style not in MODULE_STYLES for style, _ in found.values()):
        raise MplabError("the plan cuts no layer: give one or more the style column, row or vocab")
    _check_shared(model, found)
    _check_sequence(model, found, sequence_parallel)
    return found


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern stands for the module at this path."""
    return _regex(pattern).fullmatch(path) is not None


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    """A plan's patterns are matched with every module, and there are few of them."""
    return re.compile("[^.]+".join(map(re.escape, pattern.split("*"))))


def _checked(path: str, modules: Mapping[str, nn.Module], style: str, num_ranks: int) -> tuple[str, int]:
    """The style of a module, which can have it."""
    module: Any = modules[path]
    name, _, count = HUGGING_FACE_STYLES.get(style, style).partition(":")
    if name not in STYLES or (count and not (name == "column" and count.isdecimal() and int(count))):
        raise MplabError(
            f"{path}: style {style!r} is not known. Known are {', '.join(STYLES)}, and of Hugging Face's "
            f"{', '.join(HUGGING_FACE_STYLES)}"
        )
    num_parts = int(count or 1)
    if name in MODULE_STYLES:
        return name, 1
    is_embedding = isinstance(module, nn.Embedding)
    if not (is_linear(module) or (is_embedding and name == "vocab")):
        raise MplabError(
            f"{path} is a {type(module).__name__}, and {style!r} is for "
            f"{'linear layers and embeddings' if name == 'vocab' else 'linear layers'}: take it out of the plan"
        )
    if not is_plain(module):
        raise MplabError(
            f"{path} is a {type(module).__name__} with a forward of its own, which a layer that is cut would not run: "
            "take it out of the plan"
        )
    size = module.num_embeddings if is_embedding else sizes_of(module)[name != "row"]
    what = "inputs" if name == "row" else "tokens" if is_embedding else "outputs"
    joined = f" in {num_parts} joined matrices" if num_parts > 1 else ""
    parent: Any = modules[path.rpartition(".")[0]]
    head_size = next((getattr(parent, attribute) for attribute in HEAD_SIZES if hasattr(parent, attribute)), None)
    if head_size is not None and name == "column" and size % (num_parts * head_size) == 0:
        num_heads = size // num_parts // head_size
        if num_heads % num_ranks:
            raise MplabError(
                f"{path} has {num_heads} heads of {head_size}{joined}, and {num_ranks} ranks can't each have the same "
                f"number of them: choose tp from {_divisors(num_heads)}"
            )
    if size % (num_ranks * num_parts):
        raise MplabError(
            f"{path} has {size} {what}{joined}, and {num_ranks} ranks can't each have the same number of them: choose "
            f"tp from {_divisors(size // num_parts)}"
        )
    return name, num_parts


def _divisors(size: int) -> str:
    return ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)


def _check_shared(model: nn.Module, found: Mapping[str, tuple[str, int]]) -> None:
    """Layers that share a parameter must be cut alike."""
    users: dict[nn.Parameter, list[str]] = {}
    cut = {path for path, (style, _) in found.items() if style not in MODULE_STYLES}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if is_linear(module) or isinstance(module, nn.Embedding):
                users.setdefault(parameter, []).append(path)
    for paths in users.values():
        cuts = {path: found[path] if path in cut else ("not in it", 1) for path in paths}
        alike = {"column", "column_gather", "vocab"}
        if len({("column" if style in alike else style, count) for style, count in cuts.values()}) > 1:
            said = ", ".join(f"{path}: {style}" + f":{count}" * (count > 1) for path, (style, count) in cuts.items())
            raise MplabError(f"one parameter is used by layers that the plan cuts differently ({said}): cut them alike")


def _check_sequence(model: nn.Module, found: dict[str, tuple[str, int]], sequence_parallel: bool) -> None:
    """One place from which on the sequence is cut, and no parameter that is used on both sides of where that ends."""
    places = {name: [path for path, (style, _) in found.items() if style == name] for name in ("scatter", "gather")}
    if not sequence_parallel:
        for path in (*places["scatter"], *places["gather"]):
            del found[path]
        return
    if len(places["scatter"]) != 1 or len(places["gather"]) > 1:
        raise MplabError(
            f"sequence parallelism needs one module from which on the sequence is cut, and at most one after which it "
            f"is whole: the plan has {places['scatter']} as scatter and {places['gather']} as gather. "
            'Say for example {"blocks.0": "scatter"}'
        )
    before, after = whole_zones(model, found)
    for path, (style, _) in found.items():
        if path in before and style in ("column", "column_gather", "row"):
            raise MplabError(
                f"{path} ({style}) comes before {places['scatter'][0]}, from which on the sequence is cut, and would "
                "get the gradient of this rank's part alone: let the scatter come before all layers that are cut"
            )
    users: dict[nn.Parameter, list[str]] = {}
    for path, module in model.named_modules():
        for p in module.parameters(recurse=False) if path not in found else ():
            users.setdefault(p, []).append(path)
    for p, paths in users.items():
        if p.requires_grad and 0 < len(after.intersection(paths)) < len(paths):
            raise MplabError(
                f"{' and '.join(paths)} share a parameter, and not all of them come after {places['gather'][0]}, where "
                "the sequence is whole again: some of its gradient is a part and some is not. Cut them too (vocab), or "
                "take sequence_parallel=False"
            )


def _after(model: nn.Module, places: list[str]) -> set[str]:
    """The modules that come after one of these, and are not inside it, in the order in which they were made."""
    paths = [path for path, _ in model.named_modules()]
    return {
        path
        for place in places
        for path in paths[paths.index(place) :]
        if path != place and not path.startswith(f"{place}.")
    }


def whole_zones(model: nn.Module, found: Mapping[str, tuple[str, int]]) -> tuple[set[str], set[str]]:
    """Modules before the sequence is cut, and after it is whole again; everything is in the first without a scatter."""
    paths = [path for path, _ in model.named_modules()]
    scatter = next((path for path, (style, _) in found.items() if style == "scatter"), None)
    before = set(paths if scatter is None else paths[: paths.index(scatter)])
    return before, _after(model, [path for path, (style, _) in found.items() if style == "gather"])
