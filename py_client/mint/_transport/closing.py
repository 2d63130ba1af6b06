"""What `with` closes."""

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """Of what is closed when its `with` block is left."""

    @abstractmethod
    def close(self) -> None:
        """Ends it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
