"""How much of a run would have to be computed again after a crash: what its saved row lacks."""

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class UnsavedWork:
    """Since the row of one run was saved last."""

    calls: int = 0  # that have changed the row
    seconds: float = 0.0  # of the engine, this run's share
    backlog_bytes: int = 0  # of backwards since the last step: a step needs all of them
    changed_s: float = field(default_factory=time.monotonic)  # when the row last was

    def change(self, size_bytes: int, *, stepped: bool) -> None:
        """Notes a call that has changed the row."""
        self.calls += 1
        self.backlog_bytes = 0 if stepped else self.backlog_bytes + size_bytes
        self.changed_s = time.monotonic()

    def add(self, other: "UnsavedWork") -> None:
        """Takes back what a row that could not be saved would have covered."""
        self.calls += other.calls
        self.seconds += other.seconds
        self.backlog_bytes += other.backlog_bytes
