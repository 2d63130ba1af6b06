"""Keys and values of what was computed, in blocks."""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mint_core.lora.layers import MIN_ROWS, Segment
from mint_core.model.attention import PackedAttention
from mint_core.model.attention_kernels import Scores
from mint_core.model.loading import LoadedBase
from sampler_service.engine.cache.blocks import BLOCK_TOKENS
from sampler_service.engine.cache.pages import fresh_zeros
from sampler_service.engine.cache.state_cache import StateCache

ROOM_BYTES = 64 * 2**20  # into which blocks of several sequences are gathered at a time


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Of one layer's keys and values."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    shared_with: int | None = None  # an earlier layer, whose keys and values they are

    @property
    def token_bytes(self) -> int:
        if self.shared_with is not None:
            return 0
        return self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


@torch.inference_mode()
def layer_shapes(base: LoadedBase) -> dict[int, LayerShape]:
    """What each layer asks to be kept, learnt from a pass over a few tokens."""
    probe = _Probe()
    tokens = torch.zeros(MIN_ROWS, dtype=torch.int64, device=base.device)
    base.hidden(tokens, torch.arange(MIN_ROWS, device=base.device), (Segment(0, MIN_ROWS),), probe)
    return probe.shapes


class _Probe(PackedAttention):
    def __init__(self) -> None:
        super().__init__([0, MIN_ROWS])
        self.shapes: dict[int, LayerShape] = {}
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        shared = (i for i, seen in self._seen.items() if _same(seen, (key, value)))
        self.shapes[layer_index] = LayerShape(
            key.shape[0], key.shape[2], value.shape[2], key.dtype, next(shared, None)
        )
        self._seen[layer_index] = key, value
        return super().attend(layer_index, query, key, value, scores)


def _same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> bool:
    """Whether they are views of the same memory, not only of the same values."""
    return all(a.data_ptr() == b.data_ptr() for a, b in zip(ours, theirs, strict=True))


class KvCache:
    """The keys and values of every layer, [blocks, block tokens, heads, head size].

    All is finite at any time but for what a broken adapter computed: whoever starts a block clears
    it first, so that what is read and masked in one pass with others' tokens does them no harm. On
    a CPU the system gives a block memory when it is first written, and `give_back` returns it.
    """

    def __init__(
        self,
        shapes: dict[int, LayerShape],
        blocks: int,
        device: torch.device,
        states: StateCache | None = None,  # of layers that have no keys and values
    ) -> None:
        def zeros(shape: LayerShape, size: int) -> Tensor:
            dimensions = blocks, BLOCK_TOKENS, shape.heads, size
            tensor, pages = fresh_zeros(dimensions, shape.dtype, device)
            if pages is not None:
                self._pages.append((pages, tensor.nbytes // blocks))
            return tensor

        self.states = states or StateCache({}, 0, device)
        self._pages: list[tuple[mmap.mmap, int]] = []  # with the bytes of a block
        own = {
            index: (zeros(shape, shape.key_size), zeros(shape, shape.value_size))
            for index, shape in shapes.items()
            if shape.shared_with is None
        }
        self._parts = [part for layer in own.values() for part in layer]
        keepers = {
            index: index if shape.shared_with is None else shape.shared_with
            for index, shape in shapes.items()
        }
        self._layers = {index: own[keeper] for index, keeper in keepers.items()}
        # Where blocks are gathered: fresh memory for it would be paged in for every layer.
        self._rooms: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
        self.block_bytes = BLOCK_TOKENS * sum(shape.token_bytes for shape in shapes.values())
        self.room_blocks = ROOM_BYTES // max(part[0].nbytes for part in self._parts)

    def give_back(self, blocks: Sequence[int]) -> None:
        """Returns the memory of blocks, in order, to the system. They hold zeros then, or what they
        held.
        """
        for pages, block_bytes in self._pages:
            for first, stop in _runs(blocks):
                start = -(-first * block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
                size_bytes = stop * block_bytes // mmap.PAGESIZE * mmap.PAGESIZE - start
                if size_bytes > 0:
                    pages.madvise(mmap.MADV_DONTNEED, start, size_bytes)

    def layer(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, as they lie."""
        return self._layers[layer_index]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks in every layer, (from, to), in order."""
        for part in self._parts:
            for source, target in pairs:
                part[target] = part[source]

    def clear(self, blocks: Tensor) -> None:  # [blocks]
        """Fills blocks with zeros in every layer."""
        for part in self._parts:
            part.index_fill_(0, blocks, 0.0)

    def write(
        self,
        layer_index: int,
        slots: Tensor,  # [rows] block number * BLOCK_TOKENS + place in the block
        key: Tensor,  # [heads, rows, head size]
        value: Tensor,  # [heads, rows, head size]
    ) -> None:
        for part, rows in zip(self._layers[layer_index], (key, value), strict=True):
            part.flatten(0, 1).index_copy_(0, slots, rows.transpose(0, 1))

    def read(self, layer_index: int, blocks: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
        """The keys and values of `count` sequences of as many blocks each, whose numbers `blocks`
        [count * blocks] holds one after the other; each [count, heads, tokens, head size]. They are
        good until the next read.
        """
        key, value = (
            self._gather(place, part, blocks)
            .view(count, -1, *part.shape[2:])  # [count, tokens, heads, head size]
            .transpose(1, 2)
            for place, part in enumerate(self._layers[layer_index])
        )
        return key, value

    def _gather(self, place: int, part: Tensor, blocks: Tensor) -> Tensor:
        name = place, part.shape[1:], part.dtype
        room = self._rooms.get(name)
        if room is None or len(room) < len(blocks):
            room = self._rooms[name] = part.new_empty(2 * len(blocks), *part.shape[1:])
        return torch.index_select(part, 0, blocks, out=room[: len(blocks)])


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where rising numbers follow each other: the first and one beyond the last."""
    first = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[first], numbers[at - 1] + 1
            first = at
