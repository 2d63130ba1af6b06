"""What the engine does next: a pass over tiles of any runs, or all optimizer steps that are ready.

Tenants share by deficit round robin in tokens, as their weights say, and so do the runs of one
tenant, all alike. A run's tiles keep their order. Tokens are what documents cost: one with many
targets counts for more.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from trainer_service.calls import Compute
from trainer_service.jobs import Document, Plan, StepRow, StepRows, Tile
from trainer_service.queue.round_robin import Ring, RunQueue, alike

# A round gives each tenant a plan's tokens by this number: with small turns, a small request passes
# those that are about as small and not the large ones.
_ROUNDS_PER_PLAN = 8
# A tile takes a plan's tokens by this number, so that no call fills a pass alone. Quarters instead
# of halves cost a run that is alone 1 % (8 documents of 128 tokens on SmolLM2).
_TILES_PER_PLAN = 4
# Who had work a few plans ago and has none is probably about to call again, and then waits for the
# pass under way: meanwhile nobody gets more of a pass than one tile or an equal part.
_RECENT_PLANS = 4
# An engine's death may be the doing of any call that it had. Those that two had are computed apart,
# so that the third death tells which of them it was.
DEATHS_UNTIL_ALONE = 2
MOST_COMING = 16  # runs that a plan names, beside its own


Key = tuple[str, int, int]  # run, sequence, tile; of a step: run, 0, 0


def key_of(work: Tile | StepRow) -> Key:
    """What tells work that waits from other work."""
    if isinstance(work, StepRow):
        return work.training_run_id, 0, 0
    return work.training_run_id, work.sequence, work.index


def cut(
    compute: Compute,
    tile_tokens: int,
    *,
    training_run_id: str,
    sequence: int,
    isolated: bool = False,
    deaths: int = 0,
) -> tuple[Tile, ...]:
    """Cuts a call at document boundaries, by its own data alone: no neighbour changes its result.

    A document longer than a tile may be is a tile of its own. `deaths` of engines had the call.
    """
    return tuple(
        Tile(
            training_run_id=training_run_id,
            sequence=sequence,
            index=index,
            documents=documents,
            loss=compute.loss,
            backward=compute.backward,
            weighted_only=compute.weighted_only,
            isolated=isolated,
            alone=deaths >= DEATHS_UNTIL_ALONE,
        )
        for index, documents in enumerate(_groups(compute.documents, tile_tokens))
    )


def most_tile_tokens(max_batch_tokens: int) -> int:
    """How large tiles are where a pass has so many tokens."""
    return max(1, max_batch_tokens // _TILES_PER_PLAN)


def _groups(documents: Iterable[Document], most_tokens: int) -> Iterator[tuple[Document, ...]]:
    group: list[Document] = []
    tokens = 0
    for document in documents:
        grown = tokens + document.cost
        if group and (grown > most_tokens or document.width != group[-1].width):
            yield tuple(group)
            group, tokens = [], 0
        group.append(document)
        tokens += document.cost
    yield tuple(group)


class _Portions:
    """What each may have, and has, of the plan that is being formed."""

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._plans: deque[frozenset[str]] = deque(
            maxlen=_RECENT_PLANS
        )  # who had work for the last ones
        self._taken: Counter[str] = Counter()
        self._most_tokens = max_batch_tokens

    def begin(self, waiting: frozenset[str]) -> None:
        """Starts with the next plan, for which those in `waiting` have tiles."""
        self._taken.clear()
        self._most_tokens = self._max_batch_tokens
        lately = waiting.union(*self._plans)
        if waiting:
            self._plans.append(waiting)
        if lately != waiting:
            equal_part = self._max_batch_tokens // len(lately)
            self._most_tokens = max(most_tile_tokens(self._max_batch_tokens), equal_part)

    def fits(self, key: str, tokens: int) -> bool:
        return self._taken[key] + tokens <= self._most_tokens

    def take(self, key: str, tokens: int) -> None:
        self._taken[key] += tokens


class Planner:
    """Tiles and steps that are ready. A plan is formed when the engine is idle, from all of it."""

    def __init__(self, max_batch_tokens: int, weight_of: Callable[[str], float] = alike) -> None:
        """`weight_of` a tenant: how many times the tokens of a tenant of weight 1 it gets."""
        self.max_batch_tokens = max_batch_tokens
        quantum = max(1, max_batch_tokens // _ROUNDS_PER_PLAN)
        self._tenants: Ring[Ring[RunQueue]] = Ring(
            quantum, lambda: Ring(quantum, RunQueue), weight_of
        )
        self._steps: list[StepRow] = []
        self._of_tenants = _Portions(max_batch_tokens)
        self._of_runs = _Portions(max_batch_tokens)

    def add(self, tenant: str, tiles: Sequence[Tile]) -> None:
        """Queues the tiles of one call behind those of its run."""
        for tile in tiles:
            self._tenants.queue(tenant).queue(tile.training_run_id).add(tile)

    def add_step(self, step: StepRow) -> None:
        """Queues a step of a run of which nothing else is queued."""
        self._steps.append(step)

    def withdraw(self, training_run_id: str) -> list[Key]:
        """Takes back all that a run has queued, and says what that was."""
        taken: list[Tile | StepRow] = []
        taken += [step for step in self._steps if step.training_run_id == training_run_id]
        self._steps = [step for step in self._steps if step.training_run_id != training_run_id]
        for tenant, runs in list(self._tenants.queues.items()):
            if queue := runs.queues.pop(training_run_id, None):
                taken += queue.tiles()
                if not runs.queues:
                    del self._tenants.queues[tenant]
        return [key_of(work) for work in taken]

    def has(self, tenant: str) -> bool:
        """Whether tiles of a tenant are queued."""
        return tenant in self._tenants.queues

    def tokens_ahead(self, tenant: str, training_run_id: str) -> int | None:
        """About how many tokens of other runs come before a run's next tile; None: it has none."""
        runs = self._tenants.queues.get(tenant)
        queue = runs.queues.get(training_run_id) if runs else None
        if queue is None:
            return None
        head_tokens = queue.head_tokens()
        return self.tokens_until(tenant, training_run_id, head_tokens) - head_tokens

    def tokens_until(self, tenant: str, training_run_id: str | None, own_tokens: int) -> int:
        """About how many tokens are computed until a tenant, or one run of it, has had
        `own_tokens`, these included. 0 if nothing of it is queued.
        """
        runs = self._tenants.queues.get(tenant)
        if runs is None:
            return 0
        if training_run_id is not None:
            if training_run_id not in runs.queues:
                return 0
            own_tokens += runs.ahead(training_run_id, own_tokens)
        return own_tokens + self._tenants.ahead(tenant, own_tokens)

    def next_job(self) -> Plan | StepRows | None:
        """What the engine should do now: all ready steps together, else a pass over tiles."""
        if self._steps:
            return self._next_steps()
        if not (rings := self._tenants.queues):
            return None
        tiles: list[Tile] = []
        room = self.max_batch_tokens
        self._of_tenants.begin(frozenset(rings))
        self._of_runs.begin(frozenset(run for runs in rings.values() for run in runs.queues))
        while tokens := self._tenants.head_tokens():
            tenant, runs = self._tenants.head()
            run, queue = runs.head()
            fits = self._of_tenants.fits(tenant, tokens) and self._of_runs.fits(run, tokens)
            apart = queue.head().isolated or queue.head().alone
            if tiles and (apart or not (tokens <= room and fits)):
                break
            self._of_tenants.take(tenant, tokens)
            self._of_runs.take(run, tokens)
            tiles.append(self._tenants.pop())
            room -= tokens
            if apart:
                break
        return Plan(tuple(tiles), self.coming())

    def coming(self) -> tuple[str, ...]:
        """The runs whose tiles come next, about in their turns: one of each tenant after another.
        No more than a few passes have, so that it costs the same however many wait.
        """
        runs = [iter(ring.queues) for ring in islice(self._tenants.queues.values(), MOST_COMING)]
        found: list[str] = []
        while runs and len(found) < MOST_COMING:
            turn = [(each, run) for each in runs if (run := next(each, None)) is not None]
            found += [run for _, run in turn]
            runs = [each for each, _ in turn]
        return tuple(found[:MOST_COMING])

    def _next_steps(self) -> StepRows:
        alone = [step for step in self._steps if step.alone]
        now = alone[:1] or self._steps
        self._steps = [step for step in self._steps if step not in now]
        return StepRows(tuple(now), self.coming())
