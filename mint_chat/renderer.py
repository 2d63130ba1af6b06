"""Tokens and weights out of conversations, and messages out of tokens."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mint_chat.chat_format import ChatFormat
from mint_chat.comparison import warn_of_differences
from mint_chat.errors import InvalidChat, refused
from mint_chat.messages import Message, check_messages
from mint_chat.tokenizer import Tokenizer, encode, encode_with_starts
from mint_chat.train_on_what import TrainOnWhat, trained_messages


class Renderer:
    """Made by `get_renderer`. Encodes a conversation's text as a whole, as a template's is."""

    def __init__(self, name: str, tokenizer: Tokenizer, chat_format: ChatFormat) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self._format = chat_format
        warn_of_differences(name, tokenizer, chat_format)

    def build_supervised_example(
        self,
        messages: Sequence[Message],
        train_on_what: TrainOnWhat | str = TrainOnWhat.LAST_ASSISTANT_MESSAGE,
    ) -> tuple[list[int], NDArray[np.float32]]:
        """The conversation's tokens and their weights as targets, 0 or 1, both of the same length.

        A message's weight covers what its author writes, and the token that ends it. An answer that
        does not end in what sampling stops at is refused.
        """
        what = TrainOnWhat(train_on_what)
        check_messages(messages, self._format.roles)
        trained = trained_messages(messages, what)
        rendered = self._format.render(messages, trained)
        tokens, starts = encode_with_starts(self.tokenizer, rendered.text)
        weights = np.full(len(tokens), what is TrainOnWhat.ALL_TOKENS, dtype=np.float32)
        # A token that straddles a border belongs to the side it starts on.
        places = np.asarray(starts)
        for index in trained:
            start, end = rendered.outputs[index]
            if messages[index]["role"] == "assistant":
                self._check_end(rendered.text[start:end], index)
            weights[(places >= start) & (places < end)] = 1.0
        return tokens, weights

    def build_generation_prompt(
        self, messages: Sequence[Message], role: str = "assistant", prefill: str | None = None
    ) -> list[int]:
        """What to sample the next message from; it then goes on after `prefill`."""
        check_messages(messages, self._format.roles)
        if role not in self._format.roles:
            known = ", ".join(self._format.roles)
            raise refused("role", f"is {role!r}; this renderer knows {known}")
        text = self._format.prompt(messages, role) + (prefill or "")
        return encode(self.tokenizer, text)

    def get_stop_sequences(self) -> list[int] | list[str]:
        """What ends an answer, for `SamplingParams.stop`: token ids, or texts."""
        return self._format.stops.copy()

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        """The sampled message, and whether it came to its proper end."""
        ids = [int(token) for token in tokens]
        ends = {stop for stop in self._format.stops if isinstance(stop, int)}
        if not ends and self.tokenizer.eos_token_id is not None:
            ends = {self.tokenizer.eos_token_id}
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        complete = end is not None and end == len(ids) - 1
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=False)
        for stop in self._format.stops:
            if isinstance(stop, str) and stop in text:
                text, complete = text.partition(stop)[0], True
        return {"role": "assistant", "content": self._format.content_of(text)}, complete

    def _check_end(self, answer: str, index: int) -> None:
        """Refuses an answer that would never teach to stop."""
        if not self._format.end:
            raise InvalidChat(
                f"renderer `{self.name}` cannot train answers of this tokenizer, whose chat "
                "template ends them with nothing that sampling stops at; use renderer `role_colon`",
                field="tokenizer",
            )
        if self._format.end not in answer:
            raise refused(
                f"messages[{index}]",
                f"does not end in {self._format.end!r} here, at which sampling stops (renderer "
                f"`{self.name}`); give each answer a conversation that ends with it, and train "
                "that one's last assistant message",
            )
