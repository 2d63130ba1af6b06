"""Samples as they come, over one stream that is asked for again whenever it breaks."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace

from mint import types
from mint._transport.call import new_request_id
from mint._transport.connection import Connection
from mint._transport.features import RESUME_SAMPLES
from mint._transport.stream import Stream
from mint.errors import APIResponseValidationError
from mintrpc.v1 import model_pb2, sampler_pb2


class SampleStream(Stream[types.SamplePart]):
    """Parts of continuations in the order in which they come: for `for` or `async for`, one reader.

    The work begins at the call. It is stopped when a loop over the stream is left, by `break` or
    otherwise, and by `close()`, also as a context manager. When the connection breaks, the request
    is sent again with the same seed, which draws the same tokens, and with what was handed out,
    which is left out; if it differs an error is raised. From then on the server goes on for 30 s
    without a connection, so that the next break costs nothing.
    """

    def __init__(self, connection: Connection, request: sampler_pb2.SampleRequest) -> None:
        self.seed = request.sampling_params.seed  # the one that makes the same samples again
        self.revision_path = request.model_path  # of the adapter; empty: the base model
        self._continuations = [_Continuation() for _ in range(request.num_samples)]
        self._request = sampler_pb2.StreamSampleRequest(sample=request)
        self._resumes = self._attaches = RESUME_SAMPLES in connection.offered()
        super().__init__(connection, connection.sampler.StreamSample, self._request)

    def __iter__(self) -> "_Loop":
        return _Loop(self)

    def __aiter__(self) -> "_Loop":
        return _Loop(self)

    def _read(self, message: sampler_pb2.StreamSampleResponse) -> types.SamplePart | None:
        part = types.SamplePart.from_proto(message)
        if not 0 <= part.index < len(self._continuations):
            raise APIResponseValidationError(
                f"the answer has a continuation {part.index} of {len(self._continuations)}"
            )
        if message.revision_path.startswith(f"{self.revision_path}@"):  # the newest, until now
            self.revision_path = self._request.sample.model_path = message.revision_path
        if (message.seed, message.revision_path) != (self.seed, self.revision_path):
            raise APIResponseValidationError(
                f"the answer is of seed {message.seed} and revision {message.revision_path!r} "
                f"instead of {self.seed} and {self.revision_path!r}"
            )
        continuation = self._continuations[part.index]
        if self._resumes and message.offset_tokens != continuation.repeated:
            raise APIResponseValidationError(
                f"the answer has token {message.offset_tokens} of continuation {part.index} where "
                f"token {continuation.repeated} is next"
            )
        return continuation.news(part)

    def _opening_again(self) -> None:
        # Without a revision its path may mean another one now; then nothing has come yet.
        resumes = self._resumes and (not self.revision_path or "@" in self.revision_path)
        for continuation in self._continuations:
            continuation.repeated = len(continuation.tokens) if resumes else 0
        if resumes:
            # Not at the first time: a stream with an id that is left goes on for nobody.
            self._request.request_id = self._request.request_id or new_request_id()
            received = [model_pb2.TokenSequence(tokens=each.tokens) for each in self._continuations]
            del self._request.received[:]
            self._request.received.extend(received)

    def _at_end(self) -> None:
        missing = [i for i, each in enumerate(self._continuations) if not each.complete]
        if missing:
            raise APIResponseValidationError(
                f"the stream ended before the continuations {missing[:8]} did"
            )


class _Loop(Iterator[types.SamplePart], AsyncIterator[types.SamplePart]):
    """A loop's hold on its stream. The loop drops it when it is left, by an exception too."""

    def __init__(self, stream: SampleStream) -> None:
        self._stream = stream

    def __next__(self) -> types.SamplePart:
        return next(self._stream)

    async def __anext__(self) -> types.SamplePart:
        return await anext(self._stream)

    def __del__(self) -> None:
        self._stream.close()


@dataclass(slots=True)
class _Continuation:
    """What has been handed out of one continuation."""

    tokens: list[int] = field(default_factory=list)
    stop_reason: types.StopReason | None = None
    repeated: int = 0  # so many tokens have come in the present RPC

    @property
    def complete(self) -> bool:
        return self.stop_reason is not None and self.repeated == len(self.tokens)

    def news(self, part: types.SamplePart) -> types.SamplePart | None:
        """The part without what was handed out before; None if nothing is left of it."""
        known = self.tokens[self.repeated : self.repeated + len(part.tokens)]
        fresh = part.tokens[len(known) :]
        self.repeated += len(part.tokens)
        if part.tokens[: len(known)] != known or not self._may_go_on(part, bool(fresh)):
            raise APIResponseValidationError(
                f"continuation {part.index} cannot go on: the connection broke after "
                f"{len(self.tokens)} tokens, and the server that was asked again with the same "
                "seed drew others; sample again"
            )
        if self.stop_reason or not (fresh or part.stop_reason):
            return None
        self.tokens += fresh
        self.stop_reason = part.stop_reason
        return replace(
            part,
            tokens=fresh,
            logprobs=part.logprobs[len(known) :],
            model_logprobs=part.model_logprobs[len(known) :],
        )

    def _may_go_on(self, part: types.SamplePart, grows: bool) -> bool:
        """Whether length and end are those of what was handed out, as far as that goes."""
        if self.stop_reason is not None and grows:
            return False
        if part.stop_reason is None:
            return True
        at_the_end = self.repeated >= len(self.tokens)
        return at_the_end and self.stop_reason in (None, part.stop_reason)
