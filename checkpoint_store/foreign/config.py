"""PEFT's configuration of somebody else's adapter: what of it is followed, and what refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint_store.adapter_files import CONFIG_FILE
from mint_core.errors import InvalidRequest
from mint_core.lora.spec import LARGEST_FLOAT32

# What is neither followed nor changes what the weights mean. Dropout belongs to training; here
# there is none.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
}
_FOLLOWED = {
    "base_model_name_or_path",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Of `init_lora_weights`: the others change the base model's weights too, or are unknown.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_REMEDIES = {
    "bias": "train without biases",
    "modules_to_save": "train those modules with LoRA, or leave them out",
    "use_dora": "train plain LoRA, or merge it into a base model and serve that",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignConfig:
    rank: int
    alpha: float
    use_rslora: bool
    base_model: str  # as the adapter names it; empty: it does not
    target_modules: tuple[str, ...] | None  # None: by a pattern
    partial: bool  # whether fewer modules may be trained than `target_modules` match


def read_config(encoded: bytes) -> ForeignConfig:
    """Reads `adapter_config.json`. Raises InvalidRequest, naming what is not supported."""
    try:
        config = json.loads(encoded)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise refused("", f"`{CONFIG_FILE}` is no JSON object; send the one that PEFT wrote")
    _check_features(config)
    targets = _target_modules(config)
    return ForeignConfig(
        rank=_rank(config),
        alpha=_alpha(config),
        use_rslora=_flag(config, "use_rslora"),
        base_model=_base_model(config),
        target_modules=targets,
        partial=any(
            config.get(name) not in (None, [], "")
            for name in ("layers_to_transform", "layers_pattern", "exclude_modules")
        ),
    )


def refused(name: str, message: str, **metadata: object) -> InvalidRequest:
    """What is wrong with an option."""
    return InvalidRequest(
        message, field=f"{CONFIG_FILE}.{name}" if name else CONFIG_FILE, **metadata
    )


def _check_features(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise _unsupported(config, "peft_type", 'only "LORA" is')
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise _unsupported(config, "task_type", 'only "CAUSAL_LM" is')
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise _unsupported(
            config,
            "init_lora_weights",
            "it may have changed the base model's weights; convert the adapter to plain LoRA "
            "(`path_initial_model_for_weight_conversion` of PEFT's save_pretrained)",
        )
    for name, value in config.items():
        if name in _FOLLOWED or name in _WITHOUT_EFFECT:
            continue
        if value and not (name == "bias" and value == "none"):
            raise _unsupported(config, name, _REMEDIES.get(name, "train without it"))


def _unsupported(config: Mapping[str, Any], name: str, remedy: str) -> InvalidRequest:
    value = _brief(config.get(name))
    return refused(
        name, f"`{CONFIG_FILE}` sets `{name}` to {value}, which is not supported; {remedy}"
    )


def _odd(config: Mapping[str, Any], name: str, remedy: str) -> InvalidRequest:
    value = _brief(config.get(name))
    return refused(name, f"`{CONFIG_FILE}` has `{name}` {value}; {remedy}")


def _rank(config: Mapping[str, Any]) -> int:
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise refused("r", f"`{CONFIG_FILE}` has the rank `r` {_brief(rank)}; it is at least 1")
    return rank


def _alpha(config: Mapping[str, Any]) -> float:
    alpha: Any = config.get("lora_alpha")
    if type(alpha) not in (int, float) or not 0 < alpha <= LARGEST_FLOAT32:
        raise _odd(config, "lora_alpha", "it is above 0, and a float32 holds it")
    return float(alpha)


def _flag(config: Mapping[str, Any], name: str) -> bool:
    flag = config.get(name, False)
    if type(flag) is not bool:
        raise _odd(config, name, "it is true or false")
    return flag


def _base_model(config: Mapping[str, Any]) -> str:
    name = config.get("base_model_name_or_path")
    if name is not None and type(name) is not str:
        raise _odd(config, "base_model_name_or_path", "it is a text")
    return name or ""


def _target_modules(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    targets = config.get("target_modules")
    if type(targets) is str and targets:
        return None  # a regular expression, or "all-linear": the tensors tell which
    if type(targets) is list and targets and all(type(target) is str for target in targets):
        return tuple(targets)
    raise _odd(config, "target_modules", "name at least one module")


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:76] + " ..."
