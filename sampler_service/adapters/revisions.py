"""Adapters as revisions in files that the engine maps: a trainer's on this host as they lie in
memory, those of the store converted once and kept while there is room.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from checkpoint_store import SAMPLER_WEIGHTS, AdapterStore, Manifest, OpenCheckpoint
from mint_core.engine_host.pipe import Hello, ModelDescription
from mint_core.errors import CheckpointNotFound, FailedPrecondition
from mint_core.hosting.tasks import Tasks
from mint_core.lora.row_layout import RowLayout
from mint_core.lora.spec import stored_rank
from mint_core.turns import Workers
from sampler_service.adapters.row_folder import RowFolder
from sampler_service.jobs import DescribeRows

logger = logging.getLogger(__name__)

ANNOUNCED_LIMIT_S = 300.0  # for a snapshot that another host is still writing to the store
APPEAR_INTERVAL_S = 0.1
CHECK_INTERVAL_S = 30.0  # how long a revision is trusted to be still in the store
CONVERSIONS = 4  # at the same time
MOST_KNOWN = 100_000  # revisions; the rest are looked for again


class AnyEngine(Protocol):
    """One that is up: all have the same base model, and rows lie alike in them."""

    async def hello(self) -> Hello: ...

    async def call(self, job: object) -> Any: ...


class WrongBaseModel(FailedPrecondition):
    """The adapter belongs to another base model."""

    reason = "WRONG_BASE_MODEL"

    def __init__(self, manifest: Manifest, model: ModelDescription) -> None:
        super().__init__(
            f"adapter `{manifest.revision_path}` was trained on {manifest.base_model!r} "
            f"({manifest.base_fingerprint[:12]}) and this sampler serves {model.name!r} "
            f"({model.fingerprint[:12]}); "
            + model.remedy(manifest.base_fingerprint, "sample where its own base model is served"),
            path=manifest.revision_path,
            base_model=manifest.base_model,
            served=model.name,
        )


class AnotherRevision(FailedPrecondition):
    """A path means for ever what it has meant once: what was computed with it is kept by it."""

    reason = "ANOTHER_REVISION"

    def __init__(self, path: str) -> None:
        super().__init__(
            f"adapter `{path}` is another than this sampler has had by that path, since its store "
            "was made anew; publish it under another name, or start the sampler again",
            path=path,
        )


@dataclass(slots=True, eq=False)
class Revision:
    """An adapter that has been found, and fits the base model."""

    path: str  # its own, which means the same for ever
    tenant: str
    rank: int
    in_memory: Path | None = None  # a trainer's row file
    verified: bool = False  # whether its files in the store were, by this process
    checked_s: float = field(default_factory=time.monotonic)

    @property
    def recent(self) -> bool:
        return time.monotonic() - self.checked_s < CHECK_INTERVAL_S

    @property
    def stored_rank(self) -> int:
        """Ranks that it takes of the engine's memory."""
        return stored_rank(self.rank)


