"""Merged models: made by a process that ends with its work, and kept in the store."""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from checkpoint_store import MERGED_WEIGHTS, Manifest, OpenCheckpoint, new_manifest
from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import NotFound
from mint_core.rpc.model_service import tokenizer_files
from mint_core.rpc.quotas import Account, QuotaBook
from mint_core.turns import Turns
from trainer_service.checkpoints.apart import Merge, do_apart
from trainer_service.checkpoints.checkpoints import Checkpoints, check_base
from trainer_service.checkpoints.downloads import stored
from trainer_service.checkpoints.requests import ExportCheckpoint
from trainer_service.checkpoints.staging import staging
from trainer_service.wire.idempotency import Joined, Once

LINGER_S = 30.0  # for callers who were cut off
Question = tuple[str, str, str]  # tenant, revision, type
BASE_DTYPE = "base"  # in manifests: the base model's own
MODULE = "trainer_service.engine.merging"


@dataclass(frozen=True, slots=True)
class Progress:
    written_bytes: int | None  # None: it waits for its turn
    made: Manifest | None  # None: it is not there yet


class Exports:
    """One at a time, since each takes a model's memory, and tenants take turns. A merge ends soon
    after the last who waits for it has left. All methods belong to one event loop.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        quotas: QuotaBook,
        ids: Account,
        *,
        threads: int,
        linger_s: float = LINGER_S,
    ) -> None:
        self._store = checkpoints.store
        self._sweeper = checkpoints.sweeper
        self._threads = threads
        self._once = Once(ids, goes_on=False, linger_s=linger_s)
        self._waiting = Account(
            quotas, "exports", "exports under way", "wait until some have ended", passes=True
        )
        self._merges = Joined()  # by revision and type
        self._turns = Turns(1)
        self._asked: dict[tuple[str, str], Question] = {}  # by tenant and request, while it waits
        self._merging: tuple[Question, Path] | None = None  # and where it writes

    async def export(
        self, tenant: str, request: ExportCheckpoint, model: ModelDescription
    ) -> Manifest:
        """Makes a merged model, unless it is there or being made: however it is asked for."""
        with self._waiting.holding(tenant, 1):
            return await self._once.run(
                tenant, request.identity, lambda: self._export(tenant, request, model)
            )

    async def progress(self, tenant: str, request_id: str) -> Progress:
        """How far an export is. Raises NotFound."""
        try:
            made: Manifest | None = self._once.look(tenant, request_id)
        except KeyError:
            raise NotFound(
                f"there is no export `{request_id}` of yours; send ExportCheckpoint",
                request_id=request_id,
            ) from None
        if made is not None:
            return Progress(made.size_bytes, made)
        merging, asked = self._merging, self._asked.get((tenant, request_id))
        if merging is None or merging[0] != asked:
            return Progress(None, None)
        return Progress(await self._store.in_turn(tenant, _size_bytes, merging[1]), None)

    async def _export(
        self, tenant: str, request: ExportCheckpoint, model: ModelDescription
    ) -> Manifest:
        digest, run = request.identity.digest(tenant), partial(self._store.in_turn, tenant)
        source = await stored(self._store, tenant, request.path)  # the merge reads files
        dtype = request.dtype or BASE_DTYPE
        made = await run(self._store.merged, source.manifest, dtype, digest)
        if made is None:
            question = (tenant, str(source.manifest.revision_path), dtype)
            merge = partial(self._merge, question, source, request, model)
            self._asked[tenant, request.identity.request_id] = question
            try:
                made = await self._merges.run(question, merge)
            finally:
                del self._asked[tenant, request.identity.request_id]
        if made.expire_time is not None and made.expire_time < request.expire_time:
            kept = partial(replace, expire_time=request.expire_time)
            path = str(made.revision_path)
            made = await run(self._store.update, path, tenant=tenant, change=kept)
        return made

    async def _merge(
        self,
        question: Question,
        source: OpenCheckpoint,
        request: ExportCheckpoint,
        model: ModelDescription,
    ) -> Manifest:
        tenant = source.manifest.tenant
        run = partial(self._store.in_turn, tenant)
        async with self._turns.turn(tenant):
            await run(source.note_use)
            await run(self._store.verify, source)
            check_base(source.manifest, model)
            async with staging(self._store, tenant) as folder:
                job = Merge(
                    base_folder=model.folder,
                    adapter_folder=str(source.folder),
                    spec=source.manifest.spec,
                    output_folder=str(folder),
                    dtype=request.dtype,
                    float8=model.dtype == "float8",
                    threads=self._threads,
                )
                self._merging = question, folder
                try:
                    head_untied = await do_apart(MODULE, job)
                finally:
                    self._merging = None
                await run(_add_tokenizer, folder, model.folder)
                manifest = _manifest(source, request, head_untied)
                manifest = await run(self._store.publish_folder, manifest, folder)
        self._sweeper.note_expiry(request.expire_time)
        return manifest


def _manifest(source: OpenCheckpoint, request: ExportCheckpoint, head_untied: bool) -> Manifest:
    adapter = source.manifest
    return new_manifest(
        adapter.name,
        Manifest(
            training_run_id=adapter.training_run_id,
            kind=MERGED_WEIGHTS,
            tenant=adapter.tenant,
            base_model=adapter.base_model,
            base_fingerprint=adapter.base_fingerprint,
            spec=adapter.spec,
            step=adapter.step,
            metadata=adapter.metadata,
            expire_time=request.expire_time,
            source=str(adapter.revision_path),
            request=request.identity.digest(adapter.tenant),
            dtype=request.dtype or BASE_DTYPE,
            head_untied=head_untied,
        ),
    )


def _size_bytes(folder: Path) -> int:
    """Of what is still there: meanwhile it may be published, or given up."""
    size_bytes = 0
    with suppress(FileNotFoundError):
        for file in folder.iterdir():
            size_bytes += file.stat().st_size
    return size_bytes


def _add_tokenizer(folder: Path, base_folder: str) -> None:
    """Other engines want it beside the weights. What the merge has written stays."""
    for file in tokenizer_files(base_folder):
        with suppress(FileExistsError), (folder / file.name).open("xb") as opened:
            opened.write(file.content)
