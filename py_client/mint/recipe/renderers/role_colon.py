"""`User: ...` and `Assistant: ...`, for models that know no chat marks."""

from collections.abc import Collection, Sequence

from mint.recipe.renderers.chat_format import ChatFormat, Rendered, Turn, join_turns
from mint.recipe.renderers.messages import Message
from mint.recipe.renderers.tokenizer import Tokenizer

_STOP = "\n\nUser:"


class RoleColon(ChatFormat):
    def __init__(self, tokenizer: Tokenizer) -> None:
        opens = tokenizer.encode("", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
        self._opening = (tokenizer.bos_token or "") if opens else ""
        self.stops = [_STOP]

    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        turns = [_turn(message) for message in messages]
        if messages[-1]["role"] == "assistant":  # so that it learns to stop
            header, output = turns[-1]
            turns[-1] = header, output + "User:"
        return join_turns(turns, self._opening)

    def prompt(self, messages: Sequence[Message], role: str) -> str:
        return join_turns(map(_turn, messages), self._opening).text + _header(role)

    def content_of(self, answer: str) -> str:
        return answer.strip()


def _turn(message: Message) -> Turn:
    # The space belongs to the output: tokenizers join it to the word that follows.
    return _header(message["role"]), f" {message['content']}\n\n"


def _header(role: str) -> str:
    return f"{role.capitalize()}:"
