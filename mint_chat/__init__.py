"""Conversations as tokens, and back. No torch, no gRPC: clients and services have the same."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from mint_chat.chat_format import ChatFormat
from mint_chat.comparison import RendererMismatchWarning
from mint_chat.deepseek import DeepSeekR1, DeepSeekV3
from mint_chat.errors import InvalidChat, refused
from mint_chat.gemma import Gemma3, Gemma4
from mint_chat.glm import Glm4_5, Glm4_7
from mint_chat.llama3 import Llama3
from mint_chat.messages import Message
from mint_chat.qwen3 import Qwen3
from mint_chat.qwen3_5 import Qwen3_5
from mint_chat.qwen3_8 import Qwen3_8
from mint_chat.renderer import Renderer
from mint_chat.role_colon import RoleColon
from mint_chat.template import Template, Tool
from mint_chat.tokenizer import Tokenizer
from mint_chat.train_on_what import TrainOnWhat

_FORMATS: Mapping[str, Callable[[Tokenizer], ChatFormat]] = {
    "template": Template,
    "role_colon": RoleColon,
    "llama3": Llama3,
    "qwen3": partial(Qwen3, thinking=True),
    "qwen3_disable_thinking": partial(Qwen3, thinking=False),
    "qwen3_5": partial(Qwen3_5, thinking=True),
    "qwen3_5_disable_thinking": partial(Qwen3_5, thinking=False),
    "qwen3_5_preserve_thinking": partial(Qwen3_5, thinking=True, preserve=True),
    "qwen3_8_xhigh_reasoning": partial(Qwen3_8, effort="xhigh"),
    "qwen3_8_medium_reasoning": partial(Qwen3_8, effort="medium"),
    "qwen3_8_low_reasoning": partial(Qwen3_8, effort="low"),
    "qwen3_8_disable_thinking": partial(Qwen3_8, effort=None),
    "gemma3": Gemma3,
    "gemma4": partial(Gemma4, thinking=True),
    "gemma4_disable_thinking": partial(Gemma4, thinking=False),
    "glm4_5": partial(Glm4_5, thinking=True),
    "glm4_5_disable_thinking": partial(Glm4_5, thinking=False),
    "glm4_7": partial(Glm4_7, thinking=True),
    "glm4_7_disable_thinking": partial(Glm4_7, thinking=False),
    "deepseek_r1": DeepSeekR1,
    "deepseekv3": partial(DeepSeekV3, thinking=False),
    "deepseekv3_thinking": partial(DeepSeekV3, thinking=True),
}
RENDERER_NAMES = tuple(_FORMATS)

__all__ = [
    "RENDERER_NAMES",
    "InvalidChat",
    "Message",
    "Renderer",
    "RendererMismatchWarning",
    "TrainOnWhat",
    "check_name",
    "get_renderer",
]


def check_name(name: str) -> None:
    """Refuses a name that no renderer has."""
    if name not in _FORMATS:
        known = ", ".join(RENDERER_NAMES)
        raise refused("name", f"is {name!r}; there are the renderers {known}")


def get_renderer(name: str, tokenizer: Tokenizer, tools: Sequence[Tool] = ()) -> Renderer:
    """A renderer by name, one of RENDERER_NAMES. `tools` are for the template alone.

    Warns (RendererMismatchWarning) where it differs from the tokenizer's own chat template.
    """
    check_name(name)
    if not tools:
        return Renderer(name, tokenizer, _FORMATS[name](tokenizer))
    if name != "template":
        raise refused("tools", f"are what renderer `{name}` knows nothing of; use `template`")
    if "tools" not in str(tokenizer.chat_template):
        raise refused("tools", "are what the tokenizer's chat template knows nothing of")
    return Renderer(name, tokenizer, Template(tokenizer, tools))
