"""Deficit round robin in tokens over queues of tiles, and over rings of such queues."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from trainer_service.jobs import Tile, tile_tokens


class Queue(Protocol):
    """Tiles in the order in which they are to run."""

    @property
    def tokens(self) -> int:
        """Of all tiles."""
        ...

    def head_tokens(self) -> int:
        """Tokens of the next tile; 0 if there is none. Stays the same until `pop`."""
        ...

    def pop(self) -> Tile: ...


class RunQueue:
    """First come, first served."""

    def __init__(self) -> None:
        self._tiles: deque[tuple[Tile, int]] = deque()  # with its tokens, which are asked for often
        self.tokens = 0

    def add(self, tile: Tile) -> None:
        tokens = tile_tokens(tile)
        self._tiles.append((tile, tokens))
        self.tokens += tokens

    def head_tokens(self) -> int:
        return self._tiles[0][1] if self._tiles else 0

    def tiles(self) -> list[Tile]:
        return [tile for tile, _ in self._tiles]

    def pop(self) -> Tile:
        tile, tokens = self._tiles.popleft()
        self.tokens -= tokens
        return tile


Q = TypeVar("Q", bound=Queue)


@dataclass(slots=True)
class Share(Generic[Q]):
    queue: Q
    deficit: float = 0.0  # tokens that it may still take in this round


def alike(key: str) -> float:
    return 1.0


class Ring(Generic[Q]):
    """Deficit round robin (Shreedhar and Varghese 1995) over queues, or over rings."""

    def __init__(
        self, quantum: int, make: Callable[[], Q], weight_of: Callable[[str], float] = alike
    ) -> None:
        self._quantum = quantum  # tokens that a queue of weight 1 may take per round
        self._make = make
        self._weight_of = weight_of
        self._shares: dict[str, Share[Q]] = {}  # those with tiles, in the round's order

    @property
    def tokens(self) -> int:
        return sum(share.queue.tokens for share in self._shares.values())

    def queue(self, key: str) -> Q:
        """The queue of a key; the caller puts something into it at once."""
        if key not in self._shares:
            self._shares[key] = Share(self._make())
        return self._shares[key].queue

    def find(self, key: str) -> Q | None:
        """The queue of a key, if there is something in it."""
        share = self._shares.get(key)
        return share.queue if share else None

    def ahead(self, key: str, own_tokens: int) -> int:
        """About how many tokens the other queues take before that of `key` has taken
        `own_tokens`: right to one tile of each of them.
        """
        share = self._shares[key]
        missing = own_tokens - share.deficit
        rounds = max(0, math.ceil(missing / (self._quantum * self._weight_of(key))))
        total = 0.0
        turns = rounds + 1  # of those before `key` in the round; those behind it get one less
        for other, rival in self._shares.items():
            if other == key:
                turns -= 1
            elif turns:
                quanta = (turns - 1) * self._quantum * self._weight_of(other)
                total += min(rival.queue.tokens, rival.deficit + quanta)
        return int(total)

    def head_tokens(self) -> int:
        if not self._shares:
            return 0
        key = self._next()
        return self._shares[key].queue.head_tokens()

    def head(self) -> tuple[str, Q]:
        """The queue of the next tile, and whose it is; there must be one."""
        key = self._next()
        return key, self._shares[key].queue

    def items(self) -> list[tuple[str, Q]]:
        """The queues that have something in them, by key."""
        return [(key, share.queue) for key, share in self._shares.items()]

    def take(self, key: str) -> Q | None:
        """Takes a queue out, with all that is in it."""
        share = self._shares.pop(key, None)
        return share.queue if share else None

    def keys(self) -> frozenset[str]:
        """Whose queues have something in them."""
        return frozenset(self._shares)

    def pop(self) -> Tile:
        key = self._next()
        share = self._shares[key]
        share.deficit -= share.queue.head_tokens()
        tile = share.queue.pop()
        if not share.queue.head_tokens():
            del self._shares[key]  # an idle queue saves nothing up
        return tile

    def _next(self) -> str:
        """Whose turn it is; the same until `pop`, since the first in the round can then pay."""
        while True:
            key, share = next(iter(self._shares.items()))
            if share.deficit >= share.queue.head_tokens():
                return key
            share.deficit += self._quantum * self._weight_of(key)
            self._shares[key] = self._shares.pop(key)  # to the end of the round
