"""Keys and values of what was computed, in blocks, and attention over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from mint_core.lora.layers import MIN_ROWS, Segment
from mint_core.model.attention import PackedAttention
from mint_core.model.attention_kernels import Scores, causal_attention
from mint_core.model.loading import LoadedBase
from sampler_service.engine.blocks import BLOCK_TOKENS

FREE_SHARE = 0.4  # of free memory: adapters, activations and a trainer beside us want some too


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Of one layer's keys and values."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
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

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        self.shapes[layer_index] = LayerShape(key.shape[0], key.shape[2], value.shape[2], key.dtype)
        return super().attend(layer_index, query, key, value, scores)


def affordable_tokens(shapes: dict[int, LayerShape], device: torch.device) -> int:
    """How many tokens' keys and values free memory holds."""
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    return int(FREE_SHARE * free / sum(shape.token_bytes for shape in shapes.values()))


class KvCache:
    """The keys and values of every layer, [blocks, block tokens, heads, head size].

    On a CPU the system gives a block memory when it is first written.
    """

    def __init__(self, shapes: dict[int, LayerShape], blocks: int, device: torch.device) -> None:
        def empty(shape: LayerShape, size: int) -> Tensor:
            return torch.empty(
                (blocks, BLOCK_TOKENS, shape.heads, size), dtype=shape.dtype, device=device
            )

        self._layers = {
            index: (empty(shape, shape.key_size), empty(shape, shape.value_size))
            for index, shape in shapes.items()
        }

    def layer(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, as they lie."""
        return self._layers[layer_index]

    def copy(self, source: int, target: int) -> None:
        """Copies a block in every layer."""
        for layer in self._layers.values():
            for part in layer:
                part[target] = part[source]

    def write(
        self,
        layer_index: int,
        slots: Tensor,  # [rows] block number * BLOCK_TOKENS + place in the block
        key: Tensor,  # [heads, rows, head size]
        value: Tensor,  # [heads, rows, head size]
    ) -> None:
        for part, rows in zip(self._layers[layer_index], (key, value), strict=True):
            part.flatten(0, 1)[slots] = rows.transpose(0, 1)

    def read(self, layer_index: int, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The first `tokens` keys and values of a sequence, each [heads, tokens, head size]."""
        key, value = self._layers[layer_index]
        return _sequence(key, blocks, tokens), _sequence(value, blocks, tokens)


def _sequence(part: Tensor, blocks: Tensor, tokens: int) -> Tensor:  # [heads, tokens, head size]
    return part[blocks].flatten(0, 1)[:tokens].transpose(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class CachedRows:
    """Rows of the stream that continue one sequence, whose earlier tokens are in the cache."""

    start: int  # in the stream
    stop: int
    blocks: Tensor  # [blocks] of the sequence
    tokens: int  # of the sequence, these rows included


class CachedAttention:
    """Each sequence attends to its own cache, which its new rows enter first.

    Sequences are computed one by one: what a sequence gets does not depend on the others.
    """

    def __init__(
        self,
        cache: KvCache,
        sequences: Sequence[CachedRows],
        real: Tensor,  # [rows] places in the stream that are not padding
        slots: Tensor,  # [rows] where their keys and values go
        progress: Callable[[], None],  # called in every layer
    ) -> None:
        self._cache = cache
        self._sequences = sequences
        self._real = real
        self._slots = slots
        self._progress = progress

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        self._progress()
        self._cache.write(layer_index, self._slots, key[:, self._real], value[:, self._real])
        output = query.new_zeros((*query.shape[:2], value.shape[2]))
        for rows in self._sequences:
            keys, values = self._cache.read(layer_index, rows.blocks, rows.tokens)
            output[:, rows.start : rows.stop] = causal_attention(
                query[:, rows.start : rows.stop], keys, values, scores
            )
        return output
