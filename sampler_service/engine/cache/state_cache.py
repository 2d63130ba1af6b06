"""States of sequences in layers that mix tokens through one: a slot for each sequence, or for the
end of a beginning that is kept.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mint_core.model.mixers.mixer import Mixer, States
from sampler_service.engine.cache.pages import fresh_zeros


class StateCache:
    """Every layer's states, [slots, *sizes] of each part."""

    def __init__(self, mixers: Mapping[int, Mixer], slots: int, device: torch.device) -> None:
        self._layers = {
            index: tuple(
                fresh_zeros((slots, *shape.sizes), shape.dtype, device)[0]
                for shape in mixer.state_shapes
            )
            for index, mixer in mixers.items()
        }
        self.slots = slots
        self.slot_bytes = slot_bytes(mixers)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies slots in every layer, (from, to), in order."""
        for layer in self._layers.values():
            for part in layer:
                for source, target in pairs:
                    part[target] = part[source]

    def clear(self, slots: Tensor) -> None:  # [n]
        """Makes the states those of sequences that begin."""
        for layer in self._layers.values():
            for part in layer:
                part.index_fill_(0, slots, 0.0)

    def read(self, layer_index: int, slots: Tensor) -> States:  # [n]
        """Copies of a layer's states."""
        return tuple(part.index_select(0, slots) for part in self._layers[layer_index])

    def write(self, layer_index: int, slots: Tensor, states: States) -> None:  # [n]
        for part, rows in zip(self._layers[layer_index], states, strict=True):
            part.index_copy_(0, slots, rows)


def slot_bytes(mixers: Mapping[int, Mixer]) -> int:
    """Of one sequence's states."""
    return sum(shape.bytes for mixer in mixers.values() for shape in mixer.state_shapes)
