"""How a conversation is written down."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mint_chat.messages import CHAT_ROLES, Message


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text. `outputs` has, by message, the characters that its author wrote.

    The mark that ends a message is part of them; its header is not.
    """

    text: str
    outputs: Mapping[int, tuple[int, int]]  # start and end in `text`


class ChatFormat(ABC):
    """One way of writing conversations. Messages have been checked."""

    roles: Collection[str] = CHAT_ROLES  # those it knows
    end: str  # what ends an answer: sampling stops at its last token; empty: nothing in the text
    stops: list[int] | list[str]  # the same for `SamplingParams.stop`: token ids, or texts
    next_mark = ""  # the next role's, where that ends an answer: it stands behind the last one too
    # Options under which the tokenizer's own template agrees. None: it is that template.
    template_options: Mapping[str, bool | str] | None = {}

    @abstractmethod
    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        """The whole conversation, with the outputs of the wanted messages at least."""

    @abstractmethod
    def prompt(self, messages: Sequence[Message], role: str) -> str:
        """The conversation so far and the header of an answer by `role`."""

    def content_of(self, answer: str) -> str:
        """The content of an assistant's message, out of what it wrote without the end mark."""
        return answer


def after_end(text: str, place: int, end: str) -> int:
    """The place behind the end of an answer, where that stands at `place`."""
    return place + len(end) if text.startswith(end, place) else place


Turn = tuple[str, str]  # one message's header and output


def join_turns(turns: Iterable[Turn], opening: str = "", gap: str = "") -> Rendered:
    """The whole of them; `gap` comes after the mark that ends each."""
    text, outputs = opening, {}
    for index, (header, output) in enumerate(turns):
        start = len(text) + len(header)
        outputs[index] = (start, start + len(output))
        text += header + output + gap
    return Rendered(text, outputs)


def ended_by_next(rendered: Rendered, messages: Sequence[Message], mark: str) -> Rendered:
    """Where the next role's mark ends an answer: it stands behind the last one too, and belongs to
    each answer that it follows.
    """
    text = rendered.text + (mark if messages[-1]["role"] == "assistant" else "")
    outputs = dict(rendered.outputs)
    for index, (start, end) in rendered.outputs.items():
        if messages[index]["role"] == "assistant":
            outputs[index] = start, after_end(text, end, mark)
    return Rendered(text, outputs)
