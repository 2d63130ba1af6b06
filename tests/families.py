"""The families of base models that tests know: which are served, which are refused and why.

`python -m tests.families` prints docs/models.md, which is made from this table.
"""

import sys

from tests.family import Family, composite, refused, served, sized
from tests.hybrids import HYBRID_MIXTURES, HYBRIDS
from tests.mixtures import MIXTURES
from tests.models import SIZES

_PAGE = """\
# Base models

Made from the table in `tests/families.py` by `python -m tests.families > docs/models.md`; a test
holds it to that.

What is not here may be served as well: whatever a model is called, it is loaded if it proves to be
computed rightly, and refused by the name of its class, with what is missing, if it does not
(`mint_core/model/proof.py`); the log says then that it is not in this table. Of what is here, tiny
random models of the class pass all of this, `make models` for every row and `make test` for one of
each code path:

- trainer and sampler load it;
- logprobs, gradients of every A and B, and weights after steps equal those of PEFT and torch in
  float64;
- what shares a pass changes no bit, on a CPU;
- the sampler's logprobs equal the trainer's, and decoding from the cache, a beginning that was
  found in it, and what had to be computed again equal the whole;
- its adapters open in PEFT with the same logits, and its merged export in transformers.

Where a checkpoint reads more than text ("text alone" below), its part for text is served and the
rest is left out; `text_only` in the capabilities says so. Names of layers are those of the whole
model, so that adapters open on it, and an export is whole.

Experts stay frozen, as do routers and the gates of shared experts; what is trained beside them are
attention, what layers with a state have in its place, shared experts and dense layers. Adapters of
the last two open in no PEFT (0.21) for the families with a star: it takes `gate_proj`, `up_proj`
and `down_proj` for names that experts had before transformers fused them. Those of attention and
head do, and a merged export has everything.

Hybrids with a gated delta rule (Qwen 3.5, Qwen 3 Next) use kernels of `fla` on a GPU where it is
installed (`pip install 'mintrpc-...whl[server,fla]'`), and else our own chunks.

Which renderer writes conversations for a family, which outside reference it is compared with token
for token, and which families have neither, is in `docs/renderers.md`.

## Float8 weights

With `--dtype float8` the weights of all linear layers but the head are 8-bit numbers (e4m3) with
scales; embeddings, head, norms, biases and adapters stay as they are, as does what is computed:
bfloat16 on a GPU, float32 on a CPU. The numbers are made as the model is read, weight by weight,
with a power of two as the scale of each output channel; or they lie in the checkpoint: `fp8`, with
a scale for each block or weight (DeepSeek-V3, Qwen3), and `float-quantized` of compressed-tensors,
by channel, block or weight. Other quantized checkpoints are refused by the option's name, and so
are models with experts. What a checkpoint says of activations is left out: they are never rounded.

A GPU then holds a byte a weight: by their shapes 9.4 GB of Qwen3-8B where bfloat16 takes 16.4, and
73 GB of a Llama of 70B where it takes 141. Its kernel has not run on a GPU yet. On a CPU float8 is
emulated, for tests: the same numbers, in the memory and time of float32.

Such a base has a fingerprint of its own. Adapters and training state open where the model is served
in the other kind of type only with `--adapters-across-dtypes`. An export is merged into what the
float8 weights stand for, so that it is the model that was trained; it is no float8 itself.

## Served

| family | class | of its own |
|---|---|---|
{served}

## Refused

| family | class | what is missing |
|---|---|---|
{refused}
"""


_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_CAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}
_GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8}
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
_GEMMA4 = {**_SHARED, "global_head_dim": 32, "final_logit_softcapping": 2.0}
_SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
_QWEN_SIGHT = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
_SECTIONS = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
_REGISTRY = "its attention does not go through transformers' registry"

