"""What is asked of the process that has the tokenizer."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from mint_chat.messages import Message
from mint_chat.template import Tool


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Answer: the tokens of each text, `list[array]` of 32-bit integers."""

    texts: Sequence[str]
    add_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Detokenize:
    """Answer: `list[str]`."""

    sequences: Sequence[Sequence[int]]
    skip_special_tokens: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Render:
    """Answer: `Rendering`. Raises InvalidRequest."""

    chats: Sequence[Sequence[Message]]
    renderer: str
    train_on_what: str = "last_assistant_message"
    for_generation: bool = False
    tools: Sequence[Tool] = ()


@dataclass(frozen=True, slots=True)
class Rendering:
    # Tokens and weights, both [n], or no weights.
    chats: Sequence[tuple["array[int]", "array[float]"]]
    stops: Sequence[int] | Sequence[str]  # what ends an answer
