"""Who runs next. No torch, no gRPC: tokens are counted, not computed.

A request's prompt is computed once, all but its last token; then its samples fork from it, sharing
its blocks, and each computes the prompt's last token by itself. So every generated token, the first
one included, comes from a row of its own, which does not depend on how the prompt was computed.

Each pass computes the next token of all that decode, and pieces of prompts as far as its budget
goes. Prompts are cut at multiples of CHUNK_TOKENS, whatever else runs: what a request computes does
not depend on its neighbours, but for beginnings that it finds in the cache.

The tenant that has had the least comes first, and of its sequences the oldest. Places to run in are
shared between tenants; who must leave one keeps its blocks. When blocks run out, the last in that
order gives its own back and is computed again later; the first always goes on, so all end.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from sampler_service.engine.cache.blocks import BLOCK_TOKENS, BlockPool, blocks_for, first_key
from sampler_service.engine.cache.prefixes import Prefixes
from sampler_service.engine.sequences import PROMPT, Copies, Span, Step, TokenSequence
from sampler_service.engine.tenants import Line, Tenants, move
from sampler_service.jobs import CHUNK_TOKENS


@dataclass(slots=True, eq=False)
class _Request:
    num_samples: int
    sequences: set[TokenSequence] = field(default_factory=set)  # that have not ended
    begun: bool = False  # whether it has had a pass


class Scheduler:
    """Orders the sequences of all requests."""

    def __init__(
        self,
        pool: BlockPool,
        states: BlockPool | None = None,  # slots of states, where layers have some
        *,
        max_running: int,
        max_batch_tokens: int,
    ) -> None:
        assert max_batch_tokens >= max_running + CHUNK_TOKENS, "a chunk must fit beside all decodes"
        self._pool = pool
        self._states = states
        self._prefixes = Prefixes(pool, states)
        self._tenants = Tenants()
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._num_running = 0
        self._requests: dict[int, _Request] = {}

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    def begun(self, request_id: int) -> bool:
        """Whether the request has had a pass."""
        return self._requests[request_id].begun

    def add(
        self,
        request_id: int,
        prompt: list[int],
        adapter: str,
        num_samples: int,
        *,
        tenant: str = "",
        had_tokens: int = 0,  # by the tenant, of all engines
        reusable: int | None = None,  # tokens before any that is scored; None: none is
    ) -> None:
        """Takes a request in. Ids tell who came first; prompt and continuation fit in the pool."""
        assert blocks_for(len(prompt)) <= self._pool.size
        self._tenants.want(tenant, had_tokens)
        self._requests[request_id] = _Request(num_samples)
        keys = [first_key(tenant, adapter)]
        sequence = TokenSequence(request_id, PROMPT, adapter, prompt, tenant, reusable, keys)
        self._requests[request_id].sequences.add(sequence)
        if sequence.missing:
            move(sequence, self._tenants.of(sequence).fresh)
        else:
            self._fork(sequence)

    def schedule(self) -> Step | None:
        """The next pass, or None if nothing is to be done."""
        copies = Copies()
        self._admit()
        self._make_room(copies)
        if not self._num_running:  # who ran has given its blocks to those before it: they run now
            self._admit()
            self._make_room(copies)
        spans: list[Span] = []
        for tenant in self._tenants:
            decoding = [s for s in tenant.running if s.decodes]
            spans += [Span(s, s.cached, s.cached + 1, True) for s in decoding]
            tenant.served_tokens += len(decoding)
        spans += self._chunks(self._max_batch_tokens - len(spans))
        self._tenants.note_reached()
        assert spans or not self.busy, "the first sequence can always go on"
        return Step(tuple(spans), tuple(copies.blocks), tuple(copies.states)) if spans else None

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
                if not span.stop % BLOCK_TOKENS:
                    self._prefixes.keep(sequence, span.start)
                if sequence in ended:
                    self._end(sequence)
            else:
                self._let_on(self._prefixes.keep(sequence, span.start))
                if not sequence.missing and sequence.index == PROMPT:
                    self._fork(sequence)
                elif not sequence.missing:
                    sequence.decodes = True

    def abort(self, request_id: int) -> None:
        """Forgets a request, if it is there."""
        request = self._requests.get(request_id)
        for sequence in list(request.sequences) if request else ():
            self._end(sequence)

    def _admit(self) -> None:
        """Gives places and blocks to those whose turn it is."""
        with_fresh = True
        while sequence := self._tenants.next(with_fresh):
            full = self._num_running == self._max_running
            if full and self._tenants.first_to_yield(sequence) is None:
                return
            fresh = sequence.line is self._tenants.of(sequence).fresh
            if fresh and not self._begin(sequence):
                # Nobody overtakes it to the blocks, but those who have theirs may go on.
                with_fresh = False
            elif not fresh:
                if self._pool.free < self._reserve:
                    return
                self._run(sequence)

    @property
    def _reserve(self) -> int:
        """Each one that runs may want a block soon; better to wait than to send it away. With none
        running there is room: all blocks are free but those of sequences that want only a place.
        """
        return self._num_running + 1 if self._num_running else 0

    def _begin(self, sequence: TokenSequence) -> bool:
        """Gives blocks to a fresh sequence, unless it had better wait. False: there are none."""
        keys = sequence.keys_before_last(0)
        if sequence.reusable is not None:
            keys = keys[: sequence.reusable // BLOCK_TOKENS]
        found = self._prefixes.find(keys)
        if (line := self._prefixes.awaited(keys[len(found) :])) is not None:
            move(sequence, line)
            return True
        needed = blocks_for(len(sequence) - 1) - len(found)
        if self._pool.free - self._pool.count_free(found) < needed + self._reserve:
            return False
        if self._states and self._num_running and not self._states.free:
            return False
        self._pool.hold(found)
        if self._states and found:
            sequence.state = self._prefixes.state(keys[len(found) - 1])
            self._hold_state(sequence)
        sequence.blocks = [*found, *(self._pool.take() for _ in range(needed))]
        sequence.cached = min(len(found) * BLOCK_TOKENS, len(sequence) - 1)
        sequence.paid = max(sequence.paid, sequence.cached)
        if sequence.hit_tokens is None:
            sequence.hit_tokens = sequence.cached
        if sequence.index == PROMPT and not sequence.missing:
            self._fork(sequence)
        else:
            self._run(sequence)
        return True

    def _run(self, sequence: TokenSequence) -> None:
        """Gives a place to a sequence that has its blocks."""
        if self._num_running == self._max_running:
            loser = self._tenants.first_to_yield(sequence)
            assert loser is not None, "a place is asked for when there is one"
            self._put(loser, self._tenants.of(loser).ready)
        self._put(sequence, self._tenants.of(sequence).running)
        sequence.decodes = sequence.index != PROMPT and not sequence.missing
        if sequence.missing:
            self._prefixes.begin(sequence)

    def _put(self, sequence: TokenSequence, line: Line | None) -> None:
        """Moves it from line to line, and so to and from a place."""
        running = self._tenants.of(sequence).running
        if sequence.line is running:
            self._num_running -= 1
            if sequence.missing:
                self._let_on(self._prefixes.stop(sequence))
        move(sequence, line)
        self._num_running += line is running

    def _let_on(self, waited: list[TokenSequence]) -> None:
        """Puts those in line again who waited for what another was computing."""
        for sequence in waited:
            move(sequence, self._tenants.of(sequence).fresh)

    def _make_room(self, copies: Copies) -> None:
        """Gives each that decodes a place of its own for its next token, and each that has a state
        one of its own, or sends it away.
        """
        needy = [
            s
            for t in self._tenants
            for s in t.running
            if (s.cached >= s.room if s.decodes else self._states is not None)
        ]
        free = self._pool.free if self._states is None else min(self._pool.free, self._states.free)
        if len(needy) > free:
            needy.sort(key=self._tenants.precedence)
        for sequence in needy:
            running = self._tenants.of(sequence).running
            while sequence.line is running and not (
                self._has_state(sequence, copies)
                and (not sequence.decodes or self._has_room(sequence, copies))
            ):
                # It may be the sequence itself, but never one that comes before it.
                self._preempt(self._tenants.last_holder())

    def _has_state(self, sequence: TokenSequence, copies: Copies) -> bool:
        """Gives it a slot of its own, with the state that it has, if one is free."""
        if self._states is None:
            return True
        if sequence.state is None:
            slot = self._states.take() if self._states.free else None
        else:
            slot = self._states.own(sequence.state, 0, copies.states)
        sequence.state = sequence.state if slot is None else slot
        return slot is not None

    def _hold_state(self, sequence: TokenSequence) -> None:
        if self._states and sequence.state is not None:
            self._states.hold([sequence.state])

    def _release_state(self, sequence: TokenSequence) -> None:
        if self._states and sequence.state is not None:
            self._states.release([sequence.state])
            sequence.state = None

    def _has_room(self, sequence: TokenSequence, copies: Copies) -> bool:
        """Gives it a place if a block is free or its last one is its own."""
        pool, blocks = self._pool, sequence.blocks
        at, place = divmod(sequence.cached, BLOCK_TOKENS)
        if at == len(blocks):
            if not pool.free:
                return False
            blocks.append(pool.take())
        else:
            block = pool.own(blocks[at], place, copies.blocks)
            if block is None:
                return False
            blocks[at] = block
        sequence.room = (at + 1) * BLOCK_TOKENS
        self._requests[sequence.request_id].begun = True
        return True

    def _preempt(self, victim: TokenSequence) -> None:
        """Takes its blocks; it waits and is computed again."""
        self._put(victim, self._tenants.of(victim).fresh)
        self._pool.release(victim.blocks)
        self._release_state(victim)
        victim.paid = max(victim.paid, victim.cached)
        victim.blocks, victim.cached, victim.room, victim.decodes = [], 0, 0, False

    def _chunks(self, budget: int) -> Iterator[Span]:
        """Pieces of prompts: the next one of the tenant that has had least, again and again. What
        does not fit beside those before it comes first in a later pass.
        """
        queues = {t: iter([s for s in t.running if not s.decodes]) for t in self._tenants}
        while queues and budget:
            tenant = min(queues, key=attrgetter("served_tokens"))
            sequence = next(queues[tenant], None)
            if sequence is None:
                del queues[tenant]
                continue
            start = sequence.cached
            stop = start + min(CHUNK_TOKENS - start % CHUNK_TOKENS, sequence.missing)
            if stop - start <= budget:
                budget -= stop - start
                tenant.served_tokens += max(0, stop - max(start, sequence.paid))
                sequence.paid = max(stop, sequence.paid)
                self._requests[sequence.request_id].begun = True
                yield Span(sequence, start, stop, False)

    def _fork(self, prompt: TokenSequence) -> None:
        """Puts the samples of a computed prompt in line, sharing its blocks."""
        request = self._requests[prompt.request_id]
        for index in range(request.num_samples):
            sample = TokenSequence(
                prompt.request_id,
                index,
                prompt.adapter,
                prompt.prompt,
                prompt.tenant,
                keys=list(prompt.keys),
                cached=prompt.cached,
                blocks=list(prompt.blocks),
                paid=prompt.paid,
                hit_tokens=prompt.hit_tokens,
            )
            sample.state = prompt.state
            self._pool.hold(sample.blocks)
            self._hold_state(sample)
            request.sequences.add(sample)
            move(sample, self._tenants.of(sample).ready)
        self._end(prompt)

    def _end(self, sequence: TokenSequence) -> None:
        """Forgets a sequence and gives its blocks back."""
        self._put(sequence, None)
        self._pool.release(sequence.blocks)
        self._release_state(sequence)
        request = self._requests[sequence.request_id]
        request.sequences.remove(sequence)
        if not request.sequences:
            del self._requests[sequence.request_id]
            self._tenants.leave(sequence.tenant)
