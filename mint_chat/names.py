"""What fits a model, by its name."""

import re

# The whole of a name, so that a model that others trained on a family's base, into a format of
# their own, is not taken for the family's. What may follow changes numbers, not the format.
_NUMBERS = r"(-(fp8|fp16|bf16|nvfp4|awq|gptq|gguf|mlx|bnb|int4|int8|4bit|8bit|unsloth|dynamic))*"
_QWEN3 = re.compile(r"qwen3-\d+(\.\d+)?b(-a\d+b)?(-base)?" + _NUMBERS)
_LLAMA3 = re.compile(r"(meta-)?llama-3(\.\d)?-\d+b(-instruct)?" + _NUMBERS)


def get_recommended_renderer_name(model_name: str) -> str:
    """The renderer for a model, named as on a hub or by its folder.

    Base models of the families known here are not trained on chat marks: `role_colon`. Models that
    are not known here, such as those that others trained further, follow their own chat template:
    `template`.
    """
    name = model_name.rstrip("/").rpartition("/")[2].lower()
    if _QWEN3.fullmatch(name):
        return "role_colon" if "-base" in name else "qwen3"
    if _LLAMA3.fullmatch(name):
        return "llama3" if "-instruct" in name else "role_colon"
    return "template"
