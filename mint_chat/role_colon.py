"""`User: ...` and `Assistant: ...`, for models that know no chat marks."""

from collections.abc import Collection, Sequence

from mint_chat.chat_format import ChatFormat, Rendered, Turn, ended_by_next, join_turns
from mint_chat.messages import Message
from mint_chat.tokenizer import Tokenizer


class RoleColon(ChatFormat):
    next_mark = "User:"
    end = "\n\n" + next_mark

    def __init__(self, tokenizer: Tokenizer) -> None:
        opens = tokenizer.encode("", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
        self._opening = (tokenizer.bos_token or "") if opens else ""
        self.stops = [self.end]

    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        # The next question's beginning is the end of an answer: so it learns to stop.
        return ended_by_next(
            join_turns(map(_turn, messages), self._opening), messages, self.next_mark
        )

    def prompt(self, messages: Sequence[Message], role: str) -> str:
        return join_turns(map(_turn, messages), self._opening).text + _header(role)

    def content_of(self, answer: str) -> str:
        return answer.strip()


def _turn(message: Message) -> Turn:
    # The space belongs to the output: tokenizers join it to the word that follows.
    return _header(message["role"]), f" {message['content']}\n\n"


def _header(role: str) -> str:
    return f"{role.capitalize()}:"
