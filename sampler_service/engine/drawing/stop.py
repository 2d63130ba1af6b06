"""When a continuation ends: at a token, at a text, or at its longest.

Texts are looked for in bytes, so that a text that spans tokens, or a character that does, needs no
decoding of what came before.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from sampler_service.jobs import StopReason, Stops

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNREADABLE = "\ufffd"  # what decoders make of bytes that are no UTF-8 by themselves
_BESIDE = "a"  # a piece between two of which all decoders spell others as in the midst of a text
_COMPLETE = -1  # a text is


class Vocabulary:
    """The bytes that each token adds to a decoded text, in the midst of it: some decoders treat
    the first or last token otherwise. Bytes of a token that are no UTF-8 are its own, though a
    decoder may replace them, and others beside them.
    """

    def __init__(self, tokenizer: Any) -> None:  # one of transformers' fast tokenizers
        self._backend = tokenizer.backend_tokenizer
        decoder = repr(self._backend.decoder)
        self._byte_level = "ByteLevel" in decoder
        self._byte_fallback = "ByteFallback" in decoder
        added = tokenizer.added_tokens_decoder.items()
        # Which stand for no text of their own.
        self.special_ids = frozenset(int(i) for i, token in added if token.special)
        self._before = self._decode([_BESIDE])
        self._behind = self._decode([_BESIDE, _BESIDE]).removeprefix(self._before)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to a text; nothing for an id that the tokenizer does not know."""
        if token_id not in self._known:
            self._known[token_id] = self._spell(token_id)
        return self._known[token_id]

    def _spell(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        text = self._decode([_BESIDE, piece, _BESIDE])
        text = text.removeprefix(self._before).removesuffix(self._behind)
        if _UNREADABLE in text:
            if self._byte_level and _byte_of_character().keys() >= set(piece):
                return bytes(_byte_of_character()[character] for character in piece)
            if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(piece)):
                return bytes([int(match[1], 16)])
        return text.encode()

    def _decode(self, pieces: list[str]) -> str:
        decoder = self._backend.decoder
        return " ".join(pieces) if decoder is None else str(decoder.decode(pieces))


@cache
def _byte_of_character() -> dict[str, int]:
    """How byte-level tokenizers (GPT-2's convention) write bytes."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


class StopTexts:
    """Finds texts in what tokens spell (Aho and Corasick 1975, "Efficient string matching"): a byte
    costs the same however many texts there are. Made once per request, for all of its samples.

    A node stands for the beginning of a text that has been read; 0: of none.
    """

    def __init__(self, texts: Sequence[str], vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._edges: dict[int, int] = {}  # by node and byte: the node they lead to, or _COMPLETE
        self._fallback = [0]  # by node: that of its longest end that is a beginning, too
        # Level by level, since nodes fall back to those of shorter beginnings; what a complete text
        # begins need not be looked for.
        level = sorted(((text.encode(), 0) for text in texts), key=lambda each: len(each[0]))
        for at in range(max((len(text) for text, _ in level), default=0)):
            reached = [(t, self._grow(node, t[at], at + 1 == len(t))) for t, node in level]
            level = [(text, node) for text, node in reached if node != _COMPLETE]

    def _grow(self, node: int, byte: int, is_last: bool) -> int:
        key = node << 8 | byte
        if key not in self._edges:
            fallback = self._next(self._fallback[node], byte) if node else 0
            if is_last or fallback == _COMPLETE:
                self._edges[key] = _COMPLETE
            else:
                self._edges[key] = len(self._fallback)
                self._fallback.append(fallback)
        return self._edges[key]

    def _next(self, node: int, byte: int) -> int:
        while (reached := self._edges.get(node << 8 | byte)) is None and node:
            node = self._fallback[node]
        return reached or 0

    def read(self, node: int, token_id: int) -> int:
        """The node that a token leads to, or _COMPLETE."""
        for byte in self._vocabulary.bytes_of(token_id):
            node = self._next(node, byte)
            if node == _COMPLETE:
                break
        return node


class StopWatch:
    """Reads one continuation token by token and says when it ends."""

    def __init__(self, stops: Stops, max_tokens: int, texts: StopTexts) -> None:
        """`texts`: those of `stops`."""
        self._token_ids = stops.token_ids
        self._texts = texts if stops.texts else None
        self._node = 0
        self._left = max_tokens

    def read(self, token_id: int) -> StopReason | None:
        """Why the continuation ends with this token, or None if it goes on."""
        self._left -= 1
        if self._texts is not None:
            self._node = self._texts.read(self._node, token_id)
        if token_id in self._token_ids or self._node == _COMPLETE:
            return StopReason.STOP
        return None if self._left else StopReason.LENGTH
