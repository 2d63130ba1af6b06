"""The engine: requests in, one pass at a time over all that run, answers out."""

import dataclasses
import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers import AutoTokenizer

from mint_core.engine_pipe import ModelDescription
from mint_core.errors import FailedPrecondition, MintError
from mint_core.lora.row_layout import RowLayout
from mint_core.model.loading import LoadedBase, load_base
from sampler_service.engine.adapters import Adapters, affordable_ranks
from sampler_service.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from sampler_service.engine.decoder import Decoder
from sampler_service.engine.generation import Generation
from sampler_service.engine.kv_cache import KvCache, affordable_tokens, layer_shapes
from sampler_service.engine.prompt_scores import score_span
from sampler_service.engine.randomness import Draw
from sampler_service.engine.runner import Computed, Runner
from sampler_service.engine.sampling import draw_tokens
from sampler_service.engine.scheduler import PROMPT, Scheduler, TokenSequence
from sampler_service.engine.stop import Vocabulary
from sampler_service.jobs import (
    CHUNK_TOKENS,
    Abort,
    DescribeRows,
    DropAdapter,
    EngineConfig,
    Generate,
    Generated,
    LoadAdapter,
)

logger = logging.getLogger(__name__)

# The number of a call, and what it is told.
Answer = tuple[int, Generated | RowLayout | MintError | None]


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
        )
        shapes = layer_shapes(base)
        self.adapter_ranks = affordable_ranks(base, config.adapter_memory_bytes)
        blocks = _blocks(config, base, affordable_tokens(shapes, base.device))
        self.description = _within(base.description, blocks * BLOCK_TOKENS)
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
        self._generations: dict[int, Generation] = {}  # by request id

    @property
    def busy(self) -> bool:
        return self._scheduler.busy

    def accept(self, number: int, job: object) -> Answer | None:
        """Takes a job in, and answers it if that needs no pass. Raises what it refuses."""
        match job:
            case Generate():
                return self._generate(number, job)
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
        """Computes one pass and returns the answers that it completed."""
        step = self._scheduler.schedule()
        if step is None:
            return []
        computed = self._runner.run(step, self.adapters.rows)
        failed = set(self._score(computed))
        tokens: dict[TokenSequence, int] = {}
        ended: set[TokenSequence] = set()
        if any(span.decodes for span in step.spans):
            failed.update(self._draw(computed, tokens, ended))
        self._scheduler.update(step, tokens, ended)
        return [*self._fail(failed), *self._finish({s.sequence.request_id for s in step.spans})]

    def _generate(self, number: int, job: Generate) -> Answer | None:
        self.adapters.check(job.adapter)
        generation = Generation(number, job, self._vocabulary)
        if generation.done:
            return number, generation.result()
        self._generations[job.request_id] = generation
        self._scheduler.add(job.request_id, job.prompt.tolist(), job.adapter, job.num_samples)
        return None

    def _score(self, computed: Computed) -> Iterator[int]:
        """Scores the prompts that want it and yields the requests whose scores are not finite."""
        for placed in computed.placed:
            sequence = placed.span.sequence
            generation = self._generations[sequence.request_id]
            if sequence.index != PROMPT or not generation.wants_scores:
                continue
            top_k = generation.job.topk_prompt_logprobs
            scores = score_span(self.base.head, computed, placed, top_k)
            generation.add_scores(placed.span.start, scores)
            if not np.isfinite(scores.logprobs).all():
                yield sequence.request_id

    def _draw(
        self, computed: Computed, tokens: dict[TokenSequence, int], ended: set[TokenSequence]
    ) -> Iterator[int]:
        """Draws a token for each sample and yields the requests whose logits are not finite."""
        logits, sequences = self._runner.logits(computed)
        generations = [self._generations[s.request_id] for s in sequences]
        drawn = draw_tokens(
            logits,
            [
                Draw(g.job.choice, s.index, g.position(s.index))
                for g, s in zip(generations, sequences, strict=True)
            ],
        )
        for row, (generation, sequence) in enumerate(zip(generations, sequences, strict=True)):
            tokens[sequence] = token = int(drawn.tokens[row])
            logprob, model_logprob = drawn.logprobs[row], drawn.model_logprobs[row]
            if generation.add_token(sequence.index, token, logprob, model_logprob):
                ended.add(sequence)
            if not drawn.finite[row]:
                yield sequence.request_id

    def _fail(self, request_ids: set[int]) -> Iterator[Answer]:
        for request_id in request_ids:
            generation = self._generations[request_id]
            self._forget(request_id)
            yield generation.number, _not_finite(generation.job.adapter)

    def _finish(self, request_ids: set[int]) -> Iterator[Answer]:
        for request_id in request_ids:
            generation = self._generations.get(request_id)
            if generation is not None and generation.done:
                del self._generations[request_id]
                yield generation.number, generation.result()

    def _forget(self, request_id: int) -> None:
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
    return dataclasses.replace(model, context_length=context_length)


def _not_finite(adapter: str) -> MintError:
    return FailedPrecondition(
        f"the logits of {f'adapter `{adapter}`' if adapter else 'the base model'} are not finite; "
        "sample from an earlier checkpoint, and train on with a lower learning rate",
        model_path=adapter,
    )
