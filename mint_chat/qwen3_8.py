"""Qwen3.8's format: Qwen3.5's with every answer's thinking, and a wish for how hard to think."""

from collections.abc import Sequence

from mint_chat.chat_format import Turn
from mint_chat.errors import refused
from mint_chat.messages import Message
from mint_chat.qwen3 import header
from mint_chat.qwen3_5 import Qwen3_5
from mint_chat.thinking import split_thinking
from mint_chat.tokenizer import Tokenizer

# As the model has been trained to read it.
_WISHES = {
    "xhigh": "Reasoning effort is set to xhigh. Please think carefully through the task, validate "
    "key assumptions, consider plausible alternatives, and prioritize correctness, consistency, "
    "and clarity in the final answer.",
    "low": "Reasoning effort is set to low. Keep your thinking brief and focused, moving directly "
    "to the conclusion without unnecessary elaboration.",
}


class Qwen3_8(Qwen3_5):
    name = "qwen3_8"

    def __init__(self, tokenizer: Tokenizer, *, effort: str | None) -> None:
        super().__init__(tokenizer, thinking=effort is not None, preserve=True)
        self._wish = _WISHES.get(effort or "", "")
        self.template_options = {"enable_thinking": False}
        if effort is not None:
            self.template_options = {"reasoning_effort": effort}

    def _opening(self, messages: Sequence[Message]) -> str:
        if messages[0]["role"] == "system":
            if not self._wish and not messages[0]["content"]:
                raise refused("messages[0].content", "is empty; leave the system message out")
            return ""
        if not self._wish:
            return ""
        return header("system") + self._wish + self.end + "\n"

    def _split(self, content: str) -> tuple[str, str]:
        thinking, content = split_thinking(content)
        return thinking, content.strip()

    def _block_turn(self, message: Message, *, has_block: bool) -> Turn:
        head, output = super()._block_turn(message, has_block=has_block)
        if message["role"] == "system" and self._wish:
            head += self._wish + ("\n\n" if message["content"] else "")
        return head, output
