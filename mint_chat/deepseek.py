"""DeepSeek's formats: R1's, which its distilled models have too, and V3.2's."""

from collections.abc import Collection, Sequence

from mint_chat.chat_format import ChatFormat, Rendered, Turn, join_turns
from mint_chat.errors import refused
from mint_chat.messages import Message, check_turns
from mint_chat.thinking import read_thinking
from mint_chat.tokenizer import Tokenizer, token_id


def _mark(name: str) -> str:
    return f"<\uff5c{name}\uff5c>"


_BEGIN = _mark("begin\u2581of\u2581sentence")
_HEADERS = {"system": "", "user": _mark("User"), "assistant": _mark("Assistant")}


class DeepSeekR1(ChatFormat):
    """The last answer keeps its thinking, which the prompt opens; earlier answers lose theirs."""

    name = "deepseek_r1"
    end = _mark("end\u2581of\u2581sentence")
    _opened = "<think>\n"  # by the prompt

    def __init__(self, tokenizer: Tokenizer) -> None:
        for token in (_BEGIN, _HEADERS["user"], _HEADERS["assistant"]):
            token_id(tokenizer, token, self.name)
        self.stops = [token_id(tokenizer, self.end, self.name)]

    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        check_turns(messages)
        last = len(messages) - 1
        turns = (self._turn(message, index == last) for index, message in enumerate(messages))
        return join_turns(turns, _BEGIN)

    def prompt(self, messages: Sequence[Message], role: str) -> str:
        opened = self._opened if role == "assistant" else ""
        return self.render(messages, ()).text + _HEADERS[role] + opened

    def content_of(self, answer: str) -> str:
        return read_thinking(answer, self._opened)

    def _turn(self, message: Message, is_last: bool) -> Turn:
        header, content = _HEADERS[message["role"]], message["content"]
        if message["role"] != "assistant":
            return header, content
        content = self._answer(content, is_last) + self.end
        opened = self._opened if content.startswith(self._opened) else ""
        return header + opened, content.removeprefix(opened)

    def _answer(self, content: str, is_last: bool) -> str:
        return content if is_last else content.split("</think>")[-1]


class DeepSeekV3(DeepSeekR1):
    """Where an answer has no thinking, the mark that ends thinking stands all the same."""

    name = "deepseekv3"

    def __init__(self, tokenizer: Tokenizer, *, thinking: bool) -> None:
        super().__init__(tokenizer)
        self._opened = "<think>" if thinking else "</think>"
        self.template_options = {"thinking": thinking}

    def content_of(self, answer: str) -> str:
        return read_thinking(answer, self._opened if self._opened == "<think>" else "")

    def _answer(self, content: str, is_last: bool) -> str:
        thinking, closed, rest = content.partition("</think>")
        if not closed:
            return "</think>" + content
        thinking = thinking.removeprefix("<think>")
        is_chat = self._opened == "</think>"
        if not is_last or (is_chat and not thinking.strip()):
            return "</think>" + rest
        if is_chat:
            raise refused(
                "messages",
                "ends in an answer with thinking, for which renderer `deepseekv3` has no place; "
                "use `deepseekv3_thinking`",
            )
        return f"<think>{thinking}</think>{rest}"
