"""Tiny seeded models whose layers mix tokens through states, but for some that attend."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    Lfm2Config,
    PretrainedConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from tests.models import CONTEXT_LENGTH, VOCABULARY_SIZE, write_tokenizer

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Fewer heads of keys than of values, and widths that fill no whole vectors.
_DELTA: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}


def tiny_qwen3_5(folder: Path, *, tied: bool = False, seed: int = 0, **sizes: Any) -> Path:
    """A text-only dense Qwen3.5 of 3 layers and width 64, the second of which attends."""
    options = {**_SIZES, **_DELTA, "tie_word_embeddings": tied, **sizes}
    return make_hybrid(folder, Qwen3_5TextConfig(**options), seed)


def tiny_qwen3_next(folder: Path, *, seed: int = 0) -> Path:
    """The same as a Qwen3-Next without experts."""
    return make_hybrid(folder, Qwen3NextConfig(**_SIZES, **_DELTA, mlp_only_layers=[0, 1, 2]), seed)


def tiny_qwen3_next_moe(folder: Path) -> Path:
    """With experts, in every layer."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = Qwen3NextConfig(**_SIZES, **_DELTA, **experts, shared_expert_intermediate_size=32)
    return make_hybrid(folder, config, 0)


def tiny_lfm2(folder: Path, *, seed: int = 0) -> Path:
    """An LFM2 of 3 layers and width 64: short convolutions around one layer that attends."""
    config = Lfm2Config(
        **_SIZES,
        block_auto_adjust_ff_dim=False,
        conv_bias=True,
        layer_types=["conv", "full_attention", "conv"],
    )
    return make_hybrid(folder, config, seed)


def tiny_granite_hybrid(folder: Path, *, seed: int = 0) -> Path:
    """A Granite 4 hybrid without experts: Mamba layers around one that attends."""
    config = GraniteMoeHybridConfig(
        **_SIZES,
        num_local_experts=0,
        shared_intermediate_size=128,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=24,
        mamba_n_groups=2,
        attention_multiplier=0.25,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )
    return make_hybrid(folder, config, seed)


def make_hybrid(folder: Path, config: PretrainedConfig, seed: int) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # states that fade slowly: what leaks would be seen
                parameter.uniform_(0.01, 0.3).log_()
            elif "conv" in name and parameter.dim() == 3:
                parameter.normal_(0.0, 0.5)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 0.08)
            elif name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
