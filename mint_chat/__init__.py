"""Conversations as tokens, and back. No torch, no gRPC: clients and services have the same."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from mint_chat.chat_format import ChatFormat
from mint_chat.comparison import RendererMismatchWarning
from mint_chat.errors import InvalidChat, refused
from mint_chat.llama3 import Llama3
from mint_chat.messages import Message
from mint_chat.qwen3 import Qwen3
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
}
RENDERER_NAMES = tuple(_FORMATS)

__all__ = [
    "RENDERER_NAMES",
    "InvalidChat",
    "Message",
    "Renderer",
    "RendererMismatchWarning",
    "TrainOnWhat",
    "get_renderer",
]


def get_renderer(name: str, tokenizer: Tokenizer, tools: Sequence[Tool] = ()) -> Renderer:
    """A renderer by name, one of RENDERER_NAMES. `tools` are for the template alone.

    Warns (RendererMismatchWarning) where it differs from the tokenizer's own chat template.
    """
    if name not in _FORMATS:
        known = ", ".join(RENDERER_NAMES)
        raise refused("name", f"is {name!r}; there are the renderers {known}")
    if not tools:
        return Renderer(name, tokenizer, _FORMATS[name](tokenizer))
    if name != "template":
        raise refused("tools", f"are what renderer `{name}` knows nothing of; use `template`")
    if "tools" not in str(tokenizer.chat_template):
        raise refused("tools", "are what the tokenizer's chat template knows nothing of")
    return Renderer(name, tokenizer, Template(tokenizer, tools))
