"""Tokens between the engine and a reader who may be slower, told once also if they come again."""

import asyncio
from array import array
from dataclasses import dataclass, field, replace
from typing import Any

from mint_core.errors import EngineFault
from sampler_service.jobs import SamplePart, StopReason


@dataclass(slots=True)
class _Told:
    """What has come of one continuation, 4 bytes a token."""

    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    ended: bool = False
    repeated: int = 0  # so many tokens have come from the present engine

    def news(self, part: SamplePart) -> SamplePart | None:
        """The part without what has come before; None if nothing is left of it. Raises EngineFault
        if the tokens are others.
        """
        known = self.tokens[self.repeated : self.repeated + len(part.tokens)]
        fresh = part.tokens[len(known) :]
        self.repeated += len(part.tokens)
        if tuple(known) != tuple(part.tokens[: len(known)]) or (fresh and self.ended):
            raise EngineFault(
                f"the engine ended after {len(self.tokens)} tokens of continuation {part.index}, "
                "and the next one drew others from the same seed; sample again"
            )
        if self.ended or not (fresh or part.stop_reason):
            return None
        self.tokens.extend(fresh)
        self.ended = part.stop_reason is not None
        return replace(
            part,
            tokens=fresh,
            logprobs=part.logprobs[len(known) :],
            model_logprobs=part.model_logprobs[len(known) :],
        )


@dataclass(slots=True)
class _Tail:
    """New tokens of one continuation, 12 bytes each."""

    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    logprobs: "array[float]" = field(default_factory=lambda: array("f"))
    model_logprobs: "array[float]" = field(default_factory=lambda: array("f"))
    stop_reason: StopReason | None = None

    def add(self, part: SamplePart) -> None:
        self.tokens.extend(part.tokens)
        self.logprobs.extend(part.logprobs)
        self.model_logprobs.extend(part.model_logprobs)
        self.stop_reason = part.stop_reason

    def part(self, index: int) -> SamplePart:
        return SamplePart(
            index,
            tuple(self.tokens),
            tuple(self.logprobs),
            tuple(self.model_logprobs),
            self.stop_reason,
        )


class PartBuffer:
    """Parts of one request, for one reader. While it is behind, parts of the same continuation
    become one: no more than the rest of the answer is kept. All methods belong to one event loop.
    """

    def __init__(self) -> None:
        self._told: dict[int, _Told] = {}  # by index
        self._tails: dict[int, _Tail] = {}  # by index, what has waited for longest first
        self._changed = asyncio.Event()
        self._work: asyncio.Future[Any] | None = None  # once it has ended
        self.revision = ""  # that makes the tokens
        self.tokens = 0  # that have come so far

    def begin(self, revision: str) -> None:
        """Notes that an engine begins with the first tokens, be it for the first time or again."""
        self.revision = revision
        for told in self._told.values():
            told.repeated = 0

    def put(self, part: SamplePart) -> None:
        """Takes in what the engine sends. Raises EngineFault if it is not what was sent before."""
        news = self._told.setdefault(part.index, _Told()).news(part)
        if news is None:
            return
        self.tokens += len(news.tokens)
        self._tails.setdefault(part.index, _Tail()).add(news)
        self._changed.set()

    def end_with(self, work: "asyncio.Future[Any]") -> None:
        """There will be no more: the work has ended. If it failed, the reader gets what is there,
        and then the error.
        """
        if not work.cancelled():
            work.exception()  # retrieved, though the reader may have left
        self._work = work
        self._changed.set()

    def __aiter__(self) -> "PartBuffer":
        return self

    async def __anext__(self) -> SamplePart:
        while not self._tails:
            if self._work:
                self._work.result()
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        index = next(iter(self._tails))
        return self._tails.pop(index).part(index)
