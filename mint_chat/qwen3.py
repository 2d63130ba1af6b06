"""Qwen3's format: ChatML, with thinking in the answer to the last question alone.

As in the model's own template, an earlier answer loses its thinking, and the last one has a
thinking block even if it is empty. An empty block is the answer's own work where the model may
think; with thinking disabled it is part of the prompt.
"""

from collections.abc import Collection, Sequence

from mint_chat.chat_format import ChatFormat, Rendered, Turn, join_turns
from mint_chat.messages import Message
from mint_chat.thinking import split_thinking
from mint_chat.tokenizer import Tokenizer, token_id

EMPTY_BLOCK = "<think>\n\n</think>\n\n"


class Qwen3(ChatFormat):
    name = "qwen3"
    end = "<|im_end|>"

    def __init__(self, tokenizer: Tokenizer, *, thinking: bool) -> None:
        self._thinking = thinking
        token_id(tokenizer, "<|im_start|>", self.name)
        self.stops = [token_id(tokenizer, self.end, self.name)]
        self.template_options = {"enable_thinking": thinking}

    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        last = len(messages) - 1
        question = last_query(messages, default=last)
        turns = (
            self._turn(message, answer=index > question, last=index == last)
            for index, message in enumerate(messages)
        )
        return join_turns(turns, gap="\n")

    def prompt(self, messages: Sequence[Message], role: str) -> str:
        skip = role == "assistant" and not self._thinking
        return self.render(messages, ()).text + header(role) + (EMPTY_BLOCK if skip else "")

    def content_of(self, answer: str) -> str:
        """Thinking stays in the content, between its marks, unless it is empty."""
        return answer.removeprefix(EMPTY_BLOCK)

    def _turn(self, message: Message, *, answer: bool, last: bool) -> Turn:
        head, content = header(message["role"]), message["content"]
        if message["role"] == "assistant":
            thinking, content = split_thinking(content)
            if answer and (last or thinking):
                block = "<think>\n" + thinking.strip("\n") + "\n</think>\n\n"
                content = content.lstrip("\n")
                if block == EMPTY_BLOCK and not self._thinking:
                    head += block
                else:
                    content = block + content
        return head, content + self.end


def header(role: str) -> str:
    return f"<|im_start|>{role}\n"


def last_query(messages: Sequence[Message], default: int) -> int:
    """Index of the last user message that is not a tool's answer; `default` if none is."""
    for index in range(len(messages) - 1, -1, -1):
        content = messages[index]["content"]
        is_tool = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[index]["role"] == "user" and not is_tool:
            return index
    return default
