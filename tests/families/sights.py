"""The rows of the table of families that read more than text and whose text models are those of
other rows: `make models` alone tests them.
"""

from functools import partial
from typing import Any

from tests import family
from tests.families.dense import WINDOW
from tests.families.hybrids import DELTA, LFM3
from tests.families.mixtures import EXPERTS, PER_TOKEN
from tests.family import Family, sized
from tests.models import SIZES

_DENSE, _PLACES = "a dense text model", "rotary embeddings of places"
_EYE = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    **{"image_size": 28, "patch_size": 14, "depth": 1, "num_heads": 2},
}
_SQUARE = {**_EYE, "image_size": [28, 28], "patch_size": [14, 14]}
_QWEN_EYE = {
    **{"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2},
    "out_hidden_size": 64,
}
_DEEP_EYE = {**_QWEN_EYE, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_SECTIONS = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
_HALF = {**_SECTIONS, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
_OWN = {"moe_intermediate_size": 24, "num_experts_per_tok": PER_TOKEN}
_SHARED = {"n_routed_experts": EXPERTS, "n_shared_experts": 4, "first_k_dense_replace": 1}


def _row(
    name: str,
    architecture: str,
    own: str,
    eye: dict[str, Any],
    *,
    peft_opens_mlps: bool = True,
    tolerance: float = 1e-5,
    since: str = "",
    **text: Any,
) -> Family:
    """With a text model of these values."""
    return family.composite(
        name,
        f"{architecture}ForConditionalGeneration",
        own,
        models_only=True,
        peft_opens_mlps=peft_opens_mlps,
        tolerance=tolerance,
        since=since,
        text_config=sized(**text),
        vision_config=eye,
    )


_plain = partial(_row, own=_DENSE, eye=_EYE)
_placed = partial(_row, own=_PLACES, rope_parameters=_SECTIONS)
_state = partial(
    _row,
    own="a state by the gated delta rule",
    eye=_EYE,
    tolerance=2e-5,
    num_hidden_layers=3,
    **DELTA,
)

SIGHTS: tuple[Family, ...] = (
    _plain("LLaVA", "Llava"),
    _plain("LLaVA-NeXT", "LlavaNext"),
    _plain("LLaVA-NeXT-Video", "LlavaNextVideo"),
    _plain("LLaVA-OneVision", "LlavaOnevision"),
    _plain("Video-LLaVA", "VideoLlava"),
    _plain("ViP-LLaVA", "VipLlava"),
    _plain("VideoLLaMA 3", "VideoLlama3", model_type="qwen2"),
    _plain("InternVL", "InternVL", eye=_SQUARE),
    _plain("Qianfan-OCR", "QianfanOCR", eye=_SQUARE),
    _plain("GOT-OCR 2", "GotOcr2"),
    _plain("LightOnOCR", "LightOnOcr"),
    _plain("Idefics 2", "Idefics2"),
    _plain("Idefics 3", "Idefics3"),
    _plain("SmolVLM", "SmolVLM"),
    _plain("PaliGemma", "PaliGemma"),
    _plain("DeepSeek-VL", "DeepseekVL"),
    _plain("DeepSeek-VL hybrid", "DeepseekVLHybrid"),
    _plain("HyperCLOVA X vision", "HyperCLOVAXVisionV2"),
    _plain("Granite Docling", "GraniteDocling", eye={**_EYE, "out_hidden_size": 64}),
    _plain("MOSS transcription", "MossTranscribeDiarize"),
    _plain("Aya Vision", "AyaVision", **WINDOW),
    _plain("Command A Vision", "Cohere2Vision", **WINDOW),
    _plain("Gemma 4 unified", "Gemma4Unified", **WINDOW),
    _plain(
        "EXAONE 4.5",
        "Exaone4_5_",
        eye={**_QWEN_EYE, "num_key_value_heads": 2, "fullatt_block_indexes": [0]},
        model_type="exaone4",
        **WINDOW,
    ),
    _placed("Qwen2-VL", "Qwen2VL", eye={**_QWEN_EYE, "embed_dim": 32, "hidden_size": 64}),
    _placed("Qwen2.5-Omni", "Qwen2_5OmniThinker", eye=_QWEN_EYE, since="5.21"),
    _placed("PaddleOCR-VL", "PaddleOCRVL", eye=_EYE),
    _placed("Cosmos 3", "Cosmos3Omni", eye=_EYE),
    _placed("Cosmos 3 Edge", "Cosmos3Edge", eye=_EYE),
    _placed("GLM-4.6V", "Glm46V", eye=_QWEN_EYE),
    _row("GLM-4.1V", "Glm4v", _PLACES, _QWEN_EYE, rope_parameters=_HALF),
    _row("GLM-OCR", "GlmOcr", _PLACES, _QWEN_EYE, rope_parameters=_HALF),
    _row(
        "GLM-4.5V",
        "Glm4vMoe",
        f"{_PLACES}; experts beside a shared one",
        _QWEN_EYE,
        **_OWN,
        **_SHARED,
        peft_opens_mlps=False,
        rope_parameters={**_SECTIONS, "mrope_section": [2, 1, 1]},
    ),
    _placed(
        "Qwen3-VL MoE",
        "Qwen3VLMoe",
        own=f"{_PLACES}; experts",
        eye=_DEEP_EYE,
        **_OWN,
        num_experts=EXPERTS,
    ),
    _placed(
        "Qwen3-Omni",
        "Qwen3OmniMoeThinker",
        since="5.21",
        own=f"{_PLACES}; experts",
        eye=_DEEP_EYE,
        **_OWN,
        num_experts=EXPERTS,
    ),
    _row(
        "MiniMax-M3",
        "MiniMaxM3Sparse",
        "experts beside a shared one",
        _EYE,
        **{"intermediate_size": 96, "dense_intermediate_size": 96, "shared_intermediate_size": 96},
        **{"num_local_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN, "rotary_dim": 8},
    ),
    _row(
        "Step 3.7",
        "Step3p7",
        "experts beside a shared one; a gate for each head",
        _EYE,
        **{"num_hidden_layers": 3, "moe_intermediate_size": 24, "share_expert_dim": 96},
        **{"n_routed_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN},
        **{"sliding_window": 8, "num_sliding_attention_heads": 6},
        **{"moe_router_scaling_factor": 1.7, "swiglu_limits": [0.0, 0.0, 0.5]},
        swiglu_limits_shared=[0.0, 0.5, 0.0],
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    _row(
        "Kimi K2.5",
        "Kimi_K25",
        "experts beside a shared one, chosen by groups",
        _EYE,
        **_OWN,
        **_SHARED,
        **{"num_key_value_heads": 4, "head_dim": None, "q_lora_rank": 24, "kv_lora_rank": 20},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16},
        **{"n_group": 3, "topk_group": 2},
    ),
    _row(
        "LFM2-VL",
        "Lfm2Vl",
        "a state of a short convolution",
        _EYE,
        tolerance=2e-5,
        head_dim=None,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
    _row(
        "LFM3-VL",
        "Lfm3Vl",
        "a state of a short convolution; a gate for each head",
        _EYE,
        tolerance=2e-5,
        **LFM3,
    ),
    _state("MiniCPM-V 4.6", "MiniCPMV4_6", model_type="qwen3_5_text"),
    _state("MiniCPM-V 4.7", "MiniCPMV4_7"),
    _state("MiniCPM-OCR", "MiniCPMOcr"),
    family.composite(
        "Ovis 2",
        "Ovis2ForConditionalGeneration",
        _DENSE,
        models_only=True,
        text_config=sized(),
        vision_config=_EYE,
        **{"vocab_size": SIZES["vocab_size"], "hidden_size": SIZES["hidden_size"]},
    ),
    family.composite(
        "Fuyu",
        "FuyuForCausalLM",
        "q, k and v in one layer",
        models_only=True,
        text_config=sized(head_dim=None),
        image_token_id=500,
    ),
)
