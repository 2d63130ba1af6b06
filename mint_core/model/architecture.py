"""What a model's classes and configuration must be for packed streams to compute what it does.

A probe (proof.py) compares logits; here is what shows only beyond a probe's length, or with
adapters.
"""

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mint_core.errors import FailedPrecondition
from mint_core.lora.groups import ModuleCall
from mint_core.lora.targets import HEAD
from mint_core.model.routing import RoutedLayer, Routing

_LAYER_TYPES = ("full_attention", "sliding_attention")
# What a model's code raises over a call that it was not written for.
_FAULTS = (RuntimeError, TypeError, ValueError, ImportError, AttributeError, LookupError)


def text_part(model: nn.Module) -> nn.Module:
    """The part that makes hidden states of tokens. What a model has beside it for images and sounds
    is taken out: no tokens go there.
    """
    text: nn.Module = model.get_decoder()  # type: ignore[operator]
    if type(getattr(text, "config", None)) is not type(text_config(model)):
        raise unsupported(model, "no part of it makes hidden states of tokens alone")
    if reads_more_than_text(model):
        whole: Any = model.base_model
        for name, part in list(whole.named_children()):
            if text not in part.modules():
                delattr(whole, name)
    return text


def reads_more_than_text(model: nn.Module) -> bool:
    return text_config(model) is not model.config


def text_config(model: nn.Module) -> Any:
    """The configuration of the part that reads and writes text, often of the whole."""
    return model.config.get_text_config()  # type: ignore[union-attr,operator]


