"""Parts on their way to a reader who may be slower than the engine."""

import asyncio
import random
import tracemalloc
from array import array

import numpy as np
import pytest

from mint_core.errors import Aborted, EngineFault
from sampler_service.jobs import SamplePart, StopReason
from sampler_service.parts import PartBuffer, TokensDiffer

LIMIT_S = 10.0


def part(index: int, tokens: list[int], stop_reason: StopReason | None = None) -> SamplePart:
    logprobs = tuple(float(np.float32(-0.1 * token)) for token in tokens)
    model_logprobs = tuple(2 * logprob for logprob in logprobs)
    return SamplePart(index, tuple(tokens), logprobs, model_logprobs, stop_reason)


async def rest(parts: PartBuffer) -> list[SamplePart]:
    """What a reader gets of parts that are finished."""
    finished = asyncio.create_task(parts.finish())
    await asyncio.sleep(0)
    assert not finished.done()
    got = [each async for each in parts]
    await asyncio.wait_for(finished, LIMIT_S)
    return got


async def test_a_reader_that_keeps_up_gets_each_part() -> None:
    parts, sent = PartBuffer(), [part(0, [1]), part(1, [2]), part(0, [3], StopReason.STOP)]
    reader = aiter(parts)
    for each in sent:
        parts.put(each)
        assert await anext(reader) == each
    assert await rest(parts) == []
    assert parts.tokens == 3


async def test_parts_that_wait_become_one_per_continuation() -> None:
    parts = PartBuffer()
    for each in (part(1, [5]), part(0, [1]), part(1, [6, 7]), part(0, [], StopReason.LENGTH)):
        parts.put(each)
    assert await rest(parts) == [
        part(1, [5, 6, 7]),
        part(0, [1], StopReason.LENGTH),
    ]


async def test_an_error_comes_after_what_is_there() -> None:
    parts = PartBuffer()
    reader = aiter(parts)
    parts.put(part(0, [1]))
    parts.fail(EngineFault("it died"))
    assert await anext(reader) == part(0, [1])
    with pytest.raises(EngineFault, match="it died"):
        await anext(reader)


async def test_what_the_next_engine_sends_again_is_told_once() -> None:
    parts = PartBuffer()
    parts.begin("a@1")
    for each in (part(0, [1, 2]), part(1, [5], StopReason.STOP)):
        parts.put(each)
    assert await anext(aiter(parts)) == part(0, [1, 2])

    parts.begin("a@1")
    for each in (part(1, [5], StopReason.STOP), part(0, [1]), part(0, [2, 3], StopReason.LENGTH)):
        parts.put(each)

    assert await rest(parts) == [
        part(1, [5], StopReason.STOP),
        part(0, [3], StopReason.LENGTH),
    ]
    assert parts.tokens == 4


async def test_an_engine_that_draws_other_tokens_is_found_out() -> None:
    parts = PartBuffer()
    parts.put(part(0, [1, 2]))
    parts.begin("a@1")
    parts.put(part(0, [1]))
    with pytest.raises(TokensDiffer, match=r"continuation 0 .* from token 1 on"):
        parts.put(part(0, [3]))


async def test_a_waiting_reader_is_woken() -> None:
    parts = PartBuffer()
    told = aiter(parts)
    reader = asyncio.ensure_future(anext(told))
    await asyncio.sleep(0)
    parts.put(part(0, [1]))
    assert await asyncio.wait_for(reader, LIMIT_S) == part(0, [1])
    reader = asyncio.ensure_future(anext(told, None))
    await asyncio.sleep(0)
    await asyncio.wait_for(parts.finish(), LIMIT_S)
    assert await asyncio.wait_for(reader, LIMIT_S) is None


async def test_any_pace_gives_the_same_tokens() -> None:
    chance = random.Random(0)
    for _ in range(50):
        parts, sent, read = PartBuffer(), [[0], [0], [0]], [[0], [0], [0]]

        async def write(parts: PartBuffer = parts, sent: list[list[int]] = sent) -> None:
            for token in range(1, 60):
                index = chance.randrange(3)
                sent[index].append(token)
                parts.put(part(index, [token]))
                if chance.random() < 0.3:
                    await asyncio.sleep(0)
            await parts.finish()

        task = asyncio.create_task(write())
        async for each in parts:
            read[each.sample].extend(each.tokens)
            assert each == part(each.sample, list(each.tokens))
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
        await asyncio.wait_for(task, LIMIT_S)
        assert read == sent


def received(*tokens: list[int]) -> list["array[int]"]:
    return [array("i", each) for each in tokens]


async def test_what_a_reader_has_comes_again_and_is_left_out() -> None:
    parts = PartBuffer(received([1, 2], [5, 6], []))
    for each in (part(0, [1]), part(1, [5, 6], StopReason.STOP), part(0, [2, 3]), part(2, [9])):
        parts.put(each)
    assert await rest(parts) == [part(1, [], StopReason.STOP), part(0, [3]), part(2, [9])]


@pytest.mark.parametrize(
    "again", [part(0, [1, 3]), part(0, [1], StopReason.STOP), part(0, [7]), part(0, [1, 2, 9])]
)
async def test_a_reader_with_other_tokens_is_found_out(again: SamplePart) -> None:
    parts = PartBuffer(received([1, 2, 3]))
    with pytest.raises(TokensDiffer, match="continuation 0 cannot go on"):
        parts.put(again)


async def test_another_reader_goes_on_behind_what_he_has() -> None:
    parts = PartBuffer(received([], []), keep=True)
    first = aiter(parts)
    for each in (part(0, [1, 2]), part(1, [5], StopReason.STOP)):
        parts.put(each)
        assert await anext(first) == each
    assert not parts.resume(received([1, 2, 3], []))  # more than has come
    assert not parts.resume(received([2], []))  # other tokens

    assert parts.resume(received([1], [5]))  # the rest was lost on the way
    parts.put(part(0, [3]))
    second = aiter(parts)
    assert await anext(second) == part(0, [2, 3])
    assert await anext(second) == part(1, [], StopReason.STOP)
    with pytest.raises(Aborted, match="another call"):
        await anext(first)
    parts.put(part(0, [4], StopReason.LENGTH))
    assert await anext(second) == part(0, [4], StopReason.LENGTH)


async def test_what_is_not_kept_cannot_be_read_again() -> None:
    parts = PartBuffer(received([]))
    parts.put(part(0, [1, 2]))
    await anext(aiter(parts))
    assert not parts.resume(received([1]))


async def test_what_waits_takes_little_memory() -> None:
    tokens = 10_000
    parts = PartBuffer()
    tracemalloc.start()
    try:
        for token in range(tokens):
            parts.put(part(token % 4, [token]))
        used_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used_bytes < 20 * tokens
