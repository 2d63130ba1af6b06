"""The front's hand on the engine: the next plan when it is idle, and jobs on rows as they come."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from mint_core.engine_pipe import Hello, ModelDescription
from mint_core.engine_process import EngineProcess
from mint_core.errors import EngineFault, MintError, Unavailable
from mint_core.rpc.errors import domain_error
from mint_core.rpc.metrics import Metrics
from trainer_service.errors import TrainingRunLost
from trainer_service.jobs import (
    CreateRow,
    Plan,
    RowDescription,
    StepResult,
    StepRow,
    StepRows,
    Tile,
    TileResult,
)
from trainer_service.planner import Planner, tile_tokens

logger = logging.getLogger(__name__)

LEAST_LIMIT_S = 60.0  # of the engine's silence
LIMIT_FACTOR = 10.0  # of the time that a plan is predicted to take
FIRST_GUESS_S = 0.05  # per token, until a plan has been timed

_Key = tuple[str, int, int]  # run, sequence, tile; of a step: run, 0, 0


class Scheduler:
    """Feeds one engine. All methods belong to one event loop.

    Rows live in the engine alone: when it dies, `lose` is called and all work for its rows fails.
    """

    def __init__(self, engine: EngineProcess, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._hello: Hello | None = None  # of the engine in use; kept until another is up
        self._planner = Planner(1)
        self._waiting: dict[_Key, asyncio.Future[Any]] = {}  # planned for, not yet with the engine
        self._busy: asyncio.Task[None] | None = None
        self._token_s = FIRST_GUESS_S
        self._deaths = 0

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
            self._planner = Planner(hello.max_batch_tokens)

    def lose(self, why: str) -> None:
        """Fails what waits for an engine that died. What was with it fails by itself."""
        self._deaths += 1
        self._planner = Planner(self._planner.max_batch_tokens)
        waiting, self._waiting = self._waiting, {}
        for (training_run_id, _, _), future in waiting.items():
            _fail(future, TrainingRunLost(training_run_id, why))

    async def create_row(self, job: CreateRow) -> RowDescription:
        """Makes a row, once an engine is up."""
        self.welcome(await self._engine.hello())
        deaths = self._deaths
        description: RowDescription = await self._engine.call(job)
        if self._deaths != deaths:
            raise EngineFault("the engine ended after it made the run; create the run again")
        return description

    async def row(self, job: object) -> Any:
        """Does a job on one row, which must be there."""
        return await self._engine.call(job)

    async def compute(self, tenant: str, tiles: Sequence[Tile]) -> list[TileResult]:
        """Computes the tiles of one call, beside those of others."""
        self._planner.add(tenant, tiles)
        keys = [(tile.training_run_id, tile.sequence, tile.index) for tile in tiles]
        return await self._results(keys)

    async def step(self, step: StepRow) -> StepResult:
        """Takes an optimizer step, beside those of other runs."""
        self._planner.add_step(step)
        result: StepResult
        (result,) = await self._results([(step.training_run_id, 0, 0)])
        if result.error is not None:
            raise result.error
        return result

    async def _results(self, keys: Sequence[_Key]) -> list[Any]:
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in keys]
        self._waiting.update(zip(keys, futures, strict=True))
        loop.call_soon(self._advance)  # after all that is ready now, so that it goes together
        results = await asyncio.gather(*futures, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def _advance(self) -> None:
        if self._busy is None and (job := self._planner.next_job()):
            self._busy = asyncio.create_task(self._run(job))

    async def _run(self, job: Plan | StepRows) -> None:
        futures = [self._waiting.pop(key) for key in _keys(job)]
        start = time.monotonic()
        try:
            results = await self._engine.call(job, silence_limit_s=self._limit_s(job))
        except Exception as raised:
            error = domain_error(raised)
            for future in futures:
                _fail(future, error)
        else:
            if isinstance(job, Plan):
                self._learn(job, time.monotonic() - start)
            for future, result in zip(futures, results, strict=True):
                if not future.done():
                    future.set_result(result)
        finally:
            self._busy = None
            asyncio.get_running_loop().call_soon(self._advance)

    def _limit_s(self, job: Plan | StepRows) -> float:
        tokens = sum(map(tile_tokens, job.tiles)) if isinstance(job, Plan) else 0
        return max(LEAST_LIMIT_S, LIMIT_FACTOR * tokens * self._token_s)

    def _learn(self, plan: Plan, elapsed_s: float) -> None:
        tokens = {
            backward: sum(tile_tokens(tile) for tile in plan.tiles if tile.backward is backward)
            for backward in (False, True)
        }
        measured_s = elapsed_s / sum(tokens.values())
        guessed = self._token_s == FIRST_GUESS_S
        self._token_s = measured_s if guessed else 0.7 * self._token_s + 0.3 * measured_s
        self._metrics.tokens.labels("forward").inc(tokens[False])
        self._metrics.tokens.labels("forward_backward").inc(tokens[True])


def _keys(job: Plan | StepRows) -> list[_Key]:
    if isinstance(job, StepRows):
        return [(step.training_run_id, 0, 0) for step in job.steps]
    return [(tile.training_run_id, tile.sequence, tile.index) for tile in job.tiles]


def _fail(future: asyncio.Future[Any], error: MintError) -> None:
    if not future.done():
        future.set_exception(error)
