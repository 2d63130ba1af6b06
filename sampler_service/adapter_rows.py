"""Adapters as files that the engine maps: a trainer's on this host as they lie in memory, those of
the store converted once and kept while there is room.
"""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint_store import SAMPLER_WEIGHTS, CheckpointStore, Manifest, OpenCheckpoint
from mint_core.engine_host.pipe import ModelDescription
from mint_core.engine_host.process import EngineProcess
from mint_core.errors import CheckpointNotFound, FailedPrecondition
from mint_core.lora.row_layout import RowLayout
from mint_core.lora.spec import stored_rank
from sampler_service.jobs import DescribeRows
from sampler_service.row_files import RowFiles

logger = logging.getLogger(__name__)

APPEAR_LIMIT_S = 1.0  # for a path that another host has just published
ANNOUNCED_LIMIT_S = 300.0  # for a snapshot that another host is still writing to the store
APPEAR_INTERVAL_S = 0.1
CHECK_INTERVAL_S = 30.0  # how long a revision is trusted to be still in the store
CONVERSIONS = 4  # at the same time
MOST_KNOWN = 100_000  # revisions; the rest are looked for again


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
class _Known:
    """A revision that has been found."""

    tenant: str
    rank: int
    in_memory: Path | None = None  # a trainer's row file
    verified: bool = False  # whether its files in the store were, by this process
    checked_s: float = field(default_factory=time.monotonic)

    @property
    def recent(self) -> bool:
        return time.monotonic() - self.checked_s < CHECK_INTERVAL_S


@dataclass(frozen=True, slots=True)
class Row:
    """A revision's row file."""

    file: Path
    rank: int


class AdapterRows:
    """All methods belong to one event loop."""

    def __init__(self, store: CheckpointStore, files: RowFiles, engine: EngineProcess) -> None:
        self._store = store
        self._files = files
        self._engine = engine
        self._layouts: dict[int, RowLayout] = {}  # by stored rank
        self._known: dict[str, _Known] = {}  # by revision path
        self._looks: dict[tuple[str, str], asyncio.Task[tuple[str, _Known]]] = {}
        self._conversions: dict[str, asyncio.Task[Row]] = {}
        self._threads = ThreadPoolExecutor(CONVERSIONS, "adapter-rows")

    async def resolve(self, path: str, tenant: str) -> str:
        """The revision that a path means now. Raises CheckpointNotFound, or another MintError if it
        is no adapter for this sampler.
        """
        known = self._known.get(path)
        if known is not None and known.tenant == tenant and known.recent:
            return path  # a revision's own path: it means the same for ever
        return (await self._look(path, tenant))[0]

    async def row(self, revision_path: str, tenant: str) -> Row:
        """A resolved revision in a file."""
        known = await self._recall(revision_path, tenant)
        if known.in_memory is not None and known.in_memory.exists():
            return Row(known.in_memory, known.rank)
        file = self._files.get(revision_path)
        if file is not None:
            return Row(file, known.rank)
        return await self._converted(revision_path, known)

    async def own_row(self, revision_path: str, tenant: str) -> Row:
        """The same where the engine cannot use that file: in a new one of our own."""
        self._files.drop(revision_path)
        return await self._converted(revision_path, await self._recall(revision_path, tenant))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._files.close()

    async def _recall(self, revision_path: str, tenant: str) -> _Known:
        known = self._known.get(revision_path)
        if known is None or known.tenant != tenant:
            known = (await self._look(revision_path, tenant))[1]
        return known

    async def _look(self, path: str, tenant: str) -> tuple[str, _Known]:
        """Asks the store. Requests that come together for a new revision share an answer."""
        key = (path, tenant)
        while True:
            joined = key in self._looks
            if not joined:
                task = self._looks[key] = asyncio.create_task(self._await_path(path, tenant))
                task.add_done_callback(lambda _: self._looks.pop(key))
            try:
                return await asyncio.shield(self._looks[key])
            except CheckpointNotFound:
                if not joined:
                    raise  # otherwise the last look may have been before this request

    async def _await_path(self, path: str, tenant: str) -> tuple[str, _Known]:
        """Asks again for a while if the path is not there yet."""
        started_s = time.monotonic()
        while True:
            try:
                found = await asyncio.to_thread(self._find, path, tenant)
            except CheckpointNotFound:
                self._forget(path, tenant)
                announced = await asyncio.to_thread(self._store.announced, path, tenant=tenant)
                limit_s = ANNOUNCED_LIMIT_S if announced else APPEAR_LIMIT_S
                if time.monotonic() - started_s > limit_s:
                    raise
            else:
                return str(found.manifest.revision_path), await self._note(found)
            await asyncio.sleep(APPEAR_INTERVAL_S)

    def _find(self, path: str, tenant: str) -> OpenCheckpoint:
        found = self._store.find(path, tenant=tenant, kind=SAMPLER_WEIGHTS)
        found.note_use()
        return found

    def _forget(self, path: str, tenant: str) -> None:
        """Notes that the tenant has no such revision, if it had one."""
        known = self._known.get(path)
        if known is not None and known.tenant == tenant:
            del self._known[path]
            self._files.drop(path)

    async def _note(self, found: OpenCheckpoint) -> _Known:
        """Refuses what is not for this base model, and remembers the rest."""
        manifest, model = found.manifest, (await self._engine.hello()).model
        if manifest.base_fingerprint != model.fingerprint:
            raise WrongBaseModel(manifest, model)
        path, rank = str(manifest.revision_path), manifest.spec.rank
        if rank > model.max_lora_rank:
            raise FailedPrecondition(
                f"adapter `{path}` has rank {rank} and this sampler takes at most "
                f"{model.max_lora_rank}; start it with a larger --max-lora-rank",
                path=path,
                rank=rank,
            )
        if len(self._known) >= MOST_KNOWN:
            del self._known[next(iter(self._known))]
        known = self._known.setdefault(path, _Known(manifest.tenant, rank))
        known.in_memory = found.row.file.path if found.row else None
        known.checked_s = time.monotonic()
        return known

    async def _converted(self, path: str, known: _Known) -> Row:
        """A file of our own. Several that ask for it at the same time share the work."""
        if path not in self._conversions:
            task = self._conversions[path] = asyncio.create_task(self._convert(path, known))
            task.add_done_callback(lambda _: self._conversions.pop(path))
        return await asyncio.shield(self._conversions[path])

    async def _layout(self, rank: int) -> RowLayout:
        """How rows of the rank lie in the engine."""
        stored = stored_rank(rank)
        if stored not in self._layouts:
            self._layouts[stored] = await self._engine.call(DescribeRows(rank))
        return self._layouts[stored]

    async def _convert(self, path: str, known: _Known) -> Row:
        started_s = time.perf_counter()
        layout = await self._layout(known.rank)

        def convert() -> Path:
            found = self._find(path, known.tenant)
            if found.row is None and (found.copied or not known.verified):
                self._store.verify(found)
                known.verified = True
            row = layout.row(found.manifest.spec, found.weights())
            return self._files.put(found.manifest, layout, row)

        file = await asyncio.get_running_loop().run_in_executor(self._threads, convert)
        logger.info("adapter fetched path=%s s=%.4f", path, time.perf_counter() - started_s)
        return Row(file, known.rank)
