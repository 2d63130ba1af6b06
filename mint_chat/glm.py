"""GLM's formats: 4.5 and 4.6, and 4.7. The next role's mark ends an answer."""

from collections.abc import Collection, Sequence

from mint_chat.chat_format import ChatFormat, Rendered, Turn, ended_by_next, join_turns
from mint_chat.messages import Message
from mint_chat.thinking import last_question, read_thinking, split_thinking
from mint_chat.tokenizer import Tokenizer, token_id


class Glm4_5(ChatFormat):
    """Answers after the last question keep their thinking; each answer has a block, even if empty.
    With thinking disabled, questions say so and the prompt has an empty block.
    """

    name = "glm4_5"
    end = next_mark = "<|user|>"
    _gap = "\n"  # after a mark
    _empty = "\n<think></think>"
    _begun = ""  # of a block, by the prompt
    _asks_not = "/nothink"

    def __init__(self, tokenizer: Tokenizer, *, thinking: bool) -> None:
        for token in ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"):
            token_id(tokenizer, token, self.name)
        self.stops = [token_id(tokenizer, self.end, self.name)]
        self.template_options = {"enable_thinking": thinking}
        self._opened = self._begun if thinking else self._empty
        self._asks_not = "" if thinking else self._asks_not

    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        return ended_by_next(self._joined(messages), messages, self.next_mark)

    def prompt(self, messages: Sequence[Message], role: str) -> str:
        return self._joined(messages).text + self._header(role, self._opened)

    def content_of(self, answer: str) -> str:
        return read_thinking(answer, self._begun if self._opened == self._begun else "")

    def _joined(self, messages: Sequence[Message]) -> Rendered:
        question = last_question(messages)
        turns = (self._turn(message, i > question) for i, message in enumerate(messages))
        return join_turns(turns, opening="[gMASK]<sop>")

    def _header(self, role: str, opened: str) -> str:
        return f"<|{role}|>" + (opened if role == "assistant" else self._gap)

    def _turn(self, message: Message, is_answer: bool) -> Turn:
        content = message["content"]
        if message["role"] != "assistant":
            asks = message["role"] == "user" and not content.endswith(self._asks_not)
            content += self._asks_not if asks else ""
            return self._header(message["role"], ""), content
        thinking, content = split_thinking(content)
        block, content = self._empty, content.strip()
        if is_answer and thinking:
            block = f"{self._gap}<think>{thinking.strip()}</think>"
        output = block + (self._gap + content if content else "")
        opened = self._opened if output.startswith(self._opened) else ""
        return self._header("assistant", opened), output.removeprefix(opened)


class Glm4_7(Glm4_5):
    name = "glm4_7"
    _gap = ""
    _empty = "</think>"
    _begun = "<think>"
    _asks_not = ""
