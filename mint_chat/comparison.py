"""Whether a renderer writes what the tokenizer's own chat template writes."""

import warnings
from collections.abc import Sequence

from mint_chat.chat_format import ChatFormat
from mint_chat.errors import InvalidChat
from mint_chat.messages import Message
from mint_chat.tokenizer import Tokenizer, encode, template_text

_SAMPLE: list[Message] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And twice that?"},
    {"role": "assistant", "content": "10"},
]
_SHOWN_TOKENS = 8


class RendererMismatchWarning(UserWarning):
    """A renderer and the tokenizer's own chat template part."""


def warn_of_differences(name: str, tokenizer: Tokenizer, chat_format: ChatFormat) -> None:
    """Compares a sample conversation, and the prompt for its last answer. Silent if both agree."""
    options = chat_format.template_options
    if options is None or not tokenizer.chat_template:
        return
    sample = _SAMPLE
    try:
        theirs = template_text(tokenizer, sample, **options)
    except InvalidChat:  # some templates know no system message
        sample = _SAMPLE[1:]
        theirs = template_text(tokenizer, sample, **options)
    their_prompt = template_text(tokenizer, sample[:-1], add_generation_prompt=True, **options)
    ours = chat_format.render(sample, ()).text.removesuffix(chat_format.next_mark)
    pairs = {
        "a sample conversation": (ours, theirs),
        "a sample prompt": (chat_format.prompt(sample[:-1], "assistant"), their_prompt),
    }
    for what, (text, their_text) in pairs.items():
        tokens, their_tokens = encode(tokenizer, text), encode(tokenizer, their_text)
        if tokens != their_tokens:
            difference = _describe(tokenizer, tokens, their_tokens)
            warnings.warn(
                f"renderer `{name}` and the tokenizer's own chat template part in {what} at "
                f"{difference}; use renderer `template` to follow the tokenizer",
                RendererMismatchWarning,
                stacklevel=5,
            )
            return


def _describe(tokenizer: Tokenizer, ours: Sequence[int], theirs: Sequence[int]) -> str:
    """The first position where two token lists differ, and both texts from there on."""
    shorter = min(len(ours), len(theirs))
    position = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    shown = slice(position, position + _SHOWN_TOKENS)
    texts = [
        tokenizer.decode(tokens[shown], skip_special_tokens=False) for tokens in (ours, theirs)
    ]
    return f"token {position}, where the renderer has {texts[0]!r} and the template {texts[1]!r}"
