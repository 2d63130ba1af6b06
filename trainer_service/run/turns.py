"""Turns in order of asking: neighbours that may run together do, an exclusive one runs alone."""

import asyncio
from collections import deque
from types import TracebackType


class Turn:
    """A place in the queue. `async with turn:` waits for it and gives it back."""

    def __init__(self, turns: "Turns", exclusive: bool) -> None:
        self._turns = turns
        self.exclusive = exclusive
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> None:
        try:
            await self.granted
        except asyncio.CancelledError:
            self._turns.give_back(self)
            raise
        self._turns.enter(self)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._turns.give_back(self)


class Turns:
    """The queue of one run. Who has taken a turn earlier also begins earlier."""

    def __init__(self) -> None:
        self._waiting: deque[Turn] = deque()
        self._running: set[Turn] = set()
        self._entering: Turn | None = None  # granted; whose task has not gone on yet

    def take(self, *, exclusive: bool) -> Turn:
        turn = Turn(self, exclusive)
        self._waiting.append(turn)
        self._advance()
        return turn

    @property
    def busy(self) -> bool:
        """Whether a turn is taken or waited for."""
        return bool(self._running or self._waiting)

    def enter(self, turn: Turn) -> None:
        """Notes that a turn has begun: the next may, when the loop comes to it."""
        self._entering = None
        self._advance()

    def give_back(self, turn: Turn) -> None:
        if turn is self._entering:
            self._entering = None
        if turn in self._running:
            self._running.remove(turn)
        elif turn in self._waiting:
            self._waiting.remove(turn)
        self._advance()

    def _advance(self) -> None:
        if self._entering is not None or not self._waiting:
            return
        turn = self._waiting[0]
        alone = turn.exclusive or any(other.exclusive for other in self._running)
        if alone and self._running:
            return
        self._running.add(self._waiting.popleft())
        self._entering = turn
        if not turn.granted.done():
            turn.granted.set_result(None)
