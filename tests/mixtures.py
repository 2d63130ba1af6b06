"""The rows of the table of families with experts, whose layers all attend. Where experts have a
width of their own, it is no multiple of what a CPU computes at once, and nor is their number.
"""

from functools import partial
from typing import Any

from tests.family import Family, served

EXPERTS, PER_TOKEN = 6, 2
_row = partial(served, num_hidden_layers=3, intermediate_size=96)
_OWN = {"moe_intermediate_size": 24, "num_experts_per_tok": PER_TOKEN}
_SHARED = {"n_routed_experts": EXPERTS, "n_shared_experts": 4, "routed_scaling_factor": 1.7}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
}
_TWO_OF_SIX = {"num_experts_per_tok": PER_TOKEN, "num_local_experts": EXPERTS}

# A layer of Qwen3-MoE, DeepSeek, GLM and ERNIE is dense. DeepSeek's router chooses groups first.
MIXTURES: tuple[Family, ...] = (
    _row(
        "Qwen 3 MoE",
        "Qwen3MoeForCausalLM",
        "experts",
        **_OWN,
        num_experts=EXPERTS,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        peft_opens_mlps=False,
    ),
    _row("Mixtral", "MixtralForCausalLM", "experts", **_TWO_OF_SIX),
    _row(
        "OLMoE",
        "OlmoeForCausalLM",
        "experts",
        num_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        head_dim=None,
    ),
    _row(
        "MiniMax-M2",
        "MiniMaxM2ForCausalLM",
        "experts",
        **{**_TWO_OF_SIX, "intermediate_size": 24},
        rotary_dim=8,
    ),
    _row(
        "Granite MoE",
        "GraniteMoeForCausalLM",
        "experts",
        **_TWO_OF_SIX,
        embedding_multiplier=3.0,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
    ),
    _row(
        "Qwen 2 MoE",
        "Qwen2MoeForCausalLM",
        "experts beside a shared one with a gate",
        **_OWN,
        num_experts=EXPERTS,
        shared_expert_intermediate_size=96,
        head_dim=None,
    ),
    _row(
        "GLM-4.5",
        "Glm4MoeForCausalLM",
        "experts beside a shared one",
        **_OWN,
        **_SHARED,
        first_k_dense_replace=1,
        peft_opens_mlps=False,
    ),
    _row(
        "ERNIE 4.5 MoE",
        "Ernie4_5_MoeForCausalLM",
        "experts beside a shared one",
        moe_intermediate_size=24,
        moe_num_experts=EXPERTS,
        moe_k=PER_TOKEN,
        moe_num_shared_experts=4,
        peft_opens_mlps=False,
    ),
    _row(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        "experts beside a shared one, chosen by groups",
        **_OWN,
        **_SHARED,
        **_LATENT,
        n_group=3,
        topk_group=2,
        first_k_dense_replace=1,
        peft_opens_mlps=False,
    ),
    _row(
        "GLM-4.7-Flash",
        "Glm4MoeLiteForCausalLM",
        "experts beside a shared one, chosen by groups",
        **_OWN,
        **_SHARED,
        **_LATENT,
        peft_opens_mlps=False,
    ),
    _row(
        "Gemma 4 MoE of text",
        "Gemma4ForCausalLM",
        "experts beside an MLP",
        head_dim=32,
        global_head_dim=64,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=EXPERTS,
        top_k_experts=PER_TOKEN,
        moe_intermediate_size=24,
    ),
)
