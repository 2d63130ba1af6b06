"""Tokens between the engine and a reader who may be slower, told once also if they come again."""

import asyncio
from array import array
from dataclasses import dataclass, field

from mint_core.errors import EngineFault
from sampler_service.jobs import SamplePart, StopReason


@dataclass(slots=True)
class _Continuation:
    """What has come of one sample: 4 bytes a token, and 8 more while it waits for the reader."""

    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    logprobs: "array[float]" = field(default_factory=lambda: array("f"))  # of the last tokens
    model_logprobs: "array[float]" = field(default_factory=lambda: array("f"))  # of the same
    stop_reason: StopReason | None = None
    repeated: int = 0  # so many tokens have come from the present engine

    def add(self, part: SamplePart) -> int:
        """Takes in what has not come before, and says how many tokens that is. Raises EngineFault
        if the tokens are others.
        """
        known = self.tokens[self.repeated : self.repeated + len(part.tokens)]
        fresh = part.tokens[len(known) :]
        self.repeated += len(part.tokens)
        if tuple(known) != part.tokens[: len(known)] or (fresh and self.stop_reason):
            raise EngineFault(
                f"the engine ended after {len(self.tokens)} tokens of continuation {part.sample}, "
                "and the next one drew others from the same seed; sample again"
            )
        self.tokens.extend(fresh)
        self.logprobs.extend(part.logprobs[len(known) :])
        self.model_logprobs.extend(part.model_logprobs[len(known) :])
        self.stop_reason = self.stop_reason or part.stop_reason
        return len(fresh)

    def take(self, index: int) -> SamplePart:
        """What waits for the reader, who gets it."""
        waiting = len(self.logprobs)
        part = SamplePart(
            index,
            tuple(self.tokens[len(self.tokens) - waiting :]),
            tuple(self.logprobs),
            tuple(self.model_logprobs),
            self.stop_reason,
        )
        del self.logprobs[:], self.model_logprobs[:]
        return part


class PartBuffer:
    """Parts of one request, for one reader. While it is behind, parts of the same continuation
    become one: no more than the rest of the answer is kept. All methods belong to one event loop.
    """

    def __init__(self) -> None:
        self._continuations: dict[int, _Continuation] = {}  # by index
        self._waiting: dict[int, None] = {}  # indices, what has waited for longest first
        self._changed = asyncio.Event()
        self._end: Exception | None = None  # what its reader gets after the last part
        self._read = asyncio.Event()  # to the end
        self.revision = ""  # that makes the tokens
        self.tokens = 0  # that have come so far

    def begin(self, revision: str) -> None:
        """Notes that an engine begins with the first tokens, be it for the first time or again."""
        self.revision = revision
        for continuation in self._continuations.values():
            continuation.repeated = 0

    def put(self, part: SamplePart) -> None:
        """Takes in what the engine sends. Raises EngineFault if it is not what was sent before."""
        continuation = self._continuations.setdefault(part.sample, _Continuation())
        had_ended = continuation.stop_reason
        fresh = continuation.add(part)
        if fresh or continuation.stop_reason is not had_ended:
            self.tokens += fresh
            self._waiting[part.sample] = None
            self._changed.set()

    async def finish(self) -> None:
        """There will be no more. Waits until the reader has all of it."""
        self.fail(StopAsyncIteration())
        await self._read.wait()

    def fail(self, error: Exception) -> None:
        """There will be no more. The reader gets what is there, and then the error."""
        self._end = error
        self._changed.set()

    def __aiter__(self) -> "PartBuffer":
        return self

    async def __anext__(self) -> SamplePart:
        while not self._waiting:
            if self._end is not None:
                self._read.set()
                raise self._end
            self._changed.clear()
            await self._changed.wait()
        index = next(iter(self._waiting))
        del self._waiting[index]
        return self._continuations[index].take(index)
