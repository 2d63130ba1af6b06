"""The runs that there are, and what a tenant may have of them."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from mint_core.rpc.quotas import Account, QuotaBook
from trainer_service.run.run import Run

_DELETE = "delete training runs that are not needed (DeleteTrainingRun)"


class RunTable:
    """All methods belong to one event loop."""

    def __init__(self, quotas: QuotaBook) -> None:
        self._runs: dict[str, Run] = {}  # by id, oldest first
        self._by_tenant: dict[str, dict[Run, None]] = {}
        self._count = Account(quotas, "runs", "training runs", _DELETE)
        what = "GiB of weights, gradients and moments"
        self._row_bytes = Account(quotas, "row_gib", what, _DELETE, unit=2**30)

    def get(self, training_run_id: str) -> Run | None:
        return self._runs.get(training_run_id)

    def all(self) -> Collection[Run]:
        return self._runs.values()

    def of(self, tenant: str) -> list[Run]:
        """Those that the tenant can see, oldest first."""
        return [run for run in self._by_tenant.get(tenant, ()) if not run.closing]

    @contextmanager
    def room(self, tenant: str) -> Iterator[None]:
        """Holds a place for a run while it is made. Raises QuotaExceeded."""
        self._row_bytes.check(tenant, 0)
        with self._count.holding(tenant, 1):
            yield

    def add(self, run: Run) -> None:
        self._runs[run.id] = run
        self._by_tenant.setdefault(run.origin.tenant, {})[run] = None
        self._note(run, 1)

    def remove(self, run: Run) -> None:
        del self._runs[run.id], self._by_tenant[run.origin.tenant][run]
        self._note(run, -1)

    def _note(self, run: Run, sign: int) -> None:
        self._count.add(run.origin.tenant, sign)
        self._row_bytes.add(run.origin.tenant, sign * run.origin.whole_row_bytes)
