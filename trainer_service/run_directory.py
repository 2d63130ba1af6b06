"""All runs that a tenant can name: those that train here, and those of uploaded adapters."""

from collections.abc import Mapping, Sequence
from functools import partial

from checkpoint_store import CheckpointStore
from mint_core.errors import FailedPrecondition, TrainingRunNotFound
from mint_core.rpc.quotas import Account
from trainer_service.run.run import Run
from trainer_service.run_description import RunView
from trainer_service.run_table import RunTable
from trainer_service.runs import Runs
from trainer_service.uploaded_runs import (
    PREFIX,
    UploadedRun,
    is_uploaded,
    uploaded_runs,
)
from trainer_service.wire.idempotency import Once
from trainer_service.wire.pages import Page, Place, page_of, place
from trainer_service.wire.requests import DeleteRun, ListRuns


class RunDirectory:
    """All methods belong to one event loop."""

    def __init__(self, runs: Runs, table: RunTable, store: CheckpointStore, ids: Account) -> None:
        self._runs = runs
        self._table = table
        self._store = store
        self._once = Once(ids)

    async def get(self, tenant: str, training_run_id: str) -> RunView | UploadedRun:
        if not is_uploaded(training_run_id):
            return self._runs.get(tenant, training_run_id)
        found = await self._store.in_turn(
            tenant, self._store.list, tenant=tenant, training_run_id=training_run_id
        )
        if not found:
            raise TrainingRunNotFound(training_run_id)
        return uploaded_runs(found)[0]

    async def list(self, tenant: str, request: ListRuns) -> Page[RunView | UploadedRun]:
        """The tenant's runs, newest first."""
        trained = [] if request.kind == "uploaded" else self._table.of(tenant)
        page = await self._store.in_turn(tenant, self._page, tenant, request, trained)
        shown = [self._runs.view(run) if isinstance(run, Run) else run for run in page.entries]
        return Page(shown, page.next_page_token, page.total_size)

    def _page(
        self, tenant: str, request: ListRuns, trained: Sequence[Run]
    ) -> Page[Run | UploadedRun]:
        runs: list[Run | UploadedRun] = [*trained]
        if request.kind != "trained":
            runs += uploaded_runs(self._store.list(tenant=tenant, run_prefix=PREFIX))
        wanted = request.metadata_filter.items()
        chosen = [run for run in runs if wanted <= _metadata(run).items()]
        return page_of(chosen, _place, request.page)

    async def delete(self, tenant: str, request: DeleteRun) -> bytes:
        if not is_uploaded(request.training_run_id):
            return await self._runs.delete(tenant, request)
        if not request.delete_checkpoints:
            raise FailedPrecondition(
                f"training run `{request.training_run_id}` consists of its uploaded checkpoints; "
                "set `delete_checkpoints` to delete it with them",
                training_run_id=request.training_run_id,
            )
        delete = partial(self._store.in_turn, tenant, self._delete, tenant, request)
        return await self._once.run(tenant, request.identity, delete, frees=True)

    def _delete(self, tenant: str, request: DeleteRun) -> bytes:
        run, digest = request.training_run_id, request.identity.digest(tenant)
        found = self._store.list(tenant=tenant, training_run_id=run)
        if not found and not self._store.has_deleted(run, digest):
            raise TrainingRunNotFound(run)
        for manifest in found:
            self._store.delete(str(manifest.path), tenant=tenant, request=digest)
        return b""


def _metadata(run: Run | UploadedRun) -> Mapping[str, str]:
    return run.metadata if isinstance(run, Run) else run.last.metadata


def _place(run: Run | UploadedRun) -> Place:
    if isinstance(run, Run):
        return place(run.origin.create_time, run.origin.training_run_id)
    return place(run.first.create_time, run.training_run_id)
