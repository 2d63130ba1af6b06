"""The one task of a run: what it does next, and what becomes of it.

    collect   what has ended: an outcome is settled, a call that an engine died with goes back
    begin     what may: calls in the order of their numbers, passes beside each other, all else
              alone; before them, if it is time, the row is restored or saved, or leaves for another
              group
    wait      until something ends or comes, or the run is closed

What is under way is a child task, which never raises: it returns an outcome, or the death of its
engine.
"""

import asyncio
import logging
from functools import partial
from typing import Any

from mint_core.errors import EngineDied, EngineFault, MintError
from trainer_service.calls import Call, Outcome, Reply
from trainer_service.queue.planner import DEATHS_UNTIL_ALONE
from trainer_service.queue.scheduler import NotStarted
from trainer_service.run.execution import Execution, refusal
from trainer_service.run.inbox import Errand, Work
from trainer_service.run.moving import Moving
from trainer_service.run.restoring import Restoring
from trainer_service.run.run import Run
from trainer_service.run.services import RunServices

logger = logging.getLogger(__name__)


class RunLoop:
    """All methods belong to one event loop."""

    def __init__(self, run: Run, services: RunServices) -> None:
        self._run = run
        self._services = services
        self._execution = Execution(run, services)
        self._restoring = Restoring(run, services)
        self._moving = Moving(run, services)
        self._under_way: dict[int, Work] = {}  # by id
        self._ended: list[tuple[Work, Any]] = []
        self._task = services.tasks.start(self._live(), run.id)

    async def end(self) -> None:
        """Ends the task of a run that is closing, when what is under way has ended."""
        self._run.inbox.stir()
        await asyncio.wait([self._task])

    async def _live(self) -> None:
        try:
            await self._loop()
        except Exception:
            logger.exception("run=%s is given up", self._run.id)
            self._run.give_up("its task has died; the server's log says why")
        finally:
            self._moving.end()
            self._run.inbox.at_rest.set()

    async def _loop(self) -> None:
        run = self._run
        while not run.closing or self._under_way:
            run.inbox.stirred.clear()
            self._collect()
            began = []
            while not run.closing and (work := self._next()) is not None:
                self._begin(work)
                began.append(work)
            if not any(isinstance(work, Call) and work.computes for work in began):
                run.group.scheduler.has_nothing_more(run.id)
            if not self._under_way:
                run.inbox.at_rest.set()
            # Who look when what was begun has been handed in.
            asyncio.get_running_loop().call_soon(run.stir_watchers)
            await run.inbox.stirred.wait()

    def _next(self) -> Work | None:
        """What may begin now, taken out of the inbox."""
        run, inbox = self._run, self._run.inbox
        if any(isinstance(work, Errand) or work.exclusive for work in self._under_way.values()):
            return None
        first, alone = inbox.first, not self._under_way
        if self._moving.may_move(inbox):
            return Errand(self._moving.move, own=True) if alone else None
        saved_rows = self._services.saved_rows
        if inbox.first_sequence > run.ended and saved_rows.may_save(run, at_rest=alone):
            return Errand(partial(saved_rows.save, run), own=True) if alone else None
        if isinstance(first, Call) and self._lacks_row(first):
            return Errand(self._restore, own=True) if alone else None
        if first is None or not (alone or (isinstance(first, Call) and not first.exclusive)):
            return None
        return inbox.take()

    def _lacks_row(self, call: Call) -> bool:
        run = self._run
        return call.needs_row and not run.has_row and not run.lost

    def _begin(self, work: Work) -> None:
        self._under_way[id(work)] = work
        self._services.tasks.start(self._child(work), f"work of {self._run.id}")

    async def _child(self, work: Work) -> None:
        try:
            act = work.act() if isinstance(work, Errand) else self._execution.attempt(work)
            ended = await act
        except Exception as error:
            ended = error
        del self._under_way[id(work)]
        self._ended.append((work, ended))
        self._run.inbox.stir()

    def _collect(self) -> None:
        ended, self._ended = self._ended, []
        for work, came in ended:
            if isinstance(work, Errand) and not (work.own and isinstance(came, Exception)):
                work.finish(came)
            elif self._run.closing:
                pass  # nothing is written about it any more
            elif isinstance(work, Call) and isinstance(came, EngineDied):
                self._bury(work, came)
            elif isinstance(work, Call) and isinstance(came, Outcome):
                self._settle(work, came)
            else:
                raise came

    def _settle(self, call: Call, outcome: Outcome) -> None:
        run = self._run
        written = run.settle(call, outcome)
        written.add_done_callback(partial(self._answer, call, outcome))
        if outcome.changes_row:
            stepped = call.method == "OptimStep"
            run.unsaved.change(len(call.payload), stepped=stepped)
            self._services.saved_rows.consider(run, stepped=stepped)

    def _answer(self, call: Call, outcome: Outcome, written: "asyncio.Future[Reply]") -> None:
        """Tells an outcome that is on disk. One that cannot be is told by those who know why."""
        if self._run.closing or written.cancelled() or written.exception() is not None:
            return
        if outcome.saved_row is not None:
            self._services.saved_rows.replaced(self._run, outcome.saved_row)
        self._run.answer(call, outcome, written.result())

    def _bury(self, call: Call, death: EngineDied) -> None:
        """Has a call done again; one with which engine after engine has died, at last without
        neighbours, is given up.
        """
        if not isinstance(death, NotStarted):
            self._run.note_death(call)
        if call.course.deaths <= DEATHS_UNTIL_ALONE:
            self._run.inbox.put(call)
            return
        logger.error("run=%s sequence=%d ends engines", self._run.id, call.place.sequence)
        self._settle(call, refusal(call, _ends_engines(call.course.deaths, death)))

    async def _restore(self) -> None:
        """Brings the row back, or tells the calls that want it why that cannot be."""
        try:
            await self._restoring.restore()
        except EngineDied:
            pass  # it is tried again
        except MintError as error:
            for call in self._run.inbox.take_calls():
                self._settle(call, refusal(call, error))


def _ends_engines(deaths: int, death: EngineDied) -> EngineFault:
    return EngineFault(
        f"{deaths} engines ended while they worked on this call, the last of them on nothing else "
        f"({death.message}); it is not tried again: the server's log says why, and if memory was "
        "short, shorter sequences or fewer per call may do",
        engine_deaths=deaths,
    )
