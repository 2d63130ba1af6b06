"""The front's hand on the engine: schedule, run, hand out; and jobs on rows as they come.

The loop is `run`: the next plan, or all optimizer steps that are ready, when the engine is idle;
then the engine; then each call that is done gets what it came to, and what its run hands in behind
it is waited for before the next plan is made.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mint_core.engine_host.pipe import Hello
from mint_core.engine_host.process import EngineProcess
from mint_core.errors import EngineDied, EngineFault, MintError
from mint_core.rpc.errors import domain_error
from trainer_service import jobs
from trainer_service.queue.planner import Key, Planner, key_of
from trainer_service.queue.usage import Accounts

logger = logging.getLogger(__name__)

LEAST_LIMIT_S = 60.0  # of the engine's silence
LIMIT_FACTOR = 10.0  # of the time that a plan is predicted to take
# Until a plan has been timed:
FIRST_GUESS_S = 0.05  # per token, for the engine's silence
FIRST_PREDICTION_S = 1.0  # of any wait
# Runs whose calls a plan has ended hand in what comes next, such as optimizer steps, or say that
# they have nothing: it then goes before the next plan, and together. The engine waits no longer.
FOLLOW_UP_S = 0.02
ACCOUNT_S = 0.001  # from a pass to its accounting, which keeps nobody's answer waiting


@dataclass(frozen=True, slots=True)
class Forecast:
    """About what comes before the next of a run's tiles."""

    tokens_ahead: int  # of other runs, those included that the engine works on
    wait_s: float | None  # None: no plan has been timed yet


@dataclass(slots=True, eq=False)
class Handed:
    """What a run has handed in, and waits for as a whole."""

    training_run_id: str
    tenant: str
    billed: bool  # False: it is done again after a death
    results: dict[Key, Any]  # or errors; None: to come
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    seconds: float = 0.0  # of the engine, its share

    def put(self, key: Key, result: Any, seconds: float = 0.0) -> bool:
        """Takes a result or an error in. Returns whether that was the last."""
        self.results[key] = result
        self.seconds += seconds
        if any(each is None for each in self.results.values()):
            return False
        errors = [each for each in self.results.values() if isinstance(each, MintError)]
        if not errors:
            self.done.set_result(None)
        else:  # that the engine had some of it counts for more than what it was not given
            self.done.set_exception(min(errors, key=lambda error: isinstance(error, NotStarted)))
            self.done.exception()  # retrieved: its run may be gone
        return True


@dataclass(frozen=True, slots=True)
class _Running:
    """What the engine is busy with."""

    work: Sequence[jobs.Tile | jobs.StepRow]
    tokens: Sequence[int]  # that each costs; of a step, which costs next to nothing, 0
    handed: Mapping[Key, Handed]  # of which they are, in their order
    start_s: float  # as time.monotonic()

    @property
    def all_tokens(self) -> int:
        return sum(self.tokens)


class NotStarted(EngineDied):
    """The engine died before it was at the work, which had no part in that."""


