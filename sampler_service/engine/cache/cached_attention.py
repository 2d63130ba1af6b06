"""Attention of a step's rows over the key/value cache, which the rows enter first; and what mixes
them through states, which they change when the step is done.

n: sequences that decode, one row each. T: rows of the stream.

What a sequence gets depends on its own length and rows alone. Sequences that decode are computed
together where their blocks are about as many: how far a sequence is filled up follows from its own
length, and the kernel computes one sequence after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mint_core.model.attention_kernels import Scores, causal_attention
from mint_core.model.mixers.mixer import Inputs, Mixer, States
from mint_core.model.mixers.runs import Runs
from sampler_service.engine.cache.blocks import BLOCK_TOKENS, blocks_for
from sampler_service.engine.cache.kv_cache import KvCache


@dataclass(frozen=True, slots=True, eq=False)
class CachedRows:
    """Rows of the stream that continue one sequence, whose earlier tokens are in the cache."""

    start: int  # in the stream
    stop: int
    blocks: Sequence[int]  # of the sequence, at least as many as its tokens take
    tokens: int  # of the sequence, these rows included


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Sequences that decode, with as many blocks each."""

    rows: Tensor  # [n] places in the stream
    blocks: Tensor  # [n * blocks]
    seen: Tensor  # [n, 1, 1, tokens of the blocks] bool


