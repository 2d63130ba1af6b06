"""When a continuation ends: at a token, at a text, or at its longest.

Texts are looked for in bytes, so that a text that spans tokens, or a character that does, needs no
decoding of what came before.
"""

import re
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from sampler_service.jobs import StopReason, Stops

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """The bytes that each token stands for in a text."""

    def __init__(self, tokenizer: Any) -> None:  # one of transformers' fast tokenizers
        self._tokenizer = tokenizer
        decoder = repr(tokenizer.backend_tokenizer.decoder)
        self._byte_level = "ByteLevel" in decoder
        self._byte_fallback = "ByteFallback" in decoder
        added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        self._added = {i: str(token.content) for i, token in added.items()}
        # Which stand for no text of their own.
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        # Some decoders treat the first token of a text differently, so the others follow this one.
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to a text; nothing for an id that the tokenizer does not know."""
        if token_id not in self._known:
            self._known[token_id] = self._spell(token_id)
        return self._known[token_id]

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            return bytes(_byte_of_character()[character] for character in piece)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        alone = self._tokenizer.decode(self._anchor)
        followed = self._tokenizer.decode([*self._anchor, token_id])
        return str(followed).removeprefix(str(alone)).encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """How byte-level tokenizers (GPT-2's convention) write bytes."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


class StopWatch:
    """Reads one continuation token by token and says when it ends."""

    def __init__(self, stops: Stops, max_tokens: int, vocabulary: Vocabulary) -> None:
        self._token_ids = stops.token_ids
        self._texts = tuple(text.encode() for text in stops.texts)
        self._longest = max(map(len, self._texts), default=0)
        self._tail = b""  # the last bytes: a text may begin in them
        self._left = max_tokens
        self._vocabulary = vocabulary

    def read(self, token_id: int) -> StopReason | None:
        """Why the continuation ends with this token, or None if it goes on."""
        self._left -= 1
        if token_id in self._token_ids or (self._texts and self._completes_text(token_id)):
            return StopReason.STOP
        return None if self._left else StopReason.LENGTH

    def _completes_text(self, token_id: int) -> bool:
        seen = self._tail + self._vocabulary.bytes_of(token_id)
        self._tail = seen[-(self._longest - 1) :] if self._longest > 1 else b""
        return any(text in seen for text in self._texts)