class Scheduler:
    """Feeds one engine. All methods belong to one event loop.

    Rows live in the engine alone: when it dies, all work for its rows fails with EngineDied, and a
    new `life` begins. A job for a row names the life in which it was there.
    """

    def __init__(
        self,
        engine: EngineProcess,
        usage: Accounts,
        weight_of: Callable[[str], float],
        followers: AbstractSet[Callable[[], None]] = frozenset(),
    ) -> None:
        """`weight_of` a tenant; see `Planner`. `followers` are called when forecasts change."""
        self._engine = engine
        self._usage = usage
        self._weight_of = weight_of
        self.hello: Hello | None = None  # of the engine in use; kept until another is up
        self._planner = Planner(1)
        self._waiting: dict[Key, Handed] = {}  # not with the engine yet
        self._life = engine.life  # of what waits
        self._more = asyncio.Event()  # something was handed in
        self._expected: set[str] = set()  # runs whose next word is waited for
        self._all_said = asyncio.Event()  # none is
        self._running: _Running | None = None
        self._token_s: float | None = None  # as learned from plans
        self._held = False
        self._followers = followers

    @property
    def life(self) -> int:
        """Of the engine that is up, or comes next."""
        return self._engine.life

    @property
    def max_batch_tokens(self) -> int:
        return self._planner.max_batch_tokens

    def welcome(self, hello: Hello) -> None:
        """Takes note of an engine that is up and has no rows yet."""
        if hello is not self.hello:
            self.hello = hello
            self._forget_the_dead()
            self._planner = Planner(hello.max_batch_tokens, self._weight_of)

    async def up(self) -> int:
        """Waits until the engine is up and returns its life. Raises Unavailable if it could not
        start this time.
        """
        self.welcome(await self._engine.hello())
        return self.life

    def hold(self) -> None:
        """Gives the engine nothing more to compute, but for what it has."""
        self._held = True

    @property
    def held(self) -> bool:
        """Whether it gets nothing more."""
        return self._held

    @property
    def busy(self) -> bool:
        """Whether the engine computes."""
        return self._running is not None

    @property
    def at_work(self) -> set[str]:
        """The runs of which something is computed, or waits for it."""
        running = self._running.handed.values() if self._running else ()
        return {handed.training_run_id for handed in (*self._waiting.values(), *running)}

    async def run(self) -> None:
        """Feeds the engine, until cancelled."""
        while True:
            job = await self._schedule()
            self._running = running = self._begin(job)
            self._tell_followers()
            try:
                results = await self._call(job, silence_limit_s=self._limit_s(running))
            except Exception as raised:
                error = domain_error(raised)
                if isinstance(error, EngineFault) and len(running.work) > 1:
                    # It may be a neighbour's doing, and all rows may hold some of the pass.
                    error = EngineDied(error.message)
                self._hand_out(running, [error] * len(running.handed))
            else:
                elapsed_s = time.monotonic() - running.start_s
                self._hand_out(running, results, elapsed_s)
                account = partial(self._account, running, results, elapsed_s)
                asyncio.get_running_loop().call_later(ACCOUNT_S, account)
            finally:
                self._running = None

    async def _schedule(self) -> jobs.Plan | jobs.StepRows:
        """What the engine does next, once there is something."""
        await self._follow_ups()
        while True:
            self._forget_the_dead()
            if not self._held and (job := self._planner.next_job()):
                return job
            self._tell_followers()
            self._more.clear()
            await self._more.wait()
            # After all that is ready now, so that it goes together.
            await asyncio.sleep(0)

    async def _follow_ups(self) -> None:
        if self._expected:
            self._all_said.clear()
            try:
                async with asyncio.timeout(FOLLOW_UP_S):
                    await self._all_said.wait()
            except TimeoutError:
                self._expected.clear()

    def _begin(self, job: jobs.Plan | jobs.StepRows) -> _Running:
        work = job.tiles if isinstance(job, jobs.Plan) else job.steps
        handed = {key: self._waiting.pop(key) for key in map(key_of, work)}
        tokens = [jobs.tile_cost(each) if isinstance(each, jobs.Tile) else 0 for each in work]
        return _Running(work, tokens, handed, time.monotonic())

    def _hand_out(self, running: _Running, results: Sequence[Any], elapsed_s: float = 0.0) -> None:
        """Gives each who waits its results, or the errors that stand for them."""
        token_s = elapsed_s / max(1, running.all_tokens)
        for (key, handed), tokens, result in zip(
            running.handed.items(), running.tokens, results, strict=True
        ):
            if handed.put(key, result, tokens * token_s):
                self._expected.add(handed.training_run_id)

    def _forget_the_dead(self) -> None:
        """Fails what waited for an engine that has died. What was with it fails by itself."""
        if self._life == self._engine.life:
            return
        self._life = self._engine.life
        self._planner = Planner(self._planner.max_batch_tokens, self._weight_of)
        waiting, self._waiting = self._waiting, {}
        self._expected.clear()
        for key, handed in waiting.items():
            handed.put(key, NotStarted("the engine has ended"))

    async def row(
        self, job: object, life: int, on_part: Callable[[Any], None] | None = None
    ) -> Any:
        """Does a job on one row, which was there in that life."""
        if life != self.life:
            raise NotStarted("the engine with the row has ended")
        return await self._call(job, on_part=on_part)

    async def rowless(self, job: object) -> Any:
        """Does a job that needs no row."""
        return await self._call(job)

    async def compute(
        self, tenant: str, tiles: Sequence[jobs.Tile], life: int, *, billed: bool = True
    ) -> tuple[list[jobs.TileResult], float]:
        """Computes the tiles of one call, beside those of others, on a row that was there in that
        life; and how long the engine took.
        """
        handed = self._hand_in(tenant, tiles, life, billed)
        self._planner.add(tenant, tiles)
        await handed.done
        return list(handed.results.values()), handed.seconds

    async def step(
        self, tenant: str, step: jobs.StepRow, life: int, *, billed: bool = True
    ) -> jobs.StepResult:
        """Takes an optimizer step, beside those of other runs; see `compute`."""
        handed = self._hand_in(tenant, [step], life, billed)
        self._planner.add_step(step)
        await handed.done
        result: jobs.StepResult = handed.results[key_of(step)]
        if result.error is not None:
            raise result.error
        return result

    def _hand_in(
        self, tenant: str, work: Sequence[jobs.Tile | jobs.StepRow], life: int, billed: bool
    ) -> Handed:
        if life != self.life:
            raise NotStarted("the engine with the row has ended")
        keys = map(key_of, work)
        handed = Handed(work[0].training_run_id, tenant, billed, dict.fromkeys(keys))
        self._forget_the_dead()
        self._waiting.update(dict.fromkeys(handed.results, handed))
        self.has_nothing_more(handed.training_run_id)
        self._more.set()
        return handed

    def has_nothing_more(self, training_run_id: str) -> None:
        """Says that a run has handed in all it has for now: the engine need not wait for it."""
        self._expected.discard(training_run_id)
        if not self._expected:
            self._all_said.set()

    def withdraw(self, training_run_id: str, error: MintError) -> None:
        """Takes back all that a run has handed in and the engine does not have yet."""
        for key in self._planner.withdraw(training_run_id):
            self._waiting.pop(key).put(key, error)

    def forecast(self, tenant: str, training_run_id: str) -> Forecast:
        """What is ahead of a run now: nothing if none of its tiles waits for a plan."""
        queued = self._planner.tokens_ahead(tenant, training_run_id)
        if queued is None:
            return Forecast(0, 0.0)
        running = self._running
        under_way = zip(running.handed.values(), running.tokens, strict=True) if running else ()
        others = sum(
            tokens for each, tokens in under_way if each.training_run_id != training_run_id
        )
        wait_s = None if self._token_s is None else self._token_s * queued + self._rest_s()
        return Forecast(queued + others, wait_s)

    def has_waiting(self, tenant: str) -> bool:
        """Whether tiles of a tenant wait for a plan."""
        return self._planner.has(tenant)

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
        predicted_s = self._token_s * self._running.all_tokens
        return max(0.0, predicted_s - (time.monotonic() - self._running.start_s))

    def _tell_followers(self) -> None:
        for follower in self._followers:
            follower()

    async def _call(self, job: object, **options: Any) -> Any:
        try:
            return await self._engine.call(job, **options)
        except EngineDied as death:
            if death.at_work:
                raise
            raise NotStarted(death.message) from death

    def _account(self, running: _Running, results: Sequence[Any], elapsed_s: float) -> None:
        tenants = [each.tenant if each.billed else None for each in running.handed.values()]
        self._usage.add(running.work, results, tenants, elapsed_s)
        if running.all_tokens:
            measured_s = elapsed_s / running.all_tokens
            known_s = measured_s if self._token_s is None else self._token_s
            self._token_s = 0.7 * known_s + 0.3 * measured_s

    def _limit_s(self, running: _Running) -> float:
        token_s = self._token_s or FIRST_GUESS_S
        return max(LEAST_LIMIT_S, LIMIT_FACTOR * running.all_tokens * token_s)
