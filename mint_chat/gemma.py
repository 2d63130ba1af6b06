"""Gemma's formats: 3, with the system message in the first question, and 4, with thinking."""

import re
from collections.abc import Collection, Iterator, Sequence

from mint_chat.chat_format import ChatFormat, Rendered, Turn, join_turns
from mint_chat.messages import Message, check_turns
from mint_chat.tokenizer import Tokenizer, token_id

_THOUGHT = re.compile(r"\s*<\|channel>thought\n(.*?)\n?<channel\|>", re.DOTALL)


class Gemma3(ChatFormat):
    name = "gemma3"
    start, end = "<start_of_turn>", "<end_of_turn>"

    def __init__(self, tokenizer: Tokenizer) -> None:
        for token in ("<bos>", self.start):
            token_id(tokenizer, token, self.name)
        self.stops = [token_id(tokenizer, self.end, self.name)]

    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        check_turns(messages)
        return join_turns(self._turns(messages), opening="<bos>", gap="\n")

    def prompt(self, messages: Sequence[Message], role: str) -> str:
        return self.render(messages, ()).text + self._header(role)

    def _turns(self, messages: Sequence[Message]) -> Iterator[Turn]:
        opened = False
        for message in messages:
            if message["role"] == "system":
                opened = True
                yield self._header("user"), message["content"] + "\n"
            else:
                header = "" if opened else self._header(message["role"])
                opened = False
                yield header, message["content"].strip() + self.end

    def _header(self, role: str) -> str:
        return f"{self.start}{'model' if role == 'assistant' else role}\n"


class Gemma4(Gemma3):
    """The last answer keeps its thinking, which stands in `content` between the model's own marks:
    `<|channel>thought` ... `<channel|>`. Earlier answers lose theirs.
    """

    name = "gemma4"
    start, end = "<|turn>", "<turn|>"

    def __init__(self, tokenizer: Tokenizer, *, thinking: bool) -> None:
        super().__init__(tokenizer)
        self._asks = "<|think|>\n" if thinking else ""
        self.template_options = {"enable_thinking": thinking}

    def content_of(self, answer: str) -> str:
        return answer.removeprefix("<|channel>thought\n<channel|>")

    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        check_turns(messages)
        opening, last = "<bos>", len(messages) - 1
        if self._asks and messages[0]["role"] != "system":
            opening += self._header("system") + self._asks + self.end + "\n"
        turns = (self._turn(message, index == last) for index, message in enumerate(messages))
        return join_turns(turns, opening, gap="\n")

    def _turn(self, message: Message, is_last: bool) -> Turn:
        header, content = self._header(message["role"]), message["content"].strip()
        if message["role"] == "system":
            header += self._asks
        if message["role"] == "assistant":
            thought = _THOUGHT.match(content)
            pieces = content.split("<channel|>")
            content = "".join(piece.split("<|channel>")[0] for piece in pieces).strip()
            if is_last and thought and thought[1]:
                content = f"<|channel>thought\n{thought[1]}\n<channel|>{content}"
        return header, content + self.end
