"""The scheduler under arbitrary traffic: budgets kept, blocks neither lost nor mixed, all end."""

import random
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sampler_service.engine.cache.blocks import BLOCK_TOKENS, BlockPool
from sampler_service.engine.scheduler import Scheduler
from sampler_service.jobs import CHUNK_TOKENS
from tests.unit.sampler_service.scheduler_traffic import CONTEXT, LETTERS, Traffic

_letters = random.Random(1)
TEXTS = [_letters.choices(range(LETTERS), k=CONTEXT) for _ in range(2)]  # that prompts begin with
LONGEST = 60  # tokens of a continuation


def own_prompts() -> "count[int]":
    """Tokens that no other prompt begins with."""
    return count(LETTERS)


def own(tokens: "count[int]", n: int) -> list[int]:
    return [next(tokens), *[0] * (n - 1)]


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Beginnings of a few texts, going on in different ways."""
    text = draw(st.sampled_from(TEXTS))[: draw(st.integers(1, CONTEXT - 1))]
    return (text + draw(st.lists(st.integers(0, LETTERS - 1), max_size=20)))[: CONTEXT - 1]


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come and go between passes."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    @rule(
        prompt=prompts(),
        num_samples=st.integers(0, 6),
        max_tokens=st.integers(1, LONGEST),
        tenant=st.sampled_from("abcdef"),  # more than places
        adapter=st.sampled_from(["", "x"]),
        reusable=st.none() | st.integers(0, CONTEXT),
    )
    def add(
        self,
        prompt: list[int],
        num_samples: int,
        max_tokens: int,
        tenant: str,
        adapter: str,
        reusable: int | None,
    ) -> None:
        self.traffic.add(
            prompt,
            num_samples,
            min(max_tokens, CONTEXT - len(prompt)),
            adapter=adapter,
            tenant=tenant,
            reusable=None if reusable is None else min(reusable, max(0, len(prompt) - 2)),
        )

    @precondition(lambda self: self.traffic.ended)
    @rule(data=st.data(), rest=st.lists(st.integers(0, LETTERS - 1), min_size=1, max_size=20))
    def go_on_with_what_was_generated(self, data: st.DataObject, rest: list[int]) -> None:
        before = data.draw(st.sampled_from(self.traffic.ended))
        self.traffic.add([*before, *rest][: CONTEXT - 1], tenant="a")

    @precondition(lambda self: self.traffic.samples)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        requests = sorted({request_id for request_id, _ in self.traffic.samples})
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
    traffic = Traffic(blocks=1000)
    request_id = traffic.add(TEXTS[0][:prompt], num_samples)
    traffic.drain()
    assert traffic.computed[request_id] == prompt - 1 + num_samples


@given(st.integers(1, CONTEXT - 1), st.integers(1, 8))
def test_a_prompt_is_computed_once_for_requests_that_come_together(
    prompt: int, num_requests: int
) -> None:
    traffic = Traffic(blocks=1000)
    for _ in range(num_requests):
        traffic.add(TEXTS[0][:prompt])
    traffic.drain()
    assert sum(traffic.computed.values()) == prompt - 1 + num_requests


@given(st.integers(1, CONTEXT - 30), st.integers(0, 20), st.integers(1, 5))
def test_what_follows_a_known_beginning_alone_is_computed(
    prompt: int, rest: int, max_tokens: int
) -> None:
    traffic = Traffic(blocks=1000)
    traffic.add(TEXTS[0][:prompt], 1, max_tokens)
    traffic.drain()
    (known,) = traffic.ended
    request_id = traffic.add([*known, *TEXTS[1][:rest]])
    traffic.drain()
    # What was drawn last was never computed; of the rest, the full blocks are there. But where
    # nothing was added, a prompt ends where one before it may have ended.
    cached = (len(known) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert traffic.computed[request_id] == len(known) + rest - cached


def test_a_prompt_is_computed_from_the_first_position_that_is_scored() -> None:
    traffic = Traffic()
    for _ in range(2):
        request_id = traffic.add(TEXTS[0][:100], reusable=0)
        traffic.drain()
        assert traffic.computed[request_id] == 100
    for reusable, found in ((BLOCK_TOKENS - 1, 0), (BLOCK_TOKENS, BLOCK_TOKENS), (98, 96)):
        request_id = traffic.add(TEXTS[0][:100], reusable=reusable)
        traffic.drain()
        assert traffic.computed[request_id] == 100 - found
    request_id = traffic.add(TEXTS[0][:100])
    traffic.drain()
    assert traffic.computed[request_id] == 1


@pytest.mark.parametrize("other", [{"adapter": "x"}, {"tenant": "b"}])
def test_nothing_is_found_under_another_adapter_or_tenant(other: dict[str, str]) -> None:
    traffic = Traffic()
    traffic.add(TEXTS[0][:100])
    traffic.drain()
    request_id = traffic.add(TEXTS[0][:100], **other)  # type: ignore[arg-type]
    traffic.drain()
    assert traffic.computed[request_id] == 100


def test_who_waits_for_anothers_prompt_goes_on_when_that_is_aborted() -> None:
    traffic = Traffic()
    first = traffic.add(TEXTS[0])
    second = traffic.add(TEXTS[0])
    step = traffic.step()
    assert step is not None
    assert [span.sequence.request_id for span in step.spans] == [first]
    traffic.abort(first)
    traffic.drain()
    assert traffic.computed[second] == len(TEXTS[0]) - CHUNK_TOKENS  # a piece was there


def test_the_longest_unused_is_forgotten_first() -> None:
    traffic = Traffic(blocks=20)
    tokens = own_prompts()
    prompts = [own(tokens, 6 * BLOCK_TOKENS) for _ in range(4)]
    for prompt in (*prompts[:3], prompts[0], prompts[3]):
        traffic.add(prompt)
        traffic.drain()
    again = [traffic.add(prompts[i]) for i in (0, 3, 1)]
    traffic.drain()
    assert [traffic.computed[i] for i in again] == [1, 1, 6 * BLOCK_TOKENS]


def test_nobody_overtakes() -> None:
    traffic = Traffic()
    tokens = own_prompts()
    first = traffic.add(own(tokens, CONTEXT - 60), 1, 60)
    second = traffic.add(own(tokens, CONTEXT - 60), 1, 60)
    third = traffic.add(own(tokens, 5), 1, 5)
    seen: list[int] = []
    while step := traffic.step():
        seen.extend(s.sequence.request_id for s in step.spans if s.sequence.request_id not in seen)
    assert seen == [first, second, third]


def test_the_youngest_gives_way_and_is_computed_again() -> None:
    traffic = Traffic(blocks=8)
    tokens = own_prompts()
    first, second = (traffic.add(own(tokens, 16), 1, 6 * BLOCK_TOKENS) for _ in range(2))
    traffic.drain()
    needed = BLOCK_TOKENS - 1 + 6 * BLOCK_TOKENS
    assert traffic.computed[first] == needed
    assert traffic.computed[second] > needed


def test_long_prompts_do_not_keep_others_from_their_next_tokens() -> None:
    traffic = Traffic(blocks=1000)
    tokens = own_prompts()
    talker = traffic.add(own(tokens, 5), 1, 20)
    traffic.step()
    for _ in range(5):
        traffic.add(own(tokens, CONTEXT - 1))
    for _ in range(20):
        step = traffic.step()
        assert step is not None
        assert step.spans[0].sequence.request_id == talker
        assert step.spans[0].decodes


def test_a_sequence_that_fills_the_cache_alone_can_go_on() -> None:
    traffic = Traffic()
    for _ in range(2):  # the second finds its own beginning, which it must write behind
        traffic.add(TEXTS[0][: CONTEXT - 100], 1, 100)
        traffic.drain()


def test_an_abort_frees_its_blocks_at_once() -> None:
    traffic = Traffic()
    request_id = traffic.add(TEXTS[0][:500], 5, 50)
    for _ in range(4):
        traffic.step()
    assert traffic.pool.free < traffic.pool.size
    traffic.abort(request_id)
    assert traffic.pool.free == traffic.pool.size
    assert not traffic.scheduler.busy


def test_a_request_has_begun_when_it_has_a_pass() -> None:
    traffic = Traffic()
    tokens = own_prompts()
    first = traffic.add(own(tokens, CONTEXT - 60), 1, 60)
    second = traffic.add(own(tokens, CONTEXT - 60), 1, 60)
    assert not traffic.scheduler.begun(first)
    traffic.step()
    assert traffic.scheduler.begun(first)
    assert not traffic.scheduler.begun(second)


def test_a_budget_without_room_for_a_chunk_is_refused() -> None:
    with pytest.raises(AssertionError, match="beside all decodes"):
        Scheduler(BlockPool(1), max_running=1, max_batch_tokens=CHUNK_TOKENS)
