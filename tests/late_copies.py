"""What stands in the place of a GPU's stream where there is none."""

from collections import deque

from torch import Tensor


class LateCopies:
    """Copies in their order, each as late as it may be: when somebody waits for it, or for one
    behind it. Until then a target holds what nobody may read.
    """

    def __init__(self) -> None:
        self._begun: deque[tuple[Tensor, Tensor, LateCopy]] = deque()
        self.count = 0

    def begin(self, target: Tensor, source: Tensor) -> "LateCopy":
        self.count += 1
        copy = LateCopy(self)
        self._begun.append((target, source, copy))
        return copy

    def make(self, last: "LateCopy") -> None:
        while not last.made:
            target, source, copy = self._begun.popleft()
            target.copy_(source)
            copy.made = True


class LateCopy:
    """The end of one."""

    def __init__(self, copies: LateCopies) -> None:
        self._copies = copies
        self.made = False

    def query(self) -> bool:
        return self.made

    def synchronize(self) -> None:
        self._copies.make(self)
