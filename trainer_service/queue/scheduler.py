"""The front's hand on the engine: the next plan when it is idle, and jobs on rows as they come."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mint_core.engine_host.pipe import Hello, ModelDescription
from mint_core.engine_host.process import EngineProcess
from mint_core.errors import EngineDied, MintError, Unavailable
from mint_core.rpc.errors import domain_error
from trainer_service.jobs import (
    Plan,
    StepResult,
    StepRow,
    StepRows,
    Tile,
    TileResult,
    tile_tokens,
)
from trainer_service.queue.planner import Planner
from trainer_service.queue.usage import Usage

logger = logging.getLogger(__name__)

LEAST_LIMIT_S = 60.0  # of the engine's silence
LIMIT_FACTOR = 10.0  # of the time that a plan is predicted to take
# Until a plan has been timed:
FIRST_GUESS_S = 0.05  # per token, for the engine's silence
FIRST_PREDICTION_S = 1.0  # of any wait
# Turns of the event loop in which calls that waited for a plan's results hand in what comes next,
# such as the optimizer steps of its runs: they then go before the next plan, and together.
FOLLOW_UP_TURNS = 4

_Key = tuple[str, int, int]  # run, sequence, tile; of a step: run, 0, 0


@dataclass(frozen=True, slots=True)
class Forecast:
    """About what comes before the next of a run's tiles."""

    tokens_ahead: int  # of other runs, those included that the engine works on
    wait_s: float | None  # None: no plan has been timed yet


@dataclass(frozen=True, slots=True)
class _Waiter:
    """Who waits for a tile or step that is not with the engine yet."""

    tenant: str
    future: asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class _Job:
    """What the engine is busy with."""

    job: Plan | StepRows
    start_s: float  # as time.monotonic()

    @property
    def tiles(self) -> Sequence[Tile]:
        return self.job.tiles if isinstance(self.job, Plan) else ()


class NotStarted(EngineDied):
    """The engine died before it was at the work, which had no part in that."""


