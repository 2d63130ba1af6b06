"""What happens to a request: a place in the waiting room, a replica, an adapter, the engine."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace

from mint_core.backlog import Load
from mint_core.errors import EngineDied, EngineFault, Unavailable
from mint_core.rpc.caller import caller, note
from mint_core.rpc.metrics import Metrics
from sampler_service import jobs
from sampler_service.adapters.revisions import Revisions
from sampler_service.parts import PartBuffer, TokensDiffer
from sampler_service.replicas.replicas import Place, Replicas
from sampler_service.waiting_room import WaitingRoom

# An engine's death may be the doing of any call that it had. Those that two had are done one at a
# time, so that the third death tells which of them it was.
DEATHS_UNTIL_ALONE = 2


class Execution:
    """Cancelling what it does stops the work. All methods belong to one event loop."""

    def __init__(
        self,
        replicas: Replicas,
        revisions: Revisions,
        room: WaitingRoom,
        metrics: Metrics,
        *,
        max_wait_s: float,  # for the first pass; 0: as long as it takes
    ) -> None:
        self._replicas = replicas
        self._revisions = revisions
        self._room = room
        self._max_wait_s = max_wait_s
        self._request_ids = itertools.count(1)
        self._alone = asyncio.Lock()  # held by a call with which engines have died
        self._queue_depth = metrics.queue_depth
        self._tokens = metrics.counter("mint_tokens", "Tokens computed", ["kind"])
        metrics.gauge(
            "mint_queue_samples", "Continuations accepted and not finished", lambda: room.samples
        )

    async def sample(
        self, sampling: jobs.Sampling, parts: PartBuffer | None = None
    ) -> tuple[jobs.Generated, str]:
        """The whole way of a request through the front: it is admitted, gets a replica, waits for
        its adapter there, and goes to the engine; to another, or the next one, if that dies.
        Returns the answer, and from which revision it is; tokens go to `parts` as they come, if
        that is given.
        """
        job = self._job(sampling, stream=parts is not None)
        start_by_s = time.monotonic() + self._max_wait_s if self._max_wait_s else None
        deaths = 0
        with self._admitted(job), self._counted(parts):
            while True:
                alone = self._alone if deaths >= DEATHS_UNTIL_ALONE else nullcontext()
                try:
                    async with alone, self._leased(job, start_by_s) as (place, revision):
                        within_s = start_by_s and start_by_s - time.monotonic()
                        job = replace(job, adapter=revision, start_within_s=within_s)
                        generated = await self._generate(job, place, parts)
                        break
                except jobs.AdapterAbsent:
                    pass  # the engine was started anew, or is gone, since the adapter was leased
                except EngineDied as death:
                    deaths += 1
                    if deaths > DEATHS_UNTIL_ALONE:
                        raise _given_up(deaths, death) from death
                    start_by_s = None  # it has had its turn
            self._count(job, generated)
            if parts is not None:
                await parts.finish()
            return generated, job.adapter

    def _job(self, sampling: jobs.Sampling, *, stream: bool) -> jobs.Generate:
        return jobs.Generate(
            request_id=next(self._request_ids),
            adapter=sampling.model_path,  # until it is leased
            sampling=sampling,
            tenant=caller().tenant,
            stream=stream,
        )

    @contextmanager
    def _admitted(self, job: jobs.Generate) -> Iterator[None]:
        """A request's place, while it has one."""
        samples, tokens = job.sampling.num_samples, len(job.sampling.prompt)
        load = Load(count=max(samples, 1), tokens=tokens)
        with self._room.place(job.tenant, load), self._queue_depth.track_inprogress():
            note(prompt_tokens=tokens, samples=samples)
            yield

    @asynccontextmanager
    async def _leased(
        self, job: jobs.Generate, start_by_s: float | None
    ) -> AsyncIterator[tuple[Place, str]]:
        """Holds an adapter in an engine that is up, and says which revision it is."""
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout_at(start_by_s) as limit:
                    await self._replicas.hello()
                    revision = None
                    if job.adapter != jobs.BASE_MODEL:
                        revision = await self._revisions.resolve(job.adapter, job.tenant)
                    place = stack.enter_context(self._replicas.place(job, revision))
                    lease = place.replica.leases.lease(revision)
                    path = await stack.enter_async_context(lease)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise jobs.WaitedTooLong(self._max_wait_s) from None
            yield place, path

    async def _generate(
        self, job: jobs.Generate, place: Place, parts: PartBuffer | None
    ) -> jobs.Generated:
        """What the engine makes of a job; it is told if the caller leaves. Raises AdapterAbsent if
        another replica had better do it.
        """
        if self._replicas.lacks(place.replica):
            raise jobs.AdapterAbsent("the engine is gone; send the call again")
        if parts:
            parts.begin(job.adapter)
        started_s, engine = time.perf_counter(), place.replica.engine
        try:
            generated: jobs.Generated = await engine.call(
                replace(job, had_tokens=place.had_tokens), on_part=parts.put if parts else None
            )
        except (asyncio.CancelledError, TokensDiffer):
            engine.cast(jobs.Abort(job.request_id))
            raise
        except Unavailable as error:
            if self._replicas.lacks(place.replica):  # it was drained, or cannot start again
                raise jobs.AdapterAbsent(error.message) from error
            raise
        sampled = parts.tokens if parts else sum(len(c.tokens) for c in generated.continuations)
        self._replicas.note(place, job.sampling, generated.prompt_cache_hit_tokens, sampled)
        note(run_s=time.perf_counter() - started_s)
        return generated

    def _count(self, job: jobs.Generate, generated: jobs.Generated) -> None:
        self._tokens.labels("prompt").inc(len(job.sampling.prompt))
        self._tokens.labels("prompt_cached").inc(generated.prompt_cache_hit_tokens)
        note(cached_tokens=generated.prompt_cache_hit_tokens)
        if not job.stream:
            self._count_sampled(sum(len(c.tokens) for c in generated.continuations))

    @contextmanager
    def _counted(self, parts: PartBuffer | None) -> Iterator[None]:
        """Counts the tokens of a stream, also of one that is left."""
        try:
            yield
        finally:
            if parts is not None:
                self._count_sampled(parts.tokens)

    def _count_sampled(self, tokens: int) -> None:
        self._tokens.labels("sampled").inc(tokens)
        note(tokens=tokens)


def _given_up(deaths: int, last: EngineDied) -> EngineFault:
    return EngineFault(
        f"{deaths} engines ended while they worked on this call, the last of them with no other "
        f"that is suspect ({last.message}); it is not tried again",
        engine_deaths=deaths,
    )
