"""Attention over cached blocks equals attention over the whole sequence, whoever is beside it."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mint_core.model.attention_kernels import Scores, causal_attention
from sampler_service.engine.cache.blocks import BLOCK_TOKENS, blocks_for
from sampler_service.engine.cache.cached_attention import CachedAttention, CachedRows, filled_up
from sampler_service.engine.cache.kv_cache import KvCache, LayerShape

HEADS, KEY_HEADS, SIZE = 6, 2, 16
CPU = torch.device("cpu")
LENGTHS = (1, 2, 15, 16, 17, 40, 64, 65, 100, 200)
NEW_TOKENS = {17: 17, 40: 9, 65: 64}  # by length; of the others one


class Sequences:
    """Keys and values of sequences whose blocks lie anywhere in a cache of used memory."""

    def __init__(self, lengths: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        size = 2 * sum(map(blocks_for, lengths))
        self.cache = KvCache({0: LayerShape(KEY_HEADS, SIZE, SIZE, torch.float32)}, size, CPU)
        rubbish = torch.full((KEY_HEADS, size * BLOCK_TOKENS, SIZE), torch.nan)
        self.cache.write(0, torch.arange(size * BLOCK_TOKENS), rubbish, rubbish)
        numbers = iter(torch.randperm(size, generator=generator).tolist())
        self.blocks = [[next(numbers) for _ in range(blocks_for(n))] for n in lengths]
        self.lengths = lengths
        self.keys, self.values = (
            [torch.randn(KEY_HEADS, n, SIZE, generator=generator) for n in lengths]
            for _ in range(2)
        )
        self.queries = [torch.randn(HEADS, n, SIZE, generator=generator) for n in lengths]

    def attend(self, members: Sequence[int], scores: Scores, padding: int = 0) -> list[Tensor]:
        """What each member's new tokens get, computed in one stream, after the earlier ones."""
        for i in members:
            new = NEW_TOKENS.get(self.lengths[i], 1)
            if new < self.lengths[i]:
                self._pass([(i, 0, self.lengths[i] - new)], scores, 0)
        return self._pass(
            [
                (i, self.lengths[i] - NEW_TOKENS.get(self.lengths[i], 1), self.lengths[i])
                for i in members
            ],
            scores,
            padding,
        )

    def _pass(
        self, parts: Sequence[tuple[int, int, int]], scores: Scores, padding: int
    ) -> list[Tensor]:
        rows, at = [], 0
        for i, start, stop in parts:
            rows.append(CachedRows(at, at + stop - start, self.blocks[i], stop))
            at += stop - start + padding
        attention = CachedAttention(self.cache, CPU, rows)
        query, key, value = (
            torch.cat(
                [
                    torch.nn.functional.pad(of[i][:, start:stop], (0, 0, 0, padding))
                    for i, start, stop in parts
                ],
                dim=1,
            )
            for of in (self.queries, self.keys, self.values)
        )
        output = attention.attend(0, query, key, value, scores)
        return [output[:, r.start : r.stop].clone() for r in rows]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    "scores",
    [
        Scores(0.25),
        Scores(0.25, sliding_window=20),
        Scores(0.25, sliding_window=16),
        Scores(0.25, softcap=5.0),
    ],
)
def test_cached_rows_get_what_the_whole_sequence_gives(scores: Scores, padding: int) -> None:
    sequences = Sequences(LENGTHS)
    got = sequences.attend(range(len(LENGTHS)), scores, padding)
    for i, own in enumerate(got):
        query, key, value = sequences.queries[i], sequences.keys[i], sequences.values[i]
        whole = causal_attention(query, key, value, scores)
        torch.testing.assert_close(own, whole[:, -own.shape[1] :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("scores", [Scores(0.25), Scores(0.25, sliding_window=20)])
def test_a_sequence_gets_the_same_bits_alone(scores: Scores) -> None:
    together = Sequences(LENGTHS).attend(range(len(LENGTHS)), scores)
    backwards = Sequences(LENGTHS).attend(range(len(LENGTHS))[::-1], scores)[::-1]
    for i, own in enumerate(together):
        (alone,) = Sequences(LENGTHS).attend([i], scores)
        assert torch.equal(own, alone)
        assert torch.equal(own, backwards[i])


def test_sizes_hold_what_they_are_for_and_waste_a_third_at_most() -> None:
    for blocks in range(1, 600):
        assert blocks <= filled_up(blocks) <= max(2, 1.5 * blocks)
