"""The front's side of the process that has the tokenizer. It is started when it is first needed."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mint_core.engine_host.pipe import ModelDescription
from mint_core.engine_host.process import EngineProcess
from mint_core.errors import EngineDied, InvalidRequest, ModelLoading
from mint_core.text.jobs import Detokenize, Tokenize
from mint_core.turns import Turns
from mintrpc.v1 import types_pb2

LIMIT_S = 30.0  # of one job, after which the process is ended


class TextProcess:
    """Tenants take turns at it. All methods belong to one event loop."""

    def __init__(self, describe: Callable[[], ModelDescription | None], most_bytes: int) -> None:
        """`describe` says what is served; None: nothing yet. `most_bytes`: of a request's texts."""
        self._most_bytes = most_bytes
        self._describe = describe
        self._turns = Turns(1)
        self._process: EngineProcess | None = None
        self._starting = asyncio.Lock()

    async def do(self, tenant: str, job: object) -> Any:
        """What comes of a job, once there is a model. Raises what keeps the tokenizer from it, and
        InvalidRequest where the process ended over it, by itself twice: no other job was there.
        """
        if (model := self._describe()) is None:
            raise ModelLoading
        async with self._turns.turn(tenant):
            process, began_s = await self._started(model), time.monotonic()
            for last in (False, True):
                try:
                    return await process.call(job, silence_limit_s=LIMIT_S)
                except EngineDied as error:
                    if last or time.monotonic() - began_s >= LIMIT_S:
                        raise InvalidRequest(
                            "the texts of the request have ended the process that makes tokens of "
                            f"them, or kept it for {LIMIT_S:g} s; send fewer or shorter ones"
                        ) from error

    async def fill(self, tenant: str, inputs: Iterable[types_pb2.ModelInput]) -> None:
        """Has the text chunks of a request hold their tokens. Raises InvalidRequest."""
        chunks = [chunk for each in inputs for chunk in each.chunks if chunk.HasField("text")]
        size_bytes = sum(chunk.ByteSize() for chunk in chunks)
        if size_bytes > self._most_bytes:
            raise InvalidRequest(
                f"the texts of the request have {size_bytes} bytes, and at most "
                f"{self._most_bytes} are taken; split it"
            )
        for special in (False, True):
            wanted = [chunk for chunk in chunks if chunk.text.add_special_tokens == special]
            if wanted:
                job = Tokenize([chunk.text.text for chunk in wanted], special)
                for chunk, tokens in zip(wanted, await self.do(tenant, job), strict=True):
                    chunk.encoded_text.SetInParent()  # also where there are none
                    chunk.encoded_text.tokens.extend(tokens)

    async def texts(self, tenant: str, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The tokens of each as text, special ones included."""
        made: list[str] = await self.do(tenant, Detokenize(sequences))
        return made

    async def close(self) -> None:
        if self._process is not None:
            await self._process.close()

    async def _started(self, model: ModelDescription) -> EngineProcess:
        """The process; another where the last could not start."""
        async with self._starting:
            if self._process is None or self._process.closed:
                process = EngineProcess("mint_core.text", model)
                await process.start()
                self._process = process
            return self._process
