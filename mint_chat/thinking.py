"""Thinking in answers, between the marks that Qwen, GLM and DeepSeek share."""

from collections.abc import Sequence

from mint_chat.messages import Message


def split_thinking(content: str) -> tuple[str, str]:
    """Thinking, empty if there is none, and the rest."""
    if "</think>" not in content:
        return "", content
    thinking = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thinking, content.split("</think>")[-1].lstrip("\n")


def last_question(messages: Sequence[Message]) -> int:
    """Index of the last user message; -1 if there is none."""
    return max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)


def read_thinking(answer: str, opened: str = "") -> str:
    """An answer's content: thinking stays in it between its marks, unless it is empty. `opened` is
    what of a thinking block stood in the prompt already.
    """
    thinking, closed, rest = answer.partition("</think>")
    if closed and not thinking.strip().removeprefix("<think>").strip():
        return rest.lstrip("\n")
    answer = answer.lstrip("\n")
    return opened + answer if answer and not answer.startswith("<think>") else answer
