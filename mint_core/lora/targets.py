"""Which linear layers an adapter trains, and how its A is drawn."""

import hashlib
import secrets
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mint_core.errors import InvalidRequest
from mint_core.lora.groups import LinearShape
from mint_core.lora.spec import AdapterSpec, LoraRequest, lora_a_name, lora_b_name

HEAD = "lm_head"  # name of the output head in every causal LM that transformers gives one


def linear_shapes(model: nn.Module, frozen: Collection[str] = ()) -> dict[str, LinearShape]:
    """The linear layers that LoRA can train, by full name: all but those that are, or are in, the
    modules `frozen`.
    """
    without = tuple(f"{name}." for name in frozen)
    return {
        name: LinearShape(module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not f"{name}.".startswith(without)
    }


def resolve(request: LoraRequest, modules: Sequence[str]) -> AdapterSpec:
    """Fills in what the caller left open. Target names match as in PEFT: a full name or the end of
    one.
    """
    chosen = (
        _named(request.target_modules, modules)
        if request.target_modules
        else _switched(request, modules)
    )
    seed = request.seed if request.seed is not None else secrets.randbelow(2**63)
    return AdapterSpec(
        rank=request.rank,
        alpha=request.alpha,
        use_rslora=request.use_rslora,
        seed=seed,
        modules=tuple(sorted(chosen)),
    )


def _named(target_modules: Sequence[str], modules: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for name in target_modules:
        matching = {key for key in modules if f".{key}".endswith(f".{name}")}
        if not matching:
            raise InvalidRequest(
                f"`target_modules` names {name!r}, which no linear layer of the base model matches;"
                f" layers are called {', '.join(sorted({key.split('.')[-1] for key in modules}))}",
                field="lora_config.target_modules",
                target_module=name,
            )
        chosen |= matching
    return chosen


def _switched(request: LoraRequest, modules: Sequence[str]) -> set[str]:
    wanted = {
        "attn": request.train_attn,
        "mlp": request.train_mlp,
        "unembed": request.train_unembed,
    }
    chosen = {name for name in modules if wanted[group(name)]}
    if not chosen:
        raise InvalidRequest(
            "`train_attn`, `train_mlp` and `train_unembed` leave no linear layer to train; set one "
            "of which the base model has layers",
            field="lora_config",
        )
    return chosen


def group(module: str) -> str:
    """Whether a linear layer belongs to "attn", "mlp" or "unembed"."""
    if module == HEAD:
        return "unembed"
    # Layers with state stand where others have attention.
    names = ("attn", "attention", "conv", "mamba")
    mixing = any(name in part for part in module.split(".") for name in names)
    return "attn" if mixing else "mlp"


def initial_arrays(
    spec: AdapterSpec, shapes: Mapping[str, LinearShape]
) -> dict[str, NDArray[np.float32]]:
    """A Kaiming-uniform as in PEFT (bound 1 / sqrt(in_features)), B zero.

    Each module's A comes from a counter generator keyed by (seed, module): the same on every
    device, whatever else is trained.
    """
    arrays = {}
    for module in spec.modules:
        shape = shapes[module]
        key = hashlib.sha256(f"{spec.seed}:{module}".encode()).digest()[:16]
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        bound = shape.in_features**-0.5
        draws = generator.random((spec.rank, shape.in_features), dtype=np.float32)
        arrays[lora_a_name(module)] = (2.0 * draws - 1.0) * np.float32(bound)
        arrays[lora_b_name(module)] = np.zeros((shape.out_features, spec.rank), np.float32)
    return arrays
