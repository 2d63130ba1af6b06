"""Somebody else's adapter in PEFT's layout: checked against the base model, and converted."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint_store.adapter_files import (
    BASE_FINGERPRINT,
    CONFIG_FILE,
    EXP_AVG,
    EXP_AVG_SQ,
    OPTIMIZER_FILE,
    STEP,
    WEIGHTS_FILE,
    Moments,
    with_prefix,
)
from checkpoint_store.foreign.base_copies import check_base_copies
from checkpoint_store.foreign.config import ForeignConfig, read_config, refused
from checkpoint_store.foreign.tensor_file import TensorFile
from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import BaseModelNotFound
from mint_core.lora.row_layout import Floats
from mint_core.lora.spec import AdapterSpec, lora_a_name, lora_b_name

# Keys may hold the adapter's name, as in a state dict of the model that PEFT wraps.
_ADAPTER_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_[AB](\.[^.]+)?\.weight")
_UNSUPPORTED_TENSORS = {  # parts of names, and what they are of
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "an embedding's adapter",
    "lora_B.bias": "a bias of an adapter",
    "modules_to_save": "a module that was trained whole",
}


@dataclass(frozen=True, slots=True)
class ForeignAdapter:
    """Arrays have PEFT's names. Without optimizer state there are no moments."""

    spec: AdapterSpec
    weights: Mapping[str, Floats]
    moments: Moments | None
    step: int


def read_foreign_adapter(
    folder: Path, model: ModelDescription, base_model: str = ""
) -> ForeignAdapter:
    """Reads a folder of PEFT's two files, with or without `optimizer.safetensors`. Raises
    InvalidRequest with the name of whatever is wrong. `base_model` stands for the configuration's.
    """
    config = read_config((folder / CONFIG_FILE).read_bytes())
    _check_base(config, model, base_model)
    if config.rank > model.max_lora_rank:
        raise refused(
            "r",
            f"`{CONFIG_FILE}` has rank {config.rank} but the largest rank served here is "
            f"{model.max_lora_rank}; start the trainer with a larger --max-lora-rank",
            rank=config.rank,
            max_lora_rank=model.max_lora_rank,
        )
    file = TensorFile(folder / WEIGHTS_FILE, WEIGHTS_FILE)
    _check_fingerprint(file, model)
    modules, adapter, others = _modules(file)
    _check_modules(file, modules, config, model)
    shapes = _shapes(modules, config.rank, model)
    called = {
        f"{name.removesuffix('.weight')}{adapter}.weight": shape for name, shape in shapes.items()
    }
    weights = dict(zip(shapes, _arrays(file, called).values(), strict=True))
    check_base_copies(file, others, model)
    spec = AdapterSpec(
        rank=config.rank,
        alpha=config.alpha,
        use_rslora=config.use_rslora,
        seed=0,  # of which nothing was drawn here
        modules=tuple(sorted(modules)),
    )
    if not (folder / OPTIMIZER_FILE).exists():
        return ForeignAdapter(spec, weights, None, 0)
    optimizer = TensorFile(folder / OPTIMIZER_FILE, OPTIMIZER_FILE)
    return ForeignAdapter(spec, weights, *_moments(weights, optimizer))


def _check_base(config: ForeignConfig, model: ModelDescription, base_model: str) -> None:
    """Names of one model may differ in what comes before the last `/`."""
    if base_model:
        if base_model != model.name:
            raise BaseModelNotFound(base_model, model.name)
        return
    named = config.base_model
    if named.rstrip("/").rpartition("/")[2] != model.name.rpartition("/")[2]:
        raise refused(
            "base_model_name_or_path",
            f"`base_model_name_or_path` of `{CONFIG_FILE}` is {named!r} and this server serves "
            f"{model.name!r}; upload where the adapter's base model is served, or, if it is the "
            "same model, say so with `base_model`",
            base_model=named,
            served=model.name,
        )


def _check_fingerprint(file: TensorFile, model: ModelDescription) -> None:
    """An adapter that was downloaded from a server tells which base it belongs to."""
    theirs = file.metadata.get(BASE_FINGERPRINT, "")
    if theirs and not model.opens(theirs):
        remedy = model.remedy(theirs, "upload where its own base model is served")
        raise file.refused(
            f"was trained on a base model with fingerprint {theirs[:64]}, and {model.name!r} has "
            f"{model.fingerprint}; {remedy}",
            base_fingerprint=theirs,
        )


