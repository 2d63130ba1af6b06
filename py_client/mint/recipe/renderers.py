"""Conversations as tokens, and back, in this client's types."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

import mint_chat
from mint._files.server_tokenizer import ServerTokenizer
from mint.errors import InvalidInputError
from mint.recipe.server_renderer import ServerRenderer
from mint.types import ModelInput
from mint_chat import RENDERER_NAMES, Message, RendererMismatchWarning, TrainOnWhat
from mint_chat.tokenizer import Tokenizer

__all__ = [
    "RENDERER_NAMES",
    "Message",
    "Renderer",
    "RendererMismatchWarning",
    "TrainOnWhat",
    "get_renderer",
]


class Renderer:
    """Made by `get_renderer`."""

    def __init__(self, renderer: mint_chat.Renderer | ServerRenderer) -> None:
        self._renderer = renderer
        self.name = renderer.name
        self.tokenizer = renderer.tokenizer

    def build_supervised_example(
        self,
        messages: Sequence[Message],
        train_on_what: TrainOnWhat | str = TrainOnWhat.LAST_ASSISTANT_MESSAGE,
    ) -> tuple[ModelInput, NDArray[np.float32]]:
        """The conversation's tokens and their weights as targets, 0 or 1, both of the same length.

        A message's weight covers what its author writes, the token that ends it included.
        """
        with _told():
            tokens, weights = self._renderer.build_supervised_example(messages, train_on_what)
        return ModelInput.from_ints(tokens), weights

    def build_generation_prompt(
        self, messages: Sequence[Message], role: str = "assistant", prefill: str | None = None
    ) -> ModelInput:
        """What to sample the next message from; it then goes on after `prefill`."""
        with _told():
            tokens = self._renderer.build_generation_prompt(messages, role, prefill)
        return ModelInput.from_ints(tokens)

    def get_stop_sequences(self) -> list[int] | list[str]:
        """What ends an answer, for `SamplingParams.stop`: token ids, or texts."""
        return self._renderer.get_stop_sequences()

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        """The sampled message, and whether it came to its proper end."""
        with _told():
            return self._renderer.parse_response(tokens)


def get_renderer(name: str, tokenizer: Tokenizer | ServerTokenizer) -> Renderer:
    """A renderer by name, one of RENDERER_NAMES.

    Warns (RendererMismatchWarning) where it differs from the tokenizer's own chat template. With a
    tokenizer that is on the server, conversations are rendered there, in the same tokens, without
    that warning; `parse_response`, `prefill` and prompts for another role are then refused.
    """
    with _told():
        if isinstance(tokenizer, ServerTokenizer):
            return Renderer(ServerRenderer(name, tokenizer))
        return Renderer(mint_chat.get_renderer(name, tokenizer))


@contextmanager
def _told() -> Iterator[None]:
    """Refuses as the rest of this client does."""
    try:
        yield
    except mint_chat.InvalidChat as error:
        raise InvalidInputError(error.message, field=error.field) from None
