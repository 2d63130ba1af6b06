"""A run's row, and which of all rows' parts are on the device."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from torch import Tensor

from mint_core.lora.bank import AdapterRow, Part
from trainer_service.engine.row_files import RowPart


@dataclass(slots=True, eq=False)
class TrainedRow:
    """A run's row and how many steps it has taken."""

    row: AdapterRow
    step: int = 0
    gradient_pending: bool = False  # otherwise the gradient is zero
    weight_digest: int = 0  # of the weights as they are; 0: not taken
    # A weight, and a moment or root of a second one, than which none is larger; None: not known.
    largest: tuple[float, float] | None = None
    moved: set[Part] = field(default_factory=set)  # parts that are kept elsewhere
    backwards: int = 0  # tiles gone back through since the last step
    usual_backwards: int = 1  # before the last one

    @property
    def worth_keeping(self) -> frozenset[Part]:
        """The parts that a run cannot do without, wherever they are."""
        parts = self.moved.union(self.row.held)
        return frozenset(parts if self.gradient_pending else parts - {Part.GRADIENT})

    @property
    def step_is_next(self) -> bool:
        """Whether it has gone back as often as before its last step: a guess."""
        return self.backwards >= self.usual_backwards

    def note_step(self) -> None:
        """Takes note of a step that was asked for."""
        self.usual_backwards, self.backwards = max(1, self.backwards), 0

    def clear_gradient(self) -> None:
        """Makes the gradient zero, wherever the row is."""
        self.gradient_pending = False
        self.backwards = 0
        if Part.GRADIENT in self.row.held:
            self.row.part(Part.GRADIENT).zero_()

    @property
    def held_bytes(self) -> int:
        """Memory of the row on the device."""
        return len(self.row.held) * self.row.bank.part_bytes


Want = tuple[str, frozenset[Part]]  # a run's row, and the parts that the work at hand uses


class DeviceRows:
    """All rows, and their parts on the device in the order of their use."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.rows: dict[str, TrainedRow] = {}
        self._used: dict[RowPart, None] = {}  # those there, the least recently used first

    @property
    def held_bytes(self) -> int:
        return sum(trained.held_bytes for trained in self.rows.values())

    def size_bytes(self, place: RowPart) -> int:
        return self.rows[place[0]].row.bank.part_bytes

    def use(self, place: RowPart) -> None:
        """Makes a part the most recently used."""
        self._used.pop(place, None)
        self._used[place] = None

    def idle(self, keep: AbstractSet[RowPart]) -> Iterator[RowPart]:
        """The parts there, but for those in `keep`, the least recently used first. They may leave
        meanwhile.
        """
        for place in list(self._used):
            if place not in keep and place[1] in self.rows[place[0]].row.held:
                yield place

    def vector(self, place: RowPart) -> Tensor:  # [params]
        return self.rows[place[0]].row.part(place[1])

    def put(self, place: RowPart, vector: Tensor) -> None:
        """Takes a part that was kept elsewhere."""
        trained = self.rows[place[0]]
        trained.row.come_back({place[1]: vector})
        trained.moved.discard(place[1])
        self._used.setdefault(place)

    def leave(self, place: RowPart) -> None:
        """Forgets a part that is elsewhere, or soon will be."""
        self.rows[place[0]].row.leave(place[1])
        del self._used[place]

    def free(self, place: RowPart) -> None:
        """Makes a part zero, wherever it is, and gives its memory here back."""
        trained = self.rows[place[0]]
        trained.moved.discard(place[1])
        trained.row.free(place[1])

    def remove(self, training_run_id: str) -> None:
        """Forgets a row that is there."""
        self.rows.pop(training_run_id).row.leave()
        for part in Part:
            self._used.pop((training_run_id, part), None)
