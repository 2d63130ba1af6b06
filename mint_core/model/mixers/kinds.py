"""Which layers of a model have a mixer of ours in the place of their code, and whether a row's bits
depend on others there.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mint_core.model.mixers.gated_delta_net import GatedDeltaNet
from mint_core.model.mixers.mamba import Mamba
from mint_core.model.mixers.mixer import Inputs, Mixer, MixerContext, States, no_states
from mint_core.model.mixers.runs import Runs
from mint_core.model.mixers.short_convolution import ShortConvolution

KINDS = (GatedDeltaNet, Mamba, ShortConvolution)
_TRIED_ROWS = (5, 70, 33, 1)  # of documents side by side


def mixing_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The modules that have the parts of a kind, by number of the layer. Whether it is that kind
    shows when the model is proved.
    """
    found = (module for module in model.modules() if any(kind.fits(module) for kind in KINDS))
    return {_layer_index(module): module for module in found}


def install_mixers(layers: Mapping[int, nn.Module], context: MixerContext) -> dict[int, Mixer]:
    """Gives the modules their mixers."""
    mixers: dict[int, Mixer] = {}
    for index, module in layers.items():
        kind = next(kind for kind in KINDS if kind.fits(module))
        mixers[index] = module.forward = kind(module, context)
    return mixers


def states_before(mixer: Mixer, inputs: Inputs, places: Sequence[int]) -> States:
    """Of sequences that have seen so many of the first rows each, handed on once on the way."""
    device = inputs[0].device
    found = []
    for place in places:
        states = no_states(mixer, 1, device)
        for start, stop in ((0, place // 2), (place // 2, place)):
            rows = tuple(x[start:stop] for x in inputs)
            _, states = mixer.whole(rows, Runs([(0, stop - start)], stop - start, device), states)
        found.append(states)
    return tuple(map(torch.cat, zip(*found, strict=True)))


@torch.no_grad()
def documents_are_alike(mixers: Iterable[Mixer]) -> bool:
    """Whether documents get the same, bit for bit, alone and side by side, and rows of sequences
    that decode do.
    """
    by_shape = {(type(mixer), mixer.input_widths): mixer for mixer in mixers}
    return all(_alike(mixer) for mixer in by_shape.values())


def _alike(mixer: Mixer) -> bool:
    generator = torch.Generator().manual_seed(0)
    total = sum(_TRIED_ROWS)
    inputs = tuple(torch.randn(total, w, generator=generator) for w in mixer.input_widths)
    stops = [sum(_TRIED_ROWS[: place + 1]) for place in range(len(_TRIED_ROWS))]
    spans = [(stop - rows, stop) for rows, stop in zip(_TRIED_ROWS, stops, strict=True)]
    whole = _mixed(mixer, inputs, spans)
    each = mixer.step(inputs, no_states(mixer, total, inputs[0].device))[0]
    for start, stop in spans:
        own = tuple(x[start:stop] for x in inputs)
        alone = _mixed(mixer, own, [(0, stop - start)])
        states = no_states(mixer, stop - start, inputs[0].device)
        if not torch.equal(alone, whole[start:stop]):
            return False
        if not torch.equal(mixer.step(own, states)[0], each[start:stop]):
            return False
    return True


def _mixed(mixer: Mixer, inputs: Inputs, spans: list[tuple[int, int]]) -> torch.Tensor:
    runs = Runs(spans, len(inputs[0]), inputs[0].device)
    return mixer.whole(inputs, runs, None)[0]


def _layer_index(module: Any) -> int:
    return int(module.layer_idx)
