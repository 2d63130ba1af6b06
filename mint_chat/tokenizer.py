"""What renderers need of a Hugging Face tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mint_chat.errors import InvalidChat, refused
from mint_chat.messages import Message


class Tokenizer(Protocol):
    """The part of `transformers.PreTrainedTokenizerFast` that is used here."""

    chat_template: Any
    bos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    added_tokens_decoder: Mapping[int, Any]  # the marks

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool
    ) -> Mapping[str, Any]: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], *, tokenize: bool, **options: Any
    ) -> Any: ...


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text's tokens, marks such as `<|im_end|>` in it included, none added."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_with_starts(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """The text's tokens and the character at which each starts."""
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError:
        raise refused(
            "tokenizer",
            "cannot say where in the text its tokens lie; use a fast tokenizer "
            "(one with a tokenizer.json)",
        ) from None
    starts, previous_end = [], 0
    for start, end in encoded["offset_mapping"]:
        # Tokens of spaces alone may be reported as empty, at their end.
        starts.append(start if start < end else previous_end)
        previous_end = max(previous_end, end)
    return list(encoded["input_ids"]), starts


def token_id(tokenizer: Tokenizer, token: str, renderer: str) -> int:
    """The id of a mark that the renderer depends on."""
    ids = encode(tokenizer, token)
    if len(ids) != 1:
        raise InvalidChat(
            f"renderer `{renderer}` needs the token `{token}`, which this tokenizer does not have; "
            "use renderer `template` or `role_colon`",
            field="tokenizer",
        )
    return ids[0]


def template_text(tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> str:
    """What the tokenizer's own chat template makes of a conversation."""
    from jinja2 import TemplateError  # as transformers, needed only now

    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False, **options))
    except TemplateError as error:
        raise InvalidChat(
            f"the tokenizer's chat template refuses `messages`: {error}", field="messages"
        ) from None
