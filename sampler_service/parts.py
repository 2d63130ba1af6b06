"""Tokens between the engine and a reader who may be slower."""

import asyncio
from array import array
from dataclasses import dataclass, field
from typing import Any

from sampler_service.jobs import SamplePart, StopReason


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
        self._tails: dict[int, _Tail] = {}  # by index, what has waited for longest first
        self._changed = asyncio.Event()
        self._work: asyncio.Future[Any] | None = None  # once it has ended
        self.revision = ""  # that makes the tokens
        self.tokens = 0  # that have come so far

    def put(self, part: SamplePart) -> None:
        self.tokens += len(part.tokens)
        self._tails.setdefault(part.index, _Tail()).add(part)
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
