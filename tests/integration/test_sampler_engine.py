"""The sampler's engine as a process of its own: what it says at start, and in parts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from mint_core.engine_host.process import EngineProcess
from mint_core.errors import Unavailable
from sampler_service.config import SamplerConfig
from sampler_service.jobs import (
    BASE_MODEL,
    Choice,
    Generate,
    Generated,
    SamplePart,
    Sampling,
    Stops,
)

LIMIT_S = 60.0
KV_CACHE_TOKENS = 2048


def generate(request_id: int, *, stream: bool = False) -> Generate:
    sampling = Sampling(
        prompt=np.arange(3, 40), num_samples=3, max_tokens=20, choice=Choice(seed=5)
    )
    return Generate(request_id=request_id, adapter=BASE_MODEL, sampling=sampling, stream=stream)


@asynccontextmanager
async def running(model: Path) -> AsyncIterator[EngineProcess]:
    config = SamplerConfig(
        base_model=str(model),
        store=str(model / "store"),
        device="cpu",
        kv_cache_tokens=KV_CACHE_TOKENS,
    )
    engine = EngineProcess("sampler_service.engine", config)
    async with asyncio.timeout(LIMIT_S):
        await engine.start()
        try:
            yield engine
        finally:
            await engine.close()


async def test_parts_come_through_the_pipe_before_the_answer(qwen3_folder: Path) -> None:
    async with running(qwen3_folder) as engine:
        assert (await engine.hello()).kv_cache_tokens == KV_CACHE_TOKENS
        parts: list[SamplePart] = []
        whole, streamed = await asyncio.gather(
            engine.call(generate(1)),
            engine.call(generate(2, stream=True), on_part=parts.append),
        )
    assert isinstance(streamed, Generated)
    assert streamed.continuations == ()
    for index, continuation in enumerate(whole.continuations):
        own = [part for part in parts if part.sample == index]
        assert [t for part in own for t in part.tokens] == continuation.tokens.tolist()
        assert [part.stop_reason for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].stop_reason == continuation.stop_reason


async def test_a_flood_of_requests_that_are_long_to_read_leaves_passes_between_them(
    qwen3_folder: Path,
) -> None:
    texts = tuple(f"{i:03} {'x' * 300}" for i in range(256))
    sampling = replace(generate(0).sampling, num_samples=1, max_tokens=1, stops=Stops(texts=texts))
    async with running(qwen3_folder) as engine:
        begun = asyncio.Event()
        sample = asyncio.create_task(
            engine.call(generate(1, stream=True), on_part=lambda part: begun.set())
        )
        await begun.wait()
        flood = [
            asyncio.create_task(engine.call(replace(generate(number), sampling=sampling)))
            for number in range(2, 102)
        ]
        await sample
        assert sum(task.done() for task in flood) < len(flood) // 2
    with suppress(Unavailable):
        await asyncio.gather(*flood)