class CachedAttention:
    """One step's attention."""

    def __init__(
        self,
        cache: KvCache,
        device: torch.device,
        rows: Sequence[CachedRows],  # as they lie in the stream
        progress: Callable[[], None] = lambda: None,  # called in every layer
        slots: Sequence[int] = (),  # of the rows' states, where layers have some
    ) -> None:
        self._cache = cache
        self._device = device
        self._decoding = [r for r in rows if r.stop - r.start == 1]
        self._chunks = [r for r in rows if r.stop - r.start > 1]
        self._progress = progress
        self._real = self._indices([i for r in rows for i in range(r.start, r.stop)])
        self._slots = self._indices([slot for r in rows for slot in _slots(r)])
        self._groups: dict[int | None, list[_Group]] = {}  # by window
        by_rows = list(zip(rows, slots, strict=True)) if slots else []
        self._steps = [(r, slot) for r, slot in by_rows if r.stop - r.start == 1]
        self._longer = [(r, slot) for r, slot in by_rows if r.stop - r.start > 1]
        self._runs: Runs | None = None  # of those that are longer
        self._changed: list[tuple[int, Tensor, States]] = []
        if begun := [slot for r, slot in by_rows if r.tokens == r.stop - r.start]:
            cache.states.clear(self._indices(begun))
        if started := [block for r in rows for block in _started(r)]:
            cache.clear(self._indices(started))

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        self._progress()
        padded = self._real.shape[0] < query.shape[1]
        own_key, own_value = (key[:, self._real], value[:, self._real]) if padded else (key, value)
        self._cache.write(layer_index, self._slots, own_key, own_value)
        make = query.new_zeros if padded else query.new_empty
        output = make(query.shape[1], query.shape[0], value.shape[2])  # [T, heads, size]
        batched = scores.softcap is None and query.shape[2] == value.shape[2]
        for rows in self._chunks if batched else (*self._chunks, *self._decoding):
            part = slice(rows.start, rows.stop)
            if rows.tokens == rows.stop - rows.start:  # all of the sequence is here
                keys, values = key[:, part], value[:, part]
            else:
                keys, values = self._read(layer_index, rows)
            own = causal_attention(query[:, part], keys, values, scores)
            output[part] = own.transpose(0, 1)
        for group in self._grouped(scores.sliding_window) if batched else ():
            self._attend_group(layer_index, group, query, scores, output)
        return output.transpose(0, 1)

    def mix(self, layer_index: int, mixer: Mixer, inputs: Inputs) -> Tensor:
        self._progress()
        states, output = self._cache.states, None
        if self._longer:
            if self._runs is None:
                spans = [(rows.start, rows.stop) for rows, _ in self._longer]
                self._runs = Runs(spans, len(inputs[0]), self._device)
            slots = self._indices([slot for _, slot in self._longer])
            output, after = mixer.whole(inputs, self._runs, states.read(layer_index, slots))
            self._changed.append((layer_index, slots, after))
        if self._steps:
            slots = self._indices([slot for _, slot in self._steps])
            places = self._indices([rows.start for rows, _ in self._steps])
            own = tuple(x.index_select(0, places) for x in inputs)
            mixed, after = mixer.step(own, states.read(layer_index, slots))
            self._changed.append((layer_index, slots, after))
            if output is None:
                output = mixed.new_zeros(len(inputs[0]), mixed.shape[1])
            output.index_copy_(0, places, mixed)
        assert output is not None, "a step has rows"
        return output

    def change_states(self) -> None:
        """To be called once, when nothing of the step is to be computed again: a state that has
        taken a row in would take it in twice.
        """
        for layer_index, slots, states in self._changed:
            self._cache.states.write(layer_index, slots, states)
        self._changed.clear()

    def _read(self, layer_index: int, rows: CachedRows) -> tuple[Tensor, Tensor]:
        blocks = self._indices(rows.blocks[: blocks_for(rows.tokens)])
        key, value = self._cache.read(layer_index, blocks)
        return key[0, :, : rows.tokens], value[0, :, : rows.tokens]

    def _attend_group(
        self, layer_index: int, group: _Group, query: Tensor, scores: Scores, output: Tensor
    ) -> None:
        """Writes the rows of [T, heads, size] that the group's sequences get."""
        count = group.rows.shape[0]
        keys, values = self._cache.read(layer_index, group.blocks, count)
        heads, _, size = query.shape
        # The query heads that share a key head ask as if they were its queries.
        asked = query.index_select(1, group.rows).view(keys.shape[1], -1, count, size)
        got = functional.scaled_dot_product_attention(
            asked.permute(2, 0, 1, 3), keys, values, attn_mask=group.seen, scale=scores.scaling
        )
        output.index_copy_(0, group.rows, got.reshape(count, heads, -1))

    def _grouped(self, window: int | None) -> list[_Group]:
        if window not in self._groups:
            by_size: dict[int, list[tuple[CachedRows, int]]] = {}
            for rows in self._decoding:
                first = 0 if window is None else max(0, rows.tokens - window) // BLOCK_TOKENS
                size = filled_up(blocks_for(rows.tokens) - first)
                by_size.setdefault(size, []).append((rows, first))
            groups = self._groups[window] = []
            for size, members in by_size.items():
                most = max(1, self._cache.room_blocks // size)
                for at in range(0, len(members), most):
                    groups.append(self._group(size, members[at : at + most], window))
        return self._groups[window]

    def _group(
        self, size: int, members: Sequence[tuple[CachedRows, int]], window: int | None
    ) -> _Group:
        table: list[int] = []
        bounds = []
        for rows, first in members:
            own = list(rows.blocks[first : blocks_for(rows.tokens)])
            table += own + own[-1:] * (size - len(own))  # some block whose values are finite
            stop = rows.tokens - first * BLOCK_TOKENS
            bounds.append((0 if window is None else max(0, stop - window), stop))
        limits = torch.tensor(bounds, device=self._device)[:, :, None]
        at = torch.arange(size * BLOCK_TOKENS, device=self._device)
        seen = (at >= limits[:, 0]) & (at < limits[:, 1])
        places = self._indices([rows.start for rows, _ in members])
        return _Group(places, self._indices(table), seen[:, None, None])

    def _indices(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


def filled_up(blocks: int) -> int:
    """The least of 2, 3, 4, 6, 8, 12, 16, 24, ... that holds so many blocks: with few sizes, many
    sequences have the same.
    """
    size = 2
    while size < blocks:
        size *= 2
    return size * 3 // 4 if size >= 4 and size * 3 // 4 >= blocks else size


def _slots(rows: CachedRows) -> Iterator[int]:
    for at in range(rows.tokens - (rows.stop - rows.start), rows.tokens):
        yield rows.blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS


def _started(rows: CachedRows) -> Iterator[int]:
    """The blocks whose first token is among the rows."""
    first = blocks_for(rows.tokens - (rows.stop - rows.start))
    yield from rows.blocks[first : blocks_for(rows.tokens)]
