"""The rows of the table of families that are refused, with what is missing."""

from tests.family import Family, refused

_REGISTRY = "its attention does not go through transformers' registry"

_LOOPS = {
    **{"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    **{"num_hidden_layers": 3, "sliding_window": 8},
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_LATENT = {
    **{"num_key_value_heads": 4, "head_dim": None, "q_lora_rank": 24, "kv_lora_rank": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{"index_head_dim": 16, "index_n_heads": 4, "index_topk": 4},
    **{"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"n_group": 1, "topk_group": 1},
}
_INDEXED = "its layers are of the kind 'indexed_attention'"
_LINEAR = "its layers are of the kind 'linear_attention'"
_HEAD = "it has no linear layer `lm_head`"

REFUSED: tuple[Family, ...] = (
    refused("GPT-Neo", "GPTNeoForCausalLM", _REGISTRY, attention_types=[[["global"], 2]]),
    refused("Falcon", "FalconForCausalLM", _REGISTRY, head_dim=None),
    refused("BLOOM", "BloomForCausalLM", _REGISTRY),
    refused("MPT", "MptForCausalLM", _REGISTRY),
    refused("xLSTM", "xLSTMForCausalLM", _REGISTRY, num_heads=4),
    refused("XGLM", "XGLMForCausalLM", _REGISTRY, ffn_dim=128),
    refused("StableLM", "StableLmForCausalLM", _REGISTRY),
    refused(
        "Nemotron",
        "NemotronForCausalLM",
        "its attention (NemotronAttention) is not told where documents begin",
    ),
    refused(
        "Doge",
        "DogeForCausalLM",
        "its attention (DogeAttention) makes a mask of its own",
    ),
    refused("DiffLlama", "DiffLlamaForCausalLM", "its attention runs 2 times as layer 0"),
    refused("HRM-text", "HrmTextForCausalLM", "its attention runs 8 times as layer 0"),
    refused("Dory", "DoryForCausalLM", "its attention runs 2 times as layer 1", **_LOOPS),
    refused("GPT-1", "OpenAIGPTLMHeadModel", "its layer `transformer.h.0.attn.c_attn` (Conv1D)"),
    refused("GPT-2", "GPT2LMHeadModel", "its layer `transformer.h.0.attn.c_attn` (Conv1D)"),
    refused(
        "gpt-oss",
        "GptOssForCausalLM",
        "its layer `model.layers.0.mlp.router` (GptOssTopKRouter) has weights but is no nn.Linear",
        num_local_experts=4,
    ),
    refused(
        "Nemotron-H",
        "NemotronHForCausalLM",
        "its layers are of the kind 'mlp'",
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        **{"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 24, "n_groups": 2},
        **{"moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 32},
    ),
    refused("Falcon-H1", "FalconH1ForCausalLM", "none of its layers has attention alone"),
    refused(
        "Mamba 2",
        "Mamba2ForCausalLM",
        "none of its layers has attention alone",
        **{"num_heads": 8, "head_dim": 16},
    ),
    refused(
        "OLMo hybrid",
        "OlmoHybridForCausalLM",
        "its layers are of the kind 'linear_attention'",
        layer_types=["linear_attention", "full_attention"],
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    ),
    refused(
        "Llama 4",
        "Llama4ForCausalLM",
        "its layers are of the kind 'chunked_attention'",
        **{"intermediate_size_mlp": 128, "num_local_experts": 2, "attention_chunk_size": 8},
        no_rope_layers=[1, 0],
    ),
    refused(
        "MiMo-V2-Flash",
        "MiMoV2FlashForCausalLM",
        "its attention (MiMoV2FlashAttention) uses attention sinks",
        **{"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    refused(
        "Granite SWA",
        "GraniteSWAForCausalLM",
        "its attention (GraniteSWAAttention) uses attention sinks",
    ),
    refused("DeepSeek-V3.2", "DeepseekV32ForCausalLM", _INDEXED, since="5.18", **_LATENT),
    refused("GLM-5", "GlmMoeDsaForCausalLM", _INDEXED, since="5.18", **_LATENT),
    refused("Mamba", "MambaForCausalLM", _LINEAR, state_size=16),
    refused("Falcon Mamba", "FalconMambaForCausalLM", _LINEAR, state_size=16),
    refused("Jamba", "JambaForCausalLM", _LINEAR),
    refused("RecurrentGemma", "RecurrentGemmaForCausalLM", _LINEAR, since="5.23", lru_width=64),
    refused("Kimi Linear", "KimiLinearForCausalLM", _LINEAR, **_LATENT),
    refused(
        "MiniMax",
        "MiniMaxForCausalLM",
        _LINEAR,
        **{"num_local_experts": 6, "num_experts_per_tok": 2},
    ),
    refused(
        "Phi-3.5-MoE",
        "PhimoeForCausalLM",
        "its layer `model.layers.0.mlp.experts` (PhimoeExperts) has weights but is no nn.Linear",
        num_local_experts=6,
    ),
    refused("BioGPT", "BioGptForCausalLM", _HEAD),
    refused("GPT-NeoX Japanese", "GPTNeoXJapaneseForCausalLM", _HEAD, head_dim=None),
)
