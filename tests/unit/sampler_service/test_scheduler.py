"""The scheduler under arbitrary traffic: budgets kept, blocks neither lost nor mixed, all end."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sampler_service.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from sampler_service.engine.scheduler import (
    PROMPT,
    Scheduler,
    Step,
    TokenSequence,
)
from sampler_service.jobs import CHUNK_TOKENS

MAX_RUNNING = 4
BATCH_TOKENS = CHUNK_TOKENS + 100
POOL_BLOCKS = 40
CONTEXT = POOL_BLOCKS * BLOCK_TOKENS


@dataclass
class Memory:
    """What a cache would hold: the token that was written to each place. All tokens differ, so one
    stands for all that came before it too.
    """

    places: dict[tuple[int, int], int] = field(default_factory=dict)

    def run(self, step: Step) -> None:
        for source, target in step.copies:
            for place in range(BLOCK_TOKENS):
                self.places[target, place] = self.places.get((source, place), 0)
        for span in step.spans:
            for at, token in enumerate(span.sequence.tokens(span.start, span.stop), span.start):
                self.places[self._place(span.sequence, at)] = token
        for span in step.spans:  # after all writes: nobody wrote into what another reads
            tokens = span.sequence.tokens(0, span.stop)
            # The first of each block and all of the last, which is where blocks are shared.
            for at in {*range(0, span.stop, BLOCK_TOKENS), *range(span.stop)[-BLOCK_TOKENS:]}:
                assert self.places[self._place(span.sequence, at)] == tokens[at]

    def _place(self, sequence: TokenSequence, at: int) -> tuple[int, int]:
        return sequence.blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS


class Traffic:
    """Requests with their lengths, and an engine that draws the number of the draw."""

    def __init__(self, blocks: int = POOL_BLOCKS) -> None:
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(
            self.pool, max_running=MAX_RUNNING, max_batch_tokens=BATCH_TOKENS
        )
        self.memory = Memory()
        self.left: dict[tuple[int, int], int] = {}  # tokens to come, by request and sample
        self.unscored: set[int] = set()
        self._requests = 0
        self._drawn = 0

    def add(self, prompt: int, num_samples: int, max_tokens: int) -> int:
        self._requests += 1
        request_id = self._requests
        self.left.update({(request_id, i): max_tokens for i in range(num_samples)})
        if prompt > 1:
            self.unscored.add(request_id)
        tokens = [request_id * 10_000 + at for at in range(prompt)]
        self.scheduler.add(request_id, tokens, "", num_samples)
        return request_id

    def abort(self, request_id: int) -> None:
        self.scheduler.abort(request_id)
        self.left = {key: left for key, left in self.left.items() if key[0] != request_id}
        self.unscored.discard(request_id)

    def step(self) -> Step | None:
        step = self.scheduler.schedule()
        if step is None:
            assert not self.left
            assert not self.unscored
            return None
        self._check(step)
        self.memory.run(step)
        tokens: dict[TokenSequence, int] = {}
        ended = set()
        for span in step.spans:
            sequence = span.sequence
            if span.decodes:
                self._drawn += 1
                tokens[sequence] = -self._drawn
                self.left[sequence.age] -= 1
                if not self.left[sequence.age]:
                    del self.left[sequence.age]
                    ended.add(sequence)
            elif sequence.index == PROMPT and span.stop == len(sequence) - 1:
                self.unscored.discard(sequence.request_id)
        self.scheduler.update(step, tokens, ended)
        return step

    def _check(self, step: Step) -> None:
        sequences = [span.sequence for span in step.spans]
        assert len(set(sequences)) == len(sequences) <= MAX_RUNNING
        assert sum(span.stop - span.start for span in step.spans) <= BATCH_TOKENS
        for span in step.spans:
            assert span.start == span.sequence.cached
            assert span.decodes == (span.stop == len(span.sequence) and span.start == span.stop - 1)
            if not span.decodes:  # cut by the sequence's own length alone
                end = len(span.sequence) - 1
                assert span.stop == min(end, (span.start // CHUNK_TOKENS + 1) * CHUNK_TOKENS)

    def drain(self) -> None:
        # Every pass computes a token of the oldest sequence, or a piece of its prompt.
        while self.step():
            pass
        assert self.pool.free == self.pool.size


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come and go between passes."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    @rule(
        prompt=st.integers(1, CONTEXT - 1),
        num_samples=st.integers(0, 6),
        max_tokens=st.integers(1, 60),
    )
    def add(self, prompt: int, num_samples: int, max_tokens: int) -> None:
        self.traffic.add(prompt, num_samples, min(max_tokens, CONTEXT - prompt))

    @precondition(lambda self: self.traffic.left)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        requests = sorted({request_id for request_id, _ in self.traffic.left})
        self.traffic.abort(data.draw(st.sampled_from(requests)))

    @rule(steps=st.integers(1, 30))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.traffic.step()

    @invariant()
    def an_idle_scheduler_holds_no_blocks(self) -> None:
        if not self.traffic.scheduler.busy:
            assert self.traffic.pool.free == self.traffic.pool.size

    def teardown(self) -> None:
        self.traffic.drain()


SchedulerMachine.TestCase.settings = settings(
    max_examples=50, stateful_step_count=20, deadline=None
)
TestScheduler = SchedulerMachine.TestCase


@given(st.integers(1, CONTEXT - 1), st.integers(1, 8))
def test_a_prompt_is_computed_once_for_all_its_samples(prompt: int, num_samples: int) -> None:
    traffic = Traffic(blocks=10 * POOL_BLOCKS)
    traffic.add(prompt, num_samples, 1)
    computed = 0
    while step := traffic.step():
        computed += sum(span.stop - span.start for span in step.spans)
    assert computed == prompt - 1 + num_samples


def test_nobody_overtakes() -> None:
    traffic = Traffic()
    first = traffic.add(CONTEXT - 60, 1, 60)
    second = traffic.add(CONTEXT - 60, 1, 60)
    third = traffic.add(5, 1, 5)
    seen: list[int] = []
    while step := traffic.step():
        seen.extend(s.sequence.request_id for s in step.spans if s.sequence.request_id not in seen)
    assert seen == [first, second, third]


def test_the_youngest_gives_way_and_is_computed_again() -> None:
    traffic = Traffic(blocks=8)
    for _ in range(2):
        traffic.add(BLOCK_TOKENS, 1, 6 * BLOCK_TOKENS)
    computed: dict[int, int] = {1: 0, 2: 0}
    while step := traffic.step():
        for span in step.spans:
            computed[span.sequence.request_id] += span.stop - span.start
    needed = BLOCK_TOKENS - 1 + 6 * BLOCK_TOKENS
    assert computed[1] == needed
    assert computed[2] > needed
    assert traffic.pool.free == traffic.pool.size


def test_an_abort_frees_its_blocks_at_once() -> None:
    traffic = Traffic()
    request_id = traffic.add(500, 5, 50)
    for _ in range(4):
        traffic.step()
    assert traffic.pool.free < traffic.pool.size
    traffic.abort(request_id)
    assert traffic.pool.free == traffic.pool.size
    assert not traffic.scheduler.busy


def test_a_budget_without_room_for_a_chunk_is_refused() -> None:
    with pytest.raises(AssertionError, match="beside all decodes"):
        Scheduler(BlockPool(1), max_running=1, max_batch_tokens=CHUNK_TOKENS)


@given(st.integers(0, 10_000))
def test_blocks_hold_their_tokens(tokens: int) -> None:
    assert 0 <= blocks_for(tokens) * BLOCK_TOKENS - tokens < BLOCK_TOKENS
