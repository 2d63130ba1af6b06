"""Conversations as tokens, by the server that has the tokenizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mint._files.server_tokenizer import ServerTokenizer
from mint_chat import Message, TrainOnWhat, check_name
from mint_chat.errors import refused
from mint_chat.messages import check_messages
from mint_chat.template import Template
from mint_chat.train_on_what import trained_messages
from mintrpc.v1 import model_pb2


class ServerRenderer:
    """Does what `mint_chat.Renderer` does, to the token, but for reading answers."""

    def __init__(self, name: str, tokenizer: ServerTokenizer) -> None:
        """Raises BadRequestError for what the server's tokenizer cannot be rendered with."""
        check_name(name)
        self.name = name
        self.tokenizer = tokenizer
        made = self._render([])
        self._stops: list[int] | list[str] = list(made.stop_token_ids) or list(made.stop)

    def build_supervised_example(
        self,
        messages: Sequence[Message],
        train_on_what: TrainOnWhat | str = TrainOnWhat.LAST_ASSISTANT_MESSAGE,
    ) -> tuple[list[int], NDArray[np.float32]]:
        what = TrainOnWhat(train_on_what)
        check_messages(messages, Template.roles)  # those of a format, the server knows
        trained_messages(messages, what)
        (chat,) = self._render([messages], train_on_what=f"TRAIN_ON_WHAT_{what.name}").chats
        return list(chat.tokens), np.array(chat.weights, np.float32)

    def build_generation_prompt(
        self, messages: Sequence[Message], role: str = "assistant", prefill: str | None = None
    ) -> list[int]:
        if role != "assistant":
            raise refused("role", f"is {role!r}; servers render prompts for the assistant alone")
        if prefill:
            raise refused(
                "prefill", "needs the tokenizer here; leave `on_server` of get_tokenizer out"
            )
        check_messages(messages, Template.roles)
        (chat,) = self._render([messages], add_generation_prompt=True).chats
        return list(chat.tokens)

    def get_stop_sequences(self) -> list[int] | list[str]:
        return self._stops.copy()

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        raise refused(
            "tokenizer", "is on the server; leave `on_server` of get_tokenizer out to read answers"
        )

    def _render(
        self, chats: Sequence[Sequence[Message]], **options: Any
    ) -> model_pb2.RenderChatResponse:
        request = model_pb2.RenderChatRequest(renderer=self.name, **options)
        for messages in chats:
            request.chats.add().messages.extend(
                model_pb2.ChatMessage(**message) for message in messages
            )
        return self.tokenizer.render(request)
