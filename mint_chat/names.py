"""What fits a model, by its name."""

import re

# The whole of a name, so that a model that others trained on a family's base, into a format of
# their own, is not taken for the family's. What may follow changes numbers, not the format.
_NUMBERS = r"(-(fp8|fp16|bf16|nvfp4|awq|gptq|gguf|mlx|bnb|int4|int8|4bit|8bit|unsloth|dynamic))*"
_SIZE = r"\d+(\.\d+)?b(-a\d+b)?"
# The name of a family, what a base model and one for chats add to it, and what the latter's own
# template writes where nobody asks for more: its renderer.
_FAMILIES = (
    (rf"qwen3-{_SIZE}", "-base", "", "qwen3"),
    (r"qwen3\.5-(0\.8|2)b", "-base", "", "qwen3_5_disable_thinking"),
    (rf"qwen3\.[56]-{_SIZE}", "-base", "", "qwen3_5"),
    (rf"qwen3\.8-{_SIZE}", "-base", "", "qwen3_8_xhigh_reasoning"),
    (rf"(meta-)?llama-3(\.\d)?-{_SIZE}", "", "-instruct", "llama3"),
    (r"gemma-3-\d+[bm]", "-pt", "-it", "gemma3"),
    (r"gemma-4-e\db", "", "-it", "gemma4_disable_thinking"),
    (r"glm-4\.[56](-air)?", "-base", "", "glm4_5"),
    (r"glm-4\.7(-flash)?", "-base", "", "glm4_7"),
    (rf"deepseek-r1(-distill-(qwen|llama)-{_SIZE})?", "-base", "", "deepseek_r1"),
    (r"deepseek-v3\.2", "-base", "", "deepseekv3"),
)


def get_recommended_renderer_name(model_name: str) -> str:
    """The renderer for a model, named as on a hub or by its folder.

    Base models of the families known here are not trained on chat marks: `role_colon`. Models that
    are not known here, such as those that others trained further, follow their own chat template:
    `template`.
    """
    name = model_name.rstrip("/").rpartition("/")[2].lower()
    for family, base, chat, renderer in _FAMILIES:
        if re.fullmatch(family + chat + _NUMBERS, name):
            return renderer
        if re.fullmatch(family + base + _NUMBERS, name):
            return "role_colon"
    return "template"
