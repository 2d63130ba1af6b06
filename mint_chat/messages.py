"""What a conversation is made of."""

from collections.abc import Collection, Sequence
from typing import NotRequired, TypedDict

from mint_chat.errors import InvalidChat, refused

CHAT_ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn. Thinking, where a model does it, stands in `content` between its own marks."""

    role: str
    content: str
    trainable: NotRequired[bool]  # for TrainOnWhat.CUSTOMIZED, and then in every message


def check_messages(messages: Sequence[Message], roles: Collection[str]) -> None:
    """Refuses what cannot be rendered."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise refused("messages", f"is a {type(messages).__name__}; give a list of messages")
    if not messages:
        raise refused("messages", "is empty; give at least one message")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]", roles)


def _check_message(message: object, field: str, roles: Collection[str]) -> None:
    if not isinstance(message, dict):
        raise refused(
            field, f"is a {type(message).__name__}; give a dict with `role` and `content`"
        )
    for key in ("role", "content"):
        if key not in message:
            raise InvalidChat(f"`{field}` has no `{key}`", field=f"{field}.{key}")
    for key in message:
        if key not in Message.__annotations__:
            raise InvalidChat(
                f"`{field}` has the key {key!r}, which no renderer reads; "
                "give `role`, `content` and, if customized, `trainable`",
                field=f"{field}.{key}",
            )
    role, content = message["role"], message["content"]
    if role not in roles:
        raise refused(f"{field}.role", f"is {role!r}; this renderer knows {', '.join(roles)}")
    if not isinstance(content, str):
        raise refused(f"{field}.content", f"is a {type(content).__name__}; give a string")


def check_system_first(messages: Sequence[Message]) -> None:
    """Refuses a system message that is not the first."""
    for index, message in enumerate(messages):
        if index and message["role"] == "system":
            raise refused(
                f"messages[{index}].role",
                "is 'system', which this renderer knows as the first message alone",
            )


def check_turns(messages: Sequence[Message]) -> None:
    """Refuses what is not a system message, if any, and user and assistant by turns."""
    check_system_first(messages)
    opening = int(messages[0]["role"] == "system")
    for index in range(opening, len(messages)):
        role, expected = messages[index]["role"], ("user", "assistant")[(index - opening) % 2]
        if role != expected:
            raise refused(
                f"messages[{index}].role",
                f"is {role!r} where {expected!r} is due; this renderer knows user and "
                "assistant by turns, the user first",
            )
    if opening == len(messages):
        raise refused("messages", "has a system message alone; give a user message after it")
