"""Which adapters the engine holds: fetched from the store when they are asked for, and dropped
when others need the room and nobody uses them.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from checkpoint_store import SAMPLER_WEIGHTS, CheckpointStore, Manifest, OpenCheckpoint
from mint_core.engine_pipe import ModelDescription
from mint_core.engine_process import EngineProcess
from mint_core.errors import CheckpointNotFound, FailedPrecondition
from mint_core.lora.spec import stored_rank
from sampler_service.jobs import BASE_MODEL, DropAdapter, LoadAdapter

logger = logging.getLogger(__name__)

APPEAR_LIMIT_S = 1.0  # for a path that another host has just published
APPEAR_INTERVAL_S = 0.1
CHECK_INTERVAL_S = 30.0  # how long a revision in use is trusted to be still in the store


class WrongBaseModel(FailedPrecondition):
    """The adapter belongs to another base model."""

    reason = "WRONG_BASE_MODEL"

    def __init__(self, manifest: Manifest, model: ModelDescription) -> None:
        super().__init__(
            f"adapter `{manifest.revision_path}` was trained on {manifest.base_model!r} "
            f"({manifest.base_fingerprint[:12]}) and this sampler serves {model.name!r} "
            f"({model.fingerprint[:12]}); sample where its own base model is served",
            path=manifest.revision_path,
            base_model=manifest.base_model,
            served=model.name,
        )


@dataclass(slots=True, eq=False)
class _Held:
    """A revision in the engine, or on its way there."""

    revision_path: str
    tenant: str
    loading: "asyncio.Task[None]" = field(init=False)
    ranks: int = 0  # that it takes of the engine's memory; 0 while it waits for room
    users: int = 0
    checked_s: float = field(default_factory=time.monotonic)


class Adapters:
    """All methods belong to one event loop."""

    def __init__(self, store: CheckpointStore, engine: EngineProcess, *, capacity: int) -> None:
        self._store = store
        self._engine = engine
        self._capacity = capacity
        self._held: dict[str, _Held] = {}  # by revision path, the least recently used first
        self._released = asyncio.Event()
        # Who waits for a place, or for memory, is not overtaken.
        self._turn = asyncio.Lock()
        self._memory_turn = asyncio.Lock()

    @asynccontextmanager
    async def lease(self, path: str, tenant: str) -> AsyncIterator[str]:
        """The revision path of the adapter, which the engine holds meanwhile. Raises a MintError
        if the path is not there for this tenant, or does not fit the base model.
        """
        if path == BASE_MODEL:
            yield BASE_MODEL
            return
        held = await self._hold(await self._resolve(path, tenant), tenant)
        try:
            await asyncio.shield(held.loading)
            yield held.revision_path
        finally:
            held.users -= 1
            self._released.set()

    def engine_died(self) -> None:
        """Forgets what the engine held. What is still being read goes to the next engine."""
        self._held = {path: held for path, held in self._held.items() if not held.loading.done()}
        self._released.set()

    def forget(self, revision_path: str) -> None:
        """Notes that the engine does not hold a revision after all."""
        self._held.pop(revision_path, None)

    async def _resolve(self, path: str, tenant: str) -> str:
        held = self._held.get(path)
        recent = time.monotonic() - CHECK_INTERVAL_S
        if held is not None and held.tenant == tenant and held.checked_s > recent:
            return path  # a revision's own path: it means the same for ever
        revision_path = await self._find(path, tenant)
        held = self._held.get(revision_path)
        if held is not None and held.checked_s <= recent:
            await asyncio.to_thread(self._store.renew, revision_path, tenant=tenant)
            held.checked_s = time.monotonic()
        return revision_path

    async def _find(self, path: str, tenant: str) -> str:
        """Asks the store, again for a while if the path is not there yet."""
        end = time.monotonic() + APPEAR_LIMIT_S
        while True:
            try:
                return await asyncio.to_thread(
                    self._store.resolve, path, tenant=tenant, kind=SAMPLER_WEIGHTS
                )
            except CheckpointNotFound:
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(APPEAR_INTERVAL_S)

    async def _hold(self, revision_path: str, tenant: str) -> _Held:
        """The entry of a revision, with one more user."""
        async with self._turn:
            while revision_path not in self._held and len(self._held) >= self._capacity:
                await self._drop_idle()
            held = self._entry(revision_path, tenant)
            held.users += 1
            return held

    def _entry(self, revision_path: str, tenant: str) -> _Held:
        """The entry, made if need be, and the most recently used from now on."""
        held = self._held.pop(revision_path, None)
        if held is None:
            held = _Held(revision_path, tenant)
            held.loading = asyncio.create_task(self._load(held))
            held.loading.add_done_callback(lambda task: self._loaded(revision_path, task))
        self._held[revision_path] = held
        return held

    async def _drop_idle(self) -> None:
        """Drops the least recently used idle adapter; if none is idle, waits for a change."""
        idle = next((h for h in self._held.values() if not h.users and h.loading.done()), None)
        if idle is None:
            self._released.clear()
            await self._released.wait()
            return
        del self._held[idle.revision_path]
        self._engine.cast(DropAdapter(idle.revision_path))
        logger.info("adapter dropped path=%s", idle.revision_path)

    async def _load(self, held: _Held) -> None:
        hello = await self._engine.hello()
        started_s = time.perf_counter()
        opened = await asyncio.to_thread(self._open, held, hello.model)
        spec = opened.manifest.spec
        await self._take_memory(held, stored_rank(spec.rank), hello.adapter_ranks)
        weights = await asyncio.to_thread(opened.weights)
        job = LoadAdapter(revision_path=held.revision_path, spec=spec, weights=weights)
        await self._engine.call(job)
        seconds = time.perf_counter() - started_s
        logger.info("adapter loaded path=%s s=%.4f", held.revision_path, seconds)

    async def _take_memory(self, held: _Held, ranks: int, most_ranks: int) -> None:
        async with self._memory_turn:
            while sum(other.ranks for other in self._held.values()) + ranks > most_ranks:
                await self._drop_idle()
            held.ranks = ranks

    def _open(self, held: _Held, model: ModelDescription) -> OpenCheckpoint:
        path = held.revision_path
        opened = self._store.open(path, tenant=held.tenant, kind=SAMPLER_WEIGHTS)
        manifest = opened.manifest
        if manifest.base_fingerprint != model.fingerprint:
            raise WrongBaseModel(manifest, model)
        if manifest.spec.rank > model.max_lora_rank:
            raise FailedPrecondition(
                f"adapter `{path}` has rank {manifest.spec.rank} and this sampler takes "
                f"at most {model.max_lora_rank}; start it with a larger --max-lora-rank",
                path=path,
                rank=manifest.spec.rank,
            )
        return opened

    def _loaded(self, revision_path: str, task: "asyncio.Task[None]") -> None:
        """Forgets an adapter that could not be loaded, also when nobody waits for it any more."""
        if task.cancelled() or task.exception() is not None:
            held = self._held.get(revision_path)
            if held is not None and held.loading is task:
                del self._held[revision_path]
        self._released.set()
