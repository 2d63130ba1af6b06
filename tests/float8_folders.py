"""Model folders whose weights are float8, as others publish them, and what they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mint_core.lora.float8 import NUMBERS, quantized

Tensors = dict[str, Tensor]
BLOCK = 32  # channels and inputs of a scale: the tiny model's layers have several
LARGEST = 448.0
WEIGHTS = "model.safetensors"


def is_in_body(name: str, weight: Tensor) -> bool:
    """Whether float8 weights are made of it."""
    return weight.dim() == 2 and "embed" not in name and "lm_head" not in name


def stands_for(folder: Path, to: Path) -> Path:
    """A folder of what the float8 weights that are made of another's stand for, in float32."""
    return rewritten(
        folder,
        to,
        lambda name, weight: {name: quantized(weight).weight(torch.float32)},
    )


def written_out(folder: Path, to: Path) -> Path:
    """A folder of what the numbers and scales of another's files stand for, in float32."""
    tensors = load_file(folder / WEIGHTS)

    def out(name: str, weight: Tensor) -> Tensors:
        if name.endswith(("_scale", "_scale_inv")):
            return {}
        if (scales := tensors.get(f"{name}_scale_inv")) is not None:
            scales = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        elif (scales := tensors.get(f"{name}_scale")) is None:
            return {name: weight}
        return {name: weight.float() * scales.float()}

    plain = rewritten(folder, to, out)
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    return plain


def in_blocks(folder: Path, to: Path) -> Path:
    """As DeepSeek and Qwen publish them: a scale for each block, of any value."""

    def blocks(name: str, weight: Tensor) -> Tensors:
        out, inner = weight.shape
        cut = weight.view(out // BLOCK, BLOCK, inner // BLOCK, BLOCK)
        scales = cut.abs().amax((1, 3)) / LARGEST
        numbers = (cut / scales[:, None, :, None]).to(NUMBERS).view(out, inner)
        return {name: numbers, f"{name}_scale_inv": scales}

    said = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    return rewritten(folder, to, blocks, said)


def by_channel(folder: Path, to: Path) -> Path:
    """As compressed-tensors has them, scales in bfloat16; one layer is left as it was."""

    def channels(name: str, weight: Tensor) -> Tensors:
        if "layers.0.mlp.down_proj" in name:
            return {name: weight}
        scales = (weight.abs().amax(1, keepdim=True) / LARGEST).to(torch.bfloat16)
        numbers = (weight / scales.float()).clamp(-LARGEST, LARGEST).to(NUMBERS)
        return {name: numbers, f"{name}_scale": scales}

    return rewritten(folder, to, channels, compressed())


def compressed(**changes: object) -> dict[str, Any]:
    """What a configuration says of such weights."""
    weights = {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True}
    weights |= {"dynamic": False, "observer": "minmax", "group_size": None}
    group = {"weights": {**weights, **changes}, "targets": ["Linear"], "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
        "sparsity_config": {},
    }


def rewritten(
    folder: Path,
    to: Path,
    change: Callable[[str, Tensor], Tensors],
    quantization: dict[str, Any] | None = None,
) -> Path:
    """A copy of a folder with other tensors in the place of weights of its body."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("rows"))
    tensors: Tensors = {}
    for name, weight in load_file(folder / WEIGHTS).items():
        tensors |= change(name, weight) if is_in_body(name, weight) else {name: weight}
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, to / WEIGHTS, {"format": "pt"}
    )
    if quantization is not None:
        say(to, quantization)
    return to


def say(folder: Path, quantization: dict[str, Any]) -> None:
    """Puts into a configuration how its weights are quantized."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
