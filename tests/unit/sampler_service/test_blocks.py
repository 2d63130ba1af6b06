"""Blocks against a plain account of who holds which and what is kept of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sampler_service.engine.cache.blocks import (
    BLOCK_TOKENS,
    BlockPool,
    blocks_for,
    first_key,
    next_key,
)

SIZE = 5


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share, keep and release."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(SIZE)
        self.holders: list[list[int]] = []  # the blocks of each
        self.keys: dict[bytes, int] = {}  # in the order of keeping
        self.released: list[int] = []  # that nobody holds, the longest ago first
        self.named = 0

    def held(self) -> set[int]:
        return {block for blocks in self.holders for block in blocks}

    @precondition(lambda self: len(self.held()) < SIZE)
    @rule()
    def take(self) -> None:
        kept = set(self.keys.values())
        free = [block for block in self.released if block in kept]
        empty = SIZE - len(self.held()) - len(free)
        block = self.pool.take()
        assert block not in self.held()
        if empty:
            assert block not in kept
        else:
            assert block == free[0]
        self.keys = {key: b for key, b in self.keys.items() if b != block}
        if block in self.released:
            self.released.remove(block)
        self.holders.append([block])

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.holders))
        self.pool.hold(blocks)
        self.holders.append(list(blocks))

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.keys)))
        block = self.pool.find(key)
        assert block == self.keys[key]
        self.pool.hold([block])
        if block in self.released:
            self.released.remove(block)
        self.holders.append([block])

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), tokens=st.integers(1, BLOCK_TOKENS))
    def keep(self, data: st.DataObject, tokens: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.held())))
        self.named += 1
        key = next_key(b"", [self.named, tokens])
        self.pool.keep(key, block, tokens)
        assert self.pool.keeps_from(block, tokens - 1)
        self.keys[key] = block
        self.pool.keep(key, min(self.held()), tokens)  # the first stays
        assert self.pool.find(key) == block

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.held())))
        self.pool.forget(block)
        assert not self.pool.keeps_from(block, 0)
        self.keys = {key: b for key, b in self.keys.items() if b != block}

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.holders) - 1))
        blocks = self.holders.pop(at)
        self.pool.release(blocks)
        self.released += [block for block in blocks if block not in self.held()]

    @rule(most=st.integers(0, SIZE))
    def give_back(self, most: int) -> None:
        kept = set(self.keys.values())
        oldest = [block for block in self.released if block in kept]
        blank = self.pool.used - len(self.held()) - len(oldest)
        given = self.pool.give_back(most)
        assert len(given) == min(most, blank + len(oldest))
        forgotten = oldest[: max(0, most - blank)]
        assert given == sorted(given)
        assert set(forgotten) <= set(given)
        assert self.held().isdisjoint(given)
        self.released = [block for block in self.released if block not in given]
        self.keys = {key: b for key, b in self.keys.items() if b not in forgotten}

    @invariant()
    def it_agrees(self) -> None:
        held = self.held()
        assert self.pool.free == SIZE - len(held)
        assert self.pool.count_free(range(SIZE)) == self.pool.free
        assert len(held) <= self.pool.used <= SIZE
        assert all(self.pool.find(key) is not None for key in self.keys)
        for block in held:
            assert self.pool.shared(block) == (sum(block in h for h in self.holders) > 1)
        for key, block in self.keys.items():
            assert self.pool.find(key) == block


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestPool = PoolMachine.TestCase


def test_the_end_of_a_sequence_is_forgotten_before_its_beginning() -> None:
    pool = BlockPool(3)
    blocks = [pool.take() for _ in range(3)]
    for block in blocks:
        pool.keep(next_key(b"", [block]), block, BLOCK_TOKENS)
    pool.release(blocks)
    assert [pool.take() for _ in range(3)] == blocks[::-1]


def test_a_block_is_released_once_by_each_holder() -> None:
    pool = BlockPool(1)
    block = pool.take()
    pool.release([block])
    with pytest.raises(KeyError):
        pool.release([block])


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@given(st.lists(tokens, max_size=3), st.lists(tokens, max_size=3))
def test_keys_are_equal_where_all_tokens_before_are(a: list[list[int]], b: list[list[int]]) -> None:
    def key(blocks: list[list[int]]) -> bytes:
        last = first_key("tenant", "mint://r/sampler_weights/a@1")
        for block in blocks:
            last = next_key(last, block)
        return last

    assert (key(a) == key(b)) == (a == b)


def test_keys_begin_with_tenant_and_adapter() -> None:
    roots = [("", ""), ("a", "b"), ("ab", ""), ("", "ab"), ("1", "1 a"), ("11", " a")]
    assert len({first_key(tenant, adapter) for tenant, adapter in roots}) == len(roots)


@given(st.integers(0, 10_000))
def test_blocks_hold_their_tokens(tokens: int) -> None:
    assert 0 <= blocks_for(tokens) * BLOCK_TOKENS - tokens < BLOCK_TOKENS
