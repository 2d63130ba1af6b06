"""What an adapter is, without its weights. Free of torch, so that fronts and stores can speak of it
too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DEFAULT_ALPHA = 32.0
RANK_STEP = 8  # ranks are stored as multiples of it
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

# Adapter weights on their way between processes: PEFT's tensor names to float32 arrays, such as
# "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" [rank, in] and
# "...lora_B.weight" [out, rank].
AdapterArrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRequest:
    """A `LoraConfig` as the caller wrote it, defaults filled in but for `seed` and the modules."""

    rank: int
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    alpha: float = DEFAULT_ALPHA
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """A resolved adapter."""

    rank: int
    alpha: float
    use_rslora: bool
    seed: int
    modules: tuple[str, ...]  # full names of the trained linear layers, sorted

    @property
    def scale(self) -> float:
        return within_float32(self.alpha / (self.rank**0.5 if self.use_rslora else self.rank))


def within_float32(number: float) -> float:
    """The number, or infinity where no float32 holds it: torch refuses it as an argument."""
    return float(number) if abs(number) <= LARGEST_FLOAT32 else math.copysign(math.inf, number)


def stored_rank(rank: int) -> int:
    """The rank under which an adapter lies in memory."""
    return -(-rank // RANK_STEP) * RANK_STEP


def lora_a_name(module: str) -> str:
    """PEFT's name of a module's A."""
    return f"base_model.model.{module}.lora_A.weight"


def lora_b_name(module: str) -> str:
    """PEFT's name of a module's B."""
    return f"base_model.model.{module}.lora_B.weight"