def _modules(file: TensorFile) -> tuple[set[str], str, list[str]]:
    """The adapted modules, what keys have of the adapter's name, and the tensors that are no A or
    B.
    """
    modules, adapters, others = set[str](), set[str](), []
    for name in file.tensors:
        if match := _ADAPTER_TENSOR.fullmatch(name):
            modules.add(match[1])
            adapters.add(match[2] or "")
            continue
        for part, what in _UNSUPPORTED_TENSORS.items():
            if part in name:
                raise file.refused(
                    f"holds `{name}`, which is {what} and not supported; train plain LoRA",
                    tensor=name,
                )
        others.append(name)
    if not modules:
        raise file.refused("holds no adapter: no tensor is called as PEFT calls A and B")
    if len(adapters) > 1:
        named = ", ".join(f"`lora_A{adapter}.weight`" for adapter in sorted(adapters))
        raise file.refused(f"holds several adapters, as {named} tell; send them one by one")
    return modules, adapters.pop(), others


def _check_modules(
    file: TensorFile, modules: set[str], config: ForeignConfig, model: ModelDescription
) -> None:
    """Refuses modules that the base model lacks, or the configuration does not ask for."""
    for module in sorted(modules.difference(model.linear_modules)):
        raise file.refused(
            f"adapts `{module}`, and {model.name!r} has no such linear layer; the adapter belongs "
            "to another model",
            module=module,
        )
    targets = config.target_modules
    if targets is None:
        return
    asked = {module for module in model.linear_modules if _matches(module, targets)}
    for module in sorted(modules - asked):
        raise refused(
            "target_modules",
            f"`{WEIGHTS_FILE}` adapts `{module}`, which `target_modules` does not name; send the "
            "two files of one adapter",
            module=module,
        )
    for module in sorted(asked - modules) if not config.partial else ():
        raise refused(
            "target_modules",
            f"`target_modules` names `{module}`, of which `{WEIGHTS_FILE}` has no tensors; it is "
            "not whole",
            module=module,
        )


def _matches(module: str, targets: Iterable[str]) -> bool:
    """As PEFT has it: a full name, or the end of one."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _shapes(modules: set[str], rank: int, model: ModelDescription) -> dict[str, tuple[int, ...]]:
    """What A and B of the modules must be."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, (out, width) in zip(model.linear_modules, model.linear_shapes, strict=True):
        if module in modules:
            shapes[lora_a_name(module)] = (rank, width)
            shapes[lora_b_name(module)] = (out, rank)
    return shapes


def _arrays(
    file: TensorFile, shapes: Mapping[str, tuple[int, ...]], prefix: str = ""
) -> dict[str, Floats]:
    """Those tensors, whole and finite."""
    arrays = {}
    for wanted, shape in shapes.items():
        name = prefix + wanted
        if name not in file.tensors:
            raise file.refused(f"lacks `{name}`; it is not whole", tensor=name)
        found = file.tensors[name].shape
        if found != shape:
            raise file.refused(
                f"holds `{name}` in the shape {list(found)}; the rank of `{CONFIG_FILE}` and the "
                f"base model's layer need {list(shape)}",
                tensor=name,
            )
        arrays[name] = file.float32(name)
        if not np.isfinite(arrays[name]).all():
            raise file.refused(
                f"holds NaN, Inf or more than float32 can in `{name}`; adapters must be finite",
                tensor=name,
            )
    return arrays


def _moments(weights: Mapping[str, Floats], file: TensorFile) -> tuple[Moments, int]:
    """Of the weights, and after how many steps."""
    step = file.metadata.get(STEP, "")
    if re.fullmatch(r"[0-9]{1,18}", step, re.ASCII) is None:
        raise file.refused(
            f"does not say after how many steps it was saved ({step!r}); send the one that a "
            "download of training state has, or none"
        )
    shapes = {name: array.shape for name, array in weights.items()}
    moments = _arrays(file, shapes, EXP_AVG) | _arrays(file, shapes, EXP_AVG_SQ)
    for name in sorted(set(file.tensors) - set(moments)):
        raise file.refused(f"holds `{name}`, which belongs to no weight", tensor=name)
    exp_avg_sq = with_prefix(moments, EXP_AVG_SQ)
    for name, array in exp_avg_sq.items():
        if (array < 0).any():
            raise file.refused(
                f"has negative numbers in `{EXP_AVG_SQ}{name}`, a mean of squares", tensor=name
            )
    return (with_prefix(moments, EXP_AVG), exp_avg_sq), int(step)
