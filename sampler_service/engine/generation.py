"""One request on its way through the engine: what it has so far and when it is done."""

import time
from dataclasses import dataclass, field

import numpy as np

from sampler_service.engine.penalties import Occurrences, penalizes
from sampler_service.engine.prompt_scores import SpanScores
from sampler_service.engine.randomness import Draw
from sampler_service.engine.stop import StopWatch, Vocabulary
from sampler_service.jobs import Continuation, Generate, Generated, StopReason, TopLogprobs


@dataclass(slots=True)
class OpenContinuation:
    """A sample in the making."""

    watch: StopWatch
    drawn: list[tuple[int, float, float]] = field(default_factory=list)  # token and its logprobs
    stop_reason: StopReason | None = None
    occurrences: Occurrences | None = None  # if there are penalties, from its first draw on

    def close(self) -> Continuation:
        assert self.stop_reason is not None
        tokens, logprobs, model_logprobs = zip(*self.drawn, strict=True)
        return Continuation(
            tokens=np.array(tokens, np.int64),
            logprobs=np.array(logprobs, np.float32),
            model_logprobs=np.array(model_logprobs, np.float32),
            stop_reason=self.stop_reason,
        )


class Generation:
    """A `Generate` job in the making."""

    def __init__(self, number: int, job: Generate, vocabulary: Vocabulary) -> None:
        self.number = number  # of the call that waits for it
        self.job = job
        self.prompt_cache_hit_tokens = 0
        self._accepted_s = time.monotonic()
        self._samples = [
            OpenContinuation(StopWatch(job.stops, job.max_tokens, vocabulary))
            for _ in range(job.num_samples)
        ]
        self._open = job.num_samples
        # Of the prompt, what the repetition penalty applies to.
        self._repeatable = job.prompt if job.choice.repetition_penalty != 1 else job.prompt[:0]
        scored = len(job.prompt) - 1  # the first token has no logprob
        self._unscored = scored if self.wants_scores else 0
        self._logprobs = np.empty(self._unscored, np.float32)
        self._top_ids = np.empty((self._unscored, job.topk_prompt_logprobs), np.int64)
        self._top_logprobs = np.empty((self._unscored, job.topk_prompt_logprobs), np.float32)

    @property
    def wants_scores(self) -> bool:
        return self.job.prompt_logprobs or self.job.topk_prompt_logprobs > 0

    @property
    def done(self) -> bool:
        return not self._open and self._unscored <= 0

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._accepted_s

    def draw(self, sample: int, position: int) -> Draw:
        """What the sample's next token is drawn by."""
        continuation, choice = self._samples[sample], self.job.choice
        if continuation.occurrences is None and penalizes(choice):
            continuation.occurrences = Occurrences(self._repeatable)
        return Draw(choice, sample, position, continuation.occurrences)

    def add_token(
        self, sample: int, token: int, logprob: float, model_logprob: float
    ) -> StopReason | None:
        """Takes a drawn token and says why the sample ends with it, or None if it goes on."""
        continuation = self._samples[sample]
        if not self.job.stream:  # which gives each away as it comes
            continuation.drawn.append((token, logprob, model_logprob))
        if continuation.occurrences is not None:
            continuation.occurrences.add(token)
        reason = continuation.watch.read(token)
        if reason is not None:
            continuation.stop_reason = reason
            continuation.occurrences = None
            self._open -= 1
        return reason

    def add_scores(self, start: int, scores: SpanScores) -> None:
        """Takes the scores that follow position `start`. A prompt that was sent away starts again
        from 0, and so do its scores.
        """
        stop = start + len(scores.logprobs)
        self._logprobs[start:stop] = scores.logprobs
        if scores.top_ids is not None:
            self._top_ids[start:stop] = scores.top_ids
            self._top_logprobs[start:stop] = scores.top_logprobs
        self._unscored = len(self._logprobs) - stop

    def result(self) -> Generated:
        top = TopLogprobs(token_ids=self._top_ids, logprobs=self._top_logprobs)
        samples = () if self.job.stream else self._samples
        return Generated(
            continuations=tuple(sample.close() for sample in samples),
            prompt_cache_hit_tokens=self.prompt_cache_hit_tokens,
            prompt_logprobs=self._logprobs if self.job.prompt_logprobs else None,
            topk_prompt_logprobs=top if self.job.topk_prompt_logprobs else None,
        )
