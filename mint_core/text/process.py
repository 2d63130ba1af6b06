"""The front's side of the process that has the tokenizer. It is started when it is first needed."""

import asyncio
from collections.abc import Callable
from typing import Any

from mint_core.engine_host.pipe import ModelDescription
from mint_core.engine_host.process import EngineProcess
from mint_core.turns import Turns

LIMIT_S = 30.0  # of one job, after which the process is ended


class TextProcess:
    """Tenants take turns at it. All methods belong to one event loop."""

    def __init__(self, describe: Callable[[], ModelDescription | None]) -> None:
        """`describe` says what is served; None: nothing yet."""
        self._describe = describe
        self._turns = Turns(1)
        self._process: EngineProcess | None = None
        self._starting = asyncio.Lock()

    async def do(self, tenant: str, job: object) -> Any:
        """What comes of a job, once there is a model. Raises what keeps the tokenizer from it, and
        EngineDied when the process ended over it: no other job was there.
        """
        model = self._describe()
        assert model is not None
        async with self._turns.turn(tenant):
            process = await self._started(model)
            return await process.call(job, silence_limit_s=LIMIT_S)

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
