"""Llama 3's format. (The templates of 3.1 and later add a preamble with dates: see `template`.)"""

from collections.abc import Collection, Mapping, Sequence

from mint.recipe.renderers.chat_format import Rendered, Turn, join_turns
from mint.recipe.renderers.messages import CHAT_ROLES, Message
from mint.recipe.renderers.tokenizer import Tokenizer, token_id


class Llama3:
    roles: Collection[str] = CHAT_ROLES
    template_options: Mapping[str, bool] | None = {}

    def __init__(self, tokenizer: Tokenizer) -> None:
        for token in ("<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"):
            token_id(tokenizer, token, "llama3")
        self.stops: list[int] | list[str] = [token_id(tokenizer, "<|eot_id|>", "llama3")]

    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        return join_turns(map(_turn, messages), opening="<|begin_of_text|>")

    def prompt(self, messages: Sequence[Message], role: str) -> str:
        return self.render(messages, ()).text + _header(role)

    def content_of(self, answer: str) -> str:
        return answer


def _turn(message: Message) -> Turn:
    return Turn(_header(message["role"]), message["content"].strip() + "<|eot_id|>")


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"
