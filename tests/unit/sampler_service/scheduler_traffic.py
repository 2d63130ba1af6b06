"""Requests with their lengths, a scheduler, and a memory that knows what must be in each place."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sampler_service.engine.cache.blocks import BLOCK_TOKENS, BlockPool
from sampler_service.engine.scheduler import Scheduler
from sampler_service.engine.sequences import PROMPT, Step, TokenSequence
from sampler_service.jobs import CHUNK_TOKENS

MAX_RUNNING = 4
BATCH_TOKENS = CHUNK_TOKENS + 100
POOL_BLOCKS = 40
CONTEXT = POOL_BLOCKS * BLOCK_TOKENS
LETTERS = 3  # token ids are below: many prompts and continuations begin alike


class Histories:
    """Numbers: the same for the same tokens after the same tokens, and for nothing else."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[object, int], int] = {}

    def of(self, root: object, tokens: Sequence[int]) -> list[int]:
        """One number for each token."""
        numbers, last = [], root
        for token in tokens:
            last = self._numbers.setdefault((last, token), len(self._numbers))
            numbers.append(last)
        return numbers


@dataclass
class Memory:
    """What a cache would hold: for each place, the number of the history that was computed there.
    A key depends on all tokens before it, so a place is right if its history is.
    """

    histories: Histories = field(default_factory=Histories)
    places: dict[tuple[int, int], int] = field(default_factory=dict)

    def run(self, step: Step) -> None:
        for source, target in step.copies:
            for place in range(BLOCK_TOKENS):
                self.places[target, place] = self.places.get((source, place), -1)
        expected = [self._history(span.sequence, span.stop) for span in step.spans]
        for span, history in zip(step.spans, expected, strict=True):
            for at in range(span.start, span.stop):
                self.places[self._place(span.sequence, at)] = history[at]
        for span, history in zip(step.spans, expected, strict=True):
            # After all writes: nobody wrote into what another reads.
            read = [self.places[self._place(span.sequence, at)] for at in range(span.stop)]
            assert read == history

    def _history(self, sequence: TokenSequence, stop: int) -> list[int]:
        return self.histories.of((sequence.tenant, sequence.adapter), sequence.tokens(0, stop))

    def _place(self, sequence: TokenSequence, at: int) -> tuple[int, int]:
        return sequence.blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS


@dataclass
class Sample:
    """A sample on its way: what it has generated, and how much it will."""

    max_tokens: int
    tokens: list[int] = field(default_factory=list)


class Traffic:
    """Requests, and an engine whose draws depend on nothing but what came before."""

    def __init__(
        self,
        blocks: int = POOL_BLOCKS,
        max_running: int = MAX_RUNNING,
        batch_tokens: int = BATCH_TOKENS,
        *,
        checked: bool = True,  # whether the memory is looked at, which takes its time
    ) -> None:
        self.pool = BlockPool(blocks)
        self.max_running = max_running
        self.batch_tokens = batch_tokens
        self.scheduler = Scheduler(
            self.pool, max_running=max_running, max_batch_tokens=batch_tokens
        )
        self.memory = Memory() if checked else None
        self.samples: dict[tuple[int, int], Sample] = {}  # that have not ended
        self.uncomputed: set[int] = set()  # requests whose prompt must be computed whole
        self.ended: list[list[int]] = []  # prompt and continuation of each sample
        self.computed: dict[int, int] = {}  # tokens, by request
        self._requests = 0

    def add(
        self,
        prompt: Sequence[int],
        num_samples: int = 1,
        max_tokens: int = 1,
        *,
        adapter: str = "",
        tenant: str = "",
        had_tokens: int = 0,
        reusable: int | None = None,
    ) -> int:
        self._requests += 1
        request_id = self._requests
        self.samples.update({(request_id, i): Sample(max_tokens) for i in range(num_samples)})
        if len(prompt) > 1 and reusable is not None:
            self.uncomputed.add(request_id)
        self.computed[request_id] = 0
        self.scheduler.add(
            request_id,
            list(prompt),
            adapter,
            num_samples,
            tenant=tenant,
            had_tokens=had_tokens,
            reusable=reusable,
        )
        return request_id

    def abort(self, request_id: int) -> None:
        self.scheduler.abort(request_id)
        self.samples = {key: s for key, s in self.samples.items() if key[0] != request_id}
        self.uncomputed.discard(request_id)

    def step(self) -> Step | None:
        step = self.scheduler.schedule()
        if step is None:
            assert not self.samples
            assert not self.uncomputed
            assert self.pool.free == self.pool.size
            return None
        self._check(step)
        if self.memory:
            self.memory.run(step)
        tokens: dict[TokenSequence, int] = {}
        ended = set()
        for span in step.spans:
            sequence = span.sequence
            self.computed[sequence.request_id] += span.stop - span.start
            if not span.decodes:
                if sequence.index == PROMPT and span.stop == len(sequence) - 1:
                    self.uncomputed.discard(sequence.request_id)
                continue
            sample = self.samples[sequence.age]
            assert sequence.generated == sample.tokens
            tokens[sequence] = self._draw(sequence)
            sample.tokens.append(tokens[sequence])
            if len(sample.tokens) == sample.max_tokens:
                self.ended.append(sequence.prompt + sample.tokens)
                del self.samples[sequence.age]
                ended.add(sequence)
        self.scheduler.update(step, tokens, ended)
        return step

    def drain(self, most_steps: int = 50_000) -> int:
        """Steps until all have ended, and returns how many it took."""
        for steps in range(most_steps):
            if self.step() is None:
                return steps
        raise AssertionError(f"there is no end after {most_steps} passes")

    def _draw(self, sequence: TokenSequence) -> int:
        return hash((sequence.index, *sequence.tokens(len(sequence) - 9, len(sequence)))) % LETTERS

    def _check(self, step: Step) -> None:
        sequences = [span.sequence for span in step.spans]
        assert len(set(sequences)) == len(sequences) <= self.max_running
        assert sum(span.stop - span.start for span in step.spans) <= self.batch_tokens
        for span in step.spans:
            assert span.start == span.sequence.cached < span.stop
            assert span.decodes == (span.stop == len(span.sequence))
            if span.decodes:
                assert span.start == span.stop - 1
            else:  # cut by the sequence's own length alone
                end = len(span.sequence) - 1
                assert span.stop == min(end, (span.start // CHUNK_TOKENS + 1) * CHUNK_TOKENS)
