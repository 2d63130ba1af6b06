"""One request on its way through the engine: what it has so far and when it is done."""

import time
from dataclasses import dataclass, field

import numpy as np

from mint_core.errors import MintError
from sampler_service import jobs
from sampler_service.engine.drawing.constraint_compiler import CompiledConstraint, ConstrainedText
from sampler_service.engine.drawing.penalties import Occurrences, penalizes
from sampler_service.engine.drawing.prompt_scores import empty_scores, split_scores
from sampler_service.engine.drawing.randomness import Draw
from sampler_service.engine.drawing.stop import StopTexts, StopWatch, Vocabulary
from sampler_service.engine.routed_rows import RoutedRows


@dataclass(slots=True)
class OpenContinuation:
    """A sample in the making."""

    watch: StopWatch
    drawn: list[tuple[int, float, float]] = field(default_factory=list)  # token and its logprobs
    # The likeliest tokens of each position and their logprobs, both [k], where they are wanted.
    tops: list[tuple[jobs.Tokens, jobs.Floats]] = field(default_factory=list)
    stop_reason: jobs.StopReason | None = None
    occurrences: Occurrences | None = None  # if there are penalties, from its first draw on
    constrained: ConstrainedText | None = None

    def close(self, routed: jobs.Routed | None) -> jobs.Continuation:
        assert self.stop_reason is not None
        tokens, logprobs, model_logprobs = zip(*self.drawn, strict=True)
        top = None
        if self.tops:
            ids, values = map(np.stack, zip(*self.tops, strict=True))
            top = jobs.TokenLogprobs(token_ids=ids, logprobs=values)
        return jobs.Continuation(
            tokens=np.array(tokens, np.int64),
            logprobs=np.array(logprobs, np.float32),
            model_logprobs=np.array(model_logprobs, np.float32),
            stop_reason=self.stop_reason,
            topk_logprobs=top,
            routed=routed,
        )


class Generation:
    """A `Generate` job in the making."""

    def __init__(
        self,
        number: int,
        job: jobs.Generate,
        vocabulary: Vocabulary,
        constraint: CompiledConstraint | None = None,  # the job's
    ) -> None:
        self.number = number  # of the call that waits for it
        self.job = job
        self.error: MintError | None = None  # that has ended it
        self.new_parts: list[jobs.SamplePart] = []  # to be handed out after the pass
        self.prompt_cache_hit_tokens = 0
        self._asked = asked = job.sampling
        self._accepted_s = time.monotonic()
        texts = StopTexts(asked.stops.texts, vocabulary)
        self._samples = [
            OpenContinuation(StopWatch(asked.stops, asked.max_tokens, texts))
            for _ in range(asked.num_samples)
        ]
        self.routed: RoutedRows | None = None  # if it is to be said where tokens went
        if asked.routed_experts:
            self.routed = RoutedRows(len(asked.prompt), asked.num_samples)
        self._constraint = constraint
        self._open = asked.num_samples
        most = len(asked.prompt) - 1  # the first token has no logprob
        scored = most if asked.scored_tokens is None else min(asked.scored_tokens, most)
        self.first_scored = most - scored  # whose successor is the first with a score
        self._unscored = scored if self.wants_scores else 0
        self._scores = empty_scores(self._unscored, asked)

    @property
    def wants_scores(self) -> bool:
        asked = self._asked
        counts = (asked.topk_prompt_logprobs, asked.prompt_alternatives)
        return asked.prompt_logprobs or any(counts) or asked.target_prompt_tokens is not None

    @property
    def reusable(self) -> int | None:
        """For how many tokens of the prompt the cache serves; None: for all."""
        if self.routed is not None:
            return 0
        return self.first_scored if self.wants_scores else None

    @property
    def done(self) -> bool:
        return not self._open and self._unscored <= 0

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._accepted_s

    def draw(self, sample: int, position: int) -> Draw:
        """What the sample's next token is drawn by. Raises InvalidRequest if the constraint leaves
        none.
        """
        continuation, asked = self._samples[sample], self._asked
        if continuation.occurrences is None and penalizes(asked.choice):
            penalized = asked.choice.repetition_penalty != 1  # of the prompt's tokens too
            continuation.occurrences = Occurrences(asked.prompt if penalized else asked.prompt[:0])
        if continuation.constrained is None and self._constraint is not None:
            continuation.constrained = ConstrainedText(self._constraint, asked.stops.token_ids)
        allowed = continuation.constrained.allowed() if continuation.constrained else None
        topk = asked.topk_sample_logprobs
        return Draw(asked.choice, sample, position, continuation.occurrences, allowed, topk)

    def add_token(self, sample: int, token: int, logprob: float, model_logprob: float) -> bool:
        """Takes a drawn token, and says whether the sample ends with it."""
        continuation = self._samples[sample]
        reason = continuation.watch.read(token)
        if self.job.stream:
            part = jobs.SamplePart(sample, (token,), (logprob,), (model_logprob,), reason)
            self.new_parts.append(part)
        else:
            continuation.drawn.append((token, logprob, model_logprob))
        if reason is not None:
            continuation.stop_reason = reason
            continuation.occurrences = continuation.constrained = None
            self._open -= 1
            return True
        for follower in (continuation.occurrences, continuation.constrained):
            if follower is not None:
                follower.add(token)
        return False

    def add_top(self, sample: int, ids: jobs.Tokens, logprobs: jobs.Floats) -> None:  # both [k]
        """Takes the likeliest tokens where the sample's last token was drawn."""
        self._samples[sample].tops.append((ids, logprobs))

    def add_scores(self, start: int, scores: jobs.TokenLogprobs) -> None:
        """Takes the scores that follow position `start`. A prompt that was sent away starts again
        from its first, and so do its scores.
        """
        at = start - self.first_scored
        end = at + len(scores.logprobs)
        self._scores.token_ids[at:end] = scores.token_ids
        self._scores.logprobs[at:end] = scores.logprobs
        self._unscored = len(self._scores.logprobs) - end

    def result(self) -> jobs.Generated:
        asked = self._asked
        own, targets, top, alternatives = split_scores(self._scores, asked)
        targeted = asked.target_prompt_tokens is not None
        samples = () if self.job.stream else self._samples
        routed = self.routed
        return jobs.Generated(
            continuations=tuple(
                sample.close(routed.sample(index) if routed else None)
                for index, sample in enumerate(samples)
            ),
            prompt_cache_hit_tokens=self.prompt_cache_hit_tokens,
            unscored_tokens=self.first_scored + 1,
            prompt_logprobs=own.logprobs[:, 0] if asked.prompt_logprobs else None,
            topk_prompt_logprobs=top if asked.topk_prompt_logprobs else None,
            target_prompt_logprobs=targets.logprobs if targeted else None,
            prompt_alternatives=alternatives if asked.prompt_alternatives else None,
            prompt_routed=routed.prompt if routed else None,
        )
