"""The rows of the table of families whose layers mix tokens through states, but for some that
attend; and of those that have experts too.
"""

from functools import partial
from typing import Any

from tests import family
from tests.families.mixtures import EXPERTS, PER_TOKEN
from tests.family import Family, served, sized

# A state takes in many rows: PEFT in float32 is as far from float64 as we are.
_row = partial(served, num_hidden_layers=3, tolerance=2e-5)
_composite = partial(family.composite, tolerance=2e-5)
_LINEAR = ["linear_attention", "full_attention", "linear_attention"]
# Fewer heads of keys than of values, and widths that fill no whole vectors.
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "layer_types": _LINEAR,
}
_SHORT: dict[str, Any] = {"head_dim": None, "layer_types": ["conv", "full_attention", "conv"]}
LFM3: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["conv", "sliding_attention", "conv", "full_attention"],
    "sliding_window": 8,
    "conv_bias": True,
}
_MAMBA: dict[str, Any] = {
    "shared_intermediate_size": 128,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 24,
    "mamba_n_groups": 2,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 3.0,
    "layer_types": _LINEAR,
    "head_dim": None,
}
_EXPERTS = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": PER_TOKEN,
    "moe_intermediate_size": 24,
}
_GATED = {**_EXPERTS, "shared_expert_intermediate_size": 96}
_SIGHT = {
    **{"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2},
    **{"out_hidden_size": 64, "num_position_embeddings": 16},
}
_RULE, _CONVOLUTION = "a state by the gated delta rule", "a state of a short convolution"
_MIXED = f"{_RULE}; experts beside a shared one with a gate"

HYBRIDS: tuple[Family, ...] = (
    _row("Qwen 3.5 of text", "Qwen3_5ForCausalLM", _RULE, **DELTA),
    _row(
        "Qwen3-Next without experts",
        "Qwen3NextForCausalLM",
        _RULE,
        **DELTA,
        mlp_only_layers=[0, 1, 2],
        peft_opens_mlps=False,
    ),
    _row(
        "LFM2",
        "Lfm2ForCausalLM",
        _CONVOLUTION,
        **_SHORT,
        block_auto_adjust_ff_dim=False,
        conv_bias=True,
    ),
    _row("LFM3", "Lfm3ForCausalLM", f"{_CONVOLUTION}; a gate for each head", **LFM3),
    _row(
        "Granite 4 hybrid",
        "GraniteMoeHybridForCausalLM",
        "a state of Mamba 2",
        **_MAMBA,
        num_local_experts=0,
    ),
    _row(
        "Bamba",
        "BambaForCausalLM",
        "a state of Mamba 2",
        **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 24, "mamba_n_groups": 2},
        attn_layer_indices=[1],
        head_dim=None,
    ),
    _composite(
        "Qwen 3.5",
        "Qwen3_5ForConditionalGeneration",
        _RULE,
        text_config=sized(**DELTA, num_hidden_layers=3),
        vision_config=_SIGHT,
    ),
)
HYBRID_MIXTURES: tuple[Family, ...] = (
    _row("Qwen 3.5 MoE of text", "Qwen3_5MoeForCausalLM", _MIXED, **DELTA, **_GATED),
    _row(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        _MIXED,
        **DELTA,
        **_GATED,
        norm_topk_prob=True,
        peft_opens_mlps=False,
    ),
    _row(
        "Lara mini",
        "LaraMiniForCausalLM",
        _MIXED,
        **DELTA | {"layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
        **_GATED,
        sliding_window=8,
    ),
    _row(
        "LFM2 MoE",
        "Lfm2MoeForCausalLM",
        f"{_CONVOLUTION}; experts",
        **_SHORT,
        **_EXPERTS,
        num_dense_layers=1,
    ),
    _row(
        "Granite 4 hybrid with experts",
        "GraniteMoeHybridForCausalLM",
        "a state of Mamba 2; experts beside a shared one",
        **_MAMBA,
        intermediate_size=24,
        num_local_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
    ),
    _composite(
        "Qwen 3.5 MoE",
        "Qwen3_5MoeForConditionalGeneration",
        _MIXED,
        text_config=sized(**DELTA, **_GATED, num_hidden_layers=3),
        vision_config=_SIGHT,
    ),
)
# What the longer tests of experts and states are run with by default.
BY_DEFAULT = (
    *("Qwen 3 MoE", "GLM-4.5", "LFM2", "Granite 4 hybrid"),
    *("Qwen 3.5 of text", "Qwen 3.5 MoE of text"),
)
