"""How long a run is kept that nobody calls, and what is said of it afterwards."""

import copy
import logging
import time
from collections.abc import Callable

from mint_core.errors import NotFound, TrainingRunNotFound
from mint_core.rpc.metrics import Metrics
from trainer_service.errors import TrainingRunExpired

logger = logging.getLogger(__name__)

EXPIRY_INTERVAL_S = 30.0
LEAST_LEFT_S = 3600.0  # after a restart, for those who could not call meanwhile
REMEMBERED_EXPIRIES = 10_000

Clock = Callable[[], float]  # seconds, ascending


class Retention:
    """Counts from the last call of one run."""

    def __init__(self, limit_s: float, clock: Clock = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._used_s = clock()

    def touch(self) -> None:
        """Notes a call."""
        self._used_s = self._clock()

    def resume(self, unused_s: float) -> None:
        """Goes on after a restart: nobody had called for so long before it."""
        self._used_s -= max(0.0, min(unused_s, self.limit_s - LEAST_LEFT_S))

    @property
    def over(self) -> bool:
        return self._clock() - self._used_s > self.limit_s


class Expiries:
    """The runs that were deleted because nobody called them."""

    def __init__(self, metrics: Metrics) -> None:
        self._count = metrics.counter(
            "mint_training_runs_expired", "Runs deleted because nobody called them"
        )
        self._expired: dict[tuple[str, str], TrainingRunExpired] = {}  # by tenant and run

    def add(self, tenant: str, training_run_id: str, retention_s: float) -> None:
        logger.info("run=%s tenant=%s expired retention_s=%g", training_run_id, tenant, retention_s)
        self._count.inc()
        error = TrainingRunExpired(training_run_id, retention_s)
        self._expired[tenant, training_run_id] = error
        if len(self._expired) > REMEMBERED_EXPIRIES:
            del self._expired[next(iter(self._expired))]

    def not_found(self, tenant: str, training_run_id: str) -> NotFound:
        """What a tenant is told of a run that is not there."""
        expired = self._expired.get((tenant, training_run_id))
        return copy.copy(expired) if expired else TrainingRunNotFound(training_run_id)
