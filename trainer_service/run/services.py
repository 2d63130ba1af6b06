"""What the loops of all runs share."""

from mint_core.hosting.tasks import Tasks
from mint_core.rpc.metrics import Metrics
from trainer_service.checkpoints.checkpoints import Checkpoints
from trainer_service.queue.scheduler import Scheduler
from trainer_service.run.saved_rows import SavedRows


class RunServices:
    """All belong to one event loop."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        checkpoints: Checkpoints,
        saved_rows: SavedRows,
        tasks: Tasks,
        metrics: Metrics,
    ) -> None:
        self.scheduler = scheduler
        self.checkpoints = checkpoints
        self.saved_rows = saved_rows
        self.tasks = tasks
        self.rows_restored = metrics.counter(
            "mint_rows_restored", "Rows restored after their engine had ended"
        )
        self.inexact_replays = metrics.counter(
            "mint_inexact_replays", "Rows that are not to the bit what they were before"
        )
