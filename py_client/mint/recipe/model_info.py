"""What fits a model, by its name."""

import re

from mint.recipe.renderers.tokenizer import Tokenizer

_QWEN3 = re.compile(r"qwen3-\d+(\.\d+)?b(-a\d+b)?(?![a-z0-9])")
_LLAMA3 = re.compile(r"llama-3(?!\d)")


def get_recommended_renderer_name(model_name: str) -> str:
    """The renderer for a model, named as on a hub or by its folder.

    Base models of the families known here are not trained on chat marks: `role_colon`. Models that
    are not known here follow their own chat template: `template`.
    """
    name = model_name.rstrip("/").rpartition("/")[2].lower()
    if _QWEN3.search(name):
        if "-base" in name:
            return "role_colon"
        # The releases of July 2025 think always or never, and their templates differ.
        return "template" if "2507" in name else "qwen3"
    if _LLAMA3.search(name):
        return "llama3" if "instruct" in name else "role_colon"
    return "template"


def get_tokenizer(name: str) -> Tokenizer:
    """Opens a tokenizer from a folder, the local cache or the hub; runs no remote code.

    A client's own `get_tokenizer()` needs no hub: it gets the server's.
    """
    from transformers import AutoTokenizer  # slow to import

    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return tokenizer
