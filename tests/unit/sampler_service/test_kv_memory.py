"""The memory of the key/value cache: taken when it is needed, and given back."""

import mmap
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from mint_core.errors import FailedPrecondition
from mint_core.model.base import LoadedBase
from sampler_service.config import SamplerConfig
from sampler_service.engine import memory
from sampler_service.engine.cache.blocks import BLOCK_TOKENS, BlockPool, next_key
from sampler_service.engine.cache.kv_cache import KvCache, LayerShape
from sampler_service.engine.memory import KEPT_BYTES, MOST_BYTES, Sparing, cache_size
from tests.models import load_base

CPU = torch.device("cpu")
BLOCKS = 4096
# Of 12.5 KiB a block: where one ends is not where a page does.
SHAPE = LayerShape(4, 50, 50, torch.float32)
PART_BYTES = BLOCK_TOKENS * SHAPE.token_bytes // 2


def test_memory_comes_when_blocks_are_written_and_goes_when_they_are_given_back() -> None:
    process = psutil.Process()
    cache = KvCache({0: SHAPE, 1: SHAPE}, BLOCKS, CPU)
    before = process.memory_info().rss
    cache.clear(torch.arange(BLOCKS // 2))
    written = process.memory_info().rss - before
    assert written < 0.6 * BLOCKS * cache.block_bytes
    cache.give_back(range(BLOCKS))
    assert process.memory_info().rss - before < 0.1 * written


def test_giving_back_touches_no_other_block() -> None:
    cache = KvCache({0: SHAPE}, 64, CPU)
    for part in cache.layer(0):
        part.copy_(torch.rand_like(part) + 1.0)
    before = [part.clone() for part in cache.layer(0)]
    given = [0, 1, 2, 7, 20, 21, 22, 23, 63]
    cache.give_back(given)
    stay = [block for block in range(64) if block not in given]
    for part, old in zip(cache.layer(0), before, strict=True):
        assert torch.equal(part[stay], old[stay])
        freed = part[20:24].flatten()
        assert (freed == 0).sum() * 4 > 4 * PART_BYTES - 2 * mmap.PAGESIZE


def test_layers_that_share_keys_and_values_have_them_once() -> None:
    own = KvCache({0: SHAPE, 1: SHAPE}, 64, CPU)
    shared = KvCache({0: SHAPE, 1: replace(SHAPE, shared_with=0)}, 64, CPU)
    assert shared.block_bytes == own.block_bytes / 2
    rows = torch.rand(4, 3, 50)
    shared.write(0, torch.arange(3), rows, rows)
    shared.copy([(0, 5)])
    keys, _ = shared.read(1, torch.tensor([5]))
    assert torch.equal(keys[0, :, :3], rows)


def key_of(number: int) -> bytes:
    return next_key(b"", [number])


def filled_pool(held: int, kept: int, blank: int) -> BlockPool:
    pool = BlockPool(BLOCKS)
    blocks = [pool.take() for _ in range(held + kept + blank)]
    for number, block in enumerate(blocks[: held + kept]):
        pool.keep(key_of(number), block, BLOCK_TOKENS)
    for block in blocks[held:]:
        pool.release([block])
    return pool


def test_what_is_kept_beyond_the_share_goes_back_and_what_is_held_stays() -> None:
    pool, cache = filled_pool(held=30, kept=40, blank=10), KvCache({0: SHAPE}, BLOCKS, CPU)
    Sparing(pool, cache, kept=50).spare(2**60)
    assert pool.used == 50
    # Of the 30 that go 10 were blank: the others were released first.
    assert [n for n in range(70) if pool.find(key_of(n)) is None] == list(range(30, 50))
    Sparing(pool, cache, kept=10).spare(2**60)
    assert pool.used == 30


@pytest.mark.parametrize("lacking_blocks", [1, 25, 10_000])
def test_a_host_short_of_memory_gets_what_it_lacks(lacking_blocks: int) -> None:
    pool, cache = filled_pool(held=30, kept=40, blank=0), KvCache({0: SHAPE}, BLOCKS, CPU)
    spare = min(memory.SPARE_BYTES, psutil.virtual_memory().total // 8)
    free = spare - lacking_blocks * cache.block_bytes
    Sparing(pool, cache, kept=BLOCKS).spare(free)
    assert pool.used == 70 - min(lacking_blocks, 40)


@pytest.fixture(scope="module")
def base(qwen3_folder: Path) -> LoadedBase:
    return load_base(str(qwen3_folder), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("settings", "context", "most_bytes", "kept_bytes"),
    [
        ({}, 1024, MOST_BYTES, KEPT_BYTES),
        ({}, 2**30, None, KEPT_BYTES),  # a context that memory does not hold: the share
        ({"kv_cache_tokens": 1024}, 1024, 2**30, 2**30),
        ({"replicas": 2}, 1024, MOST_BYTES / 2, KEPT_BYTES / 2),  # of each
        ({"replicas": 4}, 2048, 2 * 2**30, KEPT_BYTES / 4),  # but a context
        ({"replicas": 2, "kv_cache_tokens": 1024}, 1024, 2**30, 2**30),
    ],
)
def test_a_cache_on_a_cpu_is_modest_unless_a_context_or_its_owner_wants_more(
    base: LoadedBase,
    settings: dict[str, int],
    context: int,
    most_bytes: float | None,
    kept_bytes: float,
) -> None:
    shapes = [LayerShape(1024, 128, 128, torch.float32)]  # 1 MiB a token
    wide = replace(base, description=replace(base.description, context_length=context))
    config = SamplerConfig(base_model="m", **settings)  # type: ignore[arg-type]
    share = int(memory.CACHE_SHARE * psutil.virtual_memory().available / config.sharers)
    most, kept, _ = cache_size(config, wide, shapes)
    block_bytes = BLOCK_TOKENS * 2**20
    assert kept * block_bytes == min(kept_bytes, share // block_bytes * block_bytes)
    if most_bytes is None:
        assert most * block_bytes == pytest.approx(share, rel=0.1)
    else:
        assert most * block_bytes == min(most_bytes, share // block_bytes * block_bytes)


def test_a_cache_keeps_within_the_share_of_memory_that_is_its_own(base: LoadedBase) -> None:
    shapes = [LayerShape(1024, 128, 128, torch.float32)]  # 1 MiB a token
    total, own = psutil.virtual_memory().total, psutil.Process().memory_info().rss
    for replicas in (1, 2):
        share = replicas * (own + 2**30) / total
        size = cache_size(SamplerConfig(memory_share=share, replicas=replicas), base, shapes)
        expected = pytest.approx(memory.OWN_CACHE_SHARE * 2**30, rel=0.1)
        assert size.most * BLOCK_TOKENS * 2**20 == expected
    with pytest.raises(FailedPrecondition, match="key/value cache"):
        cache_size(SamplerConfig(memory_share=0.5 * own / total), base, shapes)
