"""The engine: requests in, one pass at a time over all that run, answers out."""

import dataclasses
import heapq
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AutoTokenizer

from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import FailedPrecondition, MintError
from mint_core.lora.row_layout import RowLayout
from mint_core.model.loading import LoadedBase, load_base
from sampler_service.engine.adapters import Adapters, affordable_ranks
from sampler_service.engine.cache.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from sampler_service.engine.cache.kv_cache import KvCache, affordable_tokens, layer_shapes
from sampler_service.engine.decoder import Decoder
from sampler_service.engine.drawing.constraints import CompiledConstraint, Compiler
from sampler_service.engine.drawing.prompt_scores import score_span
from sampler_service.engine.drawing.randomness import Draw
from sampler_service.engine.drawing.sampling import draw_tokens
from sampler_service.engine.drawing.stop import Vocabulary
from sampler_service.engine.generation import Generation
from sampler_service.engine.runner import Computed, Runner
from sampler_service.engine.scheduler import Scheduler
from sampler_service.engine.sequences import PROMPT, TokenSequence
from sampler_service.jobs import (
    CHUNK_TOKENS,
    Abort,
    DescribeRows,
    DropAdapter,
    EngineConfig,
    Generate,
    Generated,
    LoadAdapter,
    SamplePart,
    WaitedTooLong,
)

logger = logging.getLogger(__name__)

COMPILING_WAIT_S = 0.01  # between looks for new jobs, while nothing runs

# The number of a call, and what it is told: a part of its answer, or all that is left of it.
Answer = tuple[int, SamplePart | Generated | RowLayout | MintError | None]


@dataclass(slots=True)
class _Outcome:
    """What came of a pass."""

    tokens: dict[TokenSequence, int] = field(default_factory=dict)  # that were drawn
    ended: dict[TokenSequence, Generation] = field(default_factory=dict)
    scored: list[Generation] = field(default_factory=list)  # to the end
    parts: list[tuple[Generation, SamplePart]] = field(default_factory=list)
    failed: dict[int, tuple[Generation, MintError]] = field(default_factory=dict)  # by request id


