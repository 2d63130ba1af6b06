"""Which beginnings of prompts an engine has of late: told by digests, without asking it."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from sampler_service.jobs import Tokens

FIRST_TOKENS = 16  # of the shortest beginning, a block of the engine's cache

Beginnings = Sequence[tuple[int, bytes]]  # lengths, rising, each with a digest


def beginnings(tenant: str, adapter: str, prompt: Tokens) -> Beginnings:
    """Those of a prompt at lengths of three binary digits: some for a long one as well, and the
    longest is not much shorter than what it has in common with another. As in the engine's
    cache, no tenant has another's.
    """
    digest = blake2b(f"{len(tenant)} {tenant}{adapter}".encode(), digest_size=16)
    found, before = [], 0
    for length in _lengths(len(prompt)):
        digest.update(prompt[before:length].tobytes())
        found.append((length, digest.digest()))
        before = length
    return found


def _lengths(most: int) -> Iterator[int]:
    length = FIRST_TOKENS
    while length <= most:
        yield length
        length += 1 << (length.bit_length() - 3)


class KeptPrompts:
    """What an engine's cache holds of prompts, as far as can be told from those it was sent: the
    last ones, up to so many tokens. Common beginnings count once.
    """

    def __init__(self) -> None:
        self._tokens: OrderedDict[bytes, int] = OrderedDict()  # beyond the next shorter beginning
        self.tokens = 0

    def common(self, prompt: Beginnings) -> int:
        """How many tokens of a prompt it has, about."""
        return next((length for length, key in reversed(prompt) if key in self._tokens), 0)

    def add(self, prompt: Beginnings, most_tokens: int) -> None:
        """Notes that the engine gets a prompt, and may keep so many tokens in all."""
        shorter = [0, *(length for length, _ in prompt)]
        for (length, key), before in reversed(list(zip(prompt, shorter, strict=False))):
            if key not in self._tokens:
                self._tokens[key] = length - before
                self.tokens += length - before
            self._tokens.move_to_end(key)  # behind longer ones, which go first
        while self.tokens > most_tokens:
            self.tokens -= self._tokens.popitem(last=False)[1]
