"""The engine: requests in, one pass at a time over all that run, answers out."""

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoTokenizer

from mint_core.engine_host.pipe import Failure, Part, Reply
from mint_core.errors import FailedPrecondition, MintError
from mint_core.model.loading import load_base
from sampler_service import jobs
from sampler_service.config import SamplerConfig
from sampler_service.engine.cache.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from sampler_service.engine.cache.kv_cache import KvCache, layer_shapes
from sampler_service.engine.cache.state_cache import StateCache
from sampler_service.engine.decoder import MOST_PIECE, Decoder
from sampler_service.engine.drawing.constraint_compiler import (
    CompiledConstraint,
    ConstraintCompiler,
)
from sampler_service.engine.drawing.prompt_scores import score_span
from sampler_service.engine.drawing.randomness import Draw
from sampler_service.engine.drawing.stop import Vocabulary
from sampler_service.engine.drawing.token_draws import DrawnTokens
from sampler_service.engine.faults import error_of_call
from sampler_service.engine.generation import Generation
from sampler_service.engine.loaded_adapters import LoadedAdapters
from sampler_service.engine.memory import (
    Sparing,
    affordable_ranks,
    cache_size,
    host_bytes,
    rank_bytes,
    within,
)
from sampler_service.engine.neighbours import prove
from sampler_service.engine.routed_rows import stacked
from sampler_service.engine.runner import Computed, Runner
from sampler_service.engine.scheduler import Scheduler
from sampler_service.engine.sequences import PROMPT, Span, Step, TokenSequence

COMPILING_WAIT_S = 0.01  # between looks for new jobs, while nothing runs

Answer = Part | Reply | Failure  # what a call is told