class Engine:
    """One thread: `accept` takes a job in, `step` computes one pass."""

    def __init__(
        self,
        config: EngineConfig,
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
        self.adapter_ranks = affordable_ranks(base, config.adapter_memory_bytes)
        blocks = _blocks(config, base, affordable_tokens(shapes, base.device))
        self.kv_cache_tokens = blocks * BLOCK_TOKENS
        self.description = _within(base.description, self.kv_cache_tokens)
        least = config.max_running_samples + CHUNK_TOKENS
        self.max_batch_tokens = config.max_batch_tokens or least
        self.base = base
        self.adapters = Adapters(base, config.host_adapter_memory_bytes)
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
        self._runner = Runner(base, cache, progress, decoder)
        self._vocabulary = Vocabulary(AutoTokenizer.from_pretrained(base.description.folder))
        self._scheduler = Scheduler(
            BlockPool(blocks),
            max_running=config.max_running_samples,
            max_batch_tokens=self.max_batch_tokens,
        )
        self._compiler = Compiler(self._vocabulary, self.description.vocabulary_size)
        # By request id: calls and jobs that start once their constraint is compiled.
        self._compiling: dict[int, tuple[int, Generate, Future[CompiledConstraint]]] = {}
        self._generations: dict[int, Generation] = {}  # by request id
        self._start_by: list[tuple[float, int]] = []  # heap of times and request ids

    @property
    def busy(self) -> bool:
        return self._scheduler.busy or bool(self._compiling)

    def accept(self, number: int, job: object) -> Answer | None:
        """Takes a job in, and answers it if that needs no pass. Raises what it refuses."""
        match job:
            case Generate():
                return self._take(number, job)
            case LoadAdapter():
                self.adapters.load(job)
            case DescribeRows(rank):
                return number, self.adapters.layout(rank)
            case DropAdapter():
                self.adapters.drop(job)
            case Abort(request_id):
                self._forget(request_id)
            case _:
                raise AssertionError(f"unknown job {job!r}")
        return number, None

    @torch.inference_mode()
    def step(self) -> list[Answer]:
        """Computes one pass and returns what is to be told after it, in order."""
        late = [*self._begin_compiled(), *self._refuse_late()]
        step = self._scheduler.schedule()
        if step is None:
            return late
        computed = self._runner.run(step, self.adapters.rows)
        outcome = _Outcome()
        self._score(computed, outcome)
        if any(span.decodes for span in step.spans):
            self._draw(computed, outcome)
        self._scheduler.update(step, outcome.tokens, outcome.ended)
        return [*late, *self._tell(outcome)]

    def _take(self, number: int, job: Generate) -> Answer | None:
        self.adapters.check(job.adapter)
        if job.constraint is None:
            return self._begin(number, job, None)
        compiling = self._compiler.compile(job.constraint)
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
                answer = self._begin(number, job, compiling.result())
            except MintError as refusal:
                answer = number, refusal
            if answer is not None:
                yield answer

    def _begin(
        self, number: int, job: Generate, constraint: CompiledConstraint | None
    ) -> Answer | None:
        generation = Generation(number, job, self._vocabulary, constraint)
        if generation.done:
            return number, generation.result()
        self._generations[job.request_id] = generation
        if job.start_by_s is not None:
            heapq.heappush(self._start_by, (job.start_by_s, job.request_id))
        self._scheduler.add(
            job.request_id,
            job.prompt.tolist(),
            job.adapter,
            job.num_samples,
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
                yield generation.number, WaitedTooLong(generation.age_s)

    def _score(self, computed: Computed, outcome: _Outcome) -> None:
        """Scores the prompts that want it."""
        for placed in computed.placed:
            sequence = placed.span.sequence
            if sequence.index != PROMPT:
                continue
            generation = self._generations[sequence.request_id]
            first = generation.first_scored
            if not generation.wants_scores or placed.span.stop <= first:
                continue
            scores = score_span(self.base.head, computed, placed, first, generation.job)
            generation.add_scores(max(placed.span.start, first), scores)
            generation.prompt_cache_hit_tokens = sequence.hit_tokens or 0
            if not np.isfinite(scores.logprobs).all():
                error = _not_finite(generation.job.adapter)
                outcome.failed[sequence.request_id] = generation, error
            outcome.scored.append(generation)

    def _draw(self, computed: Computed, outcome: _Outcome) -> None:
        """Draws a token for each sample."""
        logits, sequences = self._runner.logits(computed)
        generations = [self._generations[s.request_id] for s in sequences]
        draws = list(self._draws(sequences, generations, outcome))
        drawn = draw_tokens(logits, draws)
        tokens, logprobs = drawn.tokens.tolist(), drawn.logprobs.tolist()
        outcome.tokens = dict(zip(sequences, tokens, strict=True))
        for sequence, generation, token, logprob, model_logprob in zip(
            sequences, generations, tokens, logprobs, drawn.model_logprobs.tolist(), strict=True
        ):
            if sequence.request_id in outcome.failed:
                continue
            reason = generation.add_token(sequence.index, token, logprob, model_logprob)
            if reason is not None:
                outcome.ended[sequence] = generation
            if generation.job.stream:
                part = SamplePart(sequence.index, (token,), (logprob,), (model_logprob,), reason)
                outcome.parts.append((generation, part))
        if drawn.top_ids.size:
            for row, generation in enumerate(generations):
                if k := generation.job.topk_sample_logprobs:
                    ids, values = drawn.top_ids[row, :k], drawn.top_logprobs[row, :k]
                    generation.add_top(sequences[row].index, ids.copy(), values.copy())
        for row in np.flatnonzero(~drawn.finite).tolist():
            generation = generations[row]
            error = _not_finite(generation.job.adapter)
            outcome.failed[sequences[row].request_id] = generation, error

    def _draws(
        self, sequences: list[TokenSequence], generations: list[Generation], outcome: _Outcome
    ) -> Iterator[Draw]:
        """What each sequence's token is drawn by; where a constraint leaves none, any will do."""
        for sequence, generation in zip(sequences, generations, strict=True):
            position = len(sequence.generated)
            try:
                yield generation.draw(sequence.index, position)
            except MintError as error:
                outcome.failed[sequence.request_id] = generation, error
                yield Draw(generation.job.choice, sequence.index, position)

    def _tell(self, outcome: _Outcome) -> Iterator[Answer]:
        for request_id, (generation, error) in outcome.failed.items():
            self._forget(request_id)
            yield generation.number, error
        for generation, part in outcome.parts:
            if generation.job.request_id in self._generations:
                yield generation.number, part
        for sequence, generation in outcome.ended.items():
            generation.prompt_cache_hit_tokens = sequence.hit_tokens or 0
        yield from self._finish([*outcome.scored, *outcome.ended.values()])

    def _finish(self, generations: Iterable[Generation]) -> Iterator[Answer]:
        for generation in generations:
            request_id = generation.job.request_id
            if generation.done and request_id in self._generations:
                del self._generations[request_id]
                yield generation.number, generation.result()

    def _forget(self, request_id: int) -> None:
        if waiting := self._compiling.pop(request_id, None):
            waiting[2].cancel()
        self._generations.pop(request_id, None)
        self._scheduler.abort(request_id)


def _blocks(config: EngineConfig, base: LoadedBase, affordable: int) -> int:
    """How many blocks the cache gets."""
    # More than every running sample at full length is of no use.
    most = base.description.context_length * config.max_running_samples
    blocks = min(config.kv_cache_tokens or affordable, most) // BLOCK_TOKENS
    if not blocks:
        raise FailedPrecondition(
            f"there is room for {affordable} tokens in the key/value cache, and {BLOCK_TOKENS} are "
            "the least; free memory, or serve a smaller model or dtype"
        )
    if blocks * BLOCK_TOKENS > affordable:
        raise FailedPrecondition(
            f"`kv_cache_tokens` is {config.kv_cache_tokens} but free memory holds {affordable}; "
            "give less, or 0 to take what is free"
        )
    return blocks


def _within(model: ModelDescription, cache_tokens: int) -> ModelDescription:
    """The model with the context that the cache holds."""
    context_length = min(model.context_length, cache_tokens)
    logger.info("kv cache tokens=%d context_length=%d", cache_tokens, context_length)
    bound = model.memory_bound or context_length < model.context_length
    return dataclasses.replace(model, context_length=context_length, memory_bound=bound)


def _not_finite(adapter: str) -> MintError:
    return FailedPrecondition(
        f"the logits of {f'adapter `{adapter}`' if adapter else 'the base model'} are not finite; "
        "sample from an earlier checkpoint, and train on with a lower learning rate",
        model_path=adapter,
    )