def check_architecture(
    model: nn.Module,
    text: nn.Module,
    routed: Sequence[RoutedLayer] = (),
    mixing: Mapping[int, nn.Module] | None = None,
) -> None:
    """Refuses, by name, what is not made of linear and embedding layers, but for experts and their
    routers in the layers `routed` and layers that have a mixer of ours, or attends in a way of its
    own.
    """
    mixing = mixing or {}
    layers = enumerate(getattr(text.config, "layer_types", None) or ())
    kinds = {kind for i, kind in layers if i not in mixing} - set(_LAYER_TYPES)
    if kinds:
        raise unsupported(model, f"its layers are of the kind {sorted(kinds)[0]!r}")
    if mixing and len(mixing) == text_config(model).num_hidden_layers:
        raise unsupported(model, "none of its layers has attention alone")
    known = {name for layer in routed for name in (layer.experts, layer.router)}
    ours = {part for module in mixing.values() for part in module.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            _check_size(model, name, module)
        if isinstance(module, nn.Linear | nn.Embedding) or module in ours:
            continue
        if not known.isdisjoint(parents(name)):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                raise unsupported(
                    model,
                    f"its layer `{name}` ({type(module).__name__}) has weights but is no nn.Linear",
                )
    if not isinstance(dict(model.named_modules()).get(HEAD), nn.Linear):
        raise unsupported(model, f"it has no linear layer `{HEAD}`")
    # Models with mixers say no; that each layer runs once shows when they are proved.
    if not mixing and not text.is_backend_compatible():  # type: ignore[operator]
        raise unsupported(model, "its attention does not go through transformers' registry")


def _check_size(model: nn.Module, name: str, linear: nn.Linear) -> None:
    """Of a head, which may be the embedding's weight where the configuration names two sizes."""
    said, has = (linear.out_features, linear.in_features), tuple(linear.weight.shape)
    if has != said:
        raise unsupported(
            model, f"its layer `{name}` should be {said} by its configuration but is {has}"
        )


def check_rows(model: nn.Module, calls: Sequence[ModuleCall], tokens: int) -> None:
    """Refuses a model with a linear layer that does not read one row for each token of a pass, in
    their order: an adapter would be applied to the rows of others.
    """
    for call in calls:
        if isinstance(call.module, nn.Linear):
            rows = call.arguments[0].numel() // call.module.in_features
            if rows != tokens:
                raise unsupported(
                    model, f"its layer `{call.name}` reads {rows} rows for {tokens} tokens"
                )


@torch.no_grad()
def logit_factor(
    model: nn.Module, text: nn.Module, calls: Sequence[ModuleCall], logits: Tensor
) -> float:
    """What a model multiplies the product of head and hidden states with: of the numbers that its
    configuration may have for it, the one that gives the logits [tokens, V] of a pass.
    """
    config = text_config(model)
    named = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling")]
    if width := getattr(config, "dim_model_base", None):
        named.append(width / config.hidden_size)
    factors = [1.0]
    for value in filter(None, named):  # some multiply with it, some divide
        factors += [float(value), 1.0 / value]
    (hidden,) = (call.output.last_hidden_state for call in calls if call.module is text)
    plain = model.get_submodule(HEAD)(hidden).float().flatten(0, -2)
    return min(factors, key=lambda factor: float((plain * factor - logits).abs().max()))


def parents(name: str) -> Iterator[str]:
    """The name of a module, and of those that it is in."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def check_experts(model: nn.Module, routing: Routing) -> None:
    """Refuses a model whose experts did not all go through our function in the pass before, or are
    not alike in all layers.
    """
    widths = {index.shape[1] for index in routing.chosen}
    counts = {layer.count for layer in routing.layers}
    if len(routing.chosen) < len(routing.layers):
        raise unsupported(
            model,
            f"{len(routing.layers)} of its layers have experts but those of {len(routing.chosen)} "
            "go through transformers' registry",
        )
    if len(widths) > 1 or len(counts) > 1:
        raise unsupported(
            model,
            f"its layers have {sorted(counts)} experts and a token goes to {sorted(widths)} of "
            "them, which should be the same in all",
        )


def check_layers(model: nn.Module, calls: Counter[int]) -> None:
    """Refuses a model whose attention, or mixer, does not run once in each layer: a cache keeps one
    set of keys and values, or one state, of each.
    """
    layers: int = text_config(model).num_hidden_layers
    once = Counter(range(layers))
    for index in calls | once:
        if calls[index] != once[index]:
            raise unsupported(
                model,
                f"its attention runs {calls[index]} times as layer {index} in a pass over {layers} "
                "layers, of each of which a cache keeps one set of keys and values",
            )


def check_windows(model: nn.Module, seen: Mapping[int, int | None]) -> None:
    """Refuses a model whose layers ask for other windows than its configuration names: its mask
    says what its attention function does not hear.
    """
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(seen)
    wanted = {
        i: window if kind == "sliding_attention" else None
        for i, kind in enumerate(kinds)
        if kind in _LAYER_TYPES
    }
    if wanted != seen:
        raise unsupported(
            model,
            f"its layers attend through windows {sorted(set(seen.values()), key=str)} but its "
            f"configuration names {sorted(set(wanted.values()), key=str)}",
        )


def context_length(model: nn.Module) -> int:
    """Tokens of the longest sequence.

    Rotary embeddings of the kind "longrope" take other frequencies for the whole stream as soon as
    one document in it is longer than the original context; so none may be.
    """
    config = text_config(model)
    if (named := getattr(config, "max_position_embeddings", None)) is None:
        raise unsupported(model, "its configuration does not say how long a sequence may be")
    longest = int(named)
    rope = getattr(config, "rope_parameters", None) or {}
    # Either one set of parameters, or one for each kind of layer.
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") == "longrope":
            longest = min(longest, int(parameters["original_max_position_embeddings"]))
    return longest


@contextmanager
def refusing(model: nn.Module) -> Iterator[None]:
    """Turns what a model's own code raises into a refusal by name."""
    try:
        yield
    except NotImplementedError as error:  # it says what it is
        raise unsupported(model, first_line(error)) from error
    except _FAULTS as error:
        raise unsupported(model, f"it fails on a probe: {first_line(error)}") from error


def unsupported(model: nn.Module, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the base model's architecture {type(model).__name__} is not supported: {why}"
    )


def first_line(error: Exception) -> str:
    """What an exception of a library says, short enough for one line."""
    text = textwrap.shorten(str(error).partition("\n")[0], 200, placeholder=" ...")
    return text.removesuffix(".") or type(error).__name__