class Engine:
    """One thread: `accept` takes a job in, `step` computes one pass."""

    def __init__(
        self,
        config: SamplerConfig,
        progress: Callable[[], None],  # called while a pass goes on
    ) -> None:
        base = load_base(
            config,
            inference=True,
            batch_invariant=config.batch_invariant,
            progress=progress,
        )
        shapes = layer_shapes(base)
        self.adapter_ranks = affordable_ranks(config, base)
        blocks, kept, slots = cache_size(config, base, shapes.values())
        self.kv_cache_tokens = blocks * BLOCK_TOKENS
        self.description = within(base.description, self.kv_cache_tokens)
        least = config.max_running_samples + jobs.CHUNK_TOKENS
        self.max_batch_tokens = config.max_batch_tokens or least
        self.base = base
        host_adapters = host_bytes(config, base)
        self.adapters = LoadedAdapters(base, host_adapters)
        # The last block, and the last slot, are the decoder's.
        states = StateCache(base.mixers, slots + 1, base.device)
        cache = KvCache(shapes, blocks + 1, base.device, states)
        decoder = (
            Decoder(
                base,
                cache,
                most_rows=max(config.max_running_samples, MOST_PIECE),
                most_blocks=blocks_for(self.description.context_length),
                scratch_block=blocks,
            )
            if base.device.type == "cuda" or base.context.row_wise
            else None
        )
        if decoder is not None and decoder.row_passes is not None:
            prove(base, decoder)
            self.description = replace(self.description, bitwise_reproducible=True)
        self.runner = Runner(base, cache, progress, decoder)
        folder = base.description.folder
        self._vocabulary = Vocabulary(
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        )
        pool = BlockPool(blocks)
        self.sparing = Sparing(pool, cache, kept) if base.device.type == "cpu" else None
        self.memory_limits = {
            "base": base.description.memory_bytes,
            "kv_cache": blocks * cache.block_bytes + slots * states.slot_bytes,
            "adapters": self.adapter_ranks * rank_bytes(base),
            "host_adapters": host_adapters,
        }
        self._scheduler = Scheduler(
            pool,
            BlockPool(slots) if base.mixers else None,
            max_running=config.max_running_samples,
            max_batch_tokens=self.max_batch_tokens,
        )
        self._compiler = ConstraintCompiler(self._vocabulary, self.description.vocabulary_size)
        # By request id: calls and jobs that start once their constraint is compiled.
        self._compiling: dict[int, tuple[int, jobs.Generate, Future[CompiledConstraint]]] = {}
        self._generations: dict[int, Generation] = {}  # by request id
        self._start_by: list[tuple[float, int]] = []  # heap of times and request ids

    @property
    def busy(self) -> bool:
        return self._scheduler.busy or bool(self._compiling)

    def accept(self, number: int, job: object) -> Answer | None:
        """Takes a job in, and answers it if that needs no pass. Raises what it refuses."""
        match job:
            case jobs.Generate():
                return self._take(number, job)
            case jobs.LoadAdapter():
                self.adapters.load(job)
            case jobs.DescribeRows(rank):
                return Reply(number, self.adapters.layout(rank))
            case jobs.DropAdapter():
                self.adapters.drop(job)
            case jobs.Abort(request_id):
                self._forget(request_id)
            case _:
                raise AssertionError(f"unknown job {job!r}")
        return Reply(number, None)

    def spare(self) -> None:
        """Gives back what memory the cache does not need. To be called now and then."""
        if self.sparing:
            self.sparing.look()

    @torch.inference_mode()
    def step(self) -> list[Answer]:
        """Schedules a pass, runs it, and hands out what came of it, in order."""
        answers = [*self._begin_compiled(), *self._refuse_late()]
        step = self._scheduler.schedule()
        if step is not None:
            self.runner.cache.copy(step.copies)
            self.runner.cache.states.copy(step.state_copies)
            tokens: dict[TokenSequence, int] = {}
            ended: set[TokenSequence] = set()
            for sequences, drawn in self._compute(step.spans):
                tokens.update(zip(sequences, drawn.tokens.tolist(), strict=True))
                ended |= self._note(sequences, drawn)
            answers += self._refuse(step)
            spans = tuple(s for s in step.spans if s.sequence.request_id in self._generations)
            self._scheduler.update(Step(spans), tokens, ended)
            answers += self._hand_out(spans)
        return answers

    def _take(self, number: int, job: jobs.Generate) -> Answer | None:
        self.adapters.check(job.adapter)
        constraint = job.sampling.constraint
        if constraint is None:
            return self._begin(number, job, None)
        compiling = self._compiler.compile(constraint, job.tenant)
        self._compiling[job.request_id] = number, job, compiling
        return None

    def _begin_compiled(self) -> Iterator[Answer]:
        """Begins what waits for its constraint no longer, or refuses it."""
        waiting = list(self._compiling.values())
        if waiting and not self._scheduler.busy:  # nothing else is to be done
            wait([compiling for *_, compiling in waiting], COMPILING_WAIT_S, FIRST_COMPLETED)
        for number, job, compiling in waiting:
            if not compiling.done():
                continue
            del self._compiling[job.request_id]
            try:
                answer: Answer | None = self._begin(number, job, compiling.result())
            except Exception as error:
                answer = Failure(number, error_of_call(error))
            if answer is not None:
                yield answer

    def _begin(
        self, number: int, job: jobs.Generate, constraint: CompiledConstraint | None
    ) -> Answer | None:
        generation = Generation(number, job, self._vocabulary, constraint)
        if generation.done:
            return Reply(number, generation.result())
        self._generations[job.request_id] = generation
        if job.start_within_s is not None:
            start_by_s = time.monotonic() + job.start_within_s
            heapq.heappush(self._start_by, (start_by_s, job.request_id))
        self._scheduler.add(
            job.request_id,
            job.sampling.prompt.tolist(),
            job.adapter,
            job.sampling.num_samples,
            tenant=job.tenant,
            had_tokens=job.had_tokens,
            reusable=generation.reusable,
        )
        return None

    def _refuse_late(self) -> Iterator[Answer]:
        """Forgets the requests whose turn has not come in time."""
        while self._start_by and self._start_by[0][0] <= time.monotonic():
            _, request_id = heapq.heappop(self._start_by)
            generation = self._generations.get(request_id)
            if generation is not None and not self._scheduler.begun(request_id):
                self._forget(request_id)
                yield Failure(generation.number, jobs.WaitedTooLong(generation.age_s))

    def _compute(self, spans: Sequence[Span]) -> Iterator[tuple[list[TokenSequence], DrawnTokens]]:
        """A pass: scores prompts, and gives the samples that decode and what is drawn for them.
        If something raises, each request is computed by itself, with the same bits where a pass
        computes each row alike: then who is to blame is known, and fails alone.
        """
        try:
            computed = self.runner.run(spans, self.adapters.rows)
            self._note_routed(computed)
            self._score(computed)
            drawn = self._draw(spans, computed)
        except Exception as error:
            fault, requests = error_of_call(error), _requests(spans)
            if len(requests) == 1:
                self._generations[requests[0]].error = fault
            elif self.base.mixers and self.runner.decoder is not None:
                raise  # it has changed states, so that nothing can be computed again
            else:
                for request_id in requests:
                    own = [span for span in spans if span.sequence.request_id == request_id]
                    yield from self._compute(own)
        else:
            computed.change_states()
            if drawn is not None:
                yield drawn

    def _note_routed(self, computed: Computed) -> None:
        """Tells those that want to know which experts their tokens went to."""
        decoded = computed.decoded[1] if computed.decoded else []
        rows = [
            (p.span.sequence, p.span.start, computed.chosen, slice(p.start, p.stop))
            for p in computed.placed
        ]
        rows += [
            (sequence, len(sequence) - 1, computed.decoded_chosen, slice(row, row + 1))
            for row, sequence in enumerate(decoded)
        ]
        for sequence, start, chosen, own in rows:
            if routed := self._generations[sequence.request_id].routed:
                routed.note(sequence.index, start, stacked([index[own] for index in chosen]))

    def _score(self, computed: Computed) -> None:
        """Scores the prompts that want it."""
        for placed in computed.placed:
            span, sequence = placed.span, placed.span.sequence
            generation = self._generations[sequence.request_id]
            first = generation.first_scored
            if sequence.index != PROMPT or not generation.wants_scores or span.stop <= first:
                continue
            asked, head = generation.job.sampling, self.base.head
            scores = score_span(head, computed, placed, first, asked, self.runner.sums)
            generation.add_scores(max(span.start, first), scores)
            generation.prompt_cache_hit_tokens = sequence.hit_tokens or 0
            if not np.isfinite(scores.logprobs[scores.token_ids >= 0]).all():
                generation.error = _not_finite(generation.job.adapter)

    def _draw(
        self, spans: Sequence[Span], computed: Computed
    ) -> tuple[list[TokenSequence], DrawnTokens] | None:
        """Draws a token for each sample that decodes; None if there is none."""
        if not any(span.decodes for span in spans):
            return None
        logits, sequences = self.runner.logits(computed)
        generations = [self._generations[s.request_id] for s in sequences]
        return sequences, self.runner.draw(logits, list(map(_draw_of, sequences, generations)))

    def _note(self, sequences: list[TokenSequence], drawn: DrawnTokens) -> set[TokenSequence]:
        """Hands drawn tokens to their generations, and returns the samples that end."""
        ended: set[TokenSequence] = set()
        columns = drawn.tokens, drawn.logprobs, drawn.model_logprobs, drawn.finite
        rows = zip(sequences, *(column.tolist() for column in columns), strict=True)
        for row, (sequence, token, logprob, model_logprob, finite) in enumerate(rows):
            generation = self._generations[sequence.request_id]
            k = generation.job.sampling.topk_sample_logprobs
            if not finite or (k and not np.isfinite(drawn.top_logprobs[row, :k]).all()):
                generation.error = generation.error or _not_finite(generation.job.adapter)
            if generation.error is not None:
                continue
            try:
                if generation.add_token(sequence.index, token, logprob, model_logprob):
                    ended.add(sequence)
                    generation.prompt_cache_hit_tokens = sequence.hit_tokens or 0
                if k:
                    ids, values = drawn.top_ids[row, :k], drawn.top_logprobs[row, :k]
                    generation.add_top(sequence.index, ids.copy(), values.copy())
            except Exception as error:
                generation.error = error_of_call(error)
        return ended

    def _refuse(self, step: Step) -> Iterator[Answer]:
        """Forgets those that have failed, before what they computed is kept for others."""
        for request_id in _requests(step.spans):
            generation = self._generations[request_id]
            if generation.error is not None:
                self._forget(request_id)
                yield Failure(generation.number, generation.error)

    def _hand_out(self, spans: Sequence[Span]) -> Iterator[Answer]:
        """What those are told who had a part in a pass."""
        for request_id in _requests(spans):
            generation = self._generations[request_id]
            for part in generation.new_parts:
                yield Part(generation.number, part)
            generation.new_parts.clear()
            if generation.done:
                del self._generations[request_id]
                try:
                    yield Reply(generation.number, generation.result())
                except Exception as error:
                    yield Failure(generation.number, error_of_call(error))

    def _forget(self, request_id: int) -> None:
        if waiting := self._compiling.pop(request_id, None):
            waiting[2].cancel()
        self._generations.pop(request_id, None)
        self._scheduler.abort(request_id)


def _requests(spans: Sequence[Span]) -> list[int]:
    """The ids of those that have a part in a pass."""
    return list(dict.fromkeys(span.sequence.request_id for span in spans))


def _draw_of(sequence: TokenSequence, generation: Generation) -> Draw:
    """What the sequence's token is drawn by; where a constraint leaves none, any will do."""
    position = len(sequence.generated)
    try:
        return generation.draw(sequence.index, position)
    except Exception as error:
        generation.error = error_of_call(error)
        return Draw(generation.job.sampling.choice, sequence.index, position)


def _not_finite(adapter: str) -> MintError:
    return FailedPrecondition(
        f"the logits of {f'adapter `{adapter}`' if adapter else 'the base model'} are not finite; "
        "sample from an earlier checkpoint, and train on with a lower learning rate",
        model_path=adapter,
    )
