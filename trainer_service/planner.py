"""What the engine does next: a pass over tiles of any runs, or all optimizer steps that are ready.

Tenants share by deficit round robin in tokens, and so do the runs of one tenant. A run's tiles keep
their order.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from trainer_service.calls import Call, Compute
from trainer_service.jobs import Document, Plan, StepRow, StepRows, Tile


def tile_tokens(tile: Tile) -> int:
    return sum(len(document.tokens) for document in tile.documents)


def cut(
    call: Call, compute: Compute, max_batch_tokens: int, *, isolated: bool = False
) -> tuple[Tile, ...]:
    """Cuts a call at document boundaries, by its own data alone: no neighbour changes its result.

    A tile takes at most half a budget, so that no call fills a pass alone; a longer document is a
    tile of its own.
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
        for index, documents in enumerate(_groups(compute.documents, max(1, max_batch_tokens // 2)))
    )


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

    def head_tokens(self) -> int:
        """Tokens of the next tile; 0 if there is none. Stays the same until `pop`."""
        ...

    def pop(self) -> Tile: ...


class _RunQueue:
    """First come, first served."""

    def __init__(self) -> None:
        self.tiles: deque[Tile] = deque()

    def head_tokens(self) -> int:
        return tile_tokens(self.tiles[0]) if self.tiles else 0

    def pop(self) -> Tile:
        return self.tiles.popleft()


Q = TypeVar("Q", bound=_Queue)


@dataclass(slots=True)
class _Share(Generic[Q]):
    queue: Q
    deficit: int = 0  # tokens that it may still take in this round


class _Ring(Generic[Q]):
    """Deficit round robin (Shreedhar and Varghese 1995) over queues, or over rings."""

    def __init__(self, quantum: int, make: Callable[[], Q]) -> None:
        self._quantum = quantum  # tokens that each queue may take per round
        self._make = make
        self._shares: dict[str, _Share[Q]] = {}  # those with tiles, in the round's order

    def queue(self, key: str) -> Q:
        """The queue of a key; the caller puts something into it at once."""
        if key not in self._shares:
            self._shares[key] = _Share(self._make())
        return self._shares[key].queue

    def head_tokens(self) -> int:
        if not self._shares:
            return 0
        key = self._next()
        return self._shares[key].queue.head_tokens()

    def pop(self) -> Tile:
        key = self._next()
        share = self._shares[key]
        tile = share.queue.pop()
        share.deficit -= tile_tokens(tile)
        if not share.queue.head_tokens():
            del self._shares[key]  # an idle queue saves nothing up
        return tile

    def _next(self) -> str:
        """Whose turn it is; the same until `pop`, since the first in the round can then pay."""
        while True:
            key, share = next(iter(self._shares.items()))
            if share.deficit >= share.queue.head_tokens():
                return key
            share.deficit += self._quantum
            self._shares[key] = self._shares.pop(key)  # to the end of the round


class Planner:
    """Tiles and steps that are ready. A plan is formed when the engine is idle, from all of it."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_batch_tokens = max_batch_tokens
        quantum = max(1, max_batch_tokens // 2)
        self._tenants: _Ring[_Ring[_RunQueue]] = _Ring(quantum, lambda: _Ring(quantum, _RunQueue))
        self._steps: list[StepRow] = []
        self._isolated: Tile | None = None  # met while a plan was filled; it has the next one

    def add(self, tenant: str, tiles: Sequence[Tile]) -> None:
        """Queues the tiles of one call behind those of its run."""
        for tile in tiles:
            self._tenants.queue(tenant).queue(tile.training_run_id).tiles.append(tile)

    def add_step(self, step: StepRow) -> None:
        """Queues a step of a run of which nothing else is queued."""
        self._steps.append(step)

    def next_job(self) -> Plan | StepRows | None:
        """What the engine should do now: all ready steps together, else a pass over tiles."""
        if self._steps:
            steps, self._steps = self._steps, []
            return StepRows(tuple(steps))
        if self._isolated is not None:
            tile, self._isolated = self._isolated, None
            return Plan((tile,))
        tiles: list[Tile] = []
        room = self.max_batch_tokens
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
