"""All engines of a sampler: the requests of each, and how they are as one."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from mint_core.engine_host.engines import EnginesAsOne
from mint_core.engine_host.pipe import Hello, ModelDescription
from mint_core.engine_host.process import EngineProcess
from mint_core.errors import FailedPrecondition, Unavailable
from mint_core.hosting.tasks import Tasks
from sampler_service import jobs
from sampler_service.adapters.coming import Coming
from sampler_service.adapters.revisions import Revision
from sampler_service.replicas.choice import Standing, Wanted, choose
from sampler_service.replicas.prompts import beginnings
from sampler_service.replicas.replica import Replica
from sampler_service.replicas.shares import Shares

USUAL_TOKENS = 256.0  # of a continuation, until some have ended
LAST_COUNTS = 1 / 32  # for what is usual


@dataclass(slots=True, eq=False)
class Place:
    """A request's at a replica."""

    replica: Replica
    had_tokens: int  # by its tenant, of all replicas
    computed_tokens: int = 0  # for it; set once that is known


class Replicas(EnginesAsOne):
    """At least one. All methods belong to one event loop. To health, metrics and administrators
    they are one engine, which is up while any is.
    """

    def __init__(self) -> None:
        self._replicas: list[Replica] = []
        self._shares = Shares()
        self._usual_tokens = USUAL_TOKENS
        self.model: ModelDescription | None = None  # that is served; None: none is up yet
        self.found: Counter[tuple[str, ...]] = Counter()  # requests: replica, adapter, prompt
        self.changed = asyncio.Event()  # set when `ready` may change, for one reader who clears it

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas)

    def __len__(self) -> int:
        return len(self._replicas)

    def add(self, replica: Replica) -> None:
        """Before `start`."""
        self._replicas.append(replica)

    @property
    def up(self) -> list[Replica]:
        """Those that take requests now."""
        return [each for each in self._replicas if each.engine.ready and not each.leaving]

    @property
    def ready(self) -> bool:
        return bool(self.up)

    @property
    def engines(self) -> Iterator[EngineProcess]:
        return (each.engine for each in self._replicas)

    async def start(self, tasks: Tasks) -> None:
        """Starts all; what is served has the shortest context of any. Raises what keeps one from
        loading.
        """
        starts = [asyncio.create_task(each.engine.start()) for each in self._replicas]
        try:
            hellos = await asyncio.gather(*starts)
        except BaseException:
            await self.close()
            await asyncio.wait(starts)
            raise
        models = [hello.model for hello in hellos]
        if len({model.fingerprint for model in models}) > 1:
            raise FailedPrecondition("the replicas have loaded different base models; start again")
        for each, hello in zip(self._replicas, hellos, strict=True):
            self._welcome(each, hello, tasks)
        self.model = min(models, key=lambda model: model.context_length)

    def join(self, replica: Replica, hello: Hello, tasks: Tasks) -> None:
        """Has one more, which has said this, take requests. Raises FailedPrecondition if it would
        answer otherwise than the others.
        """
        served, found = self.model, hello.model
        assert served is not None, "start() comes first"
        if found.fingerprint != served.fingerprint:
            raise FailedPrecondition(
                "it has loaded another base model than the others; put the files of `base_model` "
                "back, or restart the server"
            )
        if (kind := found.device.partition(":")[0]) != served.device.partition(":")[0]:
            raise FailedPrecondition(
                f"it is on {kind} and the others are not, so that a seed would draw other tokens; "
                "give a `device` of their kind"
            )
        if found.context_length < served.context_length:
            raise FailedPrecondition(
                f"its memory holds a context of {found.context_length} tokens, and clients were "
                f"told of {served.context_length}; give a `device` with more free memory"
            )
        self._replicas.append(replica)
        self._welcome(replica, hello, tasks)
        self.changed.set()

    def remove(self, replica: Replica) -> None:
        """Forgets one that has ended."""
        for task in replica.following:
            task.cancel()
        self._replicas.remove(replica)
        self.ended_restarts += replica.engine.restarts
        self.changed.set()

    async def hello(self) -> Hello:
        """Waits until one is up, and returns what it said of itself."""
        for each in self.up:
            return await each.engine.hello()
        error = Unavailable("the server is shutting down; send the call again")
        staying = [each for each in self._replicas if not each.leaving]
        starts = [asyncio.create_task(each.engine.hello()) for each in staying]
        try:
            for start in asyncio.as_completed(starts):
                try:
                    return await start
                except Unavailable as why:
                    error = why
        finally:
            for task in starts:
                task.cancel()
        raise error

    async def call(self, job: object) -> object:
        """Asks one that is up what all know."""
        while True:
            await self.hello()
            asked = (self.up or self._replicas)[0]
            try:
                return await asked.engine.call(job)
            except Unavailable:
                if not self.lacks(asked):
                    raise

    @contextmanager
    def place(self, job: jobs.Generate, revision: Revision | None) -> Iterator[Place]:
        """Chooses a replica for a request, and holds its tokens there while it goes on."""
        sampling, several = job.sampling, len(self) > 1  # with one, there is nothing to share
        adapter = revision.path if revision else jobs.BASE_MODEL
        prompt = beginnings(job.tenant, adapter, sampling.prompt) if several else ()
        each_tokens = min(sampling.max_tokens, int(self._usual_tokens))
        wanted = Wanted(job.tenant, len(sampling.prompt), sampling.num_samples * each_tokens)
        among = self.up or [each for each in self._replicas if not each.leaving]
        if not among:
            raise Unavailable("the server is shutting down; send the call again")
        standings = [each.standing(prompt, revision) for each in among]
        chosen = choose(wanted, standings)
        replica, standing = among[chosen], standings[chosen]
        tokens = wanted.prompt_tokens - standing.warm_tokens + wanted.continuation_tokens
        if several:
            self._note_found(replica, standing, revision)
        replica.kept.add(prompt, replica.cache_tokens)
        had_tokens = self._shares.begin(job.tenant)
        place = Place(replica, had_tokens if several else 0)
        try:
            with replica.working(job.tenant, tokens):
                yield place
        finally:
            self._shares.end(job.tenant, place.computed_tokens)

    def note(self, place: Place, sampling: jobs.Sampling, cached: int, sampled: int) -> None:
        """Notes what a request has come to: tokens of its prompt that were not computed again, and
        those of all its samples.
        """
        place.computed_tokens = len(sampling.prompt) - cached + sampled
        if sampling.num_samples:
            usual = sampled / sampling.num_samples
            self._usual_tokens += LAST_COUNTS * (usual - self._usual_tokens)

    def lacks(self, replica: Replica) -> bool:
        """Whether what waits for a replica had better go to another."""
        return self.ready and replica not in self.up

    async def drain(self, name: str, limit_s: float | None) -> None:
        """Gives a replica no more requests, waits for so long (None: as long as it takes) until
        those that it has have ended, and ends it. Others go on with what is left.
        """
        (replica,) = (each for each in self._replicas if each.name == name)
        replica.leaving = True
        self._let_go()
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await replica.idle.wait()
        await replica.engine.close()

    async def close(self) -> None:
        """Ends all."""
        for each in self._replicas:
            each.leaving = True
        await asyncio.gather(*(self.drain(each.name, 0) for each in self._replicas))

    def _welcome(self, replica: Replica, hello: Hello, tasks: Tasks) -> None:
        replica.cache_tokens = hello.kv_cache_tokens
        replica.leases.most_ranks = hello.adapter_ranks
        replica.following = (
            tasks.start(self._follow(replica), f"replica {replica.name}"),
            tasks.start(replica.leases.run(), f"adapter leases of replica {replica.name}"),
        )

    async def _follow(self, replica: Replica) -> None:
        while True:
            replica.engine.changed.clear()
            self._let_go()
            await replica.engine.changed.wait()

    def _let_go(self) -> None:
        """Has what waits for a replica that is not up go to others."""
        for each in self._replicas:
            if self.lacks(each):
                each.leases.abandon()
        self.changed.set()

    def _note_found(self, replica: Replica, found: Standing, revision: Revision | None) -> None:
        adapter = "none"
        if revision:
            adapter = "there" if found.adapter is Coming.THERE else "brought"
        self.found[replica.name, adapter, "kept" if found.warm_tokens else "new"] += 1
