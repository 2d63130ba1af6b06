"""What need not be computed: beginnings that are in the cache, or that another is computing."""

from collections.abc import Sequence
from itertools import takewhile

from sampler_service.engine.cache.blocks import BLOCK_TOKENS, BlockPool
from sampler_service.engine.sequences import PROMPT, TokenSequence
from sampler_service.engine.tenants import Line
from sampler_service.jobs import CHUNK_TOKENS

STATE_TOKENS = CHUNK_TOKENS  # from one kept state to the next, besides that of a prompt's end


class Prefixes:
    """Finds and keeps blocks by what they and all before them hold."""

    def __init__(self, pool: BlockPool, states: BlockPool | None = None) -> None:
        self._pool = pool
        self._states = states  # slots of states, which are kept as blocks are
        self._computing: dict[bytes, TokenSequence] = {}  # by key of a block to come
        self._waiting: dict[bytes, Line] = {}  # for that block

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks that hold the first of these, as many as there are in a row."""
        blocks: list[int] = []
        for key in keys:
            block = self._pool.find(key)
            if block is None:
                break
            blocks.append(block)
        # Blocks are of use up to where the state is known.
        while blocks and self._states and self._states.find(keys[len(blocks) - 1]) is None:
            blocks.pop()
        return blocks

    def state(self, key: bytes) -> int | None:
        """The slot that is kept under the key of the last block found."""
        return self._states.find(key) if self._states else None

    def awaited(self, keys: Sequence[bytes]) -> Line | None:
        """Where to wait for the first of these, as many in a row as another is computing."""
        computing = list(takewhile(self._computing.__contains__, keys))
        return self._waiting.setdefault(computing[-1], []) if computing else None

    def begin(self, sequence: TokenSequence) -> None:
        """Notes that the sequence is going to compute what it lacks."""
        for key in sequence.keys_before_last(sequence.cached // BLOCK_TOKENS):
            self._computing.setdefault(key, sequence)

    def stop(self, sequence: TokenSequence) -> list[TokenSequence]:
        """Notes that it is not going to, and returns those who waited for it."""
        return self._settle(sequence, sequence.keys_before_last(sequence.cached // BLOCK_TOKENS))

    def keep(self, sequence: TokenSequence, start: int) -> list[TokenSequence]:
        """Keeps what it has computed from `start` on, and returns those who waited for that."""
        first, full = start // BLOCK_TOKENS, sequence.cached // BLOCK_TOKENS
        keys = [sequence.key(block) for block in range(first, full)]
        for key, block in zip(keys, sequence.blocks[first:full], strict=True):
            self._pool.keep(key, block, BLOCK_TOKENS)
        if not sequence.missing and (rest := sequence.keys_before_last(full)):
            keys += rest
            self._pool.keep(rest[0], sequence.blocks[full], sequence.cached % BLOCK_TOKENS)
        at_end = sequence.index == PROMPT and not sequence.missing
        if self._states and (at_end or not sequence.cached % STATE_TOKENS):
            assert sequence.state is not None, "who computes has a state"
            self._states.keep(keys[-1], sequence.state, 1)
        return self._settle(sequence, keys)

    def _settle(self, sequence: TokenSequence, keys: Sequence[bytes]) -> list[TokenSequence]:
        waited: list[TokenSequence] = []
        for key in keys:
            if self._computing.get(key) is sequence:
                del self._computing[key]
                waited += self._waiting.pop(key, ())
        return waited
