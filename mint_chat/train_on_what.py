"""Which messages of a conversation are trained."""

from collections.abc import Sequence
from enum import StrEnum

from mint_chat.errors import refused
from mint_chat.messages import Message


class TrainOnWhat(StrEnum):
    """What gets weight 1: what the authors of these messages wrote, their end marks included."""

    LAST_ASSISTANT_MESSAGE = "last_assistant_message"
    LAST_ASSISTANT_TURN = "last_assistant_turn"  # assistant messages after the last user message
    ALL_ASSISTANT_MESSAGES = "all_assistant_messages"
    ALL_MESSAGES = "all_messages"
    ALL_TOKENS = "all_tokens"  # headers too
    ALL_USER_AND_SYSTEM_MESSAGES = "all_user_and_system_messages"
    CUSTOMIZED = "customized"  # those whose `trainable` is true

    @classmethod
    def _missing_(cls, value: object) -> "TrainOnWhat":
        raise refused("train_on_what", f"is {value!r}; it must be one of {', '.join(cls)}")


def trained_messages(messages: Sequence[Message], train_on_what: TrainOnWhat) -> list[int]:
    """Indices of the messages that get weight. None at all is refused, unless customized."""
    if train_on_what is TrainOnWhat.CUSTOMIZED:
        return [i for i, message in enumerate(messages) if _trainable(message, i)]
    for i, message in enumerate(messages):
        if "trainable" in message:
            raise refused(
                f"messages[{i}].trainable",
                "is set, which `train_on_what` "
                f"{train_on_what.value!r} does not read; use 'customized'",
            )
    chosen = _chosen(messages, train_on_what)
    if not chosen:
        raise refused(
            "messages",
            f"has nothing to train on for `train_on_what` {train_on_what.value!r}; "
            f"its roles are {', '.join(message['role'] for message in messages)}",
        )
    return chosen


def _chosen(messages: Sequence[Message], train_on_what: TrainOnWhat) -> list[int]:
    roles = [message["role"] for message in messages]
    assistant = [i for i, role in enumerate(roles) if role == "assistant"]
    match train_on_what:
        case TrainOnWhat.LAST_ASSISTANT_MESSAGE:
            return assistant[-1:]
        case TrainOnWhat.LAST_ASSISTANT_TURN:
            last_user = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
            return [i for i in assistant if i > last_user]
        case TrainOnWhat.ALL_ASSISTANT_MESSAGES:
            return assistant
        case TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES:
            return [i for i, role in enumerate(roles) if role in ("user", "system")]
    return list(range(len(messages)))


def _trainable(message: Message, index: int) -> bool:
    field = f"messages[{index}].trainable"
    if "trainable" not in message:
        raise refused(field, "is missing; `train_on_what` 'customized' needs it in every message")
    if not isinstance(message["trainable"], bool):
        raise refused(field, f"is {message['trainable']!r}; give true or false")
    return message["trainable"]
