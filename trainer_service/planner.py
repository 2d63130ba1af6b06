"""What the engine does next: a pass over tiles of any runs, or all optimizer steps that are ready.

Tenants share by deficit round robin in tokens, as their weights say, and so do the runs of one
tenant, all alike. A run's tiles keep their order.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from trainer_service.calls import Call, Compute
from trainer_service.jobs import Document, Plan, StepRow, StepRows, Tile

# A round gives each tenant a plan's tokens by this number: with small turns, a small request passes
# those that are about as small and not the large ones.
_ROUNDS_PER_PLAN = 8
# A tile takes a plan's tokens by this number, so that no call fills a pass alone. Quarters instead
# of halves cost a run that is alone 1 % (8 documents of 128 tokens on SmolLM2).
_TILES_PER_PLAN = 4
# A tenant that is alone just now, and was not a few plans ago, gets passes of one tile: the others
# are probably about to call again, and wait for the one under way.
_RECENT_PLANS = 4


def tile_tokens(tile: Tile) -> int:
    return sum(len(document.tokens) for document in tile.documents)


def cut(
    call: Call, compute: Compute, max_batch_tokens: int, *, isolated: bool = False
) -> tuple[Tile, ...]:
    """Cuts a call at document boundaries, by its own data alone: no neighbour changes its result.

    A document longer than a tile may be is a tile of its own.
    """
    return tuple(
        Tile(
            training_run_id=call.place.training_run_id,
            sequence=call.place.sequence,
            index=index,
            documents=documents,
            loss=compute.loss,
            backward=compute.backward,
            weighted_only=compute.weighted_only,
            isolated=isolated,
        )
        for index, documents in enumerate(
            _groups(compute.documents, _most_tile_tokens(max_batch_tokens))
        )
    )


def _most_tile_tokens(max_batch_tokens: int) -> int:
    return max(1, max_batch_tokens // _TILES_PER_PLAN)


def _groups(documents: Iterable[Document], most_tokens: int) -> Iterator[tuple[Document, ...]]:
    group: list[Document] = []
    tokens = 0
    for document in documents:
        if group and tokens + len(document.tokens) > most_tokens:
            yield tuple(group)
            group, tokens = [], 0
        group.append(document)
        tokens += len(document.tokens)
    yield tuple(group)


class _Queue(Protocol):
    """Tiles in the order in which they are to run."""

    @property
    def tokens(self) -> int:
        """Of all tiles."""
        ...

    def head_tokens(self) -> int:
        """Tokens of the next tile; 0 if there is none. Stays the same until `pop`."""
        ...

    def pop(self) -> Tile: ...


class _RunQueue:
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

    def pop(self) -> Tile:
        tile, tokens = self._tiles.popleft()
        self.tokens -= tokens
        return tile


Q = TypeVar("Q", bound=_Queue)


@dataclass(slots=True)
class _Share(Generic[Q]):
    queue: Q
    deficit: float = 0.0  # tokens that it may still take in this round


def _alike(key: str) -> float:
    return 1.0


class _Ring(Generic[Q]):
    """Deficit round robin (Shreedhar and Varghese 1995) over queues, or over rings."""

    def __init__(
        self, quantum: int, make: Callable[[], Q], weight_of: Callable[[str], float] = _alike
    ) -> None:
        self._quantum = quantum  # tokens that a queue of weight 1 may take per round
        self._make = make
        self._weight_of = weight_of
        self._shares: dict[str, _Share[Q]] = {}  # those with tiles, in the round's order

    @property
    def tokens(self) -> int:
        return sum(share.queue.tokens for share in self._shares.values())

    def queue(self, key: str) -> Q:
        """The queue of a key; the caller puts something into it at once."""
        if key not in self._shares:
            self._shares[key] = _Share(self._make())
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


class Planner:
    """Tiles and steps that are ready. A plan is formed when the engine is idle, from all of it."""

    def __init__(self, max_batch_tokens: int, weight_of: Callable[[str], float] = _alike) -> None:
        """`weight_of` a tenant: how many times the tokens of a tenant of weight 1 it gets."""
        self.max_batch_tokens = max_batch_tokens
        quantum = max(1, max_batch_tokens // _ROUNDS_PER_PLAN)
        self._tenants: _Ring[_Ring[_RunQueue]] = _Ring(
            quantum, lambda: _Ring(quantum, _RunQueue), weight_of
        )
        self._steps: list[StepRow] = []
        self._isolated: Tile | None = None  # met while a plan was filled; it has the next one
        self._recent: deque[frozenset[str]] = deque(maxlen=_RECENT_PLANS)  # who had tiles, by plan

    def add(self, tenant: str, tiles: Sequence[Tile]) -> None:
        """Queues the tiles of one call behind those of its run."""
        for tile in tiles:
            self._tenants.queue(tenant).queue(tile.training_run_id).add(tile)

    def add_step(self, step: StepRow) -> None:
        """Queues a step of a run of which nothing else is queued."""
        self._steps.append(step)

    def tokens_ahead(self, tenant: str, training_run_id: str) -> int | None:
        """About how many tokens of other runs come before a run's next tile; None: it has none."""
        runs = self._tenants.find(tenant)
        queue = runs.find(training_run_id) if runs else None
        if queue is None:
            return None
        head_tokens = queue.head_tokens()
        return self.tokens_until(tenant, training_run_id, head_tokens) - head_tokens

    def tokens_until(self, tenant: str, training_run_id: str | None, own_tokens: int) -> int:
        """About how many tokens are computed until a tenant, or one run of it, has had
        `own_tokens`, these included. 0 if nothing of it is queued.
        """
        runs = self._tenants.find(tenant)
        if runs is None:
            return 0
        if training_run_id is not None:
            if runs.find(training_run_id) is None:
                return 0
            own_tokens += runs.ahead(training_run_id, own_tokens)
        return own_tokens + self._tenants.ahead(tenant, own_tokens)

    def next_job(self) -> Plan | StepRows | None:
        """What the engine should do now: all ready steps together, else a pass over tiles."""
        if self._steps:
            steps, self._steps = self._steps, []
            return StepRows(tuple(steps))
        if self._isolated is not None:
            tile, self._isolated = self._isolated, None
            return Plan((tile,))
        tiles: list[Tile] = []
        room = self._room()
        while tokens := self._tenants.head_tokens():
            if tiles and tokens > room:
                break
            tile = self._tenants.pop()
            if tile.isolated:
                if not tiles:
                    return Plan((tile,))
                self._isolated = tile
                break
            tiles.append(tile)
            room -= tokens
        return Plan(tuple(tiles)) if tiles else None

    def _room(self) -> int:
        """Most tokens of the plan to be formed, unless a single tile has more."""
        waiting = self._tenants.keys()
        lately = frozenset().union(*self._recent)
        if waiting:
            self._recent.append(waiting)
        if len(waiting) == 1 and lately - waiting:
            return _most_tile_tokens(self.max_batch_tokens)
        return self.max_batch_tokens
