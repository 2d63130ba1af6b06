"""Who runs next. No torch, no gRPC: tokens are counted, not computed.

A request's prompt is computed once, all but its last token; then its samples fork from it, sharing
its blocks, and each computes the prompt's last token by itself. So every generated token, the first
one included, comes from a row of its own, which does not depend on how the prompt was computed.

Prompts are cut at multiples of CHUNK_TOKENS, whatever else runs: what a request computes does not
depend on its neighbours. When blocks run out, the youngest sequence gives its own back and is
computed again later; the oldest always goes on, so all end.
"""

import bisect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from sampler_service.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from sampler_service.jobs import CHUNK_TOKENS

PROMPT = -1  # index of the sequence that a request's samples fork from


@dataclass(slots=True, eq=False)
class TokenSequence:
    """A prompt, or a prompt with what one sample has generated."""

    request_id: int
    index: int  # which sample, or PROMPT
    adapter: str
    prompt: list[int]  # shared by the samples
    generated: list[int] = field(default_factory=list)
    cached: int = 0  # so many tokens have their keys and values in `blocks`
    blocks: list[int] = field(default_factory=list)
    running: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def age(self) -> tuple[int, int]:
        """Requests are numbered as they come; less is older."""
        return self.request_id, self.index

    @property
    def missing(self) -> int:
        """Tokens to compute before the last one."""
        return len(self) - 1 - self.cached

    @property
    def decodes(self) -> bool:
        """Whether only the last token is to be computed, and the next one drawn."""
        return self.index != PROMPT and not self.missing

    def tokens(self, start: int, stop: int) -> list[int]:
        n = len(self.prompt)
        return self.prompt[start:stop] + self.generated[max(start - n, 0) : max(stop - n, 0)]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of a sequence to compute now."""

    sequence: TokenSequence
    start: int
    stop: int
    decodes: bool  # one token, whose successor is drawn


@dataclass(frozen=True, slots=True)
class Step:
    """One pass. `copies` of blocks (from, to) come before everything else, in order."""

    spans: tuple[Span, ...]
    copies: tuple[tuple[int, int], ...] = ()


class Scheduler:
    """Waiting and running sequences, each list in order of age."""

    def __init__(self, pool: BlockPool, *, max_running: int, max_batch_tokens: int) -> None:
        assert max_batch_tokens >= max_running + CHUNK_TOKENS, "a chunk must fit beside all decodes"
        self._pool = pool
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._waiting: list[TokenSequence] = []
        self._running: list[TokenSequence] = []
        self._num_samples: dict[int, int] = {}  # of requests whose prompt is not computed yet

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request_id: int, prompt: list[int], adapter: str, num_samples: int) -> None:
        """Takes a request in. Ids rise; prompt and continuation fit in the pool."""
        assert blocks_for(len(prompt)) <= self._pool.size
        self._num_samples[request_id] = num_samples
        sequence = TokenSequence(request_id, PROMPT, adapter, prompt)
        if sequence.missing:
            self._wait(sequence)
        else:
            self._fork(sequence)

    def schedule(self) -> Step | None:
        """The next pass, or None if nothing is to be done."""
        self._admit()
        spans: list[Span] = []
        copies: list[tuple[int, int]] = []
        for sequence in [s for s in self._running if s.decodes]:
            # Making room for an older one may have sent this one away.
            if sequence.running and self._make_room(sequence, copies):
                spans.append(Span(sequence, sequence.cached, sequence.cached + 1, True))
        spans.extend(self._chunks(self._max_batch_tokens - len(spans)))
        assert spans or not self.busy, "the oldest sequence can always go on"
        return Step(tuple(spans), tuple(copies)) if spans else None

    def update(
        self,
        step: Step,
        tokens: Mapping[TokenSequence, int],  # of each span that decodes: what was drawn
        ended: Collection[TokenSequence],
    ) -> None:
        """Takes note of a computed step."""
        for span in step.spans:
            sequence = span.sequence
            sequence.cached = span.stop
            if span.decodes:
                sequence.generated.append(tokens[sequence])
                if sequence in ended:
                    self._leave(sequence)
                    self._pool.release(sequence.blocks)
            elif sequence.index == PROMPT and not sequence.missing:
                self._leave(sequence)
                self._fork(sequence)

    def abort(self, request_id: int) -> None:
        """Forgets a request, if it is there."""
        for sequence in [s for s in self._everyone() if s.request_id == request_id]:
            self._leave(sequence)
            self._pool.release(sequence.blocks)
        self._num_samples.pop(request_id, None)

    def _admit(self) -> None:
        """Moves from waiting to running in order of age: nobody overtakes."""
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            needed = blocks_for(len(sequence) - 1) - len(sequence.blocks)
            # Each one that runs may want a block soon; better to wait than to send it away. With
            # none running there is room: who was sent away was the youngest to hold blocks.
            reserve = len(self._running) + 1 if self._running else 0
            if self._pool.free < needed + reserve:
                return
            sequence.blocks.extend(self._pool.take() for _ in range(needed))
            self._leave(sequence)
            sequence.running = True
            bisect.insort(self._running, sequence, key=_age)

    def _chunks(self, budget: int) -> Iterator[Span]:
        for sequence in self._running:
            if sequence.decodes:
                continue
            start = sequence.cached
            tokens = min(CHUNK_TOKENS - start % CHUNK_TOKENS, sequence.missing)
            if tokens > budget:
                return
            budget -= tokens
            yield Span(sequence, start, start + tokens, False)

    def _make_room(self, sequence: TokenSequence, copies: list[tuple[int, int]]) -> bool:
        """Gives the sequence a block of its own for its next token, or sends it away."""
        blocks, at = sequence.blocks, sequence.cached // BLOCK_TOKENS
        while at == len(blocks) or self._pool.shared(blocks[at]):
            if self._pool.free:
                self._replace(blocks, at, copies)
                return True
            holders = [s for s in self._everyone() if s.blocks or s is sequence]
            victim = max(holders, key=_age)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _replace(self, blocks: list[int], at: int, copies: list[tuple[int, int]]) -> None:
        new = self._pool.take()
        if at == len(blocks):
            blocks.append(new)
        else:
            copies.append((blocks[at], new))
            self._pool.release([blocks[at]])
            blocks[at] = new

    def _preempt(self, victim: TokenSequence) -> None:
        """Takes its blocks; it waits and is computed again."""
        self._pool.release(victim.blocks)
        victim.blocks, victim.cached = [], 0
        self._leave(victim)
        self._wait(victim)

    def _fork(self, prompt: TokenSequence) -> None:
        """Puts the samples of a computed prompt in line, sharing its blocks."""
        for index in range(self._num_samples.pop(prompt.request_id)):
            sample = TokenSequence(prompt.request_id, index, prompt.adapter, prompt.prompt)
            sample.cached, sample.blocks = prompt.cached, list(prompt.blocks)
            self._pool.share(sample.blocks)
            self._wait(sample)
        self._pool.release(prompt.blocks)

    def _wait(self, sequence: TokenSequence) -> None:
        bisect.insort(self._waiting, sequence, key=_age)

    def _leave(self, sequence: TokenSequence) -> None:
        (self._running if sequence.running else self._waiting).remove(sequence)
        sequence.running = False

    def _everyone(self) -> list[TokenSequence]:
        return self._running + self._waiting


def _age(sequence: TokenSequence) -> tuple[int, int]:
    return sequence.age
