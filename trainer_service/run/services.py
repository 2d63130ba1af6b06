"""What the loops of all runs share."""

from dataclasses import dataclass

from prometheus_client import Counter

from mint_core.hosting.tasks import Tasks
from mint_core.turns import Turns, Workers
from trainer_service.checkpoints.checkpoints import Checkpoints
from trainer_service.groups.groups import Groups
from trainer_service.run.saved_rows import SavedRows


@dataclass(frozen=True, slots=True, kw_only=True)
class RunServices:
    """All belong to one event loop."""

    groups: Groups
    checkpoints: Checkpoints
    saved_rows: SavedRows
    tasks: Tasks
    decoders: Workers  # of what the journal has kept of large calls
    restorations: Turns  # few together, so that the first of many runs need not wait for the last
    rows_restored: Counter
    inexact_replays: Counter
