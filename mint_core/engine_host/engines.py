"""Several engines, as one is seen from outside."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping

from mint_core.engine_host.process import EngineProcess


class EnginesAsOne(ABC):
    """What health, metrics and administrators see of them; see `EngineView`."""

    ended_restarts = 0  # of engines that are gone

    @property
    @abstractmethod
    def engines(self) -> Iterable[EngineProcess]:
        """Those that there are now."""

    @property
    def ready(self) -> bool:
        """Whether one of them is up."""
        return any(engine.ready for engine in self.engines)

    @property
    def restarts(self) -> int:
        return self.ended_restarts + sum(engine.restarts for engine in self.engines)

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(pid for engine in self.engines for pid in engine.pids)

    @property
    def memory_limits(self) -> Mapping[str, int]:
        """Of all together, in bytes, by what they are for."""
        limits: Counter[str] = Counter()
        for engine in self.engines:
            limits.update(engine.memory_limits)
        return limits

    def memory_limit(self, of: str) -> float:
        """Bytes that they take at most for something."""
        return self.memory_limits.get(of, 0)


class Engines(EnginesAsOne):
    """Those of one service. The first is there from the beginning."""

    def __init__(self, first: EngineProcess) -> None:
        self._all = [first]
        self.changed = first.changed  # set when `ready` may have, for one reader who clears it

    @property
    def engines(self) -> Iterable[EngineProcess]:
        return self._all

    def add(self, engine: EngineProcess) -> None:
        engine.changed = self.changed
        self._all.append(engine)

    def remove(self, engine: EngineProcess) -> None:
        self._all.remove(engine)
        self.ended_restarts += engine.restarts
        self.changed.set()
