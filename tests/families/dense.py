"""The rows of the table of families whose layers all attend, and have no experts."""

from tests.family import Family, served
from tests.models import CONTEXT_LENGTH, SIZES

WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_CAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "logits_scaling": 3.0,
}
_SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": 2 * ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": SIZES["vocab_size"],
}
GEMMA4 = {**_SHARED, "global_head_dim": 32, "final_logit_softcapping": 2.0}
# Their configurations have names of their own for what others call otherwise.
_GPT = {
    **{"n_positions": CONTEXT_LENGTH, "n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4},
    **{"hidden_size": None, "num_hidden_layers": None, "num_attention_heads": None},
    **{"max_position_embeddings": None, "head_dim": None, "rotary_dim": 8},
}

DENSE: tuple[Family, ...] = (
    served("Qwen 3", "Qwen3ForCausalLM", "norms of heads", tie_word_embeddings=True),
    served("Qwen 2", "Qwen2ForCausalLM", "biases of q, k and v", tie_word_embeddings=True),
    served("Llama", "LlamaForCausalLM", "rotary embeddings stretched by length"),
    served(
        "Llama 3",
        "LlamaForCausalLM",
        "rotary embeddings stretched by frequency",
        rope_parameters=_LLAMA3,
    ),
    served("Arcee", "ArceeForCausalLM", "an MLP of two layers"),
    served("Helium", "HeliumForCausalLM", "rotary embeddings of neighbours"),
    served("ERNIE 4.5", "Ernie4_5ForCausalLM", "rotary embeddings of neighbours"),
    served("Seed-OSS", "SeedOssForCausalLM", "biases of q, k and v"),
    # Its class is Llama's.
    served("InternLM3", "LlamaForCausalLM", "biases of q, k and v", attention_bias=True),
    served("Apertus", "ApertusForCausalLM", "an activation with weights", hidden_act="xielu"),
    served(
        "Apertus 1.5 of text",
        "Apertus1p5TextForCausalLM",
        "an activation with weights",
        head_dim=None,
    ),
    served("Hunyuan dense", "HunYuanDenseV1ForCausalLM", "norms of heads"),
    served("nanochat", "NanoChatForCausalLM", "norms of heads", final_logit_softcapping=2.0),
    served("BitNet", "BitNetForCausalLM", "norms within attention and MLP"),
    served("Jais 2", "Jais2ForCausalLM", "an MLP of two layers"),
    served("SmolLM3", "SmolLM3ForCausalLM", "layers without positions", no_rope_layers=[1, 0]),
    served("Mistral", "MistralForCausalLM", "a window", sliding_window=8),
    served("Ministral", "MinistralForCausalLM", "a window", **WINDOW),
    served("StarCoder2", "Starcoder2ForCausalLM", "a window", sliding_window=8),
    served("CWM", "CwmForCausalLM", "a window", **WINDOW, rope_parameters=_LLAMA3),
    served("EXAONE 4", "Exaone4ForCausalLM", "a window", **WINDOW),
    served(
        "Ministral 3",
        "Ministral3ForCausalLM",
        "queries scaled by position",
        rope_parameters={**_YARN, "llama_4_scaling_beta": 0.1},
    ),
    served("GLM", "GlmForCausalLM", "rotary embeddings of a part of each head"),
    served("GLM-4", "Glm4ForCausalLM", "rotary embeddings of a part of each head"),
    served(
        "Phi-3",
        "Phi3ForCausalLM",
        "q, k and v in one layer",
        head_dim=None,
        partial_rotary_factor=0.5,
    ),
    served("Phi", "PhiForCausalLM", "attention beside the MLP", head_dim=None),
    served("GPT-NeoX", "GPTNeoXForCausalLM", "attention beside the MLP", head_dim=None),
    served("Persimmon", "PersimmonForCausalLM", "q, k and v in one layer", head_dim=None),
    served("OLMo", "OlmoForCausalLM", "values changed in place", clip_qkv=0.5, head_dim=None),
    served("OLMo 2", "Olmo2ForCausalLM", "norms over all heads", head_dim=None),
    served("OLMo 3", "Olmo3ForCausalLM", "norms over all heads", **WINDOW, head_dim=None),
    served("Gemma", "GemmaForCausalLM", "scaled embeddings"),
    served("Gemma 2", "Gemma2ForCausalLM", "capped scores and logits", **GEMMA, **_CAPS),
    served("VaultGemma", "VaultGemmaForCausalLM", "capped scores and logits", **GEMMA, **_CAPS),
    served("Gemma 3 of text", "Gemma3ForCausalLM", "two rotary embeddings", **{**GEMMA, **WINDOW}),
    served("Gemma 4 of text", "Gemma4ForCausalLM", "layers that share keys and values", **GEMMA4),
    served(
        "Gemma 4 of text without v",
        "Gemma4ForCausalLM",
        "values made of keys",
        **{**GEMMA4, "num_kv_shared_layers": 0, "attention_k_eq_v": True},
        num_global_key_value_heads=1,
    ),
    served(
        "Gemma 3n of text",
        "Gemma3nForCausalLM",
        "several streams of hidden states",
        **_SHARED,
        laurel_rank=8,
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
        final_logit_softcapping=2.0,
    ),
    served(
        "Gemma 4 unified of text",
        "Gemma4UnifiedForCausalLM",
        "two rotary embeddings",
        **WINDOW,
        final_logit_softcapping=2.0,
    ),
    served("Granite", "GraniteForCausalLM", "a factor of the logits", **_MULTIPLIERS),
    served(
        "Granite 4 of attention alone",
        "GraniteMoeHybridForCausalLM",
        "a factor of the logits",
        **_MULTIPLIERS,
        layer_types=2 * ["full_attention"],
        num_local_experts=0,
        shared_intermediate_size=128,
        position_embedding_type="rope",
    ),
    served("HyperCLOVA X", "HyperCLOVAXForCausalLM", "a factor of the logits", **_MULTIPLIERS),
    served("Cohere", "CohereForCausalLM", "a factor of the logits", logit_scale=0.3),
    served("Cohere 2", "Cohere2ForCausalLM", "a factor of the logits", **WINDOW, logit_scale=0.3),
    served(
        "MiniCPM3", "MiniCPM3ForCausalLM", "a factor of the logits", **_LATENT, dim_model_base=16
    ),
    served("Youtu", "YoutuForCausalLM", "keys and values from a latent", **_LATENT),
    served("GPTBigCode", "GPTBigCodeForCausalLM", "learned positions", n_inner=128, head_dim=None),
    served("OPT", "OPTForCausalLM", "learned positions", ffn_dim=128, word_embed_proj_dim=32),
    served("GPT-J", "GPTJForCausalLM", "attention beside the MLP", since="5.24", **_GPT),
    served("CodeGen", "CodeGenForCausalLM", "q, k and v in one layer", since="5.24", **_GPT),
    served("CTRL", "CTRLLMHeadModel", "positions added as waves", dff=128, head_dim=None),
)