class Revisions:
    """All methods belong to one event loop."""

    def __init__(
        self, store: AdapterStore, folder: RowFolder, engine: AnyEngine, tasks: Tasks
    ) -> None:
        self._store = store
        self._folder = folder
        self._engine = engine
        self._tasks = tasks
        self._layouts: dict[int, RowLayout] = {}  # by stored rank
        self._known: dict[str, Revision] = {}  # by revision path
        self._made: dict[str, datetime] = {}  # the same, and those that are gone
        self._looks: dict[tuple[str, str], asyncio.Task[Revision | Exception]] = {}
        self._conversions = Workers(CONVERSIONS, "adapter-rows")

    async def resolve(self, path: str, tenant: str) -> Revision:
        """What a path means now. Raises CheckpointNotFound, or another MintError if it is no
        adapter for this sampler. Requests that come together for a new revision share an answer.
        """
        known = self._known.get(path)
        if known is not None and known.tenant == tenant and known.recent:
            return known
        key = (path, tenant)
        while True:
            joined = key in self._looks
            if not joined:
                self._looks[key] = self._tasks.start(self._look(*key), f"look for {path}")
            found = await asyncio.shield(self._looks[key])
            if isinstance(found, Revision):
                return found
            if not (joined and isinstance(found, CheckpointNotFound)):
                raise found  # otherwise the last look may have been before this request

    async def file(self, revision: Revision) -> Path:
        """A row file of the revision."""
        if revision.in_memory is not None and revision.in_memory.exists():
            return revision.in_memory
        return self._folder.get(revision.path) or await self._convert(revision)

    async def own_file(self, revision: Revision) -> Path:
        """The same where the engine cannot use that file: a new one of our own."""
        self._folder.drop(revision.path)
        return await self._convert(revision)

    def interrupt(self) -> None:
        """Ends what is waited for in vain when the service stops."""
        self._store.interrupt()

    def close(self) -> None:
        self._conversions.close()
        self._folder.close()

    async def _look(self, path: str, tenant: str) -> Revision | Exception:
        """Asks the store, and returns also what it raises: those who wait are told."""
        try:
            return await self._note(await self._await_path(path, tenant))
        except Exception as error:
            return error
        finally:
            del self._looks[path, tenant]

    async def _await_path(self, path: str, tenant: str) -> OpenCheckpoint:
        """Asks again for a while if the path is not there yet."""
        started_s, announced = time.monotonic(), True
        while True:
            try:
                return await self._store.in_turn(tenant, self._find, path, tenant)
            except CheckpointNotFound:
                self._forget(path, tenant)
                limit_s = ANNOUNCED_LIMIT_S if announced else self._store.appear_limit_s
                if time.monotonic() - started_s >= limit_s:
                    raise
            # Asked before the next look: what is published between the two is then found.
            announced = await self._store.in_turn(
                tenant, self._store.announced, path, tenant=tenant
            )
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
            self._folder.drop(path)

    async def _note(self, found: OpenCheckpoint) -> Revision:
        """Refuses what is not for this base model, and remembers the rest."""
        manifest, model = found.manifest, (await self._engine.hello()).model
        if not model.opens(manifest.base_fingerprint):
            raise WrongBaseModel(manifest, model)
        path, rank = str(manifest.revision_path), manifest.spec.rank
        if rank > model.max_lora_rank:
            raise FailedPrecondition(
                f"adapter `{path}` has rank {rank} and this sampler takes at most "
                f"{model.max_lora_rank}; start it with a larger --max-lora-rank",
                path=path,
                rank=rank,
            )
        for known in (self._known, self._made):
            if len(known) >= MOST_KNOWN:
                del known[next(iter(known))]
        if self._made.setdefault(path, manifest.create_time) != manifest.create_time:
            raise AnotherRevision(path)
        revision = self._known.setdefault(path, Revision(path, manifest.tenant, rank))
        revision.in_memory = found.row.file.path if found.row else None
        revision.checked_s = time.monotonic()
        return revision

    async def _convert(self, revision: Revision) -> Path:
        """Makes a file of our own."""
        path, rank, started_s = revision.path, revision.stored_rank, time.perf_counter()
        if rank not in self._layouts:
            self._layouts[rank] = await self._engine.call(DescribeRows(revision.rank))
        file = await self._conversions.run(
            revision.tenant, self._lay_out, revision, self._layouts[rank]
        )
        logger.info("adapter fetched path=%s s=%.4f", path, time.perf_counter() - started_s)
        return file

    def _lay_out(self, revision: Revision, layout: RowLayout) -> Path:
        found = self._find(revision.path, revision.tenant)
        if found.row is None and (found.copied or not revision.verified):
            self._store.verify(found)
            revision.verified = True
        row = layout.row(found.manifest.spec, found.weights())
        return self._folder.put(found.manifest, layout, row)
