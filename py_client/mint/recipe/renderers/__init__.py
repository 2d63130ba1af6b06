"""Conversations as tokens, and back."""

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

RENDERER_NAMES = ("template", "role_colon", "llama3", "qwen3", "qwen3_disable_thinking")

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
    return Renderer(name, tokenizer, _chat_format(name, tokenizer))


def _chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    match name:
        case "template":
            return Template(tokenizer)
        case "role_colon":
            return RoleColon(tokenizer)
        case "llama3":
            return Llama3(tokenizer)
        case "qwen3":
            return Qwen3(tokenizer, thinking=True)
        case "qwen3_disable_thinking":
            return Qwen3(tokenizer, thinking=False)
    raise refused("name", f"is {name!r}; there are the renderers {', '.join(RENDERER_NAMES)}")