FAMILIES: tuple[Family, ...] = (
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
    served("Hunyuan dense", "HunYuanDenseV1ForCausalLM", "norms of heads"),
    served("nanochat", "NanoChatForCausalLM", "norms of heads", final_logit_softcapping=2.0),
    served("BitNet", "BitNetForCausalLM", "norms within attention and MLP"),
    served("Jais 2", "Jais2ForCausalLM", "an MLP of two layers"),
    served("SmolLM3", "SmolLM3ForCausalLM", "layers without positions", no_rope_layers=[1, 0]),
    served("Mistral", "MistralForCausalLM", "a window", sliding_window=8),
    served("Ministral", "MinistralForCausalLM", "a window", **_WINDOW),
    served("StarCoder2", "Starcoder2ForCausalLM", "a window", sliding_window=8),
    served("CWM", "CwmForCausalLM", "a window", **_WINDOW, rope_parameters=_LLAMA3),
    served("EXAONE 4", "Exaone4ForCausalLM", "a window", **_WINDOW),
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
    served("OLMo 3", "Olmo3ForCausalLM", "norms over all heads", **_WINDOW, head_dim=None),
    served("Gemma", "GemmaForCausalLM", "scaled embeddings"),
    served("Gemma 2", "Gemma2ForCausalLM", "capped scores and logits", **_GEMMA, **_CAPS),
    served("VaultGemma", "VaultGemmaForCausalLM", "capped scores and logits", **_GEMMA, **_CAPS),
    served(
        "Gemma 3 of text", "Gemma3ForCausalLM", "two rotary embeddings", **{**_GEMMA, **_WINDOW}
    ),
    served("Gemma 4 of text", "Gemma4ForCausalLM", "layers that share keys and values", **_GEMMA4),
    served(
        "Gemma 4 of text without v",
        "Gemma4ForCausalLM",
        "values made of keys",
        **{**_GEMMA4, "num_kv_shared_layers": 0, "attention_k_eq_v": True},
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
    served("Cohere 2", "Cohere2ForCausalLM", "a factor of the logits", **_WINDOW, logit_scale=0.3),
    served(
        "MiniCPM3", "MiniCPM3ForCausalLM", "a factor of the logits", **_LATENT, dim_model_base=16
    ),
    served("Youtu", "YoutuForCausalLM", "keys and values from a latent", **_LATENT),
    served("GPTBigCode", "GPTBigCodeForCausalLM", "learned positions", n_inner=128, head_dim=None),
    served("OPT", "OPTForCausalLM", "learned positions", ffn_dim=128, word_embed_proj_dim=32),
    served("CTRL", "CTRLLMHeadModel", "positions added as waves", dff=128, head_dim=None),
    composite(
        "Gemma 3",
        "Gemma3ForConditionalGeneration",
        "two rotary embeddings",
        text_config=sized(**{**_GEMMA, **_WINDOW}),
        vision_config={**_SIGHT, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=500,
    ),
    composite(
        "Gemma 4",
        "Gemma4ForConditionalGeneration",
        "layers that share keys and values",
        text_config=sized(**_GEMMA4),
        vision_config={
            **_SIGHT,
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
            "position_embedding_size": 16,
        },
    ),
    composite(
        "Mistral Small 3",
        "Mistral3ForConditionalGeneration",
        "no more than Mistral",
        text_config={"model_type": "mistral", **sized(sliding_window=8)},
        vision_config={
            **_SIGHT,
            **{"model_type": "pixtral", "num_attention_heads": 2, "head_dim": 16},
            **{"image_size": 28, "patch_size": 14},
        },
        image_token_index=500,
    ),
    composite(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        "rotary embeddings of places",
        text_config=sized(rope_parameters=_SECTIONS),
        vision_config={
            **_QWEN_SIGHT,
            **{"out_hidden_size": 64, "num_position_embeddings": 16},
            "deepstack_visual_indexes": [0],
        },
    ),
    composite(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        "rotary embeddings of places",
        text_config=sized(rope_parameters=_SECTIONS),
        vision_config={**_QWEN_SIGHT, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
    ),
    *MIXTURES,
    *HYBRIDS,
    *HYBRID_MIXTURES,
    refused("GPT-Neo", "GPTNeoForCausalLM", _REGISTRY, attention_types=[[["global"], 2]]),
    refused("Falcon", "FalconForCausalLM", _REGISTRY, head_dim=None),
    refused("BLOOM", "BloomForCausalLM", _REGISTRY),
    refused("MPT", "MptForCausalLM", _REGISTRY),
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
)


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def page() -> str:
    """docs/models.md."""
    rows: dict[bool, list[str]] = {True: [], False: []}
    for family in FAMILIES:
        name = family.name + ("" if family.peft_opens_mlps else " *")
        rows[family.served].append(f"| {name} | `{family.architecture}` | {family.own} |")
    return _PAGE.format(served="\n".join(rows[True]), refused="\n".join(rows[False]))


if __name__ == "__main__":
    sys.stdout.write(page())
