"""Qwen3's format: ChatML, with thinking in the answer to the last question alone.

As in the model's own template, an earlier answer loses its thinking, and the last one has a
thinking block even if it is empty. An empty block is the answer's own work where the model may
think; with thinking disabled it is part of the prompt.
"""

from collections.abc import Collection, Sequence

from mint_chat.chat_format import ChatFormat, Rendered, Turn, join_turns
from mint_chat.messages import Message
from mint_chat.tokenizer import Tokenizer, token_id

_EMPTY_BLOCK = "<think>\n\n</think>\n\n"


class Qwen3(ChatFormat):
    end = "<|im_end|>"

    def __init__(self, tokenizer: Tokenizer, *, thinking: bool) -> None:
        self._thinking = thinking
        token_id(tokenizer, "<|im_start|>", "qwen3")
        self.stops = [token_id(tokenizer, self.end, "qwen3")]
        self.template_options = {"enable_thinking": thinking}

    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        question = _last_question(messages)
        last = len(messages) - 1
        turns = (
            self._turn(message, answer=index > question, last=index == last)
            for index, message in enumerate(messages)
        )
        return join_turns(turns, gap="\n")

    def prompt(self, messages: Sequence[Message], role: str) -> str:
        skip = role == "assistant" and not self._thinking
        return self.render(messages, ()).text + _header(role) + (_EMPTY_BLOCK if skip else "")

    def content_of(self, answer: str) -> str:
        """Thinking stays in the content, between its marks, unless it is empty."""
        return answer.removeprefix(_EMPTY_BLOCK)

    def _turn(self, message: Message, *, answer: bool, last: bool) -> Turn:
        header, content = _header(message["role"]), message["content"]
        if message["role"] == "assistant":
            thinking, content = _split(content)
            if answer and (last or thinking):
                block = "<think>\n" + thinking.strip("\n") + "\n</think>\n\n"
                content = content.lstrip("\n")
                if block == _EMPTY_BLOCK and not self._thinking:
                    header += block
                else:
                    content = block + content
        return header, content + self.end


def _header(role: str) -> str:
    return f"<|im_start|>{role}\n"


def _split(content: str) -> tuple[str, str]:
    """Thinking, empty if there is none, and the rest."""
    if "</think>" not in content:
        return "", content
    thinking = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thinking, content.split("</think>")[-1].lstrip("\n")


def _last_question(messages: Sequence[Message]) -> int:
    """Index of the last user message that is not a tool's answer; the last message if none is."""
    for index in range(len(messages) - 1, -1, -1):
        content = messages[index]["content"]
        is_tool = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[index]["role"] == "user" and not is_tool:
            return index
    return len(messages) - 1
