"""Slots of states in the scheduler: each pass finds in its slot what its sequence has seen."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from sampler_service.engine.cache.blocks import BlockPool
from sampler_service.engine.scheduler import Scheduler
from sampler_service.engine.sequences import Step
from sampler_service.jobs import CHUNK_TOKENS
from tests.unit.sampler_service.scheduler_traffic import LETTERS, MAX_RUNNING, Memory, Traffic

SLOTS = 2 * MAX_RUNNING


@dataclass
class Slots(Memory):
    """What the slots would hold: of each the number of the history that it has taken in."""

    states: dict[int, int] = field(default_factory=dict)

    def run(self, step: Step) -> None:
        super().run(step)
        for source, target in step.state_copies:
            self.states[target] = self.states[source]
        slots = [span.sequence.state for span in step.spans]
        assert None not in slots
        assert len(set(slots)) == len(slots), "two sequences write into one slot"
        for span in step.spans:
            history, slot = self._history(span.sequence, span.stop), span.sequence.state
            assert slot is not None
            if span.start:  # who begins clears it
                assert self.states[slot] == history[span.start - 1]
            self.states[slot] = history[-1]


def traffic(slots: int = SLOTS, **sizes: int) -> Traffic:
    made = Traffic(**sizes)
    made.memory, made.slots = Slots(), BlockPool(slots)  # type: ignore[attr-defined]
    made.scheduler = Scheduler(
        made.pool,
        made.slots,  # type: ignore[attr-defined]
        max_running=made.max_running,
        max_batch_tokens=made.batch_tokens,
    )
    return made


def letters(seed: int, n: int) -> list[int]:
    return [(seed + i * i) % LETTERS for i in range(n)]


REQUESTS = st.tuples(
    st.integers(0, 2),  # how the prompt begins
    st.one_of(st.integers(1, 80), st.integers(CHUNK_TOKENS - 20, CHUNK_TOKENS + 40)),
    st.integers(0, 6),  # samples
    st.integers(1, 40),  # tokens of each
    st.integers(0, 3),  # passes before the next request
    st.booleans(),  # whether it is aborted then
)


@settings(max_examples=150)
@given(st.lists(REQUESTS, min_size=1, max_size=8), st.integers(1, SLOTS))
def test_every_pass_finds_the_state_of_what_its_sequence_has_seen(
    requests: list[tuple[int, int, int, int, int, bool]], slots: int
) -> None:
    made = traffic(slots)
    for i, (seed, length, samples, most, passes, aborted) in enumerate(requests):
        reusable = None if samples else length - 1
        number = made.add(
            letters(seed, length), samples, most, tenant="ab"[i % 2], reusable=reusable
        )
        for _ in range(passes):
            made.step()
        if aborted:
            made.abort(number)
    made.drain()
    assert len({tuple(tokens) for tokens in made.ended}) <= len(made.ended)
    assert made.slots.free == slots  # type: ignore[attr-defined]


def test_a_prompt_again_is_not_computed_again() -> None:
    made = traffic()
    first, again = (made.add(letters(0, 600), 2, 3) for _ in range(2))
    made.drain()
    third = made.add(letters(0, 600), 1, 3)
    made.drain()
    assert made.computed[first] == 599 + 2 * 3
    assert made.computed[again] == 2 * 3
    assert made.computed[third] == 3


def test_a_beginning_is_of_use_up_to_a_kept_state() -> None:
    made = traffic()
    made.add(letters(0, 600), 1, 1)
    made.drain()
    other = made.add([*letters(0, 590), 0, 0, 0, 0], 1, 1)
    made.drain()
    assert made.computed[other] == 594 - CHUNK_TOKENS
