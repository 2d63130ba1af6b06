"""Brings rows back after the engine that had them is gone, when a call wants them.

Callers only wait. Runs that are wanted at the same time are restored together, in the passes that
they shared; others when they are called.
"""

import asyncio
import logging
import time
from pathlib import Path

from mint_core.errors import EngineDied, MintError
from mint_core.fault_points import fault_point
from mint_core.rpc.metrics import Metrics
from trainer_service.errors import StateDamaged
from trainer_service.journal.ledger import Ledger
from trainer_service.queue.scheduler import NotStarted, Scheduler
from trainer_service.recovery.replay import Replay
from trainer_service.run.run import Run

logger = logging.getLogger(__name__)

MOST_DEATHS = 3  # of engines that did the same again, until its runs are given up


class Recovery:
    """All methods belong to one event loop."""

    def __init__(
        self, scheduler: Scheduler, ledger: Ledger, folder: Path, metrics: Metrics
    ) -> None:
        self._scheduler = scheduler
        self._ledger = ledger
        self._folder = folder
        self._wanted: list[Run] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._restored = metrics.counter(
            "mint_rows_restored", "Rows restored after their engine had ended"
        )
        self._inexact = metrics.counter(
            "mint_inexact_replays", "Rows that are not to the bit what they were before"
        )

    async def present(self, run: Run, sequence: int) -> None:
        """Waits until the engine that is up has the run's row. Raises why it cannot be.

        Restoring begins when all calls of the run that have their turn wait here: what the engine
        of before had done for one of them cannot come to count any more.
        """
        presence = run.presence
        while presence.life != self._scheduler.life or presence.parked_before(sequence):
            self.consider(run, parking=1)
            await presence.park(sequence)

    def consider(self, run: Run, *, parking: int = 0) -> None:
        """Has the run's row restored if calls wait for it, and all that have their turn do."""
        presence = run.presence
        waiting = presence.parked + parking
        there = presence.life == self._scheduler.life
        if there or presence.restoring or not waiting or waiting < presence.executing:
            return
        presence.restoring = True
        if not self._wanted:
            asyncio.get_running_loop().call_soon(self._start)
        self._wanted.append(run)

    async def stop(self) -> None:
        """Ends what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self) -> None:
        runs, self._wanted = self._wanted, []
        task = asyncio.create_task(self._restore(runs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _restore(self, runs: list[Run]) -> None:
        left = {run.id: run for run in runs}
        inexact = sum(run.inexact_replays for run in runs)
        started_s = time.monotonic()
        while left:
            life = await self._scheduler.up()

            def done(run: Run, error: MintError | None, life: int = life) -> None:
                del left[run.id]
                self._done(run, life, error)

            replay = Replay(self._scheduler, self._ledger, self._folder, life, done)
            try:
                await replay.restore(list(left.values()))
            except NotStarted:
                pass  # it ended with something else
            except EngineDied:
                for run in _ending_engines(replay):
                    done(run, StateDamaged(run.id, f"its replay ended {MOST_DEATHS} engines"))
            except MintError as error:
                for run in list(left.values()):
                    done(run, error)
        self._inexact.inc(sum(run.inexact_replays for run in runs) - inexact)
        elapsed_s = time.monotonic() - started_s
        logger.info("runs_restored=%d elapsed_s=%.2f", len(runs), elapsed_s)

    def _done(self, run: Run, life: int, error: MintError | None) -> None:
        if error is None:
            fault_point("recovery:restored")
            run.presence.life = life
            run.presence.deaths.clear()
            self._restored.inc()
        elif isinstance(error, StateDamaged):
            run.lose(error.why)
        run.presence.wake(error)


def _ending_engines(replay: Replay) -> list[Run]:
    """The runs for which engine after engine has ended with the same work."""
    doing = replay.doing
    if doing is None:
        return []
    runs = list({run.id: run for run in replay.runs_doing}.values())
    for run in runs:
        run.presence.deaths[doing] = run.presence.deaths.get(doing, 0) + 1
    return runs if any(run.presence.deaths[doing] >= MOST_DEATHS for run in runs) else []
