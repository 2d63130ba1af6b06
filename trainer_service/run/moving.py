"""How a run goes to another group: its row to disk and out of the engine, and then it is restored
there as after an engine's death. No second way back.
"""

import logging
import time
from contextlib import suppress

from mint_core.errors import EngineDied, MintError, Unavailable
from mint_core.fault_points import fault_point
from trainer_service.jobs import DropRow
from trainer_service.run.inbox import Inbox
from trainer_service.run.run import Run
from trainer_service.run.services import RunServices

logger = logging.getLogger(__name__)


class Moving:
    """Of one run. `move` is called by its loop when nothing of the run is under way."""

    def __init__(self, run: Run, services: RunServices) -> None:
        self._run = run
        self._services = services

    def may_move(self, inbox: Inbox) -> bool:
        """Whether the run is to move before its next call. One of which a row is to be saved is not
        while a call that an engine died with is done again behind its successors.
        """
        run = self._run
        in_order = inbox.first_sequence > run.ended or not run.has_row or not run.unsaved.calls
        return run.destination is not None and in_order

    async def move(self) -> None:
        """Moves it. A row that cannot be saved stays where it is."""
        run, started_s = self._run, time.monotonic()
        assert run.destination is not None
        source, target = run.group, run.destination.group
        if target.draining or source is target:
            self.end()
            return
        try:
            await self._leave()
        except MintError as error:
            logger.warning("run=%s stays in %s: %s", run.id, source.name, error.message)
        else:
            fault_point("move:left")
            self._services.groups.assign(run, target)
            elapsed_s = time.monotonic() - started_s
            logger.info("run=%s moves %s->%s s=%.3f", run.id, source.name, target.name, elapsed_s)
        self.end()

    def end(self) -> None:
        """Tells those who wait for a move that it is decided."""
        if destination := self._run.destination:
            self._run.destination = None
            destination.done.set_result(None)

    async def _leave(self) -> None:
        run, scheduler = self._run, self._run.group.scheduler
        if run.has_row:
            with suppress(EngineDied):  # what is on disk, and the calls behind it, are enough
                await self._services.saved_rows.leave(run)
        if run.group.engine.ready:
            with suppress(EngineDied, Unavailable):
                await scheduler.row(DropRow(run.id), scheduler.life)
