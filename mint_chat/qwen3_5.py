"""Qwen3.5's and Qwen3.6's format: Qwen3's marks around contents without surrounding space.

The prompt opens the thinking block, or with thinking disabled has an empty one. Every answer after
the last question has a block, even if empty; earlier ones only where thinking is preserved.
"""

from collections.abc import Collection, Sequence

from mint_chat.chat_format import Rendered, Turn, join_turns
from mint_chat.errors import refused
from mint_chat.messages import Message, check_system_first
from mint_chat.qwen3 import EMPTY_BLOCK, Qwen3, header, last_query
from mint_chat.thinking import read_thinking, split_thinking
from mint_chat.tokenizer import Tokenizer


class Qwen3_5(Qwen3):
    name = "qwen3_5"

    def __init__(self, tokenizer: Tokenizer, *, thinking: bool, preserve: bool = False) -> None:
        super().__init__(tokenizer, thinking=thinking)
        self._preserve = preserve
        self._opened = "<think>\n" if thinking else EMPTY_BLOCK
        self.template_options = {"enable_thinking": thinking, "preserve_thinking": preserve}

    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        check_system_first(messages)
        messages = [{**message, "content": message["content"].strip()} for message in messages]
        question = last_query(messages, default=-1)
        if question < 0:
            raise refused("messages", f"has no question by a user, which `{self.name}` needs")
        first = 0 if self._preserve else question  # no answer comes before it
        turns = (self._block_turn(m, has_block=i >= first) for i, m in enumerate(messages))
        return join_turns(turns, self._opening(messages), gap="\n")

    def prompt(self, messages: Sequence[Message], role: str) -> str:
        opened = self._opened if role == "assistant" else ""
        return self.render(messages, ()).text + header(role) + opened

    def content_of(self, answer: str) -> str:
        return read_thinking(answer, self._opened if self._thinking else "")

    def _opening(self, messages: Sequence[Message]) -> str:
        return ""

    def _split(self, content: str) -> tuple[str, str]:
        return split_thinking(content)

    def _block_turn(self, message: Message, *, has_block: bool) -> Turn:
        head, content = header(message["role"]), message["content"]
        if message["role"] == "assistant":
            thinking, content = self._split(content)
            if has_block:
                content = f"<think>\n{thinking.strip()}\n</think>\n\n{content}"
                if content.startswith(self._opened):
                    head, content = head + self._opened, content.removeprefix(self._opened)
        return head, content + self.end
