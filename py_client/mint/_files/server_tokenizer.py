"""The base model's tokenizer where it lies: a call to the server in place of its files."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from mint._transport.call import Call
from mint._transport.connection import Connection
from mint._transport.failures import Failure
from mint._transport.servers import Servers
from mint.errors import refused
from mint.types import _checks
from mint.types.model_input import token_list
from mintrpc.v1 import model_pb2

T = TypeVar("T")
# What the user has written, in place of what the request calls it.
_WRITTEN = {
    "chats[0].": "",
    "sequences[0].tokens": "token_ids",
    "sequences": "token_ids",
    "renderer": "tokenizer",
}


class ServerTokenizer:
    """Gives the tokens that the tokenizer itself gives, each time by a call to the server.

    Renderers take it. It has nothing else of what a tokenizer has.
    """

    def __init__(self, servers: Servers, connection: Connection, base_model: str) -> None:
        """Raises InvalidInputError if the server makes no tokens of texts."""
        self._connection = connection
        self._base_model = servers.served(connection, base_model).model_name
        capabilities = servers.capabilities(connection)
        if "texts" not in capabilities.features:
            raise refused(
                "on_server",
                f"needs the feature `texts`, which the server at `{connection.address.target}`, "
                f"of version {capabilities.server_version}, does not list; leave it out, and the "
                "tokenizer's files are fetched",
            )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The text's tokens. `add_special_tokens`: with those that begin or end a sequence."""
        request = model_pb2.TokenizeRequest(
            base_model=self._base_model,
            texts=[_checks.text(text, "text")],
            add_special_tokens=_checks.switch(add_special_tokens, "add_special_tokens"),
        )
        return self._ask(
            self._connection.model.Tokenize, request, lambda made: list(made.sequences[0].tokens)
        )

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The tokens' text. `skip_special_tokens`: without such as end a sequence."""
        request = model_pb2.DetokenizeRequest(
            base_model=self._base_model,
            sequences=[{"tokens": token_list(token_ids, "token_ids")}],
            skip_special_tokens=_checks.switch(skip_special_tokens, "skip_special_tokens"),
        )
        return self._ask(
            self._connection.model.Detokenize, request, lambda made: str(made.texts[0])
        )

    def render(self, request: model_pb2.RenderChatRequest) -> model_pb2.RenderChatResponse:
        """What the server makes of conversations."""
        request.base_model = self._base_model
        made: model_pb2.RenderChatResponse = self._ask(
            self._connection.model.RenderChat, request, lambda made: made
        )
        return made

    def _ask(self, method: Any, request: Any, convert: Callable[[Any], T]) -> T:
        call = Call(self._connection, method, request, convert)
        call.explained = _as_written
        return call.ask()


def _as_written(failure: Failure) -> Failure:
    message, field = failure.message, f"`{failure.field}"
    for wire, written in _WRITTEN.items():
        message = message.replace(f"`{wire}", f"`{written}")
        field = field.replace(f"`{wire}", f"`{written}")
    return replace(failure, message=message, field=field[1:])
