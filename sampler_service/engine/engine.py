"""The engine: requests in, one pass at a time over all that run, answers out."""

import heapq
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait

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
from sampler_service.engine.decoder import Decoder
from sampler_service.engine.drawing.constraint_compiler import (
    CompiledConstraint,
    ConstraintCompiler,
)
from sampler_service.engine.drawing.prompt_scores import score_span
from sampler_service.engine.drawing.randomness import Draw
from sampler_service.engine.drawing.stop import Vocabulary
from sampler_service.engine.drawing.token_draws import draw_tokens
from sampler_service.engine.generation import Generation
from sampler_service.engine.loaded_adapters import LoadedAdapters
from sampler_service.engine.memory import affordable_ranks, cache_blocks, host_bytes, within
from sampler_service.engine.runner import Computed, Runner
from sampler_service.engine.scheduler import Scheduler
from sampler_service.engine.sequences import PROMPT, Step, TokenSequence

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
            config.base_model,
            name=config.base_model_name,
            device=config.device,
            dtype=config.dtype,
            threads=config.threads,
            max_lora_rank=config.max_lora_rank,
            inference=True,
        )
        shapes = layer_shapes(base)
        self.adapter_ranks = affordable_ranks(config, base)
        blocks = cache_blocks(config, base, shapes.values())
        self.kv_cache_tokens = blocks * BLOCK_TOKENS
        self.description = within(base.description, self.kv_cache_tokens)
        least = config.max_running_samples + jobs.CHUNK_TOKENS
        self.max_batch_tokens = config.max_batch_tokens or least
        self.base = base
        self.adapters = LoadedAdapters(base, host_bytes(config))
        cache = KvCache(shapes, blocks + 1, base.device)  # the last one is the decoder's
        decoder = (
            Decoder(
                base,
                cache,
                most_rows=config.max_running_samples,
                most_blocks=blocks_for(self.description.context_length),
                scratch_block=blocks,
            )
            if base.device.type == "cuda"
            else None
        )
        self.runner = Runner(base, cache, progress, decoder)
        self._vocabulary = Vocabulary(AutoTokenizer.from_pretrained(base.description.folder))
        self._scheduler = Scheduler(
            BlockPool(blocks),
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

    @torch.inference_mode()
    def step(self) -> list[Answer]:
        """Schedules a pass, runs it, and hands out what came of it, in order."""
        answers = [*self._begin_compiled(), *self._refuse_late()]
        step = self._scheduler.schedule()
        if step is not None:
            computed = self.runner.run(step, self.adapters.rows)
            self._score(computed)
            tokens, ended = self._draw(step, computed)
            self._scheduler.update(step, tokens, ended)
            answers += self._hand_out(step)
        return answers

    def _take(self, number: int, job: jobs.Generate) -> Answer | None:
        self.adapters.check(job.adapter)
        constraint = job.sampling.constraint
        if constraint is None:
            return self._begin(number, job, None)
        self._compiling[job.request_id] = number, job, self._compiler.compile(constraint)
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
            except MintError as refusal:
                answer = Failure(number, refusal)
            if answer is not None:
                yield answer

    def _begin(
        self, number: int, job: jobs.Generate, constraint: CompiledConstraint | None
    ) -> Answer | None:
        generation = Generation(number, job, self._vocabulary, constraint)
        if generation.done:
            return Reply(number, generation.result())
        self._generations[job.request_id] = generation
        if job.start_by_s is not None:
            heapq.heappush(self._start_by, (job.start_by_s, job.request_id))
        self._scheduler.add(
            job.request_id,
            job.sampling.prompt.tolist(),
            job.adapter,
            job.sampling.num_samples,
            tenant=job.tenant,
            reusable=generation.first_scored if generation.wants_scores else None,
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

    def _score(self, computed: Computed) -> None:
        """Scores the prompts that want it."""
        for placed in computed.placed:
            span, sequence = placed.span, placed.span.sequence
            generation = self._generations[sequence.request_id]
            first = generation.first_scored
            if sequence.index != PROMPT or not generation.wants_scores or span.stop <= first:
                continue
            scores = score_span(self.base.head, computed, placed, first, generation.job.sampling)
            generation.add_scores(max(span.start, first), scores)
            generation.prompt_cache_hit_tokens = sequence.hit_tokens or 0
            if not np.isfinite(scores.logprobs[:, 0]).all():
                generation.error = _not_finite(generation.job.adapter)

    def _draw(
        self, step: Step, computed: Computed
    ) -> tuple[dict[TokenSequence, int], set[TokenSequence]]:
        """Draws a token for each sample that decodes. Returns them, and the samples that end."""
        ended: set[TokenSequence] = set()
        if not any(span.decodes for span in step.spans):
            return {}, ended
        logits, sequences = self.runner.logits(computed)
        generations = [self._generations[s.request_id] for s in sequences]
        drawn = draw_tokens(logits, list(map(_draw_of, sequences, generations)))
        tokens, logprobs = drawn.tokens.tolist(), drawn.logprobs.tolist()
        model_logprobs, finite = drawn.model_logprobs.tolist(), drawn.finite.tolist()
        for row, (sequence, generation) in enumerate(zip(sequences, generations, strict=True)):
            if not finite[row]:
                generation.error = _not_finite(generation.job.adapter)
            if generation.error is not None:
                continue
            index = sequence.index
            if generation.add_token(index, tokens[row], logprobs[row], model_logprobs[row]):
                ended.add(sequence)
                generation.prompt_cache_hit_tokens = sequence.hit_tokens or 0
            if k := generation.job.sampling.topk_sample_logprobs:
                ids, values = drawn.top_ids[row, :k], drawn.top_logprobs[row, :k]
                generation.add_top(index, ids.copy(), values.copy())
        return dict(zip(sequences, tokens, strict=True)), ended

    def _hand_out(self, step: Step) -> Iterator[Answer]:
        """What those are told who had a part in a pass."""
        for request_id in dict.fromkeys(span.sequence.request_id for span in step.spans):
            generation = self._generations[request_id]
            if generation.error is not None:
                self._forget(request_id)
                yield Failure(generation.number, generation.error)
                continue
            for part in generation.new_parts:
                yield Part(generation.number, part)
            generation.new_parts.clear()
            if generation.done:
                del self._generations[request_id]
                yield Reply(generation.number, generation.result())

    def _forget(self, request_id: int) -> None:
        if waiting := self._compiling.pop(request_id, None):
            waiting[2].cancel()
        self._generations.pop(request_id, None)
        self._scheduler.abort(request_id)


def _draw_of(sequence: TokenSequence, generation: Generation) -> Draw:
    """What the sequence's token is drawn by; where a constraint leaves none, any will do."""
    position = len(sequence.generated)
    try:
        return generation.draw(sequence.index, position)
    except MintError as error:
        generation.error = error
        return Draw(generation.job.sampling.choice, sequence.index, position)


def _not_finite(adapter: str) -> MintError:
    return FailedPrecondition(
        f"the logits of {f'adapter `{adapter}`' if adapter else 'the base model'} are not finite; "
        "sample from an earlier checkpoint, and train on with a lower learning rate",
        model_path=adapter,
    )
