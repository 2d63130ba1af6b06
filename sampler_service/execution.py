"""What happens to a request: a place in the waiting room, an adapter, the engine."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace

from mint_core.backlog import Load
from mint_core.engine_host.process import EngineProcess
from mint_core.errors import EngineDied, EngineFault
from mint_core.rpc.caller import caller, note
from mint_core.rpc.metrics import Metrics
from sampler_service.adapters import Adapters
from sampler_service.jobs import (
    BASE_MODEL,
    Abort,
    AdapterAbsent,
    Generate,
    Generated,
    SamplePart,
    WaitedTooLong,
)
from sampler_service.parts import PartBuffer
from sampler_service.requests import Sampling
from sampler_service.waiting_room import WaitingRoom

# An engine's death may be the doing of any call that it had. Those that two had are done one at a
# time, so that the third death tells which of them it was.
DEATHS_UNTIL_ALONE = 2


class Execution:
    """Cancelling what it does stops the work. All methods belong to one event loop."""

    def __init__(
        self,
        engine: EngineProcess,
        adapters: Adapters,
        room: WaitingRoom,
        metrics: Metrics,
        *,
        max_wait_s: float,  # for the first pass; 0: as long as it takes
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._room = room
        self._max_wait_s = max_wait_s
        self._request_ids = itertools.count(1)
        self._alone = asyncio.Lock()  # held by a call with which engines have died
        self._queue_depth = metrics.queue_depth
        self._tokens = metrics.counter("mint_tokens", "Tokens computed", ["kind"])
        self._first_token_seconds = metrics.histogram(
            "mint_first_token_seconds", "Time from arrival to the first token of a streamed sample"
        )
        metrics.gauge(
            "mint_queue_samples", "Continuations accepted and not finished", lambda: room.samples
        )

    async def generate(self, sampling: Sampling) -> tuple[Generated, str]:
        """Does what is asked for, and says with which revision."""
        with self._accepted(sampling):
            generated, revision = await self._run(sampling, None)
            self._count_sampled(sum(len(c.tokens) for c in generated.continuations))
            return generated, revision

    async def stream(self, sampling: Sampling) -> AsyncGenerator[tuple[SamplePart, str], None]:
        """Tokens as they come, and from which revision. To be closed by its reader; the engine does
        not wait for it.
        """
        arrived_s = time.perf_counter()
        parts = PartBuffer()
        with self._accepted(sampling):
            work = asyncio.create_task(self._run(sampling, parts))
            work.add_done_callback(parts.end_with)
            first_token_s = 0.0
            try:
                async for part in parts:
                    if not first_token_s:
                        first_token_s = time.perf_counter() - arrived_s
                        self._first_token_seconds.observe(first_token_s)
                        note(first_token_s=first_token_s)
                    yield part, parts.revision
            finally:
                work.cancel()
                self._count_sampled(parts.tokens)

    @contextmanager
    def _accepted(self, sampling: Sampling) -> Iterator[None]:
        """A request's place, while it has one."""
        load = Load(count=max(sampling.num_samples, 1), tokens=len(sampling.prompt))
        with (
            self._room.place(caller().tenant, load),
            self._queue_depth.track_inprogress(),
        ):
            note(prompt_tokens=len(sampling.prompt), samples=sampling.num_samples)
            yield

    async def _run(self, sampling: Sampling, parts: PartBuffer | None) -> tuple[Generated, str]:
        """Has an engine do it, and the next one if that dies; tokens go to `parts` if given."""
        job, path, deaths = self._job(sampling, stream=parts is not None), sampling.model_path, 0
        while True:
            try:
                apart = self._alone if deaths >= DEATHS_UNTIL_ALONE else nullcontext()
                async with apart, self._leased(path, job.start_by_s) as path:
                    generated = await self._attempt(replace(job, adapter=path), parts)
            except EngineDied as death:
                deaths += 1
                if deaths > DEATHS_UNTIL_ALONE:
                    raise _given_up(deaths, death) from death
                job = replace(job, start_by_s=None)  # it has had its turn
                continue
            if generated is None:
                continue
            self._tokens.labels("prompt").inc(len(sampling.prompt))
            self._tokens.labels("prompt_cached").inc(generated.prompt_cache_hit_tokens)
            note(cached_tokens=generated.prompt_cache_hit_tokens)
            return generated, path

    async def _attempt(self, job: Generate, parts: PartBuffer | None) -> Generated | None:
        """None: the engine lacked the adapter, and has it now."""
        try:
            return await self._call(job, parts)
        except AdapterAbsent:
            await self._adapters.settled(job.adapter)
            return None

    def _job(self, sampling: Sampling, *, stream: bool) -> Generate:
        return Generate(
            request_id=next(self._request_ids),
            adapter=BASE_MODEL,  # until one is leased
            prompt=sampling.prompt,
            num_samples=sampling.num_samples,
            max_tokens=sampling.max_tokens,
            choice=sampling.choice,
            stops=sampling.stops,
            constraint=sampling.constraint,
            prompt_logprobs=sampling.prompt_logprobs,
            topk_prompt_logprobs=sampling.topk_prompt_logprobs,
            target_prompt_tokens=sampling.target_prompt_tokens,
            prompt_alternatives=sampling.prompt_alternatives,
            scored_tokens=sampling.scored_tokens,
            topk_sample_logprobs=sampling.topk_sample_logprobs,
            tenant=caller().tenant,
            stream=stream,
            start_by_s=time.monotonic() + self._max_wait_s if self._max_wait_s else None,
        )

    @asynccontextmanager
    async def _leased(self, path: str, start_by_s: float | None) -> AsyncIterator[str]:
        """Holds an adapter in an engine that is up, and says which revision it is."""
        async with AsyncExitStack() as stack:
            left_s = start_by_s and start_by_s - time.monotonic()
            try:
                async with asyncio.timeout(left_s) as limit:
                    await self._engine.hello()
                    lease = self._adapters.lease(path, caller().tenant)
                    revision = await stack.enter_async_context(lease)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise WaitedTooLong(self._max_wait_s) from None
            yield revision

    async def _call(self, job: Generate, parts: PartBuffer | None) -> Generated:
        if parts:
            parts.begin(job.adapter)
        started_s = time.perf_counter()
        try:
            generated: Generated = await self._engine.call(
                job, on_part=parts.put if parts else None
            )
        except asyncio.CancelledError:
            self._engine.cast(Abort(job.request_id))
            raise
        note(run_s=time.perf_counter() - started_s)
        return generated

    def _count_sampled(self, tokens: int) -> None:
        self._tokens.labels("sampled").inc(tokens)
        note(tokens=tokens)


def _given_up(deaths: int, last: EngineDied) -> EngineFault:
    return EngineFault(
        f"{deaths} engines ended while they worked on this call, the last of them with no other "
        f"that is suspect ({last.message}); it is not tried again",
        engine_deaths=deaths,
    )
