"""Tiny seeded mixtures of experts, one of each family that is served, as `tests.models` makes
dense ones. Where they have a width of their own, experts' widths are no multiples of what a CPU
computes at once, and nor are their numbers.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Gemma4TextConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from tests.models import CONTEXT_LENGTH, VOCABULARY_SIZE, write_tokenizer

EXPERTS, PER_TOKEN = 6, 2
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,  # of dense layers, and where it is the only one of experts
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_HEADS = {"head_dim": 16}
_OWN = {"moe_intermediate_size": 24, "num_experts_per_tok": PER_TOKEN}
_SHARED = {"n_routed_experts": EXPERTS, "n_shared_experts": 4, "routed_scaling_factor": 1.7}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
}
_WINDOWED = {
    "head_dim": 32,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": EXPERTS,
    "top_k_experts": PER_TOKEN,
    "moe_intermediate_size": 24,
}


def _config(kind: type[PretrainedConfig], **options: Any) -> PretrainedConfig:
    return kind(**{**_SIZES, **options})


# A layer of Qwen3-MoE, DeepSeek, GLM and ERNIE is dense. DeepSeek's router chooses groups first.
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3-moe": partial(
        _config,
        Qwen3MoeConfig,
        **_HEADS,
        **_OWN,
        num_experts=EXPERTS,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "mixtral": partial(
        _config, MixtralConfig, **_HEADS, num_local_experts=EXPERTS, num_experts_per_tok=PER_TOKEN
    ),
    "olmoe": partial(_config, OlmoeConfig, num_experts=EXPERTS, num_experts_per_tok=PER_TOKEN),
    "deepseek-v3": partial(
        _config,
        DeepseekV3Config,
        **{**_OWN, **_SHARED, **_LATENT},
        n_group=3,
        topk_group=2,
        first_k_dense_replace=1,
    ),
    "glm-4.5": partial(
        _config, Glm4MoeConfig, **_HEADS, **_OWN, **_SHARED, first_k_dense_replace=1
    ),
    "glm-4.7-flash": partial(_config, Glm4MoeLiteConfig, **{**_OWN, **_SHARED, **_LATENT}),
    "gemma-4": partial(_config, Gemma4TextConfig, **_WINDOWED),
    "granite-moe": partial(
        _config,
        GraniteMoeConfig,
        num_local_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        embedding_multiplier=3.0,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
    ),
    "ernie-4.5-moe": partial(
        _config,
        Ernie4_5_MoeConfig,
        moe_intermediate_size=24,
        moe_num_experts=EXPERTS,
        moe_k=PER_TOKEN,
        moe_num_shared_experts=4,
    ),
}


def tiny_mixture(folder: Path, family: str = "qwen3-moe", *, seed: int = 0) -> Path:
    """Of 3 layers and width 64, with 6 experts, of which a token goes to 2."""
    return make_mixture(folder, CONFIGS[family](), seed=seed)


def make_mixture(folder: Path, config: PretrainedConfig, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if name.endswith(("e_score_correction_bias", "per_expert_scale")):
                values.uniform_(0.95, 1.05)  # as after training: it changes choices
            elif values.dim() > 1:  # wider than the default, so that logits differ visibly
                values.normal_(0.0, 0.08)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
