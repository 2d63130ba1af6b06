"""Deficit round robin over queues of tiles, and over rings of such queues, in tokens as tiles cost
them.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from trainer_service.jobs import Tile, tile_cost


class RunQueue:
    """First come, first served."""

    def __init__(self) -> None:
        self._tiles: deque[tuple[Tile, int]] = deque()  # with its tokens, which are asked for often
        self.tokens = 0  # of all tiles
        self.deficit = 0.0  # tokens that it may still take in this round of the ring that it is in

    def add(self, tile: Tile) -> None:
        tokens = tile_cost(tile)
        self._tiles.append((tile, tokens))
        self.tokens += tokens

    def head_tokens(self) -> int:
        """Tokens of the next tile; 0 if there is none. Stays the same until `pop`."""
        return self._tiles[0][1] if self._tiles else 0

    def head(self) -> Tile:
        """The next tile; there must be one."""
        return self._tiles[0][0]

    def tiles(self) -> list[Tile]:
        return [tile for tile, _ in self._tiles]

    def pop(self) -> Tile:
        tile, tokens = self._tiles.popleft()
        self.tokens -= tokens
        return tile


Q = TypeVar("Q", bound="RunQueue | Ring[Any]")


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
        self.queues: dict[str, Q] = {}  # by key, those with tiles, in the round's order
        self.deficit = 0.0

    @property
    def tokens(self) -> int:
        return sum(queue.tokens for queue in self.queues.values())

    def queue(self, key: str) -> Q:
        """The queue of a key; the caller puts something into it at once."""
        if key not in self.queues:
            self.queues[key] = self._make()
        return self.queues[key]

    def ahead(self, key: str, own_tokens: int) -> int:
        """About how many tokens the other queues take before that of `key` has taken
        `own_tokens`: right to one tile of each of them.
        """
        missing = own_tokens - self.queues[key].deficit
        rounds = max(0, math.ceil(missing / (self._quantum * self._weight_of(key))))
        total = 0.0
        turns = rounds + 1  # of those before `key` in the round; those behind it get one less
        for other, rival in self.queues.items():
            if other == key:
                turns -= 1
            elif turns:
                quanta = (turns - 1) * self._quantum * self._weight_of(other)
                total += min(rival.tokens, rival.deficit + quanta)
        return int(total)

    def head_tokens(self) -> int:
        return self.head()[1].head_tokens() if self.queues else 0

    def head(self) -> tuple[str, Q]:
        """The queue of the next tile, and whose it is; there must be one. The same until `pop`,
        since the first in the round can then pay.
        """
        while True:
            key, queue = next(iter(self.queues.items()))
            if queue.deficit >= queue.head_tokens():
                return key, queue
            queue.deficit += self._quantum * self._weight_of(key)
            self.queues[key] = self.queues.pop(key)  # to the end of the round

    def pop(self) -> Tile:
        key, queue = self.head()
        queue.deficit -= queue.head_tokens()
        tile = queue.pop()
        if not queue.head_tokens():
            del self.queues[key]  # an idle queue saves nothing up
        return tile
