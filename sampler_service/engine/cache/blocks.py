"""Which blocks of the key/value cache are in use, by how many sequences, and what they hold. No
torch here.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

BLOCK_TOKENS = 16


def blocks_for(tokens: int) -> int:
    """How many blocks so many tokens take."""
    return -(-tokens // BLOCK_TOKENS)


def first_key(tenant: str, adapter: str) -> bytes:
    """What the keys of a tenant's blocks under an adapter begin with. No tenant finds another's
    blocks: how much of a prompt was found tells what others have sent.
    """
    return blake2b(f"{len(tenant)} {tenant}{adapter}".encode(), digest_size=32).digest()


def next_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a block that holds these tokens after those that `before` stands for."""
    return blake2b(before + array("q", tokens).tobytes(), digest_size=32).digest()


class BlockPool:
    """Hands out block numbers below `size`. A block that several sequences hold is free again when
    all have released it.

    What a block holds can be kept under a key, and is found by it until the block is taken for
    something else: those without a key go first, then the one that was released longest ago.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._holders: dict[int, int] = {}
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, list[bytes]] = {}  # of each block with any
        self._kept_tokens: dict[int, int] = {}  # how many of its tokens the longest key stands for
        self._idle: OrderedDict[int, None] = OrderedDict()  # free with a key, oldest release first
        self._blank: list[int] = []  # free without, and once written; the last is taken first
        self._unused = list(reversed(range(size)))  # never written, or given back: no memory

    @property
    def free(self) -> int:
        return self.size - len(self._holders)

    @property
    def used(self) -> int:
        """How many have memory: those that are held, kept, or were."""
        return self.size - len(self._unused)

    def take(self) -> int:
        """A block that nobody holds, for something new."""
        assert self.free, "take() needs a free block"
        blank = self._blank or self._unused
        block = blank.pop() if blank else self._evict()
        self._holders[block] = 1
        return block

    def give_back(self, most: int) -> list[int]:
        """Up to so many blocks that nobody holds, whose memory is not needed: in order, and what
        was kept longest ago is forgotten first.
        """
        given = [
            self._blank.pop() if self._blank else self._evict()
            for _ in range(min(most, len(self._blank) + len(self._idle)))
        ]
        self._unused = sorted([*self._unused, *given], reverse=True)  # the first taken first
        return sorted(given)

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self.forget(block)
        return block

    def hold(self, blocks: Sequence[int]) -> None:
        """Adds a holder to blocks that are held or were found."""
        for block in blocks:
            holders = self._holders.get(block, 0)
            if not holders:
                del self._idle[block]
            self._holders[block] = holders + 1

    def release(self, blocks: Sequence[int]) -> None:
        """Takes a holder away. Of blocks in a sequence's order, the last is forgotten first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._keys:
                self._idle[block] = None
            else:
                self._blank.append(block)

    def own(self, block: int, at: int, copies: list[tuple[int, int]]) -> int | None:
        """A block with what a held one holds, which its holder may write from that place on:
        itself, or another in its stead, to which it is to be copied. None: others hold it too, and
        none is free.
        """
        if not self.shared(block) and not self.keeps_from(block, at):
            return block
        if self.free:
            new = self.take()
            copies.append((block, new))
            self.release([block])
            return new
        if self.shared(block):
            return None
        self.forget(block)
        return block

    def keep(self, key: bytes, block: int, tokens: int) -> None:
        """Notes that the key stands for what the first tokens of a held block hold."""
        assert block in self._holders, "only a holder knows what is in a block"
        if key in self._by_key:
            return  # computed twice; the other one serves as well
        self._by_key[key] = block
        self._keys.setdefault(block, []).append(key)
        self._kept_tokens[block] = max(self._kept_tokens.get(block, 0), tokens)

    def find(self, key: bytes) -> int | None:
        return self._by_key.get(key)

    def forget(self, block: int) -> None:
        """Drops what is kept of a block."""
        for key in self._keys.pop(block, ()):
            del self._by_key[key]
        self._kept_tokens.pop(block, None)

    def count_free(self, blocks: Sequence[int]) -> int:
        """How many of these nobody holds."""
        return sum(block not in self._holders for block in blocks)

    def shared(self, block: int) -> bool:
        """Whether more than one sequence holds it: then it must not be written."""
        return self._holders[block] > 1

    def keeps_from(self, block: int, at: int) -> bool:
        """Whether a key stands for the token at that place of the block, or a later one."""
        return self._kept_tokens.get(block, 0) > at
