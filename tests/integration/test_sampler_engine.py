"""The sampler's engine as a process of its own: what it says at start, and in parts."""

import asyncio
from pathlib import Path

import numpy as np

from mint_core.engine_host.process import EngineProcess
from sampler_service.config import SamplerConfig
from sampler_service.jobs import BASE_MODEL, Choice, Generate, Generated, SamplePart, Sampling

LIMIT_S = 60.0
KV_CACHE_TOKENS = 2048


def generate(request_id: int, *, stream: bool = False) -> Generate:
    sampling = Sampling(
        prompt=np.arange(3, 40), num_samples=3, max_tokens=20, choice=Choice(seed=5)
    )
    return Generate(request_id=request_id, adapter=BASE_MODEL, sampling=sampling, stream=stream)


async def test_parts_come_through_the_pipe_before_the_answer(qwen3_folder: Path) -> None:
    config = SamplerConfig(
        base_model=str(qwen3_folder),
        store=str(qwen3_folder / "store"),
        device="cpu",
        kv_cache_tokens=KV_CACHE_TOKENS,
    )
    engine = EngineProcess("sampler_service.engine", config)
    async with asyncio.timeout(LIMIT_S):
        hello = await engine.start()
        try:
            assert hello.kv_cache_tokens == KV_CACHE_TOKENS
            parts: list[SamplePart] = []
            whole, streamed = await asyncio.gather(
                engine.call(generate(1)),
                engine.call(generate(2, stream=True), on_part=parts.append),
            )
        finally:
            await engine.close()
    assert isinstance(streamed, Generated)
    assert streamed.continuations == ()
    for index, continuation in enumerate(whole.continuations):
        own = [part for part in parts if part.sample == index]
        assert [t for part in own for t in part.tokens] == continuation.tokens.tolist()
        assert [part.stop_reason for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].stop_reason == continuation.stop_reason
