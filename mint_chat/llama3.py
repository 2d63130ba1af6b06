"""Llama 3's format. (The templates of 3.1 and later add a preamble with dates: see `template`.)"""

from collections.abc import Collection, Sequence

from mint_chat.chat_format import ChatFormat, Rendered, Turn, join_turns
from mint_chat.messages import Message
from mint_chat.tokenizer import Tokenizer, token_id


class Llama3(ChatFormat):
    end = "<|eot_id|>"

    def __init__(self, tokenizer: Tokenizer) -> None:
        for token in ("<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"):
            token_id(tokenizer, token, "llama3")
        self.stops = [token_id(tokenizer, self.end, "llama3")]

    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        return join_turns(map(_turn, messages), opening="<|begin_of_text|>")

    def prompt(self, messages: Sequence[Message], role: str) -> str:
        return self.render(messages, ()).text + _header(role)


def _turn(message: Message) -> Turn:
    return _header(message["role"]), message["content"].strip() + Llama3.end


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"
