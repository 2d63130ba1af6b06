"""Streamed samples: tokens come into a buffer at the engine's pace, and go out at their reader's.

One that has an id outlives its reader for a while, so that who was cut off goes on with it. What is
not held any more is drawn again, by its seed.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from mint_core.rpc.caller import caller, note
from mint_core.rpc.metrics import Metrics
from sampler_service.execution import Execution
from sampler_service.jobs import SamplePart
from sampler_service.parts import PartBuffer
from sampler_service.requests import StreamedSampling

LINGER_S = 30.0
_Key = tuple[str, str, bytes]  # tenant, id and content


@dataclass(slots=True, eq=False)
class _Stream:
    parts: PartBuffer
    filling: "asyncio.Task[None]"
    readers: int = 0  # more than 1: one of them has been cut off and does not know it yet
    timer: asyncio.TimerHandle | None = None  # while there is none


class Streams:
    """Those under way. What bounds requests bounds them: each has its place in the waiting room
    until it has been read, or nobody has come for it. All methods belong to one event loop.
    """

    def __init__(self, execution: Execution, metrics: Metrics) -> None:
        self._execution = execution
        self._held: dict[_Key, _Stream] = {}
        self._first_token_seconds = metrics.histogram(
            "mint_first_token_seconds", "Time from arrival to the first token of a streamed sample"
        )

    async def read(self, asked: StreamedSampling) -> AsyncGenerator[tuple[SamplePart, str], None]:
        """Tokens as they come, and from which revision. To be closed by its reader; the engine does
        not wait for it.
        """
        arrived_s = time.perf_counter()
        key = (caller().tenant, asked.request_id, asked.content)
        stream = self._resumed(key, asked) or self._begun(key, asked)
        stream.readers += 1
        first_token_s = 0.0
        try:
            async with aclosing(aiter(stream.parts)) as parts:
                async for part in parts:
                    if not first_token_s:
                        first_token_s = time.perf_counter() - arrived_s
                        self._first_token_seconds.observe(first_token_s)
                        note(first_token_s=first_token_s)
                    yield part, stream.parts.revision
        finally:
            stream.readers -= 1
            note(tokens=stream.parts.tokens)
            if not stream.readers:
                await self._leave(key, stream)

    def stop(self) -> None:
        """Ends those that nobody reads."""
        for key in list(self._held):
            self._forget(key)

    def _resumed(self, key: _Key, asked: StreamedSampling) -> _Stream | None:
        stream = self._held.get(key)
        if stream is None or not stream.parts.resume(asked.received):
            return None
        if stream.timer is not None:
            stream.timer.cancel()
        return stream

    def _begun(self, key: _Key, asked: StreamedSampling) -> _Stream:
        self._forget(key)  # one that does not have what this reader lacks
        parts = PartBuffer(asked.received, keep=bool(asked.request_id))
        stream = _Stream(parts, asyncio.create_task(self._fill(parts, asked)))
        if asked.request_id:
            self._held[key] = stream
            stream.filling.add_done_callback(lambda _: self._drop(key, stream))
        return stream

    async def _fill(self, parts: PartBuffer, asked: StreamedSampling) -> None:
        try:
            await self._execution.sample(asked.sampling, parts)
        except Exception as error:
            parts.fail(error)

    async def _leave(self, key: _Key, stream: _Stream) -> None:
        """Ends what nobody reads any more, at once or when nobody has come back for it."""
        if self._held.get(key) is stream and not stream.parts.is_read:
            loop = asyncio.get_running_loop()
            stream.timer = loop.call_later(LINGER_S, self._forget, key)
            return
        stream.filling.cancel()
        await asyncio.wait([stream.filling])  # what it holds is free again

    def _forget(self, key: _Key) -> None:
        if stream := self._held.get(key):
            stream.filling.cancel()
            self._drop(key, stream)

    def _drop(self, key: _Key, stream: _Stream) -> None:
        """Holds no longer what has no place in the waiting room."""
        if self._held.get(key) is stream:
            del self._held[key]
        if stream.timer is not None:
            stream.timer.cancel()
