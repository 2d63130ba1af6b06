"""Conversations as tokens, and back."""

from collections.abc import Callable, Mapping
from functools import partial

from mint.errors import refused
from mint.recipe.renderers.chat_format import ChatFormat
from mint.recipe.renderers.comparison import RendererMismatchWarning
from mint.recipe.renderers.llama3 import Llama3
from mint.recipe.renderers.messages import Message
from mint.recipe.renderers.qwen3 import Qwen3
from mint.recipe.renderers.renderer import Renderer
from mint.recipe.renderers.role_colon import RoleColon
from mint.recipe.renderers.template import Template
from mint.recipe.renderers.tokenizer import Tokenizer
from mint.recipe.renderers.train_on_what import TrainOnWhat

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
    "Message",
    "Renderer",
    "RendererMismatchWarning",
    "TrainOnWhat",
    "get_renderer",
]


def get_renderer(name: str, tokenizer: Tokenizer) -> Renderer:
    """A renderer by name, one of RENDERER_NAMES.

    Warns (RendererMismatchWarning) where it differs from the tokenizer's own chat template.
    """
    if name not in _FORMATS:
        known = ", ".join(RENDERER_NAMES)
        raise refused("name", f"is {name!r}; there are the renderers {known}")
    return Renderer(name, tokenizer, _FORMATS[name](tokenizer))
