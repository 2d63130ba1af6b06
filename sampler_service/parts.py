"""Tokens between the engine and a reader who may be slower, told once also if they come again."""

import asyncio
from array import array
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from mint_core.errors import Aborted, FailedPrecondition
from sampler_service.jobs import SamplePart, StopReason


class TokensDiffer(FailedPrecondition):
    """The seed does not draw again what the reader has, as on another host."""

    reason = "TOKENS_DIFFER"

    def __init__(self, index: int, position: int) -> None:
        super().__init__(
            f"continuation {index} cannot go on: from token {position} on, what its reader has is "
            "not what the seed draws here now; sample again",
            index=index,
            position=position,
        )


@dataclass(slots=True)
class _Continuation:
    """What has come of one sample: 4 bytes a token, and 8 more while it is held for a reader."""

    tokens: "array[int]" = field(default_factory=lambda: array("i"))  # the reader's first ones too
    first: int = 0  # position of the first token of which the logprobs are here
    logprobs: "array[float]" = field(default_factory=lambda: array("f"))  # from there on
    model_logprobs: "array[float]" = field(default_factory=lambda: array("f"))  # of the same
    stop_reason: StopReason | None = None
    repeated: int = 0  # so many tokens have come from the present engine
    told: int = 0  # so many tokens the reader has

    def add(self, part: SamplePart) -> int:
        """Takes in what has not come before, and says how many tokens that is. Raises TokensDiffer
        if the tokens are others.
        """
        known = self.tokens[self.repeated : self.repeated + len(part.tokens)]
        fresh = part.tokens[len(known) :]
        for place, (token, again) in enumerate(zip(known, part.tokens, strict=False)):
            if token != again:
                raise TokensDiffer(part.sample, self.repeated + place)
        self.repeated += len(part.tokens)
        if (fresh and self.stop_reason) or (part.stop_reason and self.repeated < len(self.tokens)):
            raise TokensDiffer(part.sample, self.repeated - len(fresh))
        self.tokens.extend(fresh)
        self.logprobs.extend(part.logprobs[len(known) :])
        self.model_logprobs.extend(part.model_logprobs[len(known) :])
        self.stop_reason = self.stop_reason or part.stop_reason
        return len(fresh)

    def goes_on_behind(self, received: "array[int]") -> bool:
        """Whether what comes behind these tokens is here."""
        return self.first <= len(received) and self.tokens[: len(received)] == received

    def take(self, index: int, *, keep: bool) -> SamplePart:
        """What waits for the reader, who gets it."""
        waiting = slice(self.told - self.first, None)
        part = SamplePart(
            index,
            tuple(self.tokens[self.told :]),
            tuple(self.logprobs[waiting]),
            tuple(self.model_logprobs[waiting]),
            self.stop_reason,
        )
        self.told = len(self.tokens)
        if not keep:
            self.first = self.told
            del self.logprobs[:], self.model_logprobs[:]
        return part


class PartBuffer:
    """Parts of one request, for one reader. While it is behind, parts of the same continuation
    become one: no more than the rest of the answer is kept, or all of it if another reader may take
    its place. All methods belong to one event loop.
    """

    def __init__(self, received: Sequence["array[int]"] = (), *, keep: bool = False) -> None:
        """`received`: what the reader has of each continuation; it comes again, and is left out.
        `keep`: another reader may take the place of the first.
        """
        self._continuations = {  # by index
            index: _Continuation(tokens[:], first=len(tokens), told=len(tokens))
            for index, tokens in enumerate(received)
        }
        self._keep = keep
        self._waiting: dict[int, None] = {}  # indices, what has waited for longest first
        self._changed = asyncio.Event()
        self._end: Exception | None = None  # what its reader gets after the last part
        self._read = asyncio.Event()  # to the end
        self._reader = 0
        self.revision = ""  # that makes the tokens
        self.tokens = 0  # that have come so far

    def begin(self, revision: str) -> None:
        """Notes that an engine begins with the first tokens, be it for the first time or again."""
        self.revision = revision
        for continuation in self._continuations.values():
            continuation.repeated = 0

    def put(self, part: SamplePart) -> None:
        """Takes in what the engine sends. Raises TokensDiffer if it is not what was before."""
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

    def resume(self, received: Sequence["array[int]"]) -> bool:
        """Lets another reader, who has these tokens, take the place of the one before. False: what
        he lacks is not all here.
        """
        known = self._continuations
        if not all(known[i].goes_on_behind(tokens) for i, tokens in enumerate(received)):
            return False
        for index, tokens in enumerate(received):
            known[index].told = len(tokens)
            if len(tokens) < len(known[index].tokens) or known[index].stop_reason:
                self._waiting[index] = None
        self._reader += 1
        self._changed.set()
        return True

    @property
    def is_read(self) -> bool:
        """Whether a reader has got all of it, its end too."""
        return self._read.is_set()

    async def __aiter__(self) -> AsyncGenerator[SamplePart, None]:
        """Raises Aborted once another reads."""
        reader = self._reader
        while True:
            while reader == self._reader and not self._waiting and self._end is None:
                self._changed.clear()
                await self._changed.wait()
            if reader != self._reader:
                raise Aborted("another call goes on with this stream")
            if not self._waiting:
                self._read.set()
                if isinstance(self._end, StopAsyncIteration):
                    return
                assert self._end is not None
                raise self._end
            index = next(iter(self._waiting))
            del self._waiting[index]
            yield self._continuations[index].take(index, keep=self._keep)
