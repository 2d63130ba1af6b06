"""The rows of the table of families that read more than text, of which text alone is served."""

from tests.families.dense import GEMMA, GEMMA4, WINDOW
from tests.family import Family, composite, sized

_SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
_QWEN_SIGHT = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
_SECTIONS = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}

COMPOSITES: tuple[Family, ...] = (
    composite(
        "Gemma 3",
        "Gemma3ForConditionalGeneration",
        "two rotary embeddings",
        text_config=sized(**{**GEMMA, **WINDOW}),
        vision_config={**_SIGHT, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=500,
    ),
    composite(
        "Gemma 4",
        "Gemma4ForConditionalGeneration",
        "layers that share keys and values",
        text_config=sized(**GEMMA4),
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
)