class Scheduler:
    """Feeds one engine. All methods belong to one event loop.

    Rows live in the engine alone: when it dies, `lose` is called, all work for its rows fails with
    EngineDied, and a new `life` begins. A job for a row names the life in which it was there.
    """

    def __init__(
        self, engine: EngineProcess, usage: Usage, weight_of: Callable[[str], float]
    ) -> None:
        """`weight_of` a tenant; see `Planner`."""
        self._engine = engine
        self._usage = usage
        self._weight_of = weight_of
        self._hello: Hello | None = None  # of the engine in use; kept until another is up
        self._planner = Planner(1)
        self._waiting: dict[_Key, _Waiter] = {}
        self._busy: asyncio.Task[None] | None = None
        self._running: _Job | None = None
        self._token_s: float | None = None  # as learned from plans
        self._held = False
        self.life = 1  # of the engine that is up, or comes next
        self.on_progress: Callable[[], None] = lambda: None  # what forecasts say has changed
        # Told of each pass, with its results and how long it took, before those who wait are.
        self.on_pass: Callable[[Plan, Sequence[TileResult], float], None] = lambda *_: None

    @property
    def description(self) -> ModelDescription | None:
        """The base model; None until the engine has been up once."""
        return self._hello.model if self._hello else None

    @property
    def model(self) -> ModelDescription:
        """The base model. Raises Unavailable while there is no description of it."""
        if self._hello is None:
            raise Unavailable("the base model is still being loaded; send the call again")
        return self._hello.model

    @property
    def max_batch_tokens(self) -> int:
        return self._planner.max_batch_tokens

    def welcome(self, hello: Hello) -> None:
        """Takes note of an engine that is up and has no rows yet."""
        if hello is not self._hello:
            self._hello = hello
            self._planner = Planner(hello.max_batch_tokens, self._weight_of)

    def lose(self, why: str) -> None:
        """Fails what waits for an engine that died. What was with it fails by itself."""
        self.life += 1
        self._planner = Planner(self._planner.max_batch_tokens, self._weight_of)
        waiting, self._waiting = self._waiting, {}
        for waiter in waiting.values():
            _fail(waiter.future, NotStarted(why))

    async def up(self) -> int:
        """Waits until an engine is up and returns its life. Unavailable when the service ends."""
        while True:
            try:
                self.welcome(await self._engine.hello())
            except Unavailable:  # it could not start this time
                if self._engine.closed:
                    raise
            else:
                return self.life

    def hold(self) -> None:
        """Gives the engine nothing more to compute, but for what it has."""
        self._held = True

    @property
    def busy(self) -> bool:
        """Whether the engine computes."""
        return self._busy is not None

    async def row(
        self, job: object, life: int, on_part: Callable[[Any], None] | None = None
    ) -> Any:
        """Does a job on one row, which was there in that life."""
        if life != self.life:
            raise NotStarted("the engine with the row has ended")
        return await self._call(job, on_part=on_part)

    async def replay(self, job: Plan | StepRows, life: int) -> Any:
        """Does past work again, beside what is new."""
        if life != self.life:
            raise NotStarted("the engine with the rows has ended")
        return await self._call(job, silence_limit_s=self._limit_s(job))

    async def compute(self, tenant: str, tiles: Sequence[Tile]) -> list[TileResult]:
        """Computes the tiles of one call, beside those of others."""
        self._planner.add(tenant, tiles)
        keys = [(tile.training_run_id, tile.sequence, tile.index) for tile in tiles]
        return await self._results(tenant, keys)

    async def step(self, tenant: str, step: StepRow) -> StepResult:
        """Takes an optimizer step, beside those of other runs."""
        self._planner.add_step(step)
        result: StepResult
        (result,) = await self._results(tenant, [(step.training_run_id, 0, 0)])
        if result.error is not None:
            raise result.error
        return result

    def forecast(self, tenant: str, training_run_id: str) -> Forecast:
        """What is ahead of a run now: nothing if none of its tiles waits for a plan."""
        queued = self._planner.tokens_ahead(tenant, training_run_id)
        if queued is None:
            return Forecast(0, 0.0)
        running = self._running.tiles if self._running else ()
        others = sum(tile_tokens(t) for t in running if t.training_run_id != training_run_id)
        wait_s = None if self._token_s is None else self._token_s * queued + self._rest_s()
        return Forecast(queued + others, wait_s)

    def predict_s(self, tenant: str, training_run_id: str | None, tokens: int) -> float:
        """About when a tenant, or one run of it, will have had so many more tokens computed."""
        if self._token_s is None:
            return FIRST_PREDICTION_S
        until = self._planner.tokens_until(tenant, training_run_id, tokens)
        return self._token_s * until + self._rest_s()

    def _rest_s(self) -> float:
        """How long the engine will still be busy with what it has."""
        if self._running is None or self._token_s is None:
            return 0.0
        predicted_s = self._token_s * sum(map(tile_tokens, self._running.tiles))
        return max(0.0, predicted_s - (time.monotonic() - self._running.start_s))

    async def _results(self, tenant: str, keys: Sequence[_Key]) -> list[Any]:
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in keys]
        waiters = (_Waiter(tenant, future) for future in futures)
        self._waiting.update(zip(keys, waiters, strict=True))
        loop.call_soon(self._advance)  # after all that is ready now, so that it goes together
        results = await asyncio.gather(*futures, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:  # that the engine had some of it counts for more than what it was not given
            raise min(errors, key=lambda error: isinstance(error, NotStarted))
        return results

    def _advance(self) -> None:
        if self._busy is None and not self._held and (job := self._planner.next_job()):
            self._busy = asyncio.create_task(self._run(job))
        self.on_progress()

    async def _run(self, job: Plan | StepRows) -> None:
        waiters = [self._waiting.pop(key) for key in _keys(job)]
        start_s = time.monotonic()
        self._running = _Job(job, start_s)
        try:
            results = await self._call(job, silence_limit_s=self._limit_s(job))
        except Exception as raised:
            error = domain_error(raised)
            for waiter in waiters:
                _fail(waiter.future, error)
        else:
            elapsed_s = time.monotonic() - start_s
            self._account(job, results, waiters, elapsed_s)
            if isinstance(job, Plan):
                self.on_pass(job, results, elapsed_s)
            for waiter, result in zip(waiters, results, strict=True):
                if not waiter.future.done():
                    waiter.future.set_result(result)
            self._running = None
            for _ in range(FOLLOW_UP_TURNS):
                await asyncio.sleep(0)
        finally:
            self._busy = self._running = None
            asyncio.get_running_loop().call_soon(self._advance)

    async def _call(self, job: object, **options: Any) -> Any:
        try:
            return await self._engine.call(job, **options)
        except EngineDied as death:
            if death.at_work:
                raise
            raise NotStarted(death.message) from death

    def _account(
        self,
        job: Plan | StepRows,
        results: Sequence[Any],
        waiters: Sequence[_Waiter],
        elapsed_s: float,
    ) -> None:
        tenants = [waiter.tenant for waiter in waiters]
        if isinstance(job, Plan):
            self._learn(job, elapsed_s)
            self._usage.add_pass(job, results, tenants, elapsed_s)
        else:
            self._usage.add_steps(results, tenants, elapsed_s)

    def _limit_s(self, job: Plan | StepRows) -> float:
        tokens = sum(map(tile_tokens, job.tiles)) if isinstance(job, Plan) else 0
        return max(LEAST_LIMIT_S, LIMIT_FACTOR * tokens * (self._token_s or FIRST_GUESS_S))

    def _learn(self, plan: Plan, elapsed_s: float) -> None:
        measured_s = elapsed_s / sum(map(tile_tokens, plan.tiles))
        known_s = measured_s if self._token_s is None else self._token_s
        self._token_s = 0.7 * known_s + 0.3 * measured_s


def _keys(job: Plan | StepRows) -> list[_Key]:
    if isinstance(job, StepRows):
        return [(step.training_run_id, 0, 0) for step in job.steps]
    return [(tile.training_run_id, tile.sequence, tile.index) for tile in job.tiles]


def _fail(future: asyncio.Future[Any], error: MintError) -> None:
    if not future.done():
        future.set_exception(error)
