"""Which blocks of the key/value cache are in use, and by how many sequences. No torch here."""

from collections.abc import Iterable

BLOCK_TOKENS = 16


class BlockPool:
    """Hands out block numbers below `size`. A block that several sequences share is free again when
    all have released it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._references: dict[int, int] = {}
        self._returned: list[int] = []  # the last one returned is taken first: its memory is warm
        self._untouched = 0  # blocks from here on were never taken, so their memory is not in use

    @property
    def free(self) -> int:
        return self.size - len(self._references)

    def take(self) -> int:
        """A block that nobody holds."""
        assert self.free, "take() needs a free block"
        if self._returned:
            block = self._returned.pop()
        else:
            block = self._untouched
            self._untouched += 1
        self._references[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a holder."""
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Takes a holder away."""
        for block in blocks:
            self._references[block] -= 1
            if not self._references[block]:
                del self._references[block]
                self._returned.append(block)

    def shared(self, block: int) -> bool:
        """Whether more than one sequence holds it: then it must not be written."""
        return self._references[block] > 1


def blocks_for(tokens: int) -> int:
    """How many blocks so many tokens take."""
    return -(-tokens // BLOCK_TOKENS)
